"""Options that several commands share, and what they mean."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

Device = Annotated[str, Option(help="auto (a GPU if there is one), cpu, cuda or cuda:N.")]
ImplName = Annotated[
    str,
    Option(
        "--impl", help="What computes attention, loss and argmax: auto, triton, sdpa, blocks or reference."
    ),
]
Mode = Annotated[str | None, Option(help="whole image, slide a window, or auto; default: the recipe's.")]
Scales = Annotated[
    str | None, Option(help="Scales to average over, such as 0.5,1.0,1.5; default: the recipe's.")
]
Flip = Annotated[bool | None, Option("--flip/--no-flip", help="Average with the mirrored image too.")]
Fold = Annotated[
    bool | None,
    Option(
        "--fold/--no-fold",
        help="Fold the decoder for inference: the same logits, faster. Default: wherever it can be.",
    ),
]
KeyStride = Annotated[
    int | None,
    Option(
        "--key-stride",
        min=1,
        help="Approximate attention: keys and values are means of so many pixels squared. 1: exact. Default: "
        "the checkpoint's.",
    ),
]
Nproc = Annotated[int | None, Option("--nproc", min=1, help="Processes on this machine, one for each GPU.")]
ClassesFile = Annotated[
    Path | None,
    Option(help="For a folder of your own: TOML of class names; default: its classes.toml."),
]
CheckpointArgument = Annotated[
    Path | None,
    Argument(help="A checkpoint, or a run folder (its best). Default: the newest run under runs/."),
]

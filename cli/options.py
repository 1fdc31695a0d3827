"""Options that several commands share, and what they mean."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from segdeformer.errors import UsageError

if TYPE_CHECKING:
    import torch

    from segdeformer.kernels.impl import Impl

Device = Annotated[str, typer.Option(help="auto (a GPU if there is one), cpu, cuda or cuda:N.")]
ImplName = Annotated[
    str,
    typer.Option(
        "--impl", help="What computes attention, loss and argmax: auto, triton, sdpa, blocks or reference."
    ),
]
Mode = Annotated[
    str | None, typer.Option(help="whole image, or slide a window; default: as the recipe says.")
]
Scales = Annotated[
    str | None, typer.Option(help="Scales to average over, such as 0.5,1.0,1.5; default: the recipe's.")
]
Flip = Annotated[bool | None, typer.Option("--flip/--no-flip", help="Average with the mirrored image too.")]
Fold = Annotated[
    bool | None,
    typer.Option(
        "--fold/--no-fold",
        help="Fold the decoder for inference: the same logits, faster. Default: wherever it can be.",
    ),
]
Nproc = Annotated[
    int | None, typer.Option("--nproc", min=1, help="Processes on this machine, one for each GPU.")
]
ClassesFile = Annotated[
    Path | None,
    typer.Option(help="For a folder of your own: TOML of class names; default: its classes.toml."),
]
CheckpointArgument = Annotated[
    Path | None,
    typer.Argument(help="A checkpoint, or a run folder (its best). Default: the newest run under runs/."),
]


def checked_impl(name: str, device: torch.device) -> Impl:
    """The implementation's name; raises `UsageError` for one that cannot run on this device."""
    from segdeformer.kernels.impl import check_impl

    try:
        return check_impl(name, device)
    except ValueError as error:
        raise UsageError(f"--{error}") from None

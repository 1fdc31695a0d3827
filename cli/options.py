"""Options that several commands share, and what they mean."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from segdeformer.errors import UsageError

if TYPE_CHECKING:
    import torch

    from segdeformer.config import EvalConfig
    from segdeformer.engine.checkpoint import Loaded
    from segdeformer.kernels.impl import Impl

Device = Annotated[str, typer.Option(help="auto (a GPU if there is one), cpu, cuda or cuda:N.")]
ImplName = Annotated[
    str,
    typer.Option(
        "--impl", help="What computes attention, loss and winners: auto, triton, sdpa, blocks or reference."
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


def load_for_inference(
    path: Path, *, device: torch.device, impl: Impl, fold: bool | None
) -> tuple[Loaded, str]:
    """The checkpoint's model, folded as --fold says, and a line that tells whether it is, and why not."""
    from segdeformer.engine.checkpoint import load

    loaded = load(path, device=device, impl=impl, fold=fold)
    obstacle = loaded.model.folding_obstacle
    if fold is None and obstacle is None:
        loaded = loaded._replace(model=loaded.model.fold())
    if loaded.model.is_folded:
        return loaded, "folded for inference: the same logits by one linear layer and narrower attention"
    return loaded, f"not folded: {obstacle or '--no-fold'}"


def changed_protocol(
    protocol: EvalConfig, *, mode: str | None, scales: str | None, flip: bool | None
) -> EvalConfig:
    """The recipe's protocol with what the command line says put in, validated like a recipe."""
    from pydantic import ValidationError

    from segdeformer.config import EvalConfig

    values = protocol.model_dump()
    if mode is not None:
        values["mode"] = mode
    if scales is not None:
        try:
            values["scales"] = [float(scale) for scale in scales.split(",")]
        except ValueError:
            raise UsageError(f"--scales {scales}: expected numbers such as 0.5,1.0,1.5") from None
    if flip is not None:
        values["flip"] = flip
    try:
        return EvalConfig.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        raise UsageError(f"--{first['loc'][0]}: {first['msg']}; got {first['input']!r}") from None

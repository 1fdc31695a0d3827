"""What `eval`, `predict` and scoring begin with: the model, its protocol, where it runs."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from rich.console import Console

from segdeformer.cli.launch import launch
from segdeformer.config import Recipe, change_recipe
from segdeformer.errors import UsageError
from segdeformer.measure.implementation import settle_inference
from segdeformer.models.few_keys import check_key_stride
from segdeformer.runtime import Runtime, choose_runtime
from segdeformer.runtime.distributed import joined_processes, started_by_torchrun
from segdeformer.weights.checkpoint import Loaded, find_checkpoint, load


class Opened(NamedTuple):
    """A model that is ready to look at images."""

    loaded: Loaded
    recipe: Recipe  # with the protocol that the command line says
    runtime: Runtime
    folding: str  # whether it is folded, and why not, in a line


def launched(nproc: int | None) -> bool:
    """Whether this command has run in `nproc` processes, and there is nothing left to do."""
    if nproc is None or nproc == 1 or started_by_torchrun():
        return False
    launch(nproc, sys.argv[1:], max_restarts=0)
    return True


def open_model(
    checkpoint: Path | None,
    *,
    device: str,
    impl: str,
    fold: bool | None = None,
    mode: str | None = None,
    scales: str | None = None,
    flip: bool | None = None,
    key_stride: int | None = None,
) -> Opened:
    """Load a checkpoint, folded as --fold says, and change its protocol; raises what the steps raise."""
    runtime = choose_runtime(device, impl)
    loaded = load(find_checkpoint(checkpoint), device=runtime.device, impl=runtime.impl, fold=fold)
    obstacle = loaded.model.folding_obstacle
    folding = f"not folded: {obstacle or '--no-fold'}"
    if fold is None:
        ready = loaded.model.for_inference()
        folding += "" if ready is loaded.model else "; BatchNorms are"
        loaded = loaded._replace(model=ready)
    if loaded.model.is_folded:
        folding = "folded for inference: the same logits by one linear layer and narrower attention"
    try:
        several = None if scales is None else [float(scale) for scale in scales.split(",")]
    except ValueError:
        raise UsageError(f"--scales {scales}: expected numbers such as 0.5,1.0,1.5") from None
    recipe = change_recipe(
        loaded.checkpoint.recipe, mode=mode, scales=several, flip=flip, key_stride=key_stride
    )
    check_key_stride(loaded.model, recipe.evaluate.key_stride)
    return Opened(loaded, recipe, runtime, folding)


@contextlib.contextmanager
def joined(opened: Opened, console: Console) -> Iterator[Runtime]:
    """Meet the other processes of this command, and settle what `auto` stands for."""
    with joined_processes(opened.runtime.device) as processes:
        runtime = opened.runtime._replace(processes=processes)
        settle_inference(
            opened.loaded.model, opened.recipe, opened.recipe.evaluate, runtime=runtime, say=console.print
        )
        yield runtime

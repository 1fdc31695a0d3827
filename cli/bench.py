"""`segdeformer bench`: measure on this machine."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from segdeformer.cli.errors import one_line_errors

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch
    from rich.console import Console

    from segdeformer.kernels.tune import Event
    from segdeformer.kernels.tune_problems import Problem


@one_line_errors
def bench_command(
    tune: Annotated[
        bool, typer.Option("--tune", help="Find this GPU's fastest tiles, and where they beat PyTorch.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option(help="Write a copy of the measurements here, to share or to ship.")
    ] = None,
    seconds: Annotated[
        float, typer.Option(min=1, help="Stop after about so long; a second run goes on from there.")
    ] = 300.0,
    again: Annotated[
        bool, typer.Option("--again", help="Measure everything anew instead of going on.")
    ] = False,
    device: Annotated[str, typer.Option(help="cuda or cuda:N.")] = "cuda",
) -> None:
    """Measure on this machine: --tune chooses the Triton kernels' tiles for its GPU."""
    from segdeformer.errors import UsageError

    if not tune:
        raise UsageError("nothing to measure: `segdeformer bench --tune` is what there is in this version")
    chosen = _gpu(device)

    import torch

    from segdeformer.cli.show import make_console
    from segdeformer.kernels.tiles import gpu_slug, user_tuned
    from segdeformer.kernels.tune import tune as tune_kernels

    name = torch.cuda.get_device_name(chosen)
    path = user_tuned() / f"{gpu_slug(name)}.json"
    console = make_console()
    console.print(f"{name}, {seconds:.0f} s: every candidate is checked against float64 before it is timed")
    _show(console, tune_kernels(path, chosen, seconds=seconds, again=again, copy=out))
    console.print(f"measurements: {path}{f' and {out}' if out else ''}; `--impl auto` uses them from now on")


def _gpu(name: str) -> torch.device:
    """The CUDA device to tune for; raises `UsageError` when there is none."""
    import importlib.util

    import torch

    from segdeformer.cli.options import checked_impl
    from segdeformer.engine.device import choose_device
    from segdeformer.errors import UsageError

    if not torch.cuda.is_available():
        raise UsageError("bench --tune measures Triton kernels on a CUDA GPU, and PyTorch sees none here")
    if importlib.util.find_spec("triton") is None:
        raise UsageError("bench --tune needs Triton, which is not installed")
    from segdeformer.kernels.launch import interpreting

    if interpreting():
        raise UsageError("TRITON_INTERPRET=1 is set, so no kernel would run on the GPU; unset it")
    device = choose_device(name)
    if device.type != "cuda":
        raise UsageError(f"device is `{name}`; bench --tune needs cuda or cuda:N")
    checked_impl("triton", device)
    return device


def _show(console: Console, events: Iterator[Event]) -> None:
    """A status line for each candidate, a line that stays for each result."""
    from segdeformer.kernels.tune import Tried

    began = time.monotonic()
    with console.status("compiling") as status:
        for event in events:
            line = describe(event)
            status.update(f"{time.monotonic() - began:.0f} s  {line}")
            if not isinstance(event, Tried):
                console.print(line)


def describe(event: Event) -> str:
    """An event of the tuner in one line."""
    from segdeformer.kernels.races import Fought
    from segdeformer.kernels.tune import OutOfTime, Settled, Skipped, Tried

    match event:
        case Tried(problem, tile, outcome):
            result = f"not taken: {outcome}" if isinstance(outcome, str) else f"{outcome:.4f} ms"
            return f"{_problem(problem)}: {tile}: {result}"
        case Settled(problem, tile, best_ms, default_ms, place, num_problems):
            default = (
                "the default tile is not usable" if default_ms is None else f"default {default_ms:.4f} ms"
            )
            return f"{place}/{num_problems} {_problem(problem)}: {tile}: {best_ms:.4f} ms ({default})"
        case Skipped(problem, reason):
            return f"{_problem(problem)}: no tile: {reason}"
        case Fought(race, choice, refusals):
            what = "forward + backward" if race.training else "forward"
            name = f"{race.operation} {race.width}, {race.value_width}, {race.element_bytes} bytes, {what}"
            if choice is None:
                reasons = "; ".join(f"{side}: {reason}" for side, reason in refusals.items())
                return f"{name}: no race ({reasons})"
            return f"{name}: triton {choice.triton_ms:.3f} ms, {race.rival} {choice.sdpa_ms:.3f} ms"
        case OutOfTime(num_left):
            return f"out of time with {num_left} kernels and races left; run again to go on"


def _problem(problem: Problem) -> str:
    return f"{problem.kernel} {problem.width}, {problem.value_width}, {problem.element_bytes} bytes"

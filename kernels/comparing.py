"""Compare this project's kernels with PyTorch for a few calls, in seconds, in a process of its own.

A kernel that never ran on a card may crash or hang there: that may cost its process, not the command that
wanted to know.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
import triton

from segdeformer.kernels.crew import COMPILE_PATIENCE_S, Crew, Work, num_cores, stage
from segdeformer.kernels.launch import Launch, interpreting
from segdeformer.kernels.plans import without_plans
from segdeformer.kernels.race_steps import make_steps
from segdeformer.kernels.races import Fought, Race, run_race

# What Triton and PyTorch raise for a kernel that is no good; it is raised again, and told, when it runs.
KERNEL_ERRORS = (ValueError, RuntimeError, AssertionError)


class Prepare(NamedTuple):
    """Compile what these races will run."""

    races: tuple[Race, ...]


def compare(
    races: Sequence[Race], device: torch.device, *, seconds: float, crew: Crew | None = None
) -> Iterator[Fought]:
    """The races that are over within about so many seconds, the longest first.

    `refusals` of a race that ended its process, or hung, name `triton` if our kernels were running.
    """
    deadline = time.monotonic() + seconds
    longest_first = sorted(races, key=lambda race: race.work, reverse=True)
    tasks: deque[Prepare | Race] = deque([Prepare(tuple(races)), *longest_first])
    crew = crew or Crew()
    with contextlib.closing(crew):
        work: Work = functools.partial(run_task, device)
        for task, news in crew.run(work, tasks, deadline=deadline):
            if isinstance(news, Fought):
                yield news
            elif news.lost is not None and isinstance(task, Race):
                yield Fought(task, None, {news.stage: news.lost})


def run_task(device: torch.device, task: Prepare | Race) -> Iterator[Fought]:
    """What the process does."""
    if isinstance(task, Prepare):
        if device.type == "cuda" and not interpreting():
            stage("compiling", COMPILE_PATIENCE_S)
            compile_together(launches_of(task.races, device), device)
        return
    try:
        yield run_race(task, device, quick=True)
    except torch.OutOfMemoryError as error:
        yield Fought(task, None, {"both": f"out of memory: {str(error).splitlines()[0]}"})


def launches_of(races: Iterable[Race], device: torch.device) -> list[Launch]:
    """All that our side of these races starts, with the shapes of their checks; nothing is started."""
    with _listed_launches() as launches:
        for race in races:
            with contextlib.suppress(*KERNEL_ERRORS):
                make_steps(race.checked_quickly(), device, checked=False).step("triton")()
    return launches


@contextlib.contextmanager
def _listed_launches() -> Iterator[list[Launch]]:
    """List launches instead of starting them, those of the backward's own threads too."""
    launches: list[Launch] = []
    run = Launch.run

    def note(self: Launch) -> None:
        launches.append(self)

    Launch.run = note  # type: ignore[method-assign]
    try:
        with without_plans():
            yield launches
    finally:
        Launch.run = run  # type: ignore[method-assign]


def compile_together(launches: Iterable[Launch], device: torch.device) -> None:
    """Fill Triton's cache, on all cores."""
    with (
        torch.cuda.device(device),
        ThreadPoolExecutor(num_cores()) as pool,
        triton.AsyncCompileMode(pool, ignore_errors=True),
    ):
        for launch in launches:
            with contextlib.suppress(*KERNEL_ERRORS):
                launch.compile()

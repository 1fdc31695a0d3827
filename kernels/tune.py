"""Find the fastest correct tiles of the Triton kernels on one GPU, then where they beat what else would run.

Every candidate's results are checked against float64 before it is timed, at full size and at an odd one. One
that does not compile, does not fit or is wrong is recorded with its reason and passed over. The file is
written as it goes, and a second run goes on from it. Nothing is printed: the caller shows the events.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
import triton

from segdeformer.errors import KernelError
from segdeformer.kernels.clock import median_ms, synchronize
from segdeformer.kernels.launch import Launch, interpreting
from segdeformer.kernels.races import Fought, Race, decoder_races, faster_backward, run_race
from segdeformer.kernels.tiles import ARCHITECTURES, Tile
from segdeformer.kernels.tune_candidates import candidate_tiles
from segdeformer.kernels.tune_problems import Problem, Trial, decoder_problems, dtypes_of
from segdeformer.kernels.tuned_file import TunedFile, open_tuned

ODD_SIZE = 1000  # no multiple of any block
COMPILERS = 8
SHARE_OF_TILES = 0.75  # of the time; the races get what is left
# What Triton and PyTorch raise for a candidate that is no good. KernelError is a ValueError.
CANDIDATE_ERRORS = (ValueError, RuntimeError, AssertionError)


class Sizes(NamedTuple):
    """How large the problems are; None: as the decoder has them."""

    most_pixels: int | None = None
    odd: int = ODD_SIZE
    candidates: int | None = None  # at most so many of each problem


FULL_SIZES = Sizes()


class Tried(NamedTuple):
    """A candidate was measured, or turned down."""

    problem: Problem
    tile: Tile
    outcome: float | str  # milliseconds, or the reason


class Settled(NamedTuple):
    """A kernel has its tile."""

    problem: Problem
    tile: Tile
    best_ms: float
    default_ms: float | None  # None where the default tile was turned down
    place: int  # of the problem, from 1
    num_problems: int


class Skipped(NamedTuple):
    """A problem without a tile, and why."""

    problem: Problem
    reason: str


class OutOfTime(NamedTuple):
    """The time is over; a further run goes on here."""

    num_left: int


Event = Tried | Settled | Skipped | Fought | OutOfTime


def tune(
    path: Path,
    device: torch.device,
    *,
    seconds: float,
    again: bool = False,
    copy: Path | None = None,
    problems: list[Problem] | None = None,
    races: list[Race] | None = None,
    sizes: Sizes = FULL_SIZES,
) -> Iterator[Event]:
    """Measure what `path` does not hold yet, for about so many seconds; `copy` is a second file to write.

    Raises `KernelError` when a candidate leaves the GPU unusable; the next run passes over it.
    """
    began = time.monotonic()
    file = open_tuned(path, device, again=again, copy=copy)
    problems = decoder_problems(device) if problems is None else problems
    todo = [p for p in problems if file.settled(p) is None or _left(file, p, sizes, device)]
    num_left = 0
    for place, problem in enumerate(todo):
        if time.monotonic() >= began + SHARE_OF_TILES * seconds:
            num_left = len(todo) - place
            break
        try:
            yield from _tune_one(
                file, problem, device, deadline=began + SHARE_OF_TILES * seconds, sizes=sizes
            )
        except torch.OutOfMemoryError as error:
            yield Skipped(problem, f"out of memory: {str(error).splitlines()[0]}")
            continue
        times = {t: ms for t, ms in file.outcomes(problem).items() if not isinstance(ms, str)}
        if not times:
            yield Skipped(problem, "no candidate is right")
            continue
        best = min(times, key=times.__getitem__)
        file.settle(problem, best)
        default_ms = times.get(problem.default_tile(device))
        yield Settled(problem, best, times[best], default_ms, problems.index(problem) + 1, len(problems))
    races = decoder_races(device) if races is None else races
    todo_races = [race for race in races if not file.is_raced(race.key)]
    for place, race in enumerate(todo_races):
        if time.monotonic() >= began + seconds:
            num_left += len(todo_races) - place
            break
        yield _race(file, race, device, sizes)
    if num_left:
        yield OutOfTime(num_left)


def _left(file: TunedFile, problem: Problem, sizes: Sizes, device: torch.device) -> list[Tile]:
    """The candidates that were not tried yet."""
    tiles = candidate_tiles(
        problem.kernel,
        problem.widths,
        problem.element_bytes,
        ARCHITECTURES[file.architecture],
        problem.default_tile(device),
    )
    tried = file.outcomes(problem)
    return [tile for tile in tiles[: sizes.candidates] if tile not in tried]


def _tune_one(
    file: TunedFile, problem: Problem, device: torch.device, *, deadline: float, sizes: Sizes
) -> Iterator[Event]:
    tiles = _left(file, problem, sizes, device)
    trials = make_trials(problem, device, sizes)
    launches = [launch for tile in tiles for trial in trials if (launch := trial.launch(tile)) is not None]
    if device.type == "cuda" and not interpreting() and not file.crashed_compiling(problem):
        with file.trying(problem, None), quiet_compiler(), torch.cuda.device(device):
            compile_together(launches)
    for tile in tiles:
        if time.monotonic() >= deadline and file.outcomes(problem):
            return
        with file.trying(problem, tile), quiet_compiler():
            outcome = try_tile(trials, tile, device)
        file.record(problem, tile, outcome)
        _check_alive(file, problem, tile, device)
        yield Tried(problem, tile, outcome)


def make_trials(problem: Problem, device: torch.device, sizes: Sizes) -> list[Trial]:
    """The problem at its own size, which is timed, and at an odd one that needs every mask."""
    timed_dtype, odd_dtype = dtypes_of(problem.element_bytes, device)
    few = problem.kernel == "attention_forward_few_keys"
    pixels = min(problem.num_pixels, sizes.most_pixels or problem.num_pixels)
    keys = problem.num_keys(device) if few else pixels
    return [
        Trial(problem, pixels, keys, dtype=timed_dtype, device=device),
        Trial(problem, sizes.odd, keys - 1 if few else sizes.odd, dtype=odd_dtype, device=device),
    ]


def try_tile(trials: list[Trial], tile: Tile, device: torch.device) -> float | str:
    """Milliseconds of the first trial if all of them come out right, else the reason against this tile."""
    try:
        for trial in trials:
            launch = trial.launch(tile)
            if launch is None:
                return "not for these sizes"
            trial.poison()
            launch.run()
            synchronize(device)
            if (reason := trial.wrong()) is not None:
                return reason
        timed = trials[0].launch(tile)
        assert timed is not None
        return median_ms(timed.run, device)
    except CANDIDATE_ERRORS as error:
        return " ".join(str(error).split())[-300:] or type(error).__name__


@contextlib.contextmanager
def quiet_compiler() -> Iterator[None]:
    """Without the pages that Triton's compiler writes to stderr about a kernel it gives up on."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def compile_together(launches: Iterable[Launch]) -> None:
    """Compile in threads; what fails here fails again, with its reason, when it is tried."""
    with ThreadPoolExecutor(COMPILERS) as pool, triton.AsyncCompileMode(pool, ignore_errors=True):
        for launch in launches:
            with contextlib.suppress(*CANDIDATE_ERRORS):
                launch.kernel.warmup(
                    **launch.tensors,
                    **launch.numbers,
                    **launch.constants,
                    grid=launch.grid,
                    **launch.options,
                )


def _check_alive(file: TunedFile, problem: Problem, tile: Tile, device: torch.device) -> None:
    """Errors of some kernels stay: then nothing else can run in this process."""
    try:
        synchronize(device)
    except RuntimeError as error:
        file.write()
        reason = str(error).splitlines()[0]
        raise KernelError(
            f"{problem.kernel} with tile {tile} left the GPU unusable ({reason}); "
            "run the same command again: it goes on after this candidate"
        ) from None


def _race(file: TunedFile, race: Race, device: torch.device, sizes: Sizes) -> Fought:
    """Fused against chunked backward, then Triton against its rival, with the tiles just found."""
    try:
        kind = race.widths_key, race.element_bytes
        if race.has_two_backwards and file.backward_form(*kind) is None:  # the first one is the largest
            file.set_backward_form(*kind, faster_backward(race, device, most_pixels=sizes.most_pixels))
        fought = run_race(race, device, most_pixels=sizes.most_pixels)
    except torch.OutOfMemoryError as error:
        return Fought(race, None, {"both": f"out of memory: {str(error).splitlines()[0]}"})
    if fought.choice is not None:
        file.add_choice(fought.choice)
    return fought

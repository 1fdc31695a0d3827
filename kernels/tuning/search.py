"""Find the fastest correct tiles of the Triton kernels on one GPU, then where they beat what else would run.

Every candidate's results are checked against float64 before it is timed, at full size and at an odd one. One
that does not compile, does not fit, is wrong, crashes or hangs is recorded with its reason and passed over:
candidates are compiled on all cores, then measured one by one, in processes that a `Crew` watches. Warp
specialised ones come last, after all kernels have a tile and all comparisons are over: where they are wrong,
they are so now and then, so they are checked many times, and a good one replaces the tile.

The file is written as it goes, and a second run goes on from it. Nothing is printed: the caller shows the
events.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch

from segdeformer.cores import num_cores
from segdeformer.kernels.launch import interpreting
from segdeformer.kernels.plans import forget_plans
from segdeformer.kernels.tiles import ARCHITECTURES, Tile, architecture_of
from segdeformer.kernels.tuning.candidates import Target, candidate_tiles, most_promising
from segdeformer.kernels.tuning.cases import Comparison, decoder_comparisons, dtypes_of
from segdeformer.kernels.tuning.clock import median_ms, synchronize
from segdeformer.kernels.tuning.comparison import KERNEL_ERRORS, Compared, faster_backward, run_comparison
from segdeformer.kernels.tuning.crew import EXACT_PATIENCE_S, Crew, Over, Work, stage
from segdeformer.kernels.tuning.events import Compiling, Event, OutOfTime, Settled, Skipped, Tried
from segdeformer.kernels.tuning.resources import Resources, resources_of
from segdeformer.kernels.tuning.store import TunedFile, open_tuned
from segdeformer.kernels.tuning.trial import Problem, Trial, decoder_problems

ODD_SIZE = 1000  # no multiple of any block
SHARE_OF_TILES = 0.75  # of the time; the comparisons get what is left
MOST_MEASURED = 12  # candidates of a problem, of about twice as many that are compiled
PASSED_OVER = "not run: by their registers and memory others promise more"
SPECIALIZED_CHECKS = 10  # a data race between warps shows now and then only


class Sizes(NamedTuple):
    """How large the problems are; None: as the decoder has them."""

    most_pixels: int | None = None
    odd: int = ODD_SIZE
    candidates: int | None = None  # at most so many of each problem, and as many specialised ones


FULL_SIZES = Sizes()


class Place(NamedTuple):
    """Where and how large."""

    device: torch.device
    sizes: Sizes


class Candidates(NamedTuple):
    """To be measured by one process after the other, until the deadline (of time.monotonic)."""

    problem: Problem
    tiles: tuple[Tile, ...]
    deadline: float


def tune(
    path: Path,
    device: torch.device,
    *,
    seconds: float,
    again: bool = False,
    copy: Path | None = None,
    problems: list[Problem] | None = None,
    comparisons: list[Comparison] | None = None,
    sizes: Sizes = FULL_SIZES,
    crew: Crew | None = None,
    measure: Work | None = None,
) -> Iterator[Event]:
    """Measure what `path` does not hold yet, for about so many seconds; `copy` is a second file to write.

    measure: what the processes do with `Candidates`, if not `measure_tiles`.
    """
    began = time.monotonic()
    file = open_tuned(path, device, again=again, copy=copy)
    tuner = _Tuner(
        file,
        decoder_problems(device) if problems is None else problems,
        decoder_comparisons() if comparisons is None else comparisons,
        Place(device, sizes),
        crew or Crew(),
        measure or functools.partial(measure_tiles, Place(device, sizes)),
    )
    try:
        for specialized, share in ((False, SHARE_OF_TILES), (True, 1.0)):
            yield from tuner.tiles(began + share * seconds, specialized=specialized)
            yield from tuner.comparisons(began + seconds)
        if num_left := tuner.num_left():
            yield OutOfTime(num_left)
    finally:
        tuner.crew.close()
        file.write()


@dataclass
class _Tuner:
    """The state of a run: the file, and what is wanted in it."""

    file: TunedFile
    problems: list[Problem]
    all_comparisons: list[Comparison]
    place: Place
    crew: Crew
    measure: Work
    given_up: set[Problem | Comparison] = field(default_factory=set)  # in this run

    def num_left(self) -> int:
        """Kernels with candidates that were not tried, and comparisons that were not run."""
        left = [
            p for p in self.problems if self._left(p, specialized=False) or self._left(p, specialized=True)
        ]
        return len(set(left) - self.given_up) + len(self._comparisons_left())

    def _target(self, problem: Problem) -> Target:
        architecture = ARCHITECTURES[self.file.architecture]
        return Target(problem.kernel, problem.widths, problem.element_bytes, architecture)

    def _left(self, problem: Problem, *, specialized: bool) -> tuple[Tile, ...]:
        """The candidates that were not tried yet."""
        tiles = candidate_tiles(self._target(problem), problem.default_tile(self.place.device))
        tried = self.file.outcomes(problem)
        wanted = [tile for tile in tiles if tile.warp_specialize == specialized]
        return tuple(tile for tile in wanted[: self.place.sizes.candidates] if tile not in tried)

    def tiles(self, deadline: float, *, specialized: bool) -> Iterator[Event]:
        """Compile, check and time the candidates of every problem, and settle on the fastest."""
        todo = deque(
            Candidates(problem, tiles, deadline)
            for problem in self.problems
            if (tiles := self._left(problem, specialized=specialized)) and problem not in self.given_up
        )
        if self.place.device.type == "cuda" and not interpreting():
            yield from self._compile(todo, deadline)
        for task, news in self.crew.run(self.measure, todo, deadline=deadline):
            if isinstance(news, Tried):
                self.file.record(*news)
                yield news
                continue
            assert isinstance(news, Over)
            left = self._left(task.problem, specialized=specialized)
            if news.lost is not None:
                culprit = next((tile for tile in left if repr(tile) == news.stage), None)
                if culprit is None:
                    self.given_up.add(task.problem)
                    yield Skipped(task.problem, f"{news.stage}: {news.lost}")
                    continue
                yield self._turn_down(task.problem, culprit, news.lost)
                if len(left) > 1:
                    todo.appendleft(task._replace(tiles=tuple(t for t in left if t != culprit)))
                    continue
            yield self._settle(task.problem)

    def _turn_down(self, problem: Problem, tile: Tile, reason: str) -> Tried:
        self.file.record(problem, tile, reason)
        self.file.write()
        return Tried(problem, tile, reason)

    def _compile(self, todo: deque[Candidates], deadline: float) -> Iterator[Event]:
        """Fill Triton's cache; a candidate that takes the compiler with it is turned down."""
        each = deque(task._replace(tiles=(tile,)) for task in todo for tile in task.tiles)
        work = functools.partial(compile_tile, self.place)
        lost = set()
        made: dict[Problem, dict[Tile, Resources]] = {}
        for task, news in self.crew.run(work, each, workers=num_cores(), deadline=deadline):
            if isinstance(news, Resources):
                made.setdefault(task.problem, {})[task.tiles[0]] = news
                continue
            if news.lost is not None:
                lost.add((task.problem, task.tiles[0]))
                yield self._turn_down(task.problem, task.tiles[0], f"the compiler: {news.lost}")
            yield Compiling(len(each))
        self.crew.close()  # they hold memory of the GPU
        kept = [t._replace(tiles=tuple(x for x in t.tiles if (t.problem, x) not in lost)) for t in todo]
        todo.clear()
        for task in kept:
            worthy = self._worthy(task, made.get(task.problem, {}))
            for tile in (tile for tile in task.tiles if tile not in worthy):
                yield self._turn_down(task.problem, tile, PASSED_OVER)
            if worthy:
                todo.append(task._replace(tiles=worthy))

    def _worthy(self, task: Candidates, made: Mapping[Tile, Resources]) -> tuple[Tile, ...]:
        """The candidates to be measured, in order: by what the compiler made of them.

        The default is among them, and those that do not compile, so that their reasons are recorded.
        """
        problem = task.problem
        ranked = most_promising(self._target(problem), made, resources=made, most=MOST_MEASURED)
        default = problem.default_tile(self.place.device)
        order = [default, *ranked, *(tile for tile in task.tiles if tile not in made)]
        return tuple(tile for tile in dict.fromkeys(order) if tile in task.tiles)

    def _settle(self, problem: Problem) -> Event:
        times = {t: ms for t, ms in self.file.outcomes(problem).items() if not isinstance(ms, str)}
        if not times:
            self.file.write()
            return Skipped(problem, "no candidate is right")
        best = min(times, key=times.__getitem__)
        self.file.settle(problem, best)
        default_ms = times.get(problem.default_tile(self.place.device))
        place = self.problems.index(problem) + 1
        return Settled(problem, best, times[best], default_ms, place, len(self.problems))

    def _comparisons_left(self) -> list[Comparison]:
        left = [c for c in self.all_comparisons if c not in self.given_up]
        return [c for c in left if not self.file.is_compared(c.key)]

    def comparisons(self, deadline: float) -> Iterator[Event]:
        """Fused against chunked backward, then Triton against its alternative, with the tiles just found."""
        self.crew.close()  # a process may remember older tiles
        todo: deque[tuple[Comparison, bool]] = deque()
        asked = set()
        for comparison in self._comparisons_left():
            kind = comparison.widths_key, comparison.element_bytes
            is_known = kind in asked or self.file.backward_form(*kind) is not None
            if comparison.has_two_backwards and not is_known:
                asked.add(kind)  # the first one is the largest
                todo.append((comparison, True))
            todo.append((comparison, False))
        work = functools.partial(compare_in_process, self.place)
        for (comparison, of_backwards), news in self.crew.run(work, todo, deadline=deadline):
            if isinstance(news, str):
                self.file.set_backward_form(comparison.widths_key, comparison.element_bytes, news)
            elif isinstance(news, Compared):
                if news.choice is not None:
                    self.file.add_choice(news.choice)
                else:
                    self.given_up.add(comparison)
                yield news
            elif news.lost is not None and not of_backwards:
                self.given_up.add(comparison)
                yield Compared(comparison, None, {news.stage: news.lost})


def measure_tiles(place: Place, task: Candidates) -> Iterator[Tried]:
    """Check and time one candidate after the other; one that spoils the GPU ends the process."""
    stage("inputs and exact results", EXACT_PATIENCE_S)
    trials = make_trials(task.problem, place)
    for tile in task.tiles:
        if time.monotonic() >= task.deadline:
            return
        stage(repr(tile))
        with quiet_compiler():
            outcome = try_tile(trials, tile, place.device)
        synchronize(place.device)
        yield Tried(task.problem, tile, outcome)


def compile_tile(place: Place, task: Candidates) -> Iterator[Resources]:
    """Compile one candidate: what it takes of the card at its own size.

    What fails here with an error fails again, with its reason, when it is tried.
    """
    architecture = architecture_of(place.device)
    made: list[Resources] = []
    with quiet_compiler(), contextlib.suppress(*KERNEL_ERRORS), torch.cuda.device(place.device):
        for trial in _launchable(task.problem, place):
            if (launch := trial.launch(task.tiles[0])) is not None:
                stage(f"{task.problem.kernel} with tile {task.tiles[0]}")
                made.append(resources_of(launch.compile(), architecture))
    yield from made[:1]


def compare_in_process(place: Place, task: tuple[Comparison, bool]) -> Iterator[str | Compared]:
    """The faster form of the backward, or the comparison itself."""
    comparison, of_backwards = task
    stage("both", EXACT_PATIENCE_S)
    forget_plans()
    most_pixels = place.sizes.most_pixels
    if not of_backwards:
        yield run_comparison(comparison, place.device, most_pixels=most_pixels)
    else:
        with contextlib.suppress(torch.OutOfMemoryError):
            yield faster_backward(comparison, place.device, most_pixels=most_pixels)
    synchronize(place.device)


def make_trials(problem: Problem, place: Place, *, exact: bool = True) -> list[Trial]:
    """The problem at its own size, which is timed, and at an odd one that needs every mask.

    exact: with the exact results, by which they can be judged.
    """
    device, sizes = place
    timed_dtype, odd_dtype = dtypes_of(problem.element_bytes, device)
    few = problem.kernel == "attention_forward_few_keys"
    pixels = min(problem.num_pixels, sizes.most_pixels or problem.num_pixels)
    keys = problem.num_keys(device) if few else pixels
    odd_keys = keys - 1 if few else sizes.odd
    return [
        Trial(problem, pixels, keys, dtype=timed_dtype, device=device, exact=exact),
        Trial(problem, sizes.odd, odd_keys, dtype=odd_dtype, device=device, exact=exact),
    ]


@functools.lru_cache(maxsize=1)
def _launchable(problem: Problem, place: Place) -> list[Trial]:
    """One process compiles many candidates of a problem."""
    return make_trials(problem, place, exact=False)


def try_tile(trials: list[Trial], tile: Tile, device: torch.device) -> float | str:
    """Milliseconds of the first trial if all of them come out right, else the reason against this tile."""
    try:
        for trial in trials:
            launch = trial.launch(tile)
            if launch is None:
                return "not for these sizes"
            for _ in range(SPECIALIZED_CHECKS if tile.warp_specialize else 1):
                trial.poison()
                launch.run()
                synchronize(device)
                if (reason := trial.wrong()) is not None:
                    return reason
        timed = trials[0].launch(tile)
        assert timed is not None
        ms = median_ms(timed.run, device)
        return ms if (reason := trials[0].wrong()) is None else f"one run after the other: {reason}"
    except KERNEL_ERRORS as error:
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

"""What the tuner tells while it runs, and each event in one line."""

from __future__ import annotations

from typing import NamedTuple

from segdeformer.errors import count
from segdeformer.kernels.tiles import Tile
from segdeformer.kernels.tuning.comparison import Compared
from segdeformer.kernels.tuning.trial import Problem


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


class Compiling(NamedTuple):
    """Candidates are compiled, on all cores at once."""

    num_left: int


class OutOfTime(NamedTuple):
    """The time is over; a further run goes on here."""

    num_left: int


Event = Tried | Settled | Skipped | Compiling | Compared | OutOfTime


def describe(event: Event) -> str:
    """An event in one line."""
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
        case Compiling(num_left):
            return f"{count(num_left, 'candidate')} left to compile"
        case Compared(comparison, choice, refusals):
            if choice is None or refusals:
                reasons = "; ".join(f"{side}: {reason}" for side, reason in refusals.items())
                return f"{comparison.label}: no comparison ({reasons})"
            alternative = f"{comparison.alternative} {choice.alternative_ms:.3f} ms"
            return f"{comparison.label}: triton {choice.triton_ms:.3f} ms, {alternative}"
        case OutOfTime(num_left):
            left = "1 kernel or comparison" if num_left == 1 else f"{num_left} kernels and comparisons"
            return f"out of time with {left} left; run again to go on"


def _problem(problem: Problem) -> str:
    return f"{problem.kernel} {problem.width}, {problem.value_width}, {problem.element_bytes} bytes"

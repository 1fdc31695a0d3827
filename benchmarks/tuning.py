"""The tuner as a phase of `make gpu`.

Tiles go where they take effect, into the user's cache, and a copy beside the results.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from benchmarks.machine import RESULTS, Machine
from benchmarks.phases import Session, seconds_left
from segdeformer.kernels.tiles import user_tuned
from segdeformer.kernels.tuning.cases import decoder_comparisons
from segdeformer.kernels.tuning.crew import Crew, Work
from segdeformer.kernels.tuning.events import OutOfTime, Skipped, Tried, describe
from segdeformer.kernels.tuning.search import FULL_SIZES, Sizes, tune
from segdeformer.kernels.tuning.trial import decoder_problems

REHEARSED_SIZES = Sizes(most_pixels=64, odd=50, candidates=1)


def run(session: Session, *, measure: Work | None = None) -> int:
    """Tune what is not tuned yet; how many kernels and comparisons are left."""
    machine = session.machine
    copy = session.records.path.with_name("tuned.json")
    path = copy if machine.is_rehearsal else user_tuned() / f"{machine.slug}.json"
    problems, comparisons = decoder_problems(machine.device), decoder_comparisons()
    if machine.is_rehearsal:
        problems, comparisons = problems[:2], [comparisons[1], comparisons[-1]]
    _take_along(path, machine, copy)
    num_left = 0
    for event in tune(
        path,
        machine.device,
        seconds=seconds_left(session),
        copy=copy,
        problems=problems,
        comparisons=comparisons,
        sizes=REHEARSED_SIZES if machine.is_rehearsal else FULL_SIZES,
        crew=Crew(patience_s=session.patience_s),
        measure=measure,
    ):
        if not isinstance(event, Tried) or isinstance(event.outcome, str):
            print(describe(event), flush=True)
        if isinstance(event, OutOfTime):
            num_left += event.num_left
        elif isinstance(event, Skipped):
            num_left += 1
    return num_left


def _take_along(path: Path, machine: Machine, copy: Path) -> None:
    """On a machine that was not tuned on before, start from the measurements beside earlier results."""
    earlier = [p for p in (copy, RESULTS / machine.slug / "tuned.json") if p.is_file()]
    if earlier and not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(earlier[0], path)

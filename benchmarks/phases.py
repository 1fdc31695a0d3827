"""What the phases of `make gpu` share: the run that they belong to, and comparisons in a watched process.

A comparison has contenders. One that breaks, crashes or hangs is named, and the others are measured without
it. B batch.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch

from benchmarks.machine import Machine, this_machine
from benchmarks.records import Records
from segdeformer.kernels.crew import PATIENCE_S, Crew, Over, stage

CONTENDER = "contender "
MOST_TRIES = 2  # of a comparison that is lost for another reason than one of its contenders


class Session(NamedTuple):
    """A run, as one of its phases sees it."""

    records: Records
    machine: Machine
    deadline: float  # of time.monotonic
    patience_s: float = PATIENCE_S


class Comparison(NamedTuple):
    """One row of a table, for a process."""

    name: str
    row: Any
    without: Mapping[str, str] = {}  # contenders, and what went wrong with each


# Of a row, for a GPU or a rehearsal, without some contenders: the entry.
Measure = Callable[[Any, Machine, Mapping[str, str]], dict[str, Any]]


def begin_contender(name: str, patience_s: float | None = None) -> None:
    """What happens from here on is this contender's doing."""
    stage(CONTENDER + name, patience_s)


def compare(measure: Measure, task: Comparison) -> Iterator[dict[str, Any]]:
    """What a process does."""
    try:
        yield measure(task.row, this_machine(), task.without)
    except torch.OutOfMemoryError as error:
        yield {"skipped": f"out of memory: {str(error).splitlines()[0]}"}


def measure_rows(
    session: Session,
    section: str,
    rows: Mapping[str, Any],
    measure: Measure,
    *,
    tiles_of: Callable[[Any], str] | None = None,
    summary: Callable[[str, dict[str, Any]], str],
) -> int:
    """Fill a section of the records, and say how many rows are left for another run.

    tiles_of: which tiles a row runs with; it is measured again when they have changed.
    """
    records = session.records
    found = records.section(section)

    def is_due(name: str) -> bool:
        entry = found.get(name)
        if entry is None or 0 < entry.get("tries", 0) < MOST_TRIES:
            return True
        return tiles_of is not None and entry.get("tiles") != tiles_of(rows[name])

    due = [name for name in rows if is_due(name)]
    due.sort(key=lambda name: found.get(name, {}).get("tries", 0))
    todo = deque(Comparison(name, rows[name]) for name in due)
    num_left = len(todo)
    with Crew(patience_s=session.patience_s) as crew:
        for task, news in crew.run(partial(compare, measure), todo, deadline=session.deadline):
            entry: dict[str, Any]
            if not isinstance(news, Over):
                entry = news
            elif news.lost is None:
                continue
            elif news.stage.startswith(CONTENDER):
                name = news.stage.removeprefix(CONTENDER)
                print(f"{task.name}: {name}: {news.lost}", flush=True)
                todo.appendleft(task._replace(without={**task.without, name: news.lost}))
                continue
            else:
                tries = found.get(task.name, {}).get("tries", 0) + 1
                entry = {"skipped": f"{news.stage}: {news.lost}", "tries": tries}
            if tiles_of is not None:
                entry["tiles"] = tiles_of(task.row)
            num_left -= 1
            records.add(section, task.name, entry)
            print(summary(task.name, entry), flush=True)
    return num_left


def one_result(session: Session, work: Callable[[None], Iterator[Any]]) -> Any:
    """What a process finds out, in one step; None if it does not."""
    with Crew(patience_s=session.patience_s) as crew:
        news = [message for _, message in crew.run(work, deque([None]))]
    return None if isinstance(news[0], Over) else news[0]


def seconds_left(session: Session) -> float:
    return session.deadline - time.monotonic()

"""What the phases of `make gpu` share: the run that they belong to, and comparisons in a watched process.

A row of a table has contenders. One that breaks, crashes or hangs is named, and the others are measured
without it.
"""

from __future__ import annotations

import time
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch

from benchmarks.machine import Machine, ceilings, free_bytes, peak_mib, short, this_machine, timings
from benchmarks.records import Records
from segdeformer.kernels.tuning.clock import synchronize
from segdeformer.kernels.tuning.crew import COMPILE_PATIENCE_S, PATIENCE_S, Crew, Over, stage
from segdeformer.kernels.tuning.judge import Verdict

CONTENDER = "contender "
ROW_SECONDS = 0.6
MOST_TRIES = 2  # of a row that is lost for another reason than one of its contenders
# What contenders raise for shapes they do not take. KernelError is a ValueError.
REFUSALS = (RuntimeError, ValueError, NotImplementedError, AssertionError)


class Session(NamedTuple):
    """A run, as one of its phases sees it."""

    records: Records
    machine: Machine
    deadline: float  # of time.monotonic
    patience_s: float = PATIENCE_S


class RowTask(NamedTuple):
    """One row of a table, for a process."""

    name: str
    row: Any
    without: Mapping[str, str] = {}  # contenders, and what went wrong with each


Judge = Callable[[Any], Verdict]  # of the results of a call
# Of a row, for a GPU or a rehearsal, without some contenders: the entry.
Measure = Callable[[Any, Machine, Mapping[str, str]], dict[str, Any]]


def kind_name(dtype: torch.dtype, *, training: bool) -> str:
    """The end of a row's name."""
    short_name = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[dtype]
    return f"{short_name} {'forward + backward' if training else 'forward'}"


class Contender(NamedTuple):
    """One way to compute a row."""

    name: str
    run: Callable[[], Any]  # what is timed
    judge: Judge | None  # None: nothing to compare its results with
    about: Mapping[str, Any] = {}  # kept with its results
    needs_bytes: int = 0  # of matrices that others do not make
    patience_s: float | None = None
    work: Mapping[str, float] = {}  # of a call, by the name of its rate: in units of that rate times 1 ms


def measure_contenders(
    contenders: Iterable[Contender],
    machine: Machine,
    without: Mapping[str, str],
    *,
    seconds: float = ROW_SECONDS,
) -> dict[str, dict[str, Any]]:
    """Check everyone but those `without`, for these reasons; then time those that are right, in turn."""
    entries: dict[str, dict[str, Any]] = {}
    right: dict[str, Contender] = {}
    for contender in contenders:
        entry = entries[contender.name] = dict(contender.about)
        if contender.name in without:
            entry["refused"] = without[contender.name]
            continue
        stage(CONTENDER + contender.name, contender.patience_s)  # what happens from here on is its doing
        if contender.needs_bytes > 0.8 * free_bytes(machine):
            gib = contender.needs_bytes / 2**30
            entry["refused"] = f"its full-size matrices of {gib:.1f} GiB do not fit"
            continue
        verdict = first_run(contender, machine)
        if verdict.wrong is not None:
            entry["refused"] = verdict.wrong
            continue
        if contender.judge is not None:
            entry["worst_error"] = short(verdict.error)
        peak = peak_mib(contender.run, machine)
        entry["peak_mib"] = None if peak is None else round(peak, 1)
        right[contender.name] = contender
    runs = {name: contender.run for name, contender in right.items()}
    for name, (ms, eager_ms) in timings(runs, machine, seconds=seconds).items():
        rates = {key: short(amount / ms) for key, amount in right[name].work.items()}
        entries[name] |= {"ms": short(ms), "eager_ms": short(eager_ms), **rates}
    return entries


def first_run(contender: Contender, machine: Machine) -> Verdict:
    """On the results of the first call, or why there are none."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            results = contender.run()
            synchronize(machine.device)
        except REFUSALS as error:
            synchronize(machine.device)  # an error that stays ends this process: the others go on in another
            first_line = (str(error) or type(error).__name__).splitlines()[0]
            reasons = [first_line, *(str(warning.message) for warning in caught)]  # SDPA warns of its reasons
            return Verdict(float("nan"), float("nan"), " ".join(" ".join(reasons).split())[:400])
    return Verdict(0.0, 0.0, None) if contender.judge is None else contender.judge(results)


def compare(measure: Measure, task: RowTask) -> Iterator[dict[str, Any]]:
    """What a process does."""
    try:
        yield measure(task.row, this_machine(), task.without)
    except torch.OutOfMemoryError as error:
        yield {"skipped": f"out of memory: {str(error).splitlines()[0]}"}


def summary(name: str, entry: dict[str, Any]) -> str:
    """The best times of a row."""
    timed = {n: c["ms"] for n, c in entry.get("contenders", {}).items() if "ms" in c}
    if not timed:
        return f"{name}: {entry.get('skipped') or entry['contenders']}"
    times = ", ".join(f"{n} {ms:.3f}" for n, ms in sorted(timed.items(), key=lambda item: item[1])[:4])
    return f"{name}: {times} ms"


def measure_rows(
    session: Session,
    section: str,
    rows: Mapping[str, Any],
    measure: Measure,
    *,
    tiles_of: Callable[[Any], str] | None = None,
    describe: Callable[[str, dict[str, Any]], str] = summary,
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
    todo = deque(RowTask(name, rows[name]) for name in due)
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
            print(describe(task.name, entry), flush=True)
    return num_left


def know_ceilings(session: Session) -> None:
    """Measure this machine's own limits, once."""
    if "ceilings" in session.records.table:
        return
    with Crew(patience_s=session.patience_s) as crew:
        news = [message for _, message in crew.run(measure_ceilings, deque([None]))]
    if not isinstance(news[0], Over):
        session.records.table["ceilings"] = news[0]
        session.records.write()
        print(f"ceilings: {news[0]}", flush=True)


def measure_ceilings(_task: None) -> Iterator[dict[str, float]]:
    """What a process does."""
    stage("ceilings", COMPILE_PATIENCE_S)
    yield ceilings(this_machine())


def seconds_left(session: Session) -> float:
    return session.deadline - time.monotonic()

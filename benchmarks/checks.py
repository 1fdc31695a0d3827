"""Every Triton kernel against float64: all dtypes, odd sizes, strides, large logits, poisoned memory.

What is allowed `kernels/tuning/judge.py` says. Groups of cases run in several processes, because most of the
time is compiling.
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.check_upsampling import UpsamplingGroup, upsampling_cases
from benchmarks.machine import Machine, poisoned_memory, short, this_machine
from benchmarks.phases import Session
from segdeformer.kernels.tuning.cases import WIDTHS_OF, attention_inputs
from segdeformer.kernels.tuning.clock import synchronize
from segdeformer.kernels.tuning.crew import Crew, Over, Work, num_cores, stage
from segdeformer.kernels.tuning.judge import ROUNDINGS, Verdict, judge, worst_row_error

MOST_WORKERS = 16  # each holds a few hundred MiB of the GPU
MOST_LOSSES_OF_A_GROUP = 3  # processes; then its further cases are left out
BATCH = 2
LARGE = 40  # times the usual logits: nearly all weight on one key
LARGE_ROUNDINGS = 48  # epsilons: such logits are rounded themselves, which shows in their exponentials
ODD_WIDTHS = ((19, 19), (64, 32), (150, 160), (160, 512))  # each makes other panels
# Only the kind of a size makes other code: 1, multiples of 16, others; and few keys, which have their kernel.
SIZES = ((17, 63), (128, 128), (1000, 200))
MORE_SIZES = ((63, 1000), (1, 1), (1, 1000), (1000, 1), (200, 17), (128, 63))


class Group(NamedTuple):
    """Cases of one operation, one pair of widths and one dtype: one task for a process."""

    operation: str
    width: int
    value_width: int
    dtype: torch.dtype
    sizes: tuple[tuple[int, int], ...]
    what: str = ""

    @property
    def name(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.operation} {self.width}, {self.value_width} {dtype} {self.what}".rstrip()


AnyGroup = Group | UpsamplingGroup


def first_groups(machine: Machine) -> list[Group]:
    """The decoder's own widths in the usual dtype."""
    wanted = [
        group for pair in itertools.zip_longest(*_decoder(machine.halves[0])) for group in pair if group
    ]
    return [_smaller(group) for group in wanted[:3]] if machine.is_rehearsal else wanted


def further_groups(machine: Machine) -> list[Group]:
    """The decoder's widths in other dtypes, more sizes of one of each kind, and odd widths."""
    found, usual = [], machine.halves[0]
    for dtype in machine.dtypes[1:]:
        external, internal = _decoder(dtype)
        found += external[:2] + internal[:3]
    found += [Group("external", 2, 2, usual, _square(SIZES))]
    found += [Group("attention", d, e, usual, SIZES) for d, e in ODD_WIDTHS]
    found += [
        Group("external", 150, 150, usual, ((1, 1), (200, 200), (1000, 1000)), "more sizes"),
        Group("attention", 256, 256, usual, MORE_SIZES, "more sizes"),
    ]
    return [_smaller(group) for group in found[:2] + found[-1:]] if machine.is_rehearsal else found


def _decoder(dtype: torch.dtype) -> tuple[list[Group], list[Group]]:
    """External and internal attentions."""
    external = [Group("external", *pair, dtype, _square(SIZES)) for pair in WIDTHS_OF["external_attention"]]
    return external, [Group("attention", *pair, dtype, SIZES) for pair in WIDTHS_OF["attention"]]


def _square(sizes: tuple[tuple[int, int], ...]) -> tuple[tuple[int, int], ...]:
    """An external attention has a key for each pixel."""
    return tuple((m, m) for _, m in sizes)


def _smaller(group: Group) -> Group:
    """For a rehearsal: the interpreter takes a second for what a GPU does in a microsecond."""
    return group._replace(sizes=((17, 17),) if group.operation == "external" else ((17, 33),))


def attention_cases(group: Group, machine: Machine) -> Iterator[tuple[str, Callable[[], Verdict]]]:
    """Those of an attention's group."""
    cases = ["plain", "strided", "large logits"]
    if machine.is_rehearsal and group.dtype == torch.float32:
        # NumPy's products k q and q k differ by several roundings: its backward misses its forward's lse.
        cases.remove("large logits")
    for (n, m), case in itertools.product(group.sizes, cases):
        yield f"{n} x {m}, {case}", partial(check_attention, group, n, m, case, machine)


class Part(NamedTuple):
    """A group from one of its cases on, for a process."""

    group: AnyGroup
    first: int = 0


class Checked(NamedTuple):
    """A case was run."""

    name: str
    share: float  # of its allowance that it took; NaN where it did not come to that
    failure: str | None


def cases_of(group: AnyGroup, machine: Machine) -> Iterator[tuple[str, Callable[[], Verdict]]]:
    """Names, and what judges a case."""
    if isinstance(group, UpsamplingGroup):
        return upsampling_cases(group, machine)
    return attention_cases(group, machine)


def check_group(part: Part) -> Iterator[Checked]:
    """What a process does: one case after the other."""
    machine = this_machine()
    for name, check in itertools.islice(cases_of(part.group, machine), part.first, None):
        stage(name)
        try:
            verdict = check()
        except (RuntimeError, ValueError, AssertionError) as error:
            synchronize(machine.device)  # an error that stays ends this process
            yield Checked(name, math.nan, " ".join(str(error).split())[-300:])
            continue
        yield Checked(name, verdict.share, verdict.wrong)


def run(session: Session, wanted: Iterable[AnyGroup], *, check: Work = check_group) -> int:
    """Check what was not right so far; how many groups are left. check: what a process does with a `Part`."""
    checks = session.records.section("checks")
    todo = deque(Part(group) for group in wanted if not right(checks.get(group.name)))
    num_left, results = len(todo), {part.group.name: Result() for part in todo}
    workers = min(MOST_WORKERS, num_cores())
    with Crew(patience_s=session.patience_s) as crew:
        for part, news in crew.run(check, todo, workers=workers, deadline=session.deadline):
            name, result = part.group.name, results[part.group.name]
            if isinstance(news, Checked):
                result.add(news)
                continue
            assert isinstance(news, Over)
            if news.lost is not None:
                result.lose(news)
                print(f"{name}: {news.stage}: {news.lost}", flush=True)
                names = [case for case, _ in cases_of(part.group, session.machine)]
                rest = names.index(news.stage) + 1 if news.stage in names else len(names)
                if rest < len(names) and result.losses < MOST_LOSSES_OF_A_GROUP:
                    todo.append(Part(part.group, rest))
                    continue
            num_left -= 1
            session.records.add("checks", name, result.entry())
            state = f"{len(result.failures)} FAILED" if result.failures else "ok"
            print(f"{name}: {result.num_cases} cases {state}", flush=True)
    return num_left


class Result:
    """What has become of a group so far."""

    def __init__(self) -> None:
        self.num_cases = self.losses = 0
        self.worst = 0.0
        self.failures: list[str] = []

    def add(self, case: Checked) -> None:
        self.num_cases += 1
        if case.failure is None:
            self.worst = max(self.worst, case.share)
        else:
            self.failures.append(f"{case.name}: {case.failure}")

    def lose(self, over: Over) -> None:
        self.num_cases += 1
        self.losses += 1
        self.failures.append(f"{over.stage}: {over.lost}")

    def entry(self) -> dict[str, Any]:
        worst = short(self.worst)
        return {"num_cases": self.num_cases, "failures": self.failures, "worst_share_of_allowed": worst}


def right(entry: dict[str, Any] | None) -> bool:
    """Whether a group ran and nothing failed."""
    return entry is not None and not entry["failures"]


def check_attention(group: Group, n: int, m: int, case: str, machine: Machine) -> Verdict:
    """Output and gradients."""
    inputs = attention_inputs(
        group.operation,
        (group.width, group.value_width),
        (BATCH, n, m),
        dtype=group.dtype,
        device=machine.device,
        training=True,
        peak=LARGE if case == "large logits" else 1.0,
        seed=n * 10007 + m,
        arrange=strided if case == "strided" else torch.Tensor.contiguous,
    )
    with poisoned_memory():
        results = inputs.step("triton")()
    expected = inputs.expected(least=1.0)  # a single key's score has no gradient, but for rounding
    if case == "large logits":
        rounding = max(LARGE_ROUNDINGS, ROUNDINGS[group.dtype]) * torch.finfo(group.dtype).eps
        expected = [right._replace(error=by_longest_row, rounding=rounding) for right in expected]
    return judge(results, expected)


def by_longest_row(result: Tensor, exact: Tensor) -> float:
    """`worst_row_error`, where nearly all rows but a few may be zero."""
    return worst_row_error(result, exact, least=max(1.0, exact.norm(dim=-1).max().item()))


def strided(tensor: Tensor) -> Tensor:
    """The same values in columns of a wider matrix that starts at an odd place, transposed in memory."""
    batch, rows, width = tensor.shape
    wide = tensor.new_full((batch, width + 5, rows + 3), float("nan"))
    view = wide[:, 3 : width + 3, 1 : rows + 1].transpose(1, 2)
    view.copy_(tensor)
    return view

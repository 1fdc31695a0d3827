"""Every Triton kernel against float64: all dtypes, odd sizes, strides, large logits, poisoned memory.

An attention may be off by twice the error of the textbook form in the same dtype, plus 16 epsilons times the
largest exact value or 1; `check_upsampling` says what the operations on upsampled logits may be. Groups of
cases run in several processes, because most of the time is compiling.
B batch, N queries, M keys, D key width, E value width, K classes.
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
from benchmarks.machine import Machine, short, this_machine
from benchmarks.phases import Session
from benchmarks.poison import poisoned_memory
from segdeformer.kernels.attention import attention, attention_reference
from segdeformer.kernels.clock import synchronize
from segdeformer.kernels.crew import Crew, Over, Work, num_cores, stage
from segdeformer.kernels.external_attention import external_attention, external_attention_reference

MOST_WORKERS = 16  # each holds a few hundred MiB of the GPU
MOST_LOSSES_OF_A_GROUP = 3  # processes; then its further cases are left out
BATCH = 2
ROUNDINGS = 16
LARGE = 40  # times the usual logits: nearly all weight on one key
# The decoder's own pairs of D and E; in training with gradients of both, folded ones forward only, which the
# checks do not tell apart.
DECODER_WIDTHS = ((256, 256), (256, 150), (512, 512), (512, 150))
DECODER_CLASSES = (150, 19, 171)
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
    dtype = machine.halves[0]
    external = [Group("external", k, k, dtype, _square(SIZES)) for k in DECODER_CLASSES]
    internal = [Group("attention", d, e, dtype, SIZES) for d, e in DECODER_WIDTHS]
    wanted = [group for pair in itertools.zip_longest(external, internal) for group in pair if group]
    return [_smaller(group) for group in wanted[:3]] if machine.is_rehearsal else wanted


def further_groups(machine: Machine) -> list[Group]:
    """The decoder's widths in other dtypes, more sizes of one of each kind, and odd widths."""
    found, usual = [], machine.halves[0]
    for dtype in machine.dtypes:
        if dtype == usual:
            continue
        found += [Group("external", k, k, dtype, _square(SIZES)) for k in DECODER_CLASSES[:2]]
        found += [Group("attention", d, e, dtype, SIZES) for d, e in DECODER_WIDTHS[:3]]
    found += [Group("external", 2, 2, usual, _square(SIZES))]
    found += [Group("attention", d, e, usual, SIZES) for d, e in ODD_WIDTHS]
    found += [
        Group("external", 150, 150, usual, ((1, 1), (200, 200), (1000, 1000)), "more sizes"),
        Group("attention", 256, 256, usual, MORE_SIZES, "more sizes"),
    ]
    return [_smaller(group) for group in found[:2] + found[-1:]] if machine.is_rehearsal else found


def _square(sizes: tuple[tuple[int, int], ...]) -> tuple[tuple[int, int], ...]:
    """An external attention has a key for each pixel."""
    return tuple((m, m) for _, m in sizes)


def _smaller(group: Group) -> Group:
    """For a rehearsal: the interpreter takes a second for what a GPU does in a microsecond."""
    return group._replace(sizes=((17, 17),) if group.operation == "external" else ((17, 33),))


def attention_cases(group: Group, machine: Machine) -> Iterator[tuple[str, Callable[[], float]]]:
    """Those of an attention's group."""
    cases = ["plain", "strided", "large logits"]
    if machine.is_rehearsal and group.dtype == torch.float32:
        # NumPy's products k q and q k differ by several roundings: its backward misses its forward's lse.
        cases.remove("large logits")
    for (n, m), case in itertools.product(group.sizes, cases):
        yield f"{n} x {m}, {case}", partial(run_case, group, n, m, case, machine)


class Part(NamedTuple):
    """A group from one of its cases on, for a process."""

    group: AnyGroup
    first: int = 0


class Checked(NamedTuple):
    """A case was run."""

    name: str
    share: float  # of its allowance that it took; NaN where it did not come to that
    failure: str | None


def cases_of(group: AnyGroup, machine: Machine) -> Iterator[tuple[str, Callable[[], float]]]:
    """Names, and what gives the share of its allowance that a case takes."""
    if isinstance(group, UpsamplingGroup):
        return upsampling_cases(group, machine)
    return attention_cases(group, machine)


def check_group(part: Part) -> Iterator[Checked]:
    """What a process does: one case after the other."""
    machine = this_machine()
    for name, share_of in itertools.islice(cases_of(part.group, machine), part.first, None):
        stage(name)
        try:
            share = share_of()
        except (RuntimeError, ValueError, AssertionError) as error:
            synchronize(machine.device)  # an error that stays ends this process
            yield Checked(name, math.nan, " ".join(str(error).split())[-300:])
            continue
        yield Checked(name, share, None if share <= 1 else f"{share:.3g} times the allowed error")  # or NaN


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


def run_case(group: Group, n: int, m: int, case: str, machine: Machine) -> float:
    """The largest error of output and gradients as a share of what is allowed; NaN if any element is."""
    generator = torch.Generator(machine.device).manual_seed(n * 10007 + m)
    large = LARGE if case == "large logits" else 1

    def random(factor: float, *shape: int, dtype: torch.dtype = group.dtype) -> Tensor:
        made = (factor * torch.randn(shape, generator=generator, device=machine.device)).to(dtype)
        return strided(made) if case == "strided" else made

    run: Callable[..., Tensor]
    reference: Callable[..., Tensor]
    if group.operation == "external":
        scale, scores = 1.0, random(3 * large, BATCH, n, group.width)
        inputs = [scores, random(3, BATCH, n, group.width, dtype=torch.float32)]
        run, reference = external_attention, external_attention_reference
    else:
        scale, queries = group.width**-0.5, random(large, BATCH, n, group.width)
        inputs = [queries, random(1, BATCH, m, group.width), random(1, BATCH, m, group.value_width)]
        run, reference = attention, attention_reference
    upstream = random(1, BATCH, n, group.value_width)

    def everything(function: Callable[..., Tensor], *, exact: bool, **options: Any) -> list[Tensor]:
        leaves = [(t.double() if exact else t).detach().requires_grad_() for t in inputs]
        out = function(*leaves, scale=scale, **options)
        return [out.detach(), *torch.autograd.grad(out, leaves, upstream.to(out.dtype))]

    exact = everything(reference, exact=True)
    eager = everything(reference, exact=False)
    with poisoned_memory():
        ours = everything(run, exact=False, impl="triton")
    shares = []
    for mine, theirs, right in zip(ours, eager, exact, strict=True):
        allowed = 2 * (theirs.double() - right).abs().max()
        allowed += ROUNDINGS * torch.finfo(group.dtype).eps * right.abs().max().clamp(min=1)
        shares.append(((mine.double() - right).abs().max() / allowed).item())
    return max(shares, key=lambda share: float("inf") if share != share else share)


def strided(tensor: Tensor) -> Tensor:
    """The same values in columns of a wider matrix that starts at an odd place, transposed in memory."""
    batch, rows, width = tensor.shape
    wide = tensor.new_full((batch, width + 5, rows + 3), float("nan"))
    view = wide[:, 3 : width + 3, 1 : rows + 1].transpose(1, 2)
    view.copy_(tensor)
    return view

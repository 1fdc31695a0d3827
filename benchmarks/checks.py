"""Every Triton kernel against float64: all dtypes, odd sizes, strides, large logits, poisoned memory.

Of the kernels that look at upsampled logits losses, gradients, argmax and counts. What is allowed
`kernels/tuning/judge.py` says. Groups of cases run in several processes, because most of the time is
compiling.
B batch, K classes, hw map, HW output.
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

from benchmarks.machine import Machine, poisoned_memory, short, this_machine
from benchmarks.phases import Session
from segdeformer.cores import num_cores
from segdeformer.kernels.tuning.cases import WIDTHS_OF, attention_inputs, loss_step, make_loss_task
from segdeformer.kernels.tuning.clock import synchronize
from segdeformer.kernels.tuning.crew import Crew, Over, Work, stage
from segdeformer.kernels.tuning.judge import (
    ROUNDINGS,
    LossTask,
    Verdict,
    expected_argmax,
    expected_loss,
    judge,
    worst_row_error,
)
from segdeformer.kernels.upsample.argmax import upsample_argmax, upsample_confusion
from segdeformer.kernels.upsample.cross_entropy import upsample_cross_entropy

MOST_WORKERS = 16  # each holds a few hundred MiB of the GPU
MOST_LOSSES_OF_A_GROUP = 3  # processes; then its further cases are left out
BATCH = 2
LARGE = 40  # times the usual logits: nearly all weight on one key
LARGE_ROUNDINGS = 48  # epsilons: such logits are rounded themselves, which shows in their exponentials
ODD_WIDTHS = ((19, 19), (64, 32), (150, 160), (160, 512))  # each makes other panels
# Only the kind of a size makes other code: 1, multiples of 16, others; and few keys, which have their kernel.
SIZES = ((17, 63), (128, 128), (1000, 200))
MORE_SIZES = ((63, 1000), (1, 1), (1, 1000), (1000, 1), (200, 17), (128, 63))
CLASSES = (150, 19, 171, 2)
FEWER_CLASSES = (150, 2)
IGNORED, STRAY = 0.3, 200
FLOAT32_ERRORS = 1e-6, 4e-6  # of a loss, or of 1 if that is more, and of a place's slopes
RESIZES = (  # map, output
    ((16, 24), (64, 96)),  # 4 times
    ((128, 171), (512, 683)),  # 4.0027 times, odd
    ((5, 6), (80, 96)),  # 16 times
    ((33, 17), (33, 17)),  # the same
    ((16, 24), (8, 12)),  # half
    ((1, 1), (9, 5)),  # from one pixel
    ((5, 6), (1, 1)),  # to one pixel
)
REHEARSED_RESIZES = (((2, 3), (8, 12)), ((2, 2), (3, 5)), ((1, 1), (3, 2)))
NUM_USUAL_RESIZES = 2
RIGHT = Verdict(0.0, 0.0, None)
LAYOUTS = {"contiguous": torch.contiguous_format, "channels-last": torch.channels_last}


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


class LossCase(NamedTuple):
    """One way to call the loss."""

    layout: str
    labels_dtype: torch.dtype
    weighted: bool
    options: dict[str, Any]

    @property
    def name(self) -> str:
        labels = str(self.labels_dtype).removeprefix("torch.")
        extras = [*(["class weights"] * self.weighted), *(f"{k} {v}" for k, v in self.options.items())]
        return ", ".join([self.layout, f"{labels} labels", *extras])


CASES = (
    LossCase("contiguous", torch.uint8, False, {}),
    LossCase("channels-last", torch.int64, True, {}),
    LossCase("channels-last", torch.uint8, False, {"label_smoothing": 0.1, "average": "all"}),
    LossCase("contiguous", torch.int64, True, {"label_smoothing": 0.2, "average": "all"}),
)


class UpsamplingGroup(NamedTuple):
    """All cases of one resize and one dtype: one task for a process, since they share compiled kernels."""

    size: tuple[int, int]  # hw
    full: tuple[int, int]  # HW
    dtype: torch.dtype
    classes: tuple[int, ...]
    cases: tuple[LossCase, ...]

    @property
    def name(self) -> str:
        (h, w), (height, width) = self.size, self.full
        return f"upsampling {h}x{w} -> {height}x{width} {str(self.dtype).removeprefix('torch.')}"


AnyGroup = Group | UpsamplingGroup


def check_groups(machine: Machine) -> tuple[list[AnyGroup], list[AnyGroup]]:
    """What the decoder runs, and the rest."""
    pairs = zip(attention_groups(machine), upsampling_groups(machine), strict=True)
    first, further = ([*attention, *upsampling] for attention, upsampling in pairs)
    return first, further


def attention_groups(machine: Machine) -> tuple[list[Group], list[Group]]:
    """The decoder's widths in the usual dtype; then other dtypes, more sizes of each kind, odd widths."""
    usual, *others = machine.dtypes
    first = [group for pair in itertools.zip_longest(*_decoder(usual)) for group in pair if group is not None]
    further = []
    for dtype in others:
        external, internal = _decoder(dtype)
        further += external[:2] + internal[:3]
    further += [Group("external", 2, 2, usual, _square(SIZES))]
    further += [Group("attention", d, e, usual, SIZES) for d, e in ODD_WIDTHS]
    further += [
        Group("external", 150, 150, usual, ((1, 1), (200, 200), (1000, 1000)), "more sizes"),
        Group("attention", 256, 256, usual, MORE_SIZES, "more sizes"),
    ]
    if machine.is_rehearsal:
        return [_smaller(group) for group in first[:3]], [_smaller(g) for g in further[:2] + further[-1:]]
    return first, further


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


def upsampling_groups(machine: Machine) -> tuple[list[UpsamplingGroup], list[UpsamplingGroup]]:
    """The usual resizes in the usual dtype; in the others, and with fewer cases the other resizes."""
    usual, *others = machine.dtypes
    sizes, classes = (REHEARSED_RESIZES, FEWER_CLASSES[1:]) if machine.is_rehearsal else (RESIZES, CLASSES)
    first = [UpsamplingGroup(*pair, usual, classes, CASES) for pair in sizes[:NUM_USUAL_RESIZES]]
    further = [group._replace(dtype=dtype) for group in first for dtype in others]
    further += [
        UpsamplingGroup(*pair, dtype, FEWER_CLASSES, CASES[place % 2 :: 2])
        for place, pair in enumerate(sizes[NUM_USUAL_RESIZES:])
        for dtype in (usual, torch.float32)
    ]
    return first, further[:1] + further[-1:] if machine.is_rehearsal else further


class Part(NamedTuple):
    """A group from one of its cases on, for a process."""

    group: AnyGroup
    first: int = 0


class Checked(NamedTuple):
    """A case was run."""

    name: str
    share: float  # of its allowance that it took; NaN where it did not come to that
    failure: str | None
    lost: bool = False  # with its process


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
    entries = session.records.section("checks")
    todo = deque(Part(group) for group in wanted if not right(entries.get(group.name)))
    num_left = len(todo)
    results: dict[str, list[Checked]] = {part.group.name: [] for part in todo}
    workers = min(MOST_WORKERS, num_cores())
    with Crew(patience_s=session.patience_s) as crew:
        for part, news in crew.run(check, todo, workers=workers, deadline=session.deadline):
            name, result = part.group.name, results[part.group.name]
            if isinstance(news, Checked):
                result.append(news)
                continue
            assert isinstance(news, Over)
            if news.lost is not None:
                result.append(Checked(news.stage, math.nan, news.lost, lost=True))
                print(f"{name}: {news.stage}: {news.lost}", flush=True)
                names = [case for case, _ in cases_of(part.group, session.machine)]
                rest = names.index(news.stage) + 1 if news.stage in names else len(names)
                if rest < len(names) and sum(c.lost for c in result) < MOST_LOSSES_OF_A_GROUP:
                    todo.append(Part(part.group, rest))
                    continue
            num_left -= 1
            entry = entry_of(result)
            session.records.add("checks", name, entry)
            state = f"{len(entry['failures'])} FAILED" if entry["failures"] else "ok"
            print(f"{name}: {entry['num_cases']} cases {state}", flush=True)
    return num_left


def entry_of(result: list[Checked]) -> dict[str, Any]:
    """What has become of a group."""
    failures = [f"{case.name}: {case.failure}" for case in result if case.failure is not None]
    worst = max((case.share for case in result if case.failure is None), default=0.0)
    return {"num_cases": len(result), "failures": failures, "worst_share_of_allowed": short(worst)}


def right(entry: dict[str, Any] | None) -> bool:
    """Whether a group ran and nothing failed."""
    return entry is not None and not entry["failures"]


def cases_of(group: AnyGroup, machine: Machine) -> Iterator[tuple[str, Callable[[], Verdict]]]:
    """Names, and what judges a case."""
    if isinstance(group, UpsamplingGroup):
        return upsampling_cases(group, machine)
    return attention_cases(group, machine)


def attention_cases(group: Group, machine: Machine) -> Iterator[tuple[str, Callable[[], Verdict]]]:
    """Those of an attention's group."""
    cases = ["plain", "strided", "large logits"]
    if group.operation == "attention":
        cases.insert(1, "biased")
    if machine.is_rehearsal and group.dtype == torch.float32:
        # NumPy's products k q and q k differ by several roundings: its backward misses its forward's lse.
        cases.remove("large logits")
    for (n, m), case in itertools.product(group.sizes, cases):
        yield f"{n} x {m}, {case}", partial(check_attention, group, n, m, case, machine)


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
        biased=case == "biased",
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


def upsampling_cases(group: UpsamplingGroup, machine: Machine) -> Iterator[tuple[str, Callable[[], Verdict]]]:
    """Names, and what judges a case."""
    for k in group.classes:
        for case in group.cases:
            yield f"loss, {k} classes, {case.name}", partial(check_loss, group, k, case, machine)
        for layout in LAYOUTS:
            name = f"{k} classes, {layout}"
            yield f"argmax, {name}", partial(check_argmax, group, k, layout, machine)
            yield f"counts, {name}", partial(check_counts, group, k, layout, machine)
        yield f"equal logits, {k} classes", partial(check_ties, group, k, machine)
        yield f"no and stray labels, {k} classes", partial(check_special_labels, group, k, machine)


def make_task(group: UpsamplingGroup, num_classes: int, layout: str, machine: Machine) -> LossTask:
    """Random logits in this layout, and labels."""
    kind = {"dtype": group.dtype, "device": machine.device}
    task = make_loss_task(BATCH, num_classes, group.size, group.full, ignored=IGNORED, **kind)
    if task.labels_BHW.min() == task.ignore_index:
        task.labels_BHW[0, 0, 0] = 0  # else the mean is of nothing
    return task._replace(logits_BKhw=task.logits_BKhw.contiguous(memory_format=LAYOUTS[layout]))


def check_loss(group: UpsamplingGroup, num_classes: int, case: LossCase, machine: Machine) -> Verdict:
    """Loss and gradient."""
    task = make_task(group, num_classes, case.layout, machine)
    weights_K = torch.linspace(0.5, 2.0, num_classes, device=machine.device) if case.weighted else None
    labels_BHW = task.labels_BHW.to(case.labels_dtype)
    task = task._replace(labels_BHW=labels_BHW, class_weights_K=weights_K, **case.options)
    loss = partial(upsample_cross_entropy, class_weights=weights_K, impl="triton", **case.options)
    with poisoned_memory():
        results = loss_step(task, loss)()
    expected = expected_loss(task)
    if group.dtype == torch.float32:  # whose textbook form is no yardstick: it sums in another order
        limits = zip(expected, FLOAT32_ERRORS, strict=True)
        expected = [right._replace(eager_error=0.0, rounding=limit) for right, limit in limits]
    return judge(results, expected)


def check_special_labels(group: UpsamplingGroup, num_classes: int, machine: Machine) -> Verdict:
    """Without a pixel that counts, loss and gradient are 0; a label that is no class makes the loss NaN."""
    logits_BKhw, labels_BHW, *_ = make_task(group, num_classes, "contiguous", machine)
    leaf = logits_BKhw.detach().requires_grad_()
    with poisoned_memory():
        loss = upsample_cross_entropy(leaf, torch.full_like(labels_BHW, 255), impl="triton")
        loss.backward()
        labels_BHW[-1, -1, -1] = STRAY
        stray = upsample_cross_entropy(logits_BKhw, labels_BHW, impl="triton")
    assert leaf.grad is not None
    assert loss.item() == 0, f"loss of ignored pixels is {loss.item()}"
    assert not leaf.grad.any(), "ignored pixels have a gradient"
    assert stray.isnan(), f"with a label that is no class the loss is {stray.item()}"
    return RIGHT


def check_argmax(group: UpsamplingGroup, num_classes: int, layout: str, machine: Machine) -> Verdict:
    """The ids and their softmax."""
    logits_BKhw = make_task(group, num_classes, layout, machine).logits_BKhw
    with poisoned_memory():
        ids_BHW, confidence_BHW = upsample_argmax(logits_BKhw, group.full, confidence=True, impl="triton")
    assert confidence_BHW is not None
    return judge([ids_BHW, confidence_BHW], expected_argmax(logits_BKhw))


def check_counts(group: UpsamplingGroup, num_classes: int, layout: str, machine: Machine) -> Verdict:
    """The confusion matrix, added to what was there; labels that are no class do not count."""
    logits_BKhw, labels_BHW, *_ = make_task(group, num_classes, layout, machine)
    labels_BHW[0, -1, -1] = STRAY
    matrix_KK = torch.full((num_classes, num_classes), 5, dtype=torch.int64, device=machine.device)
    with poisoned_memory():
        labels = labels_BHW.to(torch.uint8)
        ids_BHW = upsample_confusion(logits_BKhw, labels, matrix_KK, impl="triton").ids_BHW
    known_BHW = labels_BHW < num_classes
    expected_KK = torch.full((num_classes, num_classes), 5, dtype=torch.int64)
    pairs = labels_BHW[known_BHW].cpu(), ids_BHW[known_BHW].long().cpu()
    expected_KK.index_put_(pairs, torch.ones((), dtype=torch.int64), accumulate=True)
    assert torch.equal(matrix_KK.cpu(), expected_KK), "wrong counts"
    return judge([ids_BHW], expected_argmax(logits_BKhw))


def check_ties(group: UpsamplingGroup, num_classes: int, machine: Machine) -> Verdict:
    """Of equal logits the lowest id is chosen."""
    logits_BKhw = torch.zeros(1, num_classes, *group.size, dtype=group.dtype, device=machine.device)
    with poisoned_memory():
        ids_BHW = upsample_argmax(logits_BKhw, group.full, impl="triton").ids_BHW
    assert not ids_BHW.any(), f"of equal logits {int(ids_BHW.max())} is chosen"
    return RIGHT

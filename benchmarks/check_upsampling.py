"""What `checks` asks of the kernels that look at upsampled logits: losses, gradients, argmax, counts.

B batch, K classes, hw map, HW output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch

from benchmarks.machine import Machine, poisoned_memory
from segdeformer.kernels.tuning.cases import loss_step, make_loss_task
from segdeformer.kernels.tuning.judge import LossTask, Verdict, expected_argmax, expected_loss, judge
from segdeformer.kernels.upsample.argmax import upsample_argmax, upsample_confusion
from segdeformer.kernels.upsample.cross_entropy import upsample_cross_entropy

CLASSES = (150, 19, 171, 2)
FEWER_CLASSES = (150, 2)
BATCH = 2
IGNORED, STRAY = 0.3, 200
FLOAT32_ERRORS = 1e-6, 4e-6  # of a loss, or of 1 if that is more, and of a place's slopes
SIZES = (  # map, output
    ((16, 24), (64, 96)),  # 4 times
    ((128, 171), (512, 683)),  # 4.0027 times, odd
    ((5, 6), (80, 96)),  # 16 times
    ((33, 17), (33, 17)),  # the same
    ((16, 24), (8, 12)),  # half
    ((1, 1), (9, 5)),  # from one pixel
    ((5, 6), (1, 1)),  # to one pixel
)
REHEARSED_SIZES = (((2, 3), (8, 12)), ((2, 2), (3, 5)), ((1, 1), (3, 2)))
NUM_USUAL_SIZES = 2
RIGHT = Verdict(0.0, 0.0, None)
LAYOUTS = {"contiguous": torch.contiguous_format, "channels-last": torch.channels_last}


class Case(NamedTuple):
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
    Case("contiguous", torch.uint8, False, {}),
    Case("channels-last", torch.int64, True, {}),
    Case("channels-last", torch.uint8, False, {"label_smoothing": 0.1, "average": "all"}),
    Case("contiguous", torch.int64, True, {"label_smoothing": 0.2, "average": "all"}),
)


class UpsamplingGroup(NamedTuple):
    """All cases of one resize and one dtype: one task for a process, since they share compiled kernels."""

    size: tuple[int, int]  # hw
    full: tuple[int, int]  # HW
    dtype: torch.dtype
    classes: tuple[int, ...]
    cases: tuple[Case, ...]

    @property
    def name(self) -> str:
        (h, w), (height, width) = self.size, self.full
        return f"upsampling {h}x{w} -> {height}x{width} {str(self.dtype).removeprefix('torch.')}"


def first_upsampling_groups(machine: Machine) -> list[UpsamplingGroup]:
    """The usual resizes in the usual dtype."""
    return [_usual(sizes, machine.halves[0]) for sizes in _sizes(machine)[:NUM_USUAL_SIZES]]


def further_upsampling_groups(machine: Machine) -> list[UpsamplingGroup]:
    """The usual resizes in the other dtypes; the others in the usual one and in float32, with fewer cases."""
    sizes, usual = _sizes(machine), machine.halves[0]
    found = [
        _usual(pair, dtype) for pair in sizes[:NUM_USUAL_SIZES] for dtype in machine.dtypes if dtype != usual
    ]
    for place, pair in enumerate(sizes[NUM_USUAL_SIZES:]):
        for dtype in (usual, torch.float32):
            found.append(UpsamplingGroup(*pair, dtype, FEWER_CLASSES, CASES[place % 2 :: 2]))
    return found[:1] + found[-1:] if machine.is_rehearsal else found


def _usual(sizes: tuple[tuple[int, int], tuple[int, int]], dtype: torch.dtype) -> UpsamplingGroup:
    return UpsamplingGroup(*sizes, dtype, FEWER_CLASSES[1:] if sizes in REHEARSED_SIZES else CLASSES, CASES)


def _sizes(machine: Machine) -> tuple[tuple[tuple[int, int], tuple[int, int]], ...]:
    return REHEARSED_SIZES if machine.is_rehearsal else SIZES


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


def check_loss(group: UpsamplingGroup, num_classes: int, case: Case, machine: Machine) -> Verdict:
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

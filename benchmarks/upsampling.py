"""Loss and argmax of upsampled logits: our kernels and strips against the two textbook lines.

The two lines are F.interpolate(mode="bilinear", align_corners=False) and F.cross_entropy or argmax, eager and
through torch.compile.
B batch, K classes, hw map, HW image.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.contenders import Judge
from benchmarks.machine import Machine
from benchmarks.phases import Contender, Session, know_ceilings, measure_contenders, measure_rows
from segdeformer.kernels.impl import Impl
from segdeformer.kernels.tuning.cases import MAP_PX, SCALE, loss_step, make_loss_task, step
from segdeformer.kernels.tuning.crew import COMPILE_PATIENCE_S, EXACT_PATIENCE_S, stage
from segdeformer.kernels.tuning.judge import LossTask, expected_argmax, expected_loss, judge
from segdeformer.kernels.upsample.argmax import upsample_argmax
from segdeformer.kernels.upsample.cross_entropy import upsample_cross_entropy

ROW_SECONDS = 0.6
FULL_SIZE_COPIES = 5  # that the two lines may hold at once: logits, log-softmax, gradients
# Batch, classes, sides of map and image.
SHAPES = tuple((batch, k, MAP_PX[k], SCALE * MAP_PX[k]) for batch, k in ((16, 150), (4, 19)))
REHEARSED_SHAPES = ((2, 19, 2, 8),)
IGNORE = 255


class UpsamplingRow(NamedTuple):
    """One line of the table."""

    operation: str  # loss or argmax
    batch: int
    num_classes: int
    map_px: int  # of a side
    image_px: int
    dtype: torch.dtype
    training: bool  # forward + backward, else forward

    @property
    def name(self) -> str:
        dtype = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[self.dtype]
        what = "forward + backward" if self.training else "forward"
        shape = f"({self.batch}, {self.num_classes}, {self.map_px} -> {self.image_px})"
        return f"{self.operation} {shape} {dtype} {what}"

    @property
    def full_bytes(self) -> int:
        """Of the logits at the image's size."""
        return self.batch * self.num_classes * self.image_px**2 * self.dtype.itemsize

    @property
    def least_bytes(self) -> int:
        """What any way must move: logits, labels or ids, and in training the gradient."""
        logits = self.batch * self.num_classes * self.map_px**2 * self.dtype.itemsize
        pixels = self.batch * self.image_px**2 * (8 if self.operation == "loss" else 1)
        return logits * (2 if self.training else 1) + pixels


def first_rows(machine: Machine) -> list[UpsamplingRow]:
    """Those of the goals: training's loss, a prediction's argmax, in the usual dtype."""
    shapes = REHEARSED_SHAPES if machine.is_rehearsal else SHAPES
    kinds = (("loss", True), ("argmax", False))
    return [UpsamplingRow(what, *s, machine.halves[0], training) for s in shapes for what, training in kinds]


def further_rows(machine: Machine) -> list[UpsamplingRow]:
    """In float32, and the loss alone."""
    first = first_rows(machine)
    forward = [row._replace(training=False) for row in first if row.training]
    if machine.is_rehearsal:
        return []
    return [row._replace(dtype=torch.float32) for row in first] + forward


def two_lines(row: UpsamplingRow, logits_BKhw: Tensor, labels_BHW: Tensor) -> Tensor:
    """What everybody writes. Of the labels only the size counts for a prediction."""
    full_BKHW = F.interpolate(logits_BKhw, labels_BHW.shape[1:], mode="bilinear", align_corners=False)
    if row.operation == "loss":
        return F.cross_entropy(full_BKHW, labels_BHW, ignore_index=IGNORE)
    return full_BKHW.argmax(dim=1)


def ours(row: UpsamplingRow, logits_BKhw: Tensor, labels_BHW: Tensor, *, impl: Impl) -> Tensor:
    if row.operation == "loss":
        return upsample_cross_entropy(logits_BKhw, labels_BHW, impl=impl)
    height, width = labels_BHW.shape[1:]
    return upsample_argmax(logits_BKhw, (height, width), impl=impl).ids_BHW


def contenders(row: UpsamplingRow, task: LossTask, right: Judge, machine: Machine) -> Iterator[Contender]:
    """Who computes the row from logits and labels; ours first."""
    torch.compiler.reset()  # it gives up on a function that it compiled for too many shapes
    backend = "eager" if machine.is_rehearsal else "inductor"
    textbook = partial(two_lines, row)
    for name, function in (
        ("ours (triton)", partial(ours, row, impl="triton")),
        ("ours (strips)", partial(ours, row, impl="sdpa")),  # any name that is not theirs takes the strips
        ("eager", textbook),
        ("torch.compile", torch.compile(textbook, dynamic=False, fullgraph=True, backend=backend)),
    ):
        run = step(function, (task.logits_BKhw, task.labels_BHW), None)
        if row.operation == "loss":
            run = loss_step(task, function, training=row.training)
        needs_bytes = 0 if name.startswith("ours") else FULL_SIZE_COPIES * row.full_bytes
        patience_s = COMPILE_PATIENCE_S if name == "torch.compile" else None
        work = {"least_gb_per_s": row.least_bytes / 1e6}
        yield Contender(name, run, right, {}, needs_bytes, patience_s, work)


def measure(row: UpsamplingRow, machine: Machine, without: Mapping[str, str]) -> dict[str, Any]:
    """A row's contenders, but those `without`, for these reasons."""
    stage("exact results", EXACT_PATIENCE_S)
    size, full = (row.map_px,) * 2, (row.image_px,) * 2
    task = make_loss_task(row.batch, row.num_classes, size, full, dtype=row.dtype, device=machine.device)
    if row.operation == "loss":
        right = expected_loss(task)
    else:
        right = expected_argmax(task.logits_BKhw, eager_ids=two_lines(row, task.logits_BKhw, task.labels_BHW))
    named = contenders(row, task, partial(judge, expected=right), machine)
    entries = measure_contenders(named, machine, without, seconds=ROW_SECONDS)
    return {**row._asdict(), "dtype": str(row.dtype), "contenders": entries}


def run(session: Session, wanted: Iterable[UpsamplingRow]) -> int:
    """Measure what is not recorded yet; how many rows are left."""
    know_ceilings(session)
    return measure_rows(session, "upsampling", {row.name: row for row in wanted}, measure)

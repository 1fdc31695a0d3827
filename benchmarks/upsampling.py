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

from benchmarks.machine import Machine
from benchmarks.phases import (
    Contender,
    Judge,
    Session,
    kind_name,
    know_ceilings,
    measure_contenders,
    measure_rows,
)
from segdeformer.kernels.tuning.cases import MAP_PX, SCALE, UpsamplingInputs, make_loss_task
from segdeformer.kernels.tuning.crew import COMPILE_PATIENCE_S, EXACT_PATIENCE_S, stage
from segdeformer.kernels.tuning.judge import expected_argmax, expected_loss, judge

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
        shape = f"({self.batch}, {self.num_classes}, {self.map_px} -> {self.image_px})"
        return f"{self.operation} {shape} {kind_name(self.dtype, training=self.training)}"

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


def contenders(
    row: UpsamplingRow, inputs: UpsamplingInputs, right: Judge, machine: Machine
) -> Iterator[Contender]:
    """Who computes the row from logits and labels; ours first."""
    torch.compiler.reset()  # it gives up on a function that it compiled for too many shapes
    backend = "eager" if machine.is_rehearsal else "inductor"
    textbook = partial(two_lines, row)
    compiled = torch.compile(textbook, dynamic=False, fullgraph=True, backend=backend)
    for name, run, needs_bytes in (
        ("ours (triton)", inputs.step("triton"), 0),
        ("ours (strips)", inputs.step("sdpa"), 0),  # any name that is not theirs takes the strips
        ("eager", inputs.step_of(textbook), FULL_SIZE_COPIES * row.full_bytes),
        ("torch.compile", inputs.step_of(compiled), FULL_SIZE_COPIES * row.full_bytes),
    ):
        patience_s = COMPILE_PATIENCE_S if name == "torch.compile" else None
        work = {"least_gb_per_s": row.least_bytes / 1e6}
        yield Contender(name, run, right, {}, needs_bytes, patience_s, work)


def measure(row: UpsamplingRow, machine: Machine, without: Mapping[str, str]) -> dict[str, Any]:
    """A row's contenders, but those `without`, for these reasons."""
    stage("exact results", EXACT_PATIENCE_S)
    size, full = (row.map_px,) * 2, (row.image_px,) * 2
    task = make_loss_task(row.batch, row.num_classes, size, full, dtype=row.dtype, device=machine.device)
    if row.operation == "loss":
        inputs, right = UpsamplingInputs(task, "upsample_cross_entropy", row.training), expected_loss(task)
    else:
        inputs = UpsamplingInputs(task, "upsample_argmax")
        eager_ids = two_lines(row, task.logits_BKhw, task.labels_BHW)
        right = expected_argmax(task.logits_BKhw, eager_ids=eager_ids)
    named = contenders(row, inputs, partial(judge, expected=right), machine)
    return {
        **row._asdict(),
        "dtype": str(row.dtype),
        "contenders": measure_contenders(named, machine, without),
    }


def run(session: Session, wanted: Iterable[UpsamplingRow]) -> int:
    """Measure what is not recorded yet; how many rows are left."""
    know_ceilings(session)
    return measure_rows(session, "upsampling", {row.name: row for row in wanted}, measure)

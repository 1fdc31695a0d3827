"""Loss and winners of upsampled logits: our kernels and strips against the two textbook lines.

The two lines are F.interpolate(mode="bilinear", align_corners=False) and F.cross_entropy or argmax, eager and
through torch.compile. Every contender's loss, gradient or winners are checked against float64 first; those
that are right run in turn, the L2 cache flushed before each.
B batch, K classes, hw map, HW image.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.kernels import first_run, know_ceilings, summary
from benchmarks.machine import Machine, free_bytes, peak_mib, short, timings
from benchmarks.phases import Session, begin_contender, measure_rows
from segdeformer.kernels.crew import COMPILE_PATIENCE_S, stage
from segdeformer.kernels.tune import EXACT_PATIENCE_S
from segdeformer.kernels.upsample_argmax import upsample_argmax
from segdeformer.kernels.upsample_cross_entropy import upsample_cross_entropy
from segdeformer.kernels.upsample_oracle import TIE_ROUNDINGS, winners_error
from segdeformer.kernels.upsample_races import LossMatch, make_loss_task

ROW_SECONDS = 0.6
FULL_SIZE_COPIES = 5  # that the two lines may hold at once: logits, log-softmax, gradients
SHAPES = ((16, 150, 128, 512), (4, 19, 256, 1024))  # batch, classes, sides of map and image
REHEARSED_SHAPES = ((2, 19, 2, 8),)
IGNORE = 255


class UpsamplingRow(NamedTuple):
    """One comparison."""

    operation: str  # loss or winners
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
    """Those of the goals: training's loss, a prediction's winners, in the usual dtype."""
    shapes = REHEARSED_SHAPES if machine.is_rehearsal else SHAPES
    kinds = (("loss", True), ("winners", False))
    return [UpsamplingRow(what, *s, machine.halves[0], training) for s in shapes for what, training in kinds]


def further_rows(machine: Machine) -> list[UpsamplingRow]:
    """In float32, and the loss alone."""
    first = first_rows(machine)
    forward = [row._replace(training=False) for row in first if row.training]
    if machine.is_rehearsal:
        return []
    return [row._replace(dtype=torch.float32) for row in first] + forward


def two_lines_of_loss(logits_BKhw: Tensor, labels_BHW: Tensor) -> Tensor:
    """What everybody writes."""
    full_BKHW = F.interpolate(logits_BKhw, labels_BHW.shape[1:], mode="bilinear", align_corners=False)
    return F.cross_entropy(full_BKHW, labels_BHW, ignore_index=IGNORE)


def two_lines_of_winners(logits_BKhw: Tensor, labels_BHW: Tensor) -> Tensor:
    """The same, for a prediction; of the labels only the size counts."""
    full_BKHW = F.interpolate(logits_BKhw, labels_BHW.shape[1:], mode="bilinear", align_corners=False)
    return full_BKHW.argmax(dim=1)


def our_winners(logits_BKhw: Tensor, labels_BHW: Tensor, *, impl: Any) -> Tensor:
    height, width = labels_BHW.shape[1:]
    return upsample_argmax(logits_BKhw, (height, width), impl=impl).ids_BHW


def contenders(row: UpsamplingRow, machine: Machine) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """Who computes the row from logits and labels; ours first."""
    ours: Callable[..., Tensor] = upsample_cross_entropy if row.operation == "loss" else our_winners
    textbook = two_lines_of_loss if row.operation == "loss" else two_lines_of_winners
    torch.compiler.reset()  # it gives up on a function that it compiled for too many shapes
    backend = "eager" if machine.is_rehearsal else "inductor"
    return {
        "ours (triton)": functools.partial(ours, impl="triton"),
        "ours (strips)": functools.partial(ours, impl="sdpa"),  # any name that is not theirs takes the strips
        "eager": textbook,
        "torch.compile": torch.compile(textbook, dynamic=False, fullgraph=True, backend=backend),
    }


class Inputs:
    """A row's logits and labels, and how its results are judged."""

    def __init__(self, row: UpsamplingRow, machine: Machine) -> None:
        size, full = (row.map_px,) * 2, (row.image_px,) * 2
        task = make_loss_task(row.batch, row.num_classes, size, full, dtype=row.dtype, device=machine.device)
        self.training = row.training
        self.labels_BHW = task.labels_BHW
        self.logits_BKhw = task.logits_BKhw.requires_grad_(row.training)
        self.upstream = torch.tensor(task.upstream, device=machine.device)
        self.match = LossMatch(task) if row.operation == "loss" else None
        if self.match is None:
            ids_BHW = two_lines_of_winners(self.logits_BKhw, self.labels_BHW)
            tie = TIE_ROUNDINGS * torch.finfo(torch.float32).eps
            self.allowed = 2 * winners_error(self.logits_BKhw, ids_BHW).shortfall + tie

    def step(self, function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], list[Tensor]]:
        """One forward, or forward + backward."""

        def run() -> list[Tensor]:
            with torch.set_grad_enabled(self.training):
                out = function(self.logits_BKhw, self.labels_BHW)
                if not self.training:
                    return [out]
                return [out, *torch.autograd.grad(out, self.logits_BKhw, self.upstream.to(out.dtype))]

        return run

    def judge(self, results: list[Tensor]) -> tuple[float, str | None]:
        """The worst error, and why the results are not acceptable."""
        if self.match is not None:
            return max(self.match.errors(results)), self.match.wrong(results)
        shortfall = winners_error(self.logits_BKhw, results[0]).shortfall
        if not shortfall <= self.allowed:
            return shortfall, f"wrong winners: off by {shortfall:.2g}, allowed {self.allowed:.2g}"
        return shortfall, None


def measure(row: UpsamplingRow, machine: Machine, without: Mapping[str, str]) -> dict[str, Any]:
    """Check everyone but those `without`, for these reasons; then time those that are right."""
    stage("exact results", EXACT_PATIENCE_S)
    inputs = Inputs(row, machine)
    entries: dict[str, dict[str, Any]] = {}
    runs: dict[str, Callable[[], object]] = {}
    for name, function in contenders(row, machine).items():
        entry = entries[name] = {}
        if name in without:
            entry["refused"] = without[name]
            continue
        begin_contender(name, COMPILE_PATIENCE_S if name == "torch.compile" else None)
        if not name.startswith("ours") and FULL_SIZE_COPIES * row.full_bytes > 0.8 * free_bytes(machine):
            entry["refused"] = (
                f"too little memory for several full-size logits, {row.full_bytes / 2**30:.1f} GiB"
            )
            continue
        run = inputs.step(function)
        outcome = first_run(run, inputs.judge, machine)
        if isinstance(outcome, str):
            entry["refused"] = outcome
            continue
        entry["worst_error"] = short(outcome)
        peak = peak_mib(run, machine)
        entry["peak_mib"] = None if peak is None else round(peak, 1)
        runs[name] = run
    for name, (ms, eager_ms) in timings(runs, machine, seconds=ROW_SECONDS).items():
        gb_per_s = short(row.least_bytes / ms / 1e6)
        entries[name] |= {"ms": short(ms), "eager_ms": short(eager_ms), "least_gb_per_s": gb_per_s}
    return {**row._asdict(), "dtype": str(row.dtype), "contenders": entries}


def run(session: Session, wanted: Iterable[UpsamplingRow]) -> int:
    """Measure what is not recorded yet; how many rows are left."""
    know_ceilings(session)
    return measure_rows(session, "upsampling", {row.name: row for row in wanted}, measure, summary=summary)

"""One model under several protocols, on the same images in one pass: what few keys or windows cost and save.

N images, K classes.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from typing import Any, NamedTuple

import numpy as np
import torch

from segdeformer.config import DataConfig, EvalConfig
from segdeformer.data.classes import ClassTable
from segdeformer.data.samples import Dataset
from segdeformer.errors import UsageError
from segdeformer.inference.evaluate import Report, Tally, add_image, read_ahead
from segdeformer.inference.statistics import Interval, draws, gain_intervals, image_sums, ious
from segdeformer.inference.views import make_views
from segdeformer.kernels.tuning.clock import synchronize
from segdeformer.models.few_keys import key_stride_set, num_scores
from segdeformer.models.segmenter import Segmenter
from segdeformer.runtime import ON_CPU, Runtime
from segdeformer.runtime.device import moved

TOLERANCE = 0.001  # of mIoU, which is a share: what a recommended key stride may lose


class ProtocolScore(NamedTuple):
    """A model under one protocol, beside itself under the first one."""

    name: str
    protocol: EvalConfig
    report: Report
    change: Interval  # 95 % of the difference in mIoU to the first, by resampled images
    agreement: float  # share of pixels whose class is that of the first
    most_changed: tuple[str, float]  # the class whose IoU differs most, and by how much
    ms: float  # median of the images: model and protocol, to logits at the decoder's resolution
    num_scores: int  # products of a query with a key, mean of the images

    @property
    def stride(self) -> int:
        """Of its keys."""
        return self.protocol.key_stride or 1


class _Sums:
    """Of one protocol, over the images."""

    def __init__(self, classes: ClassTable) -> None:
        self.tally = Tally(classes)
        self.counts: list[np.ndarray] = []
        self.seconds: list[float] = []
        self.num_scores: list[int] = []
        self.num_agreeing = 0
        self.num_pixels = 0


class Comparison:
    """What is summed over the images under each protocol, by its name; others are held to the first."""

    def __init__(self, classes: ClassTable, protocols: Mapping[str, EvalConfig]) -> None:
        self.protocols = dict(protocols)
        self.sums = {name: _Sums(classes) for name in protocols}

    def rows(self) -> list[ProtocolScore]:
        """One for each protocol, in their order."""
        first, *_ = self.sums.values()
        exact = image_sums(np.stack(first.counts)[None])
        drawn = draws(len(first.counts), 1)
        rows = []
        for name, sums in self.sums.items():
            report = sums.tally.report()
            own = image_sums(np.stack(sums.counts)[None])
            changes_K = np.nan_to_num((ious(own) - ious(exact))[0])
            most = int(np.abs(changes_K).argmax())
            rows.append(
                ProtocolScore(
                    name=name,
                    protocol=self.protocols[name],
                    report=report,
                    change=gain_intervals(own, exact, drawn).miou,
                    agreement=sums.num_agreeing / sums.num_pixels,
                    most_changed=(report.classes.names[most], float(changes_K[most])),
                    ms=1e3 * statistics.median(sums.seconds),
                    num_scores=round(statistics.mean(sums.num_scores)),
                )
            )
        return rows


def compare_protocols(
    model: Segmenter,
    dataset: Dataset,
    comparison: Comparison,
    *,
    data: DataConfig,
    runtime: Runtime = ON_CPU,
) -> Generator[int, None, None]:
    """Every image under every protocol, in turn, so that drift hits all alike; gives the images done.

    Raises `UserError` as `evaluate_images` does, `UsageError` for a key stride that the model cannot have.
    """
    if runtime.processes.size > 1:
        raise UsageError("several protocols are compared by one process; leave out --nproc")
    model.eval()
    for sums in comparison.sums.values():
        sums.tally.move(runtime.device)
    with closing(read_ahead(dataset, range(len(dataset)))) as samples:
        for index, sample in enumerate(samples, start=1):
            labels_HW = moved(torch.tensor(sample.labels_HW), runtime.device)
            first_HW: torch.Tensor | None = None
            for name, protocol in comparison.protocols.items():
                sums = comparison.sums[name]
                before_KK = sums.tally.counts_KK.clone()
                synchronize(runtime.device)
                began = time.perf_counter()
                views = make_views(model, sample.image_HW3, protocol, data, runtime.device)
                synchronize(runtime.device)
                sums.seconds.append(time.perf_counter() - began)
                with torch.inference_mode():
                    ids_HW = add_image(sums.tally, views, labels_HW, runtime.impl)
                sums.tally.num_images += 1
                sums.counts.append((sums.tally.counts_KK - before_KK).cpu().numpy())
                with key_stride_set(model, protocol.key_stride):
                    sizes = [size for view in views for size in view.map_sizes]
                    sums.num_scores.append(sum(num_scores(model, *size) for size in sizes))
                first_HW = ids_HW if first_HW is None else first_HW
                sums.num_agreeing += int((ids_HW == first_HW).sum())
                sums.num_pixels += labels_HW.numel()
            yield index


def recommended_stride(rows: Sequence[ProtocolScore]) -> ProtocolScore:
    """The largest key stride whose interval stays above a loss of 0.1 mIoU points; the first has all keys."""
    return max((row for row in rows if row.change.low > -TOLERANCE), key=lambda row: row.stride)


def comparison_values(rows: Sequence[ProtocolScore]) -> list[dict[str, Any]]:
    """The rows as JSON values; fractions in [0, 1]."""
    return [
        {
            "name": row.name,
            "mode": row.protocol.mode,
            "key_stride": row.protocol.key_stride,
            "miou": row.report.scores.miou,
            "miou_change_95": list(row.change),
            "agreement": row.agreement,
            "most_changed_class": row.most_changed[0],
            "most_changed_iou": row.most_changed[1],
            "ms_per_image": row.ms,
            "attention_scores_per_image": row.num_scores,
        }
        for row in rows
    ]

"""What few keys cost and save: one model at several key strides, on the same images in one pass.

N images, K classes.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Generator, Sequence
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

EXACT = 1
TOLERANCE = 0.001  # of mIoU, which is a share: what a recommended stride may lose


class StrideScore(NamedTuple):
    """A model at one key stride, beside itself with all keys."""

    stride: int
    report: Report
    change: Interval  # 95 % of the difference in mIoU to all keys, by resampled images
    agreement: float  # share of pixels whose class is that of all keys
    most_changed: tuple[str, float]  # the class whose IoU differs most, and by how much
    ms: float  # median of the images: model and protocol, to logits at the decoder's resolution
    num_scores: int  # products of a query with a key, mean of the images


class StrideTally:
    """What is summed over the images for each stride; all keys are always among them."""

    def __init__(self, classes: ClassTable, strides: Sequence[int]) -> None:
        self.strides = sorted({EXACT, *strides})
        self.tallies = {stride: Tally(classes) for stride in self.strides}
        self.counts: dict[int, list[np.ndarray]] = {stride: [] for stride in self.strides}
        self.seconds: dict[int, list[float]] = {stride: [] for stride in self.strides}
        self.scores: dict[int, list[int]] = {stride: [] for stride in self.strides}
        self.num_agreeing = dict.fromkeys(self.strides, 0)
        self.num_pixels = 0

    def results(self) -> list[StrideScore]:
        """A row for each stride, from all keys on."""
        exact = image_sums(np.stack(self.counts[EXACT])[None])
        drawn = draws(len(self.counts[EXACT]), 1)
        rows = []
        for stride, tally in self.tallies.items():
            report = tally.report()
            own = image_sums(np.stack(self.counts[stride])[None])
            changes_K = np.nan_to_num((ious(own) - ious(exact))[0])
            most = int(np.abs(changes_K).argmax())
            rows.append(
                StrideScore(
                    stride=stride,
                    report=report,
                    change=gain_intervals(own, exact, drawn).miou,
                    agreement=self.num_agreeing[stride] / self.num_pixels,
                    most_changed=(report.classes.names[most], float(changes_K[most])),
                    ms=1e3 * statistics.median(self.seconds[stride]),
                    num_scores=round(statistics.mean(self.scores[stride])),
                )
            )
        return rows


def compare_key_strides(
    model: Segmenter,
    dataset: Dataset,
    tally: StrideTally,
    *,
    protocol: EvalConfig,
    data: DataConfig,
    runtime: Runtime = ON_CPU,
) -> Generator[int, None, None]:
    """Every image at every stride, in turn, so that drift hits all alike; gives the images done.

    Raises `UserError` as `evaluate_images` does, `UsageError` for a model without keys to average.
    """
    if runtime.processes.size > 1:
        raise UsageError("several key strides are compared by one process; leave out --nproc")
    model.eval()
    for one in tally.tallies.values():
        one.move(runtime.device)
    with closing(read_ahead(dataset, range(len(dataset)))) as samples:
        for index, sample in enumerate(samples, start=1):
            labels_HW = moved(torch.tensor(sample.labels_HW), runtime.device)
            exact_HW: torch.Tensor | None = None
            for stride, one in tally.tallies.items():
                strided = protocol.model_copy(update={"key_stride": stride})
                before_KK = one.counts_KK.clone()
                synchronize(runtime.device)
                began = time.perf_counter()
                views = make_views(model, sample.image_HW3, strided, data, runtime.device)
                synchronize(runtime.device)
                tally.seconds[stride].append(time.perf_counter() - began)
                with torch.inference_mode():
                    ids_HW = add_image(one, views, labels_HW, runtime.impl)
                tally.counts[stride].append((one.counts_KK - before_KK).cpu().numpy())
                with key_stride_set(model, stride):
                    sizes = [size for view in views for size in view.map_sizes]
                    tally.scores[stride].append(sum(num_scores(model, *size) for size in sizes))
                one.num_images += 1
                exact_HW = ids_HW if exact_HW is None else exact_HW
                tally.num_agreeing[stride] += int((ids_HW == exact_HW).sum())
            tally.num_pixels += labels_HW.numel()
            yield index


def recommended(rows: Sequence[StrideScore]) -> StrideScore:
    """The largest stride whose interval stays above a loss of 0.1 mIoU points."""
    return max((row for row in rows if row.change.low > -TOLERANCE), key=lambda row: row.stride)


def strides_values(rows: Sequence[StrideScore]) -> list[dict[str, Any]]:
    """The rows as JSON values; fractions in [0, 1]."""
    return [
        {
            "key_stride": row.stride,
            "is_exact": row.stride == EXACT,
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

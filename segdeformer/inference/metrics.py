"""Segmentation scores from one K x K confusion matrix. K classes."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from segdeformer.config import IGNORE_INDEX


class Scores(NamedTuple):
    """Shares in [0, 1]. A class that neither occurs nor is predicted has no IoU: NaN."""

    iou_K: np.ndarray
    accuracy_K: np.ndarray
    pixels_K: np.ndarray  # valid pixels of the truth per class

    @property
    def miou(self) -> float:
        """Mean IoU over the classes that have one."""
        return _mean(self.iou_K)

    @property
    def macc(self) -> float:
        """Mean accuracy (recall) over the classes that occur."""
        return _mean(self.accuracy_K)


class ConfusionMatrix:
    """Counts of (truth, prediction) pairs, summed over a whole data set; rows are the truth."""

    def __init__(self, num_classes: int) -> None:
        self.num_classes = num_classes
        self.counts_KK = np.zeros((num_classes, num_classes), dtype=np.int64)

    def add(self, truth_HW: np.ndarray, predicted_HW: np.ndarray) -> None:
        """Count the pixels whose truth is not 255. Both are integer maps of one shape, ids in [0, K)."""
        if truth_HW.shape != predicted_HW.shape:
            raise ValueError(f"truth is {truth_HW.shape}, prediction {predicted_HW.shape}; must be equal")
        valid_HW = truth_HW != IGNORE_INDEX
        pairs = truth_HW[valid_HW].astype(np.int64) * self.num_classes + predicted_HW[valid_HW]
        counts = np.bincount(pairs, minlength=self.num_classes**2)
        self.counts_KK += counts.reshape(self.num_classes, self.num_classes)

    def scores(self) -> Scores:
        """IoU and accuracy of every class from the sums over all images."""
        hits_K = np.diagonal(self.counts_KK).astype(np.float64)
        truth_K, predicted_K = self.counts_KK.sum(axis=1), self.counts_KK.sum(axis=0)
        with np.errstate(invalid="ignore"):
            return Scores(hits_K / (truth_K + predicted_K - hits_K), hits_K / truth_K, truth_K)

    @property
    def pixel_accuracy(self) -> float:
        """aAcc: fraction of all valid pixels that are right; NaN without any."""
        total = self.counts_KK.sum()
        return float(np.trace(self.counts_KK) / total) if total else float("nan")


def _mean(values_K: np.ndarray) -> float:
    known = values_K[~np.isnan(values_K)]
    return float(known.mean()) if known.size else float("nan")

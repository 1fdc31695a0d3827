"""A paired bootstrap interval of the gain in mIoU of one model over another.

S seeds, N images, K classes, R resamples. mIoU is a function of each class's hits and union summed over
images, so a resample is a weighting of the images: `images_RN @ hits_NK`.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

RESAMPLES = 2000
LEVEL = 0.95
KEY = 2022  # of the generator: the same runs give the same interval


class ImageSums(NamedTuple):
    """What each image adds to hits and union of each class, one entry a seed."""

    hits_SNK: np.ndarray  # pixels of the class, predicted as such
    union_SNK: np.ndarray  # pixels of the class, or predicted as it


class Draws(NamedTuple):
    """How often each image and each seed is drawn in each resample."""

    images_RN: np.ndarray
    seeds_RS: np.ndarray


class Interval(NamedTuple):
    """Of a share of 1, as mIoU is."""

    low: float
    high: float


class GainIntervals(NamedTuple):
    """Of the gain in mIoU, and of the gain in IoU of each class; NaN where a class is never known."""

    miou: Interval
    classes: tuple[Interval, ...]


def image_sums(counts_SNKK: np.ndarray) -> ImageSums:
    """Hits and unions of confusion matrices whose rows are the truth."""
    hits_SNK = np.diagonal(counts_SNKK, axis1=-2, axis2=-1).astype(np.float64)
    return ImageSums(hits_SNK, counts_SNKK.sum(-1) + counts_SNKK.sum(-2) - hits_SNK)


def ious(sums: ImageSums) -> np.ndarray:
    """IoU of each seed and class on all images, (S, K); NaN where a class neither occurs nor is predicted."""
    return _iou(sums.hits_SNK.sum(1), sums.union_SNK.sum(1))


def mious(sums: ImageSums) -> np.ndarray:
    """mIoU of each seed on all images, (S,), in [0, 1]."""
    return _mean_of_known(ious(sums))


def draws(num_images: int, num_seeds: int, num_resamples: int = RESAMPLES) -> Draws:
    """Images and seeds drawn with replacement, as many as there are; the same at every call."""
    images, seeds = (np.random.Generator(np.random.Philox(key=[KEY, stream])) for stream in (0, 1))
    return Draws(
        images.multinomial(num_images, np.full(num_images, 1 / num_images), num_resamples),
        seeds.multinomial(num_seeds, np.full(num_seeds, 1 / num_seeds), num_resamples),
    )


def gain_intervals(
    row: ImageSums, baseline: ImageSums, drawn: Draws, *, level: float = LEVEL
) -> GainIntervals:
    """Percentile intervals of gains averaged over seeds.

    Paired: a resample draws the same images and the same seeds for both, so what is common to both
    (hard images, an unlucky order of batches) does not widen them. Both need the same images and seeds.
    """
    if row.hits_SNK.shape != baseline.hits_SNK.shape:
        raise ValueError(
            f"the row has (seeds, images, classes) {row.hits_SNK.shape}, the baseline "
            f"{baseline.hits_SNK.shape}; a paired interval needs the same of each"
        )
    ours_SRK, theirs_SRK = (_resampled_ious(sums, drawn.images_RN) for sums in (row, baseline))
    weights_RS = drawn.seeds_RS / drawn.seeds_RS.sum(1, keepdims=True)
    gains_SR = _mean_of_known(ours_SRK) - _mean_of_known(theirs_SRK)
    gains_RK = np.einsum("rs,srk->rk", weights_RS, ours_SRK - theirs_SRK)
    ends = [(1 - level) / 2, (1 + level) / 2]
    return GainIntervals(
        miou=_interval(np.einsum("rs,sr->r", weights_RS, gains_SR), ends),
        classes=tuple(_interval(gains_R, ends) for gains_R in gains_RK.T),
    )


def _interval(gains_R: np.ndarray, ends: list[float]) -> Interval:
    known_R = gains_R[~np.isnan(gains_R)]  # a rare class may be absent from a resample
    if not known_R.size:
        return Interval(np.nan, np.nan)
    low, high = np.quantile(known_R, ends)
    return Interval(float(low), float(high))


def _resampled_ious(sums: ImageSums, images_RN: np.ndarray) -> np.ndarray:
    """IoU of each seed and class in each resample, (S, R, K)."""
    weights_RN = images_RN.astype(np.float64)  # counts stay exact, and BLAS multiplies them
    return np.stack(
        [
            _iou(weights_RN @ hits_NK, weights_RN @ union_NK)
            for hits_NK, union_NK in zip(sums.hits_SNK, sums.union_SNK, strict=True)
        ]
    )


def _iou(hits: np.ndarray, union: np.ndarray) -> np.ndarray:
    return np.divide(hits, union, out=np.full_like(hits, np.nan), where=union > 0)


def _mean_of_known(iou_XK: np.ndarray) -> np.ndarray:
    """Mean over the classes that have an IoU, which are the last axis; NaN where none has."""
    num_known_X = (~np.isnan(iou_XK)).sum(-1)
    total_X = np.nansum(iou_XK, axis=-1)
    return np.divide(total_X, num_known_X, out=np.full_like(total_X, np.nan), where=num_known_X > 0)

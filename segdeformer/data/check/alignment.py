"""Whether the outlines of a label map lie on the edges of its image, or would only if turned or shifted.

H height, W width, 3 RGB.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import cv2
import numpy as np

LONG_EDGE_PX = 192  # enough for outlines, and quick
FEWEST_OUTLINE_PX = 100
LEAST_GAIN, HIGHEST_AS_IT_IS, LEAST_ELSEWHERE = 0.2, 0.6, 0.75  # mean ranks; chance gives 0.5
RANK_LEVELS = 1023

Turn = Callable[[np.ndarray], np.ndarray]

KEEPING_SHAPE: dict[str, Turn] = {
    "mirrored left-right": np.fliplr,
    "mirrored top-bottom": np.flipud,
    "turned by 180 degrees": lambda labels_HW: labels_HW[::-1, ::-1],
}
OF_SQUARES: dict[str, Turn] = {
    "transposed": np.transpose,
    "transposed and turned by 180 degrees": lambda labels_HW: labels_HW[::-1, ::-1].T,
    "turned by 90 degrees": lambda labels_HW: np.rot90(labels_HW, 1),
    "turned by 270 degrees": lambda labels_HW: np.rot90(labels_HW, 3),
}
TURNS = (*KEEPING_SHAPE, *OF_SQUARES)


class EdgeRanks(NamedTuple):
    """Mean rank in [0, 1] of the image's gradient under the outlines of its labels."""

    as_it_is: float
    turned: tuple[float, ...]  # in the order of TURNS; the last four for squares only
    fits_better_elsewhere: bool  # the labels miss the edges, and meet them when turned or shifted


def edge_ranks(image_HW3: np.ndarray, labels_HW: np.ndarray) -> EdgeRanks | None:
    """None where there is too little of an outline to tell."""
    factor = min(1.0, LONG_EDGE_PX / max(labels_HW.shape))
    size = tuple(max(1, round(edge * factor)) for edge in reversed(labels_HW.shape))
    outline_HW = _outline(cv2.resize(labels_HW, size, interpolation=cv2.INTER_NEAREST))
    if np.count_nonzero(outline_HW) < FEWEST_OUTLINE_PX:
        return None
    grey_HW = cv2.resize(cv2.cvtColor(image_HW3, cv2.COLOR_RGB2GRAY), size, interpolation=cv2.INTER_AREA)
    rank_HW = _gradient_rank(grey_HW)
    as_it_is = float(rank_HW[outline_HW].mean())
    square = outline_HW.shape[0] == outline_HW.shape[1]
    turns = (KEEPING_SHAPE | OF_SQUARES if square else KEEPING_SHAPE).values()
    turned = tuple(float(rank_HW[turn(outline_HW)].mean()) for turn in turns)
    if as_it_is > HIGHEST_AS_IT_IS:
        return EdgeRanks(as_it_is, turned, False)
    elsewhere = max(*turned, _best_shifted(rank_HW, outline_HW))
    return EdgeRanks(as_it_is, turned, elsewhere > LEAST_ELSEWHERE and elsewhere - as_it_is > LEAST_GAIN)


def _best_shifted(rank_HW: np.ndarray, outline_HW: np.ndarray) -> float:
    """The highest mean rank under the outlines at any (circular) shift, by correlation."""
    spectrum = np.fft.rfft2(rank_HW) * np.conj(np.fft.rfft2(outline_HW))
    total_HW = np.fft.irfft2(spectrum, s=rank_HW.shape)
    return float(total_HW.max()) / np.count_nonzero(outline_HW)


def _outline(labels_HW: np.ndarray) -> np.ndarray:
    """Pixels whose right or lower neighbour has another id."""
    outline_HW = np.zeros(labels_HW.shape, bool)
    outline_HW[:, :-1] |= labels_HW[:, :-1] != labels_HW[:, 1:]
    outline_HW[:-1] |= labels_HW[:-1] != labels_HW[1:]
    return outline_HW


def _gradient_rank(grey_HW: np.ndarray) -> np.ndarray:
    """Share of the pixels with a smaller gradient; the gradient is the largest within 1 px."""
    smooth_HW = cv2.GaussianBlur(grey_HW, (5, 5), 0).astype(np.float32)
    gradient_HW = cv2.magnitude(
        cv2.Sobel(smooth_HW, cv2.CV_32F, 1, 0), cv2.Sobel(smooth_HW, cv2.CV_32F, 0, 1)
    )
    gradient_HW = cv2.dilate(gradient_HW, np.ones((3, 3), np.uint8))
    level_HW = (gradient_HW * (RANK_LEVELS / max(float(gradient_HW.max()), 1e-6))).astype(np.intp)
    count = np.bincount(level_HW.ravel())
    rank_HW: np.ndarray = ((np.cumsum(count) - count) / level_HW.size)[level_HW]
    return rank_HW

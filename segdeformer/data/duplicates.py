"""Images that are in a data set more than once: by the hash of their pixels, or nearly the same.

N images of one split, M of another, P pixels of a thumbnail.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np

from segdeformer.data.images import read_image

THUMBNAIL_PX = 8
THUMBNAIL_TOLERANCE = 2.5  # levels of 255: what JPEG changes in a mean over 1/64 of the image
COMPARED_PX = 64
LEAST_CORRELATION = 0.9  # of the details; neighbouring frames of CamVid reach 0.89
MOST_CANDIDATES = 500  # read again, the closest first


class Twins(NamedTuple):
    first: int
    second: int


def thumbnail(image_HW3: np.ndarray) -> np.ndarray:
    """Means of 8 x 8 cells in grey, (P,) float32: close for copies of any size and compression."""
    size = (THUMBNAIL_PX, THUMBNAIL_PX)
    grey_HW = cv2.cvtColor(image_HW3, cv2.COLOR_RGB2GRAY).astype(np.float32)
    return cv2.resize(grey_HW, size, interpolation=cv2.INTER_AREA).ravel()


def same_content(hashes: Sequence[bytes]) -> list[list[int]]:
    """Groups of two and more equal hashes, as indices; empty hashes are left out."""
    groups: dict[bytes, list[int]] = {}
    for index, content in enumerate(hashes):
        if content:
            groups.setdefault(content, []).append(index)
    return [group for group in groups.values() if len(group) > 1]


def close_thumbnails(first_NP: np.ndarray, second_MP: np.ndarray) -> list[Twins]:
    """All pairs across the two whose cells differ by the tolerance at most, the closest first.

    Sorted by mean brightness, each thumbnail is compared with those of nearly its own only.
    """
    order_M = np.argsort(second_MP.mean(axis=1), kind="stable")
    mean_M = second_MP.mean(axis=1)[order_M]
    found = []
    for index, thumbnail_P in enumerate(first_NP):
        mean = thumbnail_P.mean()
        low, high = np.searchsorted(mean_M, [mean - THUMBNAIL_TOLERANCE, mean + THUMBNAIL_TOLERANCE])
        near_M = order_M[low:high]
        distance_M = np.abs(second_MP[near_M] - thumbnail_P).max(axis=1, initial=0)
        close = np.flatnonzero(distance_M <= THUMBNAIL_TOLERANCE)
        found += [(float(distance_M[i]), Twins(index, int(near_M[i]))) for i in close]
    return [twins for _, twins in sorted(found)]


def same_picture(first: Path, second: Path) -> bool:
    """Whether two image files show the same to the details, but for size and compression."""
    details = [_details(read_image(path)) for path in (first, second)]
    scale = float(np.sqrt((details[0] ** 2).sum() * (details[1] ** 2).sum()))
    return scale > 0 and float((details[0] * details[1]).sum()) > LEAST_CORRELATION * scale


def _details(image_HW3: np.ndarray) -> np.ndarray:
    size = (COMPARED_PX, COMPARED_PX)
    grey_HW = cv2.cvtColor(image_HW3, cv2.COLOR_RGB2GRAY).astype(np.float32)
    small_HW = cv2.resize(grey_HW, size, interpolation=cv2.INTER_AREA)
    return small_HW - cv2.blur(small_HW, (5, 5))

"""Images that are in a data set more than once: by the hash of their pixels, or nearly the same.

N images of one split, M of another, P pixels of a thumbnail.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np

from segdeformer.data.check.examine import Exam, small_grey
from segdeformer.data.check.findings import Finding, findings_of
from segdeformer.data.images import read_image

THUMBNAIL_TOLERANCE = 2.5  # levels of 255: what JPEG changes in a mean over 1/64 of the image
COMPARED_PX = 64
LEAST_CORRELATION = 0.9  # of the details; neighbouring frames of CamVid reach 0.89
MOST_CANDIDATES = 500  # read again, the closest first


def duplicate_findings(exams: Sequence[Exam]) -> list[Finding]:
    """Equal pixels within a split and across the two; then copies that were scaled or compressed anew."""
    told: set[Path] = set()  # windows of a map may be drawn twice: that is one image
    readable = []
    by_hash: dict[bytes, list[Exam]] = {}
    for exam in exams:
        if exam.image_hash and "blank images" not in exam.traits and exam.pair.image not in told:
            told.add(exam.pair.image)
            readable.append(exam)
            by_hash.setdefault(exam.image_hash, []).append(exam)
    groups = [group for group in by_hash.values() if len(group) > 1]
    findings = []
    for split in ("train", "val"):
        within = [[exam for exam in group if exam.split == split] for group in groups]
        doubles = [_equation(group) for group in within if len(group) > 1]
        what = f"images that are there more than once (equal pixels): {len(doubles)}"
        findings += findings_of("duplicates in a split", split, doubles, what)
    disputed = [_equation(group) for group in groups if len({exam.labels_hash for exam in group} - {b""}) > 1]
    what = f"images that are there more than once, with different labels: {len(disputed)}"
    findings += findings_of("same image, other labels", "both", disputed, what)
    shared = [group for group in groups if {exam.split for exam in group} == {"train", "val"}]
    num_val = sum(exam.split == "val" for exam in exams)
    num_shared = sum(exam.split == "val" for group in shared for exam in group)
    what = f"{num_shared} of {num_val} validation images are in train, too (equal pixels)"
    if num_shared == num_val:
        what = f"every validation image is in train, too: are the {num_val} a copy of training images?"
    findings += findings_of("train/val duplicates", "both", [_equation(group) for group in shared], what)
    told_hashes = {exam.image_hash for group in shared for exam in group}
    near = _almost_the_same([exam for exam in readable if exam.image_hash not in told_hashes])
    what = f"validation images that show almost the same as a training image: {len(near)}"
    return findings + findings_of("almost the same in train and val", "both", near, what)


def _equation(group: Sequence[Exam]) -> str:
    return " = ".join(str(exam.pair.image) for exam in group)


def _almost_the_same(exams: Sequence[Exam]) -> list[str]:
    rest = [exam for exam in exams if exam.thumbnail_P is not None and exam.pair.image.is_file()]
    train, val = ([exam for exam in rest if exam.split == split] for split in ("train", "val"))
    if not train or not val:
        return []
    thumbnails = [
        np.stack([exam.thumbnail_P for exam in own if exam.thumbnail_P is not None]) for own in (val, train)
    ]
    candidates = [(val[i], train[j]) for i, j in close_thumbnails(*thumbnails)[:MOST_CANDIDATES]]
    return [_equation(pair) for pair in candidates if _same_picture(*(exam.pair.image for exam in pair))]


def close_thumbnails(first_NP: np.ndarray, second_MP: np.ndarray) -> list[tuple[int, int]]:
    """The indices of all pairs across the two whose cells differ by the tolerance at most, the closest first.

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
        found += [(float(distance_M[i]), index, int(near_M[i])) for i in close]
    return [(first, second) for _, first, second in sorted(found)]


def _same_picture(first: Path, second: Path) -> bool:
    """Whether two image files show the same to the details, but for size and compression."""
    details = []
    for path in (first, second):
        grey_HW = small_grey(read_image(path), COMPARED_PX)
        details.append(grey_HW - cv2.blur(grey_HW, (5, 5)))
    scale = float(np.sqrt((details[0] ** 2).sum() * (details[1] ** 2).sum()))
    return scale > 0 and float((details[0] * details[1]).sum()) > LEAST_CORRELATION * scale

"""Findings that need the whole data set: images twice, classes that a split lacks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from segdeformer.data.classes import ClassTable
from segdeformer.data.duplicates import MOST_CANDIDATES, close_thumbnails, same_content, same_picture
from segdeformer.data.examine import Exam
from segdeformer.data.findings import Finding, finding
from segdeformer.data.statistics import Histogram

NO_LABEL_NAMES = {
    "void",
    "ignore",
    "ignored",
    "unlabeled",
    "unlabelled",
    "don't care",
    "dontcare",
    "dont_care",
}


def duplicate_findings(exams: Sequence[Exam]) -> list[Finding]:
    """Equal pixels within a split and across the two; then copies that were scaled or compressed anew."""
    told: set[Path] = set()  # windows of a map may be drawn twice: that is one image
    readable = []
    for exam in exams:
        if exam.image_hash and "blank" not in exam.traits and exam.pair.image not in told:
            readable.append(exam)
            told.add(exam.pair.image)
    groups = [[readable[i] for i in group] for group in same_content([exam.image_hash for exam in readable])]
    findings = []
    for split in ("train", "val"):
        within = [[exam for exam in group if exam.split == split] for group in groups]
        doubles = [_equation(group) for group in within if len(group) > 1]
        if doubles:
            what = f"images that are there more than once (equal pixels): {len(doubles)}"
            findings.append(finding("duplicates in a split", split, what, doubles))
    disputed = [_equation(group) for group in groups if len({exam.labels_hash for exam in group} - {b""}) > 1]
    if disputed:
        what = f"images that are there more than once, with different labels: {len(disputed)}"
        findings.append(finding("same image, other labels", "both", what, disputed))
    shared = [group for group in groups if {exam.split for exam in group} == {"train", "val"}]
    if shared:
        num_val = sum(exam.split == "val" for exam in exams)
        num_shared = sum(exam.split == "val" for group in shared for exam in group)
        what = f"{num_shared} of {num_val} validation images are in train, too (equal pixels)"
        if num_shared == num_val:
            what = f"every validation image is in train, too: are the {num_val} a copy of training images?"
        findings.append(finding("train/val duplicates", "both", what, [_equation(group) for group in shared]))
    return findings + _near_findings(readable, {exam.image_hash for group in shared for exam in group})


def _equation(group: Sequence[Exam]) -> str:
    return " = ".join(str(exam.pair.image) for exam in group)


def _near_findings(readable: Sequence[Exam], told: set[bytes]) -> list[Finding]:
    rest = [exam for exam in readable if exam.image_hash not in told and exam.pair.image.is_file()]
    train, val = ([exam for exam in rest if exam.split == split] for split in ("train", "val"))
    if not train or not val:
        return []
    val_NP, train_MP = (
        np.stack([exam.thumbnail_P for exam in own if exam.thumbnail_P is not None]) for own in (val, train)
    )
    near = [
        f"{val[i].pair.image} = {train[j].pair.image}"
        for i, j in close_thumbnails(val_NP, train_MP)[:MOST_CANDIDATES]
        if same_picture(val[i].pair.image, train[j].pair.image)
    ]
    if not near:
        return []
    what = f"validation images that show almost the same as a training image: {len(near)}"
    return [finding("almost the same in train and val", "both", what, near)]


def class_findings(train: Histogram, val: Histogram, classes: ClassTable) -> list[Finding]:
    """Classes that only one split holds, or none, and those whose names say that they are none."""
    in_train_K, in_val_K = train.pixels_K > 0, val.pixels_K > 0
    findings = []

    def tell(kind: str, split: str, chosen_K: np.ndarray, text: str) -> None:
        names = [name for name, chosen in zip(classes.names, chosen_K, strict=True) if chosen]
        if names:
            what = f"{len(names)} of {len(classes.names)} classes {text}"
            hint = ""
            if kind == "class not in train" and chosen_K[0] and not train.ignored and len(names) == 1:
                hint = "if id 0 was meant for unlabelled pixels, the ids may be shifted by one"
            findings.append(finding(kind, split, what, names, remedy=hint))

    if np.count_nonzero(in_train_K) == 1:
        only = classes.names[int(np.argmax(in_train_K))]
        findings.append(finding("one class in all of train", "train", "every label is of one class", [only]))
    elif in_train_K.any():
        tell("class not in train", "both", ~in_train_K & ~in_val_K, "never occur")
        tell("class only in val", "train", ~in_train_K & in_val_K, "occur in val, but not in train")
        if in_val_K.any():
            tell("class not in val", "val", in_train_K & ~in_val_K, "occur in train, but not in val")
    meant_K = np.array([name.strip().lower() in NO_LABEL_NAMES for name in classes.names])
    tell("class that means no label", "train", meant_K & in_train_K, "are named as if they meant no label")
    return findings

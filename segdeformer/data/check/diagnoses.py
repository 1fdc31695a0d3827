"""From the exams of single pairs to findings: faults of files, odd formats, ids that mean something else."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import get_args

import numpy as np

from segdeformer.config import IGNORE_INDEX
from segdeformer.data.check.alignment import TURNS
from segdeformer.data.check.examine import Exam, FailureKind
from segdeformer.data.check.findings import Finding, finding, findings_of

IDS_ARE_CLASSES: tuple[str, ...] = ("folder", "landcover", "synthetic")  # no table between them
MANY = 0.05  # share of a split's label maps from which an id is no slip
MOSTLY = 0.5
FEWEST_TO_COMPARE = 12  # pairs, for a mean to say something
LEAST_MEAN_GAIN, LEAST_DEVIATIONS = 0.05, 5.0  # CamVid's labels lose 0.1 or more when mirrored

# What is said of pairs with a trait that is a fault; {count} of {total}.
FAULTS = {
    "alpha channel": "{count} of {total} images have an alpha channel; RGB was expected",
    "16-bit images": "{count} of {total} images have 16 bits a channel; 8 were expected",
    "dark 16-bit images": "{count} of {total} images use the lowest of their 16 bits only",
    "turned by EXIF": "{count} of {total} images are turned by their EXIF orientation",
    "blank images": "{count} of {total} images are of one colour throughout",
    "labels look misplaced": "in {count} of {total} pairs the labels meet the image only when mirrored, "
    "turned or shifted",
    "other format than the ending": "{count} of {total} images are of another format than they are named",
}


def pair_findings(exams: Sequence[Exam], name: str, num_classes: int) -> list[Finding]:
    """Findings of each split; what the pairs have in common is judged over the split."""
    findings = []
    mask_kind = _kind_of_masks(exams)
    for split in ("train", "val"):
        own = [exam for exam in exams if exam.split == split]
        findings += _failures(split, own)
        findings += _traits(split, own)
        findings += _turned(split, own)
        findings += _palettes(split, own)
        ids_are_classes = name in IDS_ARE_CLASSES
        findings += _labelled(split, [exam for exam in own if not (ids_are_classes and _is_mask(exam))])
        if ids_are_classes:
            masks = _labels(exam for exam in own if _is_mask(exam))
            what = f"{len(masks)} of {len(own)} label maps hold 0 and 255 alone: "
            what += "as ids they are class 0 and pixels to ignore"
            findings += findings_of(mask_kind, split, masks, what)
            findings += _shifted(split, own, num_classes)
        elif name == "ade20k":  # published without 255: with it, 1 would be subtracted twice
            reduced = _labels(exam for exam in own if IGNORE_INDEX in exam.raw_ids)
            what = (
                f"{len(reduced)} label maps hold 255, the published ones 0 to 150: was 1 subtracted already?"
            )
            remedy = "take the published files, or use these as a folder of your own"
            findings += findings_of("zero label", split, reduced, what, remedy=remedy)
    return findings


def _failures(split: str, exams: Sequence[Exam]) -> list[Finding]:
    findings = []
    for kind in get_args(FailureKind):
        failed = [(exam.pair, fail.message) for exam in exams for fail in exam.failures if fail.kind == kind]
        if failed:
            files = [pair.image if kind == "unreadable image" else pair.labels for pair, _ in failed]
            what = f"{len(failed)} of {len(exams)}, {failed[0][1]}"
            findings.append(finding(kind, split, what, files))
    return findings


def _traits(split: str, exams: Sequence[Exam]) -> list[Finding]:
    findings = []
    for kind, text in FAULTS.items():
        images = [exam.pair.image for exam in exams if kind in exam.traits]
        findings += findings_of(kind, split, images, text.format(count=len(images), total=len(exams)))
    grey = [exam.pair.image for exam in exams if "grey" in exam.traits]
    kind = "some images are grey" if len(grey) < MOSTLY * len(exams) else "all images are grey"
    return findings + findings_of(kind, split, grey, f"{len(grey)} of {len(exams)} images are grey")


def _turned(split: str, exams: Sequence[Exam]) -> list[Finding]:
    """Labels that are all turned alike: in single pairs hardly seen, in the mean of many clearly."""
    gains = {}
    all_ranks = [exam.edge_ranks for exam in exams if exam.edge_ranks is not None]
    for index, turn in enumerate(TURNS):
        gain_N = np.array([r.turned[index] - r.as_it_is for r in all_ranks if index < len(r.turned)])
        if len(gain_N) < FEWEST_TO_COMPARE:
            continue
        if gain_N.mean() > max(LEAST_MEAN_GAIN, LEAST_DEVIATIONS * gain_N.std() / len(gain_N) ** 0.5):
            gains[f"over {len(gain_N)} pairs, the labels' outlines meet the images better when {turn}"] = (
                float(gain_N.mean())
            )
    return (
        [finding("all labels look turned", split, max(gains, key=lambda what: gains[what]))] if gains else []
    )


def _palettes(split: str, exams: Sequence[Exam]) -> list[Finding]:
    """Palettes are fine while an index has the same colour in every file, and all files have one."""
    with_palette = [exam for exam in exams if "palette" in exam.traits]
    meanings: dict[bytes, int] = {}
    disagreeing = []
    for exam in with_palette:
        if any(meanings.setdefault(color, index) != index for index, color in exam.palette):
            disagreeing.append(exam.pair.labels)
    if disagreeing:
        what = f"{len(disagreeing)} label maps use a colour at another index than the files before them"
        return [finding("palettes disagree", split, what, disagreeing)]
    if len(with_palette) < MOSTLY * len(exams):
        what = f"{len(with_palette)} of {len(exams)} label maps have a palette, the others have none"
        return findings_of("some palettes", split, _labels(with_palette), what)
    return []


def _labelled(split: str, exams: Sequence[Exam]) -> list[Finding]:
    usable = [exam for exam in exams if exam.num_present is not None]
    empty, single = (_labels(exam for exam in usable if exam.num_present == number) for number in (0, 1))
    few = MOSTLY * len(usable)
    what = f"in {len(empty)} of {len(usable)} label maps every pixel is ignored ({IGNORE_INDEX})"
    findings = findings_of("all ignored" if len(empty) < few else "nothing labelled", split, empty, what)
    what = f"{len(single)} of {len(usable)} label maps hold one class only"
    return findings + findings_of(
        "one class" if len(single) < few else "mostly one class", split, single, what
    )


# Ids that mean something else.


def _labels(exams: Iterable[Exam]) -> list[Path]:
    return [exam.pair.labels for exam in exams]


def _is_mask(exam: Exam) -> bool:
    return exam.raw_ids == (0, IGNORE_INDEX)


def _kind_of_masks(exams: Sequence[Exam]) -> str:
    """Maps of 0 and 255 alone: masks, or background with as many ignored pixels as are usual in this data?"""
    masks = [exam.ignored_share for exam in exams if _is_mask(exam)]
    others = [exam for exam in exams if (exam.num_present or 0) > 1]
    usual = [exam.ignored_share for exam in others if exam.ignored_share > 0]
    if not masks or not usual or np.median(masks) > np.quantile(usual, 0.95):
        return "0/255 masks"
    zero_is_background = np.median([exam.class_0_share for exam in others]) > MOSTLY
    return "only 0 and 255" if zero_is_background else "0/255 masks"


def _shifted(split: str, exams: Sequence[Exam], num_classes: int) -> list[Finding]:
    """Ids 1 ... K, with 0 for `unlabelled`, or 255 - 1: what is left of a zero label handled wrongly."""
    read = [exam for exam in exams if exam.raw_ids]
    known = {*range(num_classes), IGNORE_INDEX}
    too_high = [exam for exam in read if set(exam.raw_ids) - known == {num_classes}]
    findings = []
    with_zero = sum(0 in exam.raw_ids for exam in read)
    none_has_zero = all(0 not in exam.raw_ids for exam in too_high)
    if len(too_high) >= MANY * len(read) or (none_has_zero and with_zero >= MOSTLY * len(read)):
        zeros = "0 never occurs" if not with_zero else f"0 occurs in {with_zero} of {len(read)} maps"
        what = (
            f"{len(too_high)} label maps hold id {num_classes}, but {num_classes} classes have the ids "
            f"0 to {num_classes - 1}, and {zeros}: are the ids shifted by one, with 0 for `unlabelled`?"
        )
        findings += findings_of("zero label", split, _labels(too_high), what)
    low_ignore = [exam for exam in read if IGNORE_INDEX - 1 in set(exam.raw_ids) - known]
    if not any(len(set(exam.raw_ids) - known) > 2 for exam in low_ignore):
        what = f"{len(low_ignore)} label maps hold id 254: was 1 subtracted from 255, too?"
        files = _labels(low_ignore)
        findings += findings_of("zero label", split, files, what, remedy="write 255 for 254")
    return findings

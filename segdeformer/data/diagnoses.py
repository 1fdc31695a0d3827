"""From the exams of single pairs to findings: faults of files, odd formats, ids that mean something else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

import numpy as np

from segdeformer.config import IGNORE_INDEX, DataName
from segdeformer.data.alignment import TURNS
from segdeformer.data.examine import Exam, FailureKind, Trait
from segdeformer.data.findings import Finding, finding

IDS_ARE_CLASSES: tuple[DataName, ...] = ("folder", "landcover", "synthetic")  # no table between them
MANY = 0.05  # share of a split's label maps from which an id is no slip
MOSTLY = 0.5
FEWEST_TO_COMPARE = 12  # pairs, for a mean to say something
LEAST_MEAN_GAIN, LEAST_DEVIATIONS = 0.05, 5.0  # CamVid's labels lose 0.1 or more when mirrored


def pair_findings(exams: Sequence[Exam], name: DataName, num_classes: int) -> list[Finding]:
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
            findings += _masks(split, own, mask_kind)
            findings += _shifted(split, own, num_classes)
        elif name == "ade20k":
            findings += _reduced_ade20k(split, own)
    return findings


def _failures(split: str, exams: Sequence[Exam]) -> list[Finding]:
    findings = []
    for kind in get_args(FailureKind):
        failed = [(exam, fail) for exam in exams for fail in exam.failures if fail.kind == kind]
        if failed:
            first = failed[0][1].message
            what = f"{len(failed)} of {len(exams)}, {first}"
            files = [
                exam.pair.image if kind == "unreadable image" else exam.pair.labels for exam, _ in failed
            ]
            findings.append(finding(kind, split, what, files))
    return findings


# What is said of images with a trait; {count} of {total}.
TRAITS: dict[Trait, tuple[str, str]] = {
    "alpha": ("alpha channel", "{count} of {total} images have an alpha channel; RGB was expected"),
    "16 bit": ("16-bit images", "{count} of {total} images have 16 bits a channel; 8 were expected"),
    "dark 16 bit": ("dark 16-bit images", "{count} of {total} images use the lowest of their 16 bits only"),
    "turned by EXIF": ("turned by EXIF", "{count} of {total} images are turned by their EXIF orientation"),
    "blank": ("blank images", "{count} of {total} images are of one colour throughout"),
    "misaligned": (
        "labels look misplaced",
        "in {count} of {total} pairs the labels meet the image only when mirrored, turned or shifted",
    ),
    "other format": (
        "other format than the ending",
        "{count} of {total} images are of another format than they are named",
    ),
}


def _traits(split: str, exams: Sequence[Exam]) -> list[Finding]:
    findings = []
    for trait, (kind, text) in TRAITS.items():
        with_trait = [exam.pair.image for exam in exams if trait in exam.traits]
        if with_trait:
            what = text.format(count=len(with_trait), total=len(exams))
            findings.append(finding(kind, split, what, with_trait))
    grey = [exam.pair.image for exam in exams if "grey" in exam.traits]
    if grey:
        kind = "some images are grey" if len(grey) < MOSTLY * len(exams) else "all images are grey"
        findings.append(finding(kind, split, f"{len(grey)} of {len(exams)} images are grey", grey))
    return findings


def _turned(split: str, exams: Sequence[Exam]) -> list[Finding]:
    """Labels that are all turned alike: in single pairs hardly seen, in the mean of many clearly."""
    findings = []
    for index, turn in enumerate(TURNS):
        ranks = [
            (exam.edge_ranks.turned[index], exam.edge_ranks.as_it_is)
            for exam in exams
            if exam.edge_ranks is not None and index < len(exam.edge_ranks.turned)
        ]
        if len(ranks) < FEWEST_TO_COMPARE:
            continue
        gain_N = np.subtract(*np.transpose(ranks))
        if gain_N.mean() > max(LEAST_MEAN_GAIN, LEAST_DEVIATIONS * gain_N.std() / len(gain_N) ** 0.5):
            what = f"over {len(ranks)} pairs, the labels' outlines meet the images better when {turn}"
            findings.append((float(gain_N.mean()), finding("all labels look turned", split, what)))
    return [max(findings, key=lambda found: found[0])[1]] if findings else []


def _palettes(split: str, exams: Sequence[Exam]) -> list[Finding]:
    """Palettes are fine while an index has the same colour in every file, and all files have one."""
    with_palette = [exam for exam in exams if "palette" in exam.traits]
    meanings: dict[bytes, int] = {}
    disagreeing = []
    for exam in with_palette:
        used = [(color, index) for index, color in exam.palette]
        if any(meanings.setdefault(color, index) != index for color, index in used):
            disagreeing.append(exam.pair.labels)
    if disagreeing:
        what = f"{len(disagreeing)} label maps use a colour at another index than the files before them"
        return [finding("palettes disagree", split, what, disagreeing)]
    if 0 < len(with_palette) < MOSTLY * len(exams):
        what = f"{len(with_palette)} of {len(exams)} label maps have a palette, the others have none"
        return [finding("some palettes", split, what, [exam.pair.labels for exam in with_palette])]
    return []


def _labelled(split: str, exams: Sequence[Exam]) -> list[Finding]:
    usable = [exam for exam in exams if exam.num_present is not None]
    empty = [exam.pair.labels for exam in usable if exam.num_present == 0]
    single = [exam.pair.labels for exam in usable if exam.num_present == 1]
    findings = []
    if empty:
        kind = "all ignored" if len(empty) < MOSTLY * len(usable) else "nothing labelled"
        what = f"in {len(empty)} of {len(usable)} label maps every pixel is ignored ({IGNORE_INDEX})"
        findings.append(finding(kind, split, what, empty))
    if single:
        kind = "one class" if len(single) < MOSTLY * len(usable) else "mostly one class"
        what = f"{len(single)} of {len(usable)} label maps hold one class only"
        findings.append(finding(kind, split, what, single))
    return findings


# Ids that mean something else.


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


def _masks(split: str, exams: Sequence[Exam], kind: str) -> list[Finding]:
    masks = [exam.pair.labels for exam in exams if _is_mask(exam)]
    if not masks:
        return []
    what = (
        f"{len(masks)} of {len(exams)} label maps hold 0 and 255 alone: "
        "as ids they are class 0 and pixels to ignore"
    )
    return [finding(kind, split, what, masks)]


def _shifted(split: str, exams: Sequence[Exam], num_classes: int) -> list[Finding]:
    """Ids 1 ... K, with 0 for `unlabelled`, or 255 - 1: what is left of a zero label handled wrongly."""
    read = [exam for exam in exams if exam.raw_ids]
    known = {*range(num_classes), IGNORE_INDEX}
    one_too_high = [exam for exam in read if set(exam.raw_ids) - known == {num_classes}]
    findings = []
    without_zero = [exam for exam in one_too_high if 0 not in exam.raw_ids]
    with_zero = sum(0 in exam.raw_ids for exam in read)
    if one_too_high and (
        len(one_too_high) >= MANY * len(read)
        or (len(without_zero) == len(one_too_high) and with_zero >= MOSTLY * len(read))
    ):
        zeros = "0 never occurs" if not with_zero else f"0 occurs in {with_zero} of {len(read)} maps"
        what = (
            f"{len(one_too_high)} label maps hold id {num_classes}, but {num_classes} classes have the ids "
            f"0 to {num_classes - 1}, and {zeros}: are the ids shifted by one, with 0 for `unlabelled`?"
        )
        findings.append(finding("zero label", split, what, [exam.pair.labels for exam in one_too_high]))
    low_ignore = [exam for exam in read if IGNORE_INDEX - 1 in set(exam.raw_ids) - known]
    if low_ignore and not any(len(set(exam.raw_ids) - known) > 2 for exam in low_ignore):
        what = f"{len(low_ignore)} label maps hold id 254: was 1 subtracted from 255, too?"
        files = [exam.pair.labels for exam in low_ignore]
        findings.append(finding("zero label", split, what, files, remedy="write 255 for 254"))
    return findings


def _reduced_ade20k(split: str, exams: Sequence[Exam]) -> list[Finding]:
    """The published maps hold 0 to 150; with 255 somebody has subtracted 1, which would happen twice."""
    reduced = [exam.pair.labels for exam in exams if IGNORE_INDEX in exam.raw_ids]
    if not reduced:
        return []
    what = f"{len(reduced)} label maps hold 255, the published ones 0 to 150: was 1 subtracted already?"
    remedy = "take the published files, or use these as a folder of your own"
    return [finding("zero label", split, what, reduced, remedy=remedy)]

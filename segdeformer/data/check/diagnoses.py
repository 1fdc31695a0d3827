"""From the exams of single pairs to findings: faults of files, odd formats, ids that mean something else.

Also images that are there more than once, and classes that are not.

N images of one split, M of another, P pixels of a thumbnail, K classes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import get_args

import cv2
import numpy as np

from segdeformer.config import IGNORE_INDEX
from segdeformer.data.check.examine import TURNS, Exam, FailureKind, Histogram, small_grey
from segdeformer.data.check.findings import Finding, finding, findings_of
from segdeformer.data.classes import ClassTable
from segdeformer.data.images import read_image
from segdeformer.errors import count, listed, verb_of

IDS_ARE_CLASSES: tuple[str, ...] = ("folder", "landcover", "synthetic")  # no table between them
MANY = 0.05  # share of a split's label maps from which an id is no slip
MOSTLY = 0.5
FEWEST_TO_COMPARE = 12  # pairs, for a mean to say something
LEAST_MEAN_GAIN, LEAST_DEVIATIONS = 0.05, 5.0  # CamVid's labels lose 0.1 or more when mirrored
THUMBNAIL_TOLERANCE = 2.5  # levels of 255: what JPEG changes in a mean over 1/64 of the image
COMPARED_PX = 64
LEAST_CORRELATION = 0.9  # of the details; neighbouring frames of CamVid reach 0.89
MOST_CANDIDATES = 500  # read again, the closest first
NO_LABEL_NAMES = (
    *("void", "ignore", "ignored", "unlabeled", "unlabelled"),
    *("don't care", "dontcare", "dont_care"),
)

# What is said of pairs with a trait that is a fault; {images}: how many of them.
FAULTS = {
    "alpha channel": "{images} {have} an alpha channel; RGB was expected",
    "16-bit images": "{images} {have} 16 bits a channel; 8 were expected",
    "dark 16-bit images": "{images} {use} the lowest of their 16 bits only",
    "turned by EXIF": "{images} {are} turned by their EXIF orientation",
    "blank images": "{images} {are} of one colour throughout",
    "labels look misplaced": "in {pairs} the labels meet the image only when mirrored, turned or shifted",
    "other format than the ending": "{images} {are} of another format than their names say",
}


def pair_findings(exams: Sequence[Exam], name: str, num_classes: int) -> Iterator[Finding]:
    """Findings of each split; what the pairs have in common is judged over the split."""
    mask_kind = _kind_of_masks(exams)
    ids_are_classes = name in IDS_ARE_CLASSES
    for split in ("train", "val"):
        own = [exam for exam in exams if exam.split == split]
        yield from _failures(split, own)
        yield from _traits(split, own)
        yield from _turned(split, own)
        yield from _palettes(split, own)
        yield from _labelled(split, [exam for exam in own if not (ids_are_classes and _is_mask(exam))])
        if ids_are_classes:
            masks = _labels(exam for exam in own if _is_mask(exam))
            what = f"{count(len(masks), 'label map', 'hold', of=len(own))} 0 and 255 alone: "
            what += "as ids they are class 0 and pixels to ignore"
            yield from findings_of(mask_kind, split, masks, what)
            yield from _shifted(split, own, num_classes)
        elif name == "ade20k":  # published without 255: with it, 1 would be subtracted twice
            reduced = _labels(exam for exam in own if IGNORE_INDEX in exam.raw_ids)
            what = f"{count(len(reduced), 'label map', 'hold')} 255, the published ones 0 to 150: "
            what += "was 1 subtracted already?"
            remedy = "take the published files, or use these as a folder of your own"
            yield from findings_of("zero label", split, reduced, what, remedy=remedy)


def _failures(split: str, exams: Sequence[Exam]) -> Iterator[Finding]:
    for kind in get_args(FailureKind):
        failed = [(exam.pair, fail.message) for exam in exams for fail in exam.failures if fail.kind == kind]
        if failed:
            files = [pair.image if kind == "unreadable image" else pair.labels for pair, _ in failed]
            reasons: dict[str, str] = {}  # by the message without its path; sizes and ids often differ
            if kind in ("unreadable image", "unreadable label map"):
                for file, (_, message) in zip(files, failed, strict=True):
                    reasons.setdefault(message.replace(str(file), ""), _without_remedy(message))
            said = listed([*reasons.values()]) or failed[0][1]
            if kind == "sizes differ":
                said = _without_remedy(said)
            yield finding(kind, split, f"{len(failed)} of {len(exams)}, {said}", files)


def _without_remedy(message: str) -> str:
    """The finding has its own."""
    return message.rpartition("; ")[0] or message


def _traits(split: str, exams: Sequence[Exam]) -> Iterator[Finding]:
    grey = sum("grey" in exam.traits for exam in exams)
    grey_kind = "some images are grey" if grey < MOSTLY * len(exams) else "all images are grey"
    texts = [(kind, kind, text) for kind, text in FAULTS.items()]
    for trait, kind, text in (*texts, ("grey", grey_kind, "{images} {are} grey")):
        images = [exam.pair.image for exam in exams if trait in exam.traits]
        yield from findings_of(kind, split, images, _worded(text, len(images), len(exams)))


def _worded(text: str, number: int, total: int) -> str:
    """A text about images or pairs, with the number of them and its verbs."""
    verbs = {verb: verb_of(number, verb) for verb in ("have", "are", "use")}
    of = {f"{noun}s": count(number, noun, of=total) for noun in ("image", "pair")}
    return text.format(**of, **verbs)


def _turned(split: str, exams: Sequence[Exam]) -> Iterator[Finding]:
    """Labels that are all turned alike: in single pairs hardly seen, in the mean of many clearly."""
    gains = {}
    all_ranks = [exam.edge_ranks for exam in exams if exam.edge_ranks is not None]
    for index, turn in enumerate(TURNS):
        gain_N = np.array([r.turned[index] - r.as_it_is for r in all_ranks if index < len(r.turned)])
        if len(gain_N) < FEWEST_TO_COMPARE:
            continue
        if gain_N.mean() > max(LEAST_MEAN_GAIN, LEAST_DEVIATIONS * gain_N.std() / len(gain_N) ** 0.5):
            what = (
                f"over {count(len(gain_N), 'pair')}, the labels' outlines meet the images better when {turn}"
            )
            gains[what] = float(gain_N.mean())
    if gains:
        yield finding("all labels look turned", split, max(gains, key=lambda what: gains[what]))


def _palettes(split: str, exams: Sequence[Exam]) -> Iterator[Finding]:
    """Palettes are fine while an index has the same colour in every file, and all files have one."""
    with_palette = [exam for exam in exams if "palette" in exam.traits]
    meanings: dict[bytes, int] = {}
    disagreeing = []
    for exam in with_palette:
        if any(meanings.setdefault(color, index) != index for index, color in exam.palette):
            disagreeing.append(exam.pair.labels)
    if disagreeing:
        what = f"{count(len(disagreeing), 'label map', 'use')} a colour at another index than the files "
        what += "before them"
        yield finding("palettes disagree", split, what, disagreeing)
    elif len(with_palette) < MOSTLY * len(exams):
        what = (
            f"{count(len(with_palette), 'label map', 'have', of=len(exams))} a palette, the others have none"
        )
        yield from findings_of("some palettes", split, _labels(with_palette), what)


def _labelled(split: str, exams: Sequence[Exam]) -> Iterator[Finding]:
    usable = [exam for exam in exams if exam.num_present is not None]
    empty, single = (_labels(exam for exam in usable if exam.num_present == number) for number in (0, 1))
    few = MOSTLY * len(usable)
    what = f"in {count(len(empty), 'label map', of=len(usable))} every pixel is ignored ({IGNORE_INDEX})"
    yield from findings_of("all ignored" if len(empty) < few else "nothing labelled", split, empty, what)
    what = f"{count(len(single), 'label map', 'hold', of=len(usable))} one class only"
    yield from findings_of("one class" if len(single) < few else "mostly one class", split, single, what)


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


def _shifted(split: str, exams: Sequence[Exam], num_classes: int) -> Iterator[Finding]:
    """Ids 1 ... K, with 0 for `unlabelled`, or 255 - 1: what is left of a zero label handled wrongly."""
    read = [exam for exam in exams if exam.raw_ids]
    known = {*range(num_classes), IGNORE_INDEX}
    too_high = [exam for exam in read if set(exam.raw_ids) - known == {num_classes}]
    with_zero = sum(0 in exam.raw_ids for exam in read)
    none_has_zero = all(0 not in exam.raw_ids for exam in too_high)
    if len(too_high) >= MANY * len(read) or (none_has_zero and with_zero >= MOSTLY * len(read)):
        zeros = "0 never occurs" if not with_zero else f"0 occurs in {count(with_zero, 'map', of=len(read))}"
        what = (
            f"{count(len(too_high), 'label map', 'hold')} id {num_classes}, but {num_classes} classes have "
            f"the ids 0 to {num_classes - 1}, and {zeros}: are the ids shifted by one, with 0 for "
            "`unlabelled`?"
        )
        yield from findings_of("zero label", split, _labels(too_high), what)
    low_ignore = [exam for exam in read if IGNORE_INDEX - 1 in set(exam.raw_ids) - known]
    if not any(len(set(exam.raw_ids) - known) > 2 for exam in low_ignore):
        files, remedy = _labels(low_ignore), "write 255 for 254"
        what = f"{count(len(files), 'label map', 'hold')} id 254: was 1 subtracted from 255, too?"
        yield from findings_of("zero label", split, files, what, remedy=remedy)


# Images that are there more than once: by the hash of their pixels, or nearly the same.


def duplicate_findings(exams: Sequence[Exam]) -> Iterator[Finding]:
    """Equal pixels within a split and across the two; then copies that were scaled or compressed anew."""
    readable: dict[Path, Exam] = {}  # windows of a map may be drawn twice: that is one image
    by_hash: dict[bytes, list[Exam]] = {}
    for exam in exams:
        if exam.image_hash and "blank images" not in exam.traits and exam.pair.image not in readable:
            readable[exam.pair.image] = exam
            by_hash.setdefault(exam.image_hash, []).append(exam)
    groups = [group for group in by_hash.values() if len(group) > 1]
    for split in ("train", "val"):
        within = [[exam for exam in group if exam.split == split] for group in groups]
        doubles = [_equation(group) for group in within if len(group) > 1]
        what = f"images that are there more than once (equal pixels): {len(doubles)}"
        yield from findings_of("duplicates in a split", split, doubles, what)
    disputed = [_equation(group) for group in groups if len({exam.labels_hash for exam in group} - {b""}) > 1]
    what = f"images that are there more than once, with different labels: {len(disputed)}"
    yield from findings_of("same image, other labels", "both", disputed, what)
    shared = [group for group in groups if {exam.split for exam in group} == {"train", "val"}]
    num_val = sum(exam.split == "val" for exam in exams)
    num_shared = sum(exam.split == "val" for group in shared for exam in group)
    what = f"{count(num_shared, 'validation image', 'are', of=num_val)} in train, too (equal pixels)"
    if num_shared == num_val:
        what = f"every validation image is in train, too: are the {num_val} a copy of training images?"
    yield from findings_of("train/val duplicates", "both", [_equation(group) for group in shared], what)
    told_hashes = {exam.image_hash for group in shared for exam in group}
    near = _almost_the_same([exam for exam in readable.values() if exam.image_hash not in told_hashes])
    what = f"validation images that show almost the same as a training image: {len(near)}"
    yield from findings_of("almost the same in train and val", "both", near, what)


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


# Classes.


def class_findings(train: Histogram, val: Histogram, classes: ClassTable) -> Iterator[Finding]:
    """Classes that only one split holds, or none, and those whose names say that they are none."""
    in_train_K, in_val_K = train.pixels_K > 0, val.pixels_K > 0

    def of_classes(
        kind: str, split: str, chosen_K: np.ndarray, text: str, remedy: str = ""
    ) -> Iterator[Finding]:
        names = [classes.names[index] for index in np.flatnonzero(chosen_K)]
        verbs = {verb: verb_of(len(names), verb) for verb in ("are", "occur")}
        of_all = count(len(names), "class", of=len(classes.names))
        what = f"{of_all} {text.format(**verbs, they='it' if len(names) == 1 else 'they')}"
        return findings_of(kind, split, names, what, remedy=remedy)

    if np.count_nonzero(in_train_K) == 1:
        only = classes.names[int(np.argmax(in_train_K))]
        yield finding("one class in all of train", "train", "every label is of one class", [only])
    elif in_train_K.any():
        never_K = ~in_train_K & ~in_val_K
        is_shifted = never_K[0] and not train.ignored and np.count_nonzero(never_K) == 1
        hint = "if id 0 was meant for unlabelled pixels, the ids may be shifted by one" if is_shifted else ""
        yield from of_classes("class not in train", "both", never_K, "never {occur}", hint)
        missed_K = ~in_train_K & in_val_K
        yield from of_classes("class only in val", "train", missed_K, "{occur} in val, but not in train")
        if in_val_K.any():
            missed_K = in_train_K & ~in_val_K
            yield from of_classes("class not in val", "val", missed_K, "{occur} in train, but not in val")
    meant_K = np.array([name.strip().lower() in NO_LABEL_NAMES for name in classes.names]) & in_train_K
    text = "{are} named as if {they} meant no label"
    yield from of_classes("class that means no label", "train", meant_K, text)

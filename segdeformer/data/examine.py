"""What one image and its label map are like: everything the data doctor keeps of a pair, a few hundred bytes.

H height, W width, 3 RGB, K classes.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Literal, NamedTuple

import cv2
import numpy as np

from segdeformer.config import IGNORE_INDEX
from segdeformer.data.alignment import EdgeRanks, edge_ranks
from segdeformer.data.datasets import Dataset, LabelMap, check_same_size, map_labels
from segdeformer.data.duplicates import thumbnail
from segdeformer.data.folders import Pair
from segdeformer.data.images import (
    JPEG_START,
    PNG_PALETTE,
    PNG_SIGNATURE,
    NotIdsError,
    read_image,
    read_labels,
)
from segdeformer.errors import UserError

Trait = Literal[
    "grey",
    "alpha",
    "16 bit",
    "dark 16 bit",
    "turned by EXIF",
    "blank",
    "other format",
    "palette",
    "misaligned",
]
FailureKind = Literal[
    "unreadable image",
    "unreadable label map",
    "colours in label map",
    "lossy label map",
    "sizes differ",
    "ids out of range",
]

PNG_GREYS, PNG_ALPHAS = (0, 4), (4, 6)  # colour types
STARTS = {
    ".jpg": (JPEG_START,),
    ".jpeg": (JPEG_START,),
    ".png": (PNG_SIGNATURE,),
    ".tif": (b"II", b"MM"),
    ".tiff": (b"II", b"MM"),
    ".bmp": (b"BM",),
    ".webp": (b"RIFF",),
}
DARK_LEVELS = 4096  # 10 or 12 bits of a sensor stored in 16


class Failure(NamedTuple):
    """Why this pair cannot be trained on; the message is the one that training would end with."""

    kind: FailureKind
    message: str


class Levels(NamedTuple):
    """Sums over an image's pixels, by channel."""

    pixels: int
    sum_3: np.ndarray
    sum_of_squares_3: np.ndarray

    def plus(self, other: Levels) -> Levels:
        return Levels(
            self.pixels + other.pixels,
            self.sum_3 + other.sum_3,
            self.sum_of_squares_3 + other.sum_of_squares_3,
        )


class Exam(NamedTuple):
    split: str
    pair: Pair
    failures: tuple[Failure, ...] = ()
    traits: frozenset[Trait] = frozenset()
    levels: Levels | None = None  # None: the image is unreadable
    image_hash: bytes = b""
    thumbnail_P: np.ndarray | None = None  # float32
    labels_hash: bytes = b""
    raw_ids: tuple[int, ...] = ()  # as in the file; of too many, the first
    count_K: np.ndarray | None = None  # pixels of each class; None: the labels cannot be used
    num_present: int | None = None  # classes that occur
    ignored: int = 0
    ignored_share: float = 0.0
    class_0_share: float = 0.0  # of the labelled pixels
    edge_ranks: EdgeRanks | None = None
    palette: tuple[tuple[int, bytes], ...] = ()  # index and colour of those used


def examine_pair(split: str, pair: Pair, label_map: LabelMap, num_classes: int) -> Exam:
    """Read both files and note what is wrong or odd; never raises for what is in them."""
    exam = Exam(split, pair)
    image_HW3, exam = _examine_image(exam)
    raw_HW, exam = _examine_labels(exam)
    if raw_HW is None:
        return exam
    if image_HW3 is not None:
        try:
            check_same_size(pair, image_HW3.shape[:2], raw_HW.shape)
        except UserError as error:
            exam = _failed(exam, "sizes differ", error)
            image_HW3 = None
    try:
        labels_HW = map_labels(raw_HW, label_map, pair.labels)
    except UserError as error:
        return _failed(exam, "ids out of range", error)
    return _examine_classes(exam, image_HW3, labels_HW, num_classes)


def examine_sample(split: str, dataset: Dataset, index: int) -> Exam:
    """The same for a sample that lies in no files of its own."""
    image_HW3, labels_HW, name = dataset.read(index)
    exam = _examine_pixels(Exam(split, Pair(name, Path(name), Path(name))), image_HW3)
    exam = exam._replace(raw_ids=_ids(labels_HW), labels_hash=_content_hash(labels_HW))
    return _examine_classes(exam, image_HW3, labels_HW, len(dataset.classes.names))


def _failed(exam: Exam, kind: FailureKind, error: UserError) -> Exam:
    return exam._replace(failures=(*exam.failures, Failure(kind, str(error))))


def _with(exam: Exam, trait: Trait) -> Exam:
    return exam._replace(traits=exam.traits | {trait})


# Images.


def _examine_image(exam: Exam) -> tuple[np.ndarray | None, Exam]:
    path = exam.pair.image
    try:
        image_HW3 = read_image(path)
    except UserError as error:
        return None, _failed(exam, "unreadable image", error)
    return image_HW3, _examine_pixels(_examine_format(exam, path.read_bytes()), image_HW3)


def _examine_format(exam: Exam, data: bytes) -> Exam:
    if not data.startswith(STARTS.get(exam.pair.image.suffix.lower(), (b"",))):
        exam = _with(exam, "other format")
    if data.startswith(PNG_SIGNATURE):
        bits, color_type = data[24], data[25]
        alpha = color_type in PNG_ALPHAS or b"tRNS" in data[:1024]
        if alpha:
            exam = _with(exam, "alpha")
        if bits == 16:
            exam = _with(exam, "16 bit")
        if color_type in PNG_GREYS:
            exam = _with(exam, "grey")
    elif not data.startswith(JPEG_START):  # TIFF, WebP, BMP
        pixels = _decoded(data, cv2.IMREAD_UNCHANGED)
        if pixels.ndim == 3 and pixels.shape[2] == 4:
            exam = _with(exam, "alpha")
        if pixels.dtype == np.uint16:
            exam = _with(exam, "16 bit")
    if "16 bit" in exam.traits and _decoded(data, cv2.IMREAD_UNCHANGED)[..., :3].max() < DARK_LEVELS:
        exam = _with(exam, "dark 16 bit")
    if b"Exif" in data[:65536] or b"eXIf" in data:
        turned = _decoded(data, cv2.IMREAD_REDUCED_COLOR_8)
        stored = _decoded(data, cv2.IMREAD_REDUCED_COLOR_8 | cv2.IMREAD_IGNORE_ORIENTATION)
        if not np.array_equal(turned, stored):
            exam = _with(exam, "turned by EXIF")
    return exam


def _decoded(data: bytes, flags: int) -> np.ndarray:
    return np.asarray(cv2.imdecode(np.frombuffer(data, np.uint8), flags))


def _examine_pixels(exam: Exam, image_HW3: np.ndarray) -> Exam:
    mean, std = (values.ravel() for values in cv2.meanStdDev(image_HW3))
    pixels = image_HW3.shape[0] * image_HW3.shape[1]
    if not std.any():
        exam = _with(exam, "blank")
    elif std[0] == std[1] == std[2] and mean[0] == mean[1] == mean[2] and _is_grey(image_HW3):
        exam = _with(exam, "grey")
    return exam._replace(
        levels=Levels(pixels, mean * pixels, (std**2 + mean**2) * pixels),
        image_hash=_content_hash(image_HW3),
        thumbnail_P=thumbnail(image_HW3),
    )


def _is_grey(image_HW3: np.ndarray) -> bool:
    red, green, blue = cv2.split(image_HW3)
    return np.array_equal(red, green) and np.array_equal(green, blue)


def _content_hash(pixels: np.ndarray) -> bytes:
    """Of the decoded pixels and their shape: the same for copies of other names and lossless formats."""
    digest = hashlib.blake2b(np.ascontiguousarray(pixels).data, digest_size=16)
    digest.update(repr((pixels.dtype.str, pixels.shape)).encode())
    return digest.digest()


# Label maps.


def _examine_labels(exam: Exam) -> tuple[np.ndarray | None, Exam]:
    path = exam.pair.labels
    try:
        raw_HW = read_labels(path)
    except NotIdsError as error:
        return None, _failed(exam, "colours in label map", error)
    except UserError as error:
        return None, _failed(exam, "unreadable label map", error)
    data = path.read_bytes()
    if data.startswith(JPEG_START):
        message = f"{path}: JPEG inside, which changes ids; save label maps as PNG from their source"
        return None, exam._replace(failures=(*exam.failures, Failure("lossy label map", message)))
    if data.startswith(PNG_SIGNATURE) and data[25:26] == PNG_PALETTE:
        exam = _with(exam, "palette")
        exam = exam._replace(palette=_used_palette(data, raw_HW))
    return raw_HW, exam._replace(raw_ids=_ids(raw_HW), labels_hash=_content_hash(raw_HW))


def _ids(labels_HW: np.ndarray) -> tuple[int, ...]:
    if labels_HW.dtype == np.uint8:
        return tuple(np.flatnonzero(np.bincount(labels_HW.ravel(), minlength=256)).tolist())
    return tuple(np.unique(labels_HW)[:256].tolist())


def _used_palette(data: bytes, raw_HW: np.ndarray) -> tuple[tuple[int, bytes], ...]:
    start = data.find(b"PLTE")
    colors = data[start + 4 : start + 4 + int.from_bytes(data[start - 4 : start], "big")]
    return tuple((index, colors[3 * index : 3 * index + 3]) for index in _ids(raw_HW))


def _examine_classes(
    exam: Exam, image_HW3: np.ndarray | None, labels_HW: np.ndarray, num_classes: int
) -> Exam:
    count = np.bincount(labels_HW.ravel(), minlength=IGNORE_INDEX + 1)
    ranks = edge_ranks(image_HW3, labels_HW) if image_HW3 is not None else None
    if ranks is not None and ranks.fits_better_elsewhere:
        exam = _with(exam, "misaligned")
    ignored = int(count[IGNORE_INDEX])
    return exam._replace(
        edge_ranks=ranks,
        count_K=count[:num_classes],
        num_present=int(np.count_nonzero(count[:num_classes])),
        ignored=ignored,
        ignored_share=ignored / labels_HW.size,
        class_0_share=float(count[0]) / max(labels_HW.size - ignored, 1),
    )

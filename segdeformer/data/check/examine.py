"""What one image and its label map are like: everything the data doctor keeps of a pair, a few hundred bytes.

H height, W width, 3 RGB, K classes.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import cv2
import numpy as np

from segdeformer.config import IGNORE_INDEX
from segdeformer.data.datasets import check_same_size, map_labels
from segdeformer.data.folders import Pair
from segdeformer.data.formats import JPEG_START, PNG_START
from segdeformer.data.images import (
    PNG_PALETTE,
    LossyLabelsError,
    NotIdsError,
    read_image,
    read_labels,
)
from segdeformer.data.samples import Dataset, LabelMap
from segdeformer.errors import UserError

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
    ".png": (PNG_START,),
    ".tif": (b"II", b"MM"),
    ".tiff": (b"II", b"MM"),
    ".bmp": (b"BM",),
    ".webp": (b"RIFF",),
}
DARK_LEVELS = 4096  # 10 or 12 bits of a sensor stored in 16
THUMBNAIL_PX = 8
WEIGHT_RULE = "median-frequency"

# Outlines against edges.
LONG_EDGE_PX = 192  # enough for outlines, and quick
FEWEST_OUTLINE_PX = 100
LEAST_GAIN, HIGHEST_AS_IT_IS, LEAST_ELSEWHERE = 0.2, 0.6, 0.75  # mean ranks; chance gives 0.5
RANK_LEVELS = 1023

Turn = Callable[[np.ndarray], np.ndarray]

TURNS: dict[str, Turn] = {
    "mirrored left-right": np.fliplr,
    "mirrored top-bottom": np.flipud,
    "turned by 180 degrees": lambda labels_HW: labels_HW[::-1, ::-1],
    "transposed": np.transpose,
    "transposed and turned by 180 degrees": lambda labels_HW: labels_HW[::-1, ::-1].T,
    "turned by 90 degrees": lambda labels_HW: np.rot90(labels_HW, 1),
    "turned by 270 degrees": lambda labels_HW: np.rot90(labels_HW, 3),
}
NUM_OF_ANY_SHAPE = 3  # turns, the first; the others are of squares


class EdgeRanks(NamedTuple):
    """Mean rank in [0, 1] of the image's gradient under the outlines of its labels."""

    as_it_is: float
    turned: tuple[float, ...]  # in the order of TURNS; the last four for squares only
    fits_better_elsewhere: bool  # the labels miss the edges, and meet them when turned or shifted


class Failure(NamedTuple):
    """Why this pair cannot be trained on; the message is the one that training would end with."""

    kind: FailureKind
    message: str


class Levels(NamedTuple):
    """Sums over an image's pixels, by channel."""

    pixels: int
    sum_3: np.ndarray
    sum_of_squares_3: np.ndarray


@dataclass(slots=True)
class Exam:
    split: str
    pair: Pair
    failures: list[Failure] = field(default_factory=list)
    traits: set[str] = field(default_factory=set)  # kinds of findings, `grey` and `palette`
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
    image_HW3 = raw_HW = labels_HW = None
    with _failing(exam, "unreadable image"):
        image_HW3 = read_image(pair.image)
        _examine_format(exam, pair.image.read_bytes())
        _examine_pixels(exam, image_HW3)
    with _failing(exam, "unreadable label map"):
        raw_HW = _examine_labels(exam)
    if raw_HW is None:
        return exam
    if image_HW3 is not None:
        with _failing(exam, "sizes differ"):
            check_same_size(pair, image_HW3.shape[:2], raw_HW.shape)
    with _failing(exam, "ids out of range"):
        labels_HW = map_labels(raw_HW, label_map, pair.labels)
    if labels_HW is not None:
        _examine_classes(exam, None if exam.failures else image_HW3, labels_HW, num_classes)
    return exam


def examine_sample(split: str, dataset: Dataset, index: int) -> Exam:
    """The same for a sample that lies in no files of its own."""
    image_HW3, labels_HW, name = dataset.read(index)
    exam = Exam(split, Pair(name, Path(name), Path(name)))
    _examine_pixels(exam, image_HW3)
    exam.raw_ids, exam.labels_hash = _ids(labels_HW), _content_hash(labels_HW)
    _examine_classes(exam, image_HW3, labels_HW, len(dataset.classes.names))
    return exam


@contextlib.contextmanager
def _failing(exam: Exam, kind: FailureKind) -> Iterator[None]:
    """A `UserError` becomes a failure of this kind, of coloured and lossy label maps one of theirs."""
    try:
        yield
    except NotIdsError as error:
        exam.failures.append(Failure("colours in label map", str(error)))
    except LossyLabelsError as error:
        exam.failures.append(Failure("lossy label map", str(error)))
    except UserError as error:
        exam.failures.append(Failure(kind, str(error)))


# Images.


def _examine_format(exam: Exam, data: bytes) -> None:
    if not data.startswith(STARTS.get(exam.pair.image.suffix.lower(), (b"",))):
        exam.traits.add("other format than the ending")
    has_alpha = is_16_bit = False
    if data.startswith(PNG_START):
        bits, color_type = data[24], data[25]
        has_alpha = color_type in PNG_ALPHAS or b"tRNS" in data[:1024]
        is_16_bit = bits == 16
        if color_type in PNG_GREYS:
            exam.traits.add("grey")
    elif not data.startswith(JPEG_START):  # TIFF, WebP, BMP
        pixels = _decoded(data, cv2.IMREAD_UNCHANGED)
        has_alpha = pixels.ndim == 3 and pixels.shape[2] == 4
        is_16_bit = pixels.dtype == np.uint16
    if has_alpha:
        exam.traits.add("alpha channel")
    if is_16_bit:
        exam.traits.add("16-bit images")
        if _decoded(data, cv2.IMREAD_UNCHANGED)[..., :3].max() < DARK_LEVELS:
            exam.traits.add("dark 16-bit images")
    if b"Exif" in data[:65536] or b"eXIf" in data:
        turned = _decoded(data, cv2.IMREAD_REDUCED_COLOR_8)
        stored = _decoded(data, cv2.IMREAD_REDUCED_COLOR_8 | cv2.IMREAD_IGNORE_ORIENTATION)
        if not np.array_equal(turned, stored):
            exam.traits.add("turned by EXIF")


def _decoded(data: bytes, flags: int) -> np.ndarray:
    return np.asarray(cv2.imdecode(np.frombuffer(data, np.uint8), flags))


def _examine_pixels(exam: Exam, image_HW3: np.ndarray) -> None:
    mean, std = (values.ravel() for values in cv2.meanStdDev(image_HW3))
    pixels = image_HW3.shape[0] * image_HW3.shape[1]
    if not std.any():
        exam.traits.add("blank images")
    elif std[0] == std[1] == std[2] and mean[0] == mean[1] == mean[2] and not np.ptp(image_HW3, axis=2).any():
        exam.traits.add("grey")
    exam.levels = Levels(pixels, mean * pixels, (std**2 + mean**2) * pixels)
    exam.image_hash = _content_hash(image_HW3)
    exam.thumbnail_P = small_grey(image_HW3, THUMBNAIL_PX).ravel()


def small_grey(image_HW3: np.ndarray, edge_px: int) -> np.ndarray:
    """Means of square cells in grey, float32: close for copies of any size and compression."""
    grey_HW = cv2.cvtColor(image_HW3, cv2.COLOR_RGB2GRAY).astype(np.float32)
    return cv2.resize(grey_HW, (edge_px, edge_px), interpolation=cv2.INTER_AREA)


def _content_hash(pixels: np.ndarray) -> bytes:
    """Of the decoded pixels and their shape: the same for copies of other names and lossless formats."""
    digest = hashlib.blake2b(np.ascontiguousarray(pixels).data, digest_size=16)
    digest.update(repr((pixels.dtype.str, pixels.shape)).encode())
    return digest.digest()


# Label maps.


def _examine_labels(exam: Exam) -> np.ndarray:
    path = exam.pair.labels
    raw_HW = read_labels(path)
    data = path.read_bytes()
    exam.raw_ids, exam.labels_hash = _ids(raw_HW), _content_hash(raw_HW)
    if data.startswith(PNG_START) and data[25:26] == PNG_PALETTE:
        exam.traits.add("palette")
        start = data.find(b"PLTE")
        colors = data[start + 4 : start + 4 + int.from_bytes(data[start - 4 : start], "big")]
        exam.palette = tuple((index, colors[3 * index : 3 * index + 3]) for index in exam.raw_ids)
    return raw_HW


def _ids(labels_HW: np.ndarray) -> tuple[int, ...]:
    if labels_HW.dtype == np.uint8:
        return tuple(np.flatnonzero(np.bincount(labels_HW.ravel(), minlength=256)).tolist())
    return tuple(np.unique(labels_HW)[:256].tolist())


def _examine_classes(
    exam: Exam, image_HW3: np.ndarray | None, labels_HW: np.ndarray, num_classes: int
) -> None:
    count = np.bincount(labels_HW.ravel(), minlength=IGNORE_INDEX + 1)
    exam.count_K = count[:num_classes]
    exam.num_present = int(np.count_nonzero(exam.count_K))
    exam.ignored = int(count[IGNORE_INDEX])
    exam.ignored_share = exam.ignored / labels_HW.size
    exam.class_0_share = float(count[0]) / max(labels_HW.size - exam.ignored, 1)
    exam.edge_ranks = edge_ranks(image_HW3, labels_HW) if image_HW3 is not None else None
    if exam.edge_ranks is not None and exam.edge_ranks.fits_better_elsewhere:
        exam.traits.add("labels look misplaced")


# Whether the outlines of a label map lie on the edges of its image, or would only if turned or shifted.


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
    is_square = outline_HW.shape[0] == outline_HW.shape[1]
    turns = list(TURNS.values())[: None if is_square else NUM_OF_ANY_SHAPE]
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


# What the pairs of a split add up to: classes, what follows for the loss, the images' mean and deviation.


class ColorScale(NamedTuple):
    """In the recipe's units: levels of 0 to 255 by channel, RGB."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


class Histogram:
    """Running sums over the pairs of a split; of a pair with useless labels only the levels count."""

    def __init__(self, num_classes: int) -> None:
        self.pixels_K = np.zeros(num_classes, np.int64)
        self.images_K = np.zeros(num_classes, np.int64)  # that hold the class
        self.pixels_of_images_K = np.zeros(num_classes, np.int64)  # labelled pixels of those images
        self.ignored = 0
        self.levels = Levels(0, np.zeros(3), np.zeros(3))

    def add(self, exam: Exam) -> None:
        if exam.levels is not None:
            (pixels, sum_3, squares_3), new = self.levels, exam.levels
            self.levels = Levels(pixels + new[0], sum_3 + new[1], squares_3 + new[2])
        if exam.count_K is not None:
            present_K = exam.count_K > 0
            self.pixels_K += exam.count_K
            self.images_K += present_K
            self.pixels_of_images_K += present_K * int(exam.count_K.sum())
            self.ignored += exam.ignored

    def color_scale(self) -> ColorScale | None:
        """None when no image could be read."""
        pixels, sum_3, sum_of_squares_3 = self.levels
        if not pixels:
            return None
        mean_3 = sum_3 / pixels
        std_3 = np.sqrt(np.maximum(sum_of_squares_3 / pixels - mean_3**2, 0))
        return ColorScale(*(tuple(round(float(x), 3) for x in values) for values in (mean_3, std_3)))

    def class_weights(self) -> tuple[float, ...]:
        """Median-frequency balancing (Eigen and Fergus, 2015): median frequency / frequency of the class.

        The frequency is counted among the labelled pixels of the images that hold the class. A class that
        never occurs weighs 1.
        """
        occurs_K = self.pixels_K > 0
        if not occurs_K.any():
            return tuple(1.0 for _ in self.pixels_K)
        frequency_K = self.pixels_K / np.maximum(self.pixels_of_images_K, 1)
        median = float(np.median(frequency_K[occurs_K]))
        weight_K = np.divide(median, frequency_K, out=np.ones(len(occurs_K)), where=occurs_K)
        return tuple(float(f"{weight:.4g}") for weight in weight_K)

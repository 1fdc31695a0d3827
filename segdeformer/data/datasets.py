"""Data sets: which image belongs to which label map, and what the ids in it mean.

A data set is opened by one plain function from its folder and split. H height, W width, 3 RGB.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import cv2
import numpy as np

from segdeformer.config import IGNORE_INDEX, DataConfig, DataName
from segdeformer.data.built_in import LandcoverDataset, SyntheticDataset
from segdeformer.data.classes import CLASS_TABLES, ClassTable, load_classes
from segdeformer.data.folders import Layout, Pair, list_files, pair_files
from segdeformer.data.images import image_size, read_image, read_labels
from segdeformer.data.samples import Dataset, LabelMap, Sample, Splits, identity_map
from segdeformer.errors import UsageError, UserError
from segdeformer.plugins import check_attributes, explained, find_part, is_path, refuse

IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".bmp", ".webp")
BUILT_IN: tuple[str, ...] = ("landcover", "synthetic")  # these need no folder


@dataclass(frozen=True, kw_only=True)
class FileDataset:
    """Images and label maps in files, in the order of their names."""

    name: str
    split: str
    classes: ClassTable
    pairs: tuple[Pair, ...]
    label_map: LabelMap
    skipped: tuple[str, ...] = ()  # lines: what in the folders could not be visited

    def __len__(self) -> int:
        return len(self.pairs)

    def read(self, index: int) -> Sample:
        """Raises `UserError` when a file is unreadable, the sizes differ or the labels hold an unknown id."""
        pair = self.pairs[index]
        image_HW3, labels_HW = read_image(pair.image), read_labels(pair.labels)
        check_same_size(pair, image_HW3.shape[:2], labels_HW.shape)
        return Sample(image_HW3, map_labels(labels_HW, self.label_map, pair.labels), pair.name)


def typical_size(dataset: Dataset, *, most: int = 64) -> tuple[int, int] | None:
    """Medians of height and width in px of up to `most` images, by their headers; None if there are none."""
    if not isinstance(dataset, FileDataset):
        return None
    pairs = dataset.pairs[:: -(-len(dataset.pairs) // most)]
    sizes = [size for pair in pairs if (size := image_size(pair.image)) is not None]
    if not sizes:
        return None
    heights, widths = (sorted(side) for side in zip(*sizes, strict=True))
    return heights[len(heights) // 2], widths[len(widths) // 2]


def check_same_size(pair: Pair, image_hw: tuple[int, ...], labels_hw: tuple[int, ...]) -> None:
    if image_hw != labels_hw:
        (height, width), (label_height, label_width) = image_hw, labels_hw
        turned = (height, width) == (label_width, label_height)
        raise UserError(
            f"{pair.image} is {width}x{height} px but {pair.labels} is {label_width}x{label_height} px; "
            + ("turn the labels as the image's EXIF says" if turned else "every pixel needs its label")
        )


def map_labels(labels_HW: np.ndarray, label_map: LabelMap, path: Path) -> np.ndarray:
    """Class ids (uint8) of the ids in the file `path`; a `UserError` lists those that `label_map` lacks."""
    is_byte = labels_HW.dtype == np.uint8
    present = np.flatnonzero(level_counts(labels_HW)) if is_byte else np.unique(labels_HW)
    unknown = [int(label) for label in present if int(label) not in label_map]
    if unknown:
        raise UserError(f"{path}: {_explain_ids(unknown, label_map)}")
    table = np.zeros(256, np.uint8)
    table[list(label_map)] = list(label_map.values())
    classes_HW: np.ndarray = cv2.LUT(labels_HW, table) if is_byte else table[labels_HW]
    return classes_HW


def level_counts(levels: np.ndarray) -> np.ndarray:
    """How often each of the 256 levels occurs in (H, W) uint8."""
    counts = cv2.calcHist([levels], [0], None, [256], [0, 256])
    return counts.ravel().astype(np.int64)


def _explain_ids(unknown: list[int], label_map: LabelMap) -> str:
    known = sorted(set(label_map) - {IGNORE_INDEX})
    num_classes = len(set(label_map.values()) - {IGNORE_INDEX})
    shown = ", ".join(map(str, unknown[:10])) + (", ..." if len(unknown) > 10 else "")
    gaps = " (with gaps)" if len(known) <= known[-1] - known[0] else ""
    text = (
        f"label ids {shown} are not among {known[0]} to {known[-1]}{gaps} "
        f"and {IGNORE_INDEX} (ignored) of {num_classes} classes; "
    )
    if unknown == [num_classes] and known == list(range(num_classes)):
        return text + (
            f"if {num_classes} means unlabelled, write 255 for it; "
            "if the ids run from 1, subtract 1 and write 255 for 0"
        )
    return text + "is it a 0/255 mask or a grey picture? write one class id per pixel"


# ADE20K: 0 is "other objects", ignored.
ADE20K_MAP: LabelMap = dict.fromkeys((IGNORE_INDEX, 0), IGNORE_INDEX) | {k + 1: k for k in range(150)}

# Cityscapes: the ids of gtFine_labelIds that are evaluated, in the order of their trainIds.
CITYSCAPES_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
CITYSCAPES_MAP: LabelMap = dict.fromkeys((IGNORE_INDEX, *range(34)), IGNORE_INDEX) | {
    label: train_id for train_id, label in enumerate(CITYSCAPES_IDS)
}

# COCO-Stuff: of the raw ids 0 to 181, those that no image has (COCO's eleven dropped object classes).
COCO_ABSENT_IDS = frozenset({11, 25, 28, 29, 44, 65, 67, 68, 70, 82, 90})
COCO_STUFF_MAP: LabelMap = {IGNORE_INDEX: IGNORE_INDEX} | {
    label: train_id for train_id, label in enumerate(sorted(set(range(182)) - COCO_ABSENT_IDS))
}


FoundLabels = tuple[Layout, LabelMap | None]  # None: what they mean is in no table


class Source(NamedTuple):
    """Where a split's files lie, and what the ids in them mean."""

    layout: Layout
    classes: Path
    label_map: LabelMap | None  # None: the ids are those of the classes


def open_dataset(config: DataConfig, split: Literal["train", "val"]) -> Dataset:
    """Find the files of a split; nothing is decoded yet.

    Raises `UserError` when folders, files or partners are missing, `UsageError` when there is no root.
    """
    folder = split_name(config, split)
    if is_path(config.name):
        return _own_dataset(config, folder)
    if config.name == "landcover":
        return LandcoverDataset(folder)
    if config.name == "synthetic":
        return SyntheticDataset(folder)
    source = find_source(config, split)
    pairs, skipped = pair_files(source.layout)
    classes, label_map = load_meaning(source)
    return FileDataset(
        name=config.name, split=folder, classes=classes, pairs=pairs, label_map=label_map, skipped=skipped
    )


def _own_dataset(config: DataConfig, split: str) -> Dataset:
    """Data of one's own, whose first sample is looked at."""
    path, what = config.name, "data set"
    make = find_part(path, what)
    with explained(path, what):
        dataset = make(root=config.root, split=split, **(config.options or {}))
    check_attributes(dataset, path, what, "name", "split", "classes", "label_map", "__len__", "read")
    if not isinstance(dataset.classes, ClassTable):
        raise refuse(path, what, f"classes of type {type(dataset.classes).__name__}", "a ClassTable")
    if len(dataset):
        with explained(path, what):
            image_HW3, labels_HW, _ = dataset.read(0)
            came = f"{image_HW3.dtype} {image_HW3.shape} and {labels_HW.dtype} {labels_HW.shape}"
            fits = image_HW3.shape == (*labels_HW.shape, 3) and image_HW3.ndim == 3
        if not fits or image_HW3.dtype != np.uint8 or labels_HW.dtype != np.uint8:
            raise refuse(path, what, came, "a uint8 image (H, W, 3) and uint8 labels (H, W)")
    made: Dataset = dataset
    return made


def open_splits(config: DataConfig) -> Splits:
    """Both splits; raises what `open_dataset` raises."""
    return Splits(open_dataset(config, "train"), open_dataset(config, "val"))


def choose_data(config: DataConfig, spec: str | None = None, classes: Path | None = None) -> DataConfig:
    """The data of a recipe, or what `--data` and `--classes` say instead; all paths absolute.

    So a run can be evaluated from anywhere. Raises `UsageError` for data that is not known.
    """
    given = config if spec is None else parse_data_spec(spec)
    root = str(Path(given.root).resolve()) if given.root else ""
    changes: dict[str, Any] = {"name": given.name, "root": root, "options": given.options}
    if classes is not None or config.classes:
        changes["classes"] = str((classes or Path(str(config.classes))).resolve())
    return config.model_copy(update=changes)


def split_name(config: DataConfig, split: Literal["train", "val"]) -> str:
    return config.train_split if split == "train" else config.val_split


def find_source(config: DataConfig, split: Literal["train", "val"]) -> Source:
    """The folders of a split of any data set that lies in files."""
    if not config.root:
        raise UsageError(f"data `{config.name}` needs a folder: `data.root`, or --data {config.name}:FOLDER")
    root, folder = Path(config.root), split_name(config, split)
    if config.name == "folder":
        layout = Layout(root, f"images/{folder}", IMAGE_ENDINGS, f"labels/{folder}", (".png",))
        return Source(layout, Path(config.classes) if config.classes else root / "classes.toml", None)
    layout, label_map = PUBLISHED[config.name](root, folder)
    return Source(layout, CLASS_TABLES / f"{config.name}.toml", label_map)


def load_meaning(source: Source) -> tuple[ClassTable, LabelMap]:
    """The classes of a source, and the class of every id in its files."""
    classes = load_classes(source.classes)
    return classes, source.label_map or identity_map(len(classes.names))


def parse_data_spec(text: str) -> DataConfig:
    """What `--data` says: `landcover`, `synthetic`, `ade20k:FOLDER` and so on, or a folder of your own."""
    name, colon, root = text.partition(":")
    for known in get_args(DataName):
        if name != known:
            continue
        if known in BUILT_IN and colon:
            raise UsageError(f"--data {text}: `{known}` takes no folder; write --data {known}")
        if known not in BUILT_IN and not root:
            raise UsageError(f"--data {text}: `{known}` needs its folder; write --data {known}:FOLDER")
        return DataConfig(name=known, root=str(Path(root).expanduser().resolve()) if root else "")
    if Path(text).expanduser().is_dir():
        return DataConfig(name="folder", root=str(Path(text).expanduser().resolve()))
    near = difflib.get_close_matches(name, get_args(DataName), n=1, cutoff=0.5)
    remedy = f"did you mean `{near[0]}`?" if near else f"known: {', '.join(get_args(DataName))}"
    raise UsageError(f"--data {text}: neither a data set nor a folder; {remedy}")


def _ade20k(root: Path, split: str) -> FoundLabels:
    folder = {"train": "training", "val": "validation"}.get(split, split)
    return Layout(root, f"images/{folder}", (".jpg",), f"annotations/{folder}", (".png",)), ADE20K_MAP


def _cityscapes(root: Path, split: str) -> FoundLabels:
    ids, train_ids = ("_gtFine_labelIds.png", CITYSCAPES_MAP), ("_gtFine_labelTrainIds.png", identity_map(19))
    return with_labels(root, f"leftImg8bit/{split}", "_leftImg8bit.png", f"gtFine/{split}", train_ids, ids)


def _coco_stuff(root: Path, split: str) -> FoundLabels:
    ids, train_ids = (".png", COCO_STUFF_MAP), ("_labelTrainIds.png", identity_map(171))
    return with_labels(root, f"images/{split}2017", ".jpg", f"annotations/{split}2017", train_ids, ids)


def with_labels(
    root: Path, images: str, ending: str, labels: str, *formats: tuple[str, LabelMap | None]
) -> FoundLabels:
    """With the first of the formats (ending, meaning) that has a file, else the last."""
    there = [known for known in formats if list_files(root / labels, (known[0],)).found]
    label_ending, label_map = (there or formats[-1:])[0]
    return Layout(root, images, (ending,), labels, (label_ending,)), label_map


PUBLISHED: dict[str, Callable[[Path, str], FoundLabels]] = {
    "ade20k": _ade20k,
    "cityscapes": _cityscapes,
    "coco_stuff": _coco_stuff,
}

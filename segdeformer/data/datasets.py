"""Data sets: which image belongs to which label map, and what the ids in it mean.

A data set is opened by one plain function from its folder and split. H height, W width, 3 RGB.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, Protocol, get_args

import numpy as np

from segdeformer.config import IGNORE_INDEX, DataConfig, DataName
from segdeformer.data.classes import CLASS_TABLES, ClassTable, load_classes
from segdeformer.data.images import read_image, read_labels
from segdeformer.errors import UsageError, UserError

IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".bmp", ".webp")
BUILT_IN: tuple[DataName, ...] = ("landcover", "synthetic")  # these need no folder

LabelMap = Mapping[int, int]  # id in the file -> class id, or 255; every other id is an error


class Sample(NamedTuple):
    image_HW3: np.ndarray  # uint8 RGB
    labels_HW: np.ndarray  # uint8 class ids; 255 = ignore
    name: str


class Dataset(Protocol):
    """Samples by index; reading one is deterministic and has no side effects."""

    @property
    def name(self) -> str: ...
    @property
    def split(self) -> str: ...
    @property
    def classes(self) -> ClassTable: ...
    @property
    def label_map(self) -> LabelMap: ...
    def __len__(self) -> int: ...
    def read(self, index: int) -> Sample: ...


class Pair(NamedTuple):
    """An image file and its label file. `name` is the path below the split's folder, without the ending."""

    name: str
    image: Path
    labels: Path


@dataclass(frozen=True, kw_only=True)
class FileDataset:
    """Images and label maps in files, in the order of their names."""

    name: str
    split: str
    classes: ClassTable
    pairs: tuple[Pair, ...]
    label_map: LabelMap

    def __len__(self) -> int:
        return len(self.pairs)

    def read(self, index: int) -> Sample:
        """Raises `UserError` when a file is unreadable, the sizes differ or the labels hold an unknown id."""
        pair = self.pairs[index]
        image_HW3, labels_HW = read_image(pair.image), read_labels(pair.labels)
        if image_HW3.shape[:2] != labels_HW.shape:
            (height, width), (label_height, label_width) = image_HW3.shape[:2], labels_HW.shape
            turned = (height, width) == (label_width, label_height)
            raise UserError(
                f"{pair.image} is {width}x{height} px but {pair.labels} is {label_width}x{label_height} px; "
                + ("turn the labels as the image's EXIF says" if turned else "every pixel needs its label")
            )
        return Sample(image_HW3, map_labels(labels_HW, self.label_map, pair.labels), pair.name)


def map_labels(labels_HW: np.ndarray, label_map: LabelMap, path: Path) -> np.ndarray:
    """Class ids (uint8) of the ids in the file `path`; a `UserError` lists those that `label_map` lacks."""
    if labels_HW.dtype == np.uint8:
        present = np.flatnonzero(np.bincount(labels_HW.ravel(), minlength=256))
    else:
        present = np.unique(labels_HW)
    unknown = [int(label) for label in present if int(label) not in label_map]
    if unknown:
        raise UserError(f"{path}: {_explain_ids(unknown, label_map)}")
    table = np.zeros(256, np.uint8)
    table[list(label_map)] = list(label_map.values())
    classes_HW: np.ndarray = table[labels_HW]
    return classes_HW


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


def identity_map(num_classes: int) -> LabelMap:
    return {IGNORE_INDEX: IGNORE_INDEX} | {label: label for label in range(num_classes)}


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


def open_dataset(config: DataConfig, split: Literal["train", "val"]) -> Dataset:
    """Find the files of a split; nothing is decoded yet.

    Raises `UserError` when folders, files or partners are missing, `UsageError` when there is no root.
    """
    if not config.root and config.name not in BUILT_IN:
        raise UsageError(f"data `{config.name}` needs a folder: `data.root`, or --data {config.name}:FOLDER")
    folder = config.train_split if split == "train" else config.val_split
    if config.name == "folder":
        return _folder(Path(config.root), folder, Path(config.classes) if config.classes else None)
    return _OPEN[config.name](Path(config.root), folder)


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


def _folder(root: Path, split: str, classes_file: Path | None) -> FileDataset:
    pairs = _pair(root, f"images/{split}", IMAGE_ENDINGS, f"labels/{split}", (".png",))
    classes = load_classes(classes_file or root / "classes.toml")
    return FileDataset(
        name="folder", split=split, classes=classes, pairs=pairs, label_map=identity_map(len(classes.names))
    )


def _ade20k(root: Path, split: str) -> FileDataset:
    folder = {"train": "training", "val": "validation"}.get(split, split)
    pairs = _pair(root, f"images/{folder}", (".jpg",), f"annotations/{folder}", (".png",))
    return _published("ade20k", split, pairs, ADE20K_MAP)


def _cityscapes(root: Path, split: str) -> FileDataset:
    images, labels = f"leftImg8bit/{split}", f"gtFine/{split}"
    if _files(root / labels, ("_gtFine_labelTrainIds.png",)):
        ending, label_map = "_gtFine_labelTrainIds.png", identity_map(19)
    else:
        ending, label_map = "_gtFine_labelIds.png", CITYSCAPES_MAP
    pairs = _pair(root, images, ("_leftImg8bit.png",), labels, (ending,))
    return _published("cityscapes", split, pairs, label_map)


def _coco_stuff(root: Path, split: str) -> FileDataset:
    images, labels = f"images/{split}2017", f"annotations/{split}2017"
    if _files(root / labels, ("_labelTrainIds.png",)):
        ending, label_map = "_labelTrainIds.png", identity_map(171)
    else:
        ending, label_map = ".png", COCO_STUFF_MAP
    pairs = _pair(root, images, (".jpg",), labels, (ending,))
    return _published("coco_stuff", split, pairs, label_map)


def _published(name: DataName, split: str, pairs: tuple[Pair, ...], label_map: LabelMap) -> FileDataset:
    classes = load_classes(CLASS_TABLES / f"{name}.toml")
    return FileDataset(name=name, split=split, classes=classes, pairs=pairs, label_map=label_map)


def _landcover(_root: Path, split: str) -> Dataset:
    from segdeformer.data.built_in import LandcoverDataset

    return LandcoverDataset(split)


def _synthetic(_root: Path, split: str) -> Dataset:
    from segdeformer.data.built_in import SyntheticDataset

    return SyntheticDataset(split)


# All but `folder`, whose classes are the user's.
_OPEN: dict[DataName, Callable[[Path, str], Dataset]] = {
    "landcover": _landcover,
    "synthetic": _synthetic,
    "ade20k": _ade20k,
    "cityscapes": _cityscapes,
    "coco_stuff": _coco_stuff,
}


def _pair(
    root: Path,
    image_folder: str,
    image_endings: tuple[str, ...],
    label_folder: str,
    label_endings: tuple[str, ...],
) -> tuple[Pair, ...]:
    """Every image with its label map: same path below the two folders, but for the endings."""
    for folder in (root, root / image_folder, root / label_folder):
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder; expected {image_folder} and {label_folder} in {root}")
    images, labels = _files(root / image_folder, image_endings), _files(root / label_folder, label_endings)
    if not images:
        raise UserError(f"{root / image_folder}: no images there (*{', *'.join(image_endings)})")
    if lonely := sorted(images.keys() - labels.keys()):
        wanted = root / label_folder / f"{lonely[0]}{label_endings[0]}"
        raise UserError(
            f"{images[lonely[0]]} has no label map {wanted} ({len(lonely)} of {len(images)} images have none)"
        )
    if lonely := sorted(labels.keys() - images.keys()):
        raise UserError(
            f"{labels[lonely[0]]} has no image in {root / image_folder} "
            f"({len(lonely)} of {len(labels)} label maps have none); remove it or add the image"
        )
    return tuple(Pair(name, images[name], labels[name]) for name in sorted(images))


def _files(folder: Path, endings: tuple[str, ...]) -> dict[str, Path]:
    """Files below the folder by relative path without the ending; hidden files are left out."""
    found: dict[str, Path] = {}
    for parent, _, names in os.walk(folder, followlinks=True):
        for name in sorted(names):
            ending = next((ending for ending in endings if name.lower().endswith(ending.lower())), None)
            if ending is None or name.startswith("."):
                continue
            path = Path(parent, name)
            key = path.relative_to(folder).as_posix()[: -len(ending)]
            if key in found:
                raise UserError(f"{found[key]} and {path} differ in their endings only; keep one of them")
            found[key] = path
    return found

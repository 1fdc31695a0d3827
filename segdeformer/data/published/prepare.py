"""From a published data set, as its archives unpack, to a folder of images and label maps of class ids.

H height, W width.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from segdeformer.config import IGNORE_INDEX
from segdeformer.data.classes import CLASS_TABLES, load_classes
from segdeformer.data.datasets import (
    CITYSCAPES_MAP,
    COCO_STUFF_MAP,
    PUBLISHED,
    FoundLabels,
    map_labels,
    with_labels,
)
from segdeformer.data.folders import Layout, Pair, list_files, pair_files
from segdeformer.data.images import read_labels, write_png
from segdeformer.data.parallel import in_threads
from segdeformer.data.published import SETS
from segdeformer.data.samples import LabelMap
from segdeformer.errors import UsageError, UserError, count, listed
from segdeformer.files import replacing, write_text

Split = Literal["train", "val"]

PNG_END = b"IEND\xaeB`\x82"
COUNTS: dict[str, dict[Split, int]] = {name: about["pairs"] for name, about in SETS.items()}
# Labels that are drawn, over others too, but not learnt.
IGNORED_LABELS = (
    *("unlabeled", "ego vehicle", "rectification border", "out of roi", "static", "dynamic", "ground"),
    *("parking", "rail track", "guard rail", "bridge", "tunnel", "polegroup", "caravan", "trailer"),
)
NOT_DRAWN = "license plate"  # it has no id of its own: the car under it stays


class Made(NamedTuple):
    """What became of a pair. `error` is None when both files are there."""

    split: Split
    is_new: bool
    error: str | None


class Preparation:
    """Finds all pairs of both splits at once; `run` makes those that are not there yet.

    Label maps are written whole or not at all, so that a stopped run goes on where it was. Raises `UserError`
    when folders or partners are missing.
    """

    def __init__(self, name: str, source: Path, target: Path, *, copy: bool) -> None:
        if name not in COUNTS:
            raise UsageError(f"{name}: not a data set to prepare; expected {', '.join(COUNTS)}")
        if target.resolve() == source.resolve():
            raise UsageError(f"{target}: DST is SRC; name another folder to make")
        self.name, self.target = name, target
        self.recipe = SETS[name]["recipe"]  # to train on it with
        self.place = _copied if copy else _linked
        self.sources = {split: _FIND[name](source, split) for split in COUNTS[name]}
        paired = {split: pair_files(layout) for split, (layout, _) in self.sources.items()}
        self.pairs = {split: found.pairs for split, found in paired.items()}
        self.skipped = [line for found in paired.values() for line in found.skipped]
        self.made: list[Made] = []

    def __len__(self) -> int:
        return sum(len(pairs) for pairs in self.pairs.values())

    def run(self, *, workers: int | None = None) -> Iterator[Made]:
        """Make what is missing or older than its source; a pair that fails does not stop the others."""
        write_text(self.target / "classes.toml", (CLASS_TABLES / f"{self.name}.toml").read_text("utf-8"))
        jobs = [partial(self._make, split, pair) for split, pairs in self.pairs.items() for pair in pairs]
        for made in in_threads(jobs, workers=workers):
            self.made.append(made)
            yield made

    def _make(self, split: Split, pair: Pair) -> Made:
        labels = self.target / "labels" / split / f"{pair.name}.png"
        image = self.target / "images" / split / f"{pair.name}{pair.image.suffix.lower()}"
        try:
            is_new = not _is_done(labels, pair.labels)
            if is_new:
                write_png(labels, _class_ids(pair.labels, self.sources[split][1]))
            size = pair.image.stat().st_size
            if not image.exists() or (not image.samefile(pair.image) and image.stat().st_size != size):
                self.place(pair.image, image)
        except UserError as error:
            return Made(split, False, str(error))
        return Made(split, is_new, None)

    def counts(self) -> list[str]:
        """A line for each split, after one for what in SRC could not be visited."""
        lines = [f"not visited: {listed(self.skipped)}"] if self.skipped else []
        for split, wanted in COUNTS[self.name].items():
            own = [made for made in self.made if made.split == split and made.error is None]
            new = sum(made.is_new for made in own)
            lines.append(
                f"{split}: {count(len(own), 'pair')}, {count(new, 'label map')} made now; "
                f"published are {wanted:,}"
            )
        return lines

    def check_counts(self, *, partial: bool) -> None:
        """Raises `UserError` when pairs failed or, unless `partial`, there are not as many as published."""
        failed = [made.error for made in self.made if made.error is not None]
        if failed:
            raise UserError(
                f"{count(len(failed), 'pair', of=len(self))} could not be made; the first: {failed[0]}"
            )
        for split, wanted in COUNTS[self.name].items():
            have = sum(made.split == split for made in self.made)
            files = list_files(self.target / "labels" / split, (".png",)).found
            if len(files) != have:
                raise UserError(
                    f"{self.target / 'labels' / split} holds {len(files)} label maps, SRC has {have}; "
                    "remove those of another source, or choose another DST"
                )
            if have != wanted and not partial:
                raise UserError(
                    f"{split} has {have:,} pairs, {self.name} was published with {wanted:,}; unpack the rest "
                    "and run again (what is made stays), or accept them with --partial"
                )


# Where the archives unpack to, and what their label files hold.


def _ade20k(root: Path, split: Split) -> FoundLabels:
    """ADEChallengeData2016.zip."""
    root = _first_folder(root, ".", "ADEChallengeData2016", wanted="images/training")
    return PUBLISHED["ade20k"](root, split)


def _cityscapes(root: Path, split: Split) -> FoundLabels:
    """leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip: label ids, or else polygons to draw."""
    formats = ("_gtFine_labelIds.png", CITYSCAPES_MAP), ("_gtFine_polygons.json", None)
    return with_labels(root, f"leftImg8bit/{split}", "_leftImg8bit.png", f"gtFine/{split}", *formats)


def _coco_stuff(root: Path, split: Split) -> FoundLabels:
    """train2017.zip, val2017.zip and stuffthingmaps_trainval2017.zip, under `images` and `annotations`.

    Also found: the images beside, and the label maps in `stuffthingmaps`.
    """
    folder = f"{split}2017"
    images = _first_folder(root, f"images/{folder}", folder, wanted=".")
    places = (f"annotations/{folder}", f"stuffthingmaps/{folder}", folder)  # the last: all in one place
    labels = _first_folder(root, *places, wanted=".")
    below = [path.relative_to(root).as_posix() for path in (images, labels)]
    return Layout(root, below[0], (".jpg",), below[1], (".png",)), COCO_STUFF_MAP


_FIND: dict[str, Callable[[Path, Split], FoundLabels]] = {
    "ade20k": _ade20k,
    "cityscapes": _cityscapes,
    "coco_stuff": _coco_stuff,
}


def _first_folder(root: Path, *places: str, wanted: str) -> Path:
    """The first place below the root that is there; the first of all if none is."""
    there = [root / place for place in places if (root / place / wanted).is_dir()]
    return there[0] if there else root / places[0]


def _class_ids(path: Path, label_map: LabelMap | None) -> np.ndarray:
    """Of a label file whose ids mean this, or of Cityscapes' polygons."""
    return draw_polygons(path) if label_map is None else map_labels(read_labels(path), label_map, path)


# Cityscapes' polygons.


def draw_polygons(path: Path) -> np.ndarray:
    """The (H, W) uint8 trainIds of a `_gtFine_polygons.json`: later objects cover earlier ones.

    Raises `UserError` when the file is no such JSON or names an unknown label.
    """
    try:
        annotation = json.loads(path.read_text("utf-8"))
        size = (int(annotation["imgWidth"]), int(annotation["imgHeight"]))
        objects = [
            (str(thing["label"]), [(x, y) for x, y in thing["polygon"]])
            for thing in annotation["objects"]
            if not thing.get("deleted")
        ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path}: cannot be read as Cityscapes polygons ({error!r}); unpack it again"
        ) from None
    picture = Image.new("L", size, IGNORE_INDEX)
    pen = ImageDraw.Draw(picture)
    for label, corners in objects:
        if label != NOT_DRAWN and len(corners) > 1:
            pen.polygon(corners, fill=_train_id(label, path))
    return np.asarray(picture)


def _train_id(label: str, path: Path) -> int:
    ids = _train_ids()
    for name in (label, label.removesuffix("group")):  # "persongroup": several persons in one outline
        if name in ids:
            return ids[name]
    raise UserError(f"{path}: unknown label {label!r}; expected those of Cityscapes")


@cache
def _train_ids() -> dict[str, int]:
    names = load_classes(CLASS_TABLES / "cityscapes.toml").names
    return dict.fromkeys(IGNORED_LABELS, IGNORE_INDEX) | {name: index for index, name in enumerate(names)}


# Files.


def _is_done(labels: Path, source: Path) -> bool:
    """Whether the label map is there, whole and no older than its source."""
    try:
        if labels.stat().st_mtime < source.stat().st_mtime:
            return False
        with labels.open("rb") as file:
            file.seek(-len(PNG_END), os.SEEK_END)
            return file.read() == PNG_END
    except OSError:
        return False


def _linked(source: Path, image: Path) -> None:
    """A symbolic link, or a copy where there are none."""
    try:
        image.parent.mkdir(parents=True, exist_ok=True)
        image.unlink(missing_ok=True)
        image.symlink_to(source.resolve())
    except OSError:
        _copied(source, image)


def _copied(source: Path, image: Path) -> None:
    with replacing(image) as aside:
        shutil.copyfile(source, aside)

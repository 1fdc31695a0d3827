"""Which files a folder holds, and which label map belongs to which image."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from segdeformer.errors import UserError, count


class Layout(NamedTuple):
    """Where a split lies: two folders below the root, and the endings that count in each."""

    root: Path
    images: str
    image_endings: tuple[str, ...]
    labels: str
    label_endings: tuple[str, ...]


class Pair(NamedTuple):
    """An image file and its label file. `name` is the path below the split's folder, without the ending."""

    name: str
    image: Path
    labels: Path


class Listing(NamedTuple):
    """The files below a folder; hidden ones are left out."""

    found: dict[str, Path]  # by relative path without the ending
    clashes: tuple[tuple[Path, Path], ...]  # files that differ in their endings only
    others: tuple[Path, ...]  # files with other endings


def list_files(folder: Path, endings: tuple[str, ...]) -> Listing:
    found: dict[str, Path] = {}
    clashes, others = [], []
    for parent, _, names in os.walk(folder, followlinks=True):
        for name in sorted(names):
            if name.startswith("."):
                continue
            path = Path(parent, name)
            ending = next((ending for ending in endings if name.lower().endswith(ending.lower())), None)
            if ending is None:
                others.append(path)
                continue
            key = path.relative_to(folder).as_posix()[: -len(ending)]
            if key in found:
                clashes.append((found[key], path))
            else:
                found[key] = path
    return Listing(found, tuple(clashes), tuple(others))


def check_folders(layout: Layout) -> None:
    for folder in (layout.root, layout.root / layout.images, layout.root / layout.labels):
        if not folder.is_dir():
            raise UserError(
                f"{folder}: no such folder; expected {layout.images} and {layout.labels} in {layout.root}"
            )


def check_any_images(layout: Layout, images: Listing) -> None:
    if not images.found:
        raise UserError(
            f"{layout.root / layout.images}: no images there (*{', *'.join(layout.image_endings)})"
        )


def pair_files(layout: Layout) -> tuple[Pair, ...]:
    """Every image with its label map: same path below the two folders, but for the endings.

    Raises `UserError` when folders, files or partners are missing, or two files have one name.
    """
    check_folders(layout)
    images = list_files(layout.root / layout.images, layout.image_endings)
    labels = list_files(layout.root / layout.labels, layout.label_endings)
    for first, second in (*images.clashes, *labels.clashes):
        raise UserError(f"{first} and {second} differ in their endings only; keep one of them")
    check_any_images(layout, images)
    if lonely := sorted(images.found.keys() - labels.found.keys()):
        wanted = layout.root / layout.labels / f"{lonely[0]}{layout.label_endings[0]}"
        raise UserError(
            f"{images.found[lonely[0]]} has no label map {wanted} "
            f"({count(len(lonely), 'image', 'have', of=len(images.found))} none)"
        )
    if lonely := sorted(labels.found.keys() - images.found.keys()):
        raise UserError(
            f"{labels.found[lonely[0]]} has no image in {layout.root / layout.images} "
            f"({count(len(lonely), 'label map', 'have', of=len(labels.found))} none); "
            "remove it or add the image"
        )
    return tuple(Pair(name, images.found[name], labels.found[name]) for name in sorted(images.found))

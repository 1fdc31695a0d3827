"""Which files a folder holds, and which label map belongs to which image."""

from __future__ import annotations

import unicodedata
from pathlib import Path
from typing import NamedTuple

from segdeformer.data.walk import walk_files
from segdeformer.errors import UserError, count, listed


class Layout(NamedTuple):
    """Where a split lies: two folders below the root, and the endings that count in each."""

    root: Path
    images: str
    image_endings: tuple[str, ...]
    labels: str
    label_endings: tuple[str, ...]


class Pair(NamedTuple):
    """An image file and its label file. `name` is that of `name_of`."""

    name: str
    image: Path
    labels: Path


class Paired(NamedTuple):
    """The pairs of a split, and a line for each thing in its folders that could not be visited."""

    pairs: tuple[Pair, ...]
    skipped: tuple[str, ...]


class Listing(NamedTuple):
    """The files below a folder; hidden ones are left out."""

    found: dict[str, Path]  # by name
    clashes: tuple[tuple[Path, Path], ...]  # files that differ in their endings only
    twins: tuple[str, ...]  # lines: files that differ in Unicode's normal form only
    others: tuple[Path, ...]  # files with other endings
    skipped: tuple[str, ...]  # lines: what could not be visited


def name_of(path: Path, folder: Path, ending: str) -> str:
    """The path below the folder, without the ending, in Unicode's composed form (NFC).

    Some systems write an accent as a character of its own (NFD), so equal names may differ in their bytes.
    """
    below = path.relative_to(folder).as_posix()
    return unicodedata.normalize("NFC", below[: len(below) - len(ending)])


def list_files(folder: Path, endings: tuple[str, ...]) -> Listing:
    found: dict[str, Path] = {}
    found_endings: dict[str, str] = {}
    clashes, twins, others = [], [], []
    walk = walk_files(folder)
    for path in walk.files:
        ending = next((ending for ending in endings if path.name.lower().endswith(ending.lower())), None)
        if ending is None:
            others.append(path)
            continue
        key = name_of(path, folder, ending)
        if key not in found:
            found[key], found_endings[key] = path, ending
            continue
        first, second = (file.relative_to(folder).as_posix() for file in (found[key], path))
        if first[: -len(found_endings[key])] == second[: -len(ending)]:
            clashes.append((found[key], path))
        else:
            twins.append(f"{folder}: {first!a} and {second!a} are one name in two forms of Unicode")
    return Listing(found, tuple(clashes), tuple(twins), tuple(others), walk.skipped)


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
            + _unvisited(images.skipped)
        )


def _unvisited(skipped: tuple[str, ...]) -> str:
    return f"; not visited: {listed(skipped)}" if skipped else ""


def all_skipped(images: Listing, labels: Listing) -> tuple[str, ...]:
    """Of both, once each: they may be one folder."""
    return tuple(dict.fromkeys((*images.skipped, *labels.skipped)))


def pair_files(layout: Layout) -> Paired:
    """Every image with its label map: same path below the two folders, but for the endings.

    Raises `UserError` when folders, files or partners are missing, or two files have one name.
    """
    check_folders(layout)
    images = list_files(layout.root / layout.images, layout.image_endings)
    labels = list_files(layout.root / layout.labels, layout.label_endings)
    for first, second in (*images.clashes, *labels.clashes):
        raise UserError(f"{first} and {second} differ in their endings only; keep one of them")
    for twins in (*images.twins, *labels.twins):
        raise UserError(f"{twins}; keep one of them")
    check_any_images(layout, images)
    if lonely := sorted(images.found.keys() - labels.found.keys()):
        wanted = layout.root / layout.labels / f"{lonely[0]}{layout.label_endings[0]}"
        raise UserError(
            f"{images.found[lonely[0]]} has no label map {wanted} "
            f"({count(len(lonely), 'image', 'have', of=len(images.found))} none)" + _unvisited(labels.skipped)
        )
    if lonely := sorted(labels.found.keys() - images.found.keys()):
        raise UserError(
            f"{labels.found[lonely[0]]} has no image in {layout.root / layout.images} "
            f"({count(len(lonely), 'label map', 'have', of=len(labels.found))} none); "
            "remove it or add the image" + _unvisited(images.skipped)
        )
    pairs = tuple(Pair(name, images.found[name], labels.found[name]) for name in sorted(images.found))
    return Paired(pairs, all_skipped(images, labels))

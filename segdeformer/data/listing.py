"""The pairs of a split, and what the names of its files alone say: partners, doubles, endings."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from segdeformer.data.findings import Finding, finding
from segdeformer.data.folders import Layout, Listing, Pair, check_any_images, check_folders, list_files
from segdeformer.errors import UserError

NOT_DATA = (".txt", ".md", ".json", ".toml", ".csv", ".xml", ".yaml", ".yml", ".db", ".ini", ".html")
SIDE_BY_SIDE = ("_gtfine_", "_gtcoarse_", "_labeltrainids", "_instancetrainids")  # in published folders


class FoundPairs(NamedTuple):
    pairs: tuple[Pair, ...]
    findings: list[Finding]


def find_pairs(split: str, layout: Layout) -> FoundPairs:
    """Like `pair_files`, but what is wrong becomes findings."""
    try:
        check_folders(layout)
        images = list_files(layout.root / layout.images, layout.image_endings)
        check_any_images(layout, images)
    except UserError as error:
        return FoundPairs((), [finding("no data", split, str(error))])
    labels = list_files(layout.root / layout.labels, layout.label_endings)
    without_image = sorted(labels.found.keys() - images.found.keys())
    without_labels = sorted(images.found.keys() - labels.found.keys())
    findings = [
        *_clashes(split, images, labels),
        *_wrong_endings(split, layout, labels, without_labels),
        *_lonely(split, layout, images, labels, without_labels, without_image),
        *_left_out(split, layout, images, labels),
    ]
    both = sorted(images.found.keys() & labels.found.keys())
    return FoundPairs(tuple(Pair(name, images.found[name], labels.found[name]) for name in both), findings)


def _clashes(split: str, images: Listing, labels: Listing) -> list[Finding]:
    clashes = (*images.clashes, *labels.clashes)
    if not clashes:
        return []
    what = f"files that differ in their endings only: {len(clashes)}; one file per name was expected"
    return [finding("duplicate names", split, what, [f"{first} = {second}" for first, second in clashes])]


def _wrong_endings(
    split: str, layout: Layout, labels: Listing, without_labels: Sequence[str]
) -> list[Finding]:
    """Label maps that are there, but saved in a format that is not read."""
    folder, missing = layout.root / layout.labels, set(without_labels)
    named = [path for path in labels.others if _key(path, folder) in missing]
    if not named:
        return []
    what = f"label maps that end in {_endings(named)}: {len(named)}; {layout.label_endings[0]} was expected"
    return [finding("label map of another format", split, what, named)]


def _lonely(
    split: str,
    layout: Layout,
    images: Listing,
    labels: Listing,
    without_labels: Sequence[str],
    without_image: Sequence[str],
) -> list[Finding]:
    findings = []
    if without_labels:
        wanted = layout.root / layout.labels / f"{without_labels[0]}{layout.label_endings[0]}"
        what = f"{len(without_labels)} of {len(images.found)} images have no label map; expected {wanted}"
        near = _similar(without_labels[0], without_image)
        remedy = f"is it {labels.found[near]}? names must be equal but for the ending" if near else ""
        files = [images.found[name] for name in without_labels]
        findings.append(finding("missing label map", split, what, files, remedy=remedy))
    if without_image:
        folder = layout.root / layout.images
        what = f"{len(without_image)} of {len(labels.found)} label maps have no image in {folder}"
        findings.append(finding("missing image", split, what, [labels.found[name] for name in without_image]))
    return findings


def _similar(name: str, others: Sequence[str]) -> str | None:
    """A name that has this one in it, or the reverse, whatever the case: `x_mask` for `x`, `B` for `b`."""
    name = name.lower()
    return next((other for other in others if name in other.lower() or other.lower() in name), None)


def _left_out(split: str, layout: Layout, images: Listing, labels: Listing) -> list[Finding]:
    """Files that nothing reads, but for notes and the side files of published data."""
    known = {_key(path, layout.root / layout.labels) for path in labels.others} & images.found.keys()
    candidates = [*images.others]
    candidates += [path for path in labels.others if _key(path, layout.root / layout.labels) not in known]
    left = [
        path
        for path in candidates
        if path.suffix.lower() not in NOT_DATA
        and not any(mark in path.name.lower() for mark in SIDE_BY_SIDE)
        and path.is_file()
    ]
    if not left:
        return []
    what = f"files that end in {_endings(left)} and are not read: {len(left)}"
    return [finding("files left out", split, what, left)]


def _key(path: Path, folder: Path) -> str:
    return path.relative_to(folder).with_suffix("").as_posix()


def _endings(paths: Sequence[Path]) -> str:
    return ", ".join(sorted({path.suffix or path.name for path in paths})[:5])

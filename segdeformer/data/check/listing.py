"""The pairs of a split, and what the names of its files alone say: partners, doubles, endings."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from segdeformer.data.check.findings import Finding, finding, findings_of
from segdeformer.data.folders import Layout, Pair, check_any_images, check_folders, list_files
from segdeformer.errors import UserError

NOT_DATA = (".txt", ".md", ".json", ".toml", ".csv", ".xml", ".yaml", ".yml", ".db", ".ini", ".html")
SIDE_BY_SIDE = ("_gtfine_", "_gtcoarse_", "_labeltrainids", "_instancetrainids")  # in published folders


class FoundPairs(NamedTuple):
    pairs: tuple[Pair, ...]
    findings: list[Finding]


def find_pairs(split: str, layout: Layout) -> FoundPairs:
    """Like `pair_files`, but what is wrong becomes findings."""
    image_folder, label_folder = layout.root / layout.images, layout.root / layout.labels
    try:
        check_folders(layout)
        images = list_files(image_folder, layout.image_endings)
        check_any_images(layout, images)
    except UserError as error:
        return FoundPairs((), [finding("no data", split, str(error))])
    labels = list_files(label_folder, layout.label_endings)
    without_image = sorted(labels.found.keys() - images.found.keys())
    without_labels = sorted(images.found.keys() - labels.found.keys())
    other_labels = {path: path.relative_to(label_folder).with_suffix("").as_posix() for path in labels.others}

    equations = [f"{first} = {second}" for first, second in (*images.clashes, *labels.clashes)]
    what = f"files that differ in their endings only: {len(equations)}; one file per name was expected"
    findings = findings_of("duplicate names", split, equations, what)

    ending = layout.label_endings[0]
    misnamed = [
        path for path, name in other_labels.items() if name in images.found and name not in labels.found
    ]
    what = f"label maps that end in {_endings(misnamed)}: {len(misnamed)}; {ending} was expected"
    findings += findings_of("label map of another format", split, misnamed, what)

    if without_labels:
        first = without_labels[0]
        what = f"{len(without_labels)} of {len(images.found)} images have no label map"
        what += f"; expected {label_folder / f'{first}{ending}'}"
        near = _similar(first, without_image)
        remedy = f"is it {labels.found[near]}? names must be equal but for the ending" if near else ""
        files = [images.found[name] for name in without_labels]
        findings.append(finding("missing label map", split, what, files, remedy=remedy))
    what = f"{len(without_image)} of {len(labels.found)} label maps have no image in {image_folder}"
    findings += findings_of("missing image", split, [labels.found[name] for name in without_image], what)

    unread = [*images.others, *(path for path, name in other_labels.items() if name not in images.found)]
    left = [path for path in unread if _may_be_data(path)]
    what = f"files that end in {_endings(left)} and are not read: {len(left)}"
    findings += findings_of("files left out", split, left, what)

    both = sorted(images.found.keys() & labels.found.keys())
    return FoundPairs(tuple(Pair(name, images.found[name], labels.found[name]) for name in both), findings)


def _similar(name: str, others: Sequence[str]) -> str | None:
    """A name that has this one in it, or the reverse, whatever the case: `x_mask` for `x`, `B` for `b`."""
    name = name.lower()
    return next((other for other in others if name in other.lower() or other.lower() in name), None)


def _may_be_data(path: Path) -> bool:
    """No notes, and no side files of published data."""
    beside = any(mark in path.name.lower() for mark in SIDE_BY_SIDE)
    return path.suffix.lower() not in NOT_DATA and not beside and path.is_file()


def _endings(paths: Sequence[Path]) -> str:
    return ", ".join(sorted({path.suffix or path.name for path in paths})[:5])

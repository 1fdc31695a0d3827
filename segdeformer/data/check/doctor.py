"""The data doctor: reads every pair of a data set and says what would spoil training."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

from segdeformer.config import DataConfig
from segdeformer.data.check.diagnoses import class_findings, duplicate_findings, pair_findings
from segdeformer.data.check.examine import ColorScale, Exam, Histogram, examine_pair, examine_sample
from segdeformer.data.check.findings import Finding, finding, findings_of, sorted_findings
from segdeformer.data.classes import ClassTable
from segdeformer.data.datasets import (
    BUILT_IN,
    FileDataset,
    find_source,
    load_meaning,
    open_dataset,
    split_name,
)
from segdeformer.data.folders import (
    Layout,
    Pair,
    all_skipped,
    check_any_images,
    check_folders,
    list_files,
    name_of,
)
from segdeformer.data.parallel import in_threads
from segdeformer.data.samples import Dataset, Sample, evenly_spread
from segdeformer.errors import UserError, count
from segdeformer.plugins import is_path

Split = Literal["train", "val"]
SPLITS: tuple[Split, ...] = ("train", "val")

SHOWN_PAIRS: dict[Split, int] = {"train": 8, "val": 4}  # on a page of samples
QUICK_PAIRS: dict[Split, int] = {"train": 48, "val": 16}  # what training looks at before it starts

NOT_DATA = (".txt", ".md", ".json", ".toml", ".csv", ".xml", ".yaml", ".yml", ".db", ".ini", ".html")
SIDE_BY_SIDE = ("_gtfine_", "_gtcoarse_", "_labeltrainids", "_instancetrainids")  # in published folders


class SplitSummary(NamedTuple):
    name: str
    num_pairs: int
    histogram: Histogram


class Checkup(NamedTuple):
    """What the doctor has found, the worst first, and the numbers that a recipe needs."""

    config: DataConfig
    classes: ClassTable
    splits: dict[Split, SplitSummary]
    findings: tuple[Finding, ...]
    class_weights: tuple[float, ...]
    color_scale: ColorScale | None

    @property
    def spoils_training(self) -> bool:
        return any(found.level == "error" for found in self.findings)


class Doctor:
    """Lists the files of both splits at once; `examine` reads them, `checkup` draws the conclusions.

    quick: look at some pairs only, evenly spread, and draw no conclusion that needs all.
    """

    def __init__(self, config: DataConfig, *, quick: bool = False) -> None:
        self.config = config
        self.quick = quick
        self.findings: list[Finding] = []  # those that need no reading
        self.exams: list[Exam] = []
        self.jobs: list[Callable[[], Exam]] = []
        self.datasets: dict[Split, Dataset] = {}
        folders = []
        for split in SPLITS:
            if config.name in BUILT_IN or is_path(config.name):
                dataset = open_dataset(config, split)
                jobs = [partial(examine_sample, split, dataset, index) for index in range(len(dataset))]
            else:
                source = find_source(config, split)
                folders.append(source.layout.root / source.layout.images)
                pairs, findings = find_pairs(split, source.layout)
                self.findings += findings
                classes, label_map = load_meaning(source)
                dataset = FileDataset(
                    name=config.name, split=split, classes=classes, pairs=pairs, label_map=label_map
                )
                jobs = [partial(examine_pair, split, pair, label_map, len(classes.names)) for pair in pairs]
            self.datasets[split], self.classes = dataset, dataset.classes
            wanted = QUICK_PAIRS[split]
            if quick and len(jobs) > wanted:
                jobs = [jobs[i * len(jobs) // wanted] for i in range(wanted)]
            self.jobs += jobs
        if folders and all(folder.is_dir() for folder in folders) and folders[0].samefile(folders[1]):
            what = f"{folders[1]} is the folder of the training images"
            self.findings.append(finding("same folder", "val", what))
        self.histograms = {split: Histogram(len(self.classes.names)) for split in SPLITS}

    def __len__(self) -> int:
        """How many pairs `examine` reads."""
        return len(self.jobs)

    def examine(self, *, workers: int | None = None) -> Iterator[Exam]:
        """Read the pairs and keep notes; a pair's pixels are gone when the next ones come."""
        for exam in in_threads(self.jobs, workers=workers):
            self.histograms["train" if exam.split == "train" else "val"].add(exam)
            exam.count_K = exam.levels = None
            self.exams.append(exam)
            yield exam

    def checkup(self) -> Checkup:
        findings = [*self.findings, *pair_findings(self.exams, self.config.name, len(self.classes.names))]
        if not self.quick:
            copied = any(found.kind == "same folder" for found in self.findings)
            findings += [] if copied else duplicate_findings(self.exams)
            findings += class_findings(self.histograms["train"], self.histograms["val"], self.classes)
        splits = {
            split: SplitSummary(split_name(self.config, split), len(dataset), self.histograms[split])
            for split, dataset in self.datasets.items()
        }
        train = self.histograms["train"]
        numbers = train.class_weights(), train.color_scale()
        return Checkup(self.config, self.classes, splits, sorted_findings(findings), *numbers)

    def samples(self) -> Iterator[tuple[Split, Sample]]:
        """Some pairs that can be trained on; after `examine`."""
        assert not self.quick
        for split in SPLITS:
            own = [exam for exam in self.exams if exam.split == split]
            usable = [index for index, exam in enumerate(own) if not exam.failures]
            for index in evenly_spread(len(usable), SHOWN_PAIRS[split]):
                yield split, self.datasets[split].read(usable[index])


def quick_check(config: DataConfig) -> tuple[Finding, ...]:
    """Errors and warnings by the files' names and by 64 pairs, the worst first; takes about a second."""
    doctor = Doctor(config, quick=True)
    for _ in doctor.examine():
        pass
    return tuple(found for found in doctor.checkup().findings if found.level != "note")


def refuse_errors(findings: Sequence[Finding]) -> None:
    """Raises a `UserError` with the first error of a check, and how many more kinds there are."""
    errors = [found for found in findings if found.level == "error"]
    if errors:
        more = f" (and {len(errors) - 1} more; `segdeformer data check` lists them)" if errors[1:] else ""
        raise UserError(errors[0].line() + more)


# The pairs of a split, and what the names of its files alone say: partners, doubles, endings.


def find_pairs(split: str, layout: Layout) -> tuple[tuple[Pair, ...], list[Finding]]:
    """Like `pair_files`, but what is wrong becomes findings."""
    image_folder, label_folder = layout.root / layout.images, layout.root / layout.labels
    try:
        check_folders(layout)
        images = list_files(image_folder, layout.image_endings)
        check_any_images(layout, images)
    except UserError as error:
        return (), [finding("no data", split, str(error))]
    labels = list_files(label_folder, layout.label_endings)
    without_image = sorted(labels.found.keys() - images.found.keys())
    lonely_images = images.found.keys() - labels.found.keys()
    without_labels = sorted(lonely_images)
    other_labels = {path: name_of(path, label_folder, path.suffix) for path in labels.others}

    equations = [f"{first} = {second}" for first, second in (*images.clashes, *labels.clashes)]
    what = f"files that differ in their endings only: {len(equations)}; one file per name was expected"
    findings = [*findings_of("duplicate names", split, equations, what)]
    twins = (*images.twins, *labels.twins)
    what = f"names that differ in Unicode's normal form only: {len(twins)}; one file per name was expected"
    findings += findings_of("names in two forms", split, twins, what)
    skipped = all_skipped(images, labels)
    what = f"links and folders that could not be visited: {len(skipped)}"
    findings += findings_of("not visited", split, skipped, what)

    ending = layout.label_endings[0]
    misnamed = [path for path, name in other_labels.items() if name in lonely_images]
    what = f"label maps that end in {_endings(misnamed)}: {len(misnamed)}; {ending} was expected"
    findings += findings_of("label map of another format", split, misnamed, what)

    if without_labels:
        first = without_labels[0]
        what = f"{count(len(without_labels), 'image', 'have', of=len(images.found))} no label map"
        what += f"; expected {label_folder / f'{first}{ending}'}"
        near = _similar(first, without_image)
        remedy = f"is it {labels.found[near]}? names must be equal but for the ending" if near else ""
        files = [images.found[name] for name in without_labels]
        findings.append(finding("missing label map", split, what, files, remedy=remedy))
    what = (
        f"{count(len(without_image), 'label map', 'have', of=len(labels.found))} no image in {image_folder}"
    )
    findings += findings_of("missing image", split, [labels.found[name] for name in without_image], what)

    unread = [*images.others, *(path for path, name in other_labels.items() if name not in images.found)]
    left = [  # no notes, and no side files of published data
        path
        for path in unread
        if path.suffix.lower() not in NOT_DATA and path.is_file()
        if not any(mark in path.name.lower() for mark in SIDE_BY_SIDE)
    ]
    what = f"files that end in {_endings(left)} and are not read: {len(left)}"
    findings += findings_of("files left out", split, left, what)

    both = sorted(images.found.keys() & labels.found.keys())
    return tuple(Pair(name, images.found[name], labels.found[name]) for name in both), findings


def _similar(name: str, others: Sequence[str]) -> str | None:
    """A name that has this one in it, or the reverse, whatever the case: `x_mask` for `x`, `B` for `b`."""
    name = name.lower()
    return next((other for other in others if name in other.lower() or other.lower() in name), None)


def _endings(paths: Sequence[Path]) -> str:
    return ", ".join(sorted({path.suffix or path.name for path in paths})[:5])

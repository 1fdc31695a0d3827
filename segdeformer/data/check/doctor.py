"""The data doctor: reads every pair of a data set and says what would spoil training."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Literal, NamedTuple, TypeVar

from segdeformer.config import DataConfig
from segdeformer.data.check.diagnoses import pair_findings
from segdeformer.data.check.duplicates import duplicate_findings
from segdeformer.data.check.examine import Exam, examine_pair, examine_sample
from segdeformer.data.check.findings import Finding, finding, sorted_findings
from segdeformer.data.check.listing import find_pairs
from segdeformer.data.check.statistics import ColorScale, Histogram, class_findings
from segdeformer.data.classes import ClassTable
from segdeformer.data.datasets import (
    BUILT_IN,
    FileDataset,
    find_source,
    load_meaning,
    open_dataset,
    split_name,
)
from segdeformer.data.parallel import in_threads
from segdeformer.data.samples import Dataset, Sample, evenly_spread
from segdeformer.errors import UserError
from segdeformer.plugins import is_path

T = TypeVar("T")
Split = Literal["train", "val"]
SPLITS: tuple[Split, ...] = ("train", "val")

SHOWN_PAIRS: dict[Split, int] = {"train": 8, "val": 4}  # on a page of samples
QUICK_PAIRS: dict[Split, int] = {"train": 48, "val": 16}  # what training looks at before it starts


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
        if config.name in BUILT_IN or is_path(config.name):
            self._plan_samples()
        else:
            self._plan_files()
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

    def _plan_samples(self) -> None:
        for split in SPLITS:
            dataset = open_dataset(self.config, split)
            self.classes = dataset.classes
            self.datasets[split] = dataset
            chosen = self._chosen(range(len(dataset)), split)
            self.jobs += [partial(examine_sample, split, dataset, index) for index in chosen]

    def _plan_files(self) -> None:
        folders = []
        for split in SPLITS:
            source = find_source(self.config, split)
            pairs, findings = find_pairs(split, source.layout)
            self.findings += findings
            self.classes, label_map = load_meaning(source)
            self.datasets[split] = FileDataset(
                name=self.config.name, split=split, classes=self.classes, pairs=pairs, label_map=label_map
            )
            num_classes = len(self.classes.names)
            chosen = self._chosen(pairs, split)
            self.jobs += [partial(examine_pair, split, pair, label_map, num_classes) for pair in chosen]
            folders.append(source.layout.root / source.layout.images)
        train, val = folders
        if train.is_dir() and val.is_dir() and train.samefile(val):
            self.findings.append(finding("same folder", "val", f"{val} is the folder of the training images"))

    def _chosen(self, items: Sequence[T], split: Split) -> Sequence[T]:
        wanted = QUICK_PAIRS[split]
        if not self.quick or len(items) <= wanted:
            return items
        return [items[i * len(items) // wanted] for i in range(wanted)]


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

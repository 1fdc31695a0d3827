"""What an ablation has shown so far: scores of its rows, and gains over their baselines with intervals.

Scores lie in [0, 1], as everywhere; percent points are for showing. A run is scored by the confusion matrices
of its validation images, which are kept in a file. N images, K classes.
"""

from __future__ import annotations

import math
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from segdeformer.ablation.plan import IMAGE_COUNTS, Plan, PlannedRow, Run
from segdeformer.config import Recipe
from segdeformer.data.samples import Dataset
from segdeformer.errors import UserError
from segdeformer.files import replacing
from segdeformer.inference import statistics as bootstrap
from segdeformer.inference.evaluate import Tally, evaluate_images, protocol_notes
from segdeformer.inference.metrics import ConfusionMatrix
from segdeformer.inference.scorecard import versions
from segdeformer.inference.statistics import ImageSums, Interval
from segdeformer.models.segmenter import Segmenter
from segdeformer.runtime import ON_CPU, Runtime

SCORE_RULE = "the model after the last iteration; none is chosen by its score, which would flatter noisy rows"
SPREAD_RULE = "sample standard deviation over seeds (n - 1)"
INTERVAL_RULE = (
    "paired bootstrap: each resample draws images and seeds with replacement, the same for the row and its "
    "baseline, sums confusion matrices over the images and averages the gain in mIoU over the seeds; "
    "percentiles"
)


class ImageCounts(NamedTuple):
    """counts: (N, K, K) uint32 pixels; rows are the truth, ignored pixels are left out."""

    names: tuple[str, ...]  # of the images
    classes: tuple[str, ...]
    counts: np.ndarray
    iteration: int  # of the model that predicted them


def count_images(
    model: Segmenter, dataset: Dataset, recipe: Recipe, *, iteration: int, runtime: Runtime = ON_CPU
) -> ImageCounts:
    """Evaluate as `segdeformer eval` does, but keep every image's confusion matrix."""
    num_classes = len(dataset.classes.names)
    names = []
    counts_NKK = np.zeros((len(dataset), num_classes, num_classes), np.uint32)
    tally = Tally(dataset.classes)
    results = evaluate_images(
        model, dataset, tally, protocol=recipe.evaluate, data=recipe.data, runtime=runtime
    )
    for index, result in enumerate(results):
        confusion = ConfusionMatrix(num_classes)
        confusion.add(result.sample.labels_HW, result.ids)
        names.append(result.sample.name)
        counts_NKK[index] = confusion.counts_KK
    return ImageCounts(tuple(names), tuple(dataset.classes.names), counts_NKK, iteration)


def write_image_counts(path: Path, counts: ImageCounts) -> None:
    """Write the matrices as a compressed NumPy file, its arrays named as the fields."""
    with replacing(path) as aside, aside.open("wb") as file:
        names, classes, counts_NKK, iteration = counts
        np.savez_compressed(file, names=names, classes=classes, counts=counts_NKK, iteration=iteration)


def read_image_counts(path: Path) -> ImageCounts:
    """Raises `UserError` when there is no such file or it is damaged."""
    try:
        with np.load(path, allow_pickle=False) as file:
            names, classes = (tuple(map(str, file[key])) for key in ("names", "classes"))
            return ImageCounts(names, classes, file["counts"], int(file["iteration"]))
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} cannot be read ({error}); remove it to have the run scored anew") from None


class RunScore(NamedTuple):
    """mIoU is None until it is finished, failure None unless it failed."""

    run: Run
    miou: float | None = None
    iou_K: np.ndarray | None = None  # NaN where a class neither occurs nor is predicted
    failure: str | None = None


class Gain(NamedTuple):
    """In mIoU, or in the IoU of a class: averaged over seeds; NaN where the class is not known."""

    mean: float
    interval: Interval


class RowGain(NamedTuple):
    """Over the baseline, by the seeds that both have. each: of each of these seeds."""

    miou: Gain
    seeds: tuple[int, ...]
    each: tuple[float, ...]
    classes: tuple[Gain, ...]


class RowResult(NamedTuple):
    row: PlannedRow
    runs: tuple[RunScore, ...]
    gain: RowGain | None  # None for a baseline, and until both have a seed in common

    @property
    def mious(self) -> list[float]:
        return [score.miou for score in self.runs if score.miou is not None]

    @property
    def mean(self) -> float | None:
        """None until a seed is finished."""
        return float(np.mean(self.mious)) if self.mious else None

    @property
    def deviation(self) -> float | None:
        """Sample standard deviation over seeds; None below two."""
        return float(np.std(self.mious, ddof=1)) if len(self.mious) > 1 else None

    @property
    def failure(self) -> str | None:
        """Why the first seed that failed did."""
        return next((score.failure for score in self.runs if score.failure is not None), None)


class Results(NamedTuple):
    plan: Plan
    rows: tuple[RowResult, ...] = ()
    num_images: int = 0  # until a run is scored
    classes: tuple[str, ...] = ()

    @property
    def num_finished(self) -> int:
        return sum(len(row.mious) for row in self.rows)

    @property
    def failures(self) -> list[str]:
        """A line for each run that failed."""
        return [
            f"{score.run.title}: failed: {score.failure}"
            for result in self.rows
            for score in result.runs
            if score.failure is not None
        ]


class Collector:
    """Keeps the sums of the runs that it has read; a run is read once."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.sums: dict[tuple[str, int], ImageSums] = {}
        self.failures: dict[tuple[str, int], str] = {}
        self.names: tuple[str, ...] = ()
        self.classes: tuple[str, ...] = ()

    def results(self) -> Results:
        """Raises `UserError` when the runs were not scored on the same images."""
        plan = self.plan
        for run in plan.runs:
            if (run.row.name, run.seed) not in self.sums and run.is_finished:
                self._read(run, run.folder / IMAGE_COUNTS)
        rows = tuple(
            RowResult(row, tuple(self._score(plan.run(row, seed)) for seed in plan.seeds), self._gain(row))
            for row in plan.rows
        )
        return Results(self.plan, rows, len(self.names), self.classes)

    def _read(self, run: Run, path: Path) -> None:
        counts = read_image_counts(path)
        if counts.iteration != run.row.recipe.train.iterations:
            raise UserError(
                f"{path} is of iteration {counts.iteration}, the row has {run.row.recipe.train.iterations}; "
                "remove it to have the run scored anew"
            )
        self.names, self.classes = self.names or counts.names, self.classes or counts.classes
        if counts.names != self.names:
            raise UserError(
                f"{path} was scored on other images than the runs before it ({len(counts.names)} against "
                f"{len(self.names)}); the data has changed, so choose another --out"
            )
        self.sums[run.row.name, run.seed] = bootstrap.image_sums(counts.counts[None])

    def _score(self, run: Run) -> RunScore:
        sums = self.sums.get((run.row.name, run.seed))
        if sums is None:
            return RunScore(run, failure=self.failures.get((run.row.name, run.seed)))
        return RunScore(run, float(bootstrap.mious(sums)[0]), bootstrap.ious(sums)[0])

    def _gain(self, row: PlannedRow) -> RowGain | None:
        names = (row.name, row.over)
        seeds = tuple(s for s in self.plan.seeds if all((name, s) in self.sums for name in names))
        if row.over is None or not seeds:
            return None
        ours, theirs = (
            ImageSums(*map(np.concatenate, zip(*(self.sums[name, s] for s in seeds), strict=True)))
            for name in (row.name, row.over)
        )
        each = bootstrap.mious(ours) - bootstrap.mious(theirs)
        class_gains_K = (bootstrap.ious(ours) - bootstrap.ious(theirs)).mean(0)
        intervals = bootstrap.gain_intervals(ours, theirs, bootstrap.draws(len(self.names), len(seeds)))
        classes = tuple(map(Gain, class_gains_K.tolist(), intervals.classes))
        return RowGain(Gain(float(each.mean()), intervals.miou), seeds, tuple(each.tolist()), classes)


def results_values(results: Results) -> dict[str, Any]:
    """Everything as JSON values, in [0, 1] as in `eval --json`; points of 100 only where the name says so."""
    plan = results.plan
    recipe = plan.base
    return {
        "title": plan.title,
        "base": {"name": recipe.name, "recipe": recipe.model_dump(mode="json", exclude_none=True)},
        "data": {**recipe.data.model_dump(mode="json"), "validation_images": results.num_images},
        "seeds": list(plan.seeds),
        "iterations": recipe.train.iterations,
        "batch_size": recipe.train.batch_size,
        "crop": list(recipe.augment.crop),
        "protocol": {**recipe.evaluate.model_dump(mode="json"), "notes": protocol_notes(recipe.evaluate)},
        "score": SCORE_RULE,
        "spread": SPREAD_RULE,
        "interval": {
            "method": INTERVAL_RULE,
            "level": bootstrap.LEVEL,
            "resamples": bootstrap.RESAMPLES,
            "generator": f"numpy Philox, keys {bootstrap.KEY}, 0 (images) and {bootstrap.KEY}, 1 (seeds)",
        },
        "versions": versions(),
        "complete": results.num_finished == len(plan.runs),
        "classes": list(results.classes),
        "rows": [_row_values(plan, row) for row in results.rows],
    }


def _row_values(plan: Plan, result: RowResult) -> dict[str, Any]:
    row, gain = result.row, result.gain
    runs = [
        {
            "seed": score.run.seed,
            "folder": str(score.run.folder.relative_to(plan.folder)),
            "miou": score.miou,
            "iou": None if score.iou_K is None else [_finite(iou) for iou in score.iou_K.tolist()],
            "failure": score.failure,
        }
        for score in result.runs
    ]
    gains = gain and {
        **_gain_values("miou", gain.miou),
        "seeds": list(gain.seeds),
        "each_seed": list(gain.each),
        "classes": [_gain_values("iou", of_class) for of_class in gain.classes],
    }
    paper = row.paper and {
        "table": row.paper.table,
        "miou_points": row.paper.miou,
        "gain_points": row.paper.gain,
    }
    return {
        "name": row.name,
        "over": row.over,
        "recipe": str(plan.recipe_path(row).relative_to(plan.folder)),
        "changes": {key: {"base": base, "row": value} for key, (base, value) in plan.changes(row).items()},
        "iterations": row.recipe.train.iterations,
        "miou": result.mean,
        "standard_deviation": result.deviation,
        "runs": runs,
        "gain": gains,
        "paper": paper,
    }


def _gain_values(name: str, gain: Gain) -> dict[str, float | None]:
    return {
        name: _finite(gain.mean),
        "low": _finite(gain.interval.low),
        "high": _finite(gain.interval.high),
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None

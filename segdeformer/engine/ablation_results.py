"""What an ablation has shown so far: scores of its rows, and gains over their baselines with intervals.

Scores are shares of 1, as everywhere; percent points are for showing.
"""

from __future__ import annotations

import math
import platform
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

import segdeformer
from segdeformer.engine import bootstrap
from segdeformer.engine.ablation_folder import recipe_path, run_path
from segdeformer.engine.ablation_plan import Plan, PlannedRow, Run, row_changes, runs_in_order
from segdeformer.engine.ablation_runs import is_finished
from segdeformer.engine.bootstrap import ImageSums, Interval
from segdeformer.engine.evaluate import protocol_notes
from segdeformer.engine.image_counts import IMAGE_COUNTS, read_image_counts
from segdeformer.errors import UserError

SCORE_RULE = "the model after the last iteration; none is chosen by its score, which would flatter noisy rows"
SPREAD_RULE = "sample standard deviation over seeds (n - 1)"
INTERVAL_RULE = (
    "paired bootstrap: each resample draws images and seeds with replacement, the same for the row and its "
    "baseline, sums confusion matrices over the images and averages the gain in mIoU over the seeds; "
    "percentiles"
)


class RunScore(NamedTuple):
    """One seed of a row; mIoU is None until it is finished, failure None unless it failed."""

    seed: int
    miou: float | None
    iou_K: np.ndarray | None = None  # NaN where a class neither occurs nor is predicted
    failure: str | None = None


class ClassGain(NamedTuple):
    """Gain in the IoU of a class, averaged over seeds; NaN where the class is not known."""

    mean: float
    interval: Interval


class Gain(NamedTuple):
    """Over the baseline, by the seeds that both have. each: of each of these seeds."""

    mean: float
    interval: Interval
    seeds: tuple[int, ...]
    each: tuple[float, ...]
    classes: tuple[ClassGain, ...]


class RowResult(NamedTuple):
    row: PlannedRow
    runs: tuple[RunScore, ...]
    gain: Gain | None  # None for a baseline, and until both have a seed in common

    @property
    def mious(self) -> list[float]:
        return [run.miou for run in self.runs if run.miou is not None]

    @property
    def mean(self) -> float | None:
        """None until a seed is finished."""
        return float(np.mean(self.mious)) if self.mious else None

    @property
    def deviation(self) -> float | None:
        """Sample standard deviation over seeds; None below two."""
        return float(np.std(self.mious, ddof=1)) if len(self.mious) > 1 else None

    @property
    def class_ious(self) -> np.ndarray | None:
        """IoU of each class, (K,), averaged over seeds; None until a seed is finished."""
        known = [run.iou_K for run in self.runs if run.iou_K is not None]
        return np.mean(known, axis=0) if known else None

    @property
    def failure(self) -> str | None:
        """Why the first seed that failed did."""
        return next((run.failure for run in self.runs if run.failure is not None), None)


class Results(NamedTuple):
    plan: Plan
    rows: tuple[RowResult, ...]
    num_images: int  # 0 until a run is scored
    classes: tuple[str, ...] = ()  # so are these empty

    @property
    def num_finished(self) -> int:
        return sum(len(row.mious) for row in self.rows)


class Collector:
    """Keeps the sums of the runs that it has read; a run is read once."""

    def __init__(self, plan: Plan, folder: Path) -> None:
        self.plan, self.folder = plan, folder
        self.sums: dict[tuple[str, int], ImageSums] = {}
        self.failures: dict[tuple[str, int], str] = {}
        self.names: tuple[str, ...] = ()
        self.classes: tuple[str, ...] = ()

    def results(self) -> Results:
        """Raises `UserError` when the runs were not scored on the same images."""
        for run in runs_in_order(self.plan):
            if (run.row.name, run.seed) not in self.sums and is_finished(self.folder, run):
                self._read(run)
        rows = tuple(self._row(row) for row in self.plan.rows)
        return Results(self.plan, rows, len(self.names), self.classes)

    def _read(self, run: Run) -> None:
        path = run_path(self.folder, run) / IMAGE_COUNTS
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
        self.sums[run.row.name, run.seed] = bootstrap.image_sums(counts.counts_NKK[None])

    def _row(self, row: PlannedRow) -> RowResult:
        runs = []
        for seed in self.plan.seeds:
            sums = self.sums.get((row.name, seed))
            if sums is None:
                runs.append(RunScore(seed, None, failure=self.failures.get((row.name, seed))))
            else:
                runs.append(RunScore(seed, float(bootstrap.mious(sums)[0]), bootstrap.ious(sums)[0]))
        return RowResult(row, tuple(runs), self._gain(row))

    def _gain(self, row: PlannedRow) -> Gain | None:
        if row.over is None:
            return None
        baseline = row.over
        seeds = tuple(s for s in self.plan.seeds if (row.name, s) in self.sums and (baseline, s) in self.sums)
        if not seeds:
            return None
        ours = _joined([self.sums[row.name, seed] for seed in seeds])
        theirs = _joined([self.sums[baseline, seed] for seed in seeds])
        each = bootstrap.mious(ours) - bootstrap.mious(theirs)
        class_gains_K = (bootstrap.ious(ours) - bootstrap.ious(theirs)).mean(0)
        intervals = bootstrap.gain_intervals(ours, theirs, bootstrap.draws(len(self.names), len(seeds)))
        return Gain(
            float(each.mean()),
            intervals.miou,
            seeds,
            tuple(float(gain) for gain in each),
            tuple(map(ClassGain, class_gains_K.tolist(), intervals.classes)),
        )


def _joined(sums: list[ImageSums]) -> ImageSums:
    return ImageSums(np.concatenate([s.hits_SNK for s in sums]), np.concatenate([s.union_SNK for s in sums]))


def results_values(results: Results, folder: Path) -> dict[str, Any]:
    """Everything as JSON values; shares as in `eval --json`, points of 100 only where the name says so."""
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
        "versions": {
            "segdeformer": segdeformer.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "complete": results.num_finished == len(runs_in_order(plan)),
        "classes": list(results.classes),
        "rows": [_row_values(plan, row, folder) for row in results.rows],
    }


def _row_values(plan: Plan, result: RowResult, folder: Path) -> dict[str, Any]:
    row, gain = result.row, result.gain
    return {
        "name": row.name,
        "over": row.over,
        "recipe": str(recipe_path(folder, row).relative_to(folder)),
        "changes": {
            key: {"base": before, "row": after} for key, (before, after) in row_changes(plan, row).items()
        },
        "iterations": row.recipe.train.iterations,
        "miou": result.mean,
        "standard_deviation": result.deviation,
        "runs": [
            {
                "seed": run.seed,
                "folder": str(run_path(folder, Run(row, run.seed)).relative_to(folder)),
                "miou": run.miou,
                "iou": None if run.iou_K is None else [_finite(iou) for iou in run.iou_K.tolist()],
                "failure": run.failure,
            }
            for run in result.runs
        ],
        "gain": None
        if gain is None
        else {
            "miou": gain.mean,
            "low": gain.interval.low,
            "high": gain.interval.high,
            "seeds": list(gain.seeds),
            "each_seed": list(gain.each),
            "classes": [
                {
                    "iou": _finite(of_class.mean),
                    "low": _finite(of_class.interval.low),
                    "high": _finite(of_class.interval.high),
                }
                for of_class in gain.classes
            ],
        },
        "paper": None
        if row.paper is None
        else {
            "table": row.paper.table,
            "miou_points": row.paper.miou,
            "gain_points": row.paper.gain,
        },
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None

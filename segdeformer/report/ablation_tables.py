"""An ablation's results as a table of texts, Markdown and CSV. Figures in percent points."""

from __future__ import annotations

import csv
import io
import math
from typing import NamedTuple

from segdeformer.engine import bootstrap
from segdeformer.engine.ablation_plan import data_title
from segdeformer.engine.ablation_results import (
    INTERVAL_RULE,
    SCORE_RULE,
    SPREAD_RULE,
    ClassGain,
    Results,
    RowResult,
)
from segdeformer.report.gains import GainLine

DASH = "-"
MOST_CLASSES = 30  # in the Markdown table
NOTE_ON_SEEDS = (
    "fewer than 3 seeds tell little of how seeds differ: the intervals are too narrow; --seeds adds seeds"
)


class Cells(NamedTuple):
    """A row as it is shown. miou: mean, and ± standard deviation; gain: with its interval."""

    name: str
    miou: str
    seeds: str  # finished of planned
    gain: str
    interval: str
    paper_miou: str
    paper_gain: str


def cells(result: RowResult) -> Cells:
    """The texts of a row; a dash where there is nothing yet."""
    gain, paper = result.gain, result.row.paper
    miou = DASH if result.mean is None else f"{100 * result.mean:.2f}"
    if result.deviation is not None:
        miou += f" ± {100 * result.deviation:.2f}"
    return Cells(
        name=result.row.name,
        miou=miou,
        seeds=f"{len(result.mious)}/{len(result.runs)}",
        gain=DASH if gain is None else f"{100 * gain.mean:+.2f}",
        interval=DASH
        if gain is None
        else f"{100 * gain.interval.low:+.2f} to {100 * gain.interval.high:+.2f}",
        paper_miou=DASH if paper is None else f"{paper.miou:.2f}",
        paper_gain=DASH if paper is None or paper.gain is None else f"{paper.gain:+.2f}",
    )


def setting_line(results: Results) -> str:
    """On what the rows were trained and scored."""
    recipe, train = results.plan.base, results.plan.base.train
    height, width = recipe.augment.crop
    images = f" ({results.num_images} validation images)" if results.num_images else ""
    return (
        f"recipe {recipe.name} on {data_title(recipe.data)}{images}: {train.iterations:,} iterations, "
        f"batch {train.batch_size}, crop {height} x {width}; seeds {', '.join(map(str, results.plan.seeds))}"
    )


def markdown(results: Results) -> str:
    """A heading, the table and how its figures were made."""
    has_paper = any(result.row.paper for result in results.rows)
    heads = ["row", "mIoU %", "seeds", "gain", "95 % interval", "over"]
    heads += ["paper mIoU", "paper gain"] if has_paper else []
    lines = [f"# {results.plan.title}", "", f"{_capital(setting_line(results))}.", ""]
    lines += [_line(heads), _line(["---", *["---:"] * 4, "---", *["---:"] * (len(heads) - 6)])]
    for result in results.rows:
        shown = cells(result)
        values = [shown.name, shown.miou, shown.seeds, shown.gain, shown.interval, result.row.over or DASH]
        values += [shown.paper_miou, shown.paper_gain] if has_paper else []
        lines.append(_line(values))
    lines.append("")
    lines += _class_lines(results)
    lines += [
        f"- `{result.row.name}`, seed {run.seed}: failed: {run.failure}"
        for result in results.rows
        for run in result.runs
        if run.failure
    ]
    lines += [
        f"- Score: {SCORE_RULE}.",
        f"- ±: {SPREAD_RULE}.",
        f"- Interval: {100 * bootstrap.LEVEL:g} %, {bootstrap.RESAMPLES:,} resamples; {INTERVAL_RULE}.",
    ]
    if has_paper:
        lines.append("- Paper: ADE20K, pretrained encoders, 160,000 iterations. Compare gains, not scores.")
    return "\n".join(lines) + "\n"


def _class_lines(results: Results) -> list[str]:
    """Where the gains lie: a table of classes, if they are few enough to read."""
    rows = [result for result in results.rows if result.gain is not None]
    if not rows:
        return []
    if len(results.classes) > MOST_CLASSES:
        return ["Gains of each class: classes.csv.", ""]
    heads = ["gain in IoU, points", *(result.row.name for result in rows)]
    lines = [_line(heads), _line(["---"] + ["---:"] * len(rows))]
    for index, name in enumerate(results.classes):
        gains = [result.gain.classes[index] for result in rows if result.gain is not None]
        lines.append(_line([name, *map(_class_text, gains)]))
    return [*lines, ""]


def _class_text(gain: ClassGain) -> str:
    if math.isnan(gain.mean):
        return DASH
    low, high = gain.interval
    return f"{100 * gain.mean:+.2f} ({100 * low:+.2f} to {100 * high:+.2f})"


def class_csv_text(results: Results) -> str:
    """One line for each row and class: IoU and gain, shares in [0, 1], averaged over seeds."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["row", "class", "iou", "gain", "gain_low", "gain_high"])
    for result in results.rows:
        iou_K = result.class_ious
        for index, name in enumerate(results.classes):
            values: list[float | None] = [None if iou_K is None else float(iou_K[index]), None, None, None]
            if result.gain is not None:
                gain = result.gain.classes[index]
                values[1:] = [gain.mean, gain.interval.low, gain.interval.high]
            known = [None if value is None or math.isnan(value) else value for value in values]
            writer.writerow([result.row.name, name, *known])
    return file.getvalue()


def csv_text(results: Results) -> str:
    """One line a row, full precision; shares in [0, 1], the paper's figures in points as printed."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    seeds = results.plan.seeds
    heads = ["row", "over", "miou", "standard_deviation", "gain", "gain_low", "gain_high"]
    heads += ["paper_miou_points", "paper_gain_points", *(f"miou_seed_{seed}" for seed in seeds), "failure"]
    writer.writerow(heads)
    for result in results.rows:
        gain, paper = result.gain, result.row.paper
        writer.writerow(
            [result.row.name, result.row.over, result.mean, result.deviation]
            + ([None] * 3 if gain is None else [gain.mean, gain.interval.low, gain.interval.high])
            + ([None] * 2 if paper is None else [paper.miou, paper.gain])
            + [run.miou for run in result.runs]
            + [result.failure]
        )
    return file.getvalue()


def closing_line(results: Results) -> str:
    """What the columns of the table are."""
    text = (
        f"mIoU after the last iteration, ± standard deviation over seeds; gain in points, "
        f"{100 * bootstrap.LEVEL:g} % interval by a paired bootstrap over images and seeds"
    )
    if any(result.row.paper for result in results.rows):
        text += "; paper: ADE20K, pretrained, 160,000 iterations: compare gains, not scores"
    return text


def gain_lines(results: Results) -> list[GainLine]:
    """The lines of the plot: all rows but the baselines."""
    lines = []
    for result in results.rows:
        if result.row.over is None:
            continue
        gain, paper = result.gain, result.row.paper
        lines.append(
            GainLine(
                name=result.row.name,
                gain=None if gain is None else 100 * gain.mean,
                low=None if gain is None else 100 * gain.interval.low,
                high=None if gain is None else 100 * gain.interval.high,
                each_seed=() if gain is None else tuple(100 * each for each in gain.each),
                paper=None if paper is None else paper.gain,
                note="failed" if result.failure else "not run yet",
            )
        )
    return lines


def _line(values: list[str]) -> str:
    escaped = [value.replace("|", "\\|") for value in values]
    return f"| {' | '.join(escaped)} |"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]

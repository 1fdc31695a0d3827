"""An ablation's results as a table of texts, Markdown, CSV and a plot. Figures in percent points."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from segdeformer.ablation.plan import data_title
from segdeformer.ablation.results import (
    INTERVAL_RULE,
    SCORE_RULE,
    SPREAD_RULE,
    Gain,
    Results,
    RowResult,
    results_values,
)
from segdeformer.data.images import write_png
from segdeformer.errors import count
from segdeformer.files import write_json, write_text
from segdeformer.inference import statistics as bootstrap
from segdeformer.report.gains import GainLine, gains_plot

DASH = "-"
MOST_CLASSES = 30  # in the Markdown table
FILES = "ablation.json, table.md, table.csv, classes.csv, plot.png"
NOTE_ON_SEEDS = (
    "fewer than 3 seeds tell little of how seeds differ: the intervals are too narrow; --seeds adds seeds"
)


class Cells(NamedTuple):
    """A row as it is shown. miou: mean, and ± standard deviation; seeds: finished of planned."""

    name: str
    miou: str
    seeds: str
    gain: str
    interval: str
    paper_miou: str
    paper_gain: str


def cells(result: RowResult) -> Cells:
    """The texts of a row; a dash where there is nothing yet."""
    paper = result.row.paper
    gain, interval = (DASH, DASH) if result.gain is None else _gain_texts(result.gain.miou)
    miou = DASH if result.mean is None else f"{100 * result.mean:.2f}"
    if result.deviation is not None:
        miou += f" ± {100 * result.deviation:.2f}"
    return Cells(
        name=result.row.name,
        miou=miou,
        seeds=f"{len(result.mious)}/{len(result.runs)}",
        gain=gain,
        interval=interval,
        paper_miou=DASH if paper is None else f"{paper.miou:.2f}",
        paper_gain=DASH if paper is None or paper.gain is None else f"{paper.gain:+.2f}",
    )


def _gain_texts(gain: Gain) -> tuple[str, str]:
    """Mean and interval."""
    low, high = gain.interval
    return f"{100 * gain.mean:+.2f}", f"{100 * low:+.2f} to {100 * high:+.2f}"


def setting_line(results: Results) -> str:
    """On what the rows were trained and scored."""
    recipe, train = results.plan.base, results.plan.base.train
    height, width = recipe.augment.crop
    images = f" ({count(results.num_images, 'validation image')})" if results.num_images else ""
    return (
        f"recipe {recipe.name} on {data_title(recipe.data)}{images}: {count(train.iterations, 'iteration')}, "
        f"batch {train.batch_size}, crop {height} x {width}; seeds {', '.join(map(str, results.plan.seeds))}"
    )


def closing_line(results: Results) -> str:
    """What the columns of the table are."""
    text = (
        f"mIoU after the last iteration, ± standard deviation over seeds; gain in points, "
        f"{100 * bootstrap.LEVEL:g} % interval by a paired bootstrap over images and seeds"
    )
    if any(result.row.paper for result in results.rows):
        text += "; paper: ADE20K, pretrained, 160,000 iterations: compare gains, not scores"
    return text


def markdown(results: Results) -> str:
    """A heading, the table and how its figures were made."""
    has_paper = any(result.row.paper for result in results.rows)
    heads = ["row", "mIoU %", "seeds", "gain", "95 % interval", "over"]
    heads += ["paper mIoU", "paper gain"] if has_paper else []
    setting = setting_line(results)
    lines = [f"# {results.plan.title}", "", f"{setting[:1].upper()}{setting[1:]}.", ""]
    lines += [_line(heads), _line(["---", *["---:"] * 4, "---", *["---:"] * (len(heads) - 6)])]
    for result in results.rows:
        *shown, paper_miou, paper_gain = cells(result)
        lines.append(_line([*shown, result.row.over or DASH, paper_miou, paper_gain][: len(heads)]))
    lines += ["", *_class_lines(results)]
    lines += [
        f"- `{result.row.name}`, seed {score.run.seed}: failed: {score.failure}"
        for result in results.rows
        for score in result.runs
        if score.failure
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
    gains = {result.row.name: result.gain.classes for result in results.rows if result.gain is not None}
    if not gains:
        return []
    if len(results.classes) > MOST_CLASSES:
        return ["Gains of each class: classes.csv.", ""]
    lines = [_line(["gain in IoU, points", *gains]), _line(["---"] + ["---:"] * len(gains))]
    for name, *of_rows in zip(results.classes, *gains.values(), strict=True):
        texts = ["{} ({})".format(*_gain_texts(gain)) for gain in of_rows]
        shown = [DASH if math.isnan(g.mean) else text for g, text in zip(of_rows, texts, strict=True)]
        lines.append(_line([name, *shown]))
    return [*lines, ""]


def _line(values: list[str]) -> str:
    escaped = [value.replace("|", "\\|") for value in values]
    return f"| {' | '.join(escaped)} |"


def csv_text(results: Results) -> str:
    """One line a row, full precision; in [0, 1], the paper's figures in points as printed."""
    heads = ["row", "over", "miou", "standard_deviation", "gain", "gain_low", "gain_high"]
    heads += ["paper_miou_points", "paper_gain_points"]
    heads += [*(f"miou_seed_{seed}" for seed in results.plan.seeds), "failure"]
    lines: list[list[Any]] = [
        [result.row.name, result.row.over, result.mean, result.deviation]
        + ([None] * 3 if result.gain is None else [result.gain.miou.mean, *result.gain.miou.interval])
        + ([None] * 2 if result.row.paper is None else [result.row.paper.miou, result.row.paper.gain])
        + [run.miou for run in result.runs]
        + [result.failure]
        for result in results.rows
    ]
    return _csv([heads, *lines])


def class_csv_text(results: Results) -> str:
    """One line for each row and class: IoU and gain in [0, 1], averaged over seeds."""
    lines: list[list[Any]] = [["row", "class", "iou", "gain", "gain_low", "gain_high"]]
    for result in results.rows:
        ious = [run.iou_K for run in result.runs if run.iou_K is not None]
        for index, name in enumerate(results.classes):
            values = [float(np.mean(ious, axis=0)[index]) if ious else math.nan]
            if result.gain is not None:
                gain = result.gain.classes[index]
                values += [gain.mean, *gain.interval]
            known = [None if math.isnan(value) else value for value in values]
            lines.append([result.row.name, name, *known, *[None] * (4 - len(known))])
    return _csv(lines)


def _csv(lines: Iterable[Sequence[object]]) -> str:
    file = io.StringIO()
    csv.writer(file, lineterminator="\n").writerows(lines)
    return file.getvalue()


def gain_lines(results: Results) -> list[GainLine]:
    """The lines of the plot: all rows but the baselines."""
    lines = []
    for result in results.rows:
        row, gain = result.row, result.gain
        if row.over is None:
            continue
        line = GainLine(
            row.name, paper=row.paper and row.paper.gain, note="failed" if result.failure else "not run yet"
        )
        if gain is not None:
            mean, low, high = (100 * value for value in (gain.miou.mean, *gain.miou.interval))
            line = line._replace(
                gain=mean, low=low, high=high, each_seed=tuple(100 * each for each in gain.each)
            )
        lines.append(line)
    return lines


def write_results(results: Results) -> None:
    """Write results as JSON, Markdown, CSV and a picture."""
    folder = results.plan.folder
    write_json(folder / "ablation.json", results_values(results))
    write_text(folder / "table.md", markdown(results))
    write_text(folder / "table.csv", csv_text(results))
    write_text(folder / "classes.csv", class_csv_text(results))
    title = f"{results.plan.title}: gain in mIoU, points"
    plot = gains_plot(gain_lines(results), title=title, subtitle=setting_line(results))
    write_png(folder / "plot.png", plot)

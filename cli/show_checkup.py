"""What the data doctor found, in a terminal: findings, classes, and lines to paste into a recipe."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from segdeformer.cli.show import make_table

if TYPE_CHECKING:
    from segdeformer.data.check.doctor import Checkup

STYLES = {"error": "red", "warning": "yellow", "note": "dim"}


def show_checkup(console: Console, checkup: Checkup) -> None:
    for summary in checkup.splits.values():
        console.print(f"{summary.name}: {summary.num_pairs:,} pairs", style="bold")
    if checkup.findings:
        console.print(_findings_table(checkup), soft_wrap=False)
    if not checkup.spoils_training:
        console.print("nothing found that would spoil training", style="green")
    console.print(_classes_table(checkup), soft_wrap=False)
    if checkup.color_scale is not None:
        mean, std = (list(values) for values in checkup.color_scale)
        console.print("for a recipe, from the training images (class weights by median frequency):")
        console.print(f"[data]\nmean = {mean}\nstd = {std}")
        console.print(f"in the terms of train.losses: class_weights = {list(checkup.class_weights)}")


def _findings_table(checkup: Checkup) -> Table:
    table = make_table("", "split", "finding", "what to do", num_left=4, padding=(0, 2, 1, 0))
    for found in checkup.findings:
        files = f"\n{shown}" if (shown := found.shown_files()) else ""
        said = f"{found.kind}: {found.what}{files}"
        table.add_row(found.level, found.split, said, found.remedy, style=STYLES[found.level])
    return table


def _classes_table(checkup: Checkup) -> Table:
    table = make_table("class", "train pixels %", "train images", "val pixels %", "val images", "weight")
    histograms = [split.histogram for split in checkup.splits.values()]
    totals = [int(histogram.pixels_K.sum()) for histogram in histograms]
    for index, name in enumerate(checkup.classes.names):
        cells = []
        for histogram, labelled in zip(histograms, totals, strict=True):
            share = histogram.pixels_K[index] / max(labelled, 1)
            cells += [f"{100 * share:.3f}", f"{histogram.images_K[index]:,}"]
        table.add_row(f"{index} {name}", *cells, f"{checkup.class_weights[index]:g}")
    cells = []
    for histogram, labelled in zip(histograms, totals, strict=True):
        cells += [f"{100 * histogram.ignored / max(histogram.ignored + labelled, 1):.3f}", ""]
    table.add_row("ignored, of all", *cells, "", style="dim")
    return table

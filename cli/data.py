"""`segdeformer data`: check a data set, and prepare published ones."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from typer import Argument, Option

from segdeformer.cli.errors import one_line_errors
from segdeformer.cli.options import ClassesFile
from segdeformer.cli.show import make_console, make_table, ticking
from segdeformer.errors import UserError, count

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from segdeformer.data.check.doctor import Checkup

STYLES = {"error": "red", "warning": "yellow", "note": "dim"}  # of findings

data_app = typer.Typer(help="Check a data set, or prepare a published one.", no_args_is_help=True)

Workers = Annotated[
    int | None, Option(min=1, help="Threads that read; default: one for every core, at most 16.")
]


@data_app.command("check")
@one_line_errors
def check_command(
    data: Annotated[str, Argument(help="landcover, NAME:FOLDER or a folder of your own images and labels.")],
    classes: ClassesFile = None,
    train: Annotated[str, Option(help="The training split's folder name.")] = "train",
    val: Annotated[str, Option(help="The validation split's folder name.")] = "val",
    json_file: Annotated[
        Path | None, Option("--json", help="Write findings with all file names and the numbers here.")
    ] = None,
    picture: Annotated[Path | None, Option(help="Draw some samples under their labels here (PNG).")] = None,
    workers: Workers = None,
) -> None:
    """Read every pair and say what would spoil training: exit code 1 if anything would."""
    from segdeformer.data.check.doctor import Doctor
    from segdeformer.data.datasets import parse_data_spec
    from segdeformer.report.checkup import write_checkup, write_overlays

    config = parse_data_spec(data).model_copy(update={"train_split": train, "val_split": val})
    if classes is not None:
        config = config.model_copy(update={"classes": str(classes.resolve())})
    console = make_console()
    doctor = Doctor(config)
    _run(console, doctor.examine(workers=workers), total=len(doctor))
    checkup = doctor.checkup()
    if json_file is not None:
        write_checkup(json_file, checkup)
    if picture is not None:
        write_overlays(picture, doctor.samples(), checkup)
    _show_checkup(console, checkup)
    for kind, path in (("report", json_file), ("picture", picture)):
        if path is not None:
            console.print(f"{kind}: {path}")
    errors = sum(found.level == "error" for found in checkup.findings)
    if errors:
        raise UserError(f"{count(errors, 'kind')} of fault would spoil training")


@data_app.command("prepare")
@one_line_errors
def prepare_command(
    name: Annotated[str, Argument(metavar="NAME", help="ade20k, cityscapes or coco_stuff.")],
    source: Annotated[Path, Argument(metavar="SRC", help="Where its archives are unpacked.")],
    target: Annotated[
        Path, Argument(metavar="DST", help="The folder to make: images/, labels/, classes.toml.")
    ],
    copy: Annotated[bool, Option("--copy", help="Copy the images; otherwise they are linked to.")] = False,
    partial: Annotated[bool, Option("--partial", help="Accept fewer images than were published.")] = False,
    workers: Workers = None,
) -> None:
    """Make label maps of class ids from a published data set; run again, it goes on where it was stopped."""
    from segdeformer.data.published.prepare import Preparation

    console = make_console()
    preparation = Preparation(name, source.expanduser(), target.expanduser(), copy=copy)
    _run(console, preparation.run(workers=workers), total=len(preparation))
    for line in preparation.counts():
        console.print(line)
    preparation.check_counts(partial=partial)
    console.print(f"{target} is ready; look at it with: segdeformer data check {target}")
    console.print(f"train on it with: segdeformer train {preparation.recipe} --data {target}")


def _run(console: Console, pairs: Iterator[object], *, total: int) -> None:
    """Go through the pairs under a bar."""
    for _ in ticking(console, pairs, "pairs", total):
        pass


def _show_checkup(console: Console, checkup: Checkup) -> None:
    """Findings, classes, and lines to paste into a recipe."""
    for summary in checkup.splits.values():
        console.print(f"{summary.name}: {count(summary.num_pairs, 'pair')}", style="bold")
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

"""Tables and lines that the commands print."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from rich.console import Console, ConsoleOptions, RenderResult
from rich.progress import track
from rich.table import Table

from segdeformer.errors import count
from segdeformer.files import write_text

if TYPE_CHECKING:
    from segdeformer.config import EvalConfig, Recipe, TrainConfig
    from segdeformer.inference.evaluate import Report
    from segdeformer.runtime import Runtime
    from segdeformer.training.optimizer import ParameterGroup

T = TypeVar("T")

LEAST_NAME = 8  # columns that names are left with before numbers are broken


def make_console(*, quiet: bool = False) -> Console:
    """A console that prints names and paths as they are: no markup, no colours in numbers, no line breaks.

    Tables are wrapped to the terminal by `soft_wrap=False`. quiet: nothing; for all processes but the first.
    """
    return Console(markup=False, highlight=False, soft_wrap=True, quiet=quiet)


class FoldingTable(Table):
    """A table that breaks what does not fit, and cuts nothing; numbers are broken last."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        # rich narrows the other columns first, but then cuts those that are not to be wrapped.
        room = options.max_width - self._extra_width
        least = 0
        for column in self.columns:
            measured = self._measure_column(console, options, column)
            least += measured.maximum if column.no_wrap else min(measured.minimum, LEAST_NAME)
        if least > room:
            for column in self.columns:
                column.no_wrap = False
        yield from super().__rich_console__(console, options)


def make_table(*header: str, num_left: int = 1, **options: Any) -> Table:
    """A plain table; its first columns are names, the others numbers. Print it with soft_wrap=False."""
    table = FoldingTable(box=None, header_style="bold", **options)
    for index, name in enumerate(header):
        table.add_column(name, justify="left" if index < num_left else "right", overflow="fold")
    return table


def ticking(console: Console, items: Iterable[T], what: str, total: int) -> Iterable[T]:
    """The items, under a bar in a terminal."""
    hidden = not console.is_terminal
    return track(items, what, total=total, console=console, transient=True, disable=hidden)


def device_words(runtime: Runtime) -> str:
    """Where something runs, and by what."""
    from segdeformer.kernels.impl import describe_impl

    return f"device {runtime.device}, attention {describe_impl(runtime.impl, runtime.device)}"


def groups_table(groups: Sequence[ParameterGroup], config: TrainConfig) -> Table:
    """Who learns at which rate: nothing about learning-rate groups is hidden."""
    table = make_table("parameters", "count", "learning rate", "weight decay")
    for group in groups:
        table.add_row(
            group.name, f"{group.num_scalars:,}", f"{group.learning_rate:.3g}", f"{group.weight_decay:.3g}"
        )
    table.add_row("total", f"{sum(group.num_scalars for group in groups):,}", "", "", style="dim")
    return table


def schedule_line(recipe: Recipe) -> str:
    """One line on optimiser, schedule and loss."""
    config, terms = recipe.train, recipe.active_losses
    weighted = (f"{term.weight:g} {term.name}" if term.weight != 1 else term.name for term in terms)
    averages = dict.fromkeys(str(getattr(term, "average", "valid")) for term in terms)
    return (
        f"AdamW, batch {config.batch_size}, {count(config.iterations, 'iteration')}: linear warm-up over "
        f"{config.warmup_iterations:,}, then poly of power {config.poly_power:g} to "
        f"{config.min_learning_rate:g}; loss {' + '.join(weighted)}, "
        f"averaged over {' or '.join(averages)} pixels"
    )


def scores_table(report: Report) -> Table:
    """IoU and accuracy of every class in percent, and the means."""
    table = make_table("class", "IoU %", "accuracy %", "pixels %")
    scores = report.scores
    total = max(int(scores.pixels_K.sum()), 1)
    for index, name in enumerate(report.classes.names):
        share = f"{100 * scores.pixels_K[index] / total:.2f}"
        table.add_row(name, percent(scores.iou_K[index]), percent(scores.accuracy_K[index]), share)
    table.add_section()
    table.add_row("mean", percent(scores.miou), percent(scores.macc), "", style="bold")
    return table


def scores_line(report: Report) -> str:
    """mIoU, mAcc, aAcc and loss in one line."""
    return (
        f"mIoU {percent(report.scores.miou)} %, mAcc {percent(report.scores.macc)} %, "
        f"aAcc {percent(report.pixel_accuracy)} %, loss {report.loss:.4f} on "
        f"{count(report.num_images, 'image')}"
    )


def protocol_line(protocol: EvalConfig) -> str:
    """The protocol in words."""
    from segdeformer.config.data import LARGER

    size = "own size"
    if protocol.resize_to is not None:
        long_px, short_px = protocol.resize_to
        size = f"ratio kept, inside {long_px} x {short_px} px"
    if protocol.multiple_of > 1:
        size += f", up to a multiple of {protocol.multiple_of}"
    mode: str = protocol.mode
    if mode != "whole":
        (height, width), (down, right) = protocol.window, protocol.stride
        mode = f"slide {height} x {width}, stride {down} x {right}"
    if protocol.mode == "auto":
        mode = f"whole; images over {LARGER} windows: {mode}"
    scales = ", ".join(f"{scale:g}" for scale in protocol.scales)
    line = f"{mode}; {size}; scales {scales}; {'with' if protocol.flip else 'no'} flip"
    stride = protocol.key_stride
    return line if stride in (None, 1) else f"{line}; key stride {stride}, an approximation"


def percent(share: float) -> str:
    """A share as a percentage with two decimals, a dash for NaN."""
    return "-" if math.isnan(share) else f"{100 * share:.2f}"


class Grid(NamedTuple):
    """A table as text; the first `num_left` columns are names, the others numbers."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()
    num_left: int = 1


def print_grid(console: Console, grid: Grid) -> None:
    """As wide as it needs to be; names are broken where the terminal is too narrow, then numbers."""
    title: dict[str, Any] = {"title": grid.title, "title_justify": "left", "title_style": "bold"}
    table = make_table(*grid.header, num_left=grid.num_left, padding=(0, 1, 0, 0), **title)
    for column in table.columns[grid.num_left :]:
        column.no_wrap = True
    for row in grid.rows:
        table.add_row(*row)
    console.print(table, soft_wrap=False)
    for note in grid.notes:
        console.print(note, style="dim", soft_wrap=False)
    console.print()


def markdown(grids: Sequence[Grid]) -> str:
    """All tables with their titles and notes."""
    parts = []
    for grid in grids:
        marks = ["---" if index < grid.num_left else "---:" for index in range(len(grid.header))]
        lines = [_markdown_row(grid.header), _markdown_row(marks), *map(_markdown_row, grid.rows)]
        notes = "".join(f"\n- {note}" for note in grid.notes)
        parts.append(f"## {grid.title}\n\n" + "\n".join(lines) + (f"\n{notes}" if notes else ""))
    return "\n\n".join(parts) + "\n"


def write_tables(console: Console, files: Mapping[str, tuple[Path | None, object]]) -> None:
    """Write text, or JSON, where a file is named, and say so."""
    for what, (path, content) in files.items():
        if path is not None:
            text = content if isinstance(content, str) else json.dumps(content, indent=1) + "\n"
            write_text(path, text)
            console.print(f"{what}: {path}")


def _markdown_row(cells: Sequence[str]) -> str:
    escaped = [cell.replace("|", r"\|").replace("*", r"\*").replace("\n", "<br>") for cell in cells]
    return f"| {' | '.join(escaped)} |"

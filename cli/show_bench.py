"""Tables of `segdeformer bench`, for the terminal and for Markdown."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from rich.table import Table

from segdeformer.files import write_text

if TYPE_CHECKING:
    from rich.console import Console

    from segdeformer.measure.fps import Comparison
    from segdeformer.measure.parameters import CountedRow, PartCounts
    from segdeformer.measure.parts import Split


class Grid(NamedTuple):
    """A table as text; the first `num_left` columns are names, the others numbers."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()
    num_left: int = 1


def print_grid(console: Console, grid: Grid) -> None:
    """As wide as it needs to be; names are broken where the terminal is too narrow."""
    table = Table(title=grid.title, title_justify="left", title_style="bold", box=None, header_style="bold")
    table.padding = (0, 1, 0, 0)
    for index, name in enumerate(grid.header):
        is_name = index < grid.num_left
        table.add_column(name, justify="left" if is_name else "right", no_wrap=not is_name, overflow="fold")
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


def paper_grid(rows: Sequence[CountedRow]) -> Grid:
    """The model rows of the paper; equal remarks share a note."""
    notes: list[str] = []
    lines = []
    for row in rows:
        remark = row.obstacle if row.row.recipe and row.obstacle else row.row.remark
        if remark and remark not in notes:
            notes.append(remark)
        lines.append(
            (
                str(row.row.table),
                f"{row.row.label}\n{row.row.recipe or 'no recipe'}",
                "-" if row.row.params_millions is None else f"{row.row.params_millions:.2f}",
                "-" if row.counts is None else f"{row.counts.total / 1e6:.3f}",
                _signed(row.difference_percent),
                _verdict(row),
                f"[{notes.index(remark) + 1}]" if remark else "",
            )
        )
    allowed = {row.row.is_segdeformer: row.allowed_percent for row in rows}
    legend = [
        f"ok: a baseline within {allowed[False]} % of the paper, a SegDeformer row within {allowed[True]} %. "
        "ok m: within that of the measured count in the note."
    ]
    legend += [f"[{number}] {note}" for number, note in enumerate(notes, start=1)]
    header = ("T.", "row of the paper, recipe", "paper", "ours", "diff %", "", "note")
    return Grid("Millions of parameters, Tables 1, 7 and 8", header, lines, legend, num_left=2)


def _verdict(row: CountedRow) -> str:
    if row.within is None:
        return ""
    if not row.within:
        return "off"
    return "ok" if row.to_measured_percent is None else "ok m"


def _signed(percent: float | None) -> str:
    """Two decimals; nothing that rounds to zero has a sign."""
    if percent is None:
        return "-"
    return "0.00" if abs(percent) < 0.005 else f"{percent:+.2f}"


def counts_grid(counts: dict[str, PartCounts]) -> Grid:
    """Models of the user's own, by part, in millions."""
    header = ("model", "encoder", "fusion", "context", "head", "auxiliary", "total M")
    rows = [
        (name, *(f"{count / 1e6:.3f}" for count in (*parts, parts.total))) for name, parts in counts.items()
    ]
    return Grid("Parameters", header, rows)


def comparison_grids(comparison: Comparison) -> list[Grid]:
    """Speed, cost, and both by part."""
    return [_speed_grid(comparison), _cost_grid(comparison), _parts_grid(comparison)]


def _speed_grid(comparison: Comparison) -> Grid:
    base = comparison.base
    header = ("model", "p50 ms", "p95 ms", "images/s", "relative", "paper")
    rows = []
    for one in comparison.measured:
        speed, paper = one.latency, comparison.paper_speed(one)
        numbers = (speed.p50_ms, speed.p95_ms, speed.images_per_s, comparison.relative_speed(one))
        cells = [f"{number:.2f}" for number in numbers]
        rows.append((one.alternative.label, *cells, "" if paper is None else f"{paper:.2f}"))
    rounds = base.latency.num_rounds
    notes = [
        f"rounds in alternation: {rounds}; relative: images/s with {base.alternative.label} = 1, by medians",
        "paper: Table 7's frames per second, likewise, on a V100 at 512x512",
    ]
    return Grid("Speed", header, rows, notes if any(row[-1] for row in rows) else notes[:1])


def _cost_grid(comparison: Comparison) -> Grid:
    header = ("model", "params M", "GFLOPs", "GMACs", "extra MiB", "peak MiB")
    rows = [
        (
            one.alternative.label,
            f"{one.parameters / 1e6:.2f}",
            _short(one.flops.total / 1e9),
            _short(one.printed_flops / 2e9),
            "-" if one.memory is None else f"{one.memory.extra_mib:.0f}",
            "-" if one.memory is None else f"{one.memory.peak_mib:.0f}",
        )
        for one in comparison.measured
    ]
    of = "the whole process" if comparison.device == "cpu" else "model, images and extra"
    notes = [
        "GFLOPs: of the whole batch as it runs, attention included, a multiply-add as two",
        "GMACs: of the equations as papers print them, a multiply-add as one: what papers call GFLOPs",
        f"extra: the peak above model and images in an eager pass; peak: of {of}",
    ]
    return Grid("Cost", header, rows, notes)


def _parts_grid(comparison: Comparison) -> Grid:
    header = ("model", "", "encoder", "fusion", "context", "head")
    rows = []
    for one in comparison.measured:
        rows.append((one.alternative.label, "ms", *_cells(one.split_ms, 1)))
        rows.append(("", "GFLOPs", *_cells(one.flops.parts, 1e9)))
    notes = ["ms: medians of eager passes; the context of a folded model holds its head"]
    return Grid("Parts", header, rows, notes, num_left=2)


def _cells(split: Split[float] | Split[int], unit: float) -> list[str]:
    return ["-" if value is None else _short(value / unit) for value in split]


def _short(number: float) -> str:
    """Two decimals, or two digits of what is less than one."""
    return f"{number:.2f}" if number >= 1 else f"{number:.2g}"

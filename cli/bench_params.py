"""`segdeformer bench --params`: how many parameters models have, and the paper's rows beside ours."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from segdeformer.cli.show import Grid, make_console, markdown, print_grid, write_tables

if TYPE_CHECKING:
    from segdeformer.measure.parameters import CountedRow, PartCounts

DEFINITION = "trained parameters, the recipe's auxiliary head included, buffers not: as the paper counts"


def bench_params(models: Sequence[str], json_file: Path | None, markdown_file: Path | None) -> None:
    """Count the paper's rows, or these models; print, and write what is asked for."""
    import torch

    from segdeformer.measure.machine import this_machine
    from segdeformer.measure.parameters import count_paper

    if models:
        counts = {model: _count(model) for model in models}
        grid = counts_grid(counts)
        table: dict[str, Any] = {"models": {name: _by_part(parts) for name, parts in counts.items()}}
    else:
        rows = count_paper()
        grid = paper_grid(rows)
        table = {"rows": [_row(row) for row in rows]}
    console = make_console()
    print_grid(console, grid)
    machine = this_machine(torch.device("cpu"), "timm")
    origin = {"versions": machine.versions, "commit": machine.commit, "date": machine.date}
    everything = {"counted": DEFINITION, **origin, **table}
    write_tables(console, {"counts": (json_file, everything), "table": (markdown_file, markdown([grid]))})


def _count(model: str) -> PartCounts:
    from segdeformer.config import load_recipe
    from segdeformer.measure.alternatives import is_recipe, load_model
    from segdeformer.measure.parameters import count_parameters, count_recipe

    return count_recipe(load_recipe(model)) if is_recipe(model) else count_parameters(load_model(model))


def _by_part(counts: PartCounts) -> dict[str, int]:
    return {**counts._asdict(), "total": counts.total}


def _row(row: CountedRow) -> dict[str, object]:
    paper = row.row
    return {
        "table": paper.table,
        "row": paper.label,
        "method": paper.method,
        "recipe": paper.recipe,
        "paper_millions": paper.params_millions,
        "measured_millions": paper.measured_millions,
        "our_millions": None if row.counts is None else round(row.counts.total / 1e6, 6),
        "parameters": None if row.counts is None else _by_part(row.counts),
        "difference_percent": _rounded(row.difference_percent),
        "difference_to_measured_percent": _rounded(row.to_measured_percent),
        "allowed_percent": row.allowed_percent,
        "within": row.within,
        "remark": paper.remark or None,
        "not_built": row.obstacle or None,
    }


def _rounded(percent: float | None) -> float | None:
    return None if percent is None else round(percent, 4)


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

"""`segdeformer bench --params`: how many parameters models have, and the paper's rows beside ours."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from segdeformer.cli.show_bench import Grid
    from segdeformer.measure.parameters import CountedRow, PartCounts

DEFINITION = "trained parameters, the recipe's auxiliary head included, buffers not: as the paper counts"


def bench_params(models: Sequence[str], json_file: Path | None, markdown_file: Path | None) -> None:
    """Count the paper's rows, or these models; print, and write what is asked for."""
    import torch

    from segdeformer.cli.show import make_console
    from segdeformer.cli.show_bench import counts_grid, markdown, paper_grid, print_grid, write_tables
    from segdeformer.measure.machine import this_machine
    from segdeformer.measure.parameters import count_paper

    if models:
        counts = {model: _count(model) for model in models}
        grid: Grid = counts_grid(counts)
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

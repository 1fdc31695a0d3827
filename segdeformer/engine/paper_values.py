"""What the paper reports for a row of an ablation, found by what the row changes."""

from __future__ import annotations

from typing import Any, NamedTuple

from segdeformer.ablations import TABLES, Context, ModelOf, Row
from segdeformer.paper import table_rows


class PaperValue(NamedTuple):
    """As printed, in percent points; a gain that is not printed is the difference of two printed scores."""

    table: int
    miou: float
    gain: float | None  # None for a baseline


def paper_value(table: int, row: Row) -> PaperValue:
    """The paper's score and gain of a row of `ablations.py`."""
    printed = _printed(table, row)
    gain = printed.get("gain")
    if gain is None and row.over is not None:
        gain = round(printed["miou"] - _printed(table, TABLES[table][row.over])["miou"], 2)
    return PaperValue(table, printed["miou"], gain)


def _printed(table: int, row: Row) -> dict[str, Any]:
    """The table's row with the same fields. Table 8 prints its baseline twice, with one score."""
    match row:
        case ModelOf(recipe):
            return next(r for r in table_rows(table) if recipe in r.get("recipes", []))
        case Context():
            fields = _fields(table, row)
            return next(r for r in table_rows(table) if {k: r.get(k) for k in fields} == fields)


def _fields(table: int, row: Context) -> dict[str, Any]:
    """The row in the columns of Table 4, 5 or 6."""
    internal, external = row.internal, row.external
    if table == 4:
        if internal is None:
            return {"heads": 0, "depth": 0, "mlp": False}
        return {"heads": internal.heads, "depth": internal.depth, "mlp": internal.mlp}
    if table == 5:
        off = {"tokens": None, "attention_loss": False, "second_stage": False, "decouple": False}
        return off if external is None else {name: getattr(external, name) for name in off}
    return {"internal": internal is not None, "external": external is not None}

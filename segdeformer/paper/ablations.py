"""The paper's ablations, Tables 4 to 8, as typed changes to a recipe, and what it reports of them.

A row without `over` is a baseline.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from segdeformer.config import ExternalConfig, InternalConfig
from segdeformer.paper import table_rows


class Context(NamedTuple):
    """The attentions of a row. Projection style and reduction stay the base recipe's."""

    internal: InternalConfig | None = None
    external: ExternalConfig | None = None
    over: str | None = None  # the row that the gain is over


class ModelOf(NamedTuple):
    """A row that takes the model of a shipped recipe; the number of classes is the data's."""

    recipe: str
    over: str | None = None


Row = Context | ModelOf

TABLES: dict[int, dict[str, Row]] = {}

TABLES[4] = {
    "no internal": Context(),
    "1 head": Context(internal=InternalConfig(), over="no internal"),
    "1 head, depth 2": Context(internal=InternalConfig(depth=2), over="no internal"),
    "2 heads": Context(internal=InternalConfig(heads=2), over="no internal"),
    "1 head, MLP": Context(internal=InternalConfig(mlp=True), over="no internal"),
}

TABLES[5] = {
    "no external": Context(),
    "momentum": Context(
        external=ExternalConfig(tokens="momentum", attention_loss=False, decouple=False), over="no external"
    ),
    "momentum, L_attn": Context(
        external=ExternalConfig(tokens="momentum", decouple=False), over="no external"
    ),
    "learned": Context(external=ExternalConfig(attention_loss=False, decouple=False), over="no external"),
    "learned, L_attn, no Y_ext": Context(
        external=ExternalConfig(second_stage=False, decouple=False), over="no external"
    ),
    "learned, L_attn": Context(external=ExternalConfig(decouple=False), over="no external"),
    "learned, L_attn, decoupled": Context(external=ExternalConfig(), over="no external"),
}

TABLES[6] = {
    "no context": Context(),
    "internal": Context(internal=InternalConfig(), over="no context"),
    "external": Context(external=ExternalConfig(), over="no context"),
    "internal + external": Context(internal=InternalConfig(), external=ExternalConfig(), over="no context"),
}

TABLES[7] = {
    "DeiT-S UperNet": ModelOf("ade20k-upernet-deit-s"),
    "DeiT-S SegDeformer": ModelOf("ade20k-segdeformer-deit-s", over="DeiT-S UperNet"),
    "DeiT-S UperNet + SegDeformer": ModelOf("ade20k-segdeformer-deit-s-upernet", over="DeiT-S UperNet"),
    "Swin-S UperNet": ModelOf("ade20k-upernet-swin-s"),
    "Swin-S SegDeformer": ModelOf("ade20k-segdeformer-swin-s", over="Swin-S UperNet"),
    "Swin-S UperNet + SegDeformer": ModelOf("ade20k-segdeformer-swin-s-upernet", over="Swin-S UperNet"),
    "Swin-S UperNet + SegDeformer, efficient": ModelOf(
        "ade20k-segdeformer-swin-s-upernet-efficient", over="Swin-S UperNet"
    ),
    "SegFormer-B2": ModelOf("ade20k-segformer-b2"),
    "SegFormer-B2 + SegDeformer": ModelOf("ade20k-segdeformer-b2", over="SegFormer-B2"),
    "SegFormer-B2 + SegDeformer, efficient": ModelOf("ade20k-segdeformer-b2-efficient", over="SegFormer-B2"),
}

# The paper prints the first row twice, once for each comparison; it is trained once.
TABLES[8] = {
    "depth 2, width 256": ModelOf("ade20k-segformer-b2"),
    "depth 8, width 256": ModelOf("ade20k-segformer-b2-depth8", over="depth 2, width 256"),
    "SegDeformer": ModelOf("ade20k-segdeformer-b2", over="depth 2, width 256"),
    "depth 8, width 512": ModelOf("ade20k-segformer-b2-depth8-width512", over="depth 2, width 256"),
    "SegDeformer, efficient": ModelOf("ade20k-segdeformer-b2-efficient", over="depth 2, width 256"),
}


class PaperValue(NamedTuple):
    """As printed, in percent points; a gain that is not printed is the difference of two printed scores."""

    table: int
    miou: float
    gain: float | None  # None for a baseline


def paper_value(table: int, row: Row) -> PaperValue:
    """The paper's score and gain of a row."""
    printed = _printed(table, row)
    gain = printed.get("gain")
    if gain is None and row.over is not None:
        gain = round(printed["miou"] - _printed(table, TABLES[table][row.over])["miou"], 2)
    return PaperValue(table, printed["miou"], gain)


def _printed(table: int, row: Row) -> dict[str, Any]:
    """The table's row with the same fields. Table 8 prints its baseline twice, with one score."""
    if isinstance(row, ModelOf):
        return next(r for r in table_rows(table) if row.recipe in r.get("recipes", []))
    fields = _columns(table, row)
    return next(r for r in table_rows(table) if {k: r.get(k) for k in fields} == fields)


def _columns(table: int, row: Context) -> dict[str, Any]:
    """The row in the columns of Table 4, 5 or 6."""
    if table == 6:
        return {"internal": row.internal is not None, "external": row.external is not None}
    attention = row.internal if table == 4 else row.external
    off: dict[str, Any] = {"tokens": None, "attention_loss": False, "second_stage": False, "decouple": False}
    if table == 4:
        off = {"heads": 0, "depth": 0, "mlp": False}
    return off if attention is None else {name: getattr(attention, name) for name in off}

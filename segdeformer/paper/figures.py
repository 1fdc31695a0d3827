"""The figures of the paper's tables that measurements are put beside."""

from __future__ import annotations

from typing import Any, NamedTuple

from segdeformer.paper import paper, table_rows

TABLES_OF_MODELS = (1, 7, 8)
SPEED_TABLE = 7
SPEED_BASE = "SegFormer-B2"  # the row whose speed is 1


class ParamsRow(NamedTuple):
    """A row of a table of models, with one of the recipes for it."""

    table: int
    method: str
    label: str  # the method, and what else tells rows of one method apart
    params_millions: float | None  # None: the paper leaves the cell empty
    measured_millions: float | None  # of the authors' code, where that differs from what is printed
    recipe: str | None  # None: there is none
    remark: str  # why the counts differ, or why there is no recipe

    @property
    def is_segdeformer(self) -> bool:
        return "SegDeformer" in self.method


class PaperSpeed(NamedTuple):
    """A row of Table 7."""

    method: str
    fps: float  # on a V100, 512x512
    relative: float  # to SegFormer-B2


def params_rows() -> list[ParamsRow]:
    """Every model row of Tables 1, 7 and 8, once for each of its recipes."""
    about = paper()["parameters"]
    return [
        ParamsRow(
            table=number,
            method=row["method"],
            label=_label(row),
            params_millions=row.get("params_millions"),
            measured_millions=about["measured_millions"].get(recipe),
            recipe=recipe,
            remark=about["no_recipe"][row["method"]] if recipe is None else about["remarks"].get(recipe, ""),
        )
        for number in TABLES_OF_MODELS
        for row in table_rows(number)
        for recipe in row.get("recipes", [None])
    ]


def _label(row: dict[str, Any]) -> str:
    label: str = row["method"]
    if row.get("crop_px", 512) != 512:
        label += f", {row['crop_px']} px"
    if "decoder_depth" in row:
        label += f", depth {row['decoder_depth']}, width {row['decoder_width']}"
    return label


def paper_speeds() -> dict[str, PaperSpeed]:
    """Table 7's frames per second by recipe, with their ratio to SegFormer-B2."""
    rows = table_rows(SPEED_TABLE)
    base = next(row["fps"] for row in rows if row["method"] == SPEED_BASE)
    return {
        name: PaperSpeed(row["method"], row["fps"], row["fps"] / base)
        for row in rows
        for name in row["recipes"]
    }

"""How many parameters a model has, by part, and those of the paper's tables.

One definition, the paper's: everything that is trained, with the auxiliary head where the recipe has one.
Buffers, such as BatchNorm's statistics and momentum tokens, do not count.
"""

from __future__ import annotations

from typing import NamedTuple

from segdeformer.config import Recipe, load_recipe
from segdeformer.errors import UserError
from segdeformer.models.segmenter import Segmenter
from segdeformer.models.skeleton import build_skeleton
from segdeformer.paper.figures import ParamsRow, params_rows

BASELINE_PERCENT = 0.5  # how far a baseline's count may lie from the paper's, or from a measured one
SEGDEFORMER_PERCENT = 1.0


class PartCounts(NamedTuple):
    """Parameters of each part; of a folded model the context's hold the head's."""

    encoder: int
    fusion: int
    context: int
    head: int
    auxiliary: int

    @property
    def total(self) -> int:
        return sum(self)


class CountedRow(NamedTuple):
    """A model row of the paper beside our counts.

    difference_percent: of our total to the printed figure; to_measured_percent: to the measured one.
    allowed_percent: how large it may be, to the measured figure where there is one.
    obstacle: why there are no counts.
    """

    row: ParamsRow
    counts: PartCounts | None
    difference_percent: float | None
    to_measured_percent: float | None
    allowed_percent: float
    obstacle: str

    @property
    def within(self) -> bool | None:
        """Whether the difference is allowed; None where there is nothing to compare."""
        measured = self.to_measured_percent
        judged = self.difference_percent if measured is None else measured
        return None if judged is None else abs(judged) <= self.allowed_percent


def count_parameters(model: Segmenter) -> PartCounts:
    """Parameters by part; shared ones count once."""
    counts = dict.fromkeys(PartCounts._fields, 0)
    for name, parameter in model.named_parameters():
        part, inner, *_ = name.split(".")
        if part == "decoder":
            part = inner if inner in ("fusion", "head") else "context"
        counts[part] += parameter.numel()
    return PartCounts(**counts)


def count_recipe(recipe: Recipe) -> PartCounts:
    """Parameters of a recipe's model.

    Raises `UserError` when it cannot be built, as for want of a package.
    """
    return count_parameters(build_skeleton(recipe.model))


def count_paper() -> list[CountedRow]:
    """Every model row of Tables 1, 7 and 8, in their order; one for each recipe of a row."""
    rows = params_rows()
    found = {name: _counts_or_obstacle(name) for name in dict.fromkeys(row.recipe for row in rows)}
    return [compared(row, found[row.recipe]) for row in rows]


def _counts_or_obstacle(recipe: str | None) -> PartCounts | str:
    if recipe is None:
        return "no recipe"
    try:
        return count_recipe(load_recipe(recipe))
    except UserError as error:
        return str(error)


def compared(row: ParamsRow, found: PartCounts | str) -> CountedRow:
    """Our counts, or why there are none, beside the row's figures."""
    allowed = SEGDEFORMER_PERCENT if row.is_segdeformer else BASELINE_PERCENT
    if isinstance(found, str):
        return CountedRow(row, None, None, None, allowed, found)
    to_printed, to_measured = (
        None if millions is None else 100 * (found.total / (1e6 * millions) - 1)
        for millions in (row.params_millions, row.measured_millions)
    )
    return CountedRow(row, found, to_printed, to_measured, allowed, "")

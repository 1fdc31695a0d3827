"""Which runs an ablation has: rows of recipes, and the seeds of each.

All rows have the data and the protocol of one base recipe, so that they can be compared image by image.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from segdeformer.config import DataConfig, Recipe, change_recipe, load_recipe, validate_recipe
from segdeformer.config.changes import differences
from segdeformer.errors import UsageError
from segdeformer.paper.ablations import TABLES, ModelOf, PaperValue, Row, paper_value

SAVES = 10  # at least so many checkpoints a run: what a kill can cost is a tenth of it


class PlannedRow(NamedTuple):
    """recipe: all but the seed, which each run has its own. over: the row that the gain is over."""

    name: str
    recipe: Recipe
    over: str | None
    paper: PaperValue | None = None

    @property
    def folder(self) -> str:
        """The name as a folder's."""
        return re.sub(r"\W+", "-", self.name.lower()).strip("-")


class Run(NamedTuple):
    """One training: a row with a seed."""

    row: PlannedRow
    seed: int

    @property
    def title(self) -> str:
        return f"{self.row.name}, seed {self.seed}"


class Plan(NamedTuple):
    """title: for headings. base: what the rows change."""

    title: str
    base: Recipe
    rows: tuple[PlannedRow, ...]
    seeds: tuple[int, ...]

    @property
    def runs(self) -> list[Run]:
        """Seed by seed through all rows: stopped at any time, the table is filled evenly."""
        return [Run(row, seed) for seed in self.seeds for row in self.rows]

    def changes(self, row: PlannedRow) -> dict[str, tuple[Any, Any]]:
        """What the row's recipe has other than the base, name and description aside."""
        found = differences(self.base.model_dump(mode="json"), row.recipe.model_dump(mode="json"))
        return {key: change for key, change in found.items() if key not in ("name", "description")}


def base_of_rows(
    recipe: Recipe, *, data: DataConfig, num_classes: int, iterations: int | None, batch: int | None
) -> Recipe:
    """The recipe on this data, with this length and batch size; warm-up scales with the length.

    It validates at the end only: the last iteration is the score, and nothing is chosen on the way.
    """
    changed = change_recipe(
        recipe.model_copy(update={"reported": None}),
        data=data,
        num_classes=num_classes,
        iterations=iterations,
        batch_size=batch,
        seed=0,
    )
    return validate_recipe(with_schedule(changed.model_dump(exclude_none=True)), recipe.name)


def with_schedule(values: dict[str, Any]) -> dict[str, Any]:
    """The recipe's values with validation at the end, and `SAVES` checkpoints or more."""
    train = values["train"]
    train["validate_every"] = train["iterations"]
    train["checkpoint_every"] = min(train["checkpoint_every"], max(1, train["iterations"] // SAVES))
    return values


def table_rows(table: int, base: Recipe) -> tuple[PlannedRow, ...]:
    """The rows of a table of the paper, on this base; a model of a shipped recipe starts from scratch.

    Raises `UsageError` when the base cannot have a row's change.
    """
    return tuple(
        PlannedRow(name, _table_recipe(base, table, name, row), row.over, paper_value(table, row))
        for name, row in TABLES[table].items()
    )


def _table_recipe(base: Recipe, table: int, name: str, row: Row) -> Recipe:
    origin = f"Table {table}, row `{name}`"
    values = base.model_dump(exclude_none=True)
    values["name"], values["description"] = f"{base.name}: {name}", origin
    model = values["model"]
    if isinstance(row, ModelOf):
        values["model"] = load_recipe(row.recipe).model.model_dump(exclude_none=True)
        values["model"]["num_classes"] = model["num_classes"]
        values["model"]["encoder"]["weights"] = "none"
    else:
        kept = model.pop("context", {})
        context = {name: getattr(row, name) for name in ("internal", "external") if getattr(row, name)}
        if context:
            style = {key: value for key, value in kept.items() if key not in ("internal", "external")}
            attentions = {key: value.model_dump(exclude_none=True) for key, value in context.items()}
            model["context"] = style | attentions
    return validate_recipe(values, origin)


def data_title(data: DataConfig) -> str:
    """What the data is called: a folder of one's own by its name."""
    return Path(data.root).name if data.name == "folder" else data.name.replace(":", "-")


def with_weights(rows: tuple[PlannedRow, ...], weights: Mapping[str, str]) -> tuple[PlannedRow, ...]:
    """The rows with the encoder weights of `weights`, by the encoder's name."""

    def changed(row: PlannedRow) -> PlannedRow:
        values = row.recipe.model_dump(exclude_none=True)
        encoder = values["model"]["encoder"]
        encoder["weights"] = weights.get(encoder["name"], encoder["weights"])
        return row._replace(recipe=validate_recipe(values, row.recipe.name))

    return tuple(map(changed, rows))


def encoders(rows: tuple[PlannedRow, ...]) -> dict[str, set[str]]:
    """The names of the rows' encoders, in order, with the weights that rows give them."""
    found: dict[str, set[str]] = {}
    for row in rows:
        found.setdefault(row.recipe.model.encoder.name, set()).add(row.recipe.model.encoder.weights)
    return found


def parse_seeds(text: str) -> tuple[int, ...]:
    """`3` means the seeds 0, 1 and 2; `0,7` or `7,` lists them. Raises `UsageError` otherwise."""
    numbers = [number.strip() for number in text.split(",") if number.strip()]
    if not numbers or not all(re.fullmatch(r"\d{1,9}", number) for number in numbers):
        raise UsageError(f"--seeds {text}: expected a number of seeds such as 3, or a list such as 0,1,7")
    seeds = tuple(map(int, numbers))
    if "," not in text:
        if not seeds[0]:
            raise UsageError("--seeds 0: a row needs at least one seed")
        return tuple(range(seeds[0]))
    if len(set(seeds)) < len(seeds):
        raise UsageError(f"--seeds {text}: a seed is listed twice")
    return seeds

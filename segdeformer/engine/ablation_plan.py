"""Which runs an ablation has: rows of recipes, and the seeds of each.

All rows have the data and the protocol of one base recipe, so that they can be compared image by image.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from segdeformer.ablations import TABLES, Context, ModelOf, Row
from segdeformer.config import DataConfig, Recipe, load_recipe, validate_recipe
from segdeformer.engine.paper_values import PaperValue, paper_value
from segdeformer.errors import UsageError

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


class Plan(NamedTuple):
    """title: for headings. base: what the rows change."""

    title: str
    base: Recipe
    rows: tuple[PlannedRow, ...]
    seeds: tuple[int, ...]

    def row(self, name: str) -> PlannedRow:
        return next(row for row in self.rows if row.name == name)


class Run(NamedTuple):
    """One training: a row with a seed."""

    row: PlannedRow
    seed: int

    @property
    def title(self) -> str:
        return f"{self.row.name}, seed {self.seed}"


def runs_in_order(plan: Plan) -> list[Run]:
    """Seed by seed through all rows: stopped at any time, the table is filled evenly."""
    return [Run(row, seed) for seed in plan.seeds for row in plan.rows]


def base_of_rows(
    recipe: Recipe, *, data: DataConfig, num_classes: int, iterations: int | None, batch: int | None
) -> Recipe:
    """The recipe on this data, with this length and batch size; warm-up scales with the length.

    It validates at the end only: the last iteration is the score, and nothing is chosen on the way.
    """
    values = recipe.model_dump(exclude_none=True)
    values.pop("reported", None)
    values["data"] = data.model_dump(exclude_none=True)
    values["model"]["num_classes"] = num_classes
    train = values["train"]
    if iterations is not None:
        share = iterations / train["iterations"]
        train["iterations"] = iterations
        train["warmup_iterations"] = round(train["warmup_iterations"] * share)
        train["checkpoint_every"] = max(1, round(train["checkpoint_every"] * share))
    if batch is not None:
        train["batch_size"] = batch
    train["seed"] = 0
    return validate_recipe(with_schedule(values), recipe.name)


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
        PlannedRow(
            name,
            _changed_recipe(base, name, row, f"Table {table}, row `{name}`"),
            row.over,
            paper_value(table, row),
        )
        for name, row in TABLES[table].items()
    )


def table_title(table: int, base: Recipe) -> str:
    """The heading of a table of the paper, on the data of this base."""
    return f"Table {table} of the paper, on {data_title(base.data)}"


def data_title(data: DataConfig) -> str:
    """What the data is called: a folder of one's own by its name."""
    return Path(data.root).name if data.name == "folder" else data.name


def _changed_recipe(base: Recipe, name: str, row: Row, origin: str) -> Recipe:
    values = base.model_dump(exclude_none=True)
    values["name"], values["description"] = f"{base.name}: {name}", origin
    model = values["model"]
    match row:
        case Context(internal, external):
            kept = model.pop("context", {})
            parts = {"internal": internal, "external": external}
            context = {key: part.model_dump(exclude_none=True) for key, part in parts.items() if part}
            if context:
                style = {key: kept[key] for key in ("projection", "reduction") if key in kept}
                model["context"] = style | context
        case ModelOf(recipe):
            values["model"] = load_recipe(recipe).model.model_dump(exclude_none=True)
            values["model"]["num_classes"] = model["num_classes"]
            values["model"]["encoder"]["weights"] = "none"
    return validate_recipe(values, origin)


def with_weights(rows: tuple[PlannedRow, ...], weights: Mapping[str, str]) -> tuple[PlannedRow, ...]:
    """The rows with the encoder weights of `weights`, by the encoder's name."""

    def changed(row: PlannedRow) -> PlannedRow:
        values = row.recipe.model_dump(exclude_none=True)
        encoder = values["model"]["encoder"]
        encoder["weights"] = weights.get(encoder["name"], encoder["weights"])
        return row._replace(recipe=validate_recipe(values, row.recipe.name))

    return tuple(map(changed, rows))


def encoders(rows: tuple[PlannedRow, ...]) -> list[str]:
    """The names of the rows' encoders, each once, in order."""
    return list(dict.fromkeys(row.recipe.model.encoder.name for row in rows))


def differences(before: Any, after: Any, path: str = "") -> dict[str, tuple[Any, Any]]:
    """Every value of nested tables that differs, by its dotted key, as (before, after); None for none."""
    if isinstance(before, dict) and isinstance(after, dict):
        found: dict[str, tuple[Any, Any]] = {}
        for key in dict.fromkeys((*before, *after)):
            found |= differences(before.get(key), after.get(key), f"{path}.{key}".lstrip("."))
        return found
    return {} if before == after else {path: (before, after)}


def row_changes(plan: Plan, row: PlannedRow) -> dict[str, tuple[Any, Any]]:
    """What the row's recipe has other than the base, name and description aside."""
    before, after = (recipe.model_dump(mode="json") for recipe in (plan.base, row.recipe))
    return {
        key: change
        for key, change in differences(before, after).items()
        if key not in ("name", "description")
    }


def parse_seeds(text: str) -> tuple[int, ...]:
    """`3` means the seeds 0, 1 and 2; `0,7` or `7,` lists them. Raises `UsageError` otherwise."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts or not all(re.fullmatch(r"\d{1,9}", part) for part in parts):
        raise UsageError(f"--seeds {text}: expected a number of seeds such as 3, or a list such as 0,1,7")
    seeds = tuple(map(int, parts))
    if "," not in text:
        if not seeds[0]:
            raise UsageError("--seeds 0: a row needs at least one seed")
        return tuple(range(seeds[0]))
    if len(set(seeds)) < len(seeds):
        raise UsageError(f"--seeds {text}: a seed is listed twice")
    return seeds

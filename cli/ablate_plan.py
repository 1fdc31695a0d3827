"""What `segdeformer ablate` is asked for: rows on a base, from the command line's words."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from segdeformer.config import DataConfig, Recipe
    from segdeformer.engine.ablation_plan import Plan, PlannedRow

# Small enough for two cores: eight runs of Table 6 in half an hour.
DEFAULT_BASE, DEFAULT_ITERATIONS = "landcover-demo", 400


def make_plan(
    what: str,
    *,
    base: str | None,
    data: str | None,
    classes: Path | None,
    seeds: tuple[int, ...],
    iterations: int | None,
    batch: int | None,
    weights: list[str],
) -> Plan:
    """The rows of `what` on the base, with the data and the changes of the command line.

    Raises `UsageError` or `UserError`, before anything is written, when one of them is wrong.
    """
    from segdeformer.cli.train_recipe import DATA_WITH_OWN_RECIPE
    from segdeformer.config import load_recipe
    from segdeformer.data.datasets import open_dataset, parse_data_spec
    from segdeformer.engine.ablation_file import file_rows, read_ablation
    from segdeformer.engine.ablation_plan import Plan, base_of_rows, table_rows, table_title, with_weights
    from segdeformer.errors import UsageError

    table = _table_number(what)
    file = None if table is not None else read_ablation(Path(what))
    given = parse_data_spec(data) if data is not None else None
    if file is not None:
        if base is not None:
            raise UsageError(f"--base {base}: {what} names its own base, `{file.base}`; change it there")
        base = file.base
    elif base is None and given is not None and given.name != "landcover":
        if given.name not in DATA_WITH_OWN_RECIPE:
            raise UsageError(f"name a recipe for {given.name}: --base {given.name}-...")
        base = given.name
    if base is None:
        iterations = iterations or DEFAULT_ITERATIONS
    recipe = load_recipe(base or DEFAULT_BASE)
    config = _data_of(recipe, given, classes)
    num_classes = len(open_dataset(config, "train").classes.names)
    open_dataset(config, "val")  # a missing split is told before anything is trained
    common = base_of_rows(recipe, data=config, num_classes=num_classes, iterations=iterations, batch=batch)
    if file is not None:
        title, rows = file.title, file_rows(file, common)
    else:
        assert table is not None
        title, rows = table_title(table, common), table_rows(table, common)
    rows = with_weights(rows, _weights_of(weights, rows))
    _check_weights(rows)
    return Plan(title, common, rows, seeds)


def _table_number(what: str) -> int | None:
    """4 for `table4`; None for a file. Raises `UsageError` for what is neither."""
    from segdeformer.ablations import TABLES
    from segdeformer.errors import UsageError

    match = re.fullmatch(r"table\s*(\d+)", what)
    if match and int(match[1]) in TABLES:
        return int(match[1])
    if not Path(what).is_file():
        tables = ", ".join(f"table{number}" for number in TABLES)
        raise UsageError(f"no ablation `{what}`: expected one of {tables}, or a TOML file of rows")
    return None


def _data_of(recipe: Recipe, given: DataConfig | None, classes: Path | None) -> DataConfig:
    """The recipe's data with what the command line says, its paths absolute, as `train` makes it."""
    config = recipe.data
    if given is not None:
        config = config.model_copy(update={"name": given.name, "root": given.root})
    elif config.root:
        config = config.model_copy(update={"root": str(Path(config.root).resolve())})
    chosen = classes or (Path(config.classes) if config.classes else None)
    if chosen is not None:
        config = config.model_copy(update={"classes": str(chosen.resolve())})
    return config


def _weights_of(given: list[str], rows: tuple[PlannedRow, ...]) -> dict[str, str]:
    """Weights for each encoder's name. Raises `UsageError` when one file would go to several encoders."""
    from segdeformer.engine.ablation_plan import encoders
    from segdeformer.errors import UsageError

    names = encoders(rows)
    chosen: dict[str, str] = {}
    for text in given:
        prefix, equals, rest = text.partition("=")
        matching = [name for name in names if prefix in (name, name.partition(".")[0])]
        if equals and matching:
            chosen[matching[0]] = _absolute(rest)
        elif text in ("timm", "none"):
            chosen |= dict.fromkeys(names, text)
        elif len(names) == 1 and (not equals or Path(text).exists()):
            chosen[names[0]] = _absolute(text)
        else:
            raise UsageError(
                f"--weights {text}: name the encoder, ENCODER=FILE; the rows have {', '.join(names)}"
            )
    return chosen


def _check_weights(rows: tuple[PlannedRow, ...]) -> None:
    """Raise `UsageError` for a weights file that is not there, before the rows ahead of it are trained."""
    from segdeformer.errors import UsageError

    for row in rows:
        weights = row.recipe.model.encoder.weights
        if weights not in ("timm", "none") and not Path(weights).is_file():
            raise UsageError(f"row `{row.name}`: `model.encoder.weights` is `{weights}`; no such file")


def _absolute(weights: str) -> str:
    from segdeformer.errors import UsageError

    if weights in ("timm", "none"):
        return weights
    path = Path(weights).expanduser()
    if not path.is_file():
        raise UsageError(f"--weights {weights}: no such file")
    return str(path.resolve())


def default_folder(what: str, plan: Plan) -> Path:
    """The same for the same command, so that repeating it goes on."""
    from segdeformer.engine.ablation_plan import data_title
    from segdeformer.engine.checkpoint import RUNS

    return RUNS / f"ablate-{Path(what).stem}-{data_title(plan.base.data)}"

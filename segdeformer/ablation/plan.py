"""Which runs an ablation has: rows of recipes, of the paper's tables or a user's file, and the seeds of each.

All rows have the data and the protocol of one base recipe, so that they can be compared image by image.
"""

from __future__ import annotations

import re
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import BaseModel, Field, ValidationError

from segdeformer.config import DataConfig, Recipe, Strict, change_recipe, load_recipe, validate_recipe
from segdeformer.config.changes import differences
from segdeformer.config.toml import read_toml
from segdeformer.errors import UsageError
from segdeformer.paper.ablations import TABLES, ModelOf, PaperValue, Row, paper_value
from segdeformer.refusals import explain

IMAGE_COUNTS = "images.npz"  # in a run's folder, once it is scored
SAVES = 10  # at least so many checkpoints a run: what a kill can cost is a tenth of it
NONE = "none"  # TOML has no null: this takes an optional table or value away

NOT_A_ROWS = (
    ("train", "seed", "--seeds says which every row is trained with"),
    ("train", "validate_every", "every row is scored after its last iteration only"),
    ("model", "num_classes", "the data has the number of classes"),
)

Name = Annotated[str, Field(min_length=1, max_length=60, pattern=r"\w")]


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
    """One training: a row with a seed, in a folder as `segdeformer train --out` makes it."""

    row: PlannedRow
    seed: int
    folder: Path

    @property
    def title(self) -> str:
        return f"{self.row.name}, seed {self.seed}"

    @property
    def log(self) -> Path:
        """What its processes print."""
        return self.folder.with_suffix(".log")

    @property
    def is_finished(self) -> bool:
        """Trained to the end and scored."""
        return (self.folder / IMAGE_COUNTS).is_file()


class Plan(NamedTuple):
    """title: for headings. base: what the rows change. folder: where all of it is kept."""

    title: str
    base: Recipe
    rows: tuple[PlannedRow, ...]
    seeds: tuple[int, ...]
    folder: Path = Path()

    def recipe_path(self, row: PlannedRow) -> Path:
        return self.folder / "rows" / row.folder / "recipe.toml"

    def run(self, row: PlannedRow, seed: int) -> Run:
        return Run(row, seed, self.recipe_path(row).parent / f"seed-{seed}")

    @property
    def runs(self) -> list[Run]:
        """Seed by seed through all rows: stopped at any time, the table is filled evenly."""
        return [self.run(row, seed) for seed in self.seeds for row in self.rows]

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


# Rows of a file.


class FileRow(Strict):
    """A row: `model`, `augment` and `train` hold changes in the recipe's own structure.

    over: the row that the gain is over; default: the first one.
    """

    name: Name
    over: str | None = None
    model: dict[str, Any] = Field(default_factory=dict)
    augment: dict[str, Any] = Field(default_factory=dict)
    train: dict[str, Any] = Field(default_factory=dict)


class AblationFile(Strict):
    """base: a shipped recipe, or a recipe file, seen from the ablation's folder."""

    title: str | None = None
    base: str
    rows: Annotated[list[dict[str, Any]], Field(min_length=2)]


class ReadFile(NamedTuple):
    """A file whose own keys are right; whether its changes fit the base is seen by `file_rows`."""

    path: Path
    title: str
    base: str
    rows: tuple[FileRow, ...]


def read_ablation(path: Path) -> ReadFile:
    """Read and check the file; raises `UsageError` that names the row and the key."""
    try:
        values = read_toml(path)
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: cannot be read as TOML ({error})") from None
    try:
        file = AblationFile.model_validate(values)
    except ValidationError as error:
        raise UsageError(f"{path}: {explain(error, AblationFile)}") from None
    rows = tuple(_file_row(path, number, row) for number, row in enumerate(file.rows, 1))
    _check_names(path, rows)
    beside = path.parent / file.base
    base = str(beside) if beside.is_file() else file.base
    return ReadFile(path, file.title or path.stem, base, rows)


def _file_row(path: Path, number: int, values: dict[str, Any]) -> FileRow:
    name = values.get("name")
    origin = f"{path}: row {f'`{name}`' if isinstance(name, str) else number}"
    for table in values.keys() & {"data", "evaluate"}:
        raise UsageError(
            f"{origin}: `{table}` cannot be a row's: all rows have the base's data and protocol, "
            "to be compared image by image"
        )
    try:
        row = FileRow.model_validate(values)
    except ValidationError as error:
        raise UsageError(f"{origin}: {explain(error, FileRow)}") from None
    for table, key, reason in NOT_A_ROWS:
        if key in getattr(row, table):
            raise UsageError(f"{origin}: `{table}.{key}` cannot be a row's: {reason}; leave it out")
    return row


def _check_names(path: Path, rows: tuple[FileRow, ...]) -> None:
    names = [row.name for row in rows]
    for number, row in enumerate(rows):
        if row.name in names[:number]:
            raise UsageError(f"{path}: two rows are named `{row.name}`; each needs a name of its own")
        if row.over is not None and (row.over not in names or row.over == row.name):
            raise UsageError(
                f"{path}: row `{row.name}`: `over` is `{row.over}`, which is no other row; "
                f"known: {', '.join(name for name in names if name != row.name)}"
            )


def file_rows(file: ReadFile, base: Recipe) -> tuple[PlannedRow, ...]:
    """The recipes of the rows; the first is the baseline of those that name no other.

    Raises `UsageError` that names row and key when a change does not fit the recipe.
    """
    first = file.rows[0].name
    overs = [row.over or (first if row.name != first else None) for row in file.rows]
    rows = tuple(
        PlannedRow(row.name, _row_recipe(file, row, base), over)
        for row, over in zip(file.rows, overs, strict=True)
    )
    folders: dict[str, str] = {}
    for planned in rows:
        other = folders.setdefault(planned.folder, planned.name)
        if other != planned.name:
            raise UsageError(
                f"{file.path}: rows `{other}` and `{planned.name}` differ in signs only and would share the "
                f"folder `{planned.folder}`; choose names that differ in letters or numbers"
            )
    return rows


def _row_recipe(file: ReadFile, row: FileRow, base: Recipe) -> Recipe:
    changes = {table: getattr(row, table) for table in ("model", "augment", "train")}
    values = _merged(base.model_dump(exclude_none=True), changes, Recipe)
    values["name"], values["description"] = f"{base.name}: {row.name}", f"{file.title}, row `{row.name}`"
    origin = f"{file.path}: row `{row.name}`"
    validate_recipe(values, origin)  # before the schedule is touched: a wrong value is named as written
    return validate_recipe(with_schedule(values), origin)


def _merged(values: dict[str, Any], changes: dict[str, Any], table: type[BaseModel] | None) -> dict[str, Any]:
    """The values with the changes put in, table by table.

    A table of another `kind` starts from its own defaults, since the kinds have different keys.
    """
    if changes.get("kind", values.get("kind")) != values.get("kind"):
        values = {}
    merged = dict(values)
    for key, change in changes.items():
        field = table.model_fields.get(key) if table else None
        if change == NONE and field is not None and field.default is None and not field.is_required():
            merged.pop(key, None)
        elif isinstance(change, dict):
            before = merged.get(key)
            options = [] if field is None else [field.annotation, *typing.get_args(field.annotation)]
            tables = [o for o in options if isinstance(o, type) and issubclass(o, BaseModel)]
            inner = tables[0] if len(tables) == 1 else None
            merged[key] = _merged(before if isinstance(before, dict) else {}, change, inner)
        else:
            merged[key] = change
    return merged


# Data, encoders, seeds.


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

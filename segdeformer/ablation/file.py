"""A user's own ablation: a TOML file with a base recipe and rows that change it."""

from __future__ import annotations

import tomllib
import typing
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, Field, ValidationError

from segdeformer.ablation.plan import PlannedRow, with_schedule
from segdeformer.config import Recipe, Strict, validate_recipe
from segdeformer.errors import UsageError
from segdeformer.refusals import explain

NONE = "none"  # TOML has no null: this takes an optional table or value away

NOT_A_ROWS = (
    ("train", "seed", "--seeds says which every row is trained with"),
    ("train", "validate_every", "every row is scored after its last iteration only"),
    ("model", "num_classes", "the data has the number of classes"),
)

Name = Annotated[str, Field(min_length=1, max_length=60, pattern=r"\w")]


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


class ReadFile(typing.NamedTuple):
    """A file whose own keys are right; whether its changes fit the base is seen by `file_rows`."""

    path: Path
    title: str
    base: str
    rows: tuple[FileRow, ...]


def read_ablation(path: Path) -> ReadFile:
    """Read and check the file; raises `UsageError` that names the row and the key."""
    try:
        values = tomllib.loads(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
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

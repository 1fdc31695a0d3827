"""What is wrong with a recipe, in one line: the path of the key, what came, what was expected."""

from __future__ import annotations

import difflib
import typing

from pydantic import BaseModel, ValidationError


class _Place(typing.NamedTuple):
    path: str  # dotted, as in TOML
    tables: list[type[BaseModel]]  # what may stand there; none at a plain value


def explain(error: ValidationError, root: type[BaseModel]) -> str:
    """One line for the first mistake in a table `root`, with the nearest right key."""
    first, *others = error.errors(include_url=False)
    path = _place(first["loc"], root).path
    match first["type"]:
        case "extra_forbidden":
            (table,) = _place(first["loc"][:-1], root).tables
            known = list(table.model_fields)
            near = difflib.get_close_matches(str(first["loc"][-1]), known, n=1, cutoff=0.4)
            remedy = f"did you mean `{near[0]}`?" if near else f"known here: {', '.join(known)}"
            text = f"unknown key `{path}`; {remedy}"
        case "missing":
            text = f"key `{path}` is missing"
        case "union_tag_not_found":
            text = f"key `{path}.kind` is missing"
        case "union_tag_invalid":
            tags = first["ctx"]["expected_tags"].rsplit(", ", 1)
            text = f"`{path}.kind`: Input should be {' or '.join(tags)}; got {first['ctx']['tag']!r}"
        case _:
            message = first["msg"].removeprefix("Value error, ")
            got = "" if first["type"] == "value_error" else f"; got {first['input']!r}"
            text = f"`{path}`: {message}{got}" if path else f"{message}{got}"
    return text + (f" (and {len(others)} more)" if others else "")


def _place(loc: tuple[int | str, ...], root: type[BaseModel]) -> _Place:
    """Where pydantic's `loc` leads, through optional tables and tables of several kinds.

    Where a table has several kinds, `loc` names the kind too, which TOML does not.
    """
    names: list[str] = []
    tables = [root]
    for part in loc:
        if isinstance(part, int):  # of a list; its items' kinds are the field's
            names.append(str(part))
            continue
        if len(tables) > 1:
            tables = [t for t in tables if _kind(t) == part]
            continue
        names.append(part)
        field = tables[0].model_fields.get(part) if tables else None
        tables = [] if field is None else list(_tables_in(field.annotation))
    return _Place(".".join(names), tables)


def _kind(table: type[BaseModel]) -> str:
    """The tag of a table of several kinds; that of Python paths for one that names no kind."""
    field = table.model_fields["kind"]
    return "module:name" if field.is_required() else str(field.default)


def _tables_in(annotation: object) -> typing.Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in typing.get_args(annotation):
        yield from _tables_in(part)

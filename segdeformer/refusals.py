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
        if len(tables) > 1:
            tables = [t for t in tables if t.model_fields["kind"].default == part]
            continue
        names.append(str(part))
        field = tables[0].model_fields.get(str(part)) if tables else None
        options = [] if field is None else [field.annotation, *typing.get_args(field.annotation)]
        tables = [o for o in options if isinstance(o, type) and issubclass(o, BaseModel)]
    return _Place(".".join(names), tables)

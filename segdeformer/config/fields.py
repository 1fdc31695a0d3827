"""What the tables of a recipe are made of."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

IGNORE_INDEX = 255

Positive = Annotated[int, Field(gt=0)]
Natural = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
# TOML has lists only; strict validation would insist on tuples.
SizeHW = Annotated[tuple[Positive, Positive], Field(strict=False)]
SizeWH = Annotated[tuple[Positive, Positive], Field(strict=False)]
PositiveFloat = Annotated[float, Field(gt=0)]
Beta = Annotated[float, Field(ge=0.0, lt=1.0)]


def _check_options(options: dict[str, Any]) -> dict[str, Any]:
    for name, value in options.items():
        parts = value if isinstance(value, list) else [value]
        if not all(isinstance(part, bool | int | float | str) for part in parts):
            raise ValueError(
                f"`{name}` is {value!r}; expected a number, a text, true or false, or a list of them"
            )
    return options


# Of somebody's own part, or of another package: what goes to it as keyword arguments.
Options = Annotated[dict[str, Any], AfterValidator(_check_options)]
PATH = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")
PythonPath = Annotated[str, Field(pattern=f"^{PATH.pattern}$")]


OLD_THIRD_PARTY = "peer"  # what version 0.1.0 called `third_party` before its release


def kind_or_own(values: Any) -> str | None:
    """The tag of a table's `kind`, which is `module:name` for every Python path."""
    kind = values.get("kind") if isinstance(values, dict) else getattr(values, "kind", None)
    if kind == OLD_THIRD_PARTY:
        return "third_party"
    return "module:name" if isinstance(kind, str) and ":" in kind else kind


class Strict(BaseModel):
    """Immutable, no unknown keys, no silent conversion of types."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

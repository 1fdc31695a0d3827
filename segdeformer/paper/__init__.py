"""The paper's tables as `paper.toml` holds them."""

from __future__ import annotations

import functools
from importlib import resources
from typing import Any

from segdeformer.config.toml import read_toml


@functools.cache
def paper() -> dict[str, Any]:
    """paper.toml as it stands."""
    return read_toml(resources.files(__name__).joinpath("paper.toml"))


def table_rows(number: int) -> list[dict[str, Any]]:
    """The rows of a table, by its number in the paper."""
    rows: list[dict[str, Any]] = next(t["rows"] for t in paper()["tables"] if t["number"] == number)
    return rows

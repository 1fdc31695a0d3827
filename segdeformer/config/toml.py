"""TOML files as editors save them: UTF-8, with or without a byte-order mark, with any ends of lines."""

from __future__ import annotations

import codecs
import tomllib
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

UTF_16_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
BOM = "\ufeff"


def read_toml(path: Path | Traversable) -> dict[str, Any]:
    """Raises `OSError`, or a `ValueError` that says what is wrong with the text, but not in which file."""
    return parse_toml(read_toml_text(path))


def read_toml_text(path: Path | Traversable) -> str:
    """The text alone; raises as `read_toml` does when it is not UTF-8."""
    data = path.read_bytes()
    if data.startswith(UTF_16_MARKS) or b"\0" in data[:2]:  # ASCII in UTF-16 has a zero in each pair of bytes
        raise ValueError("it is UTF-16, as PowerShell's `>` writes; save it as UTF-8 in an editor")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{error}; save it as UTF-8") from None
    return text.removeprefix(BOM).replace("\r\n", "\n").replace("\r", "\n")


def parse_toml(text: str) -> dict[str, Any]:
    """Raises `tomllib.TOMLDecodeError`."""
    return tomllib.loads(text.removeprefix(BOM))

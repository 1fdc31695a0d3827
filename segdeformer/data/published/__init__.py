"""Published data sets: their layouts, classes, and how they are prepared."""

import tomllib
from pathlib import Path
from typing import Any

SETS: dict[str, dict[str, Any]] = tomllib.loads(Path(__file__).with_name("sets.toml").read_text("utf-8"))

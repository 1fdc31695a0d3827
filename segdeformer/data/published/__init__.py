"""Published data sets: their layouts, classes, and how they are prepared."""

from pathlib import Path
from typing import Any

from segdeformer.config.toml import read_toml

SETS: dict[str, dict[str, Any]] = read_toml(Path(__file__).with_name("sets.toml"))

"""Class names and colours, in the order of the ids, from a small TOML file."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from segdeformer.config import IGNORE_INDEX
from segdeformer.config.toml import read_toml
from segdeformer.errors import UserError, count

Color = tuple[int, int, int]  # RGB

EXAMPLE = 'names = ["road", "car"]'
CLASS_TABLES = Path(__file__).parent / "published" / "class_tables"
KEYS = ("names", "colors")


@dataclass(frozen=True)
class ClassTable:
    """Names and RGB colours in id order; as many of the one as of the other."""

    names: tuple[str, ...]
    colors: tuple[Color, ...]


def load_classes(path: Path) -> ClassTable:
    """Read `names = [...]` and optionally `colors = [[r, g, b], ...]`, one for each name.

    Raises `UserError` when the file is missing, is no TOML, or does not say this.
    """
    try:
        values = read_toml(path)
    except FileNotFoundError:
        raise UserError(
            f"{path}: no such file; write the class names there, in the order of their ids: {EXAMPLE}, "
            "or name another file with --classes"
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as TOML ({error}); expected a line like {EXAMPLE}") from None
    for key in values:
        if key not in KEYS:
            near = difflib.get_close_matches(key, KEYS, n=1, cutoff=0.4)
            remedy = f"did you mean `{near[0]}`?" if near else "known here: names, colors"
            raise UserError(f"{path}: unknown key `{key}`; {remedy}")
    names = _names(values.get("names"), path)
    if "colors" not in values:
        return ClassTable(names, default_colors(len(names)))
    return ClassTable(names, _colors(values["colors"], len(names), path))


def _names(value: Any, path: Path) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(name, str) and name.strip() for name in value):
        raise UserError(f"{path}: `names` must be a list of class names, such as {EXAMPLE}")
    if not 2 <= len(value) <= IGNORE_INDEX:
        raise UserError(f"{path}: `names` has {count(len(value), 'class')}; it must have 2 to {IGNORE_INDEX}")
    if doubles := sorted({name for name in value if value.count(name) > 1}):
        raise UserError(f"{path}: `names` says {doubles[0]!r} more than once; every class needs its own name")
    return tuple(value)


def _colors(value: Any, num_classes: int, path: Path) -> tuple[Color, ...]:
    if not isinstance(value, list) or len(value) != num_classes:
        count = len(value) if isinstance(value, list) else 0
        raise UserError(f"{path}: `colors` has {count} entries for {num_classes} names; it may be left out")
    for index, color in enumerate(value):
        if not is_color(color):
            raise UserError(f"{path}: `colors[{index}]` is {color!r}; it must be [r, g, b], each 0 to 255")
    return tuple((red, green, blue) for red, green, blue in value)


def is_color(value: Any) -> bool:
    """Whether it is a list of three levels of 0 to 255."""
    is_triple = isinstance(value, list | tuple) and len(value) == 3
    return is_triple and all(type(level) is int and 0 <= level <= 255 for level in value)


def default_colors(num_classes: int) -> tuple[Color, ...]:
    """Colours far from black, white and each other: each is the farthest in CIELAB from those before."""
    levels = np.linspace(32, 224, 7).astype(np.uint8)
    grid_P3 = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), axis=-1).reshape(-1, 3)
    edges = np.array([[0, 0, 0], [255, 255, 255]], np.uint8)
    distance_P = np.minimum(*(_lab_distance(grid_P3, edge) for edge in edges))
    chosen = []
    for _ in range(num_classes):
        chosen.append(grid_P3[np.argmax(distance_P)])
        distance_P = np.minimum(distance_P, _lab_distance(grid_P3, chosen[-1]))
    return tuple((int(red), int(green), int(blue)) for red, green, blue in chosen)


def _lab_distance(colors_P3: np.ndarray, color: np.ndarray) -> np.ndarray:
    both = np.concatenate([colors_P3, color[None]])[None].astype(np.float32) / 255
    lab_P3: np.ndarray = cv2.cvtColor(both, cv2.COLOR_RGB2Lab)[0]
    distance_P: np.ndarray = np.linalg.norm(lab_P3[:-1] - lab_P3[-1], axis=1)
    return distance_P

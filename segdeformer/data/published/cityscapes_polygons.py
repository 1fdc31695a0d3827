"""Draw Cityscapes' polygon files into maps of trainIds, as the published scripts do. H height, W width."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from segdeformer.config import IGNORE_INDEX
from segdeformer.data.classes import CLASS_TABLES, load_classes
from segdeformer.errors import UserError

# Labels that are drawn, over others too, but not learnt.
IGNORED_LABELS = (
    *("unlabeled", "ego vehicle", "rectification border", "out of roi", "static", "dynamic", "ground"),
    *("parking", "rail track", "guard rail", "bridge", "tunnel", "polegroup", "caravan", "trailer"),
)
NOT_DRAWN = "license plate"  # it has no id of its own: the car under it stays


def draw_polygons(path: Path) -> np.ndarray:
    """The (H, W) uint8 trainIds of a `_gtFine_polygons.json`: later objects cover earlier ones.

    Raises `UserError` when the file is no such JSON or names an unknown label.
    """
    try:
        annotation = json.loads(path.read_text("utf-8"))
        size = (int(annotation["imgWidth"]), int(annotation["imgHeight"]))
        objects = [
            (str(thing["label"]), [(x, y) for x, y in thing["polygon"]])
            for thing in annotation["objects"]
            if not thing.get("deleted")
        ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path}: cannot be read as Cityscapes polygons ({error!r}); unpack it again"
        ) from None
    picture = Image.new("L", size, IGNORE_INDEX)
    pen = ImageDraw.Draw(picture)
    for label, corners in objects:
        if label != NOT_DRAWN and len(corners) > 1:
            pen.polygon(corners, fill=_train_id(label, path))
    return np.asarray(picture)


def _train_id(label: str, path: Path) -> int:
    ids = _train_ids()
    for name in (label, label.removesuffix("group")):  # "persongroup": several persons in one outline
        if name in ids:
            return ids[name]
    raise UserError(f"{path}: unknown label {label!r}; expected those of Cityscapes")


@cache
def _train_ids() -> dict[str, int]:
    names = load_classes(CLASS_TABLES / "cityscapes.toml").names
    return dict.fromkeys(IGNORED_LABELS, IGNORE_INDEX) | {name: index for index, name in enumerate(names)}

"""The data sets that need no folder: `landcover`, which ships with the program, and `synthetic`, drawn.

H height, W width, 3 RGB.
"""

from __future__ import annotations

import zlib
from pathlib import Path

import cv2
import numpy as np

from segdeformer.config import IGNORE_INDEX
from segdeformer.data import landcover
from segdeformer.data.classes import ClassTable, default_colors, load_classes
from segdeformer.data.landcover.blocks import cut, sample_window, val_tiles
from segdeformer.data.samples import Sample, identity_map
from segdeformer.errors import UserError

TRAIN_WINDOWS = 32_768  # an epoch; they overlap, and together cover the training blocks many times
WINDOW_PX = 128
WINDOW_KEY = 2019


class LandcoverDataset:
    """Views of the map: `train` has square windows with land, `val` the held-out blocks with land.

    Window `index` is drawn once and for all from (WINDOW_KEY, index); none touches a held-out block.
    """

    name = "landcover"

    def __init__(self, split: str) -> None:
        if split not in ("train", "val"):
            raise UserError(f"landcover has no split `{split}`; it has `train` and `val`")
        self.split = split
        self.classes = load_classes(Path(landcover.__path__[0], "classes.toml"))
        self.label_map = identity_map(len(self.classes.names))

    def __len__(self) -> int:
        return TRAIN_WINDOWS if self.split == "train" else len(val_tiles())

    def read(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(index)
        if self.split == "train":
            rng = np.random.Generator(np.random.Philox(key=[WINDOW_KEY, index]))
            tile = sample_window(rng, size_px=WINDOW_PX)
        else:
            tile = val_tiles()[index]
        image_HW3, labels_HW = cut(tile)
        return Sample(image_HW3, labels_HW, f"row{tile.top:04}_column{tile.left:04}")


class SyntheticDataset:
    """Noisy shapes, one colour a class, on a background of class 0, with ignored outlines.

    Image and labels are a function of (split, index); `size_hw` is the largest, and odd sizes stay odd.
    """

    name = "synthetic"

    def __init__(
        self, split: str, *, num_classes: int = 5, num_images: int = 64, size_hw: tuple[int, int] = (97, 131)
    ) -> None:
        self.split = split
        self.num_images = num_images
        self.size_hw = size_hw
        names = ("background", *(f"shape {label}" for label in range(1, num_classes)))
        self.classes = ClassTable(names, default_colors(num_classes))
        self.label_map = identity_map(num_classes)

    def __len__(self) -> int:
        return self.num_images

    def read(self, index: int) -> Sample:
        if not 0 <= index < self.num_images:
            raise IndexError(index)
        rng = np.random.Generator(np.random.Philox(key=[zlib.crc32(self.split.encode()), index]))
        height, width = (edge - 2 * int(rng.integers(edge // 8 + 1)) for edge in self.size_hw)
        labels_HW = np.zeros((height, width), np.uint8)
        for _ in range(8):
            _draw_shape(labels_HW, int(rng.integers(1, len(self.classes.names))), rng)
        colors_K3 = np.full((256, 3), 128.0)
        colors_K3[: len(self.classes.colors)] = self.classes.colors
        light = rng.uniform(0.6, 1.0)
        noise_HW3 = rng.normal(scale=20.0, size=(height, width, 3))
        image_HW3 = np.clip(light * colors_K3[labels_HW] + noise_HW3, 0, 255).astype(np.uint8)
        return Sample(image_HW3, labels_HW, f"{self.split}{index:04}")


def _draw_shape(labels_HW: np.ndarray, label: int, rng: np.random.Generator) -> None:
    """Draw an ellipse or a triangle of the class into the labels, its outline ignored."""
    height, width = labels_HW.shape
    center = (int(rng.integers(width)), int(rng.integers(height)))
    radius = rng.uniform(0.08, 0.25, size=2) * min(height, width)
    turn_degrees = int(rng.integers(180))
    step_degrees = 10 if rng.random() < 0.5 else 120
    axes = (int(radius[0]) + 1, int(radius[1]) + 1)
    corners = np.array(cv2.ellipse2Poly(center, axes, turn_degrees, 0, 360, step_degrees), np.int32)
    cv2.fillPoly(labels_HW, [corners], label)
    cv2.polylines(labels_HW, [corners], True, IGNORE_INDEX)

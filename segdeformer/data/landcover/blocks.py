"""The Earth cut into blocks: which pixels train, which validate, and how training windows are drawn.

The map is one image of 2700 x 5400 px, 15 px a degree, 90 N and 180 W at the top left. Its labelled
part, 84 N to 60 S, is cut into 18 x 45 square blocks of 8 degrees. Of every five blocks one validates,
a knight's move from the next, so that no two of them touch along an edge and every region of the Earth
is seen in training. Validation tiles are whole blocks; a training window never touches one.

Axes: H W image size, 3 RGB.
"""

from functools import cache
from importlib.resources import files
from typing import NamedTuple

import cv2
import numpy as np

NUM_CLASSES = 8
WATER = 0
IGNORE = 255

PX_PER_DEGREE = 15
BLOCK_PX = 8 * PX_PER_DEGREE
BLOCK_ROWS, BLOCK_COLUMNS = 18, 45
TOP_PX = 6 * PX_PER_DEGREE  # 84 N; the last row of blocks ends at 60 S
MAX_WINDOW_PX = 224  # 240 fits between held-out blocks, but in so few places that drawing takes seconds
MIN_TILE_LAND = 0.02  # validation blocks with a smaller share of land are open sea and are not evaluated


class Landcover(NamedTuple):
    image_HW3: np.ndarray  # uint8 RGB, NASA Blue Marble
    labels_HW: np.ndarray  # uint8 ids as in classes.toml, MODIS MCD12C1 2019; 255 is ignored


class Tile(NamedTuple):
    """A rectangle of pixels of the map."""

    top: int
    left: int
    height: int
    width: int


@cache
def load() -> Landcover:
    """The whole map, (2700, 5400, 3) and (2700, 5400) uint8, read once and not writable."""
    folder = files(__package__)
    image_HW3 = _decode(folder.joinpath("image.jpg").read_bytes(), cv2.IMREAD_COLOR)[:, :, ::-1]
    labels_HW = _decode(folder.joinpath("labels.png").read_bytes(), cv2.IMREAD_UNCHANGED)
    image_HW3 = np.ascontiguousarray(image_HW3)
    image_HW3.setflags(write=False)
    labels_HW.setflags(write=False)
    return Landcover(image_HW3, labels_HW)


def _decode(data: bytes, mode: int) -> np.ndarray:
    pixels = cv2.imdecode(np.frombuffer(data, np.uint8), mode)
    assert pixels is not None  # both files ship with the package
    return pixels


def cut(tile: Tile) -> Landcover:
    """The map inside a tile, (height, width, 3) and (height, width) uint8: views, not copies."""
    inside = np.s_[tile.top : tile.top + tile.height, tile.left : tile.left + tile.width]
    image_HW3, labels_HW = load()
    return Landcover(image_HW3[inside], labels_HW[inside])


def is_val_block(row: int, column: int) -> bool:
    """The split: a knight's-move lattice, the one of ten that divides the eight classes most
    evenly (19 to 23 % of the pixels of each validate, no tile holds more than 36 % of those)."""
    return (3 * row + column) % 5 == 4


def train_blocks() -> tuple[Tile, ...]:
    """The 648 blocks that may be trained on, row by row."""
    return _blocks(val=False)


def val_blocks() -> tuple[Tile, ...]:
    """The 162 blocks that are held out, row by row, open sea included."""
    return _blocks(val=True)


def _blocks(*, val: bool) -> tuple[Tile, ...]:
    return tuple(
        Tile(TOP_PX + row * BLOCK_PX, column * BLOCK_PX, BLOCK_PX, BLOCK_PX)
        for row in range(BLOCK_ROWS)
        for column in range(BLOCK_COLUMNS)
        if is_val_block(row, column) == val
    )


@cache
def val_tiles() -> tuple[Tile, ...]:
    """The 78 held-out blocks of 120 x 120 px with at least 2 % of land: what an evaluation goes through."""
    return tuple(block for block in val_blocks() if land_share(cut(block).labels_HW) >= MIN_TILE_LAND)


def land_share(labels_HW: np.ndarray) -> float:
    """The fraction of pixels that have a class other than water."""
    return float(np.mean((labels_HW != WATER) & (labels_HW != IGNORE)))


def touches_val(tile: Tile) -> bool:
    """Whether any pixel of the tile lies in a held-out block."""
    first_row = max((tile.top - TOP_PX) // BLOCK_PX, 0)
    last_row = min((tile.top + tile.height - 1 - TOP_PX) // BLOCK_PX, BLOCK_ROWS - 1)
    first_column, last_column = tile.left // BLOCK_PX, (tile.left + tile.width - 1) // BLOCK_PX
    return any(
        is_val_block(row, column)
        for row in range(first_row, last_row + 1)
        for column in range(first_column, last_column + 1)
    )


def sample_window(rng: np.random.Generator, *, size_px: int, min_land: float = 0.25) -> Tile:
    """A square training window, drawn again until it touches no held-out block and holds enough land.

    Uniform over such windows, and a function of the generator's state alone. A window may reach beyond
    84 N, where the image goes on and labels are ignored: else few would hold the north of Greenland.
    """
    if not 1 <= size_px <= MAX_WINDOW_PX:
        raise ValueError(
            f"a landcover window of {size_px} px was asked for; it can be 1 to {MAX_WINDOW_PX} px"
        )
    height, width = load().labels_HW.shape
    while True:
        top, left = int(rng.integers(height - size_px + 1)), int(rng.integers(width - size_px + 1))
        tile = Tile(top, left, size_px, size_px)
        if not touches_val(tile) and land_share(cut(tile).labels_HW) >= min_land:
            return tile

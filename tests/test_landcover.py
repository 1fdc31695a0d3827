"""The data set that ships: its bytes, its classes, its split, its sampling, and places everybody knows."""

import hashlib
import subprocess
import sys
import tomllib
from importlib.resources import files

import numpy as np
import pytest

from segdeformer.data.landcover import blocks
from segdeformer.data.landcover.blocks import Tile

FOLDER = files("segdeformer.data.landcover")
NAMES = ("water", "forest", "shrubland", "savanna", "grassland", "cropland", "barren", "snow and ice")
PIXELS = (8_257_892, 521_139, 413_828, 720_952, 765_900, 318_361, 453_394, 167_096)
IGNORED_PIXELS = 2_961_438


def coverage(tiles) -> np.ndarray:
    """How many of the tiles each pixel of the map is in."""
    count_HW = np.zeros(blocks.load().labels_HW.shape, int)
    for tile in tiles:
        count_HW[tile.top : tile.top + tile.height, tile.left : tile.left + tile.width] += 1
    return count_HW


def pixels_of_each_class(labels_HW) -> np.ndarray:
    return np.bincount(labels_HW.ravel(), minlength=256)[: blocks.NUM_CLASSES]


@pytest.mark.parametrize(
    ("name", "sha256"),
    [
        ("image.jpg", "10f5389b365d7ece89f68a73ce5653fb5692145fde181fc64596d0d87cb89bb8"),
        ("labels.png", "9e662efa037abe6d8a39e95244c7410219aac9e59d48f2d58239b38fb801c9f9"),
    ],
)
def test_files_are_the_ones_that_provenance_names(name, sha256):
    assert hashlib.sha256(FOLDER.joinpath(name).read_bytes()).hexdigest() == sha256
    assert sha256 in FOLDER.joinpath("PROVENANCE.md").read_text(encoding="utf-8")


def test_map_is_rgb_and_cannot_be_written_to():
    image_HW3, labels_HW = blocks.load()
    assert image_HW3.shape == (2700, 5400, 3) and labels_HW.shape == (2700, 5400)
    assert image_HW3.dtype == labels_HW.dtype == np.uint8
    red, _, blue = image_HW3[labels_HW == blocks.WATER].mean(axis=0)
    assert blue > 3 * red
    with pytest.raises(ValueError, match="read-only"):
        labels_HW[0, 0] = 0


def test_class_counts_are_the_published_ones():
    labels_HW = blocks.load().labels_HW
    assert tuple(pixels_of_each_class(labels_HW)) == PIXELS
    assert np.sum(labels_HW == blocks.IGNORE) == IGNORED_PIXELS
    assert sum(PIXELS) + IGNORED_PIXELS == labels_HW.size


def test_classes_toml_names_and_colours_every_class():
    classes = tomllib.loads(FOLDER.joinpath("classes.toml").read_text(encoding="utf-8"))
    assert tuple(classes["names"]) == NAMES
    assert len({tuple(color) for color in classes["colors"]}) == blocks.NUM_CLASSES
    assert all(0 <= value <= 255 for color in classes["colors"] for value in color)


@pytest.mark.parametrize(
    ("latitude", "longitude", "name"),
    [
        (23, 10, "barren"),  # Sahara
        (41, 104, "barren"),  # Gobi
        (-5, -65, "forest"),  # Amazon
        (0, 22, "forest"),  # Congo
        (72, -40, "snow and ice"),  # Greenland
        (42, -94, "cropland"),  # Iowa
        (27, 80, "cropland"),  # plain of the Ganges
        (-25, 125, "shrubland"),  # Australia
        (46, 107, "grassland"),  # Mongolia
        (62, 100, "savanna"),  # thin taiga of Siberia
        (0, -140, "water"),  # Pacific
    ],
)
def test_known_places_have_their_class(latitude, longitude, name):
    row, column = (90 - latitude) * blocks.PX_PER_DEGREE, (longitude + 180) * blocks.PX_PER_DEGREE
    around = blocks.cut(Tile(row - 7, column - 7, 15, 15)).labels_HW
    assert np.mean(around == NAMES.index(name)) > 0.9


def test_coastlines_of_image_and_labels_coincide():
    """Shelf water is far bluer than land: the contrast across the labels' coast falls if they are shifted."""
    italy = np.s_[640:800, 2790:3000]
    image_HW3, labels_HW = blocks.load()
    blueness_HW = image_HW3[:, :, 2].astype(int) - image_HW3[:, :, 0]

    def contrast(down_px: int, right_px: int) -> float:
        water_HW = np.roll(labels_HW, (down_px, right_px), (0, 1))[italy] == blocks.WATER
        return blueness_HW[italy][water_HW].mean() - blueness_HW[italy][~water_HW].mean()

    shifts = [(down, right) for down in (-2, 0, 2) for right in (-2, 0, 2)]
    assert max(shifts, key=lambda shift: contrast(*shift)) == (0, 0)


def test_every_labelled_pixel_is_in_exactly_one_split():
    train_HW, val_HW = coverage(blocks.train_blocks()), coverage(blocks.val_blocks())
    assert np.array_equal(np.unique(train_HW + val_HW), [0, 1])
    assert np.all(blocks.load().labels_HW[train_HW + val_HW == 0] == blocks.IGNORE)
    assert len(blocks.train_blocks()) == 648 and len(blocks.val_blocks()) == 162


def test_every_class_is_well_represented_in_both_splits():
    held_out = sum(pixels_of_each_class(blocks.cut(tile).labels_HW) for tile in blocks.val_blocks())
    shares = held_out / np.array(PIXELS)
    assert np.all((shares > 0.18) & (shares < 0.24))


def test_no_tile_decides_a_class_alone():
    counts = np.array([pixels_of_each_class(blocks.cut(tile).labels_HW) for tile in blocks.val_tiles()])
    assert np.all(counts.max(axis=0) / counts.sum(axis=0) < 0.37)


def test_validation_tiles_hold_nearly_all_held_out_land():
    tiles = blocks.val_tiles()
    assert len(tiles) == 78 and set(tiles) < set(blocks.val_blocks())
    land_HW = coverage(blocks.val_blocks()).astype(bool) & (blocks.load().labels_HW < blocks.IGNORE)
    land_HW &= blocks.load().labels_HW != blocks.WATER
    assert coverage(tiles)[land_HW].mean() > 0.99


@pytest.mark.parametrize("size_px", [1, 63, 128, 192])
def test_training_windows_avoid_held_out_blocks_and_open_sea(size_px):
    rng = np.random.default_rng(0)
    held_out_HW = coverage(blocks.val_blocks())
    for _ in range(50):
        tile = blocks.sample_window(rng, size_px=size_px, min_land=0.25)
        assert (tile.height, tile.width) == (size_px, size_px)
        assert blocks.cut(tile).labels_HW.shape == (size_px, size_px)
        assert coverage([tile])[held_out_HW == 1].sum() == 0
        assert blocks.land_share(blocks.cut(tile).labels_HW) >= 0.25


@pytest.mark.parametrize("tile", [blocks.val_blocks()[20], blocks.val_blocks()[90]])
def test_touching_a_held_out_block_by_one_pixel_counts(tile):
    above, left = tile.top - 64, tile.left - 64
    assert blocks.touches_val(Tile(above, tile.left, 65, 10))
    assert not blocks.touches_val(Tile(above, tile.left, 64, 10))
    assert blocks.touches_val(Tile(tile.top, left, 10, 65))
    assert not blocks.touches_val(Tile(tile.top, left, 10, 64))


def test_a_window_depends_on_the_generator_alone():
    def windows(seed):
        rng = np.random.default_rng(seed)
        return [blocks.sample_window(rng, size_px=96) for _ in range(20)]

    first = windows(1)
    windows(2)
    assert windows(1) == first != windows(2)


def test_four_thousand_windows_cover_most_land_of_the_train_blocks():
    rng = np.random.default_rng(0)
    seen_HW = coverage(blocks.sample_window(rng, size_px=128) for _ in range(4096)) > 0
    land_HW = np.isin(blocks.load().labels_HW, range(1, blocks.NUM_CLASSES))
    train_land_HW = land_HW & (coverage(blocks.train_blocks()) == 1)
    assert seen_HW[train_land_HW].mean() > 0.9


def test_a_window_that_cannot_exist_is_refused():
    with pytest.raises(ValueError, match=r"400 px .* 1 to 224 px"):
        blocks.sample_window(np.random.default_rng(0), size_px=400)


def test_importing_the_data_set_does_not_import_torch():
    code = "import sys, segdeformer.data.landcover.blocks; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)

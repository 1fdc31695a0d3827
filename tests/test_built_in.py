"""The data sets that need no folder: deterministic, learnable, their splits disjoint."""

import colorsys

import numpy as np
import pytest

from segdeformer.data.built_in import LandcoverDataset, SyntheticDataset
from segdeformer.errors import UserError


def test_synthetic_samples_are_a_function_of_split_and_index():
    first, again = SyntheticDataset("train").read(3), SyntheticDataset("train").read(3)
    np.testing.assert_array_equal(first.image_HW3, again.image_HW3)
    np.testing.assert_array_equal(first.labels_HW, again.labels_HW)
    other = SyntheticDataset("val").read(3)
    assert first.labels_HW.shape != other.labels_HW.shape or (first.labels_HW != other.labels_HW).any()


def test_synthetic_samples_have_odd_sizes_all_classes_and_some_ignored_pixels():
    dataset = SyntheticDataset("train", num_classes=7, num_images=20, size_hw=(63, 111))
    samples = [dataset.read(index) for index in range(len(dataset))]
    shapes = {sample.labels_HW.shape for sample in samples}
    assert len(shapes) > 5
    assert all(height % 2 == width % 2 == 1 and height <= 63 and width <= 111 for height, width in shapes)
    assert set(np.unique(np.concatenate([s.labels_HW.ravel() for s in samples]))) == {*range(7), 255}
    with pytest.raises(IndexError):
        dataset.read(20)


def test_synthetic_classes_can_be_told_apart_by_hue():
    dataset = SyntheticDataset("train")
    sample = dataset.read(0)
    for label in range(1, 5):
        if (sample.labels_HW == label).sum() > 100:
            seen = sample.image_HW3[sample.labels_HW == label].mean(axis=0) / 255
            meant = np.array(dataset.classes.colors[label]) / 255
            difference = abs(colorsys.rgb_to_hsv(*seen)[0] - colorsys.rgb_to_hsv(*meant)[0])
            assert min(difference, 1 - difference) < 0.08


def test_landcover_windows_hold_land_and_never_show_a_held_out_pixel():
    train, val = LandcoverDataset("train"), LandcoverDataset("val")
    assert (len(train), len(val)) == (32_768, 78)
    held_out = np.zeros((2700, 5400), bool)
    for index in range(len(val)):
        sample = val.read(index)
        top, left = map(int, sample.name.removeprefix("row").split("_column"))
        held_out[top : top + 120, left : left + 120] = True
    for index in range(0, len(train), 331):
        sample = train.read(index)
        top, left = map(int, sample.name.removeprefix("row").split("_column"))
        assert not held_out[top : top + 128, left : left + 128].any()
        assert sample.labels_HW.shape == (128, 128)
        assert np.mean((sample.labels_HW > 0) & (sample.labels_HW < 8)) >= 0.25
        np.testing.assert_array_equal(sample.image_HW3, train.read(index).image_HW3)


def test_landcover_has_two_splits():
    with pytest.raises(UserError, match="landcover has no split `test`; it has `train` and `val`"):
        LandcoverDataset("test")

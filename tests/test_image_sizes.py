"""Images much larger than what a model is trained on: found by their headers, said before training."""

import cv2
import numpy as np
import pytest
from PIL import Image

from segdeformer.cli.train_show import size_advice
from segdeformer.config import DataConfig, Recipe, load_recipe
from segdeformer.data.built_in import SyntheticDataset
from segdeformer.data.datasets import open_dataset, typical_size
from segdeformer.data.images import image_size, read_image


def folder_of(root, sizes):
    """A folder data set with training images of these (height, width)."""
    for kind in ("images/train", "labels/train"):
        (root / kind).mkdir(parents=True)
    for index, (height, width) in enumerate(sizes):
        cv2.imwrite(str(root / f"images/train/{index}.png"), np.zeros((height, width, 3), np.uint8))
        cv2.imwrite(str(root / f"labels/train/{index}.png"), np.zeros((height, width), np.uint8))
    (root / "classes.toml").write_text('names = ["a", "b"]\n')
    return open_dataset(DataConfig(name="folder", root=str(root)), "train")


def recipe(**changes):
    values = load_recipe("folder").model_dump(exclude_none=True)
    for key, value in changes.items():
        table, name = key.split("__")
        values[table][name] = value
    return Recipe.model_validate(values)


def test_a_size_is_that_of_the_image_as_it_is_read_and_none_of_what_is_no_image(tmp_path):
    pixels = np.zeros((20, 31, 3), np.uint8)
    for orientation, size in [(1, (20, 31)), (3, (20, 31)), (6, (31, 20)), (8, (31, 20))]:
        exif = Image.Exif()
        exif[0x0112] = orientation
        path = tmp_path / f"{orientation}.jpg"
        Image.fromarray(pixels).save(path, exif=exif)
        assert image_size(path) == size == read_image(path).shape[:2]
    (tmp_path / "text.png").write_text("no image")
    assert image_size(tmp_path / "text.png") is None
    assert image_size(tmp_path / "absent.png") is None


def test_the_typical_size_is_the_median_of_each_side(tmp_path):
    assert typical_size(folder_of(tmp_path, [(10, 90), (30, 70), (20, 80)])) == (20, 80)
    assert typical_size(SyntheticDataset("train")) is None


@pytest.mark.parametrize(
    ("size", "changes", "told"),
    [
        ((320, 320), {}, ""),  # 1.25 crops
        ((256, 200), {}, ""),
        ((1500, 2000), {"augment__resize_to": (512, 512)}, ""),
        (
            (321, 300),
            {},
            "note: images are 300 x 321 px; a crop of 256 x 256 shows 68% of one, and they are evaluated in "
            "windows of 256 x 256. To show more: a larger augment.crop, with evaluate.window as large",
        ),
        (
            (1500, 2000),
            {"evaluate__mode": "whole"},
            "note: images are 2000 x 1500 px; a crop of 256 x 256 shows 2% of one, and they are evaluated "
            "whole. To show more: a larger augment.crop, with evaluate.window as large, or augment.resize_to "
            "and evaluate.resize_to = [512, 384]",
        ),
    ],
)
def test_train_says_what_share_of_an_image_a_crop_shows_and_what_to_set(tmp_path, size, changes, told):
    assert size_advice(recipe(**changes), folder_of(tmp_path, [size])) == told

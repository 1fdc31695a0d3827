"""Transforms against values worked out by hand or in float64."""

import colorsys

import numpy as np
import pytest

from segdeformer.config import AugmentConfig, DataConfig, EvalConfig
from segdeformer.data.built_in import SyntheticDataset
from segdeformer.data.samples import Sample
from segdeformer.data.transforms import (
    Crop,
    augment,
    distort_colors,
    fill,
    fit_size,
    normalise,
    one_class_dominates,
    random_crop,
    random_flips,
    random_resize,
    resize_for_eval,
    scale_levels,
    scale_saturation,
    shift_hue,
)

MEAN, STD = DataConfig(name="synthetic").mean, DataConfig(name="synthetic").std


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def address_sample(height: int, width: int) -> Sample:
    """Every pixel knows its row and column, and its label follows from them."""
    rows, columns = np.mgrid[:height, :width].astype(np.uint8)
    return Sample(np.stack([rows, columns, rows ^ columns], axis=-1), (rows + columns) % 7, "address")


def labels_follow(image_HW3: np.ndarray, labels_HW: np.ndarray) -> bool:
    return bool(((image_HW3[:, :, 0] + image_HW3[:, :, 1]) % 7 == labels_HW).all())


class Script:
    """A generator whose coins and uniform draws are written down beforehand."""

    def __init__(self, coins: str, *amounts: float) -> None:
        self.coins = iter(coins)
        self.amounts = iter(amounts)
        self.ranges: list[tuple[float, float]] = []

    def random(self) -> float:
        return {"H": 0.49, "T": 0.51}[next(self.coins)]

    def uniform(self, low: float, high: float) -> float:
        self.ranges.append((low, high))
        return next(self.amounts)

    def integers(self, low: int, high: int, *, endpoint: bool) -> int:
        assert endpoint
        self.ranges.append((low, high))
        return int(next(self.amounts))


# Resize


@pytest.mark.parametrize(
    ("size_hw", "resize_to", "ratio", "expected"),
    [
        # (512, 683) fits (2048, 512) as it is; the short edge decides.
        ((512, 683), (2048, 512), 1.0, (512, 683)),
        ((512, 683), (2048, 512), 0.5, (256, 342)),  # 341.5 rounds up
        # Edges 2805 and 701 (cut, not rounded); factor 701 / 375 makes 934.67.
        ((375, 500), (2048, 512), 1.37, (701, 935)),
        # A panorama: the long edge decides, 2048 / 3000.
        ((500, 3000), (2048, 512), 1.0, (341, 2048)),
        ((1024, 2048), (2048, 1024), 2.0, (2048, 4096)),
        # No target: edges 91 and 67; factor 67 / 97 makes 90.48.
        ((97, 131), None, 0.7, (67, 90)),
        ((97, 131), None, 1.0, (97, 131)),
        ((3, 2), None, 0.1, (1, 1)),
    ],
)
def test_sizes_are_rounded_as_mmcv_rounds_them(size_hw, resize_to, ratio, expected):
    assert fit_size(size_hw, resize_to, ratio=ratio) == expected
    assert fit_size(size_hw[::-1], resize_to, ratio=ratio) == expected[::-1]


def test_the_ratio_is_drawn_from_the_whole_range():
    config = AugmentConfig(resize_to=(200, 100), ratio_range=(0.5, 2.0))
    chance = rng()
    heights = [random_resize(address_sample(50, 75), config, chance).labels_HW.shape[0] for _ in range(1000)]
    assert min(heights) < 55
    assert max(heights) > 195
    assert 121 < np.mean(heights) < 129  # three standard errors


def bilinear(image_HW3: np.ndarray, height: int, width: int) -> np.ndarray:
    """Half-pixel centres, edges repeated, float64."""
    out = image_HW3.astype(np.float64)
    for axis, size in ((0, height), (1, width)):
        have = out.shape[axis]
        at = np.clip((np.arange(size) + 0.5) * have / size - 0.5, 0, have - 1)
        low = np.floor(at).astype(int)
        share = (at - low).reshape([-1 if a == axis else 1 for a in range(3)])
        high = np.minimum(low + 1, have - 1)
        out = out.take(low, axis) * (1 - share) + out.take(high, axis) * share
    return out


@pytest.mark.parametrize("ratio", [0.5, 0.83, 1.71])
def test_images_are_resized_bilinearly_and_labels_to_the_nearest(ratio):
    image = rng().integers(0, 256, (37, 53, 3), dtype=np.uint8)
    labels = rng().choice(np.array([0, 3, 255], np.uint8), (37, 53))
    config = AugmentConfig(ratio_range=(ratio, ratio))
    resized = random_resize(Sample(image, labels, ""), config, rng())
    height, width = resized.labels_HW.shape
    assert (height, width) == fit_size((37, 53), None, ratio=ratio)
    assert np.abs(resized.image_HW3 - bilinear(image, height, width)).max() <= 1.0
    rows, columns = np.arange(height) * 37 // height, np.arange(width) * 53 // width
    np.testing.assert_array_equal(resized.labels_HW, labels[rows[:, None], columns])


# Crop


@pytest.mark.parametrize(
    ("counts", "dominated"),
    [
        ({0: 75, 1: 25}, True),  # a share must be below 0.75
        ({0: 74, 1: 26}, False),
        ({3: 100}, True),
        ({255: 100}, True),
        ({255: 90, 0: 5, 1: 5}, False),  # only valid pixels count
        ({255: 60, 0: 39, 1: 1}, True),
        ({0: 74, 1: 1, 254: 25}, False),
    ],
)
def test_a_class_dominates_from_its_share_of_the_valid_pixels(counts, dominated):
    labels = np.repeat(list(counts), list(counts.values())).astype(np.uint8).reshape(10, 10)
    assert one_class_dominates(labels, 0.75) is dominated


def test_image_and_labels_are_cropped_alike_anywhere():
    config = AugmentConfig(crop=(21, 33), max_class_share=1.0)
    corners = set()
    for seed in range(400):
        crop = random_crop(address_sample(29, 37), config, rng(seed))
        assert crop.labels_HW.shape == (21, 33)
        assert labels_follow(crop.image_HW3, crop.labels_HW)
        corners.add((int(crop.image_HW3[0, 0, 0]), int(crop.image_HW3[0, 0, 1])))
    assert corners == {(top, left) for top in range(9) for left in range(5)}


def test_a_crop_larger_than_the_image_takes_all_of_it():
    crop = random_crop(address_sample(19, 50), AugmentConfig(crop=(32, 32)), rng())
    assert crop.labels_HW.shape == (19, 32)
    assert crop.image_HW3[0, 0, 0] == 0


def test_crops_are_redrawn_until_no_class_dominates():
    labels = np.zeros((40, 200), np.uint8)
    labels[:, 100:] = 1
    sample = Sample(np.zeros((40, 200, 3), np.uint8), labels, "")
    shares = []
    for share in (0.75, 1.0):
        config = AugmentConfig(crop=(40, 40), max_class_share=share)
        crops = [random_crop(sample, config, rng(seed)).labels_HW for seed in range(300)]
        shares.append(np.mean([one_class_dominates(crop, 0.75) for crop in crops]))
    # 19 of 161 places will do: one draw fails with 0.882, eleven in a row with 0.251.
    assert shares[0] == pytest.approx(0.251, abs=0.06)
    assert shares[1] == pytest.approx(0.882, abs=0.06)


def test_the_eleventh_draw_stands_when_nothing_will_do():
    class Counting:
        draws = 0

        def integers(self, high: int) -> int:
            self.draws += 1
            return self.draws % high

    counting = Counting()
    sample = address_sample(50, 60)._replace(labels_HW=np.zeros((50, 60), np.uint8))
    crop = random_crop(sample, AugmentConfig(crop=(16, 16)), counting)
    assert counting.draws == 2 * 11
    assert tuple(crop.image_HW3[0, 0, :2]) == (21, 22)


# Flips and turns


@pytest.mark.parametrize(("horizontal", "vertical"), [(0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (1.0, 1.0)])
def test_flips_mirror_image_and_labels(horizontal, vertical):
    sample = address_sample(5, 9)
    flipped = random_flips(sample, AugmentConfig(horizontal_flip=horizontal, vertical_flip=vertical), rng())
    step = np.s_[:: -1 if vertical else 1, :: -1 if horizontal else 1]
    np.testing.assert_array_equal(flipped.image_HW3, sample.image_HW3[step])
    np.testing.assert_array_equal(flipped.labels_HW, sample.labels_HW[step])


def test_half_of_the_samples_are_flipped():
    chance = rng()
    flipped = [
        random_flips(address_sample(3, 5), AugmentConfig(), chance).image_HW3[0, 0, 1] == 4
        for _ in range(1000)
    ]
    assert np.mean(flipped) == pytest.approx(0.5, abs=0.048)


def test_quarter_turns_take_all_four_directions_alike():
    config = AugmentConfig(horizontal_flip=0, quarter_turns=True, crop=(9, 9))
    first_pixels = set()
    for seed in range(40):
        turned = random_flips(address_sample(9, 9), config, rng(seed))
        assert labels_follow(turned.image_HW3, turned.labels_HW)
        first_pixels.add(tuple(turned.image_HW3[0, 0, :2]))
    assert first_pixels == {(0, 0), (0, 8), (8, 8), (8, 0)}


# Photometric distortion


def test_levels_are_scaled_shifted_clipped_and_truncated():
    levels = np.array([0, 1, 101, 200, 255], np.uint8)
    np.testing.assert_array_equal(scale_levels(levels, gain=0.5), [0, 0, 50, 100, 127])
    np.testing.assert_array_equal(scale_levels(levels, gain=1.5), [0, 1, 151, 255, 255])
    np.testing.assert_array_equal(scale_levels(levels, shift=-31.5), [0, 0, 69, 168, 223])
    np.testing.assert_array_equal(scale_levels(levels, shift=31.9), [31, 32, 132, 231, 255])


def in_hsv(image_HW3: np.ndarray, change) -> np.ndarray:
    """Change (hue, saturation, value) of every pixel in float64, each in 0...1."""
    pixels = image_HW3.reshape(-1, 3) / 255
    changed = [colorsys.hsv_to_rgb(*change(*colorsys.rgb_to_hsv(*pixel))) for pixel in pixels]
    return np.array(changed).reshape(image_HW3.shape) * 255


@pytest.mark.parametrize("gain", [0.5, 1.0, 1.5])
def test_saturation_is_scaled_in_hsv(gain):
    image = rng().integers(0, 256, (11, 13, 3), dtype=np.uint8)
    expected = in_hsv(image, lambda hue, saturation, value: (hue, min(1, saturation * gain), value))
    # 8-bit HSV: hue to 2 degrees is up to 255 / 60 levels, saturation up to 1.
    difference = np.abs(scale_saturation(image, gain) - expected)
    assert difference.max() <= 6
    assert difference.mean() < 1.5


@pytest.mark.parametrize("steps", [-18, 7, 18])
def test_hue_turns_by_two_degrees_a_step(steps):
    image = rng().integers(0, 256, (11, 13, 3), dtype=np.uint8)
    expected = in_hsv(image, lambda hue, saturation, value: ((hue + steps / 180) % 1, saturation, value))
    difference = np.abs(shift_hue(image, steps) - expected)
    assert difference.max() <= 6
    assert difference.mean() < 1.5


def test_hue_goes_round_the_circle():
    red, green = np.array([[[255, 0, 0]]], np.uint8), np.array([[[0, 255, 0]]], np.uint8)
    np.testing.assert_array_equal(shift_hue(red, 60), green)
    np.testing.assert_array_equal(shift_hue(green, -60), red)
    np.testing.assert_array_equal(shift_hue(red, -120), green)


def test_contrast_comes_before_or_after_the_hsv_steps():
    image = rng().integers(0, 256, (5, 7, 3), dtype=np.uint8)
    # Coins: brightness, contrast last?, [contrast,] saturation, hue[, contrast].
    first = Script("HTHHH", 20.0, 1.4, 0.6, -11)
    expected = scale_levels(scale_levels(image, shift=20.0), gain=1.4)
    expected = shift_hue(scale_saturation(expected, 0.6), -11)
    np.testing.assert_array_equal(distort_colors(image, first), expected)
    assert first.ranges == [(-32, 32), (0.5, 1.5), (0.5, 1.5), (-18, 18)]

    last = Script("HHHHH", 20.0, 0.6, -11, 1.4)
    expected = shift_hue(scale_saturation(scale_levels(image, shift=20.0), 0.6), -11)
    np.testing.assert_array_equal(distort_colors(image, last), scale_levels(expected, gain=1.4))
    assert last.ranges == [(-32, 32), (0.5, 1.5), (-18, 18), (0.5, 1.5)]


def test_each_distortion_happens_with_probability_one_half():
    grey = np.full((1, 1, 3), 100, np.uint8)  # hue and saturation do not touch grey
    chance = rng()
    kept = [distort_colors(grey, chance)[0, 0, 0] == 100 for _ in range(4000)]
    assert np.mean(kept) == pytest.approx(0.257, abs=0.021)  # 1/4, and truncation undoes small changes


# Normalise and pad


def test_normalise_equals_its_formula_in_float64():
    image = rng().integers(0, 256, (5, 7, 3), dtype=np.uint8)
    got = normalise(image, MEAN, STD)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, (image - np.array(MEAN)) / np.array(STD), rtol=0, atol=5e-7)


def test_padding_is_zero_after_normalising_and_ignored():
    image, labels = np.full((3, 4, 3), 9, np.uint8), np.full((3, 4), 2, np.uint8)
    crop = Crop(np.full((3, 5, 9), np.nan, np.float32), np.full((5, 9), 7, np.uint8))
    fill(crop, image, labels, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    assert (crop.image_3HW[:, :3, :4] == 9).all()
    assert (crop.labels_HW[:3, :4] == 2).all()
    assert crop.image_3HW.sum() == 9 * 36
    assert (crop.labels_HW == 255).sum() == 45 - 12


# All together


def test_augment_without_chance_is_normalise_and_pad():
    config = AugmentConfig(ratio_range=(1, 1), crop=(32, 64), horizontal_flip=0, photometric=False)
    sample = address_sample(21, 33)
    crop = augment(sample, config, DataConfig(name="synthetic"), rng())
    expected = (sample.image_HW3 - np.array(MEAN)) / np.array(STD)
    np.testing.assert_allclose(crop.image_3HW[:, :21, :33], expected.transpose(2, 0, 1), rtol=0, atol=5e-7)
    np.testing.assert_array_equal(crop.labels_HW[:21, :33], sample.labels_HW)


def test_augment_depends_on_the_generator_alone_and_leaves_the_sample_as_it_was():
    config = AugmentConfig(crop=(63, 63), vertical_flip=0.5, quarter_turns=True)
    sample = SyntheticDataset("train").read(1)
    for pixels in sample[:2]:
        pixels.setflags(write=False)  # as the map of `landcover` is
    crops = [augment(sample, config, DataConfig(name="synthetic"), rng(seed)) for seed in (5, 5, 6)]
    np.testing.assert_array_equal(crops[0].image_3HW, crops[1].image_3HW)
    np.testing.assert_array_equal(crops[0].labels_HW, crops[1].labels_HW)
    assert (crops[0].image_3HW != crops[2].image_3HW).any()
    assert crops[0].image_3HW.dtype == np.float32
    assert crops[0].labels_HW.dtype == np.uint8
    assert set(np.unique(crops[0].labels_HW)) <= {*range(5), 255}


# Evaluation


@pytest.mark.parametrize(
    ("size_hw", "config", "scale", "expected"),
    [
        ((512, 683), EvalConfig(), 1.0, (512, 683)),
        ((512, 683), EvalConfig(multiple_of=32), 1.0, (512, 704)),
        ((300, 400), EvalConfig(resize_to=(2048, 512)), 1.0, (512, 683)),
        ((300, 400), EvalConfig(resize_to=(2048, 512), multiple_of=32), 1.75, (896, 1216)),
        ((97, 131), EvalConfig(), 0.5, (48, 65)),
    ],
)
def test_evaluation_sizes_keep_the_ratio_and_round_up_to_the_multiple(size_hw, config, scale, expected):
    image = rng().integers(0, 256, (*size_hw, 3), dtype=np.uint8)
    got = resize_for_eval(image, config, scale=scale)
    assert got.shape == (*expected, 3)
    assert got.dtype == np.uint8
    assert np.abs(got - bilinear(image, *expected)).max() <= 1.0

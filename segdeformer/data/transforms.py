"""From a sample to a training crop, and from an image to an evaluation input.

The training pipeline is mmsegmentation's, in its order: resize, crop, flips and turns, photometric
distortion, normalise, pad. Every function is pure; whoever calls it owns the random generator.

H W image size (of that moment), 3 RGB.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import cv2
import numpy as np

from segdeformer.config import IGNORE_INDEX, AugmentConfig, DataConfig, EvalConfig, TransformConfig
from segdeformer.data.datasets import level_counts
from segdeformer.data.samples import Sample
from segdeformer.plugins import bound_part, explained, refuse

CROP_REDRAWS = 10
BRIGHTNESS_SHIFT = 32.0
CONTRAST_GAIN = (0.5, 1.5)
SATURATION_GAIN = (0.5, 1.5)
HUE_STEPS, HUES = 18, 180  # OpenCV's 8-bit hue counts in 2 degrees

Size = tuple[int, int]


class Crop(NamedTuple):
    """What the model is trained on; both have the size of the crop."""

    image_3HW: np.ndarray  # float32, normalised; 0 where padded
    labels_HW: np.ndarray  # uint8; 255 where padded


def augment(
    sample: Sample,
    config: AugmentConfig,
    data: DataConfig,
    rng: np.random.Generator,
    *,
    out: Crop | None = None,
) -> Crop:
    """One random training crop of the sample, in `out` if given; a function of sample and generator state."""
    sample = random_resize(sample, config, rng)
    sample = random_crop(sample, config, rng)
    sample = random_flips(sample, config, rng)
    if config.photometric:
        sample = sample._replace(image_HW3=distort_colors(sample.image_HW3, rng))
    for transform in config.transforms or ():
        sample = own_transform(sample, transform, rng)
    crop = out or Crop(np.empty((3, *config.crop), np.float32), np.empty(config.crop, np.uint8))
    fill(crop, sample.image_HW3, sample.labels_HW, data.mean, data.std)
    return crop


def own_transform(sample: Sample, config: TransformConfig, rng: np.random.Generator) -> Sample:
    """A transform of one's own; raises `UsageError` when it gives anything but such an image and labels."""
    what = "transform"
    transform = _bound_transform(config.model_dump_json())
    with explained(config.path, what):
        image_HW3, labels_HW = transform(sample.image_HW3, sample.labels_HW, rng)
    arrays = (image_HW3, sample.image_HW3), (labels_HW, sample.labels_HW)
    if any(getattr(new, "shape", None) != old.shape or new.dtype != np.uint8 for new, old in arrays):
        came = [
            f"{getattr(new, 'dtype', type(new).__name__)} {getattr(new, 'shape', '')}" for new, _ in arrays
        ]
        raise refuse(config.path, what, " and ".join(came), "uint8 and the sizes that came")
    return sample._replace(image_HW3=image_HW3, labels_HW=labels_HW)


@functools.cache
def _bound_transform(config_json: str) -> Callable[..., Any]:
    config = TransformConfig.model_validate_json(config_json)
    return bound_part(config.path, "transform", config.options or {})


def random_resize(sample: Sample, config: AugmentConfig, rng: np.random.Generator) -> Sample:
    """Resize, ratio kept, to `resize_to` (or the own size) times a ratio drawn from `ratio_range`."""
    height, width = fit_size(sample.labels_HW.shape, config.resize_to, ratio=rng.uniform(*config.ratio_range))
    return sample._replace(
        image_HW3=cv2.resize(sample.image_HW3, (width, height), interpolation=cv2.INTER_LINEAR),
        labels_HW=cv2.resize(sample.labels_HW, (width, height), interpolation=cv2.INTER_NEAREST),
    )


def random_crop(sample: Sample, config: AugmentConfig, rng: np.random.Generator) -> Sample:
    """Cut out the crop, or as much as there is; redrawn while one class dominates, the last draw stands."""
    window = _random_window(sample.labels_HW.shape, config.crop, rng)
    if config.max_class_share < 1:
        for _ in range(CROP_REDRAWS):
            if not one_class_dominates(sample.labels_HW[window], config.max_class_share):
                break
            window = _random_window(sample.labels_HW.shape, config.crop, rng)
    return sample._replace(image_HW3=sample.image_HW3[window], labels_HW=sample.labels_HW[window])


def _random_window(size_hw: tuple[int, ...], crop_hw: Size, rng: np.random.Generator) -> tuple[slice, slice]:
    top, left = (
        int(rng.integers(max(have - want, 0) + 1)) for have, want in zip(size_hw, crop_hw, strict=True)
    )
    return slice(top, top + crop_hw[0]), slice(left, left + crop_hw[1])


def one_class_dominates(labels_HW: np.ndarray, max_share: float) -> bool:
    """Whether fewer than two classes are present, or the largest has `max_share` of the valid pixels."""
    counts = level_counts(labels_HW)[:IGNORE_INDEX]
    return bool(np.count_nonzero(counts) < 2 or counts.max() >= max_share * counts.sum())


def random_flips(sample: Sample, config: AugmentConfig, rng: np.random.Generator) -> Sample:
    """Mirror left-right and top-bottom with the configured probabilities, then turn by quarters."""
    image_HW3, labels_HW, _ = sample
    if rng.random() < config.horizontal_flip:
        image_HW3, labels_HW = cv2.flip(image_HW3, 1), cv2.flip(labels_HW, 1)
    if rng.random() < config.vertical_flip:
        image_HW3, labels_HW = image_HW3[::-1], labels_HW[::-1]
    if config.quarter_turns:
        turns = int(rng.integers(4))
        image_HW3, labels_HW = np.rot90(image_HW3, turns), np.rot90(labels_HW, turns)
    return sample._replace(
        image_HW3=np.ascontiguousarray(image_HW3), labels_HW=np.ascontiguousarray(labels_HW)
    )


def distort_colors(image_HW3: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Brightness, contrast, saturation and hue, each with probability 0.5; contrast comes first or last."""

    def heads() -> bool:
        return rng.random() < 0.5

    if heads():
        image_HW3 = scale_levels(image_HW3, shift=rng.uniform(-BRIGHTNESS_SHIFT, BRIGHTNESS_SHIFT))
    contrast_last = heads()
    if not contrast_last and heads():
        image_HW3 = scale_levels(image_HW3, gain=rng.uniform(*CONTRAST_GAIN))
    if heads():
        image_HW3 = scale_saturation(image_HW3, rng.uniform(*SATURATION_GAIN))
    if heads():
        image_HW3 = shift_hue(image_HW3, int(rng.integers(-HUE_STEPS, HUE_STEPS, endpoint=True)))
    if contrast_last and heads():
        image_HW3 = scale_levels(image_HW3, gain=rng.uniform(*CONTRAST_GAIN))
    return image_HW3


def scale_levels(levels: np.ndarray, *, gain: float = 1.0, shift: float = 0.0) -> np.ndarray:
    """gain * level + shift for uint8 levels, clipped to 0...255 and truncated."""
    table = np.clip(np.arange(256, dtype=np.float32) * gain + shift, 0, 255).astype(np.uint8)
    return cv2.LUT(levels, table).reshape(levels.shape)


def scale_saturation(image_HW3: np.ndarray, gain: float) -> np.ndarray:
    hsv_HW3 = cv2.cvtColor(image_HW3, cv2.COLOR_RGB2HSV)
    cv2.insertChannel(scale_levels(cv2.extractChannel(hsv_HW3, 1), gain=gain), hsv_HW3, 1)
    return cv2.cvtColor(hsv_HW3, cv2.COLOR_HSV2RGB)


def shift_hue(image_HW3: np.ndarray, steps: int) -> np.ndarray:
    """Turn the hue by `steps` of 2 degrees, round the circle."""
    hsv_HW3 = cv2.cvtColor(image_HW3, cv2.COLOR_RGB2HSV)
    table = ((np.arange(256) + steps) % HUES).astype(np.uint8)
    cv2.insertChannel(cv2.LUT(cv2.extractChannel(hsv_HW3, 0), table), hsv_HW3, 0)
    return cv2.cvtColor(hsv_HW3, cv2.COLOR_HSV2RGB)


def normalise(
    image_HW3: np.ndarray, mean: tuple[float, float, float], std: tuple[float, float, float]
) -> np.ndarray:
    """(level - mean) / std per RGB channel, float32."""
    return cv2.LUT(image_HW3, level_values(mean, std)[None])


def level_values(mean: tuple[float, float, float], std: tuple[float, float, float]) -> np.ndarray:
    """(256, 3) float32: what each level of each RGB channel becomes."""
    levels_L1 = np.arange(256, dtype=np.float32)[:, None]
    return (levels_L1 - np.array(mean, np.float32)) / np.array(std, np.float32)


def fill(
    crop: Crop,
    image_HW3: np.ndarray,
    labels_HW: np.ndarray,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
) -> None:
    """Put both at the top left of the crop, the image normalised; pad it with 0 and the labels with 255."""
    height, width = labels_HW.shape
    tables_3L = np.ascontiguousarray(level_values(mean, std).T)
    for plane_HW, levels_HW, table_L in zip(crop.image_3HW, cv2.split(image_HW3), tables_3L, strict=True):
        plane_HW[height:] = 0
        plane_HW[:height, width:] = 0
        plane_HW[:height, :width] = cv2.LUT(levels_HW, table_L)
    crop.labels_HW[height:] = IGNORE_INDEX
    crop.labels_HW[:height, width:] = IGNORE_INDEX
    crop.labels_HW[:height, :width] = labels_HW


def fit_size(size_hw: tuple[int, ...], resize_to: Size | None, *, ratio: float = 1.0) -> Size:
    """The largest (height, width) of the same shape inside `ratio` times `resize_to`, (long, short) in px.

    None stands for the size itself. Rounds as mmcv does: edges down, the result to nearest.
    """
    edges = resize_to or size_hw
    factor = min(int(max(edges) * ratio) / max(size_hw), int(min(edges) * ratio) / min(size_hw))
    height, width = (max(1, int(edge * factor + 0.5)) for edge in size_hw)
    return height, width


def resize_for_eval(image_HW3: np.ndarray, config: EvalConfig, *, scale: float = 1.0) -> np.ndarray:
    """The image at the size that the protocol evaluates, `scale` being one of its scales."""
    size_hw = fit_size(image_HW3.shape[:2], config.resize_to, ratio=scale)
    height, width = (-(-edge // config.multiple_of) * config.multiple_of for edge in size_hw)
    if (height, width) == image_HW3.shape[:2]:
        return image_HW3
    return cv2.resize(image_HW3, (width, height), interpolation=cv2.INTER_LINEAR)

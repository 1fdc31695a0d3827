"""The data of a recipe, its augmentation, and the protocol of a score."""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import AfterValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from segdeformer.config.fields import (
    PATH,
    Options,
    Positive,
    PositiveFloat,
    PythonPath,
    Share,
    SizeHW,
    SizeWH,
    Strict,
)

DataName = Literal["landcover", "folder", "ade20k", "cityscapes", "coco_stuff", "synthetic"]
EvalMode = Literal["whole", "slide", "auto"]
LARGER = 1.25  # than the window: from there on mode `auto` slides


def _known_or_own(name: str) -> str:
    names = get_args(DataName)
    if name in names or PATH.fullmatch(name):
        return name
    listed = f"{', '.join(map(repr, names[:-1]))} or {names[-1]!r}"
    raise PydanticCustomError("literal_error", "Input should be {listed}", {"listed": listed})


class DataConfig(Strict):
    """Which data, and where.

    name: one of `DataName`, or a Python path (see `protocols.OwnDataset`), which gets `root` and `options`.
    root: the data's folder; `landcover` and `synthetic` need none.
    classes: for `folder`, a TOML file of names and colours; default: classes.toml in the root.
    """

    name: Annotated[str, AfterValidator(_known_or_own)]
    root: str = ""
    classes: str | None = None
    train_split: str = "train"
    val_split: str = "val"
    mean: Annotated[tuple[float, float, float], Field(strict=False)] = (123.675, 116.28, 103.53)
    std: Annotated[tuple[PositiveFloat, PositiveFloat, PositiveFloat], Field(strict=False)] = (
        58.395,
        57.12,
        57.375,
    )
    options: Options | None = None

    @model_validator(mode="after")
    def _options_are_for_own_data(self) -> DataConfig:
        if self.options and ":" not in self.name:
            raise ValueError("`options` are for a Python path as `name`; leave them out")
        return self


# Optional keys default to None: TOML cannot say null, so only then does a resolved recipe read back.


class TransformConfig(Strict):
    """A transform of one's own, a Python path; see `protocols.OwnTransform`."""

    path: PythonPath
    options: Options | None = None


class AugmentConfig(Strict):
    """The training transforms, in this order (mmsegmentation's pipeline, see FACTS).

    resize_to: (long, short) edge in px that a ratio of `ratio_range` multiplies; None keeps the size.
    crop: (height, width) in px, redrawn up to 10 times until the largest class has less than
        `max_class_share` of the valid pixels.
    horizontal_flip, vertical_flip: probabilities. quarter_turns: one of four rotations (nadir views).
    photometric: brightness, contrast, saturation and hue, each with probability 0.5.
    transforms: of one's own, in this order, before the crop is normalised and padded.
    """

    resize_to: SizeWH | None = None
    ratio_range: Annotated[tuple[float, float], Field(strict=False)] = (0.5, 2.0)
    crop: SizeHW = (512, 512)
    max_class_share: Share = 0.75
    horizontal_flip: Share = 0.5
    vertical_flip: Share = 0.0
    quarter_turns: bool = False
    photometric: bool = True
    transforms: Annotated[tuple[TransformConfig, ...], Field(strict=False)] | None = None

    @model_validator(mode="after")
    def _range_is_ordered(self) -> AugmentConfig:
        low, high = self.ratio_range
        if not 0 < low <= high:
            raise ValueError(f"ratio_range {[low, high]} must be positive and in ascending order")
        if self.quarter_turns and self.crop[0] != self.crop[1]:
            raise ValueError(f"quarter_turns needs a square crop; got {list(self.crop)}")
        return self


class EvalConfig(Strict):
    """The protocol of a score.

    resize_to: (long, short) edge in px, ratio kept; None evaluates at the image's own size.
    multiple_of: round the resized size up to this multiple (SegFormer's own code: 32).
    mode: `whole` images, `slide` a window, or `auto`: whole up to 1.25 windows a side, sliding beyond. Models
        err on images much larger than what they were trained on.
    window, stride: (height, width) in px of the sliding window.
    scales, flip: more than one scale, or flip, averages softmax over all of them.
    key_stride: attention takes means of blocks of so many pixels squared for its keys and values, an
        approximation; 1: all keys. None: as the model was trained.
    """

    mode: EvalMode = "whole"
    resize_to: SizeWH | None = None
    multiple_of: Positive = 1
    window: SizeHW = (512, 512)
    stride: SizeHW = (512, 512)
    scales: Annotated[tuple[PositiveFloat, ...], Field(strict=False, min_length=1)] = (1.0,)
    flip: bool = False
    key_stride: Positive | None = None

    def slides(self, height: int, width: int) -> bool:
        """Whether an image of this size, in px, is seen through windows."""
        if self.mode == "auto":
            return height > LARGER * self.window[0] or width > LARGER * self.window[1]
        return self.mode == "slide"

    @model_validator(mode="after")
    def _windows_leave_no_gap(self) -> EvalConfig:
        if any(s > w for s, w in zip(self.stride, self.window, strict=True)):
            raise ValueError(
                f"stride {list(self.stride)} is larger than window {list(self.window)}: "
                "pixels between windows would have no prediction"
            )
        return self

"""The data of a recipe, its augmentation, and the protocol of a score."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from segdeformer.config.fields import Positive, PositiveFloat, Share, SizeHW, SizeWH, Strict

DataName = Literal["landcover", "folder", "ade20k", "cityscapes", "coco_stuff", "synthetic"]
EvalMode = Literal["whole", "slide"]


class DataConfig(Strict):
    """Which data, and where.

    root: the data's folder; `landcover` and `synthetic` need none.
    classes: for `folder`, a TOML file of names and colours; default: classes.toml in the root.
    """

    name: DataName
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


# Optional keys default to None: TOML cannot say null, so only then does a resolved recipe read back.


class AugmentConfig(Strict):
    """The training transforms, in this order (mmsegmentation's pipeline, see FACTS).

    resize_to: (long, short) edge in px that a ratio of `ratio_range` multiplies; None keeps the size.
    crop: (height, width) in px, redrawn up to 10 times until the largest class has less than
        `max_class_share` of the valid pixels.
    horizontal_flip, vertical_flip: probabilities. quarter_turns: one of four rotations (nadir views).
    photometric: brightness, contrast, saturation and hue, each with probability 0.5.
    """

    resize_to: SizeWH | None = None
    ratio_range: Annotated[tuple[float, float], Field(strict=False)] = (0.5, 2.0)
    crop: SizeHW = (512, 512)
    max_class_share: Share = 0.75
    horizontal_flip: Share = 0.5
    vertical_flip: Share = 0.0
    quarter_turns: bool = False
    photometric: bool = True

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
    window, stride: (height, width) in px of the sliding window, for mode `slide`.
    scales, flip: more than one scale, or flip, averages softmax over all of them.
    """

    mode: EvalMode = "whole"
    resize_to: SizeWH | None = None
    multiple_of: Positive = 1
    window: SizeHW = (512, 512)
    stride: SizeHW = (512, 512)
    scales: Annotated[tuple[PositiveFloat, ...], Field(strict=False, min_length=1)] = (1.0,)
    flip: bool = False

    @model_validator(mode="after")
    def _windows_leave_no_gap(self) -> EvalConfig:
        if any(s > w for s, w in zip(self.stride, self.window, strict=True)):
            raise ValueError(
                f"stride {list(self.stride)} is larger than window {list(self.window)}: "
                "pixels between windows would have no prediction"
            )
        return self

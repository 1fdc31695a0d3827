"""The typed recipe: everything that decides a result, nothing that does not.

A recipe is one complete TOML file. Unknown keys, wrong types and values out of range are
refused with the path of the key. Devices, workers and implementations are not in it: they
do not change results beyond rounding.
"""

from __future__ import annotations

import difflib
import tomllib
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from segdeformer.errors import UsageError
from segdeformer.refusals import explain

IGNORE_INDEX = 255
DEFAULT_RECIPE = "landcover"

Projection = Literal["affine", "conv_bn_relu"]
DataName = Literal["landcover", "folder", "ade20k", "cityscapes", "coco_stuff", "synthetic"]
LossAverage = Literal["valid", "all"]
EvalMode = Literal["whole", "slide"]

Positive = Annotated[int, Field(gt=0)]
Natural = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
# TOML has lists only; strict validation would insist on tuples.
SizeHW = Annotated[tuple[Positive, Positive], Field(strict=False)]
SizeWH = Annotated[tuple[Positive, Positive], Field(strict=False)]
PositiveFloat = Annotated[float, Field(gt=0)]
Beta = Annotated[float, Field(ge=0.0, lt=1.0)]


class Strict(BaseModel):
    """Immutable, no unknown keys, no silent conversion of types."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class EncoderConfig(Strict):
    """Which encoder makes the four feature maps.

    name: `mit_b0` ... `mit_b5`, `mit_nano`, or any timm model name.
    weights: `none`, `timm` (pretrained weights through timm's hub), or a file.
    image_size: (height, width) of the position grid for encoders with absolute positions;
        other sizes are resampled from it. Not a limit on the input.
    taps: block indices of the four maps of a flat (ViT) encoder; default spreads them evenly.
    feature_norm: LayerNorm on every returned map, as mmsegmentation's Swin has.
    """

    name: str
    weights: str = "none"
    drop_path: Share = 0.0
    image_size: SizeHW | None = None
    taps: Annotated[tuple[Natural, Natural, Natural, Natural], Field(strict=False)] | None = None
    feature_norm: bool = False


class MLPFusionConfig(Strict):
    """MLP fusion (Eq. 1). `conv_bn_relu`: mmsegmentation's; `linear`: NVlabs' and Hugging Face's.

    depth: layers from a map to the tokens. 2 is Eq. 1, one per map and one over all; the others follow
        at the first map's size (Table 8).
    """

    kind: Literal["mlp"] = "mlp"
    width: Positive = 256
    depth: Annotated[int, Field(ge=2)] = 2
    projection: Literal["conv_bn_relu", "linear"] = "conv_bn_relu"


class UperNetConfig(Strict):
    """UperNet (the paper's dagger): pyramid pooling of the last map, then a top-down pyramid.

    pools: cells per side of the grids that the last map is averaged to.
    neck: give the maps of a flat (ViT) encoder four sizes first, as mmsegmentation's MultiLevelNeck does.
    """

    kind: Literal["upernet"] = "upernet"
    width: Positive = 512
    pools: Annotated[tuple[Positive, ...], Field(strict=False, min_length=1)] = (1, 2, 3, 6)
    neck: bool = False


class FPNConfig(Strict):
    """Semantic FPN: a top-down pyramid of `pyramid_width` channels, its levels summed in `width`."""

    kind: Literal["fpn"] = "fpn"
    width: Positive = 128
    pyramid_width: Positive = 256
    neck: bool = False


class FaPNConfig(Strict):
    """FaPN: as `fpn`, but the pyramid selects features and aligns them by deformable convolutions."""

    kind: Literal["fapn"] = "fapn"
    width: Positive = 128
    pyramid_width: Annotated[int, Field(gt=0, multiple_of=8)] = 256  # 8 groups of channels move together
    neck: bool = False


FusionConfig = Annotated[
    MLPFusionConfig | UperNetConfig | FPNConfig | FaPNConfig, Field(discriminator="kind")
]


class InternalConfig(Strict):
    """Internal attention over the pixels (Eq. 5, Table 4)."""

    heads: Positive = 1
    depth: Positive = 1
    mlp: bool = False


class ExternalConfig(Strict):
    """External attention through class tokens (Eqs. 6-10, Table 5)."""

    tokens: Literal["learned"] = "learned"
    attention_loss: bool = True
    second_stage: bool = True
    decouple: bool = True


class ContextConfig(Strict):
    """What SegDeformer adds to the fused map. Leave the table out for plain SegFormer.

    reduction: keys and values of Eqs. 5 and 7 come from an R x R convolution of stride R.
    """

    projection: Projection = "affine"
    reduction: Positive = 1
    internal: InternalConfig | None = None
    external: ExternalConfig | None = None

    @model_validator(mode="after")
    def _something_is_mined(self) -> ContextConfig:
        if self.internal is None and self.external is None:
            raise ValueError("has neither `internal` nor `external`; add one, or leave `context` out")
        return self


class HeadConfig(Strict):
    """Dropout and a 1x1 convolution to class logits (Eq. 4)."""

    dropout: Share = 0.1


class AuxiliaryConfig(Strict):
    """FCN head on one encoder stage (1 to 4), training only; mmsegmentation's decoders have it."""

    stage: Annotated[int, Field(ge=1, le=4)] = 3
    width: Positive = 256


class ModelConfig(Strict):
    num_classes: Annotated[int, Field(ge=2, le=255)]
    encoder: EncoderConfig
    fusion: FusionConfig = MLPFusionConfig()
    context: ContextConfig | None = None
    head: HeadConfig = HeadConfig()
    auxiliary: AuxiliaryConfig | None = None

    @model_validator(mode="after")
    def _heads_divide_the_width(self) -> ModelConfig:
        internal = self.context.internal if self.context else None
        if internal and self.fusion.width % internal.heads:
            raise ValueError(
                f"fusion.width {self.fusion.width} is no multiple of context.internal.heads {internal.heads}"
            )
        return self


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


class TrainConfig(Strict):
    """AdamW, linear warm-up times poly decay, L_seg + weight * L_attn (Eq. 9).

    decoder_lr_multiplier: all decoder parameters, norms and tokens too, get this times the rate.
    loss_average: divide the summed cross-entropy by the `valid` pixels or by `all` (mmsegmentation).
    class_weights: one factor per class.
    """

    iterations: Positive = 160_000
    batch_size: Positive = 16
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    learning_rate: PositiveFloat = 6e-5
    betas: Annotated[tuple[Beta, Beta], Field(strict=False)] = (0.9, 0.999)
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    decoder_lr_multiplier: PositiveFloat = 10.0
    warmup_iterations: Natural = 1500
    warmup_ratio: Share = 1e-6
    poly_power: Annotated[float, Field(ge=0)] = 1.0
    min_learning_rate: Annotated[float, Field(ge=0)] = 0.0
    loss_average: LossAverage = "all"
    attention_loss_weight: Annotated[float, Field(ge=0)] = 0.4
    auxiliary_loss_weight: Annotated[float, Field(ge=0)] = 0.4
    class_weights: Annotated[tuple[Annotated[float, Field(ge=0)], ...], Field(strict=False)] | None = None
    label_smoothing: Share = 0.0
    validate_every: Positive = 16_000
    checkpoint_every: Positive = 4_000


class ReportedConfig(Strict):
    """What the paper reports for this row, for the report's second column; never used otherwise."""

    table: Annotated[int, Field(ge=1, le=8)]
    row: str
    miou: float | None = None
    miou_multi_scale: float | None = None
    params_millions: float | None = None


class Recipe(Strict):
    name: str
    description: str
    reported: ReportedConfig | None = None
    model: ModelConfig
    data: DataConfig
    augment: AugmentConfig = AugmentConfig()
    train: TrainConfig = TrainConfig()
    evaluate: EvalConfig = EvalConfig()

    @model_validator(mode="after")
    def _one_weight_per_class(self) -> Recipe:
        weights = self.train.class_weights
        if weights is not None and len(weights) != self.model.num_classes:
            raise ValueError(
                f"train.class_weights has {len(weights)} values for "
                f"model.num_classes {self.model.num_classes}"
            )
        return self

    @model_validator(mode="after")
    def _batch_norm_sees_two_values(self) -> Recipe:
        fusion = self.model.fusion
        if isinstance(fusion, UperNetConfig) and 1 in fusion.pools and self.train.batch_size == 1:
            raise ValueError(
                "train.batch_size is 1, but BatchNorm after UperNet's 1x1 pool sees one value per image and "
                "needs two; set it to 2 or more"
            )
        return self


def recipe_names() -> list[str]:
    """Names of the recipes that ship with the package, sorted."""
    folder = resources.files("segdeformer") / "recipes"
    return sorted(f.name.removesuffix(".toml") for f in folder.iterdir() if f.name.endswith(".toml"))


def load_recipe(name_or_path: str) -> Recipe:
    """Read a shipped recipe by name, or a TOML file by path.

    Raises `UsageError` when there is no such recipe, the file is no TOML, or a key or value is wrong.
    """
    if name_or_path in recipe_names():
        return parse_recipe(recipe_text(name_or_path), name_or_path)
    return parse_recipe(_recipe_file(name_or_path), name_or_path)


def recipe_text(name: str) -> str:
    """The TOML of a shipped recipe, comments and all; raises `UsageError` for an unknown name."""
    if name in recipe_names():
        return (resources.files("segdeformer") / "recipes" / f"{name}.toml").read_text("utf-8")
    raise _no_recipe(name)


def _recipe_file(name_or_path: str) -> str:
    path = Path(name_or_path)
    if not path.is_file():
        raise _no_recipe(name_or_path)
    try:
        return path.read_text("utf-8")
    except (UnicodeDecodeError, OSError) as error:
        raise UsageError(f"{path}: cannot be read as a TOML text file ({error})") from None


def _no_recipe(name: str) -> UsageError:
    near = difflib.get_close_matches(name, recipe_names(), n=1, cutoff=0.5)
    hint = f"did you mean `{near[0]}`? " if near else ""
    return UsageError(
        f"no recipe `{name}`: neither a shipped recipe nor a TOML file; "
        f"{hint}`segdeformer recipes` lists them"
    )


def parse_recipe(text: str, origin: str) -> Recipe:
    """Validate TOML text strictly. `origin` names it in errors."""
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{origin}: not valid TOML: {error}") from None
    return validate_recipe(values, origin)


def validate_recipe(values: dict[str, Any], origin: str) -> Recipe:
    """Validate a nested dict, as read from TOML or from a checkpoint's metadata."""
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise UsageError(f"{origin}: {explain(error, Recipe)}") from None


def recipe_toml(recipe: Recipe) -> str:
    """The resolved recipe, every default written out, as TOML that `load_recipe` reads back."""
    import tomli_w

    return tomli_w.dumps(recipe.model_dump(mode="json", exclude_none=True))

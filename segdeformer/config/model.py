"""The model of a recipe: encoder, fusion, context, head."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator

from segdeformer.config.fields import (
    OLD_THIRD_PARTY,
    Natural,
    Options,
    Positive,
    PythonPath,
    Share,
    SizeHW,
    Strict,
    kind_or_own,
)

Projection = Literal["affine", "conv_bn_relu"]
Start = Literal["unit", "small"]
ReductionBy = Literal["conv", "mean"]
DEFAULT_MOMENTUM = 0.1


class EncoderConfig(Strict):
    """Which encoder makes the four feature maps.

    name: `mit_b0` ... `mit_b5`, `mit_nano`, a timm model name, or a Python path (`protocols.OwnEncoder`).
    weights: `none`, `timm` (pretrained weights through timm's hub), or a file.
    image_size: (height, width) of the position grid for encoders with absolute positions;
        other sizes are resampled from it. Not a limit on the input.
    out_indices: block indices of the four maps of a flat (ViT) encoder; default spreads them evenly.
    feature_norm: LayerNorm on every returned map, as mmsegmentation's Swin has.
    options: of a Python path, which takes these and `weights` alone.
    """

    name: str
    weights: str = "none"
    drop_path: Share = 0.0
    image_size: SizeHW | None = None
    out_indices: Annotated[tuple[Natural, Natural, Natural, Natural], Field(strict=False)] | None = None
    feature_norm: bool = False
    options: Options | None = None

    @model_validator(mode="before")
    @classmethod
    def _taps_are_out_indices(cls, values: Any) -> Any:
        if isinstance(values, dict) and "taps" in values and "out_indices" not in values:
            values = {"out_indices" if key == "taps" else key: value for key, value in values.items()}
        return values

    @model_validator(mode="after")
    def _options_are_for_own_encoders(self) -> EncoderConfig:
        own = ":" in self.name
        if self.options and not own:
            raise ValueError("`options` are for a Python path as `name`; leave them out")
        others = (self.drop_path, self.image_size, self.out_indices, self.feature_norm)
        if own and others != (0.0, None, None, False):
            raise ValueError(f"`{self.name}` takes its settings from `options`; leave the other keys out")
        return self


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


def _now_called(kind: Any) -> Any:
    return "third_party" if kind == OLD_THIRD_PARTY else kind


class ThirdPartyConfig(Strict):
    """A model of segmentation_models_pytorch (extra `third-party`): its decoder, classifier and encoder.

    decoder: its class there, such as `PSPNet` or `DeepLabV3Plus`.
    options: arguments of that class, such as `encoder_depth`; what is left out has that package's default.
    `encoder.name` is that package's or timm's, and `head.dropout` the auxiliary head's alone.
    """

    kind: Annotated[Literal["third_party"], BeforeValidator(_now_called)] = "third_party"
    decoder: str
    options: Options = Field(default_factory=dict)


class OwnFusionConfig(Strict):
    """A fusion of one's own, a Python path, whose tokens have `width` channels; see `protocols.OwnFusion`."""

    kind: PythonPath
    width: Positive = 256
    options: Options | None = None


FusionConfig = Annotated[
    Annotated[MLPFusionConfig, Tag("mlp")]
    | Annotated[UperNetConfig, Tag("upernet")]
    | Annotated[FPNConfig, Tag("fpn")]
    | Annotated[FaPNConfig, Tag("fapn")]
    | Annotated[ThirdPartyConfig, Tag("third_party")]
    | Annotated[OwnFusionConfig, Tag("module:name")],
    Discriminator(kind_or_own),
]


class InternalConfig(Strict):
    """Internal attention over the pixels (Eq. 5, Table 4)."""

    heads: Positive = 1
    depth: Positive = 1
    mlp: bool = False


class ExternalConfig(Strict):
    """External attention through class tokens (Eqs. 6-10, Table 5).

    tokens: `learned`, or `momentum`: running means of each class's pixels, which take no gradient.
    momentum: share of a batch's mean in the new running mean; 0.1 for `momentum` tokens, none for others.
    decouple: a table of tokens for what a class tells, another for how it is found; `learned` only.
    """

    tokens: Literal["learned", "momentum"] = "learned"
    momentum: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    attention_loss: bool = True
    second_stage: bool = True
    decouple: bool = True

    @model_validator(mode="before")
    @classmethod
    def _momentum_has_a_share(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("tokens") == "momentum" and values.get("momentum") is None:
            return values | {"momentum": DEFAULT_MOMENTUM}
        return values

    @model_validator(mode="after")
    def _only_learned_tokens_are_two(self) -> ExternalConfig:
        if self.tokens == "momentum" and self.decouple:
            raise ValueError(
                "`decouple` is true, but momentum tokens are one table of class means; set it to false"
            )
        if self.tokens == "learned" and self.momentum is not None:
            raise ValueError(
                f'`momentum` is {self.momentum}, but tokens are "learned"; leave it out, or set tokens to '
                '"momentum"'
            )
        return self


class ContextConfig(Strict):
    """What SegDeformer adds to the fused map. Leave the table out for plain SegFormer.

    start: of the linear projections and class tokens. `unit`: N(0, 1/C) and N(0, 1), so that scores have a
        spread from the first step on; the default of `affine`. `small`: trunc-normal 0.02, the released
        code's, whose BatchNorms make up for it; the default of `conv_bn_relu`.
    reduction: keys and values of Eqs. 5 and 7 are of R x R blocks of pixels.
    reduction_by: `conv`, an R x R convolution of stride R (Section 3.4), or `mean`, which has no parameters:
        a model trained with all keys goes on with few, and the other way round.
    """

    projection: Projection = "affine"
    start: Start = "unit"
    reduction: Positive = 1
    reduction_by: ReductionBy = "conv"
    internal: InternalConfig | None = None
    external: ExternalConfig | None = None

    @model_validator(mode="before")
    @classmethod
    def _batch_norms_wake_a_small_start(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("projection") == "conv_bn_relu":
            return {"start": "small"} | values
        return values

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
    def _context_fits_the_fusion(self) -> ModelConfig:
        if self.context is None:
            return self
        if isinstance(self.fusion, ThirdPartyConfig):
            raise ValueError('fusion.kind is "third_party", which takes no `context`; leave it out')
        internal = self.context.internal
        if internal and self.fusion.width % internal.heads:
            raise ValueError(
                f"fusion.width {self.fusion.width} is no multiple of context.internal.heads {internal.heads}"
            )
        return self

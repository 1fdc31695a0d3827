"""Which model a file of another project holds, from the names and shapes of its tensors.

What they cannot tell is taken from the project's own configurations: maps of every third or sixth block of a
ViT, grids of 1, 2, 3 and 6 cells in UperNet, the auxiliary head of a ViT on the last map.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from segdeformer.config import (
    AuxiliaryConfig,
    ContextConfig,
    EncoderConfig,
    ExternalConfig,
    InternalConfig,
    MLPFusionConfig,
    ModelConfig,
    UperNetConfig,
)
from segdeformer.errors import UserError
from segdeformer.models.mit import MIT_SIZES
from segdeformer.weights.names import HUGGINGFACE_MIT, MIT_NAMES, NAMINGS, Naming
from segdeformer.weights.source import Source

RELEASED_CONTEXT = ContextConfig(
    projection="conv_bn_relu", internal=InternalConfig(), external=ExternalConfig()
)
UPERNET_POOLS = (1, 2, 3, 6)


class SwinSize(NamedTuple):
    name: str  # timm's
    width: int  # of the first stage
    depths: tuple[int, int, int, int]
    window: int


class ViTSize(NamedTuple):
    name: str
    title: str
    width: int
    depth: int
    patch: int


SWIN_DEPTHS = {"tiny": (2, 2, 6, 2), "small": (2, 2, 18, 2), "base": (2, 2, 18, 2), "large": (2, 2, 18, 2)}
SWIN_WIDTHS = {"tiny": 96, "small": 96, "base": 128, "large": 192}
SWINS = (
    *(
        SwinSize(f"swin_{size}_patch4_window7_224", SWIN_WIDTHS[size], depths, 7)
        for size, depths in SWIN_DEPTHS.items()
    ),
    *(
        SwinSize(f"swin_{size}_patch4_window12_384", SWIN_WIDTHS[size], SWIN_DEPTHS[size], 12)
        for size in ("base", "large")
    ),
)
# DeiT and ViT of one size are the same network; DeiT's names where it has that size.
VITS = (
    ViTSize("deit_tiny_patch16_224", "DeiT-Ti", 192, 12, 16),
    ViTSize("deit_small_patch16_224", "DeiT-S", 384, 12, 16),
    ViTSize("deit_base_patch16_224", "DeiT-B", 768, 12, 16),
    ViTSize("vit_base_patch8_224", "ViT-B/8", 768, 12, 8),
    ViTSize("vit_base_patch32_224", "ViT-B/32", 768, 12, 32),
    ViTSize("vit_large_patch16_224", "ViT-L", 1024, 24, 16),
)


class Deduced(NamedTuple):
    """A model, the names it has in the file, and what to call it. family: which recipes are like it."""

    config: ModelConfig
    naming: Naming
    title: str
    family: str


class _Encoder(NamedTuple):
    config: EncoderConfig
    naming: Naming
    title: str
    family: str
    channels: tuple[int, ...]


def deduce_model(source: Source) -> Deduced:
    """The model in the file; raises `UserError` where it is none that we can build, and says why."""
    tensors = source.tensors
    _check_huggingface(source)
    if "backbone.stages.0.blocks.0.attn.w_msa.qkv.weight" in tensors:
        encoder = _swin(source, "stages", "attn.w_msa")
    elif "backbone.layers.0.blocks.0.attn.qkv.weight" in tensors:
        encoder = _swin(source, "layers", "attn")
    elif "backbone.layers.0.attn.attn.in_proj_weight" in tensors:
        encoder = _vit(source)
    else:
        encoder = _mit(source)
    fusion, head, title = _decoder(source, encoder)
    context = RELEASED_CONTEXT if "decode_head.class_token.cls_token" in tensors else None
    if context is not None:
        title = "SegDeformer, released head"
    config = ModelConfig(
        num_classes=_shape(source, head, 4)[0],
        encoder=encoder.config,
        fusion=fusion,
        context=context,
        auxiliary=_auxiliary(tensors, encoder),
    )
    family = "segformer" if isinstance(fusion, MLPFusionConfig) else f"upernet-{encoder.family}"
    return Deduced(config, encoder.naming, f"{encoder.title} + {title}", family)


def _shape(source: Source, name: str, num_dimensions: int) -> torch.Size:
    if name not in source.tensors:
        raise UserError(
            f"{source.path}: lacks `{source.prefix}{name}`; the file is damaged or of another model"
        )
    shape = source.tensors[name].shape
    if len(shape) != num_dimensions:
        raise UserError(
            f"{source.path}: `{source.prefix}{name}` has shape {tuple(shape)}, expected {num_dimensions} "
            "dimensions; the file is of another model"
        )
    return shape


def _mit(source: Source) -> _Encoder:
    tensors = source.tensors
    for naming in NAMINGS[source.project]:
        if naming == "microsoft":
            continue
        before = "segformer." if source.project == "huggingface" else "backbone."
        names = {row.ours: f"{before}{getattr(row, naming)}.weight" for row in MIT_NAMES}
        norm, block = names["norm"], names["blocks.{j}.norm1"]
        norms = [tensors.get(norm.format(i=i, s=i + 1)) for i in range(4)]
        channels = tuple(t.numel() for t in norms if t is not None)
        depths = tuple(_count(tensors, block.format(i=i, s=i + 1, j="{}")) for i in range(4))
        for name, size in MIT_SIZES.items():
            if (size.channels, size.depths) == (channels, depths):
                title = name.replace("mit_", "MiT-").replace("-b", "-B")
                return _Encoder(EncoderConfig(name=name), naming, title, "mit", channels)
        if channels or any(depths):
            raise UserError(
                f"{source.path}: the encoder has channels {list(channels)} and depths {list(depths)}, "
                f"which is no size of MiT ({', '.join(MIT_SIZES)})"
            )
    first = [name for name in tensors if name.startswith(("backbone.", "segformer."))][:3]
    raise UserError(
        f"{source.path}: the encoder ({', '.join(f'`{n}`' for n in first)}, ...) is neither MiT, Swin nor "
        "ViT (DeiT); other encoders cannot be converted"
    )


def _swin(source: Source, stages: str, attention: str) -> _Encoder:
    tensors = source.tensors
    depths = tuple(_count(tensors, f"backbone.{stages}.{i}.blocks.{{}}.norm1.weight") for i in range(4))
    table = f"backbone.{stages}.0.blocks.0.{attention}.relative_position_bias_table"
    num_offsets, _ = _shape(source, table, 2)
    (width,) = _shape(source, "backbone.norm0.weight", 1)
    window = (math.isqrt(num_offsets) + 1) // 2
    for size in SWINS:
        if (size.width, size.depths, size.window) == (width, depths, window):
            config = EncoderConfig(name=size.name, feature_norm=True)
            naming: Naming = "mmseg" if stages == "stages" else "microsoft"
            title = "Swin-" + size.name.split("_")[1][0].upper()
            return _Encoder(config, naming, title, "swin", tuple(width * 2**i for i in range(4)))
    raise UserError(
        f"{source.path}: the encoder is a Swin of width {width}, depths {list(depths)} and window {window}, "
        f"which is none of {', '.join(size.name for size in SWINS)}"
    )


def _vit(source: Source) -> _Encoder:
    tensors = source.tensors
    depth = _count(tensors, "backbone.layers.{}.ln1.weight")
    width, _, patch, _ = _shape(source, "backbone.patch_embed.projection.weight", 4)
    if "backbone.ln1.weight" in tensors:
        raise UserError(
            f"{source.path}: `backbone.ln1` normalises the last map alone (`final_norm=True`), which no "
            "encoder here does; convert a model without it"
        )
    cells = _shape(source, "backbone.pos_embed", 3)[1] - 1  # the class token has a place too
    side = math.isqrt(cells)
    if side * side != cells:
        raise UserError(
            f"{source.path}: `backbone.pos_embed` has {cells} places and the class token's, which is no "
            "square, and does not tell its height; name a recipe with encoder.image_size (--recipe)"
        )
    for size in VITS:
        if (size.width, size.depth, size.patch) == (width, depth, patch):
            out_indices = (depth // 4 - 1, depth // 2 - 1, depth * 3 // 4 - 1, depth - 1)
            config = EncoderConfig(
                name=size.name, image_size=(side * patch, side * patch), out_indices=out_indices
            )
            return _Encoder(config, "mmseg", size.title, "deit", (width,) * 4)
    raise UserError(
        f"{source.path}: the encoder is a ViT of width {width}, {depth} blocks and patches of {patch} px, "
        f"which is none of {', '.join(size.name for size in VITS)}"
    )


def _decoder(source: Source, encoder: _Encoder) -> tuple[MLPFusionConfig | UperNetConfig, str, str]:
    """The fusion, the name of the classifier's weight, and a title."""
    tensors = source.tensors
    if source.project == "nvlabs":
        width = _shape(source, "decode_head.linear_fuse.conv.weight", 4)[0]
        fusion = MLPFusionConfig(width=width, projection="linear")
        return fusion, "decode_head.linear_pred.weight", "SegFormer"
    if source.project == "huggingface":
        width = _shape(source, "decode_head.linear_fuse.weight", 4)[0]
        return MLPFusionConfig(width=width, projection="linear"), "decode_head.classifier.weight", "SegFormer"
    if "decode_head.fusion_conv.conv.weight" in tensors:
        width = _shape(source, "decode_head.fusion_conv.conv.weight", 4)[0]
        return MLPFusionConfig(width=width), "decode_head.conv_seg.weight", "SegFormer"
    pools = _count(tensors, "decode_head.psp_modules.{}.1.conv.weight")
    if pools != len(UPERNET_POOLS):
        raise UserError(
            f"{source.path}: UperNet has {pools} pools, whose sizes a file does not tell; only "
            f"{list(UPERNET_POOLS)} can be converted without a recipe (--recipe)"
        )
    neck = "neck.convs.0.conv.weight" in tensors
    width = _shape(source, "decode_head.fpn_bottleneck.conv.weight", 4)[0]
    return UperNetConfig(width=width, neck=neck), "decode_head.conv_seg.weight", "UperNet"


def _auxiliary(tensors: Mapping[str, Tensor], encoder: _Encoder) -> AuxiliaryConfig | None:
    """The auxiliary head, if it is one 3x3 convolution as ours is."""
    conv = tensors.get("auxiliary_head.convs.0.conv.weight")
    deeper = any(re.match(r"auxiliary_head\.(convs\.[1-9]|conv_cat)", name) for name in tensors)
    if conv is None or deeper or conv.shape[2:] != (3, 3) or conv.shape[1] not in encoder.channels:
        return None
    flat = len(set(encoder.channels)) == 1
    stage = 4 if flat else encoder.channels.index(conv.shape[1]) + 1
    return AuxiliaryConfig(stage=stage, width=conv.shape[0])


def _count(tensors: Mapping[str, Tensor], template: str) -> int:
    count = 0
    while template.format(count) in tensors:
        count += 1
    return count


def _check_huggingface(source: Source) -> None:
    """Settings of config.json that no tensor shows, but that change what it computes."""
    config = source.huggingface_config
    if config is None:
        return
    sizes = config.get("hidden_sizes")
    heads = next((s.heads for s in MIT_SIZES.values() if list(s.channels) == sizes), None)
    expected: dict[str, Any] = {
        "model_type": "segformer",
        "num_attention_heads": None if heads is None else list(heads),
        **HUGGINGFACE_MIT,
    }
    for key, value in expected.items():
        if value is not None and config.get(key, value) != value:
            raise UserError(
                f"{source.path}: config.json has {key} = {config[key]!r}; only SegFormer with {key} = "
                f"{value!r} can be converted"
            )

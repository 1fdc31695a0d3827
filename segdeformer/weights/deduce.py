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
from segdeformer.weights.names import HUGGINGFACE_MIT, MIT_NAMES, NAMINGS, Naming, Project, classifier_of
from segdeformer.weights.source import Source

RELEASED_CONTEXT = ContextConfig(
    projection="conv_bn_relu", internal=InternalConfig(), external=ExternalConfig()
)
UPERNET_POOLS = (1, 2, 3, 6)


# By the width of the first stage, the blocks of each, and the window: timm's names.
SWINS: dict[tuple[int, tuple[int, ...], int], str] = {
    (96, (2, 2, 6, 2), 7): "swin_tiny_patch4_window7_224",
    (96, (2, 2, 18, 2), 7): "swin_small_patch4_window7_224",
    (128, (2, 2, 18, 2), 7): "swin_base_patch4_window7_224",
    (192, (2, 2, 18, 2), 7): "swin_large_patch4_window7_224",
    (128, (2, 2, 18, 2), 12): "swin_base_patch4_window12_384",
    (192, (2, 2, 18, 2), 12): "swin_large_patch4_window12_384",
}
# By width, blocks and patch: timm's names, and titles. DeiT and ViT of one size are the same network; DeiT's
# names where it has that size.
VITS = {
    (192, 12, 16): ("deit_tiny_patch16_224", "DeiT-Ti"),
    (384, 12, 16): ("deit_small_patch16_224", "DeiT-S"),
    (768, 12, 16): ("deit_base_patch16_224", "DeiT-B"),
    (768, 12, 8): ("vit_base_patch8_224", "ViT-B/8"),
    (768, 12, 32): ("vit_base_patch32_224", "ViT-B/32"),
    (1024, 24, 16): ("vit_large_patch16_224", "ViT-L"),
}
# What makes one map of four in a SegFormer.
MLP_FUSES: dict[Project, str] = {
    "nvlabs": "decode_head.linear_fuse.conv.weight",
    "huggingface": "decode_head.linear_fuse.weight",
    "mmseg": "decode_head.fusion_conv.conv.weight",
}


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
    fusion, title = _decoder(source)
    context = RELEASED_CONTEXT if "decode_head.class_token.cls_token" in tensors else None
    if context is not None:
        title = "SegDeformer, released head"
    config = ModelConfig(
        num_classes=_shape(source, classifier_of(source.project), 4)[0],
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
        norm, block = (f"{before}{MIT_NAMES[naming][n]}.weight" for n in ("norm", "blocks.{j}.norm1"))
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
    name = SWINS.get((width, depths, window))
    if name is None:
        raise UserError(
            f"{source.path}: the encoder is a Swin of width {width}, depths {list(depths)} and window "
            f"{window}, which is none of {', '.join(SWINS.values())}"
        )
    naming: Naming = "mmseg" if stages == "stages" else "microsoft"
    title = "Swin-" + name.split("_")[1][0].upper()
    channels = tuple(width * 2**i for i in range(4))
    return _Encoder(EncoderConfig(name=name, feature_norm=True), naming, title, "swin", channels)


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
    if (width, depth, patch) not in VITS:
        raise UserError(
            f"{source.path}: the encoder is a ViT of width {width}, {depth} blocks and patches of {patch} "
            f"px, which is none of {', '.join(name for name, _ in VITS.values())}"
        )
    name, title = VITS[width, depth, patch]
    out_indices = (depth // 4 - 1, depth // 2 - 1, depth * 3 // 4 - 1, depth - 1)
    config = EncoderConfig(name=name, image_size=(side * patch, side * patch), out_indices=out_indices)
    return _Encoder(config, "mmseg", title, "deit", (width,) * 4)


def _decoder(source: Source) -> tuple[MLPFusionConfig | UperNetConfig, str]:
    """The fusion, and a title."""
    tensors, fuse = source.tensors, MLP_FUSES[source.project]
    if source.project != "mmseg" or fuse in tensors:
        width = _shape(source, fuse, 4)[0]
        is_mmseg = source.project == "mmseg"
        return MLPFusionConfig(width=width, projection="conv_bn_relu" if is_mmseg else "linear"), "SegFormer"
    pools = _count(tensors, "decode_head.psp_modules.{}.1.conv.weight")
    if pools != len(UPERNET_POOLS):
        raise UserError(
            f"{source.path}: UperNet has {pools} pools, whose sizes a file does not tell; only "
            f"{list(UPERNET_POOLS)} can be converted without a recipe (--recipe)"
        )
    neck = "neck.convs.0.conv.weight" in tensors
    width = _shape(source, "decode_head.fpn_bottleneck.conv.weight", 4)[0]
    return UperNetConfig(width=width, neck=neck), "UperNet"


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

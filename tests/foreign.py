"""Models of other projects, made of nothing but their published names and shapes.

Nothing here uses our modules: dicts of random tensors under the names of mmsegmentation, NVlabs and
Microsoft's Swin. The forward passes that read them are in `foreign_equations`.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

Shapes = dict[str, tuple[int, ...]]
Tensors = dict[str, Tensor]

# channels, depths and reductions of a MiT
B0 = ((32, 64, 160, 256), (2, 2, 2, 2), (8, 4, 2, 1))
NANO = ((16, 32, 64, 128), (2, 2, 2, 2), (8, 4, 2, 1))
SWIN_T = {"width": 96, "depths": (2, 2, 6, 2), "heads": (3, 6, 12, 24), "window": 7}
SWIN_S = SWIN_T | {"depths": (2, 2, 18, 2)}
SWIN_CHANNELS = (96, 192, 384, 768)


def random_tensors(shapes: Shapes, *, seed: int = 0) -> Tensors:
    """Values that no layer is blind to: norms are not 1 and 0, variances not 1."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in shapes.items():
        if name.endswith("num_batches_tracked"):
            tensors[name] = torch.tensor(7)
            continue
        value = torch.randn(shape, generator=generator)
        if name.endswith("running_var"):
            value = value.abs() + 0.5
        elif len(shape) == 1:
            value = 0.2 * value + (1.0 if name.endswith("weight") else 0.0)
        else:
            value = value / max(1, value[0].numel()) ** 0.5
        tensors[name] = value
    return tensors


def affine(name: str, *shape: int) -> Shapes:
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def conv_module(name: str, *shape: int) -> Shapes:
    """mmcv's ConvModule with BatchNorm: no bias."""
    out = shape[0]
    return {
        f"{name}.conv.weight": shape,
        **affine(f"{name}.bn", out),
        f"{name}.bn.running_mean": (out,),
        f"{name}.bn.running_var": (out,),
        f"{name}.bn.num_batches_tracked": (),
    }


def mmseg_mit(channels: tuple[int, ...], depths: tuple[int, ...], reductions: tuple[int, ...]) -> Shapes:
    shapes: Shapes = {}
    for i, (c, depth, reduction) in enumerate(zip(channels, depths, reductions, strict=True)):
        before, kernel = (3, 7) if i == 0 else (channels[i - 1], 3)
        shapes |= affine(f"backbone.layers.{i}.0.projection", c, before, kernel, kernel)
        shapes |= affine(f"backbone.layers.{i}.0.norm", c)
        for j in range(depth):
            name = f"backbone.layers.{i}.1.{j}"
            shapes |= affine(f"{name}.norm1", c) | affine(f"{name}.norm2", c)
            shapes |= {
                f"{name}.attn.attn.in_proj_weight": (3 * c, c),
                f"{name}.attn.attn.in_proj_bias": (3 * c,),
            }
            shapes |= affine(f"{name}.attn.attn.out_proj", c, c)
            if reduction > 1:
                shapes |= affine(f"{name}.attn.sr", c, c, reduction, reduction) | affine(
                    f"{name}.attn.norm", c
                )
            shapes |= affine(f"{name}.ffn.layers.0", 4 * c, c, 1, 1)
            shapes |= affine(f"{name}.ffn.layers.1", 4 * c, 1, 3, 3)
            shapes |= affine(f"{name}.ffn.layers.4", c, 4 * c, 1, 1)
        shapes |= affine(f"backbone.layers.{i}.2", c)
    return shapes


def nvlabs_mit(channels: tuple[int, ...], depths: tuple[int, ...], reductions: tuple[int, ...]) -> Shapes:
    shapes: Shapes = {}
    for s, (c, depth, reduction) in enumerate(zip(channels, depths, reductions, strict=True), 1):
        before, kernel = (3, 7) if s == 1 else (channels[s - 2], 3)
        shapes |= affine(f"backbone.patch_embed{s}.proj", c, before, kernel, kernel)
        shapes |= affine(f"backbone.patch_embed{s}.norm", c)
        for j in range(depth):
            name = f"backbone.block{s}.{j}"
            shapes |= affine(f"{name}.norm1", c) | affine(f"{name}.norm2", c)
            shapes |= affine(f"{name}.attn.q", c, c) | affine(f"{name}.attn.kv", 2 * c, c)
            shapes |= affine(f"{name}.attn.proj", c, c)
            if reduction > 1:
                shapes |= affine(f"{name}.attn.sr", c, c, reduction, reduction) | affine(
                    f"{name}.attn.norm", c
                )
            shapes |= affine(f"{name}.mlp.fc1", 4 * c, c) | affine(f"{name}.mlp.fc2", c, 4 * c)
            shapes |= affine(f"{name}.mlp.dwconv.dwconv", 4 * c, 1, 3, 3)
        shapes |= affine(f"backbone.norm{s}", c)
    return shapes


def nvlabs_head(channels: tuple[int, ...], width: int, num_classes: int) -> Shapes:
    shapes = affine("decode_head.conv_seg", num_classes, 128, 1, 1)  # of the base class, never called
    for s, c in enumerate(channels, 1):
        shapes |= affine(f"decode_head.linear_c{s}.proj", width, c)
    shapes |= conv_module("decode_head.linear_fuse", width, 4 * width, 1, 1)
    return shapes | affine("decode_head.linear_pred", num_classes, width, 1, 1)


def mmseg_segformer_head(channels: tuple[int, ...], width: int, num_classes: int) -> Shapes:
    shapes = affine("decode_head.conv_seg", num_classes, width, 1, 1)
    for i, c in enumerate(channels):
        shapes |= conv_module(f"decode_head.convs.{i}", width, c, 1, 1)
    return shapes | conv_module("decode_head.fusion_conv", width, 4 * width, 1, 1)


def released_segdeformer_context(width: int, num_classes: int) -> Shapes:
    name = "decode_head.class_token"
    shapes: Shapes = dict.fromkeys((f"{name}.cls_token", f"{name}.prop_token"), (1, num_classes, width))
    shapes |= affine(f"{name}.q", width, width) | affine(f"{name}.k", width, width)
    for attention in ("attn", "cross_attn"):
        for part in ("key", "query", "value", "out"):
            shapes |= conv_module(f"decode_head.trans.{attention}.{part}_project", width, width, 1, 1)
    return shapes


def mmseg_swin(width: int, depths: tuple[int, ...], heads: tuple[int, ...], window: int) -> Shapes:
    shapes = affine("backbone.patch_embed.projection", width, 3, 4, 4) | affine(
        "backbone.patch_embed.norm", width
    )
    for i, depth in enumerate(depths):
        c = width * 2**i
        for j in range(depth):
            name = f"backbone.stages.{i}.blocks.{j}"
            shapes |= affine(f"{name}.norm1", c) | affine(f"{name}.norm2", c)
            shapes[f"{name}.attn.w_msa.relative_position_bias_table"] = ((2 * window - 1) ** 2, heads[i])
            shapes |= affine(f"{name}.attn.w_msa.qkv", 3 * c, c) | affine(f"{name}.attn.w_msa.proj", c, c)
            shapes |= affine(f"{name}.ffn.layers.0.0", 4 * c, c) | affine(f"{name}.ffn.layers.1", c, 4 * c)
        if i < 3:
            shapes |= affine(f"backbone.stages.{i}.downsample.norm", 4 * c)
            shapes[f"backbone.stages.{i}.downsample.reduction.weight"] = (2 * c, 4 * c)
        shapes |= affine(f"backbone.norm{i}", c)
    return shapes


def mmseg_vit(width: int, depth: int, grid: tuple[int, int]) -> Shapes:
    shapes: Shapes = {"backbone.cls_token": (1, 1, width)}
    shapes["backbone.pos_embed"] = (1, 1 + grid[0] * grid[1], width)
    shapes |= affine("backbone.patch_embed.projection", width, 3, 16, 16)
    for j in range(depth):
        name = f"backbone.layers.{j}"
        shapes |= affine(f"{name}.ln1", width) | affine(f"{name}.ln2", width)
        shapes[f"{name}.attn.attn.in_proj_weight"] = (3 * width, width)
        shapes[f"{name}.attn.attn.in_proj_bias"] = (3 * width,)
        shapes |= affine(f"{name}.attn.attn.out_proj", width, width)
        shapes |= affine(f"{name}.ffn.layers.0.0", 4 * width, width)
        shapes |= affine(f"{name}.ffn.layers.1", width, 4 * width)
    return shapes


def mmseg_upernet(
    channels: tuple[int, ...], width: int, num_classes: int, *, auxiliary: int | None
) -> Shapes:
    """auxiliary: index of the map that the FCN head takes."""
    shapes = affine("decode_head.conv_seg", num_classes, width, 1, 1)
    for i in range(4):
        shapes |= conv_module(f"decode_head.psp_modules.{i}.1", width, channels[-1], 1, 1)
    shapes |= conv_module("decode_head.bottleneck", width, channels[-1] + 4 * width, 3, 3)
    for i, c in enumerate(channels[:-1]):
        shapes |= conv_module(f"decode_head.lateral_convs.{i}", width, c, 1, 1)
        shapes |= conv_module(f"decode_head.fpn_convs.{i}", width, width, 3, 3)
    shapes |= conv_module("decode_head.fpn_bottleneck", width, 4 * width, 3, 3)
    if auxiliary is not None:
        shapes |= affine("auxiliary_head.conv_seg", num_classes, 8, 1, 1)
        shapes |= conv_module("auxiliary_head.convs.0", 8, channels[auxiliary], 3, 3)
    return shapes


def mmseg_neck(width: int) -> Shapes:
    shapes: Shapes = {}
    for i in range(4):
        shapes |= affine(f"neck.lateral_convs.{i}.conv", width, width, 1, 1)
        shapes |= affine(f"neck.convs.{i}.conv", width, width, 3, 3)
    return shapes


def swin_position_index(window: int) -> Tensor:
    """(window^2, window^2): the row of the table for a pair of pixels, by their offset."""
    pixels = [(y, x) for y in range(window) for x in range(window)]
    side = 2 * window - 1
    return torch.tensor(
        [[(y - v + window - 1) * side + (x - u + window - 1) for v, u in pixels] for y, x in pixels]
    )


def to_microsoft_swin(tensors: Tensors) -> Tensors:
    """Microsoft's names for an mmsegmentation Swin, and its order of four merged pixels.

    That order is (even row, even column), (odd, even), (even, odd), (odd, odd), each with all channels.
    """
    renamed = {}
    for name, value in tensors.items():
        new = name.replace("backbone.stages", "backbone.layers").replace(".attn.w_msa.", ".attn.")
        new = new.replace("patch_embed.projection", "patch_embed.proj")
        new = new.replace(".ffn.layers.0.0.", ".mlp.fc1.").replace(".ffn.layers.1.", ".mlp.fc2.")
        if ".downsample." in name:
            pixels = [value[..., row * 2 + column :: 4] for row, column in ((0, 0), (1, 0), (0, 1), (1, 1))]
            value = torch.cat(pixels, -1)
        renamed[new] = value
    return renamed


def random_images(height: int, width: int) -> Tensor:
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def written(path: Path, tensors: Tensors, **others: object) -> Path:
    torch.save({"state_dict": tensors, "meta": {}} | others, path)
    return path


def in_float64(tensors: Tensors) -> Tensors:
    return {name: t.double() if t.is_floating_point() else t for name, t in tensors.items()}


def mmseg_segformer(size=NANO, *, width: int = 24, num_classes: int = 7) -> Tensors:
    shapes = mmseg_mit(*size) | mmseg_segformer_head(size[0], width, num_classes)
    return random_tensors(shapes)


def nvlabs_segformer(size=NANO, *, width: int = 24, num_classes: int = 7) -> Tensors:
    return random_tensors(nvlabs_mit(*size) | nvlabs_head(size[0], width, num_classes))


def swin(size: dict, *, num_classes: int = 7) -> Tensors:
    """With the indices that mmsegmentation's files hold."""
    upernet = mmseg_upernet(SWIN_CHANNELS, 16, num_classes, auxiliary=2)
    tensors = random_tensors(mmseg_swin(**size) | upernet)
    tables = [name for name in tensors if name.endswith("relative_position_bias_table")]
    index = swin_position_index(size["window"])
    return tensors | {name.replace("bias_table", "index"): index for name in tables}


def vit(*, neck: bool, num_classes: int = 7) -> Tensors:
    shapes = mmseg_vit(384, 12, (4, 4))
    shapes |= mmseg_upernet((384,) * 4, 16, num_classes, auxiliary=3)
    return random_tensors(shapes | (mmseg_neck(384) if neck else {}))

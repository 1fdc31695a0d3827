"""What models of other projects compute, as published, from dicts of tensors in those projects' names.

Nothing here uses our modules. B batch, N tokens, M source tokens, C channels, A heads, hw size of a map.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from foreign import Tensors
from torch import Tensor


class Reader:
    """Layers by their names in a dict of tensors."""

    def __init__(self, tensors: Tensors) -> None:
        self.tensors = tensors

    def linear(self, x: Tensor, name: str) -> Tensor:
        weight = self.tensors[f"{name}.weight"]
        return F.linear(x, weight.flatten(1), self.tensors.get(f"{name}.bias"))

    def conv(self, x: Tensor, name: str, **options: int) -> Tensor:
        return F.conv2d(x, self.tensors[f"{name}.weight"], self.tensors.get(f"{name}.bias"), **options)

    def layer_norm(self, x: Tensor, name: str, *, eps: float = 1e-5) -> Tensor:
        weight = self.tensors[f"{name}.weight"]
        return F.layer_norm(x, weight.shape, weight, self.tensors[f"{name}.bias"], eps)

    def conv_module(self, x: Tensor, name: str) -> Tensor:
        kernel = self.tensors[f"{name}.conv.weight"].shape[-1]
        x = self.conv(x, f"{name}.conv", padding=kernel // 2)
        t = self.tensors
        mean, var = t[f"{name}.bn.running_mean"], t[f"{name}.bn.running_var"]
        return F.batch_norm(x, mean, var, t[f"{name}.bn.weight"], t[f"{name}.bn.bias"]).relu()

    def attention(self, query_BNC: Tensor, source_BMC: Tensor, name: str, heads: int) -> Tensor:
        """PyTorch's multi-head attention, which mmcv wraps."""
        module = torch.nn.MultiheadAttention(query_BNC.shape[-1], heads, batch_first=True).to(query_BNC.dtype)
        names = ("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias")
        module.load_state_dict({key: self.tensors[f"{name}.{key}"] for key in names})
        with torch.no_grad():
            return module(query_BNC, source_BMC, source_BMC, need_weights=False)[0]


def resized(x: Tensor, like: Tensor) -> Tensor:
    return F.interpolate(x, like.shape[-2:], mode="bilinear", align_corners=False)


def as_tokens(x_BChw: Tensor) -> Tensor:
    return x_BChw.flatten(2).transpose(1, 2)


def as_map(x_BNC: Tensor, hw: tuple[int, ...]) -> Tensor:
    return x_BNC.transpose(1, 2).unflatten(2, hw)


def run_mmseg_mit(
    tensors: Tensors, images: Tensor, *, heads: tuple[int, ...], reductions: tuple[int, ...], eps: float
) -> list[Tensor]:
    read, x, maps = Reader(tensors), images, []
    for i in range(4):
        stage = f"backbone.layers.{i}"
        kernel, stride = (7, 4) if i == 0 else (3, 2)
        x = read.conv(x, f"{stage}.0.projection", stride=stride, padding=kernel // 2)
        hw = x.shape[-2:]
        tokens = read.layer_norm(as_tokens(x), f"{stage}.0.norm", eps=eps)
        j = 0
        while f"{stage}.1.{j}.norm1.weight" in tensors:
            block = f"{stage}.1.{j}"
            query = source = read.layer_norm(tokens, f"{block}.norm1", eps=eps)
            if reductions[i] > 1:
                reduced = read.conv(as_map(query, hw), f"{block}.attn.sr", stride=reductions[i])
                source = read.layer_norm(as_tokens(reduced), f"{block}.attn.norm", eps=eps)
            tokens = tokens + read.attention(query, source, f"{block}.attn.attn", heads[i])
            inner = as_map(read.layer_norm(tokens, f"{block}.norm2", eps=eps), hw)
            inner = read.conv(inner, f"{block}.ffn.layers.0")
            inner = F.gelu(read.conv(inner, f"{block}.ffn.layers.1", padding=1, groups=inner.shape[1]))
            tokens = tokens + as_tokens(read.conv(inner, f"{block}.ffn.layers.4"))
            j += 1
        x = as_map(read.layer_norm(tokens, f"{stage}.2", eps=eps), hw)
        maps.append(x)
    return maps


def run_mmseg_segformer_head(tensors: Tensors, maps: list[Tensor]) -> Tensor:
    return Reader(tensors).conv(fuse_mmseg_segformer(tensors, maps), "decode_head.conv_seg")


def fuse_mmseg_segformer(tensors: Tensors, maps: list[Tensor]) -> Tensor:
    read = Reader(tensors)
    same = [resized(read.conv_module(x, f"decode_head.convs.{i}"), maps[0]) for i, x in enumerate(maps)]
    return read.conv_module(torch.cat(same, 1), "decode_head.fusion_conv")


def run_released_segdeformer(tensors: Tensors, maps: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Logits, and the class logits that the attention loss supervises."""
    read, x = Reader(tensors), fuse_mmseg_segformer(tensors, maps)
    hw, scale = x.shape[-2:], x.shape[1] ** -0.5
    keys = read.linear(tensors["decode_head.class_token.cls_token"], "decode_head.class_token.k")
    queries = read.linear(as_tokens(x), "decode_head.class_token.q")
    class_logits = scale * queries @ keys.transpose(1, 2)
    mixed = class_logits.softmax(-1) @ tensors["decode_head.class_token.prop_token"]

    def attend(name: str, query: Tensor, source: Tensor) -> Tensor:
        q, k, v = (
            as_tokens(read.conv_module(m, f"decode_head.trans.{name}.{part}_project"))
            for part, m in (("query", query), ("key", source), ("value", source))
        )
        context = (scale * q @ k.transpose(1, 2)).softmax(-1) @ v
        return read.conv_module(as_map(context, hw), f"decode_head.trans.{name}.out_project")

    total = x + attend("attn", x, x) + attend("cross_attn", x, as_map(mixed, hw))
    return read.conv(total, "decode_head.conv_seg"), as_map(class_logits, hw)


def run_mmseg_upernet_head(tensors: Tensors, maps: list[Tensor]) -> Tensor:
    read = Reader(tensors)
    levels = [read.conv_module(x, f"decode_head.lateral_convs.{i}") for i, x in enumerate(maps[:-1])]
    pooled = [maps[-1]]
    for i, cells in enumerate((1, 2, 3, 6)):
        cell_means = F.adaptive_avg_pool2d(maps[-1], cells)
        pooled.append(resized(read.conv_module(cell_means, f"decode_head.psp_modules.{i}.1"), maps[-1]))
    levels.append(read.conv_module(torch.cat(pooled, 1), "decode_head.bottleneck"))
    for i in (2, 1, 0):
        levels[i] = levels[i] + resized(levels[i + 1], levels[i])
    outputs = [read.conv_module(levels[i], f"decode_head.fpn_convs.{i}") for i in range(3)] + levels[3:]
    fused = torch.cat([resized(x, outputs[0]) for x in outputs], 1)
    return read.conv(read.conv_module(fused, "decode_head.fpn_bottleneck"), "decode_head.conv_seg")


def run_mmseg_neck(tensors: Tensors, maps: list[Tensor]) -> list[Tensor]:
    read, scaled = Reader(tensors), []
    for i, (x, scale) in enumerate(zip(maps, (4, 2, 1, 0.5), strict=True)):
        x = F.interpolate(read.conv(x, f"neck.lateral_convs.{i}.conv"), scale_factor=scale, mode="bilinear")
        scaled.append(read.conv(x, f"neck.convs.{i}.conv", padding=1))
    return scaled


def run_mmseg_vit(tensors: Tensors, images: Tensor, *, heads: int, taps: tuple[int, ...]) -> list[Tensor]:
    """At the size of the position grid."""
    read, maps = Reader(tensors), []
    patches = read.conv(images, "backbone.patch_embed.projection", stride=16)
    tokens = torch.cat([tensors["backbone.cls_token"].expand(len(images), -1, -1), as_tokens(patches)], 1)
    tokens = tokens + tensors["backbone.pos_embed"]
    for j in range(max(taps) + 1):
        block = f"backbone.layers.{j}"
        inner = read.layer_norm(tokens, f"{block}.ln1", eps=1e-6)
        tokens = tokens + read.attention(inner, inner, f"{block}.attn.attn", heads)
        inner = F.gelu(
            read.linear(read.layer_norm(tokens, f"{block}.ln2", eps=1e-6), f"{block}.ffn.layers.0.0")
        )
        tokens = tokens + read.linear(inner, f"{block}.ffn.layers.1")
        if j in taps:
            maps.append(as_map(tokens[:, 1:], patches.shape[-2:]))
    return maps


def run_mmseg_swin(tensors: Tensors, images: Tensor, *, heads: tuple[int, ...], window: int) -> list[Tensor]:
    """Attention is taken over the whole map, masked to the windows. Images are padded to patches of 4 px."""
    read, maps = Reader(tensors), []
    images = F.pad(images, (0, -images.shape[3] % 4, 0, -images.shape[2] % 4))
    x = read.conv(images, "backbone.patch_embed.projection", stride=4)
    hw = x.shape[-2:]
    tokens = read.layer_norm(as_tokens(x), "backbone.patch_embed.norm")
    for i in range(4):
        stage, j = f"backbone.stages.{i}", 0
        while f"{stage}.blocks.{j}.norm1.weight" in tensors:
            block = f"{stage}.blocks.{j}"
            inner = read.layer_norm(tokens, f"{block}.norm1")
            tokens = tokens + _window_attention(
                read, inner, hw, f"{block}.attn.w_msa", heads[i], window, j % 2
            )
            inner = read.linear(read.layer_norm(tokens, f"{block}.norm2"), f"{block}.ffn.layers.0.0")
            tokens = tokens + read.linear(F.gelu(inner), f"{block}.ffn.layers.1")
            j += 1
        maps.append(as_map(read.layer_norm(tokens, f"backbone.norm{i}"), hw))
        if i < 3:
            # The published definition: unfold, whose channels are (C, row, column).
            even = F.pad(as_map(tokens, hw), (0, hw[1] % 2, 0, hw[0] % 2))
            merged = F.unfold(even, 2, stride=2).transpose(1, 2)
            merged = read.layer_norm(merged, f"{stage}.downsample.norm")
            tokens = read.linear(merged, f"{stage}.downsample.reduction")
            hw = (even.shape[2] // 2, even.shape[3] // 2)
    return maps


def _window_attention(
    read: Reader, x_BNC: Tensor, hw: tuple[int, ...], name: str, heads: int, window: int, shifted: int
) -> Tensor:
    """Padded to whole windows with zeros that take part; shifted windows do not see across the map's ends."""
    height, width = (-(-n // window) * window for n in hw)
    padded = F.pad(as_map(x_BNC, hw), (0, width - hw[1], 0, height - hw[0]))
    shift = shifted * (window // 2)
    y, xx = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    y, xx = y.flatten(), xx.flatten()
    rolled_y, rolled_x = (y - shift) % height, (xx - shift) % width  # where the roll puts each pixel
    cell = rolled_y // window * width + rolled_x // window
    # Pixels that were rolled around are in a window with others, but apart.
    apart = (rolled_y > y).long() * 2 + (rolled_x > xx).long()
    together = (cell[:, None] == cell[None]) & (apart[:, None] == apart[None])
    inside = cell[:, None] == cell[None]
    dy = rolled_y[:, None] - rolled_y[None] + window - 1
    dx = rolled_x[:, None] - rolled_x[None] + window - 1
    index = (dy * (2 * window - 1) + dx).clamp(0, (2 * window - 1) ** 2 - 1)
    bias_ANN = read.tensors[f"{name}.relative_position_bias_table"][index].permute(2, 0, 1)
    q, k, v = read.linear(as_tokens(padded), f"{name}.qkv").chunk(3, -1)
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5 + bias_ANN
    scores = scores.masked_fill(~inside, -torch.inf) - 100.0 * (inside & ~together)
    mixed = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
    out = as_map(read.linear(mixed, f"{name}.proj"), (height, width))
    return as_tokens(out[:, :, : hw[0], : hw[1]])

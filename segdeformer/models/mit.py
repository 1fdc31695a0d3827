"""Mix Transformer (MiT), the pyramid encoder of SegFormer (Xie et al. 2021, section 3.1).

B batch, H W size of a map, N = H*W tokens, M tokens after reduction, C channels, A heads, D = C/A.
Maps are kept as (B, H, W, C) in memory from end to end: linear layers see tokens, convolutions
see channels-last images, and no copy lies between them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from segdeformer.models.layers import keys_of

# transformers' SegformerModel builds every LayerNorm with PyTorch's default and never reads its own
# `layer_norm_eps` (1e-6). NVlabs mixes 1e-6 and 1e-5. One value, so that Hugging Face weights agree.
NORM_EPS = 1e-5

STRIDES = (4, 8, 16, 32)
REDUCTIONS = (8, 4, 2, 1)
EXPANSION = 4


class MiTSize(NamedTuple):
    channels: tuple[int, int, int, int]
    heads: tuple[int, int, int, int]
    depths: tuple[int, int, int, int]


MIT_SIZES = {
    "mit_nano": MiTSize((16, 32, 64, 128), (1, 2, 4, 8), (2, 2, 2, 2)),
    "mit_b0": MiTSize((32, 64, 160, 256), (1, 2, 5, 8), (2, 2, 2, 2)),
    "mit_b1": MiTSize((64, 128, 320, 512), (1, 2, 5, 8), (2, 2, 2, 2)),
    "mit_b2": MiTSize((64, 128, 320, 512), (1, 2, 5, 8), (3, 4, 6, 3)),
    "mit_b3": MiTSize((64, 128, 320, 512), (1, 2, 5, 8), (3, 4, 18, 3)),
    "mit_b4": MiTSize((64, 128, 320, 512), (1, 2, 5, 8), (3, 8, 27, 3)),
    "mit_b5": MiTSize((64, 128, 320, 512), (1, 2, 5, 8), (3, 6, 40, 3)),
}


class PatchEmbed(nn.Module):
    """Overlapping patches: a strided convolution, then LayerNorm."""

    def __init__(self, channels_in: int, channels: int, *, kernel: int, stride: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels_in, channels, kernel, stride, padding=kernel // 2)
        self.norm = nn.LayerNorm(channels, eps=NORM_EPS)

    def forward(self, x_BHWC: Tensor) -> Tensor:
        return self.norm(_conv(self.proj, x_BHWC))


class EfficientAttention(nn.Module):
    """Self-attention whose keys and values come from an R x R strided convolution of the map."""

    def __init__(self, channels: int, *, heads: int, reduction: int) -> None:
        super().__init__()
        self.heads = heads
        self.reduction = reduction
        self.query = nn.Linear(channels, channels)
        self.key = nn.Linear(channels, channels)
        self.value = nn.Linear(channels, channels)
        self.proj = nn.Linear(channels, channels)
        if reduction > 1:
            self.reduce = nn.Conv2d(channels, channels, reduction, reduction)
            self.reduce_norm = nn.LayerNorm(channels, eps=NORM_EPS)

    def forward(self, x_BHWC: Tensor) -> Tensor:
        source_BMC = self._reduced(x_BHWC).flatten(1, 2)
        q_BAND = self._split(self.query(x_BHWC.flatten(1, 2)))
        k_BAMD = self._split(keys_of(self.key, source_BMC))
        v_BAMD = self._split(self.value(source_BMC))
        mixed_BAND = F.scaled_dot_product_attention(q_BAND, k_BAMD, v_BAMD)
        return self.proj(mixed_BAND.transpose(1, 2).reshape(x_BHWC.shape))

    def _split(self, x_BNC: Tensor) -> Tensor:
        return x_BNC.view(*x_BNC.shape[:2], self.heads, -1).transpose(1, 2)

    def _reduced(self, x_BHWC: Tensor) -> Tensor:
        if self.reduction == 1:
            return x_BHWC
        height, width = x_BHWC.shape[1:3]
        if height < self.reduction or width < self.reduction:
            # A map smaller than one window (images under 29 px) is filled up to it with zeros.
            right, below = max(0, self.reduction - width), max(0, self.reduction - height)
            x_BHWC = F.pad(x_BHWC, (0, 0, 0, right, 0, below))
        return self.reduce_norm(_conv(self.reduce, x_BHWC))


class MixFFN(nn.Module):
    """Feed-forward with a 3x3 depthwise convolution, which stands in for position embeddings."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = EXPANSION * channels
        self.expand = nn.Linear(channels, hidden)
        self.depthwise = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.contract = nn.Linear(hidden, channels)

    def forward(self, x_BHWC: Tensor) -> Tensor:
        return self.contract(F.gelu(_conv(self.depthwise, self.expand(x_BHWC))))


class DropPath(nn.Module):
    """Drop a residual branch per image, and scale the kept ones up to the same mean."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, branch_BHWC: Tensor) -> Tensor:
        if not self.training or self.rate == 0.0:
            return branch_BHWC
        # Dropout of a column of ones zeroes and rescales, also at rate 1.
        ones_B111 = branch_BHWC.new_ones(branch_BHWC.shape[0], 1, 1, 1)
        return branch_BHWC * F.dropout(ones_B111, self.rate)


class Block(nn.Module):
    """Pre-norm attention and Mix-FFN, each with a residual connection."""

    def __init__(self, channels: int, *, heads: int, reduction: int, drop_path: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(channels, eps=NORM_EPS)
        self.attention = EfficientAttention(channels, heads=heads, reduction=reduction)
        self.norm2 = nn.LayerNorm(channels, eps=NORM_EPS)
        self.ffn = MixFFN(channels)
        self.drop_path = DropPath(drop_path)

    def forward(self, x_BHWC: Tensor) -> Tensor:
        x_BHWC = x_BHWC + self.drop_path(self.attention(self.norm1(x_BHWC)))
        return x_BHWC + self.drop_path(self.ffn(self.norm2(x_BHWC)))


class Stage(nn.Module):
    """Patch embedding, blocks, LayerNorm."""

    def __init__(self, patch_embed: PatchEmbed, blocks: list[Block], channels: int) -> None:
        super().__init__()
        self.patch_embed = patch_embed
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.LayerNorm(channels, eps=NORM_EPS)

    def forward(self, x_BHWC: Tensor) -> Tensor:
        return self.norm(self.blocks(self.patch_embed(x_BHWC)))


class MiT(nn.Module):
    """Images to four maps at strides 4, 8, 16 and 32, of size ceil(H / stride) x ceil(W / stride).

    drop_path: rate of the last block; it grows linearly from 0 at the first.
    """

    def __init__(self, size: MiTSize, *, drop_path: float = 0.0) -> None:
        super().__init__()
        self.channels = size.channels
        self.strides = STRIDES
        last = sum(size.depths) - 1
        rates = (drop_path * block / last for block in range(last + 1))
        stages = []
        channels_in = 3
        for stage, channels in enumerate(size.channels):
            kernel, stride = (7, 4) if stage == 0 else (3, 2)
            patch_embed = PatchEmbed(channels_in, channels, kernel=kernel, stride=stride)
            blocks = [
                Block(channels, heads=size.heads[stage], reduction=REDUCTIONS[stage], drop_path=next(rates))
                for _ in range(size.depths[stage])
            ]
            stages.append(Stage(patch_embed, blocks, channels))
            channels_in = channels
        self.stages = nn.ModuleList(stages)
        self.apply(_init)

    def forward(self, images_B3HW: Tensor) -> list[Tensor]:
        x_BHWC = images_B3HW.permute(0, 2, 3, 1).contiguous()
        maps_BCHW = []
        for stage in self.stages:
            x_BHWC = stage(x_BHWC)
            maps_BCHW.append(x_BHWC.permute(0, 3, 1, 2))
        return maps_BCHW


def _conv(conv: nn.Conv2d, x_BHWC: Tensor) -> Tensor:
    return conv(x_BHWC.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def _init(module: nn.Module) -> None:
    """SegFormer's: truncated normal 0.02 for linears, fan-out normal for convolutions, zero biases."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Conv2d):
        # Depthwise weights have shape (C, 1, 3, 3): one group's fan-out, hence the division.
        fan_out = module.weight[:, 0].numel() / module.groups
        nn.init.normal_(module.weight, std=(2.0 / fan_out) ** 0.5)
        assert module.bias is not None
        nn.init.zeros_(module.bias)

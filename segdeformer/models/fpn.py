"""Semantic FPN: a top-down pyramid, and the sum of its levels at the first map's size.

Submodules carry mmsegmentation's names: `pyramid` is its FPN neck, and `scale_heads.i.k` its
`scale_heads.i.2k`, without the parameterless upsamplings between.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from segdeformer.models.fapn import AlignedPyramid
from segdeformer.models.layers import (
    ConvBNReLU,
    Tokens,
    initialise_decoder,
    initialise_linear_convolutions,
    resize,
    tokens_of,
)
from segdeformer.models.neck import MultiLevelNeck


class FeaturePyramid(nn.Module):
    """1x1 convolutions to `width`, each level plus the coarser one (nearest pixel), 3x3 convolutions."""

    def __init__(self, channels: Sequence[int], *, width: int) -> None:
        super().__init__()
        self.width = width
        self.lateral_convs = nn.ModuleList(nn.Conv2d(c, width, 1) for c in channels)
        self.fpn_convs = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in channels)
        self.apply(initialise_linear_convolutions)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        levels = [lateral(x) for lateral, x in zip(self.lateral_convs, maps, strict=True)]
        for i in reversed(range(len(levels) - 1)):
            levels[i] = levels[i] + F.interpolate(levels[i + 1], levels[i].shape[-2:], mode="nearest")
        return [conv(level) for conv, level in zip(self.fpn_convs, levels, strict=True)]


class PyramidFusion(nn.Module):
    """The head of Semantic FPN on a pyramid of either kind.

    A level goes through one 3x3 block for each doubling that it needs, and at least one; then all are summed.
    """

    def __init__(
        self,
        pyramid: FeaturePyramid | AlignedPyramid,
        strides: Sequence[int],
        *,
        width: int,
        neck: MultiLevelNeck | None = None,
    ) -> None:
        super().__init__()
        self.neck = neck
        self.pyramid = pyramid
        self.doublings = [round(math.log2(stride / strides[0])) for stride in strides]
        self.scale_heads = nn.ModuleList(
            nn.Sequential(
                *(
                    ConvBNReLU(pyramid.width if i == 0 else width, width, kernel_size=3)
                    for i in range(max(1, doublings))
                )
            )
            for doublings in self.doublings
        )
        self.scale_heads.apply(initialise_decoder)

    def forward(self, maps: Sequence[Tensor]) -> Tokens:
        if self.neck is not None:
            maps = self.neck(maps)
        levels = self.pyramid(maps)
        size = levels[0].shape[-2:]
        total = None
        for blocks, level, doublings in zip(self.scale_heads, levels, self.doublings, strict=True):
            assert isinstance(blocks, nn.Sequential)
            for block in blocks:
                level = block(level)
                if doublings:
                    level = F.interpolate(level, scale_factor=2.0, mode="bilinear", align_corners=False)
            level = resize(level, size)
            total = level if total is None else total + level
        assert total is not None
        return tokens_of(total)

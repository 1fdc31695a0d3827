"""UperNet: pyramid pooling of the last map, laterals, top-down sums, all mixed at the first map's size.

Submodules carry mmsegmentation's names, so that its weights can be told by name; a block's `.0` is its
`.conv` there, `.1` its `.bn`, and `psp_modules.i` its `psp_modules.i.1`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segdeformer.models.layers import ConvBNReLU, Tokens, initialise_decoder, resize, tokens_of
from segdeformer.models.neck import MultiLevelNeck


class UperNetFusion(nn.Module):
    """UperNet without its classifier; maps may have four sizes, or one and the same."""

    def __init__(
        self,
        channels: Sequence[int],
        *,
        width: int,
        pools: Sequence[int] = (1, 2, 3, 6),
        neck: MultiLevelNeck | None = None,
    ) -> None:
        super().__init__()
        *finer, deepest = channels
        self.pools = tuple(pools)
        self.neck = neck
        self.psp_modules = nn.ModuleList(ConvBNReLU(deepest, width) for _ in pools)
        self.bottleneck = ConvBNReLU(deepest + len(pools) * width, width, kernel_size=3)
        self.lateral_convs = nn.ModuleList(ConvBNReLU(c, width) for c in finer)
        self.fpn_convs = nn.ModuleList(ConvBNReLU(width, width, kernel_size=3) for _ in finer)
        self.fpn_bottleneck = ConvBNReLU(len(channels) * width, width, kernel_size=3)
        for child in self.children():
            if child is not neck:  # which arrives initialised
                child.apply(initialise_decoder)

    def forward(self, maps: Sequence[Tensor]) -> Tokens:
        if self.neck is not None:
            maps = self.neck(maps)
        levels = [lateral(x) for lateral, x in zip(self.lateral_convs, maps[:-1], strict=True)]
        levels.append(self.pooled(maps[-1]))
        for i in reversed(range(len(levels) - 1)):
            levels[i] = levels[i] + resize(levels[i + 1], levels[i].shape[-2:])
        smooth = [conv(level) for conv, level in zip(self.fpn_convs, levels[:-1], strict=True)]
        size = smooth[0].shape[-2:]
        everything = torch.cat([resize(level, size) for level in (*smooth, levels[-1])], dim=1)
        return tokens_of(self.fpn_bottleneck(everything))

    def pooled(self, map_BChw: Tensor) -> Tensor:
        """The map with its averages over coarse grids beside it, mixed to `width` channels."""
        size = map_BChw.shape[-2:]
        averages = [
            resize(block(F.adaptive_avg_pool2d(map_BChw, cells)), size)
            for block, cells in zip(self.psp_modules, self.pools, strict=True)
        ]
        return self.bottleneck(torch.cat([map_BChw, *averages], dim=1))

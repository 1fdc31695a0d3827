"""Swin at image sizes that windows do not divide, as published: pad to whole windows, then shift.

timm shifts first and pads then, so that the padding lies inside the shifted map. Both are the same where
windows divide every map, as at 224 px; elsewhere weights trained in mmsegmentation or Microsoft's code need
their order.
B batch, H W size of a map, C channels.
"""

from __future__ import annotations

import torch.nn.functional as F
from timm.models.swin_transformer import SwinTransformerBlock
from torch import Tensor, nn


class PaddedSwinBlock(SwinTransformerBlock):
    """timm's block, with its padding before its shift."""

    def _attn(self, x_BHWC: Tensor) -> Tensor:
        height, width = x_BHWC.shape[1:3]
        below, right = -height % self.window_size[0], -width % self.window_size[1]
        return super()._attn(F.pad(x_BHWC, (0, 0, 0, right, 0, below)))[:, :height, :width]


def pad_before_shifting(backbone: nn.Module) -> None:
    """Let every Swin block of a timm model pad first."""
    for module in backbone.modules():
        if type(module) is SwinTransformerBlock:
            module.__class__ = PaddedSwinBlock  # timm's models take no class for their blocks

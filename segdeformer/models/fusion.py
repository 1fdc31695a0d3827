"""Fuse the four encoder maps into one map of tokens at the first map's size (Eq. 1)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segdeformer.config import FusionConfig
from segdeformer.models.layers import ConvBNReLU, Tokens, initialise_decoder, tokens_of


class MLPFusion(nn.Module):
    """Bring every map to `width` channels and the first map's size, concatenate, mix with a 1x1 block.

    projection `conv_bn_relu`: 1x1 convolution + BatchNorm + ReLU per map, concatenated 1 to 4
    (mmsegmentation, and the paper's parameter counts). `linear`: a linear layer with bias per map,
    concatenated 4 to 1 (NVlabs, Hugging Face).
    """

    def __init__(self, channels: Sequence[int], *, width: int, projection: str = "conv_bn_relu") -> None:
        super().__init__()
        self.width = width
        self.deepest_first = projection == "linear"
        if projection == "linear":
            # A 1x1 convolution is Eq. 1's Linear, without moving the channels.
            linears = [nn.Conv2d(c, width, 1) for c in channels]
            self.project = nn.ModuleList(linears)
        else:
            self.project = nn.ModuleList(ConvBNReLU(c, width) for c in channels)
        self.fuse = ConvBNReLU(width * len(channels), width)
        self.apply(initialise_decoder)
        if projection == "linear":
            for linear in linears:
                nn.init.trunc_normal_(linear.weight, std=0.02)

    def forward(self, maps: Sequence[Tensor]) -> Tokens:
        size = maps[0].shape[-2:]
        projected = [
            F.interpolate(y, size, mode="bilinear", align_corners=False) if y.shape[-2:] != size else y
            for y in (layer(x) for layer, x in zip(self.project, maps, strict=True))
        ]
        if self.deepest_first:
            projected.reverse()
        return tokens_of(self.fuse(torch.cat(projected, dim=1)))


def build_fusion(config: FusionConfig, channels: Sequence[int]) -> MLPFusion:
    """The fusion that `config.kind` names, for encoder maps of these channels."""
    return MLPFusion(channels, width=config.width, projection=config.projection)

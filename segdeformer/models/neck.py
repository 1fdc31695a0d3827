"""Four sizes from the one of a flat (ViT) encoder: mmsegmentation's MultiLevelNeck."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from segdeformer.models.layers import initialise_linear_convolutions

NECK_SCALES = (4.0, 2.0, 1.0, 0.5)


class MultiLevelNeck(nn.Module):
    """A 1x1 convolution, bilinear resizing by 4, 2, 1 and 1/2, a 3x3 convolution; channels stay.

    An auxiliary head takes its encoder map from before the neck, in mmsegmentation from behind it.
    """

    def __init__(self, channels: Sequence[int]) -> None:
        super().__init__()
        self.lateral_convs = nn.ModuleList(nn.Conv2d(c, c, 1) for c in channels)
        self.convs = nn.ModuleList(nn.Conv2d(c, c, 3, padding=1) for c in channels)
        self.apply(initialise_linear_convolutions)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        return [
            conv(_scaled(lateral(x), scale))
            for lateral, conv, x, scale in zip(self.lateral_convs, self.convs, maps, NECK_SCALES, strict=True)
        ]


def _scaled(map_BChw: Tensor, scale: float) -> Tensor:
    if scale == 1 or (scale < 1 and min(map_BChw.shape[-2:]) == 1):  # half a pixel cannot be had
        return map_BChw
    return F.interpolate(map_BChw, scale_factor=scale, mode="bilinear", align_corners=False)

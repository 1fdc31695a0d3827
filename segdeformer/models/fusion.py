"""Fuse the four encoder maps into one map of tokens, at the first map's size.

MLP fusion (Eq. 1) is here, the others are in `upernet` and `fpn`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from torch import Tensor, nn

from segdeformer.errors import UsageError
from segdeformer.models.fapn import AlignedPyramid
from segdeformer.models.fpn import FeaturePyramid, PyramidFusion
from segdeformer.models.layers import ConvBNReLU, Tokens, initialise_decoder, resize, tokens_of
from segdeformer.models.neck import NECK_SCALES, MultiLevelNeck
from segdeformer.models.own import build_own_fusion
from segdeformer.models.upernet import UperNetFusion

if TYPE_CHECKING:  # modules need no recipe
    from segdeformer.config import FaPNConfig, FPNConfig, MLPFusionConfig, OwnFusionConfig, UperNetConfig


class MLPFusion(nn.Module):
    """Bring every map to `width` channels and the first map's size, concatenate, mix with a 1x1 block.

    projection `conv_bn_relu`: 1x1 convolution + BatchNorm + ReLU per map, concatenated 1 to 4
    (mmsegmentation, and the paper's parameter counts). `linear`: a linear layer with bias per map,
    concatenated 4 to 1 (NVlabs, Hugging Face). depth: 2, and one for each further 1x1 block (Table 8).

    A 1x1 convolution over a concatenation is a sum of one per map, and commutes with resizing: each
    map is mixed at its own size, and the concatenation is never made.
    """

    def __init__(
        self, channels: Sequence[int], *, width: int, depth: int = 2, projection: str = "conv_bn_relu"
    ) -> None:
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
        self.deepen = nn.Sequential(*(ConvBNReLU(width, width) for _ in range(depth - 2)))
        self.apply(initialise_decoder)
        if projection == "linear":
            for linear in linears:
                nn.init.trunc_normal_(linear.weight, std=0.02)

    def forward(self, maps: Sequence[Tensor]) -> Tokens:
        conv, norm, activation = self.fuse
        assert isinstance(conv, nn.Conv2d)
        weights = conv.weight.split(self.width, dim=1)
        if self.deepest_first:
            weights = weights[::-1]
        biases = [conv.bias, *[None] * (len(maps) - 1)]  # there is one when its BatchNorm is folded into it
        first, *others = [
            F.conv2d(layer(x), weight, bias)
            for layer, x, weight, bias in zip(self.project, maps, weights, biases, strict=True)
        ]
        for other in others:
            first += resize(other, first.shape[-2:])
        return tokens_of(self.deepen(activation(norm(first))))


Fusion = MLPFusion | UperNetFusion | PyramidFusion


def build_fusion(
    config: MLPFusionConfig | UperNetConfig | FPNConfig | FaPNConfig | OwnFusionConfig,
    channels: Sequence[int],
    strides: Sequence[int] = (4, 8, 16, 32),
) -> Any:
    """The fusion that `config.kind` names, for encoder maps of these channels and strides.

    Raises `UsageError` for a neck behind a pyramid encoder, `UserError` when `fapn` lacks torchvision.
    """
    from segdeformer.config import OwnFusionConfig

    if isinstance(config, OwnFusionConfig):
        return build_own_fusion(
            config.kind, channels, strides, width=config.width, options=config.options or {}
        )
    if config.kind == "mlp":
        return MLPFusion(channels, width=config.width, depth=config.depth, projection=config.projection)
    neck = None
    if config.neck:
        if len(set(strides)) > 1:
            raise UsageError(
                "`model.fusion.neck` is for flat (ViT) encoders, whose maps have one size; this one's have "
                f"strides {list(strides)}: set it to false"
            )
        neck = MultiLevelNeck(channels)
        strides = [round(stride / scale) for stride, scale in zip(strides, NECK_SCALES, strict=True)]
    if config.kind == "upernet":
        return UperNetFusion(channels, width=config.width, pools=config.pools, neck=neck)
    pyramid_type = FeaturePyramid if config.kind == "fpn" else AlignedPyramid
    pyramid = pyramid_type(channels, width=config.pyramid_width)
    return PyramidFusion(pyramid, strides, width=config.width, neck=neck)

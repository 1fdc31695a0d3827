"""Parts that fusion, context and heads share. B batch, N tokens, C channels, K classes, HW and hw maps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn


class Tokens(NamedTuple):
    """A map as a sequence of pixels, row by row; N = height * width."""

    pixels_BNC: Tensor
    height: int
    width: int

    def as_map(self) -> Tensor:
        """(B, C, height, width), a view."""
        return self.pixels_BNC.transpose(1, 2).unflatten(2, (self.height, self.width))


def tokens_of(map_BCHW: Tensor) -> Tokens:
    """The pixels of a map, (B, N, C); a view where memory is channels-last."""
    _, _, height, width = map_BCHW.shape
    return Tokens(map_BCHW.flatten(2).transpose(1, 2), height, width)


def resize(map_BChw: Tensor, size: Sequence[int]) -> Tensor:
    """Bilinear, with pixels as areas (align_corners=False); the map itself where it has that size."""
    if map_BChw.shape[-2:] == size:
        return map_BChw
    return F.interpolate(map_BChw, size, mode="bilinear", align_corners=False)


class SegOutput(NamedTuple):
    """What a decoder makes, at the size of the fused map."""

    logits_BKhw: Tensor
    class_logits_BKhw: Tensor | None  # float32, Attn_mid as a map, for L_attn (Eq. 8)
    auxiliary_logits_BKhw: Tensor | None  # training only
    fused_BChw: Tensor | None = None  # X without its graph; training with momentum tokens only


class ConvBNReLU(nn.Sequential):
    """Convolution without bias, BatchNorm, ReLU; the usual block of mmsegmentation's heads."""

    def __init__(self, in_channels: int, out_channels: int, *, kernel_size: int = 1) -> None:
        super().__init__(
            nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=False),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(inplace=True),
        )


class TokenConvBNReLU(nn.Module):
    """The same 1x1 block on tokens, as the released SegDeformer projects them."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.block = ConvBNReLU(in_channels, out_channels)

    def forward(self, pixels_BNC: Tensor) -> Tensor:
        # BatchNorm's statistics run over B and N, whatever the map's shape.
        map_BCN1 = pixels_BNC.transpose(1, 2).unsqueeze(-1)
        return self.block(map_BCN1).squeeze(-1).transpose(1, 2)


def keys_of(projection: nn.Module, x: Tensor) -> Tensor:
    """Project to keys. A linear projection's bias gets a gradient of exactly 0, which it has in theory.

    It adds the same to all scores of a query, which softmax ignores. Left to rounding, the gradient would be
    noise, and Adam magnifies noise to full steps, so that equal runs on other machines drift apart.
    """
    if not isinstance(projection, nn.Linear) or projection.bias is None:
        return projection(x)
    return F.linear(x, projection.weight, projection.bias.detach() + 0.0 * projection.bias)


def initialise_decoder(module: nn.Module) -> None:
    """Linears trunc-normal 0.02, convolutions normal by fan-out, norms 1 and 0; for `Module.apply`."""
    match module:
        case nn.Linear():
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        case nn.Conv2d():
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        case nn.BatchNorm2d() | nn.LayerNorm():
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)


def initialise_linear_convolutions(module: nn.Module) -> None:
    """Convolutions that no ReLU follows: Xavier-uniform, biases 0; for `Module.apply`."""
    if isinstance(module, nn.Conv2d):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)

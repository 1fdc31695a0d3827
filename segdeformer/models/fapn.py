"""FaPN's pyramid (Huang et al., ICCV 2021): features are selected, and coarser levels aligned to finer ones.

B batch, C channels of a map, W pyramid width, hw the finer map. torchvision is imported only to build one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from segdeformer.errors import UserError
from segdeformer.models.layers import initialise_linear_convolutions, resize

GROUPS = 8  # channels of one group are moved together
TAPS = 9  # of a 3x3 kernel


class FeatureSelection(nn.Module):
    """A lateral that first raises the channels that matter in this image: conv(x + gate * x)."""

    def __init__(self, in_channels: int, width: int) -> None:
        super().__init__()
        self.gate = nn.Conv2d(in_channels, in_channels, 1)
        self.select = nn.Conv2d(in_channels, width, 1, bias=False)

    def forward(self, map_BChw: Tensor) -> Tensor:
        gate_BC11 = self.gate(map_BChw.mean(dim=(2, 3), keepdim=True)).sigmoid()
        return self.select(map_BChw * (1 + gate_BC11))


class FeatureAlignment(nn.Module):
    """Move the coarser map's features, pixel by pixel, to where the finer map has theirs.

    A modulated deformable 3x3 convolution, whose offsets and masks are made of both maps. At the start
    the offsets are zero and the masks 1/2.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.compare = nn.Conv2d(2 * width, width, 1, bias=False)
        self.shift = nn.Conv2d(width, 3 * GROUPS * TAPS, 3, padding=1)
        self.deform = nn.Conv2d(width, width, 3, padding=1)  # its weights only; the work is `convolve`'s
        self.convolve = _deformable_convolution()

    def forward(self, fine_BWhw: Tensor, coarse_BWhw: Tensor) -> Tensor:
        shift = self.shift(self.compare(torch.cat([fine_BWhw, coarse_BWhw], dim=1)))
        offsets, masks = shift.split([2 * GROUPS * TAPS, GROUPS * TAPS], dim=1)
        # torchvision has no kernel for bfloat16.
        wide = torch.promote_types(coarse_BWhw.dtype, torch.float32)
        assert self.deform.bias is not None
        aligned_BWhw = self.convolve(
            coarse_BWhw.to(wide),
            offsets.to(wide),
            self.deform.weight.to(wide),
            self.deform.bias.to(wide),
            padding=1,
            mask=masks.sigmoid().to(wide),
        )
        return aligned_BWhw.relu().to(coarse_BWhw.dtype)


class AlignedPyramid(nn.Module):
    """A top-down pyramid whose laterals select features and whose coarser levels are aligned."""

    def __init__(self, channels: Sequence[int], *, width: int) -> None:
        super().__init__()
        self.width = width
        *finer, deepest = channels
        self.top = nn.Conv2d(deepest, width, 1)
        self.selections = nn.ModuleList(FeatureSelection(c, width) for c in finer)
        self.alignments = nn.ModuleList(FeatureAlignment(width) for _ in finer)
        self.output_convs = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in finer)
        self.apply(initialise_linear_convolutions)
        for alignment in self.alignments:
            assert isinstance(alignment, FeatureAlignment)
            nn.init.zeros_(alignment.shift.weight)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        levels = [self.top(maps[-1])]
        steps = zip(self.selections, self.alignments, self.output_convs, maps[:-1], strict=True)
        for select, align, convolve, x in reversed(list(steps)):
            fine_BWhw = select(x)
            coarse_BWhw = resize(levels[0], x.shape[-2:])
            levels.insert(0, convolve(fine_BWhw + align(fine_BWhw, coarse_BWhw)))
        return levels


def _deformable_convolution() -> Callable[..., Tensor]:
    """torchvision's function; that package is made for one version of PyTorch."""
    try:
        from torchvision.ops import deform_conv2d
    except (ImportError, RuntimeError) as error:
        raise UserError(
            f"fusion `fapn` needs torchvision's deformable convolution, which cannot be imported ({error}); "
            f"install the torchvision that goes with torch {torch.__version__}"
        ) from error
    return deform_conv2d

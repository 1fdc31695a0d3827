"""Dropout of whole images and channels that does not depend on how a batch is shared out.

Every process and every accumulated part draws the numbers of the whole batch and takes those of its own
images. B images of this part, C channels.
"""

from __future__ import annotations

import torch.nn.functional as F
from timm.layers.drop import DropPath as TimmDropPath
from torch import Tensor, nn

from segdeformer.models.mit import DropPath


class PlacedDropout(nn.Module):
    """A dropout whose numbers are one per image, or one per image and channel.

    first, total: where this part's images stand in the whole batch, see `put_place`. In one part it draws the
    numbers that PyTorch's and timm's modules draw.
    """

    def __init__(self, rate: float, *, channels: bool) -> None:
        super().__init__()
        self.rate = rate
        self.channels = channels
        self.first = 0
        self.total = 0

    def forward(self, x_BC: Tensor) -> Tensor:
        if not self.training or self.rate == 0.0:
            return x_BC
        last = self.first + x_BC.shape[0]
        assert last <= self.total
        per_image = (x_BC.shape[1],) if self.channels else (1,)
        shape = (self.total, *per_image, *(1,) * (x_BC.ndim - 2))
        # Dropout of ones zeroes and rescales, also at rate 1.
        return x_BC * F.dropout(x_BC.new_ones(shape), self.rate)[self.first : last]


def place_dropouts(model: nn.Module) -> None:
    """Exchange drop paths and channel dropouts for placed ones, in place; parameters stay as they are."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            match child:
                case DropPath():
                    setattr(parent, name, PlacedDropout(child.rate, channels=False))
                case TimmDropPath() if child.scale_by_keep:
                    setattr(parent, name, PlacedDropout(child.drop_prob, channels=False))
                case nn.Dropout2d():
                    setattr(parent, name, PlacedDropout(child.p, channels=True))


def put_place(model: nn.Module, *, first: int, total: int) -> None:
    """Say which images of the whole batch the next forward pass has: `first` and those after it."""
    for module in model.modules():
        if isinstance(module, PlacedDropout):
            module.first, module.total = first, total

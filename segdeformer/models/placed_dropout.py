"""Dropout that does not depend on how a batch is shared out.

Every process and every micro-batch draws the numbers of the whole batch and takes those of its own
images. B images of this micro-batch, C channels.
"""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from segdeformer.models.mit import DropPath


class PlacedDropout(nn.Module):
    """A dropout whose numbers are one per image, per image and channel, or per element.

    first, total: where this micro-batch's images stand in the whole batch, see `put_place`. Where there is
    only one, it draws the numbers that PyTorch's and timm's modules draw.
    """

    def __init__(self, rate: float, *, of: Literal["images", "channels", "elements"]) -> None:
        super().__init__()
        self.rate = rate
        self.of = of
        self.first = 0
        self.total = 0

    def forward(self, x_BC: Tensor) -> Tensor:
        if not self.training or self.rate == 0.0:
            return x_BC
        last = self.first + x_BC.shape[0]
        assert last <= self.total
        num_own = {"images": 1, "channels": 2, "elements": x_BC.ndim}[self.of]  # dimensions
        shape = (self.total, *x_BC.shape[1:num_own], *(1,) * (x_BC.ndim - num_own))
        # Dropout of ones zeroes and rescales, also at rate 1.
        return x_BC * F.dropout(x_BC.new_ones(shape), self.rate)[self.first : last]


def place_dropouts(model: nn.Module) -> None:
    """Exchange dropouts and drop paths for placed ones, in place; parameters stay as they are.

    Not the element-wise ones of encoders, some of which see windows instead of images; they are off.
    """
    for path, parent in list(model.named_modules()):
        for name, child in list(parent.named_children()):
            match child:
                case DropPath():
                    placed = PlacedDropout(child.rate, of="images")
                case _ if _is_timm_drop_path(child):
                    placed = PlacedDropout(child.drop_prob, of="images")
                case nn.Dropout2d():
                    placed = PlacedDropout(child.p, of="channels")
                case nn.Dropout() if child.p > 0.0 and not f"{path}.".startswith("encoder."):
                    placed = PlacedDropout(child.p, of="elements")
                case _:
                    continue
            setattr(parent, name, placed)


def _is_timm_drop_path(module: nn.Module) -> bool:
    """By its name, for to import timm takes seconds."""
    names = (type(module).__module__, type(module).__name__)
    return names == ("timm.layers.drop", "DropPath") and bool(module.scale_by_keep)


def put_place(model: nn.Module, *, first: int, total: int) -> None:
    """Say which images of the whole batch the next forward pass has: `first` and those after it."""
    for module in model.modules():
        if isinstance(module, PlacedDropout):
            module.first, module.total = first, total

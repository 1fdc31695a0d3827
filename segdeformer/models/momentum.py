"""Momentum tokens (Table 5): each external token is a running mean of its class's pixels.

B batch, C channels, K classes, hw the fused map, HW labels.
The features are the fused map X, before any context. Sums, not means, are handed around: those of
micro-batches and of processes add up to the sums of the whole batch.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn


class ClassSums(NamedTuple):
    """What a batch says about each class."""

    sums_KC: Tensor  # float64, over the pixels of the class
    counts_K: Tensor  # int64, how many they are

    def plus(self, other: ClassSums) -> ClassSums:
        """The sums of both batches."""
        return ClassSums(self.sums_KC + other.sums_KC, self.counts_K + other.counts_K)


@torch.no_grad()
def class_sums(map_BChw: Tensor, labels_BHW: Tensor, *, num_classes: int, ignore_index: int) -> ClassSums:
    """Sum the pixels of each class, whose labels are taken at the map's size by nearest neighbour.

    Labels of no class are left out; whether there may be any is for the loss to say.
    """
    _, channels, height, width = map_BChw.shape
    labels_Bhw = nearest_labels(labels_BHW, height, width)
    outside = (labels_Bhw == ignore_index) | (labels_Bhw < 0) | (labels_Bhw >= num_classes)
    labels_Bhw = labels_Bhw.masked_fill(outside, num_classes)
    sums_KC = map_BChw.new_zeros(num_classes, channels, dtype=torch.float64)
    counts_K = labels_BHW.new_zeros(num_classes, dtype=torch.int64)
    for map_Chw, labels_hw in zip(map_BChw, labels_Bhw, strict=True):
        # A product with 0s and 1s, where adding row by row would depend on a GPU's order of threads.
        shares_NK = F.one_hot(labels_hw.flatten(), num_classes + 1)[:, :num_classes]
        sums_KC += (map_Chw.flatten(1).double() @ shares_NK.double()).T
        counts_K += shares_NK.sum(dim=0)
    return ClassSums(sums_KC, counts_K)


def nearest_labels(labels_BHW: Tensor, height: int, width: int) -> Tensor:
    """int64 labels (B, height, width): row i is row floor(i H / height), as PyTorch's `nearest`."""
    rows = torch.arange(height, device=labels_BHW.device) * labels_BHW.shape[1] // height
    columns = torch.arange(width, device=labels_BHW.device) * labels_BHW.shape[2] // width
    return labels_BHW[:, rows[:, None], columns].long()


def summed_over_processes(sums: ClassSums) -> ClassSums:
    """The sums of all processes' batches, where `torch.distributed` runs; every process must call it."""
    if not (dist.is_available() and dist.is_initialized()):
        return sums
    total = ClassSums(sums.sums_KC.clone(), sums.counts_K.clone())
    for tensor in total:
        dist.all_reduce(tensor)
    return total


class MomentumTokens(nn.Module):
    """Running means of the classes' pixels, without gradient; one K x C table informs and is found by.

    Before its class is first seen, a token is what a learned one begins with. The first mean is taken as it
    is. Afterwards T <- (1 - momentum) T + momentum mean, once a step, where the batch has the class.
    """

    tokens_KC: Tensor
    seen_K: Tensor  # bool

    def __init__(self, num_classes: int, width: int, *, momentum: float) -> None:
        super().__init__()
        self.momentum = momentum
        self.register_buffer("tokens_KC", nn.init.trunc_normal_(torch.empty(num_classes, width), std=0.02))
        self.register_buffer("seen_K", torch.zeros(num_classes, dtype=torch.bool))

    def tables(self) -> tuple[Tensor, Tensor]:
        """(info, class), each (K, C); here the same."""
        return self.tokens_KC, self.tokens_KC

    @torch.no_grad()
    def update(self, sums: ClassSums) -> None:
        """Take in the sums of one step's whole batch; after its backward pass, which needs the old tokens."""
        present_K1 = (sums.counts_K > 0)[:, None]
        means_KC = sums.sums_KC / sums.counts_K.clamp(min=1)[:, None]
        old_KC = self.tokens_KC.double()
        moved_KC = torch.where(
            self.seen_K[:, None], (1.0 - self.momentum) * old_KC + self.momentum * means_KC, means_KC
        )
        self.tokens_KC.copy_(torch.where(present_K1, moved_KC, old_KC))
        self.seen_K |= present_K1[:, 0]

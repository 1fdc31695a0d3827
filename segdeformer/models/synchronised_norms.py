"""BatchNorms whose statistics are those of all processes' images together.

On a GPU these are PyTorch's own. PyTorch has none for the CPU, where two gloo processes would train something
else than one. (B, C, ...) maps.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


class _AddUp(torch.autograd.Function):
    """The sum over all processes, and for the gradient the sum of theirs."""

    @staticmethod
    def forward(_context: Any, values: Tensor) -> Tensor:
        total = values.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(_context: Any, gradient: Tensor) -> Any:
        total = gradient.clone()
        dist.all_reduce(total)
        return total


class CPUSyncBatchNorm(nn.modules.batchnorm._BatchNorm):
    """BatchNorm over the maps of all processes, through gloo; timm's dropout and activation follow."""

    def __init__(self, norm: nn.modules.batchnorm._BatchNorm) -> None:
        super().__init__(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
        self.weight, self.bias = norm.weight, norm.bias
        for name, buffer in norm.named_buffers(recurse=False):
            self.register_buffer(name, buffer)
        self.drop: Any = getattr(norm, "drop", nn.Identity())
        self.act: Any = getattr(norm, "act", nn.Identity())

    def _check_input_dim(self, input: Tensor) -> None:
        """Any number of dimensions after the channels."""

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.act(self.drop(self._normalise(x_BCHW)))

    def _normalise(self, x_BCHW: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x_BCHW)
        over = [0, *range(2, x_BCHW.ndim)]
        wide = x_BCHW.double()  # sums of squares must not depend on how they are split
        sums = torch.stack([wide.sum(over), wide.square().sum(over)])
        counts = torch.full_like(sums[:1], x_BCHW.numel() / x_BCHW.shape[1])
        sums = _AddUp.apply(torch.cat([sums, counts]))
        num_values = sums[2]
        if num_values[0] <= 1:
            raise ValueError(
                f"Expected more than 1 value per channel when training, got input size {x_BCHW.shape}"
            )
        mean_C = sums[0] / num_values
        variance_C = sums[1] / num_values - mean_C.square()
        self._keep(mean_C.detach(), (variance_C * num_values / (num_values - 1)).detach())
        shape = (1, -1, *(1,) * (x_BCHW.ndim - 2))
        scale_C = (variance_C + self.eps).rsqrt()
        if self.affine:
            scale_C = scale_C * self.weight
        shift_C = -mean_C * scale_C
        if self.affine:
            shift_C = shift_C + self.bias
        return (wide * scale_C.view(shape) + shift_C.view(shape)).to(x_BCHW.dtype)

    def _keep(self, mean_C: Tensor, variance_C: Tensor) -> None:
        if self.running_mean is None or self.running_var is None:
            return
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        rate = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean_C.to(self.running_mean.dtype), rate)
        self.running_var.lerp_(variance_C.to(self.running_var.dtype), rate)


def synchronise_norms(model: nn.Module, device: torch.device) -> None:
    """Exchange BatchNorms for ones over all processes, in place; names and values of the state stay.

    One process alone needs none and keeps its own.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    if device.type == "cuda":
        from timm.layers.norm_act import convert_sync_batchnorm

        convert_sync_batchnorm(model)
        return
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.modules.batchnorm._BatchNorm):
                setattr(parent, name, CPUSyncBatchNorm(child))

"""How the upsampling kernels are called. B batch, K classes, hw map, HW output."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from segdeformer.kernels.launch import Launch, dot_precision
from segdeformer.kernels.tiles import Tile
from segdeformer.kernels.upsample.triton_kernels import (
    upsampled_argmax,
    upsampled_loss,
    upsampled_loss_gradient,
)

BLOCK_PIXELS, BLOCK_CLASSES = 32, 32  # no spills, and room for many programs
TILE = Tile(BLOCK_PIXELS, BLOCK_CLASSES, 4, 1)
GRADIENT_COLUMNS = 16  # low-resolution places of a program


class Upsampling(NamedTuple):
    """Logits, the output's size, and what all kernels need of both."""

    logits: Tensor
    height: int
    width: int

    def numbers(self) -> dict[str, int | float]:
        return {
            "num_classes": self.logits.shape[1],
            "height": self.height,
            "width": self.width,
            "map_height": self.logits.shape[2],
            "map_width": self.logits.shape[3],
            **_strides(self.logits),
        }

    @property
    def block_classes(self) -> int:
        return min(BLOCK_CLASSES, max(16, triton.next_power_of_2(self.logits.shape[1])))

    def constants(self) -> dict[str, int | str | bool]:
        sides = zip(self.logits.shape[2:], (self.height, self.width), strict=True)
        # The largest number that finding a position takes, at the end of the last block.
        wide = any(2 * (s + 1) * (t + BLOCK_PIXELS + 1) >= 2**31 for s, t in sides)
        return {"WIDE": wide, "BLOCK_PIXELS": BLOCK_PIXELS, "BLOCK_CLASSES": self.block_classes}

    def grid(self) -> tuple[int, int, int]:
        return triton.cdiv(self.width, BLOCK_PIXELS), self.height, self.logits.shape[0]


def _strides(logits: Tensor) -> dict[str, int]:
    names = "batch_stride", "class_stride", "row_stride", "column_stride"
    return dict(zip(names, logits.stride(), strict=True))


class LossTerms(NamedTuple):
    """What the loss adds to the logits."""

    labels: Tensor
    class_weights: Tensor | None
    ignore_index: int
    label_smoothing: float

    def tensors(self) -> dict[str, Tensor]:
        weights, weight_sum = self.labels, self.labels  # not looked at
        if self.class_weights is not None:
            weights = weight_sum = self.class_weights
            if self.label_smoothing:
                weight_sum = self.class_weights.sum().reshape(1)
        return {"labels": self.labels, "class_weights": weights, "weight_sum": weight_sum}

    def numbers(self) -> dict[str, int | float]:
        return {"ignore_index": self.ignore_index, "smoothing": float(self.label_smoothing)}

    def constants(self) -> dict[str, int | str | bool]:
        return {"WEIGHTED": self.class_weights is not None, "SMOOTHED": self.label_smoothing > 0}


def loss_launch(up: Upsampling, terms: LossTerms, lse: Tensor, losses: Tensor) -> Launch:
    """Each pixel's log-sum-exp and loss, (B, H, W) float32."""
    return Launch(
        upsampled_loss,
        up.grid(),
        {"logits": up.logits, **terms.tensors(), "lse": lse, "losses": losses},
        {**up.numbers(), **terms.numbers()},
        {**up.constants(), **terms.constants()},
        TILE,
    )


def gradient_launch(
    up: Upsampling, terms: LossTerms, lse: Tensor, factor: Tensor, grad_logits: Tensor
) -> Launch:
    """The gradient of the summed loss times a number on the device."""
    batch, num_classes, map_height, map_width = up.logits.shape
    class_blocks = triton.cdiv(num_classes, up.block_classes)
    return Launch(
        upsampled_loss_gradient,
        (triton.cdiv(map_width, GRADIENT_COLUMNS), map_height, batch * class_blocks),
        {"logits": up.logits, **terms.tensors(), "lse": lse, "factor": factor, "grad_logits": grad_logits},
        {
            **up.numbers(),
            **terms.numbers(),
            **{f"grad_{name}": stride for name, stride in _strides(grad_logits).items()},
        },
        {
            **up.constants(),
            **terms.constants(),
            # Of half-precision logits, sums in tf32 lose nothing that was there.
            "PRECISION": dot_precision(torch.float32, tf32=up.logits.dtype != torch.float32),
            "BLOCK_COLUMNS": GRADIENT_COLUMNS,
        },
        TILE,
    )


def argmax_launch(up: Upsampling, ids: Tensor, confidence: Tensor | None) -> Launch:
    """The argmax class of each pixel and, if wanted, its softmax."""
    return Launch(
        upsampled_argmax,
        up.grid(),
        {"logits": up.logits, "ids": ids, "confidence": ids if confidence is None else confidence},
        up.numbers(),
        {**up.constants(), "CONFIDENT": confidence is not None},
        TILE,
    )

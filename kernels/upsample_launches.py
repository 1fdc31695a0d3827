"""How the upsampling kernels are called, and their PyTorch operators.

B batch, K classes, hw map, HW output.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from segdeformer.kernels.launch import Launch, check_operands, dot_precision
from segdeformer.kernels.tiles import Tile
from segdeformer.kernels.upsample_argmax import empty_winners
from segdeformer.kernels.upsample_triton import (
    upsampled_argmax,
    upsampled_loss,
    upsampled_loss_gradient,
)

TILE = Tile(32, 32, 4, 1)  # pixels x classes: no spills, and room for many programs
GRADIENT_COLUMNS = 16  # low-resolution places of a program


class Upsampling(NamedTuple):
    """Logits, the output's size, and what all kernels need of both."""

    logits: Tensor
    height: int
    width: int

    def numbers(self) -> dict[str, int | float]:
        batch_stride, class_stride, row_stride, column_stride = self.logits.stride()
        return {
            "num_classes": self.logits.shape[1],
            "height": self.height,
            "width": self.width,
            "map_height": self.logits.shape[2],
            "map_width": self.logits.shape[3],
            "batch_stride": batch_stride,
            "class_stride": class_stride,
            "row_stride": row_stride,
            "column_stride": column_stride,
        }

    def constants(self, tile: Tile) -> dict[str, int | str | bool]:
        sides = zip(self.logits.shape[2:], (self.height, self.width), strict=True)
        # The largest number that finding a position takes, at the end of the last block.
        wide = any(2 * (s + 1) * (t + tile.block_queries + 1) >= 2**31 for s, t in sides)
        return {"WIDE": wide, "BLOCK_PIXELS": tile.block_queries, "BLOCK_CLASSES": self.block_classes(tile)}

    def block_classes(self, tile: Tile) -> int:
        return min(tile.block_keys, max(16, triton.next_power_of_2(self.logits.shape[1])))

    def grid(self, tile: Tile) -> tuple[int, int, int]:
        return triton.cdiv(self.width, tile.block_queries), self.height, self.logits.shape[0]


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


def loss_launch(
    up: Upsampling, terms: LossTerms, lse: Tensor, losses: Tensor, *, tile: Tile = TILE
) -> Launch:
    """Each pixel's log-sum-exp and loss, (B, H, W) float32."""
    return Launch(
        upsampled_loss,
        up.grid(tile),
        {"logits": up.logits, **terms.tensors(), "lse": lse, "losses": losses},
        {**up.numbers(), **terms.numbers()},
        {**up.constants(tile), **terms.constants()},
        tile,
    )


def gradient_launch(
    up: Upsampling,
    terms: LossTerms,
    lse: Tensor,
    factor: Tensor,
    grad_logits: Tensor,
    *,
    tile: Tile = TILE,
) -> Launch:
    """The gradient of the summed loss times a number on the device."""
    batch, num_classes, map_height, map_width = up.logits.shape
    class_blocks = triton.cdiv(num_classes, up.block_classes(tile))
    return Launch(
        upsampled_loss_gradient,
        (triton.cdiv(map_width, GRADIENT_COLUMNS), map_height, batch * class_blocks),
        {
            "logits": up.logits,
            **terms.tensors(),
            "lse": lse,
            "factor": factor,
            "grad_logits": grad_logits,
        },
        {
            **up.numbers(),
            **terms.numbers(),
            "grad_batch_stride": grad_logits.stride(0),
            "grad_class_stride": grad_logits.stride(1),
            "grad_row_stride": grad_logits.stride(2),
            "grad_column_stride": grad_logits.stride(3),
        },
        {
            **up.constants(tile),
            **terms.constants(),
            # Of half-precision logits, sums in tf32 lose nothing that was there.
            "PRECISION": dot_precision(torch.float32, tf32=up.logits.dtype != torch.float32),
            "BLOCK_COLUMNS": GRADIENT_COLUMNS,
        },
        tile,
    )


def argmax_launch(up: Upsampling, ids: Tensor, confidence: Tensor | None, *, tile: Tile = TILE) -> Launch:
    """The winning class of each pixel and, if wanted, its softmax."""
    return Launch(
        upsampled_argmax,
        up.grid(tile),
        {"logits": up.logits, "ids": ids, "confidence": ids if confidence is None else confidence},
        up.numbers(),
        {**up.constants(tile), "CONFIDENT": confidence is not None},
        tile,
    )


@torch.library.custom_op("segdeformer::upsample_loss", mutates_args=())
def upsample_loss_triton(
    logits: Tensor,
    labels: Tensor,
    class_weights: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Sum of the losses, each pixel's loss and log-sum-exp, (B, H, W) float32. Only the sum has gradients.

    A label that is neither a class nor ignored makes the loss NaN: nothing waits for the GPU to look.
    """
    check_operands(logits)
    losses, lse = _pixels(logits, labels), _pixels(logits, labels)
    if losses.numel():
        up = Upsampling(logits, labels.shape[1], labels.shape[2])
        loss_launch(up, _terms(labels, class_weights, ignore_index, label_smoothing), lse, losses).run()
    return losses.sum(dtype=torch.float64).float(), losses, lse


def _pixels(logits: Tensor, labels: Tensor) -> Tensor:
    return logits.new_empty(labels.shape, dtype=torch.float32)


def _terms(labels: Tensor, weights: Tensor | None, ignore_index: int, label_smoothing: float) -> LossTerms:
    weights = weights.float().contiguous() if weights is not None else None
    return LossTerms(labels.contiguous(), weights, ignore_index, label_smoothing)


@upsample_loss_triton.register_fake
def _(
    logits: Tensor,
    labels: Tensor,
    class_weights: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return logits.new_empty((), dtype=torch.float32), _pixels(logits, labels), _pixels(logits, labels)


@torch.library.custom_op("segdeformer::upsample_loss_backward", mutates_args=())
def upsample_loss_backward(
    logits: Tensor,
    labels: Tensor,
    class_weights: Tensor | None,
    lse: Tensor,
    factor: Tensor,
    ignore_index: int,
    label_smoothing: float,
) -> Tensor:
    """The gradient of the summed loss, times the scalar `factor`."""
    grad_logits = torch.empty_like(logits)
    if not grad_logits.numel() or not labels.numel():
        return grad_logits.zero_()
    up = Upsampling(logits, labels.shape[1], labels.shape[2])
    terms = _terms(labels, class_weights, ignore_index, label_smoothing)
    gradient_launch(up, terms, lse, factor, grad_logits).run()
    return grad_logits


@upsample_loss_backward.register_fake
def _(
    logits: Tensor,
    labels: Tensor,
    class_weights: Tensor | None,
    lse: Tensor,
    factor: Tensor,
    ignore_index: int,
    label_smoothing: float,
) -> Tensor:
    return torch.empty_like(logits)


def _keep(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    logits, labels, class_weights, ctx.ignore_index, ctx.label_smoothing = inputs
    ctx.save_for_backward(logits, labels, class_weights, output[2])


def _backward(ctx, grad_sum, grad_losses, grad_lse):  # type: ignore[no-untyped-def]
    logits, labels, class_weights, lse = ctx.saved_tensors
    gradient = upsample_loss_backward(
        logits, labels, class_weights, lse, grad_sum, ctx.ignore_index, ctx.label_smoothing
    )
    return gradient, None, None, None, None


upsample_loss_triton.register_autograd(_backward, setup_context=_keep)


@torch.library.custom_op("segdeformer::upsample_argmax", mutates_args=())
def upsample_argmax_triton(
    logits: Tensor, height: int, width: int, confidence: bool
) -> tuple[Tensor, Tensor]:
    """Winning ids (B, H, W) and their softmax, empty if not wanted."""
    check_operands(logits)
    ids, shares = empty_winners(logits, height, width, confidence)
    if ids.numel():
        argmax_launch(Upsampling(logits, height, width), ids, shares if confidence else None).run()
    return ids, shares


upsample_argmax_triton.register_fake(empty_winners)

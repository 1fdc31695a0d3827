"""The upsampled loss and argmax through the Triton kernels, as PyTorch operators. B batch, HW output."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from segdeformer.kernels.launch import check_operands
from segdeformer.kernels.upsample.launch import (
    LossTerms,
    Upsampling,
    argmax_launch,
    gradient_launch,
    loss_launch,
)
from segdeformer.kernels.upsample.strips import empty_argmax


@torch.library.custom_op("segdeformer::upsample_loss", mutates_args=())
def upsample_loss_triton(
    logits: Tensor, labels: Tensor, class_weights: Tensor | None, ignore_index: int, label_smoothing: float
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
def _(logits: Tensor, labels: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
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
def _(logits: Tensor, *_: Any) -> Tensor:
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
    logits: Tensor, height: int, width: int, with_confidence: bool
) -> tuple[Tensor, Tensor]:
    """Class ids (B, H, W) and their softmax, empty if not wanted."""
    check_operands(logits)
    ids, confidence = empty_argmax(logits, height, width, with_confidence)
    if ids.numel():
        argmax_launch(Upsampling(logits, height, width), ids, confidence if with_confidence else None).run()
    return ids, confidence


upsample_argmax_triton.register_fake(empty_argmax)

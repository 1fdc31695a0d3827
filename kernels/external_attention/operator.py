"""`external_attention` through the Triton kernels, as PyTorch operators with gradients.

P = softmax(A) is made once, in rows padded for the attention kernels; then keys and values are the same
tile, so half the traffic, and dP is one accumulator that goes through the softmax into dA on chip.
B batch, N pixels, K classes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from segdeformer.kernels.attention.launch import Operands
from segdeformer.kernels.attention.operator import start_tiled, with_upstream
from segdeformer.kernels.external_attention.launch import external_launch, probabilities_launch
from segdeformer.kernels.launch import check_operands, check_widths, padded_rows
from segdeformer.kernels.operators import define_with_gradient, empty_like
from segdeformer.kernels.plans import start_kernel
from segdeformer.kernels.tiles import padded_width


def external_attention_triton(scores_BNK: Tensor, class_logits_BNK: Tensor, *, scale: float) -> Tensor:
    """softmax(scale * Q~ P^T) P with P = softmax(A), (B, N, K), with gradients.

    Under autocast the scores take its dtype. class_logits_BNK: A, float32 or the dtype of the scores.
    Raises `ValueError` for other inputs, and `KernelError` when a kernel does not start.
    """
    device_type = scores_BNK.device.type
    if torch.is_autocast_enabled(device_type):
        scores_BNK = scores_BNK.to(torch.get_autocast_dtype(device_type))
    check_operands(scores_BNK)
    check_widths(scores_BNK.shape[2])
    dtype, device = class_logits_BNK.dtype, class_logits_BNK.device
    if dtype not in (torch.float32, scores_BNK.dtype) or device != scores_BNK.device:
        raise ValueError(
            f"class logits are {dtype} on {device}; expected float32 or the scores' "
            f"{scores_BNK.dtype}, on {scores_BNK.device}"
        )
    mixed_BNK, _ = external_attention_with_lse(scores_BNK, class_logits_BNK, scale)
    return mixed_BNK


def _forward(scores: Tensor, class_logits: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    mixed, lse = _empty_outputs(scores)
    if mixed.numel():
        x = external_operands(scores, class_logits, scale)
        start_tiled("external_forward", x, {"out": mixed, "lse": lse}, external_launch)
    return mixed, lse


def _empty_outputs(scores: Tensor, *_: Tensor | float) -> tuple[Tensor, Tensor]:
    return scores.new_empty(scores.shape), scores.new_empty(scores.shape[:2], dtype=torch.float32)


def _backward(
    scores: Tensor, class_logits: Tensor, mixed: Tensor, lse: Tensor, grad_mixed: Tensor, scale: float
) -> tuple[Tensor, ...]:
    grad_scores, grad_class_logits = empty_like(scores, class_logits)
    if grad_mixed.numel():
        x = with_upstream(external_operands(scores, class_logits, scale), mixed, lse, grad_mixed)
        key = x.key()
        start_tiled("external_backward_queries", x, {"grad_queries": grad_scores}, external_launch, key=key)
        logits = {"class_logits": class_logits.contiguous(), "grad_class_logits": grad_class_logits}
        start_tiled("external_backward_keys", x, logits, external_launch, key=(key, class_logits.dtype))
    return grad_scores, grad_class_logits


def external_operands(scores: Tensor, class_logits: Tensor, scale: float) -> Operands:
    """Q~ padded, and P as both keys and values."""
    width = scores.shape[2]
    probabilities = scores.new_empty(*scores.shape[:2], padded_width(width))
    class_logits = class_logits.contiguous()
    key = "class_probabilities", class_logits.shape, class_logits.dtype, probabilities.dtype
    tensors = {"class_logits": class_logits, "probabilities": probabilities}
    start_kernel(key, tensors, lambda: [probabilities_launch(**tensors)])
    padded = padded_rows(scores, padded_width(width))
    return Operands(padded, probabilities, probabilities, width, width, scale, keys_are_values=True)


# The mixtures and, for the backward, each row's log-sum-exp in base 2, (B, N) float32.
external_attention_with_lse = define_with_gradient(
    "external_attention", ("scores", "class_logits"), _forward, _empty_outputs, _backward
)

"""`external_attention` through the Triton kernels, as PyTorch operators with gradients.

P = softmax(A) is made once, in rows padded for the attention kernels; then keys and values are the same
tile, so half the traffic, and dP is one accumulator that goes through the softmax into dA on chip.
B batch, N pixels, K classes.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from segdeformer.kernels.attention.launch import Operands
from segdeformer.kernels.attention.operator import make_upstream, start_backward_queries, start_tiled
from segdeformer.kernels.external_attention.launch import (
    external_backward_keys_launch,
    external_forward_launch,
    probabilities_launch,
)
from segdeformer.kernels.launch import check_operands, check_widths, padded_rows
from segdeformer.kernels.operators import define_gradient, define_operator
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
        tensors = {**x.tensors(), "out": mixed, "lse": lse}
        build = partial(external_forward_launch, x, mixed, lse)
        start_tiled("external_forward", x, x.key(), tensors, build)
    return mixed, lse


def _empty_outputs(scores: Tensor, *_: Tensor | float) -> tuple[Tensor, Tensor]:
    return scores.new_empty(scores.shape), scores.new_empty(scores.shape[:2], dtype=torch.float32)


def _backward(
    scores: Tensor, class_logits: Tensor, mixed: Tensor, lse: Tensor, grad_mixed: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    grad_scores, grad_class_logits = _empty_grads(scores, class_logits)
    if grad_mixed.numel():
        x = external_operands(scores, class_logits, scale)
        upstream = make_upstream(mixed, lse, grad_mixed, x.keys.shape[2])
        key = upstream.key(x)
        start_backward_queries(x, upstream, grad_scores, key=key, keys_are_values=True)
        class_logits = class_logits.contiguous()
        logits = {"class_logits": class_logits, "grad_class_logits": grad_class_logits}
        tensors = {**x.tensors(), **upstream.tensors(), **logits}
        build = partial(external_backward_keys_launch, x, upstream, class_logits, grad_class_logits)
        start_tiled("external_backward_keys", x, (key, class_logits.dtype), tensors, build)
    return grad_scores, grad_class_logits


def _empty_grads(scores: Tensor, class_logits: Tensor, *_: Tensor | float) -> tuple[Tensor, Tensor]:
    return scores.new_empty(scores.shape), class_logits.new_empty(class_logits.shape)


def external_operands(scores: Tensor, class_logits: Tensor, scale: float) -> Operands:
    """Q~ padded, and P as both keys and values."""
    width = scores.shape[2]
    probabilities = scores.new_empty(*scores.shape[:2], padded_width(width))
    class_logits = class_logits.contiguous()
    key = "class_probabilities", class_logits.shape, class_logits.dtype, probabilities.dtype
    tensors = {"class_logits": class_logits, "probabilities": probabilities}
    start_kernel(key, tensors, lambda: [probabilities_launch(**tensors)])
    padded = padded_rows(scores, padded_width(width))
    return Operands(padded, probabilities, probabilities, width, width, scale)


# The mixtures and, for the backward, each row's log-sum-exp in base 2, (B, N) float32.
external_attention_with_lse = define_operator(
    "external_attention",
    "(Tensor scores, Tensor class_logits, float scale) -> (Tensor, Tensor)",
    _forward,
    _empty_outputs,
)
# Gradients of the scores and of the class logits.
external_attention_backward = define_operator(
    "external_attention_backward",
    "(Tensor scores, Tensor class_logits, Tensor mixed, Tensor lse, Tensor grad_mixed, float scale)"
    " -> (Tensor, Tensor)",
    _backward,
    _empty_grads,
)
define_gradient(external_attention_with_lse, external_attention_backward)

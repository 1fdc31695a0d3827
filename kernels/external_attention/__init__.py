"""Second stage of external attention, in exact low-rank form. B batch, N pixels, K classes."""

from __future__ import annotations

from torch import Tensor

from segdeformer.kernels.attention import attention
from segdeformer.kernels.impl import Impl, choose_impl


def external_attention(
    scores_BNK: Tensor, class_logits_BNK: Tensor, *, scale: float, impl: Impl = "auto"
) -> Tensor:
    """softmax(scale * Q~ P^T) P with P = softmax(A), (B, N, K), in the dtype of `scores_BNK`.

    scores_BNK: Q~, each pixel's external query against each class prototype's key.
    class_logits_BNK: A of Eq. 6, before the softmax; float32 in half precision too.

    Eq. 7 with affine projections is this times the K x C values: X_mid = P G has rank K, so the
    C-wide keys and values never need to exist. Rows of P sum to one, hence a bias of the keys
    cancels and a bias of the values is added once, both by the caller.
    Raises `ValueError` when the two shapes differ.
    """
    if scores_BNK.ndim != 3 or scores_BNK.shape != class_logits_BNK.shape:
        raise ValueError(
            f"scores have shape {tuple(scores_BNK.shape)}, class logits {tuple(class_logits_BNK.shape)}; "
            "both must be (B, N, K)"
        )
    chosen = choose_impl(impl, scores_BNK, scores_BNK, scores_BNK, operation="external_attention")
    if chosen == "reference":
        return external_attention_reference(scores_BNK, class_logits_BNK, scale=scale)
    if chosen == "triton":
        from segdeformer.kernels.external_attention.operator import external_attention_triton

        return external_attention_triton(scores_BNK, class_logits_BNK, scale=scale)
    probabilities_BNK = class_logits_BNK.softmax(dim=-1).to(scores_BNK.dtype)
    return attention(scores_BNK, probabilities_BNK, probabilities_BNK, scale=scale, impl=chosen)


def external_attention_reference(scores_BNK: Tensor, class_logits_BNK: Tensor, *, scale: float) -> Tensor:
    """The definition, in equation order; holds the N x N matrix."""
    probabilities_BNK = class_logits_BNK.softmax(dim=-1).to(scores_BNK.dtype)
    weights_BNN = ((scores_BNK @ probabilities_BNK.transpose(1, 2)) * scale).softmax(dim=-1)
    return weights_BNN @ probabilities_BNK

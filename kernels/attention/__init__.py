"""Softmax attention of one head. B batch, N queries, M keys, D key width, E value width."""

from __future__ import annotations

import torch
from torch import Tensor

from segdeformer.kernels.attention.sdpa import attention_sdpa
from segdeformer.kernels.impl import Impl, choose_impl


def attention(
    queries_BND: Tensor,
    keys_BMD: Tensor,
    values_BME: Tensor,
    *,
    scale: float,
    bias_M: Tensor | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """softmax(scale * Q K^T + bias) V of Eq. 5, (B, N, E), in the inputs' dtype.

    M may differ from N (reduced keys and values) and E from D. Several heads: fold them into B.
    bias_M: float32 or wider, what each key's scores get besides, such as the log of how many keys it stands
        for; it takes no gradient.
    Raises `ValueError` when the shapes do not belong together.
    """
    check_attention_shapes(queries_BND, keys_BMD, values_BME)
    if bias_M is not None and bias_M.shape != keys_BMD.shape[1:2]:
        raise ValueError(
            f"the bias has shape {tuple(bias_M.shape)}; expected ({keys_BMD.shape[1]},), one a key"
        )
    match choose_impl(impl, queries_BND, keys_BMD, values_BME):
        case "triton":
            from segdeformer.kernels.attention.operator import attention_triton

            return attention_triton(queries_BND, keys_BMD, values_BME, scale=scale, bias_M=bias_M)
        case "reference":
            return attention_reference(queries_BND, keys_BMD, values_BME, scale=scale, bias_M=bias_M)
        case "blocks":
            from segdeformer.kernels.attention.blocks import attention_blocks

            with torch.autocast("cpu", enabled=False):
                return attention_blocks(queries_BND, keys_BMD, values_BME, scale=scale, bias_M=bias_M)
        case "sdpa":
            return attention_sdpa(queries_BND, keys_BMD, values_BME, scale=scale, bias_M=bias_M)


def attention_reference(
    queries_BND: Tensor, keys_BMD: Tensor, values_BME: Tensor, *, scale: float, bias_M: Tensor | None = None
) -> Tensor:
    """Eq. 5 as printed; holds the N x M matrix."""
    scores_BNM = (queries_BND @ keys_BMD.transpose(1, 2)) * scale
    if bias_M is not None:
        scores_BNM = scores_BNM + bias_M.to(scores_BNM.dtype)
    return scores_BNM.softmax(dim=-1) @ values_BME


def check_attention_shapes(queries_BND: Tensor, keys_BMD: Tensor, values_BME: Tensor) -> None:
    """Raise `ValueError` naming the shapes that disagree."""
    shapes = queries_BND.shape, keys_BMD.shape, values_BME.shape
    if not queries_BND.ndim == keys_BMD.ndim == values_BME.ndim == 3:
        raise ValueError(
            f"queries, keys, values have shapes {[tuple(shape) for shape in shapes]}; "
            "expected (B,N,D), (B,M,D), (B,M,E)"
        )
    (batch, _, width), (key_batch, num_keys, key_width), (value_batch, num_values, _) = shapes
    if not batch == key_batch == value_batch:
        raise ValueError(f"queries, keys, values have batches {batch}, {key_batch}, {value_batch}; need one")
    if width != key_width:
        raise ValueError(f"queries are {width} wide, keys {key_width}; both must be D")
    if num_keys != num_values:
        raise ValueError(f"there are {num_keys} keys and {num_values} values; both must be M")
    if num_keys == 0 or width == 0:
        raise ValueError(f"there are {num_keys} keys, {width} wide; attention needs at least one of each")

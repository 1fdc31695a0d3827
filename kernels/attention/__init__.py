"""Softmax attention of one head. B batch, N queries, M keys, D key width, E value width."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from segdeformer.kernels.impl import Impl, choose_impl

SDPA_ALIGNMENT = 8  # elements, for the GPU's fused kernels


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
            return _attention_sdpa(queries_BND, keys_BMD, values_BME, scale=scale, bias_M=bias_M)


def attention_reference(
    queries_BND: Tensor, keys_BMD: Tensor, values_BME: Tensor, *, scale: float, bias_M: Tensor | None = None
) -> Tensor:
    """Eq. 5 as printed; holds the N x M matrix."""
    scores_BNM = (queries_BND @ keys_BMD.transpose(1, 2)) * scale
    if bias_M is not None:
        scores_BNM = scores_BNM + bias_M.to(scores_BNM.dtype)
    return scores_BNM.softmax(dim=-1) @ values_BME


def _attention_sdpa(
    queries_BND: Tensor, keys_BMD: Tensor, values_BME: Tensor, *, scale: float, bias_M: Tensor | None
) -> Tensor:
    width, value_width = queries_BND.shape[-1], values_BME.shape[-1]
    # Unequal widths would drop PyTorch into the form that holds N x M scores, on a GPU odd ones too.
    # Zeros in queries and keys leave the scores as they are, zeros in values add columns that are cut off.
    common = max(width, value_width)
    if queries_BND.device.type != "cpu":
        common += -common % SDPA_ALIGNMENT
    if width < common:
        queries_BND, keys_BMD = F.pad(queries_BND, (0, common - width)), F.pad(keys_BMD, (0, common - width))
    if value_width < common:
        values_BME = F.pad(values_BME, (0, common - value_width))
    mask = None if bias_M is None else bias_M.to(queries_BND.dtype).expand(queries_BND.shape[1], -1)
    out_B1NE = F.scaled_dot_product_attention(
        queries_BND.unsqueeze(1), keys_BMD.unsqueeze(1), values_BME.unsqueeze(1), attn_mask=mask, scale=scale
    )
    return out_B1NE.squeeze(1)[..., :value_width]


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

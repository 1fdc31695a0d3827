"""Softmax attention of one head by PyTorch's own. B batch, N queries, M keys, D key width, E value width."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

SDPA_ALIGNMENT = 8  # elements, for the GPU's fused kernels


def attention_sdpa(
    queries_BND: Tensor, keys_BMD: Tensor, values_BME: Tensor, *, scale: float, bias_M: Tensor | None = None
) -> Tensor:
    """softmax(scale * Q K^T + bias) V, (B, N, E), without the N x M scores where PyTorch can."""
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

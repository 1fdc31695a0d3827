"""Softmax attention of one head on a CPU, without gradients: blocks that stay in cache, through oneDNN.

B batch, N queries, M keys, D key width, E value width; r rows and c columns of a block.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# 8 MiB of scores: the fastest of 512 to 2048 by 512 to 2048 at N = M = 16384, widths 256 and 150, two cores.
BLOCK_ROWS, BLOCK_COLUMNS = 2048, 1024


def attention_blocks(
    queries_BND: Tensor, keys_BMD: Tensor, values_BME: Tensor, *, scale: float, bias_M: Tensor | None = None
) -> Tensor:
    """softmax(scale * Q K^T + bias) V, (B, N, E), by an online softmax over blocks of 2048 x 1024 scores.

    Raises `ValueError` when gradients are wanted.
    """
    inputs = (queries_BND, keys_BMD, values_BME)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs):
        raise ValueError("impl `blocks` has no gradients; use `sdpa` to train, or torch.inference_mode()")
    return torch.stack([_attend(q, k, v, scale, bias_M) for q, k, v in zip(*inputs, strict=True)])


def _attend(
    queries_ND: Tensor, keys_MD: Tensor, values_ME: Tensor, scale: float, bias_M: Tensor | None
) -> Tensor:
    columns = [
        (
            keys_MD[first : first + BLOCK_COLUMNS].contiguous(),
            values_ME[first : first + BLOCK_COLUMNS].T.contiguous(),
            None if bias_M is None else bias_M[first : first + BLOCK_COLUMNS].to(keys_MD.dtype),
        )
        for first in range(0, keys_MD.shape[0], BLOCK_COLUMNS)
    ]
    out_NE = queries_ND.new_empty(queries_ND.shape[0], values_ME.shape[1])
    for queries_rD, out_rE in zip(queries_ND.split(BLOCK_ROWS), out_NE.split(BLOCK_ROWS), strict=True):
        queries_rD = queries_rD * scale  # one multiply per query, not per score
        if len(columns) == 1:  # few keys: one softmax
            keys_MD, values_EM, bias_M = columns[0]
            scores_rM = _matmul_transposed(queries_rD, keys_MD, bias_M)
            out_rE.copy_(_matmul_transposed(torch.softmax(scores_rM, dim=1, out=scores_rM), values_EM))
            continue
        highest_r1 = queries_rD.new_full((queries_rD.shape[0], 1), -torch.inf)
        weight_r1 = torch.zeros_like(highest_r1)
        out_rE.zero_()
        for keys_cD, values_Ec, bias_c in columns:
            scores_rc = _matmul_transposed(queries_rD, keys_cD, bias_c)
            block_highest_r1 = scores_rc.amax(dim=1, keepdim=True)
            # softmax is one pass over scores in cache; subtract, exp and sum alone would be three and slower.
            softmax_rc = torch.softmax(scores_rc, dim=1, out=scores_rc)
            # The highest score's softmax is exp(0) over the block's sum of exponentials.
            block_weight_r1 = softmax_rc.amax(dim=1, keepdim=True).reciprocal_()
            before_r1, highest_r1 = highest_r1, highest_r1.maximum(block_highest_r1)
            block_weight_r1.mul_((block_highest_r1 - highest_r1).exp_())
            weight_r1 = weight_r1 * (before_r1 - highest_r1).exp_() + block_weight_r1
            out_rE.lerp_(_matmul_transposed(softmax_rc, values_Ec), block_weight_r1 / weight_r1)
    return out_NE


def _matmul_transposed(left_ND: Tensor, right_MD: Tensor, bias_M: Tensor | None = None) -> Tensor:
    """left @ right^T + bias as a 1x1 convolution, PyTorch's public way to oneDNN.

    Its float32 matmul is MKL's, which on AMD's processors runs at half of oneDNN's speed.
    """
    # As (1, D, 1, N) with the strides of channels-last: any other view would be copied first.
    image_1D1N = left_ND.view(1, 1, *left_ND.shape).permute(0, 3, 1, 2)
    return F.conv2d(image_1D1N, right_MD[:, :, None, None], bias_M).permute(0, 2, 3, 1)[0, 0]

"""How the kernels of external attention are called. B batch, N pixels, K classes."""

from __future__ import annotations

import math

import torch
import triton
from torch import Tensor

from segdeformer.kernels.attention.launch import Operands, Upstream, forward_launch
from segdeformer.kernels.external_attention.triton_backward import external_backward_keys
from segdeformer.kernels.external_attention.triton_forward import class_probabilities, external_forward_narrow
from segdeformer.kernels.launch import Launch, interpreting
from segdeformer.kernels.tiles import WIDEST_NARROW_FORWARD, Tile

SOFTMAX_ROWS = 16
LEAST_POWER = -8  # 2^8 times a weight, which is 1 at most, is far from float16's limit
# Powers of two between a query's largest and least entry that its weights in this dtype bear: bfloat16 has
# float32's exponents, of which a sum over keys needs some; float16 keeps all its bits down to 2^-14 only.
LARGEST_RANGES = {torch.float16: 12, torch.bfloat16: 96, torch.float32: 96}


def probabilities_launch(class_logits: Tensor, probabilities: Tensor) -> Launch:
    """P = softmax(A) into rows padded with zeros."""
    batch, num_rows, width = class_logits.shape
    padded = probabilities.shape[2]
    return Launch(
        class_probabilities,
        (triton.cdiv(batch * num_rows, SOFTMAX_ROWS),),
        {"class_logits": class_logits, "probabilities": probabilities},
        {"num_rows": batch * num_rows, "num_columns": width, "padded_columns": padded},
        {"BLOCK_ROWS": SOFTMAX_ROWS, "WIDTH": triton.next_power_of_2(padded)},
        Tile(SOFTMAX_ROWS, 0, 4, 1),
    )


def external_forward_launch(x: Operands, out: Tensor, lse: Tensor, *, tile: Tile) -> Launch:
    """Softmax of Q~ P^T times P; out (B, N, K) contiguous, lse (B, N) float32 in base 2."""
    if x.queries.shape[2] > WIDEST_NARROW_FORWARD or x.scale <= 0:
        return forward_launch(x, out, lse, keys_are_values=True, tile=tile)
    ways = {
        "LARGEST_RANGE": LARGEST_RANGES[x.queries.dtype],
        "POLYNOMIAL": tile.polynomial and not interpreting(),
    }
    tensors = {"queries": x.queries, "keys": x.keys, "out": out, "lse": lse}
    constants = {**x.constants(tile), **ways}
    return Launch.of(external_forward_narrow, x.query_blocks(tile), tile, tensors, x.numbers(), constants)


def external_backward_keys_launch(
    x: Operands, upstream: Upstream, class_logits: Tensor, grad_class_logits: Tensor, *, tile: Tile
) -> Launch:
    """dA, (B, N, K) contiguous."""
    power = 1.0
    if x.scale > 0:
        power = 2.0 ** min(0, max(LEAST_POWER, math.floor(math.log2(x.scale))))
    logits = {"class_logits": class_logits, "grad_class_logits": grad_class_logits}
    return Launch.of(
        external_backward_keys,
        x.key_blocks(tile),
        tile,
        {**x.tensors(), **upstream.tensors(), **logits},
        {**x.numbers(), **upstream.numbers(), "power": power, "rest": x.scale / power},
        {**x.constants(tile), "HAS_UNIT": upstream.has_unit},
    )

"""How the kernels of external attention are called. B batch, N pixels, K classes."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import triton
from torch import Tensor

from segdeformer.kernels.attention.launch import Operands, attention_launch
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


def external_launch(kernel: str, x: Operands, results: Mapping[str, Tensor], tile: Tile) -> Launch | None:
    """A kernel's call, by its name, that writes these results; None where the tile is not for these sizes.

    out (B, N, K) and both gradients are contiguous, lse (B, N) float32 in base 2. `external_backward_keys`
    finds the class logits among its results.
    """
    if kernel == "external_backward_keys":
        power = 1.0
        if x.scale > 0:
            power = 2.0 ** min(0, max(LEAST_POWER, math.floor(math.log2(x.scale))))
        program, grid = external_backward_keys, x.key_blocks(tile)
        numbers, constants = {"power": power, "rest": x.scale / power}, {}
    elif kernel == "external_forward" and x.queries.shape[2] <= WIDEST_NARROW_FORWARD and x.scale > 0:
        program, grid = external_forward_narrow, x.query_blocks(tile)
        polynomial = tile.polynomial and not interpreting()
        numbers, constants = {}, {"LARGEST_RANGE": LARGEST_RANGES[x.queries.dtype], "POLYNOMIAL": polynomial}
    else:
        return attention_launch(kernel.replace("external", "attention"), x, results, tile)
    tensors, numbers = {**x.tensors(), **results}, {**x.numbers(), **numbers}
    return Launch.of(program, grid, tile, tensors, numbers, {**x.constants(tile), **constants})

"""How the attention kernels are called: grids, strides, padding, tiles.

B batch, N queries, M keys, D key width, E value width; n queries of a chunk.
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from segdeformer.kernels.attention.triton_backward import (
    attention_backward_keys,
    attention_backward_queries,
    attention_weights_and_grads,
    row_deltas,
)
from segdeformer.kernels.attention.triton_forward import attention_forward, attention_forward_few_keys
from segdeformer.kernels.launch import Launch, dot_precision, padded_rows
from segdeformer.kernels.tiles import Tile, choose_tile, padded_width, split_width

LOG2_E = math.log2(math.e)
WIDEST_JOINT_BACKWARD = 128  # wider accumulators of dK and dV together spill
DELTA_ROWS = 16
MOST_RAISED = 15  # the largest power of two in float16


class Operands(NamedTuple):
    """Queries, keys and values, padded to the kernels' widths, and their real widths."""

    queries: Tensor
    keys: Tensor
    values: Tensor
    width: int
    value_width: int
    scale: float

    def key(self) -> Hashable:
        """All that decides how kernels are called with these: see plans.start_kernel."""
        q, k, v = self.queries, self.keys, self.values
        shapes = q.shape, q.stride(), k.shape, k.stride(), v.shape, v.stride()
        return shapes, q.dtype, dot_precision(q.dtype), self.width, self.value_width, self.scale

    @property
    def num_queries(self) -> int:
        return self.queries.shape[1]

    @property
    def num_keys(self) -> int:
        return self.keys.shape[1]

    def tile(self, kernel: str) -> Tile:
        """The tile of a kernel for these widths on this device."""
        widths = self.queries.shape[2], self.values.shape[2]
        num_scores = self.queries.shape[0] * self.num_queries * self.num_keys
        element_bytes, device = self.queries.element_size(), self.queries.device
        return choose_tile(kernel, *widths, element_bytes, device, num_scores=num_scores)

    def tensors(self) -> dict[str, Tensor]:
        return {"queries": self.queries, "keys": self.keys, "values": self.values}

    def numbers(self) -> dict[str, int | float]:
        strides = {
            f"{name}{side}_stride": tensor.stride(dim)
            for name, tensor in (("query", self.queries), ("key", self.keys), ("value", self.values))
            for dim, side in enumerate(("_batch", ""))
        }
        sizes = {"num_queries": self.num_queries, "num_keys": self.num_keys, "width": self.width}
        widths = {"value_width": self.value_width, "out_width": self.value_width}
        return {**sizes, **widths, **strides, "scale": self.scale, "scale_log2": self.scale * LOG2_E}

    def constants(self, tile: Tile) -> dict[str, int | str | bool]:
        (d1, d2), (e1, e2) = split_width(self.width), split_width(self.value_width)
        return {
            "D1": d1,
            "D2": d2,
            "E1": e1,
            "E2": e2,
            "WIDTH": self.queries.shape[2],
            "VALUE_WIDTH": self.values.shape[2],
            "PRECISION": dot_precision(self.queries.dtype),
            "EVEN_QUERIES": tile.block_queries > 0 and self.num_queries % tile.block_queries == 0,
            "EVEN_KEYS": tile.block_keys > 0 and self.num_keys % tile.block_keys == 0,
            "BLOCK_QUERIES": tile.block_queries,
            "BLOCK_KEYS": tile.block_keys,
        }

    def query_blocks(self, tile: Tile) -> tuple[int, int]:
        """A grid of one program for each block of queries."""
        return triton.cdiv(self.num_queries, tile.block_queries), self.queries.shape[0]

    def key_blocks(self, tile: Tile) -> tuple[int, int]:
        """A grid of one program for each block of keys."""
        return triton.cdiv(self.num_keys, tile.block_keys), self.queries.shape[0]


class Upstream(NamedTuple):
    """What the backward needs besides the operands."""

    grad_out: Tensor  # padded like the values
    lse: Tensor
    deltas: Tensor
    unit: Tensor | None = None  # what 1 in grad_out and deltas stands for, a scalar; None: 1

    @property
    def has_unit(self) -> bool:
        return self.unit is not None

    def key(self, x: Operands) -> Hashable:
        """All that decides how the backward's kernels are called: see plans.start_kernel."""
        return x.key(), self.grad_out.stride(), self.has_unit

    def tensors(self) -> dict[str, Tensor]:
        unit = self.lse if self.unit is None else self.unit  # not looked at
        return {"grad_out": self.grad_out, "lse": self.lse, "deltas": self.deltas, "unit": unit}

    def numbers(self) -> dict[str, int | float]:
        return {"grad_batch_stride": self.grad_out.stride(0), "grad_stride": self.grad_out.stride(1)}


def raised(grad_out: Tensor) -> tuple[Tensor, Tensor | None]:
    """A float16 gradient times the power of two, up to 2^15, that brings its largest element to 1 or more.

    And the unit that it is then in. Products of probabilities and gradients are rounded to float16 for the
    matrix instructions, and of 16,384 probabilities times a small gradient little would be left. Nothing is
    read back from the device. Other dtypes have the range, and stay as they are.
    """
    if grad_out.dtype != torch.float16:
        return grad_out, None
    largest = torch.linalg.vector_norm(grad_out, torch.inf, dtype=torch.float32)
    power = (1 - torch.frexp(largest).exponent).clamp(0, MOST_RAISED).float()
    return grad_out * power.exp2(), power.neg().exp2()


def pad_operands(queries_BND: Tensor, keys_BMD: Tensor, values_BME: Tensor, scale: float) -> Operands:
    """Operands as the kernels want them: views where they are so already, else padded copies."""
    width, value_width = queries_BND.shape[2], values_BME.shape[2]
    return Operands(
        padded_rows(queries_BND, padded_width(width)),
        padded_rows(keys_BMD, padded_width(width)),
        padded_rows(values_BME, padded_width(value_width)),
        width,
        value_width,
        scale,
    )


def forward_launch(
    x: Operands, out: Tensor, lse: Tensor, *, keys_are_values: bool = False, tile: Tile
) -> Launch:
    """The forward over any number of keys; out (B, N, E) contiguous, lse (B, N) float32 in base 2."""
    ways = {"KEYS_ARE_VALUES": keys_are_values, "TMA": tile.tma, "WARP_SPECIALIZE": tile.warp_specialize}
    tensors = {**x.tensors(), "out": out, "lse": lse}
    constants = {**x.constants(tile), **ways}
    return Launch.of(attention_forward, x.query_blocks(tile), tile, tensors, x.numbers(), constants)


def few_keys_launch(x: Operands, out: Tensor, lse: Tensor, *, tile: Tile) -> Launch | None:
    """The forward that holds all keys and values on chip, or None where there are too many."""
    if x.num_keys > tile.block_keys:
        return None
    tile = tile._replace(block_keys=max(16, triton.next_power_of_2(x.num_keys)))
    device = x.queries.device
    processors = 4  # of a GPU that is not there; the interpreter runs programs one after the other
    if device.type == "cuda":
        processors = torch.cuda.get_device_properties(device).multi_processor_count
    blocks, batch = x.query_blocks(tile)
    programs = min(max(1, processors // batch), blocks)
    tensors = {**x.tensors(), "out": out, "lse": lse}
    numbers = {**x.numbers(), "num_blocks": triton.cdiv(blocks, programs)}
    return Launch.of(attention_forward_few_keys, (programs, batch), tile, tensors, numbers, x.constants(tile))


def deltas_launch(out: Tensor, grad_out: Tensor, deltas: Tensor) -> Launch:
    """sum(dO O) of each row of two contiguous (B, N, E) tensors."""
    rows, width = deltas.numel(), out.shape[2]
    return Launch(
        row_deltas,
        (triton.cdiv(rows, DELTA_ROWS),),
        {"out": out, "grad_out": grad_out, "deltas": deltas},
        {"num_rows": rows, "out_width": width},
        {"BLOCK_ROWS": DELTA_ROWS, "WIDTH": triton.next_power_of_2(width)},
        Tile(DELTA_ROWS, 0, 4, 1),
    )


def backward_queries_launch(
    x: Operands, upstream: Upstream, grad_queries: Tensor, *, keys_are_values: bool = False, tile: Tile
) -> Launch:
    """dQ, (B, N, D) contiguous."""
    return Launch.of(
        attention_backward_queries,
        x.query_blocks(tile),
        tile,
        {**x.tensors(), **upstream.tensors(), "grad_queries": grad_queries},
        {**x.numbers(), **upstream.numbers()},
        {**x.constants(tile), "KEYS_ARE_VALUES": keys_are_values, "HAS_UNIT": upstream.has_unit},
    )


def backward_keys_parts(x: Operands) -> tuple[str, ...]:
    """The gradients of one launch each: both together where both accumulators fit."""
    together = max(x.queries.shape[2], x.values.shape[2]) <= WIDEST_JOINT_BACKWARD
    return ("keys_and_values",) if together else ("keys", "values")


def backward_keys_launch(
    x: Operands, upstream: Upstream, grad_keys: Tensor, grad_values: Tensor, *, part: str, tile: Tile
) -> Launch:
    """dK (B, M, D) (part `keys`), dV (B, M, E) (`values`) or both (`keys_and_values`), contiguous."""
    ways = {"OF_KEYS": part != "values", "OF_VALUES": part != "keys", "HAS_UNIT": upstream.has_unit}
    return Launch.of(
        attention_backward_keys,
        x.key_blocks(tile),
        tile,
        {**x.tensors(), **upstream.tensors(), "grad_keys": grad_keys, "grad_values": grad_values},
        {**x.numbers(), **upstream.numbers()},
        {**x.constants(tile), **ways},
    )


def weights_launch(
    x: Operands, upstream: Upstream, weights_nM: Tensor, grad_scores_nM: Tensor, *, tile: Tile
) -> Launch:
    """P and dS (no scale, in the gradient's unit) of some queries of one image against all its keys."""
    block_width = math.gcd(128 // x.queries.element_size(), x.queries.shape[2], x.values.shape[2])
    return Launch.of(
        attention_weights_and_grads,
        (x.key_blocks(tile)[0], x.query_blocks(tile)[0]),
        tile,
        {**x.tensors(), **upstream.tensors(), "weights": weights_nM, "grad_scores": grad_scores_nM},
        {**x.numbers(), **upstream.numbers(), "weights_stride": weights_nM.stride(0)},
        {**x.constants(tile), "BLOCK_WIDTH": block_width},
    )

"""How the attention kernels are called: grids, strides, padding, tiles.

B batch, N queries, M keys, D key width, E value width; n queries of a chunk.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from segdeformer.kernels.attention_backward_triton import (
    attention_backward_keys,
    attention_backward_queries,
    attention_weights_and_grads,
    row_deltas,
)
from segdeformer.kernels.attention_forward_triton import attention_forward, attention_forward_few_keys
from segdeformer.kernels.launch import Launch, dot_precision, padded_rows
from segdeformer.kernels.tiles import Tile, choose_tile, padded_width, split_width

LOG2_E = math.log2(math.e)
WIDEST_JOINT_BACKWARD = 128  # wider accumulators of dK and dV together spill
DELTA_ROWS = 16


class Operands(NamedTuple):
    """Queries, keys and values, padded to the kernels' widths, and their real widths."""

    queries: Tensor
    keys: Tensor
    values: Tensor
    width: int
    value_width: int
    scale: float

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
        return {
            "num_queries": self.num_queries,
            "num_keys": self.num_keys,
            "query_batch_stride": self.queries.stride(0),
            "query_stride": self.queries.stride(1),
            "key_batch_stride": self.keys.stride(0),
            "key_stride": self.keys.stride(1),
            "value_batch_stride": self.values.stride(0),
            "value_stride": self.values.stride(1),
            "scale_log2": self.scale * LOG2_E,
        }

    def constants(self, tile: Tile) -> dict[str, int | str | bool]:
        (d1, d2), (e1, e2) = split_width(self.width), split_width(self.value_width)
        return {
            "D1": d1,
            "D2": d2,
            "E1": e1,
            "E2": e2,
            "PRECISION": dot_precision(self.queries.dtype),
            "BLOCK_QUERIES": tile.block_queries,
            "BLOCK_KEYS": tile.block_keys,
        }


class Upstream(NamedTuple):
    """What the backward needs besides the operands."""

    grad_out: Tensor  # padded like the values
    lse: Tensor
    deltas: Tensor

    def tensors(self) -> dict[str, Tensor]:
        return self._asdict()

    def numbers(self, scale: float) -> dict[str, int | float]:
        return {
            "grad_batch_stride": self.grad_out.stride(0),
            "grad_stride": self.grad_out.stride(1),
            "scale": scale,
        }


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
    x: Operands, out: Tensor, lse: Tensor, *, keys_are_values: bool = False, tile: Tile | None = None
) -> Launch:
    """The forward over any number of keys; out (B, N, E) contiguous, lse (B, N) float32 in base 2."""
    tile = tile or x.tile("external_forward" if keys_are_values else "attention_forward")
    return Launch(
        attention_forward,
        (triton.cdiv(x.num_queries, tile.block_queries), x.queries.shape[0]),
        {**x.tensors(), "out": out, "lse": lse},
        {**x.numbers(), "out_width": x.value_width},
        {
            **x.constants(tile),
            "KEYS_ARE_VALUES": keys_are_values,
            "EVEN_KEYS": x.num_keys % tile.block_keys == 0,
            "TMA": tile.tma,
            "WARP_SPECIALIZE": tile.warp_specialize,
        },
        tile,
    )


def few_keys_launch(x: Operands, out: Tensor, lse: Tensor, *, tile: Tile | None = None) -> Launch | None:
    """The forward that holds all keys and values on chip, or None where there are too many."""
    tile = tile or x.tile("attention_forward_few_keys")
    if x.num_keys > tile.block_keys:
        return None
    tile = tile._replace(block_keys=max(16, triton.next_power_of_2(x.num_keys)))
    batch, device = x.queries.shape[0], x.queries.device
    processors = 4  # of a GPU that is not there; the interpreter runs programs one after the other
    if device.type == "cuda":
        processors = torch.cuda.get_device_properties(device).multi_processor_count
    blocks = triton.cdiv(x.num_queries, tile.block_queries)
    programs = min(max(1, processors // batch), blocks)
    return Launch(
        attention_forward_few_keys,
        (programs, batch),
        {**x.tensors(), "out": out, "lse": lse},
        {**x.numbers(), "out_width": x.value_width, "num_blocks": triton.cdiv(blocks, programs)},
        x.constants(tile),
        tile,
    )


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
    x: Operands,
    upstream: Upstream,
    grad_queries: Tensor,
    *,
    keys_are_values: bool = False,
    tile: Tile | None = None,
) -> Launch:
    """dQ, (B, N, D) contiguous."""
    tile = tile or x.tile("external_backward_queries" if keys_are_values else "attention_backward_queries")
    return Launch(
        attention_backward_queries,
        (triton.cdiv(x.num_queries, tile.block_queries), x.queries.shape[0]),
        {**x.tensors(), **upstream.tensors(), "grad_queries": grad_queries},
        {**x.numbers(), **upstream.numbers(x.scale), "width": x.width},
        {
            **x.constants(tile),
            "KEYS_ARE_VALUES": keys_are_values,
            "EVEN_KEYS": x.num_keys % tile.block_keys == 0,
        },
        tile,
    )


def backward_keys_launches(
    x: Operands, upstream: Upstream, grad_keys: Tensor, grad_values: Tensor
) -> list[Launch]:
    """dK (B, M, D) and dV (B, M, E), contiguous; in one pass where both accumulators fit, else in two."""
    together = max(x.queries.shape[2], x.values.shape[2]) <= WIDEST_JOINT_BACKWARD
    parts = ("keys_and_values",) if together else ("keys", "values")
    return [backward_keys_launch(x, upstream, grad_keys, grad_values, part=part) for part in parts]


def backward_keys_launch(
    x: Operands,
    upstream: Upstream,
    grad_keys: Tensor,
    grad_values: Tensor,
    *,
    part: str,
    tile: Tile | None = None,
) -> Launch:
    """dK (part `keys`), dV (`values`) or both (`keys_and_values`)."""
    tile = tile or x.tile(f"attention_backward_{part}")
    return Launch(
        attention_backward_keys,
        (triton.cdiv(x.num_keys, tile.block_keys), x.queries.shape[0]),
        {**x.tensors(), **upstream.tensors(), "grad_keys": grad_keys, "grad_values": grad_values},
        {**x.numbers(), **upstream.numbers(x.scale), "width": x.width, "value_width": x.value_width},
        {
            **x.constants(tile),
            "OF_KEYS": part != "values",
            "OF_VALUES": part != "keys",
            "EVEN_QUERIES": x.num_queries % tile.block_queries == 0,
        },
        tile,
    )


def weights_launch(
    x: Operands, upstream: Upstream, weights_nM: Tensor, grad_scores_nM: Tensor, *, tile: Tile | None = None
) -> Launch:
    """P and dS of some queries of one image against all its keys."""
    tile = tile or x.tile("attention_weights_and_grads")
    numbers = x.numbers() | upstream.numbers(x.scale) | {"weights_stride": weights_nM.stride(0)}
    widths = x.queries.shape[2], x.values.shape[2]
    return Launch(
        attention_weights_and_grads,
        (triton.cdiv(x.num_keys, tile.block_keys), triton.cdiv(x.num_queries, tile.block_queries)),
        {**x.tensors(), **upstream.tensors(), "weights": weights_nM, "grad_scores": grad_scores_nM},
        {name: number for name, number in numbers.items() if not name.endswith("batch_stride")},
        {
            "WIDTH": widths[0],
            "VALUE_WIDTH": widths[1],
            "PRECISION": dot_precision(x.queries.dtype),
            "BLOCK_QUERIES": tile.block_queries,
            "BLOCK_KEYS": tile.block_keys,
            "BLOCK_WIDTH": math.gcd(128 // x.queries.element_size(), *widths),
        },
        tile,
    )

"""How the attention kernels are called: grids, strides, padding, tiles.

B batch, N queries, M keys, D key width, E value width; n queries of a chunk.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from segdeformer.kernels.attention import triton_backward as backward
from segdeformer.kernels.attention import triton_forward as forward
from segdeformer.kernels.launch import Launch, dot_precision, padded_rows
from segdeformer.kernels.tiles import Tile, choose_tile, padded_width, split_width

LOG2_E = math.log2(math.e)
WIDEST_JOINT_BACKWARD = 128  # wider accumulators of dK and dV together spill
DELTA_ROWS = 16
MOST_RAISED = 15  # the largest power of two in float16


class Upstream(NamedTuple):
    """What the backward needs besides queries, keys and values."""

    grad_out: Tensor  # padded like the values
    lse: Tensor
    deltas: Tensor
    unit: Tensor | None = None  # what 1 in grad_out and deltas stands for, a scalar; None: 1

    def tensors(self) -> dict[str, Tensor]:
        unit = self.lse if self.unit is None else self.unit  # not looked at
        return {"grad_out": self.grad_out, "lse": self.lse, "deltas": self.deltas, "unit": unit}


class Operands(NamedTuple):
    """Queries, keys and values, padded to the kernels' widths, their real widths, and what a backward has."""

    queries: Tensor
    keys: Tensor
    values: Tensor
    width: int
    value_width: int
    scale: float
    keys_are_values: bool = False
    bias: Tensor | None = None  # (M,) float32, in base 2
    upstream: Upstream | None = None

    def key(self) -> Hashable:
        """All that decides how kernels are called with these: see plans.start_kernel."""
        q, k, v = self.queries, self.keys, self.values
        shapes = q.shape, q.stride(), k.shape, k.stride(), v.shape, v.stride()
        ways = self.keys_are_values, self.bias is not None
        forward = shapes, ways, q.dtype, dot_precision(q.dtype), self.width, self.value_width, self.scale
        if self.upstream is None:
            return forward
        return forward, self.upstream.grad_out.stride(), self.upstream.unit is not None

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
        bias = self.queries if self.bias is None else self.bias  # not looked at
        inputs = {"queries": self.queries, "keys": self.keys, "values": self.values, "bias": bias}
        return inputs if self.upstream is None else {**inputs, **self.upstream.tensors()}

    def numbers(self) -> dict[str, int | float]:
        named = {"query": self.queries, "key": self.keys, "value": self.values}
        if self.upstream is not None:
            named["grad"] = self.upstream.grad_out
        strides = {
            f"{name}{side}_stride": tensor.stride(dim)
            for name, tensor in named.items()
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
            "KEYS_ARE_VALUES": self.keys_are_values,
            "HAS_BIAS": self.bias is not None,
            "HAS_UNIT": self.upstream is not None and self.upstream.unit is not None,
            "TMA": tile.tma,
            "WARP_SPECIALIZE": tile.warp_specialize,
        }

    def query_blocks(self, tile: Tile) -> tuple[int, int]:
        """A grid of one program for each block of queries."""
        return triton.cdiv(self.num_queries, tile.block_queries), self.queries.shape[0]

    def key_blocks(self, tile: Tile) -> tuple[int, int]:
        """A grid of one program for each block of keys."""
        return triton.cdiv(self.num_keys, tile.block_keys), self.queries.shape[0]


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


def pad_operands(
    queries_BND: Tensor, keys_BMD: Tensor, values_BME: Tensor, scale: float, bias_M: Tensor | None = None
) -> Operands:
    """Operands as the kernels want them: views where they are so already, else padded copies.

    bias_M: float32, in base e.
    """
    width, value_width = queries_BND.shape[2], values_BME.shape[2]
    queries, keys = (padded_rows(tensor, padded_width(width)) for tensor in (queries_BND, keys_BMD))
    same = keys_BMD.data_ptr() == values_BME.data_ptr() and keys_BMD.shape == values_BME.shape
    same = same and keys_BMD.stride() == values_BME.stride()
    values = keys if same else padded_rows(values_BME, padded_width(value_width))
    bias = None if bias_M is None else bias_M * LOG2_E
    return Operands(queries, keys, values, width, value_width, scale, keys_are_values=same, bias=bias)


def attention_launch(kernel: str, x: Operands, results: Mapping[str, Tensor], tile: Tile) -> Launch | None:
    """A kernel's call, by its name, that writes these results; None where the tile is not for these sizes.

    out (B, N, E), grad_queries, grad_keys and grad_values are contiguous, lse (B, N) float32 in base 2.
    `attention_weights_and_grads` writes P and dS (no scale, in the gradient's unit) of some queries of one
    image against all its keys.
    """
    numbers: dict[str, int | float] = {}
    constants: dict[str, int | str | bool] = {}
    match kernel:
        case "attention_forward":
            program, grid = forward.attention_forward, x.query_blocks(tile)
        case "attention_forward_few_keys":  # it holds all keys and values on chip
            if x.num_keys > tile.block_keys:
                return None
            tile = tile._replace(block_keys=max(16, triton.next_power_of_2(x.num_keys)))
            blocks, batch = x.query_blocks(tile)
            programs = min(max(1, _num_processors(x.queries.device) // batch), blocks)
            program, grid = forward.attention_forward_few_keys, (programs, batch)
            numbers["num_blocks"] = triton.cdiv(blocks, programs)
        case "attention_backward_queries":
            program, grid = backward.attention_backward_queries, x.query_blocks(tile)
        case "attention_weights_and_grads":
            program = backward.attention_weights_and_grads
            grid = x.key_blocks(tile)[0], x.query_blocks(tile)[0]
            numbers["weights_stride"] = results["weights"].stride(0)
            widths = x.queries.shape[2], x.values.shape[2]
            constants["BLOCK_WIDTH"] = math.gcd(128 // x.queries.element_size(), *widths)
        case _:
            program, grid = backward.attention_backward_keys, x.key_blocks(tile)
            part = kernel.removeprefix("attention_backward_")
            constants = {"OF_KEYS": part != "values", "OF_VALUES": part != "keys"}
            results = {"grad_keys": x.keys, "grad_values": x.values, **results}  # one may not be written
    tensors, numbers = {**x.tensors(), **results}, {**x.numbers(), **numbers}
    return Launch.of(program, grid, tile, tensors, numbers, {**x.constants(tile), **constants})


def _num_processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 4  # of a GPU that is not there; the interpreter runs programs one after the other
    return torch.cuda.get_device_properties(device).multi_processor_count


def backward_keys_parts(x: Operands) -> tuple[str, ...]:
    """The gradients of one launch each: both together where both accumulators fit."""
    together = max(x.queries.shape[2], x.values.shape[2]) <= WIDEST_JOINT_BACKWARD
    return ("keys_and_values",) if together else ("keys", "values")


def deltas_launch(out: Tensor, grad_out: Tensor, deltas: Tensor) -> Launch:
    """sum(dO O) of each row of two contiguous (B, N, E) tensors."""
    rows, width = deltas.numel(), out.shape[2]
    return Launch(
        backward.row_deltas,
        (triton.cdiv(rows, DELTA_ROWS),),
        {"out": out, "grad_out": grad_out, "deltas": deltas},
        {"num_rows": rows, "out_width": width},
        {"BLOCK_ROWS": DELTA_ROWS, "WIDTH": triton.next_power_of_2(width)},
        Tile(DELTA_ROWS, 0, 4, 1),
    )

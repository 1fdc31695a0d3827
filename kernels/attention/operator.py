"""`attention` through the Triton kernels, as PyTorch operators with gradients.

B batch, N queries, M keys, D key width, E value width; n queries of a chunk.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Iterator, Mapping
from functools import partial
from typing import cast

import torch
from torch import Tensor

from segdeformer.kernels.attention.launch import (
    Operands,
    Upstream,
    attention_launch,
    backward_keys_parts,
    deltas_launch,
    pad_operands,
    raised,
)
from segdeformer.kernels.fitting import smaller_tiles
from segdeformer.kernels.launch import Launch, check_operands, check_widths, padded_rows
from segdeformer.kernels.operators import define_with_gradient, empty_like
from segdeformer.kernels.plans import start_kernel
from segdeformer.kernels.tiles import Tile, backward_form

CHUNK_BYTES = 256 * 2**20  # of P and dS together: memory stays O(N), and few launches fill a large GPU
LEAST_CHUNK, MOST_CHUNK = 128, 2**18

LaunchOf = Callable[[str, Operands, Mapping[str, Tensor], Tile], Launch | None]


def attention_triton(
    queries_BND: Tensor, keys_BMD: Tensor, values_BME: Tensor, *, scale: float, bias_M: Tensor | None = None
) -> Tensor:
    """softmax(scale * Q K^T + bias) V, (B, N, E), with gradients; under autocast in its dtype.

    float16, bfloat16 or float32, any strides, D and E up to 512; the bias is float32. Raises `ValueError`
    for other inputs, and `KernelError` when a kernel does not start.
    """
    device_type = queries_BND.device.type
    if torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
        queries_BND, keys_BMD, values_BME = (t.to(dtype) for t in (queries_BND, keys_BMD, values_BME))
    check_operands(queries_BND, keys_BMD, values_BME)
    check_widths(queries_BND.shape[2], values_BME.shape[2])
    if bias_M is not None:
        bias_M = bias_M.to(torch.float32).contiguous()
    out_BNE, _ = attention_with_lse(queries_BND, keys_BMD, values_BME, bias_M, scale)
    return out_BNE


def _forward(
    queries: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    out, lse = _empty_outputs(queries, keys, values, bias, scale)
    if out.numel():
        start_forward(pad_operands(queries, keys, values, scale, bias), out, lse)
    return out, lse


def _empty_outputs(
    queries: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    batch, num_queries, _ = queries.shape
    out = values.new_empty((batch, num_queries, values.shape[2]))
    return out, queries.new_empty((batch, num_queries), dtype=torch.float32)


def start_forward(x: Operands, out: Tensor, lse: Tensor) -> None:
    """The forward that holds all keys on chip where they are few, else the loop over keys."""
    results = {"out": out, "lse": lse}

    def candidates() -> Iterator[Launch]:
        yield from launches("attention_forward_few_keys", x, results, attention_launch)
        yield from launches("attention_forward", x, results, attention_launch)

    start_kernel(("attention_forward", x.key()), {**x.tensors(), **results}, candidates)


def launches(
    kernel: str, x: Operands, results: Mapping[str, Tensor], launch_of: LaunchOf
) -> Iterator[Launch]:
    """A kernel's calls: with its tile for these widths, then with ever smaller ones."""
    for tile in smaller_tiles(x.tile(kernel), keys_stay=kernel == "attention_forward_few_keys"):
        if (launch := launch_of(kernel, x, results, tile)) is not None:
            yield launch


def start_tiled(
    kernel: str,
    x: Operands,
    results: Mapping[str, Tensor],
    launch_of: LaunchOf,
    *,
    key: Hashable = None,
) -> None:
    """Start a kernel with its tile, or the next that fits. key: see `start_kernel`; None: the operands'."""
    candidates = partial(launches, kernel, x, results, launch_of)
    start_kernel((kernel, x.key() if key is None else key), {**x.tensors(), **results}, candidates)


def _backward(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    bias: Tensor | None,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    scale: float,
) -> tuple[Tensor, ...]:
    grads = grad_queries, grad_keys, grad_values = empty_like(queries, keys, values)
    if not grad_out.numel():
        return grad_queries, grad_keys.zero_(), grad_values.zero_()
    if keys.shape[1] == 1:  # it has all the weight whatever its score: exactly no slope
        torch.sum(grad_out, dim=1, keepdim=True, out=grad_values)
        return grad_queries.zero_(), grad_keys.zero_(), grad_values
    x = with_upstream(pad_operands(queries, keys, values, scale, bias), out, lse, grad_out)
    chunks = backward_form(x.queries, x.values) == "chunks"
    (backward_in_chunks if chunks else backward_fused)(x, *grads)
    return grads


def with_upstream(x: Operands, out: Tensor, lse: Tensor, grad_out: Tensor) -> Operands:
    """With the gradient, raised in float16, in padded rows, and each row's sum(dO O)."""
    grad_out, unit = raised(grad_out.contiguous())
    deltas = torch.empty_like(lse)
    key = "row_deltas", out.shape, out.dtype
    tensors = {"out": out, "grad_out": grad_out, "deltas": deltas}
    start_kernel(key, tensors, lambda: [deltas_launch(**tensors)])
    return x._replace(upstream=Upstream(padded_rows(grad_out, x.values.shape[2]), lse, deltas, unit))


def backward_fused(x: Operands, grad_queries: Tensor, grad_keys: Tensor, grad_values: Tensor) -> None:
    """All gradients by kernels that make P and dS on chip, each of them anew."""
    key = x.key()
    start_tiled("attention_backward_queries", x, {"grad_queries": grad_queries}, attention_launch, key=key)
    grads = {"grad_keys": grad_keys, "grad_values": grad_values}
    for part in backward_keys_parts(x):
        start_tiled(f"attention_backward_{part}", x, grads, attention_launch, key=key)


def backward_in_chunks(x: Operands, grad_queries: Tensor, grad_keys: Tensor, grad_values: Tensor) -> None:
    """All gradients for any width: P and dS of a chunk of queries by one kernel, then matrix products.

    Holds two n x M matrices, of `CHUNK_BYTES` together or of the least chunk's 128 rows, and float32 sums of
    the gradients of one image's keys and values.
    """
    row_bytes = 2 * x.num_keys * x.queries.element_size()
    chunk = min(max(LEAST_CHUNK, CHUNK_BYTES // row_bytes // LEAST_CHUNK * LEAST_CHUNK), MOST_CHUNK)
    chunk = min(chunk, x.num_queries)
    weights_nM = x.queries.new_empty(chunk, x.num_keys)
    slopes_nM = torch.empty_like(weights_nM)
    grad_out, lse, deltas, in_unit = cast(Upstream, x.upstream)
    unit = 1.0 if in_unit is None else in_unit
    for b in range(x.queries.shape[0]):
        of_keys = torch.zeros_like(x.keys[b], dtype=torch.float32)
        of_values = torch.zeros_like(x.values[b], dtype=torch.float32)
        for first in range(0, x.num_queries, chunk):
            rows = slice(first, min(first + chunk, x.num_queries))
            weights, slopes = weights_nM[: rows.stop - first], slopes_nM[: rows.stop - first]
            above = Upstream(grad_out[b : b + 1, rows], lse[b, rows], deltas[b, rows])
            some = x._replace(
                queries=x.queries[b : b + 1, rows],
                keys=x.keys[b : b + 1],
                values=x.values[b : b + 1],
                upstream=above,
            )
            results = {"weights": weights, "grad_scores": slopes}
            key = some.key(), weights.stride()
            start_tiled("attention_weights_and_grads", some, results, attention_launch, key=key)
            add_product(of_values, weights.T, above.grad_out[0])
            add_product(of_keys, slopes.T, some.queries[0])
            of_queries = add_product(None, slopes, x.keys[b])
            grad_queries[b, rows] = of_queries[:, : x.width] * (x.scale * unit)
        torch.mul(of_keys[:, : x.width], x.scale * unit, out=grad_keys[b])
        torch.mul(of_values[:, : x.value_width], unit, out=grad_values[b])


def add_product(total: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
    """left @ right in float32, added to `total` in place where there is one.

    cuBLAS adds half-precision products to a float32 matrix itself; elsewhere a rounded product is made first.
    """
    if left.dtype != torch.float32 and left.is_cuda and _adds_in_place(left.dtype, left.device):
        if total is None:
            return torch.mm(left, right, out_dtype=torch.float32)
        return torch.addmm(total, left, right, out_dtype=torch.float32, out=total)
    if total is None:
        return left @ right
    return total.add_(left @ right) if left.dtype != torch.float32 else total.addmm_(left, right)


@functools.cache
def _adds_in_place(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether this PyTorch can add half-precision products to a float32 matrix: tried once on a small one."""
    eye = torch.eye(16, dtype=dtype, device=device)
    total = torch.ones(16, 16, device=device)
    try:
        torch.addmm(total, eye, eye, out_dtype=torch.float32, out=total)
        product = torch.mm(eye, eye, out_dtype=torch.float32)
    except (RuntimeError, TypeError):
        return False
    return torch.equal(total, 1 + eye.float()) and torch.equal(product, eye.float())


# The output and, for the backward, each row's log-sum-exp in base 2, (B, N) float32.
attention_with_lse = define_with_gradient(
    "attention", ("queries", "keys", "values", "bias?"), _forward, _empty_outputs, _backward
)

"""`attention` through the Triton kernels, as PyTorch operators with gradients.

B batch, N queries, M keys, D key width, E value width; n queries of a chunk.
"""

from __future__ import annotations

import torch
from torch import Tensor

from segdeformer.kernels.attention_launches import (
    Operands,
    Upstream,
    backward_keys_launches,
    backward_queries_launch,
    deltas_launch,
    few_keys_launch,
    forward_launch,
    pad_operands,
    weights_launch,
)
from segdeformer.kernels.launch import check_operands, check_widths, padded_rows
from segdeformer.kernels.tiles import backward_form

CHUNK_BYTES = 64 * 2**20  # of P and dS together: memory stays O(N), and large caches hold much of it
LEAST_CHUNK, MOST_CHUNK = 128, 2**18


def attention_triton(queries_BND: Tensor, keys_BMD: Tensor, values_BME: Tensor, *, scale: float) -> Tensor:
    """softmax(scale * Q K^T) V, (B, N, E), with gradients; under autocast in its dtype.

    float16, bfloat16 or float32, any strides, D and E up to 512. Raises `ValueError` for other
    inputs, and `KernelError` when a kernel does not start.
    """
    device_type = queries_BND.device.type
    if torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
        queries_BND, keys_BMD, values_BME = (t.to(dtype) for t in (queries_BND, keys_BMD, values_BME))
    check_operands(queries_BND, keys_BMD, values_BME)
    check_widths(queries_BND.shape[2], values_BME.shape[2])
    out_BNE, _ = attention_with_lse(queries_BND, keys_BMD, values_BME, scale)
    return out_BNE


@torch.library.custom_op("segdeformer::attention", mutates_args=())
def attention_with_lse(queries: Tensor, keys: Tensor, values: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """The output and, for the backward, each row's log-sum-exp in base 2, (B, N) float32."""
    out, lse = _empty_outputs(queries, values)
    if out.numel():
        operands = pad_operands(queries, keys, values, scale)
        (few_keys_launch(operands, out, lse) or forward_launch(operands, out, lse)).run()
    return out, lse


@attention_with_lse.register_fake
def _(queries: Tensor, keys: Tensor, values: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    return _empty_outputs(queries, values)


def _empty_outputs(queries: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    batch, num_queries, _ = queries.shape
    out = values.new_empty(batch, num_queries, values.shape[2])
    return out, queries.new_empty(batch, num_queries, dtype=torch.float32)


@torch.library.custom_op("segdeformer::attention_backward", mutates_args=())
def attention_backward(
    queries: Tensor, keys: Tensor, values: Tensor, out: Tensor, lse: Tensor, grad_out: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries, keys and values."""
    grad_queries, grad_keys, grad_values = (t.new_empty(t.shape) for t in (queries, keys, values))
    if not grad_out.numel():
        return grad_queries, grad_keys.zero_(), grad_values.zero_()
    if keys.shape[1] == 1:  # it has all the weight whatever its score: exactly no slope
        torch.sum(grad_out, dim=1, keepdim=True, out=grad_values)
        return grad_queries.zero_(), grad_keys.zero_(), grad_values
    grad_out, deltas = grad_out.contiguous(), torch.empty_like(lse)
    deltas_launch(out, grad_out, deltas).run()
    operands = pad_operands(queries, keys, values, scale)
    upstream = Upstream(padded_rows(grad_out, operands.values.shape[2]), lse, deltas)
    if backward_form(operands.queries, operands.values) == "chunks":
        backward_in_chunks(operands, upstream, grad_queries, grad_keys, grad_values)
        return grad_queries, grad_keys, grad_values
    backward_queries_launch(operands, upstream, grad_queries).run()
    for launch in backward_keys_launches(operands, upstream, grad_keys, grad_values):
        launch.run()
    return grad_queries, grad_keys, grad_values


@attention_backward.register_fake
def _(
    queries: Tensor, keys: Tensor, values: Tensor, out: Tensor, lse: Tensor, grad_out: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    return queries.new_empty(queries.shape), keys.new_empty(keys.shape), values.new_empty(values.shape)


def _keep(ctx, inputs, output) -> None:
    queries, keys, values, scale = inputs
    ctx.save_for_backward(queries, keys, values, *output)
    ctx.scale = scale


def _backward(ctx, grad_out, grad_lse):
    queries, keys, values, out, lse = ctx.saved_tensors
    return *attention_backward(queries, keys, values, out, lse, grad_out, ctx.scale), None


attention_with_lse.register_autograd(_backward, setup_context=_keep)


def backward_in_chunks(
    x: Operands, upstream: Upstream, grad_queries: Tensor, grad_keys: Tensor, grad_values: Tensor
) -> None:
    """All gradients for any width: P and dS of a chunk of queries by one kernel, then matrix products.

    Holds two n x M matrices, of `CHUNK_BYTES` together or of the least chunk's 128 rows.
    """
    row_bytes = 2 * x.num_keys * x.queries.element_size()
    chunk = min(max(LEAST_CHUNK, CHUNK_BYTES // row_bytes // LEAST_CHUNK * LEAST_CHUNK), MOST_CHUNK)
    for b in range(x.queries.shape[0]):
        of_keys = torch.zeros_like(x.keys[b], dtype=torch.float32)
        of_values = torch.zeros_like(x.values[b], dtype=torch.float32)
        for first in range(0, x.num_queries, chunk):
            rows = slice(first, min(first + chunk, x.num_queries))
            weights_nM = x.queries.new_empty(rows.stop - first, x.num_keys)
            slopes_nM = torch.empty_like(weights_nM)
            part = x._replace(
                queries=x.queries[b : b + 1, rows], keys=x.keys[b : b + 1], values=x.values[b : b + 1]
            )
            above = Upstream(
                upstream.grad_out[b : b + 1, rows], upstream.lse[b, rows], upstream.deltas[b, rows]
            )
            weights_launch(part, above, weights_nM, slopes_nM).run()
            of_values += weights_nM.T @ above.grad_out[0]
            of_keys += slopes_nM.T @ part.queries[0]
            grad_queries[b, rows] = (slopes_nM @ x.keys[b])[:, : x.width]
        grad_keys[b], grad_values[b] = of_keys[:, : x.width], of_values[:, : x.value_width]

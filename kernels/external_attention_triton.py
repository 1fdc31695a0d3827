"""`external_attention` through the Triton kernels, as PyTorch operators with gradients.

P = softmax(A) is made once, in rows padded for the attention kernels; then keys and values are the same
tile, so half the traffic, and dP is one accumulator that goes through the softmax into dA on chip.
B batch, N pixels, K classes.
"""

from __future__ import annotations

import math
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from segdeformer.kernels.attention_forward_triton import load_rows, store_columns
from segdeformer.kernels.attention_launches import Operands, Upstream, forward_launch
from segdeformer.kernels.attention_triton import make_upstream, start_backward_queries
from segdeformer.kernels.fitting import smaller_tiles
from segdeformer.kernels.launch import Launch, check_operands, check_widths, padded_rows
from segdeformer.kernels.operators import define_gradient, define_operator
from segdeformer.kernels.plans import start_kernel
from segdeformer.kernels.tiles import Tile, padded_width

SOFTMAX_ROWS = 16
LEAST_POWER = -8  # 2^8 times a weight, which is 1 at most, is far from float16's limit
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def load_logits(logits, rows, columns, width, num_rows):
    """A float32 tile of contiguous rows; columns past the end weigh nothing, rows past the end are zeros."""
    places = rows[:, None] * width + columns[None, :]
    inside = (rows[:, None] < num_rows) & (columns[None, :] < width)
    scores = tl.load(logits + places, mask=inside, other=0.0).to(tl.float32)
    return tl.where(columns[None, :] < width, scores, -float("inf"))


@triton.jit
def class_probabilities(
    logits,
    probabilities,
    num_rows,
    num_columns,
    padded_columns,
    BLOCK_ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Softmax of each row of a contiguous matrix into rows padded with zeros."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    columns = tl.arange(0, WIDTH)
    scores = load_logits(logits, rows, columns, num_columns, num_rows)
    highest = tl.max(scores, 1)
    weights = tl.exp2((scores - highest[:, None]) * LOG2_E)
    shares = weights / tl.sum(weights, 1)[:, None]
    within = (rows[:, None] < num_rows) & (columns[None, :] < padded_columns)
    places = rows[:, None] * padded_columns + columns[None, :]
    tl.store(probabilities + places, shares.to(probabilities.dtype.element_ty), mask=within)


@triton.jit
def external_backward_keys(
    queries,
    keys,
    grad_out,
    logits,
    grad_logits,
    lse,
    deltas,
    unit,
    num_queries,
    num_keys,
    query_batch_stride,
    query_stride,
    key_batch_stride,
    key_stride,
    grad_batch_stride,
    grad_stride,
    width,
    scale_log2,
    power,
    rest,
    D1: tl.constexpr,
    D2: tl.constexpr,
    EVEN_QUERIES: tl.constexpr,
    HAS_UNIT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
):
    """dP = scale dS^T Q~ + W^T dO in one accumulator, then dA = P (dP - sum(P dP)).

    scale = power * rest, power a power of two that both terms are divided by until the end: neither may
    shrink before it is rounded. keys is P as rounded for the products; the softmax's own slope takes P from A
    in float32 again.
    """
    first = tl.program_id(0) * BLOCK_KEYS
    batch = tl.program_id(1).to(tl.int64)
    keys += batch * key_batch_stride + first.to(tl.int64) * key_stride
    queries += batch * query_batch_stride
    grad_out += batch * grad_batch_stride
    lse += batch * num_queries
    deltas += batch * num_queries
    logits += (batch * num_keys + first) * width
    grad_logits += (batch * num_keys + first) * width
    left = num_keys - first

    rows = tl.arange(0, BLOCK_QUERIES)
    offsets = tl.arange(0, BLOCK_KEYS)
    columns1 = tl.arange(0, D1)
    k1 = load_rows(keys, offsets, columns1, key_stride, left, False)
    total1 = tl.zeros([BLOCK_KEYS, D1], tl.float32)
    if D2 > 0:
        columns2 = D1 + tl.arange(0, D2)
        k2 = load_rows(keys, offsets, columns2, key_stride, left, False)
        total2 = tl.zeros([BLOCK_KEYS, D2], tl.float32)

    for start in tl.range(0, num_queries, BLOCK_QUERIES):
        remaining = num_queries - start
        q1 = load_rows(queries, rows, columns1, query_stride, remaining, EVEN_QUERIES)
        g1 = load_rows(grad_out, rows, columns1, grad_stride, remaining, EVEN_QUERIES)
        scores_t = tl.dot(k1, q1.T, input_precision=PRECISION)
        grad_weights_t = tl.dot(k1, g1.T, input_precision=PRECISION)
        if D2 > 0:
            q2 = load_rows(queries, rows, columns2, query_stride, remaining, EVEN_QUERIES)
            g2 = load_rows(grad_out, rows, columns2, grad_stride, remaining, EVEN_QUERIES)
            scores_t = tl.dot(k2, q2.T, scores_t, input_precision=PRECISION)
            grad_weights_t = tl.dot(k2, g2.T, grad_weights_t, input_precision=PRECISION)
        row_lse = tl.load(lse + start + rows, mask=rows < remaining, other=float("inf"))
        delta = tl.load(deltas + start + rows, mask=rows < remaining, other=0.0)
        weights_t = tl.exp2(scores_t * scale_log2 - row_lse[None, :])
        grad_scores_t = (weights_t * (grad_weights_t - delta[None, :]) * rest).to(q1.dtype)
        weights_t = (weights_t * (1.0 / power)).to(q1.dtype)
        total1 = tl.dot(weights_t, g1, total1, input_precision=PRECISION)
        total1 = tl.dot(grad_scores_t, q1, total1, input_precision=PRECISION)
        if D2 > 0:
            total2 = tl.dot(weights_t, g2, total2, input_precision=PRECISION)
            total2 = tl.dot(grad_scores_t, q2, total2, input_precision=PRECISION)
        queries += BLOCK_QUERIES * query_stride
        grad_out += BLOCK_QUERIES * grad_stride

    if HAS_UNIT:
        power *= tl.load(unit)
    a1 = load_logits(logits, offsets, columns1, width, left)
    highest = tl.max(a1, 1)
    if D2 > 0:
        a2 = load_logits(logits, offsets, columns2, width, left)
        highest = tl.maximum(highest, tl.max(a2, 1))
    p1 = tl.exp2((a1 - highest[:, None]) * LOG2_E)
    weight = tl.sum(p1, 1)
    along = tl.sum(p1 * total1, 1)
    if D2 > 0:
        p2 = tl.exp2((a2 - highest[:, None]) * LOG2_E)
        weight += tl.sum(p2, 1)
        along += tl.sum(p2 * total2, 1)
    share = 1.0 / weight
    mean = (along * share)[:, None]
    factor = (power * share)[:, None]
    store_columns(grad_logits, p1 * factor * (total1 - mean), offsets, columns1, width, left, width)
    if D2 > 0:
        slope2 = p2 * factor * (total2 - mean)
        store_columns(grad_logits, slope2, offsets, columns2, width, left, width)


def external_attention_triton(scores_BNK: Tensor, middle_BNK: Tensor, *, scale: float) -> Tensor:
    """softmax(scale * Q~ P^T) P with P = softmax(A), (B, N, K), with gradients.

    Under autocast the scores take its dtype. middle_BNK: float32, or the dtype of the scores.
    Raises `ValueError` for other inputs, and `KernelError` when a kernel does not start.
    """
    device_type = scores_BNK.device.type
    if torch.is_autocast_enabled(device_type):
        scores_BNK = scores_BNK.to(torch.get_autocast_dtype(device_type))
    check_operands(scores_BNK)
    check_widths(scores_BNK.shape[2])
    if middle_BNK.dtype not in (torch.float32, scores_BNK.dtype) or middle_BNK.device != scores_BNK.device:
        raise ValueError(
            f"middle logits are {middle_BNK.dtype} on {middle_BNK.device}; expected float32 or the scores' "
            f"{scores_BNK.dtype}, on {scores_BNK.device}"
        )
    mixed_BNK, _ = external_attention_with_lse(scores_BNK, middle_BNK, scale)
    return mixed_BNK


def _forward(scores: Tensor, middle: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    mixed, lse = _empty_outputs(scores, middle, scale)
    if mixed.numel():
        x = external_operands(scores, middle, scale)
        build = partial(forward_launch, x, mixed, lse, keys_are_values=True)
        start_kernel(
            ("external_forward", x.key()),
            {**x.tensors(), "out": mixed, "lse": lse},
            lambda: (build(tile=tile) for tile in smaller_tiles(x.tile("external_forward"))),
        )
    return mixed, lse


def _empty_outputs(scores: Tensor, middle: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    return scores.new_empty(scores.shape), scores.new_empty(scores.shape[:2], dtype=torch.float32)


def _backward(
    scores: Tensor, middle: Tensor, mixed: Tensor, lse: Tensor, grad_mixed: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    grad_scores, grad_middle = _empty_grads(scores, middle)
    if grad_mixed.numel():
        x = external_operands(scores, middle, scale)
        upstream = make_upstream(mixed, lse, grad_mixed, x.keys.shape[2])
        key = upstream.key(x)
        start_backward_queries(x, upstream, grad_scores, key=key, keys_are_values=True)
        middle = middle.contiguous()
        build = partial(external_backward_keys_launch, x, upstream, middle, grad_middle)
        start_kernel(
            ("external_backward_keys", key, middle.dtype),
            {**x.tensors(), **upstream.tensors(), "logits": middle, "grad_logits": grad_middle},
            lambda: (build(tile=tile) for tile in smaller_tiles(x.tile("external_backward_keys"))),
        )
    return grad_scores, grad_middle


def _empty_grads(scores: Tensor, middle: Tensor, *_: Tensor | float) -> tuple[Tensor, Tensor]:
    return scores.new_empty(scores.shape), middle.new_empty(middle.shape)


def external_operands(scores: Tensor, middle: Tensor, scale: float) -> Operands:
    """Q~ padded, and P as both keys and values."""
    width = scores.shape[2]
    probabilities = scores.new_empty(*scores.shape[:2], padded_width(width))
    middle = middle.contiguous()
    key = "class_probabilities", middle.shape, middle.dtype, probabilities.dtype
    tensors = {"logits": middle, "probabilities": probabilities}
    start_kernel(key, tensors, lambda: [probabilities_launch(middle, probabilities)])
    padded = padded_rows(scores, padded_width(width))
    return Operands(padded, probabilities, probabilities, width, width, scale)


def probabilities_launch(middle: Tensor, probabilities: Tensor) -> Launch:
    """P = softmax(A) into rows padded with zeros."""
    batch, num_rows, width = middle.shape
    padded = probabilities.shape[2]
    return Launch(
        class_probabilities,
        (triton.cdiv(batch * num_rows, SOFTMAX_ROWS),),
        {"logits": middle, "probabilities": probabilities},
        {"num_rows": batch * num_rows, "num_columns": width, "padded_columns": padded},
        {"BLOCK_ROWS": SOFTMAX_ROWS, "WIDTH": triton.next_power_of_2(padded)},
        Tile(SOFTMAX_ROWS, 0, 4, 1),
    )


def external_backward_keys_launch(
    x: Operands, upstream: Upstream, middle: Tensor, grad_middle: Tensor, *, tile: Tile | None = None
) -> Launch:
    """dA, (B, N, K) contiguous."""
    tile = tile or x.tile("external_backward_keys")
    constants = {k: v for k, v in x.constants(tile).items() if k not in ("E1", "E2")}
    numbers = {k: n for k, n in x.numbers().items() if not k.startswith("value_")}
    power = 1.0
    if x.scale > 0:
        power = 2.0 ** min(0, max(LEAST_POWER, math.floor(math.log2(x.scale))))
    return Launch(
        external_backward_keys,
        (triton.cdiv(x.num_keys, tile.block_keys), x.queries.shape[0]),
        {
            "queries": x.queries,
            "keys": x.keys,
            **upstream.tensors(),
            "logits": middle,
            "grad_logits": grad_middle,
        },
        {**numbers, **upstream.numbers(), "width": x.width, "power": power, "rest": x.scale / power},
        {
            **constants,
            "EVEN_QUERIES": x.num_queries % tile.block_queries == 0,
            "HAS_UNIT": upstream.has_unit,
        },
        tile,
    )


# The mixtures and, for the backward, each row's log-sum-exp in base 2, (B, N) float32.
external_attention_with_lse = define_operator(
    "external_attention",
    "(Tensor scores, Tensor middle, float scale) -> (Tensor, Tensor)",
    _forward,
    _empty_outputs,
)
# Gradients of the scores and of the middle logits.
external_attention_backward = define_operator(
    "external_attention_backward",
    "(Tensor scores, Tensor middle, Tensor mixed, Tensor lse, Tensor grad_mixed, float scale)"
    " -> (Tensor, Tensor)",
    _backward,
    _empty_grads,
)
define_gradient(external_attention_with_lse, external_attention_backward)

"""Triton kernel of external attention's backward: one accumulator dP, on chip through the softmax into dA."""

import triton
import triton.language as tl

from segdeformer.kernels.attention.triton_forward import load_rows, store_columns
from segdeformer.kernels.external_attention.triton_forward import LOG2_E, load_class_logits


@triton.jit
def external_backward_keys(
    queries,
    keys,
    grad_out,
    class_logits,
    grad_class_logits,
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
    class_logits += (batch * num_keys + first) * width
    grad_class_logits += (batch * num_keys + first) * width
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
    a1 = load_class_logits(class_logits, offsets, columns1, width, left)
    highest = tl.max(a1, 1)
    if D2 > 0:
        a2 = load_class_logits(class_logits, offsets, columns2, width, left)
        highest = tl.maximum(highest, tl.max(a2, 1))
    p1 = tl.exp2((a1 - highest[:, None]) * LOG2_E)
    weight = tl.sum(p1, 1)
    along = tl.sum(p1 * total1, 1)
    if D2 > 0:
        p2 = tl.exp2((a2 - highest[:, None]) * LOG2_E)
        weight += tl.sum(p2, 1)
        along += tl.sum(p2 * total2, 1)
    inverse = 1.0 / weight
    mean = (along * inverse)[:, None]
    factor = (power * inverse)[:, None]
    store_columns(grad_class_logits, p1 * factor * (total1 - mean), offsets, columns1, width, left, width)
    if D2 > 0:
        slope2 = p2 * factor * (total2 - mean)
        store_columns(grad_class_logits, slope2, offsets, columns2, width, left, width)

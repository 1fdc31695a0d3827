"""Triton forwards of one-head attention. Widths are sums of two powers of two, the second may be 0.

Rows of queries, keys and values are zero-padded to those widths (see kernels.launch.padded_rows), so only row
edges need masks. Scores are kept in base 2: exp2 is the hardware's own exponential.
"""

import triton
import triton.language as tl


@triton.jit
def load_rows(base, rows, columns, stride, num_rows, EVEN: tl.constexpr):
    """A tile of rows; rows past the end are zeros."""
    pointers = base + rows[:, None] * stride + columns[None, :]
    if EVEN:
        return tl.load(pointers)
    return tl.load(pointers, mask=rows[:, None] < num_rows, other=0.0)


@triton.jit
def load_bias(base, keys, num_keys):
    """What the scores of these keys get besides, in base 2; keys past the end have no weight."""
    return tl.load(base + keys, mask=keys < num_keys, other=-float("inf"))


@triton.jit
def store_columns(base, tile, rows, columns, stride, num_rows, num_columns):
    """A tile of rows, without its padding."""
    inside = (rows[:, None] < num_rows) & (columns[None, :] < num_columns)
    tl.store(base + rows[:, None] * stride + columns[None, :], tile.to(base.dtype.element_ty), mask=inside)


@triton.jit
def attention_forward(
    queries,
    keys,
    values,
    bias,
    out,
    lse,
    num_queries,
    num_keys,
    query_batch_stride,
    query_stride,
    key_batch_stride,
    key_stride,
    value_batch_stride,
    value_stride,
    out_width,
    scale_log2,
    D1: tl.constexpr,
    D2: tl.constexpr,
    E1: tl.constexpr,
    E2: tl.constexpr,
    KEYS_ARE_VALUES: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EVEN_KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    TMA: tl.constexpr,
    WARP_SPECIALIZE: tl.constexpr,
):
    """One block of queries per program, online softmax over the keys; lse is in base 2."""
    first = tl.program_id(0) * BLOCK_QUERIES
    batch = tl.program_id(1).to(tl.int64)
    queries += batch * query_batch_stride + first.to(tl.int64) * query_stride
    keys += batch * key_batch_stride
    values += batch * value_batch_stride
    out += (batch * num_queries + first) * out_width
    lse += batch * num_queries + first
    left = num_queries - first  # rows of this block that exist, at least one

    rows = tl.arange(0, BLOCK_QUERIES)
    offsets = tl.arange(0, BLOCK_KEYS)
    columns_d1 = tl.arange(0, D1)
    columns_e1 = tl.arange(0, E1)
    if TMA:
        queries1 = tl.make_tensor_descriptor(queries, [left, D1 + D2], [query_stride, 1], [BLOCK_QUERIES, D1])
        q1 = queries1.load([0, 0])
    else:
        q1 = load_rows(queries, rows, columns_d1, query_stride, left, False)
    mixed1 = tl.zeros([BLOCK_QUERIES, E1], tl.float32)
    if D2 > 0:
        columns_d2 = D1 + tl.arange(0, D2)
        if TMA:
            queries2 = tl.make_tensor_descriptor(
                queries, [left, D1 + D2], [query_stride, 1], [BLOCK_QUERIES, D2]
            )
            q2 = queries2.load([0, D1])
        else:
            q2 = load_rows(queries, rows, columns_d2, query_stride, left, False)
    if E2 > 0:
        columns_e2 = E1 + tl.arange(0, E2)
        mixed2 = tl.zeros([BLOCK_QUERIES, E2], tl.float32)
    if TMA:
        keys1 = tl.make_tensor_descriptor(keys, [num_keys, D1 + D2], [key_stride, 1], [BLOCK_KEYS, D1])
        if D2 > 0:
            keys2 = tl.make_tensor_descriptor(keys, [num_keys, D1 + D2], [key_stride, 1], [BLOCK_KEYS, D2])
        if not KEYS_ARE_VALUES:
            values1 = tl.make_tensor_descriptor(
                values, [num_keys, E1 + E2], [value_stride, 1], [BLOCK_KEYS, E1]
            )
            if E2 > 0:
                values2 = tl.make_tensor_descriptor(
                    values, [num_keys, E1 + E2], [value_stride, 1], [BLOCK_KEYS, E2]
                )

    highest = tl.full([BLOCK_QUERIES], -float("inf"), tl.float32)
    weight = tl.zeros([BLOCK_QUERIES], tl.float32)
    for start in tl.range(0, num_keys, BLOCK_KEYS, warp_specialize=WARP_SPECIALIZE):
        if TMA:
            k1 = keys1.load([start, 0])
        else:
            k1 = load_rows(keys, offsets, columns_d1, key_stride, num_keys - start, EVEN_KEYS)
        scores = tl.dot(q1, k1.T, input_precision=PRECISION)
        if D2 > 0:
            if TMA:
                k2 = keys2.load([start, D1])
            else:
                k2 = load_rows(keys, offsets, columns_d2, key_stride, num_keys - start, EVEN_KEYS)
            scores = tl.dot(q2, k2.T, scores, input_precision=PRECISION)
        scores = scores * scale_log2
        if HAS_BIAS:
            scores += load_bias(bias + start, offsets, num_keys - start)[None, :]
        elif not EVEN_KEYS:
            scores = tl.where((offsets < num_keys - start)[None, :], scores, -float("inf"))
        risen = tl.maximum(highest, tl.max(scores, 1))
        shrink = tl.exp2(highest - risen)
        weights = tl.exp2(scores - risen[:, None])
        weight = weight * shrink + tl.sum(weights, 1)
        highest = risen
        mixed1 = mixed1 * shrink[:, None]
        if KEYS_ARE_VALUES:
            v1 = k1
        elif TMA:
            v1 = values1.load([start, 0])
        else:
            v1 = load_rows(values, offsets, columns_e1, value_stride, num_keys - start, EVEN_KEYS)
        weights = weights.to(v1.dtype)
        mixed1 = tl.dot(weights, v1, mixed1, input_precision=PRECISION)
        if E2 > 0:
            if KEYS_ARE_VALUES:
                v2 = k2
            elif TMA:
                v2 = values2.load([start, E1])
            else:
                v2 = load_rows(values, offsets, columns_e2, value_stride, num_keys - start, EVEN_KEYS)
            mixed2 = mixed2 * shrink[:, None]
            mixed2 = tl.dot(weights, v2, mixed2, input_precision=PRECISION)
        if not TMA:
            keys += BLOCK_KEYS * key_stride
            values += BLOCK_KEYS * value_stride

    inverse = 1.0 / weight
    store_columns(out, mixed1 * inverse[:, None], rows, columns_e1, out_width, left, out_width)
    if E2 > 0:
        store_columns(out, mixed2 * inverse[:, None], rows, columns_e2, out_width, left, out_width)
    tl.store(lse + rows, highest + tl.log2(weight), mask=rows < left)


@triton.jit
def attention_forward_few_keys(
    queries,
    keys,
    values,
    bias,
    out,
    lse,
    num_queries,
    num_keys,
    query_batch_stride,
    query_stride,
    key_batch_stride,
    key_stride,
    value_batch_stride,
    value_stride,
    out_width,
    scale_log2,
    num_blocks,
    D1: tl.constexpr,
    D2: tl.constexpr,
    E1: tl.constexpr,
    E2: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
):
    """All keys and values stay on chip; each program walks over its `num_blocks` blocks of queries.

    One softmax each; a block past the end loads and stores nothing.
    """
    batch = tl.program_id(1).to(tl.int64)
    queries += batch * query_batch_stride
    keys += batch * key_batch_stride
    values += batch * value_batch_stride
    out += batch * num_queries * out_width
    lse += batch * num_queries

    rows = tl.arange(0, BLOCK_QUERIES)
    offsets = tl.arange(0, BLOCK_KEYS)
    columns_d1 = tl.arange(0, D1)
    columns_e1 = tl.arange(0, E1)
    k1 = load_rows(keys, offsets, columns_d1, key_stride, num_keys, False)
    v1 = load_rows(values, offsets, columns_e1, value_stride, num_keys, False)
    if D2 > 0:
        columns_d2 = D1 + tl.arange(0, D2)
        k2 = load_rows(keys, offsets, columns_d2, key_stride, num_keys, False)
    if E2 > 0:
        columns_e2 = E1 + tl.arange(0, E2)
        v2 = load_rows(values, offsets, columns_e2, value_stride, num_keys, False)

    if HAS_BIAS:
        key_bias = load_bias(bias, offsets, num_keys)
    for step in tl.range(0, num_blocks):
        first = (tl.program_id(0) + step * tl.num_programs(0)) * BLOCK_QUERIES
        left = num_queries - first
        here = queries + first.to(tl.int64) * query_stride
        q1 = load_rows(here, rows, columns_d1, query_stride, left, False)
        scores = tl.dot(q1, k1.T, input_precision=PRECISION)
        if D2 > 0:
            q2 = load_rows(here, rows, columns_d2, query_stride, left, False)
            scores = tl.dot(q2, k2.T, scores, input_precision=PRECISION)
        if HAS_BIAS:
            scores = scores * scale_log2 + key_bias[None, :]
        else:
            scores = tl.where((offsets < num_keys)[None, :], scores * scale_log2, -float("inf"))
        highest = tl.max(scores, 1)
        weights = tl.exp2(scores - highest[:, None])
        weight = tl.sum(weights, 1)
        inverse = 1.0 / weight
        there = out + first.to(tl.int64) * out_width
        mixed1 = tl.dot(weights.to(v1.dtype), v1, input_precision=PRECISION) * inverse[:, None]
        store_columns(there, mixed1, rows, columns_e1, out_width, left, out_width)
        if E2 > 0:
            mixed2 = tl.dot(weights.to(v2.dtype), v2, input_precision=PRECISION) * inverse[:, None]
            store_columns(there, mixed2, rows, columns_e2, out_width, left, out_width)
        tl.store(lse + first + rows, highest + tl.log2(weight), mask=rows < left)

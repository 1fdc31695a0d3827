"""Triton backwards of one-head attention; widths and padding as in the forward, scores in base 2.

P = exp2(scale S - lse), dP = dO V^T, dS = P (dP - delta), delta = sum(dO O) of each row:
dV = P^T dO, dK = scale dS^T Q, dQ = scale dS K. The scale meets float32 sums, not dS, which is rounded for
the products: small gradients would fall below float16's range. For the same reason dO may come in a `unit` of
its own (see launch.raised). Transposed products are computed directly, never by turning a tile.
"""

import triton
import triton.language as tl

from segdeformer.kernels.attention.triton_forward import load_bias, load_rows, store_columns


@triton.jit
def row_deltas(out, grad_out, deltas, num_rows, out_width, BLOCK_ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """sum(dO O) of each row of two contiguous matrices."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    columns = tl.arange(0, WIDTH)
    inside = (rows[:, None] < num_rows) & (columns[None, :] < out_width)
    places = rows[:, None] * out_width + columns[None, :]
    products = tl.load(out + places, mask=inside, other=0.0).to(tl.float32)
    products *= tl.load(grad_out + places, mask=inside, other=0.0).to(tl.float32)
    tl.store(deltas + rows, tl.sum(products, 1), mask=rows < num_rows)


@triton.jit
def attention_backward_queries(
    queries,
    keys,
    values,
    bias,
    grad_out,
    grad_queries,
    lse,
    deltas,
    unit,
    num_queries,
    num_keys,
    query_batch_stride,
    query_stride,
    key_batch_stride,
    key_stride,
    value_batch_stride,
    value_stride,
    grad_batch_stride,
    grad_stride,
    width,
    scale_log2,
    scale,
    D1: tl.constexpr,
    D2: tl.constexpr,
    E1: tl.constexpr,
    E2: tl.constexpr,
    KEYS_ARE_VALUES: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EVEN_KEYS: tl.constexpr,
    HAS_UNIT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
):
    """dQ: one block of queries per program, a loop over the keys."""
    first = tl.program_id(0) * BLOCK_QUERIES
    batch = tl.program_id(1).to(tl.int64)
    queries += batch * query_batch_stride + first.to(tl.int64) * query_stride
    grad_out += batch * grad_batch_stride + first.to(tl.int64) * grad_stride
    keys += batch * key_batch_stride
    values += batch * value_batch_stride
    grad_queries += (batch * num_queries + first) * width
    lse += batch * num_queries + first
    deltas += batch * num_queries + first
    left = num_queries - first

    rows = tl.arange(0, BLOCK_QUERIES)
    offsets = tl.arange(0, BLOCK_KEYS)
    columns_d1 = tl.arange(0, D1)
    columns_e1 = tl.arange(0, E1)
    q1 = load_rows(queries, rows, columns_d1, query_stride, left, False)
    g1 = load_rows(grad_out, rows, columns_e1, grad_stride, left, False)
    total1 = tl.zeros([BLOCK_QUERIES, D1], tl.float32)
    if D2 > 0:
        columns_d2 = D1 + tl.arange(0, D2)
        q2 = load_rows(queries, rows, columns_d2, query_stride, left, False)
        total2 = tl.zeros([BLOCK_QUERIES, D2], tl.float32)
    if E2 > 0:
        columns_e2 = E1 + tl.arange(0, E2)
        g2 = load_rows(grad_out, rows, columns_e2, grad_stride, left, False)
    row_lse = tl.load(lse + rows, mask=rows < left, other=float("inf"))
    delta = tl.load(deltas + rows, mask=rows < left, other=0.0)

    for start in tl.range(0, num_keys, BLOCK_KEYS):
        k1 = load_rows(keys, offsets, columns_d1, key_stride, num_keys - start, EVEN_KEYS)
        scores = tl.dot(q1, k1.T, input_precision=PRECISION)
        if D2 > 0:
            k2 = load_rows(keys, offsets, columns_d2, key_stride, num_keys - start, EVEN_KEYS)
            scores = tl.dot(q2, k2.T, scores, input_precision=PRECISION)
        scores = scores * scale_log2 - row_lse[:, None]
        if HAS_BIAS:
            scores += load_bias(bias + start, offsets, num_keys - start)[None, :]
        weights = tl.exp2(scores)
        if not EVEN_KEYS and not HAS_BIAS:
            weights = tl.where((offsets < num_keys - start)[None, :], weights, 0.0)
        if KEYS_ARE_VALUES:
            v1 = k1
        else:
            v1 = load_rows(values, offsets, columns_e1, value_stride, num_keys - start, EVEN_KEYS)
        grad_weights = tl.dot(g1, v1.T, input_precision=PRECISION)
        if E2 > 0:
            if KEYS_ARE_VALUES:
                v2 = k2
            else:
                v2 = load_rows(values, offsets, columns_e2, value_stride, num_keys - start, EVEN_KEYS)
            grad_weights = tl.dot(g2, v2.T, grad_weights, input_precision=PRECISION)
        grad_scores = (weights * (grad_weights - delta[:, None])).to(k1.dtype)
        total1 = tl.dot(grad_scores, k1, total1, input_precision=PRECISION)
        if D2 > 0:
            total2 = tl.dot(grad_scores, k2, total2, input_precision=PRECISION)
        keys += BLOCK_KEYS * key_stride
        values += BLOCK_KEYS * value_stride

    if HAS_UNIT:
        scale *= tl.load(unit)
    store_columns(grad_queries, total1 * scale, rows, columns_d1, width, left, width)
    if D2 > 0:
        store_columns(grad_queries, total2 * scale, rows, columns_d2, width, left, width)


@triton.jit
def attention_backward_keys(
    queries,
    keys,
    values,
    bias,
    grad_out,
    grad_keys,
    grad_values,
    lse,
    deltas,
    unit,
    num_queries,
    num_keys,
    query_batch_stride,
    query_stride,
    key_batch_stride,
    key_stride,
    value_batch_stride,
    value_stride,
    grad_batch_stride,
    grad_stride,
    width,
    value_width,
    scale_log2,
    scale,
    D1: tl.constexpr,
    D2: tl.constexpr,
    E1: tl.constexpr,
    E2: tl.constexpr,
    OF_KEYS: tl.constexpr,
    OF_VALUES: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EVEN_QUERIES: tl.constexpr,
    HAS_UNIT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
):
    """dK, dV or both: one block of keys per program, a loop over the queries.

    Both accumulators together spill where they are wide; then each has a launch of its own.
    """
    first = tl.program_id(0) * BLOCK_KEYS
    batch = tl.program_id(1).to(tl.int64)
    keys += batch * key_batch_stride + first.to(tl.int64) * key_stride
    queries += batch * query_batch_stride
    grad_out += batch * grad_batch_stride
    lse += batch * num_queries
    deltas += batch * num_queries
    left = num_keys - first

    rows = tl.arange(0, BLOCK_QUERIES)
    offsets = tl.arange(0, BLOCK_KEYS)
    columns_d1 = tl.arange(0, D1)
    columns_e1 = tl.arange(0, E1)
    k1 = load_rows(keys, offsets, columns_d1, key_stride, left, False)
    if D2 > 0:
        columns_d2 = D1 + tl.arange(0, D2)
        k2 = load_rows(keys, offsets, columns_d2, key_stride, left, False)
    if E2 > 0:
        columns_e2 = E1 + tl.arange(0, E2)
    if OF_KEYS:
        values += batch * value_batch_stride + first.to(tl.int64) * value_stride
        v1 = load_rows(values, offsets, columns_e1, value_stride, left, False)
        if E2 > 0:
            v2 = load_rows(values, offsets, columns_e2, value_stride, left, False)
        of_keys1 = tl.zeros([BLOCK_KEYS, D1], tl.float32)
        if D2 > 0:
            of_keys2 = tl.zeros([BLOCK_KEYS, D2], tl.float32)
    if OF_VALUES:
        of_values1 = tl.zeros([BLOCK_KEYS, E1], tl.float32)
        if E2 > 0:
            of_values2 = tl.zeros([BLOCK_KEYS, E2], tl.float32)

    if HAS_BIAS:
        key_bias = load_bias(bias + first, offsets, left)
    for start in tl.range(0, num_queries, BLOCK_QUERIES):
        q1 = load_rows(queries, rows, columns_d1, query_stride, num_queries - start, EVEN_QUERIES)
        scores_t = tl.dot(k1, q1.T, input_precision=PRECISION)
        if D2 > 0:
            q2 = load_rows(queries, rows, columns_d2, query_stride, num_queries - start, EVEN_QUERIES)
            scores_t = tl.dot(k2, q2.T, scores_t, input_precision=PRECISION)
        # Queries past the end get an infinite lse, hence no weight.
        row_lse = tl.load(lse + start + rows, mask=rows < num_queries - start, other=float("inf"))
        scores_t = scores_t * scale_log2 - row_lse[None, :]
        if HAS_BIAS:
            scores_t += key_bias[:, None]
        weights_t = tl.exp2(scores_t)
        g1 = load_rows(grad_out, rows, columns_e1, grad_stride, num_queries - start, EVEN_QUERIES)
        if E2 > 0:
            g2 = load_rows(grad_out, rows, columns_e2, grad_stride, num_queries - start, EVEN_QUERIES)
        if OF_VALUES:
            rounded_t = weights_t.to(g1.dtype)
            of_values1 = tl.dot(rounded_t, g1, of_values1, input_precision=PRECISION)
            if E2 > 0:
                of_values2 = tl.dot(rounded_t, g2, of_values2, input_precision=PRECISION)
        if OF_KEYS:
            delta = tl.load(deltas + start + rows, mask=rows < num_queries - start, other=0.0)
            grad_weights_t = tl.dot(v1, g1.T, input_precision=PRECISION)
            if E2 > 0:
                grad_weights_t = tl.dot(v2, g2.T, grad_weights_t, input_precision=PRECISION)
            grad_scores_t = (weights_t * (grad_weights_t - delta[None, :])).to(q1.dtype)
            of_keys1 = tl.dot(grad_scores_t, q1, of_keys1, input_precision=PRECISION)
            if D2 > 0:
                of_keys2 = tl.dot(grad_scores_t, q2, of_keys2, input_precision=PRECISION)
        queries += BLOCK_QUERIES * query_stride
        grad_out += BLOCK_QUERIES * grad_stride

    one = 1.0
    if HAS_UNIT:
        one = tl.load(unit)
        scale *= one
    if OF_KEYS:
        grad_keys += (batch * num_keys + first) * width
        store_columns(grad_keys, of_keys1 * scale, offsets, columns_d1, width, left, width)
        if D2 > 0:
            store_columns(grad_keys, of_keys2 * scale, offsets, columns_d2, width, left, width)
    if OF_VALUES:
        grad_values += (batch * num_keys + first) * value_width
        store_columns(grad_values, of_values1 * one, offsets, columns_e1, value_width, left, value_width)
        if E2 > 0:
            store_columns(grad_values, of_values2 * one, offsets, columns_e2, value_width, left, value_width)


@triton.jit
def attention_weights_and_grads(
    queries,
    keys,
    values,
    bias,
    grad_out,
    weights,
    grad_scores,
    lse,
    deltas,
    num_queries,
    num_keys,
    query_stride,
    key_stride,
    value_stride,
    grad_stride,
    weights_stride,
    scale_log2,
    WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    """P and dS of a chunk of queries against all keys: two products over the width with one epilogue.

    For widths whose tiles do not fit on chip: dV, dK and dQ then are plain matrix products.
    """
    first_query = tl.program_id(1) * BLOCK_QUERIES
    first_key = tl.program_id(0) * BLOCK_KEYS
    rows = first_query + tl.arange(0, BLOCK_QUERIES)
    offsets = first_key + tl.arange(0, BLOCK_KEYS)
    columns = tl.arange(0, BLOCK_WIDTH)
    keys += first_key.to(tl.int64) * key_stride
    values += first_key.to(tl.int64) * value_stride
    near = tl.arange(0, BLOCK_KEYS)
    left = num_keys - first_key

    scores = tl.zeros([BLOCK_QUERIES, BLOCK_KEYS], tl.float32)
    for column in tl.range(0, WIDTH, BLOCK_WIDTH):
        q = load_rows(queries + column, rows, columns, query_stride, num_queries, False)
        k = load_rows(keys + column, near, columns, key_stride, left, False)
        scores = tl.dot(q, k.T, scores, input_precision=PRECISION)
    grad_weights = tl.zeros([BLOCK_QUERIES, BLOCK_KEYS], tl.float32)
    for column in tl.range(0, VALUE_WIDTH, BLOCK_WIDTH):
        g = load_rows(grad_out + column, rows, columns, grad_stride, num_queries, False)
        v = load_rows(values + column, near, columns, value_stride, left, False)
        grad_weights = tl.dot(g, v.T, grad_weights, input_precision=PRECISION)

    row_lse = tl.load(lse + rows, mask=rows < num_queries, other=float("inf"))
    delta = tl.load(deltas + rows, mask=rows < num_queries, other=0.0)
    scores = scores * scale_log2 - row_lse[:, None]
    if HAS_BIAS:
        scores += load_bias(bias, offsets, num_keys)[None, :]
    probabilities = tl.exp2(scores)
    inside = (rows[:, None] < num_queries) & (offsets[None, :] < num_keys)
    places = rows.to(tl.int64)[:, None] * weights_stride + offsets[None, :]
    tl.store(weights + places, probabilities.to(weights.dtype.element_ty), mask=inside)
    slopes = probabilities * (grad_weights - delta[:, None])
    tl.store(grad_scores + places, slopes.to(grad_scores.dtype.element_ty), mask=inside)

"""Triton forwards of one-head attention. Widths are sums of two powers of two, the second may be 0.

Rows of queries, keys and values are zero-padded to those widths (see launch.padded_rows), so only row
edges need masks. Scores are kept in base 2: exp2 is the hardware's own exponential.
"""

import struct

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
def store_columns(base, tile, rows, columns, stride, num_rows, num_columns):
    """A tile of rows, without its padding."""
    inside = (rows[:, None] < num_rows) & (columns[None, :] < num_columns)
    tl.store(base + rows[:, None] * stride + columns[None, :], tile.to(base.dtype.element_ty), mask=inside)


@triton.jit
def attention_forward(
    queries,
    keys,
    values,
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
        if not EVEN_KEYS:
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

    share = 1.0 / weight
    store_columns(out, mixed1 * share[:, None], rows, columns_e1, out_width, left, out_width)
    if E2 > 0:
        store_columns(out, mixed2 * share[:, None], rows, columns_e2, out_width, left, out_width)
    tl.store(lse + rows, highest + tl.log2(weight), mask=rows < left)


@triton.jit
def attention_forward_few_keys(
    queries,
    keys,
    values,
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

    for step in tl.range(0, num_blocks):
        first = (tl.program_id(0) + step * tl.num_programs(0)) * BLOCK_QUERIES
        left = num_queries - first
        here = queries + first.to(tl.int64) * query_stride
        q1 = load_rows(here, rows, columns_d1, query_stride, left, False)
        scores = tl.dot(q1, k1.T, input_precision=PRECISION)
        if D2 > 0:
            q2 = load_rows(here, rows, columns_d2, query_stride, left, False)
            scores = tl.dot(q2, k2.T, scores, input_precision=PRECISION)
        scores = tl.where((offsets < num_keys)[None, :], scores * scale_log2, -float("inf"))
        highest = tl.max(scores, 1)
        weights = tl.exp2(scores - highest[:, None])
        weight = tl.sum(weights, 1)
        share = 1.0 / weight
        there = out + first.to(tl.int64) * out_width
        mixed1 = tl.dot(weights.to(v1.dtype), v1, input_precision=PRECISION) * share[:, None]
        store_columns(there, mixed1, rows, columns_e1, out_width, left, out_width)
        if E2 > 0:
            mixed2 = tl.dot(weights.to(v2.dtype), v2, input_precision=PRECISION) * share[:, None]
            store_columns(there, mixed2, rows, columns_e2, out_width, left, out_width)
        tl.store(lse + first + rows, highest + tl.log2(weight), mask=rows < left)


# 2^f for f in [-1/2, 1/2] by a cubic, relative error 1.0e-4, a 38th of bfloat16's rounding; constant term 1.
CUBIC = (0.05500875, 0.24221076, 0.69328292)


def _hexadecimal(number: float) -> str:
    """A float32 as PTX writes it."""
    return f"0f{struct.unpack('>I', struct.pack('>f', number))[0]:08X}"


# Four exponentials of base 2: three by the processor's own unit, one by products, which have time to spare.
# Adding 1.5 * 2^23 rounds to the nearest integer, which then stands in the low bits: the exponent's shift.
EXP2_OF_FOUR = tl.constexpr(
    """{{
    .reg .f32 whole, part, power;
    .reg .b32 shift, bits;
    ex2.approx.ftz.f32 $0, $4;
    ex2.approx.ftz.f32 $1, $5;
    ex2.approx.ftz.f32 $2, $6;
    max.f32 part, $7, {lowest};
    add.rn.f32 whole, part, {rounder};
    mov.b32 shift, whole;
    sub.rn.f32 whole, whole, {rounder};
    sub.rn.f32 part, part, whole;
    fma.rn.f32 power, part, {c3}, {c2};
    fma.rn.f32 power, power, part, {c1};
    fma.rn.f32 power, power, part, {one};
    shl.b32 shift, shift, 23;
    mov.b32 bits, power;
    add.s32 $3, bits, shift;
    }}""".format(
        lowest=_hexadecimal(-126.0),
        rounder=_hexadecimal(1.5 * 2**23),
        c3=_hexadecimal(CUBIC[0]),
        c2=_hexadecimal(CUBIC[1]),
        c1=_hexadecimal(CUBIC[2]),
        one=_hexadecimal(1.0),
    )
)


@triton.jit
def exp2_of(scores, POLYNOMIAL: tl.constexpr):
    """2^scores for scores up to 0; POLYNOMIAL: every fourth by a polynomial, on NVIDIA's GPUs only."""
    if POLYNOMIAL:
        return tl.inline_asm_elementwise(
            EXP2_OF_FOUR, "=r,=r,=r,=r,r,r,r,r", [scores], dtype=tl.float32, is_pure=True, pack=4
        )
    return tl.exp2(scores)


@triton.jit
def external_forward_narrow(
    queries,
    keys,
    out,
    lse,
    num_queries,
    num_keys,
    query_batch_stride,
    query_stride,
    key_batch_stride,
    key_stride,
    out_width,
    scale_log2,
    WIDTH: tl.constexpr,
    EVEN_KEYS: tl.constexpr,
    LARGEST_RANGE: tl.constexpr,
    POLYNOMIAL: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
):
    """External attention over few classes, whose time goes into exponentials and not into products.

    Keys are rows of probabilities, so no score exceeds its query's largest entry: with that bound subtracted
    there is no running maximum to keep. A block with a query whose entries lie too far apart for the weights'
    dtype (`LARGEST_RANGE`, in powers of two) keeps one all the same.
    """
    first = tl.program_id(0) * BLOCK_QUERIES
    batch = tl.program_id(1).to(tl.int64)
    queries += batch * query_batch_stride + first.to(tl.int64) * query_stride
    keys += batch * key_batch_stride
    out += (batch * num_queries + first) * out_width
    lse += batch * num_queries + first
    left = num_queries - first

    rows = tl.arange(0, BLOCK_QUERIES)
    offsets = tl.arange(0, BLOCK_KEYS)
    columns = tl.arange(0, WIDTH)
    q = load_rows(queries, rows, columns, query_stride, left, False)
    entries = q.to(tl.float32) * scale_log2
    real = (columns < out_width)[None, :]
    bound = tl.max(tl.where(real, entries, -float("inf")), 1)
    lowest = tl.min(tl.where(real, entries, float("inf")), 1)
    mixed = tl.zeros([BLOCK_QUERIES, WIDTH], tl.float32)
    weight = tl.zeros([BLOCK_QUERIES], tl.float32)
    if tl.max(bound - lowest, 0) <= LARGEST_RANGE:
        for start in tl.range(0, num_keys, BLOCK_KEYS):
            k = load_rows(keys, offsets, columns, key_stride, num_keys - start, EVEN_KEYS)
            scores = tl.dot(q, k.T, input_precision=PRECISION) * scale_log2 - bound[:, None]
            if not EVEN_KEYS:
                scores = tl.where((offsets < num_keys - start)[None, :], scores, -float("inf"))
            weights = exp2_of(scores, POLYNOMIAL)
            weight += tl.sum(weights, 1)
            mixed = tl.dot(weights.to(k.dtype), k, mixed, input_precision=PRECISION)
            keys += BLOCK_KEYS * key_stride
    else:
        bound = tl.full([BLOCK_QUERIES], -float("inf"), tl.float32)
        for start in tl.range(0, num_keys, BLOCK_KEYS):
            k = load_rows(keys, offsets, columns, key_stride, num_keys - start, EVEN_KEYS)
            scores = tl.dot(q, k.T, input_precision=PRECISION) * scale_log2
            if not EVEN_KEYS:
                scores = tl.where((offsets < num_keys - start)[None, :], scores, -float("inf"))
            risen = tl.maximum(bound, tl.max(scores, 1))
            shrink = tl.exp2(bound - risen)
            weights = tl.exp2(scores - risen[:, None])
            weight = weight * shrink + tl.sum(weights, 1)
            mixed = mixed * shrink[:, None]
            mixed = tl.dot(weights.to(k.dtype), k, mixed, input_precision=PRECISION)
            bound = risen
            keys += BLOCK_KEYS * key_stride

    store_columns(out, mixed * (1.0 / weight)[:, None], rows, columns, out_width, left, out_width)
    tl.store(lse + rows, bound + tl.log2(weight), mask=rows < left)

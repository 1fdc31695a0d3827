"""Triton forwards of external attention: P = softmax(A), and the mixing where there are few classes."""

import struct

import triton
import triton.language as tl

from segdeformer.kernels.attention.triton_forward import load_rows, store_columns

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def load_class_logits(class_logits, rows, columns, width, num_rows):
    """A float32 tile of contiguous rows; columns past the end weigh nothing, rows past the end are zeros."""
    places = rows[:, None] * width + columns[None, :]
    inside = (rows[:, None] < num_rows) & (columns[None, :] < width)
    scores = tl.load(class_logits + places, mask=inside, other=0.0).to(tl.float32)
    return tl.where(columns[None, :] < width, scores, -float("inf"))


@triton.jit
def class_probabilities(
    class_logits,
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
    scores = load_class_logits(class_logits, rows, columns, num_columns, num_rows)
    highest = tl.max(scores, 1)
    weights = tl.exp2((scores - highest[:, None]) * LOG2_E)
    softmax = weights / tl.sum(weights, 1)[:, None]
    within = (rows[:, None] < num_rows) & (columns[None, :] < padded_columns)
    places = rows[:, None] * padded_columns + columns[None, :]
    tl.store(probabilities + places, softmax.to(probabilities.dtype.element_ty), mask=within)


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

"""The external attention's kernels against float64; see test_triton_attention.py."""

import math
import struct

import numpy as np
import pytest
import torch
from budget import (
    assert_no_worse,
    assert_small_gradients_no_worse,
    assert_values_and_gradients_no_worse,
)
from test_triton_attention import DEVICE, DTYPES, made, poisoned_memory  # noqa: F401

from segdeformer.kernels.external_attention import external_attention, external_attention_reference
from segdeformer.kernels.external_attention.launch import external_launch
from segdeformer.kernels.external_attention.operator import external_operands
from segdeformer.kernels.external_attention.triton_forward import CUBIC, EXP2_OF_FOUR
from segdeformer.kernels.tiles import Tile

SIZES = [(1, 150), (17, 19), (63, 171), (128, 2), (200, 150), (200, 19), (400, 2)]  # pixels, classes


def triton_external(scale):
    return lambda scores, class_logits: external_attention(scores, class_logits, scale=scale, impl="triton")


def textbook(scale):
    return lambda scores, class_logits: external_attention_reference(scores, class_logits, scale=scale)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_pixels", "num_classes"), SIZES)
def test_values_and_gradients_are_no_worse_than_the_textbook_form(num_pixels, num_classes, dtype):
    scores = 4 * made(2, num_pixels, num_classes, dtype=dtype)
    class_logits = 2 * made(2, num_pixels, num_classes, seed=1)
    upstream = made(2, num_pixels, num_classes, seed=2, dtype=dtype)
    assert_values_and_gradients_no_worse(
        triton_external(0.5), textbook(0.5), [scores, class_logits], upstream
    )


def test_class_logits_may_have_the_dtype_of_the_scores():
    scores, class_logits = made(1, 70, 19, dtype=torch.float16), made(1, 70, 19, seed=1, dtype=torch.float16)
    upstream = made(1, 70, 19, seed=2, dtype=torch.float16)
    assert_values_and_gradients_no_worse(
        triton_external(0.5), textbook(0.5), [scores, class_logits], upstream
    )
    with pytest.raises(ValueError, match=r"class logits are torch.float16 on .*; expected float32"):
        external_attention(scores.float(), class_logits, scale=1.0, impl="triton")


def test_low_rank_equals_the_plain_form_with_its_gradients():
    """Eq. 7 with C-wide keys and values, made from P and K x C tables, is the K-wide form times a table."""
    pixels, classes, width = 90, 19, 40
    queries, class_logits = made(1, pixels, width), made(1, pixels, classes, seed=1)
    keys, values = made(classes, width, seed=2), made(classes, width, seed=3)
    upstream = made(1, pixels, width, seed=4)

    def low_rank(queries, class_logits, keys, values):
        return external_attention(queries @ keys.T, class_logits, scale=width**-0.5, impl="triton") @ values

    def plain(queries, class_logits, keys, values):
        probabilities = class_logits.softmax(-1)
        scores = (queries @ (probabilities @ keys).transpose(1, 2)) * width**-0.5
        return scores.softmax(-1) @ (probabilities @ values)

    assert_values_and_gradients_no_worse(low_rank, plain, [queries, class_logits, keys, values], upstream)


def test_strided_inputs_give_the_same():
    packed = made(70, 2, 6 * 19)
    scores, class_logits = packed[..., 1:39:2].transpose(0, 1), packed[..., 40:78:2].transpose(0, 1)
    upstream = made(2, 19, 70, seed=5).transpose(1, 2)
    assert_values_and_gradients_no_worse(
        triton_external(0.5), textbook(0.5), [scores, class_logits], upstream
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_are_convex_batches_apart_and_a_constant_changes_nothing(dtype):
    scores, class_logits = made(3, 100, 150, dtype=dtype), 3 * made(3, 100, 150, seed=1)
    mixed = external_attention(scores, class_logits, scale=1.0, impl="triton")
    assert mixed.min() >= 0
    assert (mixed.double().sum(-1) - 1).abs().max() <= 150 * torch.finfo(dtype).eps
    shifted = external_attention(scores, class_logits + 5.0, scale=1.0, impl="triton")
    torch.testing.assert_close(shifted, mixed, atol=16 * torch.finfo(dtype).eps, rtol=0)
    alone = [
        external_attention(scores[i:][:1], class_logits[i:][:1], scale=1.0, impl="triton") for i in range(3)
    ]
    assert torch.equal(torch.cat(alone), mixed)


@pytest.mark.parametrize("dtype", DTYPES)
def test_scores_of_sixty_and_certain_pixels_stay_finite(dtype):
    certain = 120 * torch.eye(30, device=DEVICE)[None] - 60  # P is the identity
    scores = (120 * torch.eye(30, device=DEVICE)[None] - 60).to(dtype).requires_grad_()
    class_logits = certain.clone().requires_grad_()
    mixed = external_attention(scores, class_logits, scale=1.0, impl="triton")
    eye = torch.eye(30, dtype=torch.float64, device=DEVICE)[None]
    assert_no_worse(mixed, eye.to(dtype), eye)
    mixed.square().sum().backward()
    assert scores.grad.isfinite().all()
    assert class_logits.grad.isfinite().all()
    equal = external_attention(torch.zeros_like(scores), certain, scale=1.0, impl="triton")
    assert_no_worse(equal, eye.to(dtype), torch.full_like(eye, 1 / 30))


@pytest.mark.parametrize("tma", [False, True])
@pytest.mark.parametrize(("queries", "keys"), [(16, 64), (64, 16), (32, 32)])
def test_every_tile_gives_the_same(queries, keys, tma):
    scores, class_logits = made(1, 90, 150), made(1, 90, 150, seed=1)
    x = external_operands(scores, class_logits, 0.3)
    mixed, lse = torch.full_like(scores, float("nan")), scores.new_empty(1, 90)
    tile = Tile(queries, keys, 4, 1, tma)
    external_launch("external_forward", x, {"out": mixed, "lse": lse}, tile).run()
    oracle = textbook(0.3)(scores.double(), class_logits.double())
    assert_no_worse(mixed, textbook(0.3)(scores, class_logits), oracle)


@pytest.mark.parametrize(
    ("num_classes", "size", "scale"),
    [(19, 1e-3, 512**-0.5), (150, 1e-2, 1 / 16), (19, 1e-5, 1 / 16), (19, 1e-3, 3.0)],
)
def test_small_float16_gradients_lose_no_more_than_large_ones(num_classes, size, scale):
    scores = 2 * made(1, 500, num_classes, dtype=torch.float16)
    class_logits = 2 * made(1, 500, num_classes, seed=1)
    upstream = (size * made(1, 500, num_classes, seed=2)).half()
    power = -math.floor(math.log2(size))
    assert_small_gradients_no_worse(
        triton_external(scale), textbook(scale), [scores, class_logits], upstream, power=power
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spread", [0.5, 5, 20, 400])
@pytest.mark.parametrize("num_classes", [2, 19, 32])
def test_few_classes_need_no_running_maximum_and_far_scores_keep_one(num_classes, spread, dtype):
    """Whether a block of queries keeps one depends on how far its scores lie apart: here on every third."""
    scores = made(2, 90, num_classes, dtype=torch.float64)
    scores[:, ::3] *= spread
    scores, class_logits = scores.to(dtype), 2 * made(2, 90, num_classes, seed=1)
    x = external_operands(scores, class_logits, 1.0)
    mixed, lse = torch.full_like(scores, float("nan")), torch.full((2, 90), float("nan"), device=DEVICE)
    call = external_launch("external_forward", x, {"out": mixed, "lse": lse}, Tile(16, 32, 4, 1))
    assert call.name == "external_forward_narrow"
    call.run()
    oracle = textbook(1.0)(scores.double(), class_logits.double())
    assert_no_worse(mixed, textbook(1.0)(scores, class_logits), oracle)
    probabilities = x.keys[..., :num_classes].double()
    exact = (scores.double() @ probabilities.transpose(1, 2)).logsumexp(-1) / math.log(2)
    assert (lse.double() - exact).abs().max() <= 4e-6 * exact.abs().max().clamp(min=1)


def test_a_scale_that_is_not_positive_takes_the_general_kernel():
    scores, class_logits = made(1, 40, 19), made(1, 40, 19, seed=1)
    upstream = made(1, 40, 19, seed=2)
    for scale in (-0.5, 0.0):
        assert_values_and_gradients_no_worse(
            triton_external(scale), textbook(scale), [scores, class_logits], upstream
        )


def test_the_polynomial_of_two_to_the_x_is_a_fraction_of_bfloat16s_rounding():
    """By the steps of the PTX, in float32: round to the nearest integer, a cubic, add to the exponent."""
    rounder, (c3, c2, c1) = np.float32(1.5 * 2**23), map(np.float32, CUBIC)
    x = np.linspace(-120, 0, 400_001, dtype=np.float32)
    whole = x + rounder
    shift = whole.view(np.int32) << 23
    part = x - (whole - rounder)
    power = ((c3 * part + c2) * part + c1) * part + np.float32(1)
    result = (power.view(np.int32) + shift).view(np.float32)
    assert np.abs(result / np.exp2(x.astype(np.float64)) - 1).max() < 1.1e-4
    assert float.fromhex("0x1p-9") > 1.9e-3  # bfloat16's
    for number in (*CUBIC, -126.0, 1.5 * 2**23):
        assert struct.pack(">f", number).hex().upper() in EXP2_OF_FOUR.value


def test_an_empty_batch_is_empty():
    scores, class_logits = made(0, 5, 19).requires_grad_(), made(0, 5, 19).requires_grad_()
    external_attention(scores, class_logits, scale=1.0, impl="triton").sum().backward()
    assert scores.grad.shape == class_logits.grad.shape == (0, 5, 19)

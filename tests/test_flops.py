"""FLOPs: the counter against sums written out here, and the same for every implementation."""

import pytest
import torch

from segdeformer.config import (
    AuxiliaryConfig,
    ContextConfig,
    EncoderConfig,
    ExternalConfig,
    FaPNConfig,
    InternalConfig,
    MLPFusionConfig,
    ModelConfig,
    UperNetConfig,
)
from segdeformer.kernels.attention import attention
from segdeformer.kernels.external_attention import external_attention
from segdeformer.measure.flops import flop_counter, model_flops, printed_flops
from segdeformer.models.skeleton import build_skeleton
from segdeformer.weights.build import build_model

IMPLS = ["auto", "sdpa", "blocks", "reference", "triton"]
BOTH = {"internal": InternalConfig(), "external": ExternalConfig()}


# Multiply-adds, by hand.


def linear(pixels: int, inputs: int, outputs: int) -> int:
    return pixels * inputs * outputs


def convolution(pixels_out: int, inputs: int, outputs: int, kernel: int) -> int:
    return pixels_out * inputs * outputs * kernel**2


def depthwise(pixels: int, channels: int, kernel: int) -> int:
    return pixels * channels * kernel**2


def attended(queries: int, keys: int, width: int, value_width: int) -> int:
    """Scores, then mixtures; all heads together are as wide as the map."""
    return queries * keys * width + queries * keys * value_width


def mit_b0_macs(side_px: int) -> int:
    """Four stages of two blocks."""
    total = 0
    inputs = 3
    for stride, channels, reduction, kernel in (
        (4, 32, 8, 7),
        (8, 64, 4, 3),
        (16, 160, 2, 3),
        (32, 256, 1, 3),
    ):
        pixels = (side_px // stride) ** 2
        keys = pixels // reduction**2
        total += convolution(pixels, inputs, channels, kernel)  # overlapping patches
        for _ in range(2):
            total += linear(pixels, channels, channels)  # queries
            if reduction > 1:
                total += convolution(keys, channels, channels, reduction)
            total += 2 * linear(keys, channels, channels)  # keys and values
            total += attended(pixels, keys, channels, channels)
            total += linear(pixels, channels, channels)  # projection
            total += linear(pixels, channels, 4 * channels)  # Mix-FFN
            total += depthwise(pixels, 4 * channels, 3)
            total += linear(pixels, 4 * channels, channels)
        inputs = channels
    return total


B0_CHANNELS = (32, 64, 160, 256)
SEGFORMER_B0 = ModelConfig(
    num_classes=150, encoder=EncoderConfig(name="mit_b0"), fusion=MLPFusionConfig(width=256)
)
SEGFORMER_B0_FLOPS = 11_037_835_264


def test_segformer_b0_at_512_px_with_150_classes_is_the_hand_count():
    pixels = [(512 // stride) ** 2 for stride in (4, 8, 16, 32)]
    to_256 = [linear(p, channels, 256) for p, channels in zip(pixels, B0_CHANNELS, strict=True)]
    mixed = [linear(p, 256, 256) for p in pixels]  # each map's share of the concatenation's convolution
    classified = linear(pixels[0], 256, 150)
    by_hand = 2 * (mit_b0_macs(512) + sum(to_256) + sum(mixed) + classified)
    counted = model_flops(build_skeleton(SEGFORMER_B0), batch=1, size=(512, 512))
    assert counted.total == pytest.approx(by_hand, rel=0.03)  # what is asked for
    assert counted.total == by_hand == SEGFORMER_B0_FLOPS
    assert counted.parts.encoder == 2 * mit_b0_macs(512)
    assert counted.parts.fusion == 2 * (sum(to_256) + sum(mixed))
    assert (counted.parts.context, counted.parts.head) == (0, 2 * classified)


def test_attention_is_in_the_count_of_segformer_b0():
    pixels_and_channels = [((512 // s) ** 2, c) for s, c in zip((4, 8, 16, 32), B0_CHANNELS, strict=True)]
    alone = sum(2 * attended(pixels, 256, channels, channels) for pixels, channels in pixels_and_channels)
    assert alone == 2 * 2 * 256 * (16384 * 32 + 4096 * 64 + 1024 * 160 + 256 * 256)
    assert 0.15 < alone / (mit_b0_macs(512)) < 0.35  # leaving it out would be far beyond 3 %


def test_printed_form_of_segformer_b0_is_the_8_4_g_of_its_paper():
    pixels = [(512 // stride) ** 2 for stride in (4, 8, 16, 32)]
    to_256 = sum(linear(p, channels, 256) for p, channels in zip(pixels, B0_CHANNELS, strict=True))
    over_all = linear(pixels[0], 4 * 256, 256)  # Eq. 1 over the concatenation at the first map's size
    macs = mit_b0_macs(512) + to_256 + over_all + linear(pixels[0], 256, 150)
    assert printed_flops(SEGFORMER_B0, batch=1, size=(512, 512)) == 2 * macs
    assert macs / 1e9 == pytest.approx(8.4, abs=0.05)  # "GFLOPs" there: multiply-adds


@pytest.mark.parametrize("impl", IMPLS)
def test_segformer_b0_counts_the_same_for_every_implementation(impl):
    with torch.device("meta"):
        model = build_model(SEGFORMER_B0, impl=impl).eval()
    assert model_flops(model, batch=1, size=(512, 512)).total == SEGFORMER_B0_FLOPS


# What runs, counted while it runs.


@pytest.mark.parametrize("impl", IMPLS)
def test_every_implementation_of_attention_counts_its_two_products(impl):
    torch.manual_seed(0)
    queries, keys, values = torch.randn(2, 35, 16), torch.randn(2, 21, 16), torch.randn(2, 21, 16)
    with flop_counter() as counter, torch.no_grad():
        attention(queries, keys, values, scale=0.25, impl=impl)
    assert counter.get_total_flops() == 2 * 2 * attended(35, 21, 16, 16)


@pytest.mark.parametrize("impl", IMPLS)
def test_every_implementation_of_external_attention_counts_its_two_products(impl):
    torch.manual_seed(0)
    scores, class_logits = torch.randn(2, 35, 7), torch.randn(2, 35, 7)
    with flop_counter() as counter, torch.no_grad():
        external_attention(scores, class_logits, scale=0.25, impl=impl)
    assert counter.get_total_flops() == 2 * 2 * attended(35, 35, 7, 7)


@pytest.mark.parametrize("impl", IMPLS)
def test_running_model_counts_as_much_as_its_shapes_do(impl):
    torch.manual_seed(0)
    config = ModelConfig(
        num_classes=7,
        encoder=EncoderConfig(name="mit_nano"),
        fusion=MLPFusionConfig(width=16),
        context=ContextConfig(**BOTH),
    )
    model = build_model(config, impl=impl).eval()
    with flop_counter() as counter, torch.no_grad():
        model(torch.randn(1, 3, 33, 49))
    counted = model_flops(model, batch=1, size=(33, 49))
    assert counter.get_total_flops() == counted.total == sum(counted.parts)


@pytest.mark.parametrize(
    ("encoder", "fusion"),
    [
        ("deit_tiny_patch16_224", UperNetConfig(width=16, neck=True)),
        ("resnet18", FaPNConfig(width=16, pyramid_width=8)),
    ],
)
def test_shapes_of_other_encoders_and_fusions_count_as_much_as_a_run(encoder, fusion):
    torch.manual_seed(0)
    config = ModelConfig(
        num_classes=7,
        encoder=EncoderConfig(name=encoder),
        fusion=fusion,
        context=ContextConfig(reduction=4, **BOTH),
        auxiliary=AuxiliaryConfig(width=8),  # training only: not counted
    )
    model = build_model(config, impl="reference").eval()
    with flop_counter() as counter, torch.no_grad():
        model(torch.randn(1, 3, 65, 97))
    counted = model_flops(model, batch=1, size=(65, 97))
    assert counter.get_total_flops() == counted.total == sum(counted.parts)


@pytest.mark.parametrize(
    ("encoder", "published_gmacs"),
    [
        ("swin_tiny_patch4_window7_224", 4.5),
        ("deit_small_patch16_224", 4.6),
        ("twins_svt_small", 2.9),
        ("resnet50", 4.1),
    ],
)
def test_encoders_at_224_px_take_what_their_papers_say(encoder, published_gmacs):
    config = ModelConfig(
        num_classes=7,
        encoder=EncoderConfig(name=encoder),
        fusion=MLPFusionConfig(width=16),
    )
    counted = model_flops(build_skeleton(config), batch=1, size=(224, 224))
    assert counted.parts.encoder / 2e9 == pytest.approx(published_gmacs, abs=0.06)  # as rounded there


def test_counting_leaves_the_model_as_it_is_and_grows_with_the_batch():
    torch.manual_seed(0)
    config = SEGFORMER_B0.model_copy(update={"encoder": EncoderConfig(name="mit_nano")})
    model, images = build_model(config).eval(), torch.randn(1, 3, 33, 49)
    with torch.no_grad():
        before = model(images).logits_BKhw
        one, three = (model_flops(model, batch=batch, size=(33, 49)).total for batch in (1, 3))
        after = model(images).logits_BKhw
    assert three == 3 * one
    assert torch.equal(before, after)


# SegDeformer's context, by hand: N pixels, C channels, K classes.

N, C, K = 5 * 7, 16, 7
PIXELS_PX = (17, 25)  # maps of 5 x 7


def context_config(**fields) -> ModelConfig:
    return ModelConfig(
        num_classes=K,
        encoder=EncoderConfig(name="mit_nano"),
        fusion=MLPFusionConfig(width=C),
        context=ContextConfig(**(BOTH | fields)),
    )


INTERNAL = 3 * linear(N, C, C) + attended(N, N, C, C)  # Eq. 5
MIDDLE = (
    linear(N, C, C) + 2 * linear(K, C, C) + N * C * K
)  # Eq. 6 up to its softmax: query, key, value, scores


def test_low_rank_context_is_the_hand_count():
    second = (
        2 * linear(K, C, C)  # G Wke and G Wve
        + linear(N, C, C)  # Qe
        + N * C * K  # Q~
        + attended(N, N, K, K)
        + N * K * C  # Z V~
    )
    counted = model_flops(build_skeleton(context_config()), batch=1, size=PIXELS_PX)
    assert counted.parts.context == 2 * (INTERNAL + MIDDLE + second)
    assert counted.parts.head == 2 * linear(N, C, K)


def test_plain_context_is_the_hand_count():
    mixture = N * K * C
    second = 3 * linear(N, C, C) + attended(N, N, C, C)  # Eq. 7
    skeleton = build_skeleton(context_config(), external_form="plain")
    counted = model_flops(skeleton, batch=1, size=PIXELS_PX)
    assert counted.parts.context == 2 * (INTERNAL + MIDDLE + mixture + second)


def test_context_with_reduced_keys_is_the_hand_count():
    keys = 2 * 2  # 5 x 7 in windows of 4 x 4, filled up
    inner = convolution(keys, C, C, 4) + linear(N, C, C) + 2 * linear(keys, C, C) + attended(N, keys, C, C)
    second = N * K * C + inner  # the mixture, then the same again
    counted = model_flops(build_skeleton(context_config(reduction=4)), batch=1, size=PIXELS_PX)
    assert counted.parts.context == 2 * (inner + MIDDLE + second)


@pytest.mark.parametrize("impl", ["auto", "sdpa", "triton"])
def test_folded_context_is_the_hand_count_on_every_implementation(impl):
    torch.manual_seed(0)
    model = build_model(context_config(), impl=impl).fold()
    widths = C + C + K + K + K + K  # Q, K, X Wv W_h, A, Q~, X W_h
    by_hand = linear(N, C, widths) + attended(N, N, C, K) + attended(N, N, K, K) + linear(N, K, K)
    counted = model_flops(model, batch=1, size=PIXELS_PX)
    assert counted.parts.context == 2 * by_hand
    assert counted.parts.head is None
    assert counted.total == counted.parts.encoder + counted.parts.fusion + counted.parts.context

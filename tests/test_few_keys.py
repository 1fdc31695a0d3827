"""Few keys against a loop over blocks in float64, in every form and size."""

import copy
import math

import pytest
import torch
from test_context import randomise, tokens
from test_folding import assert_close, images, model_config

from segdeformer import build_model
from segdeformer.config import ContextConfig, ExternalConfig, InternalConfig
from segdeformer.errors import UsageError
from segdeformer.kernels import attention
from segdeformer.models.context import build_context
from segdeformer.models.few_keys import (
    block_bias,
    block_means,
    key_stride_of,
    key_stride_set,
    set_key_stride,
)

SIZES = [(17, 23), (1, 5), (8, 12), (29, 43)]
BOTH = {"internal": InternalConfig(), "external": ExternalConfig()}
CONTEXTS = {
    "both": ContextConfig(**BOTH),
    "released": ContextConfig(projection="conv_bn_relu", **BOTH),
    "heads, depth 2": ContextConfig(internal=InternalConfig(heads=2, depth=2)),
    "external": ContextConfig(external=ExternalConfig(decouple=False)),
}


def blocks(height, width, stride):
    """The pixels of each block, by number."""
    numbers = torch.arange(height * width).view(height, width)
    return [
        numbers[top : top + stride, left : left + stride].flatten().tolist()
        for top in range(0, height, stride)
        for left in range(0, width, stride)
    ]


def loop_attention(queries_BNC, keys_BNC, values_BNE, scale, members):
    """softmax over blocks, each with its mean key and value, weighted by its pixels."""
    keys = torch.stack([keys_BNC[:, pixels].mean(1) for pixels in members], 1)
    values = torch.stack([values_BNE[:, pixels].mean(1) for pixels in members], 1)
    counts = torch.tensor([float(len(pixels)) for pixels in members], dtype=torch.float64)
    weights = counts * (queries_BNC @ keys.mT * scale).exp()
    return weights @ values / weights.sum(-1, keepdim=True)


def loop_context(context, x, stride):
    """X + Y_int + Y_ext by Eqs. 5 to 7 as they are printed, over blocks."""
    members = blocks(x.height, x.width, stride)
    pixels = mixed = x.pixels_BNC
    for block in context.internal or ():
        a = block.attention
        q, k, v = a.query(mixed), a.key(mixed), a.value(mixed)
        heads = [
            loop_attention(*parts, a.scale, members)
            for parts in zip(*(t.chunk(a.heads, -1) for t in (q, k, v)), strict=True)
        ]
        mixed = mixed + a.output(torch.cat(heads, -1))
    if context.external is None:
        return mixed
    e = context.external
    info, classes = e.tokens.tables()
    middle = (e.middle_query(pixels) @ e.middle_key(classes).T * e.scale).softmax(-1) @ e.middle_value(info)
    return mixed + e.output(loop_attention(e.query(pixels), e.key(middle), e.value(middle), e.scale, members))


def strided_context(name, stride, form="low_rank", impl="sdpa"):
    torch.manual_seed(0)
    context = build_context(CONTEXTS[name], width=16, num_classes=5, external_form=form, impl=impl)
    context = randomise(context).eval()
    set_key_stride(context, stride)
    return context


@torch.no_grad()
@pytest.mark.parametrize("impl", ["sdpa", "reference", "blocks"])
@pytest.mark.parametrize("stride", [2, 3, 4, 8, 100])
@pytest.mark.parametrize(("height", "width"), SIZES)
@pytest.mark.parametrize("name", CONTEXTS)
def test_context_with_few_keys_is_a_loop_over_blocks(name, height, width, stride, impl):
    x = tokens(height, width, 16)
    expected = loop_context(strided_context(name, 1), x, stride)
    for form in ("low_rank", "plain"):
        ours = strided_context(name, stride, form, impl)(x).tokens.pixels_BNC
        torch.testing.assert_close(ours, expected, atol=1e-10, rtol=1e-10)
    assert (strided_context(name, 1)(x).tokens.pixels_BNC - expected).abs().max() > 1e-4 or height == 1


@torch.no_grad()
def test_a_map_of_image_size_is_the_same_loop():
    x = tokens(128, 171, 8, batch=1)
    context = build_context(CONTEXTS["both"], width=8, num_classes=3)
    context = randomise(context).eval()
    for stride in (4, 8):
        set_key_stride(context, stride)
        torch.testing.assert_close(
            context(x).tokens.pixels_BNC, loop_context(context, x, stride), atol=1e-10, rtol=1e-10
        )


@torch.no_grad()
@pytest.mark.parametrize("stride", [1, 2, 4, 8, 100])
@pytest.mark.parametrize("name", ["both", "external"])
def test_folded_and_unfolded_models_agree_at_every_stride(name, stride):
    torch.manual_seed(0)
    model = build_model(model_config(CONTEXTS[name])).double().eval()
    x = images(65, 93, batch=2, dtype=torch.float64)
    set_key_stride(model, stride)
    expected = model(x)
    for folded in (model.fold(), build_model(model_config(CONTEXTS[name])).double().eval()):
        if not folded.is_folded:
            folded.load_state_dict(model.state_dict())
            folded = folded.fold()
            assert key_stride_of(folded) == 1
            set_key_stride(folded, stride)
        assert key_stride_of(folded) == stride
        assert_close(folded(x).logits_BKhw, expected.logits_BKhw, 1e-12)
        assert_close(folded(x).class_logits_BKhw, expected.class_logits_BKhw, 1e-12)


@torch.no_grad()
@pytest.mark.parametrize("fold", [False, True])
def test_stride_one_is_bit_identical_to_no_stride(fold):
    torch.manual_seed(0)
    model = build_model(model_config(CONTEXTS["both"])).eval()
    model = model.fold() if fold else model
    x = images(65, 93)
    plain = model(x).logits_BKhw
    set_key_stride(model, 1)
    assert torch.equal(model(x).logits_BKhw, plain)
    with key_stride_set(model, 4):
        assert key_stride_of(model) == 4
        assert not torch.equal(model(x).logits_BKhw, plain)
    assert key_stride_of(model) == 1
    assert torch.equal(model(x).logits_BKhw, plain)


def test_means_and_bias_of_a_map_by_hand():
    x = tokens(3, 5, 2, batch=1)
    map_CHW = x.as_map()[0]
    means = block_means(x.pixels_BNC, x, 2)[0]
    assert means.shape == (6, 2)
    torch.testing.assert_close(means[0], map_CHW[:, :2, :2].mean((1, 2)))
    torch.testing.assert_close(means[2], map_CHW[:, :2, 4].mean(1))
    torch.testing.assert_close(means[5], map_CHW[:, 2, 4])
    torch.testing.assert_close(
        block_bias(x, 2), torch.tensor([4.0, 4, 2, 2, 2, 1]).double().log() - math.log(4)
    )
    assert block_bias(tokens(4, 6, 2), 2) is None
    assert torch.equal(block_means(x.pixels_BNC, x, 1), x.pixels_BNC)


def mean_form(reduction, **changes):
    context = ContextConfig(reduction=reduction, reduction_by="mean", **{**BOTH, **changes})
    torch.manual_seed(0)
    return randomise(build_context(context, width=8, num_classes=3))


@pytest.mark.parametrize("reduction", [2, 3])
def test_gradients_of_the_mean_form_by_finite_differences(reduction):
    context = mean_form(reduction)
    x = tokens(5, 4, 8, batch=1)
    names = [name for name, p in context.named_parameters() if "key.bias" not in name]  # exactly 0 by design
    parameters = [dict(context.named_parameters())[name] for name in names]

    def outputs(pixels_BNC, *values):
        state = dict(zip(names, values, strict=True))
        out = torch.func.functional_call(context, state, (x._replace(pixels_BNC=pixels_BNC),))
        return out.tokens.pixels_BNC, out.class_logits_BNK

    inputs = [tensor.detach().clone().requires_grad_() for tensor in (x.pixels_BNC, *parameters)]
    assert torch.autograd.gradcheck(outputs, inputs, fast_mode=True)


def test_the_mean_form_has_the_parameters_of_the_full_one_and_each_goes_on_from_the_other():
    full = build_model(model_config(CONTEXTS["both"]))
    reduced = build_model(model_config(ContextConfig(reduction=4, reduction_by="mean", **BOTH)))
    assert reduced.load_state_dict(full.state_dict()) is not None
    assert key_stride_of(reduced) == 4
    x = images(65, 93)
    full, reduced = full.eval(), reduced.eval()
    with torch.no_grad():
        set_key_stride(full, 4)
        assert torch.equal(full(x).logits_BKhw, reduced(x).logits_BKhw)
        set_key_stride(full, None)  # as it was trained
        set_key_stride(reduced, 1)
        assert torch.equal(full(x).logits_BKhw, reduced(x).logits_BKhw)
        set_key_stride(reduced, None)
    assert key_stride_of(reduced) == 4
    assert key_stride_of(reduced.fold()) == 4


def test_models_without_keys_to_average_are_refused_in_one_line():
    for context, told in [
        (None, "no attention over its pixels"),
        (ContextConfig(external=ExternalConfig(second_stage=False)), "no attention over its pixels"),
        (ContextConfig(reduction=4, **BOTH), r"few already, by its R x R convolutions"),
    ]:
        model = build_model(model_config(context)).eval()
        with pytest.raises(UsageError, match=told):
            set_key_stride(model, 4)
        set_key_stride(model, 1)
        set_key_stride(model, None)
    with pytest.raises(UsageError, match="the key stride is 0"):
        set_key_stride(build_model(model_config(CONTEXTS["both"])), 0)


@pytest.mark.parametrize("impl", ["sdpa", "reference", "blocks"])
def test_a_bias_adds_to_the_scores_of_each_key(impl):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, n, 8, generator=generator, dtype=torch.float64) for n in (70, 1100, 1100))
    bias = torch.randn(1100, generator=generator, dtype=torch.float64)
    weights = (q @ k.mT * 0.3 + bias).softmax(-1)
    with torch.no_grad():
        ours = attention(q, k, v, scale=0.3, bias_M=bias, impl=impl)
    torch.testing.assert_close(ours, weights @ v, atol=1e-12, rtol=1e-12)
    with pytest.raises(ValueError, match=r"the bias has shape \(7,\); expected \(1100,\), one a key"):
        attention(q, k, v, scale=0.3, bias_M=bias[:7], impl=impl)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_no_worse_than_with_all_keys(dtype):
    torch.manual_seed(0)
    model = build_model(model_config(CONTEXTS["both"])).to(dtype).eval()
    x = images(65, 93).to(dtype)
    errors = {}
    for stride in (1, 4):
        set_key_stride(model, stride)
        exact = copy.deepcopy(model).double()(x.double()).logits_BKhw
        for name, one in (("unfolded", model), ("folded", model.fold())):
            errors[name, stride] = (one(x).logits_BKhw.double() - exact).abs().max()
    for name in ("unfolded", "folded"):
        assert errors[name, 4] <= 2 * errors[name, 1]


@torch.no_grad()
@pytest.mark.parametrize("stride", [2, 4])
@pytest.mark.parametrize("name", ["both", "released"])
def test_kernels_with_few_keys_are_the_same_loop(name, stride):
    x = tokens(9, 14, 16)
    expected = loop_context(strided_context(name, 1), x, stride)
    context = strided_context(name, stride, impl="triton").float()
    ours = context(x._replace(pixels_BNC=x.pixels_BNC.float())).tokens.pixels_BNC
    eager = strided_context(name, stride, impl="reference").float()
    theirs = eager(x._replace(pixels_BNC=x.pixels_BNC.float())).tokens.pixels_BNC
    error, allowed = ((y.double() - expected).abs().max() for y in (ours, theirs))
    assert error <= 2 * allowed + 1e-6 * expected.abs().max()

"""The context module against its equations in float64, in every variant."""

import math

import pytest
import torch
from torch import nn

from segdeformer.config import ContextConfig, ExternalConfig, InternalConfig
from segdeformer.models.context import ClassTokens, ExternalAttention, build_context
from segdeformer.models.layers import Tokens


def tokens(height, width, channels, *, batch=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randn(batch, height * width, channels, generator=generator, dtype=torch.float64)
    return Tokens(pixels, height, width)


def randomise(module, seed=1):
    """Every parameter and statistic random, biases too: nothing may hide behind a zero or a one."""
    generator = torch.Generator().manual_seed(seed)
    for tensor in [*module.parameters(), *module.buffers()]:
        if tensor.is_floating_point():
            tensor.data = torch.randn(tensor.shape, generator=generator, dtype=torch.float64) * 0.5
    for child in module.modules():
        if isinstance(child, nn.BatchNorm2d):
            child.running_var.abs_().add_(0.5)
    return module.double()


def softmax_attention(q, k, v, scale):
    scores = q @ k.transpose(-1, -2) * scale
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    return weights @ v / weights.sum(-1, keepdim=True)


def affine(x, linear):
    return x @ linear.weight.T + linear.bias


def external(channels, num_classes, form, *, decouple=True, impl="sdpa"):
    module = ExternalAttention(
        channels,
        ClassTokens(num_classes, channels, decouple=decouple),
        second_stage=True,
        projection="affine",
        reduction=1,
        form=form,
        impl=impl,
    )
    return randomise(module)


@pytest.mark.parametrize("channels", [32, 64])
@pytest.mark.parametrize("num_classes", [5, 19, 150])
@pytest.mark.parametrize("decouple", [True, False])
@pytest.mark.parametrize("impl", ["sdpa", "reference"])
def test_low_rank_external_attention_equals_the_plain_one_with_every_gradient(
    channels, num_classes, decouple, impl
):
    outputs, gradients = {}, {}
    for form in ("low_rank", "plain"):
        module = external(channels, num_classes, form, decouple=decouple, impl=impl)
        x = tokens(7, 11, channels)
        x.pixels_BNC.requires_grad_()
        y = module(x)
        g = torch.Generator().manual_seed(9)
        upstream = [torch.randn(t.shape, generator=g, dtype=torch.float64) for t in y]
        sum((t * u).sum() for t, u in zip(y, upstream, strict=True)).backward()
        outputs[form] = y
        gradients[form] = {n: p.grad for n, p in module.named_parameters()} | {"x": x.pixels_BNC.grad}
    for ours, plain in zip(outputs["low_rank"], outputs["plain"], strict=True):
        torch.testing.assert_close(ours, plain, atol=1e-12, rtol=1e-12)
    for name, plain in gradients["plain"].items():
        ours = gradients["low_rank"][name]
        assert ours is not None, name
        scale = max(1.0, plain.abs().max().item())
        assert (ours - plain).abs().max() <= 1e-12 * scale, name


def test_external_attention_is_equations_6_and_7():
    module = external(32, 5, "low_rank")
    x = tokens(3, 5, 32)
    info, classes = module.tokens.tables()
    middle = affine(x.pixels_BNC, module.middle_query) @ affine(classes, module.middle_key).T / math.sqrt(32)
    mixtures = middle.softmax(-1) @ affine(info, module.middle_value)
    expected = softmax_attention(
        affine(x.pixels_BNC, module.query),
        affine(mixtures, module.key),
        affine(mixtures, module.value),
        32**-0.5,
    )
    y = module(x)
    torch.testing.assert_close(y.class_logits_BNK, middle, atol=1e-12, rtol=0)
    torch.testing.assert_close(y.context_BNC, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("heads", [1, 2, 4])
@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("mlp", [False, True])
def test_internal_attention_is_equation_5_per_head_residual_and_stacked(heads, depth, mlp):
    config = ContextConfig(internal=InternalConfig(heads=heads, depth=depth, mlp=mlp))
    context = randomise(build_context(config, width=16, num_classes=3))
    x = tokens(5, 3, 16)
    expected = x.pixels_BNC
    for block in context.internal:
        q, k, v = (
            affine(expected, p) for p in (block.attention.query, block.attention.key, block.attention.value)
        )
        per_head = [
            softmax_attention(a, b, c, (16 // heads) ** -0.5)
            for a, b, c in zip(*(t.chunk(heads, -1) for t in (q, k, v)), strict=True)
        ]
        expected = expected + torch.cat(per_head, -1)
        if mlp:
            norm, up, _, down = block.mlp
            centred = expected - expected.mean(-1, keepdim=True)
            normed = (
                centred / (centred.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight
                + norm.bias
            )
            hidden = affine(normed, up)
            gelu = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
            expected = expected + affine(gelu, down)
    output = context(x)
    torch.testing.assert_close(output.tokens.pixels_BNC, expected, atol=1e-10, rtol=1e-10)
    assert output.class_logits_BNK is None


def released_block(x, block):
    """1x1 convolution without bias, BatchNorm in eval mode, ReLU, on tokens."""
    conv, norm, _ = block.block
    y = x @ conv.weight[:, :, 0, 0].T
    return ((y - norm.running_mean) / (norm.running_var + norm.eps).sqrt() * norm.weight + norm.bias).relu()


def test_released_style_projects_query_key_value_and_output_and_takes_info_tokens_unprojected():
    config = ContextConfig(projection="conv_bn_relu", internal=InternalConfig(), external=ExternalConfig())
    context = randomise(build_context(config, width=16, num_classes=4)).eval()
    x = tokens(5, 3, 16)
    p = x.pixels_BNC
    inner = context.internal[0].attention
    mixed = softmax_attention(
        *(released_block(p, m) for m in (inner.query, inner.key, inner.value)), 16**-0.5
    )
    expected = p + released_block(mixed, inner.output)
    outer = context.external
    info, classes = outer.tokens.tables()
    middle = affine(p, outer.middle_query) @ affine(classes, outer.middle_key).T / 4
    mixtures = middle.softmax(-1) @ info
    mixed = softmax_attention(
        released_block(p, outer.query),
        released_block(mixtures, outer.key),
        released_block(mixtures, outer.value),
        16**-0.5,
    )
    expected = expected + released_block(mixed, outer.output)
    output = context(x)
    torch.testing.assert_close(output.tokens.pixels_BNC, expected, atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(output.class_logits_BNK, middle, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize(("height", "width"), [(8, 8), (5, 9), (1, 1), (4, 7)])
@pytest.mark.parametrize("projection", ["affine", "conv_bn_relu"])
def test_reduction_pads_with_zeros_and_shrinks_keys_by_an_r_by_r_convolution(height, width, projection):
    config = ContextConfig(
        projection=projection, reduction=4, internal=InternalConfig(), external=ExternalConfig()
    )
    context = randomise(build_context(config, width=8, num_classes=3)).eval()
    project = affine if projection == "affine" else released_block
    x = tokens(height, width, 8)

    def reduced(pixels, conv):
        rows, columns = -(-height // 4), -(-width // 4)
        padded = torch.zeros(2, rows * 4, columns * 4, 8, dtype=torch.float64)
        padded[:, :height, :width] = pixels.view(2, height, width, 8)
        patches = (
            padded.view(2, rows, 4, columns, 4, 8).permute(0, 1, 3, 5, 2, 4).reshape(2, rows * columns, -1)
        )
        return patches @ conv.weight.flatten(1).T + conv.bias

    inner, outer, p = context.internal[0].attention, context.external, x.pixels_BNC
    keys = reduced(p, inner.reduce.conv)
    y_int = softmax_attention(
        project(p, inner.query), project(keys, inner.key), project(keys, inner.value), 8**-0.5
    )
    info, classes = outer.tokens.tables()
    middle = affine(p, outer.middle_query) @ affine(classes, outer.middle_key).T / math.sqrt(8)
    prototypes = affine(info, outer.middle_value) if projection == "affine" else info
    keys = reduced(middle.softmax(-1) @ prototypes, outer.reduce.conv)
    y_ext = softmax_attention(
        project(p, outer.query), project(keys, outer.key), project(keys, outer.value), 8**-0.5
    )
    if projection == "conv_bn_relu":
        y_int, y_ext = released_block(y_int, inner.output), released_block(y_ext, outer.output)
    output = context(x)
    torch.testing.assert_close(output.tokens.pixels_BNC, p + y_int + y_ext, atol=1e-10, rtol=1e-10)


def test_table_5_switches():
    x = tokens(3, 5, 16)
    without_loss = randomise(
        build_context(ContextConfig(external=ExternalConfig(attention_loss=False)), width=16, num_classes=4)
    )
    assert without_loss(x).class_logits_BNK is None
    one_stage = randomise(
        build_context(ContextConfig(external=ExternalConfig(second_stage=False)), width=16, num_classes=4)
    )
    outer = one_stage.external
    info, classes = outer.tokens.tables()
    middle = affine(x.pixels_BNC, outer.middle_query) @ affine(classes, outer.middle_key).T / 4
    expected = x.pixels_BNC + middle.softmax(-1) @ affine(info, outer.middle_value)
    torch.testing.assert_close(one_stage(x).tokens.pixels_BNC, expected, atol=1e-11, rtol=0)
    shared = ClassTokens(4, 16, decouple=False)
    assert [p.shape for p in shared.parameters()] == [(4, 16)]
    assert shared.tables()[0] is shared.tables()[1]


def test_middle_logits_stay_float32_in_half_precision():
    module = external(32, 5, "low_rank").to(torch.bfloat16)
    y = module(tokens(3, 3, 32)._replace(pixels_BNC=torch.randn(1, 9, 32, dtype=torch.bfloat16)))
    assert y.class_logits_BNK.dtype == torch.float32
    assert y.context_BNC.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("changes", "projections", "tables"),
    [
        ({}, 1 / 16, 1.0),  # 256 channels
        ({"start": "unit"}, 1 / 16, 1.0),
        ({"start": "small"}, 0.02, 0.02),
        ({"projection": "conv_bn_relu"}, 0.02, 0.02),  # its convolutions aside
        ({"projection": "conv_bn_relu", "start": "unit"}, 1 / 16, 1.0),
    ],
)
@pytest.mark.parametrize("tokens", ["learned", "momentum"])
def test_linears_and_tokens_start_with_the_deviation_that_the_recipe_names_and_zero_biases(
    changes, projections, tables, tokens
):
    torch.manual_seed(0)
    outer = ExternalConfig(tokens=tokens, decouple=tokens == "learned")
    config = ContextConfig(internal=InternalConfig(mlp=True), external=outer, **changes)
    context = build_context(config, width=256, num_classes=150)
    linears = {name: m for name, m in context.named_modules() if isinstance(m, nn.Linear)}
    assert len(linears) == (11 if config.projection == "affine" else 4)
    for name, linear in linears.items():
        expected = 0.02 if "mlp" in name else projections  # which follows a LayerNorm
        assert linear.weight.std().item() == pytest.approx(expected, rel=0.03), name
        assert linear.bias.abs().max() == 0, name
    for table in context.external.tokens.tables():
        assert table.std().item() == pytest.approx(tables, rel=0.03)


def test_a_unit_start_lets_every_softmax_choose_where_a_small_one_averages():
    deviations = {}
    for start in ("unit", "small"):
        torch.manual_seed(0)
        config = ContextConfig(start=start, internal=InternalConfig(), external=ExternalConfig())
        context = build_context(config, width=128, num_classes=19).double()
        # as a fusion's ReLU leaves them: half of the normal distribution
        x = tokens(9, 13, 128)
        x = x._replace(pixels_BNC=x.pixels_BNC.relu())
        pixels_BNC = x.pixels_BNC
        inner = context.internal[0].attention
        scores_BNN = inner.query(pixels_BNC) @ inner.key(pixels_BNC).mT * inner.scale
        class_logits_BNK = context.external(x).class_logits_BNK
        deviations[start] = [t.std(-1).mean().item() for t in (scores_BNN, class_logits_BNK)]
    assert min(deviations["unit"]) > 0.3
    assert max(deviations["small"]) < 0.05

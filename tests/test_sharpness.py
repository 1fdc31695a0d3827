"""How sharp attention is, against a loop in float64; and what sharp attention must not break."""

import copy
import math

import pytest
import torch
from test_context import randomise
from test_folding import assert_close, images, model_config

from segdeformer import build_model
from segdeformer.config import ContextConfig, ExternalConfig, InternalConfig
from segdeformer.measure.sharpness import attention_sharpness
from segdeformer.models.context import build_context
from segdeformer.models.layers import Tokens, keys_of, tokens_of

CONTEXTS = {
    "both": ContextConfig(internal=InternalConfig(), external=ExternalConfig()),
    "heads, reduced": ContextConfig(reduction=2, internal=InternalConfig(heads=2), external=ExternalConfig()),
    "depth 2, one stage": ContextConfig(
        internal=InternalConfig(depth=2), external=ExternalConfig(second_stage=False)
    ),
    "released": ContextConfig(
        projection="conv_bn_relu", internal=InternalConfig(), external=ExternalConfig()
    ),
    "momentum": ContextConfig(external=ExternalConfig(tokens="momentum", decouple=False)),
}
SOFTMAXES = {
    "both": ["internal.0", "middle", "external"],
    "heads, reduced": ["internal.0", "middle", "external"],
    "depth 2, one stage": ["internal.0", "internal.1", "middle"],
    "released": ["internal.0", "middle", "external"],
    "momentum": ["middle", "external"],
}


def sharp_model(context, *, deviation, **changes):
    """A random model whose every softmax has scores of this standard deviation on `images()`."""
    torch.manual_seed(0)
    model = build_model(model_config(CONTEXTS[context], num_classes=7, **changes)).double().eval()
    inner, outer = model.decoder.context.internal or (), model.decoder.context.external
    queries = [(f"internal.{i}", block.attention.query) for i, block in enumerate(inner)]
    queries += [("middle", outer.middle_query), ("external", getattr(outer, "query", None))]
    for name, query in queries:  # in this order: the middle's sharpness decides the external keys
        found = {s.name: s.score_deviation for s in attention_sharpness(model, images(dtype=torch.float64))}
        if name in found:
            with torch.no_grad():
                for parameter in query.parameters():
                    parameter.mul_(deviation / found[name])
    return model


def loop_over_queries(queries_ND, keys_MD, scale):
    """Mean standard deviation and exp of the mean entropy, a query and a key at a time."""
    deviations, entropies = [], []
    for query_D in queries_ND.tolist():
        scores = [
            scale * sum(a * b for a, b in zip(query_D, key_D, strict=True)) for key_D in keys_MD.tolist()
        ]
        mean = sum(scores) / len(scores)
        deviations.append(math.sqrt(sum((s - mean) ** 2 for s in scores) / len(scores)))
        largest = max(scores)
        weights = [math.exp(s - largest) for s in scores]
        weights = [w / sum(weights) for w in weights]
        entropies.append(-sum(w * math.log(w) for w in weights if w))
    return sum(deviations) / len(deviations), math.exp(sum(entropies) / len(entropies))


@torch.no_grad()
@pytest.mark.parametrize("context", ["both", "released"])
def test_sharpness_is_what_a_loop_over_queries_finds(context):
    torch.manual_seed(0)
    model = build_model(model_config(CONTEXTS[context], num_classes=7, width=16))
    randomise(model.decoder.context)
    model.double().eval()
    x = images(45, 61, dtype=torch.float64)
    found = {s.name: s for s in attention_sharpness(model, x)}
    tokens = model.decoder.fusion(model.encoder(x))
    inner, outer = model.decoder.context.internal[0].attention, model.decoder.context.external
    pixels_BNC = tokens.pixels_BNC
    mixtures_BNC = outer(tokens).class_logits_BNK.softmax(-1) @ outer.middle_value(outer.tokens.tables()[0])
    class_keys_KC = outer.middle_key(outer.tokens.tables()[1])
    pairs = {
        "internal.0": (inner.query(pixels_BNC)[0], inner.key(pixels_BNC)[0]),
        "middle": (outer.middle_query(pixels_BNC)[0], class_keys_KC),
        "external": (outer.query(pixels_BNC)[0], outer.key(mixtures_BNC)[0]),
    }
    assert list(found) == list(pairs)
    for name, (queries_NC, keys_MC) in pairs.items():
        expected = loop_over_queries(queries_NC, keys_MC, 16**-0.5)
        assert expected[0] > 0.05, "a test of nothing"
        assert found[name][1:3] == pytest.approx(expected, rel=1e-5), name
        assert found[name].num_keys == len(keys_MC)


@pytest.mark.parametrize("context", CONTEXTS)
def test_every_softmax_is_named_and_the_model_left_as_it_was(context):
    torch.manual_seed(0)
    model = build_model(model_config(CONTEXTS[context]))
    before = copy.deepcopy(model.state_dict())
    model.train()
    found = attention_sharpness(model, images(batch=2))
    assert [s.name for s in found] == SOFTMAXES[context]
    assert all(1 <= s.effective_keys <= s.num_keys * 1.001 for s in found)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    again = attention_sharpness(model, images(batch=2))
    assert again == found  # the hooks are gone: nothing is found twice


def test_a_uniform_and_a_certain_attention_have_all_keys_and_one_and_no_context_has_none():
    model = build_model(model_config(CONTEXTS["both"])).eval()
    attention = model.decoder.context.internal[0].attention
    torch.nn.init.zeros_(attention.query.weight)
    uniform = attention_sharpness(model, images())[0]
    assert uniform.score_deviation == 0
    assert uniform.effective_keys == pytest.approx(uniform.num_keys, rel=1e-5)
    torch.nn.init.normal_(attention.query.weight, std=1e4)
    assert attention_sharpness(model, images())[0].effective_keys == pytest.approx(1.0, abs=0.1)
    assert attention_sharpness(build_model(model_config(None)), images()) == []


# What was exact with flat attention is so with sharp attention.


@torch.no_grad()
@pytest.mark.parametrize("deviation", [5, 10])
@pytest.mark.parametrize("context", ["both", "heads, reduced", "momentum"])
def test_folded_equals_unfolded_where_attention_is_sharp(context, deviation):
    model = sharp_model(context, deviation=deviation)
    x = images(dtype=torch.float64)
    for found in attention_sharpness(model, x):
        assert found.score_deviation == pytest.approx(deviation, rel=0.01), found
    exact = model(x).logits_BKhw
    assert_close(model.fold()(x).logits_BKhw, exact, 1e-12)
    single = copy.deepcopy(model).float()
    for ours in (single, single.fold()):
        assert (ours(x.float()).logits_BKhw.double() - exact).abs().max() <= 1e-4 * exact.abs().max()


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("deviation", [5, 10])
def test_half_precision_stays_finite_and_folding_costs_no_digits(dtype, deviation):
    model = sharp_model("both", deviation=deviation).to(dtype)
    x = images().to(dtype)
    exact = copy.deepcopy(model).double()(x.double()).logits_BKhw
    unfolded, folded = (m(x).logits_BKhw for m in (model, model.fold()))
    assert folded.isfinite().all()
    error, allowed = ((y.double() - exact).abs().max() for y in (folded, unfolded))
    assert error <= 2 * allowed
    with torch.autocast("cpu", dtype):
        assert model.float()(x.float()).logits_BKhw.isfinite().all()


def sharp_context(form, *, deviation, num_classes=19):
    """A context of 32 channels, sharp on its own tokens."""
    torch.manual_seed(0)
    context = build_context(CONTEXTS["both"], width=32, num_classes=num_classes, external_form=form).double()
    generator = torch.Generator().manual_seed(3)
    tokens = tokens_of(torch.randn(1, 32, 9, 13, generator=generator, dtype=torch.float64))
    inner, outer = context.internal[0].attention, context.external
    with torch.no_grad():
        x = tokens.pixels_BNC
        scores_BNN = inner.query(x) @ keys_of(inner.key, x).mT * inner.scale
        inner.query.weight.mul_(deviation / scores_BNN.std(-1).mean())
        outer.middle_query.weight.mul_(deviation / outer(tokens).class_logits_BNK.std(-1).mean())
        mixtures_BNC = outer(tokens).class_logits_BNK.softmax(-1) @ outer.middle_value(outer.tokens.info_KC)
        external_BNN = outer.query(x) @ outer.key(mixtures_BNC).mT * outer.scale
        outer.query.weight.mul_(deviation / external_BNN.std(-1).mean())
    return context, tokens


def outputs_and_gradients(context, tokens: Tokens, dtype=torch.float64):
    """Everything that comes out, and the gradient of every parameter and of X."""
    context = copy.deepcopy(context).to(dtype)
    pixels_BNC = tokens.pixels_BNC.to(dtype).clone().requires_grad_()
    out = context(tokens._replace(pixels_BNC=pixels_BNC))
    generator = torch.Generator().manual_seed(9)
    values = [out.tokens.pixels_BNC, out.class_logits_BNK]
    upstream = [torch.randn(v.shape, generator=generator, dtype=torch.float64) for v in values]
    sum((v * u.to(v.dtype)).sum() for v, u in zip(values, upstream, strict=True)).backward()
    gradients = {name: p.grad for name, p in context.named_parameters()} | {"X": pixels_BNC.grad}
    return {"context": values[0].detach(), "class_logits": values[1].detach()} | gradients


@pytest.mark.parametrize("deviation", [5, 10])
def test_low_rank_equals_plain_with_every_gradient_where_attention_is_sharp(deviation):
    low_rank, tokens = sharp_context("low_rank", deviation=deviation)
    plain, _ = sharp_context("plain", deviation=deviation)
    expected = outputs_and_gradients(plain, tokens)
    for name, ours in outputs_and_gradients(low_rank, tokens).items():
        assert (ours - expected[name]).abs().max() <= 1e-11 * max(1.0, expected[name].abs().max()), name


@pytest.mark.parametrize("deviation", [5, 10])
@pytest.mark.parametrize("num_classes", [2, 19, 45])  # up to 32 classes have a kernel without running maximum
def test_kernels_are_right_where_attention_is_sharp(deviation, num_classes):
    context, tokens = sharp_context("low_rank", deviation=deviation, num_classes=num_classes)
    modules = context.internal[0].attention, context.external
    results = {}
    for impl, dtype in (
        ("reference", torch.float64),
        ("reference", torch.float32),
        ("triton", torch.float32),
    ):
        for module in modules:
            module.impl = impl
        results[impl, dtype] = outputs_and_gradients(context, tokens, dtype)
    exact, eager, kernels = results.values()
    for name, expected in exact.items():
        error, allowed = ((g[name].double() - expected).abs().max() for g in (kernels, eager))
        assert error <= 2 * allowed + 4e-6 * expected.abs().max(), name

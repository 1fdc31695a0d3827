"""Every fusion in whole models: counts, compiling, exporting and half precision."""

import pytest
import torch

from segdeformer.config import (
    FaPNConfig,
    FPNConfig,
    MLPFusionConfig,
    UperNetConfig,
    load_recipe,
)
from segdeformer.models.batch_norms import fused_fusion
from segdeformer.models.encoders import build_encoder
from segdeformer.models.fusion import build_fusion
from segdeformer.models.segmenter import build_decoder

FUSIONS = {
    "mlp": MLPFusionConfig(width=16),
    "mlp, linear, deep": MLPFusionConfig(width=16, depth=4, projection="linear"),
    "upernet": UperNetConfig(width=16),
    "fpn": FPNConfig(width=16, pyramid_width=8),
    "fapn": FaPNConfig(width=16, pyramid_width=8),
}


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("ade20k-upernet-deit-s", 52.094),
        ("ade20k-upernet-deit-b", 120.575),
        ("ade20k-upernet-swin-s", 81.260),
        ("ade20k-upernet-swin-l", 233.963),  # with windows of 7: 233.760
        ("ade20k-upernet-twins-l", 132.783),
        ("ade20k-segdeformer-deit-s-upernet", 54.611),
        ("ade20k-segdeformer-deit-b-upernet", 123.092),
        ("ade20k-segdeformer-swin-s-upernet", 83.777),
        ("ade20k-segdeformer-swin-l-upernet", 236.480),
        ("ade20k-segdeformer-swin-s-upernet-efficient", 92.167),
        ("ade20k-segformer-b2-depth8", 25.158),
        ("ade20k-segformer-b2-depth8-width512", 27.430),
    ],
)
def test_parameter_counts_are_the_measured_ones_and_near_the_papers(name, millions, encoder_facts):
    recipe = load_recipe(name)
    count, channels, strides = encoder_facts(recipe.model.encoder)
    with torch.device("meta"):
        decoder = build_decoder(recipe.model, channels, strides=strides)
    count += sum(p.numel() for p in decoder.parameters())
    if recipe.model.auxiliary is not None:  # 3x3 block, classifier
        count += 9 * channels[2] * 256 + 2 * 256 + 150 * 257
    assert round(count / 1e6, 3) == millions
    paper = recipe.reported.params_millions
    if paper is not None:  # Table 8's counts fit no layers of that number and width
        allowed = 0.012 if "depth8" in name else 0.005
        assert millions == pytest.approx(paper, rel=allowed)


@pytest.fixture(scope="module")
def encoder_facts():
    """Parameters, channels and strides of an encoder, each encoder built once."""
    facts = {}

    def of(config):
        if config.name not in facts:
            encoder = build_encoder(config.model_copy(update={"weights": "none"}))
            count = sum(p.numel() for p in encoder.parameters())
            facts[config.name] = count, encoder.channels, encoder.strides
        return facts[config.name]

    return of


CHANNELS = (3, 4, 5, 6)


def maps_of(sizes):
    return [torch.randn(2, c, *size, requires_grad=True) for c, size in zip(CHANNELS, sizes, strict=True)]


@pytest.mark.parametrize("name", FUSIONS)
def test_fusion_compiles_as_one_graph_for_any_size_and_can_be_exported(name):
    torch._dynamo.reset()
    torch.manual_seed(0)
    fusion = fused_fusion(build_fusion(FUSIONS[name], CHANNELS))
    compiled = torch.compile(fusion, fullgraph=True, backend="eager", dynamic=True)
    with torch.no_grad():
        for sizes in ([(17, 25), (9, 13), (5, 7), (3, 4)], [(24, 16), (12, 8), (6, 4), (3, 2)]):
            maps = maps_of(sizes)
            torch.testing.assert_close(compiled(maps).pixels_BNC, fusion(maps).pixels_BNC)
        exported = torch.export.export(fusion, (maps,)).module()
        torch.testing.assert_close(exported(maps).pixels_BNC, fusion(maps).pixels_BNC)


def test_gradients_of_compiled_mlp_fusion_are_those_of_the_eager_one():
    torch._dynamo.reset()
    torch.manual_seed(0)
    fusion, maps = build_fusion(FUSIONS["mlp"], CHANNELS), maps_of([(17, 25), (9, 13), (5, 7), (3, 4)])
    compiled = torch.compile(fusion, fullgraph=True, backend="aot_eager")
    inputs = [*maps, *fusion.parameters()]
    ours, expected = (
        torch.autograd.grad(form(maps).pixels_BNC.square().sum(), inputs) for form in (compiled, fusion)
    )
    for mine, plain in zip(ours, expected, strict=True):
        torch.testing.assert_close(mine, plain, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("name", FUSIONS)
def test_bfloat16_and_autocast_give_nearly_the_float32_tokens(name):
    torch.manual_seed(0)
    # In training BatchNorm divides by the spread of the two averages of UperNet's 1x1 pool, however small.
    fusion, maps = build_fusion(FUSIONS[name], CHANNELS).eval(), maps_of([(17, 25), (9, 13), (5, 7), (3, 4)])
    expected = fusion(maps).pixels_BNC
    with torch.autocast("cpu", torch.bfloat16):
        mixed = fusion(maps).pixels_BNC
    mixed.float().square().sum().backward()
    assert all(p.grad.isfinite().all() for p in fusion.parameters())
    halves = fusion.bfloat16()([x.bfloat16() for x in maps]).pixels_BNC
    for ours in (mixed, halves):
        assert (ours.float() - expected).abs().mean() <= 0.02 * expected.abs().mean()

"""Whole models: published parameter counts, fusion values, and the equality of SegFormer's head."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from segdeformer import build_decoder, build_model
from segdeformer.config import EncoderConfig, HeadConfig, MLPFusionConfig, ModelConfig, load_recipe
from segdeformer.models.fusion import build_fusion


def millions(recipe_name, **context):
    """Parameters of a recipe's whole model, the auxiliary head included."""
    config = load_recipe(recipe_name).model
    config = config.model_copy(update={"encoder": config.encoder.model_copy(update={"weights": "none"})})
    if context:
        config = config.model_copy(update={"context": config.context.model_copy(update=context)})
    # Not every timm version builds on the meta device.
    with torch.device("meta" if config.encoder.name.startswith("mit") else "cpu"):
        model = build_model(config)
    return sum(p.numel() for p in model.parameters()) / 1e6


@pytest.mark.parametrize(
    ("recipe", "measured"),
    [
        ("ade20k-segformer-b1", 13.717),
        ("ade20k-segformer-b2", 24.762),
        ("ade20k-segformer-b5", 82.008),
        ("ade20k-segdeformer-b1-released", 14.454),
        ("ade20k-segdeformer-b2-released", 25.498),
        ("ade20k-segdeformer-b5-released", 82.745),
    ],
)
def test_counts_equal_the_measured_ones_to_three_decimals(recipe, measured):
    assert round(millions(recipe), 3) == measured


@pytest.mark.parametrize(
    ("recipe", "paper"),
    [
        ("ade20k-segdeformer-b1", 14.35),
        ("ade20k-segdeformer-b2", 25.40),
        ("ade20k-segdeformer-b5", 82.65),
        ("ade20k-segdeformer-b2-efficient", 27.59),
        ("ade20k-segdeformer-deit-s", 27.21),
        ("ade20k-segdeformer-swin-s", 54.02),
    ],
)
def test_counts_of_the_equations_are_within_half_a_percent_of_the_papers(recipe, paper):
    assert millions(recipe) == pytest.approx(paper, rel=0.005)


def test_the_released_head_adds_736768_parameters():
    difference = millions("ade20k-segdeformer-b1-released") - millions("ade20k-segformer-b1")
    assert round(difference * 1e6) == 736_768


def bilinear(x, size):
    return F.interpolate(x, size, mode="bilinear", align_corners=False)


def block(x, layer):
    """1x1 convolution without bias, BatchNorm in eval mode, ReLU; channels first."""
    conv, norm, _ = layer
    y = torch.einsum("oc,bchw->bohw", conv.weight[:, :, 0, 0], x)
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    y = (y - norm.running_mean[:, None, None]) * scale[:, None, None] + norm.bias[:, None, None]
    return y.relu()


@pytest.mark.parametrize("projection", ["conv_bn_relu", "linear"])
@pytest.mark.parametrize("sizes", [[(16, 24), (8, 12), (4, 6), (2, 3)], [(17, 25), (9, 13), (5, 7), (3, 4)]])
def test_mlp_fusion_is_equation_1_in_its_published_order(projection, sizes):
    channels = (3, 4, 5, 6)
    torch.manual_seed(0)
    fusion = build_fusion(MLPFusionConfig(width=8, projection=projection), channels).double().eval()
    for tensor in [*fusion.parameters(), *fusion.buffers()]:
        if tensor.is_floating_point():
            tensor.data.uniform_(0.5, 1.5)
    maps = [torch.randn(2, c, *size, dtype=torch.float64) for c, size in zip(channels, sizes, strict=True)]
    parts = []
    for layer, x in zip(fusion.project, maps, strict=True):
        if projection == "linear":
            weight, bias = layer.weight[:, :, 0, 0], layer.bias
            y = torch.einsum("oc,bchw->bohw", weight, x) + bias[:, None, None]
        else:
            y = block(x, layer)
        parts.append(bilinear(y, sizes[0]))
    if projection == "linear":
        parts.reverse()  # NVlabs and Hugging Face concatenate the deepest map first
    expected = block(torch.cat(parts, 1), fusion.fuse)
    tokens = fusion(maps)
    assert (tokens.height, tokens.width) == sizes[0]
    torch.testing.assert_close(tokens.as_map(), expected, atol=1e-12, rtol=1e-12)


def test_without_context_the_decoder_is_fusion_and_classifier():
    config = ModelConfig(
        num_classes=7,
        encoder=EncoderConfig(name="mit_nano"),
        fusion=MLPFusionConfig(width=16),
        head=HeadConfig(dropout=0.1),
    )
    decoder = build_decoder(config, (3, 4, 5, 6)).eval()
    maps = [torch.randn(1, c, 8 // s, 8 // s) for c, s in zip((3, 4, 5, 6), (1, 2, 4, 8), strict=True)]
    output = decoder(maps)
    weight, bias = decoder.head.classify.weight[:, :, 0, 0], decoder.head.classify.bias
    expected = torch.einsum("kc,bchw->bkhw", weight, decoder.fusion(maps).as_map()) + bias[:, None, None]
    torch.testing.assert_close(output.logits_BKhw, expected)
    assert output.class_logits_BKhw is None
    assert output.auxiliary_logits_BKhw is None


@pytest.mark.parametrize("size", [(64, 64), (65, 97)])
def test_textbook_and_default_implementation_agree_in_a_whole_model(size):
    config = load_recipe("synthetic").model
    torch.manual_seed(0)
    ours = build_model(config)
    textbook = build_model(config, impl="reference", external_form="plain")
    textbook.load_state_dict(ours.state_dict())
    ours, textbook = ours.double(), textbook.double()
    images = torch.randn(2, 3, *size, dtype=torch.float64)
    for model in (ours, textbook):
        torch.manual_seed(1)  # the same dropout
        output = model(images)
        (output.logits_BKhw.square().mean() + output.class_logits_BKhw.square().mean()).backward()
    for (name, a), (_, b) in zip(ours.named_parameters(), textbook.named_parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-11, rtol=1e-7, msg=lambda m, n=name: f"{n}: {m}")
    ours.eval(), textbook.eval()
    for a, b in zip(ours(images)[:2], textbook(images)[:2], strict=True):
        assert a.shape[-2:] == (-(-size[0] // 4), -(-size[1] // 4))
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-10)


def test_auxiliary_head_reads_its_stage_and_only_in_training():
    config = load_recipe("ade20k-segdeformer-swin-s").model
    encoder = EncoderConfig(name="mit_nano")
    config = config.model_copy(
        update={"encoder": encoder, "fusion": MLPFusionConfig(width=16), "num_classes": 5}
    )
    model = build_model(config)
    images = torch.randn(2, 3, 64, 96)
    assert model.train()(images).auxiliary_logits_BKhw.shape == (2, 5, 4, 6)  # stage 3: 1/16
    assert model.eval()(images).auxiliary_logits_BKhw is None


def test_logits_do_not_depend_on_the_other_images_of_a_batch():
    torch.manual_seed(0)
    model = build_model(load_recipe("synthetic").model).eval()
    images = torch.from_numpy(np.random.default_rng(0).normal(size=(3, 3, 65, 97)).astype(np.float32))
    together = model(images).logits_BKhw
    alone = torch.cat([model(image[None]).logits_BKhw for image in images])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)

"""MiT against transformers' SegformerModel, against a textbook block, and against known counts."""

import math

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

from segdeformer.models.mit import MIT_SIZES, NORM_EPS, Block, DropPath, MiT
from segdeformer.weights.encoder import export_encoder_weights, load_encoder_weights


def random_mit(name: str) -> MiT:
    """A MiT whose norms and biases are random too: at 1 and 0 they would hide swaps."""
    torch.manual_seed(0)
    mit = MiT(MIT_SIZES[name]).eval()
    with torch.no_grad():
        for parameter in mit.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return mit


# B1, B2, B5: SegFormer's totals with C = 256 and K = 150 (13.717, 24.762, 82.008 M) without the 565,398 of
# its decoder; the others from transformers' SegformerModel.
@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("mit_nano", 746_976),
        ("mit_b0", 3_319_392),
        ("mit_b1", 13_151_424),
        ("mit_b2", 24_196_288),
        ("mit_b3", 44_072_128),
        ("mit_b4", 60_842_688),
        ("mit_b5", 81_443_008),
    ],
)
def test_parameter_counts_are_the_published_ones(name, count):
    with torch.device("meta"):
        mit = MiT(MIT_SIZES[name])
    assert sum(p.numel() for p in mit.parameters()) == count


@pytest.mark.parametrize(
    ("name", "total_millions"), [("mit_b1", 13.717), ("mit_b2", 24.762), ("mit_b5", 82.008)]
)
def test_counts_with_segformers_decoder_are_the_measured_ones(name, total_millions):
    with torch.device("meta"):
        mit = MiT(MIT_SIZES[name])
    # In SegFormer-B1 and larger every decoder has 565,398 parameters at C = 256, K = 150.
    total = sum(p.numel() for p in mit.parameters()) + 565_398
    assert round(total / 1e6, 3) == total_millions


@pytest.mark.parametrize("weights_of", ["transformers", "ours"])
@pytest.mark.parametrize("size", [(64, 64), (65, 97), (50, 131)])
def test_feature_maps_equal_those_of_transformers(size, weights_of, tmp_path):
    mit = random_mit("mit_b0")
    theirs = transformers.SegformerModel(transformers.SegformerConfig()).eval()
    if weights_of == "ours":
        theirs.load_state_dict(export_encoder_weights(mit, "transformers5"))
    else:
        theirs.save_pretrained(tmp_path)
        report = load_encoder_weights(mit, tmp_path / "model.safetensors")
        assert not report.missing
        assert not report.unexpected
    images = torch.randn(2, 3, *size)
    with torch.no_grad():
        expected = theirs(images, output_hidden_states=True).hidden_states
        maps = mit(images)
    for ours, reference, stride in zip(maps, expected, mit.strides, strict=True):
        assert ours.shape[2:] == (math.ceil(size[0] / stride), math.ceil(size[1] / stride))
        torch.testing.assert_close(ours, reference, atol=1e-5, rtol=0)


def textbook_block(block: Block, x_BNC: Tensor, height: int, width: int) -> Tensor:
    """One block in NCHW and explicit matrices, from the paper's equations 1 to 3."""

    def norm(layer, x):
        mean = x.mean(-1, keepdim=True)
        variance = (x - mean).square().mean(-1, keepdim=True)
        return (x - mean) / (variance + NORM_EPS).sqrt() * layer.weight + layer.bias

    def linear(layer, x):
        return x @ layer.weight.T + layer.bias

    def to_map(x):
        return x.transpose(1, 2).reshape(x.shape[0], -1, height, width)

    attention = block.attention
    x = norm(block.norm1, x_BNC)
    source = x
    if attention.reduction > 1:
        r = attention.reduction
        windows = F.unfold(to_map(x), r, stride=r)
        source = windows.transpose(1, 2) @ attention.reduce.weight.flatten(1).T + attention.reduce.bias
        source = norm(attention.reduce_norm, source)
    q, k, v = linear(attention.query, x), linear(attention.key, source), linear(attention.value, source)
    heads = []
    for q_h, k_h, v_h in zip(*(t.chunk(attention.heads, dim=-1) for t in (q, k, v)), strict=True):
        scores = q_h @ k_h.transpose(1, 2) / math.sqrt(q_h.shape[-1])
        weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
        heads.append(weights @ v_h)
    x_BNC = x_BNC + linear(attention.proj, torch.cat(heads, dim=-1))

    ffn = block.ffn
    hidden = to_map(linear(ffn.expand, norm(block.norm2, x_BNC)))
    padded = F.pad(hidden, (1, 1, 1, 1))
    mixed = ffn.depthwise.bias[:, None, None].expand_as(hidden)
    for dy in range(3):
        for dx in range(3):
            weight = ffn.depthwise.weight[:, 0, dy, dx][:, None, None]
            mixed = mixed + weight * padded[:, :, dy : dy + height, dx : dx + width]
    active = 0.5 * mixed * (1 + torch.erf(mixed / math.sqrt(2)))
    return x_BNC + linear(ffn.contract, active.flatten(2).transpose(1, 2))


@pytest.mark.parametrize(("reduction", "height", "width"), [(1, 5, 7), (2, 5, 7), (4, 9, 4)])
def test_block_and_its_gradients_equal_the_textbook(reduction, height, width):
    torch.manual_seed(1)
    block = Block(24, heads=3, reduction=reduction, drop_path=0.0).double()
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x = torch.randn(2, height * width, 24, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn_like(x)

    expected = textbook_block(block, x, height, width)
    expected_gradients = torch.autograd.grad((expected * upstream).sum(), [x, *block.parameters()])
    output = block(x.unflatten(1, (height, width))).flatten(1, 2)
    gradients = torch.autograd.grad((output * upstream).sum(), [x, *block.parameters()])

    torch.testing.assert_close(output, expected, atol=1e-11, rtol=0)
    for gradient, reference in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, reference, atol=1e-10, rtol=1e-10)


def test_every_parameter_gets_a_finite_gradient():
    mit = random_mit("mit_nano").train()
    sum(m.square().mean() for m in mit(torch.randn(2, 3, 65, 97))).backward()
    for name, parameter in mit.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        # A bias on all keys shifts all scores of a query alike, and the softmax takes it out.
        assert parameter.grad.abs().max() > 0 or name.endswith("attention.key.bias"), name


def test_an_image_smaller_than_one_reduction_window_is_accepted():
    mit = random_mit("mit_nano")
    with torch.no_grad():
        maps = mit(torch.randn(1, 3, 5, 40))
    assert [tuple(m.shape[2:]) for m in maps] == [(2, 10), (1, 5), (1, 3), (1, 2)]
    assert all(m.isfinite().all() for m in maps)


def test_images_of_a_batch_do_not_see_each_other():
    mit = random_mit("mit_nano").double()
    images = torch.randn(3, 3, 40, 56, dtype=torch.float64)
    with torch.no_grad():
        together, alone = mit(images), mit(images[1:2])
    for batch_map, single_map in zip(together, alone, strict=True):
        torch.testing.assert_close(batch_map[1:2], single_map, atol=1e-13, rtol=1e-13)


def test_drop_path_grows_linearly_to_the_last_block():
    mit = MiT(MIT_SIZES["mit_nano"], drop_path=0.7)
    rates = [m.rate for m in mit.modules() if isinstance(m, DropPath)]
    torch.testing.assert_close(torch.tensor(rates), torch.linspace(0, 0.7, 8))


def test_drop_path_drops_whole_images_and_keeps_the_mean():
    torch.manual_seed(0)
    drop = DropPath(0.25).train()
    dropped = drop(torch.ones(4000, 2, 2, 3)).flatten(1)
    assert (dropped == dropped[:, :1]).all()
    torch.testing.assert_close(dropped[:, 0].unique(), torch.tensor([0.0, 1 / 0.75]))
    assert dropped.mean() == pytest.approx(1.0, abs=0.04)
    assert (drop.eval()(dropped) == dropped).all()


@torch.no_grad()
def test_initialisation_follows_segformer():
    torch.manual_seed(0)
    block = MiT(MIT_SIZES["mit_b0"]).stages[2].blocks[0]
    assert block.ffn.expand.weight.std() == pytest.approx(0.02, rel=0.05)
    assert block.ffn.depthwise.weight.std() == pytest.approx(math.sqrt(2 / 9), rel=0.05)
    assert block.attention.reduce.weight.std() == pytest.approx(math.sqrt(2 / (4 * 160)), rel=0.05)
    assert (block.norm1.weight == 1).all()
    assert block.attention.query.bias.abs().max() == 0

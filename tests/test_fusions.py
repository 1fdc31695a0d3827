"""Fusions against definitions written out here, in float64: values, gradients, folding, counts, training."""

import math
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from segdeformer.config import (
    FaPNConfig,
    FPNConfig,
    MLPFusionConfig,
    UperNetConfig,
)
from segdeformer.errors import UsageError, UserError
from segdeformer.models.batch_norms import fused_fusion
from segdeformer.models.fapn import GROUPS, FeatureAlignment, FeatureSelection
from segdeformer.models.fusion import build_fusion
from segdeformer.models.neck import MultiLevelNeck

CHANNELS = (3, 4, 5, 6)
PYRAMID = [(17, 25), (9, 13), (5, 7), (3, 4)]  # of a 65 x 97 image
FLAT = [(5, 7)] * 4
SMALL = {
    "mlp": MLPFusionConfig(width=16),
    "mlp, linear, deep": MLPFusionConfig(width=16, depth=4, projection="linear"),
    "upernet": UperNetConfig(width=16),
    "fpn": FPNConfig(width=16, pyramid_width=8),
    "fapn": FaPNConfig(width=16, pyramid_width=8),
}
NECKS = {f"{n}, neck": c.model_copy(update={"neck": True}) for n, c in SMALL.items() if n[0] != "m"}


def randomise(module):
    """Every parameter and statistic off its initial value; zeros and ones would hide errors."""
    generator = torch.Generator().manual_seed(1)
    for tensor in [*module.parameters(), *module.buffers()]:
        if tensor.is_floating_point():
            noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
            tensor.data += 0.2 * noise.to(tensor)
    for child in module.modules():
        if isinstance(child, nn.BatchNorm2d):
            child.running_var.abs_().add_(0.5)
    return module


def fusion_of(config, strides=(4, 8, 16, 32)):
    torch.manual_seed(0)
    return randomise(build_fusion(config, CHANNELS, strides).double())


def maps_of(sizes, *, gradients=False):
    generator = torch.Generator().manual_seed(2)
    return [
        torch.randn(2, c, *size, generator=generator, dtype=torch.float64).requires_grad_(gradients)
        for c, size in zip(CHANNELS, sizes, strict=True)
    ]


def bilinear(x, size):
    return F.interpolate(x, size, mode="bilinear", align_corners=False)


def assert_exact(ours, expected):
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(ours, expected, atol=1e-12, rtol=1e-12)


# MLP fusion.


def concatenated(fusion, maps):
    """Eq. 1 as printed: upsample, concatenate, mix."""
    parts = [bilinear(layer(x), maps[0].shape[-2:]) for layer, x in zip(fusion.project, maps, strict=True)]
    return fusion.deepen(fusion.fuse(torch.cat(parts[::-1] if fusion.deepest_first else parts, dim=1)))


@pytest.mark.parametrize("sizes", [PYRAMID, FLAT])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["mlp", "mlp, linear, deep"])
def test_mlp_fusion_and_its_gradients_equal_the_concatenated_definition(name, training, sizes):
    fusion = fusion_of(SMALL[name]).train(training)
    results = []
    for form in (lambda maps: fusion(maps).as_map(), lambda maps: concatenated(fusion, maps)):
        maps = maps_of(sizes, gradients=True)
        fusion.zero_grad()
        y = form(maps)
        (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).reshape(y.shape)).sum().backward()
        results.append([y, *(x.grad for x in maps), *(p.grad for p in fusion.parameters())])
    for ours, expected in zip(*results, strict=True):
        scale = expected.abs().max().clamp(min=1)  # a bias before a BatchNorm has no gradient
        assert (ours - expected).abs().max() <= 1e-12 * scale


def test_mlp_fusion_keeps_the_names_of_its_weights():
    names = [f"project.{i}.{part}.weight" for i in range(4) for part in (0, 1)]
    names += ["fuse.0.weight", "fuse.1.weight"]
    state = fusion_of(SMALL["mlp"]).state_dict()
    assert {n for n in state if n.endswith("weight")} == set(names)
    assert state["fuse.0.weight"].shape == (16, 64, 1, 1)


def test_mlp_fusion_never_holds_the_concatenated_map():
    fusion, maps = fusion_of(SMALL["mlp"]), maps_of(PYRAMID)
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                largest = max(largest, result.numel())
            return result

    with Watch():
        fusion(maps)
    assert largest == 2 * 16 * 17 * 25


# UperNet, Semantic FPN and the neck.


def cell_averages(x, cells):
    """Cell i of n takes the pixels from floor(i size / n) to ceil((i + 1) size / n)."""
    averages = x.new_empty(*x.shape[:2], cells, cells)
    height, width = x.shape[-2:]
    for i in range(cells):
        for j in range(cells):
            rows = slice(i * height // cells, math.ceil((i + 1) * height / cells))
            columns = slice(j * width // cells, math.ceil((j + 1) * width / cells))
            averages[:, :, i, j] = x[:, :, rows, columns].mean((2, 3))
    return averages


def block(x, layer):
    """Convolution without bias, BatchNorm in eval mode, ReLU."""
    conv, norm, _ = layer
    y = F.conv2d(x, conv.weight, padding=conv.kernel_size[0] // 2)
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    return ((y - norm.running_mean[:, None, None]) * scale[:, None, None] + norm.bias[:, None, None]).relu()


@pytest.mark.parametrize("sizes", [PYRAMID, FLAT, [(8, 8), (4, 4), (2, 2), (1, 1)]])
def test_upernet_is_pooling_laterals_and_top_down_sums(sizes):
    fusion, maps = fusion_of(SMALL["upernet"]).eval(), maps_of(sizes)
    deepest = maps[3]
    pyramid = [
        bilinear(block(cell_averages(deepest, n), fusion.psp_modules[i]), sizes[3])
        for i, n in enumerate((1, 2, 3, 6))
    ]
    p4 = block(torch.cat([deepest, *pyramid], 1), fusion.bottleneck)
    p3 = block(maps[2], fusion.lateral_convs[2]) + bilinear(p4, sizes[2])
    p2 = block(maps[1], fusion.lateral_convs[1]) + bilinear(p3, sizes[1])
    p1 = block(maps[0], fusion.lateral_convs[0]) + bilinear(p2, sizes[0])
    outs = [block(p, conv) for p, conv in zip((p1, p2, p3), fusion.fpn_convs, strict=True)]
    everything = torch.cat([bilinear(y, sizes[0]) for y in (*outs, p4)], 1)
    tokens = fusion(maps)
    assert (tokens.height, tokens.width) == sizes[0]
    assert_exact(tokens.as_map(), block(everything, fusion.fpn_bottleneck))


@pytest.mark.parametrize(("sizes", "strides"), [(PYRAMID, (4, 8, 16, 32)), (FLAT, (16,) * 4)])
def test_semantic_fpn_sums_its_levels_after_one_block_for_each_doubling(sizes, strides):
    fusion, maps = fusion_of(SMALL["fpn"], strides).eval(), maps_of(sizes)
    lateral, smooth = fusion.pyramid.lateral_convs, fusion.pyramid.fpn_convs
    level, total = 0, 0
    for i in (3, 2, 1, 0):
        here = torch.einsum("oc,bchw->bohw", lateral[i].weight[:, :, 0, 0], maps[i])
        here = here + lateral[i].bias[:, None, None]
        if i < 3:  # pixel (y, x) takes the coarser level's pixel that covers its corner
            rows, columns = (torch.arange(n) * m // n for n, m in zip(sizes[i], sizes[i + 1], strict=True))
            here = here + level[:, :, rows][:, :, :, columns]
        level = here
        y = F.conv2d(level, smooth[i].weight, smooth[i].bias, padding=1)
        blocks = fusion.scale_heads[i]
        assert len(blocks) == (max(1, i) if sizes == PYRAMID else 1)
        for layer in blocks:
            y = block(y, layer)
            if i and sizes == PYRAMID:
                y = bilinear(y, (2 * y.shape[2], 2 * y.shape[3]))
        total = total + bilinear(y, sizes[0])
    assert_exact(fusion(maps).as_map(), total)


def test_neck_makes_four_sizes_of_one():
    neck = randomise(MultiLevelNeck(CHANNELS).double())
    maps = maps_of([(6, 8)] * 4)
    sizes = [(24, 32), (12, 16), (6, 8), (3, 4)]
    for ours, x, size, lateral, conv in zip(
        neck(maps), maps, sizes, neck.lateral_convs, neck.convs, strict=True
    ):
        y = bilinear(F.conv2d(x, lateral.weight, lateral.bias), size)
        assert_exact(ours, F.conv2d(y, conv.weight, conv.bias, padding=1))
    assert [tuple(y.shape[-2:]) for y in neck(maps_of([(1, 3)] * 4))] == [(4, 12), (2, 6), (1, 3), (1, 3)]


@pytest.mark.parametrize("name", NECKS)
def test_tokens_behind_a_neck_are_at_a_quarter_of_the_image(name):
    fusion = fusion_of(NECKS[name], (16,) * 4).eval()
    tokens = fusion(maps_of(FLAT))
    assert (tokens.height, tokens.width) == (20, 28)
    expected = fusion.neck(maps_of(FLAT))
    fusion.neck = None
    assert_exact(tokens.pixels_BNC, fusion(expected).pixels_BNC)


def test_upernet_has_mmsegmentations_names():
    """There a block's `.0` is `.conv` and its `.1` is `.bn`; `psp_modules.i` is `psp_modules.i.1`."""
    blocks = [f"psp_modules.{i}" for i in range(4)] + ["bottleneck", "fpn_bottleneck"]
    blocks += [f"{kind}.{i}" for kind in ("lateral_convs", "fpn_convs") for i in range(3)]
    names = {f"{block}.{part}.weight" for block in blocks for part in (0, 1)}
    names |= {f"neck.{kind}.{i}.weight" for kind in ("lateral_convs", "convs") for i in range(4)}
    fusion = fusion_of(NECKS["upernet, neck"], (16,) * 4)
    assert {n for n in fusion.state_dict() if n.endswith("weight")} == names


# FaPN.


def deformed(x, offsets, masks, weight, bias):
    """Each tap of a 3x3 kernel reads where its offset points, zero outside, times its mask."""
    batch, _, height, width = x.shape
    offsets = offsets.reshape(batch, GROUPS, 9, 2, height, width)
    masks = masks.reshape(batch, GROUPS, 9, height, width)
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    y = 0
    for tap in range(9):
        for group, part in enumerate(x.chunk(GROUPS, 1)):
            at_y = rows + tap // 3 - 1 + offsets[:, group, tap, 0]
            at_x = columns + tap % 3 - 1 + offsets[:, group, tap, 1]
            grid = torch.stack([2 * at_x / (width - 1) - 1, 2 * at_y / (height - 1) - 1], -1)
            read = F.grid_sample(part, grid, padding_mode="zeros", align_corners=True)
            w = weight.chunk(GROUPS, 1)[group][:, :, tap // 3, tap % 3]
            y = y + torch.einsum("oc,bchw->bohw", w, read * masks[:, group, tap, None])
    return y + bias[:, None, None]


def test_feature_alignment_is_a_deformable_convolution_by_what_both_maps_say():
    torch.manual_seed(0)
    align = randomise(FeatureAlignment(16).double())
    fine, coarse = torch.randn(2, 2, 16, 5, 7, dtype=torch.float64)
    compared = torch.einsum("oc,bchw->bohw", align.compare.weight[:, :, 0, 0], torch.cat([fine, coarse], 1))
    shift = F.conv2d(compared, align.shift.weight, align.shift.bias, padding=1)
    expected = deformed(
        coarse, shift[:, :144], torch.sigmoid(shift[:, 144:]), align.deform.weight, align.deform.bias
    )
    assert shift[:, :144].abs().max() > 1
    assert_exact(align(fine, coarse), expected.relu())


def test_feature_alignment_starts_as_a_plain_convolution_at_half_strength():
    torch.manual_seed(0)
    pyramid = build_fusion(FaPNConfig(width=8, pyramid_width=16), CHANNELS).double().pyramid
    fine, coarse = torch.randn(2, 2, 16, 5, 7, dtype=torch.float64)
    align = pyramid.alignments[1]
    plain = F.conv2d(coarse, align.deform.weight / 2, align.deform.bias, padding=1)
    assert_exact(align(fine, coarse), plain.relu())


def test_fapn_selects_aligns_and_adds_from_the_top_down():
    torch.manual_seed(0)
    select = randomise(FeatureSelection(6, 8).double())
    x = maps_of(PYRAMID)[3]
    gate = torch.sigmoid(x.mean((2, 3)) @ select.gate.weight[:, :, 0, 0].T + select.gate.bias)
    chosen = torch.einsum("oc,bchw->bohw", select.select.weight[:, :, 0, 0], x + gate[:, :, None, None] * x)
    assert_exact(select(x), chosen)

    pyramid, maps = fusion_of(SMALL["fapn"]).eval().pyramid, maps_of(PYRAMID)
    levels = pyramid(maps)
    expected = F.conv2d(maps[3], pyramid.top.weight, pyramid.top.bias)
    assert_exact(levels[3], expected)
    for i in (2, 1, 0):
        fine = pyramid.selections[i](maps[i])
        aligned = pyramid.alignments[i](fine, bilinear(expected, PYRAMID[i]))
        conv = pyramid.output_convs[i]
        expected = F.conv2d(fine + aligned, conv.weight, conv.bias, padding=1)
        assert_exact(levels[i], expected)


def test_fapn_without_torchvision_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision.ops", None)
    with pytest.raises(
        UserError, match=r"^fusion `fapn` needs .* install the torchvision that goes with"
    ) as e:
        build_fusion(SMALL["fapn"], CHANNELS)
    assert "\n" not in str(e.value)


def test_a_neck_behind_a_pyramid_is_refused():
    with pytest.raises(UsageError, match=r"`model.fusion.neck` is for flat .* \[4, 8, 16, 32\]: set it to"):
        build_fusion(NECKS["upernet, neck"], CHANNELS)


# All of them.


@pytest.mark.parametrize("name", [*SMALL, *NECKS])
def test_fusion_without_batch_norms_gives_the_same_tokens(name):
    fusion = fusion_of((SMALL | NECKS)[name], (16,) * 4 if name in NECKS else (4, 8, 16, 32)).eval()
    maps = maps_of(FLAT if name in NECKS else PYRAMID)
    fused = fused_fusion(fusion)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in fused.modules())
    assert_exact(fused(maps).pixels_BNC, fusion(maps).pixels_BNC)

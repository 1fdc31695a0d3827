"""Positions of a bilinear resize: integers on the host, in tensors and in the kernels, against fractions."""

from fractions import Fraction

import pytest
import torch
import triton
import triton.language as tl
from test_triton_attention import DEVICE

from segdeformer.kernels.upsample.launch import Upsampling
from segdeformer.kernels.upsample.rows import source_range, source_rows
from segdeformer.kernels.upsample.triton_kernels import first_fed, neighbours, source_position, tent_weight

SIZES = [(8, 32), (128, 683), (171, 512), (7, 7), (33, 12), (100, 1), (1, 1), (1, 9), (3, 1000), (1000, 999)]
LONG = 60_000, 65_536  # 2 * 60,000 * 65,536 does not fit into 32 bits


def exact(source, target, place):
    """Near place, far place and the far one's weight of an output place."""
    position = max(Fraction((2 * place + 1) * source, 2 * target) - Fraction(1, 2), Fraction(0))
    near = int(position)
    return near, min(near + 1, source - 1), position - near


@pytest.mark.parametrize(("source", "target"), SIZES)
def test_tables_and_ranges_of_the_host_equal_fractions(source, target):
    expected = [exact(source, target, place) for place in range(target)]
    table = source_rows(source, target, dtype=torch.float64)
    assert table.near_r.tolist() == [near for near, _, _ in expected]
    assert table.far_r.tolist() == [far for _, far, _ in expected]
    assert table.far_weight_r.tolist() == [float(weight) for _, _, weight in expected]
    for top in range(0, target, max(1, target // 7)):
        bottom = min(top + 5, target)
        assert source_range(source, target, top, bottom) == range(
            expected[top][0], expected[bottom - 1][1] + 1
        )


@triton.jit
def probe(near, far, weight, tent, first, source, target, start, WIDE: tl.constexpr, PLACES: tl.constexpr):
    places = start + tl.arange(0, PLACES)
    position = source_position(places, source, target, WIDE)
    near_place, far_place, far_weight = neighbours(position, source, target)
    offsets = tl.arange(0, PLACES)
    tl.store(near + offsets, near_place)
    tl.store(far + offsets, far_place)
    tl.store(weight + offsets, far_weight)
    tl.store(tent + offsets, tent_weight(near_place, position, source, target, WIDE))
    tl.store(first + offsets, first_fed(places, source, target, WIDE))


@pytest.mark.parametrize(("source", "target"), [*SIZES, LONG, LONG[::-1]])
def test_positions_in_the_kernels_equal_fractions(source, target):
    logits = torch.empty(1, 1, source, 1, device="meta")
    wide = Upsampling(logits, target, 1).constants()["WIDE"]
    assert wide == (min(source, target) > 50_000)
    count = 32
    for start in sorted({0, max(0, target // 2 - 5), max(0, target - count)}):
        near, far, first = (torch.empty(count, dtype=torch.int32, device=DEVICE) for _ in range(3))
        weight, tent = (torch.empty(count, device=DEVICE) for _ in range(2))
        probe[1,](near, far, weight, tent, first, source, target, start, WIDE=wide, PLACES=count)
        here = range(start, min(start + count, target))
        expected = [exact(source, target, place) for place in here]
        assert near.tolist()[: len(here)] == [n for n, _, _ in expected]
        assert far.tolist()[: len(here)] == [f for _, f, _ in expected]
        weights = torch.tensor([float(w) for _, _, w in expected])
        torch.testing.assert_close(weight.cpu()[: len(here)], weights, rtol=3e-7, atol=0)
        edge = torch.tensor([n == f for n, f, _ in expected])
        expected_weights = torch.where(edge, 1.0, 1.0 - weights)
        torch.testing.assert_close(tent.cpu()[: len(here)], expected_weights, rtol=0, atol=3e-7)
        for place, fed in zip(range(start, min(start + count, source + 1)), first.tolist(), strict=False):
            assert fed == target or exact(source, target, fed)[0] >= place
            assert place <= 0 or fed == 0 or exact(source, target, fed - 1)[0] < place
            assert place > 0 or fed == 0

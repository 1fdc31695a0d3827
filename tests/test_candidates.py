"""How many programs share a multiprocessor, how fast a tile may be, which tiles are worth measuring."""

import pytest
import torch

from segdeformer.kernels.tiles import ARCHITECTURES, Tile, default_tile
from segdeformer.kernels.tuning.candidates import (
    Target,
    candidate_tiles,
    estimated_resources,
    most_promising,
    needs,
    scores_per_cycle,
)
from segdeformer.kernels.tuning.resources import Resources
from segdeformer.kernels.tuning.trial import decoder_problems

HOPPER = ARCHITECTURES["sm_90"]
KB = 1024


@pytest.mark.parametrize(
    ("card", "registers", "shared_bytes", "warps", "tensor_columns", "resident"),
    [
        ("sm_90", 90, 12 * KB, 4, 0, 5),  # 96 registers: five warps in each of four partitions
        ("sm_90", 97, 12 * KB, 4, 0, 4),
        ("sm_90", 16, 12 * KB, 4, 0, 16),  # 64 warps
        ("sm_90", 16, 2 * KB, 1, 0, 32),  # 32 programs
        ("sm_90", 168, 100 * KB, 4, 0, 2),  # shared memory, a kilobyte of each program reserved
        ("sm_90", 168, 229_760, 12, 0, 1),
        ("sm_90", 255, 1 * KB, 8, 0, 1),
        ("sm_90", 40, 228 * KB, 4, 0, 0),
        ("sm_90", 255, 1 * KB, 16, 0, 0),  # too many registers to start
        ("sm_86", 96, 49 * KB, 4, 0, 2),
        ("sm_86", 40, 2 * KB, 4, 0, 12),  # 48 warps
        ("sm_80", 128, 30 * KB, 4, 0, 4),
        ("sm_100", 96, 20 * KB, 4, 256, 2),
        ("sm_100", 96, 20 * KB, 4, 272, 1),  # handed out in powers of two
        ("sm_100", 4, 20 * KB, 4, 736, 0),
        ("sm_90", 4, 20 * KB, 4, 32, 0),  # has no such memory
        ("gfx942", 512, 64 * KB, 4, 0, 1),
        ("gfx942", 128, 8 * KB, 4, 0, 4),
        ("gfx942", 128, 33 * KB, 4, 0, 1),
        ("gfx942", 264, 8 * KB, 4, 0, 1),
    ],
)
def test_programs_share_a_multiprocessor_as_its_memories_allow(
    card, registers, shared_bytes, warps, tensor_columns, resident
):
    resources = Resources(shared_bytes, registers, warps, tensor_columns=tensor_columns)
    assert resources.resident_blocks(ARCHITECTURES[card]) == resident


SMALL = Tile(64, 64, 4, 2)


def speed(resources, tile=SMALL, *, width=32, num_rows=None):
    target = Target("external_forward", (width, width), 2, HOPPER, num_rows)
    return scores_per_cycle(target, tile, resources)


def test_a_second_program_hides_the_softmax_of_the_first_behind_its_products():
    alone = Resources(200 * KB, 96, 4, instruction="wgmma m64n64k16")
    two, five = alone._replace(shared_bytes=100 * KB), alone._replace(shared_bytes=40 * KB)
    assert speed(two) > 1.3 * speed(alone)
    assert speed(five) >= speed(two)
    # 16 exponentials a cycle are the end of it.
    assert speed(five) < 16
    # One program for each multiprocessor: then there is nothing to share it with.
    assert speed(five, num_rows=64 * 132) == pytest.approx(speed(alone))


def test_spills_older_instructions_and_idle_multiprocessors_cost_speed():
    good = Resources(40 * KB, 96, 4, instruction="wgmma m64n64k16")
    wide = Tile(64, 128, 4, 2)
    assert speed(good._replace(spill_bytes=512), wide, width=160) < 0.9 * speed(good, wide, width=160)
    older = good._replace(instruction="mma.sync m16n8k16")
    assert speed(older, wide, width=160) < speed(good, wide, width=160)
    assert speed(good._replace(instruction="fma"), wide, width=160) < 0.2 * speed(good, wide, width=160)
    assert speed(good, num_rows=64 * 66) == pytest.approx(0.5 * speed(good, num_rows=64 * 132))
    assert speed(good._replace(shared_bytes=228 * KB)) == 0


def candidates(kernel, widths, num_rows):
    default = default_tile(kernel, *widths, 2, HOPPER)
    return candidate_tiles(Target(kernel, widths, 2, HOPPER, num_rows), default)


def test_candidates_are_the_large_tiles_and_the_small_ones_that_share():
    few = candidates("external_forward", (32, 32), 65536)
    assert any(tile[:2] == (128, 128) for tile in few)
    assert any(tile[:3] == (64, 64, 4) for tile in few)
    assert any(tile[:3] == (128, 128, 8) for tile in candidates("external_forward", (160, 160), 16384))
    assert Tile(64, 128, 4, 2) in candidates("external_forward", (160, 160), 16384)


@pytest.mark.parametrize("architecture", ARCHITECTURES.values(), ids=lambda card: card.name)
def test_candidates_start_with_the_default_and_may_fit_the_card(architecture):
    for problem in decoder_problems(torch.device("cpu")):
        default = default_tile(problem.kernel, *problem.widths, problem.element_bytes, architecture)
        target = Target(problem.kernel, problem.widths, problem.element_bytes, architecture)
        tiles = candidate_tiles(target, default)
        assert tiles[0] == default
        assert 1 < len(tiles) <= 24
        assert len(set(tiles)) == len(tiles)
        for tile in tiles[1:]:
            q, k = tile.block_queries, tile.block_keys
            need = needs(problem.kernel, q, k, *problem.widths, problem.element_bytes)
            least = max(need.resident, need.streamed) if architecture.backend == "hip" else sum(need[:2])
            assert least * problem.element_bytes <= architecture.shared_bytes or tile.stages == 1
            assert not tile.tma or architecture.name in ("sm_90", "sm_100")
            assert tile.tma or not tile.warp_specialize
            if problem.kernel.endswith("few_keys"):
                assert k == default.block_keys


def test_compiled_tiles_are_ordered_with_the_best_of_each_occupancy_first():
    target = Target("external_forward", (160, 160), 2, HOPPER)

    def made(tile):
        return estimated_resources(target, tile)

    one, two, three = Tile(128, 128, 8, 3), Tile(64, 128, 4, 2), Tile(64, 64, 4, 2)
    others = [Tile(128, 64, 8, 3), Tile(128, 64, 8, 2), Tile(64, 64, 8, 3), Tile(64, 128, 8, 2)]
    tiles = [*others, one, two, three, broken := Tile(128, 32, 8, 3), huge := Tile(128, 32, 8, 2)]
    compiled = {tile: made(tile) for tile in tiles if tile != broken}
    compiled[huge] = compiled[huge]._replace(shared_bytes=300 * KB)
    assert [made(tile).resident_blocks(HOPPER) for tile in (one, two, three)] == [1, 2, 3]
    # The compiler spills where 64x128 has eight warps: the estimate does not count any more.
    compiled[others[3]] = compiled[others[3]]._replace(spill_bytes=400)
    target = target._replace(num_rows=16384)
    best = most_promising(target, tiles, resources=compiled, most=5)
    assert set(best[:3]) == {one, two, three}
    assert best[0] == two
    assert len(best) == 5
    everything = most_promising(target, tiles, resources=compiled)
    assert broken not in everything
    assert huge not in everything
    assert set(everything) == set(compiled) - {huge}

"""Which tiles are worth measuring: those that may fit a card, the most promising first.

Shared memory and accumulators are counted as the kernels use them; the compiler has the last word, so the
bounds are generous. q, k block of queries, of keys; d, e padded widths of queries and keys, of values.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

from segdeformer.kernels.tiles import Architecture, Tile

BLOCKS = (16, 32, 64, 128, 256)
# Float32 accumulators of a thread. On sm_90, 144 to 160 make 200 to 240 of the 255 registers; more spills.
MOST_ACCUMULATORS = 176
LEAST_ACCUMULATORS = 8  # fewer leave a warp without work
CHUNK_COLUMN_BYTES = 128  # of the blocks of columns in `attention_weights_and_grads`
COPYING_KERNELS = ("attention_forward", "external_forward")  # those with a TMA form
COPYING_ARCHITECTURES = ("sm_90", "sm_100")


class Need(NamedTuple):
    """What a tile of a kernel holds on chip, in elements."""

    resident: int  # operands that stay
    streamed: int  # operands of one stage of the pipeline
    accumulators: int  # float32, in registers


def needs(kernel: str, q: int, k: int, d: int, e: int, element_bytes: int) -> Need:
    """What a program of the kernel holds with blocks of q queries and k keys."""
    both = d if kernel.startswith("external") else d + e  # external keys are the values
    match kernel:
        case "attention_forward" | "external_forward":
            return Need(q * d, k * both, q * e + q * k)
        case "attention_forward_few_keys":
            return Need(k * both, q * d, q * e + q * k)
        case "attention_backward_queries" | "external_backward_queries":
            return Need(q * (d + e), k * both, q * d + 2 * q * k)
        case "attention_backward_keys":
            return Need(k * (d + e), q * (d + e), k * d + 2 * q * k)
        case "attention_backward_values":
            return Need(k * d, q * (d + e), k * e + q * k)
        case "attention_backward_keys_and_values":
            return Need(k * (d + e), q * (d + e), k * (d + e) + 2 * q * k)
        case "external_backward_keys":
            return Need(k * d, 2 * q * d, k * d + 2 * q * k)
        case "attention_weights_and_grads":
            return Need(0, (q + k) * CHUNK_COLUMN_BYTES // element_bytes, 2 * q * k)
    raise AssertionError(kernel)


def candidate_tiles(
    kernel: str, widths: tuple[int, int], element_bytes: int, architecture: Architecture, default: Tile
) -> list[Tile]:
    """The default tile, then others, at most about a dozen. widths: padded, of keys and of values."""
    by_shape: dict[tuple[int | bool, ...], list[Tile]] = {}
    for tile in _fitting(kernel, widths, element_bytes, architecture, default):
        by_shape.setdefault(tile[:3], []).append(tile)
    shapes = sorted(by_shape.values(), key=lambda tiles: _promise(kernel, tiles[0]), reverse=True)
    deepest = [tiles[0] for tiles in shapes]
    likely = [tile for tiles in shapes[:3] for tile in tiles[:2]]
    bulk: list[Tile] = []
    if kernel in COPYING_KERNELS and architecture.name in COPYING_ARCHITECTURES and element_bytes == 2:
        # Triton specialises four warps; eight it compiles as if not asked to.
        four = [tiles[:2] for tiles in shapes if tiles[0].warps == 4]
        bulk = [tile._replace(tma=True) for tile in deepest[:2] + [tiles[0] for tiles in four[:1]]]
        bulk += [t._replace(tma=True, warp_specialize=True) for tiles in four[:2] for t in tiles]
    return list(dict.fromkeys([default, *likely, *bulk, *deepest[: 6 if element_bytes == 2 else 3]]))


def _fitting(
    kernel: str, widths: tuple[int, int], element_bytes: int, architecture: Architecture, default: Tile
) -> Iterator[Tile]:
    """All tiles within the bounds, the deepest pipeline of a shape first."""
    blocks: tuple[int, ...] = BLOCKS
    if element_bytes == 4:  # float32 products take whole operands into registers
        blocks = BLOCKS[:3]
    elif max(widths) > 64 or kernel not in COPYING_KERNELS:
        blocks = BLOCKS[:4]
    key_blocks = blocks
    if kernel == "attention_forward_few_keys":
        key_blocks = (default.block_keys,)  # up to how many keys it is used: not a matter of tuning
    for q, k, warps in itertools.product(blocks, key_blocks, (8, 4)):
        need = needs(kernel, q, k, *widths, element_bytes)
        if not LEAST_ACCUMULATORS <= need.accumulators / (32 * warps) <= MOST_ACCUMULATORS:
            continue
        if warps == 8 and q * k < 1024:
            continue
        for stages in (3, 2, 1):
            # Hopper's products read all buffers of the pipeline, older ones hold a stage in registers.
            buffers = stages if architecture.name in COPYING_ARCHITECTURES else max(1, stages - 1)
            shared = need.resident + buffers * need.streamed
            if shared * element_bytes <= architecture.shared_bytes:
                yield Tile(q, k, warps, stages)


def _promise(kernel: str, tile: Tile) -> tuple[bool, int, int, int]:
    """Large where a tile is likely fast: a pipeline, much reuse, and the larger block stays on chip."""
    q, k = tile.block_queries, tile.block_keys
    keys_stay = kernel.endswith(("backward_keys", "backward_values", "keys_and_values"))
    return min(q, k) >= 32 and tile.stages > 1, q * k, k if keys_stay else q, tile.warps

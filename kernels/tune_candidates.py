"""Which tiles are worth measuring: those that may fit a card, the most promising first.

First by an estimate of what the compiler will make of them, which costs nothing: `candidate_tiles`. Then,
once they are compiled, by what it did make of them: `most_promising`. Both want variety: the best with one
program on a multiprocessor, the best with two, and so on, for no estimate knows what the card likes.
q, k block of queries, of keys; d, e padded widths of queries and keys, of values.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from segdeformer.kernels.resources import MATRIX_INSTRUCTIONS, Resources
from segdeformer.kernels.tile_speed import scores_per_cycle
from segdeformer.kernels.tiles import WIDEST_NARROW_FORWARD, Architecture, Tile

BLOCKS = (16, 32, 64, 128, 256)
# Float32 accumulators of a thread. On sm_90, 144 to 160 make 200 to 240 of the 255 registers; more spills.
MOST_ACCUMULATORS = 176
LEAST_ACCUMULATORS = 8  # fewer leave a warp without work
CHUNK_COLUMN_BYTES = 128  # of the blocks of columns in `attention_weights_and_grads`
COPYING_KERNELS = ("attention_forward", "external_forward")  # those with a TMA form
COPYING_ARCHITECTURES = ("sm_90", "sm_100")
BASE_REGISTERS = 44  # of a thread, beside accumulators and operands: addresses, row sums, a softmax in hand
WORTHY = 0.5  # of the best score, for the best with so many resident programs to be measured first


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
    kernel: str,
    widths: tuple[int, int],
    element_bytes: int,
    architecture: Architecture,
    default: Tile,
    *,
    num_rows: int | None = None,
    most: int = 24,
) -> list[Tile]:
    """The default tile, then others, to be compiled. widths: padded, of keys and of values."""
    case = kernel, widths, element_bytes, architecture
    tiles = list(_fitting(kernel, widths, element_bytes, architecture, default))
    ranked = most_promising(*case, tiles, num_rows=num_rows, most=most)
    bulk: list[Tile] = []
    if kernel == "external_forward" and widths[0] <= WIDEST_NARROW_FORWARD:  # a kernel without bulk copies
        if architecture.backend == "cuda" and element_bytes == 2:
            bulk = [tile._replace(polynomial=True) for tile in ranked[:3]]
    elif kernel in COPYING_KERNELS and architecture.name in COPYING_ARCHITECTURES and element_bytes == 2:
        # Triton specialises four warps; eight it compiles as if not asked to.
        four = [tile for tile in ranked if tile.warps == 4 and tile.stages > 1]
        bulk = [tile._replace(tma=True) for tile in dict.fromkeys([*ranked[:3], *four[:1]])]
        bulk += [tile._replace(tma=True, warp_specialize=True) for tile in four[:2]]
    return list(dict.fromkeys([default, *ranked[: most - 1 - len(bulk)], *bulk]))


def most_promising(
    kernel: str,
    widths: tuple[int, int],
    element_bytes: int,
    architecture: Architecture,
    tiles: Iterable[Tile],
    *,
    resources: Mapping[Tile, Resources] | None = None,
    num_rows: int | None = None,
    most: int = 12,
) -> list[Tile]:
    """The tiles worth running, the fastest by the model first, of each number of resident programs some.

    resources: what the compiler made of them; a tile without is left out. None: as estimated.
    """
    scores: dict[Tile, float] = {}
    classes: dict[Tile, int] = {}
    for tile in tiles:
        if resources is None:
            needed = estimated_resources(kernel, tile, widths, element_bytes, architecture)
        elif tile in resources:
            needed = resources[tile]
        else:
            continue
        score = scores_per_cycle(kernel, tile, widths, element_bytes, architecture, needed, num_rows=num_rows)
        if score:
            scores[tile] = score
            # 1, 2, 3 to 4, more.
            classes[tile] = min((needed.resident_blocks(architecture) - 1).bit_length(), 3)
    ranked = sorted(scores, key=lambda tile: -scores[tile])
    worthy = [tile for tile in ranked if scores[tile] >= WORTHY * scores[ranked[0]]]
    of_classes = _firsts(worthy, lambda tile: classes[tile])
    of_shapes = _firsts(ranked, lambda tile: (*tile[:2], *tile[4:]))
    return list(dict.fromkeys([*of_classes, *of_shapes, *ranked]))[:most]


def _firsts(ranked: Sequence[Tile], kind: Callable[[Tile], Hashable]) -> list[Tile]:
    """The best of each kind."""
    firsts: dict[Hashable, Tile] = {}
    for tile in ranked:
        firsts.setdefault(kind(tile), tile)
    return list(firsts.values())


def estimated_resources(
    kernel: str, tile: Tile, widths: tuple[int, int], element_bytes: int, architecture: Architecture
) -> Resources:
    """About what the compiler will make of a tile."""
    q, k = tile.block_queries, tile.block_keys
    need = needs(kernel, q, k, *widths, element_bytes)
    threads = architecture.warp_size * tile.warps
    rows = k if kernel.endswith(("backward_keys", "backward_values", "keys_and_values")) else q
    instruction = MATRIX_INSTRUCTIONS[architecture.name] if element_bytes == 2 else "fma"
    if instruction in ("wgmma", "tcgen05") and rows < 64:
        instruction = "mma.sync"
    words = need.accumulators
    columns = 0
    if instruction in ("mma.sync", "v_mfma"):  # takes its operands from registers
        words += need.resident * element_bytes // 4
    if instruction == "tcgen05":
        columns = max(32, 1 << (need.accumulators // min(rows, 128) - 1).bit_length())
    registers = BASE_REGISTERS + math.ceil(1.1 * words / threads)
    limit = 512 if architecture.backend == "hip" else 255
    # Hopper's products read all buffers of the pipeline, older ones hold a stage in registers.
    buffers = tile.stages if architecture.name in COPYING_ARCHITECTURES else max(1, tile.stages - 1)
    shared = need.resident + buffers * need.streamed
    if instruction == "tcgen05" and kernel.startswith("external"):
        shared += need.streamed  # once more, for the other side of the product
    if architecture.backend == "hip":
        shared = max(need.resident, (tile.stages - 1) * need.streamed)
    return Resources(
        shared * element_bytes,
        min(registers, limit),
        tile.warps,
        spill_bytes=8 * max(0, registers - limit),
        instruction=instruction,
        tensor_columns=columns,
    )


def _fitting(
    kernel: str, widths: tuple[int, int], element_bytes: int, architecture: Architecture, default: Tile
) -> Iterator[Tile]:
    """All tiles within the bounds."""
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
        threads = warps * architecture.warp_size
        if not LEAST_ACCUMULATORS <= need.accumulators / threads <= MOST_ACCUMULATORS:
            continue
        if warps == 8 and q * k < 1024:
            continue
        for stages in (3, 2, 1):
            tile = Tile(q, k, warps, stages)
            needed = estimated_resources(kernel, tile, widths, element_bytes, architecture)
            if needed.shared_bytes <= architecture.shared_bytes:
                yield tile

"""Which tiles are worth measuring: those that may fit a card, the most promising first.

First by an estimate of what the compiler will make of them, which costs nothing: `candidate_tiles`. Then,
once they are compiled, by what it did make of them: `most_promising`. Both want variety: the best with one
program on a multiprocessor, the best with two, and so on, for no estimate knows what the card likes.
q, k block of queries, of keys; d, e padded widths of queries and keys, of values.

For one block of q x k scores a program keeps the matrix units busy for `products` cycles (or the shared
memory that feeds them), the others for `softmax` (the exponentials first of all), and the way from L2 for
`loads`. A program alone goes through its products and its softmax one after the other. b programs that are
resident on a multiprocessor fill one another's waits, until one of the units is always busy:

    cycles of a block = about max(products, softmax, loads, (products + softmax + waits) / b)

The rates are round numbers from data sheets and papers: the order of tiles is meant, not their times.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from segdeformer.kernels.tiles import WIDEST_NARROW_FORWARD, Architecture, Tile
from segdeformer.kernels.tuning.resources import MATRIX_INSTRUCTIONS, Resources

BLOCKS = (16, 32, 64, 128, 256)
# Float32 accumulators of a thread. On sm_90, 144 to 160 make 200 to 240 of the 255 registers; more spills.
MOST_ACCUMULATORS = 176
LEAST_ACCUMULATORS = 8  # fewer leave a warp without work
CHUNK_COLUMN_BYTES = 128  # of the blocks of columns in `attention_weights_and_grads`
COPYING_KERNELS = ("attention_forward", "external_forward")  # those with a TMA form
OVER_KEYS = ("backward_keys", "backward_values", "keys_and_values")  # a program for each block of keys
COPYING_ARCHITECTURES = ("sm_90", "sm_100")
BASE_REGISTERS = 44  # of a thread, beside accumulators and operands: addresses, row sums, a softmax in hand
WORTHY = 0.5  # of the best score, for the best with so many resident programs to be measured first

EXPONENTIALS = 16  # a cycle of a multiprocessor
SHARED_BYTES = 128  # the same, of reading and writing
LOAD_CYCLES = 700  # from asking L2 or memory to the answer
STEP_CYCLES = 150  # barriers, waits for the last product, reductions over a row
OPERATIONS = 5  # float32, of a score beside its exponential
TENSOR_MEMORY_BYTES = 256  # the same as of shared memory
SMOOTH = 4  # units that are busy nearly all the time wait for one another: between a sum (1) and the maximum


class Target(NamedTuple):
    """A kernel, and the kind of card that it is to run on."""

    kernel: str
    widths: tuple[int, int]  # padded, of keys and of values
    element_bytes: int
    architecture: Architecture
    num_rows: int | None = None  # of the loop's outer side; few of them leave multiprocessors idle

    def blocks(self, tile: Tile) -> tuple[int, int]:
        """Rows of the products, and columns, the side that they are multiplied with."""
        if self.kernel.endswith(OVER_KEYS):
            return tile.block_keys, tile.block_queries
        return tile.block_queries, tile.block_keys


class Work(NamedTuple):
    """What a kernel does with one block of scores, in columns of its operands and accumulators."""

    products: int  # of all products of a q x k block, summed
    held: int  # of the operands that stay on chip
    streamed: int  # of the operands that every block loads anew
    accumulated: int  # of the float32 accumulators, in registers
    blocks: int  # of scores in registers at a time
    reread: int  # of the operands that stay on chip and are read again for every block
    rescaled: int = 0  # of the accumulators that an online softmax shrinks at every step
    stored: int = 0  # how often a block of scores is stored


def work_of(kernel: str, d: int, e: int) -> Work:
    """d, e: padded widths of queries and keys, of values."""
    both = d if kernel.startswith("external") else d + e  # external keys are the values
    match kernel:
        case "attention_forward" | "external_forward":
            return Work(d + e, d, both, e, 1, reread=d, rescaled=e)
        case "attention_forward_few_keys":
            return Work(d + e, both, d, e, 1, reread=0)
        case "attention_backward_queries" | "external_backward_queries":
            return Work(2 * d + e, d + e, both, d, 2, reread=d + e)
        case "attention_backward_keys" | "external_backward_keys":
            return Work(2 * d + e, both, d + e, d, 2, reread=d + e)
        case "attention_backward_values":
            return Work(d + e, d, d + e, e, 1, reread=d)
        case "attention_backward_keys_and_values":
            return Work(2 * d + 2 * e, d + e, d + e, d + e, 2, reread=d + e)
        case "attention_weights_and_grads":
            return Work(d + e, 0, d + e, 0, 2, reread=0, stored=2)
    raise AssertionError(kernel)


class Need(NamedTuple):
    """What a tile of a kernel holds on chip, in elements."""

    resident: int  # operands that stay
    streamed: int  # operands of one stage of the pipeline
    accumulators: int  # float32, in registers


def needs(kernel: str, q: int, k: int, d: int, e: int, element_bytes: int) -> Need:
    """What a program of the kernel holds with blocks of q queries and k keys."""
    work = work_of(kernel, d, e)
    if kernel == "attention_weights_and_grads":  # both sides stream, a block of columns a step
        return Need(0, (q + k) * CHUNK_COLUMN_BYTES // element_bytes, work.blocks * q * k)
    rows, columns = (k, q) if kernel.endswith(OVER_KEYS) else (q, k)
    held, streamed = (columns, rows) if kernel == "attention_forward_few_keys" else (rows, columns)
    accumulators = rows * work.accumulated + work.blocks * q * k
    return Need(held * work.held, streamed * work.streamed, accumulators)


def candidate_tiles(target: Target, default: Tile, *, most: int = 24) -> list[Tile]:
    """The default tile, then others, to be compiled."""
    kernel, widths, element_bytes, architecture, _ = target
    ranked = most_promising(target, _fitting(target, default), most=most)
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
    target: Target,
    tiles: Iterable[Tile],
    *,
    resources: Mapping[Tile, Resources] | None = None,
    most: int = 12,
) -> list[Tile]:
    """The tiles worth running, the fastest by the model first, of each number of resident programs some.

    resources: what the compiler made of them; a tile without is left out. None: as estimated.
    """
    scores: dict[Tile, float] = {}
    classes: dict[Tile, int] = {}
    for tile in tiles:
        needed = estimated_resources(target, tile) if resources is None else resources.get(tile)
        if needed is not None and (score := scores_per_cycle(target, tile, needed)):
            scores[tile] = score
            # 1, 2, 3 to 4, more.
            classes[tile] = min((needed.resident_blocks(target.architecture) - 1).bit_length(), 3)
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


def estimated_resources(target: Target, tile: Tile) -> Resources:
    """About what the compiler will make of a tile."""
    kernel, widths, element_bytes, architecture, _ = target
    need = needs(kernel, tile.block_queries, tile.block_keys, *widths, element_bytes)
    threads = architecture.warp_size * tile.warps
    rows, _ = target.blocks(tile)
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


def _fitting(target: Target, default: Tile) -> Iterator[Tile]:
    """All tiles within the bounds."""
    kernel, widths, element_bytes, architecture, _ = target
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
            needed = estimated_resources(target, tile)
            if needed.shared_bytes <= architecture.shared_bytes:
                yield tile


class Rates(NamedTuple):
    """What a multiprocessor does in a cycle."""

    processors: int  # on the card
    products: int  # multiply-adds of half precision by the card's own matrix instruction
    older_products: int  # by `mma.sync`
    operations: int  # float32
    loaded_bytes: int  # from L2


RATES = {
    "sm_80": Rates(108, 1024, 1024, 64, 28),
    "sm_86": Rates(84, 512, 512, 128, 16),
    "sm_90": Rates(132, 2048, 1280, 128, 28),
    "sm_100": Rates(148, 4096, 1024, 128, 32),
    "gfx942": Rates(304, 1024, 1024, 128, 40),
}


def scores_per_cycle(target: Target, tile: Tile, resources: Resources) -> float:
    """Scores that a multiprocessor gets through in a cycle; 0 where the tile does not fit the card."""
    kernel, widths, element_bytes, architecture, num_rows = target
    resident = resources.resident_blocks(architecture)
    if not resident:
        return 0.0
    rates, work = RATES[architecture.name], work_of(kernel, *widths)
    scores = tile.block_queries * tile.block_keys
    rows, columns = target.blocks(tile)  # one of the two streams
    streamed = rows if kernel == "attention_forward_few_keys" else columns

    share = 1.0  # of the multiprocessors' time in which they have a program
    if kernel == "attention_forward_few_keys":
        resident = 1  # as it is launched: one program for a multiprocessor, which walks
    elif num_rows is not None:
        blocks = math.ceil(num_rows / rows)
        if kernel == "attention_weights_and_grads":
            blocks *= math.ceil(num_rows / columns)
        turns = math.ceil(blocks / rates.processors)
        resident = min(resident, turns)
        share = blocks / (turns * rates.processors)

    products = scores * work.products / _product_rate(resources, architecture, rows)
    loaded = streamed * work.streamed * element_bytes
    if kernel == "attention_weights_and_grads":  # both sides stream, a block of columns a step
        side = _rows_of_group(resources, rows) if rows >= columns else columns
        read = 2 * scores / side * work.products * element_bytes
        loaded += rows * work.streamed * element_bytes
        steps = work.products * element_bytes / SHARED_BYTES
    else:
        # Each group of warps reads the other side for itself; units that read shared memory, their own too.
        read = rows / _rows_of_group(resources, rows) * columns * work.products * element_bytes
        if resources.instruction.startswith(("wgmma", "tcgen05")):
            read += rows * work.reread * element_bytes
        steps = 1.0
    products = max(products, (read + loaded) / SHARED_BYTES)

    spilled = resources.spill_bytes * resources.warps * architecture.warp_size
    softmax = (
        scores / EXPONENTIALS
        + (scores * OPERATIONS + tile.block_queries * work.rescaled) / rates.operations
        + 2 * spilled / SHARED_BYTES  # written and read once a step
    )
    if resources.tensor_columns:  # the accumulators go to registers and back
        softmax += 2 * tile.block_queries * work.rescaled * 4 / TENSOR_MEMORY_BYTES
    loads = (loaded + scores * work.stored * element_bytes) / rates.loaded_bytes
    ahead = (tile.stages - 1) * (products + softmax) / steps
    waits = steps * (STEP_CYCLES + max(0.0, LOAD_CYCLES + loads / steps - ahead))
    bounds = (products, softmax, loads, (products + softmax + waits) / resident)
    return share * scores / sum(bound**SMOOTH for bound in bounds) ** (1 / SMOOTH)


def _product_rate(resources: Resources, architecture: Architecture, rows: int) -> float:
    """Multiply-adds in a cycle."""
    rates = RATES[architecture.name]
    if resources.instruction == "fma":
        return rates.operations
    if not resources.instruction.startswith(MATRIX_INSTRUCTIONS[architecture.name]):
        return rates.older_products
    if resources.instruction.startswith("tcgen05"):
        return rates.products * min(1.0, rows / 128)  # 64 rows take as long as 128
    return rates.products


def _rows_of_group(resources: Resources, rows: int) -> float:
    """Rows that warps multiply with one reading of the other operand."""
    if resources.instruction.startswith("tcgen05"):
        return rows  # the unit reads shared memory itself, once for all
    if resources.instruction.startswith("wgmma"):
        return max(64.0, rows / max(1, resources.warps // 4))
    return max(16.0, rows / resources.warps)

"""How fast a tile may run on a card, from what the compiler made of it, without running it.

For one block of q x k scores a program keeps the matrix units busy for `products` cycles (or the shared
memory that feeds them), the others for `softmax` (the exponentials first of all), and the way from L2 for
`loads`. A program alone goes through its products and its softmax one after the other. b programs that are
resident on a multiprocessor fill one another's waits, until one of the units is always busy:

    cycles of a block = about max(products, softmax, loads, (products + softmax + waits) / b)

The rates are round numbers from data sheets and papers: the order of tiles is meant, not their times.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from segdeformer.kernels.resources import MATRIX_INSTRUCTIONS, Resources
from segdeformer.kernels.tiles import Architecture, Tile

EXPONENTIALS = 16  # a cycle of a multiprocessor
SHARED_BYTES = 128  # the same, of reading and writing
LOAD_CYCLES = 700  # from asking L2 or memory to the answer
STEP_CYCLES = 150  # barriers, waits for the last product, reductions over a row
OPERATIONS = 5  # float32, of a score beside its exponential
TENSOR_MEMORY_BYTES = 256  # the same as of shared memory
SMOOTH = 4  # units that are busy nearly all the time wait for one another: between a sum (1) and the maximum


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


class Work(NamedTuple):
    """A kernel's work on one block of scores, in columns."""

    products: int  # of all products of a q x k block, summed
    resident: int  # of the operands that stay on chip and are read again for every block
    streamed: int  # of the operands that every block loads anew
    rescaled: int = 0  # of the accumulators that an online softmax shrinks at every step
    stored: int = 0  # how often a block of scores is stored


def work_of(kernel: str, d: int, e: int) -> Work:
    """d, e: padded widths of queries and keys, of values."""
    both = d if kernel.startswith("external") else d + e  # external keys are the values
    match kernel:
        case "attention_forward" | "external_forward":
            return Work(d + e, d, both, rescaled=e)
        case "attention_forward_few_keys":
            return Work(d + e, 0, d)
        case "attention_backward_queries" | "external_backward_queries":
            return Work(2 * d + e, d + e, both)
        case "attention_backward_keys" | "external_backward_keys":
            return Work(2 * d + e, d + e, d + e)
        case "attention_backward_values":
            return Work(d + e, d, d + e)
        case "attention_backward_keys_and_values":
            return Work(2 * d + 2 * e, d + e, d + e)
        case "attention_weights_and_grads":
            return Work(d + e, 0, d + e, stored=2)
    raise AssertionError(kernel)


def scores_per_cycle(
    kernel: str,
    tile: Tile,
    widths: tuple[int, int],
    element_bytes: int,
    architecture: Architecture,
    resources: Resources,
    *,
    num_rows: int | None = None,
) -> float:
    """Scores that a multiprocessor gets through in a cycle; 0 where the tile does not fit the card.

    num_rows: of the loop's outer side; few of them leave multiprocessors idle, or with one program each.
    """
    resident = resources.resident_blocks(architecture)
    if not resident:
        return 0.0
    rates, work = RATES[architecture.name], work_of(kernel, *widths)
    scores = tile.block_queries * tile.block_keys
    # Rows of the products, and the side that they are multiplied with; one of the two streams.
    rows, columns = tile.block_queries, tile.block_keys
    if kernel.endswith(("backward_keys", "backward_values", "keys_and_values")):
        rows, columns = columns, rows
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
            read += rows * work.resident * element_bytes
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

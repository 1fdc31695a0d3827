"""Choose kernels/tuned/defaults.json: safe tiles for cards on which nothing was measured.

    python benchmarks/choose_tiles.py [--only sm_90 ...]

Of each kernel's candidates, in the order of their promise, the first that fits the card's shared memory
and does not spill, as the compiler says; failing that the one that spills least. No GPU is involved.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
from typing import NamedTuple

from aot import KERNELS, Case, class_widths, compile_case, main_widths

from segdeformer.kernels.tiles import ARCHITECTURES, TUNED, Architecture, Tile, padded_width

SPILL_BYTES = 16  # a chosen tile may spill this much
SLOW_PATH_BYTES = 64  # of spills are as bad as Ampere's matrix instructions on Hopper


def candidates(kernel: str, width: int, element_bytes: int) -> list[Tile]:
    """Tiles worth a try, the most promising first."""
    few_keys = kernel == "attention_forward_few_keys"
    never = [Tile(16, 0, 4, 1)] if few_keys else []
    if element_bytes == 4:
        shapes = [(32, 64), (32, 32)] if few_keys else [(64, 32), (32, 32), (32, 16), (16, 32), (16, 16)]
        return [Tile(q, k, w, 1) for q, k in shapes for w in (8, 4)] + never
    if few_keys:
        shapes = [(q, k) for k in (256, 128, 64) for q in (64, 32)]
        return [Tile(q, k, w, 2) for q, k in shapes for w in (8, 4)] + never
    if kernel == "attention_weights_and_grads":
        shapes = [(128, 128), (128, 64), (64, 64), (32, 32)]
        return [Tile(q, k, w, s) for q, k in shapes for w in (8, 4) for s in (3, 2)]
    stages = (3, 2, 1) if width <= 256 else (2, 1)
    if kernel.endswith(("forward", "queries")):
        shapes = [
            (128, 128),
            (128, 64),
            (64, 64),
            (128, 32),
            (64, 32),
            (32, 64),
            (32, 32),
            (32, 16),
            (16, 16),
        ]
    else:
        shapes = [(64, 128), (32, 128), (64, 64), (32, 64), (64, 32), (32, 32), (16, 32), (16, 16)]
    return [Tile(q, k, w, s) for q, k in shapes for s in stages for w in ((8, 4) if q * k > 1024 else (4,))]


def hopeless(architecture: Architecture, kernel: str, width: int, element_bytes: int, tile: Tile) -> bool:
    """Whether a tile cannot fit, by what it must at least hold at a time; spares its compilation."""
    operands = 1 if kernel == "external_forward" else 2
    if kernel == "attention_forward_few_keys":
        rows, walked, accumulators = tile.block_queries, tile.block_keys, 1
    elif kernel.endswith(("forward", "queries")):
        rows, walked, accumulators = tile.block_queries, tile.block_keys * max(1, tile.stages - 1), 1
    elif kernel == "attention_weights_and_grads":
        return False
    else:
        rows, walked = tile.block_keys, tile.block_queries * max(1, tile.stages - 1)
        accumulators = 2 if kernel.endswith("keys_and_values") else 1
    shared_bytes = walked * operands * width * element_bytes
    held = (rows * width * accumulators + tile.block_queries * tile.block_keys) // (32 * tile.warps)
    registers = 512 if architecture.backend == "hip" else 255  # sm_100 accumulates elsewhere
    return shared_bytes > architecture.shared_bytes or (architecture.name != "sm_100" and held > registers)


class Wanted(NamedTuple):
    """A tile to choose."""

    architecture: str
    kernel: str
    width: int  # as the model has it: an odd one takes more registers than its padded class
    value_width: int
    element_bytes: int


def choose(wanted: Wanted) -> tuple[Wanted, Tile, int]:
    """The first candidate that fits, does not spill, and uses the card's own matrix instructions.

    Failing that the one that spills least.
    """
    architecture, kernel, width, value_width, element_bytes = wanted
    least: tuple[int, Tile] | None = None
    for tile in candidates(kernel, max(width, value_width), element_bytes):
        if not tile.block_keys:  # too few keys fit to be worth a kernel
            return wanted, tile, 0
        if hopeless(ARCHITECTURES[architecture], kernel, min(width, value_width), element_bytes, tile):
            continue
        compiled = compile_case(Case(kernel, width, value_width, element_bytes, architecture, tile))
        if isinstance(compiled, str) or not compiled.fits:
            continue
        slow = architecture == "sm_90" and element_bytes == 2 and "wgmma" not in compiled.instruction
        cost = compiled.spill_bytes + SLOW_PATH_BYTES * slow
        if least is None or cost < least[0]:
            least = cost, tile
        if cost <= SPILL_BYTES:
            break
    assert least is not None, wanted
    return wanted, least[1], least[0]


def choose_defaults(architectures: list[str], *, main_only: bool) -> None:
    """Write these cards' part of `defaults.json`, or only the tiles of the decoder's own widths."""
    path = TUNED / "defaults.json"
    table = json.loads(path.read_text()) if path.exists() else {}
    wanted = []
    for architecture in architectures:
        for kernel in KERNELS:
            classes = class_widths(kernel)
            main = main_widths(kernel)
            widths = main if main_only else [*((w, w) for w in classes), *main]
            wanted += [
                Wanted(architecture, kernel, *w, size) for w in dict.fromkeys(widths) for size in (2, 4)
            ]
        if not main_only:
            table[architecture] = {}
    with multiprocessing.Pool(os.cpu_count()) as pool:
        for case, tile, cost in pool.imap(choose, wanted):
            print(f"{case}: {tile}, cost {cost}", flush=True)
            by_width = table[case.architecture].setdefault(case.kernel, {})
            place = f"{padded_width(case.width)}x{padded_width(case.value_width)}"
            by_width.setdefault(place, {})[str(case.element_bytes)] = tile
    text = json.dumps(table, indent=1)
    path.write_text(re.sub(r"\[\s+([^]]*?)\s+\]", _one_line, text) + "\n")


def _one_line(found: re.Match[str]) -> str:
    return "[" + " ".join(found.group(1).split()) + "]"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=list(ARCHITECTURES), default=list(ARCHITECTURES))
    parser.add_argument("--main", action="store_true", help="only the decoder's own widths")
    chosen = parser.parse_args()
    choose_defaults(chosen.only, main_only=chosen.main)

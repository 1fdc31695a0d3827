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

from aot import KERNELS, Case, class_widths, compile_case

from segdeformer.kernels.tiles import ARCHITECTURES, TUNED, Architecture, Tile

SPILL_BYTES = 16  # a chosen tile may spill this much


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


def choose(arguments: tuple[str, str, int, int]) -> tuple[tuple[str, str, int, int], Tile, int]:
    """The first candidate that fits and does not spill; failing that the one that spills least."""
    architecture, kernel, width, element_bytes = arguments
    least: tuple[int, Tile] | None = None
    for tile in candidates(kernel, width, element_bytes):
        if not tile.block_keys:  # too few keys fit to be worth a kernel
            return arguments, tile, 0
        if hopeless(ARCHITECTURES[architecture], kernel, width, element_bytes, tile):
            continue
        compiled = compile_case(Case(kernel, width, width, element_bytes, architecture, tile))
        if isinstance(compiled, str) or not compiled.fits:
            continue
        if least is None or compiled.spill_bytes < least[0]:
            least = compiled.spill_bytes, tile
        if compiled.spill_bytes <= SPILL_BYTES:
            break
    assert least is not None, arguments
    return arguments, least[1], least[0]


def choose_defaults(architectures: list[str]) -> None:
    """Write these cards' part of `defaults.json`."""
    wanted = [
        (architecture, kernel, width, element_bytes)
        for architecture in architectures
        for kernel in KERNELS
        for width in class_widths(kernel)
        for element_bytes in (2, 4)
    ]
    path = TUNED / "defaults.json"
    table = json.loads(path.read_text()) if path.exists() else {}
    table |= {architecture: {} for architecture in architectures}
    with multiprocessing.Pool(os.cpu_count()) as pool:
        for (architecture, kernel, width, element_bytes), tile, spill in pool.imap(choose, wanted):
            print(
                f"{architecture} {kernel} {width} {element_bytes} bytes: {tile}, {spill} B spilled",
                flush=True,
            )
            by_width = table[architecture].setdefault(kernel, {})
            by_width.setdefault(str(width), {})[str(element_bytes)] = tile
    text = json.dumps(table, indent=1)
    path.write_text(re.sub(r"\[\s+([^]]*?)\s+\]", _one_line, text) + "\n")


def _one_line(found: re.Match[str]) -> str:
    return "[" + " ".join(found.group(1).split()) + "]"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=list(ARCHITECTURES), default=list(ARCHITECTURES))
    choose_defaults(parser.parse_args().only)

"""Block shapes of the Triton kernels: measured ones per GPU, safe ones for every other card.

`tuned/defaults.json` holds, per architecture, tiles that compile within the card's shared memory without
spills to speak of; `benchmarks/choose_tiles.py` wrote it, `aot.py` there proves it. `tuned/<gpu>.json`
holds what `segdeformer bench --tune` measured on one GPU; files in the user's cache folder come before ours:

    {"gpu": "NVIDIA H200", "architecture": "sm_90", "torch": ..., "triton": ..., "commit": ..., "date": ...,
     "tiles": {kernel: {"256x160": {"2": {"14": [queries, keys, warps, stages, tma, warp_specialize]}}}},
     "backward": {"256x160": {"2": "fused" or "chunks"}},
     "choices": [the fields of `choices.Choice`], "sources": a digest of the kernels that were measured,
     "candidates": what became of every tile that was tried}

Widths in keys are padded ones, "2" and "4" are bytes of an element, "14" is a size class; older files have
one tile for all sizes in its place.
"""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from segdeformer.errors import UserError

WIDTHS = (64, 128, 192, 256, 512)  # classes of the default tiles: the wider of keys and values, rounded up
LARGEST_WIDTH = WIDTHS[-1]
# Widest keys or values whose backward makes P and dS on chip, three times over; wider ones write both, a
# chunk of queries at a time, for matrix products. On Hopper 256 columns leave its wide instructions too few
# registers.
WIDEST_FUSED_BACKWARD = 256
FUSED_BACKWARD_BY_DEFAULT = {"sm_90": 192}
WIDEST_NARROW_FORWARD = 32  # columns of P up to which exponentials outweigh products
TUNED = Path(__file__).parent / "tuned"


class Tile(NamedTuple):
    """How a kernel cuts its work."""

    block_queries: int
    block_keys: int
    warps: int
    stages: int  # depth of the software pipeline
    tma: bool = False  # Hopper's bulk copies instead of cp.async
    warp_specialize: bool = False
    polynomial: bool = False  # every fourth exponential by a polynomial; narrow external forwards only

    def __str__(self) -> str:
        extras = "".join(f", {name}" for name in self._fields[4:] if getattr(self, name))
        return f"{self.block_queries}x{self.block_keys}, {self.warps} warps, {self.stages} stages{extras}"


class Architecture(NamedTuple):
    """A kind of card: what one program may use, and what a multiprocessor has for all that run on it."""

    name: str
    shared_bytes: int  # shared memory that one program may use
    backend: str
    warp_size: int
    processor_shared_bytes: int
    processor_registers: int  # of 32 bits
    processor_warps: int
    processor_blocks: int
    tensor_columns: int = 0  # of Blackwell's tensor memory, where its products accumulate

    def resident_blocks(
        self, *, registers: int, shared_bytes: int, warps: int, tensor_columns: int = 0
    ) -> int:
        """How many programs run on a multiprocessor at a time; 0 where not even one does.

        registers of a thread; the rest of a program.
        """
        if shared_bytes > self.shared_bytes or tensor_columns > self.tensor_columns:
            return 0
        reserved = RESERVED_SHARED_BYTES if self.backend == "cuda" else 0
        # A warp stays in one of four partitions, which hands registers out in eights per thread.
        of_warp = -(-max(registers, 1) // 8) * 8 * self.warp_size
        warps_with_registers = 4 * (self.processor_registers // 4 // of_warp)
        limits = [
            self.processor_blocks,
            min(self.processor_warps, warps_with_registers) // warps,
            self.processor_shared_bytes // max(shared_bytes + reserved, 1),
        ]
        if tensor_columns:  # handed out in powers of two
            limits.append(self.tensor_columns // (1 << (tensor_columns - 1).bit_length()))
        return min(limits)


RESERVED_SHARED_BYTES = 1024  # CUDA's own, of every program from sm_80 on
ARCHITECTURES = {
    card.name: card
    for card in (
        Architecture("sm_80", 163 * 1024, "cuda", 32, 164 * 1024, 65536, 64, 32),
        Architecture("sm_86", 99 * 1024, "cuda", 32, 100 * 1024, 65536, 48, 16),
        Architecture("sm_90", 227 * 1024, "cuda", 32, 228 * 1024, 65536, 64, 32),
        Architecture("sm_100", 227 * 1024, "cuda", 32, 228 * 1024, 65536, 64, 32, tensor_columns=512),
        Architecture("gfx942", 64 * 1024, "hip", 64, 64 * 1024, 131072, 32, 16),
    )
}


@functools.cache
def split_width(width: int) -> tuple[int, int]:
    """The least sum of two powers of two from 16 on that covers a width; the second is 0 where one does.

    150 gives (128, 32), 171 (128, 64), 19 (32, 0).
    """
    assert width <= LARGEST_WIDTH
    powers = (16, 32, 64, 128, 256, 512)
    covers = [(first, 0) for first in powers] + [(a, b) for a in powers for b in powers if b < a]
    return min((c for c in covers if sum(c) >= width), key=lambda c: (sum(c), c[1]))


def padded_width(width: int) -> int:
    """A width with its padding."""
    return sum(split_width(width))


def architecture_of(device: torch.device) -> Architecture:
    """The kind of card whose default tiles are safe on this device.

    Raises `UserError` for NVIDIA cards before compute capability 8.0.
    """
    if device.type != "cuda":
        return ARCHITECTURES["sm_90"]  # Triton's interpreter, which takes any tile
    if torch.version.hip is not None:
        return ARCHITECTURES["gfx942"]  # its tiles are small enough for other AMD cards too
    properties: Any = torch.cuda.get_device_properties(device)  # its stub leaves fields out
    shared, major = properties.shared_memory_per_block_optin, properties.major
    if shared >= ARCHITECTURES["sm_90"].shared_bytes:
        return ARCHITECTURES["sm_100" if major >= 10 else "sm_90"]
    if major < 8:
        raise UserError(
            f"impl `triton` needs an NVIDIA GPU of compute capability 8.0 or newer, {properties.name} has "
            f"{major}.{properties.minor}, for which Triton has no matrix instructions; use --impl sdpa"
        )
    return ARCHITECTURES["sm_80" if shared >= ARCHITECTURES["sm_80"].shared_bytes else "sm_86"]


def size_class(size: int) -> int:
    """The step of a problem's size on a scale of factors of four, round(log4(size)).

    14 holds the sizes from 2^27 to 2^29, among them the 16384 x 16384 scores of a 512x512 image.
    """
    return size.bit_length() // 2


def choose_tile(
    kernel: str,
    width: int,
    value_width: int,
    element_bytes: int,
    device: torch.device,
    *,
    num_scores: int | None = None,
) -> Tile:
    """The measured tile for these padded widths on this GPU, else the default of its architecture.

    num_scores: B N M, where tiles were measured for several sizes; None: the largest.
    """
    if device.type == "cuda":
        measured = tuned_for(device).get("tiles", {}).get(kernel, {}).get(f"{width}x{value_width}", {})
        if str(element_bytes) in measured:
            return _measured_tile(measured[str(element_bytes)], num_scores)
    return default_tile(kernel, width, value_width, element_bytes, architecture_of(device))


def _measured_tile(entry: list[Any] | dict[str, list[Any]], num_scores: int | None) -> Tile:
    """Of tiles by size class the nearest class's, of two as near the smaller one's."""
    if isinstance(entry, list):
        return Tile(*entry)
    classes = sorted(map(int, entry))
    if num_scores is None:
        return Tile(*entry[str(classes[-1])])
    wanted = size_class(num_scores)
    return Tile(*entry[str(min(classes, key=lambda c: abs(c - wanted)))])


def backward_form(queries: torch.Tensor, values: torch.Tensor) -> str:
    """`fused` or `chunks`: as measured on this GPU, else by the widths and the kind of card."""
    width, value_width = queries.shape[2], values.shape[2]
    if queries.device.type == "cuda":
        measured = tuned_for(queries.device).get("backward", {}).get(f"{width}x{value_width}", {})
        if str(queries.element_size()) in measured:
            return str(measured[str(queries.element_size())])
    widest = FUSED_BACKWARD_BY_DEFAULT.get(architecture_of(queries.device).name, WIDEST_FUSED_BACKWARD)
    return "chunks" if max(width, value_width) > widest else "fused"


def default_tile(
    kernel: str, width: int, value_width: int, element_bytes: int, architecture: Architecture
) -> Tile:
    """The tile of `defaults.json` for these widths, or for the least class that covers both."""
    table = read_tiles(TUNED / "defaults.json")[architecture.name][kernel]
    place = f"{width}x{value_width}"
    size = str(element_bytes)
    if size not in table.get(place, {}):
        wider = (f"{w}x{w}" for w in WIDTHS if w >= max(width, value_width))
        place = next(place for place in wider if size in table.get(place, {}))
    return Tile(*table[place][size])


@functools.cache
def tuned_for(device: torch.device) -> dict[str, Any]:
    """What was measured on this GPU, the user's own measurements first; empty if nothing was."""
    name = f"{gpu_slug(torch.cuda.get_device_name(device))}.json"
    for folder in (user_tuned(), TUNED):
        if (folder / name).is_file():
            return read_tiles(folder / name)
    return {}


def user_cache() -> Path:
    """Where this user's machine keeps what it found out about itself."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "segdeformer"


def user_tuned() -> Path:
    """Where `segdeformer bench --tune` keeps this user's measurements."""
    return user_cache() / "tuned"


def gpu_slug(name: str) -> str:
    """A file name for a GPU: `NVIDIA H200` gives `nvidia_h200`."""
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")


def forget_tables() -> None:
    """Read the tile files again when they are next asked for."""
    read_tiles.cache_clear()
    tuned_for.cache_clear()


@functools.cache
def read_tiles(path: Path) -> dict[str, Any]:
    """A tile file, read once; raises `UserError` when it is damaged."""
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path} is not valid JSON ({error}); delete it and run `segdeformer bench --tune`"
        ) from None


def read_table(path: Path, header: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON file with this header; nothing if it is absent, damaged or of another: it is made again."""
    try:
        table = json.loads(path.read_text("utf-8"))
        return table if header.items() <= table.items() else {}
    except (OSError, ValueError, AttributeError):
        return {}


def rows_in_lines(table: dict[str, Any]) -> str:
    """As JSON, its lists of numbers in a line each."""
    return re.sub(r"\[\s+([^][{}]*?)\s+\]", _one_line, json.dumps(table, indent=1)) + "\n"


def _one_line(found: re.Match[str]) -> str:
    return "[" + " ".join(found.group(1).split()) + "]"

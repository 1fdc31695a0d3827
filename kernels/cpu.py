"""Which attention is the faster on this CPU without gradients: `blocks` through oneDNN, or PyTorch's own.

What wins on one machine loses on the next. So a command compares them when a kind of call is first met, in a
fraction of a second, once for each machine and PyTorch; the answer is kept in the user's cache. Where no
command asks for it, nothing is measured.

D key width, E value width, N queries, M keys.
"""

from __future__ import annotations

import functools
import platform
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from segdeformer.cores import num_cores
from segdeformer.errors import count
from segdeformer.files import WriteError, write_json
from segdeformer.kernels.attention.blocks import BLOCK_COLUMNS, attention_blocks
from segdeformer.kernels.attention.sdpa import attention_sdpa
from segdeformer.kernels.tiles import read_table, user_cache

QUERIES, MOST_KEYS = 1024, 4096  # that stand for all: both ways take blocks of them
ROUNDS = 3

_say: Callable[[str], None] | None = None


def cpu_name() -> str:
    """The processor's name and how many cores this process may use."""
    about = Path("/proc/cpuinfo")
    lines = about.read_text("utf-8").splitlines() if about.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    return f"{name}, {count(num_cores(), 'core')}"


def kind_of(width: int, value_width: int, num_keys: int) -> str:
    """What is measured once: widths, and whether all keys are one block."""
    return f"{width} and {value_width} wide, {'few' if num_keys <= BLOCK_COLUMNS else 'many'} keys"


def speedups() -> dict[str, float]:
    """How many times as fast as PyTorch's `blocks` was, by kind of call, as measured here before."""
    return _read(torch.get_num_threads())


@functools.cache
def _read(threads: int) -> dict[str, float]:
    """In this process the dictionary grows with what it measures."""
    return dict(read_table(_path(), _header(threads)).get("speedups", {}))


def _path() -> Path:
    return user_cache() / "cpu.json"


def _header(threads: int) -> dict[str, Any]:
    return {"cpu": cpu_name(), "threads": threads, "torch": torch.__version__}


def measure_when_asked(say: Callable[[str], None] | None) -> None:
    """From now on compare kinds of calls of which nothing is known, and say so; None: no more."""
    global _say
    _say = say


def blocks_are_faster(width: int, value_width: int, num_keys: int) -> bool:
    """As measured here; where it was not, and no command wants it to be, yes."""
    kind = kind_of(width, value_width, num_keys)
    known = speedups()
    # Inside a dispatch mode, as where shapes alone are followed, nothing can be timed.
    if kind not in known and _say is not None and torch._C._len_torch_dispatch_stack() == 0:
        speedup = _speedup(width, value_width, num_keys)
        known |= {kind: speedup}
        winner, loser = ("blocks", "sdpa") if speedup >= 1 else ("sdpa", "blocks")
        times = f"{max(speedup, 1 / speedup):.2f} times as fast as {loser} on this CPU"
        _say(f"auto: attention, {kind}: {winner}, {times}{_keep(known)}")
    return known.get(kind, 1.0) >= 1.0


# torch.compile takes the answer as it stands, and does not look into files (see impl._switches).
blocks_are_faster._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _keep(known: Mapping[str, float]) -> str:
    """Write the file anew; what to say if that cannot be."""
    try:
        write_json(_path(), {**_header(torch.get_num_threads()), "speedups": dict(known)})
    except WriteError as error:
        return f" (not kept for the next time: {error.reason})"
    return ""


@torch.inference_mode()
def _speedup(width: int, value_width: int, num_keys: int) -> float:
    """The ratio of the best times of both, in turn; about 0.3 s on a slow machine."""
    num_keys = min(num_keys, MOST_KEYS)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(1, rows, columns, generator=generator)
        for rows, columns in ((QUERIES, width), (num_keys, width), (num_keys, value_width))
    )
    ways = {"sdpa": attention_sdpa, "blocks": attention_blocks}
    best = dict.fromkeys(ways, float("inf"))
    for _ in range(1 + ROUNDS):  # the first one warms up; it is not the best
        for name, attend in ways.items():
            began = time.perf_counter()
            attend(q, k, v, scale=width**-0.5)
            best[name] = min(best[name], time.perf_counter() - began)
    return best["sdpa"] / best["blocks"]

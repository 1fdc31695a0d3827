"""The machine that is measured: the one place where a GPU and a rehearsal on a CPU differ."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
import triton

from segdeformer.commit import commit
from segdeformer.kernels.launch import interpreting, kernel_sources
from segdeformer.kernels.tiles import architecture_of, gpu_slug, tuned_for
from segdeformer.kernels.tuning.clock import synchronize
from segdeformer.kernels.tuning.crew import PATIENCE_S, stage

RESULTS = Path(__file__).parent / "results"
MATMUL_SIZE = 8192
COPY_BYTES = 2 * 2**30
MOST_ROUNDS = 50
LEAST_ROUNDS = 5
MOST_FLUSHES = 200  # the driver's queue holds about a thousand launches


class Machine(NamedTuple):
    """A GPU, or a CPU that rehearses with tiny shapes."""

    device: torch.device
    name: str
    dtypes: tuple[torch.dtype, ...]  # to check
    halves: tuple[torch.dtype, ...]  # to time, the more common first
    most_pixels: int | None  # None: as many as the decoder has

    @property
    def slug(self) -> str:
        return gpu_slug(self.name)

    @property
    def is_rehearsal(self) -> bool:
        return self.device.type != "cuda"


def this_machine() -> Machine:
    """The first CUDA GPU; in Triton's interpreter the CPU. Ends the program with code 2 without either."""
    if interpreting():
        halves = (torch.float16,)  # the interpreter multiplies bfloat16 wrongly
        return Machine(torch.device("cpu"), "interpreter", (torch.float16, torch.float32), halves, 48)
    if not torch.cuda.is_available():
        print(
            "error: PyTorch sees no CUDA GPU here; --interpret rehearses the code on a CPU (no measurement)",
            file=sys.stderr,
        )
        sys.exit(2)
    device = torch.device("cuda", 0)
    halves = (torch.bfloat16, torch.float16)
    architecture_of(device)  # refuses cards that the kernels cannot run on
    return Machine(device, torch.cuda.get_device_name(device), (*halves, torch.float32), halves, None)


def header(machine: Machine) -> dict[str, object]:
    """What a measurement belongs to; results of another header are never mixed with these."""
    hardware: dict[str, object] = {"name": machine.name}
    if not machine.is_rehearsal:
        properties = torch.cuda.get_device_properties(machine.device)
        hardware |= {
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_gib": round(properties.total_memory / 2**30, 1),
        }
    return {
        "hardware": hardware,
        "versions": {"torch": torch.__version__, "triton": triton.__version__, "cuda": torch.version.cuda},
        "commit": commit(),
        "sources": kernel_sources(),
    }


class Timing(NamedTuple):
    """Medians of a call, each after a flush of the L2 cache."""

    ms: float  # queued: of the device alone, the host is ahead of it
    eager_ms: float  # one call at a time, until the device is done: the host's work counts


def timings(
    runs: Mapping[str, Callable[[], object]], machine: Machine, *, seconds: float
) -> dict[str, Timing]:
    """Both times of each, all in turn, so that drift hits all alike; for about so many seconds each way."""
    if machine.is_rehearsal:
        return {name: Timing(ms, ms) for name, ms in ((name, _wall_ms(run)) for name, run in runs.items())}
    flush = torch.empty(256 * 2**20, dtype=torch.int8, device=machine.device)

    def queued_round(num_flushes: int) -> dict[str, tuple[torch.cuda.Event, torch.cuda.Event]]:
        events = {}
        for _ in range(num_flushes):  # work for the device, while the host queues the rest
            flush.zero_()
        for name, run in runs.items():
            flush.zero_()
            began, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            began.record()
            run()
            ended.record()
            events[name] = began, ended
        return events

    def eager_round() -> dict[str, float]:
        times = {}
        for name, run in runs.items():
            flush.zero_()
            synchronize(machine.device)
            times[name] = _wall_ms(lambda run=run: (run(), synchronize(machine.device)))
        return times

    def seconds_of(call: Callable[[], object]) -> float:
        return max(1e-6, _wall_ms(lambda: (call(), synchronize(machine.device))) / 1000)

    stage("timed in turn", 20 * seconds + PATIENCE_S)
    queued_round(1)  # warm-up
    synchronize(machine.device)
    host_s = max(1e-6, _wall_ms(lambda: queued_round(0)) / 1000)
    synchronize(machine.device)
    num_flushes = min(MOST_FLUSHES, math.ceil(1.5 * host_s / seconds_of(flush.zero_)))
    queued = _num_rounds(seconds, seconds_of(lambda: queued_round(num_flushes)))
    rounds = [queued_round(num_flushes) for _ in range(queued)]
    synchronize(machine.device)
    eager = [eager_round() for _ in range(_num_rounds(seconds, seconds_of(eager_round)))]
    return {
        name: Timing(
            statistics.median(began.elapsed_time(ended) for began, ended in (r[name] for r in rounds)),
            statistics.median(times[name] for times in eager),
        )
        for name in runs
    }


def _num_rounds(seconds: float, round_s: float) -> int:
    return min(max(round(seconds / round_s), LEAST_ROUNDS), MOST_ROUNDS)


def _wall_ms(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    return 1000 * (time.perf_counter() - began)


def tiles_digest(machine: Machine, widths: tuple[int, int] | None = None) -> str:
    """Which measured tiles operations of these padded widths run with, in short; of all widths for None."""
    if machine.is_rehearsal:
        return ""
    table, key = tuned_for(machine.device), None if widths is None else "{}x{}".format(*widths)
    by_kernel = {**table.get("tiles", {}), "backward": table.get("backward", {})}
    used = {name: of if key is None else of.get(key) for name, of in by_kernel.items()}
    return hashlib.sha256(json.dumps(used, sort_keys=True).encode()).hexdigest()[:12]


def short(number: float) -> float:
    """Four digits, as many as a measurement is worth."""
    return float(f"{number:.4g}")


def peak_mib(run: Callable[[], object], machine: Machine) -> float | None:
    """The allocator's peak during a call, above what was there before; None without a GPU."""
    if machine.is_rehearsal:
        run()
        return None
    torch.cuda.synchronize(machine.device)
    before = torch.cuda.memory_allocated(machine.device)
    torch.cuda.reset_peak_memory_stats(machine.device)
    run()
    torch.cuda.synchronize(machine.device)
    return (torch.cuda.max_memory_allocated(machine.device) - before) / 2**20


def free_bytes(machine: Machine) -> int:
    """Memory that a measurement may take."""
    if machine.is_rehearsal:
        return 2**30
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(machine.device)[0]


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fresh tensors hold NaN, so that an element which a kernel leaves out shows."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of operations that have no deterministic form
        torch.use_deterministic_algorithms(True, warn_only=True)  # this mode fills new memory
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(False)


def ceilings(machine: Machine) -> dict[str, float]:
    """This machine's own limits: a large matrix product of each half precision, and a copy in memory."""
    size = 64 if machine.is_rehearsal else MATMUL_SIZE
    num_bytes = min(COPY_BYTES, free_bytes(machine) // 4)
    generator = torch.Generator(machine.device).manual_seed(0)
    found = {}
    for dtype in machine.halves:
        left, right = (
            torch.randn(size, size, generator=generator, device=machine.device).to(dtype) for _ in range(2)
        )
        name = str(dtype).removeprefix("torch.")
        ms = timings({"mm": lambda a=left, b=right: a @ b}, machine, seconds=0.3)["mm"].ms
        found[f"matmul_tflops_{name}"] = short(2 * size**3 / ms / 1e9)
    if machine.is_rehearsal:
        num_bytes = 2**20
    source = torch.randint(0, 100, (num_bytes,), dtype=torch.uint8, device=machine.device)
    target = torch.empty_like(source)
    ms = timings({"copy": lambda: target.copy_(source)}, machine, seconds=0.3)["copy"].ms
    found["copy_gb_per_s"] = short(2 * num_bytes / ms / 1e6)
    return found

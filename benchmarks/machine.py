"""The machine that is measured: the one place where a GPU and a rehearsal on a CPU differ."""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
import triton

from segdeformer.kernels.clock import synchronize
from segdeformer.kernels.commit import commit
from segdeformer.kernels.launch import interpreting
from segdeformer.kernels.tiles import architecture_of, gpu_slug
from segdeformer.kernels.tuned_file import kernel_sources

RESULTS = Path(__file__).parent / "results"
MATMUL_SIZE = 8192
COPY_BYTES = 2 * 2**30
MOST_ROUNDS = 50
LEAST_ROUNDS = 5


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


def section_arguments(description: str | None) -> argparse.Namespace:
    """The command line that every section of `make gpu` has."""
    parser = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for GPU/DATE.json and .md")
    parser.add_argument("--seconds", type=float, default=200.0, help="stop after about so long")
    parser.add_argument("--interpret", action="store_true", help="rehearse on a CPU, tiny, without a GPU")
    arguments = parser.parse_args()
    if arguments.interpret and arguments.out == RESULTS:
        parser.error("--interpret measures nothing: give it an --out of its own")
    return arguments


def alternating_ms(
    runs: Mapping[str, Callable[[], object]], machine: Machine, *, seconds: float
) -> dict[str, float]:
    """Median milliseconds of each, all in turn, so that drift hits all alike; a cold L2 cache before each."""
    if machine.is_rehearsal:
        return {name: _wall_ms(run) for name, run in runs.items()}
    flush = torch.empty(256 * 2**20, dtype=torch.int8, device=machine.device)

    def one_round() -> dict[str, tuple[torch.cuda.Event, torch.cuda.Event]]:
        events = {}
        for name, run in runs.items():
            flush.zero_()
            began, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            began.record()
            run()
            ended.record()
            events[name] = began, ended
        return events

    began_at = time.monotonic()
    one_round()  # warm-up
    synchronize(machine.device)
    num_rounds = round(seconds / max(time.monotonic() - began_at, 1e-6))
    rounds = [one_round() for _ in range(min(max(num_rounds, LEAST_ROUNDS), MOST_ROUNDS))]
    synchronize(machine.device)
    return {
        name: statistics.median(began.elapsed_time(ended) for began, ended in (r[name] for r in rounds))
        for name in runs
    }


def _wall_ms(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    return 1000 * (time.perf_counter() - began)


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
        ms = alternating_ms({"mm": lambda a=left, b=right: a @ b}, machine, seconds=0.5)["mm"]
        found[f"matmul_tflops_{name}"] = short(2 * size**3 / ms / 1e9)
    if machine.is_rehearsal:
        num_bytes = 2**20
    source = torch.randint(0, 100, (num_bytes,), dtype=torch.uint8, device=machine.device)
    target = torch.empty_like(source)
    ms = alternating_ms({"copy": lambda: target.copy_(source)}, machine, seconds=0.5)["copy"]
    found["copy_gb_per_s"] = short(2 * num_bytes / ms / 1e6)
    return found

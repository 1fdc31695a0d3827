"""Which device runs, and how much memory it took."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from segdeformer.errors import LocalError, UsageError


def choose_device(name: str) -> torch.device:
    """`auto` (a GPU if there is one), `cpu`, `cuda` or `cuda:N`; raises `UsageError` otherwise."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"device is `{name}`; expected auto, cpu, cuda or cuda:N") from None
    if device.type == "cpu":
        return device
    if device.type != "cuda":
        raise UsageError(f"device is `{name}`; expected auto, cpu, cuda or cuda:N")
    if not torch.cuda.is_available():
        raise UsageError(f"device is `{name}`, but PyTorch sees no CUDA GPU here; use --device cpu")
    if device.index is not None and device.index >= torch.cuda.device_count():
        raise UsageError(f"device is `{name}`, but there are only {torch.cuda.device_count()} GPUs")
    return device


def make_deterministic() -> None:
    """Let GPU operations give the same bits every time; those that cannot warn. CPUs do anyway."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what cuBLAS needs for it
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.benchmark = False


def moved(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """On the device; a GPU is not waited for, since PyTorch keeps the pinned memory until it is read."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def peak_memory_mib(device: torch.device) -> float:
    """Peak of the GPU's allocator, or on the CPU of the whole process's resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return _peak_resident_mib()


def restart_peak_memory(device: torch.device) -> None:
    """Let `peak_memory_mib` count from here; on a CPU without Linux's files it goes on."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def held_memory_mib(device: torch.device) -> float:
    """What the GPU's allocator has given out, or on the CPU the process's resident set."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device) / 2**20
    return _resident_mib()


def available_memory_mib(device: torch.device) -> float:
    """A GPU's memory; for a CPU what this process has and may still get, within its control group."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory / 2**20
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**20]
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        limits.append(int(lines["MemAvailable"].split()[0]) / 2**10 + _resident_mib())
    group = Path("/sys/fs/cgroup/memory.max")
    if group.exists() and (text := group.read_text().strip()) != "max":
        limits.append(int(text) / 2**20)
    return min(limits)


def _resident_mib() -> float:
    statm = Path("/proc/self/statm")
    if not statm.exists():
        return _peak_resident_mib()
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def _peak_resident_mib() -> float:
    """Peak resident set of this process since it started its program."""
    status = Path("/proc/self/status")
    if status.exists():
        # getrusage would be wrong here: on Linux a child starts with its parent's peak.
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) / 2**10
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


@contextlib.contextmanager
def explained_shortage(remedy: str) -> Iterator[None]:
    """Turn PyTorch's out-of-memory errors into a `LocalError` that says what to change."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise LocalError(f"out of GPU memory ({str(error).splitlines()[0]}); {remedy}") from None
    except RuntimeError as error:
        if "can't allocate memory" not in str(error):
            raise
        raise LocalError(f"out of memory; {remedy}") from None

"""Which device runs, and how much memory it took."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from segdeformer.errors import UsageError, UserError


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


def peak_memory_mib(device: torch.device) -> float:
    """Peak of the GPU's allocator, or on the CPU of the whole process's resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return peak_resident_mib()


def peak_resident_mib() -> float:
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
    """Turn PyTorch's out-of-memory errors into a `UserError` that says what to change."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(f"out of GPU memory ({str(error).splitlines()[0]}); {remedy}") from None
    except RuntimeError as error:
        if "can't allocate memory" not in str(error):
            raise
        raise UserError(f"out of memory; {remedy}") from None

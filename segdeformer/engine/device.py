"""Which device runs, and how much memory it took."""

from __future__ import annotations

import resource
import sys

import torch

from segdeformer.errors import UsageError


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
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10

"""How long a call takes: by CUDA events with a cold L2 cache, or by the wall clock where there is no GPU."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch


def median_ms(run: Callable[[], object], device: torch.device, *, window_ms: int = 60) -> float:
    """The median time of a call, over as many as fit the window; without a GPU the time of one."""
    if device.type != "cuda":
        began = time.perf_counter()
        run()
        return 1000 * (time.perf_counter() - began)
    from triton.testing import do_bench

    with torch.cuda.device(device):
        median = do_bench(run, warmup=window_ms // 4, rep=window_ms, return_mode="median")
    assert isinstance(median, float)
    return median


def synchronize(device: torch.device) -> None:
    """Wait for the device; an error of what it ran shows up here."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)

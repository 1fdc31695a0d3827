"""Where and how a model runs; none of it changes results beyond rounding."""

from __future__ import annotations

from typing import NamedTuple

import torch

from segdeformer.cores import num_cores
from segdeformer.errors import UsageError
from segdeformer.kernels.impl import Impl, check_impl
from segdeformer.runtime.device import choose_device
from segdeformer.runtime.distributed import ALONE, Processes, environment, own_device

MOST_WORKERS = 8


class Runtime(NamedTuple):
    """What every part of a run needs to know to compute, handed on whole.

    impl: of attention and of operations on upsampled logits. workers: loader processes of this process.
    """

    device: torch.device = torch.device("cpu")
    impl: Impl = "auto"
    processes: Processes = ALONE
    workers: int = 0


ON_CPU = Runtime()


def choose_runtime(device: str = "auto", impl: str = "auto", workers: int | None = None) -> Runtime:
    """This process's device and what it runs there, before it meets the others of its run.

    device: `auto` (a GPU if there is one), `cpu`, `cuda` or `cuda:N`. workers: None for as many
    as the cores suggest.
    Raises `UsageError` for what is not there, or cannot run there.
    """
    chosen = own_device(choose_device(device))
    if workers is None:
        workers = default_workers(environment().size)
    try:
        return Runtime(chosen, check_impl(impl, chosen), workers=workers)
    except ValueError as error:
        raise UsageError(f"--{error}") from None


def default_workers(num_processes: int) -> int:
    """Some loader processes where cores are plenty; on few cores they would only take turns."""
    cores = num_cores() // num_processes
    return 0 if cores <= 2 else min(MOST_WORKERS, cores // 2)

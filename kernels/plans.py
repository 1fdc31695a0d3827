"""Start kernels at little cost to the host.

The first call of its kind settles a `Plan`: the tile, the compiled kernel and every number that it takes.
Later calls hand over tensors only; to make all the rest anew takes longer than a small kernel runs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from triton.errors import TritonError

from segdeformer.errors import KernelError
from segdeformer.kernels.fitting import first_fitting
from segdeformer.kernels.launch import (
    ALIGNED_BYTES,
    Launch,
    allow_descriptors,
    failure,
    interpreting,
)
from segdeformer.kernels.tiles import forget_tables

MOST_PLANS = 4096  # images of ever new sizes make ever new plans


class Plan(NamedTuple):
    """What is called with the tensors named in `order`, then with `values`: numbers and constants."""

    start: Callable[..., None]
    order: tuple[str, ...]
    values: tuple[int | float | str | bool, ...]
    descriptors: bool  # Hopper's bulk copies, which need a little memory on the device


_plans: dict[Hashable, Plan] = {}
_planning = True
_HERE = contextlib.nullcontext()


def start_kernel(
    key: Hashable, tensors: Mapping[str, Tensor], candidates: Callable[[], Iterable[Launch]]
) -> None:
    """Run a kernel on these tensors.

    key: all that decides the numbers, constants and tiles, such as shapes, strides, dtype and scale.
    candidates: launches on these tensors, the wanted tile first, then smaller ones; asked for at the first
    call with this key. Raises `KernelError` when none fits or the kernel does not start.
    """
    addresses = 0
    for tensor in tensors.values():
        addresses |= tensor.data_ptr()
    device = tensor.device
    key = key, device
    if addresses % ALIGNED_BYTES:  # for each address that is no multiple Triton compiles another kernel
        key = (*key, *[tensor.data_ptr() % ALIGNED_BYTES == 0 for tensor in tensors.values()])
    plan = _plans.get(key)
    if plan is None and (interpreting() or not _planning):
        next(iter(candidates())).run()
        return
    with on_device(device):
        if plan is None:
            plan = _settle(candidates(), device)
            if len(_plans) >= MOST_PLANS:
                _plans.clear()
            _plans[key] = plan
        if plan.descriptors:
            allow_descriptors(device)
        try:
            plan.start(*[tensors[name] for name in plan.order], *plan.values)
        except torch.OutOfMemoryError:
            raise
        except (TritonError, RuntimeError) as error:
            raise KernelError(failure(next(iter(candidates())), error)) from error


def _settle(candidates: Iterable[Launch], device: torch.device) -> Plan:
    launch, run = first_fitting(list(candidates), device)
    names = launch.kernel.arg_names
    assert all(name in launch.tensors for name in names[: len(launch.tensors)]), launch.name
    rest = names[len(launch.tensors) :]
    values = tuple({**launch.numbers, **launch.constants}[name] for name in rest)
    return Plan(run, tuple(names[: len(launch.tensors)]), values, launch.tile.tma)


def on_device(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Triton starts kernels on the current GPU; switching to the one that is current already takes time."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return _HERE
    return torch.cuda.device(device)


@contextlib.contextmanager
def without_plans() -> Iterator[None]:
    """Inside, in all threads, `Launch.run` starts every kernel that has no plan yet, with the wanted tile."""
    global _planning
    _planning = False
    try:
        yield
    finally:
        _planning = True


def forget_plans() -> None:
    """Read tile files again when kernels are next started."""
    _plans.clear()
    forget_tables()

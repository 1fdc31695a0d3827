"""The processes of one run: started by torchrun, they share every batch and agree on what happens next."""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Iterator
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from segdeformer.errors import ElsewhereError, LocalError, UsageError, UserError

T = TypeVar("T")

TIMEOUT = datetime.timedelta(minutes=30)  # the first process may validate or save while the others wait


class Processes(NamedTuple):
    """This process among those of the run; alone by default."""

    rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        """The one that prints and writes."""
        return self.rank == 0

    def own_indices(self, num_items: int) -> range:
        """Indices of this process's items: every `size`-th, so that none is anybody else's."""
        return range(self.rank, num_items, self.size)


ALONE = Processes()


class Environment(NamedTuple):
    """What torchrun says in the environment; see `torch.distributed.run`."""

    rank: int
    size: int
    local_rank: int
    restarts: int


def started_by_torchrun() -> bool:
    """Whether an elastic launcher has started this process."""
    return "MASTER_ADDR" in os.environ and "RANK" in os.environ


def environment() -> Environment:
    """Ours, also without torchrun: then alone."""

    def number(name: str, default: int) -> int:
        return int(os.environ.get(name, default))

    if not started_by_torchrun():
        return Environment(0, 1, 0, 0)
    return Environment(
        number("RANK", 0),
        number("WORLD_SIZE", 1),
        number("LOCAL_RANK", 0),
        number("TORCHELASTIC_RESTART_COUNT", 0),
    )


def is_first() -> bool:
    """Whether this process is the one that prints and writes, before they have met."""
    return environment().rank == 0


def own_device(device: torch.device) -> torch.device:
    """This process's GPU where the run has one per process; raises `UsageError` if there are too few."""
    env = environment()
    if env.size == 1 or device.type != "cuda":
        return device
    if device.index is not None:
        raise UsageError(f"device is `{device}`, but {env.size} processes take a GPU each; use --device cuda")
    if env.local_rank >= torch.cuda.device_count():
        raise UsageError(
            f"process {env.local_rank + 1} on this machine has no GPU: "
            f"there are {torch.cuda.device_count()}; start as many processes as there are GPUs"
        )
    chosen = torch.device("cuda", env.local_rank)
    torch.cuda.set_device(chosen)
    return chosen


@contextlib.contextmanager
def joined_processes(device: torch.device) -> Iterator[Processes]:
    """Meet the other processes (NCCL for GPU tensors, gloo for CPU ones); leave them at the end.

    Where another process ends in between, the collective that waits for it raises `ElsewhereError`.
    """
    env = environment()
    if env.size == 1:
        yield ALONE
        return
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    with explained_loss():
        dist.init_process_group(
            backend,
            store=_meeting_point(env),
            rank=env.rank,
            world_size=env.size,
            timeout=TIMEOUT,
            device_id=device if device.type == "cuda" else None,
        )
        yield Processes(env.rank, env.size)
        dist.destroy_process_group()  # after an error others may still wait: then ending is all we can do


def _meeting_point(env: Environment) -> Any:
    """Where the processes find each other. PyTorch's own would give the addresses of before a restart."""
    hosted_by_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    store = dist.TCPStore(  # type: ignore[attr-defined]
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        env.size,
        is_master=env.rank == 0 and not hosted_by_agent,
        timeout=TIMEOUT,
    )
    return dist.PrefixStore(f"segdeformer/{env.restarts}", store)  # type: ignore[attr-defined]


@contextlib.contextmanager
def explained_loss() -> Iterator[None]:
    """Turn the errors of a collective whose partner has ended into `ElsewhereError`."""
    try:
        yield
    except UserError:
        raise
    except dist.DistError:
        raise ElsewhereError from None
    except RuntimeError as error:
        # gloo has no error of its own
        if "gloo" not in str(error) and "Connection closed" not in str(error):
            raise
        raise ElsewhereError from None


@contextlib.contextmanager
def of_this_process() -> Iterator[None]:
    """Make `UserError`s ones that this process says itself, for the others do not have them."""
    try:
        yield
    except UserError as error:
        raise LocalError(str(error), exit_code=error.exit_code) from None


def add_up(values: Tensor, processes: Processes) -> Tensor:
    """The sum over the processes, in place, wherever the tensor is; alone the tensor as it is."""
    if processes.size > 1:
        dist.all_reduce(values)
    return values


def any_of(flag: bool, processes: Processes) -> bool:
    """Whether it is so in any process; all learn the same."""
    if processes.size == 1:
        return flag
    return bool(add_up(torch.tensor(float(flag)), processes).item())


def from_all(value: T, processes: Processes) -> list[T]:
    """The value of every process, in order of rank; picklable."""
    if processes.size == 1:
        return [value]
    values = [value] * processes.size
    dist.all_gather_object(values, value)
    return values


def from_first(value: T, processes: Processes) -> T:
    """The first process's value, in all."""
    return from_all(value, processes)[0]

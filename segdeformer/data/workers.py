"""PyTorch's loader processes: deaf to signals that are meant for their parent, and missed when one dies."""

from __future__ import annotations

import multiprocessing
import signal
import threading
from collections.abc import Generator
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from types import FrameType
from typing import Any

from torch.utils.data import DataLoader

from segdeformer.errors import UserError

GRACE_S = 10
DYING_S = 2.0  # a pipe breaks before its process has ended
SLEEPING = ("select", "wait")  # the functions of Python's library in which a queue is waited for
LIKELY_CAUSES = {"SIGKILL": ", probably out of memory", "SIGBUS": ", probably /dev/shm is full"}


def deafen(_worker: int) -> None:
    """A terminal, Slurm or a launcher signals every process; the main one alone answers and ends its workers.

    SIGTERM ends a worker some seconds later, when the main process has its last batch.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "SIGUSR1"):
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, lambda _signal, _frame: signal.alarm(GRACE_S))


def watched(loader: DataLoader[Any]) -> Generator[Any, None, None]:
    """What the loader's processes make; raises `UserError` at the next batch when one of them has died.

    PyTorch alone raises from a signal handler, in the middle of whatever the main thread does just then.
    """
    others = multiprocessing.active_children()
    batches = iter(loader)
    watch = _Watch([child for child in multiprocessing.active_children() if child not in others])
    has_signals = hasattr(signal, "SIGCHLD") and threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGCHLD, watch.on_signal) if has_signals else None
    try:
        while True:
            watch.check()
            watch.is_waiting = True
            try:
                batch = next(batches)
            except StopIteration:
                return
            except (RuntimeError, OSError, EOFError):  # PyTorch has missed it too, or its pipe is broken
                watch.is_waiting = False
                watch.await_death()
                watch.check()
                raise
            finally:
                watch.is_waiting = False
            yield batch
    finally:
        del batches  # ends the processes, unless the traceback of an error holds it
        watch.end()
        if has_signals:
            signal.signal(signal.SIGCHLD, before or signal.SIG_DFL)


class _Watch:
    def __init__(self, processes: list[BaseProcess]) -> None:
        self.processes = processes
        self.is_waiting = False  # for a batch

    def check(self) -> None:
        for process in self.processes:
            code = process.exitcode
            if code:
                raise UserError(
                    f"a loader worker died ({_cause(code)}): use fewer --workers than {len(self.processes)}, "
                    "or give the machine more memory"
                )

    def await_death(self) -> None:
        """Wait until a process that is dying, if one is, has died."""
        dying = wait([process.sentinel for process in self.processes], timeout=DYING_S)
        for process in self.processes:
            if process.sentinel in dying:
                process.join()

    def end(self) -> None:
        """End those that are left; once they are joined, no handler can take them for victims."""
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()

    def on_signal(self, _signal: int, frame: FrameType | None) -> None:
        """Raise where the main thread sleeps; elsewhere, in a finaliser say, an error would be lost.

        What happens elsewhere is found by PyTorch, which looks every five seconds, or at the next batch.
        """
        if self.is_waiting and frame is not None and frame.f_code.co_name in SLEEPING:
            self.check()


def _cause(code: int) -> str:
    if code > 0:
        return f"exit code {code}"
    name = signal.Signals(-code).name if -code in set(signal.Signals) else ""
    return f"killed by signal {-code}{LIKELY_CAUSES.get(name, '')}"

"""PyTorch's loader processes: deaf to signals that are meant for their parent, and missed when one fails.

A worker may die, but also live and deliver nothing: its batches go through shared memory by a thread of
their own, whose errors PyTorch prints and forgets. Then the worker is ended, and its exit code says why.
"""

from __future__ import annotations

import contextlib
import errno
import multiprocessing
import multiprocessing.queues
import os
import signal
import threading
from collections.abc import Generator
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import FrameType
from typing import Any

from torch.utils.data import DataLoader

from segdeformer.errors import UserError

GRACE_S = 10
SILENT_S = 600  # without a batch: workers that are stuck, on a dead network file system say
PREFETCHED = 2  # batches of a worker, PyTorch's default
SHARED_MEMORY = Path("/dev/shm")
# Exit codes of a worker that cannot hand over a batch.
NO_ROOM, NO_DESCRIPTORS, NO_DELIVERY = 71, 72, 73
DYING_S = 2.0  # a pipe breaks before its process has ended
SLEEPING = ("select", "wait")  # the functions of Python's library in which a queue is waited for
TOO_FEW_DESCRIPTORS = "loader workers ran out of file descriptors; use fewer --workers, or raise `ulimit -n`"
LIKELY_CAUSES = {"SIGKILL": ", probably out of memory", "SIGBUS": ", probably /dev/shm is full"}


def deafen(_worker: int) -> None:
    """A terminal, Slurm or a launcher signals every process; the main one alone answers and ends its workers.

    SIGTERM ends a worker some seconds later, when the main process has its last batch.
    """
    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(_give_up)  # type: ignore[attr-defined]
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "SIGUSR1"):
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, lambda _signal, _frame: signal.alarm(GRACE_S))


def _give_up(error: BaseException, _batch: object) -> None:
    """In a worker's thread: a batch could not be put where the parent finds it, so none ever will."""
    text = str(error).lower()
    codes = {errno.ENOSPC: NO_ROOM, errno.ENOMEM: NO_ROOM, errno.EMFILE: NO_DESCRIPTORS}
    code = codes.get(getattr(error, "errno", None) or 0, NO_DELIVERY)
    if "no space left" in text or "shared memory" in text or "bus error" in text:
        code = NO_ROOM
    elif "too many open files" in text or "ancdata" in text:
        code = NO_DESCRIPTORS
    os._exit(code)


def watched(loader: DataLoader[Any], *, batch_bytes: int = 0) -> Generator[Any, None, None]:
    """What the loader's processes make; raises `UserError` at the next batch when one of them has failed.

    batch_bytes: of a batch, to say how much shared memory they take together.
    PyTorch alone raises from a signal handler, in the middle of whatever the main thread does just then.
    """
    others = multiprocessing.active_children()
    try:
        multiprocessing.Lock()  # where there are no semaphores, this ends with less noise than the next
        batches = iter(loader)
    except (OSError, RuntimeError) as error:  # no semaphores, no more processes, no more memory
        raise UserError(f"loader workers cannot be started ({error}); use --workers 0") from None
    children = [child for child in multiprocessing.active_children() if child not in others]
    watch = _Watch(children, needed=len(children) * PREFETCHED * batch_bytes)
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
            except (
                RuntimeError,
                OSError,
                EOFError,
            ) as error:  # missed, or its pipe is broken
                watch.is_waiting = False
                watch.await_death()
                watch.check()
                if "in DataLoader worker process" in str(error):  # an error of a data set of one's own
                    raise
                raise UserError(_failure(error, len(children))) from None
            finally:
                watch.is_waiting = False
            yield batch
    finally:
        del batches  # ends the processes, unless the traceback of an error holds it
        watch.end()
        if has_signals:
            signal.signal(signal.SIGCHLD, before or signal.SIG_DFL)


class _Watch:
    def __init__(self, processes: list[BaseProcess], *, needed: int) -> None:
        self.processes = processes
        self.needed = needed  # bytes of shared memory
        self.is_waiting = False  # for a batch

    def check(self) -> None:
        for process in self.processes:
            code = process.exitcode
            if code == NO_ROOM:
                raise UserError(self._no_room())
            if code == NO_DESCRIPTORS:
                raise UserError(TOO_FEW_DESCRIPTORS)
            if code:
                raise UserError(
                    f"a loader worker died ({_cause(code)}): use fewer --workers than {len(self.processes)}, "
                    "or give the machine more memory"
                )

    def _no_room(self) -> str:
        there = ""
        with contextlib.suppress(OSError):
            about = os.statvfs(SHARED_MEMORY)
            there = f" of {about.f_frsize * about.f_blocks / 2**20:.1f} MiB"
        return (
            f"a loader worker found no room for its batch in {SHARED_MEMORY}{there}: {len(self.processes)} "
            f"workers need {self.needed / 2**20:.1f} MiB; use --workers 0, or enlarge it (docker run "
            "--shm-size=1g)"
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


def _failure(error: BaseException, num_workers: int) -> str:
    text = str(error).lower()
    if "timed out" in text:
        return (
            f"the {num_workers} loader workers made no batch for {SILENT_S // 60} minutes: is the disk or "
            "network of the data there? Use --workers 0 to see where it stops"
        )
    if "too many open files" in text or "ancdata" in text:
        return TOO_FEW_DESCRIPTORS
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return f"the loader workers failed ({reason}); use --workers 0"


def _cause(code: int) -> str:
    if code > 0:
        return f"exit code {code}"
    name = signal.Signals(-code).name if -code in set(signal.Signals) else ""
    return f"killed by signal {-code}{LIKELY_CAUSES.get(name, '')}"

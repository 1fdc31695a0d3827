"""Processes that work off tasks: one that dies, breaks or hangs is replaced, what it had in hand is named.

A task is worked on by a generator at the top of a module, in a process made by `spawn`: CUDA does not live
through a fork, and an error of a GPU often stays with its process. There it tells its results by yielding
them, and by `stage` what comes next and for how long that may be silent. Compiling is not hanging: Triton's
own hooks announce it.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple, Self

# Without progress, until a process counts as hanging; Triton's interpreter is slow, and a rehearsal keeps no
# GPU waiting. Nothing is imported for this, so that a new process loads only what its task needs.
_IS_REHEARSAL = os.environ.get("TRITON_INTERPRET") == "1"
PATIENCE_S = 300.0 if _IS_REHEARSAL else 20.0
# One kernel takes 2 s, but all cores are busy with others.
COMPILE_PATIENCE_S = 300.0 if _IS_REHEARSAL else 90.0
EXACT_PATIENCE_S = 300.0 if _IS_REHEARSAL else 90.0  # float64 answers of large problems
START_PATIENCE_S = 300.0 if _IS_REHEARSAL else 180.0  # to import PyTorch from a cold disk
GRACE_S = 30.0  # after the deadline, for what is in hand
END_S = 10.0  # until a killed process is gone; with a broken driver it may stay
MOST_LOSSES = 6  # in a row, without a result between them: then the machine is broken, not the tasks
KILL_WHEN_PARENT_DIES = 1  # Linux: PR_SET_PDEATHSIG


class Stage(NamedTuple):
    """What a process is about to do."""

    name: str
    patience_s: float


class Over(NamedTuple):
    """A task has ended. lost: why its process did not get through it; stage: what was in hand then."""

    stage: str = ""
    lost: str | None = None


Work = Callable[[Any], Iterator[Any]]  # of a task: its results


class _Voice:
    """How a worker's process speaks to the crew; in every other process it says nothing."""

    def __init__(self) -> None:
        self.connection: Connection | None = None
        self.patience_s = PATIENCE_S
        self.stage = Stage("", PATIENCE_S)
        self.lock = threading.Lock()  # the backward, and so its compiling, runs in a thread of PyTorch's

    def say(self, message: object) -> None:
        if self.connection is not None:
            with self.lock:
                self.connection.send(message)


_voice = _Voice()


def stage(name: str, patience_s: float | None = None) -> None:
    """Say what this process does next and how long it may take; outside of a crew nothing happens."""
    _voice.stage = Stage(name, _voice.patience_s if patience_s is None else patience_s)
    _voice.say(_voice.stage)


class Crew:
    """Up to so many processes as `run` is asked for; to be used in a `with` statement."""

    def __init__(self, *, patience_s: float = PATIENCE_S) -> None:
        self.patience_s = patience_s
        self._workers: list[_Worker] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def close(self) -> None:
        """End all processes; the next `run` starts new ones, which know nothing of these."""
        for worker in self._workers:
            worker.kill()
        self._workers = []

    def run(
        self,
        work: Work,
        tasks: deque[Any],
        *,
        workers: int = 1,
        deadline: float = float("inf"),
    ) -> Iterator[tuple[Any, Any]]:
        """Each task's results and then an `Over`, as they come; tasks may be added to `tasks` meanwhile.

        After the deadline (of time.monotonic) no task is begun, and after a while what is in hand is ended
        without an `Over`: it is not to blame. What was not begun is left in `tasks`.
        """
        losses = 0
        try:
            while True:
                while tasks and losses < MOST_LOSSES and time.monotonic() < deadline:
                    if (worker := self._idle(workers)) is None:
                        break
                    worker.give(work, tasks.popleft())
                busy = [worker for worker in self._workers if worker.busy]
                if not busy or time.monotonic() >= deadline + GRACE_S:
                    return
                until = min(deadline + GRACE_S, *(worker.until for worker in busy))
                ready = wait([w.connection for w in busy], timeout=max(0.0, until - time.monotonic()))
                for worker in busy:
                    task = worker.task
                    for message in worker.news(worker.connection in ready):
                        losses = losses + 1 if isinstance(message, Over) and message.lost else 0
                        yield task, message
        finally:
            self._dismiss(lambda worker: worker.busy)

    def _idle(self, workers: int) -> _Worker | None:
        """A process with nothing to do; None if there are enough, all busy."""
        self._dismiss(lambda worker: not worker.busy and not worker.process.is_alive())
        idle = [worker for worker in self._workers if not worker.busy]
        if not idle and len(self._workers) < workers:
            idle = [_Worker(self.patience_s)]
            self._workers += idle
        return idle[0] if idle else None

    def _dismiss(self, unwanted: Callable[[_Worker], bool]) -> None:
        for worker in [worker for worker in self._workers if unwanted(worker)]:
            worker.kill()
            self._workers.remove(worker)


class _Worker:
    """One process, as the crew sees it."""

    def __init__(self, patience_s: float) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, patience_s), daemon=True)
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # Ctrl-C is the crew's matter
        try:
            self.process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        theirs.close()
        self.task: Any = None
        self.busy = False
        self.stage = Stage("", START_PATIENCE_S)
        self.until = 0.0

    def give(self, work: Work, task: Any) -> None:
        self.task, self.busy = task, True
        self.stage = Stage("", START_PATIENCE_S)
        self.until = time.monotonic() + self.stage.patience_s
        with contextlib.suppress(BrokenPipeError):  # then it is found dead
            self.connection.send((work, task))

    def news(self, has_spoken: bool) -> Iterator[Any]:
        """Its results since the last time, and an `Over` if the task has ended or the process is lost."""
        while has_spoken and self.busy:
            try:
                message = self.connection.recv()
            except (EOFError, ConnectionResetError):
                yield self._lose(self._ending())
                return
            if isinstance(message, Stage):
                self.stage = message
            self.until = time.monotonic() + self.stage.patience_s
            if isinstance(message, Over):
                self.busy = False
                if message.lost is not None:
                    self.kill()  # it may have spoiled the GPU for its process
            if not isinstance(message, Stage):
                yield message
            has_spoken = not self.connection.closed and self.connection.poll()
        if self.busy and time.monotonic() >= self.until:
            yield self._lose(f"hangs: no progress for {self.stage.patience_s:.0f} s")

    def _ending(self) -> str:
        self.process.join(END_S)
        code = self.process.exitcode
        if code is not None and code < 0:
            return f"its process was ended by {signal.Signals(-code).name}"
        return f"its process ended with code {code}"

    def _lose(self, reason: str) -> Over:
        self.kill()
        self.busy = False
        return Over(self.stage.name, reason)

    def kill(self) -> None:
        """End it with all that it has started."""
        assert self.process.pid is not None
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.kill()  # it may have no process group of its own yet
        self.process.join(END_S)
        self.connection.close()


def _serve(connection: Connection, patience_s: float) -> None:
    """A worker's process: one task after the other, until one breaks."""
    os.setsid()
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(KILL_WHEN_PARENT_DIES, signal.SIGKILL)
    _voice.connection, _voice.patience_s = connection, patience_s
    while True:
        try:
            work, task = connection.recv()  # imports what the work needs
            stage("start")
            _announce_compiling()
            for result in work(task):
                _voice.say(result)
        except EOFError:
            return
        except Exception as error:  # whatever it is, it is told, and this process ends
            words = " ".join(str(error).split())[-300:]
            _voice.say(Over(_voice.stage.name, f"{type(error).__name__}: {words}"))
            return
        _voice.say(Over())


def _announce_compiling() -> None:
    """Let Triton, if it is loaded, say when a kernel is compiled, and when it is done."""
    if (knobs := sys.modules.get("triton.knobs")) is None:
        return

    def before(**_what: object) -> None:
        name, patience_s = _voice.stage
        _voice.say(Stage(name, max(patience_s, COMPILE_PATIENCE_S)))

    def after(**_what: object) -> None:
        _voice.say(_voice.stage)

    knobs.runtime.jit_cache_hook = before
    knobs.runtime.jit_post_compile_hook = after

"""Ctrl-C, SIGTERM, SIGUSR1 and SIGHUP ask a run to save and stop; a second Ctrl-C stops it at once."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from types import FrameType

from segdeformer.errors import UserError

# Slurm sends SIGTERM before it kills, or what `--signal` says, often SIGUSR1; a terminal that is closed sends
# SIGHUP. Windows has not all of them.
NAMES = ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP")


class Interrupted(KeyboardInterrupt):
    """A signal that stops at once."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.source = name_of(number)


class StoppedError(UserError):
    """Training stopped as it was asked to; all is saved, which every process knows."""


class StopRequest:
    """Calling it says whether a signal has asked to stop, or the launcher of this process has been killed."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self.launcher = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None

    def __call__(self) -> bool:
        return self.signal is not None or self.is_orphan

    @property
    def is_orphan(self) -> bool:
        """Nobody waits for this process any more."""
        return self.launcher is not None and os.getppid() != self.launcher

    @property
    def source(self) -> str:
        """Who asked."""
        if self.signal is not None:
            return name_of(self.signal)
        return "the launcher's death" if self.is_orphan else "another process"


@contextlib.contextmanager
def ended_by_signals() -> Iterator[None]:
    """Let the signals end what runs meanwhile, as an `Interrupted`: there is nothing yet to be saved."""

    def end(number: int, _frame: object) -> None:
        raise Interrupted(number)

    with answered_by(end):
        yield


@contextlib.contextmanager
def stop_request() -> Iterator[StopRequest]:
    """Note the signals meanwhile; before and after they do what they always do."""
    request = StopRequest()

    def ask(number: int, _frame: object) -> None:
        # A launcher passes a second Ctrl-C on as SIGTERM.
        if request.signal == signal.SIGINT and number in (signal.SIGINT, signal.SIGTERM):
            raise Interrupted(signal.SIGINT)
        request.signal = number

    with answered_by(ask):
        yield request


@contextlib.contextmanager
def answered_by(
    handler: Callable[[int, FrameType | None], object], names: Sequence[str] = NAMES
) -> Iterator[None]:
    """Let the handler answer the signals meanwhile."""
    before = {number: signal.signal(number, handler) for number in answered_signals(names)}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


def answered_signals(names: Sequence[str] = NAMES) -> list[signal.Signals]:
    """Those that this system has; not SIGHUP under nohup, which ignores it."""
    numbers = [signal.Signals[name] for name in names if hasattr(signal, name)]
    return [n for n in numbers if n.name != "SIGHUP" or signal.getsignal(n) != signal.SIG_IGN]


def name_of(number: int) -> str:
    """What a user calls a signal."""
    return "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name

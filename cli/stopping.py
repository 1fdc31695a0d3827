"""Ctrl-C, SIGTERM and SIGUSR1 ask a run to save and stop; a second Ctrl-C stops it at once."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator

# Slurm sends SIGTERM before it kills, or what `--signal` says, often SIGUSR1. Windows has no SIGUSR1.
ASKING = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)]


class StopRequest:
    """Calling it says whether a signal has asked to stop."""

    def __init__(self) -> None:
        self.signal: int | None = None

    def __call__(self) -> bool:
        return self.signal is not None

    @property
    def source(self) -> str:
        """Who asked."""
        if self.signal is None:
            return "another process"
        return "Ctrl-C" if self.signal == signal.SIGINT else signal.Signals(self.signal).name


@contextlib.contextmanager
def stop_request() -> Iterator[StopRequest]:
    """Answer signals meanwhile; before and after they do what they always do."""
    request = StopRequest()

    def ask(number: int, _frame: object) -> None:
        if number == signal.SIGINT and request.signal == signal.SIGINT:
            raise KeyboardInterrupt
        request.signal = number

    before = {number: signal.signal(number, ask) for number in ASKING}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

"""Tasks that go wrong in every way, for processes of a `Crew` that the tests start."""

import ctypes
import os
import signal
import subprocess
import sys
import time

from segdeformer.kernels.tuning.crew import stage


def hang():
    """As a kernel does that never ends: in C, deaf to Python's signals."""
    signal.pthread_sigmask(signal.SIG_BLOCK, set(signal.Signals))
    time.sleep(1000)


FAULTS = {
    "raises": lambda: [][0],
    "is killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "crashes": lambda: ctypes.string_at(0),
    "exits": lambda: sys.exit(3),
    "hangs": hang,
}


def obey(task):
    """Say who it is, then what is asked for, in two steps."""
    yield os.getpid()
    for name in task:
        stage(name)
        if name in FAULTS:
            FAULTS[name]()
        yield name


def with_child(task):
    """A child that lives on unless it is ended with its parent, which hangs."""
    yield subprocess.Popen(["sleep", "1000"]).pid
    stage("waits")
    hang()


def slowly(task):
    """Each step takes less than the patience, all of them more."""
    for step in range(4):
        stage(f"step {step}")
        time.sleep(task)
    stage("long", 10 * task)
    time.sleep(4 * task)
    yield "done"

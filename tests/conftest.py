"""What holds for every test."""

import os
import signal
import threading

# As the command line does it: waiting threads give their core away (see cli/main.py).
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# With `pytest -n`, each of the processes takes one core. Read once, when PyTorch loads.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

# A shell's background jobs, and nohup, ignore signals, which children would inherit.
if threading.current_thread() is threading.main_thread():
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

# Without a GPU the Triton kernels run in Triton's interpreter, which is chosen when they are imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from segdeformer.kernels import cpu  # which may import Triton


@pytest.fixture(autouse=True)
def nothing_measured_for_another_test():
    """A command in a test lets `auto` measure this CPU and say so where it prints; not beyond that test."""
    yield
    cpu.measure_when_asked(None)

"""Loader workers that neither die nor deliver: each is one line within seconds, and no process is left."""

import errno
import time
from multiprocessing.reduction import ForkingPickler

import pytest
from test_loader import DATASET, digests, loader_processes, recipe

from segdeformer.data import loader
from segdeformer.data.loader import training_batches
from segdeformer.errors import UserError

ROOM = (
    r"^a loader worker found no room for its batch in /dev/shm( of [\d.]+ MiB)?: 2 workers need [\d.]+ MiB; "
    r"use --workers 0, or enlarge it \(docker run --shm-size=1g\)$"
)
DESCRIPTORS = r"^loader workers ran out of file descriptors; use fewer --workers, or raise `ulimit -n`$"


class Undeliverable:
    """A data set whose batches cannot leave the worker."""

    def __init__(self, error):
        self.error = error

    def __getattr__(self, name):
        return getattr(DATASET, name)

    def __len__(self):
        return len(DATASET)

    def read(self, index):
        def dumps(*_):
            raise self.error

        ForkingPickler.dumps = dumps  # of this worker alone: it is a process of its own
        return DATASET.read(index)


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), ROOM),
        (RuntimeError("unable to write to file </torch_1>: No space left on device (28)"), ROOM),
        (OSError(errno.EMFILE, "Too many open files"), DESCRIPTORS),
        (RuntimeError("received 0 items of ancdata"), DESCRIPTORS),
        (ValueError("something else"), r"^a loader worker died \(exit code 73\): use fewer --workers than 2"),
    ],
)
def test_a_batch_that_cannot_be_handed_over_is_one_line(error, told):
    began = time.monotonic()
    with pytest.raises(UserError, match=told):
        list(training_batches(Undeliverable(error), recipe(), start=0, stop=4, workers=2))
    assert time.monotonic() - began < 60
    assert loader_processes() == []
    assert digests(0, 2, workers=2) == digests(0, 2, workers=0)


class Sleepy(Undeliverable):
    def read(self, index):
        time.sleep(1000)


def test_workers_that_are_stuck_are_given_up(monkeypatch):
    monkeypatch.setattr(loader, "SILENT_S", 3)
    with pytest.raises(UserError, match=r"^the 2 loader workers made no batch for 10 minutes: is the disk"):
        list(training_batches(Sleepy(None), recipe(), start=0, stop=4, workers=2))
    assert loader_processes() == []


def test_workers_that_cannot_be_started_are_one_line(monkeypatch):
    def refuse(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")  # what a machine without semaphores says

    monkeypatch.setattr("multiprocessing.synchronize.SemLock.__init__", refuse)
    with pytest.raises(UserError, match=r"^loader workers cannot be started \(.*\); use --workers 0$"):
        list(training_batches(DATASET, recipe(), start=0, stop=4, workers=2))

"""What a kill at any call of the operating system leaves of checkpoints: whole ones only.

The child process ends without a word at its n-th call.
"""

import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_saves import cut, model_of, names, save

from segdeformer.training.saves import newest, tidy
from segdeformer.weights.checkpoint import LAST

CALLS = ("fsync", "rename", "replace", "link", "unlink", "rmdir", "mkdir", "open")


def ending(real, calls: Iterator[int], number: int):
    """The call, but the process ends before the one that comes as `number`."""

    def call(*arguments, **options):
        if next(calls) == number:
            os._exit(9)
        return real(*arguments, **options)

    return call


def is_killed_at(number: int, action) -> bool:
    """Do the action in a child process that ends before its call `number`; False if it has not as many."""
    child = os.fork()
    if child == 0:
        calls = iter(range(10_000))
        for name in CALLS:
            setattr(os, name, ending(getattr(os, name), calls, number))
        try:
            action()
        finally:
            os._exit(0 if sys.exc_info()[0] is None else 1)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, 9)
    return code == 9


def two(run: Path) -> None:
    save(run, 1)
    save(run, 2)


def three_of_which_two_are_damaged(run: Path) -> None:
    for iteration in (2, 3, 4):
        save(run, iteration, keep=3)
    cut(run / "checkpoints/iteration-000003/training.pt")
    cut(run / "checkpoints/iteration-000004/model.safetensors")


@pytest.mark.parametrize(
    ("prepare", "action", "least_calls", "iterations"),
    [
        (Path.mkdir, lambda run: save(run, 1), 10, {None, 1}),
        (two, lambda run: save(run, 3), 20, {2, 3}),
        (two, lambda run: save(run, 2), 20, {2}),
        (three_of_which_two_are_damaged, lambda run: tidy(run, newest(run)), 3, {2}),
    ],
    ids=["first", "next", "same", "tidy"],
)
def test_a_kill_at_any_call_leaves_whole_checkpoints_only(
    tmp_path, monkeypatch, prepare, action, least_calls, iterations
):
    monkeypatch.setattr(
        os, "fsync", lambda _file: None
    )  # a kill loses nothing that was written: time is saved
    found = set()
    number = 0
    while True:
        run = tmp_path / f"{number}"
        prepare(run)
        if not is_killed_at(number, lambda run=run: action(run)):
            break
        stored = newest(run)
        found.add(stored and stored.iteration)
        tidy(run, stored)
        assert newest(run) == (stored and stored._replace(damaged=()))
        if stored is not None:
            assert stored.model.read_bytes() == (run / LAST).read_bytes() == model_of(stored.iteration)
        visible = [name for name in os.listdir(run) if name not in (LAST, "checkpoints")]
        assert visible == []
        save(run, 5)
        kept = [name for name in names(run) if not re.fullmatch(r"iteration-00000\d(\.\d)?", name)]
        assert kept == []
        assert newest(run).iteration == 5
        number += 1
    assert number >= least_calls
    assert found == iterations

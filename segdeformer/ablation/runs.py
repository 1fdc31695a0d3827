"""Train and score the runs of an ablation in processes of their own, some at a time.

Each is `segdeformer train`, so a run can be opened, resumed and evaluated like any other.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import NamedTuple

from segdeformer.ablation.plan import Plan, Run
from segdeformer.runtime.command import own_command, own_environment
from segdeformer.training.run import RECIPE
from segdeformer.training.runlog import METRICS
from segdeformer.weights.checkpoint import LAST

TRAIN = (*own_command(), "train")
SCORE = tuple(own_command("segdeformer.cli.ablate_score"))
CHECKPOINTS = "checkpoints/iteration-*"  # of a run folder

POLL_S = 0.25
# Becomes the program that its arguments name, after it has asked Linux for SIGINT at its parent's death (1 is
# PR_SET_PDEATHSIG), which outlasts exec. Asked for here, since code between fork and exec can deadlock.
GUARD = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGINT)
if os.getppid() != int(sys.argv[1]):
    sys.exit("error: the parent was killed before this process began")
os.execv(sys.argv[2], sys.argv[2:])
"""


class Slot(NamedTuple):
    """Where one process at a time runs. environment: variables that it gets besides ours."""

    environment: dict[str, str]
    options: tuple[str, ...]  # of training and scoring
    train_options: tuple[str, ...] = ()


class Started(NamedTuple):
    run: Run
    goes_on: bool  # after a stop, from its last checkpoint


class Progress(NamedTuple):
    """A running process, as its diary says. loss: None before the first entry; scoring: training is done."""

    run: Run
    iteration: int
    loss: float | None
    scoring: bool


class Ticked(NamedTuple):
    running: tuple[Progress, ...]


class Finished(NamedTuple):
    """seconds: since it was started. uninterrupted: so that is how long a run takes."""

    run: Run
    seconds: float
    uninterrupted: bool


class Failed(NamedTuple):
    run: Run
    reason: str


class Stopped(NamedTuple):
    """`should_stop` said so; the processes have saved and ended."""

    num_left: int


Event = Started | Ticked | Finished | Failed | Stopped


class _Job:
    """A run in a slot: training, then scoring."""

    def __init__(self, run: Run, recipe: Path, slot: Slot, lock: int) -> None:
        self.run, self.slot, self.lock = run, slot, lock
        self.began = time.monotonic()
        self.goes_on = (run.folder / LAST).is_file() or any(run.folder.glob(CHECKPOINTS))
        self.scoring = False
        if not self.goes_on:
            # killed before its first checkpoint: it starts anew, in a folder that holds no run
            (run.folder / RECIPE).unlink(missing_ok=True)
        what = ("--resume",) if self.goes_on else (str(recipe), "--seed", str(run.seed))
        options = ("--out", str(run.folder), *slot.options, *slot.train_options)
        self.process = self._start((*TRAIN, *what, *options))

    def score(self) -> None:
        self.scoring = True
        self.process = self._start((*SCORE, str(self.run.folder), *self.slot.options))

    def _start(self, command: tuple[str, ...]) -> subprocess.Popen[bytes]:
        if sys.platform == "linux":  # told to save and end when this process is killed
            command = (sys.executable, "-ISc", GUARD, str(os.getpid()), *command)
        with self.run.log.open("ab") as log:
            self.log_began = log.tell()
            return subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=own_environment() | self.slot.environment,
                pass_fds=(self.lock,),
                process_group=0,  # Ctrl-C in the terminal reaches us alone, and each child once, by us
            )

    def progress(self) -> Progress:
        iteration, loss = _last_step(self.run.folder)
        return Progress(self.run, iteration, loss, self.scoring)

    def reason(self) -> str:
        """The last error line of what it printed since it started, else the last line."""
        with self.run.log.open("rb") as log:
            log.seek(self.log_began)
            lines = [line.strip() for line in log.read().decode("utf-8", "replace").splitlines()]
        errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
        if errors:
            return errors[-1]
        code = self.process.returncode
        if code == -signal.SIGKILL:
            return "killed (SIGKILL); was memory short?"
        how = f"ended by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        said = [line for line in lines if line]
        return f"{how}: {said[-1]}" if said else how


def execute(
    plan: Plan, slots: list[Slot], *, lock: int, should_stop: Callable[[], int] = lambda: 0
) -> Generator[Event, None, None]:
    """Run what is not finished, a process in each slot, and tell what happens.

    should_stop: how often a stop was asked for. At the first, each process is told once, and saves; at
    the second they are killed. A run that fails is told and left; the others go on.
    """
    waiting = [run for run in plan.runs if not run.is_finished]
    free, jobs = list(slots), list[_Job]()
    told = 0
    try:
        while jobs or (waiting and not told):
            while free and waiting and not told:
                run = waiting.pop(0)
                job = _Job(run, plan.recipe_path(run.row), free.pop(0), lock)
                jobs.append(job)
                yield Started(job.run, job.goes_on)
            time.sleep(POLL_S)
            asked = should_stop()
            if asked > told:
                told = asked
                for job in jobs:
                    job.process.send_signal(signal.SIGINT if told == 1 else signal.SIGKILL)
            for job in list(jobs):
                if job.process.poll() is None:
                    continue
                if job.process.returncode == 0 and not job.scoring and not told:
                    job.score()
                    continue
                jobs.remove(job)
                free.append(job.slot)
                if job.process.returncode == 0 and job.scoring:
                    yield Finished(job.run, time.monotonic() - job.began, not job.goes_on)
                elif told:
                    waiting.append(job.run)
                else:
                    yield Failed(job.run, job.reason())
            yield Ticked(tuple(job.progress() for job in jobs))
        if told:
            yield Stopped(len(waiting))
    finally:  # also when the stream is left early: no process is left behind
        for job in jobs:
            job.process.send_signal(signal.SIGINT)
        for job in jobs:
            job.process.wait()


def _last_step(path: Path) -> tuple[int, float | None]:
    """Iteration and loss of the last whole entry of a run's diary; it is read from its end."""
    try:
        with (path / METRICS).open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 4096))
            lines = file.read().splitlines()
    except OSError:
        return 0, None
    for line in reversed(lines):
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:  # the first may have lost its beginning, the last lacks its end
            continue
        if entry["kind"] == "train":
            return entry["iteration"], entry["loss"]
    return 0, None

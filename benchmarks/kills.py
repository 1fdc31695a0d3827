"""Kills a small training run again and again, and compares what it ends with to the run that was left alone.

    python -m benchmarks.kills [--kills 25] [--iterations 60] [--workers 0] [--seed 0] [--json FILE]

Every life of the run is a process of its own that begins or resumes it, and ends by SIGKILL: one half of them
at a random moment, the other while a checkpoint is being written. After each kill the checkpoints with a
name must be whole; in the end weights, training state, best weights and diary must be those of the unbroken
run, bit for bit, and nothing half-written may be left. Exit code 1 if not.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

from segdeformer.config import Recipe, load_recipe
from segdeformer.data.built_in import SyntheticDataset
from segdeformer.data.samples import Splits
from segdeformer.files import write_text
from segdeformer.measure.machine import this_machine
from segdeformer.runtime import Runtime
from segdeformer.training.loop import train
from segdeformer.training.run import RECIPE, resume_run, start_run
from segdeformer.training.runlog import read_metrics
from segdeformer.training.saves import CHECKPOINTS, WRITING, newest
from segdeformer.weights.checkpoint import BEST, LAST

VALIDATE_EVERY, SAVE_EVERY = 7, 3
LONGEST_LIFE = 0.4  # of the time that the unbroken run takes
MOST_WRITES = 2  # that a life has, if it ends in one of them
LOOK_EVERY_S = 0.0002


class Life(NamedTuple):
    """How one process of the run ended."""

    seconds: float
    iteration: int | None  # of the newest checkpoint that it left; None: none yet
    in_write: bool  # a checkpoint was half-written


def small_recipe(iterations: int) -> Recipe:
    """Two small crops a step, with averaged weights: all that a checkpoint can hold."""
    recipe = load_recipe("synthetic")
    changes = {
        "iterations": iterations,
        "batch_size": 2,
        "validate_every": VALIDATE_EVERY,
        "checkpoint_every": SAVE_EVERY,
        "ema_decay": 0.9,
    }
    return recipe.model_copy(
        update={
            "augment": recipe.augment.model_copy(update={"crop": (32, 40)}),
            "train": recipe.train.model_copy(update=changes),
        }
    )


def go_on(folder: Path, *, iterations: int, workers: int) -> None:
    """Begin the run of a folder, or resume it, and train to the end."""
    begin = resume_run if (folder / RECIPE).exists() else start_run
    run = begin(
        small_recipe(iterations),
        folder,
        Splits(
            SyntheticDataset("train", num_images=7, size_hw=(49, 63)),
            SyntheticDataset("val", num_images=2, size_hw=(33, 41)),
        ),
        runtime=Runtime(workers=workers),
    )
    if run.progress.warnings:
        raise RuntimeError(f"a checkpoint was damaged: {run.progress.warnings}")
    for _ in train(run):
        pass


def start_life(folder: Path, *, iterations: int, workers: int) -> int:
    """Go on in a child process; its id. A fork needs no second import of PyTorch."""
    child = os.fork()
    if child:
        return child
    torch.set_num_threads(1)  # OpenMP's threads do not survive a fork
    try:
        go_on(folder, iterations=iterations, workers=workers)
        code = 0
    except BaseException:
        traceback.print_exc()
        code = 1
    os._exit(code)


def is_over(child: int) -> bool:
    """Whether the process ended by itself; raises `RuntimeError` if by an error."""
    found, status = os.waitpid(child, os.WNOHANG)
    if not found:
        return False
    if os.waitstatus_to_exitcode(status):
        raise RuntimeError("the run ended with the error above")
    return True


def wait_until(condition: Callable[[], bool], child: int, *, longest_s: float) -> bool:
    """Whether the process is still there when the condition holds or the time is over."""
    until = time.monotonic() + longest_s
    while not condition() and time.monotonic() < until:
        if is_over(child):
            return False
        time.sleep(LOOK_EVERY_S)
    return not is_over(child)


def half_written(folder: Path, child: int) -> set[Path]:
    """The checkpoint that this process is writing, if it is."""
    return set((folder / CHECKPOINTS).glob(f"{WRITING}*-{child}"))


def is_in_write(folder: Path, child: int, number: int, *, longest_s: float) -> bool:
    """Wait until the process writes its checkpoint `number`; False if it has ended before."""
    seen: set[Path] = set()

    def writes() -> bool:
        now = half_written(folder, child)
        seen.update(now)
        return bool(now) and len(seen) == number

    return wait_until(writes, child, longest_s=longest_s)


def break_often(
    folder: Path, kills: int, rng: random.Random, *, whole_run_s: float, **run: int
) -> tuple[list[Life], list[str]]:
    """Kill the run up to so many times, then let it end; its lives, and what was wrong after a kill."""
    lives: list[Life] = []
    while True:
        began = time.monotonic()
        child = start_life(folder, **run)
        if len(lives) == kills:
            is_there = wait_until(lambda: False, child, longest_s=100 * whole_run_s)
        elif len(lives) % 2:
            number = rng.randint(1, MOST_WRITES)
            is_there = is_in_write(folder, child, number, longest_s=100 * whole_run_s)
            time.sleep(rng.choice((0, 0.001, 0.002, 0.004)))
        else:
            longest_s = rng.uniform(0, LONGEST_LIFE * whole_run_s)
            is_there = wait_until(lambda: False, child, longest_s=longest_s)
        if not is_there:
            return lives, []
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        stored = newest(folder)
        in_write = bool(half_written(folder, child))
        lives.append(Life(time.monotonic() - began, stored.iteration if stored else None, in_write))
        if stored is not None and stored.damaged:
            return lives, stored.warnings
        if len(lives) > kills:
            return lives, ["the last life did not end"]


def differences(folder: Path, unbroken: Path) -> list[str]:
    """What is not as in the unbroken run, and what is half-written."""
    faults = [f"{path} is left" for path in folder.rglob(".*") if path.name != ".lock"]
    faults += [f"{path} is left" for path in folder.glob(f"{CHECKPOINTS}/damaged-*")]
    ours, theirs = newest(folder), newest(unbroken)
    assert ours is not None and theirs is not None
    pairs = [(folder / name, unbroken / name) for name in (LAST, BEST, RECIPE)]
    pairs += [(path, theirs.folder / path.name) for path in sorted(ours.folder.iterdir())]
    faults += [f"{a} differs from {b}" for a, b in pairs if a.read_bytes() != b.read_bytes()]
    if diary(folder) != diary(unbroken):
        faults.append(f"{folder}: another diary")
    return faults


def diary(folder: Path) -> list[dict[str, object]]:
    return [{k: v for k, v in entry.items() if k != "images_per_s"} for entry in read_metrics(folder)]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=25)
    parser.add_argument("--iterations", type=int, default=60)
    parser.add_argument("--workers", type=int, default=0, help="loader processes of the run")
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)
    machine = this_machine(torch.device("cpu"))
    lives: list[Life] = []
    faults: list[str] = []
    with tempfile.TemporaryDirectory() as place:
        unbroken = Path(place, "unbroken")
        began = time.monotonic()
        run = {"iterations": arguments.iterations, "workers": arguments.workers}
        child = start_life(unbroken, **run)
        wait_until(lambda: False, child, longest_s=600)
        whole_run_s = time.monotonic() - began
        num_runs = 0
        while len(lives) < arguments.kills and not faults:
            folder = Path(place, f"broken-{num_runs}")
            num_runs += 1
            more = break_often(folder, arguments.kills - len(lives), rng, whole_run_s=whole_run_s, **run)
            lives += more[0]
            faults += more[1] or differences(folder, unbroken)
    result = {
        "what": "SIGKILL of a small CPU run at random moments and inside checkpoint writes; then resumed",
        "machine": machine._asdict(),
        "kills": len(lives),
        "inside_a_checkpoint_write": sum(life.in_write for life in lives),
        "before_the_first_checkpoint": sum(life.iteration is None for life in lives),
        "runs": num_runs,
        "iterations_of_a_run": arguments.iterations,
        "unbroken_run_s": round(whole_run_s, 1),
        "lives": [{**life._asdict(), "seconds": round(life.seconds, 3)} for life in lives],
        "faults": faults,
    }
    if arguments.json:
        write_text(arguments.json, json.dumps(result, indent=1) + "\n")
    print(
        f"{len(lives)} kills in {num_runs} runs, {result['inside_a_checkpoint_write']} of them inside a "
        f"checkpoint write, {result['before_the_first_checkpoint']} before the first one"
    )
    for fault in faults:
        print(f"error: {fault}", file=sys.stderr)
    print("every run ended as the unbroken one, bit for bit" if not faults else "FAILED")
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()

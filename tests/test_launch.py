"""`segdeformer train --nproc 2`: processes that are killed, asked to stop, or fail alone; and signals."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

from segdeformer.cli.errors import is_silent
from segdeformer.cli.stopping import Interrupted, answered_signals, ended_by_signals, stop_request
from segdeformer.config import load_recipe, recipe_toml
from segdeformer.errors import ElsewhereError, LocalError, UserError
from segdeformer.training.runlog import read_metrics
from segdeformer.training.saves import newest

SECONDS_TO_START = 120


def write_recipe(path: Path, **changes: object) -> Path:
    base = load_recipe("synthetic")
    config = {"validate_every": 10**6, "checkpoint_every": 4, **changes}
    recipe = base.model_copy(
        update={
            "augment": base.augment.model_copy(update={"crop": (40, 48)}),
            "train": base.train.model_copy(update=config),
        }
    )
    path.write_text(recipe_toml(recipe), "utf-8")
    return path


def make_folder(root: Path, num_images: int) -> Path:
    rng = np.random.default_rng(0)
    for kind, split in ((kind, split) for kind in ("images", "labels") for split in ("train", "val")):
        folder = root / kind / split
        folder.mkdir(parents=True)
        for number in range(num_images if split == "train" else 1):
            shape = (48, 56, 3) if kind == "images" else (48, 56)
            pixels = rng.integers(0, 5, shape, dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{split}{number:03d}.png")
    (root / "classes.toml").write_text('names = ["a", "b", "c", "d", "e"]\n', "utf-8")
    return root


def begin(recipe: Path, out: Path, *options: str) -> subprocess.Popen[str]:
    """Two processes; what they leave in the folder for temporary files can be seen."""
    temporary = out.with_name(f"{out.name}-temporary")
    temporary.mkdir()
    return subprocess.Popen(
        [
            sys.executable,
            "-m",
            "segdeformer",
            "train",
            str(recipe),
            "--nproc",
            "2",
            "--out",
            str(out),
            *options,
        ],
        env={**os.environ, "TMPDIR": str(temporary), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def await_checkpoint(out: Path, launcher: subprocess.Popen[str]) -> None:
    """Wait until the first one is there."""
    for _ in range(SECONDS_TO_START * 100):
        if any(out.glob("checkpoints/iteration-*")):
            return
        assert launcher.poll() is None, launcher.communicate()
        time.sleep(0.01)
    raise AssertionError(f"{out} has no checkpoint after {SECONDS_TO_START} s")


def processes_of(launcher: subprocess.Popen[str]) -> list[int]:
    return [
        int(pid) for pid in subprocess.check_output(["pgrep", "-P", str(launcher.pid)], text=True).split()
    ]


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def left_behind(out: Path) -> list[str]:
    """Launcher's and rehearsals' folders; PyTorch keeps a compiler cache of its own."""
    names = [path.name for path in out.with_name(f"{out.name}-temporary").iterdir()]
    return [name for name in names if not name.startswith("torchinductor_")]


def test_a_killed_process_is_replaced_and_changes_no_bit(tmp_path):
    recipe = write_recipe(tmp_path / "recipe.toml", iterations=20)
    data = ("--data", str(make_folder(tmp_path / "data", num_images=6)))
    whole = begin(recipe, tmp_path / "whole", *data)
    assert whole.communicate()[1] == ""
    broken = begin(recipe, tmp_path / "broken", *data, "--max-restarts", "1")
    await_checkpoint(tmp_path / "broken", broken)
    victims = processes_of(broken)
    os.kill(victims[1], signal.SIGKILL)
    assert broken.communicate()[1] == ""
    assert (whole.returncode, broken.returncode) == (0, 0)
    expected = load_file(tmp_path / "whole" / "last.safetensors")
    found = load_file(tmp_path / "broken" / "last.safetensors")
    assert found.keys() == expected.keys()
    assert all(found[name].equal(value) for name, value in expected.items())
    assert not any(map(is_running, victims))
    assert left_behind(tmp_path / "whole") == left_behind(tmp_path / "broken") == []
    validations = [entry for entry in read_metrics(tmp_path / "broken") if entry["kind"] == "validation"]
    assert [entry["iteration"] for entry in validations] == [20]


def test_sigterm_to_the_launcher_saves_and_stops_all_with_one_line(tmp_path):
    out = tmp_path / "run"
    recipe = write_recipe(tmp_path / "recipe.toml", iterations=10**5)
    launcher = begin(recipe, out, "--data", str(make_folder(tmp_path / "data", num_images=6)))
    await_checkpoint(out, launcher)
    children = processes_of(launcher)
    launcher.send_signal(signal.SIGTERM)
    said = launcher.communicate()[1]
    assert launcher.returncode == 1
    stopped = re.fullmatch(
        r"error: stopped by SIGTERM after iteration ([\d,]+), all is saved; go on with: (.+)\n", said
    )
    assert stopped is not None, said
    assert stopped[2] == f"segdeformer train --resume --out {out}"
    assert newest(out).iteration == int(stopped[1].replace(",", ""))
    assert not any(map(is_running, children))
    assert left_behind(out) == []


def test_an_image_that_only_one_process_meets_is_named_once_and_ends_both(tmp_path):
    """The check before the run looks at every second pair here."""
    data = make_folder(tmp_path / "data", num_images=128)
    bad = data / "images" / "train" / "train001.png"
    bad.write_bytes(bad.read_bytes()[:300])
    recipe = write_recipe(tmp_path / "recipe.toml", iterations=40)
    launcher = begin(recipe, tmp_path / "run", "--data", str(data))
    said = launcher.communicate()[1]
    assert launcher.returncode == 1
    assert re.fullmatch(rf"error: {re.escape(str(bad))}: .+\n", said), said
    assert newest(tmp_path / "run") is not None
    assert left_behind(tmp_path / "run") == []


# Signals and silence, in this process.


def test_before_training_a_signal_ends_the_command_by_its_name():
    for number, name in ((signal.SIGTERM, "SIGTERM"), (signal.SIGUSR1, "SIGUSR1"), (signal.SIGINT, "Ctrl-C")):
        with pytest.raises(Interrupted) as caught, ended_by_signals():
            signal.raise_signal(number)
        assert caught.value.source == name


@pytest.mark.parametrize(
    ("numbers", "source"),
    [([signal.SIGUSR1, signal.SIGTERM, signal.SIGTERM], "SIGTERM"), ([signal.SIGINT], "Ctrl-C")],
)
def test_in_training_signals_are_noted_and_afterwards_answered_as_before(numbers, source):
    before = [signal.getsignal(number) for number in answered_signals()]
    with stop_request() as should_stop:
        assert not should_stop()
        for number in numbers:
            signal.raise_signal(number)
        assert should_stop()
        assert should_stop.source == source
    assert [signal.getsignal(number) for number in answered_signals()] == before


@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
def test_a_second_ctrl_c_ends_at_once_also_as_a_launcher_hands_it_on(second):
    with stop_request() as should_stop:
        signal.raise_signal(signal.SIGINT)
        assert should_stop()
        with pytest.raises(Interrupted):
            signal.raise_signal(second)


def test_under_nohup_a_closed_terminal_is_nothing():
    assert signal.SIGHUP in answered_signals()
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert signal.SIGHUP not in answered_signals()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_process_whose_launcher_was_killed_stops(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    with stop_request() as should_stop:
        assert not should_stop()
        monkeypatch.setattr(os, "getppid", lambda: 1)
        assert should_stop()
        assert should_stop.source == "the launcher's death"


@pytest.mark.parametrize(
    ("rank", "error", "silent"),
    [
        ("0", UserError("x"), False),
        ("1", UserError("x"), True),
        ("1", LocalError("x"), False),
        ("0", ElsewhereError(), True),
    ],
)
def test_what_all_know_is_said_by_the_first_and_what_one_knows_by_that_one(monkeypatch, rank, error, silent):
    assert not is_silent(error)  # alone
    for name, value in (("MASTER_ADDR", "localhost"), ("WORLD_SIZE", "2"), ("RANK", rank)):
        monkeypatch.setenv(name, value)
    assert is_silent(error) is silent

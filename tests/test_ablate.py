"""`segdeformer ablate`: that its processes are started, stopped, gone on with and told about as promised."""

import csv
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from segdeformer.ablation import runs as ablation_runs
from segdeformer.ablation.folder import locked
from segdeformer.ablation.request import make_slots
from segdeformer.ablation.results import read_image_counts
from segdeformer.cli.main import app
from segdeformer.errors import UserError
from segdeformer.inference.metrics import ConfusionMatrix
from segdeformer.report.gains import OURS, PAPER, GainLine, gains_plot
from segdeformer.training.runlog import read_metrics

RUNNER = CliRunner(env={"COLUMNS": "160"})
FAKE = Path(__file__).parent / "fake_training.py"

THREE_ROWS = """
title = "Three rates"
base = "synthetic"
[[rows]]
name = "one"
train.learning_rate = 1e-3
[[rows]]
name = "Two & more"
train.learning_rate = 2e-3
[[rows]]
name = "five"
over = "Two & more"
train.learning_rate = 5e-3
"""


def fake_miou(thousandths: int, seed: int) -> float:
    """What the fake's scores are: 20 + rate + seed hits of 100 in the first image, one more in each; two
    classes, of which the second is predicted but never right."""
    return np.mean([20 + thousandths + seed + index for index in range(4)]) / 100 / 2


@pytest.fixture
def fake(monkeypatch, tmp_path) -> Path:
    """Ablations train by the fake; gives a folder with `rows.toml`."""
    for name in ("TRAIN", "SCORE"):
        monkeypatch.setattr(ablation_runs, name, (sys.executable, str(FAKE), name.lower()))
    monkeypatch.setattr(ablation_runs, "POLL_S", 0.01)
    monkeypatch.chdir(tmp_path)
    Path("rows.toml").write_text(THREE_ROWS)
    return tmp_path


def ablate(*arguments: object) -> Any:
    return RUNNER.invoke(app, ["ablate", *map(str, arguments), "--device", "cpu"])


def events(output: str) -> list[str]:
    """The lines that begin with a time, without it."""
    return [line.split("  ", 1)[1] for line in output.splitlines() if line[:1].isdigit() and ":" in line[:5]]


def diary(run: str) -> list[list[str]]:
    return [line.split() for line in Path(run, "diary.txt").read_text().splitlines()]


# A whole ablation.


def test_rows_are_trained_seed_by_seed_and_compared(fake) -> None:
    result = ablate("rows.toml", "--seeds", "2", "--iterations", 3, "--out", "out")
    assert (result.exit_code, result.stderr) == (0, ""), result
    started = [line for line in events(result.stdout) if line.endswith("started")]
    assert started == [
        f"{row}, seed {seed}: started" for seed in (0, 1) for row in ("one", "Two & more", "five")
    ]

    values = json.loads(Path("out/ablation.json").read_text())
    assert values["complete"] is True
    assert (values["title"], values["base"]["name"], values["seeds"]) == ("Three rates", "synthetic", [0, 1])
    assert (values["iterations"], values["data"]["name"], values["data"]["validation_images"]) == (
        3,
        "synthetic",
        4,
    )
    assert values["protocol"]["mode"] == "whole" and "bilinear" in values["protocol"]["notes"]
    assert values["versions"]["torch"] == torch.__version__
    assert (values["interval"]["level"], values["interval"]["resamples"]) == (0.95, 2000)
    one, two, five = values["rows"]
    assert [row["over"] for row in values["rows"]] == [None, "one", "Two & more"]
    assert two["changes"] == {"train.learning_rate": {"base": 1e-3, "row": 2e-3}}
    assert one["changes"] == {}
    assert [run["miou"] for run in two["runs"]] == pytest.approx([fake_miou(2, 0), fake_miou(2, 1)])
    assert two["miou"] == pytest.approx((fake_miou(2, 0) + fake_miou(2, 1)) / 2)
    assert two["standard_deviation"] == pytest.approx(0.005 / np.sqrt(2))  # of two values half a point apart
    # Every image and seed gains one hit (or three) of 100 in one of two classes: nothing varies.
    assert [two["gain"][key] for key in ("miou", "low", "high")] == pytest.approx([0.005] * 3)
    assert [five["gain"][key] for key in ("miou", "low", "high")] == pytest.approx([0.015] * 3)
    assert five["gain"]["each_seed"] == pytest.approx([0.015, 0.015])
    assert one["gain"] is None and one["paper"] is None
    assert Path("out", two["runs"][1]["folder"], "images.npz").is_file()
    assert "seed = 1" in Path("out/rows/two-more/seed-1/recipe.toml").read_text()

    assert (
        "| five | 13.50 ± 0.35 | 2/2 | +1.50 | +1.50 to +1.50 | Two & more |"
        in Path("out/table.md").read_text()
    )
    table = list(csv.DictReader(io.StringIO(Path("out/table.csv").read_text())))
    assert [row["row"] for row in table] == ["one", "Two & more", "five"]
    assert float(table[2]["gain_low"]) == pytest.approx(0.015)
    assert float(table[0]["miou_seed_1"]) == pytest.approx(fake_miou(1, 1))
    assert Path("out/plot.png").stat().st_size > 5000


def test_a_finished_ablation_is_not_trained_again_and_takes_more_seeds(fake) -> None:
    first = ablate("rows.toml", "--seeds", "1", "--out", "out")
    again = ablate("rows.toml", "--seeds", "1", "--out", "out")
    assert (first.exit_code, again.exit_code, events(again.stdout)) == (0, 0, [])
    more = ablate("rows.toml", "--seeds", "0,5", "--out", "out")
    assert [line for line in events(more.stdout) if "started" in line] == [
        f"{row}, seed 5: started" for row in ("one", "Two & more", "five")
    ]
    assert json.loads(Path("out/ablation.json").read_text())["rows"][0]["runs"][1]["seed"] == 5
    fewer = ablate("rows.toml", "--seeds", "1", "--out", "out")
    assert fewer.exit_code == 1 and "the seeds 0, 5, the command the seeds 0;" in fewer.stderr


def test_other_settings_are_refused(fake) -> None:
    assert ablate("rows.toml", "--seeds", 1, "--out", "out").exit_code == 0
    for change, told in [
        (("--iterations", 7), "`train.iterations` 20 in row `one`, the command 7;"),
        (("--batch", 3), "`train.batch_size` 4 in row `one`, the command 3;"),
    ]:
        result = ablate("rows.toml", "--seeds", 1, "--out", "out", *change)
        assert result.exit_code == 1 and told in result.stderr and result.stderr.count("\n") == 1
    Path("rows.toml").write_text(THREE_ROWS.replace('"five"', '"V"'))
    result = ablate("rows.toml", "--seeds", 1, "--out", "out")
    assert "it has the rows `one`, `Two & more`, `five`, the command the rows `one`" in result.stderr


def test_a_row_that_fails_is_marked_and_the_others_go_on(fake) -> None:
    Path("rows.toml").write_text(THREE_ROWS.replace("2e-3", "13e-3"))
    result = ablate("rows.toml", "--seeds", 1, "--out", "out")
    assert result.exit_code == 1
    assert "Two & more, seed 0: failed: unlucky thirteen" in result.stdout
    assert "five, seed 0: mIoU 13.25 %" in result.stdout
    assert "1 of 3 runs failed" in result.stderr and result.stderr.count("\n") == 1
    values = json.loads(Path("out/ablation.json").read_text())
    assert values["complete"] is False
    _, two, five = values["rows"]
    assert (two["miou"], two["runs"][0]["failure"]) == (None, "unlucky thirteen")
    assert five["miou"] == pytest.approx(fake_miou(5, 0)) and five["gain"] is None
    assert "`Two & more`, seed 0: failed: unlucky thirteen" in Path("out/table.md").read_text()
    ablate("rows.toml", "--seeds", 1, "--out", "out")
    assert len(diary("out/rows/two-more/seed-0")) == 2 and len(diary("out/rows/five/seed-0")) == 1


# Stopping and going on.


SLOW = THREE_ROWS.replace("2e-3", "11e-3")  # 50 ms an iteration, until it is stopped


def in_a_process(*options: str) -> subprocess.Popen:
    """`segdeformer ablate rows.toml` with the fake, to be killed."""
    program = (
        "import sys\n"
        "from segdeformer.cli.main import app\n"
        "from segdeformer.ablation import runs\n"
        f"fake = ({sys.executable!r}, {str(FAKE)!r})\n"
        "runs.TRAIN, runs.SCORE = (*fake, 'train'), (*fake, 'score')\n"
        "app(sys.argv[1:])\n"
    )
    command = (sys.executable, "-c", program, "ablate", "rows.toml", "--seeds", "1", "--out", "out")
    options = ("--iterations", "60", "--device", "cpu", *options)
    return subprocess.Popen((*command, *options), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(path: Path, text: str) -> None:
    deadline = time.monotonic() + 60
    while not (path.is_file() and text in path.read_text()):
        assert time.monotonic() < deadline, path
        time.sleep(0.01)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z" if sys.platform == "linux" else True


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_stopped_ablation_goes_on_where_it_was(fake, number) -> None:
    Path("rows.toml").write_text(SLOW)
    process = in_a_process()
    run = Path("out/rows/two-more/seed-0")
    wait_for(run / "metrics.jsonl", '"iteration": 5,')
    process.send_signal(number)
    out, error = process.communicate(timeout=60)
    if number == signal.SIGINT:
        assert process.returncode == 1
        assert error == "error: stopped with 2 runs left, all is saved; the same command goes on\n"
        assert "stopping: the running rows are saved" in out
    before = diary(run)
    result = ablate("rows.toml", "--seeds", 1, "--out", "out", "--iterations", 60)  # waits for orphans
    assert (result.exit_code, result.stderr) == (0, ""), result
    assert not alive(int(before[0][2]))
    assert "one" not in " ".join(events(result.stdout))
    assert "Two & more, seed 0: goes on" in result.stdout
    starts = [int(line[0]) for line in diary(run)]
    assert starts[0] == 0 and 5 <= starts[1] < 60
    iterations = [entry["iteration"] for entry in read_metrics(run)]
    assert iterations == list(range(1, 61))  # nothing is lost, nothing is done twice
    assert json.loads(Path("out/ablation.json").read_text())["complete"] is True


def test_a_run_killed_before_its_first_checkpoint_starts_anew(fake) -> None:
    run = Path("out/rows/one/seed-0")
    assert ablate("rows.toml", "--seeds", 1, "--out", "out").exit_code == 0
    (run / "last.safetensors").unlink()
    (run / "images.npz").unlink()
    (run / "recipe.toml").write_text("half a recipe")
    result = ablate("rows.toml", "--seeds", 1, "--out", "out")
    assert result.exit_code == 0 and events(result.stdout)[0] == "one, seed 0: started"
    assert [line[0] for line in diary("out/rows/one/seed-0")] == ["0", "0"]


def test_a_folder_in_use_is_refused_at_once(tmp_path) -> None:
    with (
        locked(tmp_path, print),
        pytest.raises(UserError, match=f"process {os.getpid()}"),
        locked(tmp_path, pytest.fail),
    ):
        pass


# Where processes run.


def test_jobs_share_the_threads_of_a_cpu(fake, monkeypatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "6")
    Path("rows.toml").write_text(THREE_ROWS.replace("1e-3", "11e-3").replace("2e-3", "11e-3"))
    result = ablate("rows.toml", "--seeds", 1, "--jobs", 2, "--iterations", 6, "--out", "out")
    assert result.exit_code == 0 and "2 at once" in result.stdout
    first, second = diary("out/rows/one/seed-0")[0], diary("out/rows/two-more/seed-0")[0]
    assert (first[1], second[1]) == ("3", "3")
    assert events(result.stdout)[:2] == ["one, seed 0: started", "Two & more, seed 0: started"]


def test_jobs_get_a_gpu_each(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    slots = make_slots("auto", "cuda", jobs=3, impl="triton")
    assert [slot.environment for slot in slots] == [
        {"CUDA_VISIBLE_DEVICES": name} for name in ("3", "5", "3")
    ]
    assert {slot.options for slot in slots} == {("--device", "cuda", "--impl", "triton")}
    assert len(make_slots("auto", "cuda", jobs=None, impl="auto")) == 2
    (named,) = make_slots("cuda:1", "cuda", jobs=None, impl="auto")
    assert named.environment == {} and named.options[:2] == ("--device", "cuda:1")


# The real thing.


def test_two_rows_train_for_real_and_score_as_their_last_validation(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("rows.toml").write_text(
        'base = "synthetic"\n[[rows]]\nname = "plain"\nmodel.context = "none"\n[[rows]]\nname = "both"\n'
    )
    options = ("--seeds", "7,", "--iterations", 2, "--batch", 2, "--jobs", 2)
    result = ablate("rows.toml", *options)
    assert (result.exit_code, result.stderr) == (0, ""), result
    folder = Path("runs/ablate-rows-synthetic")
    rows = json.loads((folder / "ablation.json").read_text())["rows"]
    for row in rows:
        run = folder / row["runs"][0]["folder"]
        validation = [entry for entry in read_metrics(run) if entry["kind"] == "validation"]
        assert [entry["iteration"] for entry in validation] == [2]
        assert row["miou"] == pytest.approx(validation[0]["miou"], abs=1e-3)  # folded: float32 rounding
        counts = read_image_counts(run / "images.npz")
        assert counts.counts.shape == (64, 5, 5) and counts.names[3] == "val0003"
        whole = ConfusionMatrix(5)
        whole.counts_KK += counts.counts.sum(0).astype(np.int64)
        assert row["miou"] == pytest.approx(whole.scores().miou, abs=1e-12)
    gain = rows[1]["gain"]
    assert gain["miou"] == pytest.approx(rows[1]["miou"] - rows[0]["miou"], abs=1e-12)
    assert gain["low"] < gain["miou"] < gain["high"]
    assert rows[0]["changes"].keys() == {"model.context"}


# The plot.


def test_plot_places_gains_on_a_linear_axis_and_the_paper_beside() -> None:
    lines = [GainLine(str(gain), gain, gain, gain, (gain,), gain + 1.0) for gain in (-1.0, 0.0, 3.0)]
    lines.append(GainLine("later", None, None, None, (), None, "not run yet"))
    picture_HW3 = gains_plot(lines, title="Gains", subtitle="of nothing")

    def center(color, place) -> float:
        """Mean x of the pixels of a colour in the line of a row; the lines are 58 px apart."""
        rows, columns = np.nonzero((picture_HW3 == color).all(-1))
        top = rows.min() - 20
        return float(columns[(rows >= top + 58 * place) & (rows < top + 58 * (place + 1))].mean())

    ours, paper = ([center(color, place) for place in range(3)] for color in (OURS, PAPER))
    per_point = ours[1] - ours[0]
    assert per_point > 20
    assert ours[2] - ours[1] == pytest.approx(3 * per_point, abs=2)
    assert [theirs - mine for mine, theirs in zip(ours, paper, strict=True)] == pytest.approx(
        [per_point] * 3, abs=2
    )

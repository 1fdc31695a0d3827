"""`segdeformer train`: what a run leaves behind, what it prints, and that it can be stopped and go on."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from segdeformer.cli.main import app
from segdeformer.cli.show import scores_line
from segdeformer.config import load_recipe
from segdeformer.data.built_in import SyntheticDataset
from segdeformer.inference.evaluate import Tally, evaluate_images
from segdeformer.report.sheet import write_sheet
from segdeformer.training import runlog
from segdeformer.training.optimizer import learning_rate_at
from segdeformer.training.prepare import new_folder
from segdeformer.training.runlog import RunLog, read_metrics
from segdeformer.training.saves import newest, read_state, store
from segdeformer.weights.checkpoint import BEST, LAST, load, read_checkpoint, save_checkpoint

RUNNER = CliRunner(env={"COLUMNS": "200"})
CPU = torch.device("cpu")
AUTO = "auto (sdpa, and blocks for large maps without gradients; upsampling in strips)"
SHORT = ("train", "synthetic", "--iterations", 4, "--batch", 2, "--seed", 3, "--workers", 0)


def segdeformer(*arguments: object) -> Any:
    return RUNNER.invoke(app, [str(argument) for argument in arguments])


def succeeded(*arguments: object) -> str:
    """What the command printed; it must have worked."""
    result = segdeformer(*arguments)
    assert (result.exit_code, result.stderr) == (0, ""), result
    return result.stdout


def files_of(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def with_three_classes(root: Path) -> Path:
    """A folder data set of PNGs: three classes that colours tell, five training and two validation images."""
    root.mkdir()
    (root / "classes.toml").write_text('names = ["sky", "sea", "sand"]')
    colors_K3 = np.array([[200, 150, 90], [140, 60, 20], [120, 200, 230]], np.uint8)
    for split, count in (("train", 5), ("val", 2)):
        for kind in ("images", "labels"):
            (root / kind / split).mkdir(parents=True)
        for index in range(count):
            labels_HW = np.arange(70)[:, None] * 3 // 70 + np.zeros((1, 90 + index), int)
            noise = np.random.default_rng(index).integers(0, 20, (*labels_HW.shape, 3), dtype=np.uint8)
            cv2.imwrite(str(root / f"images/{split}/{index}.png"), colors_K3[labels_HW] + noise)
            labels_HW[-5:] = 255
            cv2.imwrite(str(root / f"labels/{split}/{index}.png"), labels_HW)
    return root


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, str]:
    """A run of four iterations, and what it printed. The tests only read it."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    return folder, succeeded(*SHORT, "--out", folder)


# What a run leaves behind.


def test_a_run_folder_holds_these_files_and_no_others(finished):
    folder, _ = finished
    assert files_of(folder) == {
        BEST,
        LAST,
        ".lock",
        "checkpoints",
        "metrics.jsonl",
        "recipe.toml",
        "validation.png",
    }
    assert files_of(folder / "checkpoints") == {"iteration-000002", "iteration-000004"}


def test_the_stored_recipe_is_the_resolved_one_in_the_folder_and_in_both_checkpoints(finished):
    folder, _ = finished
    base = load_recipe("synthetic")
    changes = {
        "iterations": 4,
        "batch_size": 2,
        "seed": 3,
        "warmup_iterations": 1,  # 4 of 20
        "validate_every": 2,  # 10 of 20
        "checkpoint_every": 2,
    }
    expected = base.model_copy(update={"train": base.train.model_copy(update=changes)})
    assert load_recipe(str(folder / "recipe.toml")) == expected
    assert read_checkpoint(folder / LAST).recipe == expected
    assert read_checkpoint(folder / BEST).recipe == expected


def test_metrics_hold_both_losses_apart_the_rate_and_every_validation(finished):
    folder, _ = finished
    entries = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [(entry["kind"], entry["iteration"]) for entry in entries] == [
        ("train", 1),
        ("validation", 2),
        ("train", 4),
        ("validation", 4),
    ]
    config = load_recipe(str(folder / "recipe.toml")).train
    for entry in entries[::2]:
        assert entry["loss"] == pytest.approx(entry["loss_seg"] + 0.4 * entry["loss_attn"], rel=1e-6)
        assert entry["loss_seg"] == pytest.approx(np.log(5), rel=0.2)  # of five equally likely classes
        assert entry["lr"] == learning_rate_at(entry["iteration"] - 1, config.learning_rate, config)
        assert entry["images_per_s"] > 0
    for entry in entries[1::2]:
        assert entry["images"] == 64
        assert entry["miou"] == pytest.approx(np.mean(list(entry["iou"].values())))
        assert list(entry["iou"]) == list(SyntheticDataset("val").classes.names)
    assert [entry["best"] for entry in entries[1::2]] == [True, entries[3]["miou"] > entries[1]["miou"]]


def test_logged_scores_and_picture_are_those_of_the_best_checkpoint(finished, tmp_path):
    folder, printed = finished
    model, checkpoint = load(folder / BEST)
    recipe, data = checkpoint.recipe, SyntheticDataset("val")
    tally = Tally(data.classes)
    results = list(evaluate_images(model, data, tally, protocol=recipe.evaluate, data=recipe.data))
    report = tally.report()
    logged = [e for e in read_metrics(folder) if e["kind"] == "validation" and e["best"]][-1]
    assert (checkpoint.iteration, report.scores.miou, report.loss) == tuple(
        logged[key] for key in ("iteration", "miou", "loss")
    )
    assert f"iteration {checkpoint.iteration}: {scores_line(report)}\n" in printed
    shown = [results[index] for index in (5, 16, 26, 37, 48, 58)]  # evenly spread over the 64
    write_sheet(tmp_path / "again.png", shown, data.classes, headline=f"synthetic: {scores_line(report)}")
    assert (tmp_path / "again.png").read_bytes() == (folder / "validation.png").read_bytes()


def test_what_is_printed_says_what_was_changed_who_learns_how_fast_and_where_the_files_are(finished):
    folder, printed = finished
    lines = [re.sub(r"\s+", " ", line).strip() for line in printed.splitlines()]
    model = load(folder / LAST).model
    encoder = sum(p.numel() for p in model.encoder.parameters())
    norms = sum(p.numel() for n, p in model.encoder.named_parameters() if "norm" in n)
    total = sum(p.numel() for p in model.parameters())
    expected = [
        "changed train.iterations: 20 -> 4",
        "changed train.batch_size: 4 -> 2",
        "changed train.seed: 0 -> 3",
        "changed train.warmup_iterations: 4 -> 1",
        "changed train.validate_every: 10 -> 2",
        "changed train.checkpoint_every: 10 -> 2",
        "data synthetic: 64 training and 64 validation images, 5 classes",
        f"device cpu, attention {AUTO}, run folder {folder}",
        "parameters count learning rate weight decay",
        f"encoder {encoder - norms:,} 0.001 0.01",
        f"encoder norms, positions {norms:,} 0.001 0",
        f"decoder {total - encoder:,} 0.001 0.01",
        f"total {total:,}",
        "AdamW, batch 2, 4 iterations: linear warm-up over 1, then poly of power 1 to 0; "
        "loss seg + 0.4 attn, averaged over valid pixels",
        f"picture: {folder}/validation.png",
        f"checkpoint: {folder}/{BEST}",
    ]
    assert [line for line in lines if line in expected] == expected


# Options.


def test_classes_of_a_folder_that_cannot_be_written_to_lie_elsewhere_and_go_with_the_run(tmp_path):
    data, run = with_three_classes(tmp_path / "data"), tmp_path / "run"
    (data / "classes.toml").rename(tmp_path / "names.toml")
    succeeded(
        *("train", "--data", data, "--classes", tmp_path / "names.toml", "--iterations", 1, "--batch", 2),
        *("--workers", 0, "--out", run),
    )
    assert load_recipe(str(run / "recipe.toml")).data.classes == str(tmp_path / "names.toml")
    assert "mIoU" in succeeded("eval", run)


def test_runs_that_start_in_one_second_have_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folders = {new_folder("synthetic") for _ in range(3)}
    assert len(folders) == 3
    assert all(folder.is_dir() for folder in folders)


def test_a_run_goes_on_with_moved_data_but_not_with_data_of_other_classes(tmp_path):
    data, run = with_three_classes(tmp_path / "data"), tmp_path / "run"
    succeeded("train", "--data", data, "--iterations", 1, "--batch", 2, "--workers", 0, "--out", run)
    data.rename(tmp_path / "moved")
    other = segdeformer("train", "--resume", "--out", run, "--data", "synthetic")
    assert other.exit_code == 1
    assert "predicts 3 classes, synthetic has 5" in other.stderr
    succeeded("train", "--resume", "--out", run, "--data", tmp_path / "moved", "--iterations", 2)
    assert load_recipe(str(run / "recipe.toml")).data.root == str(tmp_path / "moved")
    assert load(run / LAST).checkpoint.iteration == 2


def test_iterations_scale_warm_up_and_intervals_but_never_to_an_interval_of_zero(tmp_path):
    succeeded("train", "synthetic", "--iterations", 1, "--batch", 1, "--workers", 0, "--out", tmp_path / "r")
    config = load_recipe(str(tmp_path / "r/recipe.toml")).train
    assert (config.warmup_iterations, config.validate_every, config.checkpoint_every) == (0, 1, 1)


def test_data_of_ones_own_trains_evaluates_and_predicts(tmp_path):
    data, run, out = with_three_classes(tmp_path / "my data"), tmp_path / "run", tmp_path / "out"
    printed = succeeded(
        "train", "--data", data, "--iterations", 3, "--batch", 1, "--workers", 0, "--out", run
    )
    assert printed.startswith("folder: Your own images: SegDeformer-B0, a starting point\n")
    assert "  changed model.num_classes: 2 -> 3\n" in printed
    assert f"  changed data.root: data/mine -> {data}\n" in printed
    assert "data folder: 5 training and 2 validation images, 3 classes\n" in printed
    assert read_checkpoint(run / LAST).classes.names == ("sky", "sea", "sand")

    succeeded("eval", run, "--json", tmp_path / "scores.json")
    scores = json.loads((tmp_path / "scores.json").read_text())["scores"]
    best = [e for e in read_metrics(run) if e["kind"] == "validation" and e["best"]][-1]
    assert scores["miou"] == best["miou"]
    assert [row["pixels"] for row in scores["classes"]] == [24 * 181, 23 * 181, 18 * 181]

    succeeded("predict", run, data / "images/val", "--out", out)
    hits = [
        cv2.imread(str(out / f"{index}.png"), cv2.IMREAD_UNCHANGED)[:65]
        == cv2.imread(str(data / f"labels/val/{index}.png"), cv2.IMREAD_UNCHANGED)[:65]
        for index in (0, 1)
    ]
    assert np.concatenate([hit.ravel() for hit in hits]).mean() == pytest.approx(scores["aacc"], abs=1e-12)


def test_data_with_another_number_of_classes_changes_the_model_and_says_so(tmp_path):
    data = with_three_classes(tmp_path / "data")
    printed = succeeded(
        *("train", "synthetic", "--data", data, "--iterations", 1, "--batch", 2, "--workers", 0),
        *("--out", tmp_path / "run"),
    )
    assert "  changed model.num_classes: 5 -> 3\n" in printed
    assert "  changed data.name: synthetic -> folder\n" in printed
    assert load(tmp_path / "run").model.decoder.head.classify.out_channels == 3


def test_without_out_a_run_gets_a_new_folder_under_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    succeeded("train", "synthetic", "--iterations", 1, "--batch", 1, "--workers", 0)
    (folder,) = Path("runs").iterdir()
    assert re.fullmatch(r"synthetic-\d{8}-\d{6}", folder.name)


# Stopping and going on.


def test_ctrl_c_is_one_line_and_the_resumed_run_ends_as_one_that_was_never_stopped(tmp_path):
    settings = ("synthetic", "--iterations", 16, "--batch", 1)
    broken, unbroken = tmp_path / "broken", tmp_path / "unbroken"
    command = [sys.executable, "-m", "segdeformer", "train", *map(str, settings), "--out", str(broken)]
    process = subprocess.Popen(
        [*command, "--workers", "2"], stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    diary = broken / "metrics.jsonl"
    while not (diary.is_file() and diary.stat().st_size):
        assert process.poll() is None
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does it: the workers get it too
    stderr = process.communicate(timeout=60)[1]
    said = re.fullmatch(
        rf"error: stopped by Ctrl-C after iteration (\d+), all is saved; go on with: "
        rf"segdeformer train --resume --out {broken}\n",
        stderr,
    )
    assert said, stderr
    assert process.returncode == 1
    stopped_at = int(said[1])
    assert files_of(broken) - {BEST} == {LAST, ".lock", "checkpoints", "metrics.jsonl", "recipe.toml"}
    assert f"iteration-{stopped_at:06}" in files_of(broken / "checkpoints")

    printed = succeeded("train", "--resume", "--out", broken, "--workers", 0)
    assert f"goes on after iteration {stopped_at}\n" in printed
    succeeded("train", *settings, "--workers", 0, "--out", unbroken)
    ours, theirs = load_file(broken / LAST), load_file(unbroken / LAST)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert files_of(broken) == files_of(unbroken)


def test_a_finished_run_has_nothing_to_resume_until_it_gets_more_iterations(tmp_path, finished):
    folder = shutil.copytree(finished[0], tmp_path / "run")
    printed = succeeded("train", "--resume", "--out", folder, "--workers", 0)
    assert printed.endswith(f"{folder} is complete at iteration 4; --iterations N trains on\n")
    printed = succeeded("train", "--resume", "--out", folder, "--iterations", 6, "--workers", 0)
    assert "  changed train.iterations: 4 -> 6\n" in printed
    assert [e["iteration"] for e in read_metrics(folder) if e["kind"] == "train"] == [1, 4, 6]
    assert read_checkpoint(folder / LAST).recipe.train.iterations == 6
    assert load_recipe(str(folder / "recipe.toml")) == read_checkpoint(folder / LAST).recipe


def test_a_resumed_run_that_gets_no_better_ends_with_the_scores_of_its_best_checkpoint(tmp_path, finished):
    folder = shutil.copytree(finished[0], tmp_path / "run")
    model, about = load(folder / LAST)

    def write_better(path: Path) -> None:
        save_checkpoint(path, model, recipe=about.recipe, classes=about.classes, iteration=4, best_miou=0.99)

    state = read_state(newest(folder))
    store(folder, iteration=4, write_model=write_better, state=state, keep=1)
    printed = succeeded("train", "--resume", "--out", folder, "--iterations", 5, "--workers", 0)
    assert [e["best"] for e in read_metrics(folder) if e["kind"] == "validation"][-1] is False
    best = [e for e in read_metrics(folder) if e["kind"] == "validation" and e["best"]][-1]
    summary = next(line for line in printed.splitlines() if line.endswith("on 64 images"))
    assert summary.startswith(f"iteration {best['iteration']}: mIoU {100 * best['miou']:.2f} %")


def test_resume_without_out_takes_the_newest_run(tmp_path, monkeypatch, finished):
    monkeypatch.chdir(tmp_path)
    for name, saved_at in (("older", 1000), ("newer", 2000)):
        shutil.copytree(finished[0], Path("runs", name))
        os.utime(Path("runs", name, LAST), (saved_at, saved_at))
    printed = succeeded("train", "--resume")
    assert printed.endswith("runs/newer is complete at iteration 4; --iterations N trains on\n")


# TensorBoard, where it is installed.


@pytest.mark.parametrize("installed", [True, False])
def test_tensorboard_gets_the_numbers_where_it_is_installed(tmp_path, monkeypatch, installed):
    written = []

    class Writer:
        def __init__(self, folder: str, purge_step: int) -> None:
            written.append((folder, purge_step))

        def add_scalar(self, name: str, value: float, iteration: int) -> None:
            written.append((name, value, iteration))

        def close(self) -> None:
            written.append("closed")

    module = ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = Writer
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    monkeypatch.setattr(runlog.importlib.util, "find_spec", lambda _name: module if installed else None)
    entry = {
        "kind": "validation",
        "iteration": 5,
        "miou": 0.25,
        "macc": None,
        "iou": {"sky": 0.5},
        "best": True,
    }
    with RunLog(tmp_path, since=0) as log:
        log.write(entry)
    assert read_metrics(tmp_path) == [entry]
    expected = [(str(tmp_path / "tensorboard"), 1), ("validation/miou", 0.25, 5), "closed"]
    assert written == (expected if installed else [])


def test_the_same_command_with_resume_begins_a_run_and_later_goes_on_with_it(tmp_path, finished):
    command = ("train", "synthetic", "--iterations", 4, "--batch", 2, "--seed", 3, "--workers", 0, "--resume")
    folder = tmp_path / "run"
    printed = succeeded(*command, "--out", folder)
    assert printed.startswith(f"no run in {folder} yet: it begins\n")
    ours, theirs = load_file(folder / LAST), load_file(finished[0] / LAST)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    again = succeeded(*command, "--out", folder)
    assert again.endswith(f"{folder} is complete at iteration 4; --iterations N trains on\n")
    longer = [6 if word == 4 else word for word in command]
    assert "  changed train.iterations: 4 -> 6\n" in succeeded(*longer, "--out", folder)

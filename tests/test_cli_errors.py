"""What goes wrong is one line on stderr, without a traceback: exit code 2 for usage, 1 for the rest."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
from limits import no_file_above
from typer.testing import CliRunner

from segdeformer.cli.main import app
from segdeformer.config import load_recipe, recipe_text
from segdeformer.data.built_in import SyntheticDataset
from segdeformer.inference import predict
from segdeformer.weights.build import build_model
from segdeformer.weights.checkpoint import LAST, load, save_checkpoint

RUNNER = CliRunner(env={"COLUMNS": "200"})
ONE_STEP = ("--iterations", 1, "--batch", 3, "--workers", 0)


def refusal(*arguments: object, code: int) -> str:
    """The one line after `error: ` with which the command must end."""
    result = RUNNER.invoke(app, [str(argument) for argument in arguments])
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == code, result.stderr
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    return result.stderr.removeprefix("error: ").removesuffix("\n")


def write_image(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), pixels)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """An untrained model of the synthetic recipe."""
    recipe = load_recipe("synthetic")
    path = tmp_path_factory.mktemp("checkpoint") / "model.safetensors"
    classes = SyntheticDataset("val").classes
    save_checkpoint(
        path, build_model(recipe.model), recipe=recipe, classes=classes, iteration=0, best_miou=None
    )
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A finished run of one iteration, to be copied."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    done = RUNNER.invoke(app, ["train", "synthetic", *map(str, ONE_STEP), "--out", str(folder)])
    assert done.exit_code == 0, done.stderr
    return folder


@pytest.fixture
def data(tmp_path) -> Path:
    """Three training images and one for validation, of five classes with the synthetic names."""
    root = tmp_path / "data"
    for split, index in (("train", 0), ("train", 1), ("train", 2), ("val", 0)):
        write_image(root / f"images/{split}/{index}.png", np.full((40, 48, 3), 90, np.uint8))
        write_image(root / f"labels/{split}/{index}.png", np.full((40, 48), index, np.uint8))
    names = ", ".join(f'"{name}"' for name in SyntheticDataset("val").classes.names)
    (root / "classes.toml").write_text(f"names = [{names}]\n")
    return root


# Usage: nothing was started, exit code 2.

DEVICES = "expected auto, cpu, cuda or cuda:N"
RESUME = "--resume with a RECIPE or changes goes on with the run in --out; name it"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["landcovr"],
            "no recipe `landcovr`: neither a shipped recipe nor a TOML file; did you mean `landcover`? "
            "`segdeformer recipes` lists them",
        ),
        (["synthetic", "--device", "tpu"], f"device is `tpu`; {DEVICES}"),
        (["synthetic", "--device", "meta"], f"device is `meta`; {DEVICES}"),
        (["synthetic", "--device", "cuda:x"], f"device is `cuda:x`; {DEVICES}"),
        (
            ["synthetic", "--impl", "fast"],
            "--impl is `fast`; expected one of auto, triton, sdpa, blocks, reference",
        ),
        (["--resume", "synthetic"], RESUME),
        (["--resume", "--batch", "3"], RESUME),
        (["--resume", "--seed", "0"], RESUME),
        (["--resume", "--weights", "x.pth"], RESUME),
        (
            ["--data", "ade20k:somewhere"],
            "name a recipe for ade20k, such as `segdeformer train ade20k-...`; "
            "`segdeformer recipes` lists them",
        ),
        (
            ["--data", "synthetik"],
            "--data synthetik: neither a data set nor a folder; did you mean `synthetic`?",
        ),
        (
            ["synthetic", "--data", "ade20k"],
            "--data ade20k: `ade20k` needs its folder; write --data ade20k:FOLDER",
        ),
    ],
)
def test_wrong_options_of_train_are_explained_and_start_nothing(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert refusal("train", *arguments, code=2) == message
    assert not any(tmp_path.iterdir())


def test_triton_without_a_gpu_says_what_it_needs(checkpoint, tmp_path, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    message = (
        "--impl `triton` needs a GPU, the device is cpu; use auto, sdpa, blocks or reference "
        "(or set TRITON_INTERPRET=1 to try the kernels, slowly, on the CPU)"
    )
    image, out = tmp_path / "a.png", ["--out", tmp_path / "out"]
    write_image(image, np.zeros((8, 8), np.uint8))
    for command in (
        ["train", "synthetic", *out],
        ["eval", checkpoint],
        ["predict", checkpoint, image, *out],
    ):
        assert refusal(*command, "--impl", "triton", "--device", "cpu", code=2) == message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--mode", "hole", "--mode: Input should be 'whole', 'slide' or 'auto'; got 'hole'"),
        ("--scales", "1;2", "--scales 1;2: expected numbers such as 0.5,1.0,1.5"),
        ("--scales", "1,0", "--scales: Input should be greater than 0; got 0.0"),
        ("--device", "gpu", f"device is `gpu`; {DEVICES}"),
        ("--impl", "", "--impl is ``; expected one of auto, triton, sdpa, blocks, reference"),
    ],
)
def test_wrong_options_of_eval_and_predict_are_explained(option, value, message, checkpoint, tmp_path):
    write_image(tmp_path / "a.png", np.zeros((8, 8), np.uint8))
    assert refusal("eval", checkpoint, option, value, code=2) == message
    predicting = ("predict", checkpoint, tmp_path / "a.png", "--out", tmp_path / "out")
    assert refusal(*predicting, option, value, code=2) == message
    assert not (tmp_path / "out").exists()


def test_a_gpu_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    message = "device is `cuda:1`, but PyTorch sees no CUDA GPU here; use --device cpu"
    assert refusal("train", "synthetic", "--device", "cuda:1", code=2) == message


def test_an_unknown_key_of_a_recipe_names_its_path_and_the_nearest(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(recipe_text("synthetic").replace("\nlearning_rate", "\nlearning_rat"))
    expected = f"{path}: unknown key `train.learning_rat`; did you mean `learning_rate`?"
    assert refusal("train", path, code=2) == expected


def test_a_seed_too_large_for_pytorch_is_a_usage_error(tmp_path):
    seed = 2**64
    assert "seed" in refusal("train", "synthetic", *ONE_STEP, "--seed", seed, "--out", tmp_path, code=2)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments",
    [
        ["trian"],
        ["predict"],
        ["train", "synthetic", "--iterations", "0"],
        ["train", "--epochs", "3"],
        ["eval", "--opacity"],
    ],
)
def test_what_the_parser_refuses_is_exit_code_2_without_a_traceback(arguments):
    result = RUNNER.invoke(app, arguments)
    assert isinstance(result.exception, SystemExit)
    assert result.exit_code == 2
    assert "Traceback" not in result.stderr


# Data that cannot be used, exit code 1.


def spoil(data: Path, how: str, split: str) -> str:
    """Damage an image or label map of the split; returns the message that says so."""
    image, labels = data / f"images/{split}/0.png", data / f"labels/{split}/0.png"
    match how:
        case "unreadable image":
            image.write_bytes(image.read_bytes()[:60])
            return f"{image}: not a readable image (damaged, cut off or another format); replace it"
        case "size":
            write_image(labels, np.zeros((40, 47), np.uint8))
            return f"{image} is 48x40 px but {labels} is 47x40 px; every pixel needs its label"
        case "ids":
            write_image(labels, np.full((40, 48), 7, np.uint8) + np.eye(40, 48, dtype=np.uint8))
            return (
                f"{labels}: label ids 7, 8 are not among 0 to 4 and 255 (ignored) of 5 classes; "
                "is it a 0/255 mask or a grey picture? write one class id per pixel"
            )
    raise ValueError(how)


@pytest.mark.parametrize("how", ["unreadable image", "size", "ids"])
def test_a_bad_file_ends_training_and_evaluation_with_its_name(how, data, tmp_path, checkpoint):
    out = tmp_path / "run"
    expected = spoil(data, how, "train")
    message = refusal("train", "synthetic", "--data", data, *ONE_STEP, "--out", out, code=1)
    fault = expected if how == "ids" else expected.rpartition("; ")[0]  # the finding has its own remedy
    assert message.startswith(f"train: 1 of 3, {fault}; ")  # the doctor's, before anything is started
    assert not out.exists()
    expected = spoil(data, how, "val")
    assert refusal("eval", checkpoint, "--data", data, "--json", tmp_path / "s.json", code=1) == expected
    assert not (tmp_path / "s.json").exists()


def test_an_empty_folder_and_a_missing_one_are_named_with_the_layout(data, tmp_path, checkpoint):
    (data / "images/val/0.png").unlink()
    expected = f"{data}/images/val: no images there (*.jpg, *.jpeg, *.png, *.tif, *.tiff, *.bmp, *.webp)"
    out = tmp_path / "run"
    assert refusal("train", "synthetic", "--data", data, *ONE_STEP, "--out", out, code=1) == expected
    assert refusal("eval", checkpoint, "--data", data, code=1) == expected
    assert not out.exists()
    empty = tmp_path / "empty"
    empty.mkdir()
    assert refusal("eval", checkpoint, "--data", empty, code=1) == (
        f"{empty}/images/val: no such folder; expected images/val and labels/val in {empty}"
    )
    assert refusal("predict", checkpoint, empty, "--out", out, code=1) == (
        f"{empty} holds no images (.jpg, .jpeg, .png, .tif, .tiff, .bmp, .webp)"
    )


def test_classes_of_checkpoint_and_data_must_agree_in_number_and_name(data, checkpoint):
    table = (data / "classes.toml").read_text()
    (data / "classes.toml").write_text('names = ["a", "b", "c"]')
    assert refusal("eval", checkpoint, "--data", data, code=1) == (
        f"{checkpoint} predicts 5 classes, folder has 3; "
        "evaluate it on data with the classes it was trained on"
    )
    (data / "classes.toml").write_text(table.replace("shape 3", "sea"))
    assert refusal("eval", checkpoint, "--data", data, code=1) == (
        f"{checkpoint}: class 3 is `shape 3`, in folder it is `sea`; "
        "the ids would be compared wrongly, so make the class tables agree"
    )


def test_a_recipe_with_another_number_of_classes_than_its_data_says_what_to_set(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(recipe_text("synthetic").replace("num_classes = 5", "num_classes = 4"))
    expected = "recipe synthetic has model.num_classes = 4, synthetic has 5 classes; set it to 5"
    assert refusal("train", path, *ONE_STEP, "--out", tmp_path / "run", code=1) == expected
    assert not (tmp_path / "run").exists()


# Checkpoints and runs.


def test_a_truncated_checkpoint_is_one_line_for_every_command(run, tmp_path):
    folder = shutil.copytree(run, tmp_path / "run")
    for path in [*folder.glob("*.safetensors"), *folder.glob("checkpoints/*/*.safetensors")]:
        path.write_bytes(path.read_bytes()[:-100])
    write_image(tmp_path / "a.png", np.zeros((8, 8), np.uint8))
    for arguments in (
        ("eval", folder / LAST),
        ("predict", folder / LAST, tmp_path / "a.png", "--out", tmp_path / "out"),
    ):
        message = refusal(*arguments, code=1)
        assert message.startswith(f"{folder / LAST} cannot be read as a checkpoint (")
        assert message.endswith("); it may be truncated or of another kind")
    message = refusal("train", "--resume", "--out", folder, code=1)
    assert message.startswith(f"{folder}: no checkpoint is whole (iteration-000001: model.safetensors ")


def test_without_any_run_eval_and_resume_say_how_to_start_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    expected = "no run in runs/ yet; name a checkpoint, or start with `segdeformer train`"
    assert refusal("eval", code=1) == expected
    assert refusal("train", "--resume", code=1) == expected


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (["--seed", "5"], "train.seed is 5, the run has 0"),
        (["--batch", "6"], "train.batch_size is 6, the run has 3"),
        (["--precision", "bfloat16"], "train.precision is bfloat16, the run has float32"),
        (["landcover"], "name is landcover, the run has synthetic"),
    ],
)
def test_a_repeated_command_that_says_something_else_is_refused_by_name(run, changes, told):
    message = refusal("train", "--resume", "--out", run, *changes, code=2)
    assert message.startswith("--resume: ")
    assert told in message
    assert message.endswith(f"leave it out, or choose another --out than {run}")


def test_a_folder_that_holds_a_run_is_not_overwritten(run):
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert refusal("train", "synthetic", *ONE_STEP, "--out", run, code=1) == (
        f"{run} holds a run already; go on with --resume, or choose another --out"
    )
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_a_damaged_optimiser_state_is_one_line(run, tmp_path):
    folder = shutil.copytree(run, tmp_path / "run")
    state = folder / "checkpoints/iteration-000001/training.pt"
    state.write_bytes(state.read_bytes()[:5000])
    message = refusal("train", "--resume", "--out", folder, "--iterations", 2, code=1)
    assert message.startswith(f"{folder}: no checkpoint is whole (iteration-000001: training.pt ")


# No space, and Ctrl-C.


def test_no_space_for_a_checkpoint_leaves_the_previous_one_loadable(run, tmp_path):
    folder = shutil.copytree(run, tmp_path / "run")
    before = (folder / LAST).read_bytes()
    with no_file_above(100_000):
        message = refusal("train", "--resume", "--out", folder, "--iterations", 2, "--workers", 0, code=1)
    assert message.startswith(f"{folder}/")
    assert ": cannot be written (" in message
    assert message.endswith("); free space or choose another place")
    assert (folder / LAST).read_bytes() == before
    assert load(folder / LAST).checkpoint.iteration == 1
    assert {path.name for path in folder.iterdir()} == {path.name for path in run.iterdir()}


def test_no_space_for_results_leaves_none_half_written(data, checkpoint, tmp_path):
    scores, out, image = tmp_path / "s.json", tmp_path / "out", data / "images/val/0.png"
    with no_file_above(50):
        assert refusal("eval", checkpoint, "--data", data, "--json", scores, code=1) == (
            f"{scores}: cannot be written (File too large); free space or choose another place"
        )
        assert refusal("predict", checkpoint, image, "--out", out, code=1) == (
            f"{out}/0.png: cannot be written (File too large); free space or choose another place"
        )
    assert not scores.exists()
    assert list(out.iterdir()) == []


def test_a_file_in_the_way_of_a_folder_is_named(data, checkpoint):
    out = data / "classes.toml"
    assert refusal("predict", checkpoint, data / "images/val/0.png", "--out", out, code=1).startswith(
        f"{out}/0.png: cannot be written ("
    )


def test_ctrl_c_at_any_moment_is_one_line(data, checkpoint, tmp_path, monkeypatch):
    def interrupted(*_arguments, **_options):
        raise KeyboardInterrupt

    monkeypatch.setattr(predict, "strips", interrupted)
    assert refusal("predict", checkpoint, data / "images/val", "--out", tmp_path / "out", code=1) == (
        "stopped by Ctrl-C; files that were being written are left out"
    )
    assert not (tmp_path / "out").exists()


def test_a_real_ctrl_c_while_predicting_leaves_whole_files_only(checkpoint, tmp_path):
    for index in range(200):
        write_image(tmp_path / f"in/{index:03}.png", np.full((300, 400, 3), index, np.uint8))
    out = tmp_path / "out"
    command = ["predict", str(checkpoint), str(tmp_path / "in"), "--out", str(out)]
    process = subprocess.Popen(
        [sys.executable, "-m", "segdeformer", *command], stderr=subprocess.PIPE, text=True
    )
    while not (out / "000.png").exists():
        assert process.poll() is None
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGINT)
    stderr = process.communicate(timeout=60)[1]
    assert stderr == "error: stopped by Ctrl-C; files that were being written are left out\n"
    assert process.returncode == 1
    written = sorted(out.iterdir())
    assert [path.name for path in written] == [f"{index:03}.png" for index in range(len(written))]
    assert 1 <= len(written) < 200
    assert all(cv2.imread(str(path), cv2.IMREAD_UNCHANGED).shape == (300, 400) for path in written)

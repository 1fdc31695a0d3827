"""Checkpoints are whole or absent, and a run that goes on from one is the run that was never stopped."""

import hashlib
import os
import shutil
from pathlib import Path

import pytest
import torch
from limits import no_file_above
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from segdeformer.config import Recipe, load_recipe
from segdeformer.data.built_in import SyntheticDataset
from segdeformer.data.samples import Splits
from segdeformer.errors import UserError
from segdeformer.runtime import Runtime
from segdeformer.training.loop import Run, Stopped, Validated, resume_run, save_run, start_run, train
from segdeformer.training.runlog import RunLog, read_metrics
from segdeformer.training.saves import newest, read_state, store
from segdeformer.weights.checkpoint import (
    BEST,
    LAST,
    file_sha256,
    find_checkpoint,
    load,
    newest_run,
    read_checkpoint,
    save_checkpoint,
)

CPU = torch.device("cpu")
TRAIN_DATA = SyntheticDataset("train", num_images=7, size_hw=(49, 63))
VAL_DATA = SyntheticDataset("val", num_images=2, size_hw=(33, 41))
DATA = Splits(TRAIN_DATA, VAL_DATA)


def tiny_recipe(**changes: object) -> Recipe:
    """Six iterations of two crops, validated and saved after four and six."""
    recipe = load_recipe("synthetic")
    train_config = {"iterations": 6, "batch_size": 2, "validate_every": 4, "checkpoint_every": 4, **changes}
    return recipe.model_copy(
        update={
            "augment": recipe.augment.model_copy(update={"crop": (32, 40)}),
            "train": recipe.train.model_copy(update=train_config),
        }
    )


def trained(folder: Path, *, workers: int = 0, **changes: object) -> Path:
    """A finished run."""
    for _ in train(start_run(tiny_recipe(**changes), folder, DATA, runtime=Runtime(workers=workers))):
        pass
    return folder


def resumed(folder: Path) -> Run:
    return resume_run(read_checkpoint(folder / LAST).recipe, folder, DATA)


def weights_digest(path: Path) -> str:
    tensors = sorted(load_file(path).items())
    return hashlib.sha256(b"".join(n.encode() + t.numpy().tobytes() for n, t in tensors)).hexdigest()


def message_of(action, *arguments) -> str:
    """The one line of the `UserError` that the action raises."""
    with pytest.raises(UserError) as caught:
        action(*arguments)
    assert caught.value.exit_code == 1
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A finished run that the tests only read."""
    return trained(tmp_path_factory.mktemp("runs") / "whole")


# What a checkpoint holds.


def test_a_loaded_model_is_the_saved_one_bit_for_bit(tmp_path):
    run = start_run(tiny_recipe(), tmp_path, DATA)
    for _ in train(run):
        pass
    loaded = load(tmp_path / LAST)
    assert not loaded.model.training
    images = torch.randn(1, 3, 45, 63)
    with torch.inference_mode():
        assert torch.equal(loaded.model(images).logits_BKhw, run.model.eval()(images).logits_BKhw)
    about = loaded.checkpoint
    assert (about.recipe, about.classes, about.iteration) == (run.recipe, TRAIN_DATA.classes, 6)
    assert (
        about.best_miou
        == run.progress.best_miou
        == max(entry["miou"] for entry in read_metrics(tmp_path) if entry["kind"] == "validation")
    )


def test_the_best_checkpoint_is_that_of_the_best_validation(whole):
    validations = [entry for entry in read_metrics(whole) if entry["kind"] == "validation"]
    assert [entry["iteration"] for entry in validations] == [4, 6]
    best = max(validations, key=lambda entry: entry["miou"])
    about = read_checkpoint(whole / BEST)
    assert (about.iteration, about.best_miou) == (best["iteration"], best["miou"])


def test_equal_models_make_equal_files(tmp_path, whole):
    loaded = load(whole / LAST)
    about = loaded.checkpoint
    for name in ("a", "b"):
        save_checkpoint(
            tmp_path / name,
            loaded.model,
            recipe=about.recipe,
            classes=about.classes,
            iteration=about.iteration,
            best_miou=about.best_miou,
        )
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes() == (whole / LAST).read_bytes()
    assert file_sha256(tmp_path / "a") == hashlib.sha256((whole / LAST).read_bytes()).hexdigest()


def test_files_of_a_run_can_be_read_by_others_as_the_umask_allows(whole):
    umask = os.umask(0)
    os.umask(umask)
    modes = {path: path.stat().st_mode & 0o777 for path in whole.rglob("*")}
    assert len(modes) > 8
    assert modes == {path: (0o777 if path.is_dir() else 0o666) & ~umask for path in modes}


# Which checkpoint is meant.


def test_a_run_folder_stands_for_its_best_then_its_last(tmp_path, whole):
    assert find_checkpoint(whole) == whole / BEST
    assert find_checkpoint(whole / LAST) == whole / LAST
    folder = whole / "checkpoints/iteration-000006"
    assert find_checkpoint(folder) == folder / "model.safetensors"
    (tmp_path / LAST).write_bytes(b"")
    assert find_checkpoint(tmp_path) == tmp_path / LAST
    (tmp_path / LAST).unlink()
    assert message_of(find_checkpoint, tmp_path) == (
        f"{tmp_path} holds no checkpoint (best.safetensors or last.safetensors); "
        "was it trained to its first save?"
    )
    absent = tmp_path / "absent"
    assert message_of(find_checkpoint, absent) == f"no checkpoint {absent}: neither a file nor a run folder"


def test_the_newest_run_is_the_one_saved_to_last(tmp_path):
    assert message_of(newest_run, tmp_path) == (
        f"no run in {tmp_path}/ yet; name a checkpoint, or start with `segdeformer train`"
    )
    for name, saved_at in (("a", 300), ("b", 100), ("c", 200)):
        (tmp_path / name).mkdir()
        (tmp_path / name / LAST).touch()
        os.utime(tmp_path / name / LAST, (saved_at, saved_at))
    (tmp_path / "d").mkdir()  # not saved yet
    assert newest_run(tmp_path) == tmp_path / "a"


# Files that are no checkpoint.


@pytest.mark.parametrize("kept", [0, 5, 1000, 20_000, -1])
def test_a_truncated_checkpoint_is_one_line(tmp_path, whole, kept):
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes((whole / LAST).read_bytes()[:kept])
    message = message_of(load, cut)
    assert message.startswith(f"{cut} cannot be read as a checkpoint (")
    assert message.endswith("); it may be truncated or of another kind")


def test_other_safetensors_files_are_told_apart(tmp_path):
    path = tmp_path / "encoder.safetensors"
    save_file({"a": torch.zeros(2)}, path, {"format": "pt"})
    assert message_of(load, path) == (
        f"{path} is a safetensors file, but no checkpoint of segdeformer (segdeformer-1); "
        "for encoder weights use `segdeformer train --weights FILE`"
    )


def test_weights_that_do_not_fit_the_recipe_are_counted_and_named(tmp_path, whole):
    weights = load_file(whole / LAST)
    key, other = "decoder.head.classify.bias", "decoder.head.classify.weight"
    weights["surprise"] = weights.pop(key)
    weights[other] = weights[other][:3].clone()
    path = tmp_path / LAST
    with safe_open(whole / LAST, "pt") as file:
        save_file(weights, path, file.metadata())
    assert message_of(load, path) == (
        f"{path} does not fit its own recipe: 1 keys missing ['{key}'], "
        f"1 unexpected ['surprise'], 1 of other shapes ['{other}']"
    )


# Nothing is half-written.


def contents(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.mark.parametrize("limit_kib", [1, 3000, 4000])
def test_no_space_leaves_the_checkpoint_before_and_no_temporary_file(tmp_path, whole, limit_kib):
    """The limits stop the weights, and then, with larger weights' worth of room, the optimiser's state."""
    folder = shutil.copytree(whole, tmp_path / "run")
    run = resumed(folder)
    before = contents(folder)
    run.model.decoder.head.classify.bias.data.add_(1)
    run.progress.iteration = 7
    with no_file_above(limit_kib * 2**10):
        message = message_of(save_run, run)
    assert message.startswith(f"{folder}: the checkpoint of iteration 7 cannot be written (File too large); ")
    assert message.endswith("that of iteration 6 is kept: make room and go on with --resume")
    assert contents(folder) == before
    assert resumed(folder).progress.iteration == 6
    save_run(run)  # room again
    assert resumed(folder).progress.iteration == 7
    assert load(folder / LAST).model.decoder.head.classify.bias.min() > 0.5


def test_ctrl_c_while_a_file_is_written_leaves_the_previous_one(tmp_path, monkeypatch, whole):
    def interrupted(_file: int) -> None:
        raise KeyboardInterrupt

    loaded = load(whole / LAST)
    (tmp_path / LAST).write_bytes(b"previous")
    monkeypatch.setattr("segdeformer.files.os.fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(
            tmp_path / LAST,
            loaded.model,
            recipe=loaded.checkpoint.recipe,
            classes=loaded.checkpoint.classes,
            iteration=1,
            best_miou=None,
        )
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {LAST: b"previous"}


def test_a_full_disk_under_the_diary_is_one_line(tmp_path):
    def write_to_a_full_disk() -> None:
        with Path("/dev/full").open("a") as full, RunLog(tmp_path, since=0) as log:
            log.file.close()
            log.file = full
            log.write({"kind": "train", "iteration": 1})

    assert message_of(write_to_a_full_disk) == (
        f"cannot write {tmp_path}/metrics.jsonl: No space left on device; make room and --resume"
    )


# What a run goes on from.


def test_a_truncated_checkpoint_is_passed_over_and_the_run_ends_as_the_unbroken_one(tmp_path, whole):
    folder = shutil.copytree(whole, tmp_path / "run")
    state = folder / "checkpoints/iteration-000006/training.pt"
    state.write_bytes(state.read_bytes()[:1000])
    run = resumed(folder)
    assert run.progress.iteration == 4
    assert run.progress.warnings == [
        f"{state.parent} is damaged (training.pt is not what was written) and skipped; "
        "going on from the one before it"
    ]
    for _ in train(run):
        pass
    assert weights_digest(folder / LAST) == weights_digest(whole / LAST)
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == [
        "iteration-000004",
        "iteration-000006",
    ]


def test_a_state_of_another_model_is_refused(tmp_path, whole):
    folder = shutil.copytree(whole, tmp_path / "run")
    stored = newest(folder)
    state = read_state(stored)
    first = next(iter(state["optimizer"]))
    state["optimizer"][first]["exp_avg"] = torch.zeros(3, 1)
    store(folder, iteration=7, write_model=lambda path: shutil.copy(stored.model, path), state=state)
    assert message_of(resumed, folder) == (
        f"{folder}/checkpoints/iteration-000007 holds the optimiser's state of another model (`{first}`); "
        "it cannot be resumed"
    )


# Same seed, same weights: twice, with workers, and after a stop.


@pytest.mark.parametrize("workers", [0, 2])
def test_a_second_run_with_the_same_seed_makes_the_same_files(tmp_path, whole, workers):
    again = trained(tmp_path / "again", workers=workers)
    for name in (LAST, BEST):
        assert (again / name).read_bytes() == (whole / name).read_bytes()


def test_another_seed_makes_other_weights(tmp_path, whole):
    assert weights_digest(trained(tmp_path / "other", seed=1) / LAST) != weights_digest(whole / LAST)


@pytest.mark.parametrize("stop_after", [1, 4, 5])
def test_a_stopped_and_resumed_run_ends_as_the_unbroken_one(tmp_path, whole, stop_after):
    run = start_run(tiny_recipe(), tmp_path, DATA)
    *_, last = train(run, should_stop=lambda: run.progress.iteration == stop_after)
    assert last == Stopped(stop_after)
    assert read_checkpoint(tmp_path / LAST).iteration == stop_after
    again = resumed(tmp_path)
    assert again.progress.iteration == stop_after
    for _ in train(again):
        pass
    assert (tmp_path / LAST).read_bytes() == (whole / LAST).read_bytes()
    assert (tmp_path / BEST).read_bytes() == (whole / BEST).read_bytes()
    diaries = [
        [{k: v for k, v in entry.items() if k != "images_per_s"} for entry in read_metrics(folder)]
        for folder in (tmp_path, whole)
    ]
    assert diaries[0] == diaries[1]


def test_a_run_stopped_in_its_last_validation_is_validated_when_it_goes_on(tmp_path, whole):
    run = start_run(tiny_recipe(), tmp_path, DATA)
    *_, last = train(run, should_stop=lambda: run.progress.iteration == 6)
    assert last == Stopped(6)
    events = list(train(resumed(tmp_path)))
    assert [event.iteration for event in events if isinstance(event, Validated)] == [6]
    assert (tmp_path / BEST).read_bytes() == (whole / BEST).read_bytes()


def test_a_loss_that_stays_not_finite_stops_the_run_before_it_is_saved(tmp_path):
    recipe = tiny_recipe(learning_rate=1e30, warmup_iterations=0, max_skipped_steps=2)
    run = start_run(recipe, tmp_path, DATA)
    with pytest.raises(UserError, match=r"^loss or gradient not finite in 3 steps in a row, 2 are allowed"):
        list(train(run))
    assert newest(tmp_path) is None
    assert not (tmp_path / LAST).exists()

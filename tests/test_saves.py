"""Checkpoints are whole or absent, the newest whole one is found, and a full disk loses nothing."""

import errno
import hashlib
import os
import re
import signal
from pathlib import Path

import pytest
import torch
from limits import no_file_above
from safetensors.torch import save_file

from segdeformer import files
from segdeformer.errors import UserError
from segdeformer.training import saves
from segdeformer.training.saves import held, newest, read_state, store, tidy
from segdeformer.weights.checkpoint import LAST


def model_of(iteration: int) -> bytes:
    return f"weights of iteration {iteration}".encode()


def save(run: Path, iteration: int, *, size: int = 11, keep: int = 2) -> Path:
    """A checkpoint whose files tell their iteration."""
    return store(
        run,
        iteration=iteration,
        write_model=lambda path: path.write_bytes(model_of(iteration)),
        state={"weights": torch.full((size,), float(iteration)), "about": [1, (2.5, None), "x"]},
        keep=keep,
    )


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def contents(run: Path) -> dict[str, bytes]:
    return {str(path.relative_to(run)): path.read_bytes() for path in run.rglob("*") if path.is_file()}


def message_of(action, *arguments, **options) -> str:
    """The one line of the `UserError` that the action raises."""
    with pytest.raises(UserError) as caught:
        action(*arguments, **options)
    assert caught.value.exit_code == 1
    assert "\n" not in str(caught.value)
    return str(caught.value)


# What is stored.


def test_a_stored_checkpoint_is_read_back(tmp_path):
    assert newest(tmp_path) is None
    folder = save(tmp_path, 4000)
    assert folder == tmp_path / "checkpoints/iteration-004000"
    assert sorted(path.name for path in folder.iterdir()) == [
        "SHA256SUMS",
        "model.safetensors",
        "training.pt",
    ]
    stored = newest(tmp_path)
    assert (stored.folder, stored.iteration, stored.warnings) == (folder, 4000, [])
    assert stored.model.read_bytes() == (tmp_path / LAST).read_bytes() == model_of(4000)
    state = read_state(stored)
    assert torch.equal(state["weights"], torch.full((11,), 4000.0))
    assert state["about"] == [1, (2.5, None), "x"]


def test_the_sums_are_those_of_the_files_as_sha256sum_writes_them(tmp_path):
    folder = save(tmp_path, 1)
    assert (folder / "SHA256SUMS").read_text() == "".join(
        f"{hashlib.sha256((folder / name).read_bytes()).hexdigest()}  {name}\n"
        for name in ("model.safetensors", "training.pt")
    )


def test_equal_states_make_equal_files(tmp_path):
    assert contents(save(tmp_path / "a", 3)) == contents(save(tmp_path / "b", 3))


def test_the_newest_are_kept(tmp_path):
    for iteration in (2, 10, 300, 1_234_567):
        save(tmp_path, iteration, keep=3)
    assert names(tmp_path) == ["iteration-000010", "iteration-000300", "iteration-1234567"]
    save(tmp_path, 1_234_568, keep=1)
    assert names(tmp_path) == ["iteration-1234568"]
    assert (tmp_path / LAST).samefile(newest(tmp_path).model)


def test_an_iteration_saved_again_replaces_its_first_save(tmp_path):
    save(tmp_path, 1)
    save(tmp_path, 2)
    assert save(tmp_path, 2).name == "iteration-000002.1"
    assert names(tmp_path) == ["iteration-000001", "iteration-000002.1"]
    assert save(tmp_path, 2).name == "iteration-000002.2"
    assert newest(tmp_path).iteration == 2
    save(tmp_path, 3)
    assert names(tmp_path) == ["iteration-000002.2", "iteration-000003"]


def test_what_is_ahead_of_a_run_that_went_back_is_removed(tmp_path):
    for iteration in (4, 8, 12):
        save(tmp_path, iteration, keep=3)
    save(tmp_path, 6, keep=3)
    assert names(tmp_path) == ["iteration-000004", "iteration-000006"]


def test_a_copy_has_the_easy_name_where_links_are_not_possible(tmp_path, monkeypatch):
    def refuse(_source: Path, _path: Path) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(files.os, "link", refuse)
    save(tmp_path, 1)
    folder = save(tmp_path, 2)
    last = tmp_path / LAST
    assert not last.samefile(folder / "model.safetensors")
    assert last.read_bytes() == model_of(2)
    assert last.stat().st_mtime_ns == (folder / "model.safetensors").stat().st_mtime_ns
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoints", LAST]


# What is damaged.


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("name", "damage", "reason"),
    [
        ("training.pt", cut, "training.pt is not what was written"),
        ("training.pt", flip_a_bit, "training.pt is not what was written"),
        ("model.safetensors", flip_a_bit, "model.safetensors is not what was written"),
        ("model.safetensors", Path.unlink, "model.safetensors is missing"),
        ("training.pt", Path.unlink, "training.pt is missing"),
        ("SHA256SUMS", Path.unlink, "SHA256SUMS is missing"),
        ("SHA256SUMS", lambda path: path.write_bytes(b""), "SHA256SUMS is cut off"),
        ("SHA256SUMS", lambda path: path.write_bytes(b"\xff\xfe"), "SHA256SUMS is not what was written"),
    ],
)
def test_a_damaged_checkpoint_is_skipped_with_a_warning(tmp_path, name, damage, reason):
    before, folder = save(tmp_path, 1), save(tmp_path, 2)
    damage(folder / name)
    stored = newest(tmp_path)
    assert (stored.folder, stored.iteration) == (before, 1)
    assert stored.warnings == [f"{folder} is damaged ({reason}) and skipped; going on from the one before it"]
    assert stored.model.read_bytes() == model_of(1)
    assert read_state(stored)["weights"][0] == 1


def test_a_damaged_checkpoint_takes_no_place_of_a_whole_one(tmp_path):
    for iteration in (1, 2, 3):
        save(tmp_path, iteration, keep=3)
    for iteration in (2, 3):
        cut(tmp_path / f"checkpoints/iteration-00000{iteration}/training.pt")
    stored = newest(tmp_path)
    assert len(stored.warnings) == 2
    tidy(tmp_path, stored)
    assert (tmp_path / LAST).read_bytes() == model_of(1)
    assert newest(tmp_path).warnings == []
    save(tmp_path, 4, keep=2)
    assert names(tmp_path) == ["iteration-000001", "iteration-000004"]


def test_no_whole_checkpoint_is_one_line_that_says_what_was_found(tmp_path):
    cut(save(tmp_path, 1) / "training.pt")
    (save(tmp_path, 2) / "model.safetensors").unlink()
    assert message_of(newest, tmp_path) == (
        f"{tmp_path}: no checkpoint is whole (iteration-000002: model.safetensors is missing; "
        "iteration-000001: training.pt is not what was written); start anew with another --out"
    )


def test_a_run_of_the_first_version_is_told_apart(tmp_path):
    (tmp_path / LAST).touch()
    (tmp_path / "state-0000004.pt").touch()
    assert message_of(newest, tmp_path) == (
        f"{tmp_path} was written by segdeformer 0.1.0, whose runs this version cannot go on with; "
        "its weights can be evaluated still; start anew with another --out"
    )


def test_a_state_that_this_version_cannot_read_is_one_line(tmp_path):
    def write_something_else(path: Path) -> None:
        path.write_bytes(b"not a pickle")

    folder = save(tmp_path, 1)
    write_something_else(folder / "training.pt")
    saves._write_sums(folder)  # whole, but of another kind
    message = message_of(read_state, newest(tmp_path))
    assert message.startswith(f"{folder}/training.pt cannot be read (")
    assert message.endswith("); was it written by another version?")


# What cannot be written.


@pytest.mark.parametrize("limit_bytes", [10, 1000, 30_000, 40_900])
@pytest.mark.parametrize("num_before", [0, 2])
def test_a_full_disk_keeps_every_earlier_checkpoint(tmp_path, limit_bytes, num_before):
    for iteration in range(1, num_before + 1):
        save(tmp_path, iteration)
    before = contents(tmp_path)
    with no_file_above(limit_bytes):
        message = message_of(save, tmp_path, 5000, size=10_000)
    kept = f"that of iteration {num_before} is kept" if num_before else "there is none before it"
    assert re.fullmatch(
        rf"{tmp_path}: the checkpoint of iteration 5,000 cannot be written \(File too large\); "
        rf"it takes at least 0\.0 MiB, [\d,]+\.\d MiB are free; {kept}: make room and go on with --resume",
        message,
    )
    assert contents(tmp_path) == before
    assert not list(tmp_path.glob("checkpoints/.*"))
    assert save(tmp_path, 5000, size=10_000).is_dir()  # room again


def test_the_needed_space_is_that_of_the_state_and_the_checkpoint_before(tmp_path):
    with no_file_above(2**20):
        assert "takes at least 4.0 MiB" in message_of(save, tmp_path, 1, size=2**20)
    save(tmp_path, 1, size=2**21)
    with no_file_above(2**20):
        assert "takes at least 8.0 MiB" in message_of(save, tmp_path, 2, size=2**20)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
@pytest.mark.parametrize("number", range(4))
def test_space_that_runs_out_when_the_disk_is_waited_for_keeps_the_checkpoint(
    tmp_path, monkeypatch, code, number
):
    """The files, the folder and its name: file systems may find only then that there is no space."""
    save(tmp_path, 1)
    before = contents(tmp_path)
    calls = iter(range(10))
    real = os.fsync

    def fail_once(file: int) -> None:
        if next(calls) == number:
            raise OSError(code, os.strerror(code))
        real(file)

    monkeypatch.setattr(files.os, "fsync", fail_once)
    message = message_of(save, tmp_path, 2)
    assert f"iteration 2 cannot be written ({os.strerror(code)})" in message
    assert {name: data for name, data in contents(tmp_path).items() if name in before} == before
    assert newest(tmp_path).iteration == (1 if number < 3 else 2)
    assert newest(tmp_path).warnings == []


def test_a_full_disk_under_safetensors_is_told_in_the_same_words(tmp_path):
    with no_file_above(1000):
        message = message_of(
            store,
            tmp_path,
            iteration=1,
            write_model=lambda path: save_weights(path),
            state={},
        )
    assert "iteration 1 cannot be written (File too large); it takes at least " in message
    assert names(tmp_path) == []


def save_weights(path: Path) -> None:
    from safetensors import SafetensorError

    from segdeformer.weights.checkpoint import _system_error

    with files.replacing(path) as aside:
        try:
            save_file({"a": torch.zeros(1000)}, aside)
        except SafetensorError as error:
            raise _system_error(error) from None


@pytest.mark.parametrize("error", [KeyboardInterrupt, UserError("weights are not finite")])
def test_a_save_that_is_broken_off_leaves_nothing(tmp_path, error):
    def break_off(path: Path) -> None:
        path.write_bytes(b"half")
        raise error

    save(tmp_path, 1)
    before = contents(tmp_path)
    with pytest.raises(type(error) if isinstance(error, UserError) else error):
        store(tmp_path, iteration=2, write_model=break_off, state={})
    assert contents(tmp_path) == before
    assert names(tmp_path) == ["iteration-000001"]


# What is not ours.


def test_what_others_keep_in_the_folder_is_left_alone(tmp_path):
    save(tmp_path, 1)
    mine = [".writing", "notes.tmp", "checkpoints/my copy", "checkpoints/iteration-000001 (copy)", ".a.tmp"]
    for name in mine:
        (tmp_path / name).touch()
    theirs = [".last.safetensors.123.tmp", "checkpoints/.writing-000002-9/a", "checkpoints/.deleting-x/a"]
    for name in theirs:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    tidy(tmp_path, newest(tmp_path))
    assert all((tmp_path / name).exists() for name in mine)
    assert not any((tmp_path / name).exists() for name in theirs)
    save(tmp_path, 2, keep=1)
    assert all((tmp_path / name).exists() for name in mine)


# Who writes.


def test_a_run_is_held_by_one_process_until_it_ends_however_it_ends(tmp_path):
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        with held(tmp_path):
            os.write(writer, b"x")
            signal.pause()
    os.read(reader, 1)

    def hold() -> None:
        with held(tmp_path):
            pass

    assert message_of(hold) == (f"{tmp_path} is in use by another process that trains; choose another --out")
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    hold()

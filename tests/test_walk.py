"""Which files a folder holds: hidden ones never, linked ones once, and what cannot be visited is told."""

import os
from pathlib import Path

import cv2
import numpy as np
import pytest
from planted import image, labels, make_folder
from typer.testing import CliRunner

from segdeformer.cli.main import app
from segdeformer.config import DataConfig
from segdeformer.data.check.doctor import Doctor, quick_check
from segdeformer.data.datasets import open_dataset
from segdeformer.data.walk import walk_files
from segdeformer.errors import UserError
from segdeformer.report.predictions import plan_jobs

RUNNER = CliRunner(env={"COLUMNS": "200"})
COMPOSED, DECOMPOSED = "caf\u00e9", "cafe\u0301"


def touch(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"")
    return path


def names(folder: Path) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in walk_files(folder).files]


@pytest.fixture
def data(tmp_path) -> Path:
    return make_folder(tmp_path / "data", train=3, val=2)


def config(root: Path) -> DataConfig:
    return DataConfig(name="folder", root=str(root))


def findings(root: Path) -> dict[str, tuple[str, ...]]:
    doctor = Doctor(config(root))
    list(doctor.examine(workers=2))
    return {finding.kind: finding.files for finding in doctor.checkup().findings}


def test_hidden_files_and_folders_are_left_out(tmp_path):
    for name in ("b/c.png", "a.png", ".a.png", ".ipynb_checkpoints/a.png", "b/.cache/d.png"):
        touch(tmp_path / name)
    assert names(tmp_path) == ["a.png", "b/c.png"]
    assert walk_files(tmp_path).skipped == ()


def test_a_hidden_folder_that_is_named_is_visited(tmp_path):
    touch(tmp_path / ".data/a.png")
    assert names(tmp_path / ".data") == ["a.png"]


def test_links_to_files_and_folders_are_followed(tmp_path):
    for name in ("far/a.png", "far/deep/b.png", "single.png"):
        touch(tmp_path / name)
    root = tmp_path / "root"
    root.mkdir()
    (root / "linked").symlink_to(tmp_path / "far")
    (root / "c.png").symlink_to(tmp_path / "single.png")
    assert names(root) == ["c.png", "linked/a.png", "linked/deep/b.png"]
    assert walk_files(root).skipped == ()
    (tmp_path / "door").symlink_to(root)
    assert names(tmp_path / "door") == names(root)


def test_every_real_folder_is_visited_once_under_its_own_path(tmp_path):
    touch(tmp_path / "root/z/a.png")
    root = tmp_path / "root"
    (root / "again").symlink_to(root / "z")
    (root / "z/loop").symlink_to(root)
    (root / "z/up").symlink_to(tmp_path)
    walk = walk_files(root)
    assert walk.files == (root / "z/a.png",)
    assert sorted(walk.skipped) == [
        f"{root}/again: link to {root}/z, taken already",
        f"{root}/z/loop: link to {root}, taken already",
        f"{root}/z/up: link to a folder that it lies in",
    ]


def test_broken_links_and_pipes_are_told_with_their_reason(tmp_path):
    (tmp_path / "a.png").symlink_to("gone.png")
    (tmp_path / "b.png").symlink_to("b.png")
    os.mkfifo(tmp_path / "c.png")
    walk = walk_files(tmp_path)
    assert walk.files == ()
    assert walk.skipped == (
        f"{tmp_path}/a.png: broken link to gone.png (No such file or directory)",
        f"{tmp_path}/b.png: broken link to b.png (Too many levels of symbolic links)",
        f"{tmp_path}/c.png: neither a file nor a folder",
    )


def refuse_to_list(monkeypatch, folder: Path) -> None:
    """As for a user without the permission, which root has everywhere."""
    scandir = os.scandir

    def refusing(path):
        if Path(path) == folder:
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)


def test_an_unreadable_folder_is_told_and_the_others_are_visited(tmp_path, monkeypatch):
    for name in ("a/x.png", "b/y.png"):
        touch(tmp_path / name)
    refuse_to_list(monkeypatch, tmp_path / "a")
    walk = walk_files(tmp_path)
    assert walk.files == (tmp_path / "b/y.png",)
    assert walk.skipped == (f"{tmp_path}/a: cannot be read (Permission denied)",)


# What the commands say.


def test_a_data_set_skips_notebook_checkpoints(data):
    for kind in ("images", "labels"):
        (data / kind / "train/.ipynb_checkpoints").mkdir()
    copy = data / "images/train/.ipynb_checkpoints/train0000-checkpoint.png"
    copy.write_bytes(image(data, 0).read_bytes())
    assert len(open_dataset(config(data), "train")) == 3


def test_the_doctor_and_the_quick_check_tell_of_broken_links(data):
    (data / "images/train/gone.png").symlink_to("/nowhere/gone.png")
    line = f"{data}/images/train/gone.png: broken link to /nowhere/gone.png (No such file or directory)"
    assert findings(data) == {"not visited": (line,)}
    (found,) = quick_check(config(data))
    assert found.level == "warning"
    assert found.line() == (
        f"train: links and folders that could not be visited: 1: {line}; "
        "mend the links or permissions, if the files there belong to the data"
    )
    assert open_dataset(config(data), "train").skipped == (line,)


def test_a_missing_partner_is_explained_by_its_broken_link(data):
    labels(data, 1).unlink()
    labels(data, 1).symlink_to("gone.png")
    with pytest.raises(UserError) as caught:
        open_dataset(config(data), "train")
    assert str(caught.value).endswith(
        "(1 of 3 images has none); "
        f"not visited: {labels(data, 1)}: broken link to gone.png (No such file or directory)"
    )


def test_predict_finds_what_a_data_set_finds(tmp_path):
    for name in ("in/a.png", "in/.ipynb_checkpoints/a.png", "far/b.jpg", "in/notes.txt"):
        touch(tmp_path / name)
    (tmp_path / "in/linked").symlink_to(tmp_path / "far")
    (tmp_path / "in/c.png").symlink_to("gone")
    plan = plan_jobs([tmp_path / "in"], tmp_path / "out")
    assert [job.image for job in plan.jobs] == [tmp_path / "in/a.png", tmp_path / "in/linked/b.jpg"]
    assert [job.result for job in plan.jobs] == [tmp_path / "out/a", tmp_path / "out/linked/b"]
    assert plan.skipped == [f"{tmp_path}/in/c.png: broken link to gone (No such file or directory)"]


def test_predict_says_why_a_folder_seems_empty(tmp_path):
    (tmp_path / "c.png").symlink_to("gone")
    with pytest.raises(
        UserError, match=r"holds no images \(.*\); not visited: .*c\.png: broken link to gone"
    ):
        plan_jobs([tmp_path], tmp_path / "out")


# Names in two forms of Unicode.


def rename(path: Path, stem: str) -> Path:
    return path.rename(path.with_stem(stem))


def test_an_image_and_labels_in_two_forms_of_unicode_are_a_pair(data):
    picture, ids = rename(image(data, 1), DECOMPOSED), rename(labels(data, 1), COMPOSED)
    dataset = open_dataset(config(data), "train")
    assert dataset.pairs[0] == (COMPOSED, picture, ids)
    np.testing.assert_array_equal(dataset.read(0).labels_HW, cv2.imread(str(ids), cv2.IMREAD_UNCHANGED))
    assert findings(data) == {}


def test_folders_in_two_forms_of_unicode_are_paired_too(data):
    for kind, name in (("images", DECOMPOSED), ("labels", COMPOSED)):
        (data / kind / "train").rename(data / kind / name)
        (data / kind / "train").mkdir()
        (data / kind / name).rename(data / kind / "train" / name)
    assert [pair.name for pair in open_dataset(config(data), "train").pairs] == [
        f"{COMPOSED}/train{index:04}" for index in range(3)
    ]


def test_one_name_in_two_forms_is_refused_with_its_code_points(data):
    rename(image(data, 1), DECOMPOSED)
    rename(image(data, 2), COMPOSED)
    rename(labels(data, 1), COMPOSED)
    labels(data, 2).unlink()
    expected = (
        f"{data}/images/train: 'cafe\\u0301.png' and 'caf\\xe9.png' are one name in two forms of Unicode"
    )
    with pytest.raises(UserError) as caught:
        open_dataset(config(data), "train")
    assert str(caught.value) == f"{expected}; keep one of them"
    assert findings(data)["names in two forms"] == (expected,)
    result = RUNNER.invoke(app, ["data", "check", str(data)])
    assert (result.exit_code, result.stderr) == (1, "error: 1 kind of fault would spoil training\n")

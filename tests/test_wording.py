"""Numbers of things in what commands say: one image is no `1 images`, and no remedy is said twice."""

import re
from pathlib import Path

import cv2
import numpy as np
import pytest
from typer.testing import CliRunner

from segdeformer.cli.main import app
from segdeformer.errors import count, verb_of

RUNNER = CliRunner(env={"COLUMNS": "500"})
LONELY = re.compile(r"(?<![\d.,])1 (?:[a-z]+ )?(?!of |px|is |was )[a-z]+s\b")
NO_PLURALS = ("1 class", "1 loader process", "1 process")
UNREADABLE = "not a readable image (damaged, cut off or another format)"


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (count(0, "image"), "0 images"),
        (count(1, "image"), "1 image"),
        (count(1200, "image"), "1,200 images"),
        (count(1, "class"), "1 class"),
        (count(2, "class"), "2 classes"),
        (count(2, "loader process"), "2 loader processes"),
        (count(1, "label map", "hold"), "1 label map holds"),
        (count(2, "label map", "hold"), "2 label maps hold"),
        (count(1, "image", "have", of=3), "1 of 3 images has"),
        (count(1, "image", "are", of=1), "1 of 1 image is"),
        (count(2, "image", "were", of=1200), "2 of 1,200 images were"),
        (verb_of(1, "were"), "was"),
        (verb_of(0, "are"), "are"),
    ],
)
def test_a_number_agrees_with_its_noun_and_verb(said, expected):
    assert said == expected


@pytest.fixture
def data(tmp_path) -> Path:
    """One pair for validation, and two for training, of which one image cannot be read."""
    root = tmp_path / "data"
    for split, names in (("train", "ab"), ("val", "a")):
        for kind in ("images", "labels"):
            (root / kind / split).mkdir(parents=True)
            for name in names:
                pixels = np.random.default_rng(ord(name) + len(names)).integers(0, 2, (40, 48), np.uint8)
                assert cv2.imwrite(str(root / kind / split / f"{name}.png"), pixels)
    (root / "images/train/b.png").write_bytes(b"no image")
    (root / "classes.toml").write_text('names = ["ground", "sky"]\n')
    return root


def lonely(text: str) -> list[str]:
    return [found for found in LONELY.findall(text) if not found.startswith(NO_PLURALS)]


def test_commands_on_one_image_say_one_image(data, tmp_path):
    checked = RUNNER.invoke(app, ["data", "check", str(data)])
    assert "\nval: 1 pair\n" in checked.stdout
    assert f"1 of 2, {data}/images/train/b.png: {UNREADABLE} " in checked.stdout.replace("\n", " ")
    assert "replace it" not in checked.stdout
    assert checked.stderr == "error: 1 kind of fault would spoil training\n"
    assert lonely(checked.stdout) == []

    options = ["--iterations", "1", "--batch", "1", "--workers", "0", "--bad-images", "skip"]
    run = str(tmp_path / "run")
    trained = RUNNER.invoke(app, ["train", "synthetic", "--data", str(data), "--out", run, *options])
    assert trained.exit_code == 0, trained.stderr
    assert "2 training and 1 validation image, 2 classes\n" in trained.stdout
    assert "batch 1, 1 iteration: linear warm-up" in trained.stdout
    assert trained.stdout.count(" on 1 image\n") == 1
    assert lonely(trained.stdout) == []

    scored = RUNNER.invoke(app, ["eval", run])
    assert " on 1 image\n" in scored.stdout and lonely(scored.stdout) == []
    predicted = RUNNER.invoke(app, ["predict", run, f"{data}/images/val", "--out", str(tmp_path / "out")])
    assert ", 1 image, device" in predicted.stdout and lonely(predicted.stdout) == []


def test_train_says_the_remedy_of_an_unreadable_image_once(data):
    result = RUNNER.invoke(app, ["train", "synthetic", "--data", str(data), "--iterations", "1"])
    assert result.exit_code == 1
    assert result.stderr == (
        f"error: train: 1 of 2, {data}/images/train/b.png: {UNREADABLE}; copy or convert it again from its "
        "source, or remove the pair\n"
    )

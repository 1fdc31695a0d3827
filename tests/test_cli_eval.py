"""`segdeformer eval`: the scores against a float64 computation of the whole image, and what is written."""

import hashlib
import json
import math
import os
import shutil
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from typer.testing import CliRunner

from segdeformer.cli.main import app
from segdeformer.config import IGNORE_INDEX, DataConfig, load_recipe
from segdeformer.data.built_in import SyntheticDataset
from segdeformer.weights.build import build_model
from segdeformer.weights.checkpoint import BEST, LAST, load, save_checkpoint

RUNNER = CliRunner(env={"COLUMNS": "200"})
CLASSES = SyntheticDataset("val").classes
NUM_IMAGES = 5
DATA = DataConfig(name="folder")


def evaluated(*arguments: object) -> str:
    """What the command printed; it must have worked."""
    result = RUNNER.invoke(app, ["eval", *map(str, arguments)])
    assert (result.exit_code, result.stderr) == (0, ""), result
    return result.stdout


def scorecard(path: Path, *arguments: object) -> dict:
    evaluated(*arguments, "--json", path)
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A model that has learned nothing, but whose answers differ from pixel to pixel."""
    torch.manual_seed(0)
    recipe = load_recipe("synthetic")
    model = build_model(recipe.model)
    torch.nn.init.normal_(model.decoder.head.classify.weight, std=0.2)
    path = tmp_path_factory.mktemp("checkpoint") / LAST
    save_checkpoint(path, model, recipe=recipe, classes=CLASSES, iteration=7, best_miou=None)
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """The first synthetic validation images as a folder of PNGs."""
    root = tmp_path_factory.mktemp("data")
    for kind in ("images/train", "labels/train", "images/val", "labels/val"):
        (root / kind).mkdir(parents=True)
    for index in range(NUM_IMAGES):
        sample = SyntheticDataset("val").read(index)
        cv2.imwrite(str(root / f"images/val/{index}.png"), sample.image_HW3[:, :, ::-1])
        cv2.imwrite(str(root / f"labels/val/{index}.png"), sample.labels_HW)
    (root / "classes.toml").write_text(f"names = {json.dumps(CLASSES.names)}")
    return root


# The same scores, computed otherwise: float64, the whole image, one class after the other.


def whole_log_shares(
    model: torch.nn.Module, image_HW3: np.ndarray, *, scales: tuple[int, ...] = (1,), flip: bool = False
) -> torch.Tensor:
    """Log of the mean softmax over the scales and mirror images, (K, H, W) float64."""
    log_shares = []
    height, width = image_HW3.shape[:2]
    for scale in scales:
        scaled_HW3 = cv2.resize(image_HW3, (scale * width, scale * height), interpolation=cv2.INTER_LINEAR)
        image_13HW = torch.from_numpy((scaled_HW3 - np.array(DATA.mean)) / DATA.std).permute(2, 0, 1)[None]
        for turn in ((), (3,)) if flip else ((),):
            logits_BKhw = model(image_13HW.flip(turn)).logits_BKhw
            full_BKHW = F.interpolate(logits_BKhw, (height, width), mode="bilinear", align_corners=False)
            log_shares.append(full_BKHW.flip(turn).log_softmax(1)[0])
    return torch.stack(log_shares).logsumexp(0) - math.log(len(log_shares))


class ByHand(NamedTuple):
    confusion_KK: np.ndarray
    loss: float


def scores_by_hand(checkpoint: Path, **views: object) -> ByHand:
    model = load(checkpoint).model.double()
    truths, guesses, loss_sum = [], [], 0.0
    for index in range(NUM_IMAGES):
        sample = SyntheticDataset("val").read(index)
        with torch.inference_mode():
            log_shares_KHW = whole_log_shares(model, sample.image_HW3, **views)
        labels_HW = torch.from_numpy(sample.labels_HW).long()
        loss_sum += F.nll_loss(
            log_shares_KHW[None], labels_HW[None], ignore_index=IGNORE_INDEX, reduction="sum"
        ).item()
        truths.append(sample.labels_HW.ravel())
        guesses.append(log_shares_KHW.argmax(0).numpy().ravel())
    truth, guess = np.concatenate(truths), np.concatenate(guesses)
    ids = range(len(CLASSES.names))
    confusion = [[int(((truth == true) & (guess == guessed)).sum()) for guessed in ids] for true in ids]
    return ByHand(np.array(confusion), loss_sum / (truth != IGNORE_INDEX).sum())


@pytest.mark.parametrize(
    ("options", "views"),
    [
        ((), {}),
        (("--flip",), {"flip": True}),
        (("--scales", "1,2", "--flip"), {"scales": (1, 2), "flip": True}),
    ],
    ids=["whole", "flip", "scales and flip"],
)
def test_scores_equal_a_float64_computation_over_whole_images(options, views, checkpoint, data, tmp_path):
    scores = scorecard(tmp_path / "scores.json", checkpoint, "--data", data, *options)["scores"]
    expected = scores_by_hand(checkpoint, **views)
    confusion_KK = np.array(scores["confusion"])
    # A pixel whose two best classes tie may fall either way in float32; it counts in two cells.
    assert np.abs(confusion_KK - expected.confusion_KK).sum() <= 2 * 3
    assert np.count_nonzero(confusion_KK.sum(axis=0)) >= 3  # else the comparison would say little
    assert scores["loss"] == pytest.approx(expected.loss, rel=1e-4)
    assert scores["images"] == NUM_IMAGES

    hits_K, truth_K, guess_K = confusion_KK.diagonal(), confusion_KK.sum(axis=1), confusion_KK.sum(axis=0)
    for k, row in enumerate(scores["classes"]):
        assert row == {
            "id": k,
            "name": CLASSES.names[k],
            "iou": pytest.approx(hits_K[k] / (truth_K[k] + guess_K[k] - hits_K[k])),
            "accuracy": pytest.approx(hits_K[k] / truth_K[k]),
            "pixels": truth_K[k],
        }
    assert scores["miou"] == pytest.approx(np.mean([row["iou"] for row in scores["classes"]]))
    assert scores["macc"] == pytest.approx(np.mean([row["accuracy"] for row in scores["classes"]]))
    assert scores["aacc"] == pytest.approx(hits_K.sum() / confusion_KK.sum())


def test_a_very_sure_model_has_a_finite_loss_under_several_views(data, tmp_path):
    """The softmax of a class far behind is 0 in float32, and its log infinite."""
    torch.manual_seed(0)
    recipe = load_recipe("synthetic")
    model = build_model(recipe.model)
    torch.nn.init.normal_(model.decoder.head.classify.weight, std=20.0)
    path = tmp_path / LAST
    save_checkpoint(path, model, recipe=recipe, classes=CLASSES, iteration=0, best_miou=None)
    loss = scorecard(tmp_path / "s.json", path, "--data", data, "--flip")["scores"]["loss"]
    assert loss > 100  # nats
    assert loss == pytest.approx(scores_by_hand(path, flip=True).loss, rel=1e-4)


def test_one_window_as_large_as_the_image_is_the_whole_mode(checkpoint, data, tmp_path):
    whole = scorecard(tmp_path / "whole.json", checkpoint, "--data", data)
    slide = scorecard(tmp_path / "slide.json", checkpoint, "--data", data, "--mode", "slide")
    assert slide["protocol"]["mode"] == "slide"
    assert slide["scores"]["confusion"] == whole["scores"]["confusion"]


def test_the_table_shows_the_numbers_of_the_json(checkpoint, data, tmp_path):
    printed = evaluated(checkpoint, "--data", data, "--json", tmp_path / "s.json")
    scores = json.loads((tmp_path / "s.json").read_text())["scores"]
    total = sum(row["pixels"] for row in scores["classes"])
    rows = {line[1:13].strip(): line[13:].split() for line in printed.splitlines() if line.startswith(" ")}
    for row in scores["classes"]:
        cells = [100 * row["iou"], 100 * row["accuracy"], 100 * row["pixels"] / total]
        assert rows[row["name"]] == [f"{cell:.2f}" for cell in cells]
    assert rows["mean"] == [f"{100 * scores[key]:.2f}" for key in ("miou", "macc")]
    assert (
        f"mIoU {100 * scores['miou']:.2f} %, mAcc {100 * scores['macc']:.2f} %, "
        f"aAcc {100 * scores['aacc']:.2f} %, loss {scores['loss']:.4f} on 5 images\n"
    ) in printed


# What a score depends on is written with it.


def test_the_json_holds_the_protocol_the_label_map_and_the_hash_of_the_weights(checkpoint, data, tmp_path):
    card = scorecard(tmp_path / "new folder/s.json", checkpoint, "--data", data)
    notes = card["protocol"].pop("notes")
    assert "resized once, from the decoder's map to the image's own size" in notes
    assert "bilinear with align_corners=False" in notes
    assert "255 is ignored" in notes
    assert card["protocol"] == {
        "mode": "whole",
        "resize_to": None,
        "multiple_of": 1,
        "window": [512, 512],
        "stride": [512, 512],
        "scales": [1.0],
        "flip": False,
        "key_stride": None,
    }
    assert card["label_map"] == {"0": 0, "1": 1, "2": 2, "3": 3, "4": 4, "255": 255}
    assert (card["data"]["name"], card["data"]["root"], card["data"]["val_split"]) == (
        "folder",
        str(data),
        "val",
    )
    assert card["checkpoint"] == {
        "file": str(checkpoint),
        "sha256": hashlib.sha256(checkpoint.read_bytes()).hexdigest(),
        "recipe": "synthetic",
        "iteration": 7,
        "license": None,
    }
    assert card["versions"]["torch"] == torch.__version__


def test_options_override_the_protocol_and_are_written_and_printed(checkpoint, data, tmp_path):
    path = tmp_path / "s.json"
    options = ("--mode", "slide", "--scales", "0.75,1.25", "--flip")
    printed = evaluated(checkpoint, "--data", data, "--json", path, *options)
    protocol = json.loads(path.read_text())["protocol"]
    assert (protocol["mode"], protocol["scales"], protocol["flip"]) == ("slide", [0.75, 1.25], True)
    assert "protocol: slide 512 x 512, stride 512 x 512; own size; scales 0.75, 1.25; with flip\n" in printed


def test_the_recipe_in_the_checkpoint_sets_the_protocol_and_options_only_change_it(data, tmp_path):
    recipe = load_recipe("synthetic")
    changes = {"mode": "slide", "window": (64, 80), "stride": (40, 48), "resize_to": (120, 90), "flip": True}
    recipe = recipe.model_copy(update={"evaluate": recipe.evaluate.model_copy(update=changes)})
    path = tmp_path / LAST
    save_checkpoint(
        path, build_model(recipe.model), recipe=recipe, classes=CLASSES, iteration=1, best_miou=0.5
    )
    protocol = scorecard(tmp_path / "s.json", path, "--data", data, "--no-flip")["protocol"]
    assert {key: protocol[key] for key in changes} == {
        "mode": "slide",
        "window": [64, 80],
        "stride": [40, 48],
        "resize_to": [120, 90],
        "flip": False,
    }


# Which checkpoint, which data.


def test_without_arguments_the_best_of_the_newest_run_is_scored_on_its_own_data(
    checkpoint, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    for name, saved_at in (("older", 1000), ("newer", 2000)):
        Path("runs", name).mkdir(parents=True)
        for file in (LAST, BEST):
            shutil.copy(checkpoint, Path("runs", name, file))
        os.utime(Path("runs", name, LAST), (saved_at, saved_at))
    printed = evaluated()
    assert printed.startswith("runs/newer/best.safetensors (iteration 7) on synthetic val\n")
    assert printed.rstrip().endswith("on 64 images")


def test_a_run_folder_is_scored_by_its_best_checkpoint(checkpoint, data, tmp_path):
    shutil.copy(checkpoint, tmp_path / LAST)
    shutil.copy(checkpoint, tmp_path / BEST)
    assert evaluated(tmp_path, "--data", data).startswith(f"{tmp_path / BEST} (iteration 7) on folder val\n")
    assert evaluated(tmp_path / LAST, "--data", data).startswith(f"{tmp_path / LAST} (iteration 7)")


def test_the_two_implementations_of_attention_give_the_same_scores(checkpoint, data, tmp_path):
    cards = [
        scorecard(tmp_path / f"{impl}.json", checkpoint, "--data", data, "--impl", impl)["scores"]
        for impl in ("sdpa", "reference")
    ]
    assert cards[0]["miou"] == pytest.approx(cards[1]["miou"], abs=1e-4)
    assert cards[0]["loss"] == pytest.approx(cards[1]["loss"], rel=1e-5)


def test_picture_shows_the_images_asked_for_and_leaves_the_scores_alone(checkpoint, data, tmp_path):
    plain = scorecard(tmp_path / "a.json", checkpoint, "--data", data)
    picture = tmp_path / "sheet.png"
    printed = evaluated(checkpoint, "--data", data, "--json", tmp_path / "b.json", "--picture", picture)
    assert f"picture: {picture}\n" in printed
    assert json.loads((tmp_path / "b.json").read_text()) == plain
    colors = {tuple(color) for color in cv2.imread(str(picture))[:, :, ::-1].reshape(-1, 3).tolist()}
    assert set(CLASSES.colors) <= colors

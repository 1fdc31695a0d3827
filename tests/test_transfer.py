"""`--weights` of one of our checkpoints: encoder and decoder are kept, rows of classes by their names."""

import cv2
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from segdeformer.cli.main import app
from segdeformer.config import load_recipe
from segdeformer.data.built_in import SyntheticDataset
from segdeformer.data.classes import ClassTable
from segdeformer.weights.build import build_model
from segdeformer.weights.checkpoint import read_checkpoint, save_checkpoint
from segdeformer.weights.transfer import load_decoder_weights, own_checkpoint

CLASSES = SyntheticDataset("val").classes  # background, shape 1 to shape 4
ROWS = [
    "decoder.head.classify.weight",
    "decoder.head.classify.bias",
    "decoder.context.external.tokens.info_KC",
    "decoder.context.external.tokens.class_KC",
]


def recipe(num_classes):
    values = load_recipe("synthetic").model_dump(exclude_none=True)
    values["model"]["num_classes"] = num_classes
    return load_recipe("synthetic").model_validate(values)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A model with no zero in it."""
    torch.manual_seed(0)
    model = build_model(recipe(5).model)
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.is_floating_point():
            tensor.data = torch.randn_like(tensor) + 3
    path = tmp_path_factory.mktemp("from") / "best.safetensors"
    save_checkpoint(path, model, recipe=recipe(5), classes=CLASSES, iteration=7, best_miou=None)
    return path


def table(*names):
    return ClassTable(names, tuple((i, 0, 0) for i in range(len(names))))


def test_rows_follow_the_names_of_the_classes_and_new_ones_stay_as_initialised(checkpoint):
    classes = table("shape 3", "sky", "background")
    torch.manual_seed(1)
    model = build_model(recipe(3).model)
    fresh = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report = load_decoder_weights(model, read_checkpoint(checkpoint), classes)
    theirs, ours = load_file(checkpoint), model.state_dict()
    for name in ROWS:
        assert torch.equal(ours[name][0], theirs[name][3]), name
        assert torch.equal(ours[name][1], fresh[name][1]), name
        assert torch.equal(ours[name][2], theirs[name][0]), name
    others = [name for name in ours if name.startswith("decoder.") and name not in ROWS]
    assert len(others) > 20
    assert all(torch.equal(ours[name], theirs[name]) for name in others)
    assert all(torch.equal(ours[name], fresh[name]) for name in ours if name.startswith("encoder."))
    assert report.kept_classes == ("shape 3", "background")
    assert report.new_classes == ("sky",)
    assert report.missing == ()
    assert report.loaded == len(ROWS) + len(others)


def test_a_decoder_of_another_width_is_listed_and_left_as_initialised(checkpoint):
    values = recipe(5).model_dump(exclude_none=True)
    values["model"]["fusion"]["width"] = 16
    model = build_model(recipe(5).model_validate(values).model)
    fresh = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report = load_decoder_weights(model, read_checkpoint(checkpoint), CLASSES)
    assert "decoder.context.internal.0.attention.query.weight" in report.missing
    assert all(torch.equal(model.state_dict()[name], fresh[name]) for name in report.missing)


def test_only_a_checkpoint_of_ours_is_one(checkpoint, tmp_path):
    assert own_checkpoint(str(checkpoint)).iteration == 7
    (tmp_path / "other.pth").write_bytes(b"something else")
    for other in ("none", "timm", str(tmp_path / "other.pth"), str(tmp_path / "absent.safetensors")):
        assert own_checkpoint(other) is None


def test_train_goes_on_from_a_checkpoint_with_other_classes_and_lists_what_it_kept(checkpoint, tmp_path):
    root = tmp_path / "data"
    for split in ("train", "val"):
        for kind in ("images", "labels"):
            (root / kind / split).mkdir(parents=True)
        for index in range(2):
            sample = SyntheticDataset(split).read(index)
            cv2.imwrite(str(root / "images" / split / f"{index}.png"), sample.image_HW3)
            labels_HW = np.minimum(sample.labels_HW, 1)
            cv2.imwrite(str(root / "labels" / split / f"{index}.png"), labels_HW)
    (root / "classes.toml").write_text('names = ["background", "thing"]\n')
    arguments = ["--data", root, "--weights", checkpoint, "--iterations", 1, "--batch", 2, "--workers", 0]
    command = ["train", "synthetic", *arguments, "--out", tmp_path / "run"]
    result = CliRunner(env={"COLUMNS": "200"}).invoke(app, [*map(str, command)])
    assert result.exit_code == 0, result.output
    assert "decoder weights: " in result.stdout
    assert "  classes of the same name, kept: background\n" in result.stdout
    assert "  new classes, their rows as initialised: thing\n" in result.stdout
    theirs, ours = load_file(checkpoint), load_file(tmp_path / "run" / "last.safetensors")
    name = "decoder.context.internal.0.attention.query.weight"
    assert (ours[name] - theirs[name]).abs().max() < 0.1  # one step away
    assert (ours[ROWS[0]][0] - theirs[ROWS[0]][0]).abs().max() < 0.1
    assert ours[ROWS[0]].shape[0] == 2

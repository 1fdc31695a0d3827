"""Folded models saved, loaded, and used by the commands."""

import json
from pathlib import Path

import cv2
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_folding import images, randomise
from typer.testing import CliRunner

import segdeformer
from segdeformer.cli.main import app
from segdeformer.config import ContextConfig, EncoderConfig, ExternalConfig, load_recipe
from segdeformer.data.built_in import SyntheticDataset
from segdeformer.errors import UsageError, UserError
from segdeformer.weights.build import build_model
from segdeformer.weights.checkpoint import LAST, METADATA_KEY, load, read_checkpoint, save_checkpoint

RUNNER = CliRunner(env={"COLUMNS": "200"})
FOLDED_LINE = "folded for inference: the same logits by one linear layer and narrower attention\n"


def save_random(path: Path, **changes: object) -> Path:
    """A checkpoint of the synthetic recipe with these changes of its model."""
    recipe = load_recipe("synthetic")
    recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update=changes)})
    torch.manual_seed(0)
    model = randomise(build_model(recipe.model))
    classes = SyntheticDataset("val").classes
    save_checkpoint(path, model, recipe=recipe, classes=classes, iteration=7, best_miou=0.5)
    return path


def save_folded(source: Path, path: Path) -> Path:
    segdeformer.save(path, *segdeformer.load(source, fold=True))
    return path


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return save_random(tmp_path_factory.mktemp("plain") / LAST)


@pytest.fixture(scope="module")
def folded(checkpoint, tmp_path_factory) -> Path:
    return save_folded(checkpoint, tmp_path_factory.mktemp("folded") / LAST)


@pytest.fixture(scope="module")
def released(tmp_path_factory) -> Path:
    """A model that cannot be folded."""
    context = ContextConfig(projection="conv_bn_relu", external=ExternalConfig())
    return save_random(tmp_path_factory.mktemp("released") / LAST, context=context)


def succeeded(*arguments: object) -> str:
    """What the command printed; it must have worked."""
    result = RUNNER.invoke(app, [*map(str, arguments)])
    assert (result.exit_code, result.stderr) == (0, ""), result
    return result.stdout


def refusal(*arguments: object, code: int) -> str:
    """The one line after `error: `."""
    result = RUNNER.invoke(app, [*map(str, arguments)])
    assert result.exit_code == code, result
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    return result.stderr.removeprefix("error: ").removesuffix("\n")


def scores(path: Path, *arguments: object) -> dict:
    succeeded("eval", *arguments, "--json", path)
    return json.loads(path.read_text())["scores"]


@pytest.mark.parametrize("encoder", ["mit_nano", "resnet18"])
def test_a_loaded_folded_model_is_the_saved_one_bit_for_bit(encoder, tmp_path):
    source = save_random(tmp_path / "plain.safetensors", encoder=EncoderConfig(name=encoder))
    path = save_folded(source, tmp_path / "folded.safetensors")
    model, about = load(path)
    assert model.is_folded
    assert not model.training
    expected, original = load(source, fold=True)
    for name, tensor in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    with torch.inference_mode():
        assert torch.equal(model(images()).logits_BKhw, expected(images()).logits_BKhw)
        assert torch.equal(model(images()).class_logits_BKhw, expected(images()).class_logits_BKhw)
    assert about == original._replace(path=path, folded=True)
    assert about.recipe.model.encoder.name == encoder


def test_fold_true_false_and_none_ask_for_a_folded_an_unfolded_and_the_saved_model(
    checkpoint, folded, released
):
    assert [load(checkpoint, fold=fold).model.is_folded for fold in (None, False, True)] == [
        False,
        False,
        True,
    ]
    assert [load(folded, fold=fold).model.is_folded for fold in (None, True)] == [True, True]
    with pytest.raises(UsageError, match="holds a folded model, which cannot be unfolded; run it folded"):
        load(folded, fold=False)
    assert not load(released).model.is_folded
    with pytest.raises(UsageError, match="cannot be folded for inference: context\\.projection"):
        load(released, fold=True)


def test_files_from_before_folding_are_unfolded(checkpoint, tmp_path):
    with safe_open(checkpoint, "pt") as file:
        about = json.loads(file.metadata()[METADATA_KEY])
    assert about.pop("folded") is False
    save_file(load_file(checkpoint), tmp_path / LAST, {METADATA_KEY: json.dumps(about)})
    assert not load(tmp_path / LAST).model.is_folded


def test_eval_folds_where_it_can_says_so_and_gives_the_same_scores(checkpoint, folded, released, tmp_path):
    assert FOLDED_LINE in succeeded("eval", checkpoint)
    assert FOLDED_LINE in succeeded("eval", folded)
    assert "\nnot folded: --no-fold\n" in succeeded("eval", checkpoint, "--no-fold")
    assert '\nnot folded: context.projection = "conv_bn_relu", whose ReLU' in succeeded("eval", released)
    views = ("--mode", "slide", "--scales", "0.75,1.25", "--flip")
    cards = [
        scores(tmp_path / "s.json", *arguments, *views)
        for arguments in ((checkpoint, "--no-fold"), (checkpoint, "--fold"), (folded,))
    ]
    assert cards[1] == cards[2]
    assert cards[0]["loss"] == pytest.approx(cards[1]["loss"], rel=1e-5)
    assert cards[0]["miou"] == pytest.approx(cards[1]["miou"], abs=1e-4)


def test_predict_folds_where_it_can_and_says_so(checkpoint, folded, tmp_path):
    image = tmp_path / "a.png"
    cv2.imwrite(str(image), SyntheticDataset("val").read(0).image_HW3)
    maps = []
    for name, options in (("a", (checkpoint,)), ("b", (folded, "--fold")), ("c", (checkpoint, "--no-fold"))):
        printed = succeeded("predict", *options, image, "--out", tmp_path / name)
        assert (FOLDED_LINE if name != "c" else "\nnot folded: --no-fold\n") in printed
        maps.append(cv2.imread(str(tmp_path / name / "a.png"), cv2.IMREAD_UNCHANGED))
    assert (maps[0] == maps[1]).all()
    assert (maps[0] != maps[2]).sum() <= 3  # ties


@pytest.mark.parametrize("command", ["eval", "predict"])
def test_what_cannot_be_done_is_one_line(command, folded, released, tmp_path):
    image = tmp_path / "a.png"
    cv2.imwrite(str(image), SyntheticDataset("val").read(0).image_HW3)
    rest = (image, "--out", tmp_path / "out") if command == "predict" else ()
    assert refusal(command, released, *rest, "--fold", code=2) == (
        'this model cannot be folded for inference: context.projection = "conv_bn_relu", whose ReLU is not '
        'linear; only "affine" can be; run it unfolded'
    )
    assert refusal(command, folded, *rest, "--no-fold", code=2) == (
        f"{folded} holds a folded model, which cannot be unfolded; run it folded"
    )


def test_a_folded_model_is_refused_for_training(folded, tmp_path):
    assert refusal("train", "--resume", "--out", folded.parent, code=1) == (
        f"{folded.parent} holds weights, but no run to go on with; to start one from their encoder: "
        "segdeformer train RECIPE --weights FILE"
    )
    new = ("synthetic", "--out", tmp_path / "run")
    assert refusal("train", *new, "--weights", folded, code=1) == (
        f"{folded}: holds a folded model, for inference only; use the one it was made from"
    )
    assert not (tmp_path / "run").exists()


def test_saving_where_nothing_can_be_written_is_refused(checkpoint, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        save_folded(checkpoint, tmp_path / "file" / "model.safetensors")
    assert read_checkpoint(checkpoint).folded is False

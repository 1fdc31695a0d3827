"""Class weights are counted against the data's classes, which of data `folder` its classes.toml decides."""

from pathlib import Path

import pytest
from planted import NUM_CLASSES, make_folder
from typer.testing import CliRunner

from segdeformer.cli.main import app
from segdeformer.config import change_recipe, load_recipe, parse_recipe, recipe_text, validate_recipe
from segdeformer.errors import UsageError
from segdeformer.training.prepare import Wanted, prepare
from segdeformer.weights.checkpoint import LAST, read_checkpoint

WEIGHTS = [0.5, 1.0, 1.5, 2.0, 3.5]
RUNNER = CliRunner(env={"COLUMNS": "200"})


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return make_folder(tmp_path_factory.mktemp("data"), train=3, val=1)


def weighted(text: str, weights: list[float] = WEIGHTS) -> str:
    """The recipe with class weights pasted into its first term."""
    term = 'kind = "cross_entropy",'
    assert term in text
    return text.replace(term, f"{term} class_weights = {weights},", 1)


def write_recipe(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def weights_of(recipe) -> list[float]:
    return list(recipe.train.losses[0].class_weights)


def test_a_folder_decides_for_how_many_classes_weights_are_needed(data, tmp_path):
    mine = write_recipe(tmp_path / "m.toml", weighted(recipe_text("folder")))
    prepared = prepare(Wanted(recipe=mine, data=str(data)), None)
    assert (prepared.base.model.num_classes, prepared.recipe.model.num_classes) == (2, NUM_CLASSES)
    assert weights_of(prepared.recipe) == WEIGHTS


def test_a_folder_named_in_the_recipe_decides_too(data, tmp_path):
    text = weighted(recipe_text("folder")).replace('root = "data/mine"', f'root = "{data}"')
    prepared = prepare(Wanted(recipe=write_recipe(tmp_path / "m.toml", text)), None)
    assert prepared.recipe.data.root == str(data)
    assert prepared.recipe.model.num_classes == NUM_CLASSES


@pytest.mark.parametrize("weights", [WEIGHTS[:2], WEIGHTS[:4], [*WEIGHTS, 1.0]])
def test_other_than_one_weight_per_class_of_the_folder_is_refused(weights, data, tmp_path):
    mine = write_recipe(tmp_path / "m.toml", weighted(recipe_text("folder"), weights))
    out = tmp_path / "run"
    result = RUNNER.invoke(app, ["train", mine, "--data", str(data), "--out", str(out)])
    assert (result.exit_code, result.stderr) == (
        2,
        f"error: folder: train.losses.0.class_weights has {len(weights)} values for model.num_classes 5\n",
    )
    assert not out.exists()


@pytest.mark.parametrize("name", ["synthetic", "landcover", "ade20k-segdeformer-b1"])
def test_other_data_is_counted_when_the_recipe_is_read(name):
    wrong = [1.0, 2.0, 3.0]
    with pytest.raises(UsageError, match=r"^m\.toml: train\.losses\.0\.class_weights has 3 values for model"):
        parse_recipe(weighted(recipe_text(name), wrong), "m.toml")


def test_weights_for_a_folder_do_not_fit_other_data(tmp_path):
    mine = write_recipe(tmp_path / "m.toml", weighted(recipe_text("folder"), WEIGHTS[:4]))
    with pytest.raises(UsageError, match=r"class_weights has 4 values for model\.num_classes 5"):
        prepare(Wanted(recipe=mine, data="synthetic"), None)


def test_changes_leave_the_number_open_until_the_data_is_known():
    recipe = parse_recipe(weighted(recipe_text("folder")), "m.toml")
    assert change_recipe(recipe, iterations=3).train.iterations == 3
    assert change_recipe(recipe, num_classes=5).model.num_classes == 5
    with pytest.raises(UsageError, match=r"has 5 values for model\.num_classes 7"):
        change_recipe(recipe, num_classes=7)
    with pytest.raises(UsageError, match=r"has 5 values for model\.num_classes 2"):
        validate_recipe(recipe.model_dump(exclude_none=True), "a checkpoint")


def test_a_run_on_a_folder_keeps_its_weights(data, tmp_path):
    text = weighted(recipe_text("synthetic"))
    text = text.replace('name = "synthetic"\nroot', 'name = "folder"\nroot').replace(
        "num_classes = 5", "num_classes = 2"
    )
    mine, out = write_recipe(tmp_path / "m.toml", text), tmp_path / "run"
    options = ["--iterations", "1", "--batch", "2", "--workers", "0", "--out", str(out)]
    result = RUNNER.invoke(app, ["train", mine, "--data", str(data), *options])
    assert (result.exit_code, result.stderr) == (0, "")
    assert "changed model.num_classes: 2 -> 5" in result.stdout
    stored = read_checkpoint(out / LAST).recipe
    assert weights_of(stored) == WEIGHTS
    assert load_recipe(str(out / "recipe.toml")) == stored


def test_a_change_that_contradicts_another_table_is_one_line():
    recipe = load_recipe("ade20k-upernet-swin-s")
    with pytest.raises(
        UsageError, match=r"^ade20k-upernet-swin-s: train\.batch_size is 1, but BatchNorm after"
    ):
        change_recipe(recipe, batch_size=1)

"""`segdeformer eval` of several protocols: key strides and modes beside each other."""

import json
import shutil

import numpy as np
import pytest
import test_cli_eval as scoring
import torch
from safetensors.torch import load_file
from test_cli_eval import CLASSES, DATA, NUM_IMAGES, RUNNER, evaluated, scorecard

from segdeformer.cli.main import app
from segdeformer.config import EvalConfig, Recipe
from segdeformer.data.built_in import SyntheticDataset
from segdeformer.inference.predict import predict_image
from segdeformer.models.few_keys import key_stride_of
from segdeformer.weights.checkpoint import load, read_checkpoint, save_checkpoint

checkpoint, data = scoring.checkpoint, scoring.data  # fixtures


def test_key_strides_are_compared_with_all_keys_in_one_table(checkpoint, data, tmp_path):
    arguments = (checkpoint, "--data", data, "--device", "cpu")
    printed = evaluated(*arguments, "--key-stride", "2,8", "--json", tmp_path / "all.json")
    together = json.loads((tmp_path / "all.json").read_text())
    rows = {row["key_stride"]: row for row in together["comparison"]}
    assert list(rows) == [1, 2, 8]
    samples = [SyntheticDataset("val").read(index) for index in range(NUM_IMAGES)]
    ids = {}
    for stride, row in rows.items():
        alone = scorecard(tmp_path / "one.json", *arguments, "--key-stride", stride)
        assert alone["protocol"]["key_stride"] == stride
        assert ("approximated" in alone["protocol"]["notes"]) == (stride > 1)
        assert row["miou"] == alone["scores"]["miou"]
        assert row["name"] == ("all keys" if stride == 1 else f"key stride {stride}")
        loaded = load(checkpoint, key_stride=stride)
        ids[stride] = [
            predict_image(loaded.model.fold(), sample.image_HW3, protocol=EvalConfig(), data=DATA).ids_HW
            for sample in samples
        ]
        alike = np.concatenate([(a == b).ravel() for a, b in zip(ids[stride], ids[1], strict=True)])
        assert row["agreement"] == pytest.approx(alike.mean(), abs=1e-12)
        low, high = row["miou_change_95"]
        assert low <= high
        assert row["ms_per_image"] > 0
    assert rows[1]["miou_change_95"] == [0, 0]
    assert rows[1]["agreement"] == 1 > rows[8]["agreement"]
    plain = scorecard(tmp_path / "plain.json", *arguments)
    assert plain["scores"] == together["scores"]
    # two attentions on maps of 1/4 of the images' sizes
    sizes = [[-(-length // 4) for length in sample.labels_HW.shape] for sample in samples]
    for stride in rows:
        counts = [2 * h * w * -(-h // stride) * -(-w // stride) for h, w in sizes]
        assert rows[stride]["attention_scores_per_image"] == round(np.mean(counts))
    best = together["recommended_key_stride"]
    assert (f"key stride {best} is the largest" if best > 1 else "keep all keys") in printed


def test_a_kept_key_stride_is_used_and_said_by_eval_and_predict(checkpoint, data, tmp_path):
    own = shutil.copy(checkpoint, tmp_path / "own.safetensors")
    weights = load_file(own)
    arguments = (own, "--data", data, "--device", "cpu")
    printed = evaluated(*arguments, "--key-stride", "4", "--save")
    assert f"{own}: eval and predict use key stride 4 from now on" in printed
    kept = load_file(own)
    assert weights.keys() == kept.keys()
    assert all(torch.equal(weights[name], kept[name]) for name in weights)
    again = scorecard(tmp_path / "again.json", *arguments)
    assert again["protocol"]["key_stride"] == 4
    named = scorecard(tmp_path / "named.json", checkpoint, *arguments[1:], "--key-stride", 4)
    assert again["scores"] == named["scores"]
    assert "key stride 4, an approximation" in evaluated(*arguments)
    assert "key stride" not in evaluated(*arguments, "--key-stride", 1)
    assert key_stride_of(load(own).model) == 4
    assert key_stride_of(load(own, fold=True).model) == 4
    assert key_stride_of(load(own, key_stride=1).model) == 1
    command = ["predict", own, data / "images" / "val", "--out", tmp_path / "p", "--device", "cpu"]
    result = RUNNER.invoke(app, [*map(str, command)])
    assert "key stride 4, an approximation" in result.stdout


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--key-stride", "0"], "--key-stride 0: expected whole numbers from 1 on, such as 4 or 1,2,4,8"),
        (["--key-stride", "2,x"], "--key-stride 2,x: expected whole numbers"),
        (["--save"], "--save keeps a key stride: name it"),
        (["--key-stride", "1,2", "--nproc", "2"], "compared by one process; leave out --nproc"),
        (["--key-stride", "1,2", "--picture", "p.png"], "--picture draws one protocol"),
    ],
)
def test_key_strides_that_make_no_sense_are_refused_in_one_line(checkpoint, data, options, told):
    result = RUNNER.invoke(app, ["eval", str(checkpoint), "--data", str(data), *options])
    assert result.exit_code == 2
    assert told in result.stderr
    assert result.stderr.count("\n") == 1


def test_modes_are_compared_in_one_table_and_auto_slides_where_an_image_is_large(checkpoint, data, tmp_path):
    """Images are 73 to 131 px a side: all are large for a window of 48, none is for one of 110."""
    about, weights = read_checkpoint(checkpoint), load_file(checkpoint)
    found = {}
    for window in (48, 110):
        recipe = about.recipe.model_dump(exclude_none=True)
        recipe["evaluate"] |= {"mode": "auto", "window": [window] * 2, "stride": [window // 2] * 2}
        model = load(checkpoint).model
        path = tmp_path / f"{window}.safetensors"
        save_checkpoint(
            path, model, recipe=Recipe.model_validate(recipe), classes=CLASSES, iteration=7, best_miou=None
        )
        assert load_file(path).keys() == weights.keys()
        arguments = (path, "--data", data, "--device", "cpu")
        found[window] = scorecard(tmp_path / "s.json", *arguments, "--mode", "whole,slide,auto")["comparison"]
        assert [row["mode"] for row in found[window]] == ["whole", "slide", "auto"]
        for row in found[window]:
            alone = scorecard(tmp_path / "one.json", *arguments, "--mode", row["mode"])
            assert alone["scores"]["miou"] == row["miou"]
        assert scorecard(tmp_path / "own.json", *arguments)["scores"]["miou"] == found[window][2]["miou"]
        assert f"images over 1.25 windows: slide {window} x {window}" in evaluated(*arguments)
    whole, slide, auto = found[48]
    assert auto["miou"] == slide["miou"] != whole["miou"]
    whole, slide, auto = found[110]
    assert auto["miou"] == whole["miou"] != slide["miou"]
    both = scorecard(tmp_path / "b.json", *arguments, "--mode", "whole,slide", "--key-stride", "1,4")[
        "comparison"
    ]
    assert [row["name"] for row in both] == [
        "whole, all keys",
        "whole, key stride 4",
        "slide, all keys",
        "slide, key stride 4",
    ]

"""Recipes are strict, complete and agree with the paper's tables."""

import copy
import subprocess
import sys
import tomllib
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

from segdeformer.config import (
    DEFAULT_RECIPE,
    Recipe,
    Strict,
    load_recipe,
    parse_recipe,
    recipe_names,
    recipe_toml,
    validate_recipe,
)
from segdeformer.errors import UsageError

PACKAGE = resources.files("segdeformer")
PAPER = tomllib.loads(PACKAGE.joinpath("paper.toml").read_text("utf-8"))
SHIPPED = {n: PACKAGE.joinpath("recipes", f"{n}.toml").read_text("utf-8") for n in recipe_names()}
OF_THE_PAPER = [name for name, text in SHIPPED.items() if "reported" in tomllib.loads(text)]
FIGURES = ("miou", "miou_multi_scale", "params_millions")
REMOVED = object()


def table_of_paper(number: int) -> list[dict[str, Any]]:
    return next(t["rows"] for t in PAPER["tables"] if t["number"] == number)


def refusal(changes: dict[str, Any]) -> str:
    """The error that the synthetic recipe gives after `changes`: dotted key -> value, or REMOVED."""
    values = copy.deepcopy(tomllib.loads(SHIPPED["synthetic"]))
    for path, value in changes.items():
        *tables, key = path.split(".")
        at = values
        for table in tables:
            at = at.setdefault(table, {})
        if value is REMOVED:
            del at[key]
        else:
            at[key] = value
    with pytest.raises(UsageError) as caught:
        validate_recipe(values, "my.toml")
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)
    return str(caught.value)


# What is refused, and in which words.


@pytest.mark.parametrize(
    ("path", "remedy"),
    [
        ("tarin", "did you mean `train`?"),
        ("train.learning_rat", "did you mean `learning_rate`?"),
        ("model.encoder.nmae", "did you mean `name`?"),
        ("model.context.internal.head", "did you mean `heads`?"),
        ("model.context.external.qqqq", "known here: tokens, attention_loss, second_stage, decouple"),
    ],
)
def test_unknown_key_names_its_path_and_the_nearest_right_one(path: str, remedy: str) -> None:
    assert refusal({path: 1}) == f"my.toml: unknown key `{path}`; {remedy}"


@pytest.mark.parametrize(
    ("path", "value", "complaint"),
    [
        ("train.iterations", "20", "Input should be a valid integer; got '20'"),
        ("train.iterations", 2.5, "Input should be a valid integer; got 2.5"),
        ("train.seed", True, "Input should be a valid integer; got True"),
        ("augment.photometric", 1, "Input should be a valid boolean; got 1"),
        ("model.encoder.name", 3, "Input should be a valid string; got 3"),
    ],
)
def test_wrong_type_is_never_converted(path: str, value: Any, complaint: str) -> None:
    assert refusal({path: value}) == f"my.toml: `{path}`: {complaint}"


@pytest.mark.parametrize(
    ("path", "value", "complaint"),
    [
        ("train.iterations", 0, "Input should be greater than 0; got 0"),
        ("model.num_classes", 1, "Input should be greater than or equal to 2; got 1"),
        ("model.num_classes", 256, "Input should be less than or equal to 255; got 256"),
        ("model.head.dropout", 1.5, "Input should be less than or equal to 1; got 1.5"),
        ("train.learning_rate", float("nan"), "Input should be a finite number; got nan"),
        ("model.fusion.kind", "mpl", "Input should be 'mlp'; got 'mpl'"),
        ("evaluate.mode", "sliding", "Input should be 'whole' or 'slide'; got 'sliding'"),
        ("reported", {"table": 9, "row": "x"}, "Input should be less than or equal to 8; got 9"),
    ],
)
def test_value_out_of_range_names_its_key_and_the_range(path: str, value: Any, complaint: str) -> None:
    key = "reported.table" if path == "reported" else path
    assert refusal({path: value}) == f"my.toml: `{key}`: {complaint}"


def test_second_entry_of_a_pair_is_named_by_its_index() -> None:
    assert refusal({"augment.crop": [64, 0]}) == (
        "my.toml: `augment.crop.1`: Input should be greater than 0; got 0"
    )


@pytest.mark.parametrize("path", ["name", "model", "model.num_classes", "model.encoder.name", "data.name"])
def test_missing_key_is_named(path: str) -> None:
    assert refusal({path: REMOVED}) == f"my.toml: key `{path}` is missing"


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        (
            {"augment.ratio_range": [2.0, 0.5]},
            "`augment`: ratio_range [2.0, 0.5] must be positive and in ascending order",
        ),
        (
            {"augment.quarter_turns": True, "augment.crop": [64, 32]},
            "`augment`: quarter_turns needs a square crop; got [64, 32]",
        ),
        (
            {"evaluate.window": [512, 512], "evaluate.stride": [600, 512]},
            (
                "`evaluate`: stride [600, 512] is larger than window [512, 512]: "
                "pixels between windows would have no prediction"
            ),
        ),
        (
            {"train.class_weights": [1.0, 2.0]},
            "train.class_weights has 2 values for model.num_classes 5",
        ),
        (
            {"model.fusion.width": 33, "model.context.internal.heads": 2},
            "`model`: fusion.width 33 is no multiple of context.internal.heads 2",
        ),
        (
            {"model.context": {}},
            "`model.context`: has neither `internal` nor `external`; add one, or leave `context` out",
        ),
    ],
)
def test_values_that_contradict_each_other_are_refused(changes: dict[str, Any], complaint: str) -> None:
    assert refusal(changes) == f"my.toml: {complaint}"


def test_only_the_first_of_several_mistakes_is_told_and_the_others_are_counted() -> None:
    message = refusal({"train.iterations": "20", "train.seed": -1, "train.seeds": 1})
    assert message == "my.toml: `train.iterations`: Input should be a valid integer; got '20' (and 2 more)"


def test_bad_toml_names_the_file_and_the_place() -> None:
    with pytest.raises(
        UsageError, match=r"^my\.toml: not valid TOML: Invalid value \(at line 2, column 8\)$"
    ):
        parse_recipe('name = "x"\nseed = nope\n', "my.toml")


@pytest.mark.parametrize(
    ("name", "hint"),
    [("landcovr", "did you mean `landcover`? "), ("synthetik", "did you mean `synthetic`? "), ("qqq", "")],
)
def test_unknown_recipe_name_offers_the_nearest(name: str, hint: str) -> None:
    with pytest.raises(UsageError) as caught:
        load_recipe(name)
    assert str(caught.value) == (
        f"no recipe `{name}`: neither a shipped recipe nor a TOML file; {hint}"
        "`segdeformer recipes` lists them"
    )


def test_file_that_is_no_text_is_refused_by_its_path(tmp_path: Path) -> None:
    path = tmp_path / "picture.toml"
    path.write_bytes(b"\x89PNG\xff\xfe")
    with pytest.raises(UsageError, match=r"picture\.toml: cannot be read as a TOML text file"):
        load_recipe(str(path))


def test_recipe_cannot_be_changed_after_it_was_read() -> None:
    recipe = load_recipe("synthetic")
    with pytest.raises(ValueError, match="frozen"):
        recipe.train.seed = 1


# What ships.


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_recipe_carries_the_name_of_its_file(name: str) -> None:
    assert load_recipe(name).name == name


@pytest.mark.parametrize("name", SHIPPED)
def test_resolved_recipe_reads_back_equal(name: str) -> None:
    recipe = load_recipe(name)
    assert parse_recipe(recipe_toml(recipe), "resolved") == recipe


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_recipe_leaves_nothing_to_a_default(name: str) -> None:
    resolved = load_recipe(name).model_dump(mode="json", exclude_none=True)
    written = tomllib.loads(SHIPPED[name])
    if resolved["evaluate"]["mode"] == "whole":  # a window may be left out then
        for key in {"window", "stride"} - written["evaluate"].keys():
            del resolved["evaluate"][key]
    assert written == resolved


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_recipe_keeps_the_order_of_the_schema(name: str) -> None:
    def check(table: dict[str, Any], model: Strict) -> None:
        schema = [key for key in type(model).model_fields if key in table]
        assert list(table) == schema
        for key, value in table.items():
            if isinstance(value, dict):
                check(value, getattr(model, key))

    check(tomllib.loads(SHIPPED[name]), load_recipe(name))


def test_descriptions_are_distinct_short_lines() -> None:
    descriptions = [load_recipe(name).description for name in SHIPPED]
    assert len(set(descriptions)) == len(descriptions)
    assert all(20 <= len(d) <= 80 and "\n" not in d and not d.endswith(".") for d in descriptions)


def test_names_begin_with_their_data_set() -> None:
    for name in SHIPPED:
        data = load_recipe(name).data.name
        assert name == data or name.startswith(f"{data}-")


def test_default_recipe_needs_no_download_and_no_data_root() -> None:
    recipe = load_recipe(DEFAULT_RECIPE)
    assert (recipe.data.name, recipe.data.root, recipe.model.encoder.weights) == ("landcover", "", "none")


def test_demo_is_the_default_recipe_stopped_early() -> None:
    demo, full = load_recipe("landcover-demo"), load_recipe("landcover")
    assert demo.train.iterations < full.train.iterations
    assert demo.model.num_classes == full.model.num_classes == 8
    assert (demo.data, demo.evaluate) == (full.data, full.evaluate)


def test_reading_every_recipe_does_not_import_torch() -> None:
    code = (
        "import sys; from segdeformer.config import load_recipe, recipe_names\n"
        "[load_recipe(n) for n in recipe_names()]; sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# The published settings: mmsegmentation's SegFormer, which the paper follows.


@pytest.mark.parametrize("name", OF_THE_PAPER)
def test_paper_recipe_has_the_published_optimiser(name: str) -> None:
    train = load_recipe(name).train
    assert train.learning_rate == 6e-5
    assert train.betas == (0.9, 0.999)
    assert train.weight_decay == 0.01
    assert train.decoder_lr_multiplier == 10.0
    assert (train.warmup_iterations, train.warmup_ratio) == (1500, 1e-6)
    assert (train.poly_power, train.min_learning_rate) == (1.0, 0.0)
    assert train.iterations == 160_000
    assert (train.loss_average, train.class_weights, train.label_smoothing) == ("all", None, 0.0)
    assert (train.attention_loss_weight, train.auxiliary_loss_weight) == (0.4, 0.4)


@pytest.mark.parametrize("name", OF_THE_PAPER)
def test_paper_recipe_has_the_published_crop_batch_and_protocol(name: str) -> None:
    recipe = load_recipe(name)
    classes, crop, batch, resize_to, mode = {
        "ade20k": (150, 512, 16, (2048, 512), "whole"),
        "coco_stuff": (171, 512, 16, (2048, 512), "slide"),
        "cityscapes": (19, 1024, 8, (2048, 1024), "slide"),
    }[recipe.data.name]
    assert recipe.model.num_classes == classes
    assert recipe.augment.crop == (crop, crop)
    assert recipe.train.batch_size == batch
    assert recipe.augment.resize_to == recipe.evaluate.resize_to == resize_to
    assert (recipe.evaluate.mode, recipe.evaluate.multiple_of) == (mode, 1)
    assert (recipe.evaluate.scales, recipe.evaluate.flip) == ((1.0,), False)
    if mode == "slide":
        assert recipe.evaluate.window == (crop, crop)
        assert recipe.evaluate.stride == {512: (341, 341), 1024: (768, 768)}[crop]


@pytest.mark.parametrize("name", OF_THE_PAPER)
def test_paper_recipe_has_the_published_augmentation(name: str) -> None:
    augment = load_recipe(name).augment
    assert augment.ratio_range == (0.5, 2.0)
    assert augment.max_class_share == 0.75
    assert (augment.horizontal_flip, augment.vertical_flip, augment.quarter_turns) == (0.5, 0.0, False)
    assert augment.photometric


@pytest.mark.parametrize("name", OF_THE_PAPER)
def test_drop_path_is_that_of_the_encoder_family(name: str) -> None:
    encoder = load_recipe(name).model.encoder
    assert encoder.drop_path == (0.3 if encoder.name.startswith("swin") else 0.1)


@pytest.mark.parametrize("name", OF_THE_PAPER)
def test_paper_recipe_starts_from_image_net_1k_weights(name: str) -> None:
    encoder = load_recipe(name).model.encoder
    if encoder.name.startswith("mit_"):
        assert encoder.weights == f"weights/{encoder.name}.pth"
    else:  # timm's untagged Swin-S would be pretrained on ImageNet-22K
        assert encoder.weights == "timm"
        assert encoder.name.rsplit(".", 1)[1] in {"ms_in1k", "fb_in1k"}


def without(recipe: Recipe, *keys: str) -> dict[str, Any]:
    values = recipe.model_dump()
    for path in ("name", "description", *keys):
        *tables, key = path.split(".")
        at = values
        for table in tables:
            at = at[table]
        del at[key]
    return values


@pytest.mark.parametrize("size", ["b1", "b2", "b5"])
def test_baseline_paper_and_released_recipes_differ_in_nothing_but_the_context(size: str) -> None:
    baseline = load_recipe(f"ade20k-segformer-{size}")
    ours = load_recipe(f"ade20k-segdeformer-{size}")
    released = load_recipe(f"ade20k-segdeformer-{size}-released")
    assert without(baseline, "reported", "model.context") == without(ours, "reported", "model.context")
    assert without(ours, "model.context.projection") == without(released, "model.context.projection")
    assert baseline.model.context is None
    assert ours.model.context is not None
    assert ours.model.context.projection == "affine"
    assert released.model.context is not None
    assert released.model.context.projection == "conv_bn_relu"


# The paper as data.


@pytest.mark.parametrize("name", OF_THE_PAPER)
def test_reported_figures_equal_the_row_of_the_paper(name: str) -> None:
    reported = load_recipe(name).reported
    assert reported is not None
    (row,) = [r for r in table_of_paper(reported.table) if name in r.get("recipes", [])]
    assert reported.row == row["method"]
    assert {f: getattr(reported, f) for f in FIGURES} == {f: row.get(f) for f in FIGURES}


def test_every_row_that_names_a_recipe_agrees_with_that_recipe() -> None:
    named = set()
    for table in PAPER["tables"]:
        for row in table["rows"]:
            for name in row.get("recipes", []):
                reported = load_recipe(name).reported
                assert reported is not None
                assert row["miou"] == reported.miou, f"Table {table['number']}, {name}"
                named.add(name)
    assert named == set(OF_THE_PAPER)


def test_star_rows_are_the_recipes_with_a_reduction() -> None:
    rows = [r for t in PAPER["tables"] for r in t["rows"] if "recipes" in r]
    for row in rows:
        for name in row["recipes"]:
            context = load_recipe(name).model.context
            reduced = context is not None and context.reduction > 1
            assert reduced == ("efficient_attention" in row.get("markers", []))


def test_paper_has_eight_tables_of_known_columns_and_markers() -> None:
    tables = PAPER["tables"]
    assert [t["number"] for t in tables] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert [len(t["rows"]) for t in tables] == [20, 6, 6, 5, 7, 4, 10, 6]
    for table in tables:
        for row in table["rows"]:
            assert set(row) <= {*table["columns"], "markers", "recipes"}
            ordered = [key for key in (*table["columns"], "markers", "recipes") if key in row]
            assert list(row) == ordered
            assert set(row.get("markers", [])) <= set(PAPER["markers"])


def test_markers_agree_with_the_signs_in_the_method() -> None:
    signs = {"†": "uper_net", "‡": "image_net_22k", "*": "efficient_attention"}
    for table in PAPER["tables"]:
        for row in table["rows"]:
            written = [marker for sign, marker in signs.items() if sign in row.get("method", "")]
            assert row.get("markers", []) == written


def test_gains_are_differences_to_the_first_row() -> None:
    for number in (4, 5, 6):
        first, *others = table_of_paper(number)
        for row in others:
            assert row["gain"] == pytest.approx(row["miou"] - first["miou"], abs=1e-9)

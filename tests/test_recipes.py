"""Shipped recipes are complete, have the published settings, and agree with the paper's tables."""

import subprocess
import sys
import tomllib
from importlib import resources
from typing import Any

import pytest

from segdeformer.config import (
    DEFAULT_RECIPE,
    MLPFusionConfig,
    Recipe,
    Strict,
    load_recipe,
    parse_recipe,
    recipe_names,
    recipe_toml,
)

PACKAGE = resources.files("segdeformer")
PAPER = tomllib.loads(PACKAGE.joinpath("paper/paper.toml").read_text("utf-8"))
SHIPPED = {n: PACKAGE.joinpath("recipes", f"{n}.toml").read_text("utf-8") for n in recipe_names()}
OF_THE_PAPER = [name for name, text in SHIPPED.items() if "reported" in tomllib.loads(text)]
FIGURES = ("miou", "miou_multi_scale", "params_millions")


def table_of_paper(number: int) -> list[dict[str, Any]]:
    return next(t["rows"] for t in PAPER["tables"] if t["number"] == number)


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
    # SegFormer multiplies the decoder's rate, mmsegmentation's UperNet runs do not
    assert train.decoder_lr_multiplier == (1.0 if "upernet" in name else 10.0)
    assert (train.warmup_iterations, train.warmup_ratio) == (1500, 1e-6)
    assert (train.poly_power, train.min_learning_rate) == (1.0, 0.0)
    assert train.iterations == 160_000
    assert [(term.name, term.of, term.weight) for term in train.losses] == [
        ("seg", "logits", 1.0),
        ("attn", "class_logits", 0.4),
        ("aux", "auxiliary_logits", 0.4),
    ]
    assert all((t.average, t.class_weights, t.label_smoothing) == ("all", None, 0.0) for t in train.losses)


@pytest.mark.parametrize("name", OF_THE_PAPER)
def test_paper_recipe_has_the_published_crop_batch_and_protocol(name: str) -> None:
    recipe = load_recipe(name)
    classes, crop, batch, resize_to, mode = {
        "ade20k": (150, 512, 16, (2048, 512), "whole"),
        "coco_stuff": (171, 512, 16, (2048, 512), "slide"),
        "cityscapes": (19, 1024, 8, (2048, 1024), "slide"),
    }[recipe.data.name]
    if name.endswith("-640"):  # the lower Swin-L rows of Table 1
        crop, resize_to = 640, (2560, 640)
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
    assert encoder.drop_path == (0.3 if encoder.name.startswith(("swin", "twins")) else 0.1)


@pytest.mark.parametrize("name", OF_THE_PAPER)
def test_paper_recipe_starts_from_image_net_weights(name: str) -> None:
    recipe = load_recipe(name)
    encoder = recipe.model.encoder
    if encoder.name.startswith("mit_"):
        assert encoder.weights == f"weights/{encoder.name}.pth"
    else:  # timm's untagged Swin-S would be pretrained on ImageNet-22K
        assert encoder.weights == "timm"
        assert recipe.reported is not None
        tags = {"ms_in22k"} if "‡" in recipe.reported.row else {"ms_in1k", "fb_in1k", "in1k"}
        assert encoder.name.rsplit(".", 1)[1] in tags


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
    style = ("model.context.projection", "model.context.start")
    assert without(ours, *style) == without(released, *style)
    assert baseline.model.context is None
    assert ours.model.context is not None
    assert ours.model.context.projection == "affine"
    assert ours.model.context.start == "unit"
    assert released.model.context is not None
    assert released.model.context.projection == "conv_bn_relu"
    assert released.model.context.start == "small"


@pytest.mark.parametrize("name", [n for n in OF_THE_PAPER if n.split("-")[1] == "upernet"])
def test_upernet_recipes_with_and_without_context_differ_in_nothing_else(name: str) -> None:
    data, encoder = name.removesuffix("-640").split("-upernet-")
    pairs = [n for n in OF_THE_PAPER if n.startswith(f"{data}-segdeformer-{encoder}-upernet")]
    pairs = [n for n in pairs if n.endswith("-640") == name.endswith("-640")]
    assert pairs or encoder == "twins-l"  # of which the paper has no row with SegDeformer
    for pair in pairs:
        assert without(load_recipe(name), "reported", "model.context") == without(
            load_recipe(pair), "reported", "model.context"
        )


def test_dagger_rows_are_the_recipes_with_upernet() -> None:
    for row in [r for t in PAPER["tables"] for r in t["rows"]]:
        dagger = "uper_net" in row.get("markers", [])
        assert "recipes" in row or not dagger
        for name in row.get("recipes", []):
            assert (load_recipe(name).model.fusion.kind == "upernet") == dagger


def test_base_decoders_of_table_8_have_its_depths_and_widths() -> None:
    rows = [row for row in table_of_paper(8) if "decoder_depth" in row]
    for row in rows:
        for name in row["recipes"]:
            fusion = load_recipe(name).model.fusion
            assert isinstance(fusion, MLPFusionConfig)
            assert (fusion.depth, fusion.width) == (row["decoder_depth"], row["decoder_width"])
    assert [(row["decoder_depth"], row["decoder_width"]) for row in rows] == [
        (2, 256),
        (8, 256),
        (2, 256),
        (8, 512),
    ]


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

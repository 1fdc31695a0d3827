"""A recipe is read strictly: what is refused, and in which words."""

import copy
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

from segdeformer.config import (
    ThirdPartyConfig,
    change_recipe,
    load_recipe,
    parse_recipe,
    recipe_text,
    validate_recipe,
)
from segdeformer.config.changes import differences
from segdeformer.errors import UsageError

REMOVED = object()


def refusal(changes: dict[str, Any]) -> str:
    """The error that the synthetic recipe gives after `changes`: dotted key -> value, or REMOVED."""
    values = copy.deepcopy(tomllib.loads(recipe_text("synthetic")))
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
        ("model.fusion.dept", "did you mean `depth`?"),
        (
            "model.context.external.qqqq",
            "known here: tokens, momentum, attention_loss, second_stage, decouple",
        ),
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
        (
            "model.fusion.kind",
            "mpl",
            "Input should be 'mlp', 'upernet', 'fpn', 'fapn', 'third_party' or 'module:name'; got 'mpl'",
        ),
        ("model.fusion.depth", 1, "Input should be greater than or equal to 2; got 1"),
        ("evaluate.mode", "sliding", "Input should be 'whole', 'slide' or 'auto'; got 'sliding'"),
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


@pytest.mark.parametrize(
    "path", ["name", "model", "model.num_classes", "model.encoder.name", "model.fusion.kind", "data.name"]
)
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
            {"train.losses": [{"name": "seg", "kind": "cross_entropy", "class_weights": [1.0, 2.0]}]},
            "train.losses.0.class_weights has 2 values for model.num_classes 5",
        ),
        (
            {"model.fusion.width": 33, "model.context.internal.heads": 2},
            "`model`: fusion.width 33 is no multiple of context.internal.heads 2",
        ),
        (
            {"model.fusion": {"kind": "upernet", "pyramid_width": 64}},
            "unknown key `model.fusion.pyramid_width`; did you mean `width`?",
        ),
        (
            {"model.fusion": {"kind": "fapn", "pyramid_width": 20}},
            "`model.fusion.pyramid_width`: Input should be a multiple of 8; got 20",
        ),
        (
            {"model.fusion": {"kind": "upernet"}, "train.batch_size": 1},
            (
                "train.batch_size is 1, but BatchNorm after UperNet's 1x1 pool sees one value per image and "
                "needs two; set it to 2 or more"
            ),
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


def test_older_names_of_keys_are_read_and_mean_the_same() -> None:
    values = tomllib.loads(recipe_text("synthetic"))
    values["model"].pop("context")
    train = values["train"]
    term = train.pop("losses")[0]
    train |= {"loss_average": "valid", "attention_loss_weight": 0.7, "label_smoothing": 0.1}
    values["model"]["encoder"] = {"name": "test_vit", "taps": [0, 1, 2, 3]}
    values["model"]["fusion"] = {"kind": "peer", "decoder": "DPT"}
    recipe = validate_recipe(values, "older.toml")
    assert recipe.model.encoder.out_indices == (0, 1, 2, 3)
    assert recipe.model.fusion == ThirdPartyConfig(decoder="DPT")
    assert [(t.name, t.of, t.weight) for t in recipe.train.losses] == [
        ("seg", "logits", 1.0),
        ("attn", "class_logits", 0.7),
        ("aux", "auxiliary_logits", 0.4),
    ]
    assert all((t.average, t.label_smoothing) == ("valid", 0.1) for t in recipe.train.losses)
    train["losses"] = [term]
    complaint = "`train`: has `losses` and the older `loss_average`; move it into the terms of `losses`"
    with pytest.raises(UsageError, match=re.escape(complaint)):
        validate_recipe(values, "older.toml")


def test_differences_go_into_tables_and_into_terms_by_their_names() -> None:
    base = load_recipe("synthetic")
    changed = change_recipe(base, iterations=base.train.iterations, seed=7)
    assert differences(base.model_dump(), changed.model_dump()) == {"train.seed": (0, 7)}
    seg, *others = base.train.losses
    train = base.train.model_copy(update={"losses": (seg.model_copy(update={"weight": 2.0}), *others[1:])})
    found = differences(base.model_dump(), base.model_copy(update={"train": train}).model_dump())
    assert found["train.losses.seg.weight"] == (1.0, 2.0)
    assert found["train.losses.attn"] == (others[0].model_dump(), None)
    assert len(found) == 2

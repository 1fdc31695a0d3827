"""Rows of an ablation: the paper's tables, their values, rows of a file, and mistakes in it."""

from importlib import resources
from pathlib import Path

import pytest
from typer.testing import CliRunner

from segdeformer.ablation.plan import (
    Plan,
    base_of_rows,
    encoders,
    file_rows,
    parse_seeds,
    read_ablation,
    table_rows,
    with_weights,
)
from segdeformer.ablation.request import default_folder, make_plan
from segdeformer.cli.main import app
from segdeformer.config import ContextConfig, ExternalConfig, Recipe, load_recipe
from segdeformer.errors import UsageError
from segdeformer.paper import paper
from segdeformer.paper.ablations import TABLES, paper_value

RUNNER = CliRunner(env={"COLUMNS": "160"})
PAPER = {table["number"]: table["rows"] for table in paper()["tables"]}


def base(name: str = "synthetic", **changes) -> Recipe:
    recipe = load_recipe(name)
    wanted = {"data": recipe.data, "num_classes": recipe.model.num_classes, "iterations": None, "batch": None}
    return base_of_rows(recipe, **(wanted | changes))


def rows_of(tmp_path: Path, text: str, on: Recipe | None = None):
    path = tmp_path / "mine.toml"
    path.write_text('base = "synthetic"\n' + text)
    file = read_ablation(path)
    return file_rows(file, on or base(file.base))


# The paper's tables.


@pytest.mark.parametrize(
    ("table", "mious", "gains"),
    [
        (4, [40.97, 42.65, 42.53, 42.62, 42.81], [None, 1.68, 1.56, 1.65, 1.84]),
        (
            5,
            [40.97, 41.44, 41.74, 41.57, 41.86, 42.37, 42.84],
            [None, 0.47, 0.77, 0.60, 0.89, 1.40, 1.87],
        ),
        (6, [40.97, 42.65, 42.84, 44.05], [None, 1.68, 1.87, 3.08]),
        (
            7,
            [42.87, 43.93, 44.10, 47.72, 48.16, 48.94, 48.42, 45.58, 47.49, 47.09],
            [None, 1.06, 1.23, None, 0.44, 1.22, 0.70, None, 1.91, 1.51],
        ),
        (8, [45.58, 45.68, 47.49, 46.08, 47.09], [None, 0.10, 1.91, 0.50, 1.51]),
    ],
)
def test_every_row_has_the_value_that_the_paper_prints(table, mious, gains) -> None:
    values = [paper_value(table, row) for row in TABLES[table].values()]
    assert [value.miou for value in values] == mious
    assert [value.gain for value in values] == gains
    printed = list(dict.fromkeys(row["miou"] for row in PAPER[table]))
    assert list(dict.fromkeys(mious)) == printed  # in the paper's order, none left out


@pytest.mark.parametrize("table", [4, 5, 6])
def test_rows_of_tables_4_to_6_change_nothing_but_the_context(table) -> None:
    for row in table_rows(table, base()):
        assert all(key.startswith("model.context") for key in Plan("", base(), (), ()).changes(row))
        assert row.recipe.train == base().train and row.recipe.data == base().data


def test_contexts_of_table_5_are_the_columns_of_the_paper() -> None:
    for row, printed in zip(table_rows(5, base()), PAPER[5], strict=True):
        context = row.recipe.model.context
        if "tokens" not in printed:
            assert context is None
            continue
        wanted = {key: printed[key] for key in ("tokens", "attention_loss", "second_stage", "decouple")}
        assert context == ContextConfig(external=ExternalConfig(**wanted))


def test_projection_start_and_reduction_stay_those_of_the_base(tmp_path) -> None:
    (row, *_) = rows_of(
        tmp_path,
        '[[rows]]\nname = "a"\nmodel.context.projection = "conv_bn_relu"\nmodel.context.reduction = 2\n'
        'model.context.start = "unit"\n[[rows]]\nname = "b"\n',
    )
    rows = table_rows(6, row.recipe)
    assert rows[0].recipe.model.context is None
    for other in rows[1:]:
        context = other.recipe.model.context
        assert context is not None
        assert (context.projection, context.start, context.reduction) == ("conv_bn_relu", "unit", 2)


@pytest.mark.parametrize("table", [7, 8])
def test_rows_of_tables_7_and_8_are_models_of_shipped_recipes_on_the_base_s_data(table) -> None:
    shown = [row.get("recipes", [None])[0] for row in PAPER[table]]
    names = list(dict.fromkeys(shown))
    rows = table_rows(table, base())
    assert len(rows) == len(names)
    for row, name in zip(rows, names, strict=True):
        shipped = load_recipe(name).model
        encoder = shipped.encoder.model_copy(update={"weights": "none"})
        assert row.recipe.model == shipped.model_copy(update={"num_classes": 5, "encoder": encoder})
        assert (row.recipe.train, row.recipe.augment) == (base().train, base().augment)


def test_gains_are_over_the_row_of_the_same_encoder() -> None:
    rows = {row.name: row for row in table_rows(7, base())}
    for row in rows.values():
        if row.over is not None:
            assert row.recipe.model.encoder == rows[row.over].recipe.model.encoder
            assert rows[row.over].recipe.model.context is None and rows[row.over].over is None


def test_weights_go_to_the_rows_of_their_encoder() -> None:
    rows = with_weights(table_rows(8, base()), {"mit_b2": "/weights/b2.pth"})
    assert {row.recipe.model.encoder.weights for row in rows} == {"/weights/b2.pth"}
    rows = with_weights(table_rows(7, base()), {"mit_b2": "/weights/b2.pth"})
    chosen = [row.recipe.model.encoder.weights for row in rows]
    assert chosen == ["none"] * 7 + ["/weights/b2.pth"] * 3
    assert list(encoders(rows)) == [
        "deit_small_patch16_224.fb_in1k",
        "swin_small_patch4_window7_224.ms_in1k",
        "mit_b2",
    ]


# The base, seeds and order.


def test_without_arguments_it_is_table_6_on_landcover_small() -> None:
    plan = make_plan("table6", seeds="2")
    assert plan.seeds == (0, 1)
    assert [row.name for row in plan.rows] == ["no context", "internal", "external", "internal + external"]
    assert (plan.base.name, plan.base.data.name) == ("landcover-demo", "landcover")
    assert (plan.base.train.iterations, plan.base.train.warmup_iterations) == (400, 40)
    assert default_folder("table6", plan) == Path("runs/ablate-table6-landcover")
    longer = make_plan("table6", seeds="1", base="landcover-demo")
    assert longer.base.train.iterations == 500  # a base that is named keeps its length


def test_a_shorter_base_scales_its_schedule_and_validates_at_the_end_only() -> None:
    recipe = base("landcover-demo", iterations=200, batch=4).train
    assert (recipe.iterations, recipe.warmup_iterations, recipe.batch_size) == (200, 20, 4)
    assert (recipe.validate_every, recipe.checkpoint_every) == (200, 20)
    assert base(data=load_recipe("landcover").data, num_classes=8).model.num_classes == 8


def test_runs_go_through_all_rows_before_the_next_seed() -> None:
    rows = table_rows(6, base())
    order = Plan("", base(), rows, (4, 1)).runs
    names = [row.name for row in rows]
    assert [(run.row.name, run.seed) for run in order] == [(n, 4) for n in names] + [(n, 1) for n in names]


def test_seeds_are_a_number_or_a_list() -> None:
    assert [parse_seeds(text) for text in ("3", "7,", "2, 0,11")] == [(0, 1, 2), (7,), (2, 0, 11)]


@pytest.mark.parametrize("text", ["", "0", "two", "1,1", "-1", "1.5", ","])
def test_wrong_seeds_are_refused(text) -> None:
    with pytest.raises(UsageError, match="--seeds"):
        parse_seeds(text)


# Rows of a file.


def test_rows_of_a_file_change_single_keys_and_take_tables_away(tmp_path) -> None:
    rows = rows_of(
        tmp_path,
        """
        [[rows]]
        name = "plain"
        model.context = "none"
        [[rows]]
        name = "internal, 2 heads"
        model.context.internal.heads = 2
        model.context.external = "none"
        train.learning_rate = 2e-3
        train.losses = [{ name = "seg", kind = "cross_entropy", class_weights = [1.0, 2.0, 1.0, 1.0, 1.0] }]
        train.iterations = 30
        [[rows]]
        name = "upernet"
        over = "internal, 2 heads"
        model.fusion = { kind = "upernet", width = 24 }
        augment.crop = [32, 48]
        """,
    )
    plain, heads, upernet = rows
    assert [row.over for row in rows] == [None, "plain", "internal, 2 heads"]
    assert plain.recipe.model.context is None
    context = heads.recipe.model.context
    assert context is not None and context.internal is not None
    assert (context.internal.heads, context.external) == (2, None)
    assert heads.recipe.train.learning_rate == 2e-3
    assert heads.recipe.train.losses[0].class_weights == (1, 2, 1, 1, 1)
    assert (heads.recipe.train.validate_every, heads.recipe.train.checkpoint_every) == (30, 2)
    assert upernet.recipe.model.fusion.model_dump() == {
        "kind": "upernet",
        "width": 24,
        "pools": (1, 2, 3, 6),
        "neck": False,
    }
    assert upernet.recipe.augment.crop == (32, 48)
    assert [row.folder for row in rows] == ["plain", "internal-2-heads", "upernet"]


TWO = '[[rows]]\nname = "a"\n[[rows]]\nname = "b"\n'


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (
            TWO + "model.context.internl.heads = 2",
            "row `b`: unknown key `model.context.internl`; did you mean `i",
        ),
        (
            TWO + 'model.fusion.width = "wide"',
            "row `b`: `model.fusion.width`: Input should be a valid integer",
        ),
        (
            TWO + "model.context.internal.heads = 3",
            "row `b`: `model`: fusion.width 32 is no multiple of cont",
        ),
        (TWO + 'train.iterations = "ten"', "row `b`: `train.iterations`: Input should be a valid integer"),
        (TWO + "train.seed = 3", "row `b`: `train.seed` cannot be a row's: --seeds says"),
        (TWO + "train.validate_every = 3", "row `b`: `train.validate_every` cannot be a row's"),
        (TWO + "model.num_classes = 3", "row `b`: `model.num_classes` cannot be a row's: the data"),
        (TWO + 'evaluate.mode = "slide"', "row `b`: `evaluate` cannot be a row's: all rows have the base's"),
        (TWO + "modle.fusion.width = 2", "row `b`: unknown key `modle`; did you mean `model`?"),
        (TWO + 'over = "c"', "row `b`: `over` is `c`, which is no other row; known: a"),
        (TWO + 'over = "b"', "row `b`: `over` is `b`, which is no other row; known: a"),
        (TWO + "model = 3", "row `b`: `model`: Input should be a valid dictionary; got 3"),
        (TWO + "model.head = 3", "row `b`: `model.head`: Input should be a valid dictionary"),
        (TWO + "[[rows]]\nmodel.fusion.width = 2", "row 3: key `name` is missing"),
        (TWO + '[[rows]]\nname = "b"', "two rows are named `b`; each needs a name of its own"),
        (TWO + '[[rows]]\nname = "B!"', "rows `b` and `B!` differ in signs only"),
        (TWO + '[[rows]]\nname = "+"', "row `+`: `name`: String should match pattern"),
        ('[[rows]]\nname = "a"', "`rows`: List should have at least 2 items"),
        ("row = 3\n" + TWO, "unknown key `row`; did you mean `rows`?"),
        ("rows = 3", "`rows`: Input should be a valid list; got 3"),
        ("= 3", "cannot be read as TOML ("),
    ],
)
def test_a_mistake_in_a_file_is_told_in_one_line_with_row_and_key(tmp_path, monkeypatch, text, told) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.toml").write_text(f'base = "synthetic"\n{text}')
    result = RUNNER.invoke(app, ["ablate", "mine.toml", "--out", "out"])
    assert result.exit_code == 2 and result.stdout == ""
    assert result.stderr.startswith(f"error: mine.toml: {told}"), result.stderr
    assert result.stderr.count("\n") == 1 and not Path("out").exists()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (
            ["table9"],
            "no ablation `table9`: expected one of table4, table5, table6, table7, table8, or a TOML",
        ),
        (["mine.toml", "--base", "synthetic"], "--base synthetic: mine.toml names its own base, `synthetic`"),
        (["table6", "--base", "synthtic"], "no recipe `synthtic`"),
        (["table6", "--data", "nowhere"], "--data nowhere: neither a data set nor a folder"),
        (["table6", "--data", "ade20k:nowhere"], "name a recipe for ade20k: --base ade20k-..."),
        (
            ["table6", "--base", "synthetic", "--weights", "nowhere.pth"],
            "--weights nowhere.pth: no such file",
        ),
        (
            ["table7", "--base", "synthetic", "--weights", "a.pth"],
            "--weights a.pth: name the encoder, ENCODER=F",
        ),
        (["gone.toml"], "row `b`: `model.encoder.weights` is `gone.pth`; no such file"),
        (["table6", "--base", "synthetic", "--seeds", "0"], "--seeds 0: a row needs at least one seed"),
        (["table6", "--base", "synthetic", "--impl", "magic"], "--impl is `magic`"),
    ],
)
def test_a_wrong_command_is_told_in_one_line(tmp_path, monkeypatch, arguments, told) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.toml").write_text(f'base = "synthetic"\n{TWO}')
    Path("gone.toml").write_text(f'base = "synthetic"\n{TWO}model.encoder.weights = "gone.pth"\n')
    result = RUNNER.invoke(app, ["ablate", *arguments])
    assert result.exit_code == 2 and result.stdout == ""
    assert result.stderr.startswith(f"error: {told}"), result.stderr
    assert result.stderr.count("\n") == 1 and not Path("runs").exists()


def test_a_base_may_lie_beside_the_file(tmp_path, monkeypatch) -> None:
    folder = tmp_path / "below"
    folder.mkdir()
    text = (resources.files("segdeformer") / "recipes" / "synthetic.toml").read_text("utf-8")
    (folder / "own.toml").write_text(text.replace('"synthetic"', '"own"', 1))
    (folder / "mine.toml").write_text(f'base = "own.toml"\n{TWO}')
    file = read_ablation(folder / "mine.toml")
    assert load_recipe(file.base).name == "own" and file.title == "mine"

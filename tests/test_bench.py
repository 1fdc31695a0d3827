"""`segdeformer bench`: the arithmetic of times, what is compared with what, the tables, the messages."""

import json

import pytest
import torch
import typer
from typer.testing import CliRunner

from segdeformer.cli.bench import TAKES
from segdeformer.cli.bench_fps import comparison_grids
from segdeformer.cli.main import app
from segdeformer.cli.show import Grid, markdown
from segdeformer.config import load_recipe, recipe_toml
from segdeformer.data.classes import ClassTable
from segdeformer.errors import UserError
from segdeformer.measure.alternatives import Alternative, Setting, build, parse_alternatives
from segdeformer.measure.flops import Flops
from segdeformer.measure.fps import Comparison, Measured, Options
from segdeformer.measure.machine import Machine
from segdeformer.measure.memory import Memory, measure_memory
from segdeformer.measure.parameters import count_parameters
from segdeformer.measure.speed import Length, Split, alternating_ms, latency, percentile, split_ms
from segdeformer.paper.figures import paper_speeds
from segdeformer.weights.build import build_model
from segdeformer.weights.checkpoint import save_checkpoint


def run(*arguments: str):
    return CliRunner().invoke(app, ["bench", *arguments])


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A recipe that builds and runs in no time."""
    recipe = load_recipe("landcover")
    fusion = recipe.model.fusion.model_copy(update={"width": 16})
    encoder = recipe.model.encoder.model_copy(update={"name": "mit_nano", "weights": "none"})
    model = recipe.model.model_copy(update={"fusion": fusion, "encoder": encoder})
    path = tmp_path_factory.mktemp("bench") / "small.toml"
    path.write_text(recipe_toml(recipe.model_copy(update={"model": model})))
    return str(path)


# Times.


@pytest.mark.parametrize(
    ("values", "percent", "expected"),
    [
        ([3.0], 95, 3.0),
        ([4.0, 1.0, 3.0, 2.0], 50, 2.5),
        ([5.0, 1.0, 9.0], 50, 5.0),
        ([10.0 * n for n in range(21)], 95, 190.0),
        ([1.0, 2.0], 95, 1.95),
        ([7.0, 1.0], 0, 1.0),
        ([7.0, 1.0], 100, 7.0),
    ],
)
def test_percentiles_lie_between_neighbours(values, percent, expected):
    assert percentile(values, percent) == pytest.approx(expected, rel=1e-12)


def test_latency_gives_images_per_second_at_the_median():
    assert latency([30.0, 10.0, 20.0], batch=4) == pytest.approx((20.0, 29.0, 200.0, 3))


class FakeClock:
    """Time passes only when something is done; every round takes longer, as when a machine heats up."""

    def __init__(self):
        self.now_s = 0.0
        self.done = []

    def read(self) -> float:
        return self.now_s

    def run(self, name: str, seconds: float):
        def act() -> None:
            drift = 1 + 0.1 * (len(self.done) // 2)
            self.done.append(name)
            self.now_s += seconds * drift

        return act


def test_runs_alternate_so_that_drift_leaves_the_ratio_alone():
    clock = FakeClock()
    runs = {"a": clock.run("a", 0.01), "b": clock.run("b", 0.03)}
    rounds = list(alternating_ms(runs, length=Length(4, 1.0), wait=lambda: None, clock=clock.read))
    assert clock.done == ["a", "b"] * 4
    assert [r["a"] for r in rounds] == pytest.approx([10.0, 11.0, 12.0, 13.0])
    medians = {name: percentile([r[name] for r in rounds], 50) for name in runs}
    assert medians["b"] / medians["a"] == pytest.approx(3.0)


def test_waiting_for_the_device_belongs_to_the_run():
    clock = FakeClock()
    queued = []

    def wait() -> None:
        clock.now_s += 0.5 * len(queued)
        queued.clear()

    runs = {"launched": lambda: queued.append("work")}
    rounds = list(alternating_ms(runs, length=Length(2, 1.0), wait=wait, clock=clock.read))
    assert [r["launched"] for r in rounds] == pytest.approx([500.0, 500.0])


@pytest.mark.parametrize(
    ("length", "seconds_each", "num_rounds"),
    [
        (Length(None, 1.0), 0.125, 8),
        (Length(None, 1.0), 3.0, 5),
        (Length(None, 1.0), 1e-9, 500),
        (Length(7, 1), 3, 7),
    ],
)
def test_so_many_rounds_as_fit_the_seconds_but_five_to_five_hundred(length, seconds_each, num_rounds):
    clock = FakeClock()

    def act() -> None:
        clock.now_s += seconds_each

    rounds = list(alternating_ms({"a": act}, length=length, wait=lambda: None, clock=clock.read))
    assert len(rounds) == num_rounds


def test_parts_add_up_to_a_pass_and_have_a_head_only_unfolded(small):
    model = build(Alternative("a", small, Setting(fold=False)), torch.device("cpu")).model
    images = torch.randn(1, 3, 33, 49)
    split = split_ms(model, images, passes=1)
    assert min(split.encoder, split.fusion, split.context, split.head) > 0
    assert split_ms(model.fold(), images, passes=1).head is None
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())


# What is compared.


def test_models_and_changes_are_read():
    base = Setting(impl="sdpa")
    found = parse_alternatives(
        ["a", "runs/b/,dtype=bfloat16"], ["no-fold", "impl=reference,form=plain", "a"], base
    )
    assert found == [
        Alternative("a", "a", base),
        Alternative("b, dtype=bfloat16", "runs/b/", base._replace(dtype="bfloat16")),
        Alternative("a, no-fold", "a", base._replace(fold=False)),
        Alternative("a, impl=reference, form=plain", "a", base._replace(impl="reference", form="plain")),
        Alternative("a (2)", "a", base),
    ]


def test_changes_of_the_first_model_start_from_its_own():
    _, second = parse_alternatives(["a,compile,channels-last"], ["no-compile,cuda-graphs"], Setting())
    assert second.setting == Setting(compile=False, channels_last=True, cuda_graphs=True)


def test_plain_form_and_folding_give_the_same_logits(small):
    device, images = torch.device("cpu"), torch.randn(2, 3, 33, 49)
    settings = [Setting(), Setting(form="plain"), Setting(fold=False, impl="reference")]
    built = [build(Alternative("a", small, setting), device) for setting in settings]
    assert [b.folding for b in built] == ["folded", "not folded: Eq. 7 in its plain form", "not folded"]
    with torch.inference_mode():
        folded, plain, low_rank = (b.model(images).logits_BKhw for b in built)
    torch.testing.assert_close(folded, plain, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(low_rank, plain, atol=2e-5, rtol=1e-4)


def test_folded_checkpoint_is_measured_folded_only(small, tmp_path):
    recipe = load_recipe(small)
    model = build_model(recipe.model).fold()
    names = tuple(f"class {index}" for index in range(recipe.model.num_classes))
    classes = ClassTable(names, ((0, 0, 0),) * len(names))
    path = tmp_path / "folded.safetensors"
    save_checkpoint(path, model, recipe=recipe, classes=classes, iteration=1, best_miou=None)
    built = build(Alternative("c", str(path), Setting()), torch.device("cpu"))
    assert built.recipe == recipe
    assert built.folding == "folded"
    with pytest.raises(UserError, match="c: it was saved folded, which cannot be undone"):
        build(Alternative("c", str(path), Setting(fold=False)), torch.device("cpu"))
    counted = run("--params", str(path), "--json", str(tmp_path / "counts.json"))
    assert counted.exit_code == 0, counted.stderr
    (counts,) = json.loads((tmp_path / "counts.json").read_text())["models"].values()
    assert counts == {
        **count_parameters(model)._asdict(),
        "total": sum(p.numel() for p in model.parameters()),
    }


# Speed.


def measured(label: str, recipe: str, p50_ms: float) -> Measured:
    speed = latency([p50_ms], batch=1)
    flops = Flops(2_500_000_000, Split(10**9, 10**9, 5 * 10**8, None))
    alternative = Alternative(label, recipe, Setting())
    split, printed = Split(1.0, 0.5, 0.25, None), paper_speeds().get(recipe)
    return Measured(
        alternative,
        recipe,
        "folded",
        "sdpa",
        10**6,
        flops,
        3 * 10**9,
        speed,
        split,
        Memory(4, 5, 16),
        printed,
    )


def comparison(*models: Measured) -> Comparison:
    machine = Machine("a CPU, 2 cores", 2, 0.0, {"torch": "2"}, "abc", "2026-01-01")
    return Comparison(machine, "cpu", Options(1, (256, 256), False, 3, Length(None, 1), True), list(models))


def test_speeds_are_ratios_to_segformer_b2_as_in_the_paper():
    found = comparison(
        measured("ours", "ade20k-segdeformer-b2", 40.0),
        measured("base", "ade20k-segformer-b2", 10.0),
        measured("mine", "mine", 5.0),
    )
    assert found.base.alternative.label == "base"
    rows = comparison_grids(found)[0].rows
    assert [row[-2:] for row in rows] == [("0.25", "0.23"), ("1.00", "1.00"), ("2.00", "")]  # 7.80 / 33.47


def test_without_segformer_b2_the_first_model_is_1():
    found = comparison(
        measured("ours", "ade20k-segdeformer-b2", 40.0),
        measured("efficient", "ade20k-segdeformer-b2-efficient", 10.0),
    )
    rows = comparison_grids(found)[0].rows
    assert [row[-2:] for row in rows] == [("1.00", "1.00"), ("4.00", "3.16")]  # 24.63 / 7.80
    cost = comparison_grids(found)[1].rows[0]
    assert cost == ("ours", "1.00", "2.50", "1.50", "5", "16")


def test_markdown_has_titles_aligned_columns_and_notes():
    grid = Grid("Title", ("a", "b"), [("x*|y\nz", "1")], ["a note"])
    assert markdown([grid]) == "## Title\n\n| a | b |\n| --- | ---: |\n| x\\*\\|y<br>z | 1 |\n\n- a note\n"


def test_fps_gives_equal_flops_for_every_implementation_and_records_what_ran(small, tmp_path):
    impls = ("blocks", "reference")
    changes = [word for impl in impls for word in ("--against", f"impl={impl}")]
    options = ["--size", "33", "49", "--rounds", "2", "--warmup", "1", "--no-memory", "--batch", "2"]
    files = ["--json", str(tmp_path / "f.json"), "--markdown", str(tmp_path / "f.md")]
    result = run("--fps", small, *changes, *options, *files)
    assert result.exit_code == 0, result.stderr
    found = json.loads((tmp_path / "f.json").read_text())
    assert (found["batch"], found["size_hw"], found["device"], found["base"]) == (2, [33, 49], "cpu", small)
    assert found["machine"]["versions"]["torch"] == torch.__version__
    models = found["models"]
    assert list(models) == [small, *(f"{small}, impl={impl}" for impl in impls)]
    assert len({model["flops"] for model in models.values()}) == 1
    for model in models.values():
        assert model["num_rounds"] == 2
        assert 0 < model["p50_ms"] <= model["p95_ms"]
        assert model["images_per_s"] == pytest.approx(2000 / model["p50_ms"])
        assert model["flops"] == sum(part or 0 for part in model["flops_by_part"].values())
        assert model["relative_speed"] == pytest.approx(models[small]["p50_ms"] / model["p50_ms"])
    assert models[f"{small}, impl=blocks"]["impl"] == "blocks"
    assert "## Speed" in (tmp_path / "f.md").read_text()


def test_peak_memory_is_that_of_another_process_and_holds_what_a_pass_needs(small):
    built = build(Alternative("a", small, Setting()), torch.device("cpu"))
    memory = measure_memory(built, batch=1, size=(192, 224), argmax=False)
    assert memory.extra_mib > 48 * 56 * 8 * 4 / 2**20  # more than the logits
    assert memory.model_mib == pytest.approx(4 * sum(p.numel() for p in built.model.parameters()) / 2**20)
    assert memory.peak_mib > memory.extra_mib + memory.model_mib


# What can be written wrongly.


def test_every_option_of_bench_is_for_some_measurement():
    options = {option.name for option in typer.main.get_command(app).commands["bench"].params}
    taken = {name for names in TAKES.values() for name in names}
    assert taken == options - {"params", "fps", "tune", "help"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to measure: give --params, --fps or --tune"),
        (["--params", "--fps"], "--params and --fps are measured one at a time; give one of them"),
        (["--params", "--batch", "2"], "--batch is for --fps; leave it out with --params"),
        (["--fps", "--out", "x"], "--out is for --tune; leave it out with --fps"),
        (["--tune", "landcover"], "a MODEL is for --params and --fps; leave it out with --tune"),
        (["--fps", "--against", "no-fold"], "--against no-fold: name a MODEL to compare with: a recipe, run"),
        (["--fps", "landcovr"], "no model `landcovr`: neither a recipe, a TOML file, a run folder nor"),
        (["--params", "landcovr"], "no model `landcovr`: neither a recipe, a TOML file, a run folder nor"),
        (
            ["--fps", "landcover", "--dtype", "half"],
            "`dtype=half`: expected one of float32, float16, bfloat16",
        ),
        (["--fps", "landcover", "--impl", "fast"], "landcover: impl is `fast`; expected one of auto, triton"),
        (["--fps", "landcover,quick"], "`quick` is no change of a model; there are key-stride=N, impl=NAME"),
        (["--fps", "landcover", "--against", "form=short"], "`form=short`: expected one of low_rank, plain"),
        (["--fps", "landcover,fold,form=plain"], "landcover, fold, form=plain: it cannot be folded: Eq. 7"),
        (
            ["--fps", "landcover", "--device", "cpu", "--cuda-graphs"],
            "landcover: cuda-graphs needs a CUDA GPU, the device is cpu; leave it out",
        ),
        (["--fps", "landcover", "--device", "tpu"], "device is `tpu`; expected auto, cpu, cuda or cuda:N"),
    ],
)
def test_bench_refuses_in_one_line(arguments, message):
    result = run(*arguments)
    assert result.exit_code == 2
    assert result.stderr.startswith(f"error: {message}")
    assert result.stderr.count("\n") == 1

"""`segdeformer bench --params`: every model row of the paper's tables, counted or explained."""

import json

import pytest
import test_bench
from test_bench import run

from segdeformer.config import load_recipe
from segdeformer.measure.parameters import PartCounts, compared
from segdeformer.paper.figures import ParamsRow, paper, params_rows
from segdeformer.weights.build import build_model

small = test_bench.small  # a fixture


@pytest.fixture(scope="module")
def paper_files(tmp_path_factory):
    """What `bench --params` writes: JSON, read, and lines of Markdown."""
    folder = tmp_path_factory.mktemp("params")
    result = run("--params", "--json", str(folder / "p.json"), "--markdown", str(folder / "p.md"))
    assert result.exit_code == 0, result.stderr
    return json.loads((folder / "p.json").read_text()), (folder / "p.md").read_text().splitlines()


def test_every_model_row_of_the_three_tables_is_counted_or_explained(paper_files):
    rows = paper_files[0]["rows"]
    tables = {t["number"]: t["rows"] for t in paper()["tables"]}
    for number in (1, 7, 8):
        methods = [row["method"] for row in tables[number] for _ in row.get("recipes", [None])]
        assert [row["method"] for row in rows if row["table"] == number] == methods
    for row in rows:
        if row["recipe"] is None:
            assert len(row["remark"]) > 10
            continue
        printed, ours = row["paper_millions"], row["our_millions"]
        if printed is None or abs(ours - printed) > 0.0055:  # beyond rounding of what is printed
            assert len(row["remark"]) > 10, row
        assert row["within"] is not False or row["recipe"] == "ade20k-segformer-b2-depth8"
    totals = {row["recipe"]: row["parameters"]["total"] for row in rows if row["recipe"]}
    assert totals["ade20k-segformer-b2"] == 24_761_686
    assert totals["ade20k-upernet-swin-l"] == 233_962_976
    assert totals["ade20k-segdeformer-b1-released"] == 14_453_590


def test_remarks_belong_to_recipes_and_rows_that_exist():
    about = paper()["parameters"]
    rows = params_rows()
    assert set(about["remarks"]) | set(about["measured_millions"]) <= {row.recipe for row in rows}
    assert set(about["no_recipe"]) == {row.method for row in rows if row.recipe is None}
    assert all(len(remark) < 110 and "\n" not in remark for remark in about["remarks"].values())


@pytest.mark.parametrize(
    ("method", "printed", "measured", "total", "off", "within"),
    [
        ("Swin", 10.0, None, 10_050_000, 0.5, True),
        ("Swin", 10.0, None, 9_940_000, -0.6, False),
        ("Swin + SegDeformer", 10.0, None, 9_940_000, -0.6, True),
        ("Swin + SegDeformer", 10.0, None, 10_110_000, 1.1, False),
        ("SegFormer", 10.0, 9.9, 9_900_000, -1.0, True),  # held against the measured count
        ("SegFormer", 10.0, 9.9, 10_000_000, 0.0, False),
        ("SegFormer", None, None, 10_000_000, None, None),
    ],
)
def test_baselines_may_be_half_a_percent_off_and_ours_one(method, printed, measured, total, off, within):
    row = ParamsRow(1, method, method, printed, measured, "recipe", "")
    found = compared(row, PartCounts(total - 10, 4, 3, 2, 1))
    assert found.difference_percent == (None if off is None else pytest.approx(off, abs=1e-9))
    assert found.within is within


def test_recipe_that_cannot_be_built_has_its_reason():
    found = compared(ParamsRow(1, "DPT", "DPT", 109.71, None, "third_party", ""), "needs a package")
    assert (found.counts, found.within, found.obstacle) == (None, None, "needs a package")


def test_params_writes_figures_differences_and_verdicts(paper_files):
    table, lines = paper_files
    (b2,) = [r for r in table["rows"] if r["recipe"] == "ade20k-segformer-b2" and r["table"] == 7]
    assert b2["paper_millions"] == 24.91
    assert b2["measured_millions"] == 24.762
    assert b2["parameters"]["total"] == 24_761_686
    assert b2["our_millions"] == 24.761686
    assert b2["difference_percent"] == pytest.approx(-0.5954, abs=1e-4)
    assert b2["difference_to_measured_percent"] == pytest.approx(-0.0013, abs=1e-4)
    assert b2["within"] is True
    (deep,) = [r for r in table["rows"] if r["recipe"] == "ade20k-segformer-b2-depth8"]
    assert deep["difference_percent"] == pytest.approx(-1.1863, abs=1e-4)
    assert deep["within"] is False
    assert "| 7 | SegFormer-B2<br>ade20k-segformer-b2 | 24.91 | 24.762 | -0.60 | ok m | [13] |" in lines


def test_params_of_own_recipe_are_those_of_its_model_by_part(small, tmp_path):
    result = run("--params", small, "--json", str(tmp_path / "p.json"))
    assert result.exit_code == 0, result.stderr
    counts = json.loads((tmp_path / "p.json").read_text())["models"][small]
    model = build_model(load_recipe(small).model)
    parts = {
        "encoder": model.encoder,
        "fusion": model.decoder.fusion,
        "context": model.decoder.context,
        "head": model.decoder.head,
    }
    expected = {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}
    total = sum(p.numel() for p in model.parameters())
    assert counts == {**expected, "auxiliary": 0, "total": total}
    assert total == sum(expected.values())

"""`benchmarks.study`: starts are what their names say, frozen maps those of the encoder, and done is done."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks.study import runs
from benchmarks.study.__main__ import RECIPES
from benchmarks.study.features import CachedEncoder
from benchmarks.study.runs import Job, Setting, variant_names
from benchmarks.study.table import write_table
from segdeformer.config import load_recipe, recipe_toml
from segdeformer.models.encoders import build_encoder


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> str:
    """A tiny recipe that has the default start."""
    path = tmp_path_factory.mktemp("study") / "tiny.toml"
    path.write_text(recipe_toml(load_recipe("synthetic")))
    return str(path)


def job(recipe: str, variant: str, out: Path = Path("nowhere"), seed: int = 0) -> Job:
    return Job(Setting("tiny", recipe, iterations=2), variant, seed, out)


def fresh(recipe: str, variant: str) -> nn.Module:
    one = job(recipe, variant)
    return runs._fresh_model(runs._recipe(one), variant)


def test_small_is_small_and_unit_is_unit_whatever_the_recipe_starts_with(recipe):
    assert load_recipe(recipe).model.context.start == "unit"
    for variant, factor in (("small", 0.02), ("unit", None), ("queries, keys x 2", None)):
        attention = fresh(recipe, variant).decoder.context.internal[0].attention
        width = attention.query.in_features
        for name in ("query", "key", "value"):
            gain = 2 if variant.startswith("queries") and name != "value" else 1
            expected = factor or gain * width**-0.5
            assert getattr(attention, name).weight.std().item() == pytest.approx(expected, rel=0.1), (
                variant,
                name,
            )
    tokens = fresh(recipe, "tokens x 3").decoder.context.external.tokens
    assert tokens.info_KC.std().item() == pytest.approx(3, rel=0.2)


@pytest.mark.parametrize("variant", variant_names())
def test_every_variant_trains_a_step(recipe, variant):
    model = fresh(recipe, variant).train()
    out = model(torch.randn(2, 3, 64, 64))
    loss = out.logits_BKhw.square().mean()
    if out.class_logits_BKhw is not None:
        loss = loss + out.class_logits_BKhw.square().mean()
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.decoder.parameters())
    context = model.decoder.context
    assert (context is None) == (variant == "fusion only")
    if variant.startswith(("internal only", "external only")):
        assert (context.internal is None) == variant.startswith("external")
        assert (context.external is None) == variant.startswith("internal")


def test_settings_are_recipes_that_exist():
    for name in RECIPES.values():
        assert load_recipe(name).model.context is not None


def test_cached_maps_are_those_of_the_encoder_and_an_image_is_encoded_once(tmp_path):
    torch.manual_seed(0)
    cached = CachedEncoder(name="mit_nano", cache=str(tmp_path))
    torch.manual_seed(0)
    plain = build_encoder(load_recipe("synthetic").model.encoder).eval()
    images = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        expected = [torch.cat([plain(x[None])[level] for x in images]) for level in range(4)]
    for _ in range(2):
        maps = cached.train()(images)
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(maps, expected, strict=True))
        cached.encoder = None  # from here on all are known
    assert not any(m.requires_grad for m in maps)


def test_a_study_trains_scores_and_is_tabulated_and_what_is_done_is_not_done_again(recipe, tmp_path):
    jobs = [job(recipe, variant, tmp_path) for variant in ("fusion only", "unit")]
    for one in jobs:
        assert not one.is_done
        runs.run(one, threads=1)
        assert one.is_done
        results = json.loads((one.folder / "results.json").read_text())
        assert results["miou"] == pytest.approx(results["validations"][-1]["miou"], abs=1e-12)
        assert [point["iteration"] for point in results["curve"]] == [0, 1, 2]
        assert not list(one.folder.rglob("*.safetensors"))
    table = write_table(tmp_path / "tiny")
    assert "| fusion only | 1 |" in table
    gain = next(row for row in table.splitlines() if row.startswith("| unit |")).split("|")[5]
    assert gain.strip()[0] in "+-"

"""Parameter groups and learning rates, against FACTS' rules and numbers."""

import pytest
import torch

from segdeformer.config import TrainConfig, load_recipe
from segdeformer.training.optimizer import (
    build_optimizer,
    learning_rate_at,
    parameter_groups,
    set_learning_rate,
)
from segdeformer.weights.build import build_model


@pytest.fixture(scope="module")
def model():
    return build_model(load_recipe("synthetic").model)


def test_every_parameter_is_in_exactly_one_group(model):
    groups = parameter_groups(model, TrainConfig())
    ids = [id(p) for group in groups for p in group.parameters]
    assert len(ids) == len(set(ids)) == len(list(model.parameters()))


def test_the_decoder_has_ten_times_the_rate_and_decays_norms_and_tokens_too(model):
    groups = {g.name: g for g in parameter_groups(model, TrainConfig())}
    assert {n: (g.learning_rate, g.weight_decay) for n, g in groups.items()} == {
        "encoder": (6e-5, 0.01),
        "encoder norms, positions": (6e-5, 0.0),
        "decoder": (pytest.approx(6e-4), 0.01),
    }
    where = {id(p): name for name, g in groups.items() for p in g.parameters}
    for name, parameter in model.named_parameters():
        if not name.startswith("encoder."):
            assert where[id(parameter)] == "decoder", name
        elif "norm" in name:
            assert where[id(parameter)] == "encoder norms, positions", name
        else:
            assert where[id(parameter)] == "encoder", name  # biases decay as well


def test_position_tables_of_timm_encoders_are_not_decayed():
    recipe = load_recipe("synthetic")
    for name, table in [
        ("vit_tiny_patch16_224", "pos_embed"),
        ("swin_tiny_patch4_window7_224", "relative_position_bias_table"),
    ]:
        encoder = recipe.model.encoder.model_copy(update={"name": name, "drop_path": 0.0})
        model = build_model(recipe.model.model_copy(update={"encoder": encoder}))
        undecayed = {
            id(p) for g in parameter_groups(model, recipe.train) if g.weight_decay == 0 for p in g.parameters
        }
        tables = [p for n, p in model.encoder.named_parameters() if n.endswith(table)]
        assert tables
        assert all(id(p) in undecayed for p in tables)


@pytest.mark.parametrize(
    ("iteration", "expected"),
    [
        (0, 6e-5 * 1e-6),
        (750, 6e-5 * (1 - 750 / 160_000) * (1 - 0.5 * (1 - 1e-6))),
        (1500, 6e-5 * (1 - 1500 / 160_000)),
        (80_000, 3e-5),
        (159_999, 6e-5 / 160_000),
    ],
)
def test_warm_up_multiplies_the_running_poly(iteration, expected):
    assert learning_rate_at(iteration, 6e-5, TrainConfig()) == pytest.approx(expected, rel=1e-9)


def test_poly_power_and_floor():
    config = TrainConfig(iterations=100, warmup_iterations=0, poly_power=0.9, min_learning_rate=1e-4)
    assert learning_rate_at(25, 1e-2, config) == pytest.approx((1e-2 - 1e-4) * 0.75**0.9 + 1e-4)


def test_groups_keep_their_ratio_all_along(model):
    config = TrainConfig(iterations=100, warmup_iterations=10)
    optimizer = build_optimizer(parameter_groups(model, config), config)
    for iteration in (0, 5, 50, 99):
        set_learning_rate(optimizer, iteration, config)
        encoder, norms, decoder = (group["lr"] for group in optimizer.param_groups)
        assert encoder == norms
        assert decoder == pytest.approx(10 * encoder)
    assert isinstance(optimizer, torch.optim.AdamW)
    assert optimizer.defaults["betas"] == (0.9, 0.999)

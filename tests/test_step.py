"""One optimiser step: parts that add up, clipping, averages, precision, and what is left out."""

import itertools
import math
import re

import pytest
import torch
from torch import nn

from segdeformer.config import Recipe, TrainConfig, load_recipe
from segdeformer.data.built_in import SyntheticDataset
from segdeformer.data.samples import Splits
from segdeformer.errors import UsageError, UserError
from segdeformer.models import segmenter
from segdeformer.models.placed_dropout import PlacedDropout, place_dropouts
from segdeformer.training import step as step_module
from segdeformer.training.loop import Skipped, Step, train
from segdeformer.training.losses import training_losses
from segdeformer.training.optimizer import parameter_groups
from segdeformer.training.run import Options, Run, resume_run, start_run
from segdeformer.training.runlog import read_metrics
from segdeformer.training.step import gradient_norm
from segdeformer.weights.build import build_model

CPU = torch.device("cpu")
DATA = Splits(
    SyntheticDataset("train", num_images=7, size_hw=(49, 63)),
    SyntheticDataset("val", num_images=1, size_hw=(33, 41)),
)


def recipe(*, encoder: str = "mit_nano", **changes: object) -> Recipe:
    base = load_recipe("synthetic")
    given = base.model.encoder.model_copy(update={"name": encoder, "drop_path": 0.3})
    config = {"iterations": 3, "batch_size": 4, "learning_rate": 6e-5, "validate_every": 9, **changes}
    return base.model_copy(
        update={
            "model": base.model.model_copy(update={"encoder": given}),
            "augment": base.augment.model_copy(update={"crop": (40, 48)}),
            "train": TrainConfig.model_validate(base.train.model_dump(exclude={"losses"}) | config),
        }
    )


def started(folder, options: Options | None = None, **changes: object) -> Run:
    return start_run(recipe(**changes), folder, DATA, options=options or Options())


def steps(run: Run) -> list[Step]:
    return [event for event in train(run) if isinstance(event, Step)]


def state_of(run: Run) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in run.model.state_dict().items()}


class ChannelScale(nn.Module):
    """In BatchNorm's place: without statistics of a batch, which its parts do not share."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, channels))

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        return x_BCHW * self.weight[:, None, None]


@pytest.fixture
def without_batch_norm(monkeypatch):
    def build(*arguments: object, **options: object) -> segmenter.Segmenter:
        model = build_model(*arguments, **options)
        for parent in list(model.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, nn.BatchNorm2d):
                    setattr(parent, name, ChannelScale(child.num_features))
        return model

    monkeypatch.setattr("segdeformer.training.run.build_model", build)


# Parts of a batch.


@pytest.mark.parametrize("average", ["valid", "all"])
def test_accumulated_parts_learn_what_the_whole_batch_does(tmp_path, without_batch_norm, average):
    """With dropout, drop path and class weights; the parts differ in labelled pixels."""
    settings = {"loss_average": average, "class_weights": (0.5, 1.0, 2.0, 3.0, 1.5)}
    whole = started(tmp_path / "whole", **settings)
    parts = started(tmp_path / "parts", Options(accumulate=4), **settings)
    assert (whole.micro_batch_size, parts.micro_batch_size) == (4, 1)
    for ours, theirs in zip(steps(parts), steps(whole), strict=True):
        assert ours.losses.total.item() == pytest.approx(theirs.losses.total.item(), abs=1e-6)
        assert ours.losses.terms["attn"].item() == pytest.approx(theirs.losses.terms["attn"].item(), abs=1e-6)
    theirs = whole.model.state_dict()
    for name, value in parts.model.state_dict().items():
        torch.testing.assert_close(value, theirs[name], rtol=0, atol=1e-5, msg=name)


def test_every_image_has_its_own_drop_path_in_whatever_part_it_is(tmp_path):
    run = started(tmp_path)
    masks = []
    for first in range(4):
        torch.manual_seed(5)
        step_module.put_place(run.model, first=first, total=4)
        run.model.train()
        dropout = run.model.encoder.stages[3].blocks[1].drop_path
        masks.append(dropout(torch.ones(1, 2, 3, 4))[0, 0, 0, 0].item())
    torch.manual_seed(5)
    step_module.put_place(run.model, first=0, total=4)
    whole = dropout(torch.ones(4, 2, 3, 4))[:, 0, 0, 0].tolist()
    assert masks == whole
    assert all(value == 0.0 or value == pytest.approx(1 / 0.7) for value in whole)


def test_a_third_party_model_s_dropout_of_elements_is_placed_but_not_an_encoder_s():
    model = nn.Module()
    model.encoder, model.decoder = (nn.Sequential(nn.Dropout(rate), nn.Dropout(0.5)) for rate in (0.5, 0.0))
    place_dropouts(model)
    kinds = [[type(layer) for layer in part] for part in (model.encoder, model.decoder)]
    assert kinds == [[nn.Dropout, nn.Dropout], [nn.Dropout, PlacedDropout]]
    x_BChw = torch.rand(4, 3, 2, 5)
    torch.manual_seed(7)
    expected = nn.functional.dropout(x_BChw, 0.5)
    parts = []
    for first in (0, 3):
        torch.manual_seed(7)
        step_module.put_place(model, first=first, total=4)
        parts.append(model.decoder(x_BChw[first : first + 3]))
    torch.testing.assert_close(torch.cat(parts), expected)


# What an update does.


def test_clipping_scales_all_gradients_to_the_longest_norm_and_reports_the_one_before(tmp_path):
    free, clipped = started(tmp_path / "free"), started(tmp_path / "clipped", clip_norm=0.25)
    (before, *_), (event, *_) = steps(free), steps(clipped)
    assert event.losses.total == before.losses.total
    norms = [entry["gradient_norm"] for entry in read_metrics(clipped.folder) if entry["kind"] == "train"]
    assert norms[0] > 0.25
    gradients = [p.grad for p in clipped.model.parameters() if p.grad is not None]
    squares = sum(g.double().square().sum().item() for g in gradients)
    assert math.sqrt(squares) == pytest.approx(0.25, rel=1e-4)
    assert gradient_norm(clipped.model).item() == pytest.approx(0.25, rel=1e-4)


def test_averaged_weights_follow_the_formula_are_scored_and_go_on_after_a_resume(tmp_path):
    run = started(tmp_path, ema_decay=0.75, checkpoint_every=1, learning_rate=1e-3)
    expected = {name: p.double().clone() for name, p in run.model.named_parameters()}
    states = []
    for event in train(run):
        if isinstance(event, Step):
            for name, parameter in run.model.named_parameters():
                expected[name] = 0.75 * expected[name] + 0.25 * parameter.double()
            states.append({name: value.clone() for name, value in run.ema.module.state_dict().items()})
    for name, parameter in run.ema.module.named_parameters():
        torch.testing.assert_close(parameter.double(), expected[name], rtol=1e-6, atol=1e-8)
    from segdeformer.weights.checkpoint import BEST, load

    best = load(tmp_path / BEST).model.state_dict()
    assert all(torch.equal(best[name], value) for name, value in states[-1].items())
    again = resume_run(run.recipe, tmp_path, DATA)
    for name, value in again.ema.module.state_dict().items():
        assert torch.equal(value, states[-1][name]), name


def test_layer_decay_gives_each_block_its_share_of_the_rate():
    config = recipe(layer_decay=0.5, decoder_lr_multiplier=10.0, learning_rate=1e-3).train
    base = load_recipe("synthetic").model
    encoder = base.encoder.model_copy(update={"name": "test_vit2", "image_size": (32, 32)})
    model = build_model(base.model_copy(update={"encoder": encoder}))
    groups = parameter_groups(model, config)
    rate_of = {id(p): group.learning_rate for group in groups for p in group.parameters}
    assert len(rate_of) == len(list(model.parameters()))
    blocks = model.encoder.backbone.blocks
    depth = len(blocks)
    for index, block in enumerate(blocks):
        for parameter in block.parameters():
            assert rate_of[id(parameter)] == pytest.approx(1e-3 * 0.5 ** (depth - 1 - index))
    for parameter in model.encoder.backbone.patch_embed.parameters():
        assert rate_of[id(parameter)] == pytest.approx(1e-3 * 0.5**depth)
    for parameter in model.decoder.parameters():
        assert rate_of[id(parameter)] == pytest.approx(1e-2)
    with pytest.raises(UsageError, match=r"`train\.layer_decay` needs an encoder of timm"):
        parameter_groups(build_model(base), config)


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_half_precision_learns_nearly_the_same_and_keeps_float32_weights(tmp_path, precision):
    exact, half = started(tmp_path / "exact"), started(tmp_path / "half", precision=precision)
    tolerance = 0.03 if precision == "bfloat16" else 0.003
    for ours, theirs in zip(steps(half), steps(exact), strict=True):
        assert ours.losses.total.item() == pytest.approx(theirs.losses.total.item(), rel=tolerance)
        assert ours.losses.total != theirs.losses.total
    assert {p.dtype for p in half.model.parameters()} == {torch.float32}
    assert half.scaler.is_enabled() == (precision == "float16")


def test_channels_last_changes_no_result(tmp_path):
    plain, other = started(tmp_path / "plain"), started(tmp_path / "other", Options(channels_last=True))
    for ours, theirs in zip(steps(other), steps(plain), strict=True):
        assert ours.losses.total.item() == pytest.approx(theirs.losses.total.item(), abs=1e-6)
    expected = plain.model.state_dict()
    for name, value in other.model.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-5, msg=name)


@pytest.mark.parametrize("encoder", ["mit_nano", "test_vit2", "resnet10t"])
def test_checkpointing_changes_no_bit_and_no_running_statistic(tmp_path, encoder):
    plain = started(tmp_path / "plain", encoder=encoder)
    other = started(tmp_path / "other", Options(grad_checkpointing=True), encoder=encoder)
    assert [e.losses.total for e in steps(other)] == [e.losses.total for e in steps(plain)]
    expected, found = plain.model.state_dict(), other.model.state_dict()
    assert found.keys() == expected.keys()
    assert [name for name, value in found.items() if not value.equal(expected[name])] == []


def test_checkpointing_an_encoder_of_unknown_blocks_is_refused(tmp_path):
    with pytest.raises(UsageError, match="does not know the blocks of encoder `regnetx_002`"):
        started(tmp_path, Options(grad_checkpointing=True), encoder="regnetx_002")


# What is not finite.


def poison(monkeypatch, when: set[int]) -> None:
    """Make the losses of these calls NaN, and their gradients with them."""
    calls = itertools.count(1)

    def losses(*arguments: object, **options: object):
        found = training_losses(*arguments, **options)
        return found._replace(total=found.total * math.nan) if next(calls) in when else found

    monkeypatch.setattr(step_module, "training_losses", losses)


def test_a_step_that_is_not_finite_changes_nothing_and_the_next_one_learns(tmp_path, monkeypatch):
    run = started(tmp_path, ema_decay=0.5, max_skipped_steps=1)
    poison(monkeypatch, {2})
    states, skipped = [state_of(run)], []
    for event in train(run):
        if isinstance(event, Skipped):
            skipped.append(event)
        if isinstance(event, Step):
            states.append(state_of(run))
    assert [event.iteration for event in skipped] == [2]
    assert skipped[0].is_fault
    assert skipped[0].reason.startswith("iteration 2: loss nan, gradient norm nan, learning rate ")
    assert all(torch.equal(states[2][name], value) for name, value in states[1].items())  # statistics too
    assert not torch.equal(
        states[3]["decoder.head.classify.weight"], states[2]["decoder.head.classify.weight"]
    )
    assert run.progress.num_skipped_steps == 1
    noted = [entry for entry in read_metrics(tmp_path) if entry["kind"] == "skipped"]
    assert [entry["iteration"] for entry in noted] == [2]


def test_one_fault_too_many_ends_the_run_with_what_there_is_to_know(tmp_path, monkeypatch):
    run = started(tmp_path, iterations=9, max_skipped_steps=2, checkpoint_every=3)
    poison(monkeypatch, {4, 5, 6})
    with pytest.raises(UserError) as caught:
        steps(run)
    message = str(caught.value)
    assert message.startswith(
        "loss or gradient not finite in 3 steps in a row, 2 are allowed (train.max_skipped_steps); "
        "iteration 6: loss nan, gradient norm nan, learning rate "
    )
    assert re.search(r", losses before \d\.\d+, \d\.\d+, \d\.\d+, images train0004, ", message)
    assert ", images train0004, train0005, train0004, train0006; start anew" in message
    again = resume_run(run.recipe, tmp_path, DATA)
    assert again.progress.iteration == 3
    assert all(value.isfinite().all() for value in again.model.state_dict().values())


def test_gradients_that_overflow_by_scaling_are_no_fault(tmp_path):
    run = started(tmp_path, precision="float16", max_skipped_steps=0, iterations=2)
    run.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    events = list(train(run))
    skipped = [event for event in events if isinstance(event, Skipped)]
    assert len(skipped) == 2
    assert not any(event.is_fault for event in skipped)
    assert run.scaler.get_scale() == 2.0**38

"""The training loss is the weighted sum of its parts, each computed as the recipe says."""

import pytest
import torch
import torch.nn.functional as F

from segdeformer.config import IGNORE_INDEX, AuxiliaryConfig, ExternalConfig, TrainConfig, load_recipe
from segdeformer.engine.losses import training_losses
from segdeformer.models.segmenter import SegOutput, build_model

K = 5
MODEL = load_recipe("synthetic").model


def output(*, attention: bool = True, auxiliary: bool = True) -> SegOutput:
    """Random logits at 1/4, 1/4 and 1/16 of 37 x 29 px."""
    torch.manual_seed(0)
    maps = [4 * torch.randn(2, K, *size) for size in ((10, 8), (10, 8), (3, 2))]
    return SegOutput(maps[0], maps[1] if attention else None, maps[2] if auxiliary else None)


def labels() -> torch.Tensor:
    torch.manual_seed(1)
    labels_BHW = torch.randint(0, K, (2, 37, 29))
    labels_BHW[torch.rand(2, 37, 29) < 0.3] = IGNORE_INDEX
    return labels_BHW


def pixel_losses(logits_BKhw: torch.Tensor) -> torch.Tensor:
    """-log softmax of the true class at every valid pixel, in float64."""
    full_BKHW = F.interpolate(logits_BKhw.double(), (37, 29), mode="bilinear", align_corners=False)
    valid_BHW = labels() != IGNORE_INDEX
    truth_B1HW = labels().where(valid_BHW, 0).unsqueeze(1)
    return -full_BKHW.log_softmax(1).gather(1, truth_B1HW)[:, 0][valid_BHW]


def model_with(**changes: object) -> torch.nn.Module:
    torch.manual_seed(0)
    return build_model(MODEL.model_copy(update=changes))


@pytest.mark.parametrize(("attention_weight", "auxiliary_weight"), [(0.4, 0.4), (0.0, 1.5), (3.0, 0.0)])
def test_total_is_the_weighted_sum_of_the_unweighted_parts(attention_weight, auxiliary_weight):
    config = TrainConfig(
        attention_loss_weight=attention_weight, auxiliary_loss_weight=auxiliary_weight, loss_average="valid"
    )
    losses = training_losses(output(), labels(), config, None)
    expected = [pixel_losses(logits).mean() for logits in output()[:3]]
    torch.testing.assert_close([part.double() for part in losses[1:]], expected, rtol=1e-6, atol=0)
    total = expected[0] + attention_weight * expected[1] + auxiliary_weight * expected[2]
    torch.testing.assert_close(losses.total.double(), total, rtol=1e-6, atol=0)


def test_the_default_weight_of_the_attention_loss_is_that_of_equation_9():
    losses = training_losses(output(auxiliary=False), labels(), TrainConfig(), None)
    torch.testing.assert_close(losses.total, losses.segmentation + 0.4 * losses.attention)
    assert losses.auxiliary is None


def test_the_average_over_all_pixels_counts_the_ignored_ones_too():
    valid = training_losses(output(), labels(), TrainConfig(loss_average="valid"), None)
    everything = training_losses(output(), labels(), TrainConfig(loss_average="all"), None)
    share = (labels() != IGNORE_INDEX).float().mean()
    assert 0.6 < share < 0.8
    for one, other in zip(valid, everything, strict=True):
        torch.testing.assert_close(other, one * share)


def test_class_weights_reach_every_part():
    weights_K = torch.tensor([0.0, 1.0, 2.0, 0.5, 3.0])
    losses = training_losses(output(), labels(), TrainConfig(loss_average="valid"), weights_K)
    truth = labels()[labels() != IGNORE_INDEX]
    weight = weights_K[truth].double()
    expected = [(pixel_losses(logits) * weight).sum() / weight.sum() for logits in output()[:3]]
    torch.testing.assert_close([part.double() for part in losses[1:]], expected, rtol=1e-6, atol=0)


def test_label_smoothing_reaches_the_loss():
    flat = SegOutput(torch.zeros(2, K, 10, 8), None, None)
    sure = SegOutput(torch.zeros(2, K, 10, 8).index_fill_(1, torch.tensor([2]), 50.0), None, None)
    all_two = torch.full((2, 37, 29), 2)
    config = TrainConfig(label_smoothing=0.1)
    uniform = training_losses(flat, all_two, config, None).total
    assert uniform.item() == pytest.approx(torch.tensor(K).log().item())  # smoothing cannot change it
    certain = training_losses(sure, all_two, config, None).total
    assert certain.item() == pytest.approx(50 * 0.1 * (K - 1) / K)


def test_without_attention_or_auxiliary_logits_the_total_is_the_segmentation_loss():
    losses = training_losses(output(attention=False, auxiliary=False), labels(), TrainConfig(), None)
    assert losses.attention is None
    assert losses.auxiliary is None
    assert losses.total.item() == losses.segmentation.item()


def test_gradients_are_those_of_the_weighted_parts():
    logits = [part.requires_grad_() for part in output()[:3]]
    training_losses(SegOutput(*logits), labels(), TrainConfig(loss_average="valid"), None).total.backward()
    for part, weight in zip(logits, (1.0, 0.4, 0.4), strict=True):
        alone = part.detach().double().requires_grad_()
        (weight * pixel_losses(alone).mean()).backward()
        torch.testing.assert_close(part.grad.double(), alone.grad, rtol=1e-4, atol=1e-9)


def test_detached_losses_are_the_same_numbers_without_a_graph():
    losses = training_losses(
        SegOutput(*(p.requires_grad_() for p in output()[:3])), labels(), TrainConfig(), None
    )
    detached = losses.detached()
    assert [part.item() for part in detached] == [part.item() for part in losses]
    assert not any(part.requires_grad for part in detached)
    assert (
        training_losses(output(attention=False), labels(), TrainConfig(), None).detached().attention is None
    )


@pytest.mark.parametrize(
    ("context", "has_attention"),
    [
        (MODEL.context, True),
        (MODEL.context.model_copy(update={"external": None}), False),
        (MODEL.context.model_copy(update={"external": ExternalConfig(attention_loss=False)}), False),
        (None, False),
    ],
    ids=["both", "internal only", "no attention loss", "SegFormer"],
)
def test_the_attention_loss_exists_exactly_with_a_supervised_external_attention(context, has_attention):
    out = model_with(context=context)(torch.randn(2, 3, 37, 29))
    losses = training_losses(out, labels(), TrainConfig(), None)
    assert (losses.attention is not None) == has_attention
    parts = [losses.segmentation] + ([0.4 * losses.attention] if has_attention else [])
    torch.testing.assert_close(losses.total, sum(parts))


def test_the_auxiliary_part_is_there_in_training_only_and_trains_the_encoder():
    model = model_with(auxiliary=AuxiliaryConfig(stage=3, width=16))
    images = torch.randn(2, 3, 37, 29)
    losses = training_losses(model(images), labels(), TrainConfig(), None)
    losses.auxiliary.backward()
    reached = {
        name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None and p.grad.any()
    }
    assert reached == {"encoder", "auxiliary"}
    model.eval()
    assert training_losses(model(images), labels(), TrainConfig(), None).auxiliary is None

"""The training loss is the weighted sum of its parts, each computed as the recipe says."""

import pytest
import torch
import torch.nn.functional as F

from segdeformer.config import IGNORE_INDEX, AuxiliaryConfig, ExternalConfig, TrainConfig, load_recipe
from segdeformer.models.segmenter import SegOutput
from segdeformer.training.losses import Losses, build_terms, scaled_total, training_losses
from segdeformer.training.step import _values
from segdeformer.weights.build import build_model

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


def losses_of(output: SegOutput, labels_BHW: torch.Tensor, **settings: object) -> Losses:
    """By the recipe's three terms, with these settings in the older keys, which mean the same."""
    config = TrainConfig.model_validate(settings)
    return training_losses(output, labels_BHW, build_terms(config.losses, K, device=torch.device("cpu")))


@pytest.mark.parametrize(("attention_weight", "auxiliary_weight"), [(0.4, 0.4), (0.0, 1.5), (3.0, 0.0)])
def test_total_is_the_weighted_sum_of_the_unweighted_parts(attention_weight, auxiliary_weight):
    weights = {"attention_loss_weight": attention_weight, "auxiliary_loss_weight": auxiliary_weight}
    losses = losses_of(output(), labels(), loss_average="valid", **weights)
    expected = [pixel_losses(logits).mean() for logits in output()[:3]]
    torch.testing.assert_close([term.double() for term in losses.terms.values()], expected, rtol=1e-6, atol=0)
    total = expected[0] + attention_weight * expected[1] + auxiliary_weight * expected[2]
    torch.testing.assert_close(losses.total.double(), total, rtol=1e-6, atol=0)


def test_the_default_weight_of_the_attention_loss_is_that_of_equation_9():
    losses = losses_of(output(auxiliary=False), labels())
    torch.testing.assert_close(losses.total, losses.terms["seg"] + 0.4 * losses.terms["attn"])
    assert list(losses.terms) == ["seg", "attn"]


def test_the_average_over_all_pixels_counts_the_ignored_ones_too():
    valid = losses_of(output(), labels(), loss_average="valid")
    everything = losses_of(output(), labels(), loss_average="all")
    share = (labels() != IGNORE_INDEX).float().mean()
    assert 0.6 < share < 0.8
    torch.testing.assert_close(everything.total, valid.total * share)
    for name, loss in valid.terms.items():
        torch.testing.assert_close(everything.terms[name], loss * share)


def test_class_weights_reach_every_part():
    weights_K = torch.tensor([0.0, 1.0, 2.0, 0.5, 3.0])
    losses = losses_of(output(), labels(), loss_average="valid", class_weights=tuple(weights_K.tolist()))
    truth = labels()[labels() != IGNORE_INDEX]
    weight = weights_K[truth].double()
    expected = [(pixel_losses(logits) * weight).sum() / weight.sum() for logits in output()[:3]]
    torch.testing.assert_close([term.double() for term in losses.terms.values()], expected, rtol=1e-6, atol=0)


def test_label_smoothing_reaches_the_loss():
    flat = SegOutput(torch.zeros(2, K, 10, 8), None, None)
    sure = SegOutput(torch.zeros(2, K, 10, 8).index_fill_(1, torch.tensor([2]), 50.0), None, None)
    all_two = torch.full((2, 37, 29), 2)
    uniform = losses_of(flat, all_two, label_smoothing=0.1).total
    assert uniform.item() == pytest.approx(torch.tensor(K).log().item())  # smoothing cannot change it
    certain = losses_of(sure, all_two, label_smoothing=0.1).total
    assert certain.item() == pytest.approx(50 * 0.1 * (K - 1) / K)


def test_without_attention_or_auxiliary_logits_the_total_is_the_segmentation_loss():
    losses = losses_of(output(attention=False, auxiliary=False), labels())
    assert list(losses.terms) == ["seg"]
    assert losses.total.item() == losses.terms["seg"].item()


def test_gradients_are_those_of_the_weighted_parts():
    logits = [part.requires_grad_() for part in output()[:3]]
    losses_of(SegOutput(*logits), labels(), loss_average="valid").total.backward()
    for part, weight in zip(logits, (1.0, 0.4, 0.4), strict=True):
        alone = part.detach().double().requires_grad_()
        (weight * pixel_losses(alone).mean()).backward()
        torch.testing.assert_close(part.grad.double(), alone.grad, rtol=1e-4, atol=1e-9)


def test_exact_losses_are_the_same_numbers_in_float64_without_a_graph():
    losses = losses_of(SegOutput(*(p.requires_grad_() for p in output()[:3])), labels())
    exact = losses.exact()
    assert exact.total.item() == losses.total.item()
    assert {k: v.item() for k, v in exact.terms.items()} == {k: v.item() for k, v in losses.terms.items()}
    assert not any(term.requires_grad for term in (exact.total, *exact.terms.values()))
    assert {term.dtype for term in (exact.total, *exact.terms.values())} == {torch.float64}


def test_what_a_micro_batch_adds_to_the_logged_losses_is_not_rounded():
    losses = losses_of(output(), labels())
    terms = build_terms(TrainConfig().losses, K, device=torch.device("cpu"))
    found = _values(losses, terms, dict.fromkeys(losses.terms, 1 / 3))
    expected = [1 / 3 * value.double().item() for value in (losses.total, *losses.terms.values())]
    assert found.tolist() == [*expected, 0.0]


def test_equal_factors_scale_the_total_and_different_ones_each_term():
    losses = losses_of(output(), labels())
    terms = build_terms(TrainConfig().losses, K, device=torch.device("cpu"))
    half = scaled_total(losses, terms, dict.fromkeys(losses.terms, 0.5))
    assert half.item() == 0.5 * losses.total.item()
    mixed = scaled_total(losses, terms, {"seg": 0.25, "attn": 2.0, "aux": 0.5})
    seg, attn, aux = (losses.terms[name].double() for name in ("seg", "attn", "aux"))
    assert mixed.item() == pytest.approx((0.25 * seg + 0.8 * attn + 0.2 * aux).item(), rel=1e-6)


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
    losses = losses_of(out, labels())
    assert list(losses.terms) == (["seg", "attn"] if has_attention else ["seg"])
    weighted = [(0.4 if name == "attn" else 1.0) * term for name, term in losses.terms.items()]
    torch.testing.assert_close(losses.total, sum(weighted))


def test_the_auxiliary_part_is_there_in_training_only_and_trains_the_encoder():
    model = model_with(auxiliary=AuxiliaryConfig(stage=3, width=16))
    images = torch.randn(2, 3, 37, 29)
    losses = losses_of(model(images), labels())
    losses.terms["aux"].backward()
    reached = {
        name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None and p.grad.any()
    }
    assert reached == {"encoder", "auxiliary"}
    model.eval()
    assert "aux" not in losses_of(model(images), labels()).terms

"""The training loss as named terms (Eq. 9). B batch, K classes, hw a map, HW image."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from segdeformer.config import IGNORE_INDEX, CrossEntropyConfig, LossAverage, LossConfig, OwnLossConfig
from segdeformer.kernels import upsample_cross_entropy
from segdeformer.kernels.impl import Impl
from segdeformer.kernels.upsample.cross_entropy import loss_weight
from segdeformer.models.layers import SegOutput
from segdeformer.plugins import bound_part, explained, refuse

OWN = "loss"


class Losses(NamedTuple):
    """Scalars; the terms, by name and in the recipe's order, are unweighted."""

    total: Tensor
    terms: dict[str, Tensor]

    def exact(self) -> Losses:
        """The same numbers as float64, without their graph."""
        terms = {name: term.detach().double() for name, term in self.terms.items()}
        return Losses(self.total.detach().double(), terms)


class Term(NamedTuple):
    """A term of the loss, ready to be computed.

    function: of logits (B, K, h, w) and labels (B, H, W); a mean over what `average` counts.
    """

    name: str
    of: str
    weight: float
    function: Callable[[Tensor, Tensor], Tensor]
    average: LossAverage
    class_weights: tuple[float, ...] | None

    def num_labels(self, labels_BHW: Tensor) -> float:
        """What the mean is over: the loss of several batches as one is the mean weighted by this."""
        weights = (
            None if self.class_weights is None else torch.tensor(self.class_weights, dtype=torch.float64)
        )
        return loss_weight(labels_BHW, weights, IGNORE_INDEX, self.average).item()


def build_terms(
    configs: Sequence[LossConfig], num_classes: int, *, device: torch.device, impl: Impl = "auto"
) -> list[Term]:
    """The terms of a recipe; raises `UsageError` for one of one's own that is not what it should be."""
    return [
        _own_term(config, num_classes, device)
        if isinstance(config, OwnLossConfig)
        else _cross_entropy(config, device, impl)
        for config in configs
    ]


def _cross_entropy(config: CrossEntropyConfig, device: torch.device, impl: Impl) -> Term:
    weights = None if config.class_weights is None else torch.tensor(config.class_weights, device=device)

    def function(logits_BKhw: Tensor, labels_BHW: Tensor) -> Tensor:
        return upsample_cross_entropy(
            logits_BKhw,
            labels_BHW,
            ignore_index=IGNORE_INDEX,
            class_weights=weights,
            label_smoothing=config.label_smoothing,
            average=config.average,
            impl=impl,
        )

    return Term(config.name, config.of, config.weight, function, config.average, config.class_weights)


def _own_term(config: OwnLossConfig, num_classes: int, device: torch.device) -> Term:
    """Tried on two small images before anything is trained."""
    function = bound_part(config.kind, OWN, config.options or {})
    if isinstance(function, torch.nn.Module):
        function.to(device)
    logits_BKhw = torch.randn(2, num_classes, 4, 6, device=device, requires_grad=True)
    labels_BHW = torch.arange(2 * 16 * 24, device=device).view(2, 16, 24) % num_classes
    labels_BHW[:, :3] = IGNORE_INDEX
    with torch.enable_grad(), torch.random.fork_rng([]), explained(config.kind, OWN):
        loss = function(logits_BKhw, labels_BHW.to(torch.uint8))
    wanted = "a differentiable scalar"
    if not isinstance(loss, Tensor):
        raise refuse(config.kind, OWN, type(loss).__name__, wanted)
    if loss.ndim or not loss.requires_grad:
        came = (
            f"a tensor of shape {tuple(loss.shape)}, {'with' if loss.requires_grad else 'without'} gradient"
        )
        raise refuse(config.kind, OWN, came, wanted)

    def in_float32(logits_BKhw: Tensor, labels_BHW: Tensor) -> Tensor:
        return function(logits_BKhw.float(), labels_BHW)  # sums of half precision would overflow

    return Term(config.name, config.of, config.weight, in_float32, "valid", None)


def training_losses(output: SegOutput, labels_BHW: Tensor, terms: Sequence[Term]) -> Losses:
    """The weighted sum of the terms whose logits the model makes."""
    found: dict[str, Tensor] = {}
    for term in terms:
        logits_BKhw: Tensor | None = getattr(output, f"{term.of}_BKhw")
        if logits_BKhw is not None:
            found[term.name] = term.function(logits_BKhw, labels_BHW)
    return Losses(_weighted_sum(found, terms, dict.fromkeys(found, 1.0)), found)


def scaled_total(losses: Losses, terms: Sequence[Term], factors: Mapping[str, float]) -> Tensor:
    """The total with each term times its factor."""
    different = {factors[name] for name in losses.terms}
    if len(different) > 1:
        return _weighted_sum(losses.terms, terms, factors)
    (factor,) = different
    return losses.total if factor == 1.0 else losses.total * factor


def _weighted_sum(
    losses: Mapping[str, Tensor], terms: Sequence[Term], factors: Mapping[str, float]
) -> Tensor:
    total: Tensor | None = None
    for term in terms:
        if term.name not in losses:
            continue
        weight = term.weight * factors[term.name]
        loss = losses[term.name] if weight == 1.0 else weight * losses[term.name]
        total = loss if total is None else total + loss
    assert total is not None  # every recipe has a term of `logits`
    return total

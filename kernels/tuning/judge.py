"""When a result is right: by float64, with a budget of twice the textbook form's error in the same dtype.

References run over blocks of queries, or image by image, so that no N x M matrix and no full-size logits of
a batch are held, and problems of full size can be checked on the card that runs them.
B batch, N queries, M keys, K classes, hw map, HW output.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from segdeformer.kernels.upsample.cross_entropy import Average

BLOCK_SCORES = 2**25  # of a block: 256 MiB in float64
# Epsilons of rounding that a result may have beside its inputs' own. Half precisions add up in float32; in
# float32 the order of a sum and the base of an exponential show.
ROUNDINGS = {torch.float16: 4, torch.bfloat16: 4, torch.float32: 64}
# How far apart two upsampled float32 logits may be and still tie, as a share of the largest logit: position,
# weight, products and sums, on each side.
TIE = 12 * torch.finfo(torch.float32).eps
CONFIDENCE_ERROR = 1e-5  # of a softmax in float32


class Answer(NamedTuple):
    out: Tensor
    grads: tuple[Tensor, ...]  # of the inputs, in their order; empty without an upstream gradient


def answer(
    reference: Callable[..., Tensor],
    inputs: Sequence[Tensor],
    *,
    scale: float,
    grad_out: Tensor | None = None,
    exact: bool,
) -> Answer:
    """`reference` of (B, N, .) queries and (B, M, .) others, block by block.

    exact: in float64. Otherwise the textbook form in the inputs' own dtypes, the yardstick of a budget; only
    sums over blocks are then kept in float32.
    """
    precise = torch.float64 if exact else torch.float32
    leaves = [t.detach().to(precise).requires_grad_(grad_out is not None) for t in inputs]
    dtypes = [precise if exact else t.dtype for t in inputs]
    batch, num_queries, _ = inputs[0].shape
    rows_per_block = max(1, BLOCK_SCORES // (batch * inputs[1].shape[1]))
    outs = []
    with torch.set_grad_enabled(grad_out is not None):
        for first in range(0, num_queries, rows_per_block):
            rows = slice(first, first + rows_per_block)
            parts = [leaf[:, rows] if i == 0 else leaf for i, leaf in enumerate(leaves)]
            out = reference(*(t.to(dtype) for t, dtype in zip(parts, dtypes, strict=True)), scale=scale)
            if grad_out is not None:
                out.backward(grad_out[:, rows].to(out.dtype))
            outs.append(out.detach())
    grads = [leaf.grad for leaf in leaves if leaf.grad is not None]
    return Answer(torch.cat(outs, dim=1), tuple(grads))


def worst_row_error(result: Tensor, exact: Tensor, *, least: float = 0.0) -> float:
    """The largest error of a row, relative to that row's length, or the typical length if that is longer.

    Sharper than one number for all: a single wrong row shows. NaN when any element is NaN.
    least: shortest length to measure by, for gradients that cancel, such as those of a single key's score.
    """
    lengths = exact.double().norm(dim=-1)
    typical = lengths.square().mean().sqrt().clamp(min=max(least, torch.finfo(torch.float64).tiny))
    return ((result.double() - exact).norm(dim=-1) / lengths.maximum(typical)).max().item()


def largest_allowed(eager_error: float, dtype: torch.dtype) -> float:
    """Twice the error of the textbook form in the same dtype, plus rounding."""
    return 2 * eager_error + ROUNDINGS[dtype] * torch.finfo(dtype).eps


class Expected(NamedTuple):
    """One result as float64 has it, and the budget of another."""

    name: str
    exact: Tensor
    eager_error: float  # of the textbook form
    error: Callable[[Tensor, Tensor], float] = worst_row_error  # of a result, by the exact one
    unit: str = "worst row off by"
    dtype: torch.dtype | None = None  # whose rounding is allowed; None: the result's own
    rounding: float | None = None  # allowed instead of that

    def allowed(self, dtype: torch.dtype) -> float:
        """The largest error of a result in this dtype."""
        if self.rounding is not None:
            return 2 * self.eager_error + self.rounding
        return largest_allowed(self.eager_error, self.dtype or dtype)


class Verdict(NamedTuple):
    """On all results of a call."""

    error: float  # the largest, or that of the first result that is wrong
    share: float  # the largest share of its budget that one took; NaN for NaN
    wrong: str | None  # why they are not acceptable


def judge(results: Iterable[Tensor], expected: Iterable[Expected]) -> Verdict:
    """Whether every result is within its budget; there may be fewer than expected."""
    errors, shares = [0.0], [0.0]
    for result, right in zip(results, expected, strict=False):
        error, allowed = right.error(result.detach(), right.exact), right.allowed(result.dtype)
        errors.append(error)
        shares.append(error / allowed)
        if not error <= allowed:  # NaN is never allowed
            reason = f"wrong {right.name}: {right.unit} {error:.2g}, allowed {allowed:.2g}"
            return Verdict(error, shares[-1], reason)
    return Verdict(max(errors), max(shares), None)


def expected_attention(
    reference: Callable[..., Tensor],
    inputs: Sequence[Tensor],
    *,
    scale: float,
    grad_out: Tensor | None = None,
    least: float = 0.0,
) -> list[Expected]:
    """The output and, with an upstream gradient, gradients of the inputs; least: see `worst_row_error`."""
    error = partial(worst_row_error, least=least)
    exact, eager = (
        answer(reference, inputs, scale=scale, grad_out=grad_out, exact=precise) for precise in (True, False)
    )
    pairs = zip((exact.out, *exact.grads), (eager.out, *eager.grads), strict=True)
    names = ["output", *(f"gradient {place}" for place in range(1, len(inputs) + 1))]
    return [
        Expected(name, precise, error(rounded, precise), error, dtype=inputs[0].dtype)
        for name, (precise, rounded) in zip(names, pairs, strict=False)
    ]


class LossTask(NamedTuple):
    """Inputs and options of one loss."""

    logits_BKhw: Tensor
    labels_BHW: Tensor
    class_weights_K: Tensor | None = None
    label_smoothing: float = 0.0
    average: Average = "valid"
    ignore_index: int = 255

    @property
    def upstream(self) -> float:
        """What the mean is multiplied by before its gradient is taken, so that this is no denormal number."""
        return float(self.labels_BHW.numel())


def loss_answer(task: LossTask, *, exact: bool) -> tuple[Tensor, Tensor]:
    """F.interpolate, then F.cross_entropy: the loss, and the gradient of `upstream` times the loss.

    exact: in float64. Otherwise in the logits' own dtype; only the pixels' losses are then added up in
    float32.
    """
    dtype = torch.float64 if exact else task.logits_BKhw.dtype
    labels_BHW, weights_K = task.labels_BHW, task.class_weights_K
    valid_BHW = labels_BHW != task.ignore_index
    divisor = float(labels_BHW.numel())
    if task.average == "valid":
        each = valid_BHW.double()
        if weights_K is not None:
            each = weights_K.double()[labels_BHW.long().where(valid_BHW, 0)] * valid_BHW
        divisor = each.sum().item()
    total, gradients = 0.0, []
    for logits_Khw, labels_HW in zip(task.logits_BKhw.detach(), labels_BHW, strict=True):
        leaf = logits_Khw[None].to(dtype).requires_grad_()
        full_1KHW = F.interpolate(leaf, labels_HW.shape, mode="bilinear", align_corners=False)
        losses_1HW = F.cross_entropy(
            full_1KHW,
            labels_HW[None].long(),
            weight=None if weights_K is None else weights_K.to(dtype),
            ignore_index=task.ignore_index,
            label_smoothing=task.label_smoothing,
            reduction="none",
        )
        mean = losses_1HW.to(torch.promote_types(dtype, torch.float32)).sum() / divisor
        gradients += torch.autograd.grad(task.upstream * mean, leaf)
        total += mean.item()
    return torch.tensor(total, dtype=torch.float64), torch.cat(gradients)


def loss_error(loss: Tensor, exact: Tensor) -> float:
    """Relative to the loss, or to 1 if that is more; NaN for NaN."""
    return abs(loss.item() - exact.item()) / max(1.0, abs(exact.item()))


def place_error(gradient_BKhw: Tensor, exact_BKhw: Tensor) -> float:
    """The largest error of a place's K slopes, as `worst_row_error` has it."""
    return worst_row_error(gradient_BKhw.permute(0, 2, 3, 1), exact_BKhw.permute(0, 2, 3, 1))


def expected_loss(task: LossTask) -> list[Expected]:
    """The loss and the gradient of the logits."""
    exact, eager = (loss_answer(task, exact=precise) for precise in (True, False))
    of = (("loss", loss_error), ("gradient", place_error))
    return [
        Expected(name, precise, error(rounded, precise), error, "off by")
        for (name, error), precise, rounded in zip(of, exact, eager, strict=True)
    ]


def argmax_error(ids_BHW: Tensor, logits_BKhw: Tensor) -> float:
    """How far a chosen class is below the true one by float64, as a share of the largest logit.

    Infinite for no class. Where two classes tie but for rounding either may be chosen.
    """
    if ((ids_BHW < 0) | (ids_BHW >= logits_BKhw.shape[1])).any():
        return math.inf
    shortfalls = []
    for logits_Khw, ids_HW in zip(logits_BKhw.detach(), ids_BHW, strict=True):
        full_KHW = upsampled(logits_Khw, ids_HW.shape)
        shortfalls.append((full_KHW.amax(dim=0) - full_KHW.gather(0, ids_HW.long()[None])[0]).amax())
    return torch.stack(shortfalls).amax().item() / (logits_BKhw.abs().amax().item() or 1.0)


def confidence_error(confidence_BHW: Tensor, logits_BKhw: Tensor) -> float:
    """The largest relative error of the chosen class's probability; NaN for NaN."""
    errors = [
        (mine_HW.double() / upsampled(logits_Khw, mine_HW.shape).softmax(dim=0).amax(dim=0) - 1).abs().amax()
        for logits_Khw, mine_HW in zip(logits_BKhw.detach(), confidence_BHW, strict=True)
    ]
    return torch.stack(errors).amax().item()


def upsampled(logits_Khw: Tensor, size: Sequence[int]) -> Tensor:
    """One image's logits in float64."""
    full = F.interpolate(logits_Khw[None].double(), tuple(size), mode="bilinear", align_corners=False)
    return full[0]


def expected_argmax(logits_BKhw: Tensor, *, eager_ids: Tensor | None = None) -> list[Expected]:
    """The ids and, if there is one, their confidence. eager_ids: the textbook's, where its budget counts."""
    eager_error = 0.0 if eager_ids is None else argmax_error(eager_ids, logits_BKhw)
    return [
        Expected("argmax", logits_BKhw, eager_error, argmax_error, "off by", rounding=TIE),
        Expected("confidence", logits_BKhw, 0.0, confidence_error, "off by", rounding=CONFIDENCE_ERROR),
    ]

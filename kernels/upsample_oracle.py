"""What the operations on upsampled logits should give: the two textbook lines, image by image.

B batch, K classes, hw map, HW output.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from segdeformer.kernels.oracle import worst_row_error
from segdeformer.kernels.upsample_cross_entropy import Average

# How far apart two upsampled float32 logits may be and still tie, in epsilons of the largest logit: position,
# weight, products and sums, on each side.
TIE_ROUNDINGS = 12


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


class LossAnswer(NamedTuple):
    loss: Tensor  # a scalar
    gradient_BKhw: Tensor  # of `upstream` times the loss


def loss_answer(task: LossTask, *, exact: bool) -> LossAnswer:
    """F.interpolate, then F.cross_entropy.

    exact: in float64. Otherwise in the logits' own dtype, the yardstick of `largest_allowed`; only the
    pixels' losses are then added up in float32.
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
    return LossAnswer(torch.tensor(total, dtype=torch.float64), torch.cat(gradients))


def loss_error(loss: Tensor, exact: LossAnswer) -> float:
    """Relative to the loss, or to 1 if that is more; NaN for NaN."""
    right = exact.loss.item()
    return abs(loss.item() - right) / max(1.0, abs(right))


def place_error(gradient_BKhw: Tensor, exact: LossAnswer) -> float:
    """The largest error of a place's K slopes, as `worst_row_error` has it."""
    return worst_row_error(gradient_BKhw.permute(0, 2, 3, 1), exact.gradient_BKhw.permute(0, 2, 3, 1))


class WinnersError(NamedTuple):
    shortfall: float  # how far a winner is below the true one, in shares of the largest logit; inf: no class
    confidence: float  # relative; 0 without confidence, NaN for NaN


def winners_error(logits_BKhw: Tensor, ids_BHW: Tensor, confidence_BHW: Tensor | None = None) -> WinnersError:
    """How wrong winners are by float64. Where two classes tie but for rounding either may win."""
    num_classes = logits_BKhw.shape[1]
    if ((ids_BHW < 0) | (ids_BHW >= num_classes)).any():
        return WinnersError(float("inf"), float("inf"))
    shortfalls, confidences = [], [ids_BHW.new_zeros((), dtype=torch.float64)]
    for b, logits_Khw in enumerate(logits_BKhw.detach()):
        full_1KHW = F.interpolate(
            logits_Khw[None].double(), ids_BHW.shape[1:], mode="bilinear", align_corners=False
        )
        chosen_HW = full_1KHW.gather(1, ids_BHW[b].long()[None, None])[0, 0]
        shortfalls.append((full_1KHW.amax(dim=1) - chosen_HW).amax())
        if confidence_BHW is not None:
            exact_1HW = full_1KHW.softmax(dim=1).amax(dim=1)
            confidences.append((confidence_BHW[b].double() / exact_1HW - 1).abs().amax())
    largest = logits_BKhw.abs().amax().item() or 1.0
    return WinnersError(
        torch.stack(shortfalls).amax().item() / largest, torch.stack(confidences).amax().item()
    )

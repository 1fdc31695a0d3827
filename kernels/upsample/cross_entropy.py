"""Cross-entropy of bilinearly upsampled logits. B batch, K classes, hw map, HW image."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from segdeformer.kernels.impl import ChosenUpsampling, Impl, choose_upsampling
from segdeformer.kernels.upsample.strips import upsample_loss_strips

Average = Literal["valid", "all"]


class HardPixels(NamedTuple):
    """Online hard example mining: the loss of confident pixels is left out.

    A pixel counts if the softmax of its true class is below `threshold`, or below that of the
    `kept`-th hardest valid pixel of the batch, whichever is higher.
    """

    threshold: float = 0.7
    kept: int = 100_000


def upsample_cross_entropy(
    logits_BKhw: Tensor,
    labels_BHW: Tensor,
    *,
    ignore_index: int = 255,
    class_weights: Tensor | None = None,
    label_smoothing: float = 0.0,
    average: Average = "valid",
    hard_pixels: HardPixels | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """Mean cross-entropy of the logits resized to the labels' size (Eqs. 8-9), a float32 scalar.

    Bilinear, align_corners=False, any two sizes; logits of any floating dtype, sums in float32
    (float64 for float64 logits); integer labels. The full-resolution logits are never held, but
    by impl `reference`.
    `valid` divides by the pixels that are not ignored (with class weights: by the sum of their
    weights, PyTorch's rule), `all` by every pixel (mmsegmentation's). Easy pixels that `hard_pixels`
    leaves out count as ignored. If all pixels are ignored the loss is 0 with zero gradients.
    Raises `ValueError` when shapes do not belong together or an option is out of range. A label that is
    neither a class nor ignored raises too, but on a GPU and with impl `triton` it gives NaN.
    First derivatives only, and none by torch.func; impl `reference` has them all.
    """
    if logits_BKhw.ndim != 4 or labels_BHW.ndim != 3 or logits_BKhw.shape[0] != labels_BHW.shape[0]:
        raise ValueError(
            f"logits {tuple(logits_BKhw.shape)} and labels {tuple(labels_BHW.shape)} do not belong together; "
            "expected (B,K,h,w) and (B,H,W)"
        )
    if average not in ("valid", "all"):
        raise ValueError(f"average is `{average}`; expected `valid` or `all`")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing is {label_smoothing}; expected 0 to 1")
    num_classes = logits_BKhw.shape[1]
    if class_weights is not None:
        if class_weights.shape != (num_classes,):
            raise ValueError(f"class weights are {tuple(class_weights.shape)}; expected ({num_classes},)")
        dtype = torch.promote_types(logits_BKhw.dtype, torch.float32)
        class_weights = class_weights.to(logits_BKhw.device, dtype)
    labels_BHW = labels_BHW.to(logits_BKhw.device)
    ids = torch.iinfo(labels_BHW.dtype)
    if not ids.min <= ignore_index <= ids.max:  # in its own type, 255 would be a match for -1
        labels_BHW = labels_BHW.long()
    chosen = choose_upsampling(impl, "upsample_cross_entropy", logits_BKhw, labels_BHW.shape[1:])
    # On a GPU nobody waits for a look at the labels: a stray one makes the loss NaN.
    if chosen == "reference" or (logits_BKhw.device.type == "cpu" and chosen != "triton"):
        check_labels(labels_BHW, num_classes, ignore_index)
    if hard_pixels is not None:
        _, losses_BHW = _summed(logits_BKhw.detach(), labels_BHW, None, ignore_index, 0.0, chosen)
        labels_BHW = _without_easy(labels_BHW, losses_BHW, ignore_index, hard_pixels)
    if chosen == "reference":
        return upsample_cross_entropy_reference(
            logits_BKhw,
            labels_BHW,
            ignore_index=ignore_index,
            class_weights=class_weights,
            label_smoothing=label_smoothing,
            average=average,
        )
    total, _ = _summed(logits_BKhw, labels_BHW, class_weights, ignore_index, label_smoothing, chosen)
    return total / _divisor(labels_BHW, class_weights, ignore_index, average)


def upsample_cross_entropy_reference(
    logits_BKhw: Tensor,
    labels_BHW: Tensor,
    *,
    ignore_index: int,
    class_weights: Tensor | None,
    label_smoothing: float,
    average: Average,
) -> Tensor:
    """The definition: resize, then cross-entropy; holds the full-resolution logits."""
    dtype = torch.promote_types(logits_BKhw.dtype, torch.float32)
    full_BKHW = F.interpolate(
        logits_BKhw.to(dtype), labels_BHW.shape[-2:], mode="bilinear", align_corners=False
    )
    total = F.cross_entropy(
        full_BKHW,
        labels_BHW.long(),
        weight=class_weights,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        reduction="sum",
    )
    return total / _divisor(labels_BHW, class_weights, ignore_index, average)


def loss_weight(
    labels_BHW: Tensor, class_weights: Tensor | None, ignore_index: int, average: Average
) -> Tensor:
    """What the summed loss of these labels is divided by: a scalar, 0 if nothing counts.

    The loss of several batches as one is the mean of theirs, weighted by this.
    """
    if average == "all":
        return torch.full((), labels_BHW.numel(), device=labels_BHW.device)
    valid_BHW = labels_BHW != ignore_index
    if class_weights is None:
        return valid_BHW.sum()
    last = class_weights.shape[0] - 1
    return (class_weights[labels_BHW.where(valid_BHW, 0).long().clamp(0, last)] * valid_BHW).sum()


def _divisor(
    labels_BHW: Tensor, class_weights: Tensor | None, ignore_index: int, average: Average
) -> Tensor | int:
    if average == "all":
        return max(1, labels_BHW.numel())
    divisor = loss_weight(labels_BHW, class_weights, ignore_index, average)
    return divisor.where(divisor > 0, 1)


def check_labels(labels_BHW: Tensor, num_classes: int, ignore_index: int) -> None:
    """Raise `ValueError` for a label that is neither a class nor ignored."""
    if torch.compiler.is_compiling():
        return  # a value cannot stop a graph
    stray_BHW = (labels_BHW != ignore_index) & ((labels_BHW < 0) | (labels_BHW >= num_classes))
    if stray_BHW.any():
        first = int(labels_BHW[stray_BHW][0])
        raise ValueError(
            f"label {first} is none of the {num_classes} classes and not {ignore_index}, the ignored id "
            f"({int(stray_BHW.sum()):,} such pixels); the labels need another mapping"
        )


def _summed(
    logits_BKhw: Tensor,
    labels_BHW: Tensor,
    class_weights: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    chosen: ChosenUpsampling,
) -> tuple[Tensor, Tensor]:
    """The losses' sum, with gradients, and each pixel's, (B, H, W), 0 where ignored."""
    options = class_weights, ignore_index, label_smoothing
    if chosen == "triton":
        from segdeformer.kernels.upsample.operator import upsample_loss_triton

        return upsample_loss_triton(logits_BKhw, labels_BHW, *options)[:2]
    wanted = torch.is_grad_enabled() and logits_BKhw.requires_grad
    return upsample_loss_strips(logits_BKhw, labels_BHW, *options, wanted)[:2]


def _without_easy(
    labels_BHW: Tensor, losses_BHW: Tensor, ignore_index: int, hard_pixels: HardPixels
) -> Tensor:
    softmax_BHW = (-losses_BHW).exp().nan_to_num(nan=0.0)  # stray labels stay, to make the loss NaN
    valid_BHW = labels_BHW != ignore_index
    # Ignored pixels as the easiest of all, so that the kept-th hardest is a valid one if there are as many.
    ranked = softmax_BHW.where(valid_BHW, torch.inf).flatten()
    kept = min(max(hard_pixels.kept, 1), ranked.numel())
    limit = ranked.kthvalue(kept).values.clamp(min=hard_pixels.threshold)
    return labels_BHW.where(softmax_BHW <= limit, ignore_index)

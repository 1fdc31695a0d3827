"""Cross-entropy of bilinearly upsampled logits. B batch, K classes, hw map, HW image."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from segdeformer.kernels.impl import Impl, check_impl

Average = Literal["valid", "all"]


def upsample_cross_entropy(
    logits_BKhw: Tensor,
    labels_BHW: Tensor,
    *,
    ignore_index: int = 255,
    class_weights_K: Tensor | None = None,
    label_smoothing: float = 0.0,
    average: Average = "valid",
    impl: Impl = "auto",
) -> Tensor:
    """Mean cross-entropy of the logits resized to the labels' size (Eqs. 8-9), a float32 scalar.

    Bilinear, align_corners=False. `valid` divides by the pixels that are not ignored (with class
    weights: by the sum of their weights, PyTorch's rule), `all` by every pixel (mmsegmentation's).
    If all pixels are ignored the loss is 0 with zero gradients.
    Raises `ValueError` when batch sizes differ or `average` is unknown.
    """
    if logits_BKhw.ndim != 4 or labels_BHW.ndim != 3 or logits_BKhw.shape[0] != labels_BHW.shape[0]:
        raise ValueError(
            f"logits {tuple(logits_BKhw.shape)} and labels {tuple(labels_BHW.shape)} do not belong together; "
            "expected (B,K,h,w) and (B,H,W)"
        )
    if average not in ("valid", "all"):
        raise ValueError(f"average is `{average}`; expected `valid` or `all`")
    check_impl(impl)  # the reference is all there is yet, and it is right for every choice that resolves
    return upsample_cross_entropy_reference(
        logits_BKhw,
        labels_BHW,
        ignore_index=ignore_index,
        class_weights_K=class_weights_K,
        label_smoothing=label_smoothing,
        average=average,
    )


def upsample_cross_entropy_reference(
    logits_BKhw: Tensor,
    labels_BHW: Tensor,
    *,
    ignore_index: int,
    class_weights_K: Tensor | None,
    label_smoothing: float,
    average: Average,
) -> Tensor:
    """The definition: resize, then cross-entropy; holds the full-resolution logits."""
    full_BKHW = F.interpolate(
        logits_BKhw.float(), labels_BHW.shape[-2:], mode="bilinear", align_corners=False
    )
    total = F.cross_entropy(
        full_BKHW,
        labels_BHW,
        weight=class_weights_K,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        reduction="sum",
    )
    if average == "all":
        return total / labels_BHW.numel()
    valid_BHW = labels_BHW != ignore_index
    if class_weights_K is None:
        return total / valid_BHW.sum().clamp(min=1)
    divisor = (class_weights_K[labels_BHW.where(valid_BHW, 0)] * valid_BHW).sum()
    return total / divisor.where(divisor > 0, 1.0)

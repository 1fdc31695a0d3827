"""Cross-entropy of bilinearly upsampled logits. B batch, K classes, hw map, HW image."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor


def upsample_cross_entropy(
    logits_BKhw: Tensor,
    labels_BHW: Tensor,
    *,
    ignore_index: int = 255,
    class_weights_K: Tensor | None = None,
    label_smoothing: float = 0.0,
    average: Literal["valid", "all"] = "valid",
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
    match average:
        case "all":
            return total / labels_BHW.numel()
        case "valid":
            valid_BHW = labels_BHW != ignore_index
            if class_weights_K is None:
                return total / valid_BHW.sum().clamp(min=1)
            divisor = class_weights_K[labels_BHW[valid_BHW]].sum()
            return total / divisor.where(divisor > 0, 1.0)
        case _:
            raise ValueError(f"average is `{average}`; expected `valid` or `all`")

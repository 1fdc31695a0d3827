"""Classes of bilinearly upsampled logits. B batch, K classes, hw map, HW image."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from segdeformer.kernels.rows import strip_rows, upsample_rows


class ClassMap(NamedTuple):
    ids_BHW: Tensor  # uint8
    confidence_BHW: Tensor | None  # float32, softmax of the winner


def upsample_argmax(logits_BKhw: Tensor, size: tuple[int, int], *, with_confidence: bool = False) -> ClassMap:
    """argmax over the classes of the logits resized to `size` = (H, W), ids as uint8.

    Bilinear, align_corners=False. Works in strips of output rows, so that the full-resolution
    logits never exist: at most about 32 MiB of them at a time.
    Raises `ValueError` for more than 255 classes (255 means ignore).
    """
    batch, num_classes, _, _ = logits_BKhw.shape
    if num_classes > 255:
        raise ValueError(f"logits have {num_classes} classes; uint8 ids hold at most 255")
    height, width = size
    ids = torch.empty(batch, height, width, dtype=torch.uint8, device=logits_BKhw.device)
    confidence = torch.empty(batch, height, width, device=logits_BKhw.device) if with_confidence else None
    rows = strip_rows(batch * num_classes * width)
    for top in range(0, height, rows):
        bottom = min(top + rows, height)
        strip_BKrW = upsample_rows(logits_BKhw.float(), size, top, bottom)
        best, winner = strip_BKrW.max(dim=1)
        ids[:, top:bottom] = winner.to(torch.uint8)
        if confidence is not None:
            confidence[:, top:bottom] = (best - strip_BKrW.logsumexp(dim=1)).exp()
    return ClassMap(ids, confidence)


def upsample_argmax_reference(logits_BKhw: Tensor, size: tuple[int, int]) -> Tensor:
    """The definition: resize everything, then argmax; (B, H, W) int64."""
    return F.interpolate(logits_BKhw.float(), size, mode="bilinear", align_corners=False).argmax(dim=1)

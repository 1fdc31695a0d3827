"""The argmax class of bilinearly upsampled logits. B batch, K classes, hw map, HW output."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from segdeformer.kernels.impl import Impl, choose_upsampling
from segdeformer.kernels.upsample.strips import id_dtype, upsample_argmax_strips

CHUNK_PIXELS = 2**18, 2**24  # counted at once on a CPU, whose cache holds them, and on a GPU


class ArgmaxResult(NamedTuple):
    ids_BHW: Tensor  # uint8, int16 for more than 256 classes
    confidence_BHW: Tensor | None  # float32 in (0, 1], softmax of that class


def upsample_argmax(
    logits_BKhw: Tensor, size: tuple[int, int], *, confidence: bool = False, impl: Impl = "auto"
) -> ArgmaxResult:
    """argmax over K of the logits resized to `size` = (H, W), without holding the resized logits.

    Bilinear, align_corners=False. Of equal logits the lowest id is taken. No gradients.
    Raises `ValueError` for logits that are not (B, K, h, w).
    """
    if logits_BKhw.ndim != 4:
        raise ValueError(f"logits have shape {tuple(logits_BKhw.shape)}; expected (B,K,h,w)")
    match choose_upsampling(impl, "upsample_argmax", logits_BKhw, size):
        case "reference":
            return upsample_argmax_reference(logits_BKhw, size, confidence=confidence)
        case "triton":
            from segdeformer.kernels.upsample.operator import upsample_argmax_triton

            ids_BHW, confidence_BHW = upsample_argmax_triton(logits_BKhw.detach(), *size, confidence)
        case _:
            ids_BHW, confidence_BHW = upsample_argmax_strips(logits_BKhw.detach(), *size, confidence)
    return ArgmaxResult(ids_BHW, confidence_BHW if confidence else None)


def upsample_argmax_reference(
    logits_BKhw: Tensor, size: tuple[int, int], *, confidence: bool = False
) -> ArgmaxResult:
    """The definition; holds the full-resolution logits."""
    dtype = torch.promote_types(logits_BKhw.dtype, torch.float32)
    full_BKHW = F.interpolate(logits_BKhw.to(dtype), size, mode="bilinear", align_corners=False)
    ids_BHW = full_BKHW.argmax(dim=1).to(id_dtype(logits_BKhw.shape[1]))
    return ArgmaxResult(ids_BHW, full_BKHW.softmax(dim=1).amax(dim=1).float() if confidence else None)


def upsample_confusion(
    logits_BKhw: Tensor,
    labels_BHW: Tensor,
    matrix_KK: Tensor,
    *,
    ignore_index: int = 255,
    impl: Impl = "auto",
) -> ArgmaxResult:
    """Add to `matrix_KK` (int64, rows: labels, columns: argmax) how often each pair occurs.

    Counted on the logits' device: no map leaves it, and nobody waits for it. Pixels with ignored or other
    labels do not count. Returns the argmax. Raises `ValueError` when shapes do not belong together.
    """
    num_classes = logits_BKhw.shape[1]
    if labels_BHW.ndim != 3 or labels_BHW.shape[0] != logits_BKhw.shape[0]:
        raise ValueError(
            f"logits {tuple(logits_BKhw.shape)} and labels {tuple(labels_BHW.shape)} do not belong together; "
            "expected (B,K,h,w) and (B,H,W)"
        )
    if matrix_KK.shape != (num_classes, num_classes) or matrix_KK.dtype != torch.int64:
        raise ValueError(
            f"the matrix is {tuple(matrix_KK.shape)} {matrix_KK.dtype}; "
            f"expected int64 ({num_classes}, {num_classes})"
        )
    height, width = labels_BHW.shape[1:]
    result = upsample_argmax(logits_BKhw, (height, width), impl=impl)
    add_confusion(matrix_KK, labels_BHW, result.ids_BHW, ignore_index=ignore_index)
    return result


def add_confusion(matrix_KK: Tensor, labels: Tensor, ids: Tensor, *, ignore_index: int = 255) -> None:
    """Count the pairs of two maps of one shape, on their device."""
    num_classes = matrix_KK.shape[0]
    on_cpu = labels.device.type == "cpu"
    chunk = CHUNK_PIXELS[not on_cpu]
    for labels_n, ids_n in zip(labels.flatten().split(chunk), ids.flatten().split(chunk), strict=True):
        labels_n = labels_n.long()
        known_n = (labels_n != ignore_index) & (labels_n >= 0) & (labels_n < num_classes)
        pairs_n = (labels_n * num_classes + ids_n).where(known_n, num_classes**2)
        counts = count_on_cpu(pairs_n, num_classes**2) if on_cpu else count_on_gpu(pairs_n, num_classes**2)
        matrix_KK += counts.view(num_classes, num_classes)


def count_on_cpu(values_n: Tensor, end: int) -> Tensor:
    """How often each of the integers [0, end) occurs; `end` itself is dropped."""
    return torch.bincount(values_n, minlength=end + 1)[:-1]


def count_on_gpu(values_n: Tensor, end: int) -> Tensor:
    """The same without a look at the values, for which `bincount` waits twice.

    By sorting: sums by index into a few busy places take their turns, and where PyTorch is asked to be
    deterministic they are made in one warp per place.
    """
    sorted_n = values_n.int().sort().values
    edges = torch.arange(end + 1, dtype=torch.int32, device=values_n.device)
    return torch.searchsorted(sorted_n, edges).diff()

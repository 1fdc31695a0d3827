"""Loss and argmax of upsampled logits on any device, in strips of output rows: no full-resolution logits.

The loss's gradient is made in the same pass, since its only factor is a scalar.
B batch, K classes, hw map, HW output, r rows of a strip.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from segdeformer.kernels.upsample.rows import (
    SourceRows,
    mix_rows,
    mix_source_rows,
    source_range,
    source_rows,
    strip_rows,
)

# What stays in a processor's cache between the passes over a strip; elsewhere enough to fill a GPU.
CPU_STRIP_BYTES, STRIP_BYTES = 4 * 2**20, 256 * 2**20


@torch.library.custom_op("segdeformer::upsample_loss_strips", mutates_args=())
def upsample_loss_strips(
    logits: Tensor,
    labels: Tensor,
    class_weights: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    with_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Sum of the losses, each pixel's loss (B, H, W), and the sum's gradient (B, K, h, w) or an empty tensor.

    Float32, or float64 for float64 logits. Ignored pixels lose 0. Only the sum carries gradients.
    """
    dtype = torch.promote_types(logits.dtype, torch.float32)
    losses_BHW = torch.zeros(labels.shape, dtype=dtype, device=logits.device)
    shape = logits.shape if with_gradient else (0,)
    gradient_BKhw = torch.zeros(shape, dtype=dtype, device=logits.device)
    if not labels.numel():
        return losses_BHW.sum(), losses_BHW, gradient_BKhw
    strip_bytes = CPU_STRIP_BYTES if logits.device.type == "cpu" else STRIP_BYTES
    step = max(1, strip_bytes // (4 * logits.shape[1] * labels.shape[-1]))
    strips = _strips(logits.shape[2], labels.shape[1], step, dtype, logits.device)
    columns = _Columns(logits.shape[-1], labels.shape[-1], dtype, logits.device)
    with torch.autocast(logits.device.type, enabled=False):
        for b in range(logits.shape[0]):
            map_Khw = logits[b].to(dtype).contiguous()
            for rows, source, fed, matrix_sr in strips:
                full_KrW = columns.upsample(mix_source_rows(map_Khw, source))
                labels_rW = labels[b, rows].long()
                slopes_KrW = _strip_loss(
                    full_KrW, labels_rW, losses_BHW[b, rows], class_weights, ignore_index, label_smoothing
                )
                if with_gradient:
                    gradient_BKhw[b, :, fed] += matrix_sr @ columns.gather(slopes_KrW)
    return losses_BHW.sum(dtype=torch.float64).to(dtype), losses_BHW, gradient_BKhw


@upsample_loss_strips.register_fake
def _(logits: Tensor, labels: Tensor, *options: Any) -> tuple[Tensor, Tensor, Tensor]:
    with_gradient = options[-1]
    dtype = torch.promote_types(logits.dtype, torch.float32)
    return (
        logits.new_empty((), dtype=dtype),
        logits.new_empty(labels.shape, dtype=dtype),
        logits.new_empty(logits.shape if with_gradient else (0,), dtype=dtype),
    )


def _strips(
    source_height: int, height: int, step: int, dtype: torch.dtype, device: torch.device
) -> list[tuple[slice, SourceRows, slice, Tensor]]:
    """What the strips of all images have in common.

    The output rows, what they are mixed of, the source rows that feed them, and the resize transposed (source
    by output rows): adding by index would not be deterministic on a GPU.
    """
    table = source_rows(source_height, height, device=device, dtype=dtype)
    strips = []
    for top in range(0, height, step):
        bottom = min(top + step, height)
        source, fed = table.between(top, bottom), source_range(source_height, height, top, bottom)
        matrix_rs = _resize_matrix(source.shifted(fed.start), len(fed))
        strips.append((slice(top, bottom), source, slice(fed.start, fed.stop), matrix_rs.T))
    return strips


def _strip_loss(
    full_KrW: Tensor,
    labels_rW: Tensor,
    losses_rW: Tensor,
    weights_K: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
) -> Tensor:
    """Write the strip's losses and return its slopes, the gradient at full resolution."""
    num_classes = full_KrW.shape[0]
    log_softmax_KrW = full_KrW.log_softmax(dim=0)
    valid_rW = labels_rW != ignore_index
    target_rW = labels_rW.where(valid_rW, 0)
    target_1rW = target_rW.clamp(0, num_classes - 1).unsqueeze(0)
    hit_rW = valid_rW.to(full_KrW.dtype)
    if weights_K is not None:
        hit_rW = hit_rW * weights_K[target_1rW[0]]
    hit_rW = hit_rW * (1 - label_smoothing)
    torch.mul(log_softmax_KrW.gather(0, target_1rW)[0], -hit_rW, out=losses_rW)
    even_K11 = None
    total_rW = hit_rW
    if label_smoothing:
        even_K11 = torch.full_like(log_softmax_KrW[:, :1, :1], label_smoothing / num_classes)
        if weights_K is not None:
            even_K11 = even_K11 * weights_K[:, None, None]
        losses_rW -= (log_softmax_KrW * even_K11).sum(dim=0) * valid_rW
        total_rW = hit_rW + even_K11.sum() * valid_rW
    losses_rW.masked_fill_(target_rW != target_1rW[0], torch.nan)  # a label that is no class
    slopes_KrW = log_softmax_KrW.exp_().mul_(total_rW)
    if even_K11 is not None:
        slopes_KrW -= even_K11 * valid_rW
    return slopes_KrW.scatter_add_(0, target_1rW, -hit_rW.unsqueeze(0))


def _resize_matrix(source: SourceRows, num_sources: int) -> Tensor:
    """The resize as a matrix, (outputs, source positions)."""
    matrix = source.far_weight_r.new_zeros(source.near_r.shape[0], num_sources)
    matrix.scatter_add_(1, source.near_r[:, None], 1 - source.far_weight_r[:, None])
    return matrix.scatter_add_(1, source.far_r[:, None], source.far_weight_r[:, None])


class _Columns:
    """Bilinear resizing of rows, and its transpose."""

    def __init__(self, source: int, target: int, dtype: torch.dtype, device: torch.device) -> None:
        self.source, self.target = source, target
        # PyTorch finds positions in the data's own precision: exact only if the ratio is a power of two.
        ratio = target / source
        # Its backward on a GPU is not deterministic.
        self.exact = ratio.is_integer() and int(ratio).bit_count() == 1 and device.type == "cpu"
        if not self.exact:
            self.matrix_Ww = _resize_matrix(source_rows(source, target, device=device, dtype=dtype), source)

    def upsample(self, rows_Krw: Tensor) -> Tensor:
        if not self.exact:
            return rows_Krw @ self.matrix_Ww.T
        size = (rows_Krw.shape[1], self.target)
        return F.interpolate(rows_Krw[None], size, mode="bilinear", align_corners=False)[0]

    def gather(self, slopes_KrW: Tensor) -> Tensor:
        if not self.exact:
            return slopes_KrW @ self.matrix_Ww
        num_classes, rows, _ = slopes_KrW.shape
        return torch.ops.aten.upsample_bilinear2d_backward(
            slopes_KrW[None], [rows, self.target], [1, num_classes, rows, self.source], False, None, None
        )[0]


def _keep(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(output[2])
    ctx.dtype = inputs[0].dtype


def _backward(ctx, grad_sum, grad_losses, grad_gradient):  # type: ignore[no-untyped-def]
    if torch.is_grad_enabled():
        raise RuntimeError("the upsampled loss has no second derivatives; use impl `reference`")
    (gradient,) = ctx.saved_tensors
    return (gradient * grad_sum).to(ctx.dtype), None, None, None, None, None


upsample_loss_strips.register_autograd(_backward, setup_context=_keep)


def id_dtype(num_classes: int) -> torch.dtype:
    """The least integer type that holds every class id."""
    return torch.uint8 if num_classes <= 256 else torch.int16


def empty_argmax(logits: Tensor, height: int, width: int, with_confidence: bool) -> tuple[Tensor, Tensor]:
    """What the argmax operators return; an empty confidence if none is wanted."""
    size = (logits.shape[0], height, width)
    return (
        logits.new_empty(size, dtype=id_dtype(logits.shape[1])),
        logits.new_empty(size if with_confidence else (0,), dtype=torch.float32),
    )


@torch.library.custom_op("segdeformer::upsample_argmax_strips", mutates_args=())
def upsample_argmax_strips(
    logits: Tensor, height: int, width: int, with_confidence: bool
) -> tuple[Tensor, Tensor]:
    """Class ids (B, H, W) and their softmax, empty if not wanted."""
    ids_BHW, confidence_BHW = empty_argmax(logits, height, width, with_confidence)
    rows = strip_rows(logits.shape[1] * width)
    source = source_rows(logits.shape[2], height, device=logits.device)
    for b in range(logits.shape[0]):
        map_1Khw = logits[b : b + 1].to(torch.promote_types(logits.dtype, torch.float32))
        for top in range(0, height, rows):
            strip = slice(top, min(top + rows, height))
            full_KrW = mix_rows(map_1Khw, source.between(strip.start, strip.stop), width)[0]
            ids_BHW[b, strip] = full_KrW.argmax(dim=0)
            if with_confidence:
                confidence_BHW[b, strip] = (full_KrW.amax(dim=0) - full_KrW.logsumexp(dim=0)).exp()
    return ids_BHW, confidence_BHW


upsample_argmax_strips.register_fake(empty_argmax)

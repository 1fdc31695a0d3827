"""Bilinear resizing (align_corners=False) of some output rows. B batch, K channels, hw map, HW output.

Output row i of H lies at ((2 i + 1) h - H) / (2 H) of the source's h rows, at least 0. The quotient of these
integers is the row before it, the remainder the weight of the one behind: exact, and the same on the host, in
tensors here and in triton_kernels.py.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

STRIP_BYTES = 32 * 2**20


class SourceRows(NamedTuple):
    """The two source rows that mix into each output row."""

    near_r: Tensor  # int64, the upper one
    far_r: Tensor  # int64, the lower one
    far_weight_r: Tensor  # in [0, 1)

    def between(self, top: int, bottom: int) -> SourceRows:
        """Those of output rows [top, bottom), views."""
        return SourceRows(*(table_r[top:bottom] for table_r in self))

    def shifted(self, first: int) -> SourceRows:
        """The same rows counted from `first`."""
        return self._replace(near_r=self.near_r - first, far_r=self.far_r - first)


def source_rows(
    source_height: int, height: int, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> SourceRows:
    """Source rows of all output rows when `source_height` rows become `height`.

    Made where they are used: a copy to a GPU would wait for it, and could not be part of a CUDA graph.
    """
    first = source_height - height
    end = first + 2 * source_height * height
    numerator_r = torch.arange(first, end, 2 * source_height, device=device).clamp_(min=0)
    near_r = numerator_r // (2 * height)
    far_r = (near_r + 1).clamp_(max=source_height - 1)
    far_weight_r = (numerator_r % (2 * height)).double() / (2 * height)
    return SourceRows(near_r, far_r, far_weight_r.to(dtype))


def source_range(source_height: int, height: int, top: int, bottom: int) -> range:
    """The source rows that output rows [top, bottom) are mixed of, known without a look at the device."""
    first, last = (max(0, (2 * i + 1) * source_height - height) // (2 * height) for i in (top, bottom - 1))
    return range(first, min(last + 2, source_height))


def mix_rows(values_BKhw: Tensor, source: SourceRows, width: int) -> Tensor:
    """(B, K, rows, width): the source rows mixed, then resized horizontally."""
    mixed_BKrw = mix_source_rows(values_BKhw, source)
    if mixed_BKrw.shape[-1] == width:
        return mixed_BKrw
    return F.interpolate(mixed_BKrw, (mixed_BKrw.shape[-2], width), mode="bilinear", align_corners=False)


def mix_source_rows(values_hw: Tensor, source: SourceRows) -> Tensor:
    """The rows of the last two dimensions mixed, their width as it is."""
    return torch.lerp(
        values_hw.index_select(-2, source.near_r),
        values_hw.index_select(-2, source.far_r),
        source.far_weight_r[:, None].to(values_hw.dtype),
    )


def strip_rows(values_per_row: int) -> int:
    """How many output rows of float32 values make a strip of at most 32 MiB; at least one."""
    return max(1, STRIP_BYTES // (4 * max(1, values_per_row)))

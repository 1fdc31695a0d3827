"""Bilinear resizing (align_corners=False) of some output rows. B batch, K channels, hw map, HW output."""

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

    def shifted(self, first: int) -> SourceRows:
        """The same rows counted from `first`."""
        return self._replace(near_r=self.near_r - first, far_r=self.far_r - first)


def source_rows(
    source_height: int,
    height: int,
    top: int,
    bottom: int,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> SourceRows:
    """Source rows for output rows [top, bottom) when `source_height` rows become `height`."""
    centre_r = torch.arange(top, bottom, device=device, dtype=torch.float64) + 0.5
    position_r = (centre_r * (source_height / height) - 0.5).clamp(min=0.0)
    near_r = position_r.floor().long().clamp(max=source_height - 1)
    far_r = (near_r + 1).clamp(max=source_height - 1)
    return SourceRows(near_r, far_r, (position_r - near_r).to(dtype))


def mix_rows(values_BKhw: Tensor, source: SourceRows, width: int) -> Tensor:
    """(B, K, rows, width): the source rows mixed, then resized horizontally."""
    mixed_BKrw = torch.lerp(
        values_BKhw.index_select(-2, source.near_r),
        values_BKhw.index_select(-2, source.far_r),
        source.far_weight_r[:, None].to(values_BKhw.dtype),
    )
    if mixed_BKrw.shape[-1] == width:
        return mixed_BKrw
    return F.interpolate(mixed_BKrw, (mixed_BKrw.shape[-2], width), mode="bilinear", align_corners=False)


def upsample_rows(values_BKhw: Tensor, size: tuple[int, int], top: int, bottom: int) -> Tensor:
    """Rows [top, bottom) of the values resized to `size` = (H, W); (B, K, bottom - top, W)."""
    source = source_rows(values_BKhw.shape[-2], size[0], top, bottom, device=values_BKhw.device)
    return mix_rows(values_BKhw, source, size[1])


def strip_rows(values_per_row: int) -> int:
    """How many output rows of float32 values make a strip of at most 32 MiB; at least one."""
    return max(1, STRIP_BYTES // (4 * max(1, values_per_row)))

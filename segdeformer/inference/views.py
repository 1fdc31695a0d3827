"""One image through the model under a protocol, in strips of output rows.

The full-resolution logits never exist: only the decoder's maps are kept, and each strip of the
output is made from them when it is asked for. Sliding windows sum logits, several scales or flips
average softmax, exactly as if everything had been made at once.

K classes, HW image, hw decoder map, r rows of a strip.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from segdeformer.config import DataConfig, EvalConfig
from segdeformer.data.transforms import normalise, resize_for_eval
from segdeformer.kernels.impl import Impl, choose_upsampling
from segdeformer.kernels.upsample.rows import mix_rows, source_range, source_rows, strip_rows
from segdeformer.models.few_keys import key_stride_set
from segdeformer.runtime.device import explained_shortage, moved


class Strip(NamedTuple):
    """Output rows [top, top + r). With several views the logits are the log of the mean softmax."""

    top: int
    logits_KrW: Tensor  # float32

    def ids(self) -> Tensor:
        """The argmax class, (r, W) int64."""
        return self.logits_KrW.argmax(dim=0)

    def confidence(self) -> Tensor:
        """Softmax of the argmax class, (r, W) float32."""
        return (self.logits_KrW.amax(dim=0) - self.logits_KrW.logsumexp(dim=0)).exp()


class View(Protocol):
    """One scale and orientation of the image, already through the model."""

    @property
    def num_classes(self) -> int: ...
    @property
    def map_sizes(self) -> list[tuple[int, int]]:
        """(height, width) of the decoder's map in each pass through the model."""
        ...

    def rows(self, top: int, bottom: int) -> Tensor:
        """Logits of output rows [top, bottom), (K, r, W) float32."""
        ...


class WholeView:
    """The decoder's map stretched over the output."""

    def __init__(self, logits_1Khw: Tensor, size: tuple[int, int]) -> None:
        self.logits_1Khw = logits_1Khw
        self.num_classes = logits_1Khw.shape[1]
        self.map_sizes = [_map_size(logits_1Khw)]
        self.source = source_rows(logits_1Khw.shape[2], size[0], device=logits_1Khw.device)
        self.size = size

    def rows(self, top: int, bottom: int) -> Tensor:
        return mix_rows(self.logits_1Khw, self.source.between(top, bottom), self.size[1])[0]


def _map_size(logits_1Khw: Tensor) -> tuple[int, int]:
    return logits_1Khw.shape[2], logits_1Khw.shape[3]


class Window(NamedTuple):
    top: int
    left: int
    height: int
    width: int


class SlidingView:
    """Overlapping windows on the resized image: logits summed, divided by their number, resized."""

    def __init__(
        self, windows: list[tuple[Window, Tensor]], resized: tuple[int, int], size: tuple[int, int]
    ) -> None:
        self.windows = windows
        self.resized = resized
        self.size = size
        window, logits_1Khw = windows[0]  # all windows are as large
        self.num_classes = logits_1Khw.shape[1]
        self.map_sizes = [_map_size(logits) for _, logits in windows]
        self.source_of_window = source_rows(logits_1Khw.shape[2], window.height, device=logits_1Khw.device)
        self.source = source_rows(resized[0], size[0], device=logits_1Khw.device)

    def rows(self, top: int, bottom: int) -> Tensor:
        if self.resized == self.size:
            return self._resized_rows(top, bottom)[0]
        needed = source_range(self.resized[0], self.size[0], top, bottom)
        source = self.source.between(top, bottom).shifted(needed.start)
        return mix_rows(self._resized_rows(needed.start, needed.stop), source, self.size[1])[0]

    def _resized_rows(self, first: int, last: int) -> Tensor:
        total = self.windows[0][1].new_zeros(1, self.num_classes, last - first, self.resized[1])
        count = total.new_zeros(last - first, self.resized[1])
        for window, logits_1Khw in self.windows:
            top, bottom = max(first, window.top), min(last, window.top + window.height)
            if top >= bottom:
                continue
            inside = np.s_[top - first : bottom - first, window.left : window.left + window.width]
            source = self.source_of_window.between(top - window.top, bottom - window.top)
            total[(..., *inside)] += mix_rows(logits_1Khw, source, window.width)
            count[inside] += 1
        return total / count


class MirroredView:
    """A view of the mirrored image, mirrored back."""

    def __init__(self, view: View) -> None:
        self.view = view
        self.num_classes = view.num_classes
        self.map_sizes = view.map_sizes

    def rows(self, top: int, bottom: int) -> Tensor:
        return self.view.rows(top, bottom).flip(-1)


def predict_strips(
    model: nn.Module,
    image_HW3: np.ndarray,
    protocol: EvalConfig,
    data: DataConfig,
    device: torch.device,
) -> Iterator[Strip]:
    """The image's logits at its own size, strip by strip from the top.

    image_HW3: uint8 RGB of any size. The model must be in eval mode.
    """
    return strips(make_views(model, image_HW3, protocol, data, device), image_HW3.shape[:2])


def make_views(
    model: nn.Module,
    image_HW3: np.ndarray,
    protocol: EvalConfig,
    data: DataConfig,
    device: torch.device,
) -> list[View]:
    """Every scale and orientation of a protocol through the model, which must be in eval mode.

    Raises `UsageError` for a key stride that the model cannot have.
    """
    height, width = image_HW3.shape[:2]
    views: list[View] = []
    with key_stride_set(model, protocol.key_stride):
        for scale in protocol.scales:
            scaled_HW3 = resize_for_eval(image_HW3, protocol, scale=scale)
            for mirrored in (False, True) if protocol.flip else (False,):
                oriented = scaled_HW3[:, ::-1] if mirrored else scaled_HW3
                view = _view(model, oriented, (height, width), protocol, data, device)
                views.append(MirroredView(view) if mirrored else view)
    return views


def fused_map(views: list[View], impl: Impl) -> Tensor | None:
    """The one map, (1, K, h, w), whose upsampling is all that is left to do, if a kernel does it at once."""
    if len(views) != 1 or not isinstance(views[0], WholeView):
        return None
    logits_1Khw, size = views[0].logits_1Khw, views[0].size
    return logits_1Khw if choose_upsampling(impl, "upsample_argmax", logits_1Khw, size) == "triton" else None


def strips(views: list[View], size: tuple[int, ...]) -> Iterator[Strip]:
    """The combined views at `size` = (H, W), from the top."""
    height, width = size
    rows = strip_rows(views[0].num_classes * width)
    for top in range(0, height, rows):
        yield Strip(top, _combine(views, top, min(top + rows, height)))


def _combine(views: list[View], top: int, bottom: int) -> Tensor:
    if len(views) == 1:
        return views[0].rows(top, bottom)
    # In logarithms, where a probability of 1e-50 is still one.
    total_KrW = views[0].rows(top, bottom).log_softmax(dim=0)
    for view in views[1:]:
        total_KrW = torch.logaddexp(total_KrW, view.rows(top, bottom).log_softmax(dim=0))
    return total_KrW - math.log(len(views))


def _view(
    model: nn.Module,
    image_HW3: np.ndarray,
    size: tuple[int, int],
    protocol: EvalConfig,
    data: DataConfig,
    device: torch.device,
) -> View:
    image_3HW = moved(torch.from_numpy(normalise(image_HW3, data.mean, data.std)).permute(2, 0, 1), device)
    resized = (image_HW3.shape[0], image_HW3.shape[1])
    if not protocol.slides(*resized):
        return WholeView(_logits(model, image_3HW), size)
    windows = [
        (w, _logits(model, image_3HW[:, w.top : w.top + w.height, w.left : w.left + w.width]))
        for w in sliding_windows(resized, protocol.window, protocol.stride)
    ]
    return SlidingView(windows, resized, size)


@torch.inference_mode()
def _logits(model: nn.Module, image_3HW: Tensor) -> Tensor:
    with explained_shortage("evaluate smaller windows: --mode slide, or a smaller evaluate.resize_to"):
        return model(image_3HW.unsqueeze(0)).logits_BKhw.float()


def sliding_windows(size: tuple[int, int], window: tuple[int, int], stride: tuple[int, int]) -> list[Window]:
    """Windows that cover the image; the last of a row or column shifts inwards, none is cropped.

    An image smaller than the window is one window of its own size.
    """

    def starts(length: int, window_px: int, stride_px: int) -> list[int]:
        steps = max(math.ceil((length - window_px) / stride_px), 0)
        return [max(min(i * stride_px, length - window_px), 0) for i in range(steps + 1)]

    height, width = min(window[0], size[0]), min(window[1], size[1])
    return [
        Window(top, left, height, width)
        for top in starts(size[0], window[0], stride[0])
        for left in starts(size[1], window[1], stride[1])
    ]

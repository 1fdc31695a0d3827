"""Few keys: attention over means of blocks of keys and values, without new parameters or training.

The fused map is finer than most of the maps that it is made of, so neighbouring keys and values are nearly
alike. Over means of r x r blocks a softmax has r^2 fewer terms:

    sum_j n_j exp(q k_j) v_j / sum_j n_j exp(q k_j),   k_j, v_j: means over the n_j pixels of block j

Blocks lie side by side from the top left corner on; those at the bottom and right edges hold the pixels that
are left, n_j < r^2, and their scores get ln n_j. Downsampled keys and values are known from image generation
(ToDo, arXiv 2402.13573; PixArt-Sigma, arXiv 2403.04692).

B batch, N pixels, M blocks, C any width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segdeformer.errors import UsageError
from segdeformer.models.layers import Tokens, tokens_of


def block_means(pixels_BNC: Tensor, tokens: Tokens, stride: int) -> Tensor:
    """Means of stride x stride blocks of pixels that lie as those of `tokens` do, (B, M, C).

    M = ceil(height / stride) * ceil(width / stride).
    """
    size = min(stride, tokens.height), min(stride, tokens.width)
    map_BCHW = tokens._replace(pixels_BNC=pixels_BNC).as_map()
    means = F.avg_pool2d(map_BCHW, size, ceil_mode=True, count_include_pad=False)
    return tokens_of(means).pixels_BNC


def block_bias(tokens: Tokens, stride: int) -> Tensor | None:
    """What a block's pixels add to its scores, ln(n_j / stride^2), (M,); None if all are full.

    float32, or float64 for float64 pixels.
    """
    if tokens.height % stride == 0 and tokens.width % stride == 0:
        return None
    dtype = torch.promote_types(tokens.pixels_BNC.dtype, torch.float32)
    zeros = tokens.pixels_BNC.new_zeros((), dtype=dtype)
    rows, columns = (_log_counts(n, stride, zeros) for n in (tokens.height, tokens.width))
    return (rows[:, None] + columns).flatten()


def _log_counts(length: int, stride: int, like: Tensor) -> Tensor:
    counts = like.new_zeros(-(-length // stride))
    if length % stride:
        counts[-1] = math.log(length % stride / stride)
    return counts


def set_key_stride(model: nn.Module, stride: int | None) -> None:
    """Let every attention of a segmenter take means of stride x stride blocks for keys and values.

    1: all keys. None: as the model was trained. Raises `UsageError` where there are no such keys.
    """
    check_key_stride(model, stride)
    for attention in _attentions(model):
        attention.key_stride = attention.trained_key_stride if stride is None else stride


def check_key_stride(model: nn.Module, stride: int | None) -> None:
    """Raise `UsageError` for a stride that the model cannot have."""
    if stride is not None and stride < 1:
        raise UsageError(f"the key stride is {stride}; it must be 1 or more")
    if stride is not None and stride > 1:
        obstacle = key_stride_obstacle(model)
        if obstacle is not None:
            raise UsageError(f"key stride {stride}: {obstacle}; leave it at 1")


def key_stride_obstacle(model: nn.Module) -> str | None:
    """Why there are no keys to be averaged; None if there are."""
    attentions = _attentions(model)
    if not attentions:
        return "this model has no attention over its pixels"
    if any(attention.reduce is not None for attention in attentions):
        return "this model's keys are few already, by its R x R convolutions"
    return None


def key_stride_of(model: nn.Module) -> int:
    """The stride that its attentions have now; 1 where there are none."""
    return max((attention.key_stride for attention in _attentions(model)), default=1)


def num_scores(model: nn.Module, height: int, width: int) -> int:
    """Products of a query with a key that the model takes of one image on a map of this size."""
    total = 0
    for attention in _attentions(model):
        stride = attention.key_stride if attention.reduce is None else attention.reduce.reduction
        num_keys = -(-height // stride) * -(-width // stride)
        total += getattr(attention, "heads", 1) * height * width * num_keys
    return total


@contextmanager
def key_stride_set(model: nn.Module, stride: int | None) -> Iterator[None]:
    """Inside, the model has this key stride; None: whatever it has."""
    if stride is None:
        yield
        return
    attentions = _attentions(model)
    before = [attention.key_stride for attention in attentions]
    set_key_stride(model, stride)
    try:
        yield
    finally:
        for attention, old in zip(attentions, before, strict=True):
            attention.key_stride = old


def _attentions(model: nn.Module) -> list[Any]:
    """The modules with keys that can be averaged."""
    return [module for module in model.modules() if hasattr(module, "trained_key_stride")]

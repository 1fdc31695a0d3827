"""Encoders and fusions of one's own, tried once when a model is built. B batch, C channels, hw a map."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from segdeformer.models.layers import Tokens
from segdeformer.plugins import check_attributes, explained, find_part, refuse

ENCODER, FUSION = "encoder", "fusion"
CELLS = 2, 3  # of the coarsest map, in height and width, that a part is tried with


def build_own_encoder(path: str, options: Mapping[str, Any]) -> Any:
    """An `protocols.OwnEncoder`; raises `UsageError` when it is none."""
    part = find_part(path, ENCODER)
    with explained(path, ENCODER):
        encoder = part(**options)
    _check_module(encoder, path, ENCODER)
    check_attributes(encoder, path, ENCODER, "channels", "strides")
    channels, strides = list(encoder.channels), list(encoder.strides)
    if len(channels) != 4 or len(strides) != 4:
        raise refuse(path, ENCODER, f"channels {channels} and strides {strides}", "four of each")
    height, width = (cells * max(strides) for cells in CELLS)
    with explained(path, ENCODER):
        maps = _tried(encoder, torch.zeros(1, 3, height, width))
    wanted = [
        (1, c, math.ceil(height / s), math.ceil(width / s)) for c, s in zip(channels, strides, strict=True)
    ]
    shapes = (
        [tuple(getattr(each, "shape", ())) for each in maps] if isinstance(maps, Sequence) else type(maps)
    )
    if shapes != wanted:
        raise refuse(path, ENCODER, f"{shapes} for an image of {height}x{width} px", str(wanted))
    return encoder


def build_own_fusion(
    path: str, channels: Sequence[int], strides: Sequence[int], *, width: int, options: Mapping[str, Any]
) -> Any:
    """An `protocols.OwnFusion`; raises `UsageError` when it is none."""
    part = find_part(path, FUSION)
    with explained(path, FUSION):
        fusion = part(channels=tuple(channels), strides=tuple(strides), width=width, **options)
    _check_module(fusion, path, FUSION)
    sizes = [[cells * max(strides) // stride for cells in CELLS] for stride in strides]
    maps = [torch.randn(1, c, *size) for c, size in zip(channels, sizes, strict=True)]
    with explained(path, FUSION):
        tokens = _tried(fusion, maps)
    expected = f"Tokens of shape (1, height * width, {width})"
    if not isinstance(tokens, Tokens):
        raise refuse(path, FUSION, type(tokens).__name__, expected)
    shape = tuple(tokens.pixels_BNC.shape)
    if shape != (1, tokens.height * tokens.width, width):
        came = f"{shape} with a map of {tokens.height}x{tokens.width}"
        raise refuse(path, FUSION, came, expected)
    return fusion


def _check_module(part: object, path: str, what: str) -> None:
    if not isinstance(part, nn.Module):
        raise refuse(path, what, type(part).__name__, "a torch.nn.Module")


def _tried(module: nn.Module, given: Tensor | Sequence[Tensor]) -> Any:
    """What the module makes, in eval mode; random numbers are drawn as if nothing had been tried."""
    was_training = module.training
    with torch.no_grad(), torch.random.fork_rng([]):
        made = module.eval()(given)
    module.train(was_training)
    return made

"""Models without memory for their weights: shapes are all that counting needs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from segdeformer.config import ModelConfig
from segdeformer.models.context import ExternalForm
from segdeformer.models.segmenter import Segmenter, build_segmenter


def without_weights(config: ModelConfig) -> ModelConfig:
    """The same model from random weights: no file is read, nothing is downloaded."""
    return config.model_copy(update={"encoder": config.encoder.model_copy(update={"weights": "none"})})


def build_skeleton(config: ModelConfig, *, external_form: ExternalForm = "low_rank") -> Segmenter:
    """The model in eval mode on PyTorch's meta device, in a second at most.

    Raises `UserError` when it cannot be built, as for want of a package.
    """
    with torch.device("meta"), _RatesOnCPU():
        return build_segmenter(without_weights(config), external_form=external_form).eval()


class _RatesOnCPU(TorchFunctionMode):
    """Older releases of timm read their drop path rates out of a tensor, so that one needs values."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        return func(*args, **(kwargs | {"device": "cpu"} if func is torch.linspace else kwargs))

"""Predict the classes of one image."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from segdeformer.config import DataConfig, EvalConfig
from segdeformer.inference.views import fused_map, make_views, strips
from segdeformer.kernels.upsample.argmax import upsample_argmax
from segdeformer.models.segmenter import Segmenter
from segdeformer.runtime import ON_CPU, Runtime


class Prediction(NamedTuple):
    ids_HW: np.ndarray  # uint8
    confidence_HW: np.ndarray  # float32 in [0, 1], softmax of the argmax


def predict_image(
    model: Segmenter,
    image_HW3: np.ndarray,
    *,
    protocol: EvalConfig,
    data: DataConfig,
    runtime: Runtime = ON_CPU,
) -> Prediction:
    """Classes and confidence of a uint8 RGB image (H, W, 3), at its own size."""
    device, impl = runtime.device, runtime.impl
    height, width = image_HW3.shape[:2]
    views = make_views(model, image_HW3, protocol, data, device)
    logits_1Khw = fused_map(views, impl)
    if logits_1Khw is not None:
        result = upsample_argmax(logits_1Khw, (height, width), confidence=True, impl=impl)
        assert result.confidence_BHW is not None
        return Prediction(result.ids_BHW[0].cpu().numpy(), result.confidence_BHW[0].cpu().numpy())
    ids_HW = torch.empty(height, width, dtype=torch.uint8, device=device)
    confidence_HW = torch.empty(height, width, device=device)
    for strip in strips(views, (height, width)):
        rows = slice(strip.top, strip.top + strip.logits_KrW.shape[1])
        ids_HW[rows] = strip.ids()
        confidence_HW[rows] = strip.confidence()
    return Prediction(ids_HW.cpu().numpy(), confidence_HW.cpu().numpy())  # here a GPU is waited for

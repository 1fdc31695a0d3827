"""Predict the classes of one image."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from segdeformer.config import DataConfig, EvalConfig
from segdeformer.engine.inference import fused_map, make_views, strips
from segdeformer.kernels.impl import Impl
from segdeformer.kernels.upsample_argmax import upsample_argmax
from segdeformer.models.segmenter import Segmenter


class Prediction(NamedTuple):
    ids_HW: np.ndarray  # uint8
    confidence_HW: np.ndarray  # float32 in [0, 1], softmax of the winner


def predict_image(
    model: Segmenter,
    image_HW3: np.ndarray,
    *,
    protocol: EvalConfig,
    data: DataConfig,
    device: torch.device,
    impl: Impl = "auto",
) -> Prediction:
    """Classes and confidence of a uint8 RGB image, at its own size; impl is that of the upsampling."""
    height, width = image_HW3.shape[:2]
    views = make_views(model, image_HW3, protocol, data, device)
    logits_1Khw = fused_map(views, impl)
    if logits_1Khw is not None:
        winners = upsample_argmax(logits_1Khw, (height, width), confidence=True, impl=impl)
        assert winners.confidence_BHW is not None
        return Prediction(winners.ids_BHW[0].cpu().numpy(), winners.confidence_BHW[0].cpu().numpy())
    ids_HW = torch.empty(height, width, dtype=torch.uint8, device=device)
    confidence_HW = torch.empty(height, width, device=device)
    for strip in strips(views, (height, width)):
        rows = slice(strip.top, strip.top + strip.logits_KrW.shape[1])
        ids_HW[rows] = strip.ids()
        confidence_HW[rows] = strip.confidence()
    return Prediction(ids_HW.cpu().numpy(), confidence_HW.cpu().numpy())  # here a GPU is waited for

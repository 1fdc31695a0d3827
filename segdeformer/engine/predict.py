"""Predict the classes of one image."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from segdeformer.config import DataConfig, EvalConfig
from segdeformer.engine.inference import predict_strips
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
) -> Prediction:
    """Classes and confidence of a uint8 RGB image, at its own size."""
    height, width = image_HW3.shape[:2]
    prediction = Prediction(np.empty((height, width), np.uint8), np.empty((height, width), np.float32))
    for strip in predict_strips(model, image_HW3, protocol, data, device):
        rows = slice(strip.top, strip.top + strip.logits_KrW.shape[1])
        prediction.ids_HW[rows] = strip.ids().to(torch.uint8).cpu().numpy()
        prediction.confidence_HW[rows] = strip.confidence().cpu().numpy()
    return prediction

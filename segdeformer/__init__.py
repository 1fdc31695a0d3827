"""Semantic segmentation with the SegDeformer decoder (ECCV 2022).

`train`, `evaluate` and `predict` do what the commands of these names do. `build_model` makes a model from a
recipe, `load` one from a checkpoint, `save` writes one, `SegDeformer` is the decoder alone. PyTorch is
imported when one of them is first used, so `import segdeformer` is immediate.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from segdeformer.version import __version__ as __version__

if TYPE_CHECKING:
    from segdeformer.api import Training, evaluate, predict, train
    from segdeformer.config import Recipe, change_recipe, load_recipe
    from segdeformer.data.samples import Splits
    from segdeformer.models.segmenter import SegDeformer, Segmenter, build_decoder
    from segdeformer.weights.build import build_model
    from segdeformer.weights.checkpoint import load, save

__all__ = [
    "Recipe",
    "SegDeformer",
    "Segmenter",
    "Splits",
    "Training",
    "build_decoder",
    "build_model",
    "change_recipe",
    "evaluate",
    "load",
    "load_recipe",
    "predict",
    "save",
    "train",
]

_HOMES = {
    "segdeformer.api": ("Training", "evaluate", "predict", "train"),
    "segdeformer.config": ("Recipe", "change_recipe", "load_recipe"),
    "segdeformer.data.samples": ("Splits",),
    "segdeformer.models.segmenter": ("SegDeformer", "Segmenter", "build_decoder"),
    "segdeformer.weights.build": ("build_model",),
    "segdeformer.weights.checkpoint": ("load", "save"),
}


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(home), name)
    raise AttributeError(f"module 'segdeformer' has no attribute {name!r}")

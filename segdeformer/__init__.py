"""Semantic segmentation with the SegDeformer decoder (ECCV 2022).

`build_model` makes a model from a recipe, `load` one from a checkpoint, `save` writes one, `SegDeformer` is
the decoder alone. PyTorch is imported when one of them is first used, so `import segdeformer` is immediate.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from segdeformer.config import Recipe, load_recipe
    from segdeformer.engine.checkpoint import load, save
    from segdeformer.models.segmenter import SegDeformer, Segmenter, build_decoder, build_model

__version__ = "0.1.0"
__all__ = [
    "Recipe",
    "SegDeformer",
    "Segmenter",
    "build_decoder",
    "build_model",
    "load",
    "load_recipe",
    "save",
]

_HOMES = {
    "Recipe": "segdeformer.config",
    "load_recipe": "segdeformer.config",
    "load": "segdeformer.engine.checkpoint",
    "save": "segdeformer.engine.checkpoint",
    "SegDeformer": "segdeformer.models.segmenter",
    "Segmenter": "segdeformer.models.segmenter",
    "build_decoder": "segdeformer.models.segmenter",
    "build_model": "segdeformer.models.segmenter",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'segdeformer' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)

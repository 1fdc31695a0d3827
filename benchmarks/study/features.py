"""A frozen encoder whose maps are kept on disk, so that a decoder on it trains in minutes on two cores.

In a recipe: `name = "benchmarks.study.features:CachedEncoder"`. B batch, HW image.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from segdeformer.config import EncoderConfig
from segdeformer.models.encoders import build_encoder
from segdeformer.weights.encoder import load_encoder_weights


class CachedEncoder(nn.Module):
    """An encoder without gradients, always in eval mode, asked once for each image that it is shown.

    An image is known by a digest of its values, so whatever changes it (a crop, a flip) makes another one.
    Maps are stored as float32: with and without the cache, a run is the same to the bit.
    """

    def __init__(self, *, name: str, cache: str, weights: str = "none", **options: Any) -> None:
        super().__init__()
        self.encoder = build_encoder(EncoderConfig(name=name, **options)).eval().requires_grad_(False)
        identity = f"{name} {sorted(options.items())} {weights}"
        if weights != "none":
            load_encoder_weights(self.encoder, weights)
            identity += hashlib.sha256(Path(weights).read_bytes()).hexdigest()
        self.folder = Path(cache) / hashlib.sha256(identity.encode()).hexdigest()[:16]
        self.folder.mkdir(parents=True, exist_ok=True)
        self.channels, self.strides = self.encoder.channels, self.encoder.strides

    def train(self, mode: bool = True) -> Self:
        """Stays in eval mode: a frozen encoder drops nothing and learns no statistics."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images_B3HW: Tensor) -> list[Tensor]:
        """The encoder's maps, read where they are known."""
        each = [self._maps(image_3HW) for image_3HW in images_B3HW]
        return [torch.stack(maps) for maps in zip(*each, strict=True)]

    def _maps(self, image_3HW: Tensor) -> Sequence[Tensor]:
        digest = hashlib.blake2b(image_3HW.cpu().contiguous().numpy().tobytes(), digest_size=16).hexdigest()
        path = self.folder / f"{digest}.npz"
        if path.exists():
            with np.load(path) as file:
                return [torch.from_numpy(file[key]).to(image_3HW.device) for key in file]
        maps = [map_1Chw[0] for map_1Chw in self.encoder(image_3HW[None])]
        aside = path.with_name(f"{digest}.{os.getpid()}.npz")
        np.savez(aside, *(map_Chw.cpu().numpy() for map_Chw in maps))
        aside.replace(path)
        return maps

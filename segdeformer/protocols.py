"""What parts of one's own must look like, which a recipe or the command line names by a Python path.

How they are found and what `options` do: see `plugins` and docs/extending.md.
B batch, K classes, hw a map, HW an image, N tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from segdeformer.data.samples import Dataset
from segdeformer.models.layers import Tokens
from segdeformer.training.loop import Event
from segdeformer.training.run import Run


class OwnDataset(Protocol):
    """`data.name`: makes the data of a split; called once for `train` and once for `val`."""

    def __call__(self, *, root: str, split: str, **options: Any) -> Dataset:
        """root: `data.root`, absolute, or empty. split: `data.train_split` or `data.val_split`."""
        ...


class OwnEncoder(Protocol):
    """`model.encoder.name`: makes a module; called with the options, and with `weights` if that is no `none`.

    A checkpoint is read without `weights`, so the file of pretraining is needed once.

    channels, strides: four of each, of maps from large to small.
    """

    channels: Sequence[int]
    strides: Sequence[int]

    def __call__(self, images_B3HW: Tensor) -> Sequence[Tensor]:
        """Normalised images to four maps (B, channels[i], ceil(H / strides[i]), ceil(W / strides[i]))."""
        ...


class OwnFusion(Protocol):
    """`model.fusion.kind`: makes a module of the encoder's `channels` and `strides`, and of `width`."""

    def __call__(self, maps: Sequence[Tensor]) -> Tokens:
        """Four encoder maps to `Tokens` (B, N, width) and their height and width."""
        ...


class OwnLoss(Protocol):
    """`kind` in `train.losses`: a term of the loss."""

    def __call__(self, logits_BKhw: Tensor, labels_BHW: Tensor, **options: Any) -> Tensor:
        """A scalar, a mean over labelled pixels, of low-resolution float32 logits and uint8 labels."""
        ...


class OwnTransform(Protocol):
    """`path` in `augment.transforms`: changes a training crop after all other transforms."""

    def __call__(
        self, image_HW3: np.ndarray, labels_HW: np.ndarray, rng: np.random.Generator, **options: Any
    ) -> tuple[np.ndarray, np.ndarray]:
        """uint8 RGB and uint8 class ids, 255 ignored, of unchanged size; random by `rng` alone."""
        ...


class OwnLogger(Protocol):
    """`train --logger`: told everything that happens in the first process of a run."""

    def __call__(self, event: Event, run: Run) -> None:
        """event: see `training.loop`; losses in it are on the CPU."""
        ...

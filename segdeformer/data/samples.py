"""What a data set is: samples by index, and what the ids in its files mean. HW image, 3 RGB."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, Protocol

import numpy as np

from segdeformer.config import IGNORE_INDEX
from segdeformer.data.classes import ClassTable

LabelMap = Mapping[int, int]  # id in the file -> class id, or 255; every other id is an error


class Sample(NamedTuple):
    image_HW3: np.ndarray  # uint8 RGB
    labels_HW: np.ndarray  # uint8 class ids; 255 = ignore
    name: str


class Dataset(Protocol):
    """Samples by index; reading one is deterministic and has no side effects."""

    @property
    def name(self) -> str: ...
    @property
    def split(self) -> str: ...
    @property
    def classes(self) -> ClassTable: ...
    @property
    def label_map(self) -> LabelMap: ...
    def __len__(self) -> int: ...
    def read(self, index: int) -> Sample: ...


class Splits(NamedTuple):
    """What a model trains on, and what it is scored on."""

    train: Dataset
    val: Dataset


def evenly_spread(count: int, most: int) -> list[int]:
    """Up to `most` of `count` indices, evenly spread over a data set, so that nobody chose them."""
    shown = min(most, count)
    return [(2 * i + 1) * count // (2 * shown) for i in range(shown)]


def identity_map(num_classes: int) -> LabelMap:
    return {IGNORE_INDEX: IGNORE_INDEX} | {label: label for label in range(num_classes)}

"""The confusion matrix of every validation image of a run, in a file. N images, K classes."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np

from segdeformer.config import Recipe
from segdeformer.data.samples import Dataset
from segdeformer.errors import UserError
from segdeformer.files import replacing
from segdeformer.inference.evaluate import Tally, evaluate_images
from segdeformer.inference.metrics import ConfusionMatrix
from segdeformer.models.segmenter import Segmenter
from segdeformer.runtime import ON_CPU, Runtime


class ImageCounts(NamedTuple):
    """counts: (N, K, K) uint32 pixels; rows are the truth, ignored pixels are left out."""

    names: tuple[str, ...]  # of the images
    classes: tuple[str, ...]
    counts: np.ndarray
    iteration: int  # of the model that predicted them


def count_images(
    model: Segmenter, dataset: Dataset, recipe: Recipe, *, iteration: int, runtime: Runtime = ON_CPU
) -> ImageCounts:
    """Evaluate as `segdeformer eval` does, but keep every image's confusion matrix."""
    num_classes = len(dataset.classes.names)
    names = []
    counts_NKK = np.zeros((len(dataset), num_classes, num_classes), np.uint32)
    tally = Tally(dataset.classes)
    results = evaluate_images(
        model, dataset, tally, protocol=recipe.evaluate, data=recipe.data, runtime=runtime
    )
    for index, result in enumerate(results):
        confusion = ConfusionMatrix(num_classes)
        confusion.add(result.sample.labels_HW, result.ids)
        names.append(result.sample.name)
        counts_NKK[index] = confusion.counts_KK
    return ImageCounts(tuple(names), tuple(dataset.classes.names), counts_NKK, iteration)


def write_image_counts(path: Path, counts: ImageCounts) -> None:
    """Write the matrices as a compressed NumPy file, its arrays named as the fields."""
    with replacing(path) as aside, aside.open("wb") as file:
        names, classes, counts_NKK, iteration = counts
        np.savez_compressed(file, names=names, classes=classes, counts=counts_NKK, iteration=iteration)


def read_image_counts(path: Path) -> ImageCounts:
    """Raises `UserError` when there is no such file or it is damaged."""
    try:
        with np.load(path, allow_pickle=False) as file:
            names, classes = (tuple(map(str, file[key])) for key in ("names", "classes"))
            return ImageCounts(names, classes, file["counts"], int(file["iteration"]))
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} cannot be read ({error}); remove it to have the run scored anew") from None

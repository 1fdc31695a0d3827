"""A picture of some validation images: image, truth and prediction side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from segdeformer.data.classes import ClassTable
from segdeformer.data.images import write_png
from segdeformer.data.samples import evenly_spread
from segdeformer.inference.evaluate import ImageResult
from segdeformer.inference.metrics import ConfusionMatrix
from segdeformer.report.pictures import comparison_sheet

NUM_SHOWN = 6  # images


def shown_indices(num_images: int) -> list[int]:
    return evenly_spread(num_images, NUM_SHOWN)


def write_sheet(path: Path, results: Sequence[ImageResult], classes: ClassTable, *, headline: str) -> None:
    """Draw the results, each with its own mIoU, into a PNG file."""
    rows = []
    for result in results:
        sample, ids_HW = result.sample, result.ids
        confusion = ConfusionMatrix(len(classes.names))
        confusion.add(sample.labels_HW, ids_HW)
        rows.append((sample.name, sample.image_HW3, sample.labels_HW, ids_HW, confusion.scores().miou))
    write_png(path, comparison_sheet(rows, classes.names, classes.colors, headline))

"""Pages of images: beside truth and prediction, or beside themselves under their labels, with one legend.

H height, W width, 3 RGB.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np

from segdeformer.data.classes import ClassTable
from segdeformer.data.images import write_png
from segdeformer.data.samples import evenly_spread
from segdeformer.inference.evaluate import ImageResult
from segdeformer.inference.metrics import ConfusionMatrix
from segdeformer.report.lettering import FAINT_INK, blank, paragraph, shortened, write
from segdeformer.report.pictures import (
    BELOW,
    BESIDE,
    class_shares,
    comparison_sheet,
    framed,
    joined,
    overlay,
    reduced_size,
    with_legend,
)

NUM_SHOWN = 6  # images
TILE_PX = 240  # long edge of an image on the page
GAP_PX, TEXT_PX = 8, 15
COLUMNS = 3


def shown_indices(num_images: int) -> list[int]:
    return evenly_spread(num_images, NUM_SHOWN)


def write_sheet(path: Path, results: Sequence[ImageResult], classes: ClassTable, *, headline: str) -> None:
    """Draw the results, each with its own mIoU, into a PNG file."""
    rows = []
    for sample, ids_HW in ((result.sample, result.ids) for result in results):
        confusion = ConfusionMatrix(len(classes.names))
        confusion.add(sample.labels_HW, ids_HW)
        rows.append((sample.name, sample.image_HW3, sample.labels_HW, ids_HW, confusion.scores().miou))
    write_png(path, comparison_sheet(rows, classes.names, classes.colors, headline))


class Labelled(NamedTuple):
    title: str
    image_HW3: np.ndarray
    labels_HW: np.ndarray  # uint8 class ids; 255 = ignore, drawn as the plain image


def overlay_page(samples: Sequence[Labelled], classes: ClassTable, headline: str) -> np.ndarray:
    """Image and overlay in three columns; the legend tells the classes that occur, and their shares."""
    cells = [_cell(sample, classes) for sample in samples]
    cell_w = max(cell.shape[1] for cell in cells)
    width = min(COLUMNS, len(cells)) * (cell_w + 3 * GAP_PX) - 3 * GAP_PX
    parts = [paragraph(headline, width, round(1.4 * TEXT_PX))]
    for first in range(0, len(cells), COLUMNS):
        padded = [
            np.pad(cell, ((0, 2 * GAP_PX), (0, cell_w - cell.shape[1]), (0, 0)), constant_values=255)
            for cell in cells[first : first + COLUMNS]
        ]
        parts.append(joined(padded, axis=BESIDE, gap=3 * GAP_PX))
    page_HW3 = joined(parts, axis=BELOW, gap=0)
    ids = np.concatenate([sample.labels_HW.ravel() for sample in samples])
    shares_K = class_shares(ids[None], len(classes.names))
    page_HW3 = framed(page_HW3, 2 * GAP_PX)
    return with_legend(page_HW3, classes.names, classes.colors, np.flatnonzero(shares_K), shares=shares_K)


def _cell(sample: Labelled, classes: ClassTable) -> np.ndarray:
    """Image, overlay, and the title above them."""
    size = reduced_size(sample.labels_HW, TILE_PX)
    way = cv2.INTER_AREA if max(sample.labels_HW.shape) > TILE_PX else cv2.INTER_NEAREST
    image_HW3 = cv2.resize(sample.image_HW3, size, interpolation=way)
    labels_HW = cv2.resize(sample.labels_HW, size, interpolation=cv2.INTER_NEAREST)
    both_HW3 = joined([image_HW3, overlay(image_HW3, labels_HW, classes.colors)], axis=BESIDE, gap=GAP_PX)
    title_HW3 = blank(round(1.6 * TEXT_PX), both_HW3.shape[1])
    title = shortened(sample.title, TEXT_PX, both_HW3.shape[1])
    write(title_HW3, title, 0, TEXT_PX, TEXT_PX, color=FAINT_INK)
    return joined([title_HW3, both_HW3], axis=BELOW, gap=0)

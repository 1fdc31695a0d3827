"""A page of samples: each image beside itself under its labels, with one legend.

H height, W width, 3 RGB.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import cv2
import numpy as np

from segdeformer.data.classes import ClassTable
from segdeformer.report.lettering import FAINT_INK, blank, paragraph, shortened, write
from segdeformer.report.pictures import BELOW, BESIDE, class_shares, framed, joined, overlay, with_legend

TILE_PX = 240  # long edge of an image on the page
GAP_PX, TEXT_PX = 8, 15
COLUMNS = 3


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
    height, width = sample.labels_HW.shape
    factor = TILE_PX / max(height, width)
    size = (max(1, round(width * factor)), max(1, round(height * factor)))
    way = cv2.INTER_AREA if factor < 1 else cv2.INTER_NEAREST
    image_HW3 = cv2.resize(sample.image_HW3, size, interpolation=way)
    labels_HW = cv2.resize(sample.labels_HW, size, interpolation=cv2.INTER_NEAREST)
    both_HW3 = joined([image_HW3, overlay(image_HW3, labels_HW, classes.colors)], axis=BESIDE, gap=GAP_PX)
    title_HW3 = blank(round(1.6 * TEXT_PX), both_HW3.shape[1])
    title = shortened(sample.title, TEXT_PX, both_HW3.shape[1])
    write(title_HW3, title, 0, TEXT_PX, TEXT_PX, color=FAINT_INK)
    return joined([title_HW3, both_HW3], axis=BELOW, gap=0)

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
from segdeformer.report.pictures import class_shares, overlay, with_legend

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
    lines = [cells[first : first + COLUMNS] for first in range(0, len(cells), COLUMNS)]
    cell_w = max(cell.shape[1] for cell in cells)
    width = min(COLUMNS, len(cells)) * (cell_w + 3 * GAP_PX) - 3 * GAP_PX
    head_HW3 = paragraph(headline, width, round(1.4 * TEXT_PX))
    height = head_HW3.shape[0] + sum(max(cell.shape[0] for cell in line) + 2 * GAP_PX for line in lines)
    page_HW3 = blank(height, width)
    page_HW3[: head_HW3.shape[0]] = head_HW3
    top = head_HW3.shape[0]
    for line in lines:
        for column, cell in enumerate(line):
            left = column * (cell_w + 3 * GAP_PX)
            page_HW3[top : top + cell.shape[0], left : left + cell.shape[1]] = cell
        top += max(cell.shape[0] for cell in line) + 2 * GAP_PX
    ids = np.concatenate([sample.labels_HW.ravel() for sample in samples])
    shares_K = class_shares(ids[None], len(classes.names))
    shown = [int(class_id) for class_id in np.flatnonzero(shares_K)]
    px = 2 * GAP_PX
    page_HW3 = np.pad(page_HW3, ((px, px), (px, px), (0, 0)), constant_values=255)
    return with_legend(page_HW3, classes.names, classes.colors, shown, shares=shares_K)


def _cell(sample: Labelled, classes: ClassTable) -> np.ndarray:
    """Image, overlay, and the title above them."""
    height, width = sample.labels_HW.shape
    factor = TILE_PX / max(height, width)
    size = (max(1, round(width * factor)), max(1, round(height * factor)))
    way = cv2.INTER_AREA if factor < 1 else cv2.INTER_NEAREST
    image_HW3 = cv2.resize(sample.image_HW3, size, interpolation=way)
    labels_HW = cv2.resize(sample.labels_HW, size, interpolation=cv2.INTER_NEAREST)
    title_px = round(1.6 * TEXT_PX)
    cell_HW3 = blank(title_px + size[1], 2 * size[0] + GAP_PX)
    title = shortened(sample.title, TEXT_PX, cell_HW3.shape[1])
    write(cell_HW3, title, 0, TEXT_PX, TEXT_PX, color=FAINT_INK)
    cell_HW3[title_px:, : size[0]] = image_HW3
    cell_HW3[title_px:, size[0] + GAP_PX :] = overlay(image_HW3, labels_HW, classes.colors)
    return cell_HW3

"""Draw label maps, overlays, legends, confidence maps and sheets of examples, as RGB arrays.

H height, W width, 3 RGB; all pictures are uint8. OpenCV and numpy only: nothing here needs torch.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import cv2
import numpy as np

from segdeformer.config import IGNORE_INDEX
from segdeformer.errors import UserError
from segdeformer.report.lettering import (
    FAINT_INK,
    WHITE,
    Color,
    blank,
    paragraph,
    shortened,
    text_width,
    write,
)

IGNORED_COLOR: Color = (48, 48, 48)  # a dark neutral grey: no palette that we ship has it
OUTLINE: Color = (196, 200, 204)

MIN_TEXT_PX = 13
MIN_PICTURE_PX = 256  # smaller pictures are enlarged by a whole factor: a legend needs room
SCREEN_RATIO = 1.5  # width to height of the frame that a picture with a legend should fill well
BELOW, BESIDE = 0, 1  # axes along which pictures are joined
LONGEST_NAME_EM = 16  # longer names end in an ellipsis
ROUNDING = 1e-3  # a softmax in float32 may end a little above 1
WIDEST_GAP_EM = 7  # between the columns of a legend that is spread


class Comparison(NamedTuple):
    """One example of a sheet. `score` is its mIoU in [0, 1], or None."""

    title: str
    image_HW3: np.ndarray
    truth_HW: np.ndarray
    prediction_HW: np.ndarray
    score: float | None = None


def colorize(labels_HW: np.ndarray, colors: Sequence[Color]) -> np.ndarray:
    """The colour of each pixel's class, (H, W, 3); 255 becomes `IGNORED_COLOR`.

    Raises `UserError` when an id has no colour.
    """
    _check_ids(labels_HW, len(colors))
    table = np.full((IGNORE_INDEX + 1, 3), IGNORED_COLOR, np.uint8)
    table[: len(colors)] = np.asarray(colors, np.uint8).reshape(-1, 3)
    return np.take(table, labels_HW, axis=0)


def overlay(
    image_HW3: np.ndarray, labels_HW: np.ndarray, colors: Sequence[Color], *, opacity: float = 0.6
) -> np.ndarray:
    """Class colours over the image; ignored pixels show the plain image.

    opacity: 0 is the image alone, 1 the colours alone.
    """
    _check_sizes(image_HW3, labels_HW)
    if not 0 <= opacity <= 1:
        raise UserError(f"opacity is {opacity}; it must be between 0 and 1")
    blend_HW3 = cv2.addWeighted(image_HW3, 1 - opacity, colorize(labels_HW, colors), opacity, 0)
    return np.where((labels_HW == IGNORE_INDEX)[:, :, None], image_HW3, blend_HW3)


def class_shares(labels_HW: np.ndarray, num_classes: int) -> np.ndarray:
    """Share of each class among the pixels that are not ignored, (K,); zeros when all are."""
    _check_ids(labels_HW, num_classes)
    count_K = np.bincount(labels_HW.ravel(), minlength=IGNORE_INDEX + 1)[:num_classes]
    return np.divide(count_K, max(int(count_K.sum()), 1))


def with_legend(
    picture_HW3: np.ndarray,
    names: Sequence[str],
    colors: Sequence[Color],
    shown_ids: Sequence[int] | np.ndarray,
    shares: Sequence[float] | np.ndarray | None = None,
) -> np.ndarray:
    """The picture on white, with a legend of the classes in `shown_ids` beside or below it.

    shares: one per class of `names`, in [0, 1]; the legend tells them and is sorted by them.
    The text grows with the picture; a picture below 256 px is enlarged by a whole factor.
    """
    ids = [int(i) for i in shown_ids]
    if wrong := [i for i in ids if not 0 <= i < min(len(names), len(colors))]:
        raise UserError(f"ids {_listed(wrong)} have no name and colour; there are {len(names)} classes")
    if shares is not None:
        ids.sort(key=lambda i: -shares[i])
    entries = [_Entry(colors[i], names[i], "" if shares is None else _percent(float(shares[i]))) for i in ids]
    picture_HW3, text_px = _enlarged(picture_HW3)
    height, width = picture_HW3.shape[:2]
    margin = text_px
    picture_HW3 = _outlined(picture_HW3)
    if not entries:
        return framed(picture_HW3, margin)

    def screen_and_area(choice: tuple[int, _Legend]) -> tuple[float, int]:
        axis, legend = choice
        if axis == BESIDE:
            all_h, all_w = max(height, legend.height), width + margin + legend.width
        else:
            all_h, all_w = height + margin + legend.height, max(width, legend.width)
        return max(all_w, SCREEN_RATIO * all_h), all_w * all_h

    # The legend that leaves the picture largest on a screen; of several such, the one with the least white.
    legends = [_Legend(entries, text_px, columns) for columns in range(1, len(entries) + 1)]
    axis, legend = min(itertools.product((BELOW, BESIDE), legends), key=screen_and_area)
    return framed(joined([picture_HW3, legend.draw()], axis=axis, gap=margin), margin)


def confidence_map(confidence_HW: np.ndarray) -> np.ndarray:
    """Confidences in [0, 1] as colours from dark violet (0) to yellow (1), ordered for the eye: viridis."""
    if not np.all((confidence_HW >= -ROUNDING) & (confidence_HW <= 1 + ROUNDING)):  # also catches NaN
        low, high = np.min(confidence_HW), np.max(confidence_HW)
        raise UserError(f"confidences run from {low:g} to {high:g}; they must lie between 0 and 1")
    level_HW = np.rint(np.clip(confidence_HW, 0, 1) * 255).astype(np.uint8)
    return _viridis(level_HW)


def with_color_bar(picture_HW3: np.ndarray, *, title: str = "confidence") -> np.ndarray:
    """A confidence map on white, with the scale of its colours below."""
    picture_HW3, text_px = _enlarged(picture_HW3)
    bar_width = max(text_width(title, text_px, bold=True), min(picture_HW3.shape[1], 28 * text_px))
    bar_h, line_h = text_px, round(1.7 * text_px)
    scale_HW3 = blank(line_h + bar_h + line_h, bar_width)
    write(scale_HW3, title, 0, text_px, text_px, bold=True)
    level_W = np.linspace(0, 255, bar_width).round().astype(np.uint8)
    scale_HW3[line_h : line_h + bar_h, :bar_width] = _viridis(np.tile(level_W, (bar_h, 1)))
    baseline = line_h + bar_h + round(1.3 * text_px)
    for tick in (0, 0.5, 1):
        left = round(tick * (bar_width - text_width(f"{tick:g}", text_px)))
        write(scale_HW3, f"{tick:g}", left, baseline, text_px, color=FAINT_INK)
    return framed(joined([_outlined(picture_HW3), scale_HW3], axis=BELOW, gap=text_px), text_px)


def comparison_sheet(
    examples: Sequence[Comparison | tuple[str, np.ndarray, np.ndarray, np.ndarray, float | None]],
    names: Sequence[str],
    colors: Sequence[Color],
    headline: str,
    *,
    tile_px: int = 256,
) -> np.ndarray:
    """Examples as image | truth | prediction with a caption each, under a headline, above one legend.

    examples: `Comparison`, or plain tuples of the same five things.
    tile_px: about the long side of a tile. Smaller images are enlarged by whole factors, larger ones reduced.
    """
    rows = [Comparison(*example) for example in examples]
    if not rows:
        raise UserError("a comparison sheet needs at least one example")
    for row in rows:
        for labels_HW in (row.truth_HW, row.prediction_HW):
            _check_sizes(row.image_HW3, labels_HW, f"{row.title}: ")
    triples = [_tiles(row, colors, tile_px) for row in rows]
    cell_w: int = max(6 * MIN_TEXT_PX, *(triple[0].shape[1] for triple in triples))  # room for a heading
    gap = max(4, round(tile_px / 32))
    block_w = 3 * cell_w + 2 * gap

    def width_of(blocks: int) -> int:
        return blocks * block_w + (blocks - 1) * 4 * gap

    def misfit(blocks: int) -> float:
        lines = range(0, len(rows), blocks)
        height = sum(max(t[0].shape[0] for t in triples[i : i + blocks]) + 3 * gap for i in lines)
        return abs(math.log(width_of(blocks) / float(height) / SCREEN_RATIO))

    blocks = min(range(1, min(3, len(rows)) + 1), key=misfit)
    width = width_of(blocks)
    text_px = max(MIN_TEXT_PX, round(width / 72))
    parts = [paragraph(headline, width, round(1.5 * text_px))] if headline else []
    heading_HW3 = _heading(cell_w, gap, text_px)
    drawn = [_block(row, triple, cell_w, gap, text_px) for row, triple in zip(rows, triples, strict=True)]
    lines = [[heading_HW3] * blocks, *(drawn[i : i + blocks] for i in range(0, len(drawn), blocks))]
    joined_lines = [joined(line, axis=BESIDE, gap=4 * gap) for line in lines]
    parts.append(joined(joined_lines, axis=BELOW, gap=round(0.5 * text_px)))
    entries = _entries_of(rows, names, colors)
    legends = (_Legend(entries, text_px, columns) for columns in range(len(entries), 0, -1))
    parts.append(
        next(legend for legend in legends if legend.rows == len(entries) or legend.width <= width).draw(width)
    )
    return framed(joined(parts, axis=BELOW, gap=round(1.1 * text_px)), 2 * text_px)


# Sheets.


def _tiles(row: Comparison, colors: Sequence[Color], tile_px: int) -> list[np.ndarray]:
    """Image, truth and prediction, all of one size. Maps keep exact colours: nearest, never blended."""
    pictures = [row.image_HW3, colorize(row.truth_HW, colors), colorize(row.prediction_HW, colors)]
    factor = tile_px / max(row.truth_HW.shape)
    if factor >= 1:
        pictures = [_enlarged_by(picture, round(factor)) for picture in pictures]
    else:
        size = reduced_size(row.truth_HW, tile_px)
        ways = (cv2.INTER_AREA, cv2.INTER_NEAREST, cv2.INTER_NEAREST)
        pictures = [cv2.resize(p, size, interpolation=way) for p, way in zip(pictures, ways, strict=True)]
    return [_outlined(picture) for picture in pictures]


def reduced_size(labels_HW: np.ndarray, edge_px: int) -> tuple[int, int]:
    """(width, height) in which the long edge has `edge_px`."""
    height, width = labels_HW.shape
    factor = edge_px / max(height, width)
    return max(1, round(width * factor)), max(1, round(height * factor))


def _heading(cell_w: int, gap: int, text_px: int) -> np.ndarray:
    heading_HW3 = blank(round(1.3 * text_px), 3 * cell_w + 2 * gap)
    for column, text in enumerate(("image", "truth", "prediction")):
        write(heading_HW3, text, column * (cell_w + gap), text_px, text_px, bold=True)
    return heading_HW3


def _block(row: Comparison, triple: list[np.ndarray], cell_w: int, gap: int, text_px: int) -> np.ndarray:
    """Three tiles and their caption."""
    height, width = triple[0].shape[:2]
    block_HW3 = blank(height + round(1.9 * text_px), 3 * cell_w + 2 * gap)
    for column, tile in enumerate(triple):
        block_HW3[:height, column * (cell_w + gap) :][:, :width] = tile
    baseline = height + round(1.35 * text_px)
    room = 2 * (cell_w + gap) + width
    if row.score is not None:
        score = f"mIoU {row.score:.2f}"
        room -= text_width(score, text_px, bold=True)
        write(block_HW3, score, room, baseline, text_px, bold=True)
        room -= text_px
    write(block_HW3, shortened(row.title, text_px, room), 0, baseline, text_px, color=FAINT_INK)
    return block_HW3


def _entries_of(rows: Sequence[Comparison], names: Sequence[str], colors: Sequence[Color]) -> list[_Entry]:
    """Classes that occur in any truth or prediction, in the order of their ids; then the ignored pixels."""
    maps = [labels for row in rows for labels in (row.truth_HW, row.prediction_HW)]
    occurring = np.unique(np.concatenate([np.unique(labels_HW) for labels_HW in maps]))
    entries = [_Entry(colors[i], names[i], "") for i in occurring if i != IGNORE_INDEX]
    if IGNORE_INDEX in occurring:
        entries.append(_Entry(IGNORED_COLOR, "ignored", ""))
    return entries


# Legends.


class _Entry(NamedTuple):
    color: Color
    name: str
    share: str


class _Legend:
    """Swatch, name and share of every entry, in columns that entries run down. All measures in px."""

    def __init__(self, entries: Sequence[_Entry], text_px: int, columns: int) -> None:
        self.text_px = text_px
        longest = LONGEST_NAME_EM * text_px
        self.entries = [entry._replace(name=shortened(entry.name, text_px, longest)) for entry in entries]
        name_w, share_w = (
            max(text_width(text, text_px) for text in texts)
            for texts in ([e.name for e in self.entries], [e.share for e in entries])
        )
        self.rows = math.ceil(len(entries) / columns)
        self.gaps = math.ceil(len(entries) / self.rows) - 1
        self.column_w = round(1.6 * text_px) + name_w + (round(0.9 * text_px) + share_w if share_w else 0)
        self.row_h, self.gap_w = round(1.65 * text_px), round(1.8 * text_px)
        self.height = self.rows * self.row_h
        self.width = (self.gaps + 1) * self.column_w + self.gaps * self.gap_w

    def draw(self, width: int | None = None) -> np.ndarray:
        """The columns spread over `width` within reason."""
        text_px, gap = self.text_px, self.gap_w
        if width is not None and self.gaps:
            gap = min(gap + (width - self.width) // self.gaps, WIDEST_GAP_EM * text_px)
        legend_HW3 = blank(self.height, self.width + self.gaps * (gap - self.gap_w))
        line = max(1, text_px // 16)
        for index, entry in enumerate(self.entries):
            column, row = divmod(index, self.rows)
            left, top = column * (self.column_w + gap), row * self.row_h + (self.row_h - text_px) // 2
            swatch_HW3 = legend_HW3[top : top + text_px, left : left + text_px]
            swatch_HW3[:] = OUTLINE
            swatch_HW3[line:-line, line:-line] = entry.color
            baseline = top + round(0.86 * text_px)
            write(legend_HW3, entry.name, left + round(1.6 * text_px), baseline, text_px)
            right = left + self.column_w - text_width(entry.share, text_px)
            write(legend_HW3, entry.share, right, baseline, text_px, color=FAINT_INK)
        return legend_HW3


def _percent(share: float) -> str:
    return "<0.1%" if 0 < share < 0.0005 else f"{share:.1%}"


# Pixels.


def _check_ids(labels_HW: np.ndarray, num_classes: int) -> None:
    if labels_HW.ndim != 2 or labels_HW.dtype.kind not in "iu":
        raise UserError(
            f"labels are {labels_HW.dtype} of shape {list(labels_HW.shape)}; expected one integer per pixel"
        )
    ids = np.unique(labels_HW)
    if wrong := [int(i) for i in ids if not 0 <= i < num_classes and i != IGNORE_INDEX]:
        raise UserError(
            f"labels have ids {_listed(wrong)}; there are {num_classes} classes, "
            f"ids 0 to {num_classes - 1}, and {IGNORE_INDEX} is ignored"
        )


def _check_sizes(image_HW3: np.ndarray, labels_HW: np.ndarray, where: str = "") -> None:
    if image_HW3.shape != (*labels_HW.shape, 3):
        image, labels = (" x ".join(str(n) for n in a.shape) for a in (image_HW3, labels_HW))
        raise UserError(f"{where}image is {image}, labels are {labels}; expected H x W x 3 and H x W")


def _viridis(level_HW: np.ndarray) -> np.ndarray:
    return cv2.cvtColor(cv2.applyColorMap(level_HW, cv2.COLORMAP_VIRIDIS), cv2.COLOR_BGR2RGB)


def _enlarged(picture_HW3: np.ndarray) -> tuple[np.ndarray, int]:
    """The picture in a size that has room for text, and the text's size in px."""
    picture_HW3 = _enlarged_by(picture_HW3, math.ceil(MIN_PICTURE_PX / max(picture_HW3.shape[:2])))
    return picture_HW3, max(MIN_TEXT_PX, round(max(picture_HW3.shape[:2]) / 64))


def _enlarged_by(picture_HW3: np.ndarray, factor: int) -> np.ndarray:
    return picture_HW3.repeat(factor, axis=0).repeat(factor, axis=1) if factor > 1 else picture_HW3


def joined(pictures: Sequence[np.ndarray], *, axis: int, gap: int) -> np.ndarray:
    """Pictures below (axis 0) or beside (axis 1) each other, aligned at the left or top."""
    across = 1 - axis
    size = [0, 0]
    size[axis] = sum(p.shape[axis] for p in pictures) + gap * (len(pictures) - 1)
    size[across] = max(p.shape[across] for p in pictures)
    canvas_HW3 = blank(*size)
    at = [0, 0]
    for picture in pictures:
        canvas_HW3[at[0] :, at[1] :][: picture.shape[0], : picture.shape[1]] = picture
        at[axis] += picture.shape[axis] + gap
    return canvas_HW3


def framed(picture_HW3: np.ndarray, px: int, color: Color = WHITE) -> np.ndarray:
    return np.asarray(cv2.copyMakeBorder(picture_HW3, px, px, px, px, cv2.BORDER_CONSTANT, value=color))


def _outlined(picture_HW3: np.ndarray) -> np.ndarray:
    """A hairline around the picture: snow would melt into the page."""
    return framed(picture_HW3, 1, OUTLINE)


def _listed(ids: Sequence[int]) -> str:
    return ", ".join(str(i) for i in ids[:8]) + (" ..." if len(ids) > 8 else "")

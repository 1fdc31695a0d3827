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
    return np.take(_color_table(colors), labels_HW, axis=0)


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
    shown_ids: Sequence[int],
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
    picture_HW3 = _enlarged(picture_HW3, MIN_PICTURE_PX)
    height, width = picture_HW3.shape[:2]
    text_px = max(MIN_TEXT_PX, round(max(height, width) / 64))
    margin = text_px

    picture_HW3 = _outlined(picture_HW3)
    if not entries:
        return _framed(picture_HW3, margin)

    def screen_and_area(choice: tuple[int, int]) -> tuple[float, int]:
        axis, columns = choice
        legend_h, legend_w = _legend_size(entries, text_px, columns)
        if axis == BESIDE:
            all_h, all_w = max(height, legend_h), width + margin + legend_w
        else:
            all_h, all_w = height + margin + legend_h, max(width, legend_w)
        return max(all_w, SCREEN_RATIO * all_h), all_w * all_h

    # The legend that leaves the picture largest on a screen; of several such, the one with the least white.
    choices = itertools.product((BELOW, BESIDE), range(1, len(entries) + 1))
    axis, columns = min(choices, key=screen_and_area)
    return _framed(_joined([picture_HW3, _legend(entries, text_px, columns)], axis=axis, gap=margin), margin)


def confidence_map(confidence_HW: np.ndarray) -> np.ndarray:
    """Confidences in [0, 1] as colours from dark violet (0) to yellow (1), ordered for the eye: viridis."""
    if not np.all((confidence_HW >= -ROUNDING) & (confidence_HW <= 1 + ROUNDING)):  # also catches NaN
        low, high = np.min(confidence_HW), np.max(confidence_HW)
        raise UserError(f"confidences run from {low:g} to {high:g}; they must lie between 0 and 1")
    level_HW = np.rint(np.clip(confidence_HW, 0, 1) * 255).astype(np.uint8)
    return _viridis(level_HW)


def with_color_bar(picture_HW3: np.ndarray, *, title: str = "confidence") -> np.ndarray:
    """A confidence map on white, with the scale of its colours below."""
    picture_HW3 = _enlarged(picture_HW3, MIN_PICTURE_PX)
    height, width = picture_HW3.shape[:2]
    text_px = max(MIN_TEXT_PX, round(max(height, width) / 64))
    bar_width = max(text_width(title, text_px, bold=True), min(width, 28 * text_px))
    bar_h, line_h = text_px, round(1.7 * text_px)
    scale_HW3 = blank(line_h + bar_h + line_h, bar_width)
    write(scale_HW3, title, 0, text_px, text_px, bold=True)
    level_W = np.linspace(0, 255, bar_width).round().astype(np.uint8)
    scale_HW3[line_h : line_h + bar_h, :bar_width] = _viridis(np.tile(level_W, (bar_h, 1)))
    baseline = line_h + bar_h + round(1.3 * text_px)
    for tick in (0, 0.5, 1):
        left = round(tick * (bar_width - text_width(f"{tick:g}", text_px)))
        write(scale_HW3, f"{tick:g}", left, baseline, text_px, color=FAINT_INK)
    return _framed(_joined([_outlined(picture_HW3), scale_HW3], axis=BELOW, gap=text_px), text_px)


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
    lines = [_headings(blocks, width, cell_w, gap, text_px)]
    for first in range(0, len(rows), blocks):
        block = slice(first, first + blocks)
        tallest = max(triple[0].shape[0] for triple in triples[block])
        line_HW3 = blank(tallest + round(1.9 * text_px), width)
        for i, (row, triple) in enumerate(zip(rows[block], triples[block], strict=True)):
            _draw_block(line_HW3, row, triple, i * (block_w + 4 * gap), cell_w + gap, text_px)
        lines.append(line_HW3)
    parts.append(_joined(lines, axis=BELOW, gap=round(0.5 * text_px)))
    entries = _entries_of(rows, names, colors)
    columns = range(len(entries), 0, -1)
    fitting = next(c for c in columns if c == 1 or _legend_size(entries, text_px, c)[1] <= width)
    parts.append(_legend(entries, text_px, fitting, width))
    return _framed(_joined(parts, axis=BELOW, gap=round(1.1 * text_px)), 2 * text_px)


# Sheets.


def _tiles(row: Comparison, colors: Sequence[Color], tile_px: int) -> list[np.ndarray]:
    """Image, truth and prediction, all of one size. Maps keep exact colours: nearest, never blended."""
    pictures = [row.image_HW3, colorize(row.truth_HW, colors), colorize(row.prediction_HW, colors)]
    height, width = row.truth_HW.shape
    factor = tile_px / max(height, width)
    if factor >= 1:
        pictures = [_enlarged_by(picture, round(factor)) for picture in pictures]
    else:
        size = (max(1, round(width * factor)), max(1, round(height * factor)))
        ways = (cv2.INTER_AREA, cv2.INTER_NEAREST, cv2.INTER_NEAREST)
        pictures = [cv2.resize(p, size, interpolation=way) for p, way in zip(pictures, ways, strict=True)]
    return [_outlined(picture) for picture in pictures]


def _headings(blocks: int, width: int, cell_w: int, gap: int, text_px: int) -> np.ndarray:
    line_HW3 = blank(round(1.3 * text_px), width)
    for block in range(blocks):
        for column, heading in enumerate(("image", "truth", "prediction")):
            left = block * (3 * cell_w + 6 * gap) + column * (cell_w + gap)
            write(line_HW3, heading, left, text_px, text_px, bold=True)
    return line_HW3


def _draw_block(
    line_HW3: np.ndarray,
    row: Comparison,
    triple: list[np.ndarray],
    left: int,
    pitch: int,
    text_px: int,
) -> None:
    """Three tiles, `pitch` px from one to the next, and their caption, into the line at `left`."""
    height, width = triple[0].shape[:2]
    for column, tile in enumerate(triple):
        line_HW3[:height, left + column * pitch :][:, :width] = tile
    baseline = height + round(1.35 * text_px)
    room = 2 * pitch + width
    if row.score is not None:
        score = f"mIoU {row.score:.2f}"
        room -= text_width(score, text_px, bold=True)
        write(line_HW3, score, left + room, baseline, text_px, bold=True)
        room -= text_px
    write(line_HW3, shortened(row.title, text_px, room), left, baseline, text_px, color=FAINT_INK)


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


class _LegendGrid(NamedTuple):
    """A legend's measures in px. Entries run down the columns."""

    rows: int
    row_h: int
    column_w: int
    column_gap: int


def _legend_grid(entries: Sequence[_Entry], text_px: int, columns: int) -> _LegendGrid:
    name_w = max(text_width(_short_name(e.name, text_px), text_px) for e in entries)
    share_w = max(text_width(e.share, text_px) for e in entries)
    return _LegendGrid(
        rows=math.ceil(len(entries) / columns),
        row_h=round(1.65 * text_px),
        column_w=round(1.6 * text_px) + name_w + (round(0.9 * text_px) + share_w if share_w else 0),
        column_gap=round(1.8 * text_px),
    )


def _legend_size(entries: Sequence[_Entry], text_px: int, columns: int) -> tuple[int, int]:
    """Height and width in px."""
    grid = _legend_grid(entries, text_px, columns)
    used = math.ceil(len(entries) / grid.rows)
    return grid.rows * grid.row_h, used * grid.column_w + (used - 1) * grid.column_gap


def _legend(entries: Sequence[_Entry], text_px: int, columns: int, width: int | None = None) -> np.ndarray:
    """Swatch, name and share of every entry, in columns, which spread over `width` within reason."""
    grid = _legend_grid(entries, text_px, columns)
    height, least_width = _legend_size(entries, text_px, columns)
    gap, gaps = grid.column_gap, math.ceil(len(entries) / grid.rows) - 1
    if width is not None and gaps:
        gap = min(gap + (width - least_width) // gaps, WIDEST_GAP_EM * text_px)
    legend_HW3 = blank(height, least_width + gaps * (gap - grid.column_gap))
    for index, entry in enumerate(entries):
        column, row = divmod(index, grid.rows)
        left = column * (grid.column_w + gap)
        top = row * grid.row_h + (grid.row_h - text_px) // 2
        cv2.rectangle(legend_HW3, (left, top), (left + text_px - 1, top + text_px - 1), OUTLINE, cv2.FILLED)
        line = max(1, text_px // 16)
        legend_HW3[top + line : top + text_px - line, left + line : left + text_px - line] = entry.color
        baseline = top + round(0.86 * text_px)
        name = _short_name(entry.name, text_px)
        write(legend_HW3, name, left + round(1.6 * text_px), baseline, text_px)
        right = left + grid.column_w - text_width(entry.share, text_px)
        write(legend_HW3, entry.share, right, baseline, text_px, color=FAINT_INK)
    return legend_HW3


def _percent(share: float) -> str:
    return "<0.1%" if 0 < share < 0.0005 else f"{share:.1%}"


def _short_name(name: str, text_px: int) -> str:
    return shortened(name, text_px, LONGEST_NAME_EM * text_px)


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


def _color_table(colors: Sequence[Color]) -> np.ndarray:
    table = np.empty((IGNORE_INDEX + 1, 3), np.uint8)
    table[:] = IGNORED_COLOR
    table[: len(colors)] = np.asarray(colors, np.uint8).reshape(-1, 3)
    return table


def _viridis(level_HW: np.ndarray) -> np.ndarray:
    return cv2.cvtColor(cv2.applyColorMap(level_HW, cv2.COLORMAP_VIRIDIS), cv2.COLOR_BGR2RGB)


def _enlarged(picture_HW3: np.ndarray, least_px: int) -> np.ndarray:
    return _enlarged_by(picture_HW3, math.ceil(least_px / max(picture_HW3.shape[:2])))


def _enlarged_by(picture_HW3: np.ndarray, factor: int) -> np.ndarray:
    return picture_HW3.repeat(factor, axis=0).repeat(factor, axis=1) if factor > 1 else picture_HW3


def _joined(pictures: Sequence[np.ndarray], *, axis: int, gap: int) -> np.ndarray:
    """Pictures below (axis 0) or beside (axis 1) each other, aligned at the left or top."""
    across = 1 - axis
    size = [0, 0]
    size[axis] = sum(p.shape[axis] for p in pictures) + gap * (len(pictures) - 1)
    size[across] = max(p.shape[across] for p in pictures)
    canvas_HW3 = blank(*size)
    at = [0, 0]
    for picture in pictures:
        canvas_HW3[at[0] : at[0] + picture.shape[0], at[1] : at[1] + picture.shape[1]] = picture
        at[axis] += picture.shape[axis] + gap
    return canvas_HW3


def _bordered(picture_HW3: np.ndarray, px: int, color: Color) -> np.ndarray:
    return np.asarray(cv2.copyMakeBorder(picture_HW3, px, px, px, px, cv2.BORDER_CONSTANT, value=color))


def _framed(picture_HW3: np.ndarray, margin: int) -> np.ndarray:
    return _bordered(picture_HW3, margin, WHITE)


def _outlined(picture_HW3: np.ndarray) -> np.ndarray:
    """A hairline around the picture: snow would melt into the page."""
    return _bordered(picture_HW3, 1, OUTLINE)


def _listed(ids: Sequence[int]) -> str:
    return ", ".join(str(i) for i in ids[:8]) + (" ..." if len(ids) > 8 else "")

"""Draw gains with their intervals, and the paper's beside them, as an RGB array.

H height, W width, 3 RGB, uint8. A row is a line: a dot for the mean gain, a bar for its interval, small dots
for single seeds, a diamond for the paper's gain. Figures in percent points.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import cv2
import numpy as np

from segdeformer.report.lettering import (
    FAINT_INK,
    INK,
    Color,
    blank,
    paragraph,
    shortened,
    text_width,
    wrapped,
    write,
)

OURS: Color = (31, 99, 166)
SEED: Color = (142, 184, 224)
PAPER: Color = (204, 96, 28)
GRID: Color = (228, 231, 234)
ZERO: Color = (148, 154, 160)

TEXT_PX, SMALL_PX, TITLE_PX = 22, 19, 28
LINE_PX = 58  # from row to row
MARGIN_PX = 36
PLOT_PX = 720  # of the axis
WIDEST_NAME_PX = 460
FINER = 4  # shapes are drawn so many times larger, and reduced
MOST_TICKS = 9
LEAST_REACH = 0.1  # points, of the axis


class GainLine(NamedTuple):
    """A row of the plot. gain, low, high: None when there is no run yet. note: instead of them."""

    name: str
    gain: float | None = None
    low: float | None = None
    high: float | None = None
    each_seed: tuple[float, ...] = ()
    paper: float | None = None
    note: str = ""


def gains_plot(lines: Sequence[GainLine], *, title: str, subtitle: str) -> np.ndarray:
    """One picture for any number of rows, (H, W, 3); at least one row."""
    assert lines, "a plot of no rows"
    name_px = min(WIDEST_NAME_PX, max(text_width(line.name, TEXT_PX) for line in lines))
    value_px = max(text_width(_value_text(line), SMALL_PX) for line in lines)
    left = MARGIN_PX + name_px + 28
    width = left + PLOT_PX + 28 + value_px + MARGIN_PX
    heading = paragraph(title, width - 2 * MARGIN_PX, TITLE_PX)
    told = wrapped(subtitle, SMALL_PX, width - 2 * MARGIN_PX)
    top = MARGIN_PX + heading.shape[0] + round(1.45 * SMALL_PX * len(told)) + 56
    bottom = top + LINE_PX * len(lines)
    canvas_HW3 = blank(bottom + 132, width)
    canvas_HW3[MARGIN_PX : MARGIN_PX + heading.shape[0], MARGIN_PX : width - MARGIN_PX] = heading
    for number, text in enumerate(told):
        baseline = MARGIN_PX + heading.shape[0] + round(1.45 * SMALL_PX * (number + 1))
        write(canvas_HW3, text, MARGIN_PX, baseline, SMALL_PX, color=FAINT_INK)

    axis = _axis(lines, left)
    for tick in axis.ticks:
        x = axis.x(tick)
        color = ZERO if tick == 0 else GRID
        canvas_HW3[top - 10 : bottom + 4, x - 1 : x + 1] = color
        text = "0" if tick == 0 else f"{tick:+.{axis.decimals}f}"
        write(canvas_HW3, text, x - text_width(text, SMALL_PX) // 2, bottom + 30, SMALL_PX, color=FAINT_INK)
    for number, line in enumerate(lines):
        _draw_line(canvas_HW3, line, axis, top + LINE_PX * number + LINE_PX // 2, name_px)
    _draw_legend(canvas_HW3, bottom + 84, left, lines)
    return canvas_HW3


class _Axis(NamedTuple):
    """The range, and where it lies: from points to px."""

    left: int
    ticks: tuple[float, ...]
    decimals: int

    def x(self, value: float) -> int:
        low, high = self.ticks[0], self.ticks[-1]
        return self.left + round(PLOT_PX * (value - low) / (high - low))


def _axis(lines: Sequence[GainLine], left: int) -> _Axis:
    """A range with zero and all figures in it, and round ticks."""
    values = [0.0]
    for line in lines:
        values += [v for v in (line.gain, line.low, line.high, line.paper, *line.each_seed) if v is not None]
    low, high = min(values), max(max(values), min(values) + LEAST_REACH)
    reach = high - low
    size = 10.0 ** math.floor(math.log10(reach / MOST_TICKS))
    step = next(size * m for m in (1, 2, 5, 10, 20) if reach / (size * m) <= MOST_TICKS - 2)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    ticks = tuple(round(step * i, 9) for i in range(first, max(last, first + 1) + 1))
    return _Axis(left, ticks, max(0, -math.floor(math.log10(step) + 1e-9)))


def _value_text(line: GainLine) -> str:
    if line.gain is None or line.low is None or line.high is None:
        return line.note
    return f"{line.gain:+.2f}  ({line.low:+.2f} to {line.high:+.2f})"


def _draw_line(canvas_HW3: np.ndarray, line: GainLine, axis: _Axis, y: int, name_px: int) -> None:
    name = shortened(line.name, TEXT_PX, name_px)
    write(canvas_HW3, name, MARGIN_PX, y + round(0.35 * TEXT_PX), TEXT_PX)
    text = _value_text(line)
    color = FAINT_INK if line.gain is None else INK
    write(canvas_HW3, text, axis.left + PLOT_PX + 28, y + round(0.35 * SMALL_PX), SMALL_PX, color=color)
    strip = canvas_HW3[y - LINE_PX // 2 : y + LINE_PX // 2, : axis.left + PLOT_PX + 24]
    middle = LINE_PX // 2
    shapes = _Shapes(strip)
    if line.gain is not None and line.low is not None and line.high is not None:
        seeds = [axis.x(gain) for gain in line.each_seed]
        shapes.interval(axis.x(line.low), axis.x(line.high), middle, OURS, seeds)
        shapes.dot(axis.x(line.gain), middle, 9, OURS)
    if line.paper is not None:
        shapes.diamond(axis.x(line.paper), middle, 11, PAPER)
    shapes.finish()


def _draw_legend(canvas_HW3: np.ndarray, y: int, left: int, lines: Sequence[GainLine]) -> None:
    """Centred below the axis."""
    entries = [("gain and 95 % interval", 46, "bar")]
    if any(len(line.each_seed) > 1 for line in lines):
        entries.append(("single seeds", 18, "seed"))
    if any(line.paper is not None for line in lines):
        entries.append(("paper (ADE20K)", 24, "paper"))
    gap = 44
    total = sum(mark + 12 + text_width(text, SMALL_PX) + gap for text, mark, _ in entries) - gap
    x = max(MARGIN_PX, left + (PLOT_PX - total) // 2)
    for text, mark, kind in entries:
        shapes = _Shapes(canvas_HW3[y - 20 : y + 20])
        match kind:
            case "bar":
                shapes.interval(x + 4, x + mark - 4, 20, OURS)
                shapes.dot(x + mark // 2, 20, 9, OURS)
            case "seed":
                shapes.dot(x + mark // 2, 20, 6, SEED)
            case _:
                shapes.diamond(x + mark // 2, 20, 11, PAPER)
        shapes.finish()
        write(canvas_HW3, text, x + mark + 12, y + round(0.35 * SMALL_PX), SMALL_PX, color=FAINT_INK)
        x += mark + 12 + text_width(text, SMALL_PX) + gap


class _Shapes:
    """Smooth shapes on a part of a canvas: drawn large, reduced at the end."""

    def __init__(self, under_HW3: np.ndarray) -> None:
        self.under_HW3 = under_HW3
        self.large_HW3 = under_HW3.repeat(FINER, axis=0).repeat(FINER, axis=1)

    def interval(self, left: int, right: int, y: int, color: Color, seeds: Sequence[int] = ()) -> None:
        """A line from end to end, dots on it, and its ends above dots that lie there."""
        self._box(left, right, y, 2, color)
        for x in seeds:
            self.dot(x, y, 6, SEED)
        self._box(left - 1, left + 2, y, 9, color)
        self._box(right - 2, right + 1, y, 9, color)

    def dot(self, x: int, y: int, radius: int, color: Color) -> None:
        """On a white rim, so that it is seen on a bar of its colour."""
        center = (FINER * x, FINER * y)
        cv2.circle(self.large_HW3, center, FINER * (radius + 2), (255, 255, 255), cv2.FILLED)
        cv2.circle(self.large_HW3, center, FINER * radius, color, cv2.FILLED)

    def diamond(self, x: int, y: int, radius: int, color: Color) -> None:
        """Hollow: what lies under it stays visible."""
        corners = FINER * np.array([[x - radius, y], [x, y - radius], [x + radius, y], [x, y + radius]])
        cv2.polylines(self.large_HW3, [corners.astype(np.int32)], True, color, 3 * FINER)

    def _box(self, left: int, right: int, y: int, half: int, color: Color) -> None:
        corner = (FINER * left, FINER * (y - half))
        cv2.rectangle(self.large_HW3, corner, (FINER * right, FINER * (y + half)), color, cv2.FILLED)

    def finish(self) -> None:
        """Put them onto the canvas."""
        height, width = self.under_HW3.shape[:2]
        self.under_HW3[:] = cv2.resize(self.large_HW3, (width, height), interpolation=cv2.INTER_AREA)

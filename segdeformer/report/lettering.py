"""Write text into RGB arrays. H height, W width, 3 RGB.

OpenCV 5 has a TrueType font, OpenCV 4 strokes; drawn larger and reduced, both look smooth.
"""

from __future__ import annotations

import math
import unicodedata
from functools import cache

import cv2
import numpy as np

Color = tuple[int, int, int]
WHITE: Color = (255, 255, 255)
INK: Color = (28, 32, 36)
FAINT_INK: Color = (104, 111, 118)


def blank(height: int, width: int) -> np.ndarray:
    """A white canvas, (height, width, 3)."""
    return np.full((height, width, 3), WHITE, np.uint8)


@cache
def _font() -> cv2.FontFace | None:
    return cv2.FontFace("sans") if hasattr(cv2, "FontFace") else None


@cache
def _glyphs(text: str, size_px: int, bold: bool) -> np.ndarray:
    """Coverage in [0, 1] of a line of text, float32; the baseline is `size_px` below the top."""
    if not text:
        return np.zeros((1, 0), np.float32)
    text = text.encode("utf-8", "replace").decode()  # OpenCV crashes on what is no text in a file's name
    finer, font = 3, _font()
    size, weight = finer * size_px, 600 if bold else 400
    height = finer * math.ceil(1.4 * size_px)
    if font is not None:
        _, _, width, _ = cv2.getTextSize((0, 0), text, (0, 0), font, size, weight)
        mask_HW = np.zeros((height, finer * math.ceil(width / finer + 0.2 * size_px)), np.uint8)
        cv2.putText(mask_HW, text, (0, size), (255,), font, size, weight)
    else:
        text = _in_ascii(text)
        scale, thickness = 0.72 * size / 21, max(1, round(size * (0.13 if bold else 0.085)))
        (width, _), _ = cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, scale, thickness)
        mask_HW = np.zeros((height, finer * math.ceil(width / finer + 0.2 * size_px)), np.uint8)
        cv2.putText(mask_HW, text, (0, size), cv2.FONT_HERSHEY_SIMPLEX, scale, (255,), thickness, cv2.LINE_AA)
    fine = cv2.resize(mask_HW, None, fx=1 / finer, fy=1 / finer, interpolation=cv2.INTER_AREA)
    used = np.flatnonzero(fine.any(axis=0))
    return fine[:, : used[-1] + 1 if used.size else 0].astype(np.float32) / 255


def _in_ascii(text: str) -> str:
    """As near as strokes can write it: accents dropped, other letters as question marks."""
    parts = unicodedata.normalize("NFKD", text.replace("°", " "))  # NFKD also makes an ellipsis three dots
    return "".join(c for c in parts if not unicodedata.combining(c)).encode("ascii", "replace").decode()


def text_width(text: str, size_px: int, *, bold: bool = False) -> int:
    """Width in px of the line that `write` draws."""
    return int(_glyphs(text, size_px, bold).shape[1])


def write(
    canvas_HW3: np.ndarray,
    text: str,
    left: int,
    baseline: int,
    size_px: int,
    *,
    color: Color = INK,
    bold: bool = False,
) -> None:
    """Draw a line of text onto the canvas. What would leave the canvas is a mistake of ours."""
    coverage = _glyphs(text, size_px, bold)
    top = max(0, baseline - size_px)
    coverage = coverage[max(0, size_px - baseline) :][: canvas_HW3.shape[0] - top]
    assert 0 <= left <= canvas_HW3.shape[1] - coverage.shape[1], f"{text!r} is clipped"
    under = canvas_HW3[top : top + coverage.shape[0], left : left + coverage.shape[1]]
    under[:] = np.rint(under + (np.array(color, np.float32) - under) * coverage[:, :, None])


def shortened(text: str, size_px: int, room_px: int) -> str:
    """The text, or as much of its beginning as fits with an ellipsis."""
    if text_width(text, size_px) <= room_px:
        return text
    for end in range(len(text) - 1, 0, -1):
        short = text[:end].rstrip() + "…"
        if text_width(short, size_px) <= room_px:
            return short
    return ""


def wrapped(
    text: str, size_px: int, width: int, *, bold: bool = False, longest_word: int | None = None
) -> list[str]:
    """Lines broken between words; a word that is longer than a line, or `longest_word`, is shortened."""
    lines: list[str] = []
    for word in text.split():
        line = f"{lines[-1]} {word}" if lines else word
        if lines and text_width(line, size_px, bold=bold) <= width:
            lines[-1] = line
        else:
            lines.append(shortened(word, size_px, longest_word or width))
    return lines


def paragraph(text: str, width: int, size_px: int) -> np.ndarray:
    """Bold text, wrapped between words."""
    lines = wrapped(text, size_px, width, bold=True, longest_word=round(0.9 * width))
    paragraph_HW3 = blank(round(1.35 * size_px * len(lines)), width)
    for i, line in enumerate(lines):
        write(paragraph_HW3, line, 0, round(1.35 * size_px * i) + size_px, size_px, bold=True)
    return paragraph_HW3

"""Images and label maps, from and to files.

H height, W width. Colours are RGB everywhere in the project; OpenCV's BGR does not leave this file.
"""

from __future__ import annotations

import logging
import warnings
import zlib
from pathlib import Path

import cv2
import numpy as np

from segdeformer.data.formats import (
    JPEG_START,
    PNG_START,
    bands_of,
    declared_size,
    lossy_format,
    tiff_kind,
)
from segdeformer.errors import UserError
from segdeformer.files import replacing

# Both are settings of the whole process. Its errors are reported by us, in one line. Its threads would
# fight with the loader's worker processes, and forking a process that has started them can hang.
if hasattr(cv2, "setLogLevel"):
    cv2.setLogLevel(0)
else:  # its place in newer releases
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
cv2.setNumThreads(0)
logging.getLogger("PIL").addHandler(logging.NullHandler())  # nor does Pillow print what it cannot open

PNG_PALETTE, PNG_GREY = b"\x03", b"\x00"  # colour types
JPEG_SCAN, JPEG_END = b"\xff\xda", b"\xff\xd9"
MOST_PIXELS = 2**29  # 23,170 squared; 1.5 GiB as RGB
MOST_BYTES = 2**31  # of a file
ONE_ID = "save one id per pixel (8-bit grey PNG)"


class NotIdsError(UserError):
    """A readable picture stands where a label map should be."""


class LossyLabelsError(UserError):
    """Label ids were saved in a format that changes them."""


def read_image(path: Path) -> np.ndarray:
    """Read any image as (H, W, 3) uint8 RGB, turned as its EXIF orientation says.

    Grey and palette images become RGB, alpha is dropped, the 65536 levels of 16 bits become 256.
    Raises `UserError` when there is no such file or it cannot be decoded whole.
    """
    data = _read_bytes(path)
    if data.startswith(PNG_START):
        data = _plain_png(data, path, keep=(b"IHDR", b"PLTE", b"IDAT", b"eXIf", b"IEND"))
    pixels = _decode(data, cv2.IMREAD_COLOR | cv2.IMREAD_ANYDEPTH, path)
    if pixels.dtype == np.uint16:
        pixels = ((pixels.astype(np.uint32) + 128) // 257).astype(np.uint8)
    if pixels.dtype != np.uint8:
        kind = tiff_kind(data)  # OpenCV has made it three channels
        raise _unusual(path, kind.words() if kind else bands_of(pixels.shape[2], pixels.dtype))
    return cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB, dst=pixels)


def image_size(path: Path) -> tuple[int, int] | None:
    """(height, width) in px by an image's header, turned as its EXIF orientation says; None without one."""
    from PIL import Image

    try:
        with warnings.catch_warnings(action="ignore"), Image.open(path) as image:
            width, height = image.size
            is_turned = image.getexif().get(0x0112, 1) >= 5  # the orientations that swap the sides
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
    return (width, height) if is_turned else (height, width)


def read_labels(path: Path) -> np.ndarray:
    """Read a label map as (H, W) integers, exactly as stored; of a palette PNG the indices, not the colours.

    Raises `UserError` when there is no such file or it cannot be decoded whole; `NotIdsError` for colours,
    fractions and channels that differ, `LossyLabelsError` for formats that change ids.
    """
    data = _read_bytes(path)
    bits = 8
    if data.startswith(PNG_START):
        data = _plain_png(data, path, keep=(b"IHDR", b"IDAT", b"IEND"))
        bits = data[24]
    kind = tiff_kind(data)
    if kind is not None and kind.bands == 1 and kind.dtype.startswith("float"):
        raise _fractions(path, kind.dtype)
    if kind is not None and kind.bands > 4:
        raise NotIdsError(f"{path}: {kind.words()} where class ids should be; {ONE_ID}")
    pixels = _decode(data, cv2.IMREAD_UNCHANGED, path)
    if lossy := lossy_format(data):
        raise LossyLabelsError(
            f"{path}: {lossy} inside, which changes ids; save label maps as PNG from their source"
        )
    if bits < 8:
        pixels //= 255 // (2**bits - 1)  # OpenCV stretches 1, 2 and 4 bits to the range of 8
    return _one_channel(pixels, data, path)


def _one_channel(pixels: np.ndarray, data: bytes, path: Path) -> np.ndarray:
    """The ids of decoded pixels; a `NotIdsError` where channels differ or hold fractions."""
    kind = tiff_kind(data)
    if kind is not None and kind.bands > 1 and pixels.ndim == 2:  # OpenCV has dropped the others
        raise NotIdsError(f"{path}: {kind.words()} where class ids should be; {ONE_ID}")
    if pixels.ndim == 3:
        first, others = pixels[:, :, :1], pixels[:, :, 1:3]
        if not (others == first).all():
            raise NotIdsError(f"{path}: colours where class ids should be; {ONE_ID}")
        alpha = pixels[:, :, 3:]
        if alpha.size and np.ptp(alpha) and not (alpha == first).all():
            raise NotIdsError(f"{path}: 4 channels that differ where class ids should be; {ONE_ID}")
        pixels = pixels[:, :, 0]
    if pixels.dtype.kind == "f":
        raise _fractions(path, pixels.dtype)
    return pixels


def _fractions(path: Path, dtype: object) -> NotIdsError:
    return NotIdsError(f"{path}: label ids are {dtype}; save them as integers (8-bit grey PNG)")


def write_png(path: Path, pixels: np.ndarray) -> None:
    """Write (H, W) uint8 or uint16, or (H, W, 3) uint8 RGB: the whole file, or none and a `UserError`."""
    if pixels.ndim == 3:
        pixels = cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR)
    encoded = cv2.imencode(".png", pixels)[1]
    with replacing(path) as aside:
        aside.write_bytes(encoded.data)


def _read_bytes(path: Path) -> bytes:
    try:
        num_bytes = path.stat().st_size
        if num_bytes > MOST_BYTES:
            raise UserError(
                f"{path}: {num_bytes / 2**30:.1f} GiB are more than the {MOST_BYTES / 2**30:.0f} GiB "
                "of a file that are read at once; cut it into tiles"
            )
        return path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; check the path") from None
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror}); check the path and its permissions"
        ) from None


def _decode(data: bytes, flags: int, path: Path) -> np.ndarray:
    if data.startswith(JPEG_START) and not _jpeg_has_end(data):
        raise _unreadable(path)  # older OpenCV would fill up the image with grey
    size = declared_size(data)
    if size is not None and size[0] * size[1] > MOST_PIXELS:  # before memory is taken for them
        raise UserError(
            f"{path}: {size[1]:,} x {size[0]:,} px are more than the {MOST_PIXELS:,} that are read at once; "
            "cut it into tiles"
        )
    try:
        pixels = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    except cv2.error:  # an empty file, or more pixels than OpenCV takes
        pixels = None
    if pixels is None:
        kind = tiff_kind(data)
        raise _unreadable(path) if kind is None or kind.is_picture() else _unusual(path, kind.words())
    return pixels


def _unusual(path: Path, what: str) -> UserError:
    return UserError(f"{path}: {what}; expected 1, 3 or 4 bands of uint8 or uint16; convert it")


def _unreadable(path: Path) -> UserError:
    return UserError(f"{path}: not a readable image (damaged, cut off or another format); replace it")


def _jpeg_has_end(data: bytes) -> bool:
    """Whether the end marker follows the first scan; that of an EXIF thumbnail comes before."""
    start = len(JPEG_START)
    while data[start : start + 1] == b"\xff" and data[start : start + 2] != JPEG_SCAN:
        start += 2 + int.from_bytes(data[start + 2 : start + 4], "big")
    return data.find(JPEG_END, start) >= 0


def _plain_png(data: bytes, path: Path, *, keep: tuple[bytes, ...]) -> bytes:
    """The same PNG, checked, from some of its chunks.

    Without PLTE, a palette PNG becomes the grey PNG of its indices, which OpenCV would expand to colours.
    Without colour profiles and broken sums, libpng has nothing to print on stderr.
    """
    chunks = [PNG_START]
    start = len(PNG_START)
    while (kind := data[start + 4 : start + 8]) and chunks[-1][4:8] != b"IEND":
        body_end = start + 8 + int.from_bytes(data[start : start + 4], "big")
        body = data[start + 8 : body_end]
        if data[body_end : body_end + 4] != _png_sum(kind, body):
            raise _unreadable(path)
        if kind == b"IHDR" and body[9:10] == PNG_PALETTE and b"PLTE" not in keep:
            body = body[:9] + PNG_GREY + body[10:]
        if kind in keep:
            chunks.append(len(body).to_bytes(4, "big") + kind + body + _png_sum(kind, body))
        start = body_end + 4
    if chunks[-1][4:8] != b"IEND":
        raise _unreadable(path)
    return b"".join(chunks)


def _png_sum(kind: bytes, body: bytes) -> bytes:
    return zlib.crc32(body, zlib.crc32(kind)).to_bytes(4, "big")

"""What a header says before anything is decoded: size, the bands of a TIFF, lossy compression."""

from __future__ import annotations

import struct
from typing import NamedTuple

from segdeformer.errors import count

JPEG_START = b"\xff\xd8"
PNG_START = b"\x89PNG\r\n\x1a\n"
TIFF_STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # the last two: BigTIFF

WIDTH, HEIGHT, BITS, COMPRESSION, BANDS, SAMPLE_FORMAT = 256, 257, 258, 259, 277, 339  # tags
NUMBER_FORMATS = {3: "H", 4: "I", 16: "Q"}  # by a tag's type
SAMPLE_KINDS = {1: "uint", 2: "int", 3: "float", 5: "complex int", 6: "complex"}
PICTURE_TYPES = (*(f"uint{bits}" for bits in (1, 2, 4, 8, 10, 12, 14, 16)), "unknown8", "unknown16")
TIFF_JPEGS = (6, 7, 34892)  # compressions


class TiffKind(NamedTuple):
    """What the pixels of a TIFF's first picture are."""

    bands: int
    dtype: str  # as NumPy would name it: uint8, float32
    has_jpeg: bool

    def is_picture(self) -> bool:
        """Whether it has as many bands as an image, of bits that can be scaled to 8."""
        return self.bands <= 4 and self.dtype in PICTURE_TYPES

    def words(self) -> str:
        return bands_of(self.bands, self.dtype)


def declared_size(data: bytes) -> tuple[int, int] | None:
    """(height, width) in px as a PNG, JPEG, TIFF, BMP or WebP says; None where the header says nothing."""
    if data.startswith(PNG_START):
        return int.from_bytes(data[20:24], "big"), int.from_bytes(data[16:20], "big")
    if data.startswith(JPEG_START):
        return _jpeg_size(data)
    if data.startswith(b"BM"):
        width, height = (abs(int.from_bytes(data[at : at + 4], "little", signed=True)) for at in (18, 22))
        return height, width
    if data.startswith(b"RIFF") and data[12:16] == b"VP8X":
        width, height = (1 + int.from_bytes(data[at : at + 3], "little") for at in (24, 27))
        return height, width
    if data.startswith(TIFF_STARTS):
        try:
            tags = _tags(data)
        except struct.error:
            return None
        return tags.get(HEIGHT, 0), tags.get(WIDTH, 0)
    return None


def _jpeg_size(data: bytes) -> tuple[int, int] | None:
    start = len(JPEG_START)
    while data[start : start + 1] == b"\xff" and len(data) >= start + 9:
        marker = data[start + 1]
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # a frame, of whatever coding
            height, width = struct.unpack_from(">HH", data, start + 5)
            return height, width
        start += 2 + int.from_bytes(data[start + 2 : start + 4], "big")
    return None


def bands_of(bands: int, dtype: object) -> str:
    return f"{count(bands, 'band')} of {dtype}"


def tiff_kind(data: bytes) -> TiffKind | None:
    """By the header; None when it is no TIFF or cut off."""
    if not data.startswith(TIFF_STARTS):
        return None
    try:
        tags = _tags(data)
    except struct.error:
        return None
    sample_kind = SAMPLE_KINDS.get(tags.get(SAMPLE_FORMAT, 1), "unknown")
    return TiffKind(
        tags.get(BANDS, 1), f"{sample_kind}{tags.get(BITS, 1)}", tags.get(COMPRESSION) in TIFF_JPEGS
    )


def _tags(data: bytes) -> dict[int, int]:
    """The first value of every tag whose values are whole numbers."""
    order = "<" if data.startswith(b"II") else ">"
    is_big = b"+" in data[:4]
    start_at, start_format, count_format, entry = (8, "Q", "Q", "HHQ8s") if is_big else (4, "I", "H", "HHI4s")
    (start,) = struct.unpack_from(order + start_format, data, start_at)
    (num_tags,) = struct.unpack_from(order + count_format, data, start)
    start += struct.calcsize(order + count_format)
    tags = {}
    for number in range(min(num_tags, 1000)):
        tag, kind, values, inline = struct.unpack_from(
            order + entry, data, start + number * struct.calcsize(order + entry)
        )
        if kind not in NUMBER_FORMATS or not values:
            continue
        form = order + NUMBER_FORMATS[kind]
        if values * struct.calcsize(form) <= len(inline):
            (tags[tag],) = struct.unpack_from(form, inline)
        else:
            (at,) = struct.unpack(order + start_format, inline)
            (tags[tag],) = struct.unpack_from(form, data, at)
    return tags


def lossy_format(data: bytes) -> str | None:
    """The format that gives back other values than were saved; None for those that keep them."""
    if data.startswith(JPEG_START):
        return "JPEG"
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return "lossy WebP" if _webp_is_lossy(data) else None
    if data[4:8] == b"ftyp" and b"avi" in data[8:32]:  # avif, avis
        return "AVIF"
    kind = tiff_kind(data)
    return "JPEG" if kind is not None and kind.has_jpeg else None


def _webp_is_lossy(data: bytes) -> bool:
    """Whether its picture is a `VP8 ` chunk, whatever comes before; `VP8L` is lossless."""
    start = 12
    while name := data[start : start + 4]:
        if name in (b"VP8 ", b"VP8L"):
            return name == b"VP8 "
        size = int.from_bytes(data[start + 4 : start + 8], "little")
        start += 8 + size + size % 2
    return False

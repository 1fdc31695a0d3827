"""Sizes that are absurd are refused by the header, before memory is taken for them."""

import resource
import struct
import zlib

import cv2
import numpy as np
import pytest

from segdeformer.data import images
from segdeformer.data.formats import declared_size
from segdeformer.data.images import MOST_PIXELS, read_image, read_labels
from segdeformer.errors import UserError

SIDE = 60_000  # squared: 3.6 thousand million pixels, 10 GiB as RGB


def png(height, width):
    """A PNG that says it has this size, and whose rows are zeros: 10 MB for 10 GiB."""

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    rows = zlib.compressobj(9)
    body = b"".join(rows.compress(bytes(1 + width)) for _ in range(min(height, 50))) + rows.flush()
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def patched(ending, *, height, width):
    """A real image of 20x30 px whose header says another size."""
    data = bytearray(cv2.imencode(ending, np.zeros((20, 30, 3), np.uint8))[1].tobytes())
    if ending == ".jpg":
        at = data.index(b"\xff\xc0")
        data[at + 5 : at + 9] = struct.pack(">HH", height, width)
    elif ending == ".bmp":
        data[18:26] = struct.pack("<ii", width, -height)  # from the top down
    elif ending == ".tiff":
        start = struct.unpack_from("<I", data, 4)[0]
        for number in range(struct.unpack_from("<H", data, start)[0]):
            at = start + 2 + 12 * number
            tag = struct.unpack_from("<H", data, at)[0]
            if tag in (256, 257):
                struct.pack_into("<HII", data, at + 2, 4, 1, width if tag == 256 else height)
    return bytes(data)


@pytest.mark.parametrize("ending", [".png", ".jpg", ".bmp", ".tiff"])
@pytest.mark.parametrize("read", [read_image, read_labels])
def test_an_absurd_size_is_refused_with_the_limit_and_takes_no_memory(ending, read, tmp_path):
    path = tmp_path / f"a{ending}"
    path.write_bytes(png(SIDE, SIDE) if ending == ".png" else patched(ending, height=SIDE, width=SIDE))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError) as caught:
        read(path)
    if not (ending == ".jpg" and read is read_labels):  # which is lossy, and refused for that
        assert str(caught.value) == (
            f"{path}: 60,000 x 60,000 px are more than the 536,870,912 that are read at once; "
            "cut it into tiles"
        )
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KiB


@pytest.mark.parametrize("ending", [".png", ".jpg", ".bmp", ".tiff", ".webp"])
def test_sizes_of_real_files_are_read_from_their_headers(ending):
    data = cv2.imencode(ending, np.zeros((20, 31, 3), np.uint8))[1].tobytes()
    assert declared_size(data) == (None if ending == ".webp" else (20, 31))
    for cut in range(60):
        declared_size(data[:cut])  # whatever is left of a file, nothing is raised


def test_sizes_up_to_the_limit_are_read(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    cv2.imwrite(str(path), np.zeros((20, 30), np.uint8))
    monkeypatch.setattr(images, "MOST_PIXELS", 600)
    assert read_image(path).shape == (20, 30, 3)
    monkeypatch.setattr(images, "MOST_PIXELS", 599)
    with pytest.raises(UserError, match="30 x 20 px are more than the 599 that are read at once"):
        read_image(path)
    assert MOST_PIXELS > 10_000**2 * 5


def test_a_file_that_is_larger_than_memory_should_hold_is_refused_unread(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    with path.open("wb") as file:
        file.truncate(3 * 2**31)  # a hole: it takes no space
    with pytest.raises(UserError, match=r"a.png: 6.0 GiB are more than the 2 GiB of a file that are read at"):
        read_image(path)

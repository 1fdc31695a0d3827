"""Reading and writing files: what arrives is exactly what the file holds, or one line of error."""

import errno
import os
import struct
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest

from segdeformer.data.formats import lossy_format, tiff_kind
from segdeformer.data.images import (
    LossyLabelsError,
    NotIdsError,
    image_size,
    read_image,
    read_labels,
    write_png,
)
from segdeformer.errors import UserError

GREY, PALETTE = 0, 3


def rgb_image(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def smooth_image(height: int, width: int) -> np.ndarray:
    """A gradient, different in each channel and direction, that JPEG hardly changes."""
    rows, columns = np.mgrid[:height, :width]
    return np.stack([rows * 255 // height, columns * 255 // width, np.full_like(rows, 60)], -1).astype(
        np.uint8
    )


def encode(path: Path, pixels: np.ndarray, *options: int) -> Path:
    """Write with OpenCV, RGB(A) given."""
    if pixels.ndim == 3:
        pixels = pixels[:, :, [2, 1, 0, 3][: pixels.shape[2]]]
    path.write_bytes(cv2.imencode(path.suffix, pixels, options)[1].tobytes())
    return path


def png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def raw_png(ids_HW: np.ndarray, *, bits: int, color_type: int, extra: bytes = b"") -> bytes:
    """A PNG written by hand, with ids packed in `bits`; a palette of odd colours if it wants one."""
    height, width = ids_HW.shape
    bit_rows = (ids_HW[:, :, None] >> np.arange(bits - 1, -1, -1)) & 1
    rows = np.packbits(bit_rows.reshape(height, -1).astype(np.uint8), axis=1)
    header = struct.pack(">IIBBBBB", width, height, bits, color_type, 0, 0, 0)
    colors = np.random.default_rng(1).integers(0, 256, 3 * 2**bits, dtype=np.uint8).tobytes()
    return (
        b"\x89PNG\r\n\x1a\n"
        + png_chunk(b"IHDR", header)
        + extra
        + (png_chunk(b"PLTE", colors) if color_type == PALETTE else b"")
        + png_chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows)))
        + png_chunk(b"IEND", b"")
    )


def raw_tiff(values_HWB: np.ndarray, *, order: str = "<") -> bytes:
    """A grey TIFF of any number of bands and any type, written by hand."""
    height, width, bands = values_HWB.shape
    body = values_HWB.astype(values_HWB.dtype.newbyteorder(order)).tobytes()
    bits = struct.pack(f"{order}{bands}H", *[8 * values_HWB.itemsize] * bands)
    formats = struct.pack(f"{order}{bands}H", *[{"u": 1, "i": 2, "f": 3}[values_HWB.dtype.kind]] * bands)
    after = 8 + 2 + 10 * 12 + 4
    entries = (
        *((256, 3, 1, width), (257, 3, 1, height), (258, 3, bands, bits), (259, 3, 1, 1), (262, 3, 1, 1)),
        *((273, 4, 1, after + len(bits + formats)), (277, 3, 1, bands), (278, 3, 1, height)),
        *((279, 4, 1, len(body)), (339, 3, bands, formats)),
    )
    packed = b""
    for tag, kind, count, value in entries:
        if isinstance(value, bytes):
            at = after if tag == 258 else after + len(bits)
            inside = value.ljust(4, b"\0") if len(value) <= 4 else struct.pack(f"{order}I", at)
        else:
            inside = struct.pack(
                f"{order}{'HH' if kind == 3 else 'I'}", *([value, 0] if kind == 3 else [value])
            )
        packed += struct.pack(f"{order}HHI", tag, kind, count) + inside
    start = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HIH", 42, 8, len(entries))
    return start + packed + b"\0\0\0\0" + bits + formats + body


def with_orientation(jpeg: bytes, orientation: int) -> bytes:
    """The JPEG with an EXIF block that holds this orientation."""
    tiff = b"II*\0" + struct.pack("<IHHHIHHI", 8, 1, 0x0112, 3, 1, orientation, 0, 0)
    exif = b"Exif\0\0" + tiff
    return jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + jpeg[2:]


@pytest.mark.parametrize("ending", [".png", ".tif", ".bmp"])
def test_lossless_files_give_their_rgb_values(tmp_path, ending):
    image = rgb_image(13, 21)
    np.testing.assert_array_equal(read_image(encode(tmp_path / f"a{ending}", image)), image)


@pytest.mark.parametrize("ending", [".jpg", ".webp"])
def test_lossy_files_give_rgb_in_the_right_order(tmp_path, ending):
    image = smooth_image(48, 64)
    got = read_image(encode(tmp_path / f"a{ending}", image))
    assert np.abs(got.astype(int) - image).max() < 24
    assert np.abs(got.astype(int) - image).mean() < 3


def test_grey_becomes_three_equal_channels(tmp_path):
    grey = rgb_image(7, 9)[:, :, 0]
    np.testing.assert_array_equal(read_image(encode(tmp_path / "a.png", grey)), np.stack([grey] * 3, axis=-1))


def test_alpha_is_dropped_and_colours_stay(tmp_path):
    rgba = np.dstack([rgb_image(7, 9), np.zeros((7, 9), np.uint8)])
    np.testing.assert_array_equal(read_image(encode(tmp_path / "a.png", rgba)), rgba[:, :, :3])


def test_sixteen_bits_are_scaled_to_eight_with_rounding(tmp_path):
    levels = np.array([[0, 128, 129, 256], [257, 32896, 65406, 65535]], np.uint16)
    expected = np.rint(levels / 257.0).astype(np.uint8)
    for ending in (".png", ".tif"):
        got = read_image(encode(tmp_path / f"a{ending}", levels))
        assert got.dtype == np.uint8
        np.testing.assert_array_equal(got, np.stack([expected] * 3, axis=-1))


def test_a_palette_image_gives_its_colours(tmp_path):
    ids = np.arange(35).reshape(5, 7)
    (tmp_path / "a.png").write_bytes(raw_png(ids, bits=8, color_type=PALETTE))
    colors = np.random.default_rng(1).integers(0, 256, 3 * 256, dtype=np.uint8).reshape(256, 3)
    np.testing.assert_array_equal(read_image(tmp_path / "a.png"), colors[ids])


@pytest.mark.parametrize(("orientation", "turns"), [(1, 0), (3, 2), (6, 3), (8, 1)])
def test_exif_orientation_is_applied(tmp_path, orientation, turns):
    image = smooth_image(48, 64)
    jpeg = cv2.imencode(".jpg", image[:, :, ::-1], [cv2.IMWRITE_JPEG_QUALITY, 98])[1].tobytes()
    (tmp_path / "a.jpg").write_bytes(with_orientation(jpeg, orientation))
    got, expected = read_image(tmp_path / "a.jpg"), np.rot90(image, turns)
    assert got.shape == expected.shape
    assert np.abs(got.astype(int) - expected).mean() < 3


def test_a_path_may_be_unicode(tmp_path):
    image = rgb_image(3, 5)
    path = encode(tmp_path / "größe 図.png", image)
    np.testing.assert_array_equal(read_image(path), image)


@pytest.mark.parametrize("color_type", [GREY, PALETTE])
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_label_pngs_of_any_depth_give_the_stored_ids(tmp_path, bits, color_type):
    ids = np.arange(7 * 37).reshape(7, 37) % 2**bits
    (tmp_path / "a.png").write_bytes(raw_png(ids, bits=bits, color_type=color_type))
    got = read_labels(tmp_path / "a.png")
    assert got.dtype == np.uint8
    np.testing.assert_array_equal(got, ids)


def test_sixteen_and_thirty_two_bit_labels_keep_their_ids(tmp_path):
    ids = np.array([[0, 255, 256], [1000, 40000, 65535]])
    np.testing.assert_array_equal(read_labels(encode(tmp_path / "a.png", ids.astype(np.uint16))), ids)
    np.testing.assert_array_equal(read_labels(encode(tmp_path / "a.tif", ids.astype(np.int32))), ids)


def test_three_equal_channels_are_one_label_map(tmp_path):
    ids = rgb_image(5, 7)[:, :, 0]
    np.testing.assert_array_equal(read_labels(encode(tmp_path / "a.png", np.stack([ids] * 3, axis=-1))), ids)


def test_colours_are_refused_as_labels(tmp_path):
    path = encode(tmp_path / "colours.png", rgb_image(5, 7))
    with pytest.raises(
        UserError, match=r"colours\.png: colours where class ids should be; save one id per pixel"
    ):
        read_labels(path)


def test_fractions_are_refused_as_labels(tmp_path):
    path = encode(tmp_path / "a.tif", np.ones((3, 4), np.float32))
    with pytest.raises(UserError, match="label ids are float32; save them as integers"):
        read_labels(path)


@pytest.mark.parametrize(
    ("ending", "options", "what"),
    [
        (".jpg", (), "JPEG"),
        (".webp", (cv2.IMWRITE_WEBP_QUALITY, 80), "lossy WebP"),
        (".tif", (cv2.IMWRITE_TIFF_COMPRESSION, 7), "JPEG"),
    ],
)
def test_lossy_formats_are_refused_as_labels_whatever_their_name(tmp_path, ending, options, what):
    ids = np.repeat(np.arange(12, dtype=np.uint8), 36).reshape(18, 24)
    path = encode(tmp_path / f"a{ending}", ids, *options).rename(tmp_path / "a.png")
    with pytest.raises(LossyLabelsError) as caught:
        read_labels(path)
    expected = f"{path}: {what} inside, which changes ids; save label maps as PNG from their source"
    assert str(caught.value) == expected
    assert read_image(path).shape == (18, 24, 3)  # as an image it is welcome


def test_lossless_webp_and_compressed_tiff_keep_their_ids(tmp_path):
    ids = rgb_image(18, 24)[:, :, 0]
    for ending, options in (
        (".webp", (cv2.IMWRITE_WEBP_QUALITY, 101)),
        (".tif", (cv2.IMWRITE_TIFF_COMPRESSION, 5)),
    ):
        np.testing.assert_array_equal(read_labels(encode(tmp_path / f"a{ending}", ids, *options)), ids)


def test_an_extended_webp_is_told_by_its_picture(tmp_path):
    for quality, expected in ((80, "lossy WebP"), (101, None)):
        webp = cv2.imencode(".webp", rgb_image(9, 9), [cv2.IMWRITE_WEBP_QUALITY, quality])[1].tobytes()
        profile = b"ICCP" + (3).to_bytes(4, "little") + b"abc\0"
        assert lossy_format(webp[:12] + profile + webp[12:]) == expected


def test_four_channels_are_ids_only_if_alpha_says_nothing(tmp_path):
    ids = rgb_image(5, 7)[:, :, 0]
    for alpha in (np.full_like(ids, 255), ids):
        got = read_labels(encode(tmp_path / "a.png", np.dstack([ids, ids, ids, alpha])))
        np.testing.assert_array_equal(got, ids)
    path = encode(tmp_path / "a.png", np.dstack([np.zeros_like(ids)] * 3 + [ids]))
    with pytest.raises(NotIdsError, match=r"a\.png: 4 channels that differ where class ids should be; save"):
        read_labels(path)


@pytest.mark.parametrize("bands", [2, 4])
def test_bands_that_would_be_dropped_are_refused_as_labels(tmp_path, bands):
    (tmp_path / "a.tif").write_bytes(raw_tiff(np.ones((5, 7, bands), np.uint8)))
    with pytest.raises(NotIdsError, match=f"{bands} bands of uint8 where class ids should be; save one id"):
        read_labels(tmp_path / "a.tif")


@pytest.mark.parametrize("ending", [".png", ".jpg", ".webp", ".tif", ".bmp"])
@pytest.mark.parametrize("kept", [0, 5, 30, 0.5, -1])
def test_a_file_cut_off_is_one_line_and_nothing_on_stderr(tmp_path, capfd, ending, kept):
    path = encode(tmp_path / f"cut{ending}", rgb_image(40, 50))
    data = path.read_bytes()
    path.write_bytes(data[: int(kept * len(data)) if isinstance(kept, float) else kept])
    for read in (read_image, read_labels):
        with pytest.raises(UserError) as caught:
            read(path)
        assert str(caught.value).startswith(f"{path}: not a readable image")
        assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_the_end_of_a_thumbnail_is_not_that_of_the_image(tmp_path):
    jpeg = cv2.imencode(".jpg", rgb_image(40, 50))[1].tobytes()
    thumbnail = b"\xff\xd8\xff\xda\x00\x02\xff\xd9"
    with_thumbnail = jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(thumbnail) + 2) + thumbnail + jpeg[2:]
    (tmp_path / "whole.jpg").write_bytes(with_thumbnail)
    assert read_image(tmp_path / "whole.jpg").shape == (40, 50, 3)
    (tmp_path / "cut.jpg").write_bytes(with_thumbnail[: len(with_thumbnail) // 2])
    with pytest.raises(UserError, match="not a readable image"):
        read_image(tmp_path / "cut.jpg")


def test_a_flipped_bit_in_a_png_is_found(tmp_path, capfd):
    path = encode(tmp_path / "a.png", rgb_image(40, 50))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)
    with pytest.raises(UserError, match="not a readable image"):
        read_image(path)
    assert capfd.readouterr() == ("", "")


def test_a_wrong_colour_profile_prints_nothing(tmp_path, capfd):
    ids = np.arange(12).reshape(3, 4)
    profile = png_chunk(b"iCCP", b"bad\0\0" + zlib.compress(b"no profile"))
    (tmp_path / "a.png").write_bytes(raw_png(ids, bits=8, color_type=GREY, extra=profile))
    np.testing.assert_array_equal(read_image(tmp_path / "a.png")[:, :, 0], ids)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize(
    ("bands", "dtype", "what"),
    [
        (1, np.float32, "1 band of float32"),
        (3, np.float32, "3 bands of float32"),
        (12, np.uint8, "12 bands of uint8"),
        (12, np.uint16, "12 bands of uint16"),
        (1, np.float16, "1 band of float16"),
        (1, np.int16, "1 band of int16"),
        (1, np.uint32, "1 band of uint32"),
    ],
)
def test_a_tiff_that_is_no_picture_is_told_by_its_bands_and_type(tmp_path, capfd, bands, dtype, what, order):
    path = tmp_path / "a.tif"
    path.write_bytes(raw_tiff(np.ones((5, 7, bands), dtype), order=order))
    with pytest.raises(UserError) as caught:
        read_image(path)
    assert str(caught.value) == f"{path}: {what}; expected 1, 3 or 4 bands of uint8 or uint16; convert it"
    assert capfd.readouterr() == ("", "")


def test_a_big_tiff_is_told_by_its_bands_and_type():
    entries = [(258, 3, 1, 32), (277, 3, 1, 12), (339, 3, 1, 3), (259, 3, 1, 1)]
    body = b"".join(struct.pack("<HHQQ", *entry) for entry in entries)
    assert tiff_kind(b"II+\0" + struct.pack("<HHQQ", 8, 0, 16, 4) + body) == (12, "float32", False)


@pytest.mark.parametrize(
    ("bands", "dtype", "message"),
    [
        (1, np.float16, "label ids are float16; save them as integers"),
        (12, np.uint8, "12 bands of uint8 where class ids should be; save one id per pixel"),
    ],
)
def test_a_tiff_that_is_no_label_map_is_told_by_its_bands_and_type(tmp_path, bands, dtype, message):
    (tmp_path / "a.tif").write_bytes(raw_tiff(np.ones((5, 7, bands), dtype)))
    with pytest.raises(NotIdsError, match=message):
        read_labels(tmp_path / "a.tif")


def test_a_header_that_pillow_cannot_read_prints_nothing(tmp_path, capfd):
    (tmp_path / "a.tif").write_bytes(raw_tiff(np.ones((5, 7, 12), np.uint8)))
    assert image_size(tmp_path / "a.tif") is None
    assert capfd.readouterr() == ("", "")


def test_a_radiance_map_is_told_by_its_type(tmp_path):
    path = encode(tmp_path / "a.hdr", np.ones((5, 7, 3), np.float32))
    with pytest.raises(UserError, match=r"a\.hdr: 3 bands of float32; expected 1, 3 or 4 bands of uint8"):
        read_image(path)


def test_missing_files_and_folders_are_named(tmp_path):
    with pytest.raises(UserError, match=r"none\.jpg: no such file; check the path"):
        read_image(tmp_path / "none.jpg")
    with pytest.raises(UserError, match=r"cannot be read \(Is a directory\)"):
        read_labels(tmp_path)


def test_text_is_no_image(tmp_path):
    (tmp_path / "a.jpg").write_text("not an image at all, but long enough to look at")
    with pytest.raises(
        UserError, match=r"a\.jpg: not a readable image \(damaged, cut off or another format\)"
    ):
        read_image(tmp_path / "a.jpg")


def test_written_pngs_read_back_exactly(tmp_path):
    image, ids = rgb_image(11, 17), rgb_image(11, 17)[:, :, 1]
    write_png(tmp_path / "image.png", image)
    write_png(tmp_path / "ids.png", ids)
    write_png(tmp_path / "wide.png", ids.astype(np.uint16) * 200)
    np.testing.assert_array_equal(read_image(tmp_path / "image.png"), image)
    np.testing.assert_array_equal(read_labels(tmp_path / "ids.png"), ids)
    np.testing.assert_array_equal(read_labels(tmp_path / "wide.png"), ids.astype(np.uint16) * 200)
    assert sorted(os.listdir(tmp_path)) == ["ids.png", "image.png", "wide.png"]


def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    write_png(tmp_path / "a.png", np.zeros((2, 3), np.uint8))

    def full(path, data):
        path.touch()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(UserError, match=r"a\.png: cannot be written \(No space left on device\); free space"):
        write_png(tmp_path / "a.png", np.ones((2, 3), np.uint8))
    assert os.listdir(tmp_path) == ["a.png"]
    assert read_labels(tmp_path / "a.png").max() == 0


def test_a_folder_is_made_but_not_where_a_file_is_in_the_way(tmp_path):
    write_png(tmp_path / "new" / "a.png", np.zeros((2, 3), np.uint8))
    assert os.listdir(tmp_path / "new") == ["a.png"]
    with pytest.raises(UserError, match=r"cannot be written \((Not a directory|File exists)\)"):
        write_png(tmp_path / "new" / "a.png" / "b.png", np.zeros((2, 3), np.uint8))

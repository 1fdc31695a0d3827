"""`segdeformer predict`: any image file gives an id map of its own size, and nothing else is touched."""

import struct
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from typer.testing import CliRunner

from segdeformer.cli.main import app
from segdeformer.config import load_recipe
from segdeformer.data.built_in import SyntheticDataset
from segdeformer.report.pictures import confidence_map, overlay
from segdeformer.weights.build import build_model
from segdeformer.weights.checkpoint import load, save_checkpoint

RUNNER = CliRunner(env={"COLUMNS": "200"})
CLASSES = SyntheticDataset("val").classes


def predict(*arguments: object) -> Any:
    return RUNNER.invoke(app, ["predict", *map(str, arguments)])


def succeeded(*arguments: object) -> str:
    """What the command printed; it must have worked."""
    result = predict(*arguments)
    assert (result.exit_code, result.stderr) == (0, ""), result
    return result.stdout


def refusal(*arguments: object) -> str:
    """The one line after `error: `."""
    result = predict(*arguments)
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    return result.stderr.removeprefix("error: ").removesuffix("\n")


def files_below(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def read_rgb(path: Path) -> np.ndarray:
    return cv2.imread(str(path), cv2.IMREAD_COLOR)[:, :, ::-1]


def rgb_image(index: int = 0) -> np.ndarray:
    return SyntheticDataset("val").read(index).image_HW3


def write_image(path: Path, pixels: np.ndarray, *options: int) -> Path:
    """Write with OpenCV; RGB(A) given."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if pixels.ndim == 3:
        pixels = pixels[:, :, [2, 1, 0, 3][: pixels.shape[2]]]
    assert cv2.imwrite(str(path), pixels, options)
    return path


def orient(jpeg: Path, orientation: int) -> None:
    """Splice an EXIF block with this orientation into the JPEG, behind its start marker."""
    tiff = b"II*\0" + struct.pack("<IHHHIHHI", 8, 1, 0x0112, 3, 1, orientation, 0, 0)
    exif = b"Exif\0\0" + tiff
    data = jpeg.read_bytes()
    jpeg.write_bytes(data[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + data[2:])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A model that has learned nothing, but whose answers differ from pixel to pixel."""
    torch.manual_seed(0)
    recipe = load_recipe("synthetic")
    model = build_model(recipe.model)
    torch.nn.init.normal_(model.decoder.head.classify.weight, std=0.2)
    path = tmp_path_factory.mktemp("checkpoint") / "model.safetensors"
    save_checkpoint(path, model, recipe=recipe, classes=CLASSES, iteration=0, best_miou=None)
    return path


def shares_by_hand(checkpoint: Path, image_HW3: np.ndarray) -> torch.Tensor:
    """Softmax of the whole image in float64, (K, H, W)."""
    model, about = load(checkpoint)
    data = about.recipe.data
    image_13HW = torch.from_numpy((image_HW3 - np.array(data.mean)) / data.std).permute(2, 0, 1)[None]
    with torch.inference_mode():
        logits_BKhw = model.double()(image_13HW).logits_BKhw
    full_BKHW = F.interpolate(logits_BKhw, image_HW3.shape[:2], mode="bilinear", align_corners=False)
    return full_BKHW.softmax(1)[0]


def assert_predicts(path: Path, checkpoint: Path, image_HW3: np.ndarray) -> None:
    """The file holds the classes of this RGB image, but for ties that fall otherwise in float32."""
    ids_HW = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    assert ids_HW.dtype == np.uint8
    expected_HW = shares_by_hand(checkpoint, image_HW3).argmax(0).numpy()
    assert ids_HW.shape == expected_HW.shape
    assert (ids_HW != expected_HW).sum() <= 3
    assert len(np.unique(ids_HW)) > 1  # else the comparison would say little


# Every kind of image.


def colour(path: Path) -> np.ndarray:
    write_image(path.with_suffix(".png"), rgb_image())
    return rgb_image()


def grey(path: Path) -> np.ndarray:
    write_image(path.with_suffix(".png"), rgb_image()[:, :, 1])
    return np.stack([rgb_image()[:, :, 1]] * 3, axis=-1)


def transparent(path: Path) -> np.ndarray:
    alpha_HW1 = np.random.default_rng(0).integers(0, 256, (*rgb_image().shape[:2], 1), dtype=np.uint8)
    write_image(path.with_suffix(".png"), np.concatenate([rgb_image(), alpha_HW1], axis=2))
    return rgb_image()


def sixteen_bit(path: Path) -> np.ndarray:
    write_image(path.with_suffix(".tif"), rgb_image().astype(np.uint16) * 257)
    return rgb_image()


def rotated(path: Path) -> np.ndarray:
    """A photograph taken with the camera turned: EXIF says to turn the pixels to the right."""
    jpeg = write_image(path.with_suffix(".jpg"), rgb_image(), cv2.IMWRITE_JPEG_QUALITY, 98)
    stored_HW3 = read_rgb(jpeg)
    orient(jpeg, 6)
    return np.rot90(stored_HW3, -1).copy()


def three_pixels_high(path: Path) -> np.ndarray:
    write_image(path.with_suffix(".bmp"), rgb_image()[30:33])
    return rgb_image()[30:33]


@pytest.mark.parametrize("kind", [colour, grey, transparent, sixteen_bit, rotated, three_pixels_high])
def test_ids_are_those_of_the_image_as_it_is_seen_at_its_own_size(kind, checkpoint, tmp_path):
    image_HW3 = kind(tmp_path / "in/image")
    succeeded(checkpoint, tmp_path / "in", "--out", tmp_path / "out")
    assert files_below(tmp_path / "out") == {"image.png"}
    assert_predicts(tmp_path / "out/image.png", checkpoint, image_HW3)


@pytest.mark.parametrize("orientation", [3, 6, 8])
def test_a_rotated_photograph_gives_an_upright_map(orientation, checkpoint, tmp_path):
    height, width = rgb_image().shape[:2]
    jpeg = write_image(tmp_path / "a.jpg", rgb_image())
    orient(jpeg, orientation)
    succeeded(checkpoint, jpeg, "--out", tmp_path)
    upright = (height, width) if orientation == 3 else (width, height)
    assert cv2.imread(str(tmp_path / "a.png"), cv2.IMREAD_UNCHANGED).shape == upright


# Overlays and confidence.


def test_overlay_and_confidence_are_the_prediction_as_pictures(checkpoint, tmp_path):
    image_HW3 = np.tile(rgb_image(), (3, 3, 1))  # large enough not to be enlarged for its legend
    path = write_image(tmp_path / "in/a.png", image_HW3)
    out = tmp_path / "out"
    printed = succeeded(checkpoint, path, "--out", out, "--overlay", "--confidence", "--opacity", 0.25)
    assert files_below(out) == {"a.png", "a_overlay.png", "a_confidence.png"}
    assert [line.strip() for line in printed.splitlines()[-3:]] == [
        str(out / name) for name in ("a.png", "a_overlay.png", "a_confidence.png")
    ]
    ids_HW = cv2.imread(str(out / "a.png"), cv2.IMREAD_UNCHANGED)
    height, width = ids_HW.shape
    blended_HW3 = overlay(image_HW3, ids_HW, CLASSES.colors, opacity=0.25)
    drawn_HW3 = read_rgb(out / "a_overlay.png")
    assert drawn_HW3.shape[0] >= height
    assert drawn_HW3.shape[0] * drawn_HW3.shape[1] > height * width  # the legend has its own room
    match = cv2.matchTemplate(drawn_HW3.copy(), blended_HW3, cv2.TM_SQDIFF)
    _, _, (left, top), _ = cv2.minMaxLoc(match)
    np.testing.assert_array_equal(drawn_HW3[top : top + height, left : left + width], blended_HW3)
    for label in np.unique(ids_HW):  # each class that occurs has its swatch
        assert (drawn_HW3[:, left + width :] == CLASSES.colors[label]).all(-1).any() or (
            drawn_HW3[top + height :] == CLASSES.colors[label]
        ).all(-1).any()

    expected_HW = shares_by_hand(checkpoint, image_HW3).amax(0).numpy().astype(np.float32)
    drawn_HW3 = read_rgb(out / "a_confidence.png")
    assert drawn_HW3.shape[0] > height + 20  # the scale of the colours has its own room
    match = cv2.matchTemplate(drawn_HW3.copy(), confidence_map(expected_HW), cv2.TM_SQDIFF)
    _, _, (left, top), _ = cv2.minMaxLoc(match)
    shown_HW3 = drawn_HW3[top : top + height, left : left + width].astype(int)
    assert np.abs(shown_HW3 - confidence_map(expected_HW)).max() <= 8  # one level of the colour table


def test_opacity_outside_its_range_is_refused(checkpoint, tmp_path):
    path = write_image(tmp_path / "a.png", rgb_image())
    result = predict(checkpoint, path, "--out", tmp_path / "out", "--overlay", "--opacity", 1.5)
    assert result.exit_code == 2
    assert not (tmp_path / "out").exists()


def test_scales_and_flip_change_the_protocol(checkpoint, tmp_path):
    path = write_image(tmp_path / "a.png", rgb_image())
    printed = succeeded(checkpoint, path, "--out", tmp_path / "out", "--scales", "0.5,1", "--flip")
    assert "protocol: whole; own size; scales 0.5, 1; with flip\n" in printed


# Many images.


def test_a_folder_keeps_its_subfolders_and_other_files_are_left_out(checkpoint, tmp_path):
    for name in ("a.png", "sub/b.png", "sub/deep/a.PNG"):
        write_image(tmp_path / "in" / name, rgb_image()[:20, :31])
    (tmp_path / "in/notes.txt").write_text("no image")
    single = write_image(tmp_path / "elsewhere/c.png", rgb_image(1))
    printed = succeeded(checkpoint, tmp_path / "in", single, "--out", tmp_path / "out")
    assert files_below(tmp_path / "out") == {"a.png", "sub/b.png", "sub/deep/a.png", "c.png"}
    assert f"{checkpoint}, 4 images, device cpu, attention auto (sdpa, and blocks" in printed
    assert_predicts(tmp_path / "out/c.png", checkpoint, rgb_image(1))


def test_two_images_of_one_stem_keep_their_endings_apart(checkpoint, tmp_path):
    write_image(tmp_path / "in/a.png", rgb_image(0))
    write_image(tmp_path / "in/a.bmp", rgb_image(1))
    succeeded(checkpoint, tmp_path / "in", "--out", tmp_path / "out")
    assert files_below(tmp_path / "out") == {"a.png.png", "a.bmp.png"}
    assert_predicts(tmp_path / "out/a.png.png", checkpoint, rgb_image(0))
    assert_predicts(tmp_path / "out/a.bmp.png", checkpoint, rgb_image(1))


def test_one_name_from_two_folders_is_refused_before_anything_is_written(checkpoint, tmp_path):
    for folder in ("x", "y"):
        write_image(tmp_path / folder / "a.png", rgb_image())
    out = tmp_path / "out"
    message = refusal(checkpoint, tmp_path / "x", tmp_path / "y", "--out", out)
    assert message == f"two inputs would both be written to {out}/a.png.png; predict them apart"
    assert not out.exists()


def test_an_overlay_and_another_images_ids_never_share_a_file(checkpoint, tmp_path):
    write_image(tmp_path / "in/a.png", rgb_image(0))
    write_image(tmp_path / "in/a_overlay.png", rgb_image(1))
    message = refusal(checkpoint, tmp_path / "in", "--out", tmp_path / "out", "--overlay")
    assert message == f"two inputs would both be written to {tmp_path}/out/a_overlay.png; predict them apart"
    assert not (tmp_path / "out").exists()


def test_unreadable_images_do_not_cost_the_good_ones(checkpoint, tmp_path):
    for index, name in enumerate(("a.png", "c.png", "e.png")):
        write_image(tmp_path / "in" / name, rgb_image(index))
    (tmp_path / "in/b.png").write_bytes(b"no image")
    (tmp_path / "in/d.jpg").write_bytes(b"")
    assert refusal(checkpoint, tmp_path / "in", "--out", tmp_path / "out") == (
        f"{tmp_path}/in/b.png: not a readable image (damaged, cut off or another format); replace it "
        "(and 1 more image failed)"
    )
    assert files_below(tmp_path / "out") == {"a.png", "c.png", "e.png"}
    for index, name in enumerate(("a.png", "c.png", "e.png")):
        assert_predicts(tmp_path / "out" / name, checkpoint, rgb_image(index))


# Inputs are never overwritten.


def test_an_id_map_never_replaces_its_image(checkpoint, tmp_path):
    path = write_image(tmp_path / "a.png", rgb_image())
    message = refusal(checkpoint, path, "--out", tmp_path)
    assert message == f"the result would overwrite the input {path}; choose another --out"
    np.testing.assert_array_equal(read_rgb(path), rgb_image())


@pytest.mark.parametrize("kind", ["overlay", "confidence"])
def test_an_overlay_or_confidence_map_never_replaces_another_input(kind, checkpoint, tmp_path):
    write_image(tmp_path / "a.png", rgb_image(0))
    other = write_image(tmp_path / f"sub/a_{kind}.png", rgb_image(1))
    message = refusal(checkpoint, tmp_path, "--out", tmp_path / "sub", f"--{kind}")
    assert message == f"the result would overwrite the input {other}; choose another --out"
    np.testing.assert_array_equal(read_rgb(other), rgb_image(1))


def test_a_link_to_the_input_counts_as_the_input(checkpoint, tmp_path):
    path = write_image(tmp_path / "photos/a.png", rgb_image())
    (tmp_path / "out").symlink_to(tmp_path / "photos")
    assert "would overwrite the input" in refusal(checkpoint, path, "--out", tmp_path / "out")
    np.testing.assert_array_equal(read_rgb(path), rgb_image())


def test_results_inside_the_input_folder_are_refused_the_second_time(checkpoint, tmp_path):
    write_image(tmp_path / "in/a.jpg", rgb_image())
    arguments = (checkpoint, tmp_path / "in", "--out", tmp_path / "in/predicted")
    succeeded(*arguments)
    first = tmp_path / "in/predicted/a.png"
    before = first.read_bytes()
    assert refusal(*arguments) == f"the result would overwrite the input {first}; choose another --out"
    assert files_below(tmp_path / "in") == {"a.jpg", "predicted/a.png"}
    assert first.read_bytes() == before

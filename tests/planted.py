"""A data set of drawn shapes as a folder, and the faults that can be planted in it."""

import shutil
from pathlib import Path

import cv2
import numpy as np

from segdeformer.data.built_in import SyntheticDataset
from segdeformer.data.images import write_png

NUM_CLASSES = 5
SIZE_HW = (64, 80)


def make_folder(root: Path, *, train: int, val: int, size_hw: tuple[int, int] = SIZE_HW) -> Path:
    """Drawn shapes as a folder data set, without any fault."""
    for split, count in (("train", train), ("val", val)):
        data = SyntheticDataset(split, num_classes=NUM_CLASSES, num_images=count, size_hw=size_hw)
        for index in range(count):
            image_HW3, labels_HW, name = data.read(index)
            write_png(root / f"images/{split}/{name}.png", image_HW3)
            write_png(root / f"labels/{split}/{name}.png", labels_HW)
    names = ", ".join(f'"{name}"' for name in data.classes.names)
    (root / "classes.toml").write_text(f"names = [{names}]\n")
    return root


def image(root: Path, index: int, split: str = "train") -> Path:
    return root / f"images/{split}/{split}{index:04}.png"


def labels(root: Path, index: int, split: str = "train") -> Path:
    return root / f"labels/{split}/{split}{index:04}.png"


def pixels(path: Path) -> np.ndarray:
    read = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    assert read is not None
    return read


def encode(path: Path, values: np.ndarray, ending: str = "") -> None:
    """Write with OpenCV in the format of `ending`, whatever the path's own."""
    done, encoded = cv2.imencode(ending or path.suffix, values)
    assert done
    path.write_bytes(encoded.tobytes())


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


def turn_by_exif(path: Path) -> None:
    """A JPEG of the same picture that says `rotate by 180 degrees`."""
    jpeg = cv2.imencode(".jpg", pixels(path))[1].tobytes()
    tiff = b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x03\0\0\0\0\0\0"
    app1 = b"Exif\0\0" + tiff
    path.unlink()
    segment = b"\xff\xe1" + (len(app1) + 2).to_bytes(2, "big") + app1
    path.with_suffix(".jpg").write_bytes(jpeg[:2] + segment + jpeg[2:])


def binary(ids_HW: np.ndarray) -> np.ndarray:
    return np.where((ids_HW > 0) & (ids_HW < 255), 255, 0).astype(np.uint8)


def with_palette(path: Path, colors: list[tuple[int, int, int]]) -> None:
    from PIL import Image

    with Image.open(path) as picture:
        picture.load()
    picture.putpalette([level for color in colors for level in color])
    picture.save(path)


COLORS = [(0, 0, 0), (200, 0, 0), (0, 200, 0), (0, 0, 200), (9, 200, 200)] + [(5, 5, 5)] * 251


def plant(root: Path, kind: str, i: int) -> str:
    """Spoil training pair `i`; returns the name of the file that must be named."""
    picture, ids = image(root, i), labels(root, i)
    match kind:
        case "unreadable image":
            cut_off(picture)
            return picture.name
        case "unreadable label map":
            cut_off(ids)
        case "colours in label map":
            encode(ids, np.array(COLORS, np.uint8)[pixels(ids)])
        case "lossy label map":
            encode(ids, pixels(ids), ".jpg")
        case "sizes differ":
            encode(ids, pixels(ids).T.copy() if i % 2 else pixels(ids)[:-1])
        case "ids out of range":
            encode(ids, np.where(pixels(ids) == 1, 77, pixels(ids)).astype(np.uint8))
        case "0/255 masks":
            encode(ids, binary(pixels(ids)))
        case "missing label map":
            ids.unlink()
            return picture.name
        case "missing image":
            picture.unlink()
        case "label map of another format":
            encode(ids.with_suffix(".jpg"), pixels(ids))
            ids.unlink()
            return ids.with_suffix(".jpg").name
        case "duplicate names":
            encode(picture.with_suffix(".bmp"), pixels(picture))
            return picture.with_suffix(".bmp").name
        case "train/val duplicates":
            encode(picture, pixels(image(root, i % 4, "val")))
            shutil.copyfile(labels(root, i % 4, "val"), ids)
            return picture.name
        case "all ignored":
            encode(ids, np.full_like(pixels(ids), 255))
        case "one class":
            encode(ids, np.full_like(pixels(ids), 2))
        case "duplicates in a split":
            copy = picture.with_suffix(".bmp").with_stem(f"again{i}")
            encode(copy, pixels(picture))
            shutil.copyfile(ids, ids.with_stem(f"again{i}"))
            return copy.name
        case "same image, other labels":
            copy = picture.with_stem(f"other{i}")
            shutil.copyfile(picture, copy)
            encode(ids.with_stem(f"other{i}"), pixels(ids)[::-1])
            return copy.name
        case "some images are grey":
            encode(picture, cv2.cvtColor(pixels(picture), cv2.COLOR_BGR2GRAY))
            return picture.name
        case "alpha channel":
            encode(picture, cv2.cvtColor(pixels(picture), cv2.COLOR_BGR2BGRA))
            return picture.name
        case "16-bit images":
            encode(picture, pixels(picture).astype(np.uint16) * 257)
            return picture.name
        case "dark 16-bit images":
            encode(picture, pixels(picture).astype(np.uint16))
            return picture.name
        case "blank images":
            encode(picture, np.zeros_like(pixels(picture)))
            return picture.name
        case "turned by EXIF":
            turn_by_exif(picture)
            return picture.with_suffix(".jpg").name
        case "labels look misplaced":
            encode(ids, pixels(ids)[:, ::-1])
            return picture.name
        case "other format than the ending":
            encode(picture, pixels(picture), ".jpg")
            return picture.name
        case "files left out":
            picture.with_name(f"left{i}.heic").write_bytes(b"1")
            return f"left{i}.heic"
        case "some palettes":
            with_palette(ids, COLORS)
        case "almost the same in train and val":
            twin = sorted(root.glob("images/val/*.png"))[-1 - i % 4]
            height, width = pixels(twin).shape[:2]
            larger = cv2.resize(pixels(twin), (2 * width, 2 * height), interpolation=cv2.INTER_CUBIC)
            encode(picture, larger, ".jpg")
            encode(ids, pixels(root / "labels/val" / twin.name).repeat(2, 0).repeat(2, 1))
            return twin.name
        case _:
            raise ValueError(kind)
    return ids.name


ERRORS = (
    "unreadable image",
    "unreadable label map",
    "colours in label map",
    "lossy label map",
    "sizes differ",
    "ids out of range",
    "0/255 masks",
    "missing label map",
    "missing image",
    "label map of another format",
    "duplicate names",
    "train/val duplicates",
)
WARNINGS = (
    "all ignored",
    "duplicates in a split",
    "same image, other labels",
    "some images are grey",
    "alpha channel",
    "16-bit images",
    "dark 16-bit images",
    "blank images",
    "turned by EXIF",
    "labels look misplaced",
    "other format than the ending",
    "files left out",
    "some palettes",
    "almost the same in train and val",
)
FOLLOWS = {  # what else is true then
    "label map of another format": {"missing label map"},
    "dark 16-bit images": {"16-bit images"},
    "same image, other labels": {"duplicates in a split", "labels look misplaced"},
    "almost the same in train and val": {"other format than the ending"},
    "turned by EXIF": {"labels look misplaced"},
}

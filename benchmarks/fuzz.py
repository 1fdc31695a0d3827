"""Damaged files at every reader: no traceback, no hang, no memory beyond a bound.

    python -m benchmarks.fuzz [--files 10000] [--seed 0] [--keep FOLDER]

Each file is a good one with a few bytes changed, cut, repeated or made extreme. A reader may take it or raise
a `UserError`; everything else is a fault, whose file is kept.
"""

from __future__ import annotations

import argparse
import io
import json
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch

from segdeformer.ablation.plan import read_ablation
from segdeformer.config import load_recipe, recipe_toml
from segdeformer.data.classes import ClassTable, load_classes
from segdeformer.data.images import image_size, read_image, read_labels
from segdeformer.errors import UserError
from segdeformer.training.runlog import METRICS, read_metrics
from segdeformer.weights.build import build_model
from segdeformer.weights.checkpoint import read_checkpoint, save_checkpoint, saved_model
from segdeformer.weights.files import read_weights

MOST_SECONDS = 10.0  # of one file
MOST_GROWTH_MIB = 1024  # of the process, over all files
EXTREMES = (b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f", b"\x80\0\0\0")


class Reader(NamedTuple):
    """What reads a kind of file. names: of files, one for each seed."""

    read: Callable[[Path], object]
    seeds: dict[str, bytes]


class Fault(NamedTuple):
    reader: str
    file: Path
    what: str


def readers(folder: Path) -> dict[str, Reader]:
    """Every reader of files that a user hands over, with good files."""
    rng = np.random.default_rng(0)
    colours = rng.integers(0, 256, (21, 33, 3), np.uint8)
    ids = rng.integers(0, 5, (21, 33), np.uint8)
    pictures = {
        f"colours{ending}": cv2.imencode(ending, colours)[1].tobytes()
        for ending in (".png", ".jpg", ".tiff", ".bmp", ".webp")
    }
    labels = {f"ids{ending}": cv2.imencode(ending, ids)[1].tobytes() for ending in (".png", ".tiff")}
    recipe = load_recipe("synthetic")
    torch.manual_seed(0)
    model = build_model(recipe.model)
    classes = ClassTable(tuple(map(str, range(5))), ((0, 0, 0),) * 5)
    path = folder / "seed.safetensors"
    save_checkpoint(path, model, recipe=recipe, classes=classes, iteration=1, best_miou=None)
    nested = io.BytesIO()
    torch.save({"ema": {"module": {"a": torch.ones(3)}}, "meta": {"x": 1}}, nested)
    metrics = "".join(json.dumps({"kind": "train", "iteration": i, "loss": 0.5}) + "\n" for i in range(5))
    rows = '[ablation]\ntitle = "t"\nbase = "synthetic"\n\n[[rows]]\nname = "a"\ntrain.learning_rate = 1e-3\n'
    table = 'names = ["road", "car"]\ncolors = [[1, 2, 3], [4, 5, 6]]\n'
    checkpoint = path.read_bytes()
    return {
        "image": Reader(read_image, pictures | labels),
        "image size": Reader(image_size, pictures),
        "labels": Reader(read_labels, labels | {"picture.png": pictures["colours.png"]}),
        "recipe": Reader(lambda p: load_recipe(str(p)), {"r.toml": recipe_toml(recipe).encode()}),
        "classes": Reader(load_classes, {"classes.toml": table.encode()}),
        "ablation": Reader(read_ablation, {"rows.toml": rows.encode()}),
        "metrics": Reader(lambda p: read_metrics(p.parent), {METRICS: metrics.encode()}),
        "checkpoint": Reader(lambda p: saved_model(read_checkpoint(p)), {"c.safetensors": checkpoint}),
        "weights": Reader(read_weights, {"w.pth": nested.getvalue(), "w.safetensors": checkpoint}),
    }


def mutated(seed: bytes, rng: np.random.Generator) -> bytes:
    """A few changes, the more likely near the beginning, where headers are."""
    data = bytearray(seed)
    for _ in range(int(rng.integers(1, 6))):
        length = max(1, len(data))
        near = min(length, 512) if rng.random() < 0.7 else length
        at = int(rng.integers(0, near))
        match int(rng.integers(0, 7)):
            case 0:
                data[at : at + 1] = bytes([int(rng.integers(0, 256))])
            case 1:
                data[at : at + 4] = EXTREMES[int(rng.integers(0, len(EXTREMES)))]
            case 2:
                del data[at:]
            case 3:
                del data[at : at + int(rng.integers(1, 64))]
            case 4:
                data[at:at] = data[at : at + int(rng.integers(1, 256))]
            case 5:
                data[at:at] = rng.bytes(int(rng.integers(1, 64)))
            case _:
                data[at : at + 1] = bytes([data[at] ^ (1 << int(rng.integers(0, 8)))]) if data[at:] else b""
    return bytes(data)


def faults(num_files: int, seed: int, keep: Path) -> Iterator[Fault]:
    """Give every reader its share of damaged files; those at which one goes wrong are kept."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        known = readers(folder)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for number in range(num_files):
            reader_name, reader = list(known.items())[number % len(known)]
            rng = np.random.default_rng([seed, number])
            file_name = list(reader.seeds)[int(rng.integers(0, len(reader.seeds)))]
            path = folder / file_name
            path.write_bytes(mutated(reader.seeds[file_name], rng))
            what = _wrong(reader, path)
            grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024
            if what is None and grown > MOST_GROWTH_MIB:
                what = f"memory grew by {grown} MiB"
                before += grown * 1024
            if what is not None:
                keep.mkdir(parents=True, exist_ok=True)
                kept = keep / f"{number}-{file_name}"
                kept.write_bytes(path.read_bytes())
                yield Fault(reader_name, kept, what)
            path.unlink()


def _wrong(reader: Reader, path: Path) -> str | None:
    began = time.monotonic()
    try:
        reader.read(path)
    except UserError as error:
        if "\n" in str(error).strip():
            return f"several lines: {error!r}"
    except Exception as error:  # whatever else it is, it would be a traceback
        return f"{type(error).__name__}: {error}"
    seconds = time.monotonic() - began
    return f"took {seconds:.0f} s" if seconds > MOST_SECONDS else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--files", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--keep", type=Path, default=Path("runs/fuzz"), help="for files that a reader fails at"
    )
    args = parser.parse_args()
    found = 0
    for fault in faults(args.files, args.seed, args.keep):
        found += 1
        print(f"{fault.reader}: {fault.what[:300]}\n    {fault.file}", flush=True)
    print(f"{args.files:,} files, {found} faults")
    sys.exit(found > 0)


if __name__ == "__main__":
    main()

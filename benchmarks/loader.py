"""Training batches per second: our pipeline against torchvision v2's equivalent, in one run, in turn.

    python benchmarks/loader.py [--rounds 5] [--json benchmarks/results/loader.json]

Both read the same files (made here: ADE20K's size, JPEG of quality 90 and grey PNG) and make float32 batches
of 512 x 512 crops: decode, resize by 0.5 ... 2, crop, flip, photometric distortion, normalise, stack.
Torchvision's decoder and resize rule are those that are fastest here; ours also draws a crop again while one
class fills it, which torchvision does not offer.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import cv2
import numpy as np
import PIL.Image
import torch
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset
from torchvision import tv_tensors
from torchvision.io import ImageReadMode, decode_jpeg, decode_png, read_file
from torchvision.transforms import v2

from segdeformer.config import DataConfig, Recipe, load_recipe
from segdeformer.data.datasets import open_dataset
from segdeformer.data.loader import training_batches
from segdeformer.files import write_text
from segdeformer.measure.machine import this_machine
from segdeformer.measure.speed import Length, alternating_ms

RECIPE = "ade20k-segdeformer-b1"
NUM_PAIRS = 64
SIZES_HW = ((512, 683), (683, 512), (512, 512), (512, 768))  # most of ADE20K has a short edge of 512
NUM_CLASSES = 150
CHOOSING_ROUNDS = 3
DECODERS = ("torchvision.io", "PIL")


class Theirs(NamedTuple):
    """The choices of torchvision's pipeline."""

    decoder: str
    antialias: bool


def write_pairs(root: Path) -> None:
    """Textures of all scales, as photographs have them, and label maps of some forty regions."""
    rng = np.random.default_rng(0)
    images, labels = root / "images/training", root / "annotations/training"
    images.mkdir(parents=True)
    labels.mkdir(parents=True)
    for index, (height, width) in zip(range(NUM_PAIRS), itertools.cycle(SIZES_HW), strict=False):
        picture = np.zeros((height, width, 3), np.float32)
        for octave in range(1, 8):
            shape = (height >> octave, width >> octave, 3)
            noise = rng.normal(scale=8.0 * 2 ** (octave / 2), size=shape).astype(np.float32)
            picture += cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC)
        regions = rng.normal(size=(height >> 6, width >> 6)).astype(np.float32)
        smooth = cv2.resize(regions, (width, height), interpolation=cv2.INTER_CUBIC)
        ids = np.floor(smooth * 12) * 37 % (NUM_CLASSES + 1)
        PIL.Image.fromarray(np.clip(picture + 128, 0, 255).astype(np.uint8)).save(
            images / f"{index:04}.jpg", quality=90
        )
        PIL.Image.fromarray(ids.astype(np.uint8)).save(labels / f"{index:04}.png")


class TorchvisionPairs(TorchDataset[tuple[torch.Tensor, torch.Tensor]]):
    """ADE20K pairs through v2's transforms, the recipe's as far as v2 has them."""

    def __init__(self, root: Path, recipe: Recipe, choice: Theirs) -> None:
        self.images = sorted((root / "images/training").iterdir())
        self.labels = sorted((root / "annotations/training").iterdir())
        self.choice = choice
        config, data = recipe.augment, recipe.data
        assert config.resize_to is not None
        distort = [  # v2.RandomPhotometricDistort would swap channels on top
            v2.RandomApply([v2.ColorJitter(brightness=32 / 255)], 0.5),
            v2.RandomApply([v2.ColorJitter(contrast=0.5)], 0.5),
            v2.RandomApply([v2.ColorJitter(saturation=0.5)], 0.5),
            v2.RandomApply([v2.ColorJitter(hue=0.1)], 0.5),
        ]
        self.transform = v2.Compose(
            [
                v2.ScaleJitter(config.resize_to[::-1], config.ratio_range, antialias=choice.antialias),
                v2.RandomCrop(
                    config.crop, pad_if_needed=True, fill={tv_tensors.Image: 0, tv_tensors.Mask: 255}
                ),
                v2.RandomHorizontalFlip(config.horizontal_flip),
                *distort,
                v2.ToDtype({tv_tensors.Image: torch.float32, "others": None}, scale=True),
                v2.Normalize([m / 255 for m in data.mean], [s / 255 for s in data.std]),
            ]
        )
        self.class_of_id = torch.cat([torch.tensor([255]), torch.arange(255)]).to(torch.uint8)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        if self.choice.decoder == "PIL":
            image = v2.functional.pil_to_tensor(PIL.Image.open(self.images[index]).convert("RGB"))
            ids = v2.functional.pil_to_tensor(PIL.Image.open(self.labels[index]))
        else:
            image = decode_jpeg(read_file(str(self.images[index])), ImageReadMode.RGB)
            ids = decode_png(read_file(str(self.labels[index])))
        labels = self.class_of_id[ids[0].int()]
        return self.transform(tv_tensors.Image(image), tv_tensors.Mask(labels))


def theirs(root: Path, recipe: Recipe, choice: Theirs, workers: int, num_batches: int) -> Iterable[object]:
    size = recipe.train.batch_size
    dataset = TorchvisionPairs(root, recipe, choice)
    order = [index % NUM_PAIRS for index in range(size * num_batches)]
    return DataLoader(dataset, size, sampler=order, num_workers=workers)


def ours(root: Path, recipe: Recipe, workers: int, num_batches: int) -> Iterable[object]:
    dataset = open_dataset(DataConfig(name="ade20k", root=str(root)), "train")
    return training_batches(dataset, recipe, start=0, stop=num_batches, workers=workers)


def images_per_s(
    ways: Mapping[str, Callable[[], Iterable[object]]], num_images: int, *, rounds: int
) -> dict[str, list[float]]:
    """In alternation, each round from the start of the workers to the last batch."""
    runs = {name: partial(lambda batches: deque(batches(), maxlen=0), way) for name, way in ways.items()}
    times = list(alternating_ms(runs, length=Length(rounds, 0)))
    return {name: [round(1000 * num_images / ms[name], 1) for ms in times] for name in ways}


def measure(root: Path, *, workers: int, rounds: int, num_batches: int, choice: Theirs) -> dict[str, object]:
    """Both, with so many workers."""
    recipe = load_recipe(RECIPE)
    ways = {
        "ours": lambda: ours(root, recipe, workers, num_batches),
        "torchvision": lambda: theirs(root, recipe, choice, workers, num_batches),
    }
    rates = images_per_s(ways, num_batches * recipe.train.batch_size, rounds=rounds)
    medians = {name: statistics.median(rate) for name, rate in rates.items()}
    times_faster = round(medians["ours"] / medians["torchvision"], 2)
    return {"images_per_s": medians, "rounds": rates, "times_faster": times_faster}


def fastest_choice(root: Path) -> tuple[Theirs, dict[str, float]]:
    """What suits torchvision best here, in the process itself."""
    recipe = load_recipe(RECIPE)
    choices = {f"{d}, antialias {a}": Theirs(d, a) for d, a in itertools.product(DECODERS, (True, False))}
    ways = {name: partial(theirs, root, recipe, choice, 0, 2) for name, choice in choices.items()}
    rates = images_per_s(ways, 2 * recipe.train.batch_size, rounds=CHOOSING_ROUNDS)
    best = {name: max(rate) for name, rate in rates.items()}
    return choices[max(best, key=best.__getitem__)], best


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batches", type=int, default=8, help="of 16 images, in each round")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    lengths = {"rounds": arguments.rounds, "num_batches": arguments.batches}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_pairs(root)
        machine = this_machine(torch.device("cpu"), "torchvision", "pillow")
        choice, choices = fastest_choice(root)
        result = {
            "what": f"training batches of 16 crops of 512x512, float32, from {NUM_PAIRS} pairs of "
            f"{', '.join(f'{w}x{h}' for h, w in SIZES_HW)} px; images per second, median of the rounds",
            "machine": machine._asdict() | {"opencv": cv2.__version__},
            "torchvision": {"chosen": choice._asdict(), "images_per_s": choices},
            "workers": {
                str(workers): measure(root, workers=workers, **lengths, choice=choice) for workers in (2, 0)
            },
        }
    text = json.dumps(result, indent=2)
    print(text)
    if arguments.json:
        write_text(arguments.json, text + "\n")


if __name__ == "__main__":
    main()

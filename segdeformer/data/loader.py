"""Training batches in an order, and with an augmentation, that only the seed decides.

Position p = iteration * batch size + place in the batch. Epoch p // n goes through the n samples in an order
drawn from (seed, epoch); the crop at p is drawn from (seed, p). So batch i can be made without those before
it, by any worker, and any slice of it by any process: resuming costs nothing, and the number of workers,
processes and micro-batches changes nothing.

B batch, H W crop size, 3 RGB.
"""

from __future__ import annotations

import math
from collections.abc import Generator
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from segdeformer.config import Recipe
from segdeformer.data.samples import Dataset, Sample
from segdeformer.data.transforms import Crop, augment
from segdeformer.data.workers import SILENT_S, deafen, watched
from segdeformer.errors import UserError

ORDER, CROPS, SUBSTITUTES = 0, 1, 2  # the independent random streams of a seed
MOST_SUBSTITUTES = 10  # draws for one place

BadImages = Literal["stop", "skip"]


class Batch(NamedTuple):
    images_B3HW: Tensor  # float32, normalised
    labels_BHW: Tensor  # uint8; 255 = ignore
    names: tuple[str, ...]
    skipped: tuple[str, ...] = ()  # for each sample that another one stands in for: why it could not be read


class LocalSlice(NamedTuple):
    """Which images of every global batch are whose: its places, in order, split evenly."""

    rank: int = 0
    num_processes: int = 1
    accumulation: int = 1  # micro-batches that a process makes of its places

    def places(self, batch_size: int, micro: int) -> range:
        """The places of a micro-batch; the batch size must be divisible by processes times accumulation."""
        size, remainder = divmod(batch_size, self.num_processes * self.accumulation)
        assert remainder == 0 and size > 0
        first = (self.rank * self.accumulation + micro) * size
        return range(first, first + size)


def training_batches(
    dataset: Dataset,
    recipe: Recipe,
    *,
    start: int,
    stop: int,
    workers: int,
    pin_memory: bool = False,
    bad_images: BadImages = "stop",
    rank: int = 0,
    num_processes: int = 1,
    accumulation: int = 1,
) -> Generator[Batch, None, None]:
    """The batches of iterations start ... stop - 1, made in the process itself or by worker processes.

    A process gets its contiguous images of each global batch, in `accumulation` micro-batches one after
    another. Pin memory when they go to a GPU. PyTorch's random state is left alone.

    bad_images: `stop` raises the `UserError` of a sample that cannot be read when its batch is due; `skip`
    takes others in its place, drawn from (seed, position), and tells of it in `Batch.skipped`.
    Raises `UserError` when a worker process dies.
    """
    slice_ = LocalSlice(rank, num_processes, accumulation)
    loader = DataLoader(
        _Batches(dataset, recipe, slice_, bad_images),
        sampler=range(start * accumulation, stop * accumulation),
        batch_size=None,
        num_workers=workers,
        collate_fn=_as_it_is,
        pin_memory=pin_memory,
        generator=torch.Generator(),
        worker_init_fn=deafen,
        timeout=SILENT_S if workers else 0,
    )
    pixels = len(slice_.places(recipe.train.batch_size, 0)) * math.prod(recipe.augment.crop)
    batch_bytes = pixels * (3 * 4 + 1)  # float32 images, uint8 labels
    for batch in watched(loader, batch_bytes=batch_bytes) if workers else loader:
        if isinstance(batch, UserError):
            raise batch
        yield batch


def training_batch(
    dataset: Dataset,
    recipe: Recipe,
    iteration: int,
    *,
    places: range | None = None,
    bad_images: BadImages = "stop",
) -> Batch:
    """The batch of one iteration, or some places of it: a function of the data, the recipe and its seed."""
    size, seed = recipe.train.batch_size, recipe.train.seed
    places = places if places is not None else range(size)
    images_B3HW = np.empty((len(places), 3, *recipe.augment.crop), np.float32)
    labels_BHW = np.empty((len(places), *recipe.augment.crop), np.uint8)
    names, skipped = [], []
    for row, place in enumerate(places):
        position = iteration * size + place
        sample, failures = _read(dataset, seed, position, bad_images)
        out = Crop(images_B3HW[row], labels_BHW[row])
        augment(sample, recipe.augment, recipe.data, generator(seed, CROPS, position), out=out)
        names.append(sample.name)
        skipped += failures
    return Batch(torch.from_numpy(images_B3HW), torch.from_numpy(labels_BHW), tuple(names), tuple(skipped))


def _read(dataset: Dataset, seed: int, position: int, bad_images: BadImages) -> tuple[Sample, list[str]]:
    """The sample at a position or, where it is unreadable and that is allowed, one drawn in its place."""
    failures: list[str] = []
    index = sample_index(seed, position, len(dataset))
    rng = generator(seed, SUBSTITUTES, position)
    while True:
        try:
            return dataset.read(index), failures
        except UserError as error:
            if bad_images == "stop":
                raise
            failures.append(str(error))
            if len(failures) > MOST_SUBSTITUTES:
                raise UserError(
                    f"{len(failures)} samples in a row cannot be read, the last one: {error}"
                ) from None
        index = int(rng.integers(len(dataset)))


def sample_index(seed: int, position: int, num_samples: int) -> int:
    """Which sample is at a position: every epoch is a fresh permutation."""
    epoch, place = divmod(position, num_samples)
    return int(_epoch_order(seed, epoch, num_samples)[place])


@lru_cache(maxsize=2)  # a batch may lie across two epochs
def _epoch_order(seed: int, epoch: int, num_samples: int) -> np.ndarray:
    return generator(seed, ORDER, epoch).permutation(num_samples)


def generator(seed: int, stream: int, index: int) -> np.random.Generator:
    """Random numbers for one index of a stream: the index is the top word of Philox's counter."""
    key = np.array([seed % 2**64, stream], np.uint64)  # a list of large numbers would become floats
    return np.random.Generator(np.random.Philox(key=key, counter=[0, 0, 0, index]))


class _Batches(TorchDataset[Batch | UserError]):
    """Micro-batches by number, for PyTorch's workers. Errors travel as values: it would add a traceback."""

    def __init__(self, dataset: Dataset, recipe: Recipe, local: LocalSlice, bad_images: BadImages) -> None:
        self.dataset = dataset
        self.recipe = recipe
        self.local = local
        self.bad_images = bad_images

    def __getitem__(self, number: int) -> Batch | UserError:
        iteration, micro = divmod(number, self.local.accumulation)
        places = self.local.places(self.recipe.train.batch_size, micro)
        try:
            return training_batch(
                self.dataset, self.recipe, iteration, places=places, bad_images=self.bad_images
            )
        except UserError as error:
            return error


def _as_it_is(batch: Any) -> Any:
    return batch

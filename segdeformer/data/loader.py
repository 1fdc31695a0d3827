"""Training batches in an order, and with an augmentation, that only the seed decides.

Position p = iteration * batch size + place in the batch. Epoch p // n goes through the n samples in an order
drawn from (seed, epoch); the crop at p is drawn from (seed, p). So batch i can be made without those before
it, by any worker: resuming costs nothing, and the number of workers changes nothing.

B batch, H W crop size, 3 RGB.
"""

from __future__ import annotations

import signal
from collections.abc import Generator
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from segdeformer.config import Recipe
from segdeformer.data.datasets import Dataset
from segdeformer.data.transforms import augment
from segdeformer.errors import UserError

ORDER, CROPS = 0, 1  # the independent random streams of a seed


class Batch(NamedTuple):
    images_B3HW: Tensor  # float32, normalised
    labels_BHW: Tensor  # uint8; 255 = ignore
    names: tuple[str, ...]


def training_batches(
    dataset: Dataset, recipe: Recipe, *, start: int, stop: int, workers: int, pin_memory: bool = False
) -> Generator[Batch, None, None]:
    """The batches of iterations start ... stop - 1, made in the process itself or by worker processes.

    Pin memory when they go to a GPU. PyTorch's random state is left alone. Raises the `UserError` of a sample
    that cannot be read when its batch is due.
    """
    loader = DataLoader(
        _Batches(dataset, recipe),
        sampler=range(start, stop),
        batch_size=None,
        num_workers=workers,
        collate_fn=_as_it_is,
        pin_memory=pin_memory,
        generator=torch.Generator(),
        worker_init_fn=_quiet_worker,
    )
    for batch in loader:
        if isinstance(batch, UserError):
            raise batch
        yield batch


def training_batch(dataset: Dataset, recipe: Recipe, iteration: int) -> Batch:
    """The batch of one iteration, a function of the data, the recipe and its seed."""
    size, seed = recipe.train.batch_size, recipe.train.seed
    images_B3HW = np.empty((size, 3, *recipe.augment.crop), np.float32)
    labels_BHW = np.empty((size, *recipe.augment.crop), np.uint8)
    names = []
    for place in range(size):
        position = iteration * size + place
        sample = dataset.read(sample_index(seed, position, len(dataset)))
        crop = augment(sample, recipe.augment, recipe.data, generator(seed, CROPS, position))
        images_B3HW[place], labels_BHW[place] = crop
        names.append(sample.name)
    return Batch(torch.from_numpy(images_B3HW), torch.from_numpy(labels_BHW), tuple(names))


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
    """Batches by iteration, for PyTorch's workers. Errors travel as values: PyTorch would add a traceback."""

    def __init__(self, dataset: Dataset, recipe: Recipe) -> None:
        self.dataset = dataset
        self.recipe = recipe

    def __getitem__(self, iteration: int) -> Batch | UserError:
        try:
            return training_batch(self.dataset, self.recipe, iteration)
        except UserError as error:
            return error


def _as_it_is(batch: Any) -> Any:
    return batch


def _quiet_worker(_worker: int) -> None:
    """Ctrl-C reaches the whole process group; the main process alone answers it and ends its workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

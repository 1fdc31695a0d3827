"""The batch of an iteration is decided by the seed, whoever makes it and whenever."""

import hashlib

import numpy as np
import pytest
import torch

from segdeformer.config import AugmentConfig, DataConfig, EncoderConfig, ModelConfig, Recipe, TrainConfig
from segdeformer.data.built_in import SyntheticDataset
from segdeformer.data.datasets import Sample
from segdeformer.data.loader import Batch, generator, sample_index, training_batch, training_batches
from segdeformer.data.transforms import augment
from segdeformer.errors import UserError

DATASET = SyntheticDataset("train", num_images=7, size_hw=(63, 71))


def recipe(*, seed: int = 0, batch_size: int = 3) -> Recipe:
    return Recipe(
        name="test",
        description="",
        model=ModelConfig(num_classes=5, encoder=EncoderConfig(name="mit_nano")),
        data=DataConfig(name="synthetic"),
        augment=AugmentConfig(crop=(49, 65)),
        train=TrainConfig(batch_size=batch_size, seed=seed),
    )


def digest(batch: Batch) -> str:
    parts = (
        batch.images_B3HW.numpy().tobytes(),
        batch.labels_BHW.numpy().tobytes(),
        repr(batch.names).encode(),
    )
    return hashlib.sha256(b"".join(parts)).hexdigest()


def digests(start: int, stop: int, *, workers: int, seed: int = 0) -> list[str]:
    batches = training_batches(DATASET, recipe(seed=seed), start=start, stop=stop, workers=workers)
    return [digest(batch) for batch in batches]


def test_workers_and_resuming_change_nothing():
    alone = digests(0, 9, workers=0)
    assert len(set(alone)) == 9
    assert digests(0, 9, workers=2) == alone
    assert digests(0, 4, workers=0) + digests(4, 9, workers=2) == alone
    assert digests(7, 9, workers=0) == alone[7:]
    assert digests(0, 9, workers=0, seed=1) != alone


def test_a_batch_holds_the_augmented_samples_of_its_positions():
    batch = training_batch(DATASET, recipe(), 5)
    assert batch.images_B3HW.shape == (3, 3, 49, 65)
    assert batch.images_B3HW.dtype == torch.float32
    assert batch.labels_BHW.shape == (3, 49, 65)
    assert batch.labels_BHW.dtype == torch.uint8
    for place, position in enumerate((15, 16, 17)):
        sample = DATASET.read(sample_index(0, position, 7))
        crop = augment(sample, recipe().augment, recipe().data, generator(0, 1, position))
        np.testing.assert_array_equal(batch.images_B3HW[place], crop.image_3HW)
        np.testing.assert_array_equal(batch.labels_BHW[place], crop.labels_HW)
        assert batch.names[place] == sample.name


def test_every_epoch_is_another_permutation_of_all_samples():
    orders = [tuple(sample_index(0, 7 * epoch + place, 7) for place in range(7)) for epoch in range(20)]
    assert all(sorted(order) == list(range(7)) for order in orders)
    assert len(set(orders)) > 15


def test_the_order_of_a_seed_stays_what_it_was():
    """Written down: another order would silently change what a stored recipe and seed mean."""
    assert [sample_index(0, position, 7) for position in range(14)] == [
        0,
        5,
        1,
        6,
        2,
        4,
        3,
        2,
        1,
        3,
        4,
        0,
        5,
        6,
    ]
    assert generator(0, 1, 0).random(2).tolist() == [0.8133540609793564, 0.7513314251083365]


def test_streams_seeds_and_indices_do_not_share_numbers():
    keys = [
        (seed, stream, index) for seed in (0, 1, 2**64 - 1) for stream in (0, 1) for index in (0, 1, 10**9)
    ]
    numbers = np.concatenate([generator(*key).integers(2**63, size=50) for key in keys])
    assert len(set(numbers.tolist())) == len(numbers)


def test_one_sample_fills_a_larger_batch_with_different_crops():
    dataset = SyntheticDataset("train", num_images=1)
    batch = training_batch(dataset, recipe(batch_size=4), 0)
    assert batch.names == ("train0000",) * 4
    assert len({image.numpy().tobytes() for image in batch.images_B3HW}) == 4


@pytest.mark.parametrize("workers", [0, 2])
def test_the_random_state_of_torch_and_numpy_is_left_alone(workers):
    torch.manual_seed(3)
    before = torch.get_rng_state(), repr(np.random.get_state())
    digests(0, 2, workers=workers)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert repr(np.random.get_state()) == before[1]


class BadSample(SyntheticDataset):
    """One file of seven is broken."""

    def read(self, index: int) -> Sample:
        if index == sample_index(0, 4, 7):
            raise UserError("images/b.jpg: not a readable image", exit_code=1)
        return super().read(index)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_file_is_one_clean_line_at_its_turn(workers, capfd):
    dataset = BadSample("train", num_images=7)
    batches = training_batches(dataset, recipe(), start=0, stop=4, workers=workers)
    assert digest(next(batches)) == digest(training_batch(dataset, recipe(), 0))
    with pytest.raises(UserError) as caught:
        next(batches)
    assert str(caught.value) == "images/b.jpg: not a readable image"
    assert caught.value.exit_code == 1
    assert capfd.readouterr() == ("", "")


def test_a_loader_may_be_left_early(capfd):
    batches = training_batches(DATASET, recipe(), start=0, stop=1000, workers=2)
    next(batches)
    batches.close()
    assert capfd.readouterr() == ("", "")

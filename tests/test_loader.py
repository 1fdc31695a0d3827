"""The batch of an iteration is decided by the seed, whoever makes it and whenever."""

import hashlib
import multiprocessing
import os
import re
import signal
import threading

import numpy as np
import pytest
import torch

from segdeformer.config import AugmentConfig, DataConfig, EncoderConfig, ModelConfig, Recipe, TrainConfig
from segdeformer.data.built_in import SyntheticDataset
from segdeformer.data.loader import Batch, generator, sample_index, training_batch, training_batches
from segdeformer.data.samples import Sample
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
    for workers in (1, 2, 4):
        assert digests(0, 9, workers=workers) == alone
    assert digests(0, 4, workers=0) + digests(4, 9, workers=2) == alone
    assert digests(7, 9, workers=0) == alone[7:]
    assert digests(0, 9, workers=0, seed=1) != alone


@pytest.mark.parametrize(("num_processes", "accumulation"), [(1, 3), (2, 1), (4, 1), (2, 3)])
def test_parts_of_processes_and_accumulation_join_to_the_global_batch(num_processes, accumulation):
    config = recipe(batch_size=12)
    parts = [
        list(
            training_batches(
                DATASET,
                config,
                start=2,
                stop=4,
                workers=rank % 2,
                rank=rank,
                num_processes=num_processes,
                accumulation=accumulation,
            )
        )
        for rank in range(num_processes)
    ]
    assert {len(of_rank) for of_rank in parts} == {2 * accumulation}
    for number, iteration in enumerate((2, 3)):
        micro = [
            batch
            for of_rank in parts
            for batch in of_rank[number * accumulation : (number + 1) * accumulation]
        ]
        assert {len(batch.names) for batch in micro} == {12 // (num_processes * accumulation)}
        joined = Batch(
            torch.cat([batch.images_B3HW for batch in micro]),
            torch.cat([batch.labels_BHW for batch in micro]),
            tuple(name for batch in micro for name in batch.names),
        )
        assert digest(joined) == digest(training_batch(DATASET, config, iteration))


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


BAD = sample_index(0, 4, 7)  # read second in the second batch of three


class BadSample(SyntheticDataset):
    """One file of seven is broken."""

    def read(self, index: int) -> Sample:
        if index == BAD:
            raise UserError("images/b.jpg: not a readable image", exit_code=1)
        return super().read(index)


class BadFolder(SyntheticDataset):
    """Every file is broken."""

    def read(self, index: int) -> Sample:
        raise UserError(f"images/{index}.jpg: not a readable image", exit_code=1)


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


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_file_is_left_out_and_told_of_where_that_is_allowed(workers):
    dataset = BadSample("train", num_images=7, size_hw=(63, 71))
    options = {"start": 0, "stop": 7, "workers": workers, "bad_images": "skip"}
    batches = list(training_batches(dataset, recipe(), **options))
    places = [(i, j) for i in range(7) for j in range(3) if sample_index(0, 3 * i + j, 7) == BAD]
    assert len(places) == 3  # once an epoch
    assert places[0] == (1, 1)
    for i, batch in enumerate(batches):
        expected = training_batch(DATASET, recipe(), i)
        for j in range(3):
            is_same = torch.equal(batch.images_B3HW[j], expected.images_B3HW[j])
            assert is_same == ((i, j) not in places)
            assert (batch.names[j] == expected.names[j]) == is_same
        told = ("images/b.jpg: not a readable image",) * sum(place[0] == i for place in places)
        assert batch.skipped[: len(told)] == told
        assert bool(batch.skipped) == bool(told)


def test_what_stands_in_for_a_broken_file_depends_on_its_position_alone():
    dataset = BadSample("train", num_images=7, size_hw=(63, 71))
    batch = training_batch(dataset, recipe(), 1, bad_images="skip")
    part = training_batch(dataset, recipe(), 1, places=range(1, 2), bad_images="skip")
    assert torch.equal(part.images_B3HW[0], batch.images_B3HW[1])
    index = int(generator(0, 2, 4).integers(7))
    assert index != BAD
    crop = augment(DATASET.read(index), recipe().augment, recipe().data, generator(0, 1, 4))
    np.testing.assert_array_equal(batch.images_B3HW[1], crop.image_3HW)


def test_a_folder_of_broken_files_ends_the_search():
    with pytest.raises(UserError) as caught:
        training_batch(BadFolder("train", num_images=7), recipe(), 0, bad_images="skip")
    assert re.fullmatch(
        r"11 samples in a row cannot be read, the last one: images/\d\.jpg: not a readable image",
        str(caught.value),
    )


def loader_processes() -> list[multiprocessing.process.BaseProcess]:
    return multiprocessing.active_children()


@pytest.mark.parametrize(
    ("number", "cause"),
    [(signal.SIGKILL, "killed by signal 9, probably out of memory"), (signal.SIGFPE, "killed by signal 8")],
)
def test_a_worker_that_was_killed_is_one_clear_line(number, cause):
    batches = training_batches(DATASET, recipe(), start=0, stop=1000, workers=2)
    next(batches)
    victim = loader_processes()[0]
    os.kill(victim.pid, number)  # nothing is raised here, nor while the training step runs
    victim.join()
    with pytest.raises(UserError) as caught:
        next(batches)
    assert str(caught.value) == (
        f"a loader worker died ({cause}): use fewer --workers than 2, or give the machine more memory"
    )
    assert loader_processes() == []


def test_a_worker_killed_at_any_moment_is_one_clear_line_and_leaves_no_process():
    """A broken pipe may be seen before the death."""
    for attempt in range(3):
        batches = training_batches(DATASET, recipe(), start=0, stop=10_000, workers=2)
        next(batches)
        victim = loader_processes()[attempt % 2]
        timer = threading.Timer(0.002 * attempt, victim.kill)
        timer.start()
        with pytest.raises(UserError, match=r"^a loader worker died \(killed by signal 9, probably"):
            list(batches)
        timer.join()
        assert loader_processes() == []


class Killer(SyntheticDataset):
    """Reading one sample is too much."""

    def read(self, index: int) -> Sample:
        if index == BAD:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().read(index)


def test_a_worker_that_dies_while_its_batch_is_waited_for_is_one_clear_line():
    digests(0, 1, workers=1)  # PyTorch sets its handler once a process
    handler = signal.getsignal(signal.SIGCHLD)
    with pytest.raises(
        UserError, match=r"^a loader worker died \(killed by signal 9, probably out of memory\)"
    ):
        list(training_batches(Killer("train", num_images=7), recipe(), start=1, stop=9, workers=1))
    assert loader_processes() == []
    batches = training_batches(DATASET, recipe(), start=0, stop=3, workers=1)
    assert [digest(batch) for batch in batches] == digests(0, 3, workers=0)
    assert signal.getsignal(signal.SIGCHLD) is handler


def test_signals_to_the_whole_process_group_leave_the_workers_at_work():
    batches = training_batches(DATASET, recipe(), start=0, stop=50, workers=2)
    found = [digest(next(batches)) for _ in range(2)]  # one of each: both have begun
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGTERM):
        for worker in loader_processes():
            os.kill(worker.pid, number)
    found += [digest(batch) for batch in batches]
    assert found == digests(0, 50, workers=0)


def test_a_loader_may_be_left_early(capfd):
    batches = training_batches(DATASET, recipe(), start=0, stop=1000, workers=2)
    next(batches)
    batches.close()
    assert capfd.readouterr() == ("", "")
    assert loader_processes() == []

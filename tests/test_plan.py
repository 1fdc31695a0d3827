"""What fits into memory, and a rehearsal that leaves nothing behind."""

import pytest

from segdeformer.config import load_recipe
from segdeformer.data.built_in import SyntheticDataset
from segdeformer.data.samples import Splits
from segdeformer.errors import UsageError, UserError
from segdeformer.runtime import ON_CPU, Runtime
from segdeformer.runtime.distributed import Processes
from segdeformer.training import plan
from segdeformer.training.plan import Fit, fit_batch, rehearse
from segdeformer.training.run import Options
from segdeformer.training.step import TooFewValuesError

DATA = Splits(
    SyntheticDataset("train", num_images=7, size_hw=(49, 63)),
    SyntheticDataset("val", num_images=1, size_hw=(33, 41)),
)
HOW = {"runtime": ON_CPU, "options": Options()}


def recipe(crop: tuple[int, int] = (40, 48), **train: object):
    base = load_recipe("synthetic")
    return base.model_copy(
        update={
            "augment": base.augment.model_copy(update={"crop": crop}),
            "train": base.train.model_copy(update=train),
        }
    )


class Memory:
    """In place of rehearsals: 100 MiB and 30 for each image; `least` images suffice for a BatchNorm."""

    def __init__(self, least: int = 1) -> None:
        self.least = least
        self.tried: list[int] = []

    def __call__(self, short, *_data, **_options):
        size = short.train.batch_size
        self.tried.append(size)
        if size < self.least:
            raise TooFewValuesError("one value")
        return plan.Rehearsal(None, 0.0, 0.0, 100.0 + 30.0 * size, [])


@pytest.fixture
def memory(monkeypatch):
    def fake(available_mib: float, **settings: int) -> Memory:
        rehearsals = Memory(**settings)
        monkeypatch.setattr(plan, "rehearse", rehearsals)
        monkeypatch.setattr(plan, "available_memory_mib", lambda _device: available_mib)
        return rehearsals

    return fake


@pytest.mark.parametrize(
    ("available_mib", "micro_batch_size"),
    [(1000.0, 12), (460.0 / 0.8, 12), (459.0 / 0.8, 6), (200.0 / 0.8, 3), (130.0 / 0.8, 1)],
)
def test_a_cpu_s_largest_part_is_reckoned_from_two_small_ones(memory, available_mib, micro_batch_size):
    tried = memory(available_mib).tried
    fit = fit_batch(recipe(batch_size=12), DATA, **HOW)
    assert fit == Fit(
        12 // micro_batch_size, micro_batch_size, 100.0 + 30.0 * micro_batch_size, 0.8 * available_mib
    )
    assert tried == [1, 2]


def test_parts_too_small_for_a_batch_norm_are_none(memory):
    tried = memory(240.0 / 0.8, least=2).tried
    fit = fit_batch(recipe(batch_size=12), DATA, **HOW)
    assert (fit.micro_batch_size, fit.accumulate) == (4, 3)
    assert tried == [1, 2, 3]
    memory(240.0, least=2)
    with pytest.raises(TooFewValuesError):
        fit_batch(recipe(batch_size=1), DATA, **HOW)


def test_where_nothing_fits_it_says_what_to_change(memory):
    memory(100.0)
    with pytest.raises(UserError) as caught:
        fit_batch(recipe(batch_size=12), DATA, **HOW)
    assert str(caught.value) == (
        "micro-batches of 1 image take 130 MiB or more, a process has 80 MiB; use --grad-checkpointing, or "
        "a smaller augment.crop"
    )
    with pytest.raises(UsageError, match="batch_size is 12, which 5 processes cannot share evenly"):
        fit_batch(recipe(batch_size=12), DATA, runtime=Runtime(processes=Processes(0, 5)), options=Options())


@pytest.mark.parametrize("iterations", [1, 9])
def test_a_rehearsal_takes_up_to_two_real_steps_and_leaves_nothing(tmp_path, monkeypatch, iterations):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    config = recipe(iterations=iterations, validate_every=1, checkpoint_every=1)
    found = rehearse(config, DATA, **HOW)
    assert len(found.losses) == min(2, iterations)
    assert all(0.5 < loss < 5.0 for loss in found.losses)
    assert list(tmp_path.glob("segdeformer-*")) == []  # PyTorch may keep a cache there


def test_a_real_search_passes_over_the_single_image_that_a_batch_norm_refuses():
    """The coarsest map of a 32x32 crop is one pixel."""
    fit = fit_batch(recipe((32, 32), batch_size=4), DATA, **HOW)
    assert (fit.accumulate, fit.micro_batch_size) == (1, 4)

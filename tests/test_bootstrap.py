"""The paired bootstrap: against enumeration, against a loop over images, and that pairing is what it says."""

import itertools
import math

import numpy as np
import pytest

from segdeformer.inference.metrics import ConfusionMatrix, Scores
from segdeformer.inference.statistics import ImageSums, draws, gain_intervals, image_sums, ious, mious


def confusions(num_seeds: int, num_images: int, num_classes: int, *, key: int) -> np.ndarray:
    """Random counts (S, N, K, K) with many zeros, so that classes are absent from some images."""
    rng = np.random.default_rng(key)
    shape = (num_seeds, num_images, num_classes, num_classes)
    return rng.integers(0, 40, shape) * (rng.random(shape) < 0.4)


def scores_of(counts_NKK: np.ndarray) -> Scores:
    """As the project's evaluation computes them, from summed confusion matrices."""
    confusion = ConfusionMatrix(counts_NKK.shape[-1])
    confusion.counts_KK += counts_NKK.sum(0)
    return confusion.scores()


def miou_of(counts_NKK: np.ndarray) -> float:
    return scores_of(counts_NKK).miou


def ious_of(counts_NKK: np.ndarray) -> np.ndarray:
    return scores_of(counts_NKK).iou_K


def test_miou_of_the_sums_is_that_of_the_evaluation() -> None:
    counts_SNKK = confusions(3, 5, 4, key=1)
    counts_SNKK[:, :, 2, :] = counts_SNKK[:, :, :, 2] = 0  # a class that neither occurs nor is predicted
    expected = [miou_of(counts_NKK) for counts_NKK in counts_SNKK]
    assert mious(image_sums(counts_SNKK)) == pytest.approx(expected, abs=1e-15)
    expected_SK = np.stack([ious_of(counts_NKK) for counts_NKK in counts_SNKK])
    assert np.isnan(expected_SK[:, 2]).all()
    np.testing.assert_allclose(ious(image_sums(counts_SNKK)), expected_SK, rtol=1e-15)


def test_miou_without_any_class_is_nan() -> None:
    assert math.isnan(mious(image_sums(np.zeros((1, 2, 3, 3), int)))[0])


def test_interval_of_three_images_is_that_of_all_27_resamples() -> None:
    # Hits of one class among 10 pixels an image: the gain of an image is -1, 0 or +5 tenths.
    ours = ImageSums(np.array([[[4.0], [5.0], [9.0]]]), np.full((1, 3, 1), 10.0))
    theirs = ImageSums(np.array([[[5.0], [5.0], [4.0]]]), np.full((1, 3, 1), 10.0))
    gains = [sum(drawn) / 30 for drawn in itertools.product([-1, 0, 5], repeat=3)]
    assert len(gains) == 27
    # Each end of the range has probability 1/27, more than 2.5 %, so the percentiles are the ends themselves.
    interval = gain_intervals(ours, theirs, draws(3, 1)).miou
    assert interval == pytest.approx((min(gains), max(gains)), abs=1e-15)
    # 68.5 %: between the 15.75 % and the 84.25 % of the 27 ordered gains, both inside a step of theirs.
    low, high = (sorted(gains)[math.floor(27 * share)] for share in (0.1575, 0.8425))
    assert gain_intervals(ours, theirs, draws(3, 1, 20_000), level=0.685).miou == pytest.approx((low, high))


def test_draws_have_the_shares_of_a_bootstrap() -> None:
    drawn = draws(7, 2, 50_000)
    assert np.all(drawn.images_RN.sum(1) == 7) and np.all(drawn.seeds_RS.sum(1) == 2)
    # An image is drawn once on average, with variance 1 - 1/7, and left out with probability (6/7)^7.
    assert drawn.images_RN.mean(0) == pytest.approx(np.ones(7), abs=0.02)
    assert drawn.images_RN.var(0) == pytest.approx(np.full(7, 6 / 7), abs=0.03)
    assert (drawn.images_RN == 0).mean() == pytest.approx((6 / 7) ** 7, abs=0.005)
    assert [(drawn.seeds_RS[:, 0] == n).mean() for n in (0, 1, 2)] == pytest.approx(
        [0.25, 0.5, 0.25], abs=0.01
    )


def test_draws_of_images_do_not_depend_on_the_number_of_seeds() -> None:
    assert np.array_equal(draws(5, 1, 9).images_RN, draws(5, 3, 9).images_RN)
    assert np.array_equal(draws(5, 3, 9).seeds_RS, draws(5, 3, 9).seeds_RS)


@pytest.mark.parametrize(("num_seeds", "num_images", "num_classes"), [(1, 5, 2), (2, 7, 3), (3, 1, 5)])
def test_interval_is_that_of_a_loop_over_resamples(num_seeds: int, num_images: int, num_classes: int) -> None:
    ours, theirs = (confusions(num_seeds, num_images, num_classes, key=key) for key in (3, 4))
    drawn = draws(num_images, num_seeds, 101)
    gains, class_gains = [], []
    for images_N, seeds_S in zip(drawn.images_RN, drawn.seeds_RS, strict=True):
        images = np.repeat(np.arange(num_images), images_N)
        seeds = np.repeat(np.arange(num_seeds), seeds_S)
        gains.append(np.mean([miou_of(ours[s, images]) - miou_of(theirs[s, images]) for s in seeds]))
        class_gains.append(
            np.mean([ious_of(ours[s, images]) - ious_of(theirs[s, images]) for s in seeds], axis=0)
        )
    expected = np.percentile(gains, [5, 95])
    intervals = gain_intervals(image_sums(ours), image_sums(theirs), drawn, level=0.9)
    assert intervals.miou == pytest.approx(tuple(expected), abs=1e-14)
    for label in range(num_classes):
        expected = np.nanpercentile([gains_K[label] for gains_K in class_gains], [5, 95])
        assert intervals.classes[label] == pytest.approx(tuple(expected), abs=1e-14)


def test_equal_rows_gain_exactly_nothing() -> None:
    sums = image_sums(confusions(3, 11, 4, key=5))
    assert gain_intervals(sums, sums, draws(11, 3)).miou == (0.0, 0.0)


def test_what_both_rows_have_in_common_does_not_widen_the_interval() -> None:
    """Images from very hard to very easy, one row a constant above the other: unpaired it would be lost."""
    hits_SNK = np.linspace(5, 90, 20)[None, :, None]
    union_SNK = np.full((1, 20, 1), 100.0)
    ours, theirs = ImageSums(hits_SNK + 2, union_SNK), ImageSums(hits_SNK, union_SNK)
    assert gain_intervals(ours, theirs, draws(20, 1)).miou == pytest.approx((0.02, 0.02))
    shuffled = ImageSums(hits_SNK[:, ::-1], union_SNK)
    low, high = gain_intervals(ours, shuffled, draws(20, 1)).miou
    assert low < -0.1 and high > 0.1


def test_seeds_that_differ_widen_the_interval() -> None:
    union_SNK = np.full((2, 30, 1), 100.0)
    baseline = ImageSums(np.full((2, 30, 1), 50.0), union_SNK)
    apart = ImageSums(np.stack([np.full((30, 1), 48.0), np.full((30, 1), 56.0)]), union_SNK)
    # All images are alike, so only the seeds vary: gains of -2 and +6 points, drawn twice.
    assert gain_intervals(apart, baseline, draws(30, 2)).miou == pytest.approx((-0.02, 0.06))


def test_rows_of_other_images_are_refused() -> None:
    three, four = (image_sums(confusions(1, n, 2, key=6)) for n in (3, 4))
    with pytest.raises(ValueError, match=r"\(1, 3, 2\), the baseline \(1, 4, 2\)"):
        gain_intervals(three, four, draws(3, 1))

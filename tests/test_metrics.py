"""Scores from confusion matrices, against numbers worked out by hand."""

import math

import numpy as np
import pytest

from segdeformer.inference.metrics import ConfusionMatrix


def test_scores_of_a_matrix_worked_out_by_hand():
    confusion = ConfusionMatrix(3)
    confusion.add(np.array([[0, 0, 1, 1], [1, 255, 0, 255]]), np.array([[0, 1, 1, 1], [0, 2, 0, 0]]))
    assert confusion.counts_KK.tolist() == [[2, 1, 0], [1, 2, 0], [0, 0, 0]]
    scores = confusion.scores()
    assert scores.iou_K[:2].tolist() == [0.5, 0.5]
    assert math.isnan(scores.iou_K[2])  # neither true nor predicted: prediction 2 stands on an ignored pixel
    assert scores.miou == 0.5
    assert scores.accuracy_K[:2].tolist() == pytest.approx([2 / 3, 2 / 3])
    assert scores.macc == pytest.approx(2 / 3)
    assert confusion.pixel_accuracy == pytest.approx(4 / 6)


def test_a_class_only_predicted_counts_with_iou_zero_but_has_no_accuracy():
    confusion = ConfusionMatrix(2)
    confusion.add(np.zeros((2, 2), np.uint8), np.array([[0, 0], [0, 1]], np.uint8))
    assert confusion.scores().iou_K.tolist() == [0.75, 0.0]
    assert confusion.scores().miou == 0.375
    assert confusion.scores().macc == 0.75


def test_sums_over_images_are_not_means_of_images():
    confusion = ConfusionMatrix(2)
    confusion.add(np.zeros((1, 9), np.uint8), np.zeros((1, 9), np.uint8))
    confusion.add(np.ones((1, 1), np.uint8), np.zeros((1, 1), np.uint8))
    assert confusion.scores().iou_K.tolist() == [0.9, 0.0]


def test_many_ids_do_not_overflow_uint8_arithmetic():
    rng = np.random.default_rng(0)
    truth, predicted = (rng.integers(0, 171, (63, 65), dtype=np.uint8) for _ in range(2))
    confusion = ConfusionMatrix(171)
    confusion.add(truth, predicted)
    expected = np.zeros((171, 171), int)
    np.add.at(expected, (truth.astype(int), predicted.astype(int)), 1)
    np.testing.assert_array_equal(confusion.counts_KK, expected)


def test_nothing_but_ignored_pixels_has_no_score():
    confusion = ConfusionMatrix(2)
    confusion.add(np.full((2, 2), 255), np.zeros((2, 2), int))
    assert math.isnan(confusion.scores().miou)
    assert math.isnan(confusion.pixel_accuracy)


def test_maps_of_two_sizes_are_refused():
    with pytest.raises(ValueError, match=r"truth is \(2, 2\), prediction \(2, 3\)"):
        ConfusionMatrix(2).add(np.zeros((2, 2), int), np.zeros((2, 3), int))

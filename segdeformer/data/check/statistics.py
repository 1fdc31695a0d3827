"""How often each class occurs, what follows for the loss, and the images' mean and deviation. K classes."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from segdeformer.data.check.examine import Exam, Levels

WEIGHT_RULE = "median-frequency"


class ColorScale(NamedTuple):
    """In the recipe's units: levels of 0 to 255 by channel, RGB."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


class Histogram:
    """Running sums over the pairs of a split; of a pair with useless labels only the levels count."""

    def __init__(self, num_classes: int) -> None:
        self.pixels_K = np.zeros(num_classes, np.int64)
        self.images_K = np.zeros(num_classes, np.int64)  # that hold the class
        self.pixels_of_images_K = np.zeros(num_classes, np.int64)  # labelled pixels of those images
        self.ignored = 0
        self.levels = Levels(0, np.zeros(3), np.zeros(3))

    def add(self, exam: Exam) -> None:
        if exam.levels is not None:
            (pixels, sum_3, squares_3), new = self.levels, exam.levels
            self.levels = Levels(pixels + new[0], sum_3 + new[1], squares_3 + new[2])
        if exam.count_K is not None:
            present_K = exam.count_K > 0
            self.pixels_K += exam.count_K
            self.images_K += present_K
            self.pixels_of_images_K += present_K * int(exam.count_K.sum())
            self.ignored += exam.ignored

    def color_scale(self) -> ColorScale | None:
        """None when no image could be read."""
        pixels, sum_3, sum_of_squares_3 = self.levels
        if not pixels:
            return None
        mean_3 = sum_3 / pixels
        std_3 = np.sqrt(np.maximum(sum_of_squares_3 / pixels - mean_3**2, 0))
        return ColorScale(*(tuple(round(float(x), 3) for x in values) for values in (mean_3, std_3)))

    def class_weights(self) -> tuple[float, ...]:
        """Median-frequency balancing (Eigen and Fergus, 2015): median frequency / frequency of the class.

        The frequency is counted among the labelled pixels of the images that hold the class. A class that
        never occurs weighs 1.
        """
        occurs_K = self.pixels_K > 0
        if not occurs_K.any():
            return tuple(1.0 for _ in self.pixels_K)
        frequency_K = self.pixels_K / np.maximum(self.pixels_of_images_K, 1)
        median = float(np.median(frequency_K[occurs_K]))
        weight_K = np.divide(median, frequency_K, out=np.ones(len(occurs_K)), where=occurs_K)
        return tuple(float(f"{weight:.4g}") for weight in weight_K)

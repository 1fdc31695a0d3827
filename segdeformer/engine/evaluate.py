"""Score a model on a data set, under a protocol that is written down with the score.

Memory: one image at a time, its logits in strips; sums go into one confusion matrix.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Generator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from segdeformer.config import IGNORE_INDEX, DataConfig, EvalConfig
from segdeformer.data.classes import ClassTable
from segdeformer.data.datasets import Dataset, Sample
from segdeformer.engine.inference import predict_strips
from segdeformer.engine.metrics import ConfusionMatrix, Scores
from segdeformer.errors import UserError
from segdeformer.models.segmenter import Segmenter

READERS = 2


class Report(NamedTuple):
    """Scores of one pass over a data set; `loss` is the mean cross-entropy of the valid pixels."""

    scores: Scores
    pixel_accuracy: float
    loss: float
    num_images: int
    confusion_KK: np.ndarray
    classes: ClassTable


class ImageResult(NamedTuple):
    sample: Sample
    ids_HW: np.ndarray  # uint8


class Tally:
    """What is summed over the images of a data set."""

    def __init__(self, classes: ClassTable) -> None:
        self.classes = classes
        self.confusion = ConfusionMatrix(len(classes.names))
        self.loss_sum = 0.0
        self.num_images = 0

    def report(self) -> Report:
        """The scores of all images so far."""
        num_valid = int(self.confusion.counts_KK.sum())
        return Report(
            scores=self.confusion.scores(),
            pixel_accuracy=self.confusion.pixel_accuracy,
            loss=self.loss_sum / num_valid if num_valid else math.nan,
            num_images=self.num_images,
            confusion_KK=self.confusion.counts_KK,
            classes=self.classes,
        )


def evaluate(
    model: Segmenter, dataset: Dataset, *, protocol: EvalConfig, data: DataConfig, device: torch.device
) -> Report:
    """Run every image of the data set through the model and sum up; see `evaluate_images`."""
    tally = Tally(dataset.classes)
    for _ in evaluate_images(model, dataset, tally, protocol=protocol, data=data, device=device):
        pass
    return tally.report()


def evaluate_images(
    model: Segmenter,
    dataset: Dataset,
    tally: Tally,
    *,
    protocol: EvalConfig,
    data: DataConfig,
    device: torch.device,
) -> Generator[ImageResult, None, None]:
    """Predict image by image, in order, for callers that draw or may want to stop; sums go into `tally`.

    The model is put into eval mode and left so. Raises `UserError` if the data set is empty.
    """
    if len(dataset) == 0:
        raise UserError(f"{data.name}: the {dataset.split} split has no images to evaluate")
    model.eval()
    with closing(_read_ahead(dataset)) as samples:
        for sample in samples:
            ids_HW = np.empty(sample.labels_HW.shape, np.uint8)
            for strip in predict_strips(model, sample.image_HW3, protocol, data, device):
                rows = slice(strip.top, strip.top + strip.logits_KrW.shape[1])
                ids_HW[rows] = strip.ids().to(torch.uint8).cpu().numpy()
                labels_rW = torch.from_numpy(sample.labels_HW[rows].astype(np.int64)).to(device)
                tally.loss_sum += F.cross_entropy(
                    strip.logits_KrW[None], labels_rW[None], ignore_index=IGNORE_INDEX, reduction="sum"
                ).item()
            tally.confusion.add(sample.labels_HW, ids_HW)
            tally.num_images += 1
            yield ImageResult(sample, ids_HW)


def _read_ahead(dataset: Dataset) -> Generator[Sample, None, None]:
    """The samples in order, the next few already being read."""
    with ThreadPoolExecutor(READERS) as pool:
        waiting: deque[Future[Sample]] = deque()
        try:
            for index in range(len(dataset)):
                waiting.append(pool.submit(dataset.read, index))
                if len(waiting) > READERS:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def check_same_classes(model_classes: ClassTable, dataset: Dataset, what: str) -> None:
    """Raise `UserError` unless the data has as many classes, with the same names, as the checkpoint."""
    ours, theirs = model_classes.names, dataset.classes.names
    if len(ours) != len(theirs):
        raise UserError(
            f"{what} predicts {len(ours)} classes, {dataset.name} has {len(theirs)}; "
            "evaluate it on data with the classes it was trained on"
        )
    for index, (our, their) in enumerate(zip(ours, theirs, strict=True)):
        if our != their:
            raise UserError(
                f"{what}: class {index} is `{our}`, in {dataset.name} it is `{their}`; "
                "the ids would be compared wrongly, so make the class tables agree"
            )


def protocol_notes(protocol: EvalConfig) -> str:
    """In words, what the fields of a protocol leave open."""
    if protocol.mode == "slide":
        path = (
            "logits of each window are resized to the window, summed, divided by the number of windows over "
            "each pixel, and resized to the image's own size before argmax; the last window shifts inwards"
        )
    else:
        path = "logits are resized once, from the decoder's map to the image's own size, before argmax"
    several = (
        "softmax is averaged over scales and flip; " if protocol.flip or len(protocol.scales) > 1 else ""
    )
    return (
        f"{path}; every resize is bilinear with align_corners=False; {several}"
        "sums over the whole data set, nan-mean over classes; label 255 is ignored"
    )


def report_values(report: Report) -> dict[str, Any]:
    """The report as JSON values; shares in [0, 1], null where a class has no IoU."""

    def value(number: float) -> float | None:
        return float(number) if math.isfinite(number) else None

    scores = report.scores
    return {
        "miou": value(scores.miou),
        "macc": value(scores.macc),
        "aacc": value(report.pixel_accuracy),
        "loss": value(report.loss),
        "images": report.num_images,
        "classes": [
            {
                "id": index,
                "name": name,
                "iou": value(scores.iou_K[index]),
                "accuracy": value(scores.accuracy_K[index]),
                "pixels": int(scores.pixels_K[index]),
            }
            for index, name in enumerate(report.classes.names)
        ],
        "confusion": report.confusion_KK.tolist(),
    }

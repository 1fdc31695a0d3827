"""Score a model on a data set, under a protocol that is written down with the score.

Memory: one image at a time, its logits in strips; sums go into one confusion matrix.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from segdeformer.config import IGNORE_INDEX, DataConfig, EvalConfig
from segdeformer.config.data import LARGER
from segdeformer.data.classes import ClassTable
from segdeformer.data.samples import Dataset, Sample
from segdeformer.errors import UserError
from segdeformer.inference.metrics import ConfusionMatrix, Scores
from segdeformer.inference.views import View, fused_map, make_views, strips
from segdeformer.kernels.impl import Impl
from segdeformer.kernels.upsample.argmax import add_confusion, upsample_confusion
from segdeformer.kernels.upsample.cross_entropy import upsample_cross_entropy
from segdeformer.models.segmenter import Segmenter
from segdeformer.runtime import ON_CPU, Runtime
from segdeformer.runtime.device import moved
from segdeformer.runtime.distributed import Processes, from_all, of_this_process

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
    predicted_HW: torch.Tensor  # class ids, uint8, where they were made

    @property
    def ids(self) -> np.ndarray:
        """(H, W) uint8, brought to the CPU."""
        return self.predicted_HW.cpu().numpy()


class Tally:
    """What is summed over the images of a data set, on the device that predicts them."""

    def __init__(self, classes: ClassTable) -> None:
        self.classes = classes
        num_classes = len(classes.names)
        self.counts_KK = torch.zeros(num_classes, num_classes, dtype=torch.int64)
        self.image_losses: list[torch.Tensor] = []  # float64, summed over the pixels of each image
        self.num_images = 0

    def move(self, device: torch.device) -> None:
        """Sum up there from now on."""
        self.counts_KK = self.counts_KK.to(device)

    def gather(self, processes: Processes) -> None:
        """Put in what the other processes have; all must call it, and have the same report after."""
        if processes.size == 1:
            return
        self.counts_KK = self.counts_KK.cpu()
        gathered = from_all((self.counts_KK, self._losses()), processes)
        self.counts_KK = torch.stack([counts_KK for counts_KK, _ in gathered]).sum(dim=0)
        losses = [loss for _, own in gathered for loss in own]
        self.image_losses = [torch.tensor(loss, dtype=torch.float64) for loss in losses]
        self.num_images = len(self.image_losses)

    def _losses(self) -> list[float]:
        return torch.stack(self.image_losses).tolist() if self.image_losses else []

    def report(self) -> Report:
        """The scores of all images so far."""
        confusion = ConfusionMatrix(len(self.classes.names))
        confusion.counts_KK += self.counts_KK.cpu().numpy()
        num_valid = int(confusion.counts_KK.sum())
        return Report(
            scores=confusion.scores(),
            pixel_accuracy=confusion.pixel_accuracy,
            # fsum: exact, so that it does not matter which process has had which image
            loss=math.fsum(self._losses()) / num_valid if num_valid else math.nan,
            num_images=self.num_images,
            confusion_KK=confusion.counts_KK,
            classes=self.classes,
        )


def evaluate(
    model: Segmenter,
    dataset: Dataset,
    *,
    protocol: EvalConfig,
    data: DataConfig,
    runtime: Runtime = ON_CPU,
) -> Report:
    """Run every image of the data set through the model and sum up; see `evaluate_images`.

    With several processes each takes its images, and all return the same report.
    """
    tally = Tally(dataset.classes)
    for _ in evaluate_images(model, dataset, tally, protocol=protocol, data=data, runtime=runtime):
        pass
    tally.gather(runtime.processes)
    return tally.report()


def evaluate_images(
    model: Segmenter,
    dataset: Dataset,
    tally: Tally,
    *,
    protocol: EvalConfig,
    data: DataConfig,
    runtime: Runtime = ON_CPU,
) -> Generator[ImageResult, None, None]:
    """Predict image by image, in order, for callers that draw or may want to stop; sums go into `tally`.

    runtime: of several processes each takes its own images only, and `tally.gather` puts the sums together;
        its impl is that of upsampling and counting, for the model's attention has its own already.
    The model is put into eval mode and left so. Raises `UserError` if the data set is empty.
    """
    if len(dataset) == 0:
        raise UserError(f"{data.name}: the {dataset.split} split has no images to evaluate")
    model.eval()
    tally.move(runtime.device)
    with closing(read_ahead(dataset, runtime.processes.own_indices(len(dataset)))) as samples:
        for sample in samples:
            views = make_views(model, sample.image_HW3, protocol, data, runtime.device)
            labels_HW = moved(torch.tensor(sample.labels_HW), runtime.device)
            with torch.inference_mode():
                predicted_HW = add_image(tally, views, labels_HW, runtime.impl)
            tally.num_images += 1
            yield ImageResult(sample, predicted_HW)


def add_image(tally: Tally, views: list[View], labels_HW: torch.Tensor, impl: Impl) -> torch.Tensor:
    """Add an image to the tally and return its class ids, uint8; a GPU is not waited for."""
    logits_1Khw = fused_map(views, impl)
    if logits_1Khw is not None:
        result = upsample_confusion(
            logits_1Khw, labels_HW[None], tally.counts_KK, ignore_index=IGNORE_INDEX, impl=impl
        )
        mean = upsample_cross_entropy(
            logits_1Khw, labels_HW[None], ignore_index=IGNORE_INDEX, average="all", impl=impl
        )
        tally.image_losses.append(mean.double() * labels_HW.numel())
        return result.ids_BHW[0]
    predicted_HW = torch.empty(labels_HW.shape, dtype=torch.uint8, device=labels_HW.device)
    loss = torch.zeros((), dtype=torch.float64, device=labels_HW.device)
    for strip in strips(views, labels_HW.shape):
        rows = slice(strip.top, strip.top + strip.logits_KrW.shape[1])
        predicted_HW[rows] = strip.ids()
        losses_1rW = F.cross_entropy(
            strip.logits_KrW[None], labels_HW[None, rows].long(), ignore_index=IGNORE_INDEX, reduction="none"
        )
        loss += losses_1rW.sum(dtype=torch.float64)  # PyTorch's own sum is not deterministic on a GPU
    tally.image_losses.append(loss)
    add_confusion(tally.counts_KK, labels_HW, predicted_HW, ignore_index=IGNORE_INDEX)
    return predicted_HW


def read_ahead(dataset: Dataset, indices: Iterable[int]) -> Generator[Sample, None, None]:
    """The samples of these indices in order, the next few already being read; raises what reading raises."""
    with ThreadPoolExecutor(READERS) as pool:
        waiting: deque[Future[Sample]] = deque()
        try:
            for index in indices:
                waiting.append(pool.submit(dataset.read, index))
                if len(waiting) > READERS:
                    yield _sample_of(waiting.popleft())
            while waiting:
                yield _sample_of(waiting.popleft())
        finally:
            for future in waiting:
                future.cancel()


def _sample_of(future: Future[Sample]) -> Sample:
    with of_this_process():
        return future.result()


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
    whole = "logits are resized once, from the decoder's map to the image's own size, before argmax"
    path = whole
    if protocol.mode != "whole":
        path = (
            "logits of each window are resized to the window, summed, divided by the number of windows over "
            "each pixel, and resized to the image's own size before argmax; the last window shifts inwards"
        )
    if protocol.mode == "auto":
        path = f"images up to {LARGER} windows a side: {whole}; larger ones: {path}"
    several = (
        "softmax is averaged over scales and flip; " if protocol.flip or len(protocol.scales) > 1 else ""
    )
    few = (
        f"attention is approximated: keys and values are means of {protocol.key_stride} x "
        f"{protocol.key_stride} pixels of the decoder's map; "
        if protocol.key_stride is not None and protocol.key_stride > 1
        else ""
    )
    return (
        f"{few}{path}; every resize is bilinear with align_corners=False; {several}"
        "sums over the whole data set, nan-mean over classes; label 255 is ignored"
    )


def report_values(report: Report) -> dict[str, Any]:
    """The report as JSON values; fractions in [0, 1], null where a class has no IoU."""

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

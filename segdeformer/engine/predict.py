"""Predict the classes of image files and write what was asked for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from segdeformer.config import DataConfig, EvalConfig
from segdeformer.data.classes import ClassTable
from segdeformer.data.images import read_image, write_png
from segdeformer.engine.inference import predict_strips
from segdeformer.errors import UserError
from segdeformer.models.segmenter import Segmenter
from segdeformer.report.pictures import confidence_map, overlay, with_legend

IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")


class Prediction(NamedTuple):
    ids_HW: np.ndarray  # uint8
    confidence_HW: np.ndarray  # float32 in [0, 1], softmax of the winner


class Job(NamedTuple):
    """One image and the file names, without endings, of its results."""

    image: Path
    result: Path


def predict_image(
    model: Segmenter,
    image_HW3: np.ndarray,
    *,
    protocol: EvalConfig,
    data: DataConfig,
    device: torch.device,
) -> Prediction:
    """Classes and confidence of a uint8 RGB image, at its own size."""
    height, width = image_HW3.shape[:2]
    prediction = Prediction(np.empty((height, width), np.uint8), np.empty((height, width), np.float32))
    for strip in predict_strips(model, image_HW3, protocol, data, device):
        rows = slice(strip.top, strip.top + strip.logits_KrW.shape[1])
        prediction.ids_HW[rows] = strip.ids().to(torch.uint8).cpu().numpy()
        prediction.confidence_HW[rows] = strip.confidence().cpu().numpy()
    return prediction


def plan_jobs(inputs: Sequence[Path], out: Path) -> list[Job]:
    """Find the images of files and folders (with their subfolders) and name their results under `out`.

    Raises `UserError` when an input is missing, a folder holds no image, or a result would overwrite
    an input.
    """
    found: list[tuple[Path, Path]] = []  # image, path relative to what was named
    for given in inputs:
        if given.is_dir():
            images = sorted(p for p in given.rglob("*") if p.suffix.lower() in IMAGE_ENDINGS and p.is_file())
            if not images:
                raise UserError(f"{given} holds no images ({', '.join(IMAGE_ENDINGS)})")
            found += [(image, image.relative_to(given)) for image in images]
        elif given.is_file():
            found.append((given, Path(given.name)))
        else:
            raise UserError(f"no image or folder {given}")
    stems = [relative.with_suffix("") for _, relative in found]
    names = [
        # two images of one stem: the ending tells their results apart
        relative if stems.count(stem) > 1 else stem
        for stem, (_, relative) in zip(stems, found, strict=True)
    ]
    doubles = {name for name in names if names.count(name) > 1}
    if doubles:
        raise UserError(f"two inputs would both be written to {out / min(doubles)}.png; predict them apart")
    jobs = [Job(image, out / name) for (image, _), name in zip(found, names, strict=True)]
    originals = {image.resolve() for image, _ in found}
    for job in jobs:
        if ids_path(job).resolve() in originals:
            raise UserError(f"the result would overwrite the input {job.image}; choose another --out")
    return jobs


def run_job(
    job: Job,
    model: Segmenter,
    *,
    classes: ClassTable,
    protocol: EvalConfig,
    data: DataConfig,
    device: torch.device,
    draw_overlay: bool,
    draw_confidence: bool,
    opacity: float,
) -> list[Path]:
    """Predict one image and write its files; returns their paths."""
    image_HW3 = read_image(job.image)
    prediction = predict_image(model, image_HW3, protocol=protocol, data=data, device=device)
    written = [ids_path(job)]
    write_png(written[0], prediction.ids_HW)
    if draw_overlay:
        shares_K = (
            np.bincount(prediction.ids_HW.ravel(), minlength=len(classes.names)) / prediction.ids_HW.size
        )
        picture = overlay(image_HW3, prediction.ids_HW, classes.colors, opacity=opacity)
        shown = [int(k) for k in np.flatnonzero(shares_K)]
        written.append(_beside(job, "overlay"))
        write_png(written[-1], with_legend(picture, classes.names, classes.colors, shown, shares=shares_K))
    if draw_confidence:
        written.append(_beside(job, "confidence"))
        write_png(written[-1], confidence_map(prediction.confidence_HW))
    return written


def ids_path(job: Job) -> Path:
    """The file of the class ids."""
    return job.result.with_name(f"{job.result.name}.png")


def _beside(job: Job, kind: str) -> Path:
    return job.result.with_name(f"{job.result.name}_{kind}.png")

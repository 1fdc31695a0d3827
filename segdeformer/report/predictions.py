"""Class maps, overlays and confidence maps of image files, written where asked."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from segdeformer.data.classes import ClassTable
from segdeformer.data.datasets import IMAGE_ENDINGS
from segdeformer.data.images import write_png
from segdeformer.data.walk import walk_files
from segdeformer.errors import UserError, listed
from segdeformer.inference.predict import Prediction
from segdeformer.report.pictures import class_shares, confidence_map, overlay, with_color_bar, with_legend

Kind = Literal["overlay", "confidence"]


class Job(NamedTuple):
    """One image, and the file name of its results without their endings."""

    image: Path
    result: Path

    def files(self, kinds: Sequence[Kind]) -> list[Path]:
        """The file of the class ids, then one for each kind."""
        endings = ["", *(f"_{kind}" for kind in kinds)]
        return [self.result.with_name(f"{self.result.name}{ending}.png") for ending in endings]


class Plan(NamedTuple):
    """What to predict, and a line for each thing in the folders that could not be visited."""

    jobs: list[Job]
    skipped: list[str]


def plan_jobs(inputs: Sequence[Path], out: Path, *, kinds: Sequence[Kind] = ()) -> Plan:
    """Find the images of files and folders (with their subfolders) and name their results under `out`.

    Raises `UserError` when an input is missing, a folder holds no image, or a result would overwrite an
    input or another result.
    """
    found: list[tuple[Path, Path]] = []  # image, path relative to what was named
    skipped: list[str] = []
    for given in inputs:
        if given.is_dir():
            walk = walk_files(given)
            images = [path for path in walk.files if path.suffix.lower() in IMAGE_ENDINGS]
            skipped += walk.skipped
            if not images:
                unvisited = f"; not visited: {listed(walk.skipped)}" if walk.skipped else ""
                raise UserError(f"{given} holds no images ({', '.join(IMAGE_ENDINGS)}){unvisited}")
            found += [(image, image.relative_to(given)) for image in images]
        elif given.is_file():
            found.append((given, Path(given.name)))
        else:
            raise UserError(f"no image or folder {given}")
    stems = Counter(relative.with_suffix("") for _, relative in found)
    jobs = [
        # two images of one stem: the ending tells their results apart
        Job(image, out / (relative if stems[relative.with_suffix("")] > 1 else relative.with_suffix("")))
        for image, relative in found
    ]
    results = Counter(path for job in jobs for path in job.files(kinds))
    if doubles := [path for path, count in results.items() if count > 1]:
        raise UserError(f"two inputs would both be written to {min(doubles)}; predict them apart")
    originals = {image.resolve() for image, _ in found}
    for path in results:
        if path.resolve() in originals:
            raise UserError(f"the result would overwrite the input {path}; choose another --out")
    return Plan(jobs, skipped)


def write_prediction(
    job: Job,
    image_HW3: np.ndarray,
    prediction: Prediction,
    classes: ClassTable,
    *,
    kinds: Sequence[Kind],
    opacity: float,
) -> list[Path]:
    """Write the ids as they are, and the pictures asked for; returns the files' paths."""
    files = job.files(kinds)
    write_png(files[0], prediction.ids_HW)
    for path, kind in zip(files[1:], kinds, strict=True):
        if kind == "overlay":
            shares_K = class_shares(prediction.ids_HW, len(classes.names))
            coloured = overlay(image_HW3, prediction.ids_HW, classes.colors, opacity=opacity)
            shown_K = np.flatnonzero(shares_K)
            picture = with_legend(coloured, classes.names, classes.colors, shown_K, shares=shares_K)
        else:
            picture = with_color_bar(confidence_map(prediction.confidence_HW))
        write_png(path, picture)
    return files

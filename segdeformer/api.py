"""The door: train, evaluate and predict from Python, as the commands of the same names do."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from segdeformer.config import EvalConfig, Recipe
from segdeformer.data.datasets import choose_data, open_dataset
from segdeformer.data.images import read_image
from segdeformer.data.samples import Dataset, Splits
from segdeformer.errors import UsageError
from segdeformer.inference.evaluate import Report, check_same_classes
from segdeformer.inference.evaluate import evaluate as evaluate_model
from segdeformer.inference.predict import Prediction, predict_image
from segdeformer.measure.implementation import settle_inference, settle_training
from segdeformer.models.segmenter import Segmenter
from segdeformer.runtime import Runtime, choose_runtime
from segdeformer.training.loop import Event
from segdeformer.training.loop import train as train_run
from segdeformer.training.prepare import Wanted, new_folder, prepare
from segdeformer.training.run import DEFAULT_OPTIONS, Options, Run, resume_run, start_run
from segdeformer.weights.checkpoint import Loaded, load


class Training:
    """A run that has begun; going through it trains, one event after another.

    Events are `training.loop.Step`, `Skipped`, `Validating`, `Validated` and `Stopped`. Where nobody asks for
    the next event, nothing is computed.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self._is_stopped = False

    @property
    def folder(self) -> Path:
        """Of checkpoints, recipe and metrics; `best.safetensors` is what `load(folder)` takes."""
        return self.run.folder

    @property
    def model(self) -> Segmenter:
        """In training mode; its weights change with every step."""
        return self.run.model

    def stop(self) -> None:
        """Save and end after the step whose event came last; `train(resume=True)` goes on from there."""
        self._is_stopped = True

    def __iter__(self) -> Iterator[Event]:
        return train_run(self.run, should_stop=lambda: self._is_stopped)


def train(
    recipe: Recipe | str | None = None,
    *,
    data: Splits | str | None = None,
    model: Segmenter | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    device: str = "auto",
    impl: str = "auto",
    workers: int | None = None,
    options: Options = DEFAULT_OPTIONS,
) -> Training:
    """Begin a run, or go on with the one in `out`; everything is checked before the first step.

    recipe: a `Recipe`, or what `load_recipe` takes; by default the data's own.
    data: `landcover`, `NAME:FOLDER` or a folder, or data sets of one's own (see `data.datasets.Dataset`).
    model: one's own, trained as it is handed over; to load its checkpoints, hand it to `load` again.
    out: run folder; by default a new one under runs/.
    Raises `UserError` in one line for whatever does not exist or does not fit.
    """
    runtime = choose_runtime(device, impl, workers)
    spec, splits = (data, None) if data is None or isinstance(data, str) else (None, data)
    folder = None if out is None else Path(out)
    if resume and (recipe is not None or folder is None):
        raise UsageError("resume goes on with the run in `out`, by its own recipe; give `out` and no recipe")
    prepared = prepare(Wanted(recipe, spec), folder if resume else None, splits)
    begin = resume_run if resume else start_run
    run = begin(
        prepared.recipe,
        folder or new_folder(prepared.recipe.name),
        prepared.data,
        runtime=runtime,
        options=options,
        model=model,
    )
    if not run.complete:
        settle_training(run, say=lambda line: None)
    return Training(run)


def evaluate(
    model: Loaded | str | Path,
    data: Dataset | str | None = None,
    *,
    protocol: EvalConfig | None = None,
    device: str = "auto",
    impl: str = "auto",
) -> Report:
    """Score a model of `load`, or of a checkpoint or run folder, on validation data.

    data: as `train` takes it; by default the checkpoint's. protocol: by default its recipe's.
    Raises `UserError` in one line when the data is not there or has other classes.
    """
    loaded, runtime = _loaded(model, device, impl)
    recipe = loaded.checkpoint.recipe
    protocol = protocol or recipe.evaluate
    config = recipe.data
    if data is None or isinstance(data, str):
        config = choose_data(config, data)
        data = open_dataset(config, "val")
    check_same_classes(loaded.checkpoint.classes, data, str(loaded.checkpoint.path))
    settle_inference(loaded.model, recipe, protocol, runtime=runtime, say=lambda line: None)
    return evaluate_model(loaded.model, data, protocol=protocol, data=config, runtime=runtime)


def predict(
    model: Loaded | str | Path,
    image: np.ndarray | str | Path,
    *,
    protocol: EvalConfig | None = None,
    device: str = "auto",
    impl: str = "auto",
) -> Prediction:
    """Classes and confidence of an image, at its own size.

    image: (H, W, 3) uint8 RGB, or a file. A checkpoint that is named is read at every call: for many images
    hand over what `load` gives. Raises `UserError` for a file that cannot be read.
    """
    loaded, runtime = _loaded(model, device, impl)
    recipe = loaded.checkpoint.recipe
    protocol = protocol or recipe.evaluate
    settle_inference(loaded.model, recipe, protocol, runtime=runtime, say=lambda line: None)
    pixels_HW3 = image if isinstance(image, np.ndarray) else read_image(Path(image))
    return predict_image(loaded.model, pixels_HW3, protocol=protocol, data=recipe.data, runtime=runtime)


def _loaded(model: Loaded | str | Path, device: str, impl: str) -> tuple[Loaded, Runtime]:
    """The model in eval mode on the device; in its fastest form, if it is read here."""
    if isinstance(model, Loaded):
        own = next(model.model.parameters()).device
        return model, choose_runtime(str(own), impl)
    runtime = choose_runtime(device, impl)
    loaded = load(model, device=runtime.device, impl=runtime.impl)
    return loaded._replace(model=loaded.model.for_inference()), runtime

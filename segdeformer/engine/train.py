"""The training loop, as a stream of events that a command line shows.

Every iteration reseeds PyTorch from (seed, iteration) and takes the batch of (seed, iteration), so
a resumed run needs no replay and no stored generator.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from segdeformer.config import IGNORE_INDEX, Recipe, recipe_toml
from segdeformer.data.datasets import Dataset
from segdeformer.data.loader import Batch, training_batches
from segdeformer.engine.checkpoint import (
    BEST,
    LAST,
    drop_old_states,
    load_state,
    read_checkpoint,
    save_checkpoint,
    save_state,
    saved_model,
)
from segdeformer.engine.device import explained_shortage
from segdeformer.engine.evaluate import Report, Tally, evaluate_images, report_values
from segdeformer.engine.losses import Losses, training_losses
from segdeformer.engine.optimizer import (
    ParameterGroup,
    build_optimizer,
    parameter_groups,
    set_learning_rate,
)
from segdeformer.engine.runlog import RunLog
from segdeformer.errors import UserError
from segdeformer.files import write_text
from segdeformer.kernels.impl import Impl
from segdeformer.kernels.upsample_cross_entropy import check_labels
from segdeformer.models.segmenter import Segmenter, build_model

LOG_EVERY = 10
RECIPE = "recipe.toml"


class Step(NamedTuple):
    """One optimiser step is done. The losses stay on the device until somebody reads them."""

    iteration: int  # steps done so far
    losses: Losses
    learning_rate: float  # the encoder's
    images_per_second: float  # as last measured


class Validating(NamedTuple):
    """One more validation image is done."""

    num_done: int
    num_images: int


class Validated(NamedTuple):
    iteration: int
    report: Report
    is_best: bool


class Stopped(NamedTuple):
    """`should_stop` said so; everything up to `iteration` is saved."""

    iteration: int


Event = Step | Validating | Validated | Stopped


@dataclass
class Run:
    """A model in training and everything that goes with it."""

    recipe: Recipe
    folder: Path
    train_data: Dataset
    val_data: Dataset
    model: Segmenter
    groups: list[ParameterGroup]
    optimizer: torch.optim.AdamW
    device: torch.device
    impl: Impl = "auto"
    iteration: int = 0
    best_miou: float | None = None
    validation_due: bool = False  # of this iteration; stays true only where one was stopped

    @property
    def complete(self) -> bool:
        """Nothing is left to train or to validate."""
        return self.iteration >= self.recipe.train.iterations and not self.validation_due


def start_run(
    recipe: Recipe,
    folder: Path,
    *,
    train_data: Dataset,
    val_data: Dataset,
    device: torch.device,
    impl: Impl = "auto",
) -> Run:
    """Build the model and make the run folder with its resolved recipe.

    Raises `UserError` when the folder already holds a run, the data is empty, or the recipe's number
    of classes is not the data's.
    """
    if (folder / RECIPE).exists():
        raise UserError(f"{folder} holds a run already; go on with --resume, or choose another --out")
    _check_data(recipe, train_data)
    _check_data(recipe, val_data)
    torch.manual_seed(recipe.train.seed)
    run = _assemble(recipe, folder, train_data, val_data, device, build_model(recipe.model, impl=impl))
    run.impl = impl
    write_text(folder / RECIPE, recipe_toml(recipe))
    return run


def resume_run(
    recipe: Recipe,
    folder: Path,
    *,
    train_data: Dataset,
    val_data: Dataset,
    device: torch.device,
    impl: Impl = "auto",
) -> Run:
    """Go on from the run's last checkpoint; the next batch is the one that would have come."""
    checkpoint = read_checkpoint(folder / LAST)
    if checkpoint.folded:
        raise UserError(f"{checkpoint.path} holds a folded model, for inference only; it cannot be trained")
    _check_data(recipe, train_data)
    _check_data(recipe, val_data)
    model = saved_model(checkpoint, impl=impl)
    run = _assemble(recipe, folder, train_data, val_data, device, model)
    run.impl = impl
    load_state(folder, run.optimizer, checkpoint.iteration)
    run.iteration = checkpoint.iteration
    run.best_miou = checkpoint.best_miou
    run.validation_due = checkpoint.validation_due
    write_text(folder / RECIPE, recipe_toml(recipe))
    return run


def _check_data(recipe: Recipe, dataset: Dataset) -> None:
    if len(dataset) == 0:
        raise UserError(f"{dataset.name}: the {dataset.split} split has no images")
    num_classes = len(dataset.classes.names)
    if num_classes != recipe.model.num_classes:
        raise UserError(
            f"recipe {recipe.name} has model.num_classes = {recipe.model.num_classes}, "
            f"{dataset.name} has {num_classes} classes; set it to {num_classes}"
        )


def _assemble(
    recipe: Recipe,
    folder: Path,
    train_data: Dataset,
    val_data: Dataset,
    device: torch.device,
    model: Segmenter,
) -> Run:
    model.to(device)
    groups = parameter_groups(model, recipe.train)
    optimizer = build_optimizer(groups, recipe.train)
    return Run(recipe, folder, train_data, val_data, model, groups, optimizer, device)


def train(run: Run, *, workers: int = 0, should_stop: Callable[[], bool] = lambda: False) -> Iterator[Event]:
    """Train from `run.iteration` to the end, validating and saving at the recipe's intervals.

    The last iteration is always validated and saved. `should_stop` is asked between steps and between
    validation images; then the run is saved and the stream ends with `Stopped`.
    Raises `UserError` when the loss is no longer finite.
    """
    config = run.recipe.train
    weights_K = None
    if config.class_weights is not None:
        weights_K = torch.tensor(config.class_weights, device=run.device)
    batches = training_batches(
        run.train_data,
        run.recipe,
        start=run.iteration,
        stop=config.iterations,
        workers=workers,
        pin_memory=run.device.type == "cuda",
    )
    with RunLog(run.folder, since=run.iteration) as log, closing(batches):
        if run.validation_due:  # it was stopped in the middle of one
            yield from _validate(run, log, should_stop)
            save_run(run)
            if run.validation_due:
                yield Stopped(run.iteration)
                return
        images_per_second, began, since = 0.0, time.perf_counter(), run.iteration
        for batch in batches:
            losses = _step(run, batch, weights_K)
            done = run.iteration == config.iterations
            is_validated = done or run.iteration % config.validate_every == 0
            is_saved = done or run.iteration % config.checkpoint_every == 0
            is_logged = done or run.iteration == 1 or run.iteration % LOG_EVERY == 0
            if is_logged or is_validated or is_saved:
                _check_finite(run, batch, losses)
            if is_logged:  # the check has waited for the device: now the time of the steps is known
                num_images = config.batch_size * (run.iteration - since)
                images_per_second = num_images / (time.perf_counter() - began)
                log.write(_step_values(run, losses, images_per_second))
                began, since = time.perf_counter(), run.iteration
            yield Step(run.iteration, losses, _learning_rate(run), images_per_second)
            if is_validated:
                run.validation_due = True
                yield from _validate(run, log, should_stop)
                began, since = time.perf_counter(), run.iteration
            stopped = run.validation_due or (should_stop() and not done)
            if is_saved or stopped:
                save_run(run)
                began, since = time.perf_counter(), run.iteration
            if stopped:
                yield Stopped(run.iteration)
                return


def _step(run: Run, batch: Batch, class_weights_K: torch.Tensor | None) -> Losses:
    torch.manual_seed(_step_seed(run.recipe.train.seed, run.iteration))
    run.model.train()
    set_learning_rate(run.optimizer, run.iteration, run.recipe.train)
    images_B3HW = batch.images_B3HW.to(run.device, non_blocking=True)
    labels_BHW = batch.labels_BHW.to(run.device, non_blocking=True)
    with explained_shortage("use a smaller --batch or augment.crop"):
        try:
            output = run.model(images_B3HW)
        except UserError:
            raise
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            raise UserError(
                "BatchNorm needs more than one value per channel: raise train.batch_size to 2 or more, "
                "or augment.crop"
            ) from None
        try:
            losses = training_losses(output, labels_BHW, run.recipe.train, class_weights_K, impl=run.impl)
        except UserError:
            raise
        except ValueError as error:
            raise UserError(f"{error}; one of {', '.join(batch.names)}") from None
        run.optimizer.zero_grad(set_to_none=True)
        losses.total.backward()
        run.optimizer.step()
    run.iteration += 1
    return losses.detached()


def _learning_rate(run: Run) -> float:
    """The encoder's."""
    return float(run.optimizer.param_groups[0]["lr"])


def _step_seed(seed: int, iteration: int) -> int:
    """PyTorch's seed of one iteration: dropout and drop path depend on nothing else."""
    return int(np.random.SeedSequence([seed, iteration]).generate_state(1, np.uint64)[0] >> 1)


def _check_finite(run: Run, batch: Batch, losses: Losses) -> None:
    total = losses.total.item()
    if not math.isfinite(total):
        try:
            check_labels(batch.labels_BHW, run.recipe.model.num_classes, IGNORE_INDEX)
        except ValueError as error:
            raise UserError(f"{error}; one of {', '.join(batch.names)}") from None
        raise UserError(
            f"the loss is {total} at iteration {run.iteration} (batch of {', '.join(batch.names[:4])}, ...); "
            "start anew with a lower train.learning_rate"
        )


def _validate(run: Run, log: RunLog, should_stop: Callable[[], bool]) -> Iterator[Validating | Validated]:
    """Score the model, keep it if it is the best, and clear `validation_due`, unless it is stopped before."""
    tally = Tally(run.val_data.classes)
    results = evaluate_images(
        run.model,
        run.val_data,
        tally,
        protocol=run.recipe.evaluate,
        data=run.recipe.data,
        device=run.device,
        impl=run.impl,
    )
    with closing(results):
        for _ in results:
            yield Validating(tally.num_images, len(run.val_data))
            if should_stop() and tally.num_images < len(run.val_data):
                return
    report = tally.report()
    miou = 0.0 if math.isnan(report.scores.miou) else report.scores.miou
    is_best = run.best_miou is None or miou > run.best_miou
    run.validation_due = False
    if is_best:
        run.best_miou = miou
        _save(run, BEST)
    log.write(_validation_values(run.iteration, report, is_best))
    yield Validated(run.iteration, report, is_best)


def save_run(run: Run) -> None:
    """Save model and optimiser so that `--resume` goes on from here.

    `last.safetensors` names the iteration whose state belongs to it, and is renamed into place after
    that state: a kill at any moment leaves a pair that fits.
    """
    save_state(run.folder, run.optimizer, run.iteration)
    _save(run, LAST)
    drop_old_states(run.folder, run.iteration)


def _save(run: Run, name: str) -> None:
    save_checkpoint(
        run.folder / name,
        run.model,
        recipe=run.recipe,
        classes=run.train_data.classes,
        iteration=run.iteration,
        best_miou=run.best_miou,
        validation_due=run.validation_due,
    )


def _step_values(run: Run, losses: Losses, images_per_second: float) -> dict[str, object]:
    parts = {"loss": losses.total, "loss_seg": losses.segmentation}
    if losses.attention is not None:
        parts["loss_attn"] = losses.attention
    if losses.auxiliary is not None:
        parts["loss_aux"] = losses.auxiliary
    return {
        "kind": "train",
        "iteration": run.iteration,
        **{name: part.item() for name, part in parts.items()},
        "lr": _learning_rate(run),
        "images_per_s": round(images_per_second, 2),
    }


def _validation_values(iteration: int, report: Report, is_best: bool) -> dict[str, object]:
    values = report_values(report)
    return {
        "kind": "validation",
        "iteration": iteration,
        **{key: values[key] for key in ("miou", "macc", "aacc", "loss", "images")},
        "iou": {c["name"]: c["iou"] for c in values["classes"]},
        "best": is_best,
    }

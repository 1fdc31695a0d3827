"""The training loop, as a stream of events that a command line shows.

Every iteration reseeds PyTorch from (seed, iteration) and takes the batch of (seed, iteration), so
a resumed run needs no replay and no stored generator.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, nullcontext
from itertools import islice
from typing import NamedTuple

import torch

from segdeformer.config import IGNORE_INDEX
from segdeformer.data.loader import Batch, training_batches
from segdeformer.engine.distributed import add_up, any_of, explained_loss, of_this_process
from segdeformer.engine.evaluate import Report, Tally, evaluate_images, report_values
from segdeformer.engine.losses import Losses
from segdeformer.engine.run import (
    Options,
    Run,
    resume_run,
    save_best,
    save_run,
    scored_model,
    start_run,
)
from segdeformer.engine.runlog import RunLog
from segdeformer.engine.saves import held
from segdeformer.engine.step import StepResult, explain_fault, take_step
from segdeformer.errors import ElsewhereError, UserError
from segdeformer.kernels.upsample_cross_entropy import loss_weight

__all__ = [
    "Event",
    "Options",
    "Run",
    "Skipped",
    "Step",
    "Stopped",
    "Validated",
    "Validating",
    "resume_run",
    "save_run",
    "start_run",
    "train",
]

LOG_EVERY = 10
ASK_EVERY = 8  # validation images of a process, between two questions whether any process is to stop


class Step(NamedTuple):
    """One optimiser step is done; its losses are on the CPU."""

    iteration: int  # steps done so far
    losses: Losses
    learning_rate: float  # the encoder's
    images_per_second: float  # as last measured, over all processes


class Skipped(NamedTuple):
    """A step learned nothing, for its loss or gradient was not finite."""

    iteration: int
    reason: str
    is_fault: bool  # False: float16's losses were scaled too far, which mends itself


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


Event = Step | Skipped | Validating | Validated | Stopped


def train(
    run: Run, *, workers: int = 0, should_stop: Callable[[], bool] = lambda: False
) -> Generator[Event, None, None]:
    """Train from `run.iteration` to the end, validating and saving at the recipe's intervals.

    The last iteration is always validated and saved. `should_stop` is asked between steps and between
    validation images; then the run is saved and the stream ends with `Stopped`. With several processes
    each runs this, with the same events; if any is asked to stop, all do.
    Raises `UserError` when more steps in a row than the recipe allows have no finite loss or gradient.
    """
    config = run.recipe.train
    weights_K = None
    if config.class_weights is not None:
        weights_K = torch.tensor(config.class_weights, device=run.device)
    first = run.processes.is_first
    with (
        held(run.folder) if first else nullcontext(),
        RunLog(run.folder, since=run.iteration) if first else nullcontext() as log,
        closing(_batches(run, workers)) as batches,
    ):
        if run.validation_due:  # it was stopped in the middle of one
            yield from _validate(run, log, should_stop)
            save_run(run)
            if run.validation_due:
                yield Stopped(run.iteration)
                return
        images_per_second, began, since = 0.0, time.perf_counter(), run.iteration
        while run.iteration < config.iterations:
            parts, shares = _next_parts(run, batches)
            result = take_step(run, parts, weights_K, shares, stop_asked=should_stop())
            done = run.iteration == config.iterations
            is_validated = done or run.iteration % config.validate_every == 0
            is_saved = done or run.iteration % config.checkpoint_every == 0
            if result.skipped:
                yield _account_for_fault(run, parts, result, log)
            else:
                run.skipped_in_a_row = 0
            if done or run.iteration == 1 or run.iteration % LOG_EVERY == 0:
                num_images = config.batch_size * (run.iteration - since)
                images_per_second = num_images / (time.perf_counter() - began)
                if log is not None and not result.skipped:
                    log.write(_step_values(run, result, images_per_second))
                began, since = time.perf_counter(), run.iteration
            yield Step(run.iteration, result.losses, _learning_rate(run), images_per_second)
            if is_validated:
                run.validation_due = True
                yield from _validate(run, log, should_stop)
                began, since = time.perf_counter(), run.iteration
            stopped = run.validation_due or (not done and _is_stopped(run, result, should_stop))
            if is_saved or stopped:
                save_run(run)
                began, since = time.perf_counter(), run.iteration
            if stopped:
                yield Stopped(run.iteration)
                return


def _batches(run: Run, workers: int) -> Generator[Batch, None, None]:
    """This process's parts of all batches to come, in order."""
    return training_batches(
        run.train_data,
        run.recipe,
        start=run.iteration,
        stop=run.recipe.train.iterations,
        workers=workers,
        pin_memory=run.device.type == "cuda",
        rank=run.processes.rank,
        num_processes=run.processes.size,
        accumulation=run.options.accumulate,
        bad_images=run.options.bad_images,
    )


def _next_parts(run: Run, batches: Iterator[Batch]) -> tuple[list[Batch], list[float]]:
    """This process's parts of the next batch, and what each counts in the whole batch's loss.

    If a process cannot read its images, all end: it with that error, the others with `ElsewhereError`.
    """
    error: UserError | None = None
    parts: list[Batch] = []
    try:
        parts = list(islice(batches, run.options.accumulate))
    except UserError as raised:
        error = raised
    is_whole = run.processes.size * run.options.accumulate == 1
    counts = [0.0] if error or is_whole else [_loss_weight(run, part) for part in parts]
    if run.processes.size == 1:
        total = sum(counts)
    else:
        said = torch.tensor([sum(counts), float(error is not None)], dtype=torch.float64)
        with explained_loss():
            total, num_failed = add_up(said, run.processes).tolist()
        if num_failed and error is None:
            raise ElsewhereError
    if error is not None:
        with of_this_process():
            raise error
    run.unreadable += [name for part in parts for name in part.skipped]
    if is_whole:
        return parts, [1.0]
    if total == 0.0:  # no pixel has a label: every loss is 0
        return parts, [0.0 for _ in parts]
    return parts, [count / total for count in counts]


def _loss_weight(run: Run, part: Batch) -> float:
    config = run.recipe.train
    weights_K = None
    if config.class_weights is not None:
        weights_K = torch.tensor(config.class_weights, dtype=torch.float64)
    return loss_weight(part.labels_BHW, weights_K, IGNORE_INDEX, config.loss_average).item()


def _is_stopped(run: Run, result: StepResult, should_stop: Callable[[], bool]) -> bool:
    return should_stop() if run.processes.size == 1 else result.stop_asked


def _account_for_fault(run: Run, parts: Sequence[Batch], result: StepResult, log: RunLog | None) -> Skipped:
    """Note a step that was left out; raises `UserError` when it is one too many."""
    allowed = run.recipe.train.max_skipped_steps
    reason = explain_fault(run, parts, result, _learning_rate(run))
    run.num_skipped_steps += 1
    if result.is_fault:
        run.skipped_in_a_row += 1
        if run.skipped_in_a_row > allowed:
            raise UserError(
                f"loss or gradient not finite in {run.skipped_in_a_row} steps in a row, "
                f"{allowed} are allowed (train.max_skipped_steps); {reason}; start anew with a lower "
                "train.learning_rate, or train.clip_norm = 1.0"
            )
    if log is not None:
        log.write({"kind": "skipped", "iteration": run.iteration, "reason": reason})
    return Skipped(run.iteration, reason, result.is_fault)


def _learning_rate(run: Run) -> float:
    """The encoder's."""
    return float(run.optimizer.param_groups[0]["lr"])


def _validate(
    run: Run, log: RunLog | None, should_stop: Callable[[], bool]
) -> Iterator[Validating | Validated]:
    """Score the model, keep it if it is the best, and clear `validation_due`, unless it is stopped before."""
    tally = Tally(run.val_data.classes)
    model = scored_model(run)
    results = evaluate_images(
        model,
        run.val_data,
        tally,
        protocol=run.recipe.evaluate,
        data=run.recipe.data,
        device=run.device,
        impl=run.impl,
        processes=run.processes,
    )
    num_images = len(run.val_data)
    with closing(results), explained_loss():
        for number in range(math.ceil(num_images / run.processes.size)):
            next(results, None)  # the last processes may have one image less
            num_done = min(num_images, tally.num_images * run.processes.size)
            yield Validating(num_done, num_images)
            asked = run.processes.size == 1 or number % ASK_EVERY == 0
            if asked and any_of(should_stop(), run.processes) and num_done < num_images:
                return
        tally.gather(run.processes)
    report = tally.report()
    miou = 0.0 if math.isnan(report.scores.miou) else report.scores.miou
    is_best = run.best_miou is None or miou > run.best_miou
    run.validation_due = False
    if is_best:
        run.best_miou = miou
        save_best(run, model)
    if log is not None:
        log.write(_validation_values(run.iteration, report, is_best))
    yield Validated(run.iteration, report, is_best)


def _step_values(run: Run, result: StepResult, images_per_second: float) -> dict[str, object]:
    losses = result.losses
    parts = {"loss": losses.total, "loss_seg": losses.segmentation}
    if losses.attention is not None:
        parts["loss_attn"] = losses.attention
    if losses.auxiliary is not None:
        parts["loss_aux"] = losses.auxiliary
    return {
        "kind": "train",
        "iteration": run.iteration,
        **{name: part.item() for name, part in parts.items()},
        "gradient_norm": result.gradient_norm,
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

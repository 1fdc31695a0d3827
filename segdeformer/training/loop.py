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

from segdeformer.data.loader import Batch, training_batches
from segdeformer.errors import ElsewhereError, UserError
from segdeformer.inference.evaluate import Report, Tally, evaluate_images, report_values
from segdeformer.runtime.distributed import add_up, any_of, explained_loss, of_this_process
from segdeformer.training.losses import Losses
from segdeformer.training.run import (
    Options,
    Run,
    resume_run,
    save_best,
    save_run,
    scored_model,
    start_run,
)
from segdeformer.training.runlog import RunLog
from segdeformer.training.saves import held
from segdeformer.training.step import StepResult, explain_fault, take_step

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


def train(run: Run, *, should_stop: Callable[[], bool] = lambda: False) -> Generator[Event, None, None]:
    """Train from `run.progress.iteration` to the end, validating and saving at the recipe's intervals.

    The last iteration is always validated and saved. `should_stop` is asked between steps and between
    validation images; then the run is saved and the stream ends with `Stopped`. With several processes
    each runs this, with the same events; if any is asked to stop, all do.
    Raises `UserError` when more steps in a row than the recipe allows have no finite loss or gradient.
    """
    config = run.recipe.train
    first = run.runtime.processes.is_first
    with (
        held(run.folder) if first else nullcontext(),
        RunLog(run.folder, since=run.progress.iteration) if first else nullcontext() as log,
        closing(_batches(run)) as batches,
    ):
        if run.progress.validation_due:  # it was stopped in the middle of one
            yield from _validate(run, log, should_stop)
            save_run(run)
            if run.progress.validation_due:
                yield Stopped(run.progress.iteration)
                return
        images_per_second, began, since = 0.0, time.perf_counter(), run.progress.iteration
        while run.progress.iteration < config.iterations:
            micro_batches, weights = _next_batch(run, batches)
            result = take_step(run, micro_batches, weights, stop_asked=should_stop())
            done = run.progress.iteration == config.iterations
            is_validated = done or run.progress.iteration % config.validate_every == 0
            is_saved = done or run.progress.iteration % config.checkpoint_every == 0
            if result.skipped:
                yield _account_for_fault(run, micro_batches, result, log)
            else:
                run.progress.skipped_in_a_row = 0
            if done or run.progress.iteration == 1 or run.progress.iteration % LOG_EVERY == 0:
                num_images = config.batch_size * (run.progress.iteration - since)
                images_per_second = num_images / (time.perf_counter() - began)
                if log is not None and not result.skipped:
                    log.write(_step_values(run, result, images_per_second))
                began, since = time.perf_counter(), run.progress.iteration
            yield Step(run.progress.iteration, result.losses, _learning_rate(run), images_per_second)
            if is_validated:
                run.progress.validation_due = True
                yield from _validate(run, log, should_stop)
                began, since = time.perf_counter(), run.progress.iteration
            stopped = run.progress.validation_due or (not done and _is_stopped(run, result, should_stop))
            if is_saved or stopped:
                save_run(run)
                began, since = time.perf_counter(), run.progress.iteration
            if stopped:
                yield Stopped(run.progress.iteration)
                return


def _batches(run: Run) -> Generator[Batch, None, None]:
    """This process's micro-batches of all batches to come, in order."""
    return training_batches(
        run.data.train,
        run.recipe,
        start=run.progress.iteration,
        stop=run.recipe.train.iterations,
        workers=run.runtime.workers,
        pin_memory=run.runtime.device.type == "cuda",
        rank=run.runtime.processes.rank,
        num_processes=run.runtime.processes.size,
        accumulation=run.options.accumulate,
        bad_images=run.options.bad_images,
    )


def _next_batch(run: Run, batches: Iterator[Batch]) -> tuple[list[Batch], list[dict[str, float]]]:
    """This process's micro-batches of the next batch, and what each counts in the whole one's loss, by term.

    If a process cannot read its images, all end: it with that error, the others with `ElsewhereError`.
    """
    error: UserError | None = None
    own: list[Batch] = []
    try:
        own = list(islice(batches, run.options.accumulate))
    except UserError as raised:
        error = raised
    names = [term.name for term in run.terms]
    is_whole = run.runtime.processes.size * run.options.accumulate == 1
    counts = [] if is_whole else [[term.num_labels(batch.labels_BHW) for term in run.terms] for batch in own]
    totals = [sum(column) for column in zip(*counts, strict=True)] or [0.0] * len(names)
    if run.runtime.processes.size > 1:
        said = torch.tensor([*totals, float(error is not None)], dtype=torch.float64)
        with explained_loss():
            *totals, num_failed = add_up(said, run.runtime.processes).tolist()
        if num_failed and error is None:
            raise ElsewhereError
    if error is not None:
        with of_this_process():
            raise error
    run.progress.unreadable += [name for batch in own for name in batch.skipped]
    if is_whole:
        return own, [dict.fromkeys(names, 1.0)]
    # Where no pixel has a label, every loss is 0.
    weights = [[n / total if total else 0.0 for n, total in zip(row, totals, strict=True)] for row in counts]
    return own, [dict(zip(names, row, strict=True)) for row in weights]


def _is_stopped(run: Run, result: StepResult, should_stop: Callable[[], bool]) -> bool:
    return should_stop() if run.runtime.processes.size == 1 else result.stop_asked


def _account_for_fault(
    run: Run, micro_batches: Sequence[Batch], result: StepResult, log: RunLog | None
) -> Skipped:
    """Note a step that was left out; raises `UserError` when it is one too many."""
    allowed = run.recipe.train.max_skipped_steps
    reason = explain_fault(run, micro_batches, result, _learning_rate(run))
    run.progress.num_skipped_steps += 1
    if result.is_fault:
        run.progress.skipped_in_a_row += 1
        if run.progress.skipped_in_a_row > allowed:
            raise UserError(
                f"loss or gradient not finite in {run.progress.skipped_in_a_row} steps in a row, "
                f"{allowed} are allowed (train.max_skipped_steps); {reason}; start anew with a lower "
                "train.learning_rate, or train.clip_norm = 1.0"
            )
    if log is not None:
        log.write({"kind": "skipped", "iteration": run.progress.iteration, "reason": reason})
    return Skipped(run.progress.iteration, reason, result.is_fault)


def _learning_rate(run: Run) -> float:
    """The encoder's."""
    return float(run.optimizer.param_groups[0]["lr"])


def _validate(
    run: Run, log: RunLog | None, should_stop: Callable[[], bool]
) -> Iterator[Validating | Validated]:
    """Score the model, keep it if it is the best, and clear `validation_due`, unless it is stopped before."""
    tally = Tally(run.data.val.classes)
    model = scored_model(run)
    results = evaluate_images(
        model,
        run.data.val,
        tally,
        protocol=run.recipe.evaluate,
        data=run.recipe.data,
        runtime=run.runtime,
    )
    num_images = len(run.data.val)
    with closing(results), explained_loss():
        for number in range(math.ceil(num_images / run.runtime.processes.size)):
            next(results, None)  # the last processes may have one image less
            num_done = min(num_images, tally.num_images * run.runtime.processes.size)
            yield Validating(num_done, num_images)
            asked = run.runtime.processes.size == 1 or number % ASK_EVERY == 0
            if asked and any_of(should_stop(), run.runtime.processes) and num_done < num_images:
                return
        tally.gather(run.runtime.processes)
    report = tally.report()
    miou = 0.0 if math.isnan(report.scores.miou) else report.scores.miou
    is_best = run.progress.best_miou is None or miou > run.progress.best_miou
    run.progress.validation_due = False
    if is_best:
        run.progress.best_miou = miou
        save_best(run, model)
    if log is not None:
        log.write(_validation_values(run.progress.iteration, report, is_best))
    yield Validated(run.progress.iteration, report, is_best)


def _step_values(run: Run, result: StepResult, images_per_second: float) -> dict[str, object]:
    losses = result.losses
    return {
        "kind": "train",
        "iteration": run.progress.iteration,
        "loss": losses.total.item(),
        **{f"loss_{name}": term.item() for name, term in losses.terms.items()},
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

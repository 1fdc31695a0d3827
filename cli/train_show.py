"""What `segdeformer train` prints: what it is about to do, how it goes, what came out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from segdeformer.cli.stopping import StoppedError, stop_request

if TYPE_CHECKING:
    from rich.console import Console

    from segdeformer.config import Recipe
    from segdeformer.data.check.findings import Finding
    from segdeformer.protocols import OwnLogger
    from segdeformer.training.loop import Validated
    from segdeformer.training.run import Run

HIGHEST_FINE_TUNING_RATE = 2e-4


def introduce(
    console: Console, run: Run, base: Recipe, findings: Sequence[Finding], *, shows_folder: bool = True
) -> None:
    """The run before its first step: changes of the recipe, data, device, who learns how fast."""
    from segdeformer.cli.show import device_words, groups_table, schedule_line
    from segdeformer.config.changes import differences

    recipe = run.recipe
    console.print(f"{recipe.name}: {recipe.description}", style="bold")
    for key, (before, after) in differences(base.model_dump(), recipe.model_dump()).items():
        console.print(f"  changed {key}: {before} -> {after}", style="yellow")
    data = run.data.train
    console.print(
        f"data {data.name}: {len(data):,} training and {len(run.data.val):,} validation images, "
        f"{recipe.model.num_classes} classes"
    )
    folder = f", run folder {run.folder}" if shows_folder else ""
    console.print(f"{device_words(run.runtime)}{folder}")
    if sharing := _sharing(run):
        console.print(sharing)
    if run.model.weights_report is not None:
        for line in run.model.weights_report.lines():
            console.print(line)
    if recipe.model.encoder.weights != "none" and recipe.train.learning_rate > HIGHEST_FINE_TUNING_RATE:
        console.print(
            f"note: a pretrained encoder at a learning rate of {recipe.train.learning_rate:g}; fine-tuning "
            "usually takes 6e-5 and decoder_lr_multiplier 10, as the recipe folder-pretrained does",
            style="yellow",
        )
    for found in findings:
        console.print(found.line(), style="yellow")
    for warning in run.progress.warnings:
        console.print(f"warning: {warning}", style="yellow")
    console.print(groups_table(run.groups, recipe.train), soft_wrap=False)
    console.print(schedule_line(recipe))
    if run.progress.iteration:
        console.print(f"goes on after iteration {run.progress.iteration:,}")


def _sharing(run: Run) -> str:
    """How the batch is shared out, and what else makes this run larger or smaller; empty if nothing."""
    from torch import nn

    options, processes = run.options, run.runtime.processes
    parts = []
    if processes.size > 1:
        parts.append(
            f"{processes.size} processes{', each with a share of the model' if options.shard else ''}"
        )
    if options.accumulate > 1:
        parts.append(f"{options.accumulate} micro-batches one after another")
    if parts:
        parts.append(f"{run.micro_batch_size} images at once in each")
    if options.accumulate > 1 and any(
        isinstance(m, nn.modules.batchnorm._BatchNorm) for m in run.model.modules()
    ):
        parts.append("BatchNorm sees a micro-batch at a time")
    for name in ("compile", "channels_last", "grad_checkpointing"):
        if getattr(options, name):
            parts.append(name.replace("_", "-"))
    if run.recipe.train.precision != "float32":
        parts.append(run.recipe.train.precision)
    return ", ".join(parts)


def train_and_show(console: Console, run: Run, loggers: Sequence[OwnLogger]) -> None:
    """Train to the end, or until a signal asks to stop; then `UserError` says how to go on."""
    from segdeformer.cli.progress import TrainingProgress
    from segdeformer.runtime.distributed import add_up, any_of, explained_loss
    from segdeformer.training.loop import Skipped, Stopped, Validated, Validating, train

    best: Validated | None = None
    progress = TrainingProgress(console, run)
    with stop_request() as should_stop, progress.bar:
        for event in train(run, should_stop=should_stop):
            for logger in loggers:
                logger(event, run)
            match event:
                case Validating():
                    progress.validating(event)
                case Validated():
                    if event.is_best:
                        best = event
                    progress.validated(event)
                case Skipped():
                    progress.skipped(event)
                case Stopped():
                    with explained_loss():
                        any_of(False, run.runtime.processes)  # the first one has saved
                    raise StoppedError(
                        f"stopped by {should_stop.source} after iteration {event.iteration:,}, all is saved; "
                        f"go on with: segdeformer train --resume --out {run.folder}"
                    )
                case _:
                    progress.stepped(event)
    if run.progress.num_skipped_steps:
        console.print(
            f"{run.progress.num_skipped_steps:,} steps were left out, for their loss or gradient was not "
            "finite; metrics.jsonl has each",
            style="yellow",
        )
    import torch

    with explained_loss():
        num_unreadable = int(
            add_up(torch.tensor(float(len(run.progress.unreadable))), run.runtime.processes).item()
        )
    if num_unreadable:
        console.print(
            f"{num_unreadable:,} times another image took the place of one that cannot be read, such as: "
            f"{run.progress.unreadable[0] if run.progress.unreadable else 'one of another process'}",
            style="yellow",
        )
    if run.runtime.processes.is_first:
        _finish(console, run, best)


def _finish(console: Console, run: Run, best: Validated | None) -> None:
    """The best validation's table, a picture made by its checkpoint, and where both lie.

    best: None if it was before this run was resumed; then it is made again.
    """
    import torch

    from segdeformer.cli.show import scores_line, scores_table
    from segdeformer.inference.evaluate import ImageResult, evaluate
    from segdeformer.inference.predict import predict_image
    from segdeformer.report.sheet import shown_indices, write_sheet
    from segdeformer.runtime.distributed import ALONE
    from segdeformer.training.run import build_like
    from segdeformer.weights.checkpoint import BEST, load_weights, read_checkpoint

    recipe, path = run.recipe, run.folder / BEST
    model = build_like(run).eval()
    load_weights(model, path)
    how: Any = {"protocol": recipe.evaluate, "data": recipe.data, "runtime": run.runtime}
    if best is None:
        alone = run.runtime._replace(processes=ALONE)
        report = evaluate(model, run.data.val, **how | {"runtime": alone})
    else:
        report = best.report
    results = []
    for index in shown_indices(len(run.data.val)):
        sample = run.data.val.read(index)
        prediction = predict_image(model, sample.image_HW3, **how)
        results.append(ImageResult(sample, torch.from_numpy(prediction.ids_HW)))
    picture = run.folder / "validation.png"
    line = scores_line(report)
    write_sheet(picture, results, report.classes, headline=f"{recipe.name}: {line}")
    console.print(scores_table(report), soft_wrap=False)
    console.print(f"iteration {read_checkpoint(path).iteration:,}: {line}", style="bold")
    console.print(f"picture:    {picture}")
    console.print(f"checkpoint: {path}")

"""What `segdeformer train` prints: what it is about to do and take, how it goes, what came out."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from segdeformer.cli import show
from segdeformer.cli.stopping import StoppedError, stop_request
from segdeformer.errors import count
from segdeformer.runtime.device import peak_memory_mib

if TYPE_CHECKING:
    from rich.console import Console

    from segdeformer.config import Recipe
    from segdeformer.data.check.findings import Finding
    from segdeformer.data.samples import Dataset
    from segdeformer.protocols import OwnLogger
    from segdeformer.runtime import Runtime
    from segdeformer.training.loop import Skipped, Step, Validated, Validating
    from segdeformer.training.prepare import Prepared
    from segdeformer.training.run import Options, Run

HIGHEST_FINE_TUNING_RATE = 2e-4
REFRESH_S = 0.5
LINE_EVERY_S = 30.0


def say_download(console: Console, recipe: Recipe) -> None:
    """Before a model is built: whose weights it downloads, which may take a while."""
    from segdeformer.models.mit import MIT_SIZES
    from segdeformer.plugins import is_path

    encoder = recipe.model.encoder
    if encoder.weights == "timm" and encoder.name not in MIT_SIZES and not is_path(encoder.name):
        console.print(
            f"encoder weights: `{encoder.name}` of timm, downloaded unless they are on this machine already"
        )


def introduce(
    console: Console, run: Run, base: Recipe, findings: Sequence[Finding], *, shows_folder: bool = True
) -> None:
    """The run before its first step: changes of the recipe, data, device, who learns how fast."""
    from segdeformer.config.changes import differences

    recipe = run.recipe
    console.print(f"{recipe.name}: {recipe.description}", style="bold")
    for key, (before, after) in differences(base.model_dump(), recipe.model_dump()).items():
        console.print(f"  changed {key}: {before} -> {after}", style="yellow")
    data = run.data.train
    console.print(
        f"data {data.name}: {len(data):,} training and {count(len(run.data.val), 'validation image')}, "
        f"{count(recipe.model.num_classes, 'class')}"
    )
    folder = f", run folder {run.folder}" if shows_folder else ""
    console.print(f"{show.device_words(run.runtime)}{folder}")
    if sharing := _sharing(run):
        console.print(sharing)
    if run.model.weights_report is not None:
        for line in run.model.weights_report.lines():
            console.print(line)
    for line in run.decoder_report.lines() if run.decoder_report is not None else ():
        console.print(line)
    if recipe.model.encoder.weights != "none" and recipe.train.learning_rate > HIGHEST_FINE_TUNING_RATE:
        console.print(
            f"note: a pretrained encoder at a learning rate of {recipe.train.learning_rate:g}; fine-tuning "
            "usually takes 6e-5 and decoder_lr_multiplier 10, as the recipe folder-pretrained does",
            style="yellow",
        )
    for found in findings:
        console.print(found.line(), style="yellow")
    if advice := size_advice(recipe, data):
        console.print(advice, style="yellow")
    for warning in run.progress.warnings:
        console.print(f"warning: {warning}", style="yellow")
    console.print(show.groups_table(run.groups, recipe.train), soft_wrap=False)
    console.print(show.schedule_line(recipe))
    if run.progress.iteration:
        console.print(f"goes on after iteration {run.progress.iteration:,}")


def size_advice(recipe: Recipe, data: Dataset) -> str:
    """What to set where images are much larger than the crop that is trained on; empty if they are not."""
    from segdeformer.config.data import LARGER
    from segdeformer.data.datasets import typical_size

    size, crop = typical_size(data), recipe.augment.crop
    if size is None or recipe.augment.resize_to is not None:
        return ""
    if size[0] <= LARGER * crop[0] and size[1] <= LARGER * crop[1]:
        return ""
    (height, width), share = size, crop[0] * crop[1] / (size[0] * size[1])
    windows = "in windows of {} x {}".format(*recipe.evaluate.window)
    how = "whole" if recipe.evaluate.mode == "whole" else windows
    remedy = "a larger augment.crop, with evaluate.window as large"
    shrink = max(size) / (2 * max(crop))
    if shrink > 1:
        long_px, short_px = (round(side / shrink / 32) * 32 for side in (max(size), min(size)))
        remedy += f", or augment.resize_to and evaluate.resize_to = [{long_px}, {short_px}]"
    return (
        f"note: images are {width} x {height} px; a crop of {crop[1]} x {crop[0]} shows {share:.0%} of one, "
        f"and they are evaluated {how}. To show more: {remedy}"
    )


def _sharing(run: Run) -> str:
    """How the batch is shared out, and what else makes this run larger or smaller; empty if nothing."""
    from torch import nn

    options, processes = run.options, run.runtime.processes
    parts = []
    if processes.size > 1:
        parts.append(
            f"{count(processes.size, 'process')}{', each with a share of the model' if options.shard else ''}"
        )
    if options.accumulate > 1:
        parts.append(f"{options.accumulate} micro-batches one after another")
    if parts:
        parts.append(f"{count(run.micro_batch_size, 'image')} at once in each")
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


def choose_accumulation(console: Console, prepared: Prepared, options: Options, runtime: Runtime) -> Options:
    """The options with the smallest accumulation that fits memory, and a line that says so."""
    from segdeformer.training.plan import fit_batch

    fit = fit_batch(prepared.recipe, prepared.data, runtime=runtime, options=options)
    console.print(
        f"--auto-batch: {count(fit.micro_batch_size, 'image')} at once, --accumulate {fit.accumulate}: "
        f"{fit.peak_mib:,.0f} of {fit.available_mib:,.0f} MiB"
    )
    return options._replace(accumulate=fit.accumulate)


def show_plan(
    console: Console, prepared: Prepared, options: Options, runtime: Runtime, findings: Sequence[Finding]
) -> None:
    """The resolved recipe, what is in it, and two measured steps; nothing is written."""
    from segdeformer.config import recipe_toml
    from segdeformer.training.plan import kernels_of, rehearse

    recipe, workers = prepared.recipe, runtime.workers
    console.print("dry run: nothing is kept", style="bold")
    console.print(recipe_toml(recipe).rstrip())
    rehearsal = rehearse(recipe, prepared.data, runtime=runtime, options=options)
    run = rehearsal.run
    run.recipe = recipe
    introduce(console, run, prepared.base, findings, shows_folder=False)
    if not findings:
        console.print("data: nothing found that would spoil training (names, and 64 pairs)", style="green")

    kernels = show.make_table("operation", "size", "by", num_left=3)
    strides = tuple(run.model.encoder.strides)
    for kernel in kernels_of(recipe, runtime, strides, run.micro_batch_size):
        kernels.add_row(*kernel)
    console.print(kernels, soft_wrap=False)

    train = recipe.train
    num_images = len(prepared.data.train)
    epochs = train.iterations * train.batch_size / num_images
    step_s = rehearsal.step_s
    loading_s = rehearsal.batch_s / workers if workers else rehearsal.batch_s
    iteration_s = max(step_s, loading_s) if workers else step_s + loading_s
    console.print(
        f"{count(num_images, 'image')} an epoch, {num_images / train.batch_size:,.1f} iterations; "
        f"{count(train.iterations, 'iteration', 'are')} {epochs:,.1f} epochs"
    )
    console.print(
        f"an iteration: {step_s:.3g} s to learn, {loading_s:.3g} s to load with "
        f"{count(workers, 'loader process')}; all of them {_duration(iteration_s * train.iterations)}, "
        f"and validation every {train.validate_every:,}"
    )
    console.print(f"peak memory {rehearsal.peak_mib:,.0f} MiB, of a process, in two steps")
    console.print(f"loss of the first steps: {', '.join(f'{loss:.4f}' for loss in rehearsal.losses)}")


class TrainingProgress:
    """Rich bar with loss, rate, speed, memory and time left; it is seen while `bar` is entered."""

    def __init__(self, console: Console, run: Run) -> None:
        self.console = console
        self.run = run
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self.total = run.recipe.train.iterations
        self.training = self.bar.add_task(
            "train", total=self.total, completed=run.progress.iteration, note=""
        )
        self.validation = self.bar.add_task("validate", total=len(run.data.val), note="", visible=False)
        self.shown_at = self.line_at = time.monotonic()
        self.began, self.began_at = time.monotonic(), run.progress.iteration

    def stepped(self, step: Step) -> None:
        """One more iteration."""
        now = time.monotonic()
        if now - self.shown_at < REFRESH_S and step.iteration < self.total:
            return
        self.shown_at = now
        (_, first), *others = step.losses.terms.items()
        note = " ".join([f"loss {first.item():.3f}", *(f"{name} {loss.item():.3f}" for name, loss in others)])
        note += (
            f"  lr {step.learning_rate:.2e}  {step.images_per_second:.1f} img/s"
            f"  {peak_memory_mib(self.run.runtime.device):,.0f} MiB"
        )
        self.bar.update(self.training, completed=step.iteration, note=note)
        if not self.console.is_terminal and now - self.line_at >= LINE_EVERY_S:
            self.line_at = now
            seconds_left = (now - self.began) / (step.iteration - self.began_at)
            seconds_left *= self.total - step.iteration
            self.console.print(f"{step.iteration:,}/{self.total:,}  {note}  {_minutes(seconds_left)} left")

    def skipped(self, event: Skipped) -> None:
        """A step that learned nothing: a line that stays, unless it mends itself."""
        if event.is_fault:
            self.console.print(f"left out, not finite: {event.reason}", style="yellow")

    def validating(self, event: Validating) -> None:
        """One more validation image."""
        self.bar.update(self.validation, completed=event.num_done, visible=True)

    def validated(self, event: Validated) -> None:
        """A validation is done: this line stays."""
        self.bar.update(self.validation, completed=0, visible=False)
        report = event.report
        self.console.print(
            f"iteration {event.iteration:,}: mIoU {show.percent(report.scores.miou)} %, "
            f"aAcc {show.percent(report.pixel_accuracy)} %, loss {report.loss:.4f}"
            f"{', best so far' if event.is_best else ''}"
            f"  ({_minutes(time.monotonic() - self.began)})"
        )


def train_and_show(console: Console, run: Run, loggers: Sequence[OwnLogger]) -> None:
    """Train to the end, or until a signal asks to stop; then `UserError` says how to go on."""
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
    if num_skipped := run.progress.num_skipped_steps:
        console.print(
            f"{count(num_skipped, 'step', 'were')} left out, for their loss or gradient "
            "was not finite; metrics.jsonl has each",
            style="yellow",
        )
    import torch

    with explained_loss():
        num_unreadable = int(
            add_up(torch.tensor(float(len(run.progress.unreadable))), run.runtime.processes).item()
        )
    if num_unreadable:
        console.print(
            f"{count(num_unreadable, 'time')} another image took the place of one that cannot be read, "
            f"such as: {run.progress.unreadable[0] if run.progress.unreadable else 'one of another process'}",
            style="yellow",
        )
    if run.runtime.processes.is_first:
        _finish(console, run, best)


def _finish(console: Console, run: Run, best: Validated | None) -> None:
    """The best validation's table, a picture made by its checkpoint, and where both lie.

    best: None if it was before this run was resumed; then it is made again.
    """
    import torch

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
    line = show.scores_line(report)
    write_sheet(picture, results, report.classes, headline=f"{recipe.name}: {line}")
    console.print(show.scores_table(report), soft_wrap=False)
    console.print(f"iteration {read_checkpoint(path).iteration:,}: {line}", style="bold")
    console.print(f"picture:    {picture}")
    console.print(f"checkpoint: {path}")


def _minutes(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = seconds / 60
    if minutes < 90:
        return f"{minutes:.1f} minutes"
    hours = minutes / 60
    return f"{hours:.1f} hours" if hours < 48 else f"{hours / 24:.1f} days"

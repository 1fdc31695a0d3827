"""What is seen while a model trains: a bar in a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from segdeformer.cli.show import percent
from segdeformer.runtime.device import peak_memory_mib

if TYPE_CHECKING:
    from segdeformer.training.loop import Run, Skipped, Step, Validated, Validating

REFRESH_S = 0.5
LINE_EVERY_S = 30.0


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
            f"iteration {event.iteration:,}: mIoU {percent(report.scores.miou)} %, "
            f"aAcc {percent(report.pixel_accuracy)} %, loss {report.loss:.4f}"
            f"{', best so far' if event.is_best else ''}"
            f"  ({_minutes(time.monotonic() - self.began)})"
        )


def _minutes(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"

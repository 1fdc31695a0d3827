"""What is seen while an ablation runs: a live table in a terminal, a line for each event elsewhere."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Self

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from segdeformer.engine.ablation_results import Results
from segdeformer.engine.ablation_runs import Failed, Finished, Progress, Started, Ticked
from segdeformer.report.ablation_tables import DASH, Cells, cells

LINE_EVERY_S = 60.0


def results_table(results: Results) -> Table:
    """The rows with scores, gains and the paper's figures."""
    has_paper = any(result.row.paper for result in results.rows)
    table = Table("row", box=None, header_style="bold", pad_edge=False)
    heads = ["mIoU %", "seeds", "gain", "95 %"] + (["paper"] if has_paper else [])
    for head in heads:
        table.add_column(head, justify="right", no_wrap=True)
    for result in results.rows:
        shown = cells(result)
        name = Text(shown.name)
        if result.failure is not None:
            name.append(" (failed)", style="red")
        values = [shown.miou, shown.seeds, shown.gain, shown.interval]
        values += [_paper(shown)] if has_paper else []
        table.add_row(name, *values, style="dim" if shown.miou == DASH else "")
    return table


def _paper(shown: Cells) -> str:
    """As the paper prints it."""
    return shown.paper_miou if shown.paper_gain == DASH else f"{shown.paper_miou} ({shown.paper_gain})"


def progress_line(progress: Progress) -> str:
    """How far a run is, with its loss and the time it still needs."""
    run, total = progress.run, progress.run.row.recipe.train.iterations
    if progress.scoring:
        return f"{run.title}: scoring"
    if progress.loss is None:
        return f"{run.title}: starting"
    return f"{run.title}: iteration {progress.iteration:,} of {total:,}, loss {progress.loss:.3f}"


class AblationProgress:
    """Shows events and results; `results` is replaced when a run has finished."""

    def __init__(self, console: Console, results: Results) -> None:
        self.console, self.results = console, results
        self.began = self.line_at = time.monotonic()
        self.running: tuple[Progress, ...] = ()
        self.stopping = False
        self.durations_s: list[float] = []
        self.live = Live(console=console, refresh_per_second=4, transient=True, get_renderable=self._picture)

    def started(self, event: Started) -> None:
        self._say(f"{event.run.title}: {'goes on' if event.goes_on else 'started'}")

    def ticked(self, event: Ticked) -> None:
        """Outside a terminal, a line now and then."""
        self.running = event.running
        now = time.monotonic()
        if not self.console.is_terminal and now - self.line_at >= LINE_EVERY_S:
            self.line_at = now
            for progress in event.running:
                self._say(progress_line(progress))

    def finished(self, event: Finished, results: Results) -> None:
        self.results = results
        if event.whole:
            self.durations_s.append(event.seconds)
        result = next(r for r in results.rows if r.row.name == event.run.row.name)
        miou = next(run.miou for run in result.runs if run.seed == event.run.seed)
        score = "" if miou is None else f"mIoU {100 * miou:.2f} %"
        self._say(f"{event.run.title}: {score} ({_minutes(event.seconds)})")

    def failed(self, event: Failed, results: Results) -> None:
        self.results = results
        self._say(f"{event.run.title}: failed: {event.reason}", style="red")

    def stopping_now(self) -> None:
        if not self.stopping:
            self.stopping = True
            self._say("stopping: the running rows are saved; Ctrl-C again to kill them")

    def _left(self) -> str:
        """How long it may still take, as the runs so far did; empty before the first is finished."""
        if not self.durations_s or not self.running:
            return ""
        mean_s = sum(self.durations_s) / len(self.durations_s)
        num_left = sum(len(r.runs) - len(r.mious) for r in self.results.rows if r.failure is None)
        done = sum(p.iteration / p.run.row.recipe.train.iterations for p in self.running)
        return f", about {_minutes(max(0.0, mean_s * (num_left - done) / len(self.running)))} left"

    def _say(self, text: str, style: str = "") -> None:
        self.console.print(f"{_minutes(time.monotonic() - self.began)}  {text}", style=style)

    def _picture(self) -> Group:
        num_runs = sum(len(result.runs) for result in self.results.rows)
        now = time.monotonic()
        lines = [
            f"{self.results.num_finished} of {num_runs} runs, {_minutes(now - self.began)}{self._left()}"
        ]
        lines += [progress_line(progress) for progress in self.running]
        return Group(
            "", results_table(self.results), "", Text("\n".join(lines), style="cyan", overflow="ellipsis")
        )

    def __enter__(self) -> Self:
        if self.console.is_terminal:
            self.live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.console.is_terminal:
            self.live.stop()


def _minutes(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"

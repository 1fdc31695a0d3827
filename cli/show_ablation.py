"""What is seen of an ablation: its rows, a live table in a terminal or a line for each event, its results."""

from __future__ import annotations

import time

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from segdeformer.ablation.plan import Plan, PlannedRow, encoders
from segdeformer.ablation.results import SCORE_RULE, Results
from segdeformer.ablation.runs import Event, Failed, Finished, Progress, Started, Ticked
from segdeformer.ablation.tables import DASH, FILES, NOTE_ON_SEEDS, cells, closing_line, setting_line
from segdeformer.cli.show import make_table
from segdeformer.errors import count

LINE_EVERY_S = 60.0
MOST_CHANGES = 5  # of a row, to be told one by one


def introduce(console: Console, plan: Plan, *, num_at_once: int) -> None:
    """What will be trained, and what was before."""
    console.print(plan.title, style="bold")
    console.print(setting_line(Results(plan)))
    console.print(f"score: {SCORE_RULE}", style="dim")
    for row in plan.rows:
        console.print(f"  {row.name}: {_changes_line(plan, row)}", style="dim")
    scratch = [name for name, weights in encoders(plan.rows).items() if weights == {"none"}]
    if scratch:
        console.print(
            f"from scratch: {', '.join(scratch)} (pretrained weights: --weights ENCODER=FILE)", style="yellow"
        )
    finished = sum(run.is_finished for run in plan.runs)
    before = f", {finished} of them finished before" if finished else ""
    at_once = f", {num_at_once} at once" if num_at_once > 1 else ""
    console.print(f"{count(len(plan.runs), 'run')}{before}{at_once}; folder {plan.folder}")


def _changes_line(plan: Plan, row: PlannedRow) -> str:
    """What a row changes: each key, or of a model that is altogether another the tables."""
    changes = {key.removeprefix("model."): value for key, (_, value) in plan.changes(row).items()}
    if len(changes) > MOST_CHANGES:
        tables = dict.fromkeys(key.partition(".")[0] for key in changes)
        return f"another {', '.join(tables)}: {plan.recipe_path(row)}"
    told = []
    for name, value in changes.items():
        if isinstance(value, dict):
            told.append(f"{name} ({', '.join(f'{k} {v}' for k, v in value.items() if v is not None)})")
        else:
            told.append(f"{name} {'off' if value is None else value}")
    return ", ".join(told) or "as the base"


def results_table(results: Results) -> Table:
    """The rows with scores, gains and the paper's figures."""
    has_paper = any(result.row.paper for result in results.rows)
    heads = ["mIoU %", "seeds", "gain", "95 %"] + (["paper"] if has_paper else [])
    table = make_table("row", *heads, pad_edge=False)
    for column in table.columns[1:]:
        column.no_wrap = True
    for result in results.rows:
        shown = cells(result)
        name = Text(shown.name)
        if result.failure is not None:
            name.append(" (failed)", style="red")
        paper = shown.paper_miou  # as the paper prints it
        if shown.paper_gain != DASH:
            paper += f" ({shown.paper_gain})"
        values = [shown.miou, shown.seeds, shown.gain, shown.interval, paper][: len(heads)]
        table.add_row(name, *values, style="dim" if shown.miou == DASH else "")
    return table


def conclude(console: Console, results: Results) -> None:
    """The table, what its columns are, which runs failed, and the files."""
    console.print()
    console.print(results_table(results), soft_wrap=False)
    if results.num_finished:
        console.print(closing_line(results), style="dim")
        if len(results.plan.seeds) < 3:
            console.print(NOTE_ON_SEEDS, style="dim")
    for line in results.failures:
        console.print(line, style="red")
    console.print(f"results: {results.plan.folder}/{FILES}")


def progress_line(progress: Progress) -> str:
    """How far a run is, with its loss and the time it still needs."""
    run, total = progress.run, progress.run.row.recipe.train.iterations
    if progress.scoring:
        return f"{run.title}: scoring"
    if progress.loss is None:
        return f"{run.title}: starting"
    return f"{run.title}: iteration {progress.iteration:,} of {total:,}, loss {progress.loss:.3f}"


class AblationProgress:
    """Shows events; `results` is replaced when a run has ended. `live` is for a terminal."""

    def __init__(self, console: Console, results: Results) -> None:
        self.console, self.results = console, results
        self.began = self.line_at = time.monotonic()
        self.running: tuple[Progress, ...] = ()
        self.stopping = False
        self.durations_s: list[float] = []
        self.live = Live(console=console, refresh_per_second=4, transient=True, get_renderable=self._picture)

    def show(self, event: Event) -> None:
        match event:
            case Started(run, goes_on):
                self._say(f"{run.title}: {'goes on' if goes_on else 'started'}")
            case Finished(run, seconds, uninterrupted):
                if uninterrupted:
                    self.durations_s.append(seconds)
                result = next(result for result in self.results.rows if result.row.name == run.row.name)
                miou = next(score.miou for score in result.runs if score.run.seed == run.seed)
                score = "" if miou is None else f"mIoU {100 * miou:.2f} %"
                self._say(f"{run.title}: {score} ({_minutes(seconds)})")
            case Failed(run, reason):
                self._say(f"{run.title}: failed: {reason}", style="red")
            case Ticked(running):
                self.running = running
                now = time.monotonic()
                if not self.console.is_terminal and now - self.line_at >= LINE_EVERY_S:
                    self.line_at = now
                    for progress in running:
                        self._say(progress_line(progress))

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
        results, passed = self.results, _minutes(time.monotonic() - self.began)
        lines = [f"{count(results.num_finished, 'run', of=len(results.plan.runs))}, {passed}{self._left()}"]
        lines += [progress_line(progress) for progress in self.running]
        return Group("", results_table(results), "", Text("\n".join(lines), style="cyan", overflow="fold"))


def _minutes(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"

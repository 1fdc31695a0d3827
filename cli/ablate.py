"""`segdeformer ablate`: train the rows of a table of the paper, or of your own, and compare them."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from segdeformer.cli.ablate_plan import DEFAULT_BASE, DEFAULT_ITERATIONS
from segdeformer.cli.errors import one_line_errors
from segdeformer.cli.options import ClassesFile, Device, ImplName

if TYPE_CHECKING:
    from rich.console import Console

    from segdeformer.engine.ablation_plan import Plan, PlannedRow
    from segdeformer.engine.ablation_results import Results
    from segdeformer.engine.ablation_runs import Slot

DEFAULT_TABLE = "table6"
DEFAULT_SEEDS = "2"
MOST_WORKERS = 8
MOST_CHANGES = 5  # of a row, to be told one by one


@one_line_errors
def ablate_command(
    what: Annotated[
        str, typer.Argument(help="table4, table5, table6, table7, table8, or a TOML file of your own rows.")
    ] = DEFAULT_TABLE,
    base: Annotated[
        str | None,
        typer.Option(
            help=f"The recipe that the rows change; default: {DEFAULT_BASE} for "
            f"{DEFAULT_ITERATIONS} iterations, or the recipe of --data."
        ),
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="landcover, NAME:FOLDER or a folder; default: the recipe's.")
    ] = None,
    classes: ClassesFile = None,
    seeds: Annotated[
        str, typer.Option(help="How many, or which: 3 means 0,1,2. More can be added later.")
    ] = DEFAULT_SEEDS,
    iterations: Annotated[
        int | None, typer.Option(min=1, help="Instead of the recipe's; warm-up scales with it.")
    ] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Batch size instead of the recipe's.")] = None,
    weights: Annotated[
        list[str] | None,
        typer.Option(
            help="Encoder weights: a file, `timm` or `none`. ENCODER=FILE, repeated, for several encoders."
        ),
    ] = None,
    jobs: Annotated[
        int | None, typer.Option(min=1, help="Trainings at once; default: one for each GPU, one on a CPU.")
    ] = None,
    device: Device = "auto",
    impl: ImplName = "auto",
    out: Annotated[
        Path | None, typer.Option(help="Folder of the results; default: runs/ablate-WHAT-DATA.")
    ] = None,
) -> None:
    """Train each row with each seed, and give gains with confidence intervals beside the paper's.

    Without arguments: Table 6 on the landcover data, small, with 2 seeds.

    Stopped or killed, the same command goes on. The model after the last iteration is scored.
    """
    from segdeformer.cli.ablate_plan import default_folder, make_plan
    from segdeformer.cli.options import checked_impl
    from segdeformer.cli.show import make_console
    from segdeformer.engine.ablation_folder import locked, settle
    from segdeformer.engine.ablation_plan import parse_seeds
    from segdeformer.engine.device import choose_device

    chosen = choose_device(device)
    checked_impl(impl, chosen)
    plan = make_plan(
        what,
        base=base,
        data=data,
        classes=classes,
        seeds=parse_seeds(seeds),
        iterations=iterations,
        batch=batch,
        weights=weights or [],
    )
    folder = out or default_folder(what, plan)
    slots = _make_slots(device, str(chosen.type), jobs=jobs, impl=impl)
    console = make_console()
    with locked(folder, console.print) as lock:
        settle(folder, plan)
        _introduce(console, plan, folder, slots)
        _run(console, plan, folder, slots, lock)


def _make_slots(device: str, kind: str, *, jobs: int | None, impl: str) -> list[Slot]:
    """Where trainings run at once: on a GPU each, or sharing the CPU's threads."""
    from segdeformer.engine.ablation_runs import Slot

    if kind == "cuda":
        import torch

        if device not in ("auto", "cuda"):  # one GPU was named: all share it
            options = ("--device", device, "--impl", impl)
            return [Slot({}, options) for _ in range(jobs or 1)]
        count = torch.cuda.device_count()
        seen = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        names = seen.split(",")[:count] if seen else [str(index) for index in range(count)]
        options = ("--device", "cuda", "--impl", impl)
        return [
            Slot({"CUDA_VISIBLE_DEVICES": names[job % count]}, options, _workers_option(jobs or count))
            for job in range(jobs or count)
        ]
    num = jobs or 1
    said = os.environ.get("OMP_NUM_THREADS", "")
    threads = max(1, (int(said) if said.isdigit() else _cores()) // num)
    environment = {"OMP_NUM_THREADS": str(threads)} if num > 1 else {}
    options = ("--device", "cpu", "--impl", impl)
    return [Slot(environment, options, _workers_option(num)) for _ in range(num)]


def _workers_option(jobs: int) -> tuple[str, ...]:
    """A share of the cores for loading; alone, `train` chooses for itself."""
    if jobs == 1:
        return ()
    share = _cores() // jobs
    return ("--workers", str(0 if share <= 2 else min(MOST_WORKERS, share // 2)))


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _introduce(console: Console, plan: Plan, folder: Path, slots: list[Slot]) -> None:
    from segdeformer.engine.ablation_plan import encoders, runs_in_order
    from segdeformer.engine.ablation_results import SCORE_RULE, Results
    from segdeformer.engine.ablation_runs import is_finished
    from segdeformer.report.ablation_tables import setting_line

    console.print(plan.title, style="bold")
    console.print(setting_line(Results(plan, (), 0)))
    console.print(f"score: {SCORE_RULE}", style="dim")
    for row in plan.rows:
        console.print(f"  {row.name}: {_told_changes(plan, row, folder)}", style="dim")
    scratch = [
        name
        for name in encoders(plan.rows)
        if all(
            row.recipe.model.encoder.weights == "none"
            for row in plan.rows
            if row.recipe.model.encoder.name == name
        )
    ]
    if scratch:
        console.print(
            f"from scratch: {', '.join(scratch)} (pretrained weights: --weights ENCODER=FILE)", style="yellow"
        )
    runs = runs_in_order(plan)
    finished = sum(is_finished(folder, run) for run in runs)
    before = f", {finished} of them finished before" if finished else ""
    at_once = f", {len(slots)} at once" if len(slots) > 1 else ""
    console.print(f"{len(runs)} runs{before}{at_once}; folder {folder}")


def _told_changes(plan: Plan, row: PlannedRow, folder: Path) -> str:
    """What a row changes, in a line: each key, or of a whole other model the tables."""
    from segdeformer.engine.ablation_folder import recipe_path
    from segdeformer.engine.ablation_plan import row_changes

    changes = row_changes(plan, row)
    if len(changes) > MOST_CHANGES:
        tables = dict.fromkeys(key.removeprefix("model.").partition(".")[0] for key in changes)
        return f"another {', '.join(tables)}: {recipe_path(folder, row)}"
    return ", ".join(_told(key, value) for key, (_, value) in changes.items()) or "as the base"


def _told(key: str, value: object) -> str:
    name = key.removeprefix("model.")
    if isinstance(value, dict):
        inner = ", ".join(f"{k} {v}" for k, v in value.items() if v is not None)
        return f"{name} ({inner})"
    return f"{name} {'off' if value is None else value}"


def _run(console: Console, plan: Plan, folder: Path, slots: list[Slot], lock: int) -> None:
    """Train and show until all is done; ends with the table, the files, and an exit code."""
    from segdeformer.cli.show_ablation import AblationProgress, results_table
    from segdeformer.engine.ablation_results import Collector
    from segdeformer.engine.ablation_runs import Failed, Finished, Started, Stopped, execute
    from segdeformer.errors import UserError

    collector = Collector(plan, folder)
    num_left = 0
    with (
        _stop_requests() as asked,
        AblationProgress(console, collector.results()) as progress,
        contextlib.closing(execute(plan, folder, slots, lock=lock, should_stop=asked)) as stream,
    ):
        for event in stream:
            match event:
                case Started():
                    progress.started(event)
                case Finished():
                    results = collector.results()
                    _write(results, folder)
                    progress.finished(event, results)
                case Failed(run, reason):
                    collector.failures[run.row.name, run.seed] = reason
                    progress.failed(event, collector.results())
                case Stopped():
                    num_left = event.num_left
                case _:
                    progress.ticked(event)
            if asked():
                progress.stopping_now()
    results = collector.results()
    _write(results, folder)
    console.print()
    console.print(results_table(results), soft_wrap=False)
    _conclude(console, results, folder)
    if num_left:
        raise UserError(f"stopped with {num_left} runs left, all is saved; the same command goes on")
    if collector.failures:
        raise UserError(
            f"{len(collector.failures)} of {len(plan.rows) * len(plan.seeds)} runs failed, see above and "
            f"{folder / 'rows'}/*/seed-*.log; the same command tries them again"
        )


def _conclude(console: Console, results: Results, folder: Path) -> None:
    from segdeformer.report.ablation_tables import NOTE_ON_SEEDS, closing_line

    if results.num_finished:
        console.print(closing_line(results), style="dim")
        if len(results.plan.seeds) < 3:
            console.print(NOTE_ON_SEEDS, style="dim")
    for result in results.rows:
        for run in result.runs:
            if run.failure is not None:
                console.print(f"{result.row.name}, seed {run.seed}: failed: {run.failure}", style="red")
    console.print(f"results: {folder}/ablation.json, table.md, table.csv, classes.csv, plot.png")


def _write(results: Results, folder: Path) -> None:
    """Write results as JSON, Markdown, CSV and a picture."""
    import json

    from segdeformer.data.images import write_png
    from segdeformer.engine.ablation_results import results_values
    from segdeformer.files import write_text
    from segdeformer.report.ablation_tables import (
        class_csv_text,
        csv_text,
        gain_lines,
        markdown,
        setting_line,
    )
    from segdeformer.report.gains import gains_plot

    write_text(folder / "ablation.json", json.dumps(results_values(results, folder), indent=2) + "\n")
    write_text(folder / "table.md", markdown(results))
    write_text(folder / "table.csv", csv_text(results))
    write_text(folder / "classes.csv", class_csv_text(results))
    lines = gain_lines(results)
    title = f"{results.plan.title}: gain in mIoU, points"
    write_png(folder / "plot.png", gains_plot(lines, title=title, subtitle=setting_line(results)))


@contextlib.contextmanager
def _stop_requests() -> Iterator[Callable[[], int]]:
    """Gives a function that says how often Ctrl-C was pressed (or SIGTERM sent)."""
    asked = 0

    def ask(_signal: int, _frame: object) -> None:
        nonlocal asked
        asked += 1

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

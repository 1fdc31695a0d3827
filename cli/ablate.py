"""`segdeformer ablate`: train the rows of a table of the paper, or of your own, and compare them."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Argument, Option

from segdeformer.ablation import DEFAULT_BASE, DEFAULT_ITERATIONS
from segdeformer.cli.errors import one_line_errors
from segdeformer.cli.options import ClassesFile, Device, ImplName
from segdeformer.cli.stopping import answered_by

if TYPE_CHECKING:
    from rich.console import Console

    from segdeformer.ablation.plan import Plan
    from segdeformer.ablation.runs import Slot


@one_line_errors
def ablate_command(
    what: Annotated[
        str, Argument(help="table4, table5, table6, table7, table8, or a TOML file of your own rows.")
    ] = "table6",
    base: Annotated[
        str | None,
        Option(
            help=f"The recipe that the rows change; default: {DEFAULT_BASE} for "
            f"{DEFAULT_ITERATIONS} iterations, or the recipe of --data."
        ),
    ] = None,
    data: Annotated[
        str | None, Option(help="landcover, NAME:FOLDER or a folder; default: the recipe's.")
    ] = None,
    classes: ClassesFile = None,
    seeds: Annotated[str, Option(help="How many, or which: 3 means 0,1,2. More can be added later.")] = "2",
    iterations: Annotated[
        int | None, Option(min=1, help="Instead of the recipe's; warm-up scales with it.")
    ] = None,
    batch: Annotated[int | None, Option(min=1, help="Batch size instead of the recipe's.")] = None,
    weights: Annotated[
        list[str] | None,
        Option(
            help="Encoder weights: a file, `timm` or `none`. ENCODER=FILE, repeated, for several encoders."
        ),
    ] = None,
    jobs: Annotated[
        int | None, Option(min=1, help="Trainings at once; default: one for each GPU, one on a CPU.")
    ] = None,
    device: Device = "auto",
    impl: ImplName = "auto",
    out: Annotated[Path | None, Option(help="Folder of the results; default: runs/ablate-WHAT-DATA.")] = None,
) -> None:
    """Train each row with each seed, and give gains with confidence intervals beside the paper's.

    Without arguments: Table 6 on the landcover data, small, with 2 seeds.

    Stopped or killed, the same command goes on. The model after the last iteration is scored.
    """
    from segdeformer.ablation.folder import locked, settle
    from segdeformer.ablation.request import default_folder, make_plan, make_slots
    from segdeformer.cli.show import make_console
    from segdeformer.cli.show_ablation import introduce
    from segdeformer.runtime import choose_runtime

    kind = choose_runtime(device, impl).device.type
    plan = make_plan(
        what,
        seeds=seeds,
        base=base,
        data=data,
        classes=classes,
        iterations=iterations,
        batch=batch,
        weights=weights,
    )
    plan = plan._replace(folder=out or default_folder(what, plan))
    slots = make_slots(device, kind, jobs=jobs, impl=impl)
    console = make_console()
    with locked(plan.folder, console.print) as lock:
        settle(plan)
        introduce(console, plan, num_at_once=len(slots))
        _run(console, plan, slots, lock)


def _run(console: Console, plan: Plan, slots: list[Slot], lock: int) -> None:
    """Train and show until all is done; ends with the table, the files, and an exit code."""
    from segdeformer.ablation.results import Collector
    from segdeformer.ablation.runs import Failed, Finished, Stopped, execute
    from segdeformer.ablation.tables import write_results
    from segdeformer.cli.show_ablation import AblationProgress, conclude
    from segdeformer.errors import UserError, count

    collector = Collector(plan)
    progress = AblationProgress(console, collector.results())
    asked: list[int] = []  # by Ctrl-C, or SIGTERM
    num_left = 0
    with (
        answered_by(lambda number, _frame: asked.append(number), ("SIGINT", "SIGTERM")),
        progress.live if console.is_terminal else contextlib.nullcontext(),
        contextlib.closing(execute(plan, slots, lock=lock, should_stop=lambda: len(asked))) as stream,
    ):
        for event in stream:
            match event:
                case Finished():
                    progress.results = collector.results()
                    write_results(progress.results)
                case Failed(run, reason):
                    collector.failures[run.row.name, run.seed] = reason
                    progress.results = collector.results()
                case Stopped():
                    num_left = event.num_left
            progress.show(event)
            if asked:
                progress.stopping_now()
    results = collector.results()
    write_results(results)
    conclude(console, results)
    if num_left:
        raise UserError(f"stopped with {count(num_left, 'run')} left, all is saved; the same command goes on")
    if collector.failures:
        raise UserError(
            f"{count(len(collector.failures), 'run', of=len(plan.runs))} failed, see above and "
            f"{plan.folder / 'rows'}/*/seed-*.log; the same command tries them again"
        )

"""`segdeformer train`: train a recipe, watch it, keep the best."""

from __future__ import annotations

import contextlib
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Argument, Option

from segdeformer.cli.errors import one_line_errors
from segdeformer.cli.options import ClassesFile, Device, ImplName
from segdeformer.cli.stopping import ended_by_signals

if TYPE_CHECKING:
    from collections.abc import Sequence

    from segdeformer.protocols import OwnLogger
    from segdeformer.runtime import Runtime
    from segdeformer.training.prepare import Wanted
    from segdeformer.training.run import Options

large = partial(Option, rich_help_panel="Large runs")
UNREADABLE = ("unreadable image", "unreadable label map")  # findings that --bad-images skip lives with


@one_line_errors
@ended_by_signals()
def train_command(
    recipe: Annotated[
        str | None,
        Argument(help="A shipped recipe (see `segdeformer recipes`) or a TOML file.", show_default=False),
    ] = None,
    data: Annotated[
        str | None, Option(help="landcover, NAME:FOLDER or a folder of your own images and labels.")
    ] = None,
    classes: ClassesFile = None,
    out: Annotated[Path | None, Option(help="Run folder; default: a new one under runs/.")] = None,
    iterations: Annotated[
        int | None, Option(min=1, help="Instead of the recipe's; warm-up and validation scale with it.")
    ] = None,
    batch: Annotated[
        int | None, Option(min=1, help="Images of a step, over all processes; instead of the recipe's.")
    ] = None,
    seed: Annotated[int | None, Option(min=0, help="Instead of the recipe's.")] = None,
    weights: Annotated[
        str | None, Option(help="Encoder weights: a file, `timm` or `none`; instead of the recipe's.")
    ] = None,
    device: Device = "auto",
    workers: Annotated[
        int | None, Option(min=0, help="Loader processes; default: by the number of cores.")
    ] = None,
    impl: ImplName = "auto",
    resume: Annotated[
        bool, Option("--resume", help="Go on with the run in --out, or with the newest one.")
    ] = False,
    dry_run: Annotated[
        bool, Option("--dry-run", help="Show what would be done, measure two steps, and leave no trace.")
    ] = False,
    keep: Annotated[int, Option(min=1, help="Checkpoints to keep for --resume.")] = 2,
    bad_images: Annotated[
        str, Option(help="At an image that cannot be read: stop, or skip it and count.")
    ] = "stop",
    logger: Annotated[
        list[str] | None,
        Option(help="MODULE:NAME of a logger of your own, told every event; may be repeated."),
    ] = None,
    nproc: Annotated[int | None, large(min=1, help="Processes on this machine, one for each GPU.")] = None,
    max_restarts: Annotated[int, large(min=0, help="With --nproc: go on so often after a death.")] = 0,
    accumulate: Annotated[int, large(min=1, help="Micro-batches of a batch, one after another.")] = 1,
    auto_batch: Annotated[
        bool, large("--auto-batch", help="Find the smallest --accumulate that fits memory.")
    ] = False,
    precision: Annotated[
        str | None, large(help="float32, bfloat16 or float16; instead of the recipe's.")
    ] = None,
    compile_model: Annotated[bool, large("--compile", help="Compile the model by torch.compile.")] = False,
    channels_last: Annotated[bool, large("--channels-last", help="Maps in channels-last memory.")] = False,
    grad_checkpointing: Annotated[
        bool, large("--grad-checkpointing", help="Compute encoder blocks twice, to save memory.")
    ] = False,
    shard: Annotated[bool, large("--shard", help="Share the model between processes (FSDP2).")] = False,
    deterministic: Annotated[
        bool, large("--deterministic", help="On a GPU too, the same bits from one seed.")
    ] = False,
) -> None:
    """Train. Without arguments: the default recipe on the landcover data that comes with the package."""
    from segdeformer.errors import UsageError
    from segdeformer.plugins import bound_part
    from segdeformer.runtime import choose_runtime
    from segdeformer.runtime.device import make_deterministic
    from segdeformer.runtime.distributed import joined_processes, started_by_torchrun
    from segdeformer.training.prepare import Wanted
    from segdeformer.training.run import Options

    if max_restarts and not started_by_torchrun() and (nproc or 1) == 1:
        raise UsageError("--max-restarts needs --nproc, whose launcher starts again what has died")
    wanted = Wanted(recipe, data, classes, out, iterations, batch, seed, weights, precision)
    if nproc is not None and nproc > 1 and not started_by_torchrun():
        makes_folder = out is None and not resume and not dry_run
        _launch(wanted, nproc, max_restarts=max_restarts, makes_folder=makes_folder)
        return
    runtime = choose_runtime(device, impl, workers)
    if runtime.impl == "blocks":
        raise UsageError("--impl blocks has no gradients; use auto or sdpa to train")
    if bad_images not in ("stop", "skip"):
        raise UsageError(f"--bad-images is `{bad_images}`; expected stop or skip")
    if auto_batch and accumulate > 1:
        raise UsageError("--auto-batch finds --accumulate; leave one of them out")
    if deterministic:
        make_deterministic()
    options = Options(
        accumulate=accumulate,
        compile=compile_model,
        channels_last=channels_last,
        grad_checkpointing=grad_checkpointing,
        shard=shard,
        keep=keep,
        bad_images="skip" if bad_images == "skip" else "stop",
    )
    loggers = [bound_part(path, "logger", {}) for path in logger or ()]
    with joined_processes(runtime.device) as processes:
        runtime = runtime._replace(processes=processes)
        _train(wanted, options, loggers, runtime, resume=resume, dry_run=dry_run, auto_batch=auto_batch)


def _train(
    wanted: Wanted,
    options: Options,
    loggers: Sequence[OwnLogger],
    runtime: Runtime,
    *,
    resume: bool,
    dry_run: bool,
    auto_batch: bool,
) -> None:
    from segdeformer.cli.show import make_console
    from segdeformer.cli.train_show import (
        choose_accumulation,
        introduce,
        say_download,
        show_plan,
        train_and_show,
    )
    from segdeformer.data.check.doctor import quick_check, refuse_errors
    from segdeformer.errors import UserError
    from segdeformer.measure.implementation import settle_training
    from segdeformer.runtime.distributed import environment, from_first
    from segdeformer.training.prepare import new_folder, prepare, run_to_resume
    from segdeformer.training.run import RECIPE, resume_run, start_run

    first = runtime.processes.is_first
    console = make_console(quiet=not first)
    out = wanted.out
    resumed = run_to_resume(wanted) if resume else None
    if environment().restarts:  # torchrun has started us again after a death
        if out is None:
            raise UserError("a restart does not know its run: name --out, so that it goes on from there")
        if (out / RECIPE).is_file():
            resumed = out
            wanted = wanted._replace(recipe=None, seed=None, batch=None, weights=None, precision=None)
    if resume and resumed is None:
        console.print(f"no run in {out} yet: it begins")
    prepared = prepare(wanted, resumed)
    recipe = prepared.recipe
    findings = quick_check(recipe.data) if first else ()
    refuse_errors([f for f in findings if options.bad_images == "stop" or f.kind not in UNREADABLE])

    if resumed is None:
        say_download(console, recipe)
    if auto_batch:
        options = choose_accumulation(console, prepared, options, runtime)
    if dry_run:
        show_plan(console, prepared, options, runtime, findings)
        return
    folder = resumed or out
    if folder is None:
        folder = from_first(new_folder(recipe.name) if first else Path(), runtime.processes)
    begin = start_run if resumed is None else resume_run
    run = None
    try:
        run = begin(recipe, folder, prepared.data, runtime=runtime, options=options)
    finally:
        if run is None and resumed is None and out is None:
            with contextlib.suppress(OSError):  # it may hold the recipe already
                folder.rmdir()

    if not run.complete:
        settle_training(run, say=console.print)
    introduce(console, run, prepared.base, findings)
    if run.complete:
        iteration = run.progress.iteration
        console.print(f"{folder} is complete at iteration {iteration:,}; --iterations N trains on")
        return
    train_and_show(console, run, loggers if first else ())


def _launch(wanted: Wanted, nproc: int, *, max_restarts: int, makes_folder: bool) -> None:
    """This command in `nproc` processes, whose run folder is chosen here, so that a restart finds it."""
    from segdeformer.cli.launch import launch
    from segdeformer.training.prepare import new_folder, prepare

    arguments = sys.argv[1:]
    prepared = prepare(wanted, None) if makes_folder else None
    folder = new_folder(prepared.recipe.name) if prepared else None
    if folder is not None:
        arguments = [*arguments, "--out", str(folder)]
    try:
        launch(nproc, arguments, max_restarts=max_restarts)
    finally:
        if folder is not None:
            with contextlib.suppress(OSError):  # empty, if nothing came of it
                folder.rmdir()

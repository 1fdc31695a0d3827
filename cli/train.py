"""`segdeformer train`: train a recipe, watch it, keep the best."""

from __future__ import annotations

import contextlib
import datetime
import itertools
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from segdeformer.cli.errors import one_line_errors
from segdeformer.cli.options import ClassesFile, Device, ImplName

if TYPE_CHECKING:
    from rich.console import Console

    from segdeformer.config import DataConfig, Recipe
    from segdeformer.engine.train import Run, Validated
    from segdeformer.kernels.impl import Impl

# When only --data is said, the recipe of this name trains. The other data sets' recipes need pretrained
# encoders, so there the recipe is the user's choice.
DATA_WITH_OWN_RECIPE = ("landcover", "synthetic", "folder")
HIGHEST_FINE_TUNING_RATE = 2e-4


@one_line_errors
def train_command(
    recipe: Annotated[
        str | None,
        typer.Argument(
            help="A shipped recipe (see `segdeformer recipes`) or a TOML file.", show_default=False
        ),
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="landcover, NAME:FOLDER or a folder of your own images and labels.")
    ] = None,
    classes: ClassesFile = None,
    out: Annotated[Path | None, typer.Option(help="Run folder; default: a new one under runs/.")] = None,
    iterations: Annotated[
        int | None, typer.Option(min=1, help="Instead of the recipe's; warm-up and validation scale with it.")
    ] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Batch size instead of the recipe's.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Instead of the recipe's.")] = None,
    weights: Annotated[
        str | None, typer.Option(help="Encoder weights: a file, `timm` or `none`; instead of the recipe's.")
    ] = None,
    device: Device = "auto",
    workers: Annotated[
        int | None, typer.Option(min=0, help="Loader processes; default: by the number of cores.")
    ] = None,
    impl: ImplName = "auto",
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run in --out, or with the newest one.")
    ] = False,
) -> None:
    """Train. Without arguments: the default recipe on the landcover data that comes with the package."""
    from segdeformer.cli.options import checked_impl
    from segdeformer.cli.show import make_console
    from segdeformer.config import DEFAULT_RECIPE, load_recipe
    from segdeformer.data.datasets import open_dataset, parse_data_spec
    from segdeformer.engine.checkpoint import LAST, newest_run, read_checkpoint
    from segdeformer.engine.device import choose_device
    from segdeformer.engine.evaluate import check_same_classes
    from segdeformer.engine.train import resume_run, start_run
    from segdeformer.errors import UsageError, UserError

    chosen = choose_device(device)
    resolved = checked_impl(impl, chosen)
    if resolved == "blocks":
        raise UsageError("--impl blocks has no gradients; use auto or sdpa to train")
    given = parse_data_spec(data) if data is not None else None
    if resume:
        if recipe is not None or seed is not None or batch is not None or weights is not None:
            raise UsageError("--resume goes on with the run's own recipe; leave out RECIPE and its changes")
        out = out or newest_run()
        if not (out / LAST).is_file():
            raise UserError(f"{out} holds no {LAST} to go on with; start it without --resume")
        checkpoint = read_checkpoint(out / LAST)
        base = checkpoint.recipe
    else:
        checkpoint = None
        base = load_recipe(recipe or (_recipe_for(given.name) if given else DEFAULT_RECIPE))
    config = base.data
    if given is not None:
        config = config.model_copy(update={"name": given.name, "root": given.root})
    elif config.root:
        # so that the run can be evaluated from anywhere
        config = config.model_copy(update={"root": str(Path(config.root).resolve())})
    if classes is not None:
        config = config.model_copy(update={"classes": str(classes.resolve())})
    train_data, val_data = open_dataset(config, "train"), open_dataset(config, "val")
    if checkpoint is not None:
        check_same_classes(checkpoint.classes, train_data, str(checkpoint.path))
    # data of the user's choice brings its own number of classes, but a run keeps its own
    takes_classes = given is not None and not resume
    changed = _changed_recipe(
        base,
        data=config,
        num_classes=len(train_data.classes.names) if takes_classes else base.model.num_classes,
        iterations=iterations,
        keeps_schedule=resume,
        batch=batch,
        seed=seed,
        weights=weights,
    )
    folder = out or _new_folder(changed.name)
    begin = resume_run if resume else start_run
    run = None
    try:
        run = begin(changed, folder, train_data=train_data, val_data=val_data, device=chosen, impl=resolved)
    finally:
        if run is None and out is None:
            with contextlib.suppress(OSError):  # it may hold the recipe already
                folder.rmdir()

    console = make_console()
    _introduce(console, run, base, resolved)
    if run.complete:
        console.print(f"{folder} is complete at iteration {run.iteration:,}; --iterations N trains on")
        return
    _train_and_show(console, run, workers=_choose_workers(workers))


def _recipe_for(data_name: str) -> str:
    from segdeformer.errors import UsageError

    if data_name not in DATA_WITH_OWN_RECIPE:
        raise UsageError(
            f"name a recipe for {data_name}, such as `segdeformer train {data_name}-...`; "
            "`segdeformer recipes` lists them"
        )
    return data_name


def _changed_recipe(
    base: Recipe,
    *,
    data: DataConfig,
    num_classes: int,
    iterations: int | None,
    keeps_schedule: bool,
    batch: int | None,
    seed: int | None,
    weights: str | None,
) -> Recipe:
    """The recipe with the command line's changes, validated again.

    Warm-up and intervals scale with `iterations`, unless a run that has begun `keeps_schedule`.
    """
    from segdeformer.config import validate_recipe

    values = base.model_dump(exclude_none=True)
    values["data"] = data.model_dump(exclude_none=True)
    values["model"]["num_classes"] = num_classes
    train = values["train"]
    if iterations is not None and not keeps_schedule:
        share = iterations / train["iterations"]
        for name in ("warmup_iterations", "validate_every", "checkpoint_every"):
            smallest = 0 if name == "warmup_iterations" else 1
            train[name] = max(smallest, round(train[name] * share))
    if iterations is not None:
        train["iterations"] = iterations
    if batch is not None:
        train["batch_size"] = batch
    if seed is not None:
        train["seed"] = seed
    if weights is not None:
        values["model"]["encoder"]["weights"] = weights
    return validate_recipe(values, base.name)


def _new_folder(name: str) -> Path:
    """Make a folder of its own for a run, also when several start in one second."""
    from segdeformer.engine.checkpoint import RUNS

    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    for number in itertools.count(1):
        folder = RUNS / (f"{name}-{stamp}" if number == 1 else f"{name}-{stamp}-{number}")
        with contextlib.suppress(FileExistsError):
            folder.mkdir(parents=True)
            return folder
    raise AssertionError("counting never ends")


def _choose_workers(wanted: int | None) -> int:
    """Some loader processes where cores are plenty; on few cores they would only take turns."""
    if wanted is not None:
        return wanted
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return 0 if cores <= 2 else min(8, cores // 2)


def _introduce(console: Console, run: Run, base: Recipe, impl: Impl) -> None:
    from segdeformer.cli.show import groups_table, schedule_line
    from segdeformer.kernels.impl import describe_impl

    recipe = run.recipe
    attention = describe_impl(impl, run.device)
    console.print(f"{recipe.name}: {recipe.description}", style="bold")
    for change in _changes(base.model_dump(), recipe.model_dump()):
        console.print(f"  changed {change}", style="yellow")
    data = run.train_data
    console.print(
        f"data {data.name}: {len(data):,} training and {len(run.val_data):,} validation images, "
        f"{recipe.model.num_classes} classes"
    )
    console.print(f"device {run.device}, attention {attention}, run folder {run.folder}")
    if run.model.weights_report is not None:
        for line in run.model.weights_report.lines():
            console.print(line)
    if recipe.model.encoder.weights != "none" and recipe.train.learning_rate > HIGHEST_FINE_TUNING_RATE:
        console.print(
            f"note: a pretrained encoder at a learning rate of {recipe.train.learning_rate:g}; fine-tuning "
            "usually takes 6e-5 and decoder_lr_multiplier 10, as the recipe folder-pretrained does",
            style="yellow",
        )
    console.print(groups_table(run.groups, recipe.train), soft_wrap=False)
    console.print(schedule_line(recipe.train))
    if run.iteration:
        console.print(f"goes on after iteration {run.iteration:,}")


def _changes(before: Any, after: Any, path: str = "") -> Iterator[str]:
    if isinstance(before, dict) and isinstance(after, dict):
        for key in after:
            yield from _changes(before.get(key), after[key], f"{path}.{key}".lstrip("."))
    elif before != after:
        yield f"{path}: {before} -> {after}"


def _train_and_show(console: Console, run: Run, *, workers: int) -> None:
    from segdeformer.cli.progress import TrainingProgress
    from segdeformer.engine.train import Stopped, Validated, Validating, train
    from segdeformer.errors import UserError

    best: Validated | None = None
    with stop_request() as should_stop, TrainingProgress(console, run) as progress:
        for event in train(run, workers=workers, should_stop=should_stop):
            match event:
                case Validating():
                    progress.validating(event)
                case Validated():
                    if event.is_best:
                        best = event
                    progress.validated(event)
                case Stopped():
                    raise UserError(
                        f"stopped by Ctrl-C after iteration {event.iteration:,}, all is saved; go on with: "
                        f"segdeformer train --resume --out {run.folder}"
                    )
                case _:
                    progress.stepped(event)
    _finish(console, run, best)


@contextlib.contextmanager
def stop_request() -> Iterator[Callable[[], bool]]:
    """Gives a function that says whether Ctrl-C was pressed; a second Ctrl-C interrupts at once."""
    asked = False

    def ask(_signal: int, _frame: object) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True

    before = signal.signal(signal.SIGINT, ask)
    try:
        yield lambda: asked
    finally:
        signal.signal(signal.SIGINT, before)


def _finish(console: Console, run: Run, best: Validated | None) -> None:
    """The best validation's table, a picture made by its checkpoint, and where both lie.

    best: None if it was before this run was resumed; then it is made again.
    """
    import torch

    from segdeformer.cli.show import scores_line, scores_table
    from segdeformer.engine.checkpoint import BEST, load_weights, read_checkpoint
    from segdeformer.engine.evaluate import ImageResult, evaluate
    from segdeformer.engine.predict import predict_image
    from segdeformer.report.sheet import shown_indices, write_sheet

    recipe, path = run.recipe, run.folder / BEST
    load_weights(run.model, path)
    run.model.eval()
    if best is None:
        report = evaluate(
            run.model,
            run.val_data,
            protocol=recipe.evaluate,
            data=recipe.data,
            device=run.device,
            impl=run.impl,
        )
    else:
        report = best.report
    results = []
    for index in shown_indices(len(run.val_data)):
        sample = run.val_data.read(index)
        prediction = predict_image(
            run.model,
            sample.image_HW3,
            protocol=recipe.evaluate,
            data=recipe.data,
            device=run.device,
            impl=run.impl,
        )
        results.append(ImageResult(sample, torch.from_numpy(prediction.ids_HW)))
    picture = run.folder / "validation.png"
    line = scores_line(report)
    write_sheet(picture, results, report.classes, headline=f"{recipe.name}: {line}")
    console.print(scores_table(report), soft_wrap=False)
    console.print(f"iteration {read_checkpoint(path).iteration:,}: {line}", style="bold")
    console.print(f"picture:    {picture}")
    console.print(f"checkpoint: {path}")

"""`segdeformer train`: train a recipe, watch it, keep the best."""

from __future__ import annotations

import contextlib
import datetime
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from segdeformer.cli.errors import one_line_errors
from segdeformer.cli.options import Device, ImplName

if TYPE_CHECKING:
    from rich.console import Console

    from segdeformer.config import Recipe
    from segdeformer.engine.train import Run, Validated

# When only --data is said, the recipe of this name trains. The other data sets' recipes need pretrained
# encoders, so there the recipe is the user's choice.
DATA_WITH_OWN_RECIPE = ("landcover", "synthetic", "folder")


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
    from segdeformer.cli.options import check_impl
    from segdeformer.config import load_recipe
    from segdeformer.data.datasets import open_dataset, parse_data_spec
    from segdeformer.engine.checkpoint import LAST, newest_run, read_checkpoint
    from segdeformer.engine.device import choose_device
    from segdeformer.engine.train import resume_run, start_run
    from segdeformer.errors import UsageError

    chosen, resolved = choose_device(device), check_impl(impl)
    if resume:
        if recipe is not None or data is not None or seed is not None or batch is not None or weights:
            raise UsageError("--resume goes on with the run's own recipe; leave out RECIPE and its changes")
        out = out or newest_run()
        base = read_checkpoint(out / LAST).recipe
        given = None
    else:
        given = parse_data_spec(data) if data is not None else None
        base = load_recipe(recipe or _default_recipe(given.name if given else "landcover"))
    config = base.data
    if given is not None:
        config = config.model_copy(update={"name": given.name, "root": given.root})
    train_data, val_data = open_dataset(config, "train"), open_dataset(config, "val")
    changed = _changed_recipe(
        base,
        data=config,
        # data of the user's choice brings its own number of classes
        num_classes=len(train_data.classes.names) if given is not None else base.model.num_classes,
        iterations=iterations,
        batch=batch,
        seed=seed,
        weights=weights,
    )
    folder = out or _new_folder(changed.name)
    begin = resume_run if resume else start_run
    run = begin(changed, folder, train_data=train_data, val_data=val_data, device=chosen, impl=resolved)

    from rich.console import Console

    console = Console()
    _introduce(console, run, base, resolved)
    if run.iteration >= changed.train.iterations:
        console.print(f"{folder} is complete at iteration {run.iteration:,}; --iterations N trains on")
        return
    _train_and_show(console, run, workers=_choose_workers(workers))


def _default_recipe(data_name: str) -> str:
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
    data: Any,
    num_classes: int,
    iterations: int | None,
    batch: int | None,
    seed: int | None,
    weights: str | None,
) -> Recipe:
    """The recipe with the command line's changes, validated again."""
    from segdeformer.config import validate_recipe

    values = base.model_dump(exclude_none=True)
    values["data"] = data.model_dump()
    values["model"]["num_classes"] = num_classes
    train = values["train"]
    if iterations is not None:
        share = iterations / train["iterations"]
        for name in ("warmup_iterations", "validate_every", "checkpoint_every"):
            smallest = 0 if name == "warmup_iterations" else 1
            train[name] = max(smallest, round(train[name] * share))
        train["iterations"] = iterations
    if batch is not None:
        train["batch_size"] = batch
    if seed is not None:
        train["seed"] = seed
    if weights is not None:
        values["model"]["encoder"]["weights"] = weights
    return validate_recipe(values, base.name)


def _new_folder(name: str) -> Path:
    from segdeformer.engine.checkpoint import RUNS

    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    return RUNS / f"{name}-{stamp}"


def _choose_workers(wanted: int | None) -> int:
    """Some loader processes where cores are plenty; on few cores they would only take turns."""
    if wanted is not None:
        return wanted
    cores = os.cpu_count() or 1
    return 0 if cores <= 2 else min(8, cores // 2)


def _introduce(console: Console, run: Run, base: Recipe, impl: str) -> None:
    from segdeformer.cli.show import groups_table, schedule_line

    recipe = run.recipe
    console.print(f"[bold]{recipe.name}[/]: {recipe.description}", highlight=False)
    for change in _changes(base.model_dump(), recipe.model_dump()):
        console.print(f"  changed {change}", style="yellow", highlight=False, markup=False)
    data = run.train_data
    console.print(
        f"data {data.name}: {len(data):,} training and {len(run.val_data):,} validation images, "
        f"{recipe.model.num_classes} classes"
    )
    console.print(f"device {run.device}, attention {impl}, run folder {run.folder}", highlight=False)
    if run.model.weights_report is not None:
        for line in run.model.weights_report.lines():
            console.print(line, markup=False, highlight=False)
    console.print(groups_table(run.groups, recipe.train))
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
                    if best is None or event.is_best:
                        best = event
                    progress.validated(event)
                case Stopped():
                    raise UserError(
                        f"stopped by Ctrl-C after iteration {event.iteration:,}, all is saved; go on with: "
                        f"segdeformer train --resume --out {run.folder}"
                    )
                case _:
                    progress.stepped(event)
    if best is not None:
        _finish(console, run, best)


@contextlib.contextmanager
def stop_request() -> Iterator[Any]:
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


def _finish(console: Console, run: Run, best: Validated) -> None:
    """The best validation's table, a picture made by its checkpoint, and what to do next."""
    from segdeformer.cli.show import scores_line, scores_table
    from segdeformer.engine.checkpoint import BEST, load_weights
    from segdeformer.engine.evaluate import ImageResult
    from segdeformer.engine.predict import predict_image
    from segdeformer.report.sheet import shown_indices, write_sheet

    load_weights(run.model, run.folder / BEST)
    run.model.eval()
    results = []
    for index in shown_indices(len(run.val_data)):
        sample = run.val_data.read(index)
        prediction = predict_image(
            run.model,
            sample.image_HW3,
            protocol=run.recipe.evaluate,
            data=run.recipe.data,
            device=run.device,
        )
        results.append(ImageResult(sample, prediction.ids_HW))
    picture = run.folder / "validation.png"
    line = scores_line(best.report)
    write_sheet(picture, results, best.report.classes, headline=f"{run.recipe.name}: {line}")
    console.print(scores_table(best.report))
    console.print(f"iteration {best.iteration:,}: {line}", style="bold")
    console.print(f"picture:    {picture}", highlight=False, soft_wrap=True)
    console.print(f"checkpoint: {run.folder / BEST}", highlight=False, soft_wrap=True)

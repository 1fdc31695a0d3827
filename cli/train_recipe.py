"""From the words of a command line to the recipe, the data and the folder of a run."""

from __future__ import annotations

import contextlib
import datetime
import itertools
from pathlib import Path
from typing import NamedTuple

from segdeformer.config import DEFAULT_RECIPE, DataConfig, Recipe, load_recipe, validate_recipe
from segdeformer.data.datasets import Dataset, open_dataset, parse_data_spec
from segdeformer.engine.checkpoint import RUNS, newest_run, read_checkpoint
from segdeformer.engine.evaluate import check_same_classes
from segdeformer.engine.run import RECIPE
from segdeformer.engine.saves import newest
from segdeformer.errors import UsageError, UserError

# When only --data is said, the recipe of this name trains. The other data sets' recipes need pretrained
# encoders, so there the recipe is the user's choice.
DATA_WITH_OWN_RECIPE = ("landcover", "synthetic", "folder")


class Wanted(NamedTuple):
    """What the command line says about the recipe; None where it says nothing."""

    recipe: str | None
    data: str | None
    classes: Path | None
    out: Path | None
    iterations: int | None
    batch: int | None
    seed: int | None
    weights: str | None
    precision: str | None


class Prepared(NamedTuple):
    """A run that can begin."""

    base: Recipe  # before the command line's changes
    recipe: Recipe
    train_data: Dataset
    val_data: Dataset


def prepare(wanted: Wanted, resumed: Path | None) -> Prepared:
    """Read recipe and data; with `resumed`, a run folder, its own recipe.

    Raises `UserError` or `UsageError` in one line for whatever does not exist or does not fit.
    """
    given = parse_data_spec(wanted.data) if wanted.data is not None else None
    checkpoint = None
    if resumed is None:
        base = load_recipe(wanted.recipe or (_recipe_for(given.name) if given else DEFAULT_RECIPE))
    else:
        stored = newest(resumed)
        if stored is not None:
            checkpoint = read_checkpoint(stored.model)
            base = checkpoint.recipe
        elif (resumed / RECIPE).is_file():  # it ended before its first checkpoint
            base = load_recipe(str(resumed / RECIPE))
        elif any(resumed.glob("*.safetensors")):
            raise UserError(
                f"{resumed} holds weights, but no run to go on with; to start one from their encoder: "
                "segdeformer train RECIPE --weights FILE"
            )
        else:
            raise UserError(f"{resumed} holds no run to go on with; start it without --resume")
    config = base.data
    if given is not None:
        config = config.model_copy(update={"name": given.name, "root": given.root})
    elif config.root:
        # so that the run can be evaluated from anywhere
        config = config.model_copy(update={"root": str(Path(config.root).resolve())})
    if wanted.classes is not None:
        config = config.model_copy(update={"classes": str(wanted.classes.resolve())})
    train_data, val_data = open_dataset(config, "train"), open_dataset(config, "val")
    if checkpoint is not None:
        check_same_classes(checkpoint.classes, train_data, str(checkpoint.path))
    # data of the user's choice brings its own number of classes, but a run keeps its own
    takes_classes = given is not None and resumed is None
    recipe = _changed_recipe(
        base,
        wanted,
        data=config,
        num_classes=len(train_data.classes.names) if takes_classes else base.model.num_classes,
        keeps_schedule=resumed is not None,
    )
    return Prepared(base, recipe, train_data, val_data)


def _recipe_for(data_name: str) -> str:
    if data_name not in DATA_WITH_OWN_RECIPE:
        raise UsageError(
            f"name a recipe for {data_name}, such as `segdeformer train {data_name}-...`; "
            "`segdeformer recipes` lists them"
        )
    return data_name


def _changed_recipe(
    base: Recipe, wanted: Wanted, *, data: DataConfig, num_classes: int, keeps_schedule: bool
) -> Recipe:
    """The recipe with the command line's changes, validated again.

    Warm-up and intervals scale with `iterations`, unless a run that has begun `keeps_schedule`.
    """
    values = base.model_dump(exclude_none=True)
    values["data"] = data.model_dump(exclude_none=True)
    values["model"]["num_classes"] = num_classes
    train = values["train"]
    if wanted.iterations is not None and not keeps_schedule:
        share = wanted.iterations / train["iterations"]
        for name in ("warmup_iterations", "validate_every", "checkpoint_every"):
            smallest = 0 if name == "warmup_iterations" else 1
            train[name] = max(smallest, round(train[name] * share))
    changes = {
        "iterations": wanted.iterations,
        "batch_size": wanted.batch,
        "seed": wanted.seed,
        "precision": wanted.precision,
    }
    train.update({key: value for key, value in changes.items() if value is not None})
    if wanted.weights is not None:
        values["model"]["encoder"]["weights"] = wanted.weights
    return validate_recipe(values, base.name)


def run_to_resume(wanted: Wanted) -> Path:
    """The folder that --resume means: the one named, or the newest.

    Raises `UsageError` when the recipe is to be changed, which it cannot in the middle of a run.
    """
    changes = (wanted.recipe, wanted.seed, wanted.batch, wanted.weights, wanted.precision)
    if any(change is not None for change in changes):
        raise UsageError("--resume goes on with the run's own recipe; leave out RECIPE and its changes")
    return wanted.out or newest_run()


def new_folder(name: str) -> Path:
    """Make a folder of its own for a run, also when several start in one second."""
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    for number in itertools.count(1):
        folder = RUNS / (f"{name}-{stamp}" if number == 1 else f"{name}-{stamp}-{number}")
        with contextlib.suppress(FileExistsError):
            folder.mkdir(parents=True)
            return folder
    raise AssertionError("counting never ends")

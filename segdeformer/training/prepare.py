"""From what a caller wants to the recipe, the data and the folder of a run."""

from __future__ import annotations

import contextlib
import datetime
import itertools
from pathlib import Path
from typing import NamedTuple

from segdeformer.config import DEFAULT_RECIPE, Recipe, change_recipe, load_recipe
from segdeformer.config.changes import differences
from segdeformer.data.datasets import choose_data, open_splits, parse_data_spec
from segdeformer.data.samples import Splits
from segdeformer.errors import UsageError, UserError
from segdeformer.inference.evaluate import check_same_classes
from segdeformer.training.run import RECIPE
from segdeformer.training.saves import newest
from segdeformer.weights.checkpoint import RUNS, Checkpoint, newest_run, read_checkpoint

# When only --data is said, the recipe of this name trains. The other data sets' recipes need pretrained
# encoders, so there the recipe is the user's choice.
DATA_WITH_OWN_RECIPE = ("landcover", "synthetic", "folder")

# What --iterations sets or scales: a run may be made longer.
MAY_CHANGE = tuple(
    f"train.{key}" for key in ("iterations", "warmup_iterations", "validate_every", "checkpoint_every")
)


class Wanted(NamedTuple):
    """What a run is to be, in the words of the command line; None where nothing is said."""

    recipe: Recipe | str | None = None
    data: str | None = None
    classes: Path | None = None
    out: Path | None = None
    iterations: int | None = None
    batch: int | None = None
    seed: int | None = None
    weights: str | None = None
    precision: str | None = None


class Prepared(NamedTuple):
    """A run that can begin."""

    base: Recipe  # before the caller's changes
    recipe: Recipe
    data: Splits


def prepare(wanted: Wanted, resumed: Path | None, data: Splits | None = None) -> Prepared:
    """Read recipe and data; with `resumed`, a run folder, its own recipe.

    data: one's own instead of the recipe's. Raises `UserError` or `UsageError` in one line for whatever does
    not exist or does not fit.
    """
    checkpoint = None
    if resumed is not None:
        base, checkpoint = _stored_recipe(resumed)
    else:
        base = _named_recipe(wanted.recipe or _recipe_for(wanted.data))
    config = choose_data(base.data, wanted.data, wanted.classes)
    splits = data or open_splits(config)
    if checkpoint is not None:
        check_same_classes(checkpoint.classes, splits.train, str(checkpoint.path))
    # data of the user's choice, and any folder, brings its own number of classes, but a run keeps its own
    chosen = data is not None or wanted.data is not None or config.name == "folder"
    takes_classes = chosen and resumed is None
    recipe = change_recipe(
        base,
        data=config,
        num_classes=len(splits.train.classes.names) if takes_classes else None,
        iterations=wanted.iterations,
        batch_size=wanted.batch,
        seed=wanted.seed,
        precision=wanted.precision,
        weights=wanted.weights,
        keeps_schedule=resumed is not None,
    )
    return Prepared(base, recipe, splits)


def _stored_recipe(folder: Path) -> tuple[Recipe, Checkpoint | None]:
    """The recipe that a run folder goes on with, and its newest checkpoint, if there is one yet."""
    stored = newest(folder)
    if stored is not None:
        checkpoint = read_checkpoint(stored.model)
        return checkpoint.recipe, checkpoint
    if (folder / RECIPE).is_file():
        return load_recipe(str(folder / RECIPE)), None
    if any(folder.glob("*.safetensors")):
        raise UserError(
            f"{folder} holds weights, but no run to go on with; to start one from their encoder: "
            "segdeformer train RECIPE --weights FILE"
        )
    raise UserError(f"{folder} holds no run to go on with; start it without --resume")


def _recipe_for(data_spec: str | None) -> str:
    if data_spec is None:
        return DEFAULT_RECIPE
    name = parse_data_spec(data_spec).name
    if name not in DATA_WITH_OWN_RECIPE:
        raise UsageError(
            f"name a recipe for {name}, such as `segdeformer train {name}-...`; "
            "`segdeformer recipes` lists them"
        )
    return name


def run_to_resume(wanted: Wanted) -> Path | None:
    """The folder of the run that --resume goes on with; None where there is none yet, and one is to begin.

    A command that names its folder may be repeated as it is, as a queue does: it begins the run, and later
    goes on with it. Without a folder the newest run is meant. Raises `UsageError` where the command says
    something else than the run was begun with, by name; iterations and the place of its data may change.
    """
    changes = (wanted.recipe, wanted.seed, wanted.batch, wanted.weights, wanted.precision)
    if wanted.out is None:
        if any(change is not None for change in changes):
            raise UsageError("--resume with a RECIPE or changes goes on with the run in --out; name it")
        return newest_run()
    if newest(wanted.out) is None and not (wanted.out / RECIPE).is_file():
        if any(wanted.out.glob("*.safetensors")):
            _stored_recipe(wanted.out)  # which says what is there instead
        return None
    stored, _ = _stored_recipe(wanted.out)
    base = stored if wanted.recipe is None else _named_recipe(wanted.recipe)
    repeated = change_recipe(
        base,
        data=stored.data,
        num_classes=stored.model.num_classes,
        batch_size=wanted.batch,
        seed=wanted.seed,
        precision=wanted.precision,
        weights=wanted.weights,
    )
    others = {
        key: values
        for key, values in differences(stored.model_dump(), repeated.model_dump()).items()
        if key not in MAY_CHANGE
    }
    if others:
        told = [f"{key} is {after}, the run has {before}" for key, (before, after) in others.items()]
        more = f" (and {len(told) - 3} more)" if len(told) > 3 else ""
        raise UsageError(
            f"--resume: {'; '.join(told[:3])}{more}; a run keeps what it was begun with: leave it out, or "
            f"choose another --out than {wanted.out}"
        )
    return wanted.out


def _named_recipe(recipe: Recipe | str) -> Recipe:
    return recipe if isinstance(recipe, Recipe) else load_recipe(recipe)


def new_folder(name: str) -> Path:
    """Make a folder of its own for a run, also when several start in one second."""
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    RUNS.mkdir(exist_ok=True)
    for number in itertools.count(1):
        folder = RUNS / (f"{name}-{stamp}" if number == 1 else f"{name}-{stamp}-{number}")
        with contextlib.suppress(FileExistsError):
            folder.mkdir()
            return folder
    raise AssertionError("counting never ends")

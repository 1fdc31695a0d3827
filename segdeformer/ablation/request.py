"""From the command line's words to rows on a base, and to where they run at once."""

from __future__ import annotations

import os
import re
from pathlib import Path

import torch

from segdeformer.ablation import DEFAULT_BASE, DEFAULT_ITERATIONS
from segdeformer.ablation.plan import (
    Plan,
    PlannedRow,
    base_of_rows,
    data_title,
    encoders,
    file_rows,
    parse_seeds,
    read_ablation,
    table_rows,
    with_weights,
)
from segdeformer.ablation.runs import Slot
from segdeformer.config import load_recipe
from segdeformer.cores import num_cores
from segdeformer.data.datasets import choose_data, open_splits, parse_data_spec
from segdeformer.errors import UsageError
from segdeformer.paper.ablations import TABLES
from segdeformer.runtime import default_workers
from segdeformer.training.prepare import DATA_WITH_OWN_RECIPE
from segdeformer.weights.checkpoint import RUNS

NO_FILES = ("timm", "none")  # encoder weights that are no file


def make_plan(
    what: str,
    *,
    seeds: str,
    base: str | None = None,
    data: str | None = None,
    classes: Path | None = None,
    iterations: int | None = None,
    batch: int | None = None,
    weights: list[str] | None = None,
) -> Plan:
    """The rows of `what` on the base, with the data and the changes of the command line.

    Raises `UsageError` or `UserError`, before anything is written, when one of them is wrong.
    """
    chosen_seeds = parse_seeds(seeds)
    match = re.fullmatch(r"table\s*(\d+)", what)
    table = int(match[1]) if match and int(match[1]) in TABLES else None
    if table is None and not Path(what).is_file():
        tables = ", ".join(f"table{number}" for number in TABLES)
        raise UsageError(f"no ablation `{what}`: expected one of {tables}, or a TOML file of rows")
    file = read_ablation(Path(what)) if table is None else None
    given = parse_data_spec(data) if data is not None else None
    if file is not None:
        if base is not None:
            raise UsageError(f"--base {base}: {what} names its own base, `{file.base}`; change it there")
        base = file.base
    elif base is None and given is not None and given.name != "landcover":
        if given.name not in DATA_WITH_OWN_RECIPE:
            raise UsageError(f"name a recipe for {given.name}: --base {given.name}-...")
        base = given.name
    if base is None:
        base, iterations = DEFAULT_BASE, iterations or DEFAULT_ITERATIONS
    recipe = load_recipe(base)
    config = choose_data(recipe.data, data, classes)
    splits = open_splits(config)  # a missing split is told before anything is trained
    num_classes = len(splits.train.classes.names)
    common = base_of_rows(recipe, data=config, num_classes=num_classes, iterations=iterations, batch=batch)
    if table is not None:
        title, rows = f"Table {table} of the paper, on {data_title(config)}", table_rows(table, common)
    else:
        assert file is not None
        title, rows = file.title, file_rows(file, common)
    rows = with_weights(rows, _weights(weights or [], rows))
    for row in rows:
        path = row.recipe.model.encoder.weights
        if path not in NO_FILES and not Path(path).is_file():
            raise UsageError(f"row `{row.name}`: `model.encoder.weights` is `{path}`; no such file")
    return Plan(title, common, rows, chosen_seeds)


def _weights(given: list[str], rows: tuple[PlannedRow, ...]) -> dict[str, str]:
    """Weights for each encoder's name. Raises `UsageError` when one file would go to several encoders."""
    names = list(encoders(rows))
    chosen: dict[str, str] = {}
    for text in given:
        prefix, equals, rest = text.partition("=")
        matching = [name for name in names if prefix in (name, name.partition(".")[0])]
        if equals and matching:
            chosen[matching[0]] = _absolute(rest)
        elif text in NO_FILES:
            chosen |= dict.fromkeys(names, text)
        elif len(names) == 1 and (not equals or Path(text).exists()):
            chosen[names[0]] = _absolute(text)
        else:
            raise UsageError(
                f"--weights {text}: name the encoder, ENCODER=FILE; the rows have {', '.join(names)}"
            )
    return chosen


def _absolute(weights: str) -> str:
    path = Path(weights).expanduser()
    if weights in NO_FILES:
        return weights
    if not path.is_file():
        raise UsageError(f"--weights {weights}: no such file")
    return str(path.resolve())


def default_folder(what: str, plan: Plan) -> Path:
    """The same for the same command, so that repeating it goes on."""
    return RUNS / f"ablate-{Path(what).stem}-{data_title(plan.base.data)}"


def make_slots(device: str, kind: str, *, jobs: int | None, impl: str) -> list[Slot]:
    """Where trainings run at once: on a GPU each, or with an equal number of the CPU's threads.

    device: as asked for; kind: what was found, `cpu` or `cuda`. All share a GPU that was named.
    """
    if kind == "cuda" and device not in ("auto", "cuda"):
        return [Slot({}, ("--device", device, "--impl", impl))] * (jobs or 1)
    options = ("--device", kind, "--impl", impl)
    gpus: list[str] = []
    if kind == "cuda":
        seen = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        count = torch.cuda.device_count()
        gpus = seen.split(",")[:count] if seen else [str(index) for index in range(count)]
    num = jobs or len(gpus) or 1
    loading = () if num == 1 else ("--workers", str(default_workers(num)))  # alone, `train` chooses
    if gpus:
        devices = [{"CUDA_VISIBLE_DEVICES": gpus[job % len(gpus)]} for job in range(num)]
        return [Slot(environment, options, loading) for environment in devices]
    said = os.environ.get("OMP_NUM_THREADS", "")
    threads = max(1, (int(said) if said.isdigit() else num_cores()) // num)
    return [Slot({"OMP_NUM_THREADS": str(threads)} if num > 1 else {}, options, loading)] * num

"""What two processes do together, and one alone; `test_distributed.py` starts it as `joined.py FOLDER`.

Not a test.
"""

import json
import os
import sys
from pathlib import Path

import torch

from segdeformer.config import EvalConfig, Recipe, TrainConfig, load_recipe
from segdeformer.data.built_in import SyntheticDataset
from segdeformer.data.samples import Splits
from segdeformer.inference.evaluate import evaluate, report_values
from segdeformer.runtime import Runtime
from segdeformer.runtime.distributed import ALONE, Processes, joined_processes
from segdeformer.training.loop import Options, Step, start_run, train
from segdeformer.weights.build import build_model

CPU = torch.device("cpu")
TRAIN_DATA = SyntheticDataset("train", num_images=9, size_hw=(49, 63))
VAL_DATA = SyntheticDataset("val", num_images=5, size_hw=(33, 41))
PROTOCOLS = {
    "whole": EvalConfig(),
    "slide": EvalConfig(mode="slide", window=(24, 24), stride=(16, 16), scales=(1.0, 1.25), flip=True),
}


def recipe(*, iterations: int) -> Recipe:
    """Dropout, drop path, BatchNorm, class weights, an average over the labelled pixels: all that could
    depend on how a batch is shared out. The rate is small, since Adam turns rounding into steps of its size.
    """
    base = load_recipe("synthetic")
    encoder = base.model.encoder.model_copy(update={"drop_path": 0.3})
    config = {
        "iterations": iterations,
        "learning_rate": 6e-5,
        "batch_size": 4,
        "loss_average": "valid",
        "class_weights": (0.5, 1.0, 2.0, 3.0, 1.5),
        "clip_norm": 0.5,
        "ema_decay": 0.9,
        "validate_every": iterations,
        "checkpoint_every": iterations,
    }
    return base.model_copy(
        update={
            "model": base.model.model_copy(update={"encoder": encoder}),
            "augment": base.augment.model_copy(update={"crop": (40, 48)}),
            "train": TrainConfig.model_validate(base.train.model_dump(exclude={"losses"}) | config),
        }
    )


def losses_of_run(folder: Path, processes: Processes, options: Options, *, iterations: int) -> list[float]:
    """Train; the total loss of every step."""
    chosen = recipe(iterations=iterations)
    if options.shard:  # has no averaged weights
        chosen = chosen.model_copy(update={"train": chosen.train.model_copy(update={"ema_decay": None})})
    run = start_run(
        chosen,
        folder,
        Splits(TRAIN_DATA, VAL_DATA),
        runtime=Runtime(processes=processes),
        options=options,
    )
    return [event.losses.total.item() for event in train(run) if isinstance(event, Step)]


def scores(processes: Processes) -> dict[str, object]:
    """An untrained model under two protocols."""
    chosen = recipe(iterations=1)
    torch.manual_seed(3)
    model = build_model(chosen.model)
    runtime = Runtime(processes=processes)
    reports = {
        name: evaluate(model, VAL_DATA, protocol=protocol, data=chosen.data, runtime=runtime)
        for name, protocol in PROTOCOLS.items()
    }
    return {name: report_values(report) for name, report in reports.items()}


def everything(folder: Path, processes: Processes = ALONE) -> None:
    """Leave all results in the folder; the first process writes."""
    torch.set_num_threads(1)
    results = {
        "scores": scores(processes),
        "losses": losses_of_run(folder / "run", processes, Options(), iterations=20),
    }
    if processes.size > 1:
        sharded = Options(shard=True)
        results["sharded"] = losses_of_run(folder / "sharded", processes, sharded, iterations=4)
    else:
        results["sharded"] = losses_of_run(folder / "sharded", processes, Options(), iterations=4)
    if processes.is_first:
        (folder / f"results-{processes.size}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with joined_processes(CPU) as both:
        everything(Path(sys.argv[1]), both)

"""Peak memory of evaluating one large image on a CPU, above what the process holds with the model in it.

    python benchmarks/eval_memory.py [--recipe NAME] [--classes 150] [--height 1024] [--width 2048]

Random weights, folded where the model can be; the model, the argmax, the loss and the confusion matrix.
"""

from __future__ import annotations

import argparse
import json
import os
import time

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch

from segdeformer.config import EvalConfig, load_recipe
from segdeformer.data.classes import ClassTable
from segdeformer.data.datasets import Sample
from segdeformer.engine.device import peak_resident_mib
from segdeformer.engine.evaluate import Tally, evaluate_images
from segdeformer.models.segmenter import build_model


class OneImage:
    """A data set of one random image."""

    split = "val"

    def __init__(self, classes: ClassTable, height: int, width: int) -> None:
        random = np.random.default_rng(0)
        image = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
        labels = random.integers(0, len(classes.names), (height, width), dtype=np.uint8)
        self.sample = Sample(image, labels, "random")
        self.classes = classes
        self.name = "random"

    def __len__(self) -> int:
        return 1

    def read(self, index: int) -> Sample:
        return self.sample


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--recipe", default="ade20k-segdeformer-b1")
    parser.add_argument("--classes", type=int, default=150)
    parser.add_argument("--height", type=int, default=1024)
    parser.add_argument("--width", type=int, default=2048)
    arguments = parser.parse_args()
    recipe = load_recipe(arguments.recipe)
    encoder = recipe.model.encoder.model_copy(update={"weights": "none"})
    config = recipe.model.model_copy(update={"encoder": encoder, "num_classes": arguments.classes})
    model = build_model(config).eval()
    if model.folding_obstacle is None:
        model = model.fold()
    names = tuple(str(index) for index in range(arguments.classes))
    classes = ClassTable(names, ((0, 0, 0),) * arguments.classes)

    def evaluate(height: int, width: int) -> float:
        began = time.perf_counter()
        data = OneImage(classes, height, width)
        protocol = EvalConfig(mode="whole")
        options = {"protocol": protocol, "data": recipe.data, "device": torch.device("cpu")}
        for _ in evaluate_images(model, data, Tally(classes), **options):
            pass
        return time.perf_counter() - began

    evaluate(64, 64)  # libraries settle
    with open("/proc/self/statm") as statm:
        held_mib = int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
    seconds = evaluate(arguments.height, arguments.width)
    extra_mib = peak_resident_mib() - held_mib
    print(json.dumps(vars(arguments) | {"held_mib": held_mib, "extra_mib": extra_mib, "seconds": seconds}))


if __name__ == "__main__":
    main()

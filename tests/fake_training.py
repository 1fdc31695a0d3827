"""Stands in for training and scoring in tests of `ablate`: the same files and signals, in no time.

    fake_training.py train RECIPE --seed N --out RUN ...      fake_training.py train --resume --out RUN ...
    fake_training.py score RUN ...

Hits are a function of the recipe's learning rate (in thousandths) and the seed. At a rate of 0.013 training
fails, at 0.011 it takes long. RUN/diary.txt has a line for each start.
"""

import json
import os
import signal
import sys
import time
import tomllib
from pathlib import Path

NUM_IMAGES = 4


def recipe_of(run: Path) -> dict:
    return tomllib.loads((run / "recipe.toml").read_text("utf-8"))


def train(arguments: list[str]) -> None:
    run = Path(arguments[arguments.index("--out") + 1])
    state = run / "last.safetensors"
    stopping = []
    signal.signal(signal.SIGINT, lambda *_: stopping.append(1))
    if "--resume" in arguments:
        iteration = int(state.read_text())
    else:
        run.mkdir(parents=True, exist_ok=True)
        seed = arguments[arguments.index("--seed") + 1]
        recipe = Path(arguments[0]).read_text("utf-8").replace("seed = 0", f"seed = {seed}")
        (run / "recipe.toml").write_text(recipe)
        iteration = 0
    values = recipe_of(run)["train"]
    with (run / "diary.txt").open("a") as diary:
        print(iteration, os.environ.get("OMP_NUM_THREADS"), os.getpid(), file=diary)
    if values["learning_rate"] == 0.013:
        print("some context", flush=True)
        print("error: unlucky thirteen", file=sys.stderr)
        sys.exit(1)
    slow = values["learning_rate"] == 0.011 and iteration == 0
    while iteration < values["iterations"]:
        iteration += 1
        with (run / "metrics.jsonl").open("a") as metrics:
            print(json.dumps({"kind": "train", "iteration": iteration, "loss": 1 / iteration}), file=metrics)
        state.write_text(str(iteration))
        time.sleep(0.05 if slow else 0)
        if stopping:
            sys.exit(1)
    state.write_text(str(iteration))


def score(run: Path) -> None:
    import numpy as np

    values = recipe_of(run)["train"]
    hits = 20 + round(1000 * values["learning_rate"]) + values["seed"]
    counts_NKK = np.zeros((NUM_IMAGES, 2, 2), np.uint32)
    for index in range(NUM_IMAGES):  # one class of 100 pixels an image, of which so many are hit
        counts_NKK[index, 0] = [hits + index, 100 - hits - index]
    names = [f"image {index}" for index in range(NUM_IMAGES)]
    labelled = {"names": names, "classes": ["here", "never"]}
    np.savez_compressed(run / "images.npz", **labelled, counts=counts_NKK, iteration=values["iterations"])


if __name__ == "__main__":
    if sys.argv[1] == "train":
        train(sys.argv[2:])
    else:
        score(Path(sys.argv[2]))

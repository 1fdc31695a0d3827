"""Peak memory of one training step on a CPU: SegDeformer beside SegFormer, each in a process of its own.

    python benchmarks/step_memory.py [--model b1] [--batch 2] [--size 512] [--classes 150] [--json FILE]

The whole step: forward, both losses, backward, AdamW. Peaks are of the whole process; `held` is what
the process held before the step, with the optimiser's state.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

from segdeformer.config import TrainConfig, load_recipe
from segdeformer.engine.device import peak_resident_mib
from segdeformer.engine.losses import training_losses
from segdeformer.models.segmenter import build_model

MODELS = ("segdeformer", "segformer")


def one_step(arguments: argparse.Namespace) -> dict[str, float]:
    """A step in this process, which should be fresh."""
    recipe = load_recipe(f"ade20k-{arguments.step_of}-{arguments.model}")
    encoder = recipe.model.encoder.model_copy(update={"weights": "none"})
    config = recipe.model.model_copy(update={"encoder": encoder, "num_classes": arguments.classes})
    torch.manual_seed(0)
    model = build_model(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-9)

    def step(size: int) -> float:
        images = torch.randn(arguments.batch, 3, size, size)
        labels = torch.randint(0, arguments.classes, (arguments.batch, size, size), dtype=torch.uint8)
        began = time.perf_counter()
        losses = training_losses(model(images), labels, TrainConfig(), None)
        optimizer.zero_grad()
        losses.total.backward()
        optimizer.step()
        return time.perf_counter() - began

    step(64)  # libraries and the optimiser allocate what they keep
    with open("/proc/self/statm") as statm:
        held_mib = int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
    seconds = step(arguments.size)
    return {"held_mib": held_mib, "peak_mib": peak_resident_mib(), "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="b1")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--classes", type=int, default=150)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--step-of", choices=MODELS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.step_of:
        print(json.dumps(one_step(arguments)))
        return
    steps = {}
    for name in MODELS:
        command = [sys.executable, *sys.argv, "--step-of", name]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        steps[name] = json.loads(output)
    commit = subprocess.run(
        ["git", "-C", Path(__file__).parent, "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    ).stdout.strip()
    ours, theirs = steps["segdeformer"], steps["segformer"]
    result = {
        "model": arguments.model,
        "batch": arguments.batch,
        "size": arguments.size,
        "classes": arguments.classes,
        "dtype": "float32",
        "processor": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "commit": commit,
        "date": datetime.date.today().isoformat(),
        "steps": steps,
        "peak_ratio": ours["peak_mib"] / theirs["peak_mib"],
        "extra_ratio": (ours["peak_mib"] - ours["held_mib"]) / (theirs["peak_mib"] - theirs["held_mib"]),
    }
    print(json.dumps(result, indent=1))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

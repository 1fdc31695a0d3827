"""The loss, a training step and an evaluation on a CPU: peak memory, each in a process of its own, and time.

    python -m benchmarks.cpu [--model b1] [--batch 2] [--classes 150] [--size 512] [--json FILE]

The loss of upsampled logits in strips beside F.interpolate + F.cross_entropy, forward and backward, timed in
alternation; the whole step (both losses, AdamW), with all keys and with few, beside SegFormer's; the
evaluation of one 2048x1024 image, folded, with argmax, loss and confusion matrix. A model's forward pass:
`segdeformer bench --fps`.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
import torch.nn.functional as F

from segdeformer.config import EvalConfig, load_recipe
from segdeformer.data.classes import ClassTable
from segdeformer.data.samples import Sample
from segdeformer.files import write_text
from segdeformer.inference.evaluate import Tally, evaluate_images
from segdeformer.kernels import upsample_cross_entropy
from segdeformer.kernels.tuning.cases import loss_step, make_loss_task
from segdeformer.kernels.tuning.judge import LossTask
from segdeformer.measure.machine import this_machine
from segdeformer.measure.memory import in_own_process, peak_mib
from segdeformer.measure.speed import Length, alternating_ms, percentile
from segdeformer.models.segmenter import Segmenter
from segdeformer.models.skeleton import without_weights
from segdeformer.weights.build import build_model

CPU = torch.device("cpu")
Run = Callable[[bool], object]  # of a small problem, for what libraries keep, or of the whole one


class OneImage:
    """A data set of one random image."""

    name, split = "random", "val"

    def __init__(self, num_classes: int, height: int, width: int) -> None:
        random = np.random.default_rng(0)
        image = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
        labels = random.integers(0, num_classes, (height, width), dtype=np.uint8)
        self.sample = Sample(image, labels, "random")
        self.classes = ClassTable(tuple(map(str, range(num_classes))), ((0, 0, 0),) * num_classes)

    def __len__(self) -> int:
        return 1

    def read(self, index: int) -> Sample:
        return self.sample


def loss_inputs(options: argparse.Namespace) -> LossTask:
    """Logits at a quarter of the size, in the model's memory order, and labels, a tenth ignored."""
    size, full = (options.size // 4,) * 2, (options.size,) * 2
    task = make_loss_task(options.batch, options.classes, size, full, dtype=torch.float32, device=CPU)
    return task._replace(logits_BKhw=task.logits_BKhw.contiguous(memory_format=torch.channels_last))


def eager_loss(logits_BKhw: torch.Tensor, labels_BHW: torch.Tensor) -> torch.Tensor:
    full_BKHW = F.interpolate(logits_BKhw, labels_BHW.shape[1:], mode="bilinear", align_corners=False)
    return F.cross_entropy(full_BKHW, labels_BHW, ignore_index=255)


LOSSES = {"ours": upsample_cross_entropy, "eager": eager_loss}


def loss_run(options: argparse.Namespace, way: str) -> Run:
    task = loss_inputs(options)
    few = LossTask(task.logits_BKhw[:, :, :8, :8], task.labels_BHW[:, :32, :32])
    runs = [loss_step(inputs, LOSSES[way]) for inputs in (task, few)]
    return lambda small: runs[small]()


def random_model(options: argparse.Namespace, kind: str) -> Segmenter:
    kind, _, reduction = kind.partition(" R")
    config = without_weights(load_recipe(f"ade20k-{kind}-{options.model}").model)
    if reduction:
        assert config.context is not None
        few = {"reduction": int(reduction), "reduction_by": "mean"}
        config = config.model_copy(update={"context": config.context.model_copy(update=few)})
    torch.manual_seed(0)
    return build_model(config.model_copy(update={"num_classes": options.classes}))


def step_run(options: argparse.Namespace, kind: str) -> Run:
    model = random_model(options, kind).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-9)

    def run(small: bool) -> None:
        size = 64 if small else options.size
        images = torch.randn(options.batch, 3, size, size)
        labels = torch.randint(0, options.classes, (options.batch, size, size), dtype=torch.uint8)
        output = model(images)
        loss = upsample_cross_entropy(output.logits_BKhw, labels)
        if output.class_logits_BKhw is not None:
            loss = loss + 0.4 * upsample_cross_entropy(output.class_logits_BKhw, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return run


def evaluation_run(options: argparse.Namespace, kind: str) -> Run:
    model = random_model(options, kind).eval()
    if model.folding_obstacle is None:
        model = model.fold()
    data = load_recipe(f"ade20k-{kind}-{options.model}").data

    def run(small: bool) -> None:
        images = OneImage(options.classes, *((64, 64) if small else (options.height, options.width)))
        protocol = EvalConfig(mode="whole")
        for _ in evaluate_images(model, images, Tally(images.classes), protocol=protocol, data=data):
            pass

    return run


RUNS: dict[str, tuple[Callable[[argparse.Namespace, str], Run], str]] = {
    "loss, ours": (loss_run, "ours"),
    "loss, F.interpolate + F.cross_entropy": (loss_run, "eager"),
    "step, segdeformer": (step_run, "segdeformer"),
    "step, segdeformer, R = 4 by means": (step_run, "segdeformer R4"),
    "step, segdeformer, R = 8 by means": (step_run, "segdeformer R8"),
    "step, segformer": (step_run, "segformer"),
    "evaluation, segdeformer": (evaluation_run, "segdeformer"),
}


def measured(options: argparse.Namespace) -> dict[str, float]:
    """Memory and time of one of the runs, once; this process should be fresh."""
    make, of = RUNS[options.run]
    run = make(options, of)
    run(True)
    began = time.perf_counter()
    peak = peak_mib(lambda: run(False), CPU)
    seconds = time.perf_counter() - began
    return {"held_mib": peak.held, "peak_mib": peak.peak, "extra_mib": peak.extra, "seconds": seconds}


def loss_times(options: argparse.Namespace) -> dict[str, float]:
    """Medians of both losses in alternation, and how far they lie apart."""
    task = loss_inputs(options)
    runs = {way: loss_step(task, loss) for way, loss in LOSSES.items()}
    (loss, gradient), (their_loss, their_gradient) = (run() for run in runs.values())
    rounds = list(alternating_ms(runs, length=Length(options.repeats, 0)))
    ours_ms, eager_ms = (percentile([times[way] for times in rounds], 50) for way in runs)
    return {
        "ours_ms": ours_ms,
        "eager_ms": eager_ms,
        "times_faster": eager_ms / ours_ms,
        "loss_difference": abs(loss - their_loss).item(),
        "gradient_difference": ((gradient - their_gradient).abs().max() / their_gradient.abs().max()).item(),
    }


def main() -> None:
    if sys.argv[1:] and sys.argv[1].startswith("{"):  # the process of one run
        print(json.dumps(measured(argparse.Namespace(**json.loads(sys.argv[1])))))
        return
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="b1")
    numbers = {"batch": 2, "classes": 150, "size": 512, "height": 1024, "width": 2048, "repeats": 7}
    for name, default in numbers.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    machine = this_machine(CPU)
    chosen = {name: value for name, value in vars(options).items() if name != "json"}
    result = {
        **chosen,
        "dtype": "float32",
        "machine": machine._asdict(),
        "memory": {name: in_own_process("benchmarks.cpu", {**chosen, "run": name}) for name in RUNS},
        "loss": loss_times(options),
    }
    text = json.dumps(result, indent=1)
    print(text)
    if options.json:
        write_text(options.json, text + "\n")


if __name__ == "__main__":
    main()

"""Whole-model CPU inference: ours against the textbook decoder with N x N matrices, in one run.

    python benchmarks/decoder_cpu.py [--model b1] [--size 512] [--classes 150,19] [--repeats 5]

Four ways: `folded` (`model.fold()`), `ours` (attention in blocks, exact low-rank external stage) and
`textbook` (Eqs. 5-7 as printed, every N x N matrix held) with the same weights, and `segformer` (no context)
for scale.
Times alternate in one process, so that drift hits all alike; each peak memory is a process of its own.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

from segdeformer.config import ContextConfig, ExternalConfig, InternalConfig, ModelConfig, load_recipe
from segdeformer.engine.device import peak_resident_mib
from segdeformer.kernels.commit import commit
from segdeformer.measure.machine import cpu_name
from segdeformer.models.segmenter import Segmenter, build_model

WAYS = ("folded", "ours", "textbook", "segformer")


class Memory(NamedTuple):
    before_mib: float  # resident set when the model is built
    peak_mib: float  # of the whole process


class Times(NamedTuple):
    seconds: dict[str, list[float]]  # per forward pass
    difference: dict[str, float]  # largest to textbook's logits, relative to the largest logit


def build(way: str, model: str, num_classes: int) -> Segmenter:
    """The B-model in one of the four ways; the first three get equal random weights."""
    base = load_recipe(f"ade20k-segformer-{model}").model
    context = ContextConfig(projection="affine", internal=InternalConfig(), external=ExternalConfig())
    config: ModelConfig = base.model_copy(
        update={
            "num_classes": num_classes,
            "encoder": base.encoder.model_copy(update={"weights": "none"}),
            "context": None if way == "segformer" else context,
        }
    )
    torch.manual_seed(0)
    if way == "textbook":
        return build_model(config, impl="reference", external_form="plain").eval()
    built = build_model(config).eval()
    return built.fold() if way == "folded" else built


def image(size: int) -> torch.Tensor:
    return torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0))


@torch.inference_mode()
def memory(way: str, arguments: argparse.Namespace, num_classes: int) -> Memory:
    """Memory of one forward pass; meant for a fresh process."""
    model, x = build(way, arguments.model, num_classes), image(arguments.size)
    model(image(64))  # libraries allocate their own on first use
    with open("/proc/self/statm") as statm:
        before_mib = int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
    model(x)
    return Memory(before_mib, peak_resident_mib())


@torch.inference_mode()
def measure(arguments: argparse.Namespace, num_classes: int) -> Times:
    """Every way in alternation."""
    models = {way: build(way, arguments.model, num_classes) for way in WAYS}
    x = image(arguments.size)
    first = {way: model(x).logits_BKhw for way, model in models.items()}  # warm-up
    textbook = first["textbook"]
    difference = {
        way: ((first[way] - textbook).abs().max() / textbook.abs().max()).item() for way in ("folded", "ours")
    }
    taken: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(arguments.repeats):
        for way, model in models.items():
            began = time.perf_counter()
            model(x)
            taken[way].append(time.perf_counter() - began)
    return Times(taken, difference)


def rows(arguments: argparse.Namespace, num_classes: int) -> dict[str, object]:
    """Everything about one number of classes."""
    taken, difference = measure(arguments, num_classes)
    memories: dict[str, Memory] = {}
    for way in WAYS:
        command = [sys.executable, __file__, *sys.argv[1:], "--peak-of", way, str(num_classes)]
        answer = subprocess.run(command, capture_output=True, text=True, check=True)
        memories[way] = Memory(*json.loads(answer.stdout.splitlines()[-1]))
    textbook_s, textbook_mib = statistics.median(taken["textbook"]), memories["textbook"].peak_mib
    return {
        "largest_relative_difference_of_logits_to_textbook": difference,
        **{
            way: {
                "median_s": round(statistics.median(taken[way]), 4),
                "min_s": round(min(taken[way]), 4),
                "times_faster_than_textbook": round(textbook_s / statistics.median(taken[way]), 2),
                "peak_mib": round(memories[way].peak_mib),
                "peak_above_model_mib": round(memories[way].peak_mib - memories[way].before_mib),
                "share_of_textbook_peak": round(memories[way].peak_mib / textbook_mib, 3),
            }
            for way in WAYS
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="b1", choices=["b1", "b2", "b5"])
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--classes", default="150,19")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--peak-of", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peak_of:
        way, num_classes = arguments.peak_of
        print(json.dumps(memory(way, arguments, int(num_classes))))
        return

    result = {
        "what": f"SegDeformer-{arguments.model.upper()} affine, batch 1, {arguments.size}x{arguments.size}, "
        "float32, forward to 1/4 logits, by number of classes",
        "hardware": f"{cpu_name()}, {torch.get_num_threads()} threads",
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "load_average_before": round(os.getloadavg()[0], 1),  # of other work; more than 0.3 distorts
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
        "classes": {num: rows(arguments, int(num)) for num in arguments.classes.split(",")},
    }
    text = json.dumps(result, indent=2)
    print(text)
    if arguments.json:
        arguments.json.write_text(text + "\n", "utf-8")


if __name__ == "__main__":
    main()

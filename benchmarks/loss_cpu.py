"""Cross-entropy of upsampled logits on a CPU: strips against F.interpolate + F.cross_entropy, in one run.

    python benchmarks/loss_cpu.py [--batch 2] [--classes 150] [--map 128] [--size 512] [--json FILE]

Forward and backward. Times alternate in one process; each peak memory is a process of its own, its
resident set before the loss taken off.
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

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
import torch.nn.functional as F

from segdeformer.engine.device import peak_resident_mib
from segdeformer.kernels.upsample_cross_entropy import upsample_cross_entropy

WAYS = ("ours", "eager")


def inputs(arguments: argparse.Namespace) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (arguments.batch, arguments.classes, arguments.map, arguments.map)
    logits = torch.randn(shape, generator=generator).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(
        0, arguments.classes, (arguments.batch, arguments.size, arguments.size), generator=generator
    )
    labels[torch.rand(labels.shape, generator=generator) < 0.1] = 255
    return logits.requires_grad_(), labels


def step(way: str, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """One loss and its gradient."""
    logits.grad = None
    if way == "ours":
        loss = upsample_cross_entropy(logits, labels)
    else:
        full = F.interpolate(logits, labels.shape[1:], mode="bilinear", align_corners=False)
        loss = F.cross_entropy(full, labels, ignore_index=255)
        del full
    loss.backward()
    return loss.detach()


def resident_mib() -> float:
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def extra_mib(way: str, arguments: argparse.Namespace) -> float:
    """Peak memory of one step above what the process held before; meant for a fresh process."""
    logits, labels = inputs(arguments)
    step(way, logits.detach()[:, :, :8, :8].requires_grad_(), labels[:, :32, :32])  # libraries settle
    before_mib = resident_mib()
    step(way, logits, labels)
    return peak_resident_mib() - before_mib


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--classes", type=int, default=150)
    parser.add_argument("--map", type=int, default=128)
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--memory-of", choices=WAYS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory_of:
        print(extra_mib(arguments.memory_of, arguments))
        return

    peaks_mib = {}
    for way in WAYS:
        command = [sys.executable, *sys.argv, "--memory-of", way]
        peaks_mib[way] = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    logits, labels = inputs(arguments)
    losses, gradients = {}, {}
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    for repeat in range(arguments.repeats + 1):
        for way in WAYS:
            start = time.perf_counter()
            losses[way] = step(way, logits, labels)
            if repeat:  # the first round warms up
                seconds[way].append(time.perf_counter() - start)
            assert logits.grad is not None
            gradients[way] = logits.grad
    medians = {way: statistics.median(times) for way, times in seconds.items()}
    largest = gradients["eager"].abs().max()
    commit = subprocess.run(
        ["git", "-C", Path(__file__).parent, "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    ).stdout.strip()
    result = {
        "batch": arguments.batch,
        "classes": arguments.classes,
        "map": arguments.map,
        "size": arguments.size,
        "dtype": "float32",
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "commit": commit,
        "date": datetime.date.today().isoformat(),
        "median_s": medians,
        "extra_mib": peaks_mib,
        "times_faster": medians["eager"] / medians["ours"],
        "share_of_memory": peaks_mib["ours"] / peaks_mib["eager"],
        "loss_difference": abs(losses["ours"] - losses["eager"]).item(),
        "gradient_difference": ((gradients["ours"] - gradients["eager"]).abs().max() / largest).item(),
    }
    print(json.dumps(result, indent=1))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

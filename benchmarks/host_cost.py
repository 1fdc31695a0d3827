"""What a call of our Triton kernels costs the host, on a machine without a GPU.

    python -m benchmarks.host_cost [--json FILE]

Everything runs but the kernels and the GPU's own launch call: checks, operators, autograd, padding, Triton's
launcher. Small tensors, so that the CPU's copies of them take no time. Lower quartiles of microseconds.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.no_gpu import pretend
from segdeformer.files import write_text
from segdeformer.kernels.attention import attention
from segdeformer.kernels.external_attention import external_attention
from segdeformer.measure.machine import this_machine

CALLS = 1000
SCALE = 1 / 16


def quartile_us(run: Callable[[], object]) -> float:
    """A call's time that three of four calls exceed: what others take of the machine adds to the rest."""
    for _ in range(20):
        run()
    times = []
    for _ in range(CALLS):
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    return round(1e6 * sorted(times)[CALLS // 4], 1)


def forward_and_both(function: Callable[..., Tensor], *inputs: Tensor) -> dict[str, float]:
    """Without gradients, and with the backward."""
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    grad_out = torch.ones_like(function(*inputs))

    def forward() -> None:
        with torch.no_grad():
            function(*inputs)

    def both() -> None:
        torch.autograd.grad(function(*leaves), leaves, grad_out)

    return {"forward_us": quartile_us(forward), "forward_backward_us": quartile_us(both)}


def measure() -> dict[str, dict[str, float]]:
    """Of our operations, and of PyTorch's own attention for scale (which computes, on tiny tensors)."""
    found = {}
    for width, value_width, num_keys in ((128, 128, 512), (192, 192, 512), (192, 150, 512)):
        q, k, v = (
            torch.zeros(1, rows, columns, dtype=torch.bfloat16)
            for rows, columns in ((32, width), (num_keys, width), (num_keys, value_width))
        )
        name = f"attention ({width}, {value_width}), {num_keys} keys"
        found[name] = forward_and_both(lambda *x: attention(*x, scale=SCALE, impl="triton"), q, k, v)
    for num_classes in (19, 64, 150):
        scores = torch.zeros(1, 32, num_classes, dtype=torch.bfloat16)
        found[f"external attention, {num_classes} classes"] = forward_and_both(
            lambda *x: external_attention(*x, scale=SCALE, impl="triton"), scores, scores.float()
        )
    tiny = torch.zeros(1, 1, 16, 16)
    sdpa = torch.nn.functional.scaled_dot_product_attention
    found["scaled_dot_product_attention, 16 keys"] = forward_and_both(sdpa, tiny, tiny, tiny)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the numbers here")
    arguments = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        sys.exit("error: TRITON_INTERPRET=1 is set, so Triton's launcher is not used; unset it")
    torch.set_num_threads(1)
    pretend()
    found = measure()
    for name, times in found.items():
        print(f"{name}: forward {times['forward_us']} us, both {times['forward_backward_us']} us")
    if arguments.json:
        header = this_machine(torch.device("cpu"))._asdict()
        write_text(arguments.json, json.dumps({**header, "calls": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()

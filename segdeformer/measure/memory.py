"""Peak memory of a call: the CUDA allocator's, or on a CPU that of a whole process, best one of its own.

`python -m segdeformer.measure.memory SPEC` is that process for a model's forward pass.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from segdeformer.errors import UserError
from segdeformer.kernels.tuning.clock import synchronize
from segdeformer.measure.alternatives import Alternative, Built, Setting, build, make_run, random_images
from segdeformer.runtime.command import own_command, own_environment
from segdeformer.runtime.device import held_memory_mib, peak_memory_mib, restart_peak_memory

WARM_UP_PX = 64


class Peak(NamedTuple):
    """Memory before a call and at most during it, in MiB."""

    held: float
    peak: float

    @property
    def extra(self) -> float:
        return self.peak - self.held


class Memory(NamedTuple):
    """model_mib: weights and buffers. extra_mib: the peak above what was there with model and images.

    peak_mib: on a GPU model, images and extra; on a CPU the whole process, Python and PyTorch included.
    """

    model_mib: float
    extra_mib: float
    peak_mib: float


def peak_mib(run: Callable[[], object], device: torch.device) -> Peak:
    """Of one call, whose libraries should have allocated what they keep in an earlier, small one."""
    synchronize(device)
    restart_peak_memory(device)  # building and folding may have held more than a small pass does
    held = held_memory_mib(device)
    run()
    synchronize(device)
    return Peak(held, peak_memory_mib(device))


def in_own_process(module: str, spec: Mapping[str, object], *, hint: str = "") -> Any:
    """What `python -m module SPEC`, spec as JSON, prints as its last line, JSON too.

    Raises `UserError` when that process does not end well.
    """
    command = [*own_command(module), json.dumps(spec)]
    answer = subprocess.run(command, capture_output=True, text=True, env=own_environment())
    if answer.returncode:
        reason = (answer.stderr.strip().splitlines() or ["no message"])[-1]
        if answer.returncode == -9:
            reason = "killed, perhaps for want of memory"
        raise UserError(f"no memory measured ({reason}){hint}")
    return json.loads(answer.stdout.splitlines()[-1])


def measure_memory(built: Built, *, batch: int, size: tuple[int, int], argmax: bool) -> Memory:
    """Of one eager pass (not compiled, no graph), on the model's device.

    Raises `UserError` when the process on the CPU does not end well.
    """
    if built.device.type == "cuda":
        return _of_pass(built.eager, batch, size, argmax)
    spec = {**built.alternative._asdict(), "setting": built.alternative.setting._asdict()}
    spec |= {"batch": batch, "size": size, "argmax": argmax}
    return Memory(*in_own_process(__name__, spec, hint="; take a smaller --size, or --no-memory"))


@torch.inference_mode()
def _of_pass(built: Built, batch: int, size: tuple[int, int], argmax: bool) -> Memory:
    images_B3HW, on_gpu = random_images(built, batch, size), built.device.type == "cuda"
    run = make_run(built, images_B3HW, argmax=argmax)
    # An earlier pass, in which libraries allocate what they keep; on a CPU its own memory would count, too.
    small = images_B3HW if on_gpu else random_images(built, 1, (WARM_UP_PX, WARM_UP_PX))
    make_run(built, small, argmax=argmax)()
    peak = peak_mib(run, built.device)
    model_mib = _mib(*built.model.parameters(), *built.model.buffers())
    return Memory(model_mib, peak.extra, model_mib + _mib(images_B3HW) + peak.extra if on_gpu else peak.peak)


def _mib(*tensors: Tensor) -> float:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors) / 2**20


def main() -> None:
    """Print the memory of what the first argument, JSON, describes."""
    spec = json.loads(sys.argv[1])
    alternative = Alternative(spec["label"], spec["source"], Setting(**spec["setting"]))
    try:
        built = build(alternative, torch.device("cpu")).eager
        memory = _of_pass(built, spec["batch"], tuple(spec["size"]), spec["argmax"])
    except UserError as error:
        sys.exit(str(error))
    print(json.dumps(memory))


if __name__ == "__main__":
    main()

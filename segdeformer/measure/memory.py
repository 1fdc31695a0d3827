"""Peak memory of a forward pass: the CUDA allocator's, or on a CPU that of a process of its own.

`python -m segdeformer.measure.memory SPEC` is that process.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import torch

from segdeformer.engine.command import own_command, own_environment
from segdeformer.engine.device import peak_resident_mib
from segdeformer.errors import UserError
from segdeformer.measure.contenders import Built, Contender, Setting, build, make_run, random_images
from segdeformer.models.segmenter import Segmenter

WARM_UP_PX = 64


class Memory(NamedTuple):
    """model_mib: weights and buffers. extra_mib: the peak above what was there with model and images.

    peak_mib: on a GPU model, images and extra; on a CPU the whole process, Python and PyTorch included.
    """

    model_mib: float
    extra_mib: float
    peak_mib: float


def measure_memory(built: Built, *, batch: int, size: tuple[int, int], argmax: bool) -> Memory:
    """Of one eager pass (not compiled, no graph), on the model's device.

    Raises `UserError` when the process on the CPU does not end well.
    """
    contender = built.contender
    device = next(built.model.parameters()).device
    if device.type == "cuda":
        return _on_gpu(built, batch, size, argmax)
    spec = {**contender._asdict(), "setting": contender.setting._asdict()}
    spec |= {"batch": batch, "size": size, "argmax": argmax}
    command = [*own_command(__name__), json.dumps(spec)]
    answer = subprocess.run(command, capture_output=True, text=True, env=own_environment())
    if answer.returncode:
        reason = (answer.stderr.strip().splitlines() or ["no message"])[-1]
        if answer.returncode == -9:
            reason = "killed, perhaps for want of memory"
        raise UserError(f"no memory measured ({reason}); take a smaller --size, or --no-memory")
    return Memory(*json.loads(answer.stdout.splitlines()[-1]))


def model_mib(model: Segmenter) -> float:
    """Weights and buffers."""
    tensors = chain(model.parameters(), model.buffers())
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors) / 2**20


@torch.inference_mode()
def _on_gpu(built: Built, batch: int, size: tuple[int, int], argmax: bool) -> Memory:
    device = next(built.model.parameters()).device
    images_B3HW = random_images(batch, size, built.contender.setting, device)
    run = make_run(_eager(built), images_B3HW, argmax=argmax)
    run()  # libraries allocate what they keep
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    run()
    torch.cuda.synchronize(device)
    extra_mib = (torch.cuda.max_memory_allocated(device) - before) / 2**20
    images_mib = images_B3HW.numel() * images_B3HW.element_size() / 2**20
    held_mib = model_mib(built.model)
    return Memory(held_mib, extra_mib, held_mib + images_mib + extra_mib)


def _eager(built: Built) -> Built:
    setting = built.contender.setting._replace(compile=False, cuda_graphs=False)
    return built._replace(contender=built.contender._replace(setting=setting))


@torch.inference_mode()
def _of_this_process(built: Built, batch: int, size: tuple[int, int], argmax: bool) -> Memory:
    setting, cpu = built.contender.setting, torch.device("cpu")
    small = random_images(1, (WARM_UP_PX, WARM_UP_PX), setting, cpu)
    make_run(built, small, argmax=argmax)()  # libraries allocate what they keep
    images_B3HW = random_images(batch, size, setting, cpu)
    run = make_run(built, images_B3HW, argmax=argmax)
    _forget_peak()
    held_mib = _resident_mib()
    run()
    peak_mib = peak_resident_mib()
    return Memory(model_mib(built.model), peak_mib - held_mib, peak_mib)


def _forget_peak() -> None:
    """Let Linux count the peak anew, as building and folding may have held more than a small pass does."""
    with contextlib.suppress(OSError):  # elsewhere, or where it may not be: the peak since the start
        Path("/proc/self/clear_refs").write_text("5", "ascii")


def _resident_mib() -> float:
    statm = Path("/proc/self/statm")
    if not statm.exists():
        return peak_resident_mib()
    return int(statm.read_text("ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def main() -> None:
    """Print the memory of what the first argument, JSON, describes."""
    spec = json.loads(sys.argv[1])
    contender = Contender(spec["label"], spec["source"], Setting(**spec["setting"]))
    try:
        built = _eager(build(contender, torch.device("cpu")))
        memory = _of_this_process(built, spec["batch"], tuple(spec["size"]), spec["argmax"])
    except UserError as error:
        sys.exit(str(error))
    print(json.dumps(memory))


if __name__ == "__main__":
    main()

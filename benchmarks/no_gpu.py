"""Triton's driver for a GPU that is not there: kernels compile and are started, but nothing runs.

All of the host's work can so be tried and timed on any machine: tensors lie on the CPU, and only the last
call into the GPU's own driver is missing.
"""

from __future__ import annotations

from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from segdeformer.kernels import launch
from segdeformer.kernels.tiles import ARCHITECTURES


class NoGpu:
    """What Triton asks of a driver, by an NVIDIA card's compute capability and memory for a program."""

    def __init__(self, capability: int, shared_bytes: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)
        self.shared_bytes = shared_bytes
        self.started: list[str] = []  # names of kernels
        self.utils = self

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": self.shared_bytes}

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[object, ...]:
        module, function, registers, spills, most_threads = object(), 0, 0, 0, 1024
        return module, function, registers, spills, most_threads

    def unload_module(self, module: object) -> None:
        pass

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        return lambda *arguments: self.started.append(metadata.name)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def pretend(*, architecture: str = "sm_90", shared_bytes: int | None = None) -> NoGpu:
    """From now on kernels are compiled for this card and started without effect; for a process of its own."""
    shared_bytes = shared_bytes or ARCHITECTURES[architecture].shared_bytes
    card = NoGpu(int(architecture.removeprefix("sm_")), shared_bytes)
    driver.set_active(card)
    launch.check_interpreter = lambda tensor: None  # CPU tensors without the interpreter
    return card

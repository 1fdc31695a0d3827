"""What a measurement belongs to: the machine, the versions, the sources, the day."""

from __future__ import annotations

import datetime
import importlib.util
import os
import platform
from importlib.metadata import version
from typing import NamedTuple

import torch

from segdeformer.commit import commit
from segdeformer.kernels.cpu import cpu_name

BUSY_LOAD = 0.3  # of a core taken by others; more distorts times


class Machine(NamedTuple):
    hardware: str
    threads: int  # of PyTorch on the CPU
    load: float | None  # processes that wanted a core in the last minute, before the measurement
    versions: dict[str, str]
    commit: str
    date: str  # ISO

    @property
    def warning(self) -> str | None:
        """What makes times of a CPU doubtful."""
        if self.load is None or self.load <= BUSY_LOAD:
            return None
        return f"the machine was busy before (load {self.load:.1f}): times are too long, ratios less so"


def this_machine(device: torch.device, *packages: str) -> Machine:
    """The machine as far as this device is concerned, and the versions of further packages."""
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    versions |= {package: version(package) for package in packages}
    hardware = cpu_name()
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        hardware = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB; {hardware}"
        versions["cuda"] = str(torch.version.cuda or torch.version.hip)
        if importlib.util.find_spec("triton") is not None:
            import triton

            versions["triton"] = triton.__version__
    load = round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None
    today = datetime.date.today().isoformat()
    return Machine(hardware, torch.get_num_threads(), load, versions, commit(), today)

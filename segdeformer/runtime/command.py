"""How a process starts children that run this package too."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def own_command(module: str = "segdeformer") -> list[str]:
    """What runs a module of this package, by default its command line; files that lie around hide none."""
    return [sys.executable, "-P", "-m", module]


def own_environment() -> dict[str, str]:
    """Our environment, in which a child finds this package, in an uninstalled clone too."""
    home = str(Path(__file__).parents[2])
    path = os.environ.get("PYTHONPATH")
    return {**os.environ, "PYTHONPATH": os.pathsep.join([home, path] if path else [home])}

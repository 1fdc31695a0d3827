"""Which sources were measured."""

from __future__ import annotations

import subprocess
from pathlib import Path

from segdeformer.version import __version__

CHECKOUT = Path(__file__).resolve().parent.parent  # where this is one


def commit() -> str:
    """The checkout's commit, `-dirty` with changes; outside of a checkout the version."""
    if not (CHECKOUT / ".git").exists():
        return f"version {__version__}"
    try:
        answer = subprocess.run(
            ["git", "-C", str(CHECKOUT), "describe", "--always", "--dirty"],
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return answer.stdout.strip()

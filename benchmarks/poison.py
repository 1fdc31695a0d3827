"""Memory that shows what a kernel leaves out."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fresh tensors hold NaN, so that an element which a kernel leaves out shows."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of operations that have no deterministic form
        torch.use_deterministic_algorithms(True, warn_only=True)  # this mode fills new memory
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(False)

"""Where this project's kernels were measured to beat PyTorch: by operation, widths and size of the problem.

Two sources for each GPU: its tile file (see `tiles`), which `segdeformer bench --tune` writes, and
`GPU.auto.json` in the same cache folder, what commands compared for their own models (see `auto_file`):

    {"gpu": ..., "torch": ..., "triton": ..., "sources": a digest of the kernels that were compared,
     "choices": [the fields of `Choice`, and `reason` where ours did not count],
     "settled": [digests of models and sizes with nothing left to compare]}

Choices without a `size`, as older files have them, say nothing about any size and are passed over.

B batch, N queries, M keys, K classes, HW output.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from segdeformer.kernels.tiles import (
    LARGEST_WIDTH,
    forget_tables,
    gpu_slug,
    padded_width,
    read_table,
    size_class,
    tuned_for,
    user_tuned,
)

Operation = Literal["attention", "external_attention", "upsample_cross_entropy", "upsample_argmax"]


class Kind(NamedTuple):
    """What is asked about, but for its size."""

    operation: str
    width: int  # of queries and keys, as the model has it
    value_width: int
    element_bytes: int
    training: bool  # forward + backward, else forward

    @property
    def padded(self) -> Kind:
        """As the kernels have it."""
        return self._replace(width=padded_width(self.width), value_width=padded_width(self.value_width))


class Choice(NamedTuple):
    """A recorded comparison of our kernels with PyTorch: its attention, or upsampling in strips."""

    operation: str
    width: int  # of queries and keys, as the model has it
    value_width: int
    element_bytes: int
    training: bool  # forward + backward, else forward
    size: int  # of the problem: B N M scores, or B K H W upsampled values
    triton_ms: float  # infinite where ours did not run or was wrong
    alternative_ms: float  # of PyTorch's attention, or of strips; infinite where ours ended the process

    @property
    def triton_wins(self) -> bool:
        return self.triton_ms < self.alternative_ms

    def serves(self, kind: Kind) -> bool:
        """Whether it was run with these widths, after padding."""
        fits = max(kind.width, kind.value_width) <= LARGEST_WIDTH
        return fits and Kind(*self[:5]).padded == kind.padded

    def row(self) -> dict[str, Any]:
        """As a file has it."""
        times = {"triton_ms": self.triton_ms, "alternative_ms": self.alternative_ms}
        return self._asdict() | {name: None if math.isinf(ms) else ms for name, ms in times.items()}


def read_choices(rows: Sequence[dict[str, Any]]) -> list[Choice]:
    """The choices of a file's rows that say at which size they were measured."""
    choices = []
    for row in rows:
        if "size" in row:
            row = {"alternative_ms": row.get("sdpa_ms"), **row}  # its name in older files
            times = (math.inf if row[name] is None else row[name] for name in ("triton_ms", "alternative_ms"))
            choices.append(Choice(*[row[name] for name in Choice._fields[:6]], *times))
    return choices


# By GPU: what the processes of this process's run have agreed on, in place of what its machine's files say.
_AGREED: dict[str, list[Choice]] = {}


def agree(device: torch.device, choices: Sequence[Choice]) -> None:
    """Let `auto` in this process go by these choices alone, on GPUs of this device's kind."""
    _AGREED[torch.cuda.get_device_name(device)] = list(choices)
    switches.cache_clear()


def forget_choices() -> None:
    """Read the files again when they are next asked for, whatever was agreed on."""
    _AGREED.clear()
    switches.cache_clear()
    forget_tables()


def measured_choices(device: torch.device) -> list[Choice]:
    """The comparisons that hold on this GPU, those of `bench --tune` first."""
    name = torch.cuda.get_device_name(device)
    if name in _AGREED:
        return _AGREED[name]
    return tuned_choices(device) + read_choices(read_table(auto_path(name), {}).get("choices", []))


def tuned_choices(device: torch.device) -> list[Choice]:
    """The comparisons in this GPU's tile file."""
    return read_choices(tuned_for(device).get("choices", []))


def auto_path(gpu: str) -> Path:
    """Where commands keep what they compared on GPUs of this name."""
    return user_tuned() / f"{gpu_slug(gpu)}.auto.json"


def answers_by_class(choices: Sequence[Choice], kind: Kind) -> dict[int, bool]:
    """Whether ours is faster, for every size class for which something can be said.

    A class with no comparison of its own takes the next smaller one's, else the next larger one's.
    """
    own: dict[int, bool] = {}
    for choice in choices:
        if choice.serves(kind):
            own.setdefault(size_class(choice.size), choice.triton_wins)
    larger = {c - 1: wins for c, wins in own.items()}
    smaller = {c + 1: wins for c, wins in own.items()}
    return larger | smaller | own


@functools.cache
def switches(device: str, kind: Kind) -> tuple[int, ...]:
    """Sizes at which the faster one changes: PyTorch below the first, ours from there on, and so forth.

    Empty where nothing was measured. A compiled graph with these numbers in it asks for no more about its
    sizes than on which side of them it is.
    """
    answers = answers_by_class(measured_choices(torch.device(device)), kind)
    found, ours = [], False
    for c in range(max(answers, default=-1) + 2):
        if answers.get(c, False) != ours:
            ours = not ours
            found.append(least_size(c))
    return tuple(found)


def least_size(c: int) -> int:
    """The smallest of a size class."""
    return 2 ** (2 * c - 1) if c > 0 else 0

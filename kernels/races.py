"""Races between the Triton kernels and what else would run, and between two forms of the backward.

What else: PyTorch's scaled_dot_product_attention; for operations on upsampled logits the strips of rows.

B batch, N queries, M keys, D key width, E value width, K classes.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable
from functools import partial
from typing import NamedTuple, Self

import torch
from torch import Tensor

from segdeformer.errors import KernelError
from segdeformer.kernels.attention_launches import pad_operands
from segdeformer.kernels.attention_triton import (
    attention_with_lse,
    backward_fused,
    backward_in_chunks,
    make_upstream,
)
from segdeformer.kernels.choices import Choice, Operation
from segdeformer.kernels.clock import median_ms, synchronize
from segdeformer.kernels.crew import stage
from segdeformer.kernels.impl import Call, Impl
from segdeformer.kernels.race_steps import AttentionMatch, Steps, make_steps, race_inputs
from segdeformer.kernels.tiles import WIDEST_FUSED_BACKWARD, padded_width
from segdeformer.kernels.upsample_races import BATCH, SCALE, LossMatch, LossSteps, WinnersMatch

UPSAMPLING = ("upsample_cross_entropy", "upsample_argmax")
PRODUCTS_OF_A_VALUE = 2000  # that a GPU makes in the time in which it upsamples one logit in strips
LONG_MS = 60.0  # once is enough, where it must be quick


# Of a comparison's check in float64 where it must be quick: most queries, keys, rows of a map, images. All
# remainders by 256 stay, and with them the kernels that are compiled for the whole problem.
MOST_QUERIES, MOST_KEYS, MOST_ROWS, MOST_IMAGES = 2048, 8192, 32, 2
MOST_EXTERNAL = 4096  # where the queries are the keys


class Race(NamedTuple):
    """One operation of a decoder; widths as the model has them."""

    operation: Operation
    width: int
    value_width: int
    element_bytes: int
    training: bool  # forward + backward
    num_pixels: int  # queries, or places of the map that is upsampled
    num_keys: int | None = None  # None: the pixels
    batch: int = 1
    map_hw: tuple[int, int] | None = None  # that is upsampled; None: a square
    full_hw: tuple[int, int] | None = None  # that it is upsampled to; None: four times as large

    @classmethod
    def of(cls, call: Call) -> Self:
        """The race that decides about a call."""
        kind = cls(*call[:5], num_pixels=math.prod(call.source), batch=call.batch)
        if not kind.is_upsampling:
            return kind._replace(num_keys=call.target[0])
        (height, width), (full_height, full_width) = call.source, call.target
        return kind._replace(map_hw=(height, width), full_hw=(full_height, full_width))

    @property
    def is_upsampling(self) -> bool:
        return self.operation in UPSAMPLING

    @property
    def rival(self) -> str:
        """What runs where the Triton kernels do not."""
        return "strips" if self.is_upsampling else "sdpa"

    @property
    def keys(self) -> int:
        return self.num_pixels if self.num_keys is None else self.num_keys

    @property
    def sides(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Height and width of the map and of the output."""
        side = math.isqrt(self.num_pixels)
        height, width = self.map_hw or (side, side)
        return (height, width), self.full_hw or (SCALE * height, SCALE * width)

    @property
    def size(self) -> int:
        """B N M scores, or B K H W upsampled values."""
        if self.is_upsampling:
            return self.batch * self.width * math.prod(self.sides[1])
        return self.batch * self.num_pixels * self.keys

    @property
    def label(self) -> str:
        """The operation and its size in words."""
        dtype = "float32" if self.element_bytes == 4 else "half precision"
        if self.is_upsampling:
            what = "loss" if self.operation == "upsample_cross_entropy" else "argmax"
            height, width = self.sides[1]
            return f"upsampled {what} of {self.batch} x {self.width} x {height} x {width}, {dtype}"
        name = self.operation.replace("_", " ")
        wide = f"{self.width}" if self.width == self.value_width else f"{self.width} and {self.value_width}"
        training = ", training" if self.training else ""
        sizes = f"{self.batch} x {self.num_pixels} x {self.keys}"
        return f"{name} of {sizes}, {wide} wide, {dtype}{training}"

    @property
    def work(self) -> float:
        """Roughly in proportion to its time, to do the longest first."""
        if self.is_upsampling:
            return self.size * PRODUCTS_OF_A_VALUE
        return self.size * (self.width + self.value_width) * (3.5 if self.training else 1.0)

    @property
    def key(self) -> tuple[str, int, int, int, bool, int]:
        """What a `Choice` is found by."""
        return *self[:5], self.size

    @property
    def widths_key(self) -> str:
        return f"{padded_width(self.width)}x{padded_width(self.value_width)}"

    @property
    def has_two_backwards(self) -> bool:
        fits = max(padded_width(self.width), padded_width(self.value_width)) <= WIDEST_FUSED_BACKWARD
        return self.operation == "attention" and self.training and fits

    def within(self, most_pixels: int) -> Race:
        """The same with one image of at most so many pixels, and as many keys."""
        if self.is_upsampling:
            side = math.isqrt(min(self.num_pixels, most_pixels // SCALE**2))
            return self._replace(num_pixels=side**2, batch=1, map_hw=None, full_hw=None)
        keys = None if self.num_keys is None else min(self.num_keys, most_pixels)
        return self._replace(num_pixels=min(self.num_pixels, most_pixels), num_keys=keys, batch=1)

    def checked_quickly(self) -> Race:
        """A part of it, of which float64 takes a fraction of a second on any card."""
        batch = min(self.batch, MOST_IMAGES)
        if self.is_upsampling:
            (height, width), (full_height, full_width) = self.sides
            rows, columns = min(height, MOST_ROWS), min(width, MOST_ROWS)
            full = (max(1, full_height * rows // height), max(1, full_width * columns // width))
            return self._replace(batch=batch, map_hw=(rows, columns), full_hw=full)
        if self.operation == "external_attention":
            return self._replace(batch=batch, num_pixels=_at_most(self.num_pixels, MOST_EXTERNAL))
        num_pixels, keys = _at_most(self.num_pixels, MOST_QUERIES), _at_most(self.keys, MOST_KEYS)
        return self._replace(batch=batch, num_pixels=num_pixels, num_keys=keys)


def _at_most(number: int, most: int) -> int:
    """The number, or the largest up to `most` with the same remainder by 256."""
    return number if number <= most else most - (most - number) % 256


class Fought(NamedTuple):
    """A race is over. refusals: of each contender that did not run or was wrong, why."""

    race: Race
    choice: Choice | None  # None where PyTorch's time is missing, or memory was short
    refusals: dict[str, str]


def decoder_races(device: torch.device) -> list[Race]:
    """The operations of the paper's decoders, those that matter most first.

    In half precision: in float32 PyTorch's products on tensor cores are out of reach. Batches are such that
    one size class below and one above are those of common batches too.
    """
    races = []
    for num_classes, num_pixels, batch in ((150, 16384, 4), (19, 65536, 1), (171, 16384, 4)):
        races += _both("external_attention", num_classes, num_classes, num_pixels, None, batch=batch)
    races += _both("attention", 256, 256, 16384, None, batch=4)
    races.append(Race("attention", 256, 150, 2, False, 16384))
    races += _both("attention", 256, 256, 16384, 1024, batch=4)  # reduction 4
    races.append(Race("attention", 256, 150, 2, False, 16384, 1024))
    races += _both("attention", 256, 256, 1024, None, batch=8)  # maps at 1/16
    races += _both("external_attention", 150, 150, 1024, None, batch=8)
    races += _both("attention", 512, 512, 16384, None, batch=4)
    races.append(Race("attention", 512, 150, 2, False, 16384))
    races.append(Race("attention", 256, 150, 2, False, 1024))
    races.append(Race("attention", 256, 256, 2, False, 16384, 256))  # reduction 8
    return races + _upsampling_races()


def _both(
    operation: Operation, width: int, value_width: int, num_pixels: int, num_keys: int | None, *, batch: int
) -> list[Race]:
    """One image forward, and a batch in training."""
    forward = Race(operation, width, value_width, 2, False, num_pixels, num_keys)
    return [forward, forward._replace(training=True, batch=batch)]


def _upsampling_races() -> list[Race]:
    """As choose_upsampling asks: the loss in training, winners not, K as both widths."""
    races = []
    for k, element_bytes, num_pixels in ((150, 2, 16384), (150, 4, 16384), (19, 2, 65536), (171, 2, 16384)):
        races.append(Race("upsample_cross_entropy", k, k, element_bytes, True, num_pixels, batch=BATCH))
        races.append(Race("upsample_argmax", k, k, element_bytes, False, num_pixels, batch=BATCH))
    return races


def run_race(
    race: Race, device: torch.device, *, most_pixels: int | None = None, quick: bool = False
) -> Fought:
    """Check and time both sides: ours, and what `auto` would run without it, as it would run it.

    quick: check a part only, and time a long step once. Raises `OutOfMemoryError`.
    """
    timed = race if most_pixels is None else race.within(most_pixels)
    sides: tuple[tuple[str, Impl], ...] = (
        ("triton", "triton"),
        (race.rival, "sdpa"),  # which is the strips for operations on upsampled logits
    )
    refusals = {}
    stage("both")
    part = timed.checked_quickly() if quick else timed if race.is_upsampling else timed._replace(batch=1)
    match = make_steps(part, device, checked=True)
    for name, impl in sides:
        stage(name)
        if (reason := _reason_against(match, impl, device)) is not None:
            refusals[name] = reason
    del match  # float64 takes much room
    if race.rival in refusals:
        return Fought(race, None, refusals)
    steps = make_steps(timed, device, checked=False)
    times = {}
    for name, impl in sides:
        stage(name)
        outcome = math.inf if name in refusals else _step_ms(steps.step(impl), device, quick=quick)
        if isinstance(outcome, str):
            refusals[name], outcome = outcome, math.inf
        times[name] = round(outcome, 5)
    choice = Choice(*race.key, times["triton"], times[race.rival])
    return Fought(race, choice if math.isfinite(choice.sdpa_ms) else None, refusals)


def _reason_against(match: Steps | LossSteps | WinnersMatch, impl: Impl, device: torch.device) -> str | None:
    """Why a side does not count: it does not run, or its results are wrong."""
    assert isinstance(match, AttentionMatch | LossMatch | WinnersMatch)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            results = match.step(impl)()
            synchronize(device)
    except torch.OutOfMemoryError:
        raise
    except (KernelError, RuntimeError) as error:
        reasons = [str(warning.message) for warning in caught] or [str(error)]
        return " ".join(" ".join(reasons).split())[:300]
    return match.wrong(results)


def _step_ms(run: Callable[[], list[Tensor]], device: torch.device, *, quick: bool) -> float | str:
    """Milliseconds of a step, or why it does not run at this size."""
    try:
        run()
        synchronize(device)
        if not quick:
            return median_ms(run, device)
        began = time.perf_counter()
        run()
        synchronize(device)
        once_ms = 1000 * (time.perf_counter() - began)
        return once_ms if once_ms >= LONG_MS else median_ms(run, device)
    except torch.OutOfMemoryError:
        raise
    except (KernelError, RuntimeError) as error:
        return " ".join(str(error).split())[:300]


def faster_backward(race: Race, device: torch.device, *, most_pixels: int | None = None) -> str:
    """`fused` or `chunks`, whichever takes less time for the gradients of an attention."""
    timed = race if most_pixels is None else race.within(most_pixels)
    inputs, grad_out, scale = race_inputs(timed, device)
    queries, keys, values = (t.detach() for t in inputs)
    assert grad_out is not None
    out, lse = attention_with_lse(queries, keys, values, scale)
    operands = pad_operands(queries, keys, values, scale)
    upstream = make_upstream(out, lse, grad_out, operands.values.shape[2])
    grads = [torch.empty_like(t) for t in (queries, keys, values)]
    times = {}
    for name, backward in (("fused", backward_fused), ("chunks", backward_in_chunks)):
        try:
            times[name] = median_ms(partial(backward, operands, upstream, *grads), device)
        except KernelError:
            continue
    return min(times, key=times.__getitem__, default="chunks")

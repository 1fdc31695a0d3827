"""How long runs take: several in alternation, so that what drifts hits all alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Generic, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from segdeformer.kernels.tuning.clock import synchronize
from segdeformer.models.segmenter import Segmenter

LEAST_ROUNDS = 5
MOST_ROUNDS = 500
SPLIT_PASSES = 5

Clock = Callable[[], float]  # seconds
T = TypeVar("T")


class Latency(NamedTuple):
    """Of one run after another, each waited for."""

    p50_ms: float
    p95_ms: float
    images_per_s: float  # at p50
    num_rounds: int


class Length(NamedTuple):
    """How long to measure: so many rounds, or as many as fit the seconds (5 to 500)."""

    rounds: int | None
    seconds: float

    def is_over(self, num_rounds: int, elapsed_s: float) -> bool:
        if self.rounds is not None:
            return num_rounds >= self.rounds
        return num_rounds >= MOST_ROUNDS or (num_rounds >= LEAST_ROUNDS and elapsed_s >= self.seconds)


def alternating_ms(
    runs: Mapping[str, Callable[[], object]],
    *,
    length: Length,
    wait: Callable[[], None] = lambda: None,
    clock: Clock = time.perf_counter,
) -> Iterator[dict[str, float]]:
    """Milliseconds of each run, round by round: first, second, ..., first, second, ...

    wait: returns when the device has done all that it was given; a CPU has.
    """

    def elapsed_ms(run: Callable[[], object]) -> float:
        wait()
        began = clock()
        run()
        wait()
        return 1000 * (clock() - began)

    began = clock()
    num_rounds = 0
    while not length.is_over(num_rounds, clock() - began):
        yield {name: elapsed_ms(run) for name, run in runs.items()}
        num_rounds += 1


def latency(times_ms: Sequence[float], *, batch: int) -> Latency:
    """What the rounds of one run say."""
    p50_ms = percentile(times_ms, 50)
    return Latency(p50_ms, percentile(times_ms, 95), 1000 * batch / p50_ms, len(times_ms))


def percentile(values: Sequence[float], percent: float) -> float:
    """The value that so many percent lie below, interpolated between neighbours; 50 is the median."""
    return float(np.percentile(values, percent))


# The parts of a model that are measured one by one: encoder, fusion, context, head.


class Split(NamedTuple, Generic[T]):
    """A forward pass by its parts; what the decoder does outside of fusion and head is context.

    head: None for a folded model, whose head is part of what computes the context.
    """

    encoder: T
    fusion: T
    context: T
    head: T | None


@contextmanager
def metered(model: Segmenter, read: Callable[[], T]) -> Iterator[dict[str, tuple[T, T]]]:
    """Read a meter (a clock, a counter) before and after the encoder, the decoder, its fusion and its head.

    What it gives holds the last pass.
    """
    readings: dict[str, tuple[T, T]] = {}
    modules: dict[str, nn.Module] = {"encoder": model.encoder, "decoder": model.decoder}
    modules |= {name: part for name, part in model.decoder.named_children() if name in ("fusion", "head")}
    names = {id(module): name for name, module in modules.items()}

    def before(module: nn.Module, inputs: object) -> None:
        now = read()
        readings[names[id(module)]] = now, now

    def after(module: nn.Module, inputs: object, output: object) -> None:
        name = names[id(module)]
        readings[name] = readings[name][0], read()

    with ExitStack() as stack:
        for module in modules.values():
            stack.callback(module.register_forward_pre_hook(before).remove)
            stack.callback(module.register_forward_hook(after).remove)
        yield readings


def split_of(spent: Mapping[str, int]) -> Split[int]:
    """The split of whole numbers (FLOPs, nanoseconds) that `metered` modules took."""
    head = spent.get("head")
    context = spent["decoder"] - spent["fusion"] - (head or 0)
    return Split(spent["encoder"], spent["fusion"], context, head)


def split_ms(model: Segmenter, images_B3HW: Tensor, *, passes: int) -> Split[float]:
    """Milliseconds of each part, the median of some passes of the plain model (not compiled, no graph)."""
    device = images_B3HW.device

    def recorded_event() -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(device))
        return event

    def one_split() -> Split[int]:
        """In nanoseconds."""
        if device.type != "cuda":
            with metered(model, time.perf_counter_ns) as readings:
                model(images_B3HW)
            return split_of({name: after - before for name, (before, after) in readings.items()})
        with metered(model, recorded_event) as events:
            model(images_B3HW)
        synchronize(device)
        return split_of({name: round(1e6 * a.elapsed_time(b)) for name, (a, b) in events.items()})

    splits = [one_split() for _ in range(passes)]
    return Split(*(None if None in ns else statistics.median(ns) / 1e6 for ns in zip(*splits, strict=True)))

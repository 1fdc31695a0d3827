"""How the Triton kernels compare with what else would run, each checked first, then timed.

What else: PyTorch's scaled_dot_product_attention; for operations on upsampled logits the strips of rows; for
the gradients of an attention another form of our own backward. `compare` does so for a few calls, in
seconds, in a process of its own: a kernel that never ran on a card may crash or hang there.
"""

from __future__ import annotations

import contextlib
import math
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import NamedTuple, TypeVar

import torch
import triton
from torch import Tensor

from segdeformer.cores import num_cores
from segdeformer.errors import KernelError
from segdeformer.kernels.attention.launch import pad_operands
from segdeformer.kernels.attention.operator import (
    attention_with_lse,
    backward_fused,
    backward_in_chunks,
    with_upstream,
)
from segdeformer.kernels.choices import Choice
from segdeformer.kernels.impl import Impl
from segdeformer.kernels.launch import Launch, interpreting
from segdeformer.kernels.plans import without_plans
from segdeformer.kernels.tuning.cases import AttentionInputs, Comparison
from segdeformer.kernels.tuning.clock import median_ms, synchronize
from segdeformer.kernels.tuning.crew import COMPILE_PATIENCE_S, Crew, stage
from segdeformer.kernels.tuning.judge import judge

T = TypeVar("T")
LONG_MS = 60.0  # once is enough, where it must be quick
# What Triton and PyTorch raise for a kernel that is no good. KernelError is a ValueError.
KERNEL_ERRORS = (ValueError, RuntimeError, AssertionError)


class Compared(NamedTuple):
    """A comparison is over. refusals: of each side that did not run or was wrong, why."""

    comparison: Comparison
    choice: Choice | None  # None where PyTorch's time is missing, or memory was short
    refusals: dict[str, str]


class Prepare(NamedTuple):
    """Compile what these comparisons will run."""

    comparisons: tuple[Comparison, ...]


def compare(
    comparisons: Sequence[Comparison], device: torch.device, *, seconds: float, crew: Crew | None = None
) -> Iterator[Compared]:
    """The comparisons that are over within about so many seconds, the longest first.

    `refusals` of one that ended its process, or hung, name `triton` if our kernels were running.
    """
    deadline = time.monotonic() + seconds
    longest_first = sorted(comparisons, key=lambda comparison: comparison.work, reverse=True)
    tasks: deque[Prepare | Comparison] = deque([Prepare(tuple(comparisons)), *longest_first])
    with contextlib.closing(crew or Crew()) as crew:
        for task, news in crew.run(partial(run_task, device), tasks, deadline=deadline):
            if isinstance(news, Compared):
                yield news
            elif news.lost is not None and isinstance(task, Comparison):
                yield Compared(task, None, {news.stage: news.lost})


def run_task(device: torch.device, task: Prepare | Comparison) -> Iterator[Compared]:
    """What the process does."""
    if isinstance(task, Comparison):
        yield run_comparison(task, device, quick=True)
    elif device.type == "cuda" and not interpreting():
        stage("compiling", COMPILE_PATIENCE_S)
        with (
            torch.cuda.device(device),
            ThreadPoolExecutor(num_cores()) as pool,
            triton.AsyncCompileMode(pool, ignore_errors=True),
        ):
            for launch in launches_of(task.comparisons, device):
                with contextlib.suppress(*KERNEL_ERRORS):  # they are raised again, and told, when it runs
                    launch.compile()


def launches_of(comparisons: Iterable[Comparison], device: torch.device) -> list[Launch]:
    """All that our side starts, with the shapes of the checks, the backward's threads too; nothing runs."""
    launches: list[Launch] = []
    run = Launch.run

    def note(self: Launch) -> None:
        launches.append(self)

    Launch.run = note  # type: ignore[method-assign]
    try:
        with without_plans():
            for comparison in comparisons:
                with contextlib.suppress(*KERNEL_ERRORS):
                    comparison.checked_quickly().inputs(device).step("triton")()
    finally:
        Launch.run = run  # type: ignore[method-assign]
    return launches


def run_comparison(
    comparison: Comparison, device: torch.device, *, most_pixels: int | None = None, quick: bool = False
) -> Compared:
    """Check and time both sides: ours, and what `auto` would run without it, as it would run it.

    quick: check a part only, and time a long step once.
    """
    try:
        return _run_comparison(comparison, device, comparison.within(most_pixels), quick=quick)
    except torch.OutOfMemoryError as error:
        return Compared(comparison, None, {"both": f"out of memory: {str(error).splitlines()[0]}"})


def _run_comparison(
    comparison: Comparison, device: torch.device, timed: Comparison, *, quick: bool
) -> Compared:
    alternative = comparison.alternative
    sides: tuple[tuple[str, Impl], ...] = (
        ("triton", "triton"),
        (alternative, "sdpa"),  # which is the strips for operations on upsampled logits
    )
    refusals = {}
    stage("both")
    part = timed.checked_quickly() if quick else timed if timed.is_upsampling else timed._replace(batch=1)
    inputs = part.inputs(device)
    expected = inputs.expected()
    for name, impl in sides:
        stage(name)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            outcome = _outcome(inputs.step(impl), device)
        if isinstance(outcome, str):
            refusals[name] = " ".join(str(w.message) for w in caught)[:300] or outcome
        elif (reason := judge(outcome, expected).wrong) is not None:
            refusals[name] = reason
    del inputs, expected  # float64 takes much room
    if alternative in refusals:
        return Compared(comparison, None, refusals)
    inputs = timed.inputs(device)
    times = {}
    for name, impl in sides:
        stage(name)
        ms: float | str = math.inf if name in refusals else _step_ms(inputs.step(impl), device, quick=quick)
        if isinstance(ms, str):
            refusals[name], ms = ms, math.inf
        times[name] = round(ms, 5)
    choice = Choice(*comparison.key, times["triton"], times[alternative])
    return Compared(comparison, choice if math.isfinite(choice.alternative_ms) else None, refusals)


def _outcome(run: Callable[[], T], device: torch.device) -> T | str:
    """What comes of a step, or why it does not run."""
    try:
        results = run()
        synchronize(device)
        return results
    except torch.OutOfMemoryError:
        raise
    except (KernelError, RuntimeError) as error:
        return " ".join(str(error).split())[:300]


def _step_ms(run: Callable[[], list[Tensor]], device: torch.device, *, quick: bool) -> float | str:
    """Milliseconds of a step, or why it does not run at this size."""

    def measure() -> float:
        run()
        synchronize(device)
        if quick:
            began = time.perf_counter()
            run()
            synchronize(device)
            once_ms = 1000 * (time.perf_counter() - began)
            if once_ms >= LONG_MS:
                return once_ms
        return median_ms(run, device)

    return _outcome(measure, device)


def faster_backward(comparison: Comparison, device: torch.device, *, most_pixels: int | None = None) -> str:
    """`fused` or `chunks`, whichever takes less time for the gradients of an attention."""
    inputs = comparison.within(most_pixels).inputs(device)
    assert isinstance(inputs, AttentionInputs)
    assert inputs.grad_out is not None
    queries, keys, values = tensors = [t.detach() for t in inputs.tensors]
    out, lse = attention_with_lse(queries, keys, values, None, inputs.scale)
    x = with_upstream(pad_operands(queries, keys, values, inputs.scale), out, lse, inputs.grad_out)
    grads = [torch.empty_like(t) for t in tensors]
    times = {}
    for name, backward in (("fused", backward_fused), ("chunks", backward_in_chunks)):
        with contextlib.suppress(KernelError):
            times[name] = median_ms(partial(backward, x, *grads), device)
    return min(times, key=times.__getitem__, default="chunks")

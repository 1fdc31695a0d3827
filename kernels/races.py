"""Races between the Triton kernels and PyTorch's scaled_dot_product_attention, and between two backwards.

B batch, N pixels, D key width, E value width, K classes.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from segdeformer.errors import KernelError
from segdeformer.kernels.attention import attention, attention_reference
from segdeformer.kernels.attention_launches import (
    Upstream,
    backward_keys_launches,
    backward_queries_launch,
    deltas_launch,
    pad_operands,
)
from segdeformer.kernels.attention_triton import attention_with_lse, backward_in_chunks
from segdeformer.kernels.clock import median_ms, synchronize
from segdeformer.kernels.external_attention import external_attention, external_attention_reference
from segdeformer.kernels.impl import Operation
from segdeformer.kernels.launch import padded_rows
from segdeformer.kernels.oracle import answer, largest_allowed, worst_row_error
from segdeformer.kernels.tiles import WIDEST_FUSED_BACKWARD, Choice, padded_width
from segdeformer.kernels.tune_problems import dtypes_of


class Race(NamedTuple):
    """One operation of the decoder; widths as the model has them."""

    operation: Operation
    width: int
    value_width: int
    element_bytes: int
    training: bool  # forward + backward
    num_pixels: int

    @property
    def key(self) -> tuple[str, int, int, int, bool]:
        """What a `Choice` is found by."""
        return self[:5]

    @property
    def widths_key(self) -> str:
        return f"{padded_width(self.width)}x{padded_width(self.value_width)}"

    @property
    def has_two_backwards(self) -> bool:
        fits = max(padded_width(self.width), padded_width(self.value_width)) <= WIDEST_FUSED_BACKWARD
        return self.operation == "attention" and self.training and fits


class Fought(NamedTuple):
    """A race is over. refusals: of each contender that did not run or was wrong, why."""

    race: Race
    choice: Choice | None  # None without a time of both sides
    refusals: dict[str, str]


def decoder_races(device: torch.device) -> list[Race]:
    """The operations of the paper's decoders, those that matter most first."""
    halves = []
    for num_classes, num_pixels in ((150, 16384), (19, 65536), (171, 16384)):
        for training in (False, True):
            halves.append(Race("external_attention", num_classes, num_classes, 2, training, num_pixels))
    halves += [
        Race("attention", 256, 256, 2, False, 16384),
        Race("attention", 256, 256, 2, True, 16384),
        Race("attention", 256, 150, 2, False, 16384),
        Race("attention", 512, 512, 2, False, 16384),
        Race("attention", 512, 512, 2, True, 16384),
        Race("attention", 512, 150, 2, False, 16384),
    ]
    wide = {("external_attention", 150), ("attention", 256)}
    singles = [race._replace(element_bytes=4) for race in halves if (race.operation, race.width) in wide]
    return halves + singles


def run_race(race: Race, device: torch.device, *, most_pixels: int | None = None) -> Fought:
    """Check and time both sides, PyTorch's with the backend that it takes by itself, as it would later."""
    inputs, grad_out, scale = race_inputs(race, device, most_pixels)
    reference = (
        external_attention_reference if race.operation == "external_attention" else attention_reference
    )
    exact, eager = (
        answer(reference, inputs, scale=scale, grad_out=grad_out, exact=precise) for precise in (True, False)
    )
    allowed = [
        largest_allowed(worst_row_error(rounded, precise), inputs[0].dtype)
        for rounded, precise in zip((eager.out, *eager.grads), (exact.out, *exact.grads), strict=True)
    ]

    def step(impl: str) -> Callable[[], list[Tensor]]:
        operation = external_attention if race.operation == "external_attention" else attention

        def run() -> list[Tensor]:
            with torch.set_grad_enabled(race.training):
                out: Tensor = operation(*inputs, scale=scale, impl=impl)  # type: ignore[arg-type]
                return [out, *(torch.autograd.grad(out, inputs, grad_out) if race.training else ())]

        return run

    def contest(run: Callable[[], list[Tensor]]) -> float | str:
        """Milliseconds, or why it does not count."""
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                results = run()
                synchronize(device)
        except (KernelError, RuntimeError) as error:
            reasons = [str(warning.message) for warning in caught] or [str(error)]
            return " ".join(" ".join(reasons).split())[:300]
        for result, precise, limit in zip(results, (exact.out, *exact.grads), allowed, strict=True):
            worst = worst_row_error(result, precise)
            if not worst <= limit:  # NaN is never allowed
                return f"wrong: worst row off by {worst:.2g}, allowed {limit:.2g}"
        return median_ms(run, device)

    outcomes = {impl: contest(step(impl)) for impl in ("triton", "sdpa")}
    refusals = {name: reason for name, reason in outcomes.items() if isinstance(reason, str)}
    triton_ms, sdpa_ms = outcomes["triton"], outcomes["sdpa"]
    if isinstance(triton_ms, str) or isinstance(sdpa_ms, str):
        return Fought(race, None, refusals)
    return Fought(race, Choice(*race.key, round(triton_ms, 5), round(sdpa_ms, 5)), refusals)


def race_inputs(
    race: Race, device: torch.device, most_pixels: int | None
) -> tuple[tuple[Tensor, ...], Tensor | None, float]:
    """Inputs (leaves in training), upstream gradient and scale."""
    generator = torch.Generator(device).manual_seed(0)
    dtype = dtypes_of(race.element_bytes, device)[0]
    n = min(race.num_pixels, most_pixels or race.num_pixels)

    def random(factor: float, *shape: int, dtype: torch.dtype = dtype) -> Tensor:
        made = factor * torch.randn(shape, generator=generator, device=device)
        return made.to(dtype).requires_grad_(race.training)

    grad_out = random(1, 1, n, race.value_width).detach() if race.training else None
    if race.operation == "external_attention":
        scores, middle = random(3, 1, n, race.width), random(3, 1, n, race.width, dtype=torch.float32)
        return (scores, middle), grad_out, 1.0
    widths = (race.width, race.width, race.value_width)
    return tuple(random(1, 1, n, width) for width in widths), grad_out, race.width**-0.5


def faster_backward(race: Race, device: torch.device, *, most_pixels: int | None = None) -> str:
    """`fused` or `chunks`, whichever takes less time for the gradients of an attention."""
    inputs, grad_out, scale = race_inputs(race, device, most_pixels)
    queries, keys, values = (t.detach() for t in inputs)
    assert grad_out is not None
    out, lse = attention_with_lse(queries, keys, values, scale)
    deltas = torch.empty_like(lse)
    deltas_launch(out, grad_out, deltas).run()
    operands = pad_operands(queries, keys, values, scale)
    upstream = Upstream(padded_rows(grad_out, operands.values.shape[2]), lse, deltas)
    grads = [torch.empty_like(t) for t in (queries, keys, values)]

    def fused() -> None:
        backward_queries_launch(operands, upstream, grads[0]).run()
        for launch in backward_keys_launches(operands, upstream, grads[1], grads[2]):
            launch.run()

    def chunks() -> None:
        backward_in_chunks(operands, upstream, *grads)

    times = {}
    for name, run in (("fused", fused), ("chunks", chunks)):
        try:
            times[name] = median_ms(run, device)
        except KernelError:
            continue
    return min(times, key=times.__getitem__, default="chunks")

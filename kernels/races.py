"""Races between the Triton kernels and what else would run, and between two forms of the backward.

What else: PyTorch's scaled_dot_product_attention; for operations on upsampled logits the strips of rows.

B batch, N pixels, D key width, E value width, K classes.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from segdeformer.errors import KernelError
from segdeformer.kernels.attention import attention, attention_reference
from segdeformer.kernels.attention_launches import pad_operands
from segdeformer.kernels.attention_triton import (
    attention_with_lse,
    backward_fused,
    backward_in_chunks,
    make_upstream,
)
from segdeformer.kernels.clock import median_ms, synchronize
from segdeformer.kernels.external_attention import external_attention, external_attention_reference
from segdeformer.kernels.impl import Impl, Operation
from segdeformer.kernels.oracle import answer, largest_allowed, worst_row_error
from segdeformer.kernels.tiles import WIDEST_FUSED_BACKWARD, Choice, padded_width
from segdeformer.kernels.tune_problems import dtypes_of
from segdeformer.kernels.upsample_races import SCALE, LossMatch, WinnersMatch, upsampling_match

UPSAMPLING = ("upsample_cross_entropy", "upsample_argmax")


class Race(NamedTuple):
    """One operation of the decoder; widths as the model has them."""

    operation: Operation
    width: int
    value_width: int
    element_bytes: int
    training: bool  # forward + backward
    num_pixels: int  # of the map, where it is upsampled

    @property
    def rival(self) -> str:
        """What runs where the Triton kernels do not."""
        return "strips" if self.operation in UPSAMPLING else "sdpa"

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
    return halves + singles + _upsampling_races()


def _upsampling_races() -> list[Race]:
    """As choose_upsampling asks: the loss in training, winners not, K as both widths."""
    races = []
    for k, element_bytes, num_pixels in ((150, 2, 16384), (150, 4, 16384), (19, 2, 65536), (171, 2, 16384)):
        races.append(Race("upsample_cross_entropy", k, k, element_bytes, True, num_pixels))
        races.append(Race("upsample_argmax", k, k, element_bytes, False, num_pixels))
    return races


class AttentionMatch:
    """Inputs of an attention and what should come out; runs give the output and, in training, gradients."""

    def __init__(self, race: Race, device: torch.device, most_pixels: int | None) -> None:
        self.race = race
        self.inputs, self.grad_out, self.scale = race_inputs(race, device, most_pixels)
        external = race.operation == "external_attention"
        reference = external_attention_reference if external else attention_reference
        exact, eager = (
            answer(reference, self.inputs, scale=self.scale, grad_out=self.grad_out, exact=precise)
            for precise in (True, False)
        )
        self.exact = (exact.out, *exact.grads)
        self.allowed = [
            largest_allowed(worst_row_error(rounded, precise), self.inputs[0].dtype)
            for rounded, precise in zip((eager.out, *eager.grads), self.exact, strict=True)
        ]

    def step(self, impl: Impl) -> Callable[[], list[Tensor]]:
        inputs, training = self.inputs, self.race.training
        operation = external_attention if self.race.operation == "external_attention" else attention

        def run() -> list[Tensor]:
            with torch.set_grad_enabled(training):
                out: Tensor = operation(*inputs, scale=self.scale, impl=impl)
                return [out, *(torch.autograd.grad(out, inputs, self.grad_out) if training else ())]

        return run

    def wrong(self, results: list[Tensor]) -> str | None:
        """Why the results are not acceptable; None if they are."""
        for result, precise, limit in zip(results, self.exact, self.allowed, strict=True):
            worst = worst_row_error(result, precise)
            if not worst <= limit:  # NaN is never allowed
                return f"wrong: worst row off by {worst:.2g}, allowed {limit:.2g}"
        return None


def run_race(race: Race, device: torch.device, *, most_pixels: int | None = None) -> Fought:
    """Check and time both sides: ours, and what `auto` would run without it, as it would run it."""
    match: AttentionMatch | LossMatch | WinnersMatch
    if race.operation in UPSAMPLING:
        num_places = race.num_pixels
        if most_pixels is not None:
            num_places = min(num_places, most_pixels // SCALE**2)
        dtype = dtypes_of(race.element_bytes, device)[0]
        match = upsampling_match(race.operation, race.width, num_places, dtype=dtype, device=device)
    else:
        match = AttentionMatch(race, device, most_pixels)

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
        return match.wrong(results) or median_ms(run, device)

    # `sdpa` is the strips for operations on upsampled logits.
    outcomes = {"triton": contest(match.step("triton")), race.rival: contest(match.step("sdpa"))}
    refusals = {name: reason for name, reason in outcomes.items() if isinstance(reason, str)}
    triton_ms, rival_ms = outcomes["triton"], outcomes[race.rival]
    if isinstance(triton_ms, str) or isinstance(rival_ms, str):
        return Fought(race, None, refusals)
    return Fought(race, Choice(*race.key, round(triton_ms, 5), round(rival_ms, 5)), refusals)


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

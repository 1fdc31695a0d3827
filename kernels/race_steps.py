"""What a race runs: a decoder's operation on random inputs, and what should come of it in float64.

B batch, N queries, M keys, D key width, E value width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from segdeformer.kernels.attention import attention, attention_reference
from segdeformer.kernels.external_attention import external_attention, external_attention_reference
from segdeformer.kernels.impl import Impl
from segdeformer.kernels.oracle import answer, largest_allowed, worst_row_error
from segdeformer.kernels.tune_problems import dtypes_of
from segdeformer.kernels.upsample_races import LossMatch, LossSteps, WinnersMatch, make_loss_task

if TYPE_CHECKING:
    from segdeformer.kernels.races import Race


class Steps:
    """A race's inputs; a step runs it once, and gives the output and, in training, gradients."""

    def __init__(self, race: Race, device: torch.device) -> None:
        self.race = race
        self.inputs, self.grad_out, self.scale = race_inputs(race, device)

    def step(self, impl: Impl) -> Callable[[], list[Tensor]]:
        inputs, training = self.inputs, self.race.training
        operation = external_attention if self.race.operation == "external_attention" else attention

        def run() -> list[Tensor]:
            with torch.set_grad_enabled(training):
                out: Tensor = operation(*inputs, scale=self.scale, impl=impl)
                return [out, *(torch.autograd.grad(out, inputs, self.grad_out) if training else ())]

        return run


class AttentionMatch(Steps):
    """Inputs of an attention and what should come out."""

    def __init__(self, race: Race, device: torch.device) -> None:
        super().__init__(race, device)
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

    def wrong(self, results: list[Tensor]) -> str | None:
        """Why the results are not acceptable; None if they are."""
        for result, precise, limit in zip(results, self.exact, self.allowed, strict=True):
            worst = worst_row_error(result, precise)
            if not worst <= limit:  # NaN is never allowed
                return f"wrong: worst row off by {worst:.2g}, allowed {limit:.2g}"
        return None


def make_steps(race: Race, device: torch.device, *, checked: bool) -> Steps | LossSteps | WinnersMatch:
    """A race's inputs; checked: with what should come out of them."""
    if not race.is_upsampling:
        return AttentionMatch(race, device) if checked else Steps(race, device)
    size, full = race.sides
    dtype = dtypes_of(race.element_bytes, device)[0]
    task = make_loss_task(race.batch, race.width, size, full, dtype=dtype, device=device)
    if race.operation == "upsample_argmax":
        return WinnersMatch(task.logits_BKhw, full)
    return LossMatch(task) if checked else LossSteps(task)


def race_inputs(race: Race, device: torch.device) -> tuple[tuple[Tensor, ...], Tensor | None, float]:
    """Inputs (leaves in training), upstream gradient and scale."""
    generator = torch.Generator(device).manual_seed(0)
    dtype = dtypes_of(race.element_bytes, device)[0]
    b, n, m = race.batch, race.num_pixels, race.keys

    def random(factor: float, *shape: int, dtype: torch.dtype = dtype) -> Tensor:
        made = factor * torch.randn(shape, generator=generator, device=device)
        return made.to(dtype).requires_grad_(race.training)

    grad_out = random(1, b, n, race.value_width).detach() if race.training else None
    if race.operation == "external_attention":
        scores, middle = random(3, b, n, race.width), random(3, b, n, race.width, dtype=torch.float32)
        return (scores, middle), grad_out, 1.0
    queries, keys = random(1, b, n, race.width), random(1, b, m, race.width)
    return (queries, keys, random(1, b, m, race.value_width)), grad_out, race.width**-0.5

"""The races of the operations on upsampled logits: the Triton kernels against the strips of rows.

B batch, K classes, hw map, HW output.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from segdeformer.kernels.impl import Impl
from segdeformer.kernels.oracle import largest_allowed
from segdeformer.kernels.upsample_argmax import upsample_argmax
from segdeformer.kernels.upsample_cross_entropy import upsample_cross_entropy
from segdeformer.kernels.upsample_oracle import (
    TIE_ROUNDINGS,
    LossTask,
    loss_answer,
    loss_error,
    place_error,
    winners_error,
)

BATCH = 4  # images
SCALE = 4  # of the decoder's map to the image
IGNORED = 0.1


def make_loss_task(
    batch: int,
    num_classes: int,
    size: tuple[int, int],
    full: tuple[int, int],
    *,
    dtype: torch.dtype,
    device: torch.device,
    ignored: float = IGNORED,
) -> LossTask:
    """Random logits (no leaf) and int64 labels."""
    generator = torch.Generator(device).manual_seed(0)
    logits = 3 * torch.randn(batch, num_classes, *size, generator=generator, device=device)
    labels = torch.randint(0, num_classes, (batch, *full), generator=generator, device=device)
    labels[torch.rand(labels.shape, generator=generator, device=device) < ignored] = 255
    return LossTask(logits.to(dtype), labels)


class LossSteps:
    """Forward and backward of the loss; runs give the loss and its gradient."""

    def __init__(self, task: LossTask) -> None:
        self.logits_BKhw = task.logits_BKhw.detach().requires_grad_()
        self.labels_BHW = task.labels_BHW
        self.upstream = torch.tensor(task.upstream, device=self.labels_BHW.device)

    def step(self, impl: Impl) -> Callable[[], list[Tensor]]:
        def run() -> list[Tensor]:
            with torch.enable_grad():
                loss = upsample_cross_entropy(self.logits_BKhw, self.labels_BHW, impl=impl)
                return [loss, *torch.autograd.grad(loss, self.logits_BKhw, self.upstream.to(loss.dtype))]

        return run


class LossMatch(LossSteps):
    """The same, and what should come out."""

    def __init__(self, task: LossTask) -> None:
        super().__init__(task)
        self.exact, eager = (loss_answer(task, exact=precise) for precise in (True, False))
        self.eager_errors = self.errors([eager.loss, eager.gradient_BKhw])

    def errors(self, results: list[Tensor]) -> list[float]:
        """Of the loss and, if there is one, of the gradient."""
        found = [loss_error(results[0], self.exact)]
        return found + [place_error(gradient, self.exact) for gradient in results[1:]]

    def wrong(self, results: list[Tensor]) -> str | None:
        """Why the results are not acceptable; None if they are."""
        names = ("loss", "gradient")
        for place, (result, error) in enumerate(zip(results, self.errors(results), strict=True)):
            limit = largest_allowed(self.eager_errors[place], result.dtype)
            if not error <= limit:  # NaN is never allowed
                return f"wrong {names[place]}: off by {error:.2g}, allowed {limit:.2g}"
        return None


class WinnersMatch:
    """The winning classes, without their confidence; runs give the ids."""

    def __init__(self, logits_BKhw: Tensor, size: tuple[int, int]) -> None:
        self.logits_BKhw = logits_BKhw.detach()
        self.size = size
        self.allowed = TIE_ROUNDINGS * torch.finfo(torch.float32).eps

    def step(self, impl: Impl) -> Callable[[], list[Tensor]]:
        return lambda: [upsample_argmax(self.logits_BKhw, self.size, impl=impl).ids_BHW]

    def wrong(self, results: list[Tensor]) -> str | None:
        """Why the results are not acceptable; None if they are."""
        error = winners_error(self.logits_BKhw, results[0]).shortfall
        if not error <= self.allowed:
            return f"wrong winners: {error:.2g} of the largest logit too low, allowed {self.allowed:.2g}"
        return None

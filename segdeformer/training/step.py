"""One optimiser step: forward and backward of its micro-batches, then an update, if all is finite.

A micro-batch is what goes through the model at once in one process. Weighted by their labels, their losses
add up to the loss of the whole batch as one. B images of a micro-batch, K classes.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from segdeformer.config import IGNORE_INDEX
from segdeformer.data.loader import Batch
from segdeformer.errors import LocalError, UserError
from segdeformer.kernels.upsample.cross_entropy import check_labels
from segdeformer.models.layers import SegOutput
from segdeformer.models.momentum import ClassSums, class_sums, summed_over_processes
from segdeformer.models.placed_dropout import put_place
from segdeformer.runtime.device import explained_shortage
from segdeformer.runtime.distributed import add_up, explained_loss, from_all
from segdeformer.training.losses import Losses, Term, scaled_total, training_losses
from segdeformer.training.optimizer import set_learning_rate
from segdeformer.training.resume import full_tensor
from segdeformer.training.run import Run

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SMALLEST_SCALE = 1.0  # of float16's losses: gradients that overflow here do so without scaling too
MOST_NAMES = 16  # of images, in a message
LAST_LOSSES = 3
REMEDY = "use a smaller --batch, more --accumulate, --grad-checkpointing, or a smaller augment.crop"


class TooFewValuesError(UserError):
    """A BatchNorm has one value per channel, from which it learns no variance."""


class StepResult(NamedTuple):
    """What a step did. Losses are of the whole batch, over all processes and micro-batches, on the CPU."""

    losses: Losses
    gradient_norm: float  # before clipping
    skipped: bool  # nothing was learned, for something was not finite
    is_fault: bool  # skipped, and not because float16's losses were scaled too far
    stop_asked: bool  # in any process


def take_step(
    run: Run,
    micro_batches: Sequence[Batch],
    weights: Sequence[Mapping[str, float]],
    *,
    stop_asked: bool,
) -> StepResult:
    """Learn from a batch, of which these are this process's micro-batches.

    weights: by the terms' names, what each micro-batch counts in the loss of the whole batch.
    A step whose loss or gradient is not finite leaves weights, optimiser and running statistics as they were.
    Raises `UserError` when memory is short or labels are none of the classes.
    """
    config = run.recipe.train
    set_learning_rate(run.optimizer, run.progress.iteration, config)
    run.model.train()
    run.optimizer.zero_grad(set_to_none=True)
    kept = _Statistics(run.model)
    sums: Tensor | None = None
    tokens: ClassSums | None = None
    first = run.runtime.processes.rank * run.micro_batch_size * run.options.accumulate
    with explained_shortage(REMEDY), explained_loss():
        for number, (batch, weight) in enumerate(zip(micro_batches, weights, strict=True)):
            # Every micro-batch draws the numbers of the whole batch, and takes its own.
            torch.manual_seed(step_seed(config.seed, run.progress.iteration))
            put_place(run.model, first=first + number * run.micro_batch_size, total=config.batch_size)
            with _gradients_kept(run, is_last=number == len(micro_batches) - 1):
                output, labels_BHW = _forward(run, batch)
                losses = _losses(run, output, labels_BHW, batch)
                # The processes' gradients are averaged.
                factors = {name: part * run.runtime.processes.size for name, part in weight.items()}
                run.scaler.scale(scaled_total(losses, run.terms, factors)).backward()
            values = _values(losses, run.terms, weight)
            sums = values if sums is None else sums + values
            if output.fused_BChw is not None:
                found = class_sums(
                    output.fused_BChw,
                    labels_BHW,
                    num_classes=run.recipe.model.num_classes,
                    ignore_index=IGNORE_INDEX,
                )
                tokens = found if tokens is None else tokens.plus(found)
        assert sums is not None
        sums[-1:].fill_(float(stop_asked))  # by `sums[-1] =` it would be copied there, which waits
        if run.scaler.is_enabled():
            run.scaler.unscale_(run.optimizer)
        norm = gradient_norm(run.model)
        add_up(sums, run.runtime.processes)
        # Here a GPU is waited for, and nowhere else: what is not finite must not reach the weights.
        numbers = torch.cat([sums, norm.double().reshape(1)]).tolist()
        finite = all(map(math.isfinite, numbers))
        overflow = not finite and math.isfinite(numbers[0]) and _scale(run) > SMALLEST_SCALE
        if finite:
            if config.clip_norm is not None:
                torch.nn.utils.clip_grads_with_norm_(run.model.parameters(), config.clip_norm, norm)
            run.optimizer.step()  # not through the scaler, which would look at the gradients again
        if run.scaler.is_enabled():
            run.scaler.update()
        if not finite:
            kept.give_back()
        elif tokens is not None:
            assert run.model.momentum_tokens is not None
            run.model.momentum_tokens.update(
                tokens if run.runtime.processes.size == 1 else summed_over_processes(tokens)
            )
        if finite and run.ema is not None:
            run.ema.update(run.model)
        if finite:
            run.progress.last_losses = [*run.progress.last_losses, numbers[0]][-LAST_LOSSES:]
    run.progress.iteration += 1
    return StepResult(
        losses=_as_losses(numbers, losses),
        gradient_norm=numbers[-1],
        skipped=not finite,
        is_fault=not finite and not overflow,
        stop_asked=numbers[-2] > 0,
    )


def step_seed(seed: int, iteration: int) -> int:
    """PyTorch's seed of one iteration: dropout and drop path depend on nothing else."""
    return int(np.random.SeedSequence([seed, iteration]).generate_state(1, np.uint64)[0] >> 1)


def gradient_norm(model: nn.Module) -> Tensor:
    """Euclidean length of all gradients together, a scalar; of a sharded model over all shards."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return full_tensor(torch.nn.utils.get_total_norm(gradients))


def _forward(run: Run, batch: Batch) -> tuple[SegOutput, Tensor]:
    images_B3HW = batch.images_B3HW.to(run.runtime.device, non_blocking=True)
    labels_BHW = batch.labels_BHW.to(run.runtime.device, non_blocking=True)
    if run.options.channels_last:
        images_B3HW = images_B3HW.contiguous(memory_format=torch.channels_last)
    dtype = DTYPES[run.recipe.train.precision]
    try:
        with torch.autocast(run.runtime.device.type, dtype, enabled=dtype != torch.float32):
            return run.forward(images_B3HW), labels_BHW
    except UserError:
        raise
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise TooFewValuesError(
            "BatchNorm needs more than one value per channel: raise train.batch_size to 2 or more, "
            "accumulate less, or raise augment.crop"
        ) from None


def _losses(run: Run, output: SegOutput, labels_BHW: Tensor, batch: Batch) -> Losses:
    try:
        return training_losses(output, labels_BHW, run.terms)
    except UserError:
        raise
    except ValueError as error:
        raise LocalError(f"{error}; one of {', '.join(batch.names)}") from None


@contextlib.contextmanager
def _gradients_kept(run: Run, *, is_last: bool) -> Iterator[None]:
    """Gradients are averaged over the processes once, after the last micro-batch."""
    if isinstance(run.forward, DistributedDataParallel) and not is_last:
        with run.forward.no_sync():
            yield
        return
    if run.options.shard:
        run.model.set_requires_gradient_sync(is_last)  # type: ignore[operator]
    yield


class _Statistics:
    """BatchNorms' running statistics as they were before a step."""

    def __init__(self, model: nn.Module) -> None:
        norms = (m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm))
        self.buffers = [buffer for norm in norms for buffer in norm.buffers(recurse=False)]
        self.values = [buffer.clone() for buffer in self.buffers]

    def give_back(self) -> None:
        for buffer, value in zip(self.buffers, self.values, strict=True):
            buffer.copy_(value)


def _scale(run: Run) -> float:
    return run.scaler.get_scale() if run.scaler.is_enabled() else 0.0


def _values(losses: Losses, terms: Sequence[Term], weight: Mapping[str, float]) -> Tensor:
    """Total and terms, weighted, and room for one number more; float64."""
    losses = losses.exact()
    found = [weight[name] * loss for name, loss in losses.terms.items()]
    total = scaled_total(losses, terms, weight)
    return torch.stack([total, *found, torch.zeros_like(total)])


def _as_losses(numbers: Sequence[float], like: Losses) -> Losses:
    total, *terms = map(torch.tensor, numbers[: 1 + len(like.terms)])
    return Losses(total, dict(zip(like.terms, terms, strict=True)))


def explain_fault(run: Run, micro_batches: Sequence[Batch], result: StepResult, learning_rate: float) -> str:
    """What was not finite, when, after which losses, and with which images; all processes must call it."""
    with explained_loss():
        told = from_all(
            (_label_fault(run, micro_batches), [name for batch in micro_batches for name in batch.names]),
            run.runtime.processes,
        )
    for label_fault, _ in told:
        if label_fault is not None:
            return label_fault
    names = [name for _, own in told for name in own]
    shown = ", ".join(names[:MOST_NAMES]) + (", ..." if len(names) > MOST_NAMES else "")
    last = ", ".join(f"{loss:.4g}" for loss in run.progress.last_losses) or "none"
    return (
        f"iteration {run.progress.iteration}: loss {result.losses.total.item():g}, gradient norm "
        f"{result.gradient_norm:g}, learning rate {learning_rate:.3g}, losses before {last}, images {shown}"
    )


def _label_fault(run: Run, micro_batches: Sequence[Batch]) -> str | None:
    for batch in micro_batches:
        try:
            check_labels(batch.labels_BHW, run.recipe.model.num_classes, IGNORE_INDEX)
        except ValueError as error:
            return f"{error}; one of {', '.join(batch.names)}"
    return None

"""One optimiser step: forward and backward of its parts, then an update, unless something is not finite.

A part is what goes through the model at once in one process. Weighted by their labels, the parts' losses add
up to the loss of the whole batch as one. B images of a part, K classes.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from segdeformer.config import IGNORE_INDEX
from segdeformer.data.loader import Batch
from segdeformer.engine.device import explained_shortage
from segdeformer.engine.distributed import add_up, explained_loss, from_all
from segdeformer.engine.losses import Losses, training_losses
from segdeformer.engine.optimizer import set_learning_rate
from segdeformer.engine.resume import whole
from segdeformer.engine.run import Run
from segdeformer.errors import LocalError, UserError
from segdeformer.kernels.upsample_cross_entropy import check_labels
from segdeformer.models.layers import SegOutput
from segdeformer.models.momentum import ClassSums, class_sums, summed_over_processes
from segdeformer.models.placed_dropout import put_place

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SMALLEST_SCALE = 1.0  # of float16's losses: gradients that overflow here do so without scaling too
MOST_NAMES = 16  # of images, in a message
LAST_LOSSES = 3
REMEDY = "use a smaller --batch, more --accumulate, --grad-checkpointing, or a smaller augment.crop"


class TooFewValuesError(UserError):
    """A BatchNorm has one value per channel, from which it learns no variance."""


class StepResult(NamedTuple):
    """What a step did. Losses are of the whole batch, over all processes and parts, on the CPU."""

    losses: Losses
    gradient_norm: float  # before clipping
    skipped: bool  # nothing was learned, for something was not finite
    is_fault: bool  # skipped, and not because float16's losses were scaled too far
    stop_asked: bool  # in any process


def take_step(
    run: Run,
    parts: Sequence[Batch],
    class_weights_K: Tensor | None,
    shares: Sequence[float],
    *,
    stop_asked: bool,
) -> StepResult:
    """Learn from a batch, of which these are this process's parts.

    shares: what each part's loss counts in the loss of the whole batch.
    A step whose loss or gradient is not finite leaves weights, optimiser and running statistics as they were.
    Raises `UserError` when memory is short or labels are none of the classes.
    """
    config = run.recipe.train
    set_learning_rate(run.optimizer, run.iteration, config)
    run.model.train()
    run.optimizer.zero_grad(set_to_none=True)
    kept = _Statistics(run.model)
    sums = torch.zeros(5, device=run.device, dtype=torch.float64)
    tokens: ClassSums | None = None
    first = run.processes.rank * run.part_size * run.options.accumulate
    with explained_shortage(REMEDY), explained_loss():
        for number, (part, share) in enumerate(zip(parts, shares, strict=True)):
            # Every part draws the numbers of the whole batch, and takes its own.
            torch.manual_seed(step_seed(config.seed, run.iteration))
            put_place(run.model, first=first + number * run.part_size, total=config.batch_size)
            with _gradients_kept(run, is_last=number == len(parts) - 1):
                output, labels_BHW = _forward(run, part)
                losses = _losses(run, output, labels_BHW, class_weights_K, part)
                factor = share * run.processes.size  # the processes' gradients are averaged
                loss = losses.total if factor == 1.0 else losses.total * factor
                run.scaler.scale(loss).backward()
            sums[:4] += share * _values(losses)
            if output.fused_BChw is not None:
                found = class_sums(
                    output.fused_BChw,
                    labels_BHW,
                    num_classes=run.recipe.model.num_classes,
                    ignore_index=IGNORE_INDEX,
                )
                tokens = found if tokens is None else tokens.plus(found)
        sums[4:].fill_(float(stop_asked))  # by `sums[4] =` it would be copied there, which waits
        if run.scaler.is_enabled():
            run.scaler.unscale_(run.optimizer)
        norm = gradient_norm(run.model)
        add_up(sums, run.processes)
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
                tokens if run.processes.size == 1 else summed_over_processes(tokens)
            )
        if finite and run.ema is not None:
            run.ema.update(run.model)
        if finite:
            run.last_losses = [*run.last_losses, numbers[0]][-LAST_LOSSES:]
    run.iteration += 1
    return StepResult(
        losses=_as_losses(numbers, losses),
        gradient_norm=numbers[5],
        skipped=not finite,
        is_fault=not finite and not overflow,
        stop_asked=numbers[4] > 0,
    )


def step_seed(seed: int, iteration: int) -> int:
    """PyTorch's seed of one iteration: dropout and drop path depend on nothing else."""
    return int(np.random.SeedSequence([seed, iteration]).generate_state(1, np.uint64)[0] >> 1)


def gradient_norm(model: nn.Module) -> Tensor:
    """Euclidean length of all gradients together, a scalar; of a model in shares over all of them."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return whole(torch.nn.utils.get_total_norm(gradients))


def _forward(run: Run, part: Batch) -> tuple[SegOutput, Tensor]:
    images_B3HW = part.images_B3HW.to(run.device, non_blocking=True)
    labels_BHW = part.labels_BHW.to(run.device, non_blocking=True)
    if run.options.channels_last:
        images_B3HW = images_B3HW.contiguous(memory_format=torch.channels_last)
    dtype = DTYPES[run.recipe.train.precision]
    try:
        with torch.autocast(run.device.type, dtype, enabled=dtype != torch.float32):
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


def _losses(
    run: Run, output: SegOutput, labels_BHW: Tensor, class_weights_K: Tensor | None, part: Batch
) -> Losses:
    try:
        return training_losses(output, labels_BHW, run.recipe.train, class_weights_K, impl=run.impl)
    except UserError:
        raise
    except ValueError as error:
        raise LocalError(f"{error}; one of {', '.join(part.names)}") from None


@contextlib.contextmanager
def _gradients_kept(run: Run, *, is_last: bool) -> Iterator[None]:
    """Gradients are averaged over the processes once, after the last part."""
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


def _values(losses: Losses) -> Tensor:
    """Total, segmentation, attention and auxiliary; 0 where there is none."""
    none = losses.total.new_zeros(())
    parts = (losses.total, losses.segmentation, losses.attention, losses.auxiliary)
    return torch.stack([none if part is None else part.detach() for part in parts]).double()


def _as_losses(numbers: Sequence[float], like: Losses) -> Losses:
    total, segmentation, attention, auxiliary = map(torch.tensor, numbers[:4])
    return Losses(
        total,
        segmentation,
        None if like.attention is None else attention,
        None if like.auxiliary is None else auxiliary,
    )


def explain_fault(run: Run, parts: Sequence[Batch], result: StepResult, learning_rate: float) -> str:
    """What was not finite, when, after which losses, and with which images; all processes must call it."""
    with explained_loss():
        shares = from_all(
            (_label_fault(run, parts), [name for part in parts for name in part.names]), run.processes
        )
    for label_fault, _ in shares:
        if label_fault is not None:
            return label_fault
    names = [name for _, own in shares for name in own]
    shown = ", ".join(names[:MOST_NAMES]) + (", ..." if len(names) > MOST_NAMES else "")
    last = ", ".join(f"{loss:.4g}" for loss in run.last_losses) or "none"
    return (
        f"iteration {run.iteration}: loss {result.losses.total.item():g}, gradient norm "
        f"{result.gradient_norm:g}, learning rate {learning_rate:.3g}, losses before {last}, images {shown}"
    )


def _label_fault(run: Run, parts: Sequence[Batch]) -> str | None:
    for part in parts:
        try:
            check_labels(part.labels_BHW, run.recipe.model.num_classes, IGNORE_INDEX)
        except ValueError as error:
            return f"{error}; one of {', '.join(part.names)}"
    return None

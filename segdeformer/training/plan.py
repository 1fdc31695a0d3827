"""What a run will take, measured on its first steps, without leaving a trace; and what fits into memory."""

from __future__ import annotations

import contextlib
import gc
import math
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from segdeformer.config import Recipe, ThirdPartyConfig
from segdeformer.data.loader import training_batch
from segdeformer.data.samples import Splits
from segdeformer.errors import UsageError, UserError, count
from segdeformer.kernels.impl import choose_impl, choose_upsampling
from segdeformer.runtime import Runtime
from segdeformer.runtime.device import available_memory_mib, peak_memory_mib, restart_peak_memory
from segdeformer.runtime.distributed import ALONE, from_all
from segdeformer.training.loop import Step, train
from segdeformer.training.run import Options, Run, start_run
from segdeformer.training.step import TooFewValuesError

STEPS = 2
USABLE = 0.9  # of a GPU's memory: the rest is the allocator's, and DDP's buckets
USABLE_ON_CPU = 0.8


class Rehearsal(NamedTuple):
    """A run's first steps."""

    run: Run
    step_s: float  # the last one's: the first warms up
    batch_s: float  # to read and augment a process's images of a batch, in one loader process
    peak_mib: float  # of the GPU's allocator, or of the process on a CPU
    losses: list[float]


def rehearse(recipe: Recipe, data: Splits, *, runtime: Runtime, options: Options) -> Rehearsal:
    """Build the run in a folder that goes away and take two steps. Raises what the run would raise."""
    steps = min(STEPS, recipe.train.iterations)
    # No validation, and no save, within these steps.
    rare = {"iterations": steps + 1, "validate_every": steps + 2, "checkpoint_every": steps + 2}
    short = recipe.model_copy(update={"train": recipe.train.model_copy(update=rare)})
    with tempfile.TemporaryDirectory(prefix="segdeformer-") as folder:
        began = time.perf_counter()
        training_batch(data.train, recipe, 0)
        batch_s = (time.perf_counter() - began) / runtime.processes.size
        restart_peak_memory(runtime.device)
        run = start_run(
            short, Path(folder) / "run", data, runtime=runtime._replace(workers=0), options=options
        )
        durations, losses = [], []
        with contextlib.closing(train(run)) as events:
            began = time.perf_counter()
            for event in events:
                if not isinstance(event, Step):
                    continue
                durations.append(time.perf_counter() - began)
                losses.append(event.losses.total.item())
                if len(losses) == steps:
                    break
                began = time.perf_counter()
    run.progress.iteration = 0  # of the run that it stands for
    step_s = max(0.0, durations[-1] - batch_s)  # the steps have read their batches themselves
    return Rehearsal(run, step_s, batch_s, peak_memory_mib(runtime.device), losses)


class Kernel(NamedTuple):
    """An operation of a model and what computes it in training."""

    operation: str
    size: str
    implementation: str


def kernels_of(
    recipe: Recipe, runtime: Runtime, strides: tuple[int, ...], micro_batch_size: int
) -> list[Kernel]:
    """What each operation takes for `micro_batch_size` training crops, by the rules of `kernels.impl`."""
    impl, config = runtime.impl, recipe.model
    height, width = (math.ceil(side / strides[0]) for side in recipe.augment.crop)
    num_pixels = height * width
    one = torch.empty(1, device=runtime.device, dtype=getattr(torch, recipe.train.precision))

    def shaped(rows: int, columns: int, heads: int = 1) -> torch.Tensor:
        return one.expand(micro_batch_size * heads, rows, columns)

    kernels = []
    if config.context is not None and not isinstance(config.fusion, ThirdPartyConfig):
        channels = config.fusion.width
        reduction = config.context.reduction
        num_keys = math.ceil(height / reduction) * math.ceil(width / reduction)
        if config.context.internal is not None:
            heads = config.context.internal.heads
            head = channels // heads
            keys = shaped(num_keys, head, heads)
            chosen = choose_impl(impl, shaped(num_pixels, head, heads), keys, keys)
            kernels.append(Kernel("internal attention", f"{num_pixels} x {num_keys}, {head} wide", chosen))
        external = config.context.external
        if external is not None and external.second_stage:
            low_rank = config.context.projection == "affine" and reduction == 1
            wide = config.num_classes if low_rank else channels
            chosen = choose_impl(
                impl,
                shaped(num_pixels, wide),
                shaped(num_keys, wide),
                shaped(num_keys, wide),
                operation="external_attention" if low_rank else "attention",
            )
            size = f"{num_pixels} x {num_keys}, {wide} wide{' (low rank)' if low_rank else ''}"
            kernels.append(Kernel("external attention", size, chosen))
    crop = recipe.augment.crop
    size = f"{config.num_classes} x {height} x {width} -> {crop[0]} x {crop[1]}"
    logits = one.expand(micro_batch_size, config.num_classes, height, width)
    chosen_loss = choose_upsampling(impl, "upsample_cross_entropy", logits, crop)
    kernels.append(Kernel("upsampled loss", size, chosen_loss))
    scored = one.float().expand(1, config.num_classes, height, width)
    chosen_argmax = choose_upsampling(impl, "upsample_argmax", scored, crop)
    kernels.append(Kernel("upsampled argmax", size, chosen_argmax))
    return kernels


class Fit(NamedTuple):
    """How a batch goes into memory."""

    accumulate: int
    micro_batch_size: int
    peak_mib: float  # measured, or on a CPU expected, for one process
    available_mib: float  # that it may use


def fit_batch(recipe: Recipe, data: Splits, *, runtime: Runtime, options: Options) -> Fit:
    """The smallest accumulation with which a process's images of the batch fits into its memory.

    On a GPU by trying; on a CPU, where one try too many ends everything, from two small micro-batches. Every
    process tries alone, and all take the largest answer. Sizes too small for a BatchNorm are left out.
    Raises `UserError` if even the smallest is too much.
    """
    device, processes = runtime.device, runtime.processes
    num_images = recipe.train.batch_size // processes.size
    if num_images * processes.size != recipe.train.batch_size:
        raise UsageError(
            f"train.batch_size is {recipe.train.batch_size}, which {processes.size} processes cannot share "
            f"evenly; make it a multiple of {processes.size}"
        )
    alone, unshared = runtime._replace(processes=ALONE), options._replace(accumulate=1, shard=False)

    def peak_mib(micro_batch_size: int) -> float:
        size = {"batch_size": micro_batch_size}
        one_part = recipe.model_copy(update={"train": recipe.train.model_copy(update=size)})
        try:
            rehearsal = rehearse(one_part, data, runtime=alone, options=unshared)
        except TooFewValuesError:
            if processes.size > 1 and micro_batch_size == 1:  # a BatchNorm over all processes has enough
                return peak_mib(2)
            raise
        except UserError as error:
            if "out of" not in str(error):
                raise
            return math.inf
        finally:
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
        return rehearsal.peak_mib

    sizes = [size for size in range(num_images, 0, -1) if num_images % size == 0]
    available_mib = available_memory_mib(device)
    if device.type == "cuda":
        fit = _fit_by_trying(num_images, sizes, available_mib, peak_mib)
    else:
        available_mib /= processes.size
        fit = _fit_on_cpu(num_images, sizes, available_mib, peak_mib)
    fit = max(from_all(fit, processes), key=lambda one: one.accumulate)
    if fit.peak_mib > fit.available_mib:
        raise UserError(
            f"micro-batches of {count(fit.micro_batch_size, 'image')} take {fit.peak_mib:,.0f} MiB or more, "
            f"a process has {fit.available_mib:,.0f} MiB; use --grad-checkpointing, or a smaller augment.crop"
        )
    return fit


PeakOf = Callable[[int], float]  # of micro-batches of so many images, in MiB; inf: did not fit


def _fit_by_trying(num_images: int, sizes: list[int], available_mib: float, peak_mib: PeakOf) -> Fit:
    """The largest micro-batch that fits; if none does, the smallest there is."""
    fit: Fit | None = None
    for size in sizes:
        try:
            peak = peak_mib(size)
        except TooFewValuesError:
            if fit is None:
                raise
            break
        fit = Fit(num_images // size, size, peak, USABLE * available_mib)
        if peak <= fit.available_mib:
            break
    assert fit is not None  # a process has an image
    return fit


def _fit_on_cpu(num_images: int, sizes: list[int], available_mib: float, peak_mib: PeakOf) -> Fit:
    """Memory grows by the image: two small batches tell how much. If none fits, the smallest there is."""
    measured: dict[int, float] = {}
    for size in reversed(sizes):
        try:
            measured[size] = peak_mib(size)
        except TooFewValuesError:
            if size == num_images:
                raise
        if len(measured) == 2:
            break
    small, large = min(measured), max(measured)
    least, more = measured[small], measured[large]
    per_image = max(0.0, more - least) / max(1, large - small)
    usable_mib = USABLE_ON_CPU * available_mib
    fits = [
        Fit(num_images // size, size, least + per_image * (size - small), usable_mib)
        for size in sizes
        if size >= small
    ]
    return next((fit for fit in fits if fit.peak_mib <= usable_mib), fits[-1])

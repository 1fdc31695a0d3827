"""A model in training and everything that goes with it; how it is begun, saved and gone on with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from segdeformer.config import Recipe, recipe_toml
from segdeformer.data.loader import BadImages, training_batch
from segdeformer.data.samples import Splits
from segdeformer.errors import UsageError, UserError
from segdeformer.files import write_text
from segdeformer.models.placed_dropout import place_dropouts
from segdeformer.models.segmenter import Segmenter
from segdeformer.models.synchronised_norms import synchronise_norms
from segdeformer.runtime import ON_CPU, Runtime
from segdeformer.runtime.distributed import any_of
from segdeformer.training.losses import Term, build_terms
from segdeformer.training.optimizer import ParameterGroup, build_optimizer, parameter_groups
from segdeformer.training.parallel import checkpoint_activations, shard_model, wrap_model
from segdeformer.training.resume import give_optimizer_state, optimizer_state
from segdeformer.training.saves import newest, read_state, store, tidy
from segdeformer.weights.build import build_model
from segdeformer.weights.checkpoint import BEST, read_checkpoint, save_checkpoint, saved_model
from segdeformer.weights.transfer import DecoderReport, load_decoder_weights, own_checkpoint

RECIPE = "recipe.toml"


class Options(NamedTuple):
    """How a run is computed and kept. None of it changes results beyond rounding, but one thing: BatchNorm's
    statistics are those of a micro-batch.

    accumulate: micro-batches that the images of one process go through the model in.
    compile: by `torch.compile`. channels_last: memory order of maps.
    grad_checkpointing: keep only the encoder blocks' inputs, and compute the rest again for the gradients.
    shard: parameters, gradients and optimiser state sharded (FSDP2), instead of a copy in each process.
    keep: checkpoints to keep. bad_images: `stop` at an image that cannot be read, or `skip` it.
    """

    accumulate: int = 1
    compile: bool = False
    channels_last: bool = False
    grad_checkpointing: bool = False
    shard: bool = False
    keep: int = 2
    bad_images: BadImages = "stop"


DEFAULT_OPTIONS = Options()


@dataclass
class Progress:
    """How far a run is."""

    iteration: int = 0
    best_miou: float | None = None
    validation_due: bool = False  # of this iteration; stays true only where one was stopped
    skipped_in_a_row: int = 0
    num_skipped_steps: int = 0
    last_losses: list[float] = field(default_factory=list)  # the last few finite ones, since it was started
    unreadable: list[str] = field(default_factory=list)  # images that were left out
    warnings: list[str] = field(default_factory=list)  # what was found when it was gone on with


@dataclass
class Run:
    """See the module; `model` is the bare one, `forward` what training calls."""

    recipe: Recipe
    folder: Path
    data: Splits
    model: Segmenter
    forward: Callable[[Tensor], Any]
    groups: list[ParameterGroup]
    terms: list[Term]
    optimizer: torch.optim.AdamW
    scaler: torch.amp.GradScaler
    ema: Any  # timm's ModelEmaV3, or None
    runtime: Runtime
    options: Options
    decoder_report: DecoderReport | None = None  # of one of our checkpoints that it started from
    progress: Progress = field(default_factory=Progress)

    @property
    def complete(self) -> bool:
        """Nothing is left to train or to validate."""
        progress = self.progress
        return progress.iteration >= self.recipe.train.iterations and not progress.validation_due

    @property
    def micro_batch_size(self) -> int:
        """Images that go through the model at once in one process."""
        return self.recipe.train.batch_size // (self.runtime.processes.size * self.options.accumulate)


def start_run(
    recipe: Recipe,
    folder: Path,
    data: Splits,
    *,
    runtime: Runtime = ON_CPU,
    options: Options = DEFAULT_OPTIONS,
    model: Segmenter | None = None,
) -> Run:
    """Build the model, or take one's own, and make the run folder with its resolved recipe.

    Raises `UserError` when the folder already holds a run, the data is empty, or the recipe's number
    of classes is not the data's.
    """
    first = runtime.processes.is_first
    if first and (folder / RECIPE).exists():
        raise UserError(f"{folder} holds a run already; go on with --resume, or choose another --out")
    _check(recipe, data, runtime, options)
    torch.manual_seed(recipe.train.seed)
    decoder_report = None
    if model is None:
        model = build_model(recipe.model, impl=runtime.impl)
        checkpoint = own_checkpoint(recipe.model.encoder.weights)
        if checkpoint is not None and not checkpoint.folded:
            decoder_report = load_decoder_weights(model, checkpoint, data.train.classes)
    run = _assemble(recipe, folder, data, model, runtime, options)
    if first:
        tidy(folder, None)
        write_text(folder / RECIPE, recipe_toml(recipe))
    run.decoder_report = decoder_report
    return run


def resume_run(
    recipe: Recipe,
    folder: Path,
    data: Splits,
    *,
    runtime: Runtime = ON_CPU,
    options: Options = DEFAULT_OPTIONS,
    model: Segmenter | None = None,
) -> Run:
    """Go on from the run's newest whole checkpoint; the next batch is the one that would have come.

    model: one's own, whose weights are replaced. Damaged checkpoints are passed over, which
    `run.progress.warnings` tells. A run that ended before its first checkpoint begins anew. Raises
    `UserError` when there is no run in the folder, or no whole checkpoint of it.
    """
    stored = newest(folder)
    if stored is None and not (folder / RECIPE).exists():
        raise UserError(f"{folder} holds no run to go on with; start it without --resume")
    any_of(False, runtime.processes)  # all have looked: the first may tidy up
    if stored is None:
        if runtime.processes.is_first:
            (folder / RECIPE).unlink()
        return start_run(recipe, folder, data, runtime=runtime, options=options, model=model)
    checkpoint = read_checkpoint(stored.model)
    assert not checkpoint.folded  # nothing that trains writes one
    _check(recipe, data, runtime, options)
    model = saved_model(checkpoint, impl=runtime.impl, model=model)
    run = _assemble(recipe, folder, data, model, runtime, options)
    state = read_state(stored)
    give_optimizer_state(run.model, run.optimizer, state["optimizer"], origin=stored.folder)
    run.scaler.load_state_dict(state["scaler"])
    if run.ema is not None and state["ema"] is not None:
        run.ema.module.load_state_dict(state["ema"])
    run.progress = Progress(
        iteration=checkpoint.iteration,
        best_miou=checkpoint.best_miou,
        validation_due=checkpoint.validation_due,
        skipped_in_a_row=state["skipped_in_a_row"],
        num_skipped_steps=state["num_skipped_steps"],
        warnings=list(stored.warnings),
    )
    any_of(False, runtime.processes)  # all have read it
    if runtime.processes.is_first:
        tidy(folder, stored)
        write_text(folder / RECIPE, recipe_toml(recipe))
    return run


def _check(recipe: Recipe, data: Splits, runtime: Runtime, options: Options) -> None:
    for dataset in data:
        if len(dataset) == 0:
            raise UserError(f"{dataset.name}: the {dataset.split} split has no images")
        num_classes = len(dataset.classes.names)
        if num_classes != recipe.model.num_classes:
            raise UserError(
                f"recipe {recipe.name} has model.num_classes = {recipe.model.num_classes}, "
                f"{dataset.name} has {num_classes} classes; set it to {num_classes}"
            )
    try:
        recipe.check_class_weights()  # not yet counted in a recipe for a folder that has not met its data
    except ValueError as error:
        raise UsageError(f"recipe {recipe.name}: {error}") from None
    if recipe.augment.transforms:  # one's own, tried before there is a folder
        training_batch(data.train, recipe, 0, places=range(1), bad_images=options.bad_images)
    processes = runtime.processes
    parts = processes.size * options.accumulate
    if recipe.train.batch_size % parts:
        raise UsageError(
            f"train.batch_size is {recipe.train.batch_size}, which {processes.size} processes with "
            f"--accumulate {options.accumulate} cannot share evenly; make it a multiple of {parts}"
        )
    if options.shard and processes.size == 1:
        raise UsageError(
            "--shard shares a model between processes, and there is one; start several with --nproc"
        )
    if options.shard and recipe.train.ema_decay is not None:
        raise UsageError("--shard leaves no whole weights to average: leave out --shard or train.ema_decay")
    if options.shard and recipe.train.precision == "float16":
        raise UsageError("--shard has no loss scaling: set train.precision to bfloat16 or float32")


def _assemble(
    recipe: Recipe, folder: Path, data: Splits, model: Segmenter, runtime: Runtime, options: Options
) -> Run:
    device, processes = runtime.device, runtime.processes
    terms = build_terms(recipe.train.losses, recipe.model.num_classes, device=device, impl=runtime.impl)
    place_dropouts(model)
    if processes.size > 1:  # a rehearsal is alone though others run
        synchronise_norms(model, device)
    if options.grad_checkpointing:
        checkpoint_activations(model.encoder)
    model.to(device)
    if options.channels_last and not options.shard:  # FSDP2 takes no such weights; maps follow the images
        model.to(memory_format=torch.channels_last)
    ema = None
    if recipe.train.ema_decay is not None:
        from timm.utils.model_ema import ModelEmaV3

        ema = ModelEmaV3(model, decay=recipe.train.ema_decay)
    if options.shard:
        shard_model(model, device)
    groups = parameter_groups(model, recipe.train)  # of the shards, if it is sharded
    return Run(
        recipe=recipe,
        folder=folder,
        data=data,
        model=model,
        forward=wrap_model(model, processes, device, compiled=options.compile, sharded=options.shard),
        groups=groups,
        terms=terms,
        optimizer=build_optimizer(groups, recipe.train),
        scaler=torch.amp.GradScaler(device.type, enabled=recipe.train.precision == "float16"),
        ema=ema,
        runtime=runtime,
        options=options,
    )


def scored_model(run: Run) -> Segmenter:
    """What is validated and kept as best: the averaged weights if there are any; unsharded."""
    if run.ema is not None:
        return run.ema.module
    if not run.options.shard:
        return run.model
    from segdeformer.training.parallel import full_state_dict

    model = build_like(run)
    model.load_state_dict(full_state_dict(run.model))
    return model


def build_like(run: Run) -> Segmenter:
    """A model of the run's recipe on its device, with random weights."""
    config = run.recipe.model
    encoder = config.encoder.model_copy(update={"weights": "none"})
    with torch.random.fork_rng(devices=[]):
        return build_model(config.model_copy(update={"encoder": encoder}), impl=run.runtime.impl).to(
            run.runtime.device
        )


def save_run(run: Run) -> None:
    """Save model and optimiser so that `--resume` goes on from here; the first process writes.

    All processes must call it, for a sharded model is put together. Raises `UserError`, and keeps what was
    there, when the disk is full or a weight is not finite.
    """
    model = scored_model(run) if run.options.shard else run.model
    state = {
        "optimizer": optimizer_state(run.model, run.optimizer),
        "scaler": run.scaler.state_dict(),
        "ema": None if run.ema is None else run.ema.module.state_dict(),
        "skipped_in_a_row": run.progress.skipped_in_a_row,
        "num_skipped_steps": run.progress.num_skipped_steps,
    }
    if run.runtime.processes.is_first:
        store(
            run.folder,
            iteration=run.progress.iteration,
            write_model=lambda path: _write(run, model, path),
            state=state,
            keep=run.options.keep,
        )


def save_best(run: Run, model: nn.Module) -> None:
    """Keep the model that has just been scored as the run's best; the first process writes."""
    assert isinstance(model, Segmenter)
    if run.runtime.processes.is_first:
        _write(run, model, run.folder / BEST)


def _write(run: Run, model: Segmenter, path: Path) -> None:
    save_checkpoint(
        path,
        model,
        recipe=run.recipe,
        classes=run.data.train.classes,
        iteration=run.progress.iteration,
        best_miou=run.progress.best_miou,
        validation_due=run.progress.validation_due,
    )

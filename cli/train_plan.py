"""`segdeformer train --dry-run` and `--auto-batch`: what a run will take, before it starts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

    from segdeformer.data.check.findings import Finding
    from segdeformer.runtime import Runtime
    from segdeformer.training.prepare import Prepared
    from segdeformer.training.run import Options


def choose_accumulation(console: Console, prepared: Prepared, options: Options, runtime: Runtime) -> Options:
    """The options with the smallest accumulation that fits memory, and a line that says so."""
    from segdeformer.training.plan import fit_batch

    fit = fit_batch(prepared.recipe, prepared.data, runtime=runtime, options=options)
    console.print(
        f"--auto-batch: {fit.micro_batch_size} images at once, --accumulate {fit.accumulate}: "
        f"{fit.peak_mib:,.0f} of {fit.available_mib:,.0f} MiB"
    )
    return options._replace(accumulate=fit.accumulate)


def show_plan(
    console: Console, prepared: Prepared, options: Options, runtime: Runtime, findings: Sequence[Finding]
) -> None:
    """The resolved recipe, what is in it, and two measured steps; nothing is written."""
    from segdeformer.cli.show import make_table
    from segdeformer.cli.train_show import introduce
    from segdeformer.config import recipe_toml
    from segdeformer.training.plan import kernels_of, rehearse

    recipe, workers = prepared.recipe, runtime.workers
    console.print("dry run: nothing is kept", style="bold")
    console.print(recipe_toml(recipe).rstrip())
    rehearsal = rehearse(recipe, prepared.data, runtime=runtime, options=options)
    run = rehearsal.run
    run.recipe = recipe
    introduce(console, run, prepared.base, findings, shows_folder=False)
    if not findings:
        console.print("data: nothing found that would spoil training (names, and 64 pairs)", style="green")

    kernels = make_table("operation", "size", "by", num_left=3)
    strides = tuple(run.model.encoder.strides)
    for kernel in kernels_of(recipe, runtime, strides, run.micro_batch_size):
        kernels.add_row(*kernel)
    console.print(kernels, soft_wrap=False)

    train = recipe.train
    num_images = len(prepared.data.train)
    epochs = train.iterations * train.batch_size / num_images
    step_s = rehearsal.step_s
    loading_s = rehearsal.batch_s / workers if workers else rehearsal.batch_s
    iteration_s = max(step_s, loading_s) if workers else step_s + loading_s
    console.print(
        f"{num_images:,} images an epoch, {num_images / train.batch_size:,.1f} iterations; "
        f"{train.iterations:,} iterations are {epochs:,.1f} epochs"
    )
    console.print(
        f"an iteration: {step_s:.3g} s to learn, {loading_s:.3g} s to load with {workers} loader processes; "
        f"all of them {_duration(iteration_s * train.iterations)}, and validation every "
        f"{train.validate_every:,}"
    )
    console.print(f"peak memory {rehearsal.peak_mib:,.0f} MiB, of a process, in two steps")
    console.print(f"loss of the first steps: {', '.join(f'{loss:.4f}' for loss in rehearsal.losses)}")


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = seconds / 60
    if minutes < 90:
        return f"{minutes:.1f} minutes"
    hours = minutes / 60
    return f"{hours:.1f} hours" if hours < 48 else f"{hours / 24:.1f} days"

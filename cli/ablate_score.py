"""Score a run of an ablation, in a process of its own: every validation image's confusion matrix.

`python -m segdeformer.cli.ablate_score RUN` writes `images.npz` into the run's folder.
"""

from __future__ import annotations

from pathlib import Path

import typer

from segdeformer.cli.errors import one_line_errors
from segdeformer.cli.options import Device, ImplName


@one_line_errors
def score_command(run: Path, device: Device = "auto", impl: ImplName = "auto") -> None:
    """Evaluate the model after the last iteration as `segdeformer eval` would, image by image."""
    from segdeformer.cli.options import checked_impl, load_for_inference
    from segdeformer.data.datasets import open_dataset
    from segdeformer.engine.checkpoint import LAST
    from segdeformer.engine.device import choose_device
    from segdeformer.engine.image_counts import IMAGE_COUNTS, count_images, write_image_counts
    from segdeformer.errors import UserError

    chosen = choose_device(device)
    resolved = checked_impl(impl, chosen)
    loaded, _ = load_for_inference(run / LAST, device=chosen, impl=resolved, fold=None)
    recipe, iteration = loaded.checkpoint.recipe, loaded.checkpoint.iteration
    if iteration < recipe.train.iterations:
        raise UserError(f"{run / LAST} is of iteration {iteration} of {recipe.train.iterations}; train it on")
    counts = count_images(
        loaded.model,
        open_dataset(recipe.data, "val"),
        protocol=recipe.evaluate,
        data=recipe.data,
        device=chosen,
        iteration=iteration,
        impl=resolved,
    )
    write_image_counts(run / IMAGE_COUNTS, counts)


if __name__ == "__main__":
    typer.run(score_command)

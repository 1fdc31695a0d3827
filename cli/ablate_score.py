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
    from segdeformer.ablation.plan import IMAGE_COUNTS
    from segdeformer.ablation.results import count_images, write_image_counts
    from segdeformer.cli.inference import open_model
    from segdeformer.data.datasets import open_dataset
    from segdeformer.errors import UserError
    from segdeformer.weights.checkpoint import LAST

    opened = open_model(run / LAST, device=device, impl=impl)
    recipe, iteration = opened.recipe, opened.loaded.checkpoint.iteration
    if iteration < recipe.train.iterations:
        raise UserError(f"{run / LAST} is of iteration {iteration} of {recipe.train.iterations}; train it on")
    model, dataset = opened.loaded.model, open_dataset(recipe.data, "val")
    counts = count_images(model, dataset, recipe, iteration=iteration, runtime=opened.runtime)
    write_image_counts(run / IMAGE_COUNTS, counts)


if __name__ == "__main__":
    typer.run(score_command)

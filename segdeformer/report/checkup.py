"""What the data doctor found, as JSON, and a picture of samples under their labels."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from segdeformer.data.check.doctor import Checkup
from segdeformer.data.check.examine import WEIGHT_RULE
from segdeformer.data.images import write_png
from segdeformer.data.samples import Sample
from segdeformer.errors import UserError
from segdeformer.files import write_json
from segdeformer.report.sheet import Labelled, overlay_page
from segdeformer.version import __version__


def write_checkup(path: Path, checkup: Checkup) -> None:
    """Findings with all their files, counts by class, and the numbers for a recipe."""
    scale = checkup.color_scale
    report = {
        "segdeformer": __version__,
        "data": checkup.config.model_dump(mode="json", exclude={"mean", "std"}),
        "spoils_training": checkup.spoils_training,
        "findings": [
            {**found._asdict(), "count": len(found.files), "files": list(found.files)}
            for found in checkup.findings
        ],
        "classes": list(checkup.classes.names),
        "splits": {
            split: {
                "name": summary.name,
                "pairs": summary.num_pairs,
                "pixels_by_class": summary.histogram.pixels_K.tolist(),
                "images_by_class": summary.histogram.images_K.tolist(),
                "ignored_pixels": summary.histogram.ignored,
            }
            for split, summary in checkup.splits.items()
        },
        "recipe": {
            "mean": scale and list(scale.mean),
            "std": scale and list(scale.std),
            "class_weights": list(checkup.class_weights),
            "class_weights_rule": WEIGHT_RULE,
        },
    }
    write_json(path, report)


def write_overlays(path: Path, samples: Iterable[tuple[str, Sample]], checkup: Checkup) -> None:
    """Draw the samples into a PNG file."""
    shown = [Labelled(f"{split}: {sample.name}", *sample[:2]) for split, sample in samples]
    if not shown:
        raise UserError(f"{path}: no pair can be drawn; mend the errors above first")
    counts = ", ".join(f"{summary.num_pairs:,} {split}" for split, summary in checkup.splits.items())
    pairs = "pairs" if sum(summary.num_pairs for summary in checkup.splits.values()) != 1 else "pair"
    headline = f"{checkup.config.name}: {counts} {pairs}; where labels are ignored, the plain image shows"
    write_png(path, overlay_page(shown, checkup.classes, headline))

"""A decoder that goes on from one of our checkpoints, on data with other classes.

K classes, C channels. Everything that has a row for each class is taken row by row, by the class's name.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch

from segdeformer.data.classes import ClassTable
from segdeformer.errors import UserError
from segdeformer.models.segmenter import Segmenter
from segdeformer.weights.checkpoint import Checkpoint, read_checkpoint
from segdeformer.weights.files import read_weights

# What has a row for each class: heads, and class tokens, learned or averaged.
BY_CLASS = (
    "head.classify.weight",
    "head.classify.bias",
    "tokens.info_KC",
    "tokens.class_KC",
    "tokens.tokens_KC",
    "tokens.seen_K",
)


class DecoderReport(NamedTuple):
    """What a checkpoint gave to a decoder and an auxiliary head."""

    loaded: int  # tensors
    kept_classes: tuple[str, ...]  # that it knew by name
    new_classes: tuple[str, ...]
    missing: tuple[str, ...]  # our tensors that it has not, or in another shape

    def lines(self) -> list[str]:
        """For the terminal."""
        lists = {
            "classes of the same name, kept": self.kept_classes,
            "new classes, their rows as initialised": self.new_classes,
            "not in it or of another shape, left as initialised": self.missing,
        }
        summary = f"decoder weights: {self.loaded} tensors of the same checkpoint"
        return [summary, *(f"  {title}: {', '.join(names)}" for title, names in lists.items() if names)]


def own_checkpoint(source: str) -> Checkpoint | None:
    """The checkpoint of ours that a name of weights means; None for any other."""
    try:
        return read_checkpoint(Path(source)) if Path(source).is_file() else None
    except UserError:
        return None


@torch.no_grad()
def load_decoder_weights(model: Segmenter, checkpoint: Checkpoint, classes: ClassTable) -> DecoderReport:
    """Fill decoder and auxiliary head of a fresh model; classes are those of its data.

    Tensors are taken by name where the shapes agree, rows of classes by the names of the classes.
    """
    theirs = read_weights(checkpoint.path).tensors
    rows = {name: index for index, name in enumerate(checkpoint.classes.names)}
    pairs = [(ours, rows[name]) for ours, name in enumerate(classes.names) if name in rows]
    loaded, missing = 0, []
    for name, tensor in model.state_dict().items():
        if name.startswith("encoder."):
            continue
        given = theirs.get(name)
        if given is not None and name.endswith(BY_CLASS) and given.shape[1:] == tensor.shape[1:]:
            for ours, other in pairs:
                tensor[ours] = given[other].to(tensor)
        elif given is not None and given.shape == tensor.shape:
            tensor.copy_(given)
        else:
            missing.append(name)
            continue
        loaded += 1
    kept = {ours for ours, _ in pairs}
    return DecoderReport(
        loaded=loaded,
        kept_classes=tuple(classes.names[place] for place in sorted(kept)),
        new_classes=tuple(name for place, name in enumerate(classes.names) if place not in kept),
        missing=tuple(missing),
    )

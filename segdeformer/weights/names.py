"""What each of our tensors is called, and how it is laid out, in another project's files.

One table per project, in names.toml, serves both directions. O out, I in channels, C channels of a map, K
classes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from segdeformer.config.toml import read_toml
from segdeformer.models.encoders import TimmEncoder
from segdeformer.models.mit import EXPANSION, REDUCTIONS, STRIDES, MiT
from segdeformer.models.segmenter import Segmenter

Project = Literal["nvlabs", "mmseg", "huggingface"]
PROJECT_TITLES = {"nvlabs": "NVlabs", "mmseg": "mmsegmentation", "huggingface": "Hugging Face"}

Layout = Literal["same", "linear", "convolution", "table", "unfolded"]

# nvlabs, mmseg and huggingface as in `Project`. microsoft: mmsegmentation's heads on Swin's own names.
# transformers5: what Hugging Face's modules are called inside transformers 5, which writes `huggingface`.
Naming = Literal["nvlabs", "mmseg", "microsoft", "huggingface", "transformers5"]
NAMINGS: dict[Project, tuple[Naming, ...]] = {
    "nvlabs": ("nvlabs",),
    "mmseg": ("mmseg", "microsoft"),
    "huggingface": ("huggingface", "transformers5"),
}

# What Hugging Face's config.json says of a MiT of any size.
HUGGINGFACE_MIT = {
    "sr_ratios": list(REDUCTIONS),
    "patch_sizes": [7, 3, 3, 3],
    "strides": [4, 2, 2, 2],
    "mlp_ratios": [EXPANSION] * len(STRIDES),
    "hidden_act": "gelu",
}


def _swap_first_and_last(value: Tensor) -> Tensor:
    """Of the last three dimensions, which are then one."""
    return value.transpose(-1, -3).flatten(-3)


def _as_convolution(value: Tensor) -> Tensor:
    return value[:, :, None, None]


def _as_linear(value: Tensor) -> Tensor:
    return value.flatten(1)


# From ours to theirs, and back; what is not here is the same.
LAYOUTS: dict[Layout, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "linear": (_as_linear, _as_convolution),  # (O, I) there, (O, I, 1, 1) here
    "convolution": (_as_convolution, _as_linear),  # the other way round
    "table": (lambda value: value[None], lambda value: value[0]),  # (1, K, C) there
    "unfolded": (  # 2x2 pixels in the last dimension, there ordered (C, row, column), here (column, row, C)
        lambda value: _swap_first_and_last(value.unflatten(-1, (2, 2, -1))),
        lambda value: _swap_first_and_last(value.unflatten(-1, (-1, 2, 2))),
    ),
}


class Link(NamedTuple):
    """One tensor there, and ours, which are concatenated in this order."""

    theirs: str
    ours: tuple[str, ...]
    layout: Layout = "same"

    def write(self, state: Mapping[str, Tensor]) -> Tensor:
        """Our tensors as the other project's one."""
        values = [state[name] for name in self.ours]
        value = torch.cat(values) if len(values) > 1 else values[0]
        return LAYOUTS[self.layout][0](value) if self.layout in LAYOUTS else value

    def read(self, value: Tensor, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The other project's tensor as ours, with the rows that they have in `state`."""
        value = LAYOUTS[self.layout][1](value) if self.layout in LAYOUTS else value
        rows = [len(state[name]) for name in self.ours] if len(self.ours) > 1 else None
        return dict(zip(self.ours, value.split(rows) if rows else [value], strict=True))


def written(links: Sequence[Link], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our tensors under the names, and in the shapes, of another project."""
    return {link.theirs: link.write(state) for link in links}


class Rule(NamedTuple):
    """A module of ours, as a regular expression, and its name there.

    kind: `block` for our ConvBNReLU, whose `.0` and `.1` are `.conv` and `.bn` there; `tensor` when it is no
    module but a parameter itself. layout: `linear` is its weight's alone, others are of all its tensors.
    """

    ours: str
    theirs: str
    kind: Literal["module", "block", "tensor"] = "module"
    layout: Layout = "same"


CLASSIFIER = r"decoder\.head\.classify"
TABLES = read_toml(Path(__file__).with_suffix(".toml"))
MIT_NAMES: dict[Naming, dict[str, str]] = TABLES["mit"]
STYLES = tuple(MIT_NAMES)
HEADS: dict[Naming, tuple[Rule, ...]] = {
    naming: tuple(Rule(*row) for row in rows) for naming, rows in TABLES["heads"].items()
}
HEADS["microsoft"] = HEADS["mmseg"]
BLOCK_PARTS = {"0": "conv", "1": "bn"}


def classifier_of(naming: Naming) -> str:
    """What the weight of the layer that tells the classes is called."""
    return next(f"{rule.theirs}.weight" for rule in HEADS[naming] if rule.ours == CLASSIFIER)


class Table(NamedTuple):
    """Names of a whole model. unknown: our tensors that the other project has no name for."""

    links: tuple[Link, ...]
    unknown: tuple[str, ...]


def name_table(model: Segmenter, naming: Naming) -> Table:
    """Every tensor of the model, by its name in the other project."""
    links = []
    if isinstance(model.encoder, MiT) and naming != "microsoft":
        before = "segformer." if naming in ("huggingface", "transformers5") else "backbone."
        for theirs, ours, layout in mit_links(model.encoder, naming):
            links.append(Link(before + theirs, tuple(f"encoder.{name}" for name in ours), layout))
    rules = HEADS[naming] + _encoder_rules(model, naming)
    taken = {name for link in links for name in link.ours}
    unknown = []
    for name, tensor in model.state_dict().items():
        if name in taken:
            continue
        link = next((link for rule in rules if (link := _apply(rule, name, tensor))), None)
        if link is None:
            unknown.append(name)
        else:
            links.append(link)
    return Table(tuple(links), tuple(unknown))


def mit_links(encoder: MiT, naming: Naming) -> list[Link]:
    """Every tensor of a MiT, by its name in the other project's encoder."""
    links: dict[str, Link] = {}
    for name, tensor in encoder.state_dict().items():
        _, stage, *middle, kind = name.split(".")
        module = re.sub(r"^blocks\.\d+", "blocks.{j}", ".".join(middle))
        theirs = MIT_NAMES[naming][module].format(i=stage, s=int(stage) + 1, j=name.split(".")[3])
        theirs += f"_{kind}" if theirs.endswith("in_proj") else f".{kind}"
        # mmsegmentation writes the linear layers of the Mix-FFN as 1x1 convolutions.
        layout: Layout = "convolution" if ".ffn." in theirs and tensor.ndim == 2 else "same"
        before = links[theirs].ours if theirs in links else ()
        links[theirs] = Link(theirs, (*before, name), layout)
    return list(links.values())


def _encoder_rules(model: Segmenter, naming: Naming) -> tuple[Rule, ...]:
    family = type(model.encoder.backbone).__name__ if isinstance(model.encoder, TimmEncoder) else "MiT"
    return tuple(Rule(*row) for row in TABLES["encoders"].get(f"{naming} {family}", ()))


def _apply(rule: Rule, name: str, tensor: Tensor) -> Link | None:
    if rule.kind == "tensor":
        found = re.fullmatch(rule.ours, name)
        return Link(found.expand(rule.theirs), (name,), rule.layout) if found else None
    part = r"\.(?P<part>[01])" if rule.kind == "block" else ""
    found = re.fullmatch(rf"(?:{rule.ours}){part}\.(?P<kind>\w+)", name)
    if found is None:
        return None
    middle = f".{BLOCK_PARTS[found['part']]}" if part else ""
    layout: Layout = rule.layout
    if layout == "linear" and tensor.ndim != 4:
        layout = "same"  # its bias
    return Link(f"{found.expand(rule.theirs)}{middle}.{found['kind']}", (name,), layout)

"""Encoder weights from files, whatever names their authors gave the tensors.

A MiT's are those of `names`; encoders of timm read files in timm's. Nothing is dropped in silence: the
report lists what the file lacks and what it has too much.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from segdeformer.errors import UserError
from segdeformer.models.encoders import Encoder, TimmEncoder, WeightsReport
from segdeformer.models.mit import MIT_SIZES, MiT
from segdeformer.models.third_party import ThirdPartyEncoder
from segdeformer.weights.files import read_weights
from segdeformer.weights.names import STYLES, Link, Naming, mit_links, written

# What training wrappers prepend to names.
WRAPPERS = {"module", "model", "backbone", "encoder", "segformer", "teacher", "student"}

# For the error about a file of another model: a telling name, and what it tells.
FAMILIES = (
    ("attn.relative_position_bias_table", "a Swin or BEiT"),
    ("blocks.0.attn.qkv.weight", "a ViT"),
    ("layer1.0.conv1.weight", "a ResNet"),
    ("blocks.0.conv_dw.weight", "a ConvNeXt"),
    ("blocks.0.0.conv_dw.weight", "an EfficientNet or MobileNet"),
)
FOLDED = "decoder.project.weight"  # what every folded model has; its convolutions may hold BatchNorms
LEAST_SHARE = 0.5  # of the encoder's parameters; below it the file belongs to another model


class Recognised(NamedTuple):
    """A naming style that fits a file. `links`: their names are without the prefix."""

    style: str
    prefix: str
    links: list[Link]


def load_encoder_weights(encoder: Encoder | ThirdPartyEncoder, source: str | Path) -> WeightsReport:
    """Fill the encoder from a file, and say what was and was not used.

    Position grids and tables of relative positions are resampled to the encoder's size. Raises
    `UserError`, and leaves the encoder as it was, when the file cannot be read, another tensor has
    another shape, less than half of the encoder's parameters are in it, or the model in it is folded.
    """
    path = Path(source)
    read = read_weights(path)
    tensors = read.tensors
    if FOLDED in tensors:
        raise UserError(f"{path}: holds a folded model, for inference only; use the one it was made from")
    found = _recognise(encoder, tensors)
    share = _share(encoder, tensors, found)
    if share < LEAST_SHARE:
        raise UserError(f"{path}: holds {share:.0%} of this encoder's parameters; {_looks_like(tensors)}")
    state = encoder.state_dict()
    values: dict[str, Tensor] = {}
    missing: list[str] = []
    resampled: list[str] = []
    for link in found.links:
        name, own = found.prefix + link.theirs, link._replace(layout="same")
        if name not in tensors:
            missing += link.ours
            continue
        given, shape = tensors[name], own.write(state).shape
        # A linear layer may be disguised as a 1x1 convolution.
        value = given.flatten(1) if given.shape == (*shape, 1, 1) else given
        fitted = _resample(encoder, found.style, link.ours[0], value, shape)
        if fitted.shape != shape:
            raise UserError(
                f"{path}: `{name}` has shape {tuple(given.shape)}, the encoder needs {tuple(shape)}; "
                f"{_looks_like(tensors)}"
            )
        if fitted is not value:
            resampled.append(f"{link.theirs} {tuple(given.shape)} -> {tuple(shape)}")
        values |= own.read(fitted, state)

    encoder.load_state_dict(values, strict=False)
    used = {found.prefix + link.theirs for link in found.links}
    return WeightsReport(
        source=str(path),
        source_format=found.style,
        loaded=len(values),
        missing=tuple(missing),
        unexpected=tuple(name for name in tensors if name not in used),
        resampled=tuple(resampled),
        passed_over=read.passed_over,
        container=read.container,
    )


def export_encoder_weights(encoder: MiT, style: Naming) -> dict[str, Tensor]:
    """The encoder's tensors under the names, and in the shapes, of another project."""
    return written(mit_links(encoder, style), encoder.state_dict())


def _recognise(encoder: Encoder | ThirdPartyEncoder, tensors: Mapping[str, Tensor]) -> Recognised:
    """The style and prefix under which the file holds most of the encoder's tensors."""
    prefixes = sorted({prefix for name in tensors for prefix in _wrapper_prefixes(name)}) or [""]
    candidates = [Recognised(style, p, links) for style, links in _styles(encoder) for p in prefixes]
    return max(candidates, key=lambda c: sum(c.prefix + link.theirs in tensors for link in c.links))


def _share(encoder: Encoder | ThirdPartyEncoder, tensors: Mapping[str, Tensor], found: Recognised) -> float:
    """The part of the encoder's parameters whose names are in the file."""
    sizes = {name: parameter.numel() for name, parameter in encoder.named_parameters()}
    there = [link for link in found.links if found.prefix + link.theirs in tensors]
    return sum(sizes.get(name, 0) for link in there for name in link.ours) / sum(sizes.values())


def _styles(encoder: Encoder | ThirdPartyEncoder) -> Iterator[tuple[str, list[Link]]]:
    """Ways to name the encoder's tensors, and what each is called so."""
    names = list(encoder.state_dict())

    def renamed(rename: Callable[[str], str]) -> list[Link]:
        return [Link(rename(name), (name,)) for name in names]

    yield "segdeformer", renamed(str)
    if isinstance(encoder, MiT):
        yield from ((style, mit_links(encoder, style)) for style in STYLES)
        return
    third_party = isinstance(encoder, ThirdPartyEncoder)
    package = "segmentation_models_pytorch" if third_party else "timm"
    yield package, renamed(lambda name: name.removeprefix("backbone."))
    if third_party:
        # It keeps a timm model under `model`, and timm may have made a list of it: stages.0 is stages_0 then.
        prefix, item = "backbone.model.", re.compile(r"^([a-z]+)_(\d+)\.")
        yield "timm", renamed(lambda name: item.sub(r"\1.\2.", name.removeprefix(prefix)))


def _wrapper_prefixes(name: str) -> Iterator[str]:
    yield ""
    parts = name.split(".")
    for i, part in enumerate(parts[:-1]):
        if part not in WRAPPERS:
            return
        yield ".".join(parts[: i + 1]) + "."


def _resample(
    encoder: Encoder | ThirdPartyEncoder, style: str, name: str, value: Tensor, shape: torch.Size
) -> Tensor:
    """Fit position grids and tables of relative positions to the encoder's; return others as they are."""
    if not isinstance(encoder, TimmEncoder):
        return value
    if name.endswith("pos_embed") and value.ndim == len(shape) and value.shape[-1] == shape[-1]:
        return _resample_grid(encoder, style, value, shape)
    if name.endswith("relative_position_bias_table") and value.ndim == 2 and value.shape[1] == shape[1]:
        return _resample_table(encoder, name, value, shape)
    return value


def _resample_grid(encoder: TimmEncoder, style: str, value: Tensor, shape: torch.Size) -> Tensor:
    """Resample absolute positions bicubically. Files do not tell their grid: it is taken as square."""
    from timm.layers.pos_embed import resample_abs_pos_embed, resample_abs_pos_embed_nhwc

    if len(shape) == 4:
        return value if value.shape == shape else resample_abs_pos_embed_nhwc(value.float(), list(shape[1:3]))
    patch_embed: Any = getattr(encoder.backbone, "patch_embed", None)
    grid = getattr(patch_embed, "grid_size", None)
    if len(shape) != 3 or grid is None:
        return value
    tokens = shape[1] - grid[0] * grid[1]  # class and register tokens have no place in the grid
    side = math.isqrt(value.shape[1] - tokens)
    if side * side != value.shape[1] - tokens:
        return value
    # A square grid of our length may differ from ours, 16x16 from 8x32; our own files are right as they are.
    if value.shape == shape and (grid[0] == grid[1] or style == "segdeformer"):
        return value
    return resample_abs_pos_embed(value.float(), list(grid), [side, side], num_prefix_tokens=tokens)


def _resample_table(encoder: TimmEncoder, name: str, value: Tensor, shape: torch.Size) -> Tensor:
    """Resample a square window's table, one row per offset, bicubically to the encoder's window."""
    from timm.layers.pos_embed_rel import resize_rel_pos_bias_table_simple

    attention: Any = encoder.get_submodule(name.rpartition(".")[0])
    height, width = (2 * side - 1 for side in attention.window_size)
    tokens = shape[0] - height * width  # BEiT's rows for its class token come last
    side = math.isqrt(value.shape[0] - tokens)
    if value.shape == shape or side * side != value.shape[0] - tokens:
        return value
    return resize_rel_pos_bias_table_simple(value.float(), attention.window_size, tuple(shape))


def _looks_like(tensors: Mapping[str, Tensor]) -> str:
    """What model the file seems to be of, for an error."""
    shapes = {name: tuple(value.shape) for name, value in tensors.items()}
    for size_name, size in MIT_SIZES.items():
        with torch.device("meta"):
            mit = MiT(size)
        for style in STYLES:
            exported = export_encoder_weights(mit, style)
            for prefix in {prefix for name in shapes for prefix in _wrapper_prefixes(name)}:
                if all(shapes.get(prefix + name) == tuple(value.shape) for name, value in exported.items()):
                    return f"the file looks like `{size_name}` in {style} names"
    for telling, family in FAMILIES:
        if name := next((n for n in shapes if n.endswith(telling)), None):
            return f"the file looks like {family}: `{name}` has shape {shapes[name]}"
    return f"its first tensors are {', '.join(f'`{name}`' for name in list(shapes)[:3])}"

"""Encoder weights from files, whatever names their authors gave the tensors.

One table gives every MiT tensor its name in each published style; reading and exporting both use
it. Encoders of timm read files in timm's names. Nothing is dropped in silence: the report lists
what the file lacks and what it has too much.
"""

from __future__ import annotations

import math
import pickle
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from segdeformer.errors import UsageError, UserError
from segdeformer.models.encoders import Encoder, TimmEncoder
from segdeformer.models.mit import MIT_SIZES, MiT
from segdeformer.models.peers import PeerEncoder

# huggingface: transformers 4, and the files that any version of it writes.
# transformers5: what the modules are called inside transformers 5.
Style = Literal["nvlabs", "mmseg", "huggingface", "transformers5"]


class Names(NamedTuple):
    """One of our modules in the four styles. s counts stages from 1, i from 0."""

    ours: str
    nvlabs: str
    mmseg: str
    huggingface: str
    transformers5: str


# fmt: off
STAGE_NAMES = (
    Names("patch_embed.proj", "patch_embed{s}.proj", "layers.{i}.0.projection",
          "encoder.patch_embeddings.{i}.proj", "stages.{i}.patch_embeddings.proj"),
    Names("patch_embed.norm", "patch_embed{s}.norm", "layers.{i}.0.norm",
          "encoder.patch_embeddings.{i}.layer_norm", "stages.{i}.patch_embeddings.layer_norm"),
    Names("norm", "norm{s}", "layers.{i}.2", "encoder.layer_norm.{i}", "stages.{i}.layer_norm"),
)
BLOCK = Names("blocks.{j}", "block{s}.{j}", "layers.{i}.1.{j}",
              "encoder.block.{i}.{j}", "stages.{i}.blocks.{j}")
# A name that stands in several rows of a column is one tensor there: ours, concatenated in this order.
BLOCK_NAMES = (
    Names("norm1", "norm1", "norm1", "layer_norm_1", "layernorm_before"),
    Names("attention.query", "attn.q", "attn.attn.in_proj", "attention.self.query", "attention.q_proj"),
    Names("attention.key", "attn.kv", "attn.attn.in_proj", "attention.self.key", "attention.k_proj"),
    Names("attention.value", "attn.kv", "attn.attn.in_proj", "attention.self.value", "attention.v_proj"),
    Names("attention.proj", "attn.proj", "attn.attn.out_proj", "attention.output.dense", "attention.o_proj"),
    Names("attention.reduce", "attn.sr", "attn.sr", "attention.self.sr",
          "attention.sequence_reduction.sequence_reduction"),
    Names("attention.reduce_norm", "attn.norm", "attn.norm", "attention.self.layer_norm",
          "attention.sequence_reduction.layer_norm"),
    Names("norm2", "norm2", "norm2", "layer_norm_2", "layernorm_after"),
    Names("ffn.expand", "mlp.fc1", "ffn.layers.0", "mlp.dense1", "mlp.fc1"),
    Names("ffn.depthwise", "mlp.dwconv.dwconv", "ffn.layers.1", "mlp.dwconv.dwconv", "mlp.dwconv.dwconv"),
    Names("ffn.contract", "mlp.fc2", "ffn.layers.4", "mlp.dense2", "mlp.fc2"),
)
# fmt: on
STYLES: tuple[Style, ...] = ("nvlabs", "mmseg", "huggingface", "transformers5")

# A checkpoint keeps its weights under one of these, and training wrappers prepend the others to names.
CONTAINERS = ("state_dict", "model", "teacher")
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


class WeightsReport(NamedTuple):
    """What a file gave to an encoder. `missing` are our names, `unexpected` the file's."""

    source: str
    source_format: str
    loaded: int
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    resampled: tuple[str, ...]

    def lines(self) -> list[str]:
        """For the terminal: a summary, and a line for each list that is not empty."""
        lists = {
            "resampled to this size": self.resampled,
            "missing in the file, left as initialised": self.missing,
            "in the file but not used": self.unexpected,
        }
        summary = f"encoder weights: {self.loaded} tensors from {self.source} ({self.source_format} names)"
        return [summary, *(f"  {title}: {', '.join(names)}" for title, names in lists.items() if names)]


class Recognised(NamedTuple):
    """A naming style that fits a file. `names`: the file's name without prefix -> ours, in order."""

    style: str
    prefix: str
    names: dict[str, list[str]]


def load_encoder_weights(encoder: Encoder | PeerEncoder, source: str | Path) -> WeightsReport:
    """Fill the encoder from a .safetensors, .pth, .pt or .bin file, and say what was and was not used.

    Position grids and tables of relative positions are resampled to the encoder's size. Raises
    `UserError`, and leaves the encoder as it was, when the file cannot be read, another tensor has
    another shape, less than half of the encoder's parameters are in it, or the model in it is folded.
    """
    path = Path(source)
    tensors = read_tensors(path)
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
    for theirs, ours in found.names.items():
        given = tensors.get(found.prefix + theirs)
        if given is None:
            missing += ours
            continue
        parts = [state[name] for name in ours]
        rows = [p.shape[0] for p in parts] if len(parts) > 1 else None
        shape = torch.Size([sum(rows), *parts[0].shape[1:]]) if rows else parts[0].shape
        value = _as_linear(given, shape)
        fitted = _resample(encoder, found.style, ours[0], value, shape)
        if fitted.shape != shape:
            raise UserError(
                f"{path}: `{found.prefix}{theirs}` has shape {tuple(given.shape)}, the encoder needs "
                f"{tuple(shape)}; {_looks_like(tensors)}"
            )
        if fitted is not value:
            resampled.append(f"{theirs} {tuple(given.shape)} -> {tuple(shape)}")
        values.update(zip(ours, torch.split(fitted, rows) if rows else [fitted], strict=True))

    encoder.load_state_dict(values, strict=False)
    used = {found.prefix + theirs for theirs in found.names}
    return WeightsReport(
        source=str(path),
        source_format=found.style,
        loaded=len(values),
        missing=tuple(missing),
        unexpected=tuple(name for name in tensors if name not in used),
        resampled=tuple(resampled),
    )


def export_encoder_weights(encoder: MiT, style: Style) -> dict[str, Tensor]:
    """The encoder's tensors under the names, and in the shapes, of another project."""
    state = encoder.state_dict()
    exported = {}
    for theirs, ours in mit_names(encoder, style).items():
        value = torch.cat([state[name] for name in ours])
        # mmsegmentation writes the linear layers of the Mix-FFN as 1x1 convolutions.
        exported[theirs] = value[:, :, None, None] if ".ffn." in theirs and value.ndim == 2 else value
    return exported


def mit_names(encoder: MiT, style: Style) -> dict[str, list[str]]:
    """Names in `style` of all tensors of a MiT, each with our names of its parts."""
    stage_rows = {row.ours: getattr(row, style) for row in STAGE_NAMES}
    block_rows = {row.ours: f"{getattr(BLOCK, style)}.{getattr(row, style)}" for row in BLOCK_NAMES}
    names: dict[str, list[str]] = {}
    for ours in encoder.state_dict():
        _, stage, *middle, kind = ours.split(".")
        module = ".".join(middle)
        block = re.fullmatch(r"blocks\.(\d+)\.(.+)", module)
        template = block_rows[block[2]] if block else stage_rows[module]
        theirs = template.format(i=stage, s=int(stage) + 1, j=block and block[1])
        separator = "_" if theirs.endswith("in_proj") else "."
        names.setdefault(f"{theirs}{separator}{kind}", []).append(ours)
    return names


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a weights file, out of their containers, under the names they have there."""
    if not path.is_file():
        kind = "is a folder: name the file in it" if path.is_dir() else "no such weights file"
        raise UserError(f"{path}: {kind}")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    if path.suffix not in {".pth", ".pt", ".bin"}:
        raise UsageError(f"{path}: weights must be a .safetensors, .pth, .pt or .bin file")
    content = _read_pickle(path)
    while container := next((c for c in CONTAINERS if isinstance(content.get(c), Mapping)), None):
        content = content[container]
    return {name: value for name, value in content.items() if isinstance(value, Tensor)}


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: damaged or no safetensors file ({_first_line(error)})") from error


def _read_pickle(path: Path) -> Mapping[str, Any]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        foreign = re.search(r"GLOBAL (\S+) was not an allowed global", str(error))
        if foreign is None:
            raise UserError(f"{path}: damaged or no PyTorch file") from error
        raise UserError(
            f"{path}: holds objects of `{foreign[1]}`, which could run code when read; "
            "save its state_dict alone, and use that"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise UserError(f"{path}: damaged or no PyTorch file ({_first_line(error)})") from error
    if not isinstance(content, Mapping):
        raise UserError(f"{path}: holds a {type(content).__name__}, not a dict of tensors")
    return content


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__


def _recognise(encoder: Encoder | PeerEncoder, tensors: Mapping[str, Tensor]) -> Recognised:
    """The style and prefix under which the file holds most of the encoder's tensors."""
    prefixes = sorted({prefix for name in tensors for prefix in _wrapper_prefixes(name)}) or [""]
    styles = _styles(encoder)
    candidates = [Recognised(style, prefix, names) for style, names in styles for prefix in prefixes]
    return max(candidates, key=lambda c: sum(c.prefix + name in tensors for name in c.names))


def _share(encoder: Encoder | PeerEncoder, tensors: Mapping[str, Tensor], found: Recognised) -> float:
    """The part of the encoder's parameters whose names are in the file."""
    sizes = {name: parameter.numel() for name, parameter in encoder.named_parameters()}
    named = [
        ours for theirs, names in found.names.items() if found.prefix + theirs in tensors for ours in names
    ]
    return sum(sizes.get(name, 0) for name in named) / sum(sizes.values())


def _styles(encoder: Encoder | PeerEncoder) -> Iterator[tuple[str, dict[str, list[str]]]]:
    names = list(encoder.state_dict())
    yield "segdeformer", {name: [name] for name in names}
    if isinstance(encoder, TimmEncoder):
        yield "timm", {name.removeprefix("backbone."): [name] for name in names}
    elif isinstance(encoder, PeerEncoder):
        yield from _peer_styles(names)
    else:
        for style in STYLES:
            yield style, mit_names(encoder, style)


def _peer_styles(names: list[str]) -> Iterator[tuple[str, dict[str, list[str]]]]:
    yield "segmentation_models_pytorch", {name.removeprefix("backbone."): [name] for name in names}
    # It keeps a timm model under `model`, and timm may have made a list of it: stages.0 is stages_0 then.
    timm_names = {name: name.removeprefix("backbone.model.") for name in names}
    yield (
        "timm",
        {re.sub(r"^([a-z]+)_(\d+)\.", r"\1.\2.", theirs): [name] for name, theirs in timm_names.items()},
    )


def _wrapper_prefixes(name: str) -> Iterator[str]:
    yield ""
    parts = name.split(".")
    for i, part in enumerate(parts[:-1]):
        if part not in WRAPPERS:
            return
        yield ".".join(parts[: i + 1]) + "."


def _as_linear(value: Tensor, shape: torch.Size) -> Tensor:
    """Undo a linear layer's disguise as a 1x1 convolution."""
    return value.flatten(1) if value.shape == (*shape, 1, 1) else value


def _resample(
    encoder: Encoder | PeerEncoder, style: str, name: str, value: Tensor, shape: torch.Size
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
    attention: Any = encoder.get_submodule(name.rpartition(".")[0])
    height, width = (2 * side - 1 for side in attention.window_size)
    tokens = shape[0] - height * width  # BEiT's rows for its class token come last
    side = math.isqrt(value.shape[0] - tokens)
    if value.shape == shape or side * side != value.shape[0] - tokens:
        return value
    grid = value[: side * side].float().T.reshape(1, -1, side, side)
    grid = F.interpolate(grid, (height, width), mode="bicubic", align_corners=False)
    return torch.cat([grid[0].flatten(1).T, value[side * side :].float()])


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
    if not shapes:
        return "there is no tensor in the file"
    return f"its first tensors are {', '.join(f'`{name}`' for name in list(shapes)[:3])}"

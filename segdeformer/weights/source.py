"""Read a model file of another project: its tensors, and what it says of classes, settings, normalisation."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_args

from torch import Tensor

from segdeformer.data.classes import is_color
from segdeformer.errors import UsageError, UserError
from segdeformer.weights.checkpoint import METADATA_KEY
from segdeformer.weights.files import read_weights
from segdeformer.weights.names import PROJECT_TITLES, Project

AVERAGED = re.compile("ema|teacher|averaged|imnet")  # in the prefix of a second copy of the model
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")

# What tells the projects apart, after a prefix.
MARKS: tuple[tuple[str, Project], ...] = (
    ("decode_head.linear_c4.proj.weight", "nvlabs"),
    ("decode_head.linear_c.0.proj.weight", "huggingface"),
    ("decode_head.linear_projections.0.proj.weight", "huggingface"),
    ("decode_head.fusion_conv.conv.weight", "mmseg"),
    ("decode_head.fpn_bottleneck.conv.weight", "mmseg"),
)


class Source(NamedTuple):
    """One model out of a file.

    tensors: by name, without `prefix`. aside: names in the file that belong to no or another copy of it.
    passed_over: classes of objects in the file that were not read. huggingface_config: config.json's content.
    """

    path: Path
    project: Project
    container: str | None
    prefix: str
    tensors: dict[str, Tensor]
    aside: tuple[str, ...]
    passed_over: tuple[str, ...]
    class_names: tuple[str, ...] | None
    class_colors: tuple[tuple[int, int, int], ...] | None
    iteration: int
    mean_std: tuple[tuple[float, ...], tuple[float, ...]] | None  # RGB, 0 to 255
    license: str | None  # that the file states
    huggingface_config: Mapping[str, Any] | None


def read_source(path: Path, *, project: Project | None = None, prefix: str | None = None) -> Source:
    """Read a file, or a folder of Hugging Face.

    project: what it must be from; None recognises it. prefix: which of several copies of the model to take;
    None takes the one that is no running average. Raises `UserError` when it cannot be read or holds no whole
    model.
    """
    folder = path if path.is_dir() else None
    files = [path / name for name in WEIGHT_FILES if (path / name).is_file()] if folder else [path]
    if not files:
        raise UserError(f"{folder} holds neither {' nor '.join(WEIGHT_FILES)}; name a model file")
    file = files[0]
    read = read_weights(file)
    if METADATA_KEY in read.meta:
        raise UsageError(
            f"{file} is a checkpoint of segdeformer already; to write it for another project, add "
            f"--to {'|'.join(get_args(Project))}"
        )
    # What stands before `decode_head.` in the names, once for each copy of the model.
    found = (re.match(r"((?:[^.]+\.)*?)decode_head\.", name) for name in read.tensors)
    prefixes = list(dict.fromkeys(match[1] for match in found if match))
    prefix = _choose_prefix(file, read.tensors, prefixes, prefix)
    others = tuple(other for other in prefixes if other != prefix and other.startswith(prefix))
    chosen = {name for name in read.tensors if name.startswith(prefix) and not name.startswith(others)}
    tensors = {name.removeprefix(prefix): t for name, t in read.tensors.items() if name in chosen}
    recognised = _recognise(file, tensors)
    if project is not None and recognised != project:
        raise UsageError(
            f"{path}: --from {project}, but its names are those of {PROJECT_TITLES[recognised]} "
            f"({recognised}); leave out --from, or name another file"
        )
    config = _json(folder / "config.json") if folder else None
    names, colors = _classes(read.meta, config)
    iteration = read.meta.get("iter")
    license_text = read.meta.get("license") or (config or {}).get("license")
    return Source(
        path=path,
        project=recognised,
        container=read.container,
        prefix=prefix,
        tensors=tensors,
        aside=tuple(name for name in read.tensors if name not in chosen),
        passed_over=read.passed_over,
        class_names=names,
        class_colors=colors,
        iteration=iteration if type(iteration) is int and iteration >= 0 else 0,
        mean_std=_normalisation(tensors, folder),
        license=license_text if isinstance(license_text, str) else None,
        huggingface_config=config,
    )


def _choose_prefix(path: Path, tensors: Mapping[str, Tensor], prefixes: list[str], wanted: str | None) -> str:
    """The prefix of the copy to take."""
    if wanted is not None:
        wanted = wanted if not wanted or wanted.endswith(".") else f"{wanted}."
        if wanted not in prefixes:
            raise UsageError(f"--prefix {wanted}: {path} has {_quoted(prefixes)} before `decode_head.`")
        return wanted
    if prefixes:
        return min(prefixes, key=lambda p: (bool(AVERAGED.search(p)), len(p)))
    raise UserError(
        f"{path}: holds no `decode_head.`, so it is no whole segmentation model "
        f"({_quoted(list(tensors)[:3])}, ...); for encoder weights use `segdeformer train --weights FILE`"
    )


def _recognise(path: Path, tensors: Mapping[str, Tensor]) -> Project:
    for mark, project in MARKS:
        if mark in tensors:
            return project
    heads = [name for name in tensors if name.startswith("decode_head.")]
    raise UserError(
        f"{path}: its decode head ({_quoted(heads[:3])}, ...) is neither SegFormer's (NVlabs, "
        "mmsegmentation, Hugging Face) nor UperNet's (mmsegmentation)"
    )


def _quoted(names: Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _json(path: Path) -> Mapping[str, Any] | None:
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error})") from None
    return values if isinstance(values, Mapping) else None


def _classes(
    meta: Mapping[str, Any], config: Mapping[str, Any] | None
) -> tuple[tuple[str, ...] | None, tuple[tuple[int, int, int], ...] | None]:
    """Names and colours: CLASSES and PALETTE (mmsegmentation 0.x), `dataset_meta` (1.x), `id2label`."""
    if config is not None:
        labels = config.get("id2label")
        if not isinstance(labels, Mapping) or not all(str(index).isdigit() for index in labels):
            return None, None
        if any(label == f"LABEL_{index}" for index, label in labels.items()):  # Hugging Face's for no name
            return None, None
        return tuple(str(labels[key]) for key in sorted(labels, key=int)), None
    data = meta.get("dataset_meta")
    values = data if isinstance(data, Mapping) else {str(k).lower(): v for k, v in meta.items()}
    names, palette = values.get("classes"), values.get("palette")
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        return None, None
    if not isinstance(palette, list | tuple) or len(palette) != len(names) or not all(map(is_color, palette)):
        return tuple(names), None
    return tuple(names), tuple((red, green, blue) for red, green, blue in palette)


def _normalisation(
    tensors: Mapping[str, Tensor], folder: Path | None
) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """What images are normalised by, from mmsegmentation 1.x' preprocessor or Hugging Face's."""
    mean, std = tensors.get("data_preprocessor.mean"), tensors.get("data_preprocessor.std")
    if mean is not None and std is not None and mean.numel() == std.numel() == 3:
        return tuple(mean.flatten().tolist()), tuple(std.flatten().tolist())
    config = _json(folder / "preprocessor_config.json") if folder else None
    given = [(config or {}).get(key) for key in ("image_mean", "image_std")]
    mean_std = [
        tuple(round(255 * float(value), 6) for value in values)  # 0.485 * 255 is 123.675 but for the last bit
        for values in given
        if isinstance(values, list) and len(values) == 3 and all(isinstance(v, int | float) for v in values)
    ]
    return (mean_std[0], mean_std[1]) if len(mean_std) == 2 else None

"""Read a file of weights, whoever wrote it, without running any code of it.

Training checkpoints hold more than tensors: logs, settings, arrays, as objects of their project's classes,
which PyTorch's restricted reader refuses. An inert stand-in takes the place of each; nothing is imported.
"""

from __future__ import annotations

import pickle
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from segdeformer.errors import UsageError, UserError
from segdeformer.weights.signatures import failed_download

# Where tensors are looked for: the first that has any, else the dict with most tensors.
# mmengine puts the averaged weights into `state_dict`, the others into `ema_state_dict`: the first is right.
CONTAINERS = (
    "state_dict",
    "model_state_dict",
    "model",
    "network",
    "net",
    "state_dict_ema",
    "ema_state_dict",
    "model_ema",
    "ema",
    "teacher",
    "student",
)
DEEPEST = 5  # dicts inside one another
MOST_KEYS_SHOWN = 6
FOREIGN = re.compile(r"GLOBAL (\S+) was not an allowed global")
REFUSED = ("Can only", "is blocked", "unrecognized function")  # the reader's words where no stand-in helps
MOST_FOREIGN = 100  # names; a file with more is no checkpoint


class StandIn:
    """Takes any arguments and any state, keeps nothing."""

    def __new__(cls, *arguments: Any, **options: Any) -> StandIn:
        return super().__new__(cls)

    def __init__(self, *arguments: Any, **options: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


class WeightsFile(NamedTuple):
    """What is in a file, out of its containers.

    container: where the tensors are, such as `model_ema` or `ema.module`. passed_over: full names of objects
    that were not read. meta: what the file says beside its tensors.
    """

    tensors: dict[str, Tensor]
    container: str | None
    passed_over: tuple[str, ...]
    meta: Mapping[str, Any]


def read_weights(path: Path) -> WeightsFile:
    """Read a .safetensors, .pth, .pt, .bin or .ckpt file.

    Raises `UserError` when it is not there, is damaged, holds no dict or no tensor, or could only be read by
    running its code; `UsageError` for another ending.
    """
    if not path.is_file():
        kind = "is a folder: name the file in it" if path.is_dir() else "no such file or folder"
        raise UserError(f"{path}: {kind}")
    if (instead := failed_download(path)) is not None:
        raise UserError(f"{path}: {instead}")
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, "pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                meta = file.metadata() or {}
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path}: damaged or no safetensors file ({error})") from error
        if not tensors:
            raise UserError(_no_tensor(path, tensors))
        return WeightsFile(tensors, None, (), meta)
    if path.suffix not in {".pth", ".pt", ".bin", ".ckpt"}:
        raise UsageError(f"{path}: must be a .safetensors, .pth, .pt, .bin or .ckpt file")
    content, passed_over = _read_pickle(path)
    meta = content.get("meta")
    places = _containers(content)
    inner = content
    for name in places:
        inner = inner[name]
    tensors = {str(name): value for name, value in inner.items() if isinstance(value, Tensor)}
    if not tensors:
        raise UserError(_no_tensor(path, content))
    container = ".".join(map(str, places)) or None
    return WeightsFile(tensors, container, passed_over, meta if isinstance(meta, Mapping) else {})


def _containers(content: Mapping[Any, Any]) -> tuple[Any, ...]:
    """The keys that lead to the tensors: by the names of `CONTAINERS`, else to the dict with most of them."""
    places: tuple[Any, ...] = ()
    while len(places) < DEEPEST:
        known = (name for name in CONTAINERS if isinstance(content.get(name), Mapping))
        name = next((name for name in known if _most_tensors(content[name]).num_tensors), None)
        if name is None:
            break
        content, places = content[name], (*places, name)
    return places + _most_tensors(content).places


class _Dict(NamedTuple):
    num_tensors: int  # of the tensors that are directly in it
    places: tuple[Any, ...]  # keys that lead to it


def _most_tensors(content: Mapping[Any, Any], depth: int = 0) -> _Dict:
    """The dict with most tensors, the outermost of equals."""
    best = _Dict(sum(isinstance(value, Tensor) for value in content.values()), ())
    for name, value in content.items():
        if isinstance(value, Mapping) and depth < DEEPEST:
            found = _most_tensors(value, depth + 1)
            if found.num_tensors > best.num_tensors:
                best = _Dict(found.num_tensors, (name, *found.places))
    return best


def _no_tensor(path: Path, content: Mapping[Any, Any]) -> str:
    keys = [f"`{name}`" for name in content]
    shown = ", ".join(keys[:MOST_KEYS_SHOWN]) + (", ..." if len(keys) > MOST_KEYS_SHOWN else "")
    has = f"its keys are {shown}" if keys else "its dict is empty"
    return f"{path}: there is no tensor in the file, {has}; save a state_dict of the model, and use that"


def _read_pickle(path: Path) -> tuple[Mapping[str, Any], tuple[str, ...]]:
    """The dict in a file, with stand-ins for everything but tensors and plain values, and their names."""
    passed_over: list[str] = []
    while True:
        allowed: list[Any] = [(StandIn, name) for name in passed_over]
        try:
            with warnings.catch_warnings(action="ignore"), torch.serialization.safe_globals(allowed):
                content = torch.load(path, map_location="cpu", weights_only=True)
            break
        except pickle.UnpicklingError as error:
            passed_over.append(_next_foreign(path, error, passed_over))
        except Exception as error:  # a damaged pickle may do anything that its reader's few commands can
            reason = str(error).strip().split("\n")[0] or type(error).__name__
            raise UserError(f"{path}: damaged or no PyTorch file ({reason})") from error
    if isinstance(content, StandIn):
        raise UserError(
            f"{path}: holds an object of `{passed_over[0]}`, not a dict of tensors, and making it would run "
            "code; save its state_dict, and use that"
        )
    if not isinstance(content, Mapping):
        raise UserError(f"{path}: holds a {type(content).__name__}, not a dict of tensors")
    return content, tuple(passed_over)


def _next_foreign(path: Path, error: pickle.UnpicklingError, known: list[str]) -> str:
    """The name that the reader stopped at; raises `UserError` where no stand-in helps."""
    message = str(error)
    if found := FOREIGN.search(message):
        name = found[1] if "." in found[1] else f"builtins.{found[1]}"  # the reader drops `builtins.`
        if name not in known and len(known) < MOST_FOREIGN:
            return name
    elif not any(words in message for words in REFUSED):
        raise UserError(f"{path}: damaged or no PyTorch file") from error
    holds = f" of {', '.join(f'`{name}`' for name in known[:3])}" if known else ""
    raise UserError(
        f"{path}: holds objects{holds} that cannot be passed over, and reading them could run code; "
        "save its state_dict alone, and use that"
    ) from error

"""Read a file of weights, whoever wrote it, without running any code of it.

Training checkpoints hold more than tensors: logs, settings, arrays, as objects of their project's classes,
which PyTorch's restricted reader refuses. An inert stand-in takes the place of each; nothing is imported.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from segdeformer.errors import UsageError, UserError

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

    container: the innermost one. passed_over: full names of objects that were not read. meta: what the file
    says beside its tensors.
    """

    tensors: dict[str, Tensor]
    container: str | None
    passed_over: tuple[str, ...]
    meta: Mapping[str, Any]


def read_weights(path: Path) -> WeightsFile:
    """Read a .safetensors, .pth, .pt, .bin or .ckpt file.

    Raises `UserError` when it is not there, is damaged, holds no dict, or could only be read by running its
    code; `UsageError` for another ending.
    """
    if not path.is_file():
        kind = "is a folder: name the file in it" if path.is_dir() else "no such file or folder"
        raise UserError(f"{path}: {kind}")
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, "pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                return WeightsFile(tensors, None, (), file.metadata() or {})
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path}: damaged or no safetensors file ({error})") from error
    if path.suffix not in {".pth", ".pt", ".bin", ".ckpt"}:
        raise UsageError(f"{path}: must be a .safetensors, .pth, .pt, .bin or .ckpt file")
    content, passed_over = _read_pickle(path)
    meta, container = content.get("meta"), None
    while inner := next((c for c in CONTAINERS if isinstance(content.get(c), Mapping)), None):
        content, container = content[inner], inner
    tensors = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
    return WeightsFile(tensors, container, passed_over, meta if isinstance(meta, Mapping) else {})


def _read_pickle(path: Path) -> tuple[Mapping[str, Any], tuple[str, ...]]:
    """The dict in a file, with stand-ins for everything but tensors and plain values, and their names."""
    passed_over: list[str] = []
    while True:
        allowed: list[Any] = [(StandIn, name) for name in passed_over]
        try:
            with torch.serialization.safe_globals(allowed):
                content = torch.load(path, map_location="cpu", weights_only=True)
            break
        except pickle.UnpicklingError as error:
            passed_over.append(_next_foreign(path, error, passed_over))
        except (RuntimeError, EOFError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
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

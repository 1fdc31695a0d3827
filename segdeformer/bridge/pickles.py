"""Read a PyTorch file of another project without running any code of it.

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

from segdeformer.errors import UserError

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


class Unpickled(NamedTuple):
    content: Mapping[str, Any]
    passed_over: tuple[str, ...]  # full names of what became a stand-in


def read_foreign_pickle(path: Path) -> Unpickled:
    """The dict in a .pth, .pt or .bin file, with stand-ins for everything but tensors and plain values.

    Raises `UserError` when the file is damaged, holds no dict, or could only be read by running its code.
    """
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
            "code; save its state_dict, and convert that"
        )
    if not isinstance(content, Mapping):
        raise UserError(f"{path}: holds a {type(content).__name__}, not a dict of tensors")
    return Unpickled(content, tuple(passed_over))


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
        "save its state_dict alone, and convert that"
    ) from error

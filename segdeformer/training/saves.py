"""The checkpoints of a run: a folder each, whole or absent, of which the last few are kept.

    RUN/checkpoints/iteration-004000/model.safetensors   weights, recipe and classes (see `checkpoint`)
    RUN/checkpoints/iteration-004000/training.pt         what else a resumed run needs: plain values, tensors
    RUN/checkpoints/iteration-004000/SHA256SUMS          for `sha256sum -c`
    RUN/last.safetensors                                 another name of the newest model.safetensors

A folder is written as `.writing-...` and renamed, and renamed to `.deleting-...` before it is removed: a kill
at any moment leaves only whole folders under their own names.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from segdeformer.errors import UserError
from segdeformer.files import WriteError, clear_asides, link, reason_of, sync
from segdeformer.weights.checkpoint import LAST, MODEL, file_sha256

CHECKPOINTS = "checkpoints"
TRAINING, SUMS, LOCK = "training.pt", "SHA256SUMS", ".lock"
NAME = re.compile(r"iteration-(\d+)(?:\.(\d+))?")
WRITING, DELETING, DAMAGED = ".writing-", ".deleting-", "damaged-"
MIB = 2**20

State = dict[str, Any]  # tensors, numbers, strings, None, and lists, tuples and dicts of them


class Damage(NamedTuple):
    """A checkpoint that is not what was written."""

    folder: Path
    reason: str

    @property
    def warning(self) -> str:
        return f"{self.folder} is damaged ({self.reason}) and skipped; going on from the one before it"


class Stored(NamedTuple):
    """A whole checkpoint, and the damaged ones that are newer."""

    folder: Path
    iteration: int
    damaged: tuple[Damage, ...] = ()

    @property
    def model(self) -> Path:
        return self.folder / MODEL

    @property
    def warnings(self) -> list[str]:
        """A line for each damaged one."""
        return [damage.warning for damage in self.damaged]


def store(
    run: Path, *, iteration: int, write_model: Callable[[Path], None], state: State, keep: int = 2
) -> Path:
    """Write a checkpoint, give it the name `last.safetensors` too, and keep the `keep` newest.

    write_model: writes model.safetensors, at the path that it is given.
    Checkpoints of later iterations, left from before the run went back, are removed. Returns the folder.
    Raises `UserError`, with every earlier checkpoint still there, when the disk is full.
    """
    checkpoints = run / CHECKPOINTS
    aside = checkpoints / f"{WRITING}{iteration:06d}-{os.getpid()}"
    try:
        checkpoints.mkdir(parents=True, exist_ok=True)
        _remove(aside)
        aside.mkdir()
        write_model(aside / MODEL)
        _write_state(aside / TRAINING, state)
        _write_sums(aside)
        sync(aside)
        folder = _free_name(checkpoints, iteration)
        aside.rename(folder)
        sync(checkpoints)
        sync(run)
    except (WriteError, OSError) as error:
        own_bytes = _folder_bytes(aside, MODEL) + _tensor_bytes(state)
        needed_bytes = max(own_bytes, *map(_folder_bytes, _saved(run)), 0)
        _remove(aside)
        reason = error.reason if isinstance(error, WriteError) else reason_of(error)
        raise UserError(_refusal(run, iteration, reason, needed_bytes)) from None
    except BaseException:
        _remove(aside)
        raise
    link(folder / MODEL, run / LAST)
    saved = _saved(run)
    place = saved.index(folder)
    same = [other for other in saved[place + 1 :] if _key(other)[0] == iteration]
    earlier = [other for other in saved[place + 1 :] if other not in same]
    for old in (*saved[:place], *same, *earlier[keep - 1 :], *checkpoints.glob(f"{DAMAGED}*")):
        _drop(old)
    return folder


def newest(run: Path) -> Stored | None:
    """The newest whole checkpoint of a run, None if it has none at all. Reads all of it; changes nothing.

    Raises `UserError` when there are some but none is whole, or when an earlier version wrote them.
    """
    damaged: list[Damage] = []
    for folder in _saved(run):
        reason = _damage(folder)
        if reason is None:
            return Stored(folder, _key(folder)[0], tuple(damaged))
        damaged.append(Damage(folder, reason))
    if damaged:
        found = "; ".join(f"{damage.folder.name}: {damage.reason}" for damage in damaged)
        raise UserError(f"{run}: no checkpoint is whole ({found}); start anew with another --out")
    if any(run.glob("state-*.pt")):
        raise UserError(
            f"{run} was written by segdeformer 0.1.0, whose runs this version cannot go on with; "
            "its weights can be evaluated still; start anew with another --out"
        )
    return None


def read_state(stored: Stored) -> State:
    """What the run gave to `store` beside the model; tensors on the CPU."""
    path = stored.folder / TRAINING
    try:
        state: State = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError, KeyError, pickle.UnpicklingError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"{path} cannot be read ({reason}); was it written by another version?") from None
    return state


def tidy(run: Path, stored: Stored | None) -> None:
    """Clear what killed processes left, before this one writes; for the one process that will.

    Damaged checkpoints newer than `stored` get a name that is no checkpoint's; the next `store` removes them.
    """
    if not run.is_dir():
        return
    checkpoints = run / CHECKPOINTS
    try:
        clear_asides(run)
        for prefix in (WRITING, DELETING):
            for left in checkpoints.glob(f"{prefix}*"):
                _remove(left)
        if stored is None:
            return
        for damage in stored.damaged:
            _remove(checkpoints / f"{DAMAGED}{damage.folder.name}")
            damage.folder.rename(checkpoints / f"{DAMAGED}{damage.folder.name}")
        last = run / LAST
        if not (last.is_file() and last.samefile(stored.model)):  # killed before it was linked, or damaged
            link(stored.model, last)
    except OSError as error:
        raise UserError(f"{run}: cannot be written ({reason_of(error)}); mend its permissions") from None


@contextlib.contextmanager
def held(run: Path) -> Iterator[None]:
    """Hold the run folder for this process; raises `UserError` while another one holds it.

    The system lets go when the process ends, however it ends. Where there are no locks, nothing is held.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    path = run / LOCK
    try:
        run.mkdir(parents=True, exist_ok=True)
        file = path.open("a+")
    except OSError as error:
        raise WriteError(path, reason_of(error)) from None
    with file:
        # A lock that children do not inherit: a loader's worker may outlive a killed parent for seconds.
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{run} is in use by another process that trains; choose another --out") from None
        except OSError:  # a file system without locks
            pass
        yield


def _saved(run: Path) -> list[Path]:
    """The checkpoints, whole or damaged, newest first."""
    folders = [path for path in run.glob(f"{CHECKPOINTS}/*") if NAME.fullmatch(path.name)]
    return sorted(folders, key=_key, reverse=True)


def _key(folder: Path) -> tuple[int, int]:
    """Iteration, and how often it was saved before."""
    match = NAME.fullmatch(folder.name)
    assert match is not None
    return int(match[1]), int(match[2] or 0)


def _free_name(checkpoints: Path, iteration: int) -> Path:
    """The name of this iteration, with a number where it is taken (the old one goes later)."""
    name = f"iteration-{iteration:06d}"
    taken = [_key(folder)[1] for folder in _saved(checkpoints.parent) if _key(folder)[0] == iteration]
    return checkpoints / (f"{name}.{max(taken) + 1}" if taken else name)


def _write_state(path: Path, state: State) -> None:
    try:
        with path.open("wb") as file:
            torch.save(state, file)
    except RuntimeError as error:  # the writer fails once more when it is closed
        cause = error.__context__
        while cause is not None and not isinstance(cause, OSError):
            cause = cause.__context__
        raise cause or error from None
    sync(path)


def _write_sums(folder: Path) -> None:
    path = folder / SUMS
    path.write_text("".join(f"{file_sha256(folder / name)}  {name}\n" for name in (MODEL, TRAINING)), "ascii")
    sync(path)


def _damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, if something is."""
    name = SUMS
    try:
        lines = (folder / SUMS).read_text("ascii").splitlines()
        sums = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
        if set(sums) != {MODEL, TRAINING}:
            return f"{SUMS} is cut off"
        for name, digest in sums.items():
            if file_sha256(folder / name) != digest:
                return f"{name} is not what was written"
    except FileNotFoundError:
        return f"{name} is missing"
    except UnicodeDecodeError:
        return f"{SUMS} is not what was written"
    except OSError as error:
        return f"{name} cannot be read: {reason_of(error)}"
    return None


def _drop(folder: Path) -> None:
    """Remove a checkpoint; what is left of it after a kill does not look like one."""
    going = folder.with_name(f"{DELETING}{folder.name}-{os.getpid()}")
    with contextlib.suppress(OSError):  # a checkpoint too many is no reason to stop
        folder.rename(going)
    _remove(going)


def _remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)


def _folder_bytes(folder: Path, names: str = "*") -> int:
    return sum(path.stat().st_size for path in folder.glob(names))


def _tensor_bytes(value: object) -> int:
    if isinstance(value, Tensor):
        return value.nbytes
    if isinstance(value, Mapping):
        return sum(map(_tensor_bytes, value.values()))
    if isinstance(value, list | tuple):
        return sum(map(_tensor_bytes, value))
    return 0


def _refusal(run: Path, iteration: int, reason: str, needed_bytes: int) -> str:
    free = "an unknown number of MiB"
    with contextlib.suppress(OSError):
        free = f"{shutil.disk_usage(run).free / MIB:,.1f} MiB"
    saved = _saved(run)
    kept = f"that of iteration {_key(saved[0])[0]:,} is kept" if saved else "there is none before it"
    return (
        f"{run}: the checkpoint of iteration {iteration:,} cannot be written ({reason}); it takes at least "
        f"{needed_bytes / MIB:,.1f} MiB, {free} are free; {kept}: make room and go on with --resume"
    )

"""Files that are whole or absent: written aside, then renamed."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from segdeformer.errors import UserError

ASIDE = re.compile(r"\..+\.\d+\.tmp")
# Answers of `link` where the file system has no links, or none between these places.
NO_LINKS = (
    errno.EPERM,
    errno.EOPNOTSUPP,
    errno.ENOSYS,
    errno.EXDEV,
    errno.EMLINK,
)  # there, or there any more


class WriteError(UserError):
    """A file could not be written, mostly because the disk is full; what was there before still is."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{path}: cannot be written ({reason}); free space or choose another place")
        self.reason = reason


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary path beside `path`; on success it becomes `path`, on any error it is removed.

    An `OSError` (no space, no permission) becomes a `WriteError`, a `UserError` that names the file.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield aside
        aside.chmod(0o666 & ~_umask())  # some writers make their files readable to the owner only
        sync(aside)
        aside.replace(path)
    except OSError as error:
        raise WriteError(path, reason_of(error)) from None
    finally:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)  # there is no way to read it without setting it
    os.umask(mask)
    return mask


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text, whole or not at all; `?` for bytes of file names that are no UTF-8."""
    with replacing(path) as aside:
        aside.write_text(text, "utf-8", errors="replace")


def write_json(path: Path, values: object) -> None:
    """Write values as indented JSON, whole or not at all."""
    write_text(path, json.dumps(values, indent=2) + "\n")


def link(source: Path, path: Path) -> None:
    """Make `path` another name of the file `source`; a copy where the file system has no links."""
    with replacing(path) as aside:
        aside.unlink(missing_ok=True)
        try:
            os.link(source, aside)
        except OSError as error:
            if error.errno not in NO_LINKS:
                raise
            shutil.copy2(source, aside)  # with its time, as a link has it


def clear_asides(folder: Path) -> None:
    """Remove what killed processes left of `replacing` in this folder; nobody may be writing there."""
    for path in folder.iterdir():
        if ASIDE.fullmatch(path.name):
            path.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    except OSError as error:
        # some network file systems cannot do it for folders
        if not (path.is_dir() and error.errno in (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS)):
            raise
    finally:
        os.close(file)


def reason_of(error: OSError) -> str:
    return error.strerror or str(error)

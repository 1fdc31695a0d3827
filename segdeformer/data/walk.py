"""The files below a folder, found by the same rules for every command."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import NamedTuple

from segdeformer.files import reason_of


class Walk(NamedTuple):
    """All files below a folder, sorted, and a line for each thing there that could not be visited."""

    files: tuple[Path, ...]
    skipped: tuple[str, ...]


Identity = tuple[int, int]  # device and number: of a real folder, whatever links lead to it


def walk_files(folder: Path) -> Walk:
    """Names that begin with a dot are left out, links to files and folders followed.

    Every real folder is visited once, under its own path if that lies below `folder`, else under the first
    link to it. A link to a folder visited already is told of, as are broken links and what cannot be read.
    """
    files: list[Path] = []
    skipped: list[str] = []
    try:
        holding = {_identity(parent.stat()) for parent in folder.resolve().parents}
        seen = {_identity(folder.stat()): folder}
    except (OSError, RuntimeError) as error:
        return Walk((), (f"{folder}: cannot be read ({_reason(error)})",))
    folders, links = [folder], list[tuple[Path, Identity]]()
    while folders or links:
        if not folders:  # all real ones have been visited
            link, identity = links.pop(0)
            if identity in seen or identity in holding:
                taken = f"{seen[identity]}, taken already" if identity in seen else "a folder that it lies in"
                skipped.append(f"{link}: link to {taken}")
                continue
            seen[identity] = link
            folders.append(link)
        inside = folders.pop()
        try:
            with os.scandir(inside) as listed:
                entries = sorted(listed, key=lambda entry: entry.name)
        except OSError as error:
            skipped.append(f"{inside}: cannot be read ({_reason(error)})")
            continue
        for entry in entries:
            if entry.name.startswith("."):
                continue
            path = inside / entry.name
            if entry.is_file(follow_symlinks=False):
                files.append(path)
                continue
            try:
                status = entry.stat()  # of what a link leads to
            except OSError as error:
                skipped.append(_broken(path, error))
                continue
            if stat.S_ISREG(status.st_mode):
                files.append(path)
            elif not stat.S_ISDIR(status.st_mode):
                skipped.append(f"{path}: neither a file nor a folder")
            elif entry.is_symlink():
                links.append((path, _identity(status)))
            elif _identity(status) not in seen:
                seen[_identity(status)] = path
                folders.append(path)
    return Walk(tuple(sorted(files)), tuple(skipped))


def _identity(status: os.stat_result) -> Identity:
    return status.st_dev, status.st_ino


def _broken(path: Path, error: OSError) -> str:
    if path.is_symlink():
        return f"{path}: broken link to {os.readlink(path)} ({_reason(error)})"
    return f"{path}: cannot be read ({_reason(error)})"


def _reason(error: Exception) -> str:
    return reason_of(error) if isinstance(error, OSError) else "links in a circle"

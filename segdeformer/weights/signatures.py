"""What a file is by its first bytes, where it is not what its name says."""

from __future__ import annotations

import zipfile
from pathlib import Path

START_BYTES = 512
LFS_POINTER = b"version https://git-lfs"
HTML = (b"<!doctype html", b"<html", b"<?xml")
ZIP, PICKLE = b"PK\x03\x04", b"\x80"  # PyTorch's files, and those of before 1.6
SAFETENSORS = b"{"  # after eight bytes
PYTORCH_ENDINGS = (".pth", ".pt", ".bin", ".ckpt", ".pkl")


def start_of(path: Path) -> bytes:
    """The first bytes of a file; none where it cannot be read, which its reader will say."""
    try:
        with path.open("rb") as file:
            return file.read(START_BYTES)
    except OSError:
        return b""


def failed_download(path: Path) -> str | None:
    """What stands in place of a file that was not downloaded, with the remedy; None where it is no such."""
    start = start_of(path)
    if start.startswith(LFS_POINTER):
        return "is a Git LFS pointer, not the file that it stands for; fetch that with `git lfs pull`"
    if start.lstrip(b"\xef\xbb\xbf \t\r\n").lower().startswith(HTML):
        return "is a web page, so the download failed; download the file itself again"
    return None


def is_pytorch(path: Path) -> bool:
    """Whether a file is one of `torch.save`, or a pickle, or is called like one."""
    start = start_of(path)
    if start[8:9] == SAFETENSORS:  # whatever the file is called, and the header's length before it may be any
        return False
    if start.startswith(ZIP):
        try:
            with zipfile.ZipFile(path) as archive:
                return any(name.endswith("data.pkl") for name in archive.namelist())
        except (zipfile.BadZipFile, OSError):
            return path.suffix in PYTORCH_ENDINGS
    return start.startswith(PICKLE) or path.suffix in PYTORCH_ENDINGS

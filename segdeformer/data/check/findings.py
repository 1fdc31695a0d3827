"""What the data doctor says: kinds of findings, how bad each is, and what to do about it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from segdeformer.config.toml import read_toml

Level = Literal["error", "warning", "note"]

NUM_SHOWN = 3  # files, in a table
NUM_LISTED = 8  # in a line


class Finding(NamedTuple):
    """One kind of fault in one split (or across both): what came and what was expected, where, what to do."""

    kind: str
    level: Level
    split: str
    what: str
    remedy: str
    files: tuple[str, ...]

    def shown_files(self, most: int = NUM_SHOWN) -> str:
        """The first few, and how many more; nothing when all are named already."""
        if len(self.files) <= most and all(file in self.what for file in self.files):
            return ""
        more = len(self.files) - most
        return ", ".join(self.files[:most]) + (f" and {more:,} more" if more > 0 else "")

    def line(self) -> str:
        """All of it in one line."""
        where = f": {shown}" if (shown := self.shown_files(NUM_LISTED)) else ""
        return f"{self.split}: {self.what}{where}; {self.remedy}"


# What to do about each kind, by its level, the worst first.
REMEDIES: dict[Any, dict[str, str]] = read_toml(Path(__file__).with_suffix(".toml"))


def finding(kind: str, split: str, what: str, files: Sequence[object] = (), *, remedy: str = "") -> Finding:
    """A finding of a known kind, with its level, and its remedy unless another is given."""
    level: Level = next(level for level, kinds in REMEDIES.items() if kind in kinds)
    names = tuple(_printable(str(file)) for file in files)
    return Finding(kind, level, split, _printable(what), _printable(remedy) or REMEDIES[level][kind], names)


def findings_of(
    kind: str, split: str, files: Sequence[object], what: str, *, remedy: str = ""
) -> Iterator[Finding]:
    """A finding if there are files with the fault, else none."""
    if files:
        yield finding(kind, split, what, files, remedy=remedy)


def _printable(name: str) -> str:
    """The name with a question mark for what is no text: file names may be any bytes."""
    return name.encode("utf-8", "replace").decode()


def sorted_findings(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    """The worst first, otherwise in the order they were made."""
    return tuple(sorted(findings, key=lambda found: list(REMEDIES).index(found.level)))

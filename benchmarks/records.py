"""The results of one GPU and day: a JSON that is written after every entry and picked up by the next run."""

from __future__ import annotations

import datetime
import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.machine import RESULTS, Machine, header
from benchmarks.report import markdown
from segdeformer.files import write_text


class Records:
    """Entries by section and name."""

    def __init__(self, path: Path, table: dict[str, Any]) -> None:
        self.path = path
        self.table = table

    def section(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = self.table.setdefault(name, {})
        return found

    def add(self, section: str, name: str, entry: dict[str, Any]) -> None:
        self.section(section)[name] = entry
        self.write()

    def write(self) -> None:
        write_text(self.path, json.dumps(self.table, indent=1) + "\n")
        write_text(self.path.with_suffix(".md"), markdown(self.table))


def open_records(out: Path, machine: Machine) -> Records:
    """This GPU's newest results of the same kernels and versions, in `out` or the repository, or new ones."""
    wanted, today = header(machine), datetime.date.today().isoformat()
    folder = out / machine.slug
    folders = [folder] if machine.is_rehearsal else [RESULTS / machine.slug, folder]
    records = None
    for old in (path for f in folders for path in sorted(f.glob("????-??-??*.json"))):
        try:
            found = json.loads(old.read_text("utf-8"))
        except ValueError as error:
            sys.exit(f"error: {old}: not valid JSON ({error}); delete or mend it")
        if all(found.get(key) == wanted[key] for key in ("hardware", "versions", "sources")):
            records = Records(folder / old.name, found)
    if records is None:
        names = [f"{today}.json", *(f"{today}-{number}.json" for number in range(2, 100))]
        free = next(name for name in names if not (folder / name).exists())
        records = Records(folder / free, {**wanted, "date": today})
    return records

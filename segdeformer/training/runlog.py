"""The run's diary: metrics.jsonl, and TensorBoard where it is installed."""

from __future__ import annotations

import contextlib
import importlib.util
import json
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from segdeformer.errors import UserError
from segdeformer.files import write_text

METRICS = "metrics.jsonl"


class RunLog:
    """Appends one JSON object a line; entries later than the iteration resumed from are dropped."""

    def __init__(self, folder: Path, *, since: int) -> None:
        self.path = folder / METRICS
        entries = read_metrics(folder) if since else []
        kept = [entry for entry in entries if entry["iteration"] <= since]
        write_text(self.path, "".join(f"{json.dumps(entry)}\n" for entry in kept))
        self.file = self.path.open("a", encoding="utf-8")
        self.board = None
        if importlib.util.find_spec("tensorboard") is not None:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=since + 1)

    def write(self, entry: dict[str, Any]) -> None:
        """Append an entry; it has `kind` and `iteration`. Numbers also go to TensorBoard."""
        try:
            self.file.write(json.dumps(entry) + "\n")
            self.file.flush()
        except OSError as error:
            raise UserError(f"cannot write {self.path}: {error.strerror}; make room and --resume") from None
        if self.board is not None:
            for name, value in entry.items():
                if isinstance(value, int | float) and name not in ("iteration", "best"):
                    self.board.add_scalar(f"{entry['kind']}/{name}", value, entry["iteration"])

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(OSError):  # what could not be written was reported when it was
            self.file.close()
        if self.board is not None:
            self.board.close()


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """All whole lines of a run's metrics.jsonl; a last line cut short by a kill is left out."""
    path = folder / METRICS
    if not path.is_file():
        return []
    entries: list[dict[str, Any]] = []
    for line in path.read_bytes().splitlines():
        try:
            entry = json.loads(line)
        except ValueError:  # of JSON, or of its encoding
            break
        if not isinstance(entry, dict):
            break
        entries.append(entry)
    return entries

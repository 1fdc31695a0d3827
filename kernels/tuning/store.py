"""Files of one GPU's measurements while they are being made; `tiles` and `choices` describe and read them.

`bench --tune` writes a `TunedFile`. Beside what `tiles` reads it keeps every candidate's time, or why it was
turned down, so that a killed run goes on where it was and tries nothing twice that hangs or crashes. What
other commands compare for their own models goes into an `AutoFile`: neither spoils the other.
"""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
import triton

from segdeformer.commit import commit
from segdeformer.errors import UserError
from segdeformer.files import WriteError, write_text
from segdeformer.kernels.choices import Choice, auto_path, forget_choices, read_choices
from segdeformer.kernels.launch import kernel_sources
from segdeformer.kernels.plans import forget_plans
from segdeformer.kernels.tiles import Tile, architecture_of, padded_width, read_table, rows_in_lines
from segdeformer.kernels.tuning.trial import Problem


class TunedFile:
    """A GPU's tiles, candidates and comparisons; each change that matters is written at once."""

    def __init__(self, path: Path, table: dict[str, Any], copy: Path | None = None) -> None:
        self.path = path
        self.copy = copy
        self.table = table

    @property
    def architecture(self) -> str:
        return str(self.table["architecture"])

    def write(self) -> None:
        text = rows_in_lines(self.table)
        for path in filter(None, (self.path, self.copy)):
            write_text(path, text)
        forget_plans()
        forget_choices()

    def outcomes(self, problem: Problem) -> dict[Tile, float | str]:
        """Of each candidate so far its milliseconds, or why it was turned down."""
        return {
            Tile(*row["tile"]): row["ms"] if "ms" in row else row["reason"]
            for row in self.table["candidates"]
            if _names(row, problem)
        }

    def record(self, problem: Problem, tile: Tile, outcome: float | str) -> None:
        key = "reason" if isinstance(outcome, str) else "ms"
        value = outcome if isinstance(outcome, str) else round(outcome, 5)
        row = {**_name(problem), "tile": list(tile), key: value}
        self.table["candidates"].append(row)

    def settle(self, problem: Problem, tile: Tile) -> None:
        """This is the problem's tile; comparisons that were run with another one no longer count."""
        if tile != self.settled(problem):
            old = self.table["choices"]
            self.table["choices"] = [choice for choice in old if not _takes(choice, problem)]
            if problem.operation == "attention":
                self.table["backward"].get(problem.widths_key, {}).pop(str(problem.element_bytes), None)
        of_kernel = self.table["tiles"].setdefault(problem.kernel, {})
        by_bytes = of_kernel.setdefault(problem.widths_key, {})
        by_bytes.setdefault(str(problem.element_bytes), {})[str(problem.size_class)] = list(tile)
        self.write()

    def settled(self, problem: Problem) -> Tile | None:
        by_bytes = self.table["tiles"].get(problem.kernel, {}).get(problem.widths_key, {})
        tile = by_bytes.get(str(problem.element_bytes), {}).get(str(problem.size_class))
        return None if tile is None else Tile(*tile)

    def is_compared(self, key: tuple[str, int, int, int, bool, int]) -> bool:
        fields = ("operation", "width", "value_width", "element_bytes", "training", "size")
        return any(tuple(choice.get(field) for field in fields) == key for choice in self.table["choices"])

    def add_choice(self, choice: Choice) -> None:
        self.table["choices"].append(choice.row())
        self.write()

    def backward_form(self, widths_key: str, element_bytes: int) -> str | None:
        """`fused` or `chunks`, if that was measured."""
        form: str | None = self.table["backward"].get(widths_key, {}).get(str(element_bytes))
        return form

    def set_backward_form(self, widths_key: str, element_bytes: int, form: str) -> None:
        self.table["backward"].setdefault(widths_key, {})[str(element_bytes)] = form
        self.write()


def open_tuned(path: Path, device: torch.device, *, again: bool, copy: Path | None = None) -> TunedFile:
    """The file with what it holds of these kernels and versions; anything else is measured anew.

    Raises `UserError` for a damaged file.
    """
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else "none (interpreter)"
    header = {**_header(gpu), "architecture": architecture_of(device).name}
    table: dict[str, Any] = {}
    if path.is_file() and not again:
        try:
            table = json.loads(path.read_text("utf-8"))
        except ValueError as error:
            raise UserError(f"{path}: not valid JSON ({error}); delete it, or measure with --again") from None
    if not isinstance(table, dict) or {key: table.get(key) for key in header} != header:
        table = {"tiles": {}, "backward": {}, "choices": [], "candidates": []}
    now = {**header, "commit": commit(), "date": datetime.date.today().isoformat()}
    return TunedFile(path, {**now, **{key: table[key] for key in table if key not in now}}, copy)


class AutoFile(NamedTuple):
    """Its contents, as far as they are of these kernels and versions."""

    header: dict[str, str]
    rows: list[dict[str, Any]]  # of choices
    settled: list[str]  # digests of what has nothing left to compare

    @classmethod
    def read(cls, gpu: str) -> Self:
        header = _header(gpu)
        table = read_table(auto_path(gpu), header)
        return cls(header, list(table.get("choices", [])), list(table.get("settled", [])))

    @property
    def choices(self) -> list[Choice]:
        return read_choices(self.rows)

    def add(self, rows: list[dict[str, Any]], settled: str | None) -> str | None:
        """Write with these, and with what others have written meanwhile; why not, if it cannot be."""
        now = self.read(self.header["gpu"])
        names = [settled] if settled is not None and settled not in now.settled else []
        if not rows and not names:
            return None
        lines = ",\n  ".join(json.dumps(row) for row in now.rows + rows)
        about = json.dumps({**self.header, "date": datetime.date.today().isoformat()})
        text = f'{about[:-1]},\n "settled": {json.dumps(now.settled + names)},\n "choices": [\n  {lines}]}}\n'
        try:
            write_text(auto_path(self.header["gpu"]), text)
        except WriteError as error:
            return error.reason
        return None


def _header(gpu: str) -> dict[str, str]:
    """What a measurement belongs to; of another header it is made anew."""
    versions = {"torch": torch.__version__, "triton": triton.__version__}
    return {"gpu": gpu, **versions, "sources": kernel_sources()}


def _name(problem: Problem) -> dict[str, str | int]:
    return {
        "kernel": problem.kernel,
        "widths": problem.widths_key,
        "bytes": problem.element_bytes,
        "size": problem.size_class,
    }


def _names(row: dict[str, Any], problem: Problem) -> bool:
    return all(row.get(key) == value for key, value in _name(problem).items())


def _takes(choice: dict[str, Any], problem: Problem) -> bool:
    """Whether a comparison was run with the problem's kernel, if perhaps in one of its directions only."""
    widths = padded_width(choice["width"]), padded_width(choice["value_width"])
    mine = (problem.operation, problem.widths, problem.element_bytes)
    return (choice["operation"], widths, choice["element_bytes"]) == mine

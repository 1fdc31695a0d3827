"""The file of what commands compared for their own models on one kind of GPU; `choices` describes it.

Apart from the tile file, which `bench --tune` writes: neither spoils the other.
"""

from __future__ import annotations

import datetime
import json
from typing import Any, NamedTuple, Self

import torch
import triton

from segdeformer.files import WriteError, write_text
from segdeformer.kernels.choices import Choice, auto_path, read_auto, read_choices
from segdeformer.kernels.launch import kernel_sources


class AutoFile(NamedTuple):
    """Its contents, as far as they are of these kernels and versions."""

    header: dict[str, str]
    rows: list[dict[str, Any]]  # of choices
    settled: list[str]  # digests of what has nothing left to compare

    @classmethod
    def read(cls, gpu: str) -> Self:
        header = {
            "gpu": gpu,
            "torch": torch.__version__,
            "triton": triton.__version__,
            "sources": kernel_sources(),
        }
        table = read_auto(gpu)
        if {key: table.get(key) for key in header} != header:
            return cls(header, [], [])
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

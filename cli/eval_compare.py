"""`segdeformer eval` under several protocols: one table of what each costs and saves."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from rich.console import Console

from segdeformer.cli import show
from segdeformer.cli.inference import Opened, joined
from segdeformer.config import DataConfig, EvalConfig, change_recipe
from segdeformer.data.samples import Dataset
from segdeformer.errors import UsageError
from segdeformer.inference.comparison import (
    Comparison,
    ProtocolScore,
    compare_protocols,
    comparison_values,
    recommended_stride,
)
from segdeformer.inference.scorecard import write_scorecard
from segdeformer.weights.checkpoint import Checkpoint, save_key_stride


class Variants(NamedTuple):
    """Modes and key strides that are asked for; None: as the checkpoint says."""

    modes: list[str | None]
    strides: list[int | None]

    @property
    def are_several(self) -> bool:
        return len(self.modes) * len(self.strides) > 1

    def protocols(self, opened: Opened) -> dict[str, EvalConfig]:
        """The checkpoint's changed to each mode and stride, by name; of several strides 1 comes first."""
        strides = self.strides
        if len(strides) > 1:
            strides = [1, *sorted({stride for stride in strides if stride is not None} - {1})]
        found = {}
        for mode, stride in itertools.product(self.modes, strides):
            keys = "all keys" if stride == 1 else f"key stride {stride}"
            name = ", ".join([*([mode] if mode is not None else []), *([keys] if stride is not None else [])])
            found[name] = change_recipe(opened.recipe, mode=mode, key_stride=stride).evaluate
        return found


def parse_variants(mode: str | None, key_stride: str | None) -> Variants:
    """Raises `UsageError` for a key stride that is no whole number; modes are checked with the recipe."""
    parts = [] if key_stride is None else [part.strip() for part in key_stride.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise UsageError(f"--key-stride {key_stride}: expected whole numbers from 1 on, such as 4 or 1,2,4,8")
    modes: list[str | None] = [None] if mode is None else list(dict.fromkeys(mode.split(",")))
    return Variants(modes, [int(part) for part in parts] or [None])


def compare(
    opened: Opened,
    dataset: Dataset,
    config: DataConfig,
    protocols: Mapping[str, EvalConfig],
    console: Console,
    json_file: Path | None,
    *,
    save: bool,
) -> None:
    """Score all, and of several key strides say which one costs nothing that can be seen."""
    comparison = Comparison(dataset.classes, protocols)
    about = opened.loaded.checkpoint
    with joined(opened, console) as runtime:
        console.print(show.device_words(runtime), style="dim")
        done = compare_protocols(opened.loaded.model, dataset, comparison, data=config, runtime=runtime)
        for _ in show.ticking(console, done, "images", len(dataset)):
            pass
    rows = comparison.rows()
    console.print(_table(rows), soft_wrap=False)
    console.print("change: of mIoU, over the images; scores: query-key products of an image", style="dim")
    best = None
    if len({row.protocol.mode for row in rows}) == 1:
        best = recommended_stride(rows)
        console.print(_advice(rows[0], best), style="bold")
    if json_file is not None:
        write_scorecard(
            json_file,
            rows[0].report,
            protocol=rows[0].protocol,
            data=config,
            label_map=dataset.label_map,
            checkpoint=about,
            comparison=comparison_values(rows),
            recommended_key_stride=None if best is None else best.stride,
        )
        console.print(f"scores: {json_file}")
    if save and best is not None:
        keep_stride(about, best.stride, console)


def _table(rows: list[ProtocolScore]) -> object:
    table = show.make_table(
        "protocol", "mIoU %", "change, 95 %", "agreement %", "most changed class", "ms/image", "scores"
    )
    for number, row in enumerate(rows):
        name, change = row.most_changed
        low, high = (f"{100 * end:+.2f}" for end in row.change)
        table.add_row(
            row.name,
            show.percent(row.report.scores.miou),
            f"{low} to {high}" if number else "",
            show.percent(row.agreement),
            f"{name} {100 * change:+.2f}" if number else "",
            f"{row.ms:.1f}",
            f"{row.num_scores:.3g}",
        )
    return table


def _advice(exact: ProtocolScore, best: ProtocolScore) -> str:
    if best.stride == 1:
        return "every key stride here may lose more than 0.1 mIoU: keep all keys"
    speed = f"{exact.ms / best.ms:.1f} times as fast here"
    return f"key stride {best.stride} is the largest that loses less than 0.1 mIoU: {speed}"


def keep_stride(about: Checkpoint, stride: int, console: Console) -> None:
    """Write it into the checkpoint, and say so."""
    save_key_stride(about, stride)
    console.print(f"{about.path}: eval and predict use key stride {stride} from now on")

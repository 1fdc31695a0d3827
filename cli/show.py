"""Tables and lines that the commands print."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from rich.console import Console
from rich.progress import track
from rich.table import Table

if TYPE_CHECKING:
    from segdeformer.config import EvalConfig, LossConfig, Recipe, TrainConfig
    from segdeformer.inference.evaluate import Report
    from segdeformer.runtime import Runtime
    from segdeformer.training.optimizer import ParameterGroup

T = TypeVar("T")


def make_console(*, quiet: bool = False) -> Console:
    """A console that prints names and paths as they are: no markup, no colours in numbers, no line breaks.

    Tables are wrapped to the terminal by `soft_wrap=False`. quiet: nothing; for all processes but the first.
    """
    return Console(markup=False, highlight=False, soft_wrap=True, quiet=quiet)


def make_table(*header: str, num_left: int = 1, **options: Any) -> Table:
    """A plain table; its first columns are names, the others numbers."""
    table = Table(box=None, header_style="bold", **options)
    for index, name in enumerate(header):
        table.add_column(name, justify="left" if index < num_left else "right")
    return table


def ticking(console: Console, items: Iterable[T], what: str, total: int) -> Iterable[T]:
    """The items, under a bar in a terminal."""
    hidden = not console.is_terminal
    return track(items, what, total=total, console=console, transient=True, disable=hidden)


def device_words(runtime: Runtime) -> str:
    """Where something runs, and by what."""
    from segdeformer.kernels.impl import describe_impl

    return f"device {runtime.device}, attention {describe_impl(runtime.impl, runtime.device)}"


def groups_table(groups: Sequence[ParameterGroup], config: TrainConfig) -> Table:
    """Who learns at which rate: nothing about learning-rate groups is hidden."""
    table = make_table("parameters", "count", "learning rate", "weight decay")
    for group in groups:
        table.add_row(
            group.name, f"{group.num_scalars:,}", f"{group.learning_rate:.3g}", f"{group.weight_decay:.3g}"
        )
    table.add_row("total", f"{sum(group.num_scalars for group in groups):,}", "", "", style="dim")
    return table


def schedule_line(recipe: Recipe) -> str:
    """One line on optimiser, schedule and loss."""
    config = recipe.train
    return (
        f"AdamW, batch {config.batch_size}, {config.iterations:,} iterations: linear warm-up over "
        f"{config.warmup_iterations:,}, then poly of power {config.poly_power:g} to "
        f"{config.min_learning_rate:g}; {loss_words(recipe.active_losses)}"
    )


def loss_words(terms: Sequence[LossConfig]) -> str:
    """The sum of terms, and what their means are over."""
    weighted = (f"{term.weight:g} {term.name}" if term.weight != 1 else term.name for term in terms)
    averages = dict.fromkeys(str(getattr(term, "average", "valid")) for term in terms)
    return f"loss {' + '.join(weighted)}, averaged over {' or '.join(averages)} pixels"


def scores_table(report: Report) -> Table:
    """IoU and accuracy of every class in percent, and the means."""
    table = make_table("class", "IoU %", "accuracy %", "pixels %")
    scores = report.scores
    total = max(int(scores.pixels_K.sum()), 1)
    for index, name in enumerate(report.classes.names):
        share = f"{100 * scores.pixels_K[index] / total:.2f}"
        table.add_row(name, percent(scores.iou_K[index]), percent(scores.accuracy_K[index]), share)
    table.add_section()
    table.add_row("mean", percent(scores.miou), percent(scores.macc), "", style="bold")
    return table


def scores_line(report: Report) -> str:
    """mIoU, mAcc, aAcc and loss in one line."""
    return (
        f"mIoU {percent(report.scores.miou)} %, mAcc {percent(report.scores.macc)} %, "
        f"aAcc {percent(report.pixel_accuracy)} %, loss {report.loss:.4f} on {report.num_images} images"
    )


def protocol_line(protocol: EvalConfig) -> str:
    """The protocol in words."""
    size = "own size"
    if protocol.resize_to is not None:
        long_px, short_px = protocol.resize_to
        size = f"ratio kept, inside {long_px} x {short_px} px"
    if protocol.multiple_of > 1:
        size += f", up to a multiple of {protocol.multiple_of}"
    mode: str = protocol.mode
    if mode == "slide":
        (height, width), (down, right) = protocol.window, protocol.stride
        mode += f" {height} x {width}, stride {down} x {right}"
    scales = ", ".join(f"{scale:g}" for scale in protocol.scales)
    return f"{mode}; {size}; scales {scales}; {'with' if protocol.flip else 'no'} flip"


def percent(share: float) -> str:
    """A share as a percentage with two decimals, a dash for NaN."""
    return "-" if math.isnan(share) else f"{100 * share:.2f}"

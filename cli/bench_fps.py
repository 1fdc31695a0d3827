"""`segdeformer bench --fps`: models side by side, in time, FLOPs and memory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from segdeformer.cli.show import Grid, make_console, markdown, print_grid, write_tables
from segdeformer.errors import count

if TYPE_CHECKING:
    import torch

    from segdeformer.measure.alternatives import Alternative
    from segdeformer.measure.fps import Comparison, Measured, Options
    from segdeformer.measure.speed import Split


def bench_fps(
    alternatives: Sequence[Alternative],
    options: Options,
    device: torch.device,
    json_file: Path | None,
    markdown_file: Path | None,
) -> None:
    """Measure, print, and write what is asked for."""
    from segdeformer.measure.fps import compare

    console = make_console()
    with console.status("starting") as status:
        comparison = compare(alternatives, options, device, say=status.update, tell=console.print)
    about = _about(comparison)
    for line in about:
        console.print(line, style="dim", soft_wrap=False)
    grids = comparison_grids(comparison)
    for grid in grids:
        print_grid(console, grid)
    text = "".join(f"- {line}\n" for line in about) + f"\n{markdown(grids)}"
    tables = {"measurements": (json_file, comparison_json(comparison)), "tables": (markdown_file, text)}
    write_tables(console, tables)


def _about(comparison: Comparison) -> list[str]:
    """What was timed, where, and how each model ran."""
    machine, options = comparison.machine, comparison.options
    height, width = options.size
    versions = ", ".join(f"{name} {version}" for name, version in machine.versions.items())
    until = "each pixel's class, upsampled" if options.argmax else "logits at the decoder's resolution"
    lines = [
        f"{machine.hardware}, {count(machine.threads, 'thread')}; {versions}; "
        f"{machine.commit}, {machine.date}",
        f"batch {options.batch}, {height}x{width}, {comparison.device}: normalised images to {until}",
    ]
    labels: dict[str, list[str]] = {}
    for one in comparison.measured:
        labels.setdefault(_how(one), []).append(one.alternative.label)
    lines += [f"{'; '.join(alike)}: {how}" for how, alike in labels.items()]
    return lines + ([machine.warning] if comparison.device == "cpu" and machine.warning else [])


def _how(one: Measured) -> str:
    setting = one.alternative.setting
    switches = {
        "compiled": setting.compile,
        "CUDA graph": setting.cuda_graphs,
        "channels last": setting.channels_last,
    }
    extras = "".join(f", {name}" for name, on in switches.items() if on)
    return f"{setting.dtype}, attention {one.impl}, {one.folding}{extras}"


def comparison_json(comparison: Comparison) -> dict[str, object]:
    """Everything, for machines."""
    options = comparison.options
    return {
        "machine": comparison.machine._asdict(),
        "device": comparison.device,
        "timed": "normalised images to "
        + ("each pixel's class at the images' size" if options.argmax else "logits at decoder resolution"),
        "batch": options.batch,
        "size_hw": list(options.size),
        "warmup": options.warmup,
        "base": comparison.base.alternative.label,
        "flops": "matrix products, convolutions, attention; a multiply-add as two; of the whole batch",
        "models": {one.alternative.label: _model_json(comparison, one) for one in comparison.measured},
    }


def _model_json(comparison: Comparison, one: Measured) -> dict[str, object]:
    paper = one.paper
    return {
        "source": one.alternative.source,
        "recipe": one.recipe,
        "setting": one.alternative.setting._asdict(),
        "impl": one.impl,
        "folding": one.folding,
        "parameters": one.parameters,
        "flops": one.flops.total,
        "flops_by_part": one.flops.parts._asdict(),
        "printed_macs": one.printed_flops // 2,
        **one.latency._asdict(),
        "relative_speed": comparison.relative_speed(one),
        "ms_by_part": one.split_ms._asdict(),
        "memory": None if one.memory is None else one.memory._asdict(),
        "paper": None if paper is None else {"row": paper.method, "fps": paper.fps},
        "paper_relative_speed": comparison.paper_speed(one),
    }


def comparison_grids(comparison: Comparison) -> list[Grid]:
    """Speed, cost, and both by part."""
    return [_speed_grid(comparison), _cost_grid(comparison), _parts_grid(comparison)]


def _speed_grid(comparison: Comparison) -> Grid:
    base = comparison.base
    header = ("model", "p50 ms", "p95 ms", "images/s", "relative", "paper")
    rows = []
    for one in comparison.measured:
        speed, paper = one.latency, comparison.paper_speed(one)
        numbers = (speed.p50_ms, speed.p95_ms, speed.images_per_s, comparison.relative_speed(one))
        cells = [f"{number:.2f}" for number in numbers]
        rows.append((one.alternative.label, *cells, "" if paper is None else f"{paper:.2f}"))
    rounds = base.latency.num_rounds
    notes = [
        f"rounds in alternation: {rounds}; relative: images/s with {base.alternative.label} = 1, by medians",
        "paper: Table 7's frames per second, likewise, on a V100 at 512x512",
    ]
    return Grid("Speed", header, rows, notes if any(row[-1] for row in rows) else notes[:1])


def _cost_grid(comparison: Comparison) -> Grid:
    header = ("model", "params M", "GFLOPs", "GMACs", "extra MiB", "peak MiB")
    rows = [
        (
            one.alternative.label,
            f"{one.parameters / 1e6:.2f}",
            _short(one.flops.total / 1e9),
            _short(one.printed_flops / 2e9),
            "-" if one.memory is None else f"{one.memory.extra_mib:.0f}",
            "-" if one.memory is None else f"{one.memory.peak_mib:.0f}",
        )
        for one in comparison.measured
    ]
    of = "the whole process" if comparison.device == "cpu" else "model, images and extra"
    notes = [
        "GFLOPs: of the whole batch as it runs, attention included, a multiply-add as two",
        "GMACs: of the equations as papers print them, a multiply-add as one: what papers call GFLOPs",
        f"extra: the peak above model and images in an eager pass; peak: of {of}",
    ]
    return Grid("Cost", header, rows, notes)


def _parts_grid(comparison: Comparison) -> Grid:
    header = ("model", "", "encoder", "fusion", "context", "head")
    rows = []
    for one in comparison.measured:
        rows.append((one.alternative.label, "ms", *_cells(one.split_ms, 1)))
        rows.append(("", "GFLOPs", *_cells(one.flops.parts, 1e9)))
    notes = ["ms: medians of eager passes; the context of a folded model holds its head"]
    return Grid("Parts", header, rows, notes, num_left=2)


def _cells(split: Split[float] | Split[int], unit: float) -> list[str]:
    return ["-" if value is None else _short(value / unit) for value in split]


def _short(number: float) -> str:
    """Two decimals, or two digits of what is less than one."""
    return f"{number:.2f}" if number >= 1 else f"{number:.2g}"

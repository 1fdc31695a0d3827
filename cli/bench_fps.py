"""`segdeformer bench --fps`: models side by side, in time, FLOPs and memory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from segdeformer.measure.alternatives import Alternative
    from segdeformer.measure.fps import Comparison, Measured, Options


def bench_fps(
    alternatives: Sequence[Alternative],
    options: Options,
    device: torch.device,
    json_file: Path | None,
    markdown_file: Path | None,
) -> None:
    """Measure, print, and write what is asked for."""
    from segdeformer.cli.show import make_console
    from segdeformer.cli.show_bench import comparison_grids, markdown, print_grid, write_tables
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
        f"{machine.hardware}, {machine.threads} threads; {versions}; {machine.commit}, {machine.date}",
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

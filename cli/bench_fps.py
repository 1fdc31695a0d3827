"""`segdeformer bench --fps`: models side by side, in time, FLOPs and memory."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from segdeformer.measure.fps import Comparison, Measured


class FpsFlags(NamedTuple):
    """The command line's options. changes: as in `--against`, of every model."""

    changes: Sequence[str]
    fold: bool | None
    size: tuple[int, int] | None
    batch: int
    warmup: int
    rounds: int | None
    seconds: float
    argmax: bool
    memory: bool


def bench_fps(
    models: Sequence[str],
    against: Sequence[str],
    flags: FpsFlags,
    device: str,
    json_file: Path | None,
    markdown_file: Path | None,
) -> None:
    """Measure, print, and write what is asked for."""
    from segdeformer.cli.show import make_console
    from segdeformer.cli.show_bench import comparison_grids, markdown, print_grid
    from segdeformer.engine.device import choose_device
    from segdeformer.files import write_text
    from segdeformer.measure.contenders import Setting, changed, parse_contenders
    from segdeformer.measure.fps import SIZE_ON_CPU, SIZE_ON_GPU, TRIO, Options, compare
    from segdeformer.measure.speed import Length

    chosen = choose_device(device)
    size = flags.size or (SIZE_ON_CPU if chosen.type == "cpu" else SIZE_ON_GPU)
    setting = Setting(fold=flags.fold)
    for change in flags.changes:
        setting = changed(setting, change)
    length = Length(flags.rounds, flags.seconds)
    options = Options(flags.batch, size, flags.argmax, flags.warmup, length, flags.memory)
    contenders = parse_contenders(models or ([] if against else TRIO), against, setting)
    console = make_console()
    with console.status("starting") as status:
        comparison = compare(contenders, options, chosen, say=status.update, tell=console.print)
    for line in _about(comparison):
        console.print(line, style="dim", soft_wrap=False)
    grids = comparison_grids(comparison)
    for grid in grids:
        print_grid(console, grid)
    if json_file is not None:
        write_text(json_file, json.dumps(comparison_json(comparison), indent=1) + "\n")
        console.print(f"measurements: {json_file}")
    if markdown_file is not None:
        about = "\n".join(f"- {line}" for line in _about(comparison))
        write_text(markdown_file, f"{about}\n\n{markdown(grids)}")
        console.print(f"tables: {markdown_file}")


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
        labels.setdefault(_how(one), []).append(one.contender.label)
    lines += [f"{'; '.join(alike)}: {how}" for how, alike in labels.items()]
    return lines + ([machine.warning] if comparison.device == "cpu" and machine.warning else [])


def _how(one: Measured) -> str:
    setting = one.contender.setting
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
        "base": comparison.base.contender.label,
        "flops": "matrix products, convolutions, attention; a multiply-add as two; of the whole batch",
        "models": {one.contender.label: _model_json(comparison, one) for one in comparison.measured},
    }


def _model_json(comparison: Comparison, one: Measured) -> dict[str, object]:
    paper = one.paper
    return {
        "source": one.contender.source,
        "recipe": one.recipe,
        "setting": one.contender.setting._asdict(),
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

"""`segdeformer bench`: measure on this machine."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from typer import Argument, Option

from segdeformer.cli.errors import one_line_errors

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import torch
    from rich.console import Console

    from segdeformer.kernels.tuning.events import Event


TABLES, SPEED, TUNING = "With --params and --fps", "With --fps", "With --tune"  # headings of --help
TAKES = {  # which parameters each kind of measurement looks at
    "--params": ("models", "json_file", "markdown_file"),
    "--fps": (
        *("models", "against", "json_file", "markdown_file", "size", "batch", "key_stride", "dtype", "impl"),
        *(
            "fold",
            "compile_",
            "cuda_graphs",
            "channels_last",
            "argmax",
            "memory",
            "warmup",
            "rounds",
            "seconds",
        ),
        "device",
    ),
    "--tune": ("out", "seconds", "again", "device"),
}


speed_option = partial(typer.Option, rich_help_panel=SPEED)
tables_option = partial(typer.Option, rich_help_panel=TABLES)
tuning_option = partial(typer.Option, rich_help_panel=TUNING)


@one_line_errors
def bench_command(
    context: typer.Context,
    models: Annotated[
        list[str] | None,
        Argument(
            metavar="MODEL",
            help="Recipes, run folders or checkpoints, each with changes if you like: runs/a,no-fold",
        ),
    ] = None,
    params: Annotated[
        bool, Option("--params", help="Count parameters: of the paper's rows, or of the models given.")
    ] = False,
    fps: Annotated[bool, Option("--fps", help="Time, FLOPs and memory of models side by side.")] = False,
    tune: Annotated[
        bool, Option("--tune", help="Find this GPU's fastest tiles, and where they beat PyTorch.")
    ] = False,
    device: Annotated[
        str | None, Option(help="auto, cpu, cuda or cuda:N; for --tune cuda or cuda:N.")
    ] = None,
    json_file: Annotated[Path | None, tables_option("--json", help="Write everything here.")] = None,
    markdown_file: Annotated[Path | None, tables_option("--markdown", help="Write the tables here.")] = None,
    against: Annotated[
        list[str] | None,
        speed_option(
            metavar="MODEL|CHANGE",
            help="One more model, or the first one changed: key-stride=4, impl=reference, no-fold, "
            "dtype=bfloat16, form=plain, compile, cuda-graphs, channels-last; several with commas. May be "
            "repeated.",
        ),
    ] = None,
    size: Annotated[
        tuple[int, int] | None,
        speed_option(min=1, metavar="H W", help="Of images, in px. Default: 512 512, on a CPU 256 256."),
    ] = None,
    batch: Annotated[int, speed_option(min=1, help="Images at a time.")] = 1,
    key_stride: Annotated[
        int | None,
        speed_option(min=1, help="Keys are means of so many pixels squared. Default: all, or as saved."),
    ] = None,
    dtype: Annotated[str, speed_option(help="float32, float16 or bfloat16.")] = "float32",
    impl: Annotated[str, speed_option(help="auto, triton, sdpa, blocks or reference attention.")] = "auto",
    fold: Annotated[
        bool | None, speed_option("--fold/--no-fold", help="Fold for inference. Default: wherever it can be.")
    ] = None,
    compile_: Annotated[bool, speed_option("--compile", help="Through torch.compile.")] = False,
    cuda_graphs: Annotated[
        bool, speed_option("--cuda-graphs", help="As one CUDA graph; needs a GPU.")
    ] = False,
    channels_last: Annotated[
        bool, speed_option("--channels-last", help="Images and weights in that memory order.")
    ] = False,
    argmax: Annotated[
        bool, speed_option("--argmax", help="Up to each pixel's class at the image's size.")
    ] = False,
    memory: Annotated[bool, speed_option("--memory/--no-memory", help="Measure peak memory.")] = True,
    warmup: Annotated[int, speed_option(min=1, help="Passes of each model before it is timed.")] = 3,
    rounds: Annotated[int | None, speed_option(min=1, help="So many rounds instead of --seconds.")] = None,
    seconds: Annotated[
        float | None,
        Option(
            min=1,
            help="--fps: time for about so long (default 20). --tune: stop after about so long (default "
            "300); a second run goes on from there.",
        ),
    ] = None,
    out: Annotated[
        Path | None, tuning_option(help="Write a copy of the measurements here, to share or to ship.")
    ] = None,
    again: Annotated[
        bool, tuning_option("--again", help="Measure everything anew instead of going on.")
    ] = False,
) -> None:
    """Measure on this machine: parameters, speed and memory, or the Triton kernels' tiles for its GPU."""
    kinds = {"--params": params, "--fps": fps, "--tune": tune}
    _check(context, [name for name, wanted in kinds.items() if wanted])
    if params:
        from segdeformer.cli.bench_params import bench_params

        bench_params(models or [], json_file, markdown_file)
    elif fps:
        from segdeformer.cli.bench_fps import bench_fps
        from segdeformer.measure.alternatives import Setting, changed, parse_alternatives
        from segdeformer.measure.fps import DEFAULTS, Options, default_size
        from segdeformer.measure.speed import Length
        from segdeformer.runtime.device import choose_device

        chosen = choose_device(device or "auto")
        switches = {"compile": compile_, "cuda-graphs": cuda_graphs, "channels-last": channels_last}
        setting = Setting(key_stride=key_stride, fold=fold)
        for change in (f"dtype={dtype}", f"impl={impl}", *(name for name, on in switches.items() if on)):
            setting = changed(setting, change)
        length = Length(rounds, 20.0 if seconds is None else seconds)
        options = Options(batch, size or default_size(chosen), argmax, warmup, length, memory)
        alternatives = parse_alternatives(models or ([] if against else DEFAULTS), against or [], setting)
        bench_fps(alternatives, options, chosen, json_file, markdown_file)
    else:
        _tune(out, 300.0 if seconds is None else seconds, again, device or "cuda")


def _check(context: typer.Context, kinds: Sequence[str]) -> None:
    """Raise `UsageError` unless one kind of measurement is asked for, with options that are for it."""
    from segdeformer.errors import UsageError

    if not kinds:
        raise UsageError("nothing to measure: give --params, --fps or --tune")
    if len(kinds) > 1:
        raise UsageError(f"{' and '.join(kinds)} are measured one at a time; give one of them")
    for option in context.command.params:
        source = context.get_parameter_source(option.name or "")
        given = source is not None and source.name == "COMMANDLINE"
        if given and option.name not in (*TAKES[kinds[0]], *(kind[2:] for kind in kinds)):
            takers = [kind for kind, names in TAKES.items() if option.name in names]
            name = option.opts[0] if option.param_type_name == "option" else "a MODEL"
            raise UsageError(f"{name} is for {' and '.join(takers)}; leave it out with {kinds[0]}")


def _tune(out: Path | None, seconds: float, again: bool, device: str) -> None:
    """Measure until the time is over."""
    chosen = _gpu(device)

    import torch

    from segdeformer.cli.show import make_console
    from segdeformer.kernels.tiles import gpu_slug, user_tuned
    from segdeformer.kernels.tuning.search import tune as tune_kernels

    name = torch.cuda.get_device_name(chosen)
    path = user_tuned() / f"{gpu_slug(name)}.json"
    console = make_console()
    console.print(f"{name}, {seconds:.0f} s: every candidate is checked against float64 before it is timed")
    _show(console, tune_kernels(path, chosen, seconds=seconds, again=again, copy=out))
    console.print(f"measurements: {path}{f' and {out}' if out else ''}; `--impl auto` uses them from now on")


def _gpu(name: str) -> torch.device:
    """The CUDA device to tune for; raises `UsageError` when there is none."""
    import importlib.util

    import torch

    from segdeformer.errors import UsageError
    from segdeformer.runtime import choose_runtime
    from segdeformer.runtime.device import choose_device

    if not torch.cuda.is_available():
        raise UsageError("bench --tune measures Triton kernels on a CUDA GPU, and PyTorch sees none here")
    if importlib.util.find_spec("triton") is None:
        raise UsageError("bench --tune needs Triton, which is not installed")
    from segdeformer.kernels.launch import interpreting

    if interpreting():
        raise UsageError("TRITON_INTERPRET=1 is set, so no kernel would run on the GPU; unset it")
    if choose_device(name).type != "cuda":
        raise UsageError(f"device is `{name}`; bench --tune needs cuda or cuda:N")
    return choose_runtime(name, "triton").device


def _show(console: Console, events: Iterator[Event]) -> None:
    """A status line for each candidate, a line that stays for each result."""
    from segdeformer.kernels.tuning.events import Compiling, Tried, describe

    began = time.monotonic()
    with console.status("compiling") as status:
        for event in events:
            line = describe(event)
            status.update(f"{time.monotonic() - began:.0f} s  {line}")
            if not isinstance(event, Tried | Compiling):
                console.print(line)

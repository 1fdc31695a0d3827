"""`segdeformer eval`: score a checkpoint on a data set."""

from __future__ import annotations

from itertools import chain
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Option

from segdeformer.cli import options
from segdeformer.cli.errors import one_line_errors

if TYPE_CHECKING:
    from rich.console import Console

    from segdeformer.cli.inference import Opened
    from segdeformer.config import DataConfig
    from segdeformer.data.samples import Dataset
    from segdeformer.weights.checkpoint import Checkpoint


@one_line_errors
def eval_command(
    checkpoint: options.CheckpointArgument = None,
    data: Annotated[
        str | None, Option(help="landcover, NAME:FOLDER or a folder; default: the checkpoint's.")
    ] = None,
    classes: options.ClassesFile = None,
    mode: options.Mode = None,
    scales: options.Scales = None,
    flip: options.Flip = None,
    key_stride: Annotated[
        str | None,
        Option(
            "--key-stride",
            help="Approximate attention by means of so many pixels squared for keys and values; several, as "
            "1,2,4,8, are compared with all keys. Default: the checkpoint's.",
        ),
    ] = None,
    save: Annotated[
        bool, Option("--save", help="Keep the key stride, or the best of several, in the checkpoint.")
    ] = False,
    json_file: Annotated[
        Path | None, Option("--json", help="Write scores, protocol and weights hash here.")
    ] = None,
    picture: Annotated[
        Path | None, Option(help="Draw some images beside truth and prediction here (PNG).")
    ] = None,
    device: options.Device = "auto",
    impl: options.ImplName = "auto",
    fold: options.Fold = None,
    nproc: options.Nproc = None,
) -> None:
    """Score a checkpoint: mIoU, mAcc, aAcc and per-class IoU, and the protocol they belong to."""
    from segdeformer.cli import show
    from segdeformer.cli.inference import joined, launched, open_model
    from segdeformer.data.datasets import choose_data, open_dataset
    from segdeformer.inference.evaluate import ImageResult, Tally, check_same_classes, evaluate_images
    from segdeformer.inference.scorecard import write_scorecard
    from segdeformer.report.sheet import shown_indices, write_sheet
    from segdeformer.runtime.distributed import from_all, is_first

    strides = _strides(key_stride, save=save, nproc=nproc, picture=picture)
    if launched(nproc):
        return
    opened = open_model(
        checkpoint,
        device=device,
        impl=impl,
        fold=fold,
        mode=mode,
        scales=scales,
        flip=flip,
        key_stride=max(strides, default=None),
    )
    recipe, about = opened.recipe, opened.loaded.checkpoint
    config = choose_data(recipe.data, data, classes)
    dataset = open_dataset(config, "val")
    check_same_classes(about.classes, dataset, str(about.path))

    console = show.make_console(quiet=not is_first())
    console.print(f"{about.path} (iteration {about.iteration:,}) on {config.name} {config.val_split}")
    protocol = recipe.evaluate
    if len(strides) > 1:
        protocol = protocol.model_copy(update={"key_stride": None})
    console.print(f"protocol: {show.protocol_line(protocol)}")
    console.print(opened.folding, style="dim")
    if len(strides) > 1:
        _compare(opened, dataset, config, strides, console, json_file, save=save)
        return
    shown = shown_indices(len(dataset)) if picture is not None else []
    drawn: list[tuple[int, ImageResult]] = []
    tally = Tally(dataset.classes)
    with joined(opened, console) as runtime:
        console.print(show.device_words(runtime), style="dim")
        own = runtime.processes.own_indices(len(dataset))
        results = evaluate_images(
            opened.loaded.model, dataset, tally, protocol=recipe.evaluate, data=config, runtime=runtime
        )
        for index, result in zip(own, show.ticking(console, results, "images", len(own)), strict=True):
            if index in shown:
                drawn.append((index, result._replace(predicted_HW=result.predicted_HW.cpu())))
        tally.gather(runtime.processes)
        drawn = sorted(chain.from_iterable(from_all(drawn, runtime.processes)), key=itemgetter(0))
        if not runtime.processes.is_first:
            return
    report = tally.report()
    console.print(show.scores_table(report), soft_wrap=False)
    console.print(show.scores_line(report), style="bold")
    if json_file is not None:
        write_scorecard(
            json_file,
            report,
            protocol=recipe.evaluate,
            data=config,
            label_map=dataset.label_map,
            checkpoint=about,
        )
        console.print(f"scores: {json_file}")
    if picture is not None:
        headline = f"{recipe.name}: {show.scores_line(report)}"
        write_sheet(picture, [result for _, result in drawn], report.classes, headline=headline)
        console.print(f"picture: {picture}")
    if save:
        _save(about, strides[0], console)


def _strides(text: str | None, *, save: bool, nproc: int | None, picture: Path | None) -> list[int]:
    """The key strides that are asked for, none or one or several; raises `UsageError` for what is none."""
    from segdeformer.errors import UsageError

    parts = [] if text is None else [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise UsageError(f"--key-stride {text}: expected whole numbers from 1 on, such as 4 or 1,2,4,8")
    if save and not parts:
        raise UsageError(
            "--save keeps a key stride; name it, or several to choose from: --key-stride 1,2,4,8"
        )
    if len(parts) > 1 and nproc not in (None, 1):
        raise UsageError("several key strides are compared by one process; leave out --nproc")
    if len(parts) > 1 and picture is not None:
        raise UsageError("--picture draws one key stride; name one, or leave it out")
    return [int(part) for part in parts]


def _compare(
    opened: Opened,
    dataset: Dataset,
    config: DataConfig,
    strides: list[int],
    console: Console,
    json_file: Path | None,
    *,
    save: bool,
) -> None:
    """Score each key stride beside all keys, and say which one costs nothing that can be seen."""
    from segdeformer.cli import show
    from segdeformer.cli.inference import joined
    from segdeformer.inference.key_strides import (
        EXACT,
        StrideTally,
        compare_key_strides,
        recommended,
        strides_values,
    )
    from segdeformer.inference.scorecard import write_scorecard

    tally = StrideTally(dataset.classes, strides)
    protocol, about = opened.recipe.evaluate, opened.loaded.checkpoint
    with joined(opened, console) as runtime:
        console.print(show.device_words(runtime), style="dim")
        done = compare_key_strides(
            opened.loaded.model, dataset, tally, protocol=protocol, data=config, runtime=runtime
        )
        for _ in show.ticking(console, done, "images", len(dataset)):
            pass
    rows = tally.results()
    table = show.make_table(
        "key stride", "mIoU %", "change, 95 %", "agreement %", "most changed class", "ms/image", "scores"
    )
    for row in rows:
        name, change = row.most_changed
        low, high = (f"{100 * end:+.2f}" for end in row.change)
        exact = row.stride == EXACT
        table.add_row(
            "1, exact" if exact else str(row.stride),
            show.percent(row.report.scores.miou),
            "" if exact else f"{low} to {high}",
            show.percent(row.agreement),
            "" if exact else f"{name} {100 * change:+.2f}",
            f"{row.ms:.1f}",
            f"{row.num_scores:.3g}",
        )
    console.print(table)
    best = recommended(rows)
    console.print("change: of mIoU, over the images; scores: query-key products of an image", style="dim")
    advice = "every key stride here may lose more than 0.1 mIoU: keep all keys"
    if best.stride != EXACT:
        speed = f"{rows[0].ms / best.ms:.1f} times as fast here"
        advice = f"key stride {best.stride} is the largest that loses less than 0.1 mIoU: {speed}"
    console.print(advice, style="bold")
    if json_file is not None:
        write_scorecard(
            json_file,
            rows[0].report,
            protocol=protocol.model_copy(update={"key_stride": EXACT}),
            data=config,
            label_map=dataset.label_map,
            checkpoint=about,
            key_strides=strides_values(rows),
            recommended_key_stride=best.stride,
        )
        console.print(f"scores: {json_file}")
    if save:
        _save(about, best.stride, console)


def _save(about: Checkpoint, stride: int, console: Console) -> None:
    from segdeformer.weights.checkpoint import save_key_stride

    save_key_stride(about, stride)
    console.print(f"{about.path}: eval and predict use key stride {stride} from now on")

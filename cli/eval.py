"""`segdeformer eval`: score a checkpoint on a data set."""

from __future__ import annotations

import sys
from itertools import chain
from operator import itemgetter
from pathlib import Path
from typing import Annotated

import typer

from segdeformer.cli.errors import one_line_errors
from segdeformer.cli.options import (
    CheckpointArgument,
    ClassesFile,
    Device,
    Flip,
    Fold,
    ImplName,
    Mode,
    Nproc,
    Scales,
)


@one_line_errors
def eval_command(
    checkpoint: CheckpointArgument = None,
    data: Annotated[
        str | None, typer.Option(help="landcover, NAME:FOLDER or a folder; default: the checkpoint's.")
    ] = None,
    classes: ClassesFile = None,
    mode: Mode = None,
    scales: Scales = None,
    flip: Flip = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write scores, protocol and weights hash here.")
    ] = None,
    picture: Annotated[
        Path | None, typer.Option(help="Draw some images beside truth and prediction here (PNG).")
    ] = None,
    device: Device = "auto",
    impl: ImplName = "auto",
    fold: Fold = None,
    nproc: Nproc = None,
) -> None:
    """Score a checkpoint: mIoU, mAcc, aAcc and per-class IoU, and the protocol they belong to."""
    from segdeformer.engine.distributed import (
        from_all,
        is_first,
        joined_processes,
        own_device,
        started_by_torchrun,
    )

    if nproc is not None and nproc > 1 and not started_by_torchrun():
        from segdeformer.cli.launch import launch

        launch(nproc, sys.argv[1:], max_restarts=0)
        return
    from segdeformer.cli.options import changed_protocol, checked_impl, load_for_inference
    from segdeformer.data.datasets import open_dataset, parse_data_spec
    from segdeformer.engine.checkpoint import find_checkpoint
    from segdeformer.engine.device import choose_device
    from segdeformer.engine.evaluate import ImageResult, Tally, check_same_classes, evaluate_images
    from segdeformer.engine.implementation import settle_inference
    from segdeformer.engine.scorecard import write_scorecard
    from segdeformer.kernels.impl import describe_impl

    chosen = own_device(choose_device(device))
    resolved = checked_impl(impl, chosen)
    path = find_checkpoint(checkpoint)
    loaded, folding = load_for_inference(path, device=chosen, impl=resolved, fold=fold)
    recipe = loaded.checkpoint.recipe
    protocol = changed_protocol(recipe.evaluate, mode=mode, scales=scales, flip=flip)
    config = recipe.data
    if data is not None:
        given = parse_data_spec(data)
        config = config.model_copy(update={"name": given.name, "root": given.root})
    if classes is not None:
        config = config.model_copy(update={"classes": str(classes.resolve())})
    dataset = open_dataset(config, "val")
    check_same_classes(loaded.checkpoint.classes, dataset, str(path))

    from rich.progress import track

    from segdeformer.cli.show import make_console, protocol_line, scores_line, scores_table
    from segdeformer.report.sheet import shown_indices, write_sheet

    console = make_console(quiet=not is_first())
    console.print(f"{path} (iteration {loaded.checkpoint.iteration:,}) on {config.name} {config.val_split}")
    console.print(f"protocol: {protocol_line(protocol)}")
    console.print(folding, style="dim")
    shown = shown_indices(len(dataset)) if picture is not None else []
    drawn: list[tuple[int, ImageResult]] = []
    tally = Tally(dataset.classes)
    with joined_processes(chosen) as processes:
        settle_inference(
            loaded.model,
            recipe,
            protocol,
            device=chosen,
            impl=resolved,
            processes=processes,
            say=console.print,
        )
        console.print(f"device {chosen}, attention {describe_impl(resolved, chosen)}", style="dim")
        share = processes.share(len(dataset))
        results = evaluate_images(
            loaded.model,
            dataset,
            tally,
            protocol=protocol,
            data=config,
            device=chosen,
            impl=resolved,
            processes=processes,
        )
        ticking = track(
            results,
            "images",
            total=len(share),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        for index, result in zip(share, ticking, strict=True):
            if index in shown:
                drawn.append((index, result._replace(predicted_HW=result.predicted_HW.cpu())))
        tally.gather(processes)
        drawn = sorted(chain.from_iterable(from_all(drawn, processes)), key=itemgetter(0))
        if not processes.is_first:
            return
    report = tally.report()
    console.print(scores_table(report), soft_wrap=False)
    console.print(scores_line(report), style="bold")
    if json_file is not None:
        write_scorecard(
            json_file,
            report,
            protocol=protocol,
            data=config,
            label_map=dataset.label_map,
            checkpoint=loaded.checkpoint,
        )
        console.print(f"scores: {json_file}")
    if picture is not None:
        write_sheet(
            picture, [r for _, r in drawn], report.classes, headline=f"{recipe.name}: {scores_line(report)}"
        )
        console.print(f"picture: {picture}")

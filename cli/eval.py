"""`segdeformer eval`: score a checkpoint on a data set."""

from __future__ import annotations

from itertools import chain
from operator import itemgetter
from pathlib import Path
from typing import Annotated

from typer import Option

from segdeformer.cli import options
from segdeformer.cli.errors import one_line_errors


@one_line_errors
def eval_command(
    checkpoint: options.CheckpointArgument = None,
    data: Annotated[
        str | None, Option(help="landcover, NAME:FOLDER or a folder; default: the checkpoint's.")
    ] = None,
    classes: options.ClassesFile = None,
    mode: Annotated[
        str | None,
        Option(
            help="whole image, slide a window, or auto; several, as whole,slide, are compared. Default: the "
            "checkpoint's."
        ),
    ] = None,
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
    from segdeformer.cli.eval_compare import compare, keep_stride, parse_variants
    from segdeformer.cli.inference import joined, launched, open_model
    from segdeformer.data.datasets import FileDataset, choose_data, open_dataset
    from segdeformer.errors import UsageError, listed
    from segdeformer.inference.evaluate import ImageResult, Tally, check_same_classes, evaluate_images
    from segdeformer.inference.scorecard import write_scorecard
    from segdeformer.models.few_keys import check_key_stride
    from segdeformer.report.sheet import shown_indices, write_sheet
    from segdeformer.runtime.distributed import from_all, is_first

    variants = parse_variants(mode, key_stride)
    if variants.are_several and nproc not in (None, 1):
        raise UsageError("several protocols are compared by one process; leave out --nproc")
    if variants.are_several and picture is not None:
        raise UsageError("--picture draws one protocol; name one, or leave it out")
    if save and (variants.strides == [None] or len(variants.modes) > 1):
        raise UsageError("--save keeps a key stride: name it, or some to choose from, and at most one mode")
    if launched(nproc):
        return
    opened = open_model(checkpoint, device=device, impl=impl, fold=fold, scales=scales, flip=flip)
    protocols = variants.protocols(opened)
    if not variants.are_several:
        (protocol,) = protocols.values()
        opened = opened._replace(recipe=opened.recipe.model_copy(update={"evaluate": protocol}))
    for protocol in protocols.values():
        check_key_stride(opened.loaded.model, protocol.key_stride)
    recipe, about = opened.recipe, opened.loaded.checkpoint
    config = choose_data(recipe.data, data, classes)
    dataset = open_dataset(config, "val")
    check_same_classes(about.classes, dataset, str(about.path))

    console = show.make_console(quiet=not is_first())
    console.print(f"{about.path} (iteration {about.iteration:,}) on {config.name} {config.val_split}")
    if not variants.are_several:
        console.print(f"protocol: {show.protocol_line(recipe.evaluate)}")
    console.print(opened.folding, style="dim")
    if isinstance(dataset, FileDataset) and dataset.skipped:
        console.print(f"not visited: {listed(dataset.skipped)}", style="yellow")
    if variants.are_several:
        compare(opened, dataset, config, protocols, console, json_file, save=save)
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
    if save and recipe.evaluate.key_stride is not None:
        keep_stride(about, recipe.evaluate.key_stride, console)

"""`segdeformer predict`: class maps, overlays and confidence maps of your images."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from segdeformer.cli.errors import one_line_errors
from segdeformer.cli.options import Device, Flip, Fold, ImplName, Mode, Nproc, Scales


@one_line_errors
def predict_command(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint, or a run folder (its best).")],
    images: Annotated[list[Path], typer.Argument(help="Images, or folders of images.")],
    out: Annotated[Path, typer.Option(help="Folder for the results; made if missing.")],
    overlay: Annotated[
        bool, typer.Option("--overlay", help="Also write the image coloured by class, with a legend.")
    ] = False,
    confidence: Annotated[
        bool, typer.Option("--confidence", help="Also write a map of the winner's softmax.")
    ] = False,
    opacity: Annotated[float, typer.Option(min=0.0, max=1.0, help="Of the colours over the image.")] = 0.6,
    mode: Mode = None,
    scales: Scales = None,
    flip: Flip = None,
    device: Device = "auto",
    impl: ImplName = "auto",
    fold: Fold = None,
    nproc: Nproc = None,
) -> None:
    """Predict images of any size: <name>.png holds one class id per pixel, at the input's own size."""
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
    from segdeformer.data.images import read_image
    from segdeformer.engine.checkpoint import find_checkpoint
    from segdeformer.engine.device import choose_device
    from segdeformer.engine.implementation import settle_inference
    from segdeformer.engine.predict import predict_image
    from segdeformer.errors import UserError
    from segdeformer.kernels.impl import describe_impl
    from segdeformer.report.predictions import Kind, plan_jobs, write_prediction

    kinds: list[Kind] = []
    if overlay:
        kinds.append("overlay")
    if confidence:
        kinds.append("confidence")
    jobs = plan_jobs(images, out, kinds=kinds)
    chosen = own_device(choose_device(device))
    resolved = checked_impl(impl, chosen)
    path = find_checkpoint(checkpoint)
    loaded, folding = load_for_inference(path, device=chosen, impl=resolved, fold=fold)
    recipe = loaded.checkpoint.recipe
    protocol = changed_protocol(recipe.evaluate, mode=mode, scales=scales, flip=flip)

    from rich.progress import track

    from segdeformer.cli.show import make_console, protocol_line

    console = make_console(quiet=not is_first())
    failed: list[UserError] = []
    written: list[Path] = []
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
        attention = describe_impl(resolved, chosen)
        console.print(f"{loaded.checkpoint.path}, {len(jobs)} images, device {chosen}, attention {attention}")
        console.print(folding, style="dim")
        console.print(f"protocol: {protocol_line(protocol)}", style="dim")
        share = [jobs[index] for index in processes.share(len(jobs))]
        for job in track(share, "images", console=console, transient=True, disable=not console.is_terminal):
            try:
                image_HW3 = read_image(job.image)
                prediction = predict_image(
                    loaded.model,
                    image_HW3,
                    protocol=protocol,
                    data=recipe.data,
                    device=chosen,
                    impl=resolved,
                )
                written += write_prediction(
                    job, image_HW3, prediction, loaded.checkpoint.classes, kinds=kinds, opacity=opacity
                )
            except UserError as error:  # one bad image does not cost the others
                failed.append(error)
        shares = from_all((written, [str(error) for error in failed]), processes)
    written = [path for paths, _ in shares for path in paths]
    failures = [message for _, messages in shares for message in messages]
    for path in written[:6]:
        console.print(f"  {path}")
    if len(written) > 6:
        console.print(f"  ... {len(written)} files in {out}")
    if failures:
        more = f" (and {len(failures) - 1} more images failed)" if len(failures) > 1 else ""
        raise UserError(f"{failures[0]}{more}")

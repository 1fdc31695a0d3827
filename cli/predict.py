"""`segdeformer predict`: class maps, overlays and confidence maps of your images."""

from __future__ import annotations

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
        bool, typer.Option("--confidence", help="Also write a map of the predicted class's softmax.")
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
    from rich.progress import track

    from segdeformer.cli.inference import joined, launched, open_model
    from segdeformer.cli.show import make_console, protocol_line
    from segdeformer.data.images import read_image
    from segdeformer.errors import UserError
    from segdeformer.inference.predict import predict_image
    from segdeformer.kernels.impl import describe_impl
    from segdeformer.report.predictions import Kind, plan_jobs, write_prediction
    from segdeformer.runtime.distributed import from_all, is_first

    if launched(nproc):
        return
    kinds: list[Kind] = []
    if overlay:
        kinds.append("overlay")
    if confidence:
        kinds.append("confidence")
    jobs = plan_jobs(images, out, kinds=kinds)
    opened = open_model(checkpoint, device=device, impl=impl, fold=fold, mode=mode, scales=scales, flip=flip)
    (model, about), recipe = opened.loaded, opened.recipe

    console = make_console(quiet=not is_first())
    failed: list[UserError] = []
    written: list[Path] = []
    with joined(opened, console) as runtime:
        attention = describe_impl(runtime.impl, runtime.device)
        console.print(f"{about.path}, {len(jobs)} images, device {runtime.device}, attention {attention}")
        console.print(opened.folding, style="dim")
        console.print(f"protocol: {protocol_line(recipe.evaluate)}", style="dim")
        own = [jobs[index] for index in runtime.processes.own_indices(len(jobs))]
        for job in track(own, "images", console=console, transient=True, disable=not console.is_terminal):
            try:
                image_HW3 = read_image(job.image)
                prediction = predict_image(
                    model, image_HW3, protocol=recipe.evaluate, data=recipe.data, runtime=runtime
                )
                written += write_prediction(
                    job, image_HW3, prediction, about.classes, kinds=kinds, opacity=opacity
                )
            except UserError as error:  # one bad image does not cost the others
                failed.append(error)
        everybody = from_all((written, [str(error) for error in failed]), runtime.processes)
    written = [path for paths, _ in everybody for path in paths]
    failures = [message for _, messages in everybody for message in messages]
    for path in written[:6]:
        console.print(f"  {path}")
    if len(written) > 6:
        console.print(f"  ... {len(written)} files in {out}")
    if failures:
        more = f" (and {len(failures) - 1} more images failed)" if len(failures) > 1 else ""
        raise UserError(f"{failures[0]}{more}")

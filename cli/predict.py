"""`segdeformer predict`: class maps, overlays and confidence maps of your images."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from segdeformer.cli.errors import one_line_errors
from segdeformer.cli.options import Device, Flip, Fold, ImplName, KeyStride, Mode, Nproc, Scales


@one_line_errors
def predict_command(
    checkpoint: Annotated[Path, Argument(help="A checkpoint, or a run folder (its best).")],
    images: Annotated[list[Path], Argument(help="Images, or folders of images.")],
    out: Annotated[Path, Option(help="Folder for the results; made if missing.")],
    overlay: Annotated[
        bool, Option("--overlay", help="Also write the image coloured by class, with a legend.")
    ] = False,
    confidence: Annotated[
        bool, Option("--confidence", help="Also write a map of the predicted class's softmax.")
    ] = False,
    opacity: Annotated[float, Option(min=0.0, max=1.0, help="Of the colours over the image.")] = 0.6,
    mode: Mode = None,
    scales: Scales = None,
    flip: Flip = None,
    key_stride: KeyStride = None,
    device: Device = "auto",
    impl: ImplName = "auto",
    fold: Fold = None,
    nproc: Nproc = None,
) -> None:
    """Predict images of any size: <name>.png holds one class id per pixel, at the input's own size."""
    from segdeformer.cli.inference import joined, launched, open_model
    from segdeformer.cli.show import device_words, make_console, protocol_line, ticking
    from segdeformer.data.images import read_image
    from segdeformer.errors import UserError, count, listed
    from segdeformer.inference.predict import predict_image
    from segdeformer.report.predictions import Kind, plan_jobs, write_prediction
    from segdeformer.runtime.distributed import from_all, is_first

    if launched(nproc):
        return
    wanted: dict[Kind, bool] = {"overlay": overlay, "confidence": confidence}
    kinds = [kind for kind, on in wanted.items() if on]
    jobs, skipped = plan_jobs(images, out, kinds=kinds)
    opened = open_model(
        checkpoint,
        device=device,
        impl=impl,
        fold=fold,
        mode=mode,
        scales=scales,
        flip=flip,
        key_stride=key_stride,
    )
    (model, about), recipe = opened.loaded, opened.recipe

    console = make_console(quiet=not is_first())
    failed: list[UserError] = []
    written: list[Path] = []
    with joined(opened, console) as runtime:
        console.print(f"{about.path}, {count(len(jobs), 'image')}, {device_words(runtime)}")
        console.print(opened.folding, style="dim")
        if skipped:
            console.print(f"not visited: {listed(skipped)}", style="yellow")
        console.print(f"protocol: {protocol_line(recipe.evaluate)}", style="dim")
        own = [jobs[index] for index in runtime.processes.own_indices(len(jobs))]
        for job in ticking(console, own, "images", len(own)):
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
        console.print(f"  ... {count(len(written), 'file')} in {out}")
    if failures:
        several = f"{len(failures)} of {count(len(jobs), 'image')} failed: " if len(failures) > 1 else ""
        raise UserError(f"{several}{listed(failures)}")

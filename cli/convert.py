"""`segdeformer convert`: models of NVlabs, mmsegmentation and Hugging Face into ours, and back."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from typer import Argument, Option

from segdeformer.cli.errors import one_line_errors
from segdeformer.errors import UsageError, and_more, count, verb_of
from segdeformer.files import write_json

if TYPE_CHECKING:
    from rich.console import Console

    from segdeformer.weights.exports import Parity
    from segdeformer.weights.imports import Imported

Project = Literal["nvlabs", "mmseg", "huggingface"]


@one_line_errors
def convert_command(
    source: Annotated[
        Path,
        Argument(help="A model file, or a folder of Hugging Face; with --to a run or checkpoint of ours."),
    ],
    out: Annotated[
        Path, Option(help="The new checkpoint (.safetensors); with --to a .pth file, or a folder.")
    ],
    to: Annotated[Project | None, Option(help="Write one of our checkpoints for this project.")] = None,
    from_: Annotated[
        Literal["auto", "nvlabs", "mmseg", "huggingface"],
        Option("--from", help="Whose names the file has; auto recognises them."),
    ] = "auto",
    recipe: Annotated[
        str | None, Option(help="A recipe, or a TOML file, with the model of the file; default: deduced.")
    ] = None,
    classes: Annotated[
        str | None,
        Option(help="ade20k, cityscapes, coco_stuff or a TOML file of class names; default: the file's."),
    ] = None,
    license_: Annotated[
        str | None, Option("--license", help="Of the weights; default: what the published ones have.")
    ] = None,
    prefix: Annotated[
        str | None,
        Option(help="Of several copies of a model in the file, the one whose names begin so: ema_model."),
    ] = None,
    check: Annotated[
        bool,
        Option("--check/--no-check", help="Compare with the project's library, where that is installed."),
    ] = True,
    json_file: Annotated[
        Path | None, Option("--json", help="Write what was used, left out and compared here.")
    ] = None,
) -> None:
    """Convert SegFormer and UperNet models of other projects into a checkpoint for eval, predict and train.

    Every tensor of the file is used, or listed with the reason why not; anything else is an error.
    """
    if to is not None:
        given = {"--from": from_ != "auto", "--recipe": recipe, "--classes": classes, "--prefix": prefix}
        if extra := next((name for name, value in given.items() if value), None):
            raise UsageError(f"{extra} is for files of other projects; leave it out with --to")
        _export(source, out, to=to, license_text=license_, check=check, json_file=json_file)
        return
    if out.suffix != ".safetensors" or out.is_dir():
        raise UsageError(f"--out {out}: a checkpoint is a .safetensors file")
    from segdeformer.cli.show import make_console
    from segdeformer.weights.checkpoint import save_checkpoint
    from segdeformer.weights.exports import check_parity
    from segdeformer.weights.imports import import_model, report_values
    from segdeformer.weights.labels import forbids_commerce

    imported = import_model(
        source,
        project=None if from_ == "auto" else from_,
        prefix=prefix,
        recipe_name=recipe,
        classes=classes,
        license_text=license_,
    )
    console = make_console()
    _describe(console, imported)
    parity = None
    if check:
        parity = check_parity(
            imported.model, imported.naming, imported.source.tensors, imported.source.huggingface_config
        )
        _describe_parity(console, parity)
    save_checkpoint(
        out,
        imported.model,
        recipe=imported.recipe,
        classes=imported.classes.table,
        iteration=imported.source.iteration,
        best_miou=None,
        license=imported.license,
    )
    if forbids_commerce(imported.license):
        console.print(
            f"warning: the weights may not be used commercially: {imported.license}", style="yellow"
        )
    if json_file is not None:
        values = report_values(imported) | {"out": str(out), "parity": parity and parity._asdict()}
        write_json(json_file, values)
        console.print(f"report: {json_file}")
    console.print(f"checkpoint: {out} (try: segdeformer predict {out} IMAGES --out results)", style="bold")


def _describe(console: Console, imported: Imported) -> None:
    """What was in the file, and what became of it."""
    from segdeformer.weights.names import PROJECT_TITLES

    source = imported.source
    console.print(f"{source.path}: {imported.title}, in the names of {PROJECT_TITLES[source.project]}")
    places = [f"`{place}`" for place in (source.container, source.prefix) if place]
    under = f" under {', '.join(places)}" if places else ""
    console.print(
        f"used: {count(imported.used, 'tensor', of=len(source.tensors) + len(source.aside))}{under}"
    )
    groups: dict[str, list[str]] = {}
    for item in imported.unused:
        groups.setdefault(item.reason, []).append(item.name)
    for reason, names in groups.items():
        console.print(f"not used: {names[0]}{and_more(names)} ({reason})")
    if imported.missing:
        missing = f"{imported.missing[0]}{and_more(imported.missing)}"
        console.print(f"missing: {missing} (counters, start at 0)")
    if source.passed_over:
        console.print(f"not read, since it is no tensor and could run code: {', '.join(source.passed_over)}")
    classes = imported.classes
    console.print(f"classes: {len(classes.table.names)}, {classes.origin}")
    protocol = imported.recipe.data.name
    console.print(
        f"recipe: {imported.recipe.name}; data, training and protocol as for {protocol}", style="dim"
    )
    console.print(f"license: {imported.license}")


def _describe_parity(console: Console, parity: Parity) -> None:
    console.print(
        f"checked: {count(parity.rewritten, 'tensor')} written back in the old names "
        f"{verb_of(parity.rewritten, 'are')} equal to the bit"
    )
    if parity.compared_with is None:
        console.print(f"logits not compared: {parity.reason}", style="dim")
    else:
        difference = f"{parity.largest_difference:.1e}"
        console.print(f"checked: logits differ from those of {parity.compared_with} by at most {difference}")


def _export(
    source: Path, out: Path, *, to: Project, license_text: str | None, check: bool, json_file: Path | None
) -> None:
    from segdeformer.cli.show import make_console
    from segdeformer.weights.checkpoint import load
    from segdeformer.weights.exports import export_model
    from segdeformer.weights.names import PROJECT_TITLES

    loaded = load(source)
    checkpoint = loaded.checkpoint
    license_text = license_text or checkpoint.license or "not stated"
    exported = export_model(loaded, to, out, license_text=license_text, check=check)
    console = make_console()
    console.print(
        f"{checkpoint.path} ({checkpoint.recipe.name}) for {PROJECT_TITLES[to]}: "
        f"{count(exported.tensors, 'tensor')}"
    )
    if exported.left_out:
        console.print(
            f"left out: {count(len(exported.left_out), 'tensor')} of the auxiliary head (training only)"
        )
    if exported.parity is not None:
        _describe_parity(console, exported.parity)
    console.print(f"license: {license_text}")
    for file in exported.files:
        console.print(f"written: {file}", style="bold")
    if json_file is not None:
        values = {
            "source": str(checkpoint.path),
            "project": to,
            "files": [str(file) for file in exported.files],
            "tensors": exported.tensors,
            "left_out": list(exported.left_out),
            "license": license_text,
            "parity": exported.parity and exported.parity._asdict(),
        }
        write_json(json_file, values)
        console.print(f"report: {json_file}")

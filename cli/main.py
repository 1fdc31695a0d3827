"""The `segdeformer` command."""

from __future__ import annotations

import os
import sys
from typing import Annotated, Any

import typer

from segdeformer.cli.ablate import ablate_command
from segdeformer.cli.bench import bench_command
from segdeformer.cli.convert import convert_command
from segdeformer.cli.data import data_app
from segdeformer.cli.eval import eval_command
from segdeformer.cli.output import finished_output, replace_what_cannot_be_encoded
from segdeformer.cli.predict import predict_command
from segdeformer.cli.recipes import recipes_command
from segdeformer.cli.train import train_command
from segdeformer.version import __version__

# Read once, when PyTorch loads: OpenMP threads that wait give their core away. Spinning, the default, made
# three trainings at once on two cores 4 times slower, and is no faster alone.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


class Command(typer.Typer):
    """A command whose output always arrives: characters are replaced, a full disk is one line."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        replace_what_cannot_be_encoded()
        with finished_output():
            return super().__call__(*args, **kwargs)


# Read when the hub's client is imported: without a network, a download of weights fails soon.
os.environ.setdefault("HF_HUB_ETAG_TIMEOUT", "5")

app = Command(
    name="segdeformer",
    help="Semantic segmentation with the SegDeformer decoder (ECCV 2022).",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("train")(train_command)
app.command("eval")(eval_command)
app.command("predict")(predict_command)
app.command("recipes")(recipes_command)
app.command("bench")(bench_command)
app.command("convert")(convert_command)
app.command("ablate")(ablate_command)
app.add_typer(data_app, name="data")


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"segdeformer {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    replace_what_cannot_be_encoded()
    # As for `python -m`: parts of one's own may lie in this folder. At the end, so that it hides nothing.
    sys.path.append(os.getcwd())

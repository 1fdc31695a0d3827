"""`python -m segdeformer` is the `segdeformer` command."""

from segdeformer.cli.main import app

app(prog_name="segdeformer")

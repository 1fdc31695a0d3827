"""`segdeformer recipes`: list the recipes, or print one to start your own from."""

from __future__ import annotations

from typing import Annotated

import typer
from typer import Argument

from segdeformer.cli.errors import one_line_errors


@one_line_errors
def recipes_command(
    name: Annotated[str | None, Argument(help="Print this recipe's TOML.")] = None,
) -> None:
    """List the shipped recipes, or print one: segdeformer recipes NAME > mine.toml"""
    from segdeformer.config import load_recipe, recipe_names, recipe_text

    if name is not None:
        typer.echo(recipe_text(name), nl=False)
        return
    from segdeformer.cli.show import make_console, make_table

    table = make_table("recipe", "what it trains", "paper mIoU", num_left=3)
    table.columns[0].no_wrap = True
    for recipe in map(load_recipe, recipe_names()):
        reported = recipe.reported.miou if recipe.reported else None
        table.add_row(recipe.name, recipe.description, "" if reported is None else f"{reported:.2f}")
    make_console().print(table, soft_wrap=False)

"""Turn what went wrong into one line and an exit code."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from typing import ParamSpec

import typer

from segdeformer.errors import UserError

P = ParamSpec("P")


def one_line_errors(command: Callable[P, None]) -> Callable[P, None]:
    """A command whose `UserError`s print as `error: ...` and whose Ctrl-C as `stopped`, no traceback."""

    @functools.wraps(command)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            command(*args, **kwargs)
        except UserError as error:
            fail(str(error), error.exit_code)
        except KeyboardInterrupt:
            fail("stopped by Ctrl-C; files that were being written are left out", 1)
        except BrokenPipeError:  # the reader of our output, `head` say, went away
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(1) from None

    return guarded


def fail(message: str, exit_code: int) -> None:
    """Print one line to stderr and leave."""
    typer.secho("error: ", fg="red", bold=True, err=True, nl=False)
    typer.echo(" ".join(message.split()), err=True)
    raise typer.Exit(exit_code)

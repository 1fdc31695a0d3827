"""Turn what went wrong into one line and an exit code."""

from __future__ import annotations

import functools
import os
import sys
import time
from collections.abc import Callable
from typing import ParamSpec

import typer

from segdeformer.cli.stopping import Interrupted, StoppedError
from segdeformer.errors import ElsewhereError, LocalError, UserError

P = ParamSpec("P")

HEAD_START_S = 10.0
FIRST_SAYS_IT_S = 1.0


def one_line_errors(command: Callable[P, None]) -> Callable[P, None]:
    """A command whose `UserError`s print as `error: ...` and whose Ctrl-C as `stopped`, no traceback."""

    @functools.wraps(command)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            command(*args, **kwargs)
        except UserError as error:
            if is_silent(error):
                # torchrun ends all processes with the first that ends, which must not be this silent one.
                time.sleep(FIRST_SAYS_IT_S if isinstance(error, StoppedError) else HEAD_START_S)
                raise typer.Exit(error.exit_code) from None
            if not _is_first():  # perhaps the first one has such an error too; then its end is ours
                time.sleep(FIRST_SAYS_IT_S)
            fail(str(error), error.exit_code)
        except KeyboardInterrupt as error:
            if is_silent(error):
                raise typer.Exit(1) from None
            source = error.source if isinstance(error, Interrupted) else "Ctrl-C"
            fail(f"stopped by {source}; files that were being written are left out", 1)
        except BrokenPipeError:  # the reader of our output, `head` say, went away
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(1) from None

    return guarded


def is_silent(error: BaseException) -> bool:
    """In a run of several processes: whether it is another's to tell this error, mostly the first one's."""
    if "MASTER_ADDR" not in os.environ or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return False
    if isinstance(error, ElsewhereError):
        return True
    return not _is_first() and not isinstance(error, LocalError)


def _is_first() -> bool:
    return "MASTER_ADDR" not in os.environ or os.environ.get("RANK", "0") == "0"


def fail(message: str, exit_code: int) -> None:
    """Print one line to stderr and leave."""
    typer.secho("error: ", fg="red", bold=True, err=True, nl=False)
    typer.echo(" ".join(message.split()), err=True)
    raise typer.Exit(exit_code)

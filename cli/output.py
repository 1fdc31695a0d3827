"""What stdout and stderr cannot take: characters outside their encoding, and a disk that is full."""

from __future__ import annotations

import contextlib
import io
import os
import sys
import traceback
from collections.abc import Iterator
from typing import NoReturn, TextIO

import typer

from segdeformer.files import reason_of

PRINTERS = ("rich", "typer", "click")


def replace_what_cannot_be_encoded() -> None:
    """Let both streams write `?` for what their encoding lacks, bytes of names that are no UTF-8 too."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
            stream.reconfigure(errors="replace")


def discard(stream: TextIO | None) -> None:
    """Send what is left in a stream's buffer, and what follows, nowhere: the interpreter would fail at it."""
    with contextlib.suppress(OSError, ValueError, AttributeError):  # closed, or not a file's
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())  # type: ignore[union-attr]
        os.close(nowhere)


def output_error(error: OSError | None = None) -> OSError | None:
    """Why stdout takes no more, if it does not: what a flush says, or an error if it came from printing.

    What cannot be written is discarded.
    """
    try:
        if sys.stdout is not None and not sys.stdout.closed:
            sys.stdout.flush()
    except OSError as failed:
        discard(sys.stdout)
        return failed
    # Unbuffered output leaves nothing to be flushed.
    for frame, _ in traceback.walk_tb(None if error is None else error.__traceback__):
        module = str(frame.f_globals.get("__name__"))
    if error is None or module.partition(".")[0] not in PRINTERS:
        return None
    discard(sys.stdout)
    return error


def output_message(error: OSError) -> str:
    """One line on an output that could not be written."""
    return f"the output cannot be written ({reason_of(error)}); free space, or send it elsewhere"


def print_error(message: str) -> None:
    """Print one line to stderr, if that takes any."""
    if sys.stderr is None:
        return
    try:
        # Named, for by itself click would write UTF-8 to a stream whose encoding is ASCII.
        typer.secho("error: ", fg="red", bold=True, file=sys.stderr, nl=False)
        typer.echo(" ".join(message.split()), file=sys.stderr)
    except OSError:
        discard(sys.stderr)


@contextlib.contextmanager
def finished_output() -> Iterator[None]:
    """Flush stdout when a command has ended, where the interpreter would fail with a traceback.

    What cannot be written is one line on stderr and exit code 1; where the reader went away, no line.
    """
    try:
        yield
    except OSError as error:  # outside a command: the help, say
        if (failed := output_error(error)) is None:
            raise
        _leave(failed)
    finally:
        if (failed := output_error()) is not None:
            _leave(failed)


def _leave(failed: OSError) -> NoReturn:
    if not isinstance(failed, BrokenPipeError):
        print_error(output_message(failed))
    raise SystemExit(1) from None

"""Turn what went wrong into one line and an exit code."""

from __future__ import annotations

import errno
import functools
import os
import sys
import time
from collections.abc import Callable
from typing import ParamSpec

import typer

from segdeformer.cli.output import discard, output_error, output_message, print_error
from segdeformer.cli.stopping import Interrupted, StoppedError
from segdeformer.errors import ElsewhereError, LocalError, UserError
from segdeformer.files import reason_of

P = ParamSpec("P")

HEAD_START_S = 10.0
FIRST_SAYS_IT_S = 1.0

PERMISSIONS = "change its permissions, or choose another place (--out)"
SPACE = "free space, or choose another place (--out)"
REMEDIES = {
    errno.EACCES: PERMISSIONS,
    errno.EPERM: PERMISSIONS,
    errno.EROFS: "start in a folder that can be written, or choose another place (--out)",
    errno.ENOSPC: SPACE,
    errno.EDQUOT: SPACE,
    errno.EFBIG: "raise the limit (ulimit -f), or choose another place (--out)",
    errno.EMFILE: "raise the limit (ulimit -n), or take fewer --workers",
    errno.ENFILE: "close other programs, or take fewer --workers",
    errno.ENOMEM: "close other programs, or take fewer --workers",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ENOTDIR: "a part of this path is a file where a folder was expected; choose another path",
    errno.EISDIR: "name a file, not a folder",
    errno.EEXIST: "move it away, or choose another path",
    errno.ENOENT: "check the path",
    errno.ELOOP: "its links lead in a circle; mend them",
    errno.EIO: "the disk or the network drive fails; check it, or choose another place (--out)",
    errno.EADDRINUSE: "choose another MASTER_PORT",
}
ANY_REMEDY = "check the path and what the system says about it"


def one_line_errors(command: Callable[P, None]) -> Callable[P, None]:
    """A command whose errors print as `error: ...` and whose Ctrl-C as `stopped`, no traceback.

    These are `UserError`s and the system's, `OSError`s.
    """

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
            discard(sys.stdout)
            raise typer.Exit(1) from None
        except OSError as error:
            if not _is_first():  # another process may have the same; then its end is ours
                time.sleep(FIRST_SAYS_IT_S)
            failed = output_error(error)
            fail(os_error_message(error) if failed is None else output_message(failed), 1)

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


def os_error_message(error: OSError) -> str:
    """What the system refused, in one line: path, reason, remedy."""
    if error.errno is None:  # made by a library, or carried over from a worker with its traceback
        words = str(error).strip()
        return (words.splitlines()[-1] if "Traceback" in words else words) or type(error).__name__
    names = [
        name for name in (error.filename, error.filename2) if isinstance(name, str | bytes | os.PathLike)
    ]
    path = " -> ".join(os.fsdecode(name) for name in names)
    return f"{path}{': ' if path else ''}{reason_of(error)}; {REMEDIES.get(error.errno, ANY_REMEDY)}"


def fail(message: str, exit_code: int) -> None:
    """Print one line to stderr and leave."""
    print_error(message)
    raise typer.Exit(exit_code)

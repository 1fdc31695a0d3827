"""The exceptions that a command line turns into one line and an exit code."""

from collections.abc import Sequence, Sized


class UserError(ValueError):
    """Something the user can mend: the message says what came, what was expected, what to do.

    Commands print the message as one line and exit with `exit_code`
    (1: the work failed, 2: the command or recipe was written wrongly).
    """

    def __init__(self, message: str, *, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class UsageError(UserError):
    """The command line or the recipe is wrong; nothing was started."""

    def __init__(self, message: str) -> None:
        super().__init__(message, exit_code=2)


class KernelError(UserError):
    """A GPU kernel did not compile or start; the message names kernel, shapes, tile and remedy."""


def listed(messages: Sequence[str], *, most: int = 8) -> str:
    """Several messages in one line: the first of them, and how many more there are."""
    more = len(messages) - most
    return " | ".join(messages[:most]) + (f" | and {more:,} more" if more > 0 else "")


def count(number: int, noun: str, verb: str = "", *, of: int | None = None) -> str:
    """A number of things, and what they do: `1 class`, `1,200 images`, `1 of 3 label maps holds`.

    noun: of one; verb: of several.
    """
    several = f"{noun}es" if noun.endswith(("s", "x", "ch", "sh")) else f"{noun}s"
    things = f"{number:,}" if of is None else f"{number:,} of {of:,}"
    things += f" {noun if (number if of is None else of) == 1 else several}"
    return f"{things} {verb_of(number, verb)}" if verb else things


def verb_of(number: int, verb: str) -> str:
    """The verb for a number of things from that for several: `is` or `are`, `holds` or `hold`."""
    if number != 1:
        return verb
    return {"are": "is", "have": "has", "were": "was"}.get(verb, f"{verb}s")


def and_more(names: Sized) -> str:
    """What follows the first of several names in a message."""
    return f" and {len(names) - 1} more" if len(names) > 1 else ""


class LocalError(UserError):
    """An error of one process of a run only, which says it whatever its rank; other errors all have alike."""


class ElsewhereError(UserError):
    """Another process of this run has failed, or was killed; this one has nothing to add."""

    def __init__(self) -> None:
        super().__init__("another process of this run has ended; `--resume` goes on from the last checkpoint")

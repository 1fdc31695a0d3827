"""Parts of one's own, found by a Python path; what they must look like is in `protocols`.

A path is `"package.module:name"`. What it names is called with the recipe's `options` for it as keyword
arguments: a class is instantiated with them, a function gets them at every call.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from segdeformer.errors import UsageError


def is_path(name: str) -> bool:
    """Whether this names a part of one's own."""
    return ":" in name


def find_part(path: str, what: str) -> Any:
    """What `package.module:name` names; `what` it is to be is said in errors.

    Raises `UsageError` when the module cannot be imported, or has no such name, or it cannot be called.
    """
    module_name, _, name = path.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise UsageError(f"{what} `{path}`: {module_name} cannot be imported: {error}") from None
        package = module_name.partition(".")[0]
        raise UsageError(
            f"{what} `{path}`: no module `{error.name}`; install the package that has `{package}`, or start "
            "in the folder where it lies"
        ) from None
    except Exception as error:  # anything may go wrong in another's code
        raise UsageError(f"{what} `{path}`: {module_name} cannot be imported: {_told(error)}") from None
    part = module
    for attribute in name.split("."):
        if not hasattr(part, attribute):
            raise UsageError(f"{what} `{path}`: {module.__name__} has no `{name}`")
        part = getattr(part, attribute)
    if not callable(part):
        raise UsageError(f"{what} `{path}` is {type(part).__name__}; expected a function or a class")
    return part


def bound_part(path: str, what: str, options: Mapping[str, Any]) -> Callable[..., Any]:
    """The part with its options: a class's instance, or the function with them as keyword arguments."""
    part = find_part(path, what)
    if not isinstance(part, type):
        return functools.partial(part, **options)
    with explained(path, what):
        instance: Callable[..., Any] = part(**options)
    if not callable(instance):
        raise UsageError(f"{what} `{path}`: its instances cannot be called; give it `__call__`")
    return instance


@contextmanager
def explained(path: str, what: str) -> Iterator[None]:
    """Turn what goes wrong in a first call of the part into a `UsageError` that names it."""
    try:
        yield
    except UsageError:
        raise
    except Exception as error:  # anything may go wrong in another's code
        raise UsageError(f"{what} `{path}` failed: {_told(error)}") from error


def check_attributes(part: object, path: str, what: str, *names: str) -> None:
    """Raise `UsageError` for the first attribute that is missing."""
    for name in names:
        if not hasattr(part, name):
            raise UsageError(f"{what} `{path}` has no `{name}`; it needs {', '.join(names)}")


def refuse(path: str, what: str, came: str, expected: str) -> UsageError:
    """The error for a part that gives something else than it should."""
    return UsageError(f"{what} `{path}` gives {came}; expected {expected}")


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"

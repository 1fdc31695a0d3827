"""Limits that tests put on this process."""

import contextlib
import resource


@contextlib.contextmanager
def no_file_above(size_bytes: int):
    """Writes past this size fail with EFBIG, as those on a full disk do with ENOSPC."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)

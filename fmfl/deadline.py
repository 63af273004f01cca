"""Time limit of a study: it ends at the next finished round, start or notebook once the limit has passed."""

import contextlib
import os
import time
from collections.abc import Iterator

#: Variable of the environment that holds the limit, in seconds since 1970; kernels inherit it.
VARIABLE = "FMFL_DEADLINE"


def has_passed() -> bool:
    """Return whether the limit has passed; without a limit it never does."""
    return time.time() >= float(os.environ.get(VARIABLE, "inf"))


@contextlib.contextmanager
def at(limit: float) -> Iterator[None]:
    """Set the limit inside; infinity leaves the one that is set already.

    Args:
        limit: in seconds since 1970.
    """
    before = os.environ.get(VARIABLE)
    if limit < float("inf"):
        os.environ[VARIABLE] = repr(limit)
    try:
        yield
    finally:
        os.environ.pop(VARIABLE, None)
        if before is not None:
            os.environ[VARIABLE] = before

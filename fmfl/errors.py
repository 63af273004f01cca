"""The exception for mistakes that a person can mend, and sentences for a system's refusals."""

import errno
from collections.abc import Iterable

#: The disk is full, the quota used up, the file too large.
FULL = {errno.ENOSPC, errno.EFBIG, *([errno.EDQUOT] if hasattr(errno, "EDQUOT") else [])}

#: Somebody else may write here, or nobody.
CLOSED = {errno.EROFS, errno.EACCES, errno.EPERM}


class UserError(ValueError):
    """Mistake in a file or parameter; the message is one sentence that names it and says what to do.

    The command line prints the message alone, and so does a notebook cell: a traceback would
    bury the sentence that helps.
    """

    def _render_traceback_(self) -> list[str]:
        """IPython's hook for how an exception is shown in a notebook."""
        return [f"{type(self).__name__}: {self}"]


class OutOfTime(UserError):
    """End of a study at its time limit: no mistake, and the same command goes on; see `deadline`."""


def first_few(said: Iterable[str], most: int = 3) -> str:
    """List the first things of many for a sentence, as `a, b, c and 4 more`."""
    said = list(said)
    return ", ".join(said[:most]) + (f" and {len(said) - most} more" if len(said) > most else "")


def of_the_system(error: OSError, file: object = "") -> str:
    """Return one sentence on the system's refusal and its remedy.

    Args:
        error: from the system.
        file: what was written or read, where the error does not say it.
    """
    where = error.filename or file or "a file"
    why = error.strerror or str(error) or type(error).__name__
    if error.errno in FULL:
        return (
            f"there is no room for {where} ({why}): make some there, "
            "and the same command continues where it stopped"
        )
    if error.errno in CLOSED:
        return f"{where} cannot be read or written ({why}): name another place, or allow it there"
    return f"{where}: {why}; see that the path is right and what is there can be used"

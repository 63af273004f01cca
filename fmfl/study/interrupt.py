"""Ctrl-C: one sentence and exit code 130, at whatever instant it comes.

Only modules of the interpreter's own start are imported here, so that this can be ready before all else.
"""

import contextlib
import os
import signal
from collections.abc import Callable, Iterator

STOPPED = "fmfl: stopped; the same command continues where it stopped"


def end(*signalled: object) -> None:
    """End the process with the sentence, without unwinding what it is in the midst of."""
    with contextlib.suppress(OSError):
        os.write(2, f"{STOPPED}\n".encode())
    os._exit(130)


def listen() -> None:
    """Let Ctrl-C `end` the process from now on; a background job goes on to ignore it."""
    if callable(signal.getsignal(signal.SIGINT)):
        signal.signal(signal.SIGINT, end)


@contextlib.contextmanager
def handled(act: Callable[[Callable[[], object]], object]) -> Iterator[None]:
    """Let Ctrl-C do something else inside; no change beside the main thread or where it is ignored.

    Args:
        act: takes what to call for that which was done before.
    """
    before = signal.getsignal(signal.SIGINT)
    try:
        if callable(before):
            signal.signal(signal.SIGINT, lambda *signalled: act(lambda: before(*signalled)))
    except ValueError:  # another thread
        before = None
    try:
        yield
    finally:
        if callable(before):
            signal.signal(signal.SIGINT, before)


def while_importing() -> contextlib.AbstractContextManager[None]:
    """Around imports let Ctrl-C `end` the process: nothing has been begun that has to be put away.

    Modules in C print an exception that is raised while they are imported, and raise another one.
    """
    return handled(lambda before: end())


class Noted:
    """Around a command: Ctrl-C raises KeyboardInterrupt, a second one ends the process at once.

    Attributes:
        came: whether there was one, whatever was made of the exception on its way up.
    """

    came = False

    def act(self, before: Callable[[], object]) -> None:
        """What Ctrl-C does, see `handled`."""
        if self.came:
            end()
        self.came = True
        signal.default_int_handler(signal.SIGINT, None)

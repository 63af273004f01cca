"""Ctrl-C: one sentence and exit code 130, at whatever instant it comes.

Only modules that the interpreter imports at its own start are imported here: it is ready before all else.
"""

import contextlib
import os
import signal
from collections.abc import Callable, Iterator

STOPPED = "fmfl: stopped; the same command continues where it stopped"


def end(*signalled: object) -> None:
    """Print the sentence and end the process at once, without unwinding."""
    with contextlib.suppress(OSError):
        os.write(2, f"{STOPPED}\n".encode())
    os._exit(130)


def listen() -> None:
    """Let Ctrl-C `end` the process from now on; a background job goes on to ignore it."""
    if callable(signal.getsignal(signal.SIGINT)):
        signal.signal(signal.SIGINT, end)


@contextlib.contextmanager
def handled(act: Callable[[Callable[[], object]], object]) -> Iterator[None]:
    """Let Ctrl-C do something else inside, in the main thread and unless it is ignored.

    Args:
        act: takes the function that does what Ctrl-C did before.
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
    """Let Ctrl-C `end` the process during imports, when nothing has begun that has to be put away.

    Modules in C print an exception that is raised while they are imported, and raise another one.
    """
    return handled(lambda before: end())


class Noted:
    """Action of Ctrl-C around a command: KeyboardInterrupt, and the end of the process the second time.

    Attributes:
        came: whether there was one, whatever the exception became on its way up.
    """

    came = False

    def act(self, before: Callable[[], object]) -> None:
        """Raise KeyboardInterrupt, or end the process; see `handled`."""
        if self.came:
            end()
        self.came = True
        signal.default_int_handler(signal.SIGINT, None)

"""Syntax trees of the Python source of notebooks' cells."""

import ast
import contextlib
import threading

TRIES = 10  # two disturbances in a row are rare already

_ONE_TREE = threading.RLock()


def parse(source: str) -> ast.Module:
    """The tree of Python source, also where other trees are built meanwhile.

    CPython 3.11 and some later versions (github.com/python/cpython/issues/106905) keep one count of depth for
    all trees that are being built. Another thread's tree, or one that a finalizer builds when garbage is
    collected (writing a traceback to a log is enough), disturbs it, and a sound tree ends in a SystemError.
    Threads wait for each other here; a tree that was disturbed from elsewhere is built again.

    Raises:
        SyntaxError: the source is no Python.
    """
    with _ONE_TREE:
        for _ in range(TRIES - 1):
            with contextlib.suppress(SystemError):
                return ast.parse(source)
        return ast.parse(source)

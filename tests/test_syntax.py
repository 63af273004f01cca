"""One tree of Python source is not disturbed by another."""

import ast
import gc

import pytest

from fmfl import syntax


class Garbage:
    """Builds a tree of its own, in frames below, when the garbage collector finds it."""

    found = 0

    def __init__(self):
        self.cycle = self

    def __del__(self):
        Garbage.found += 1
        self.parse(20)

    def parse(self, depth):
        return self.parse(depth - 1) if depth else ast.parse("x = 1")


def test_a_tree_is_built_though_a_finalizer_builds_another_meanwhile():
    source = "numbers = [1, 2, 3]\n" * 2000
    gc.collect()
    Garbage.found = 0
    gc.disable()  # else some could be found before the tree is begun
    try:
        for _ in range(50):
            Garbage()
    finally:
        gc.enable()
    tree = syntax.parse(source)
    assert Garbage.found == 50  # else nothing was disturbed
    assert ast.dump(tree) == ast.dump(ast.parse(source))


def test_what_is_no_python_is_a_syntax_error():
    with pytest.raises(SyntaxError):
        syntax.parse("numbers = [1, 2")

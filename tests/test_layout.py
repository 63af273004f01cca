"""The science imports none of what is built on it, and no two modules import each other."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter

import pytest

from fmfl import paths

#: What each wing may import besides itself; the science's own name is "".
ALLOWED = {
    "": {"sources", "teachers"},
    "sources": {""},
    "teachers": {""},
    "analysis": {""},
    "study": {"", "sources", "teachers", "analysis"},
    "flower": {"", "sources", "analysis", "study"},
}


def imported(name: str, tree: ast.AST, modules: set[str]) -> set[str]:
    """Find the modules that one imports, inside functions too; imports for types alone do not count."""
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "fmfl":
            home = node.module.removeprefix("fmfl").removeprefix(".")
            for alias in node.names:
                inside = f"{home}.{alias.name}".removeprefix(".")
                found.add(inside if inside in modules else home)
        elif isinstance(node, ast.Import):
            found |= {
                alias.name.removeprefix("fmfl.") for alias in node.names if alias.name.startswith("fmfl.")
            }
    return (found & modules) - {name}


@pytest.fixture(scope="module")
def imports() -> dict[str, set[str]]:
    """Each module of the package and those that it imports."""
    files = {
        file.relative_to(paths.PACKAGE).with_suffix("").as_posix().replace("/", "."): file
        for file in paths.PACKAGE.rglob("*.py")
        if file.name not in ("__init__.py", "__main__.py")
    }
    return {
        name: imported(name, ast.parse(file.read_text(encoding="utf-8")), set(files))
        for name, file in files.items()
    }


def wing(module: str) -> str:
    return module.rpartition(".")[0]


def test_each_module_imports_only_what_lies_below_it(imports):
    wrong = [
        f"{name} imports {other}"
        for name, others in imports.items()
        for other in others
        if wing(other) not in ALLOWED[wing(name)] | {wing(name)}
    ]
    assert not wrong


def test_no_module_imports_itself_by_a_detour(imports):
    TopologicalSorter(imports).prepare()  # raises a CycleError that names the modules


def test_import_fmfl_gives_every_module_of_the_science():
    """So a notebook calls `fmfl.split.holdout`, with the name of the file in it."""
    code = "import fmfl; fmfl.split.holdout; fmfl.losses.dice_loss; fmfl.nothing"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.stderr.splitlines()[-1] == "AttributeError: package 'fmfl' has no module 'nothing'"

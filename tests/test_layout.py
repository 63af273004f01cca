"""The science imports none of what is built on it, and no two modules import each other."""

import subprocess
import sys
from graphlib import TopologicalSorter

import pytest

from docs import modules

#: What each wing may import besides itself; the science's own name is "".
ALLOWED = {
    "": {"sources", "teachers"},
    "sources": {""},
    "teachers": {""},
    "analysis": {""},
    "study": {"", "sources", "teachers", "analysis"},
    "flower": {"", "sources", "analysis", "study"},
    "course": {""},
    "widgets": {"", "analysis"},
}


@pytest.fixture(scope="module")
def imports() -> dict[str, set[str]]:
    """Each module of the package and those that it imports."""
    return modules.imports(modules.modules())


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


def test_the_table_of_modules_is_current():
    assert modules.PAGE.read_text(encoding="utf-8") == modules.page(), "run python docs/modules.py"

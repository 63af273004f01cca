"""Exercises: from one source file a part, the participant's notebook and the solved one.

A source is Python in the percent format, which editors show as cells (`# %%`, `# %% [markdown]`). Between
`# BEGIN SOLUTION` and `# END SOLUTION` stand the lines that the participant writes. In the participant's
notebook the comments after `# BEGIN STUB` stand in their place, or three dots where there are none.

nbgrader does the same with cells' metadata, and brings a database, an exchange of files and an extension of
the server, for grades that this course does not give. jupytext reads the format, but knows no solutions.
"""

import json
import os
import re
from pathlib import Path

import nbformat
from nbformat import NotebookNode

from fmfl import paths

FOLDER = paths.NOTEBOOKS / "exercises"
SOURCES = FOLDER / "sources"

#: Stub (commented out, optional) and solution, with their indentation.
SOLUTION = re.compile(
    r"(?:^[ ]*# BEGIN STUB\n(?P<stub>(?:[ ]*#.*\n)*?))?"
    r"^(?P<indent>[ ]*)# BEGIN SOLUTION\n(?P<lines>.*?)^[ ]*# END SOLUTION\n?",
    re.M | re.S,
)
CELL = re.compile(r"^# %%(?P<kind> \[markdown\])?(?: tags=(?P<tags>\[.*\]))?\n", re.M)
#: Links from the project's folder, written as `](/docs/course.md)`.
LINK = re.compile(r"\]\(/(?P<target>[^)]+)\)")


def sources() -> list[Path]:
    """Return the source files, in the order of the course."""
    return sorted(SOURCES.glob("*.py"))


def unsolved(code: str) -> str:
    """Return a cell's code with stubs in place of the solutions."""

    def stub(match: re.Match) -> str:
        if match["stub"]:
            return re.sub(r"^( *)# ?", r"\1", match["stub"], flags=re.M)
        return f"{match['indent']}...  # your lines\n"

    return SOLUTION.sub(stub, code)


def solved(code: str) -> str:
    """Return a cell's code with the solutions, without the marks."""
    return SOLUTION.sub(lambda match: match["lines"], code)


def notebook(
    source: Path, *, solutions: bool = False, participant: str = "", folder: Path = FOLDER
) -> NotebookNode:
    """Make a notebook without outputs out of a source.

    Args:
        source: one of `sources`.
        solutions: with the solutions instead of the stubs.
        participant: stands in the cell of parameters; empty: as in the source.
        folder: where the notebook will be, for its links.
    """
    up = os.path.relpath(paths.ROOT, folder).replace(os.sep, "/")
    begin, *parts = _parts(source.read_text(encoding="utf-8"))
    if begin.strip():
        raise ValueError(f"{source} does not begin with a cell")
    cells = []
    for number, (tags, is_prose, text) in enumerate(parts):
        if is_prose:
            prose = re.sub(r"^# ?", "", text, flags=re.M)
            cell = nbformat.v4.new_markdown_cell(LINK.sub(rf"]({up}/\g<target>)", prose).strip())
        else:
            code = solved(text) if solutions else unsolved(text)
            if participant and "parameters" in tags:
                code = re.sub(r'(?<=participant: str = )".*?"', json.dumps(participant), code)
            cell = nbformat.v4.new_code_cell(code.strip(), metadata={"tags": tags} if tags else {})
        cell["id"] = f"cell-{number}"
        cells.append(cell)
    kernel = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
    metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    return nbformat.v4.new_notebook(cells=cells, metadata=metadata)


def _parts(text: str) -> list:
    """Return what stands before the first cell, then tags, kind and text of each cell."""
    begin, *rest = CELL.split(text)
    cells = zip(rest[::3], rest[1::3], rest[2::3], strict=True)
    return [begin, *((json.loads(tags or "[]"), bool(kind), body) for kind, tags, body in cells)]


def text_of(made: NotebookNode) -> str:
    """Return a notebook as its file holds it."""
    return nbformat.writes(made, version=4) + "\n"


def build() -> list[Path]:
    """Write the participants' notebooks beside their sources, and return the files."""
    files = [FOLDER / f"{source.stem}.ipynb" for source in sources()]
    for source, file in zip(sources(), files, strict=True):
        file.write_text(text_of(notebook(source)), encoding="utf-8")
    return files

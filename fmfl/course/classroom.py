"""Classroom: a copy of the exercises for each participant, and a run of all solutions."""

import logging
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from fmfl.course import answers, exercises


def copy(participant: str) -> tuple[Path, list[str], list[str]]:
    """Give a participant the exercises, and leave alone what is there already.

    Returns:
        The participant's folder, the notebooks that are new in it, and those that were there.
    """
    folder = answers.folder(participant)
    folder.mkdir(parents=True, exist_ok=True)
    new, kept = [], []
    for source in exercises.sources():
        file = folder / f"{source.stem}.ipynb"
        made = exercises.notebook(source, participant=participant, folder=folder)
        try:
            with file.open("x", encoding="utf-8") as opened:  # fails where it exists
                opened.write(exercises.text_of(made))
            new.append(file.name)
        except FileExistsError:
            kept.append(file.name)
    return folder, new, kept


def run_solutions(folder: Path | None = None) -> Iterator[tuple[str, float]]:
    """Run every solution in a kernel of its own, as JupyterLab would.

    Args:
        folder: keeps the executed notebooks, for the teacher; None: nothing is kept.

    Yields:
        Each part's name and its seconds, the start of the kernel included.

    Raises:
        PapermillExecutionError: a solution fails.
    """
    import nbformat
    import papermill
    from traitlets.config import Config

    logging.getLogger("papermill").setLevel(logging.ERROR)  # it would say that a cell has no output yet
    with tempfile.TemporaryDirectory(prefix="fmfl-class-", ignore_cleanup_errors=True) as temporary:
        kept = folder or Path(temporary)
        kept.mkdir(parents=True, exist_ok=True)
        # Sockets in a folder of its own: over TCP each kernel prints a warning.
        sockets = {"transport": "ipc", "ip": f"{temporary}/kernel"} if os.name == "posix" else {}
        how = {"kernel_name": "python3", "progress_bar": False, "config": Config({"KernelManager": sockets})}
        for source in exercises.sources():
            file = kept / f"{source.stem}.ipynb"
            nbformat.write(exercises.notebook(source, solutions=True, folder=kept), file)
            started = time.perf_counter()
            papermill.execute_notebook(file, file, {"participant": temporary}, cwd=kept, **how)
            yield source.stem, time.perf_counter() - started

"""Execution of one notebook: by Jupyter's kernel through papermill, or in this process (`--plain`)."""

import ast
import contextlib
import io
import json
import logging
import os
import re
import signal
import tempfile
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from fmfl import errors, paths
from fmfl.errors import OutOfTime, UserError
from fmfl.study import interrupt, outputs
from fmfl.study.cells import Cell

#: Environment of a kernel: a bar would fill the notebook with its every state, figures belong into it.
KERNEL_ENVIRONMENT = {"TQDM_DISABLE": "1", "MPLBACKEND": "module://matplotlib_inline.backend_inline"}

#: Text of an OSError, which is all that another process tells of it.
REFUSAL = re.compile(r"\[Errno (?P<number>\d+)\] (?P<why>[^:]+)(: '(?P<file>.*)')?")


def in_kernel(cell: Cell, output: Path) -> None:
    """Run a notebook through papermill; its outputs are kept even if it fails.

    Ctrl-C ends the kernel at once, and with it the wait for it.

    Raises:
        UserError: papermill is not installed, the notebook failed, or it cannot be written.
    """
    try:
        import papermill
    except ImportError:
        raise UserError("papermill is not installed: install it, or run with --plain") from None
    from jupyter_client.kernelspec import NoSuchKernel
    from papermill.exceptions import PapermillExecutionError

    # It warns of every setting that a notebook does not name itself; each one is checked there all the same.
    logging.getLogger("papermill").setLevel(logging.ERROR)
    output.parent.mkdir(parents=True, exist_ok=True)
    source = paths.NOTEBOOKS / f"{cell.notebook}.ipynb"
    with _kernel() as (kernel, printed):
        try:
            papermill.execute_notebook(
                _literal(source), _literal(output), cell.parameters, kernel_name="python3",
                progress_bar=False, log_output=False, **kernel,
            )  # fmt: skip
        except PapermillExecutionError as error:
            raise failure(output, error.ename, error.evalue) from None
        except (RuntimeError, NoSuchKernel) as error:  # the kernel died, or there is none
            raise failure(output, type(error).__name__, f"{error}{_last_line(printed)}") from None
        except OSError as error:  # the notebook itself could not be written
            if not outputs.read_record(output):
                output.unlink(missing_ok=True)  # else it would stand there half
            raise UserError(errors.of_the_system(error, output)) from error


@contextlib.contextmanager
def _kernel() -> Iterator[tuple[dict[str, Any], IO[bytes]]]:
    """Papermill's options for a kernel that Ctrl-C ends, and the file of what it prints outside cells.

    Its sockets lie in a folder of its own. Jupyter's default, free TCP ports, are chosen before the kernel
    opens them: two processes that share a study and start kernels at once could choose the same.
    """
    from jupyter_client import AsyncKernelManager
    from traitlets.config import Config

    with (
        tempfile.TemporaryDirectory(prefix="fmfl-", ignore_cleanup_errors=True) as folder,
        tempfile.TemporaryFile() as printed,
    ):
        started: list[AsyncKernelManager] = []

        class Manager(AsyncKernelManager):
            async def start_kernel(self, **options: Any) -> None:
                started.append(self)
                own = {"env": os.environ | KERNEL_ENVIRONMENT, "cwd": str(paths.NOTEBOOKS)}
                await super().start_kernel(**options | own | {"stdout": printed, "stderr": printed})

        sockets = {"transport": "ipc", "ip": f"{folder}/kernel"} if os.name == "posix" else {}
        try:
            with interrupt.handled(lambda go_on: (_kill(started), go_on())):
                yield {"kernel_manager_class": Manager, "config": Config({"KernelManager": sockets})}, printed
        except KeyboardInterrupt:
            _kill(started)  # one that was only starting
            raise


def _kill(managers: list[Any]) -> None:
    for manager in managers:
        pid = getattr(manager.provisioner, "pid", None)
        if manager.has_kernel and pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM if os.name == "nt" else signal.SIGKILL)


def _literal(path: Path) -> str:
    """Escape braces for papermill, which puts a parameter's value in place of its name in them."""
    return str(path).replace("{", "{{").replace("}", "}}")


def _last_line(printed: IO[bytes]) -> str:
    """Return the last line that a kernel printed before it died, such as a missing module, in brackets."""
    printed.seek(max(0, printed.seek(0, os.SEEK_END) - 10_000))
    lines = printed.read().decode(errors="replace").strip().splitlines()
    return f" ({lines[-1].strip()})" if lines else ""


def plain(cell: Cell, output: Path) -> None:
    """Run a notebook's code cells in this process, where Jupyter is not installed.

    The executed notebook holds the same code, the injected parameters and what was printed; figures are in
    the run's folder.

    Raises:
        UserError: a cell failed.
    """
    from matplotlib import pyplot

    pyplot.switch_backend("Agg")
    content = outputs.read_json(paths.NOTEBOOKS / f"{cell.notebook}.ipynb")
    namespace: dict[str, Any] = {"__name__": "__main__", "In": [], "display": print}
    executed: list[dict[str, Any]] = []
    error: Exception | None = None
    for part in _with_parameters(content["cells"], cell.parameters):
        executed.append(part)
        if part["cell_type"] == "code":
            part["outputs"], error = _run("".join(part["source"]), namespace)
            pyplot.close("all")  # as a kernel does after each cell
        if error:
            break
    outputs.write_text(output, json.dumps(content | {"cells": executed}, indent=1))
    if error:
        raise failure(output, type(error).__name__, str(error)) from error


def _with_parameters(parts: list[dict[str, Any]], parameters: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield a notebook's cells, and after the one of its parameters another one with the values given."""
    for part in parts:
        yield part | {"execution_count": None} if part["cell_type"] == "code" else part
        if "parameters" in part["metadata"].get("tags", []):
            lines = ["# Parameters", *(f"{name} = {value!r}" for name, value in parameters.items())]
            yield {
                "cell_type": "code",
                "id": "injected-parameters",
                "metadata": {"tags": ["injected-parameters"]},
                "source": "\n".join(lines),
                "execution_count": None,
            }


def _run(source: str, namespace: dict[str, Any]) -> tuple[list[dict[str, Any]], Exception | None]:
    """Execute one cell as IPython would, and show a last expression; returns outputs and the error."""
    namespace["In"].append(source)
    printed, caught = io.StringIO(), None
    try:
        with contextlib.redirect_stdout(printed):
            tree = ast.parse(source)
            last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
            exec(compile(tree, "<cell>", "exec"), namespace)
            if last is not None:
                value = eval(compile(ast.Expression(last.value), "<cell>", "eval"), namespace)
                if value is not None and not source.rstrip().endswith(";"):
                    print(value)
    except Exception as error:
        caught = error
    text = printed.getvalue()
    shown: list[dict[str, Any]] = []
    if text:
        shown.append({"output_type": "stream", "name": "stdout", "text": text})
    if caught:
        about = {"ename": type(caught).__name__, "evalue": str(caught)}
        shown.append({"output_type": "error", **about, "traceback": traceback.format_exception(caught)})
    return shown, caught


def failure(output: Path, kind: str, message: str) -> UserError:
    """Return one sentence for an error in a notebook.

    Args:
        output: the executed notebook.
        kind: the error's class.
        message: its text.
    """
    for told in (UserError, OutOfTime):
        if kind == told.__name__:
            return told(message)
    refused = REFUSAL.fullmatch(message.strip())
    if refused and int(refused["number"]) in errors.FULL | errors.CLOSED:
        error = OSError(int(refused["number"]), refused["why"], refused["file"])
        return UserError(errors.of_the_system(error, output.parent.parent))
    first = (message.strip() or "no message").splitlines()[0]
    return UserError(f"notebook {output.stem} failed with {kind}: {first}; its outputs are in {output}")

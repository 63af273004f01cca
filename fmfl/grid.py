"""The study as a whole: which notebooks run with which parameters, each once, and the report at the end.

A cell is one notebook with one set of parameters. It is done when its record says so with a fingerprint of
its settings, images, teacher, notebook, the package's code and the cells that it continues, and when all that
it left is still there; anything else is run again. Within a cell, trained states are found again by their own
fingerprints, so running a cell twice trains nothing twice.
"""

import ast
import contextlib
import io
import itertools
import json
import logging
import os
import re
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from fmfl import config, models, paths, states, study
from fmfl.config import Settings, several
from fmfl.errors import UserError

#: Which stages' settings a notebook depends on, and single ones besides.
DEPENDS: dict[str, tuple[str, ...]] = {
    "01_data": ("data", "federate.num_clients", "federate.age_strength", "federate.quantity_ratio",
                "federate.seed"),
    "02_teacher": ("data", "teacher", "distill.student"),
    "03_distill": ("data", "teacher", "distill", "sweep", "federate.batch_size", "federate.augmentation",
                   "federate.batch_norm", "federate.seed", "federate.inits", "run.precision",
                   "run.deterministic"),
    "04_federate": ("data", "teacher", "distill", "federate", "run.precision", "run.deterministic"),
    "05_analysis": ("data", "teacher", "distill", "sweep", "federate", "analysis", "run.precision",
                    "run.deterministic"),
}  # fmt: skip

#: What every notebook is given and no number depends on.
WHERE = ("run_name", "device", "cohort_device")

#: Modules whose code no number depends on.
NO_NUMBERS = ("cli.py", "grid.py", "teacher_training.py", "verify.py")

NO_BARS = {"TQDM_DISABLE": "1"}
"""An environment without progress bars, see :func:`fmfl.study.show_bars`."""

FILES = ("results.csv", "per_image.csv", "table1.csv", "claims.csv", "manifest.json", "report.html")
"""What a finished study's folder holds, besides figures, weights and executed notebooks."""


@dataclass(frozen=True)
class Cell:
    """One notebook with one set of settings.

    Attributes:
        notebook: its name without suffix.
        cfg: all settings.
        needs: names of the cells that it continues.
        rounds: federated rounds that it trains, a standalone client's counted by its share.
    """

    notebook: str
    cfg: Settings
    needs: tuple[str, ...] = ()
    rounds: int = 0

    @property
    def name(self) -> str:
        """Its name in the run's folder."""
        return study.cell_name(self.cfg, self.notebook)

    @property
    def parameters(self) -> dict[str, Any]:
        """What is injected: every setting that the notebook depends on, and where it runs."""
        flat = self.cfg.flat()
        names = {name for name, stage in config.stage_of().items() if self._depends_on(stage, name)}
        return {name: flat[name] for name in flat if name in names or name in WHERE}

    def _depends_on(self, stage: str, name: str) -> bool:
        wanted = DEPENDS[self.notebook]
        return stage in wanted or f"{stage}.{name}" in wanted


def plan(cfg: Settings, seeds: list[int], splits: list[str]) -> list[Cell]:
    """The study's cells in the order in which they can run.

    Centralised and standalone training, which the paper compares in its Table 1, are trained under the
    reference split (or the first, where that is not among the splits).
    """
    reference = cfg.analysis.reference_split if cfg.analysis.reference_split in splits else splits[0]
    cfg = replace(cfg, federate=replace(cfg.federate, seed=seeds[0]))
    cells = [Cell("01_data", cfg), Cell("02_teacher", cfg)]
    for seed in seeds:
        seeded = replace(cfg, federate=replace(cfg.federate, seed=seed))
        distill = Cell("03_distill", seeded)
        cells.append(distill)
        for name in splits:
            arms = several(cfg.federate.arms)
            arms = arms if name == reference else [arm for arm in arms if arm == "federated"]
            if not arms:
                continue
            federated = replace(seeded.federate, split=name, arms=",".join(arms))
            runs = len(several(federated.inits)) * ("federated" in arms) + len(set(arms) - {"federated"})
            cells.append(
                Cell(
                    "04_federate",
                    replace(seeded, federate=federated),
                    (distill.name,),
                    runs * federated.num_rounds,
                )
            )
    # Seed and split are the grid's axes; what the analysis depends on is every cell before it.
    whole = replace(cfg, federate=replace(cfg.federate, split=reference))
    cells.append(Cell("05_analysis", whole, tuple(cell.name for cell in cells)))
    return cells


def notebook_code(notebook: str) -> list[str]:
    """A notebook's code cells; outputs and text left out."""
    content = study.read_json(paths.NOTEBOOKS / f"{notebook}.ipynb")
    return ["".join(cell["source"]) for cell in content["cells"] if cell["cell_type"] == "code"]


def check(cells: list[Cell]) -> dict[str, str]:
    """Find what would stop a later cell now, before anything is written: data, teacher, student, clients.

    Returns:
        Fingerprints of the images and of the teacher's weights, on which cells depend as on settings.

    Raises:
        UserError: the study cannot run to its end with these settings.
    """
    cfg = cells[0].cfg
    if cfg.run.device == "cuda" and not torch.cuda.is_available():
        raise UserError("device is cuda, but PyTorch finds no GPU here: choose auto or cpu")
    models.build(cfg.distill.student)
    here = replace(cfg, run=replace(cfg.run, device="cpu"))  # the GPU's memory is the notebooks'
    who = study.load_teacher(here)
    cohort = study.load_cohort(here)
    federated = study.hold_out(here, cohort).federated
    for cell in cells:
        if cell.notebook == "04_federate":
            study.partition(cohort, federated, cell.cfg.federate)
    return {"data": cohort.fingerprint, "teacher": who.sha256}


def run(
    cells: list[Cell], *, plain: bool = False, progress: bool = True, say: Callable[[str], None] = tqdm.write
) -> tuple[int, int]:
    """Run what is not done yet.

    Args:
        cells: from :func:`plan`.
        plain: execute the notebooks' code in this process, without Jupyter.
        progress: show bars, the study's with the time left, counted in federated rounds.
        say: takes one line for each cell.

    Returns:
        How many cells were run and how many were done already.

    Raises:
        UserError: the study cannot begin (see :func:`check`), or a notebook failed: the sentence names it
            and where its outputs are kept.
    """
    with _environment({} if progress else NO_BARS):
        return _run(cells, check(cells), plain, progress, say)


def _run(
    cells: list[Cell], inputs: dict[str, str], plain: bool, progress: bool, say: Callable[[str], None]
) -> tuple[int, int]:
    check_folder(cells[0].cfg.run_dir)
    _sweep(cells[0].cfg.run_dir)
    modules = sorted(str(file.relative_to(paths.PACKAGE)) for file in paths.PACKAGE.rglob("*.py"))
    code = states.code_digest(tuple(name for name in modules if name not in NO_NUMBERS))
    fingerprints: dict[str, str] = {}
    ran = 0
    total = sum(cell.rounds for cell in cells)
    with _bar(cells, total, progress) as tick:
        for cell in cells:
            settings = {k: v for k, v in cell.parameters.items() if k not in WHERE}
            before = [fingerprints[name] for name in cell.needs]
            found = [inputs[stage] for stage in DEPENDS[cell.notebook] if stage in inputs]
            key = states.fingerprint("cell-2", code, notebook_code(cell.notebook), settings, found, before)
            fingerprints[cell.name] = key
            folder = cell.cfg.run_dir
            marker = folder / "cells" / cell.name / "done.json"
            executed = folder / "notebooks" / f"{cell.name}.ipynb"
            if _done(marker, key) and not _missing(cell, marker):
                continue
            marker.unlink(missing_ok=True)
            before_it = _figures(folder)
            started = time.perf_counter()
            (execute_plain if plain else execute)(cell, executed)
            if missing := _missing(cell, marker):
                raise UserError(f"{executed} ran but left no {', '.join(missing)} in {folder}: look into it")
            seconds = round(time.perf_counter() - started, 1)
            figures = [name for name, when in _figures(folder).items() if before_it.get(name) != when]
            about = {"fingerprint": key, "seconds": seconds, "figures": figures}
            study.write_text(marker, json.dumps(about))
            ran += 1
            tick()
            say(f"{cell.name}: {seconds:.0f} s")
    return ran, len(cells) - ran


def _read_marker(marker: Path) -> dict[str, Any]:
    """What stands in a cell's done.json; empty where there is none or it is damaged."""
    try:
        found = json.loads(marker.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _done(marker: Path, key: str) -> bool:
    return _read_marker(marker).get("fingerprint") == key


def _figures(folder: Path) -> dict[str, int]:
    """Figures and when each was written, in ns."""
    return {file.name: file.stat().st_mtime_ns for file in sorted((folder / "figures").glob("*.png"))}


def _missing(cell: Cell, marker: Path) -> list[str]:
    """What a cell leaves behind and is not there: its files below the run's folder."""
    cfg, own = cell.cfg.federate, f"cells/{cell.name}"
    wanted = [f"notebooks/{cell.name}.ipynb", f"{own}/cell.json"]
    wanted += [f"figures/{name}" for name in _read_marker(marker).get("figures", [])]
    if cell.notebook == "03_distill":
        wanted += [f"weights/init-{init}-seed{cfg.seed}.safetensors" for init in several(cfg.inits)]
    if cell.notebook == "04_federate":
        wanted += [f"{own}/results.csv", f"{own}/per_image.csv"]
        wanted += [f"weights/{name}.safetensors" for name in _runs(cell.cfg)]
    if cell.notebook == "05_analysis":
        wanted += [*FILES, "figures/fig2.png", "figures/fig3.png"]
    return [name for name in wanted if not (cell.cfg.run_dir / name).exists()]


OWN_FOLDERS = ("cells", "figures", "notebooks", "weights")

_UNFINISHED = re.compile(r"\..+\.(csv|json|html|ipynb|png|safetensors)\.\d+")


def _sweep(folder: Path) -> None:
    """Remove what a killed run was writing: hidden files that end in the writer's process number."""
    places = [folder.glob(".*"), *((folder / part).rglob(".*") for part in OWN_FOLDERS)]
    for file in itertools.chain(*places):
        if _UNFINISHED.fullmatch(file.name) and file.is_file():
            file.unlink(missing_ok=True)


@contextlib.contextmanager
def _bar(cells: list[Cell], total: int, progress: bool) -> Iterator[Callable[[], None]]:
    """A bar over all rounds of the study, read from the checkpoints that the kernels write."""
    if not progress:
        yield lambda: None
        return
    finished = threading.Event()
    with tqdm(total=total, unit="round", desc="study", dynamic_ncols=True, smoothing=0.1) as bar:
        bar.n = bar.initial = min(total, _rounds_done(cells))
        bar.refresh()

        def look() -> None:
            now = min(total, _rounds_done(cells))
            if now > bar.n:
                bar.update(now - bar.n)

        def watch() -> None:
            while not finished.wait(1.0):
                look()

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield look
        finally:
            finished.set()
            thread.join()


def _runs(cfg: Settings) -> dict[str, float]:
    """The runs of one split and seed, named as their files in ``weights/``, each with its share of a run.

    The standalone clients together count as one.
    """
    cfg, seed = cfg.federate, f"seed{cfg.federate.seed}"
    runs = {
        "federated": {f"federated-{cfg.split}-{init}-{seed}": 1.0 for init in several(cfg.inits)},
        "centralised": {f"centralised-pooled-random-{seed}": 1.0},
        "standalone": {
            f"standalone-{cfg.split}-random-{seed}-client{k}": 1 / cfg.num_clients
            for k in range(cfg.num_clients)
        },
    }
    return {name: share for arm in several(cfg.arms) for name, share in runs[arm].items()}


def _rounds_done(cells: list[Cell]) -> int:
    """Finished rounds of the plan's runs, by their checkpoints."""
    done = 0.0
    for cell in cells:
        if cell.notebook == "04_federate":
            for name, share in _runs(cell.cfg).items():
                record = states.read_record(cell.cfg.run_dir / "weights" / f"{name}.safetensors")
                done += share * min(cell.cfg.federate.num_rounds, record.get("round_number", 0))
    return int(done + 1e-6)  # thirds do not add up to whole numbers


def execute(cell: Cell, output: Path) -> None:
    """Run a notebook through papermill; its outputs are kept even if it fails."""
    try:
        import papermill
    except ImportError:
        raise UserError("papermill is not installed: install it, or run with --plain") from None
    from jupyter_client.kernelspec import NoSuchKernel
    from papermill.exceptions import PapermillExecutionError
    from traitlets.config import Config

    # It warns of every setting that a notebook does not name itself; each one is checked there all the same.
    logging.getLogger("papermill").setLevel(logging.ERROR)
    # Sockets in the file system instead of TCP ports: nobody else on the machine can listen in.
    private = {"config": Config({"KernelManager": {"transport": "ipc"}})} if os.name == "posix" else {}

    output.parent.mkdir(parents=True, exist_ok=True)
    source = paths.NOTEBOOKS / f"{cell.notebook}.ipynb"
    # A bar would fill the notebook with its every state; figures belong into it, whatever the shell says.
    try:
        with _environment(NO_BARS | {"MPLBACKEND": "module://matplotlib_inline.backend_inline"}):
            papermill.execute_notebook(
                str(source), str(output), cell.parameters, kernel_name="python3", cwd=str(paths.NOTEBOOKS),
                progress_bar=False, log_output=False, **private,
            )  # fmt: skip
    except PapermillExecutionError as error:
        raise _failure(output, error.ename, error.evalue) from None
    except (RuntimeError, NoSuchKernel) as error:  # the kernel died, or there is none
        raise _failure(output, type(error).__name__, str(error)) from None


@contextlib.contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """Environment variables for the processes that are started inside."""
    before = {name: os.environ.pop(name, None) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name in values:
            del os.environ[name]
        os.environ.update({name: value for name, value in before.items() if value is not None})


def execute_plain(cell: Cell, output: Path) -> None:
    """Run a notebook's code cells in this process, where Jupyter is not installed.

    The executed notebook holds the same code, the injected parameters and what was printed; figures are in
    the run's folder.
    """
    from matplotlib import pyplot

    pyplot.switch_backend("Agg")
    content = study.read_json(paths.NOTEBOOKS / f"{cell.notebook}.ipynb")
    injected = "\n".join(
        ["# Parameters", *(f"{name} = {value!r}" for name, value in cell.parameters.items())]
    )
    executed: list[dict[str, Any]] = []
    namespace: dict[str, Any] = {"__name__": "__main__", "In": [], "display": print}
    failure: Exception | None = None
    for part in content["cells"]:
        if part["cell_type"] != "code":
            executed.append(part)
            continue
        executed.append(_run_plain("".join(part["source"]), namespace, part))
        if "parameters" in part["metadata"].get("tags", []) and "error" not in executed[-1]:
            about = {"id": "injected-parameters", "metadata": {"tags": ["injected-parameters"]}}
            executed.append(_run_plain(injected, namespace, about))
        pyplot.close("all")  # as a kernel does after each cell
        failure = executed[-1].pop("error", None)
        if failure:
            break
    study.write_text(output, json.dumps(content | {"cells": executed}, indent=1))
    if failure:
        raise _failure(output, type(failure).__name__, str(failure)) from failure


def _run_plain(source: str, namespace: dict[str, Any], part: dict[str, Any]) -> dict[str, Any]:
    """Execute one cell as IPython would: a last expression is shown."""
    namespace["In"].append(source)
    printed = io.StringIO()
    cell = {
        "cell_type": "code",
        "metadata": part.get("metadata", {}),
        "source": source,
        "execution_count": None,
    }
    if "id" in part:
        cell["id"] = part["id"]
    try:
        with contextlib.redirect_stdout(printed):
            tree = ast.parse(source)
            shown = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
            exec(compile(tree, "<cell>", "exec"), namespace)
            if shown is not None:
                value = eval(compile(ast.Expression(shown.value), "<cell>", "eval"), namespace)
                if value is not None and not source.rstrip().endswith(";"):
                    print(value)
    except Exception as error:
        cell["error"] = error
    text = printed.getvalue()
    cell["outputs"] = [{"output_type": "stream", "name": "stdout", "text": text}] if text else []
    if error := cell.get("error"):
        about = {"ename": type(error).__name__, "evalue": str(error)}
        cell["outputs"].append(
            {"output_type": "error", **about, "traceback": traceback.format_exception(error)}
        )
    return cell


def _failure(output: Path, kind: str, message: str) -> UserError:
    if kind == UserError.__name__:
        return UserError(message)
    first = message.strip().splitlines()[0] if message.strip() else "no message"
    return UserError(f"notebook {output.stem} failed with {kind}: {first}; its outputs are in {output}")


def check_folder(folder: Path) -> None:
    """Raise a UserError unless results can be written to the folder."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(
            f"--out {folder} cannot be written to ({error.strerror}): name another folder"
        ) from None

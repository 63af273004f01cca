"""The study as a whole: which notebooks run with which parameters, each once, and the report at the end.

A cell is one notebook with one set of parameters. It is done when its record says so with a fingerprint of
its settings, images, teacher, notebook, the package's code and the cells that it continues, and when all that
it left is still there; anything else is run again. Within a cell, trained states are found again by their own
fingerprints, so running a cell twice trains nothing twice.

Several processes, on one machine or on machines that see one folder, share a study: each takes a cell that
nobody holds. A cell is held by a lock of the operating system, which ends with the process that has it: what
a dead one held is free at once.
"""

import ast
import contextlib
import io
import itertools
import json
import logging
import os
import re
import shutil
import signal
import tempfile
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch
from filelock import FileLock, Timeout
from tqdm import tqdm

from fmfl import config, distill, errors, models, paths, runs, split, states, syntax
from fmfl.config import Settings, split_list
from fmfl.errors import UserError
from fmfl.split import AGE_SCHEMES, Holdout
from fmfl.study import interrupt, outputs, stages

#: Modules whose code no number depends on.
NO_NUMBERS = (
    "__main__.py",
    "flower/deploy.py",
    "study/cli.py",
    "study/grid.py",
    "study/inspection.py",
    "study/interrupt.py",
    "study/options.py",
    "study/verify.py",
    "syntax.py",
)

NO_BARS = {"TQDM_DISABLE": "1"}
"""An environment without progress bars, see `study.show_bars`."""

FILES = ("results.csv", "per_image.csv", "table1.csv", "claims.csv", "manifest.json", "report.html")
"""What a finished study's folder holds, besides figures, weights and executed notebooks."""


@dataclass(frozen=True)
class Cell:
    """One notebook with one set of settings.

    Attributes:
        notebook: its name without suffix.
        cfg: all settings.
        needs: keys of the cells that it continues.
        rounds: federated rounds that it trains, a standalone client's counted by its share.
        variant: the one setting in which it differs from the study, "name=value"; empty for the study itself.
    """

    notebook: str
    cfg: Settings
    needs: tuple[str, ...] = ()
    rounds: int = 0
    variant: str = ""

    @property
    def name(self) -> str:
        """Its name in the run's folder."""
        return outputs.cell_name(self.cfg, self.notebook)

    @property
    def key(self) -> str:
        """Its name in the whole study."""
        return f"{self.variant}/{self.name}" if self.variant else self.name

    @property
    def parameters(self) -> dict[str, Any]:
        """What is injected: every setting that the notebook depends on, and where it runs."""
        names = config.taken_by(self.notebook)
        return {name: value for name, value in self.cfg.flat().items() if name in names}


def plan(
    cfg: Settings, seeds: list[int], splits: list[str], vary: dict[str, list[Any]] | None = None
) -> list[Cell]:
    """The study's cells in the order in which they can run.

    Centralised and standalone training, which the paper compares in its Table 1, are trained under the
    reference split (or the first, where that is not among the splits).

    Args:
        cfg: the study's settings.
        seeds: of everything that is drawn at random but the held-out images.
        splits: names of partitions.
        vary: to a setting's name, values that it has beside the study's own, one setting at a time: the
            federated arm under the reference split, in `vary/{name}={value}`. What a value cannot change,
            such as the random start by a number of labels, is not trained again.
    """
    reference = cfg.analysis.reference_split if cfg.analysis.reference_split in splits else splits[0]
    whose = cfg.federate.images_without_age
    if whose == "auto":  # all splits of a study train on the same images
        whose = "leave_out" if set(splits) & set(AGE_SCHEMES) else "keep"
    cfg = replace(cfg, federate=replace(cfg.federate, seed=seeds[0], images_without_age=whose))
    cells = [Cell("01_data", cfg), Cell("02_teacher", cfg)]
    for seed in seeds:
        seeded = replace(cfg, federate=replace(cfg.federate, seed=seed))
        distill = Cell("03_distill", seeded)
        cells.append(distill)
        for name in splits:
            arms = split_list(cfg.federate.arms)
            arms = arms if name == reference else [arm for arm in arms if arm == "federated"]
            if not arms:
                continue
            federated = replace(seeded.federate, split=name, arms=",".join(arms))
            runs = len(split_list(federated.inits)) * ("federated" in arms) + len(set(arms) - {"federated"})
            cells.append(
                Cell(
                    "04_federate",
                    replace(seeded, federate=federated),
                    (distill.name,),
                    runs * federated.num_rounds,
                )
            )
    for name, values in (vary or {}).items():
        for value in values:
            cells += _variant(cfg, seeds, reference, name, value)
    # Seed and split are the grid's axes; what the analysis depends on is every cell before it.
    whole = replace(cfg, federate=replace(cfg.federate, split=reference))
    cells.append(Cell("05_analysis", whole, tuple(cell.key for cell in cells)))
    return cells


def _variant(cfg: Settings, seeds: list[int], split: str, name: str, value: Any) -> list[Cell]:
    """The cells of a study with one setting changed."""
    stage = config.PARAMETERS[name].stage
    variant = f"{name}={stages.as_text(value)}"
    inits = split_list(cfg.federate.inits)
    if stage in ("teacher", "distill") and name != "student":
        inits = [init for init in inits if init != "random"]
    folder = outputs.variant_dir(cfg, variant)
    changed = cfg.flat() | {name: value, "run_name": str(folder), "split": split, "arms": "federated"}
    changed["inits"] = ",".join(inits)
    cells = []
    for seed in seeds:
        own = config.settings(changed | {"seed": seed})
        distill = Cell("03_distill", own, variant=variant)
        rounds = len(inits) * own.federate.num_rounds
        cells += [distill, Cell("04_federate", own, (distill.key,), rounds, variant)]
    return cells


class Cost(NamedTuple):
    """What a cell will take."""

    images: int  # that go through a student in training, repeats counted
    hours: float  # at the speed that this device has just shown


def estimate(cells: list[Cell], *, steps: int = 4, replace_other: bool = False) -> dict[str, Cost]:
    """What the cells that are not done will cost, by key: their training, without teacher and scoring.

    A few steps of the student are timed on this device; on a CPU, trainings that run side by side share the
    cores.

    Raises:
        UserError: the study cannot run to its end, or its folder holds another one.
    """
    inputs = check(cells)
    if not replace_other:
        _refuse(cells, inputs)
    keys = _fingerprints(cells, inputs)
    cohort = stages.load_cohort(cells[0].cfg)
    rates: dict[tuple, float] = {}
    found = {}
    for cell in cells:
        if _is_done(cell, keys[cell.key]):
            continue
        cfg = cell.cfg
        how = (cfg.data.size, cfg.distill.student, cfg.federate.batch_size, cfg.federate.augmentation)
        if how not in rates:
            rates[how] = stages.images_a_second(cfg, cohort, steps)
        images = _images(cell, stages.holdout(cfg, cohort))
        found[cell.key] = Cost(images, images / rates[how] / 3600)
    return found


def _images(cell: Cell, parts: Holdout) -> int:
    """Images that a cell's trainings see."""
    cfg, proxy, clients = cell.cfg, len(parts.proxy), len(parts.federated)
    starts = {*split_list(cfg.federate.inits)} - {"random"}
    if cell.notebook == "02_teacher":  # of predicted boxes: two students, each from half of the proxy set
        return cfg.distill.proxy_epochs * proxy
    if cell.notebook == "03_distill":
        return len(starts & {"pretraining", "fm"}) * cfg.distill.proxy_epochs * proxy
    # The rounds' images as if all clients took part: those without an age are few.
    of_one_run = cfg.federate.participation * clients * cfg.federate.local_epochs
    return round(cell.rounds * of_one_run)


def notebook_code(notebook: str) -> list[str]:
    """A notebook's code cells; outputs and text left out."""
    content = outputs.read_json(paths.NOTEBOOKS / f"{notebook}.ipynb")
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
    model = models.build(cfg.distill.student)
    for init in {*split_list(cfg.federate.inits)} & {*distill.GIVEN}:
        file = distill.weights_of(init, cfg.distill)
        models.load_weights(model, file, encoder_only=init == "imagenet")
    here = replace(cfg, run=replace(cfg.run, device="cpu"))  # the GPU's memory is the notebooks'
    who = stages.load_teacher(here)
    cohort = stages.load_cohort(here)
    parts = stages.holdout(here, cohort)
    for cell in cells:
        if cell.notebook == "03_distill" and {"pretraining", "fm"} & {*split_list(cell.cfg.federate.inits)}:
            known = int(stages.labelled(cell.cfg, parts.proxy).sum())
            _check_batches(cell.cfg, {"the proxy set": len(parts.proxy), "its labelled part": known})
        if cell.notebook == "04_federate":
            one = cell.cfg.federate
            if one.split == "age" and one.age_strength and one.num_clients > 1:
                split.check_ages(cohort.table, parts.federated)
            clients = stages.partition(cohort, parts.federated, one)
            _check_batches(cell.cfg, {f"client {k}": len(images) for k, images in enumerate(clients)})
    return {"data": cohort.fingerprint, "teacher": who.sha256}


def other_study(cells: list[Cell], inputs: dict[str, str]) -> dict[str, tuple[Any, Any]]:
    """Compare what the study's folder holds with what is to run there: settings, images, teacher.

    Seeds, splits, starts, arms, variants and all else in `study.FREE` may differ, and so may the
    code. Images and teacher are told by their bytes, so that they may have moved.

    Args:
        inputs: from `check`.

    Returns:
        Of each thing that differs its value there and here; empty where the study can go on.
    """
    cfg = cells[0].cfg
    found: dict[str, tuple[Any, Any]] = {}
    images, weights = set(), set()
    for _, about in outputs.cell_records(cfg.run_dir):
        found |= outputs.changed(about, cfg)
        record = about.get("record") or {}
        images |= {record.get({"01_data": "fingerprint", "04_federate": "images"}.get(about["notebook"]))}
        weights |= {record.get("sha256")} if about["notebook"] == "02_teacher" else set()
    for folder in (cfg.run_dir / outputs.VARY).glob("*=*"):
        for _, about in outputs.cell_records(folder):
            other = outputs.changed(about, cfg)
            found |= {name: values for name, values in other.items() if name != folder.name.split("=")[0]}
    for file in sorted((cfg.run_dir / "weights").glob("*.safetensors")):
        if isinstance(made_of := states.read_record(file).get("made_of"), dict):
            there = made_of["settings"]
            here = runs.run_settings(cfg.federate, there["arm"]) | {"student": cfg.distill.student}
            names = [name for name in here if name in there and name not in outputs.FREE]
            found |= {name: (there[name], here[name]) for name in names if there[name] != here[name]}
            images.add(made_of["data"])
    held = _read_marker(cfg.run_dir / "manifest.json")
    if isinstance(settings := held.get("settings"), dict):
        settings = {name: value for name, value in settings.items() if name not in config.tagged("place")}
        found |= outputs.changed({"notebook": "05_analysis", "settings": cfg.flat() | settings}, cfg)
        images.add((held.get("data") or {}).get("fingerprint"))
    elif (cfg.run_dir / "results.csv").exists() and not any((cfg.run_dir / "cells").glob("*/cell.json")):
        found["results.csv"] = ("of another origin", "to be written")
    for what, name, seen in (("data", "data", images), ("teacher", "checkpoint", weights)):
        seen.discard(None)
        if seen:
            found.pop(name, None)
        if other := seen - {inputs[what]}:
            short = f"of fingerprint {min(other)[:8]}"
            found[f"{what} (by its bytes)"] = (short, f"of fingerprint {inputs[what][:8]}")
    # The splits decide it, and a study may add one. Where that changes who holds which images, the cells are
    # run again and the rounds that there are move aside.
    found.pop("images_without_age", None)
    return found


def _refuse(cells: list[Cell], inputs: dict[str, str]) -> None:
    """Raise a UserError where the study's folder holds another one."""
    root = cells[0].cfg.run_dir
    if found := other_study(cells, inputs):
        raise UserError(
            f"--out {root} holds another study ({stages.in_words(found)}): name another folder, or add "
            f"--replace, which first moves that one to {_free_name(root)}"
        )


def _free_name(folder: Path) -> Path:
    """The folder's name with the first number that makes it a name nobody has."""
    numbered = (folder.with_name(f"{folder.name}.{number}") for number in itertools.count(1))
    return next(name for name in numbered if not os.path.lexists(name))


def _move_away(root: Path) -> Path:
    """Move a study's folder to a free name beside it.

    Raises:
        UserError: another process is at work in it, or it cannot be moved.
    """
    if any(CellLocks(root).held()):
        raise UserError(
            f"--out {root} holds another study that is being run: stop it, or name another folder"
        )
    aside = _free_name(root)
    try:
        os.rename(root, aside)
    except OSError as error:
        raise UserError(
            f"--out {root} cannot be moved to {aside} ({error.strerror}): move it yourself, or name another"
        ) from None
    return aside


def _check_batches(cfg: Settings, holders: dict[str, int]) -> None:
    """Raise a UserError where a step would see one image and the student's BatchNorm one pixel of it."""
    batch, norm = cfg.federate.batch_size, cfg.federate.batch_norm
    # An epoch is cut into steps that differ by at most one image, see train.batches.
    alone = {who: n for who, n in holders.items() if n and n // -(-n // batch) == 1}
    if not alone:
        return
    model = models.build(cfg.distill.student, batch_norm=norm)
    if models.smallest_batch(model, cfg.data.size) > 1:
        who, n = next(iter(alone.items()))
        how = "give it more images" if n == 1 else "raise batch_size"
        raise UserError(
            f"{who} has {n} image{'s' * (n != 1)}, so with batch_size {batch} a step sees one alone, which "
            f"is too little for the BatchNorm of {cfg.distill.student} at size {cfg.data.size}: {how}, "
            "raise size or set batch_norm to group"
        )


def run(
    cells: list[Cell],
    *,
    plain: bool = False,
    progress: bool = True,
    jobs: int = 1,
    replace_other: bool = False,
    say: Callable[[str], None] = tqdm.write,
) -> tuple[int, int]:
    """Run what is not done yet.

    Args:
        cells: from `plan`.
        plain: execute the notebooks' code in this process, without Jupyter.
        progress: show bars, the study's with the time left, counted in federated rounds.
        jobs: how many notebooks may run at once. On two cores, which one notebook's trainings fill already,
            two take 0.91 of the time; what 02_teacher says of speed is then of a shared machine.
        replace_other: another study in the folder is moved to a free name beside it.
        say: takes one line for each cell.

    Returns:
        How many cells were run and how many were done already.

    Raises:
        UserError: the study cannot begin (see `check`), its folder holds another one, or a notebook
            failed: the sentence names it and where its outputs are kept. Notebooks that run beside it are let
            come to their end first.
    """
    if plain and jobs > 1:
        raise UserError(f"--jobs {jobs} needs Jupyter: with --plain the notebooks run one after the other")
    with _environment({} if progress else NO_BARS), _sentences():
        inputs = check(cells)
        root = cells[0].cfg.run_dir
        check_folder(root)
        if not replace_other:
            _refuse(cells, inputs)
        elif other_study(cells, inputs):
            say(f"{root} held another study: it is now {_move_away(root)}")
            check_folder(root)
        keys = _fingerprints(cells, inputs)
        CellLocks(root).sweep()
        with _bar(cells, sum(cell.rounds for cell in cells), progress) as tick:
            work = _Work(cells, keys, plain, jobs, lambda line: (tick(), say(line)))
            ran = work.by_several() if jobs > 1 else work.alone()
        CellLocks(root).forget()
    return ran, len(cells) - ran


@contextlib.contextmanager
def _sentences() -> Iterator[None]:
    """A full disk is a sentence; Ctrl-C ends the kernels at once, and is not waited for in vain."""

    def end_kernels(go_on: Callable[[], object]) -> None:
        _kill_kernels()
        go_on()

    try:
        with interrupt.handled(end_kernels):
            yield
    except OSError as error:
        raise UserError(errors.of_the_system(error)) from error
    except KeyboardInterrupt:
        _kill_kernels()  # one that was only starting
        raise


class _Work:
    """The cells that are to be run, by one worker or by several side by side.

    A worker takes a cell that nobody holds, as a process of its own would: see `CellLocks`.
    """

    def __init__(
        self,
        cells: list[Cell],
        keys: dict[str, str],
        plain: bool,
        jobs: int,
        tell: Callable[[str], object],
    ) -> None:
        self.cells, self.keys, self.plain, self.jobs, self.tell = cells, keys, plain, jobs, tell
        self.given_up = False
        self.changed = threading.Condition()  # a cell of this process has ended

    def alone(self) -> int:
        """Run cells until all are done or one fails; returns how many were run."""
        held, ran = CellLocks(self.cells[0].cfg.run_dir), 0
        done: set[str] = set()

        def is_done(cell: Cell) -> bool:
            return _is_done(cell, self.keys[cell.key])

        def ready(cell: Cell) -> bool:
            return cell.key not in done and done.issuperset(cell.needs)

        while not self.given_up:
            done.update(cell.key for cell in self.cells if cell.key not in done and is_done(cell))
            if len(done) == len(self.cells):
                break
            open_cells = list(filter(ready, self.cells))  # those in work too
            # What another worker has finished since is seen before it can be taken.
            cell = held.take(open_cells, is_done)
            if cell is None:  # others hold what is left
                with self.changed:
                    self.changed.wait(POLL_SECONDS)
                continue
            try:
                seconds = _run_cell(
                    cell, self.keys[cell.key], self.plain, share=min(self.jobs, len(open_cells))
                )
            finally:
                held.release(cell)
                with self.changed:
                    self.changed.notify_all()
            ran += 1
            self.tell(f"{cell.key}: {seconds:.0f} s")
        return ran

    def by_several(self) -> int:
        """As `alone`, by several workers; each waits for its own kernel most of the time."""
        with ThreadPoolExecutor(self.jobs) as pool:
            workers = [pool.submit(self.alone) for _ in range(self.jobs)]
            try:
                wait(workers, return_when=FIRST_EXCEPTION)
                self.given_up = True  # if one has failed, the others begin nothing new
                wait(workers)
            except BaseException:  # Ctrl-C
                self.given_up = True
                while wait(workers, timeout=POLL_SECONDS).not_done:
                    _kill_kernels()  # again, for one that was only starting
                raise
        return sum(worker.result() for worker in workers)


POLL_SECONDS = 1.0
"""Between two looks at cells that other workers or processes hold."""


def _fingerprints(cells: list[Cell], inputs: dict[str, str]) -> dict[str, str]:
    """What each cell's results depend on."""
    modules = sorted(file.relative_to(paths.PACKAGE).as_posix() for file in paths.PACKAGE.rglob("*.py"))
    code = states.code_digest(tuple(name for name in modules if name not in NO_NUMBERS))
    found: dict[str, str] = {}
    for cell in cells:
        settings = {k: v for k, v in cell.parameters.items() if k not in config.tagged("where")}
        before = [found[key] for key in cell.needs]
        given = [inputs[name] for name in inputs if name in config.taken_by(cell.notebook)]
        found[cell.key] = states.fingerprint(
            "cell-3", code, notebook_code(cell.notebook), settings, given, before
        )
    return found


def _run_cell(cell: Cell, fingerprint: str, plain: bool, share: int = 1) -> float:
    """Execute a cell and mark it done; returns the seconds that it took.

    Args:
        share: how many notebooks share the cores while it runs.
    """
    folder, marker = cell.cfg.run_dir, _marker(cell)
    executed = folder / "notebooks" / f"{cell.name}.ipynb"
    marker.unlink(missing_ok=True)
    started = time.perf_counter()
    if plain:
        execute_plain(cell, executed)
    else:
        execute(cell, executed, share)
    if missing := _missing(cell):
        raise UserError(f"{executed} ran but left no {', '.join(missing)} in {folder}: look into it")
    seconds = round(time.perf_counter() - started, 1)
    outputs.write_text(marker, json.dumps({"fingerprint": fingerprint, "seconds": seconds}))
    return seconds


class CellLocks:
    """Which cells this process has taken of a study that others may work on too.

    One lock, the gate, is held for a moment by whoever takes or gives back a cell; each cell taken has a lock
    of its own. Both are the operating system's and end with their process.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.folder = root / "claims"
        self.locks: dict[str, FileLock] = {}

    @contextlib.contextmanager
    def gate(self) -> Iterator[None]:
        """Alone among the study's processes."""
        self.folder.mkdir(exist_ok=True)
        try:
            with FileLock(self.folder / "gate.lock"):
                self.folder.mkdir(exist_ok=True)
                yield
        except NotImplementedError:
            raise UserError(
                f"--out {self.root} lies where files cannot be locked: name a folder of another file system"
            ) from None

    def _lock(self, cell: Cell) -> FileLock:
        return FileLock(self.folder / f"{cell.key.replace('/', '~')}.lock")

    def take(self, cells: Iterable[Cell], is_done: Callable[[Cell], bool]) -> Cell | None:
        """The first of the cells that nobody holds and that is not done; None if there is none."""
        with self.gate():
            for cell in cells:
                lock = self._lock(cell)
                try:
                    lock.acquire(timeout=0)
                except Timeout:
                    continue
                if not is_done(cell):
                    self.locks[cell.key] = lock
                    return cell
                self._let_go(lock)
        return None

    def release(self, cell: Cell) -> None:
        """Give a cell back."""
        with self.gate():
            self._let_go(self.locks.pop(cell.key))

    @staticmethod
    def _let_go(lock: FileLock) -> None:
        # Behind the gate nobody else can be opening the file that goes.
        Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()

    def held(self) -> Iterator[Path]:
        """The locks that living processes hold."""
        for file in self.folder.glob("*.lock"):
            if file.name != "gate.lock":
                try:
                    with FileLock(file).acquire(timeout=0):
                        pass
                except Timeout:
                    yield file

    def sweep(self) -> None:
        """Remove what killed processes were writing, if no other one is at work."""
        if not any(_unfinished(self.root)):
            return
        with self.gate():
            if any(self.held()):
                return
            for file in _unfinished(self.root):
                file.unlink(missing_ok=True)

    def forget(self) -> None:
        """Once all cells are done there is nothing left to hold."""
        shutil.rmtree(self.folder, ignore_errors=True)


def _marker(cell: Cell) -> Path:
    return cell.cfg.run_dir / "cells" / cell.name / "done.json"


def _is_done(cell: Cell, fingerprint: str) -> bool:
    return _read_marker(_marker(cell)).get("fingerprint") == fingerprint and not _missing(cell)


def _read_marker(marker: Path) -> dict[str, Any]:
    """What stands in a cell's done.json or cell.json; empty where there is none or it is damaged."""
    try:
        found = json.loads(marker.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _missing(cell: Cell) -> list[str]:
    """What a cell leaves behind and is not there: its files below the run's folder."""
    cfg, own = cell.cfg.federate, f"cells/{cell.name}"
    wanted = [f"notebooks/{cell.name}.ipynb", f"{own}/cell.json"]
    wanted += [
        f"figures/{name}" for name in _read_marker(cell.cfg.run_dir / own / "cell.json").get("figures", [])
    ]
    if cell.notebook == "03_distill":
        wanted += [f"weights/init-{init}-seed{cfg.seed}.safetensors" for init in split_list(cfg.inits)]
    if cell.notebook == "04_federate":
        wanted += [f"{own}/results.csv", f"{own}/per_image.csv"]
        wanted += [f"weights/{name}.safetensors" for name in _runs(cell.cfg)]
    if cell.notebook == "05_analysis":
        wanted += [*FILES, "figures/fig2.png", "figures/fig3.png"]
    return [name for name in wanted if not (cell.cfg.run_dir / name).exists()]


OWN_FOLDERS = ("cells", "figures", "notebooks", "weights")

_UNFINISHED = re.compile(r"\..+\.(csv|json|html|ipynb|png|safetensors)\.\d+")


def _unfinished(folder: Path) -> Iterator[Path]:
    """What a process is writing, or was when it died: hidden files that end in its number."""
    places = [folder.glob(".*")]
    for place in (folder, *(folder / outputs.VARY).glob("*")):
        places += [(place / part).rglob(".*") for part in OWN_FOLDERS]
    for file in itertools.chain(*places):
        if _UNFINISHED.fullmatch(file.name) and file.is_file():
            yield file


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
    """The runs of one split and seed, named as their files in `weights/`, each with its share of a run.

    The standalone clients together count as one.
    """
    cfg, seed = cfg.federate, f"seed{cfg.federate.seed}"
    runs = {
        "federated": {f"federated-{cfg.split}-{init}-{seed}": 1.0 for init in split_list(cfg.inits)},
        "centralised": {f"centralised-pooled-random-{seed}": 1.0},
        "standalone": {
            f"standalone-{cfg.split}-random-{seed}-client{k}": 1 / cfg.num_clients
            for k in range(cfg.num_clients)
        },
    }
    return {name: share for arm in split_list(cfg.arms) for name, share in runs[arm].items()}


def _rounds_done(cells: list[Cell]) -> int:
    """Finished rounds of the plan's runs, by their checkpoints."""
    done = 0.0
    for cell in cells:
        if cell.notebook == "04_federate":
            for name, share in _runs(cell.cfg).items():
                record = states.read_record(cell.cfg.run_dir / "weights" / f"{name}.safetensors")
                done += share * min(cell.cfg.federate.num_rounds, record.get("round_number", 0))
    return int(done + 1e-6)  # thirds do not add up to whole numbers


def execute(cell: Cell, output: Path, share: int = 1) -> None:
    """Run a notebook through papermill; its outputs are kept even if it fails.

    Args:
        share: how many notebooks share the cores.
    """
    try:
        import papermill
    except ImportError:
        raise UserError("papermill is not installed: install it, or run with --plain") from None
    from jupyter_client import AsyncKernelManager
    from jupyter_client.kernelspec import NoSuchKernel
    from papermill.exceptions import PapermillExecutionError

    # It warns of every setting that a notebook does not name itself; each one is checked there all the same.
    logging.getLogger("papermill").setLevel(logging.ERROR)
    output.parent.mkdir(parents=True, exist_ok=True)
    source = paths.NOTEBOOKS / f"{cell.notebook}.ipynb"
    # A bar would fill the notebook with its every state; figures belong into it, whatever the shell says.
    own = NO_BARS | {"MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    if share > 1:
        own["OMP_NUM_THREADS"] = str(max(1, torch.get_num_threads() // share))

    class Manager(AsyncKernelManager):
        """Jupyter's own; this process's environment and folder stay as they are, whoever else runs here."""

        async def start_kernel(self, **options: Any) -> None:
            _kernels.add(self)
            # What a kernel says outside a cell is of its own end: not for the terminal.
            there = {"env": os.environ | own, "cwd": str(paths.NOTEBOOKS), "stdout": said, "stderr": said}
            await super().start_kernel(**options | there)

    with tempfile.TemporaryFile() as said:
        try:
            with _private_sockets() as private:
                papermill.execute_notebook(
                    _as_it_is(source), _as_it_is(output), cell.parameters, kernel_name="python3",
                    progress_bar=False, log_output=False, kernel_manager_class=Manager, config=private,
                )  # fmt: skip
        except PapermillExecutionError as error:
            raise _failure(output, error.ename, error.evalue) from None
        except (RuntimeError, NoSuchKernel) as error:  # the kernel died, or there is none
            raise _failure(output, type(error).__name__, f"{error}{_last_words(said)}") from None
        except OSError as error:  # the notebook itself could not be written
            if not _read_marker(output):
                output.unlink(missing_ok=True)  # else it would stand there half
            raise UserError(errors.of_the_system(error, output)) from error


def _as_it_is(path: Path) -> str:
    """A path for papermill, which would put a parameter's value in place of its name in braces."""
    return str(path).replace("{", "{{").replace("}", "}}")


def _last_words(said: IO[bytes]) -> str:
    """The last line that a kernel wrote before it died, such as a missing module; empty if there is none."""
    said.seek(max(0, said.seek(0, os.SEEK_END) - 10_000))
    lines = said.read().decode(errors="replace").split("\n")
    last = next((line.strip() for line in reversed(lines) if line.strip()), "")
    return f" ({last})" if last else ""


@contextlib.contextmanager
def _private_sockets() -> Iterator[Any]:
    """Jupyter's settings for a kernel's sockets in a folder of its own, where nobody else can listen.

    Left to itself, Jupyter gives the sockets of every kernel in a folder one name: two that start at once
    would get each other's messages.
    """
    from traitlets.config import Config

    if os.name != "posix":  # TCP ports
        yield Config()
        return
    with tempfile.TemporaryDirectory(prefix="fmfl-", ignore_cleanup_errors=True) as folder:
        yield Config({"KernelManager": {"transport": "ipc", "ip": f"{folder}/kernel"}})


_kernels: "weakref.WeakSet[Any]" = weakref.WeakSet()
"""Managers of the kernels that were started here."""


def _kill_kernels() -> None:
    """End the kernels, and with them the wait of those who run notebooks in them."""
    for manager in list(_kernels):
        pid = getattr(manager.provisioner, "pid", None)
        if manager.has_kernel and pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM if os.name == "nt" else signal.SIGKILL)


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
    content = outputs.read_json(paths.NOTEBOOKS / f"{cell.notebook}.ipynb")
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
    outputs.write_text(output, json.dumps(content | {"cells": executed}, indent=1))
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
            tree = syntax.parse(source)
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


#: What the text of an OSError holds: in another process that is all there is of it.
_REFUSED = re.compile(r"\[Errno (?P<number>\d+)\] (?P<why>[^:]+)(: '(?P<file>.*)')?")


def _failure(output: Path, kind: str, message: str) -> UserError:
    if kind == UserError.__name__:
        return UserError(message)
    refused = _REFUSED.fullmatch(message.strip())
    if refused and int(refused["number"]) in errors.FULL | errors.CLOSED:
        error = OSError(int(refused["number"]), refused["why"], refused["file"])
        return UserError(errors.of_the_system(error, output.parent.parent))
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

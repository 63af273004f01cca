"""The study as a whole: `plan` names its cells, `run` runs those that are not done.

`cells.Cell.is_done` decides whether a cell is run again. Several processes, on one machine or on machines
that see one folder, can run one study: each takes a cell that no other holds, see `locks.CellLocks`.
"""

import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from fmfl import config, deadline
from fmfl.config import Settings, split_list
from fmfl.errors import OutOfTime, UserError
from fmfl.split import AGE_SCHEMES
from fmfl.study import cost, execute, outputs, preflight
from fmfl.study import progress as progress_bar
from fmfl.study.cells import Cell, fingerprints
from fmfl.study.locks import CellLocks
from fmfl.study.progress import Watch

#: Between two looks at cells that other processes hold.
POLL_SECONDS = 1.0


def plan(
    cfg: Settings, seeds: list[int], splits: list[str], vary: dict[str, list[Any]] | None = None
) -> list[Cell]:
    """Return the study's cells in the order in which they can run.

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
    ageless = cfg.federate.images_without_age
    if ageless == "auto":  # all splits of a study train on the same images
        ageless = "leave_out" if set(splits) & set(AGE_SCHEMES) else "keep"
    cfg = replace(cfg, federate=replace(cfg.federate, seed=seeds[0], images_without_age=ageless))
    cells = [Cell("01_data", cfg), Cell("02_teacher", cfg)]
    for seed in seeds:
        cells += _of_one_seed(replace(cfg, federate=replace(cfg.federate, seed=seed)), splits, reference)
    for name, values in (vary or {}).items():
        for value in values:
            cells += _variant(cfg, seeds, reference, name, value)
    # Seed and split are the grid's axes; what the analysis depends on is every cell before it.
    whole = replace(cfg, federate=replace(cfg.federate, split=reference))
    cells.append(Cell("05_analysis", whole, tuple(cell.key for cell in cells)))
    return cells


def _of_one_seed(cfg: Settings, splits: list[str], reference: str) -> list[Cell]:
    """Return the starts of one seed and their federations; only the reference split has all arms."""
    starts = Cell("03_distill", cfg)
    cells = [starts]
    for name in splits:
        arms = [arm for arm in split_list(cfg.federate.arms) if arm == "federated" or name == reference]
        if arms:
            federated = replace(cfg.federate, split=name, arms=",".join(arms))
            runs = len(split_list(federated.inits)) * ("federated" in arms) + len({*arms} - {"federated"})
            own = replace(cfg, federate=federated)
            cells.append(Cell("04_federate", own, (starts.name,), runs * federated.num_rounds))
    return cells


def _variant(cfg: Settings, seeds: list[int], split: str, name: str, value: Any) -> list[Cell]:
    """Return the cells of a study with one setting changed."""
    variant = f"{name}={outputs.as_text(value)}"
    inits = split_list(cfg.federate.inits)
    if config.PARAMETERS[name].stage in ("teacher", "distill") and name != "student":
        inits = [init for init in inits if init != "random"]
    folder = outputs.variant_dir(cfg, variant)
    changed = cfg.flat() | {name: value, "run_name": str(folder), "split": split, "arms": "federated"}
    changed["inits"] = ",".join(inits)
    cells = []
    for seed in seeds:
        own = config.settings(changed | {"seed": seed})
        starts = Cell("03_distill", own, variant=variant)
        rounds = len(inits) * own.federate.num_rounds
        cells += [starts, Cell("04_federate", own, (starts.key,), rounds, variant)]
    return cells


def only(cells: list[Cell], keys: list[str]) -> list[Cell]:
    """Return the cells with these keys and those that they need, of a plan and in its order.

    Raises:
        UserError: the plan has no such cell.
    """
    planned = {cell.key: cell for cell in cells}
    for key in keys:
        if key not in planned:
            raise UserError(f"--only {key} is no notebook of this study: --dry-run names them")
    wanted = set(keys)
    for cell in reversed(cells):  # what a cell needs stands before it
        if cell.key in wanted:
            wanted.update(cell.needs)
    return [cell for cell in cells if cell.key in wanted]


def run(
    cells: list[Cell],
    *,
    plain: bool = False,
    progress: bool = True,
    replace_other: bool = False,
    stop_at: float = math.inf,
    say: Callable[[str], None] = tqdm.write,
) -> tuple[int, int]:
    """Run the cells that are not done.

    Args:
        cells: from `plan`.
        plain: execute the notebooks' code in this process, without Jupyter.
        progress: show bars, the study's with the notebook that runs and the time left.
        replace_other: move another study in the folder to a free name beside it.
        stop_at: time after which nothing more is begun, in seconds since 1970; see `deadline`.
        say: takes one line for each cell.

    Returns:
        How many cells were run and how many were done already.

    Raises:
        UserError: the study cannot begin (see `preflight`), or a notebook failed: the sentence names it and
            where its outputs are kept.
        OutOfTime: it has stopped at its time limit; the sentence says what is left.
    """
    with contextlib.nullcontext() if progress else no_bars(), deadline.at(stop_at):
        inputs = preflight.check(cells)
        root = cells[0].cfg.run_dir
        preflight.check_folder(root)
        if not replace_other:
            preflight.refuse_other(cells, inputs)
        elif preflight.other_study(cells, inputs):
            say(f"{root} held another study: it is now {preflight.move_away(root)}")
            preflight.check_folder(root)
        keys = fingerprints(cells, inputs)
        locks = CellLocks(root)
        locks.sweep()
        with _bar(cells, keys, plain, progress) as watch, _told_what_is_left(cells, keys, locks):
            ran = 0
            for cell, seconds in _run_open_cells(cells, keys, locks, plain, watch.begin):
                watch.end(cell)
                say(f"{cell.key}: {seconds:.0f} s")
                ran += 1
        locks.remove()
    return ran, len(cells) - ran


def _run_open_cells(
    cells: list[Cell], keys: dict[str, str], locks: CellLocks, plain: bool, begin: Callable[[Cell], None]
) -> Iterator[tuple[Cell, float]]:
    """Run cells until all are done, here or by other processes; yields each cell run here and its seconds."""
    done: set[str] = set()
    while True:
        done.update(cell.key for cell in cells if cell.key not in done and cell.is_done(keys[cell.key]))
        ready = [cell for cell in cells if cell.key not in done and done.issuperset(cell.needs)]
        if not ready:
            return
        if deadline.has_passed():
            raise OutOfTime("the time is up before the next notebook")
        # What another process has finished since is seen before it can be taken.
        cell = locks.take(ready, lambda cell: cell.is_done(keys[cell.key]))
        if cell is None:  # others hold what is left
            time.sleep(POLL_SECONDS)
            continue
        begin(cell)
        try:
            seconds = _run_cell(cell, keys[cell.key], plain)
        finally:
            locks.release(cell)
        yield cell, seconds


def _run_cell(cell: Cell, fingerprint: str, plain: bool) -> float:
    """Execute a cell and mark it done; returns the seconds that it took."""
    cell.marker.unlink(missing_ok=True)
    started = time.perf_counter()
    (execute.plain if plain else execute.in_kernel)(cell, cell.executed)
    if missing := cell.missing():
        raise UserError(
            f"{cell.executed} ran but left no {', '.join(missing)} in {cell.cfg.run_dir}: look into it"
        )
    seconds = round(time.perf_counter() - started, 1)
    outputs.write_text(cell.marker, json.dumps({"fingerprint": fingerprint, "seconds": seconds}))
    return seconds


@contextlib.contextmanager
def _told_what_is_left(cells: list[Cell], keys: dict[str, str], locks: CellLocks) -> Iterator[None]:
    """At the time limit raise an OutOfTime that says what is left.

    Where nothing at all was finished, it is a UserError: the same command would stop there again.
    """
    before = _finished_files(cells)
    try:
        yield
    except OutOfTime:
        if _finished_files(cells) == before and not any(locks.held()):
            raise UserError(
                "the time was up before a round, a start or a notebook was finished: give more --minutes"
            ) from None
        left = [cell for cell in cells if not cell.is_done(keys[cell.key])]
        rounds = sum(cell.rounds for cell in left) - _rounds_done(left)
        trained = f" and {rounds} of {sum(cell.rounds for cell in cells)} rounds" if rounds else ""
        raise OutOfTime(
            f"the time is up: {len(left)} of {len(cells)} notebooks{trained} are left; "
            "the same command continues there"
        ) from None


def _finished_files(cells: list[Cell]) -> dict[Path, int]:
    """Return when each checkpoint, start and record of a finished cell was written."""
    files = {file for cell in cells for file in (cell.cfg.run_dir / "weights").glob("*.safetensors")}
    times: dict[Path, int] = {}
    for file in files | {cell.marker for cell in cells}:
        # A checkpoint has no file for a moment while another process replaces it.
        with contextlib.suppress(FileNotFoundError):
            times[file] = file.stat().st_mtime_ns
    return times


@contextlib.contextmanager
def no_bars() -> Iterator[None]:
    """Set the environment so that notebooks show no bars, see `stages.show_bars`."""
    before = os.environ.get("TQDM_DISABLE")
    os.environ["TQDM_DISABLE"] = "1"
    try:
        yield
    finally:
        del os.environ["TQDM_DISABLE"]
        if before is not None:
            os.environ["TQDM_DISABLE"] = before


@contextlib.contextmanager
def _bar(cells: list[Cell], keys: dict[str, str], plain: bool, shown: bool) -> Iterator[Watch]:
    """Show a bar over the cells that are not done; yields the watch that is told of each."""
    left = [cell for cell in cells if shown and not cell.is_done(keys[cell.key])]
    if not left:
        yield Watch([], {})
        return
    print("measuring this machine, for the time left", file=sys.stderr)
    with progress_bar.shown(Watch(cells, cost.of_checked(left, plain=plain))) as watch:
        yield watch


def _rounds_done(cells: list[Cell]) -> int:
    """Count the plan's finished rounds, by the checkpoints."""
    done = sum(progress_bar.rounds_done(cell) for cell in cells if cell.notebook == "04_federate")
    return int(done + 1e-6)  # thirds do not add up to whole numbers

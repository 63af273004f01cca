"""Trainings of an experiment, one JSON file each: those that are still to do, and those that are finished.

A plan is a list of named tuples whose `name` is that of the file. It can be stopped at any time: what has a
file is not trained again, and is never taken for a training with other settings or images.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Protocol, TypeVar

import typer

from fmfl import states
from fmfl.errors import UserError
from fmfl.study import outputs, provenance

Worker = Annotated[int, typer.Option(min=0, help="This worker's number, counted from 0.")]
Workers = Annotated[int, typer.Option(min=1, help="Number of workers that share the plan.")]


class Named(Protocol):
    """One training, as a named tuple with a name."""

    @property
    def name(self) -> str:
        """Name of its file without suffix."""

    def _asdict(self) -> dict[str, Any]: ...


T = TypeVar("T", bound=Named)


def pending(plan: Sequence[T], folder: Path, worker: int, workers: int, **shared: object) -> Iterator[T]:
    """Yield a worker's trials that have no file yet: every n-th of the plan, from the worker's on.

    Args:
        plan: of all workers.
        folder: of the finished trials.
        worker: its number, from 0.
        workers: number of workers.
        shared: entries that all files have to have beside their trial's own fields, if they have them at all.

    Raises:
        UserError: there is no such worker, or a file of the plan holds another training.
    """
    check_worker(worker, workers)
    folder.mkdir(parents=True, exist_ok=True)
    for trial in plan:
        file = folder / f"{trial.name}.json"
        found = _read(file) if file.exists() else {}
        for name, value in (trial._asdict() | shared).items():
            if name in found and found[name] != value:
                raise UserError(
                    f"{file} was trained with {name} {found[name]}, not {value}: move it away, "
                    "or choose another --folder"
                )
    for trial in plan[worker::workers]:
        if not (folder / f"{trial.name}.json").exists():
            yield trial


def made_by() -> dict[str, str]:
    """Describe the code and the processor that train; asked before training, since a checkout can change."""
    return {
        "commit": provenance.commit(*provenance.CODE, "bench"),
        "code": states.code_digest(),
        "processor": provenance.processor(),
    }


def keep(folder: Path, trial: Named, found: dict[str, Any]) -> None:
    """Write a finished trial's file, whole or not at all."""
    outputs.write_text(folder / f"{trial.name}.json", json.dumps(trial._asdict() | found))


def finished(folder: Path) -> list[dict[str, Any]]:
    """Read all finished trials, by name.

    Raises:
        UserError: there is none, or they were trained on other images or for other numbers of rounds.
    """
    found = [_read(file) for file in sorted(folder.glob("*.json"))]
    if not found:
        raise UserError(f"{folder} holds no finished training: use `run` first")
    for name in ("data", "rounds"):
        values = sorted({str(trial[name]) for trial in found if name in trial})
        if len(values) > 1:
            raise UserError(f"{folder} holds trainings with {name} {' and '.join(values)}: keep them apart")
    return found


def check_worker(worker: int, workers: int) -> None:
    """Refuse a worker that does not exist, before anything is loaded."""
    if worker >= workers:
        raise UserError(f"--worker {worker}: the {workers} workers are counted from 0 to {workers - 1}")


def _read(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text())
    except ValueError as error:
        raise UserError(f"{file} is damaged ({error}): remove it, and `run` trains it again") from error


def warn_of_mixed(found: list[dict[str, Any]]) -> None:
    """Print the seeds whose trials do not share a kind of processor."""
    for mixed in mixed_processors(found):
        print(f"bench: {mixed}: compare within one kind of processor, see docs/reproducibility.md")


def mixed_processors(found: list[dict[str, Any]]) -> list[str]:
    """Name the seeds whose trials were trained on several kinds of processor; one not recorded is a kind."""
    known: dict[tuple[int, int | None], set[str]] = {}
    for trial in found:
        seed = trial["seed"], trial.get("labelled")
        known.setdefault(seed, set()).add(trial.get("processor") or "a processor that was not recorded")
    return [
        f"seed {seed} has trials of {', '.join(sorted(k))}" for (seed, _), k in known.items() if len(k) > 1
    ]

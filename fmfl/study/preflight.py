"""Checks before a study begins: that it can run, that its folder is its own, and what it will cost."""

import itertools
import os
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from fmfl import config, devices, distill, models, parallel, runs, split, states, train
from fmfl.config import Settings, split_list
from fmfl.data import Cohort
from fmfl.errors import UserError
from fmfl.split import Holdout
from fmfl.study import outputs, stages
from fmfl.study.cells import Cell, fingerprints
from fmfl.study.locks import CellLocks
from fmfl.study.outputs import Differences
from fmfl.train import Examples

#: Starts that learn from the proxy set.
PROXY_INITS = {"pretraining", "fm"}

# ---------------------------------------------------------------------------------------------------
# That it can run to its end
# ---------------------------------------------------------------------------------------------------


def check(cells: list[Cell]) -> dict[str, str]:
    """Find what would stop a later cell now, before anything is written: data, teacher, student, clients.

    Returns:
        Fingerprints of the images ("data") and of the teacher's weights ("teacher"), on which cells depend
        as on settings.

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
    on_cpu = replace(cfg, run=replace(cfg.run, device="cpu"))  # the GPU's memory is the notebooks'
    teacher = stages.load_teacher(on_cpu)
    cohort = stages.load_cohort(on_cpu)
    parts = stages.holdout(on_cpu, cohort)
    for cell in cells:
        if cell.notebook == "03_distill" and PROXY_INITS & {*split_list(cell.cfg.federate.inits)}:
            known = int(stages.labelled(cell.cfg, parts.proxy).sum())
            _check_batches(cell.cfg, {"the proxy set": len(parts.proxy), "its labelled part": known})
        if cell.notebook == "04_federate":
            federation = cell.cfg.federate
            if federation.split == "age" and federation.age_strength and federation.num_clients > 1:
                split.check_ages(cohort.table, parts.federated)
            clients = stages.partition(cohort, parts.federated, federation)
            _check_batches(cell.cfg, {f"client {k}": len(images) for k, images in enumerate(clients)})
    return {"data": cohort.fingerprint, "teacher": teacher.sha256}


def _check_batches(cfg: Settings, sizes: dict[str, int]) -> None:
    """Raise a UserError where a step would see one image and the student's BatchNorm one pixel of it."""
    batch, norm = cfg.federate.batch_size, cfg.federate.batch_norm
    # An epoch is cut into steps that differ by at most one image, see train.batches.
    alone = {name: n for name, n in sizes.items() if n and n // -(-n // batch) == 1}
    if not alone:
        return
    model = models.build(cfg.distill.student, batch_norm=norm)
    if models.smallest_batch(model, cfg.data.size) > 1:
        name, n = next(iter(alone.items()))
        remedy = "give it more images" if n == 1 else "raise batch_size"
        raise UserError(
            f"{name} has {n} image{'s' * (n != 1)}, so with batch_size {batch} a step sees one alone, which "
            f"is too little for the BatchNorm of {cfg.distill.student} at size {cfg.data.size}: {remedy}, "
            "raise size or set batch_norm to group"
        )


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


# ---------------------------------------------------------------------------------------------------
# That its folder holds no other study
# ---------------------------------------------------------------------------------------------------


class Trace(NamedTuple):
    """Origin of a file in a study's folder, compared with the study that is to run.

    Attributes:
        differences: settings that differ from those that are to run.
        images, teacher: fingerprints; None where the file does not tell.
    """

    differences: Differences
    images: str | None = None
    teacher: str | None = None


def other_study(cells: list[Cell], inputs: dict[str, str]) -> Differences:
    """Compare what the study's folder holds with what is to run there: settings, images, teacher.

    Seeds, splits, starts, arms, variants and all else in `outputs.FREE` may differ, and so may the code.
    Images and teacher are told by their bytes, so that they may have moved.

    Args:
        inputs: from `check`.

    Returns:
        All that differs; empty where the study can go on.
    """
    found = traces(cells[0].cfg)
    differences: Differences = {}
    for trace in found:
        differences |= trace.differences
    for name, setting, seen in (
        ("data", "data", {trace.images for trace in found}),
        ("teacher", "checkpoint", {trace.teacher for trace in found}),
    ):
        if seen := seen - {None}:
            differences.pop(setting, None)
        if others := seen - {inputs[name]}:
            there, here = (f"of fingerprint {digest[:8]}" for digest in (min(others), inputs[name]))
            differences[f"{name} (by its bytes)"] = (there, here)
    # The splits decide images_without_age, and a study may add a split. Where that changes the clients'
    # images, cells are run again and the rounds that there are move aside.
    differences.pop("images_without_age", None)
    return differences


def traces(cfg: Settings) -> list[Trace]:
    """List the origins of what the run's folder holds."""
    return [*_of_cells(cfg), *_of_checkpoints(cfg), *_of_results(cfg)]


def _of_cells(cfg: Settings) -> Iterator[Trace]:
    """Records of cells, those of variants included."""
    for _, about in outputs.cell_records(cfg.run_dir):
        record, notebook = about.get("record") or {}, about["notebook"]
        images = record.get({"01_data": "fingerprint", "04_federate": "images"}.get(notebook))
        teacher = record.get("sha256") if notebook == "02_teacher" else None
        yield Trace(outputs.changed(about, cfg), images, teacher)
    for folder in (cfg.run_dir / outputs.VARY).glob("*=*"):
        for _, about in outputs.cell_records(folder):
            differences = outputs.changed(about, cfg)
            differences.pop(folder.name.split("=")[0], None)
            yield Trace(differences)


def _of_checkpoints(cfg: Settings) -> Iterator[Trace]:
    """Runs that were stopped inside a cell, which has no record yet."""
    for file in sorted((cfg.run_dir / "weights").glob("*.safetensors")):
        if isinstance(made_of := states.read_record(file).get("made_of"), dict):
            there = made_of["settings"]
            here = runs.run_settings(cfg.federate, there["arm"]) | {"student": cfg.distill.student}
            names = [name for name in here if name in there and name not in outputs.FREE]
            differences = {name: (there[name], here[name]) for name in names if there[name] != here[name]}
            yield Trace(differences, made_of["data"])


def _of_results(cfg: Settings) -> Iterator[Trace]:
    """Manifest, or results that were passed on without it and without their cells."""
    manifest = outputs.read_record(cfg.run_dir / "manifest.json")
    if isinstance(settings := manifest.get("settings"), dict):
        settings = {name: value for name, value in settings.items() if name not in config.tagged("place")}
        about = {"notebook": "05_analysis", "settings": cfg.flat() | settings}
        yield Trace(outputs.changed(about, cfg), (manifest.get("data") or {}).get("fingerprint"))
    elif (cfg.run_dir / "results.csv").exists() and not any((cfg.run_dir / "cells").glob("*/cell.json")):
        yield Trace({"results.csv": ("of another origin", "to be written")})


def refuse_other(cells: list[Cell], inputs: dict[str, str]) -> None:
    """Raise a UserError where the study's folder holds another study."""
    root = cells[0].cfg.run_dir
    if differences := other_study(cells, inputs):
        raise UserError(
            f"--out {root} holds another study ({outputs.in_words(differences)}): name another folder, or "
            f"add --replace, which first moves that one to {_free_name(root)}"
        )


def move_away(root: Path) -> Path:
    """Move a study's folder to a free name beside it, and return that name.

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


def _free_name(folder: Path) -> Path:
    numbered = (folder.with_name(f"{folder.name}.{number}") for number in itertools.count(1))
    return next(name for name in numbered if not os.path.lexists(name))


# ---------------------------------------------------------------------------------------------------
# Its cost
# ---------------------------------------------------------------------------------------------------


class Cost(NamedTuple):
    """Training that a cell will take.

    Attributes:
        images: that go through a student, repeats counted.
        hours: at the speed that this device has just shown.
    """

    images: int
    hours: float


def estimate(cells: list[Cell], *, steps: int = 4, replace_other: bool = False) -> dict[str, Cost]:
    """Cost of each cell that is not done, by key: its training, without teacher and scoring.

    A few steps of the student are timed on this device; on a CPU, trainings that run side by side share the
    cores.

    Raises:
        UserError: the study cannot run to its end, or its folder holds another one.
    """
    inputs = check(cells)
    if not replace_other:
        refuse_other(cells, inputs)
    keys = fingerprints(cells, inputs)
    cohort = stages.load_cohort(cells[0].cfg)
    speeds: dict[tuple, float] = {}
    costs = {}
    for cell in cells:
        if cell.is_done(keys[cell.key]):
            continue
        cfg = cell.cfg
        how = (cfg.data.size, cfg.distill.student, cfg.federate.batch_size, cfg.federate.augmentation)
        if how not in speeds:
            speeds[how] = images_a_second(cfg, cohort, steps)
        images = _images(cell, stages.holdout(cfg, cohort))
        costs[cell.key] = Cost(images, images / speeds[how] / 3600)
    return costs


def _images(cell: Cell, parts: Holdout) -> int:
    """Count the images that a cell's trainings see."""
    cfg, proxy, clients = cell.cfg, len(parts.proxy), len(parts.federated)
    if cell.notebook == "02_teacher":  # of predicted boxes: two students, each from half of the proxy set
        return cfg.distill.proxy_epochs * proxy
    if cell.notebook == "03_distill":
        return len(PROXY_INITS & {*split_list(cfg.federate.inits)}) * cfg.distill.proxy_epochs * proxy
    # The rounds' images as if all clients took part: those without an age are few.
    return round(cell.rounds * cfg.federate.participation * clients * cfg.federate.local_epochs)


def images_a_second(cfg: Settings, cohort: Cohort, steps: int = 4) -> float:
    """Speed at which this device trains the run's student, in images a second over all its cores.

    Args:
        steps: batches that are timed, after one that warms up.
    """
    batch = min(cfg.federate.batch_size, len(cohort))

    def fit(number: int, steps: int) -> None:
        rows = torch.arange(steps * batch, device=cohort.images.device) % len(cohort)
        model = models.build(cfg.distill.student, device=cohort.device, batch_norm=cfg.federate.batch_norm)
        train.fit(
            model,
            Examples(cohort.images, cohort.masks, rows, device=cohort.device),
            train.LOSSES[cfg.federate.loss],
            epochs=1,
            batch_size=batch,
            optimizer=train.adam(model, cfg.federate.learning_rate),
            key=(number,),
            augmentation=cfg.federate.augmentation,
            precision=devices.precision_of(cfg.run),
        )

    trainings = range(torch.get_num_threads() if cohort.device.type == "cpu" else 1)
    parallel.side_by_side(lambda number: fit(number, 1), trainings, cohort.device)
    started = time.perf_counter()
    parallel.side_by_side(lambda number: fit(number, steps), trainings, cohort.device)
    return len(trainings) * steps * batch / (time.perf_counter() - started)

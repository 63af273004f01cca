"""The manifest of a study: everything that its numbers depend on."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd

from fmfl import config, split, states
from fmfl.analysis import tables
from fmfl.config import Settings, split_list
from fmfl.sources.mask_files import is_lung, organ_of
from fmfl.study import outputs
from fmfl.study.provenance import where

STAND_IN = (
    "The built-in teacher stands in for SAM-Med2D and is no foundation model: it was trained on lungs alone, "
    "among them images of the Guangzhou source and synthetic ones of the built-in generator, so its student "
    "also carries labels that pre-training has not seen."
)

OTHER_ORGAN = (
    "The built-in teacher was trained on lungs alone and does not know this organ ({organ}): its Dice on the "
    "proxy images says what a student can learn from it."
)


def manifest(cfg: Settings, results: pd.DataFrame, others: Iterable[str] = ()) -> dict[str, Any]:
    """Collect everything that the run's numbers depend on, from the records that its cells left.

    Args:
        cfg: the run's settings.
        results: the rows of results.csv.
        others: cells that are not part of them, from `collect`.
    """
    left_out = {*others, "05_analysis"}
    cells = {name: about for name, about in outputs.cell_records(cfg.run_dir) if name not in left_out}
    records = {name: about["record"] for name, about in cells.items()}
    figures = [name for about in cells.values() for name in about.get("figures", [])]
    figures += outputs.drawn.get(cfg.run_dir, {})  # by the analysis that writes this manifest
    teacher = records.get("02_teacher", {})
    if teacher.get("name") == "builtin":
        organ = organ_of(cfg.data.mask_class).name
        teacher |= {"note": STAND_IN if is_lung(organ) else OTHER_ORGAN.format(organ=organ)}
    here = where(cfg)
    return {
        "fmfl": here["fmfl"],
        "commit": here["commit"],
        "created": here["finished"],
        "versions": {"python": here["python"]} | here["versions"],
        "device": here["device"],
        "settings": _settings(cfg, results),
        "data": records.get("01_data", {}),
        "teacher": teacher,
        "student": next((record for name, record in records.items() if name.startswith("03_distill")), {}),
        "figures": list(dict.fromkeys(figures)),
        **_weights(cfg, results),
        "cells": {name: about["run"] | {"record": about["record"]} for name, about in cells.items()},
    }


def _settings(cfg: Settings, results: pd.DataFrame) -> dict[str, Any]:
    """Return all settings; in place of the grid's axes their values in the results."""
    settings = cfg.flat() | {
        "seeds": sorted(int(seed) for seed in results.seed.unique()),
        "splits": [name for name in split.OPTIONS if name in set(results.split)],
        "inits": tables.ordered_inits(results),
        "arms": sorted(results.arm.unique()),
    }
    del settings["split"], settings["seed"]
    # Results are passed on; where they lay on this machine is not.
    for name in config.tagged("place"):
        settings[name] = ",".join(Path(part).name for part in split_list(settings[name]))
    return settings


def _weights(cfg: Settings, results: pd.DataFrame) -> dict[str, Any]:
    """Return digests of the weights in files, by file, and of the state after each round, by run."""
    runs = {f"{row.arm}-{row.split}-{row.init}-seed{row.seed}" for row in results.itertuples()}
    runs |= {f"init-{row.init}-seed{row.seed}" for row in results.itertuples()}
    files = sorted((cfg.run_dir / "weights").glob("*.safetensors"))
    files = [file for file in files if file.stem.split("-client")[0] in runs]
    rounds = {file.stem: states.read_record(file).get("rounds") for file in files}
    return {
        "weights": {file.name: _digest(file) for file in files},
        "rounds": {run: [done["sha256"] for done in of_run] for run, of_run in rounds.items() if of_run},
    }


def _digest(file: Path) -> str:
    """Return the SHA-256 over names and values of a state in a file."""
    stored = states.read_state(file)
    return states.state_digest(stored[0]) if stored else "unreadable"

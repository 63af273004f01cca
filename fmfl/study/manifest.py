"""The manifest of a study: everything that its numbers depend on."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd

from fmfl import config, split, states
from fmfl.analysis import tables
from fmfl.config import Settings, split_list
from fmfl.study.outputs import _drawn, cell_records
from fmfl.study.provenance import where

STAND_IN = (
    "The built-in teacher stands in for SAM-Med2D and is no foundation model: it was trained on lungs alone, "
    "among them images of the Guangzhou source and synthetic ones of the built-in generator, so its student "
    "also carries labels that pre-training has not seen."
)


def manifest(cfg: Settings, results: pd.DataFrame, others: Iterable[str] = ()) -> dict[str, Any]:
    """Everything that the run's numbers depend on, from the records that its cells left.

    Args:
        cfg: the run's settings.
        results: the rows of results.csv.
        others: cells that are not part of them, from `collect`.
    """
    left_out = {*others, "05_analysis"}
    cells = {name: about for name, about in cell_records(cfg.run_dir) if name not in left_out}
    figures = [name for about in cells.values() for name in about.get("figures", [])]
    figures += _drawn.get(cfg.run_dir, {})  # by the analysis that asks
    here = where(cfg)
    settings = cfg.flat() | {
        "seeds": sorted(int(seed) for seed in results.seed.unique()),
        "splits": [name for name in split.OPTIONS if name in set(results.split)],
        "inits": tables.ordered_inits(results),
        "arms": sorted(results.arm.unique()),
    }
    for name in ("split", "seed"):
        del settings[name]
    # Results are passed on; where they lay on this machine is nobody's business.
    for name in config.tagged("place"):
        settings[name] = ",".join(Path(part).name for part in split_list(settings[name]))
    runs = {f"{row.arm}-{row.split}-{row.init}-seed{row.seed}" for row in results.itertuples()}
    runs |= {f"init-{row.init}-seed{row.seed}" for row in results.itertuples()}
    weights = {
        file.name: read_record_digest(file)
        for file in sorted((cfg.run_dir / "weights").glob("*.safetensors"))
        if file.stem.split("-client")[0] in runs
    }
    records = {Path(name).stem: states.read_record(cfg.run_dir / "weights" / name) for name in weights}
    rounds = {
        name: [done["sha256"] for done in record["rounds"]]
        for name, record in records.items()
        if "rounds" in record
    }
    who = cells.get("02_teacher", {}).get("record", {})
    if who.get("name") == "builtin":
        who = who | {"note": STAND_IN}
    return {
        "fmfl": here["fmfl"],
        "commit": here["commit"],
        "created": here["finished"],
        "versions": {"python": here["python"]} | here["versions"],
        "device": here["device"],
        "settings": settings,
        "data": cells.get("01_data", {}).get("record", {}),
        "teacher": who,
        "student": next((c["record"] for n, c in cells.items() if n.startswith("03_distill")), {}),
        "figures": list(dict.fromkeys(figures)),
        "weights": weights,
        "rounds": rounds,
        "cells": {name: cell["run"] | {"record": cell["record"]} for name, cell in cells.items()},
    }


def read_record_digest(file: Path) -> str:
    """SHA-256 over the names and values of a state in a file."""
    found = states.read_state(file)
    return states.state_digest(found[0]) if found else "unreadable"

"""Comparison of two studies: of each run, the first round and the first tensor in which they differ.

A study's `manifest.json` holds a SHA-256 of the global state after every round of every run. Folders that
agree in all of them are equal bit by bit. Where they differ, other differences of the manifests (settings,
versions, device, commit, images) show where to look for the cause.
"""

import math
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from fmfl import states
from fmfl.errors import UserError
from fmfl.states import State
from fmfl.study import outputs

#: Parts of a manifest that can be the cause of a difference.
CAUSES = ("fmfl", "commit", "versions", "device", "settings", "data", "teacher", "student")

KEY = ["arm", "init", "split", "seed", "round"]
VALUES = ["dice", "iou", "hd95", "bytes_up", "bytes_down", "images_seen"]  # all of results.csv but seconds

#: Sentence on two things that are compared, and whether they are equal.
Verdict = tuple[str, bool]


def compare(one: Path, other: Path, tolerance: float = 0.0) -> tuple[list[str], bool]:
    """Compare two studies' folders.

    Args:
        one, other: each with `manifest.json`, `results.csv` and `weights/`.
        tolerance: final weights and scores that differ by no more count as equal, as between devices.

    Returns:
        Lines on the differences of the manifests, the runs and the results; and whether all runs and results
        are equal. Differences of the manifests alone, such as in a version, do not make studies unequal.

    Raises:
        UserError: a folder or one of its files is missing or damaged.
    """
    folders = one, other
    manifests = _manifest(one), _manifest(other)
    verdicts = {
        Path(name).stem: _compare_run(name, folders, manifests, tolerance)
        for name in sorted({*manifests[0]["weights"], *manifests[1]["weights"]})
    }
    tables = [_table(folder) for folder in folders]
    remark = ""
    if len({manifest.get("settings", {}).get("engine", "local") for manifest in manifests}) > 1:
        # One engine measures the bytes that another computes.
        tables = [table.drop(columns=["bytes_up", "bytes_down"]) for table in tables]
        remark = " (and the bytes, as the engines differ)"
    sentence, equal = _compare_results(*tables, tolerance)
    verdicts["results.csv"] = sentence + remark, equal
    lines = [*_causes(*manifests), *(f"{name}: {sentence}" for name, (sentence, _) in verdicts.items())]
    return lines, all(equal for _, equal in verdicts.values())


def _manifest(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise UserError(f"{folder}: there is no such folder; name a study's folder")
    manifest = outputs.read_json(folder / "manifest.json")
    if not isinstance(manifest, dict) or not isinstance(manifest.get("weights"), dict):
        raise UserError(f"{folder / 'manifest.json'} is no study's manifest: run 05_analysis again")
    return manifest


def _causes(*manifests: dict[str, Any]) -> Iterator[str]:
    """Yield `name: value | other value` of each difference that can be a cause."""
    one, other = (_flat({name: manifest.get(name) for name in CAUSES}) for manifest in manifests)
    for name in dict.fromkeys([*one, *other]):
        if name != "settings.run_name" and one.get(name) != other.get(name):
            yield f"{name}: {one.get(name)} | {other.get(name)}"


def _flat(value: Any, at: str = "") -> dict[str, Any]:
    """Return nested dictionaries as one, with dots in its names."""
    if not isinstance(value, dict):
        return {at: value}
    return {k: v for name in value for k, v in _flat(value[name], f"{at}.{name}" if at else name).items()}


def _compare_run(
    name: str, folders: tuple[Path, Path], manifests: tuple[dict, dict], tolerance: float
) -> Verdict:
    """Compare one file of weights, and its run's rounds."""
    for folder, manifest in zip(folders, reversed(manifests), strict=True):
        if name not in manifest["weights"]:
            return f"only in {folder}", False
    rounds = [manifest.get("rounds", {}).get(Path(name).stem, []) for manifest in manifests]
    parted = next((n for n, (a, b) in enumerate(zip_longest(*rounds)) if a != b), None)
    if parted is None:
        how = f"equal through round {len(rounds[0]) - 1}" if rounds[0] else ""
    else:
        how = f"equal through round {parted - 1}, then they part" if parted else "they part from the start"
    finals = [_state(folder / "weights" / name) for folder in folders]
    digests = [
        manifest["weights"][name] if state is None else states.state_digest(state)
        for manifest, state in zip(manifests, finals, strict=True)
    ]
    if digests[0] == digests[1]:
        return how or "equal", parted is None or tolerance > 0
    how += "; final weights differ" if how else "the weights differ"
    if None in finals:
        return f"{how} and are not there to compare", False
    tensor, most = _difference(*finals)
    how = f"{how} first in {tensor}" + (f", at most by {most:.3g}" if math.isfinite(most) else "")
    return (f"{how}, within the tolerance", True) if 0 < tolerance >= most else (how, False)


def _state(file: Path) -> State | None:
    """Read a file's tensors; None where it is not there, as in a folder passed on without its weights."""
    if not file.exists():
        return None
    if (stored := states.read_state(file)) is None:
        raise UserError(f"{file} is damaged: copy it again, or run the study again")
    return stored[0]


def _difference(one: State, other: State) -> tuple[str, float]:
    """Name the first tensor that differs, and the largest difference: infinity where it has no number."""
    first, most = "", 0.0
    for key in sorted({*one, *other}):
        a, b = one.get(key), other.get(key)
        if a is None or b is None or (a.shape, a.dtype) != (b.shape, b.dtype):
            first, most = first or f"{key} (in one alone, or of another kind)", float("inf")
        elif states.tensor_digest(a) != states.tensor_digest(b):
            away = (a.double() - b.double()).abs().max().item()
            away = float("inf") if math.isnan(away) else away
            first, most = first or f"{key} (by {away:.3g})", max(most, away)
    return first, most


def _table(folder: Path) -> pd.DataFrame:
    file = folder / "results.csv"
    try:
        table = pd.read_csv(file).set_index(KEY)[VALUES].astype(float)
    except FileNotFoundError:
        raise UserError(f"{file} is missing: run 05_analysis again") from None
    except (ValueError, KeyError):  # no CSV, or no numbers; a column is missing
        raise UserError(f"{file} is damaged: delete it and run 05_analysis again") from None
    if not table.index.is_unique:
        raise UserError(f"{file} holds a row twice: delete it and run 05_analysis again")
    return table


def _compare_results(one: pd.DataFrame, other: pd.DataFrame, tolerance: float) -> Verdict:
    """Compare the rows of results.csv."""
    one, other = one.align(other, join="outer")
    away = (one - other).abs().to_numpy()
    differs = (away > tolerance) | (one.isna() != other.isna()).to_numpy()
    rows = differs.any(axis=1)
    if not rows.any():
        within = " within the tolerance" if np.any(away > 0) else ""
        return f"all {len(one)} rows are equal{within}, seconds aside", True
    first = int(rows.argmax())
    column = one.columns[int(differs[first].argmax())]
    row = ", ".join(f"{name} {part}" for name, part in zip(KEY, one.index[first], strict=True))
    values = f"{one[column].iloc[first]} | {other[column].iloc[first]}"
    return f"{rows.sum()} of {len(one)} rows differ, first {row}: {column} {values}", False

"""Whether two studies gave the same: for each run, the round in which they part and the tensor that tells.

A study's `manifest.json` holds a SHA-256 of the global state after every round of every run. Where two
folders agree in all of them, they are equal bit by bit; where they do not, what else differs in the manifests
(settings, versions, device, commit, images) is where to look for the cause.
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

#: What of a manifest can be the cause of a difference.
CAUSES = ("fmfl", "commit", "versions", "device", "settings", "data", "teacher", "student")

#: Settings that say where a study lies.
ASIDE = ("settings.run_name",)

KEY = ["arm", "init", "split", "seed", "round"]
VALUES = ["dice", "iou", "hd95", "bytes_up", "bytes_down", "images_seen"]  # and not how many seconds it took


def compare(one: Path, other: Path, tolerance: float = 0.0) -> tuple[list[str], bool]:
    """Compare two studies' folders.

    Args:
        one, other: each with `manifest.json`, `results.csv` and `weights/`.
        tolerance: final weights and scores that differ by no more count as equal, as between devices.

    Returns:
        What to say, a line each: differences of the manifests, the runs, the results; and whether all runs
        and results are equal. Causes alone, such as another version that changes no number, part nothing.

    Raises:
        UserError: a folder or one of its files is missing or damaged.
    """
    manifests = _manifest(one), _manifest(other)
    lines = list(_causes(*(_flat({name: found.get(name) for name in CAUSES}) for found in manifests)))
    equal = True
    for name in sorted({*manifests[0]["weights"], *manifests[1]["weights"]}):
        said, same = _run(name, (one, other), manifests, tolerance)
        lines.append(f"{Path(name).stem}: {said}")
        equal &= same
    engines = {found.get("settings", {}).get("engine", "local") for found in manifests}
    # One engine measures the bytes that another reckons.
    aside = ["bytes_up", "bytes_down"] if len(engines) > 1 else []
    said, same = _results(*(_table(folder).drop(columns=aside) for folder in (one, other)), tolerance)
    if aside:
        said += " (and the bytes, as the engines differ)"
    return [*lines, f"results.csv: {said}"], equal and same


def _manifest(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise UserError(f"{folder}: there is no such folder; name a study's folder")
    found = outputs.read_json(folder / "manifest.json")
    if not isinstance(found, dict) or not isinstance(found.get("weights"), dict):
        raise UserError(f"{folder / 'manifest.json'} is no study's manifest: run 05_analysis again")
    return found


def _flat(value: Any, at: str = "") -> dict[str, Any]:
    """Nested dictionaries as one, with dots in its names."""
    if not isinstance(value, dict):
        return {at: value}
    return {k: v for name in value for k, v in _flat(value[name], f"{at}.{name}" if at else name).items()}


def _causes(one: dict[str, Any], other: dict[str, Any]) -> Iterator[str]:
    for name in dict.fromkeys([*one, *other]):
        if name not in ASIDE and one.get(name) != other.get(name):
            yield f"{name}: {one.get(name)} | {other.get(name)}"


def _run(
    name: str, folders: tuple[Path, Path], manifests: tuple[dict, dict], tolerance: float
) -> tuple[str, bool]:
    """What to say of one file of weights, and whether both folders agree in it."""
    for folder, found in zip(folders, reversed(manifests), strict=True):
        if name not in found["weights"]:
            return f"only in {folder}", False
    rounds = [found.get("rounds", {}).get(Path(name).stem, []) for found in manifests]
    parted = next((n for n, (a, b) in enumerate(zip_longest(*rounds)) if a != b), None)
    finals = [_state(folder / "weights" / name) for folder in folders]
    digests = [
        found["weights"][name] if state is None else states.state_digest(state)
        for found, state in zip(manifests, finals, strict=True)
    ]
    if parted is None:
        how = f"equal through round {len(rounds[0]) - 1}" if rounds[0] else ""
    else:
        how = f"equal through round {parted - 1}, then they part" if parted else "they part from the start"
    if digests[0] == digests[1]:
        return how or "equal", parted is None or tolerance > 0
    how += "; final weights differ" if how else "the weights differ"
    if None in finals:
        return f"{how} and are not there to compare", False
    where, furthest = _difference(*finals)
    how = f"{how} first in {where}" + (f", at most by {furthest:.3g}" if math.isfinite(furthest) else "")
    return (f"{how}, within the tolerance", True) if 0 < tolerance >= furthest else (how, False)


def _state(file: Path) -> State | None:
    """A file's tensors; None where it is not there, as in a folder passed on without its weights."""
    if not file.exists():
        return None
    if (found := states.read_state(file)) is None:
        raise UserError(f"{file} is damaged: copy it again, or run the study again")
    return found[0]


def _difference(one: State, other: State) -> tuple[str, float]:
    """The first name whose tensors differ, and the largest difference; infinity where there is no telling."""
    where, furthest = "", 0.0
    for key in sorted({*one, *other}):
        a, b = one.get(key), other.get(key)
        if a is None or b is None or (a.shape, a.dtype) != (b.shape, b.dtype):
            where, furthest = where or f"{key} (in one alone, or of another kind)", float("inf")
        elif states.tensor_digest(a) != states.tensor_digest(b):
            away = (a.double() - b.double()).abs().max().item()
            away = float("inf") if math.isnan(away) else away
            where, furthest = where or f"{key} (by {away:.3g})", max(furthest, away)
    return where, furthest


def _table(folder: Path) -> pd.DataFrame:
    file = folder / "results.csv"
    try:
        found = pd.read_csv(file).set_index(KEY)[VALUES].astype(float)
    except FileNotFoundError:
        raise UserError(f"{file} is missing: run 05_analysis again") from None
    except (ValueError, KeyError):  # no CSV, or no numbers; a column is missing
        raise UserError(f"{file} is damaged: delete it and run 05_analysis again") from None
    if not found.index.is_unique:
        raise UserError(f"{file} holds a row twice: delete it and run 05_analysis again")
    return found


def _results(one: pd.DataFrame, other: pd.DataFrame, tolerance: float) -> tuple[str, bool]:
    one, other = one.align(other, join="outer")
    away = (one - other).abs().to_numpy()
    differs = (away > tolerance) | (one.isna() != other.isna()).to_numpy()
    rows = differs.any(axis=1)
    if not rows.any():
        within = " within the tolerance" if np.any(away > 0) else ""
        return f"all {len(one)} rows are equal{within}, seconds aside", True
    first = int(rows.argmax())
    value = one.columns[int(differs[first].argmax())]
    where = ", ".join(f"{name} {part}" for name, part in zip(KEY, one.index[first], strict=True))
    numbers = f"{one[value].iloc[first]} | {other[value].iloc[first]}"
    return f"{rows.sum()} of {len(one)} rows differ, first {where}: {value} {numbers}", False

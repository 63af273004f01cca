"""Checkpoints of runs: the rounds that a run goes on from, and those of other runs, which are kept aside."""

import itertools
import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch

from fmfl.errors import UserError, first_few
from fmfl.states import State, fingerprint, previous, read_record, read_state

#: Parts of `Run.made_of` that are digests, and the words for another one.
IDENTITIES = {
    "code": "other code",
    "data": "other images",
    "start": "other weights to begin with",
    "clients": "other images at the clients",
    "test images": "other test images",
    "engine": "another engine, or other code for drift",
}


def unlike(record: Mapping, made_of: Mapping) -> list[str]:
    """Name what differs between a checkpoint's record and another run, each difference in a few words."""
    there = record.get("made_of")
    if not isinstance(there, dict):
        return ["an older version of fmfl wrote it"]
    there, here = ({**one.get("settings", {}), **one} for one in (there, made_of))
    # As JSON gives them back.
    here = json.loads(json.dumps(here, default=str))
    differences = []
    for name in sorted({*there, *here} - {"settings"}):
        before, now = there.get(name), here.get(name)
        if before != now:
            differences.append(IDENTITIES.get(name, f"{name} {before}, now {now}"))
    return differences


def aside(file: Path, record: Mapping) -> Path:
    """Name the file that keeps another run's checkpoint: in `aside/`, with 8 characters of its fingerprint.

    It stays a file of safetensors. No table or manifest takes it for a result, but a run of its very
    fingerprint goes on from it.
    """
    return file.parent / "aside" / f"{file.stem}.{str(record.get('fingerprint', ''))[:8]}{file.suffix}"


def _others(file: Path, made_of: Mapping) -> list[tuple[Path, dict]]:
    """List the undamaged checkpoints of other runs under a run's name with their records, newest first."""
    key, found = fingerprint(made_of), []
    for place in (file, previous(file)):
        record = read_record(place)
        other = record.get("fingerprint") != key and read_state(place) is not None
        # The one before it adds nothing to a newer one of the same run.
        if other and record.get("fingerprint") not in {of.get("fingerprint") for _, of in found}:
            found.append((place, record))
    return found


def refuse_other(file: Path, made_of: Mapping) -> None:
    """Raise a UserError where a file holds rounds of another run."""
    for place, record in _others(file, made_of):
        raise UserError(
            f"{place} holds {record.get('round_number', 0)} rounds made with other settings, test images or "
            f"version of fmfl ({first_few(unlike(record, made_of))}): name another folder with --out, "
            "or the same settings to go on"
        )


def _move_aside(place: Path, file: Path, record: Mapping, why: list[str]) -> None:
    """Move the checkpoint of another run out of the way of this one, over no other file."""
    kept = first = aside(file, record)
    for number in itertools.count(1):
        if not kept.exists():
            break
        kept = first.with_name(f"{first.stem}.{number}{first.suffix}")
    kept.parent.mkdir(exist_ok=True)
    os.replace(place, kept)
    warnings.warn(
        f"{file} held {record.get('round_number', 0)} rounds of another run ({first_few(why)}): "
        f"they are kept in {kept}",
        stacklevel=4,
    )


def last_checkpoint(file: Path, made_of: Mapping, device: torch.device) -> tuple[State, dict] | None:
    """Read the newest undamaged checkpoint of a run; None where there is none.

    The rounds of other runs under the same name are moved aside, and those of this one come back from there.
    """
    key = fingerprint(made_of)
    if (newest := read_state(file, fingerprint=key, device=device)) is not None:
        return newest
    for place, record in _others(file, made_of):
        _move_aside(place, file, record, unlike(record, made_of))
    kept = aside(file, {"fingerprint": key})
    places = [previous(file), *kept.parent.glob(f"{kept.stem}*{kept.suffix}")]
    for place in sorted(places, key=lambda one: -read_record(one).get("round_number", 0)):
        if (before := read_state(place, fingerprint=key, device=device)) is not None:
            if file.exists():
                warnings.warn(
                    f"{file} is damaged: the run continues from the checkpoint before it", stacklevel=3
                )
            os.replace(place, file)  # else the next round would keep the damaged one
            return before
    if file.exists():
        warnings.warn(f"{file} is damaged: the run begins anew", stacklevel=3)
    return None

"""Trained students in a run's folder: its final weights, the choice among them, and the network."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fmfl import config, devices, models, states
from fmfl.analysis import tables
from fmfl.analysis.tables import known_first
from fmfl.config import ARMS, SPLITS, Settings
from fmfl.errors import UserError, first_few
from fmfl.sources.mask_files import organ_of
from fmfl.study import outputs

#: Order in which a start is taken where none is named; no test score is looked at.
INITS = ("fm", "pretraining", "imagenet", "file", "random")

#: What a choice is made by, in this order, and the words for a value that is taken without being named.
RULES = {
    "arm": "the federated arm",
    "split": "the study's reference split",
    "init": "the start fm",
    "seed": "the lowest seed",
    "client": "the first client",
}


#: Stands below everything that a student gives.
NOTE = "Research only: this is not a medical device, and must not be used for diagnosis or treatment."


@dataclass(frozen=True)
class Final:
    """Final weights of one run, and the student that they belong to.

    Attributes:
        file: in the run's `weights/`.
        arm, init, split, seed, client: of the run; client is -1 for a global model.
        student, batch_norm: name in `models.STUDENTS`, and its norm.
        rounds: how many rounds it was trained.
        made_of: all that its bytes depend on, by name.
    """

    file: Path
    arm: str
    init: str
    split: str
    seed: int
    client: int
    student: str
    batch_norm: str
    rounds: int
    made_of: dict[str, Any] = field(default_factory=dict, compare=False)

    @property
    def name(self) -> str:
        """Name of the file without its suffix."""
        return self.file.stem

    @property
    def sha256(self) -> str:
        """SHA-256 of the file."""
        return hashlib.sha256(self.file.read_bytes()).hexdigest()

    def __str__(self) -> str:
        client = f", client {self.client}" if self.client >= 0 else ""
        about = f"arm {self.arm}, split {self.split}, start {self.init}, seed {self.seed}{client}"
        return f"{self.file.name} ({about})"


def finals(run_dir: Path) -> list[Final]:
    """List the final weights in a run's folder, sorted by name; runs that have not ended are left out.

    Raises:
        UserError: there is no such folder, or it holds none.
    """
    if not run_dir.is_dir():
        raise UserError(f"{run_dir}: there is no such folder; name the folder of a run, such as runs/study")
    weights = run_dir / "weights"
    records = {file: states.read_record(file) for file in sorted(weights.glob("*.safetensors"))}
    runs = {file: record for file, record in records.items() if record.get("arm") in ARMS}
    common = settings(run_dir)
    ended = [_final(file, record, common) for file, record in runs.items() if _ended(record)]
    if ended:
        return ended
    if runs:
        file, record = next(iter(runs.items()))
        raise UserError(
            f"{file} stands at round {record.get('round_number', 0)}: run the same study again, which "
            "finishes it, and then use it"
        )
    raise UserError(
        f"{run_dir} holds no finished study, as its folder weights holds no final weights: run 04_federate "
        "or `fmfl study` into it first, or name another folder"
    )


def _ended(record: dict[str, Any]) -> bool:
    rounds = record.get("made_of", {}).get("settings", {}).get("num_rounds")
    return rounds is None or record.get("round_number", 0) >= rounds


def _final(file: Path, record: dict[str, Any], common: dict[str, Any]) -> Final:
    made_of = record.get("made_of", {})
    how = common | made_of.get("settings", {})
    names = ("arm", "init", "split", "seed", "client")
    return Final(
        file,
        **{name: record[name] for name in names},
        student=str(how.get("student", "")),
        batch_norm=str(how.get("batch_norm", "average")),
        rounds=record.get("round_number", 0),
        made_of=made_of,
    )


def settings(run_dir: Path) -> dict[str, Any]:
    """Return a run's settings by name, as its cells or its manifest have them; empty where neither is."""
    of_cells = [about["settings"] for name, about in outputs.cell_records(run_dir) if name.startswith("04_")]
    return of_cells[0] if of_cells else outputs.read_record(run_dir / "manifest.json").get("settings", {})


def mask_class(run_dir: Path) -> str:
    """Return the class that a run's students segment, as its settings name it; else lung."""
    return str(settings(run_dir).get("mask_class") or "lung")


def organ(run_dir: Path) -> str:
    """Return the organ that a run's masks show; see `mask_class`."""
    return organ_of(mask_class(run_dir)).name


def as_settings(run_dir: Path) -> Settings:
    """Return a run's settings, as those of a run in its folder.

    Raises:
        UserError: the folder does not tell them.
    """
    told = settings(run_dir)
    if not told:
        raise UserError(f"{run_dir} does not tell its settings: run 04_federate into it again")
    own = {
        name: ",".join(map(str, value)) if isinstance(value, list) else value
        for name, value in told.items()
        if name in config.PARAMETERS
    }
    return config.settings(own | {"run_name": str(run_dir)})


def image_size(run_dir: Path, given: int = 0) -> int:
    """Return the pixels a side at which a run's students were trained.

    Args:
        run_dir: the run's folder.
        given: its size where the folder does not tell, as after `fmfl flower server`; 0: not given.

    Raises:
        UserError: the folder tells another size, or none and none is given.
    """
    told = settings(run_dir).get("size")
    if told and given and given != told:
        raise UserError(f"--size is {given}, but {run_dir} was trained at {told}: leave --size out")
    if not told and not given:
        raise UserError(f"{run_dir} does not say the size that it was trained at: give it by --size")
    return int(told or given)


def reference_split(run_dir: Path) -> str:
    """Return the split of a run's Table 1."""
    return str(settings(run_dir).get("reference_split", tables.PAPER_SPLIT))


def choose(run_dir: Path, **wanted: object) -> tuple[Final, str]:
    """Choose final weights by a rule that looks at no score: see `RULES`.

    Args:
        run_dir: the run's folder.
        **wanted: arm, split, init, seed and client, where a person names them; None or "" is not named.

    Returns:
        The weights, and a sentence that says why these and which others there are.

    Raises:
        UserError: there are none of that name; the sentence lists those that are there.
    """
    left, reasons, others = finals(run_dir), [], []
    for name, by_rule in RULES.items():
        there = _in_order(name, {getattr(one, name) for one in left}, run_dir)
        value = wanted.get(name)
        if name == "client" and there == [-1] and value is None:
            break
        named = value is not None and value != ""
        if named and value not in there:
            raise UserError(_unknown(name, value, there, left))
        value = value if named else there[0]
        if named:
            reasons.append(f"--{name} {value}")
        else:
            usual = value == _first_choice(name, value, run_dir)
            reasons.append(by_rule if usual else f"{name} {value}, as {by_rule} is not among them")
        if more := [str(one) for one in there if one != value]:
            others.append(f"--{name} {' or '.join(more)}")
        left = [one for one in left if getattr(one, name) == value]
    why = f"{', '.join(reasons)}; no score was looked at"
    return left[0], why + (f"; others by {', '.join(others)}" if others else "")


def _in_order(name: str, values: Iterable, run_dir: Path) -> list:
    """Return the values that are there, the one that the rule takes first."""
    known = {"arm": ARMS, "split": (reference_split(run_dir), *SPLITS), "init": INITS}
    values = sorted(values)
    return known_first(values, dict.fromkeys(known[name])) if name in known else values


def _first_choice(name: str, value: object, run_dir: Path) -> object:
    """Return what the rule would take if everything were there."""
    return {"arm": ARMS[0], "split": reference_split(run_dir), "init": INITS[0]}.get(name, value)


def _unknown(name: str, value: object, there: list, left: list[Final]) -> str:
    """Say that weights are not there, and list those that are."""
    so_far = {part: {getattr(one, part) for one in left} for part in RULES}
    before = list(RULES)[: list(RULES).index(name)]
    given = ", ".join(f"{part} {next(iter(so_far[part]))}" for part in before if len(so_far[part]) == 1)
    of = f" for {given}" if given else ""
    listed = "none, as these weights are of all clients" if there == [-1] else first_few(map(str, there), 12)
    return f"--{name} {value}: there are no such final weights{of}; there is: {listed}"


def device(name: str) -> torch.device:
    """Return a device by name; `auto` is a GPU where PyTorch finds one.

    Raises:
        UserError: there is no such device here.
    """
    wanted = config.settings({"device": name}).run
    if wanted.device == "cuda" and not torch.cuda.is_available():
        raise UserError("device is cuda, but PyTorch finds no GPU here: choose auto or cpu")
    return devices.device_of(wanted)


def load(final: Final, device: str | torch.device = "cpu") -> nn.Module:
    """Return the student with its final weights, in evaluation mode.

    Raises:
        UserError: the file is damaged, or its weights are not those of the student.
    """
    stored = states.read_state(final.file, device=device)
    if stored is None:
        raise UserError(f"{final.file} is damaged: run the same study again, which makes it anew")
    model = models.build(final.student, device=device, batch_norm=final.batch_norm)
    try:
        models.load_state(model, stored[0])
    except RuntimeError:
        raise UserError(
            f"{final.file} does not hold the weights of student {final.student!r}: its run's folder was "
            "changed, so run the study again"
        ) from None
    return model.eval()

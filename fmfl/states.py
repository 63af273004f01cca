"""Model states: saved and loaded atomically, with a SHA-256 that shows damage."""

import hashlib
import json
import os
from functools import cache
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from fmfl import paths

#: A model's `state_dict`: it travels between server and clients.
State = dict[str, Tensor]


def tensor_digest(tensor: Tensor) -> str:
    """Return the SHA-256 of a tensor's values."""
    # As bytes, because numpy knows no bfloat16.
    values = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(values.numpy()).hexdigest()


def state_digest(state: State) -> str:
    """Return the SHA-256 over names and values of a state: equal states, equal digests."""
    digest = hashlib.sha256()
    for key in sorted(state):
        digest.update(key.encode())
        digest.update(tensor_digest(state[key]).encode())
    return digest.hexdigest()


def fingerprint(*parts: object) -> str:
    """Return a short name for everything that a result depends on."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:32]


#: Modules that decide what training computes: a state trained by other code is another state.
TRAINING_CODE = (
    *("seeds.py", "devices.py", "parallel.py", "augment.py", "losses.py", "models.py"),
    *("unet.py", "capture.py", "train.py", "distill.py", "federate.py"),
)


@cache
def code_digest(files: tuple[str, ...] = TRAINING_CODE) -> str:
    """Return the SHA-256 of modules' source text: `sha256sum FILE ... | sha256sum` prints the same.

    The text counts, comments included, with line endings as LF: syntax trees differ between versions of
    Python, and a checkout on Windows may end its lines with CRLF.

    Args:
        files: modules below the package's folder, named with `/`; their order counts.
    """
    lines = ""
    for name in files:
        source = (paths.PACKAGE / name).read_bytes().replace(b"\r\n", b"\n")
        lines += f"{hashlib.sha256(source).hexdigest()}  {name}\n"
    return hashlib.sha256(lines.encode()).hexdigest()


def previous(file: Path) -> Path:
    """Name the file to which `write_state` moves the state before."""
    return file.with_name(f"{file.name}.previous")


def write_bytes(file: Path, content: bytes) -> None:
    """Write a file whole or not at all, should the process be killed or the power fail at any instant."""
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = _unfinished(file, content)
    os.replace(unfinished, file)
    _sync_folder(file.parent)


def _unfinished(file: Path, content: bytes) -> Path:
    """Write the content to a hidden file beside the named one, and wait until the disk has it."""
    unfinished = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        with unfinished.open("wb") as opened:
            opened.write(content)
            opened.flush()
            os.fsync(opened.fileno())  # else a power cut could leave the new name with no content
    except OSError as error:  # a full disk: what could be written takes the little room there is
        unfinished.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(file)) from error
    return unfinished


def _sync_folder(folder: Path) -> None:
    """Let the disk know the folder's names as they are now; Windows has no such call."""
    if hasattr(os, "O_DIRECTORY"):
        opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)


def write_state(file: Path, state: State, *, keep_previous: bool = False, **record: object) -> None:
    """Write a state with a record of how it was made: the whole file or none of it, as `write_bytes`.

    The file is read as safetensors by anyone; the record is JSON in its metadata under `fmfl`, with the
    `state_digest` of the tensors under `sha256`.

    Args:
        keep_previous: the file that was there stays, as `previous`; else neither stays.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    content = save(
        {key: value.detach().cpu().contiguous() for key, value in state.items()},
        metadata={"fmfl": json.dumps(record | {"sha256": state_digest(state)})},
    )
    # Safetensors' own writing would hide the file from the others of a shared folder.
    unfinished = _unfinished(file, content)
    if keep_previous and file.exists():
        os.replace(file, previous(file))
    elif not keep_previous:
        previous(file).unlink(missing_ok=True)
    os.replace(unfinished, file)
    _sync_folder(file.parent)


def read_record(file: Path) -> dict:
    """Read the record of a state's file, without its tensors; empty where the file is missing or damaged."""
    try:
        with safe_open(file, "pt") as opened:
            return json.loads((opened.metadata() or {}).get("fmfl", "{}"))
    except (OSError, SafetensorError, ValueError):
        return {}


def read_state(
    file: Path, *, fingerprint: str | None = None, device: str | torch.device = "cpu"
) -> tuple[State, dict] | None:
    """Read a state and its record; None where the file is missing, damaged or made with other settings.

    Args:
        fingerprint: the record's own must equal it; None takes any.
    """
    record = read_record(file)
    if fingerprint is not None and record.get("fingerprint") != fingerprint:
        return None
    try:
        state = load_file(file, device=str(device))
    except (OSError, SafetensorError):
        return None
    intact = record.get("sha256") in (None, state_digest(state))  # other programs write none
    return (state, record) if intact else None

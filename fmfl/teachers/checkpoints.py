"""Weights from elsewhere: fetched on request, read as tensors only, compared key by key, known by SHA-256."""

import hashlib
import pickle
import socket
import zipfile
from collections.abc import Mapping
from itertools import groupby
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from fmfl import paths
from fmfl.errors import UserError
from fmfl.states import State

#: The parts of a network by a text in their keys, the first that fits, and the harm of loading without them.
PARTS = {
    ".Adapter.": ("adapters", "the image encoder would see X-rays as the photographs of plain SAM"),
    "image_encoder.": ("image encoder", "images would be turned into noise"),
    "prompt_encoder.": ("prompt encoder", "boxes would not be understood"),
    "mask_decoder.": ("mask decoder", "masks would be noise, however good the image encoder is"),
}


def _empty_dict(*args: object) -> dict:
    """Stand for `defaultdict(dict)`, in which an optimizer keeps its state."""
    return {}


#: Names that a checkpoint may hold besides those that PyTorch takes for data. An optimizer that a training
#: script saved whole beside the model is read as bare attributes: none of its code runs.
DATA_TYPES = [
    dict,
    (_empty_dict, "collections.defaultdict"),
    *((SimpleNamespace, f"torch.optim.{name}") for name in ("adam.Adam", "adamw.AdamW", "sgd.SGD")),
]


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file that may be larger than memory."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read(path: str | Path) -> State:
    """Return the tensors of a checkpoint as its authors publish it, on the CPU.

    The file holds a bare state dict, or one under `model` or `state_dict`, in PyTorch's format or in
    safetensors; its content tells which, not its name. Code in a file is never run.

    Raises:
        UserError: there is no such file, or it holds no named tensors.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"the teacher's weights {path} are not there: name an existing file")
    if path.is_dir():
        raise UserError(f"{path} is a folder, not a file of weights: name the file in it")
    with path.open("rb") as file:
        head = file.read(512)
    if not head:
        raise UserError(f"{path} is empty: fetch it again")
    if head.lstrip()[:1] == b"<":
        raise UserError(
            f"{path} is a web page, not weights: open the address in a browser and save what the page offers"
        )
    content = _safetensors(path) if head[8:9] == b"{" else _pytorch(path, head)
    for key in ("model", "state_dict"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not content:
        raise UserError(f"{path} holds no state dict, which names each tensor: save model.state_dict()")
    if other := [key for key, value in content.items() if not isinstance(value, Tensor)]:
        raise UserError(f"{path} holds no tensor at {str(other[0])!r}, so it is no state dict of a network")
    # Written from inside DistributedDataParallel, each key begins so.
    shared = all(key.startswith("module.") for key in content)
    return {key.removeprefix("module.") if shared else key: value for key, value in content.items()}


def _safetensors(path: Path) -> State:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{path} is a damaged or truncated safetensors file ({reason}): fetch it again"
        ) from None


def _pytorch(path: Path, head: bytes) -> object:
    is_zip = head[:4] == b"PK\x03\x04"
    if is_zip and not zipfile.is_zipfile(path):  # the directory stands at the end
        raise UserError(f"{path} is truncated: fetch it again")
    if not is_zip and head[:1] != b"\x80":
        raise UserError(f"{path} is no checkpoint: neither PyTorch's format nor safetensors")
    try:
        with torch.serialization.safe_globals(DATA_TYPES):
            # Mapped, an optimizer of twice the model's size is never read from the disk.
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError as error:
        if "GLOBAL" not in str(error) and "Unsupported" not in str(error):
            raise UserError(f"{path} is a damaged or truncated checkpoint: fetch it again") from None
        raise UserError(
            f"{path} asks to run code when it is read, which is refused: save its state_dict() or safetensors"
        ) from None
    except Exception as error:  # a damaged pickle can fail in any way
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"{path} is a damaged or truncated checkpoint ({reason[:80]}): fetch it again"
        ) from None


def differences(state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> str:
    """Say part by part where keys and shapes of a checkpoint differ from a network's, and the harm.

    Returns:
        One sentence; empty where all agree.
    """
    both = [key for key in expected if key in state]
    problems = {
        "missing": [key for key in expected if key not in state],
        "unexpected": [key for key in state if key not in expected],
        "of another shape": [key for key in both if state[key].shape != expected[key].shape],
    }
    texts = []
    for problem, keys in problems.items():
        for (part, harm), (first, *others) in groupby(sorted(keys, key=_part_of), _part_of):
            harm = f": {harm}" if harm and problem != "unexpected" else ""
            texts.append(f"{1 + len(others)} keys of the {part} {problem} (such as {first}){harm}")
    return "; ".join(texts)


def _part_of(key: str) -> tuple[str, str]:
    """Return the part of a Segment Anything network that a key belongs to, and the harm without it."""
    return next((part for text, part in PARTS.items() if text in f".{key}"), ("rest", ""))


def usable(path: Path, state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Raise a UserError where a checkpoint's numbers cannot be a trained network's."""
    if reason := _fault({key: value for key, value in state.items() if key in expected}, expected):
        raise UserError(f"{path} is no trained network: {reason}; fetch the weights again or choose others")


def _fault(state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> str:
    """Say why numbers cannot be a trained network's; empty where they can."""
    for key, value in state.items():
        if not expected[key].is_floating_point():
            continue
        if not value.is_floating_point():
            kind = str(value.dtype).removeprefix("torch.")
            return f"{key} holds {kind} instead of floating point, as quantised weights do"
        if not value.float().isfinite().all():
            return f"{key} holds NaN or infinity"
    matrices = {key: value for key, value in state.items() if value.ndim > 1 and value.numel() > 1}
    if not matrices or any((value != value.flatten()[0]).any() for value in matrices.values()):
        return ""
    return f"{next(iter(matrices))} and every other matrix hold one number each"


class Published(NamedTuple):
    """A teacher's weights where its authors publish them.

    Attributes:
        file_name: the authors' own.
        page: address of the authors' description.
        sha256: of the file; None where its authors and public registries name none.
        url: address of the file itself; None where a person has to fetch it.
    """

    file_name: str
    page: str
    sha256: str | None = None
    url: str | None = None

    @property
    def file(self) -> Path:
        """The place of the downloaded file."""
        return paths.WEIGHTS / self.file_name


def _of_sam(model: str, sha256: str) -> Published:
    page = "https://github.com/facebookresearch/segment-anything#model-checkpoints"
    url = f"https://dl.fbaipublicfiles.com/segment_anything/sam_{model}.pth"
    return Published(f"sam_{model}.pth", page, sha256, url)


#: SAM's checksums are those of public model registries (micro-sam's, for one): Meta names none.
PUBLISHED = {
    "sam-med2d": Published("sam-med2d_b.pth", "https://github.com/OpenGVLab/SAM-Med2D"),
    "sam_vit_b": _of_sam("vit_b_01ec64", "ec2df62732614e57411cdcf32a23ffdf28910380d03139ee0f4fcbe91eb8c912"),
    "sam_vit_l": _of_sam("vit_l_0b3195", "3adcc4315b642a4d2101128f611684e8734c41232a17c648ed1693702a49a622"),
    "sam_vit_h": _of_sam("vit_h_4b8939", "a7bf3b02f3ebf1267aba913ff637d9a2d5c33d3173bb679e46d9f338c26f262e"),
    "medsam": Published("medsam_vit_b.pth", "https://github.com/bowang-lab/MedSAM"),
}


#: SHA-256 of the built-in teacher's weights, which this project ships.
BUILTIN_SHA256 = "33d406f61d46e79f77cab95818fcdb1c2f82c17c2cd11488ea72055b5179131e"


def published_as(sha256: str) -> str | None:
    """Return the teacher whose shipped or published file has this SHA-256; None for any other file."""
    known = {file.sha256: name for name, file in PUBLISHED.items() if file.sha256}
    return (known | {BUILTIN_SHA256: "builtin"}).get(sha256)


def download(name: str, *, progress: bool = True) -> Path:
    """Fetch a teacher's published weights, once.

    Args:
        name: one of `PUBLISHED`.
        progress: show a bar.

    Returns:
        The file, whose SHA-256 is the published one.

    Raises:
        UserError: the weights have no direct address, cannot be fetched, or are not the published ones.
    """
    if name not in PUBLISHED:
        raise UserError(f"no published weights are known for {name!r}: choose one of {', '.join(PUBLISHED)}")
    known = PUBLISHED[name]
    if known.url is None:
        raise UserError(
            f"{known.file_name} has no direct address: fetch it by hand from {known.page} and save it as "
            f"{known.file}, or name it with --checkpoint"
        )
    if known.file.is_file():
        if sha256_of(known.file) == known.sha256:
            return known.file
        raise UserError(f"{known.file} is not the published file (other SHA-256): move it away or delete it")
    try:
        known.file.parent.mkdir(parents=True, exist_ok=True)
        _download(known.url, known.file, known.sha256, progress)
    except OSError as error:
        reason = getattr(error, "reason", None) or error.strerror or error
        raise UserError(f"{known.url} could not be fetched ({reason}): try again") from None
    except RuntimeError:  # of PyTorch's for another checksum
        raise UserError(
            f"{known.url} was cut off or gave another file than the published one (other SHA-256): try again "
            f"or save it by hand as {known.file}"
        ) from None
    return known.file


def _download(url: str, file: Path, sha256: str, progress: bool) -> None:
    """Call PyTorch's download with a limit of a minute for a silent server; it sets none itself."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(60)
    try:
        torch.hub.download_url_to_file(url, str(file), sha256, progress)
    finally:
        socket.setdefaulttimeout(before)

"""Weights from elsewhere: fetched on request, read as tensors only, compared key by key, known by SHA-256."""

import hashlib
import os
import pickle
import shutil
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from tqdm.auto import tqdm

from fmfl import paths
from fmfl.errors import UserError

State = dict[str, Tensor]

#: The parts of a network by what their keys hold, the first that fits, and what is wrong without them.
PARTS = {
    ".Adapter.": ("adapters", "the image encoder would see X-rays as the photographs of plain SAM"),
    "image_encoder.": ("image encoder", "images would be turned into noise"),
    "prompt_encoder.": ("prompt encoder", "boxes would not be understood"),
    "mask_decoder.": ("mask decoder", "masks would be noise, however good the image encoder is"),
}


class _Ignored:
    """Takes the place of an optimizer beside the weights: made and forgotten, none of its code runs."""

    def __init__(self, *args: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


def _plain_dict(*args: object) -> dict:
    """Takes the place of `defaultdict(dict)`, which an optimizer keeps its state in."""
    return {}


#: What may stand for a name in a checkpoint, besides what PyTorch itself takes for data: an optimizer that a
#: training script saved whole beside the model is skipped.
STAND_INS = [
    (_Ignored, "torch.optim.adam.Adam"),
    (_Ignored, "torch.optim.adamw.AdamW"),
    (_Ignored, "torch.optim.sgd.SGD"),
    (_plain_dict, "collections.defaultdict"),
    (dict, "builtins.dict"),
]


def sha256_of(path: Path) -> str:
    """SHA-256 of a file that may be larger than memory."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read(path: str | Path) -> State:
    """The tensors of a checkpoint as its authors publish it, on the CPU.

    A bare state dict, or one under `model` or `state_dict` with others beside it, in PyTorch's format
    or in safetensors; the format is told from the content, not from the name. Code in a file is never run.

    Raises:
        UserError: there is no such file, or it holds no named tensors.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(
            f"the teacher's weights {path} are not there: name an existing file with --checkpoint"
        )
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
        with torch.serialization.safe_globals(STAND_INS):
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


@dataclass(frozen=True)
class Fit:
    """How a checkpoint's tensors compare with a network's.

    Attributes:
        missing: keys of the network that the checkpoint lacks.
        unexpected: keys of the checkpoint that the network lacks.
        reshaped: key -> shape in the checkpoint and in the network, where they differ.
        matched: keys that agree.
    """

    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    reshaped: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict)
    matched: list[str] = field(default_factory=list)

    @property
    def problems(self) -> list[str]:
        """Keys that do not agree."""
        return [*self.missing, *self.unexpected, *self.reshaped]

    def without(self, patterns: Iterable[str]) -> "Fit":
        """What is left when keys that match a pattern (`*` stands for anything) are passed over."""
        patterns = tuple(patterns)

        def left(keys: Iterable[str]) -> list[str]:
            return [key for key in keys if not any(fnmatchcase(key, pattern) for pattern in patterns)]

        reshaped = {key: self.reshaped[key] for key in left(self.reshaped)}
        return Fit(left(self.missing), left(self.unexpected), reshaped, self.matched)

    def sentence(self) -> str:
        """What is wrong, part by part, and what it would have meant; empty where nothing is."""
        said = []
        for what, keys in (
            ("missing", self.missing),
            ("unexpected", self.unexpected),
            ("of another shape", list(self.reshaped)),
        ):
            by_part: dict[str, list[str]] = {}
            for key in keys:
                by_part.setdefault(part_of(key), []).append(key)
            for part, found in by_part.items():
                harm = dict(PARTS.values()).get(part)
                harm = f": {harm}" if harm and what != "unexpected" else ""
                said.append(f"{len(found)} keys of the {part} {what} (such as {found[0]}){harm}")
        return "; ".join(said)


def part_of(key: str) -> str:
    """The part of a Segment Anything network that a key belongs to."""
    return next((part for prefix, (part, _) in PARTS.items() if prefix in f".{key}"), "rest")


def compare(state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> Fit:
    """A checkpoint's keys and shapes against a network's."""
    both = [key for key in expected if key in state]
    reshaped = {
        key: (tuple(state[key].shape), tuple(expected[key].shape))
        for key in both
        if state[key].shape != expected[key].shape
    }
    return Fit(
        missing=[key for key in expected if key not in state],
        unexpected=[key for key in state if key not in expected],
        reshaped=reshaped,
        matched=[key for key in both if key not in reshaped],
    )


def not_finite(state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> str:
    """The first of a network's weights that a checkpoint does not hold as finite numbers; empty for none."""
    for key, wanted in expected.items():
        if key not in state or not wanted.is_floating_point():
            continue
        if not state[key].is_floating_point():
            kind = str(state[key].dtype).removeprefix("torch.")
            return f"{key} holds {kind} instead of floating point, as quantised weights do"
        if not state[key].float().isfinite().all():
            return f"{key} holds NaN or infinity"
    return ""


def constant(state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> str:
    """The first matrix of a checkpoint in which no matrix has two different numbers; empty where one has."""
    matrices = [key for key, wanted in expected.items() if key in state and wanted.ndim > 1]
    if any((state[key] != state[key].flatten()[0]).any() for key in matrices if state[key].numel() > 1):
        return ""
    return f"{matrices[0]} and every other matrix hold one number each" if matrices else ""


def usable(path: Path, state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Raise a UserError where a checkpoint's numbers cannot be a trained network's."""
    if wrong := not_finite(state, expected) or constant(state, expected):
        raise UserError(f"{path} is no trained network: {wrong}; fetch the weights again or choose others")


# ------------------------------------------------------------------------------------------ published files


@dataclass(frozen=True)
class Published:
    """A teacher's weights where its authors publish them.

    Attributes:
        file_name: as its authors call it.
        sha256: of the file; None where its authors and public registries name none.
        url: an address that gives the file itself; None where a person has to fetch it.
        page: where its authors say more.
    """

    file_name: str
    page: str
    sha256: str | None = None
    url: str | None = None

    @property
    def file(self) -> Path:
        """Where `download` puts it."""
        return paths.WEIGHTS / self.file_name


_SAM_PAGE = "https://github.com/facebookresearch/segment-anything#model-checkpoints"
_SAM_URL = "https://dl.fbaipublicfiles.com/segment_anything/"


def _of_sam(file_name: str, sha256: str) -> Published:
    return Published(file_name, _SAM_PAGE, sha256, _SAM_URL + file_name)


#: SAM's checksums are those of public model registries (micro-sam's, for one): Meta names none.
PUBLISHED = {
    "sam-med2d": Published("sam-med2d_b.pth", "https://github.com/OpenGVLab/SAM-Med2D"),
    "sam_vit_b": _of_sam(
        "sam_vit_b_01ec64.pth", "ec2df62732614e57411cdcf32a23ffdf28910380d03139ee0f4fcbe91eb8c912"
    ),
    "sam_vit_l": _of_sam(
        "sam_vit_l_0b3195.pth", "3adcc4315b642a4d2101128f611684e8734c41232a17c648ed1693702a49a622"
    ),
    "sam_vit_h": _of_sam(
        "sam_vit_h_4b8939.pth", "a7bf3b02f3ebf1267aba913ff637d9a2d5c33d3173bb679e46d9f338c26f262e"
    ),
    "medsam": Published("medsam_vit_b.pth", "https://github.com/bowang-lab/MedSAM"),
}


def published_as(sha256: str) -> str | None:
    """The teacher whose published checksum this is; None for any other file."""
    return next((name for name, known in PUBLISHED.items() if known.sha256 == sha256), None)


def download(name: str, *, progress: bool = True) -> Path:
    """Fetch a teacher's published weights; what an earlier try has left is continued.

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
    # Pooch and torch.hub begin a file of gigabytes anew after each broken line; this one goes on.
    unfinished = known.file.with_name(f"{known.file.name}.part")
    try:
        unfinished.parent.mkdir(parents=True, exist_ok=True)
        _fetch(known.url, unfinished, progress=progress)
    except (OSError, urllib.error.URLError) as error:
        reason = getattr(error, "reason", None) or getattr(error, "strerror", None) or error
        raise UserError(
            f"{known.url} could not be fetched ({reason}): the same command continues where it stopped"
        ) from None
    if (found := sha256_of(unfinished)) != known.sha256:
        unfinished.unlink()
        raise UserError(
            f"{known.url} gave another file than the published one (SHA-256 {found[:16]}...): it was deleted"
        )
    os.replace(unfinished, known.file)
    return known.file


def _fetch(url: str, file: Path, *, progress: bool) -> None:
    """Append to a file what it lacks of an address's content."""
    there = file.stat().st_size if file.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={there}-"} if there else {})
    try:
        answer = urllib.request.urlopen(request, timeout=60)
    except urllib.error.HTTPError as error:
        if error.code == 416 and there:  # nothing is left to send
            return
        raise
    with answer:
        if answer.status != 206:  # a server that knows no ranges sends all
            there = 0
        size = answer.headers.get("Content-Length")
        total = there + int(size) if size else None
        with (
            file.open("ab" if there else "wb") as out,
            tqdm.wrapattr(
                answer, "read", total=total, initial=there, desc=file.stem, unit="B", disable=not progress
            ) as body,
        ):
            shutil.copyfileobj(body, out, 2**20)
    if total is not None and file.stat().st_size < total:
        raise OSError("the connection was cut")

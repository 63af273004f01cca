"""Files of a source: which are there, which are images, and which image a name means.

Links are followed, except one that leads back to a folder that holds it. Nothing in images/ or masks/ goes
unmentioned: what is no image by its suffix or content becomes a `SkippedFile`. Hidden files are left aside.
"""

import json
import os
import stat
from collections import defaultdict
from collections.abc import Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fmfl.errors import UserError

DICOM_SUFFIXES = frozenset({".dcm", ".dicom"})
IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp"}) | DICOM_SUFFIXES
TABLE_SUFFIXES = frozenset({".csv", ".tsv", ".xls", ".xlsx", ".ods"})
# Beside images these are usual and mean no loss; any other unknown file may be an image that nobody reads.
COMPANIONS = TABLE_SUFFIXES | {
    ".txt",
    ".md",
    ".json",
    ".xml",
    ".html",
    ".pdf",
    ".ini",
    ".db",
    ".log",
    ".yaml",
}


class SkippedFile(Exception):
    """One file that is not used, and why. Readers yield it, decoders raise it."""

    def __init__(self, file: Path, reason: str, detail: str, *, defect: bool = True) -> None:
        super().__init__(detail)
        self.file, self.reason, self.detail, self.defect = file, reason, detail, defect


class Found(NamedTuple):
    """One file below a folder; `fault` says why it cannot be opened, "" where it can."""

    name: str  # path below the folder, with "/"
    size: int  # bytes
    mtime: int  # ns
    fault: str = ""


def is_folder(path: Path) -> bool:
    """True for a folder or a link to one; UserError where the system refuses to say."""
    try:
        return stat.S_ISDIR(os.stat(path).st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); change its permissions.") from None


def walk(root: Path, deep: bool = True) -> Iterator[Found]:
    """Every file below `root`; nothing where there is no such folder.

    Raises:
        UserError: a folder cannot be read.
    """
    if is_folder(root):
        yield from _walk(root, "", deep, ())


def _walk(root: Path, below: str, deep: bool, above: tuple[Path, ...]) -> Iterator[Found]:
    folder = root / below
    try:
        entries = list(os.scandir(folder))
    except OSError as error:
        raise UserError(
            f"{folder}: this folder cannot be read ({error.strerror}); change its permissions."
        ) from None
    above = (*above, folder.resolve())
    for entry in entries:
        name = below + entry.name
        if entry.name.startswith("."):
            continue
        try:
            if entry.is_file():
                status = entry.stat()
                yield Found(name, status.st_size, status.st_mtime_ns)
                continue
            inside = entry.is_dir()
        except OSError:  # a link to itself
            inside = False
        if not inside:
            if entry.is_symlink():
                yield Found(name, 0, 0, f"a link to {os.readlink(entry.path)}, which is not there")
            else:
                yield Found(name, 0, 0, "neither a file nor a folder")
        elif deep:
            target = Path(entry.path).resolve() if entry.is_symlink() else None
            if any(target == one or target in one.parents for one in above):
                yield Found(name, 0, 0, "a link that leads back to a folder that holds it")
            else:
                yield from _walk(root, f"{name}/", deep, above)


def list_files(folder: Path) -> list[Found]:
    """Every file that a reader may look at, sorted; a cache made from other files is not used."""
    if is_folder(folder / "images"):  # the usual case: what else lies in the folder does not matter
        found = list(walk(folder, deep=False))
        for part in ("images", "masks", "annotations", "releases"):
            found += [one._replace(name=f"{part}/{one.name}") for one in walk(folder / part)]
    else:
        found = list(walk(folder))
    return sorted(found)


def annotation_files(folder: Path) -> list[Path]:
    """JSON files in annotations/ (or where V7's own command line puts them), else at the folder's top."""
    for place in (folder / "annotations", folder / "releases" / "latest" / "annotations"):
        found = sorted(one.name for one in walk(place) if one.name.lower().endswith(".json"))
        if found:
            return [Path(place, name) for name in found]
    return [
        folder / name
        for name in sorted(one.name for one in walk(folder, deep=False) if one.name.lower().endswith(".json"))
    ]


def read_json(path: Path, fatal: bool = False) -> Any:
    """Raises LeftOut, or with `fatal` UserError, where the file is no JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        if fatal:
            raise UserError(f"{path}: broken JSON ({first_line(error)}); export it again.") from None
        raise SkippedFile(path, "broken JSON", f"broken JSON ({first_line(error)})") from None


def first_line(error: BaseException) -> str:
    """An error's first line without its full stop."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def printable(text: str) -> str:
    """Text with escapes for what UTF-8 has no form for: bytes of a file's name in another encoding."""
    return text.encode(errors="backslashreplace").decode()


def has_image_suffix(name: str) -> bool:
    """True for the name of a picture or a DICOM file."""
    return name.lower().endswith(tuple(IMAGE_SUFFIXES))


def is_dicom(path: Path) -> bool:
    """True where the content is DICOM: "DICM" at byte 128 (PS3.10, section 7.1)."""
    try:
        with path.open("rb") as file:
            return file.read(132)[128:] == b"DICM"
    except OSError:
        return False


def without_suffix(name: str) -> str:
    """A name without the suffix of an image; another dot belongs to the name, as in a DICOM UID."""
    return name.rpartition(".")[0] if has_image_suffix(name) else name


def key(path: Path, root: Path) -> str:
    """A file's path below `root` without its suffix: for a flat folder its stem."""
    return without_suffix(path.relative_to(root).as_posix())


def image_root(folder: Path) -> Path:
    """The folder below which a source's images lie."""
    return folder / "images" if is_folder(folder / "images") else folder


class ImageIndex:
    """The image files below a folder, sorted, and those that are none (`others`).

    `others` is complete only for a folder of images: at a source's top any file may lie.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.files: list[Path] = []
        self.others: list[SkippedFile] = []
        for found in sorted(walk(root)):
            path = root / found.name
            if printable(found.name) != found.name:
                detail = "its name is not valid UTF-8, so no table can name it; rename it"
                self.others.append(SkippedFile(path, "name not valid", detail))
            elif found.fault and not path.is_symlink():  # a pipe: nobody may ever write into it
                self.others.append(SkippedFile(path, "not a file", f"it is {found.fault}"))
            elif has_image_suffix(found.name):  # a broken link too: its reader says so
                self.files.append(path)
            elif found.fault:
                self.others.append(SkippedFile(path, "broken link", found.fault))
            elif path.name.upper() != "DICOMDIR" and is_dicom(path):
                self.files.append(path)
            elif root.name in ("images", "masks"):
                companion = path.suffix.lower() in COMPANIONS or path.name.upper() == "DICOMDIR"
                detail = "neither its suffix nor its content is that of an image that is read"
                self.others.append(SkippedFile(path, "not an image", detail, defect=not companion))
        self._exact: dict[tuple[str, ...], set[Path]] = defaultdict(set)
        self._ending: dict[tuple[str, ...], set[Path]] = defaultdict(set)
        for path in self.files:
            for parts in {path.relative_to(root).parts, tuple(self.key(path).split("/"))}:
                self._exact[parts].add(path)
                for start in range(len(parts)):
                    self._ending[parts[start:]].add(path)

    def key(self, path: Path) -> str:
        """The image's id: its path below the root without suffix."""
        return key(path, self.root)

    def match(self, wanted: Mapping[Hashable, Sequence[str]]) -> dict[Hashable, Path | str]:
        """The image of each entry, or one sentence on why none can be told.

        An entry's names are paths; any of them may be that of a file. Where none is, the first may lie in
        more, or in fewer, folders than the file (`train/x.png` and `x.png`), if only one file and only one
        entry agree so. Of two images that share a name but not a folder, neither stands for the other.
        """
        found: dict[Hashable, Path | str] = {}
        claims: dict[Path, list[Hashable]] = defaultdict(list)
        for entry, names in wanted.items():
            exact = set().union(*(self._named(name) for name in names))
            similar = set() if exact else self._similar(names[0])
            if len(exact) == 1:
                found[entry] = next(iter(exact))
            elif len(similar) == 1:
                claims[next(iter(similar))].append(entry)
            else:
                several = sorted(self.key(path) for path in exact | similar)
                found[entry] = f"is not in {self.root.name}/"
                if several:
                    found[entry] = f"could be any of {', '.join(several[:3])}"
        taken = set(found.values())
        for path, entries in claims.items():
            alone = len(entries) == 1 and path not in taken
            for entry in entries:
                found[entry] = path if alone else f"is not in {self.root.name}/ under its own path"
        return found

    def _forms(self, name: str) -> list[tuple[str, ...]]:
        """A name's folders and file; as they are, without "images", and without the image's suffix."""
        parts = tuple(part for part in str(name).replace("\\", "/").split("/") if part not in ("", "."))
        forms = [parts, parts[1:]] if len(parts) > 1 and parts[0] == "images" else [parts]
        return forms + [(*form[:-1], without_suffix(form[-1])) for form in forms if form]

    def _named(self, name: str) -> set[Path]:
        return next((self._exact[form] for form in self._forms(name) if form in self._exact), set())

    def _similar(self, name: str) -> set[Path]:
        for form in self._forms(name):
            shorter = (form[start:] for start in range(1, len(form)))
            found = set(self._ending.get(form, ())).union(*(self._exact.get(one, ()) for one in shorter))
            if found:
                return found
        return set()

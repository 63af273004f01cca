"""Files of a source: which are there, which are images, and which image a name means.

Links are followed, except one that leads back to a folder that holds it. Nothing in images/ or masks/ goes
unmentioned: what is no image by its suffix or content becomes a `SkippedFile`. Hidden files are ignored.
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
#: Beside images these are usual and mean no loss; any other unknown file may be an image that nobody reads.
COMPANIONS = (
    TABLE_SUFFIXES | {".txt", ".md", ".pdf", ".ini", ".db", ".log"} | {".json", ".xml", ".html", ".yaml"}
)


class SkippedFile(Exception):
    """One file that is not used, and why. Readers yield it, decoders raise it."""

    def __init__(self, file: Path, reason: str, detail: str, *, defect: bool = True) -> None:
        super().__init__(detail)
        self.file, self.reason, self.detail, self.defect = file, reason, detail, defect

    def entry(self, folder: Path) -> dict[str, Any]:
        """Return its row in `Cohort.left_out`, but for the source."""
        file = printable(self.file.relative_to(folder).as_posix())
        return {"file": file, "reason": self.reason, "detail": printable(self.detail), "defect": self.defect}


class Found(NamedTuple):
    """One file below a folder."""

    name: str  # path below the folder, with "/"
    size: int = 0  # bytes
    mtime: int = 0  # ns
    fault: str = ""  # why it cannot be opened


def is_folder(path: Path) -> bool:
    """Return True for a folder or a link to one; raise a UserError where the system refuses to say."""
    try:
        return stat.S_ISDIR(os.stat(path).st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); change its permissions") from None


def walk(root: Path, deep: bool = True) -> Iterator[Found]:
    """Find every file below `root`; nothing where there is no such folder.

    Raises:
        UserError: a folder cannot be read.
    """
    if is_folder(root):
        yield from _walk(root, "", deep, ())


def _walk(root: Path, below: str, deep: bool, above: tuple[Path, ...]) -> Iterator[Found]:
    folder = root / below
    try:
        entries = [entry for entry in os.scandir(folder) if not entry.name.startswith(".")]
    except OSError as error:
        reason = error.strerror
        raise UserError(f"{folder}: this folder cannot be read ({reason}); change its permissions") from None
    above = (*above, folder.resolve())
    for entry in entries:
        name = below + entry.name
        try:
            if entry.is_file():
                status = entry.stat()
                yield Found(name, status.st_size, status.st_mtime_ns)
                continue
            inside = entry.is_dir()
        except OSError:  # a link to itself
            inside = False
        target = Path(entry.path).resolve() if inside and entry.is_symlink() else None
        if not inside and entry.is_symlink():
            yield Found(name, fault=f"a link to {os.readlink(entry.path)}, which is not there")
        elif not inside:
            yield Found(name, fault="neither a file nor a folder")
        elif deep and target and any(target == one or target in one.parents for one in above):
            yield Found(name, fault="a link that leads back to a folder that holds it")
        elif deep:
            yield from _walk(root, f"{name}/", deep, above)


def list_files(folder: Path) -> list[Found]:
    """List every file that a reader may look at, sorted; a cache made from other files is not used."""
    if not is_folder(folder / "images"):
        return sorted(walk(folder))
    files = list(walk(folder, deep=False))  # what else lies in the folder does not matter
    for part in ("images", "masks", "annotations", "releases"):
        files += [one._replace(name=f"{part}/{one.name}") for one in walk(folder / part)]
    return sorted(files)


def annotation_files(folder: Path) -> list[Path]:
    """List the JSON files in annotations/ (or where V7's own command line puts them), else at the top."""
    places = (folder / "annotations", folder / "releases" / "latest" / "annotations", folder)
    for place in places:
        files = walk(place, deep=place != folder)
        names = sorted(one.name for one in files if one.name.lower().endswith(".json"))
        if names:
            return [place / name for name in names]
    return []


def read_json(path: Path) -> Any:
    """Return what a JSON file holds; raise a SkippedFile where it is no JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise SkippedFile(path, "broken JSON", f"broken JSON ({first_line(error)})") from None


def first_line(error: BaseException) -> str:
    """Return an error's first line without its full stop."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def printable(text: str) -> str:
    """Return a text with escapes for what UTF-8 has no form for: a file's name in another encoding."""
    return text.encode(errors="backslashreplace").decode()


def has_image_suffix(name: str) -> bool:
    """Return True for the name of a picture or a DICOM file."""
    return name.lower().endswith(tuple(IMAGE_SUFFIXES))


def _is_dicom(path: Path) -> bool:
    """Return True where the content is DICOM: "DICM" at byte 128 (PS3.10, section 7.1)."""
    try:
        with path.open("rb") as file:
            return file.read(132)[128:] == b"DICM"
    except OSError:
        return False


def _without_suffix(name: str) -> str:
    """Return a name without the suffix of an image; another dot belongs to it, as in a DICOM UID."""
    return name.rpartition(".")[0] if has_image_suffix(name) else name


def image_root(folder: Path) -> Path:
    """Return the folder below which a source's images lie."""
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
            elif has_image_suffix(path.name):  # a broken link too: its reader says so
                self.files.append(path)
            elif found.fault:
                self.others.append(SkippedFile(path, "broken link", found.fault))
            elif path.name.upper() != "DICOMDIR" and _is_dicom(path):
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
        """Return the image's id: its path below the root without suffix; for a flat folder its stem."""
        return _without_suffix(path.relative_to(self.root).as_posix())

    def match(self, entries: Mapping[Hashable, Sequence[str]]) -> dict[Hashable, Path | str]:
        """Find the image of each entry, or one sentence on why none can be told.

        An entry's names are paths; any of them may be that of a file. Where none is, the first may lie in
        more, or in fewer, folders than the file (`train/x.png` and `x.png`), if only one file and only one
        entry agree so. Of two images that share a name but not a folder, neither stands for the other.
        """
        matches: dict[Hashable, Path | str] = {}
        claims: dict[Path, list[Hashable]] = defaultdict(list)
        for entry, names in entries.items():
            exact = set().union(*(self._named(name) for name in names))
            similar = set() if exact else self._similar(names[0])
            if len(exact) == 1:
                matches[entry] = exact.pop()
            elif len(similar) == 1:
                claims[similar.pop()].append(entry)
            else:
                several = sorted(self.key(path) for path in exact | similar)
                matches[entry] = f"could be any of {', '.join(several[:3])}"
                if not several:
                    matches[entry] = f"is not in {self.root.name}/"
        taken = set(matches.values())
        for path, claimants in claims.items():
            alone = len(claimants) == 1 and path not in taken
            for entry in claimants:
                matches[entry] = path if alone else f"is not in {self.root.name}/ under its own path"
        return matches

    def _forms(self, name: str) -> list[tuple[str, ...]]:
        """Return a name's folders and file; as they are, without "images", and without the image's suffix."""
        parts = tuple(part for part in str(name).replace("\\", "/").split("/") if part not in ("", "."))
        forms = [parts, parts[1:]] if len(parts) > 1 and parts[0] == "images" else [parts]
        return forms + [(*form[:-1], _without_suffix(form[-1])) for form in forms if form]

    def _named(self, name: str) -> set[Path]:
        return next((self._exact[form] for form in self._forms(name) if form in self._exact), set())

    def _similar(self, name: str) -> set[Path]:
        for form in self._forms(name):
            shorter = (form[start:] for start in range(1, len(form)))
            paths = set(self._ending.get(form, ())).union(*(self._exact.get(one, ()) for one in shorter))
            if paths:
                return paths
        return set()

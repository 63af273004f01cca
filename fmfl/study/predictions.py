"""Masks of new images by a run's student, in files: `masks/`, `overlays/` and `predictions.csv`.

Images pass through in small groups, so thousands of them take no more memory than a few. Nothing is written
over that an earlier prediction did not make: its table names its files and the SHA-256 of its masks.
"""

import csv
import hashlib
import io
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from fmfl import states, use
from fmfl.analysis import words
from fmfl.analysis.tables import read_table
from fmfl.errors import UserError, first_few
from fmfl.sources.contents import read_xray
from fmfl.sources.files import (
    COMPANIONS,
    IMAGE_SUFFIXES,
    ImageIndex,
    SkippedFile,
    image_root,
    is_folder,
    printable,
    walk,
)
from fmfl.sources.mask_files import is_lung
from fmfl.study.students import NOTE, Final

#: The table of a prediction, which also tells its files from somebody else's.
TABLE = "predictions.csv"

#: Images that are in memory at a time, for each core.
IMAGES_A_CORE = 16

#: Columns of predictions.csv. Areas in cm2 are empty where a file does not tell the size of its pixels.
COLUMNS = (
    *("image", "mask", "overlay", "weights", "weights_sha256", "width", "height"),
    *("area_pixels", "right_pixels", "left_pixels", "parts"),
    *("area_cm2", "right_cm2", "left_cm2", "pixel_height_mm", "pixel_width_mm", "spacing_from"),
    *("remark", "mask_sha256"),
)

#: Views of a chest X-ray that students are trained on.
FRONTAL = ("", "AP", "PA")


class Source(NamedTuple):
    """An image to segment, and the name that its mask gets."""

    path: Path
    name: str


class Outcome(NamedTuple):
    """Result of a prediction.

    Attributes:
        table: predictions.csv.
        left_out: files that could not be used, each with its reason.
        beside: files that are usual beside images, such as tables and notes.
    """

    table: pd.DataFrame
    left_out: list[SkippedFile]
    beside: Sequence[SkippedFile] = ()


def predict(
    model: nn.Module,
    size: int,
    inputs: Sequence[Path],
    out: Path,
    *,
    weights: Final,
    organ: str = "lung",
    progress: bool = False,
) -> Outcome:
    """Segment images and write masks, overlays and the table.

    Args:
        model: the student.
        size: pixels a side at which it was trained.
        inputs: image files, and folders with images at any depth.
        out: a new folder, or one of an earlier prediction, which is replaced.
        weights: of the student; the table names them with their SHA-256.
        organ: of the masks; lungs alone have a right and a left one.
        progress: show a bar.

    Raises:
        UserError: there is no image, none can be used, or the folder holds something else.
    """
    sources, others = find_images(inputs)
    left_out, beside = ([one for one in others if one.defect is defect] for defect in (True, False))
    _clear(out, inputs, sources)
    about = {"weights": weights.file.name, "weights_sha256": weights.sha256}
    workers = os.cpu_count() or 1
    group, rows = IMAGES_A_CORE * workers, []
    with (
        ThreadPoolExecutor(workers) as pool,
        tqdm(total=len(sources), unit="image", disable=not progress, leave=False) as bar,
    ):
        for start in range(0, len(sources), group):
            for done in _segment(model, size, sources[start : start + group], pool, organ):
                bar.update()
                if isinstance(done, SkippedFile):
                    left_out.append(done)
                    continue
                row = done.row | about
                _append(out / TABLE, row)  # before its files: then no file of ours is without a row
                for name, content in done.files.items():
                    states.write_bytes(out / name, content)
                rows.append(row)
    if not rows:
        raise UserError(f"no image could be used; the first is {left_out[0].file}: {left_out[0]}")
    return Outcome(pd.DataFrame(rows, columns=list(COLUMNS)), left_out, beside)


def in_words(done: Outcome, out: Path) -> list[str]:
    """Return lines that say what was written, what is worth a look, and what it must not be used for."""
    left_out = f", {len(done.left_out)} left out" if done.left_out else ""
    lines = [f"images: {len(done.table)} segmented{left_out}"]
    if done.beside:
        names = first_few(printable(one.file.name) for one in done.beside)
        lines.append(f"not images: {words.counted(len(done.beside), 'file')} ({names})")
    if odd := int(done.table.remark.str.len().gt(0).sum()):
        lines.append(f"worth a look: {words.counted(odd, 'mask')}, see the column remark")
    at_detector = int((done.table.spacing_from == "ImagerPixelSpacing").sum())
    if at_detector:
        lines.append(f"cm2 at the detector, larger than in the chest: {words.counted(at_detector, 'image')}")
    lines.append(f"masks: {out / 'masks'}; overlays: {out / 'overlays'}; table: {out / TABLE}")
    return [*lines, NOTE]


# Images


def find_images(inputs: Sequence[Path]) -> tuple[list[Source], list[SkippedFile]]:
    """List the images in files and folders, each once, and the files that are none.

    A folder with a folder images/ in it stands for that one. A mask has the name of its image; where two
    images share one, it has the image's suffix and its folder's name too.

    Raises:
        UserError: a path is not there, there is no image at all, or two images would have one mask.
    """
    images: dict[Path, tuple[Path, str, str]] = {}  # by real path: as given, its name, and a longer one
    left_out: list[SkippedFile] = []
    for given in inputs:
        if not given.exists():
            raise UserError(f"{given}: there is no such file or folder")
        if not is_folder(given):
            if printable(given.name) != given.name:
                detail = "its name is not valid UTF-8, so no table can name it; rename it"
                left_out.append(SkippedFile(given, "name not valid", detail))
                continue
            long = f"{given.resolve().parent.name}/{given.name}"
            images.setdefault(given.resolve(), (given, given.stem, long))
            continue
        index = ImageIndex(image_root(given))
        left_out += [*index.others, *_unknown_files(index)]
        for path in index.files:
            below = path.relative_to(index.root).as_posix()
            long = f"{given.resolve().name}/{below}"
            images.setdefault(path.resolve(), (path, index.key(path), long))
    if not images:
        looked_for = ", ".join(sorted(IMAGE_SUFFIXES))
        raise UserError(f"{inputs[0]}: there is no image file in it (looked for {looked_for})")
    short = Counter(name.lower() for _, name, _ in images.values())
    sources = [
        Source(path, long if short[name.lower()] > 1 else name) for path, name, long in images.values()
    ]
    repeated = [name for name, count in Counter(one.name.lower() for one in sources).items() if count > 1]
    if repeated:
        raise UserError(f"two images are called {repeated[0]}, and would have one mask: give them one by one")
    return sources, left_out


def _unknown_files(index: ImageIndex) -> Iterator[SkippedFile]:
    """Yield the files in a folder that are no images; those that are usual beside images are no defect."""
    seen = {*index.files, *(one.file for one in index.others)}
    for found in sorted(walk(index.root)):
        path = index.root / found.name
        if path not in seen:
            companion = path.suffix.lower() in COMPANIONS or path.name.upper() == "DICOMDIR"
            detail = "neither its suffix nor its content is that of an image that is read"
            yield SkippedFile(path, "not an image", detail, defect=not companion)


# Prediction


class Segmented(NamedTuple):
    """One image's row of the table, and its files by name."""

    row: dict[str, Any]
    files: dict[str, bytes]


def _segment(
    model: nn.Module, size: int, sources: Sequence[Source], pool: ThreadPoolExecutor, organ: str
) -> Iterator[Segmented | SkippedFile]:
    """Segment some images; Pillow and SciPy give the lock back, so the rest of the work is in threads."""
    read = list(pool.map(_read, sources))
    usable = [place for place, one in enumerate(read) if not isinstance(one, SkippedFile)]
    logits = use.logits(model, [read[place][0] for place in usable], size)
    of_place = dict(zip(usable, logits, strict=True))

    def finish(place: int) -> Segmented | SkippedFile:
        one = read[place]
        return (
            one if isinstance(one, SkippedFile) else _segmented(sources[place], *one, of_place[place], organ)
        )

    yield from pool.map(finish, range(len(sources)))


def _read(source: Source) -> tuple[np.ndarray, dict[str, Any]] | SkippedFile:
    try:
        return read_xray(source.path)
    except SkippedFile as reason:
        return reason


def _segmented(
    source: Source, grey: np.ndarray, header: dict[str, Any], logits: Tensor, organ: str
) -> Segmented:
    mask = use.mask_in_own_size(logits, *grey.shape)
    chest = is_lung(organ)
    lungs = use.lungs(mask) if chest else use.parts_of(mask)
    no_sides = _why_no_sides(header) if chest else []
    if no_sides:
        lungs = lungs._replace(right=None, left=None, labels=np.where(mask, 3, 0).astype(np.uint8))
    sides = {"right": lungs.right, "left": lungs.left}
    content = _png(mask.astype(np.uint8) * 255)
    row: dict[str, Any] = {
        "image": printable(str(source.path)),
        "mask": f"masks/{source.name}.png",
        "overlay": f"overlays/{source.name}.jpg",
        "height": grey.shape[0],
        "width": grey.shape[1],
        "area_pixels": lungs.area,
        **{f"{side}_pixels": area for side, area in sides.items()},
        "parts": lungs.parts,
        **_in_cm2({"area": lungs.area} | sides, header),
        "remark": "; ".join(filter(None, [lungs.remark, *no_sides])),
        "mask_sha256": _sha256(content),
    }
    return Segmented(row, {row["mask"]: content, row["overlay"]: _jpeg(use.overlay(grey, lungs.labels))})


def _why_no_sides(header: dict[str, Any]) -> list[str]:
    """Return why a chest X-ray's left is not known to be the patient's right, by its header."""
    remarks = []
    if (seen := header.get("orientation", "L")).split("\\")[0] != "L":
        remarks.append(f"PatientOrientation is {seen}: the image's left is not the patient's right")
    if (view := header.get("view", "")) not in FRONTAL:
        remarks.append(f"the view is {view}, and students are trained on frontal views")
    return remarks


def _in_cm2(areas: dict[str, int | None], header: dict[str, Any]) -> dict[str, Any]:
    """Return areas in cm2 where the header tells the size of a pixel."""
    if "spacing" not in header:
        return {}
    height, width = header["spacing"]
    return {
        **{
            f"{name}_cm2": round(area * height * width / 100, 2)
            for name, area in areas.items()
            if area is not None
        },
        "pixel_height_mm": height,
        "pixel_width_mm": width,
        "spacing_from": header["spacing_from"],
    }


def _png(picture: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG")
    return file.getvalue()


def _jpeg(picture: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "JPEG", quality=88)
    return file.getvalue()


# The folder


def _clear(out: Path, inputs: Sequence[Path], sources: Sequence[Source]) -> None:
    """Make room for a prediction: take away the files of an earlier one, and refuse to touch any other.

    Raises:
        UserError: the folder lies within the images, holds a mask that somebody has changed, or holds a file
            of somebody else under a name that is needed.
    """
    for given in inputs:
        if is_folder(given) and given.resolve() in (out.resolve(), *out.resolve().parents):
            raise UserError(f"--out {out} lies in the folder of images {given}: name a folder elsewhere")
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file: name a folder")
    ours = _of_earlier(out)
    names = [file for one in sources for file in (f"masks/{one.name}.png", f"overlays/{one.name}.jpg")]
    for name in [TABLE, *names]:
        if name not in ours and (out / name).exists():
            raise UserError(f"{out / name} is there, and no prediction of fmfl made it: name another --out")
    for name, sha256 in ours.items():
        if sha256 and (out / name).is_file() and _sha256((out / name).read_bytes()) != sha256:
            raise UserError(f"{out / name} has been changed since it was made: name another --out to keep it")
    for name in ours:
        (out / name).unlink(missing_ok=True)
    out.mkdir(parents=True, exist_ok=True)


def _of_earlier(out: Path) -> dict[str, str]:
    """Return the files of an earlier prediction in a folder, each with its SHA-256 where one is known."""
    if not (out / TABLE).is_file():
        return {}
    table = read_table(out / TABLE, COLUMNS)
    if list(table) != list(COLUMNS):
        return {}
    table = table.fillna("")
    ours = dict(zip(table["mask"], table.mask_sha256, strict=True)) | dict.fromkeys(table.overlay, "")
    inside = {name: sha256 for name, sha256 in ours.items() if name.startswith(("masks/", "overlays/"))}
    return {name: sha256 for name, sha256 in inside.items() if ".." not in Path(name).parts} | {TABLE: ""}


def _append(file: Path, row: dict[str, Any]) -> None:
    """Append a row to the table, which gets its header with the first one."""
    new = not file.exists()
    with file.open("a", encoding="utf-8", newline="") as opened:
        writer = csv.DictWriter(opened, COLUMNS, restval="")
        if new:
            writer.writeheader()
        writer.writerow(row)


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()

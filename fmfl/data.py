"""Chest X-rays and their lung masks, from folders on disk to one `Cohort` on a device.

A source is `"phantom"` (the built-in synthetic X-rays) or a folder in one of four layouts, told apart by
what the folder holds:

    folder      images/, masks/ (same stem, any image suffix, `_mask` may follow), metadata.csv (optional)
    Darwin 1.0  images/, annotations/*.json with "image": V7's former export format
    Darwin 2.0  images/, annotations/*.json with "item" and its slots: V7's export format
    COCO        images/, an instances file in annotations/ or at the folder's top; polygons and both RLEs

A `metadata.csv` beside a Darwin or COCO export adds to what the export says. Its one required column is
`image_id` (the image's path below images/ without suffix); all others of `COLUMNS` are optional.

`fmfl.readers` has a reader for each layout that yields plain `Record`s, so that a fifth layout is one more
function. Everything behind the readers is here and shared: decode, rasterise at the image's own size, resize,
check, cache. A file is read rightly, or left out and counted with its reason, or the source is refused.

What counts as one patient: two images whose site and patient_id agree, wherever they were read from. So the
table's `patient_id` is `"{site}:{patient_id}"`. A site that is not given is the source folder's name; a
patient_id that is not given is the image's own id.
"""

import glob
import hashlib
import importlib.util
import json
import math
import os
import warnings
import zipfile
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from tqdm import tqdm

from fmfl import paths
from fmfl.errors import UserError, first_few
from fmfl.sources import metadata, phantom, readers
from fmfl.sources.files import (
    IMAGE_SUFFIXES,
    Found,
    ImageIndex,
    SkippedFile,
    first_line,
    image_root,
    list_files,
    printable,
)
from fmfl.sources.metadata import COLUMNS
from fmfl.sources.pixels import read_image, resize
from fmfl.sources.readers import Record

SIZES = (16, 2048)  # pixels a side

# Raise it when this module, or one that it reads files with, gives other pixels, masks or rows for the same
# files; older caches rest.
CACHE_FORMAT = 3


@dataclass(frozen=True, eq=False)
class Cohort:
    """Images, masks and patients, ready to be indexed on a device.

    Attributes:
        images: [N, 1, H, W] uint8, 0..255, H = W; index tensors lie where they do.
        masks: [N, 1, H, W] uint8, 1 where there is lung, else 0.
        table: one row an image, in the order of `images`; the columns are `COLUMNS`.
        left_out: one row a file that is not used: source, file (below the source's folder), reason (to count
            by), detail (one sentence), defect (True: the file wants mending; False: it is of another kind).
        remarks: sentences on images that are used, but that a person should look at.
        fingerprint: SHA-256 of pixels, masks and table as the files give them; the same on every machine,
            under every path, and whatever the source's folder is called.
        device: what computes with them; None: where they lie.
    """

    images: Tensor
    masks: Tensor
    table: pd.DataFrame
    left_out: pd.DataFrame
    fingerprint: str
    device: torch.device | None = None
    remarks: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "device", self.device or self.images.device)

    def __len__(self) -> int:
        return len(self.images)

    @property
    def size(self) -> int:
        """Pixels a side."""
        return self.images.shape[-1]

    def to(self, device: str | torch.device, *, resident: bool = True) -> "Cohort":
        """The same cohort for `device`; unless `resident`, its tensors stay where they are."""
        images, masks = self.images, self.masks
        if resident:
            images, masks = images.to(device), masks.to(device)
        # "cuda" is "cuda:0": a tensor there tells the name that tensors have.
        return replace(self, images=images, masks=masks, device=torch.empty(0, device=device).device)

    def patients(self, indices: Tensor | Sequence[int]) -> set[str]:
        """The patient ids of the images at `indices` (an int64 tensor on any device, or a sequence)."""
        rows = torch.as_tensor(indices, dtype=torch.int64).cpu().numpy()
        return set(self.table["patient_id"].iloc[rows])

    def summary(self) -> pd.DataFrame:
        """By source: images, patients, ages known, and the number left out for each reason."""
        held = self.table.groupby("source", sort=False).agg(
            images=("image_id", "size"), patients=("patient_id", "nunique"), ages_known=("age", "count")
        )
        out = pd.crosstab(self.left_out["source"], self.left_out["reason"]).reindex(held.index, fill_value=0)
        return held.rename(columns={"ages_known": "ages known"}).join(out.add_prefix("left out: "))


def load(
    sources: str | os.PathLike | Sequence[str | os.PathLike],
    size: int = 256,
    device: str | torch.device = "cpu",
    *,
    num_phantoms: int = 300,
    phantom_seed: int = 0,
    mask_class: str = "lung",
    strict: bool = False,
    cache: str | os.PathLike | None = paths.CACHE,
    workers: int | None = None,
    progress: bool = True,
) -> Cohort:
    """Read one or several sources into one cohort.

    Images are squeezed to a square without padding, as in the paper. A file that cannot be used is listed in
    `left_out` and the rest goes on: one bad file among thousands must not cost a night.

    Args:
        sources: "phantom" or folders: a list, or one text with commas between them.
        size: pixels a side, 16..2048.
        device: where the tensors go.
        num_phantoms: how many synthetic X-rays "phantom" stands for.
        phantom_seed: which ones.
        mask_class: the annotated class that is the mask; "left lung", "Lungs" and "LUNG_R" are "lung" too.
        strict: a file that wants mending is an error; an image of another kind (lateral, CT slice) is not.
        cache: folder of decoded sources; None to decode every time.
        workers: decoding threads; None for one a core.
        progress: show a bar while decoding.

    Raises:
        UserError: a parameter is out of range, a source is missing, empty, in no known layout or without one
            usable image; with `strict` also the first file that wants mending.
    """
    low, high = SIZES
    if not isinstance(size, int) or isinstance(size, bool) or not low <= size <= high:
        raise UserError(f"size is {size!r}: give a whole number of pixels in {low}..{high}.")
    if not readers.words(mask_class):
        raise UserError(
            f"mask_class is {mask_class!r}: give the name of the annotated class, such as 'lung'."
        )
    if workers is not None and workers < 1:
        raise UserError(f"workers is {workers!r}: give the number of decoding threads, at least 1.")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch raises either, by how it was built
        raise UserError(f"device {str(device)!r} cannot be used here: {first_line(error)}") from None

    names = _names(sources)
    plans = []
    for name, folder in names.items():
        if folder is None:
            plans.append(_plan_phantoms(num_phantoms, size, phantom_seed))
        else:
            plans.append(_plan_folder(folder, name, size, mask_class, workers, progress))
    # Every source goes straight to its place: joining them afterwards would need the memory twice.
    shape = (sum(plan.capacity for plan in plans), size, size)
    images, masks = np.empty(shape, np.uint8), np.empty(shape, np.uint8)
    parts: list[_Part] = []
    count = 0
    for name, plan in zip(names, plans, strict=True):
        parts.append(_cached(cache, f"{name}-{size}", plan, images[count:], masks[count:]))
        count += len(parts[-1].rows)

    left_out = _left_out_table(zip(names, parts, strict=True))
    if strict and left_out["defect"].any():
        first = left_out[left_out["defect"]].iloc[0]
        more = int(left_out["defect"].sum()) - 1
        raise UserError(
            f"{names[first['source']] / first['file']}: {first['detail']}"
            + (f" ({more} more files want mending)" if more else "")
            + "; mend or remove it, or load without strict."
        )
    return Cohort(
        images=torch.from_numpy(images[:count])[:, None].to(device),
        masks=torch.from_numpy(masks[:count])[:, None].to(device),
        table=_join_tables(zip(names, parts, strict=True)),
        left_out=left_out,
        fingerprint=_sha256(*(part.digest.encode() for part in parts)),
        remarks=tuple(
            f"{name}: {one}" for name, part in zip(names, parts, strict=True) for one in part.remarks
        ),
    )


# ---------------------------------------------------------------------------------------- sources and tables


@dataclass(frozen=True)
class _Part:
    """What one source gave, besides its pixels. In `rows` site and patient_id are as given, or empty."""

    rows: list[dict[str, Any]]
    left_out: list[dict[str, Any]]
    digest: str  # SHA-256 of pixels, masks and rows
    remarks: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Plan:
    """How to get one source, and all that its content depends on."""

    make: Callable[[np.ndarray, np.ndarray], _Part]  # fills the first len(rows) of images and of masks
    capacity: int  # images at most
    settings: Mapping[str, Any]
    files: Sequence[Found] = ()


def _plan_phantoms(num_images: int, size: int, seed: int) -> _Plan:
    if num_images < 1:
        raise UserError(f"num_phantoms is {num_images!r}: give the number of synthetic X-rays, at least 1.")
    # Their drawing is this project's own code, which changes without a file of the user's changing.
    code = _sha256(Path(phantom.__file__).read_bytes())
    settings = {"size": size, "num_images": num_images, "seed": seed, "code": code, "numpy": np.__version__}
    return _Plan(partial(_make_phantoms, num_images, seed), num_images, settings)


def _make_phantoms(num_images: int, seed: int, images: np.ndarray, masks: np.ndarray) -> _Part:
    images[:num_images], masks[:num_images], table = phantom.generate(num_images, images.shape[-1], seed)
    rows = table[[column for column in COLUMNS if column != "source"]].to_dict("records")
    return _Part(rows, [], _digest(images[:num_images], masks[:num_images], rows))


def _digest(images: np.ndarray, masks: np.ndarray, rows: list[dict[str, Any]]) -> str:
    text = json.dumps([images.shape, rows], sort_keys=True)
    return _sha256(text.encode(), images, np.packbits(masks))


def _names(sources: str | os.PathLike | Sequence[str | os.PathLike]) -> dict[str, Path | None]:
    """Each source's name in the table -> its folder, or None for the synthetic X-rays.

    A folder is named by its last part, and by its last two where that is taken: the name is the default site,
    so two folders `a/train` and `b/train` must not share it.
    """
    if isinstance(sources, str):
        sources = sources.split(",")
    elif isinstance(sources, os.PathLike):
        sources = [sources]
    given = [os.fspath(source).strip() for source in sources]
    given = [source for source in given if source]
    if not given:
        raise UserError("sources is empty: give 'phantom', a folder, or several with commas between them.")

    folders: list[Path | None] = []
    for source in given:
        folder = None if source == "phantom" else Path(source).expanduser()
        if folder is not None and not folder.is_dir():
            what = "is a file, not a folder" if folder.exists() else "there is no such folder"
            raise UserError(f"{folder}: {what}; give a folder with chest X-rays and masks, or 'phantom'.")
        if printable(str(source)) != source:
            raise UserError(f"{source}: this name is not valid UTF-8; rename the folder.")
        if any(folder == other or (folder and other and folder.samefile(other)) for other in folders):
            raise UserError(f"{source}: this source is given twice; name each source once.")
        folders.append(folder)

    last = ["phantom" if folder is None else folder.resolve().name for folder in folders]
    named: dict[str, Path | None] = {}
    for name, folder in zip(last, folders, strict=True):
        if folder is not None and last.count(name) > 1:
            name = "/".join(folder.resolve().parts[-2:])
        if name in named:
            raise UserError(f"{folder}: another source is called {name} too; rename one of the folders.")
        named[name] = folder
    return named


def _join_tables(parts: Iterable[tuple[str, _Part]]) -> pd.DataFrame:
    """One table over all sources: sites filled in, patients and images named uniquely."""
    rows = [row | {"source": name, "site": row["site"] or name} for name, part in parts for row in part.rows]
    seen = Counter(row["image_id"] for row in rows)
    for row in rows:
        row["patient_id"] = f"{row['site']}:{row['patient_id']}"
        if seen[row["image_id"]] > 1:  # within a source ids are unique, so here two sources share one
            row["image_id"] = f"{row['source']}/{row['image_id']}"
    table = pd.DataFrame(rows, columns=list(COLUMNS))
    return table.astype({"age": "float64", "original_width": "int64", "original_height": "int64"})


def _left_out_table(parts: Iterable[tuple[str, _Part]]) -> pd.DataFrame:
    rows = [{"source": name} | entry for name, part in parts for entry in part.left_out]
    table = pd.DataFrame(rows, columns=["source", "file", "reason", "detail", "defect"])
    return table.astype({"defect": bool})


# ---------------------------------------------------------------------------------------------- one folder


def _plan_folder(
    folder: Path, name: str, size: int, mask_class: str, workers: int | None, progress: bool
) -> _Plan:
    files = list_files(folder)
    if not files:
        raise UserError(f"{folder}: this folder is empty; give a folder with chest X-rays and masks.")
    capacity = len(ImageIndex(image_root(folder)).files)
    settings = {"folder": str(folder.resolve()), "size": size, "mask_class": mask_class}
    settings |= {"pydicom": importlib.util.find_spec("pydicom") is not None}
    make = partial(_make_from_folder, folder, name, mask_class, workers, progress)
    return _Plan(make, capacity, settings, files)


def _make_from_folder(
    folder: Path,
    name: str,
    mask_class: str,
    workers: int | None,
    progress: bool,
    images: np.ndarray,
    masks: np.ndarray,
) -> _Part:
    """Read, decode and check every image of a folder; the slow path behind the cache."""
    ordered, left_out = _records(folder, mask_class)
    rows: list[dict[str, Any]] = []
    remarks: dict[str, list[str]] = defaultdict(list)
    with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        # Threads, since Pillow gives the lock back while it decodes and resizes.
        decoded = pool.map(partial(_decode_or_leave_out, size=images.shape[-1]), ordered)
        bar = tqdm(decoded, total=len(ordered), desc=name, unit="image", disable=not progress, leave=False)
        for result in bar:
            if isinstance(result, SkippedFile):
                left_out.append(result)
                continue
            images[len(rows)], masks[len(rows)] = result.image, result.mask
            rows.append(result.row)
            for remark in result.remarks:
                remarks[remark].append(result.row["image_id"])

    if not rows:
        raise UserError(_nothing_usable(folder, left_out))
    entries = [
        {
            "file": printable(one.file.relative_to(folder).as_posix()),
            "reason": one.reason,
            "detail": printable(one.detail),
            "defect": one.defect,
        }
        for one in left_out
    ]
    entries.sort(key=lambda entry: (entry["file"], entry["reason"]))
    said = [f"{len(ids)} images with {what}: {first_few(ids)}" for what, ids in remarks.items()]
    return _Part(rows, entries, _digest(images[: len(rows)], masks[: len(rows)], rows), said)


def _records(folder: Path, mask_class: str) -> tuple[list[Record], list[SkippedFile]]:
    """What a folder's reader finds, in the order of image_id; several images of one id are left out."""
    records: dict[str, list[Record]] = defaultdict(list)
    left_out: list[SkippedFile] = []
    for found in readers.reader(folder)(folder, mask_class):
        if isinstance(found, SkippedFile):
            left_out.append(found)
        else:
            records[found.row["image_id"]].append(found)
    for image_id, several in records.items():
        if len(several) > 1:
            detail = (
                f"{len(several)} images have the image_id {image_id}, and it is not told whose mask it is"
            )
            left_out += [SkippedFile(one.image, "image_id twice", detail) for one in several]
    return [records[image_id][0] for image_id in sorted(records) if len(records[image_id]) == 1], left_out


def _nothing_usable(folder: Path, left_out: list[SkippedFile]) -> str:
    if all(one.reason == "not an image" and not one.defect for one in left_out):
        return f"{folder}: there is no image file in it (looked for {', '.join(sorted(IMAGE_SUFFIXES))})."
    reasons = Counter(one.reason for one in left_out).most_common()
    counted = ", ".join(f"{count} x {reason}" for reason, count in reasons)
    first = next(one for one in left_out if one.reason == reasons[0][0])
    file = first.file.relative_to(folder)
    return f"{folder}: no usable image ({counted}); the first is {file}: {first.detail}."


class Decoded(NamedTuple):
    """One image of a cohort."""

    image: np.ndarray  # (size, size) uint8, 0..255
    mask: np.ndarray  # (size, size) uint8, 0 or 1
    row: dict[str, Any]
    remarks: tuple[str, ...]  # what a person should look at


def _decode_or_leave_out(record: Record, size: int) -> Decoded | SkippedFile:
    try:
        return decode(record, size)
    except SkippedFile as reason:
        return reason


def decode(record: Record, size: int) -> Decoded:
    """One image, its mask and its finished row.

    The row tells what only the file knows: its own size where no other is given, and a DICOM header's age,
    sex, patient and view where no table has them.

    Raises:
        LeftOut: the image cannot be read or shows nothing, its mask is empty, or the two do not fit together.
    """
    no_mask = partial(SkippedFile, record.image, record.without_mask, defect=False)
    if record.mask is None:
        raise no_mask("nothing of the mask class is annotated")
    grey, header = read_image(record.image)
    if grey.min() == grey.max():
        raise SkippedFile(record.image, "constant image", "all its pixels are the same: it shows nothing")
    if min(grey.shape) < SIZES[0]:
        detail = f"it has {grey.shape[1]} x {grey.shape[0]} pixels: an X-ray has at least {SIZES[0]} a side"
        raise SkippedFile(record.image, "image too small", detail)
    mask, remark = record.mask(grey)
    if not mask.any():
        raise no_mask("its mask is empty")
    small = resize(mask.astype(np.uint8) * 255, size) >= 128
    if not small.any():
        detail = f"its mask has {mask.sum()} pixels, of which nothing is left at a size of {size}"
        raise SkippedFile(record.image, "mask too small", detail)
    row, aged = _with_header(record.image, record.row, header)
    height, width = grey.shape
    row["original_width"] = row["original_width"] or width
    row["original_height"] = row["original_height"] or height
    remarks = tuple(filter(None, (remark, aged)))
    return Decoded(resize(grey, size), small.astype(np.uint8), row, remarks)


def _with_header(
    image: Path, row: Mapping[str, Any], header: Mapping[str, Any]
) -> tuple[dict[str, Any], str]:
    """A row with what a DICOM header adds to it, and a remark; LeftOut where what it needs is not valid."""
    row, remark = dict(row), ""
    if math.isnan(row["age"]):
        if "age" in header:
            row |= {"age": header["age"], "age_source": "record"}
            remark = "a DICOM age without its unit, taken as years" if header["age_without_unit"] else ""
        elif "age_not_valid" in header:
            raise metadata.age_not_valid(image, header["age_not_valid"])
    row["patient_id"] = row["patient_id"] or metadata.patient(image, header.get("patient_id", ""))
    row["patient_id"] = row["patient_id"] or row["image_id"]
    for column in ("sex", "view"):
        row[column] = row[column] or header.get(column, "")
    return row, remark


def _sha256(*content: Any) -> str:
    digest = hashlib.sha256()
    for piece in content:
        digest.update(piece)
    return digest.hexdigest()


# --------------------------------------------------------------------------------------------------- cache


def _cached(
    cache: str | os.PathLike | None, name: str, plan: _Plan, images: np.ndarray, masks: np.ndarray
) -> _Part:
    """`plan.make(images, masks)`, or what it gave the last time for the same files and settings.

    A cache is a zip archive without compression, so reading it verifies a checksum of every byte. It appears
    under its name only when complete. One that is damaged is made again. One that cannot be written costs the
    time of decoding again, never the run.
    """
    if cache is None:
        return plan.make(images, masks)
    settings = json.dumps([CACHE_FORMAT, plan.settings], sort_keys=True)
    stem = f"{name.replace('/', '_')}-{_sha256(settings.encode())[:16]}"
    path = Path(cache) / f"{stem}-{_sha256(json.dumps(plan.files).encode())[:16]}.zip"
    if path.exists():
        try:
            return _read_cache(path, images, masks)
        except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            warnings.warn(f"{path}: damaged cache ({first_line(error)}); decoding again.", stacklevel=3)
    part = plan.make(images, masks)
    try:
        _write_cache(path, part, images[: len(part.rows)], masks[: len(part.rows)])
        for old in path.parent.glob(f"{glob.escape(stem)}-*.zip"):  # of this source before its files changed
            if old != path:
                old.unlink()
    except OSError as error:
        warnings.warn(f"{path}: the cache cannot be written ({first_line(error)}).", stacklevel=3)
    return part


def _write_cache(path: Path, part: _Part, images: np.ndarray, masks: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with zipfile.ZipFile(unfinished, "w") as archive:
            archive.writestr("about.json", json.dumps(asdict(part)))
            with archive.open("images", "w", force_zip64=True) as file:
                file.write(images)
            with archive.open("masks", "w", force_zip64=True) as file:  # one bit a pixel, an image a row
                file.write(np.packbits(masks.reshape(len(masks), -1), axis=1))
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def _read_cache(path: Path, images: np.ndarray, masks: np.ndarray) -> _Part:
    """Fills the first images and masks; in small pieces, since fresh memory is what takes the time here."""
    with zipfile.ZipFile(path) as archive:
        part = _Part(**json.loads(archive.read("about.json")))
        count, pixels, step = len(part.rows), images[0].size, 64
        with archive.open("images") as stored, archive.open("masks") as packed:
            for start in range(0, count, step):
                place = slice(start, min(start + step, count))
                length = place.stop - start
                block = np.frombuffer(stored.read(length * pixels), np.uint8)
                images[place] = block.reshape(images[place].shape)
                block = np.frombuffer(packed.read(length * -(-pixels // 8)), np.uint8).reshape(length, -1)
                masks[place] = np.unpackbits(block, axis=1, count=pixels).reshape(masks[place].shape)
            if stored.read(1) or packed.read(1):
                raise ValueError("it holds more than its table says")
    return part

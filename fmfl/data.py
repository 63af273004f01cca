"""Chest X-rays and their lung masks, from folders on disk to one `Cohort` on a device.

A source is `"phantom"` (the built-in synthetic X-rays) or a folder in one of four layouts, told apart by
what the folder holds:

    folder      images/, masks/ (same stem, any image suffix, `_mask` may follow), metadata.csv (optional)
    Darwin 1.0  images/, annotations/*.json with "image": V7's former export format
    Darwin 2.0  images/, annotations/*.json with "item" and its slots: V7's export format
    COCO        images/, an instances file in annotations/ or at the folder's top; polygons and both RLEs

A `metadata.csv` beside a Darwin or COCO export adds to what the export says. Its one required column is
`image_id` (the image's path below images/ without suffix); all others of `COLUMNS` are optional.

Each layout has a reader that yields plain `Record`s, so that a fifth layout is one more function. Everything
behind the readers is shared: decode, rasterise at the image's own size, resize, check, cache.

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
import re
import warnings
import zipfile
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

from fmfl import paths, phantom
from fmfl.errors import UserError

COLUMNS = (
    "image_id",
    "patient_id",
    "age",  # years; NaN where unknown
    "age_source",  # record: this patient's; cohort: the middle of a range given for all; "" without an age
    "sex",  # M, F or ""
    "finding",
    "site",
    "view",
    "source",
    "original_width",
    "original_height",
    "licence",
)
DICOM_SUFFIXES = frozenset({".dcm", ".dicom"})
IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp"}) | DICOM_SUFFIXES
SIZES = (16, 2048)  # pixels a side
OLDEST = 120.0  # years; a larger age is a mistake in the table

# Raise it when this module gives other pixels, masks or rows for the same files; older caches rest.
CACHE_FORMAT = 1

# Of V7's tags on one image the first of these is the finding: the special before the general.
DARWIN_FINDINGS = {
    "COVID-19": "covid-19",
    "Viral Pneumonia": "viral pneumonia",
    "Bacterial Pneumonia": "bacterial pneumonia",
    "Fungal Pneumonia": "fungal pneumonia",
    "No Pneumonia (healthy)": "normal",
}


@dataclass(frozen=True, eq=False)
class Cohort:
    """Images, masks and patients, ready to be indexed on a device.

    Attributes:
        images: (N, 1, H, W) uint8, 0..255, H = W; index tensors lie where they do.
        masks: (N, 1, H, W) uint8, 1 where there is lung, else 0.
        table: one row an image, in the order of `images`; the columns are `COLUMNS`.
        left_out: one row a file that is not used: source, file (below the source's folder), reason (to count
            by), detail (one sentence), defect (True: the file wants mending; False: it is of another kind).
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
    if not _words(mask_class):
        raise UserError(
            f"mask_class is {mask_class!r}: give the name of the annotated class, such as 'lung'."
        )
    if workers is not None and workers < 1:
        raise UserError(f"workers is {workers!r}: give the number of decoding threads, at least 1.")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch raises either, by how it was built
        raise UserError(f"device {str(device)!r} cannot be used here: {_first_line(error)}") from None

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
    )


# ---------------------------------------------------------------------------------------- sources and tables


@dataclass(frozen=True)
class _Part:
    """What one source gave, besides its pixels. In `rows` site and patient_id are as given, or empty."""

    rows: list[dict[str, Any]]
    left_out: list[dict[str, Any]]
    digest: str  # SHA-256 of pixels, masks and rows


@dataclass(frozen=True)
class _Plan:
    """How to get one source, and all that its content depends on."""

    make: Callable[[np.ndarray, np.ndarray], _Part]  # fills the first len(rows) of images and of masks
    capacity: int  # images at most
    settings: Mapping[str, Any]
    files: Sequence[tuple[str, int, int]] = ()  # path, bytes, mtime in ns


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


class LeftOut(Exception):
    """One file that is not used, and why. Readers yield it, decoders raise it."""

    def __init__(self, file: Path, reason: str, detail: str, *, defect: bool = True) -> None:
        super().__init__(detail)
        self.file, self.reason, self.detail, self.defect = file, reason, detail, defect


MaskRule = Callable[[int, int], np.ndarray]  # (height, width) of the image -> (height, width) bool


@dataclass(frozen=True)
class Record:
    """What a reader says of one image, before anything is decoded."""

    image: Path
    mask: MaskRule | None  # None: nothing of the mask class is annotated
    row: dict[str, Any]  # from `_row`
    without_mask: str  # the reason to give if there is no mask, or an empty one


def _plan_folder(
    folder: Path, name: str, size: int, mask_class: str, workers: int | None, progress: bool
) -> _Plan:
    files = _list_files(folder)
    if not files:
        raise UserError(f"{folder}: this folder is empty; give a folder with chest X-rays and masks.")
    capacity = sum(_is_image(path) and not path.startswith("masks/") for path, _, _ in files)
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
    records: dict[str, Record] = {}
    left_out: list[LeftOut] = []
    for found in _reader(folder)(folder, mask_class):
        if isinstance(found, LeftOut):
            left_out.append(found)
        elif found.row["image_id"] in records:
            first = records[found.row["image_id"]].image.name
            left_out.append(LeftOut(found.image, "image_id twice", f"its image_id is that of {first} too"))
        else:
            records[found.row["image_id"]] = found
    ordered = [records[image_id] for image_id in sorted(records)]

    rows: list[dict[str, Any]] = []
    with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        # Threads, since Pillow gives the lock back while it decodes and resizes.
        decoded = pool.map(partial(_decode_or_leave_out, size=images.shape[-1]), ordered)
        bar = tqdm(decoded, total=len(ordered), desc=name, unit="image", disable=not progress, leave=False)
        for result in bar:
            if isinstance(result, LeftOut):
                left_out.append(result)
            else:
                images[len(rows)], masks[len(rows)], row = result
                rows.append(row)

    if not rows:
        raise UserError(_nothing_usable(folder, left_out))
    entries = [
        {
            "file": one.file.relative_to(folder).as_posix(),
            "reason": one.reason,
            "detail": one.detail,
            "defect": one.defect,
        }
        for one in left_out
    ]
    entries.sort(key=lambda entry: (entry["file"], entry["reason"]))
    return _Part(rows, entries, _digest(images[: len(rows)], masks[: len(rows)], rows))


def _nothing_usable(folder: Path, left_out: list[LeftOut]) -> str:
    if not left_out:
        return f"{folder}: there is no image file in it (looked for {', '.join(sorted(IMAGE_SUFFIXES))})."
    reasons = Counter(one.reason for one in left_out).most_common()
    counted = ", ".join(f"{count} x {reason}" for reason, count in reasons)
    file, detail = left_out[0].file.relative_to(folder), left_out[0].detail
    return f"{folder}: no usable image ({counted}); the first is {file}: {detail}."


def _decode_or_leave_out(
    record: Record, size: int
) -> tuple[np.ndarray, np.ndarray, dict[str, Any]] | LeftOut:
    try:
        return decode(record, size)
    except LeftOut as reason:
        return reason


def decode(record: Record, size: int) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    """One image, its mask and its finished row.

    Returns:
        (size, size) uint8 0..255, (size, size) uint8 0/1, and the row with what only the file knows: its own
        size where no other is given, and a DICOM header's age, sex, patient and view where no table has them.

    Raises:
        LeftOut: the image cannot be read, its mask is empty, or the two do not fit together.
    """
    no_mask = partial(LeftOut, record.image, record.without_mask, defect=False)
    if record.mask is None:
        raise no_mask("nothing of the mask class is annotated")
    grey, header = read_image(record.image)
    height, width = grey.shape
    small = resize(record.mask(height, width).astype(np.uint8) * 255, size) >= 128
    if not small.any():
        raise no_mask("its mask is empty")
    row = dict(record.row)
    if math.isnan(row["age"]) and "age" in header:
        row |= {"age": header["age"], "age_source": "record"}
    for column in ("patient_id", "sex", "view"):
        row[column] = row[column] or header.get(column, "")
    row["patient_id"] = row["patient_id"] or row["image_id"]
    row["original_width"] = row["original_width"] or width
    row["original_height"] = row["original_height"] or height
    return resize(grey, size), small.astype(np.uint8), row


def _reader(folder: Path) -> Callable[[Path, str], Iterator[Record | LeftOut]]:
    """The reader for what the folder holds. Mask files win over annotations: they need no interpretation."""
    if (folder / "images").is_dir() and (folder / "masks").is_dir():
        return read_folder
    broken = None
    for path in _annotation_files(folder):
        try:
            content = _read_json(path)
        except LeftOut as reason:
            broken = broken or reason
            continue
        if isinstance(content, dict) and "annotations" in content:
            if "images" in content:
                return read_coco
            if "image" in content or "item" in content:
                return read_darwin
    if broken:
        raise UserError(f"{broken.file}: {broken.detail}; mend it, no other file tells the folder's layout.")
    raise UserError(
        f"{folder}: in no known layout: looked for images/ with masks/, for Darwin JSON files in annotations/"
        " and for a COCO instances file in annotations/ or at the top; arrange it in one of these."
    )


# ------------------------------------------------------------------------------------------------- readers


def read_folder(folder: Path, mask_class: str) -> Iterator[Record | LeftOut]:
    """images/, masks/ and an optional metadata.csv.

    With a metadata.csv, an image that it does not list is left out: without its patient_id it might land on
    both sides of a split.
    """
    table = yield from _read_metadata(folder)
    listed = {_key(path, folder / "masks"): path for path in reversed(_image_files(folder / "masks"))}
    for image in _image_files(folder / "images"):
        image_id = _key(image, folder / "images")
        if table is not None and image_id not in table:
            yield LeftOut(image, "not in metadata.csv", f"metadata.csv has no row with image_id {image_id}")
            continue
        try:
            row = _row(image, image_id, {} if table is None else table[image_id])
        except LeftOut as reason:
            yield reason
            continue
        without_mask = _why_no_mask(row["view"], mask_class)
        mask = listed.get(image_id) or listed.get(f"{image_id}_mask")
        if mask is None and without_mask == _why_no_mask("", mask_class):
            yield LeftOut(image, "missing mask", f"there is no mask file masks/{image_id}.*")
            continue
        rule = None if mask is None else partial(mask_from_file, mask)
        yield Record(image, rule, row, without_mask)


def read_darwin(folder: Path, mask_class: str) -> Iterator[Record | LeftOut]:
    """V7's export, Darwin JSON 1.0 or 2.0, one file an image.

    Tags carry the table: `Age:`, `Sex/`, `PatientID:`, `View/` and the findings; 2.0 may hold the same as
    properties. All polygons of the mask class are united; any other class, "Ignore" among them, leaves the
    mask as it is. Of a 2.0 item with several slots the first is read.

    Reference: docs.v7labs.com/reference/darwin-json and /reference/legacy-darwin-json-10.
    """
    table = yield from _read_metadata(folder)
    images = _ImageIndex(folder)
    for path in _annotation_files(folder):
        image = images.find(path.stem)
        try:
            content = _read_json(path)
            try:
                names, declared, slot = _darwin_image(content)
                image = images.find(*names) or image
                if image is None:
                    raise LeftOut(path, "missing image", f"its image {names[0]} is not in images/")
                tags = _darwin_tags(content)
                shapes = _darwin_shapes(content["annotations"], mask_class, slot)
            except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
                raise LeftOut(path, "broken JSON", f"not Darwin JSON as V7 writes it: {error!r}") from None
            image_id = images.key(image)
            row = _row(image, image_id, tags | declared | (table or {}).get(image_id, {}))
        except LeftOut as reason:
            yield reason
            continue
        finally:
            images.use(image)
        modality = "CT slice" if tags["ct"] else _why_no_mask(row["view"], mask_class)
        size = declared["width"], declared["height"]
        yield Record(image, partial(_unite, path, shapes, size) if shapes else None, row, modality)
    for image in images.unused():
        yield LeftOut(image, "not annotated", "there is no annotation file for it", defect=False)


def read_coco(folder: Path, mask_class: str) -> Iterator[Record | LeftOut]:
    """COCO instances files: an image's annotations of the mask class are united, over all files.

    COCO knows no patients: a metadata.csv, or columns of the same names among an image's own entries, say
    what is known of them.

    Reference: cocodataset.org/#format-data and the mask API of cocoapi.
    """
    table = yield from _read_metadata(folder)
    images = _ImageIndex(folder)
    values: dict[Path, dict[str, Any]] = {}
    shapes: dict[Path, list[MaskRule]] = defaultdict(list)
    broken: dict[Path, LeftOut] = {}
    origin: dict[Path, Path] = {}
    for path in _annotation_files(folder):
        content = _read_json(path, fatal=True)
        if not isinstance(content, dict) or not {"images", "annotations"} <= content.keys():
            continue
        try:
            licences = {one["id"]: one["name"] for one in content.get("licenses", [])}
            classes = {one["id"]: one["name"] for one in content.get("categories", [])}
            ours = {number for number, name in classes.items() if _is_class(name, mask_class)}
            entries = {one["id"]: one for one in content["images"]}
            names = {number: str(one["file_name"]) for number, one in entries.items()}
            of_image = defaultdict(list)
            for one in content["annotations"]:
                if one.get("category_id") in ours:
                    of_image[one["image_id"]].append(one)
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path}: not a COCO instances file: {error!r}; export it again.") from None
        for number, entry in entries.items():
            image = images.find(names[number])
            if image is None:
                yield LeftOut(path, "missing image", f"its image {names[number]} is not in images/")
                continue
            images.use(image)
            origin[image] = path
            values.setdefault(image, {"licence": licences.get(entry.get("license"), "")}).update(entry)
            try:
                for one in of_image[number]:
                    shapes[image] += _coco_shapes(one["segmentation"])
            except (KeyError, TypeError, ValueError, IndexError) as error:
                detail = f"its segmentation in {path.name} is broken: {error!r}"
                broken[image] = LeftOut(image, "broken JSON", detail)
    for image, known in values.items():
        image_id = images.key(image)
        try:
            if image in broken:
                raise broken[image]
            row = _row(image, image_id, known | (table or {}).get(image_id, {}))
        except LeftOut as reason:
            yield reason
            continue
        size = known.get("width"), known.get("height")
        rule = partial(_unite, origin[image], shapes[image], size) if shapes[image] else None
        yield Record(image, rule, row, _why_no_mask(row["view"], mask_class))
    for image in images.unused():
        yield LeftOut(image, "not annotated", "no instances file lists it", defect=False)


def _darwin_image(content: Mapping[str, Any]) -> tuple[list[str], dict[str, Any], str]:
    """(the names under which the image may lie, its declared sizes, the name of the slot)."""
    if "item" in content:  # 2.0
        item = content["item"]
        slot = (item.get("slots") or [{}])[0]
        inside = str(item.get("path") or "/").strip("/")
        files = [one["file_name"] for one in slot.get("source_files") or [] if one.get("file_name")]
        names = [item["name"], *files]
        names = [f"{inside}/{name}" for name in names if inside] + names
        declared = {"width": slot.get("width"), "height": slot.get("height")}
        return names, declared, str(slot.get("slot_name", "0"))
    image = content["image"]
    inside = str(image.get("path") or "/").strip("/")
    names = [image[key] for key in ("filename", "original_filename") if image.get(key)]
    names = [f"{inside}/{name}" for name in names if inside] + names
    declared = {key: image.get(key) for key in ("width", "height", "original_width", "original_height")}
    return names, declared, ""


def _darwin_tags(content: Mapping[str, Any]) -> dict[str, Any]:
    """What the image's tags say, under our column names; `ct` is True for a CT slice."""
    names = [one["name"] for one in content["annotations"] if "tag" in one]
    properties = list(content.get("properties") or [])
    properties += [p for one in content["annotations"] if "tag" in one for p in one.get("properties") or []]
    names += [f"{one['name']}:{one['value']}" for one in properties if one.get("value") is not None]
    valued = {}
    for name in names:
        key, mark, value = re.match(r"([^:/]*)([:/]?)(.*)", name, re.DOTALL).groups()
        if mark:
            valued.setdefault(key.strip().lower(), value.strip())
    plain = {name.lower() for name in names} | {value.lower() for value in valued.values()}
    return {
        "age": valued.get("age", ""),
        "sex": valued.get("sex", ""),
        "patient_id": valued.get("patientid", ""),
        "view": valued.get("view", "").replace("_", " "),
        "finding": next((ours for theirs, ours in DARWIN_FINDINGS.items() if theirs.lower() in plain), ""),
        "ct": "ct" in plain,
    }


def _darwin_shapes(annotations: Sequence[Mapping[str, Any]], mask_class: str, slot: str) -> list[MaskRule]:
    """The shapes of the mask class: polygons (1.0, 2.0), complex polygons (1.0) and raster masks (2.0)."""
    here = [one for one in annotations if slot in (one.get("slot_names") or [slot])]
    ours = [one for one in here if _is_class(one["name"], mask_class)]
    shapes: list[MaskRule] = []
    for one in ours:
        polygon = one.get("polygon") or {}
        outlines = list(polygon.get("paths") or []) + list(polygon.get("additional_paths") or [])
        outlines += [polygon["path"]] if polygon.get("path") else []
        outlines += list((one.get("complex_polygon") or {}).get("path") or [])
        if outlines:
            points = [_points([[point["x"], point["y"]] for point in outline]) for outline in outlines]
            shapes.append(partial(fill_even_odd, points))
    for one in here:
        if "raster_layer" in one:
            layer = one["raster_layer"]
            labels = layer["mask_annotation_ids_mapping"]
            wanted = [labels[mask["id"]] for mask in ours if mask.get("id") in labels]
            pairs = np.asarray(layer["dense_rle"], np.int64).reshape(-1, 2)  # label, run length; row by row
            if wanted:
                shapes.append(partial(_from_runs, np.isin(pairs[:, 0], wanted), pairs[:, 1], "C"))
    return shapes


def _coco_shapes(segmentation: Any) -> list[MaskRule]:
    """One annotation: several polygons (parts of one object, united), or one RLE mask."""
    if isinstance(segmentation, Mapping):
        counts = segmentation["counts"]
        runs = decode_coco_counts(counts) if isinstance(counts, str | bytes) else np.asarray(counts, np.int64)
        height, width = segmentation["size"]
        if runs.min(initial=0) < 0 or runs.sum() != height * width:
            raise ValueError("the RLE counts do not add up to its size")
        return [partial(_from_runs, np.arange(len(runs)) % 2 == 1, runs, "F")]
    return [partial(fill_even_odd, [_points(np.reshape(part, (-1, 2)))]) for part in segmentation]


def _read_metadata(folder: Path) -> Generator[LeftOut, None, dict[str, dict[str, str]] | None]:
    """Rows of metadata.csv as text by image_id, or None without one; those without use are yielded."""
    path = folder / "metadata.csv"
    if not path.is_file():
        return None
    try:
        as_text = {"dtype": str, "keep_default_na": False, "skipinitialspace": True}
        table = pd.read_csv(path, encoding="utf-8-sig", **as_text)
    except (ValueError, pd.errors.ParserError, OSError) as error:  # ValueError: not UTF-8, or empty
        raise UserError(f"{path}: not a CSV table ({_first_line(error)}); save it as UTF-8.") from None
    if "image_id" not in table.columns:
        found = ", ".join(map(str, table.columns))
        raise UserError(f"{path}: there is no image_id column (it has: {found}); name the images in one.")
    images = _ImageIndex(folder)
    rows: dict[str, dict[str, str]] = {}
    for line, row in enumerate(table.to_dict("records"), start=2):
        name = row["image_id"].strip()
        image_id = _without_suffix(name)
        if image_id in rows:
            yield LeftOut(path, "image_id twice", f"line {line} has image_id {name} again")
        elif images.find(image_id) is None:
            yield LeftOut(path, "missing image", f"the image {name} of line {line} is not in images/")
        else:
            rows[image_id] = {key: value.strip() for key, value in row.items() if value.strip()}
    return rows


def _row(image: Path, image_id: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """A checked row out of what a reader found; `values` may lack any column and hold others.

    Raises:
        LeftOut: the age is not a number of years in 0..120. An age that is empty or "NA" is unknown, which is
            no fault; one that is "nan" or negative went wrong somewhere, and so may have the rest of its row.
    """
    text = {key: "" if values.get(key) is None else str(values[key]).strip() for key in COLUMNS}
    age = math.nan
    if text["age"].lower() not in {"", "na", "n/a", "unknown"}:
        try:
            age = float(text["age"])
        except ValueError:
            age = math.nan
        if not 0 <= age <= OLDEST:
            detail = f"its age is {text['age']!r}, not years in 0..{OLDEST:.0f} (empty where unknown)"
            raise LeftOut(image, "age not valid", detail)
    age_source = "cohort" if text["age_source"].lower() == "cohort" else "record"
    return {
        "image_id": image_id,
        "patient_id": text["patient_id"],
        "age": age,
        "age_source": "" if math.isnan(age) else age_source,
        "sex": {"m": "M", "male": "M", "f": "F", "female": "F"}.get(text["sex"].lower(), ""),
        "finding": text["finding"],
        "site": text["site"],
        "view": text["view"],
        "original_width": _whole(text["original_width"]),
        "original_height": _whole(text["original_height"]),
        "licence": text["licence"],
    }


def _whole(text: str) -> int:
    """A positive whole number, or 0 for anything else: original sizes are for information only."""
    try:
        return max(0, int(float(text)))
    except (ValueError, OverflowError):
        return 0


def _why_no_mask(view: str, mask_class: str) -> str:
    lateral = view.lower() in {"l", "ll", "rl", "lat"} or "lateral" in view.lower()
    return "lateral view" if lateral else f"no {mask_class} mask"


def _words(name: str) -> list[str]:
    return re.findall(r"[^\W_]+", name.lower())


def _is_class(name: str, mask_class: str) -> bool:
    """Whether a class is the mask class: "Lung", "left lung" and "Lungs" are, "Lung opacity" is not."""
    words = [word for word in _words(name) if word not in {"left", "right", "l", "r"}]
    wanted = _words(mask_class)
    return words in (wanted, [*wanted[:-1], wanted[-1] + "s"])


# ------------------------------------------------------------------------------------------------ geometry


def fill_even_odd(outlines: Sequence[np.ndarray], height: int, width: int) -> np.ndarray:
    """The pixels whose centre lies inside closed outlines, by the even-odd rule.

    The pixel in row r and column c covers [c, c+1] x [r, r+1]. Asking for its centre keeps areas unbiased;
    drawing libraries add the outline itself, half a pixel all round. Each edge toggles, in every row that it
    crosses, the first pixel to the right of the crossing; the running parity along the row is the mask.

    Args:
        outlines: each (n, 2) float, x and y in pixels; may reach beyond the image.
        height: of the image, pixels.
        width: of the image, pixels.

    Returns:
        (height, width) bool.
    """
    toggles = np.zeros((height, width + 1), np.uint8)
    for outline in outlines:
        (x0, y0), (x1, y1) = outline.T, np.roll(outline, -1, axis=0).T
        first = np.clip(np.ceil(np.minimum(y0, y1) - 0.5), 0, height).astype(np.int64)
        last = np.clip(np.ceil(np.maximum(y0, y1) - 0.5), 0, height).astype(np.int64)
        rows_of_edge = last - first
        edge = np.repeat(np.arange(len(outline)), rows_of_edge)
        before = np.repeat(np.cumsum(rows_of_edge) - rows_of_edge, rows_of_edge)
        row = first[edge] + np.arange(len(edge)) - before
        along = (row + 0.5 - y0[edge]) / (y1 - y0)[edge]
        crossing = x0[edge] + along * (x1 - x0)[edge]
        column = np.clip(np.ceil(crossing - 0.5), 0, width).astype(np.int64)
        np.bitwise_xor.at(toggles, (row, column), 1)
    return np.bitwise_xor.accumulate(toggles[:, :width], axis=1).astype(bool)


def decode_coco_counts(text: str | bytes) -> np.ndarray:
    """The run lengths in COCO's compressed RLE text.

    Each number is written five bits a character, lowest first, plus 48; bit 5 says that more follow, bit 4 of
    the last one is the sign. From the fourth number on, the difference to the number two before is written.
    """
    numbers: list[int] = []
    value = shift = 0
    for byte in text.encode("ascii") if isinstance(text, str) else text:
        bits = byte - 48
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:
            value -= 1 << shift
        numbers.append(value + numbers[-2] if len(numbers) > 2 else value)
        value = shift = 0
    if shift:
        raise ValueError("the RLE text ends within a number")
    return np.asarray(numbers, np.int64)


def _from_runs(inside: np.ndarray, lengths: np.ndarray, order: str, height: int, width: int) -> np.ndarray:
    """(height, width) bool out of run lengths; order "C" runs along rows, "F" along columns."""
    flat = np.repeat(inside, lengths)
    if len(flat) != height * width:
        raise ValueError(f"{len(flat)} pixels in the runs, {height * width} in the image")
    return flat.reshape((height, width), order=order)


def _unite(
    annotation: Path, shapes: Sequence[MaskRule], declared: tuple[Any, Any], height: int, width: int
) -> np.ndarray:
    """The union of shapes drawn on an image of the declared (width, height)."""
    if None not in declared and tuple(declared) != (width, height):
        detail = f"annotated at {declared[0]} x {declared[1]} pixels, but its image has {width} x {height}"
        raise LeftOut(annotation, "mask of another size", detail)
    mask = np.zeros((height, width), bool)
    for shape in shapes:
        try:
            mask |= shape(height, width)
        except ValueError as error:
            raise LeftOut(annotation, "mask of another size", str(error)) from None
    return mask


def _points(values: Any) -> np.ndarray:
    points = np.asarray(values, np.float64)
    if points.ndim != 2 or not np.isfinite(points).all():
        raise ValueError("an outline is not a list of finite x and y")
    return points


# -------------------------------------------------------------------------------------------------- pixels


def read_image(path: Path) -> tuple[np.ndarray, dict[str, Any]]:
    """A picture as 8-bit grey, turned as its EXIF tag says, and what its header tells of the patient.

    8-bit grey stays as it is, colour is weighted to luma (ITU-R 601), transparency lies on black. Deeper
    grey (16-bit, float, DICOM) is stretched from its own lowest to its own highest value: such files hold 10,
    12 or 16 significant bits and seldom say which.

    Returns:
        (H, W) uint8, and a dict that may hold age (years), sex, patient_id and view.

    Raises:
        LeftOut: the file cannot be read.
    """
    # Decoders meet arbitrary bytes and raise nearly anything; whatever it is, it is this one file's fault.
    try:
        if path.suffix.lower() in DICOM_SUFFIXES:
            return _read_dicom(path)
        image = _open(path)
        if _is_deep(image):
            return _stretch(np.asarray(image)), {}
        return np.asarray(image.convert("L")), {}
    except (LeftOut, MemoryError):
        raise
    except Exception as error:
        raise LeftOut(path, "unreadable image", f"not readable as an image ({_first_line(error)})") from None


def mask_from_file(path: Path, height: int, width: int) -> np.ndarray:
    """A mask picture as bool (height, width).

    Values up to 15 are labels, every one but 0 is lung; otherwise lung is what is brighter than half of the
    brightest, which forgives the noise of JPEG. Colours count by their strongest channel.
    """
    try:
        image = _open(path)
        if image.mode == "1":
            image = image.convert("L")
        values = np.asarray(image if image.mode == "L" or _is_deep(image) else image.convert("RGB"))
    except MemoryError:
        raise
    except Exception as error:
        raise LeftOut(path, "unreadable mask", f"not readable as an image ({_first_line(error)})") from None
    values = values.max(axis=2) if values.ndim == 3 else values
    if values.shape != (height, width):
        detail = f"the mask has {values.shape[1]} x {values.shape[0]} pixels, its image {width} x {height}"
        raise LeftOut(path, "mask of another size", detail)
    brightest = values.max()
    return values > (0 if brightest <= 15 else brightest / 2)


def resize(grey: np.ndarray, size: int) -> np.ndarray:
    """(H, W) uint8 squeezed to (size, size), antialiased.

    Pillow's bilinear filter is as wide as the shrinking asks, along each side for itself: a weighted mean
    over the area that a new pixel covers. A 0/255 mask thresholded at the half keeps its edges in place.
    """
    return np.asarray(Image.fromarray(grey).resize((size, size), Image.Resampling.BILINEAR))


def _open(path: Path) -> Image.Image:
    with Image.open(path) as opened:
        image = ImageOps.exif_transpose(opened)
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "black"), image).convert("RGB")
        image.load()
        return image


def _is_deep(image: Image.Image) -> bool:
    return image.mode.startswith(("I", "F"))


def _stretch(values: np.ndarray) -> np.ndarray:
    """Lowest..highest value -> 0..255; a flat picture becomes black."""
    values = values.astype(np.float64)
    low, high = values.min(), values.max()
    if not np.isfinite([low, high]).all():
        raise ValueError("it holds values that are not finite")
    return np.rint((values - low) * (255 / max(high - low, 1e-12))).astype(np.uint8)


def _read_dicom(path: Path) -> tuple[np.ndarray, dict[str, Any]]:
    try:
        import pydicom
        from pydicom import pixels
    except ImportError:
        detail = "reading DICOM needs the package pydicom: pip install pydicom"
        raise LeftOut(path, "pydicom not installed", detail) from None
    dataset = pydicom.dcmread(path)
    values = dataset.pixel_array
    if values.ndim != 2:
        raise ValueError(f"one grey frame is wanted, not an array of shape {values.shape}")
    values = pixels.apply_modality_lut(values, dataset)  # stored values -> rescaled values
    grey = _stretch(pixels.apply_voi_lut(values, dataset))  # -> the window that a reader would see
    if dataset.get("PhotometricInterpretation") == "MONOCHROME1":  # there the lowest value is white
        grey = 255 - grey

    header = {
        "patient_id": str(dataset.get("PatientID") or "").strip(),
        "sex": {"M": "M", "F": "F"}.get(str(dataset.get("PatientSex") or ""), ""),
        "view": str(dataset.get("ViewPosition") or "").strip(),
    }
    age = re.fullmatch(r"(\d{1,3})([DWMY])", str(dataset.get("PatientAge") or "").strip())
    if age:
        years = int(age[1]) / {"D": 365.25, "W": 52.18, "M": 12, "Y": 1}[age[2]]
        if years <= OLDEST:
            header["age"] = years
    return grey, header


# --------------------------------------------------------------------------------------------------- files


class _ImageIndex:
    """The image files of a source, found by path below images/, and by name or stem where only one fits."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "images" if (folder / "images").is_dir() else folder
        self.files = _image_files(self.root)
        self._used: set[Path] = set()
        self._by_name: dict[str, set[Path]] = defaultdict(set)
        for path in self.files:
            for name in (path.relative_to(self.root).as_posix(), self.key(path), path.name, path.stem):
                self._by_name[name].add(path)

    def key(self, path: Path) -> str:
        return _key(path, self.root)

    def find(self, *names: str) -> Path | None:
        """The image of the first name that fits exactly one file."""
        for name in names:
            name = str(name)
            last = name.rpartition("/")[2]
            for tried in (name, name.removeprefix("images/"), last, _without_suffix(last)):
                if len(self._by_name.get(tried, ())) == 1:
                    return next(iter(self._by_name[tried]))
        return None

    def use(self, path: Path | None) -> None:
        self._used.add(path)

    def unused(self) -> list[Path]:
        return [path for path in self.files if path not in self._used]


def _key(path: Path, root: Path) -> str:
    """A file's path below `root` without suffix: for a flat folder its stem."""
    return path.relative_to(root).with_suffix("").as_posix()


def _is_image(name: str) -> bool:
    return name.lower().endswith(tuple(IMAGE_SUFFIXES))


def _without_suffix(name: str) -> str:
    """A name without the suffix of an image; another dot belongs to the name, as in a DICOM UID."""
    return name.rpartition(".")[0] if _is_image(name) else name


def _image_files(root: Path) -> list[Path]:
    """The image files below `root`, sorted."""
    return [Path(root, name) for name in sorted(name for name, _ in _walk(root)) if _is_image(name)]


def _annotation_files(folder: Path) -> list[Path]:
    """JSON files in annotations/ (or where V7's own command line puts them), else at the folder's top."""
    for place in (folder / "annotations", folder / "releases" / "latest" / "annotations"):
        found = sorted(name for name, _ in _walk(place) if name.lower().endswith(".json"))
        if found:
            return [Path(place, name) for name in found]
    return sorted(folder.glob("*.json"))


def _list_files(folder: Path) -> list[tuple[str, int, int]]:
    """Every file that a reader may look at: (path below the folder, bytes, mtime in ns), sorted."""
    if (folder / "images").is_dir():  # the usual case: what else lies in the folder does not matter
        found = list(_walk(folder, deep=False))
        for part in ("images", "masks", "annotations", "releases"):
            found += [(f"{part}/{name}", stat) for name, stat in _walk(folder / part)]
    else:
        found = list(_walk(folder))
    return sorted((name, stat.st_size, stat.st_mtime_ns) for name, stat in found)


def _walk(root: Path, below: str = "", deep: bool = True) -> Iterator[tuple[str, os.stat_result]]:
    """(path below `root` with "/", stat) of every file; hidden files and folders are left aside."""
    if not (root / below).is_dir():
        return
    for entry in os.scandir(root / below):
        if entry.name.startswith("."):
            continue
        if entry.is_file():
            yield below + entry.name, entry.stat()
        elif deep and entry.is_dir():
            yield from _walk(root, f"{below}{entry.name}/")


def _read_json(path: Path, fatal: bool = False) -> Any:
    """Raises LeftOut, or with `fatal` UserError, where the file is no JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        if fatal:
            raise UserError(f"{path}: broken JSON ({_first_line(error)}); export it again.") from None
        raise LeftOut(path, "broken JSON", f"broken JSON ({_first_line(error)})") from None


def _sha256(*content: Any) -> str:
    digest = hashlib.sha256()
    for piece in content:
        digest.update(piece)
    return digest.hexdigest()


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


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
            warnings.warn(f"{path}: damaged cache ({_first_line(error)}); decoding again.", stacklevel=3)
    part = plan.make(images, masks)
    try:
        _write_cache(path, part, images[: len(part.rows)], masks[: len(part.rows)])
        for old in path.parent.glob(f"{glob.escape(stem)}-*.zip"):  # of this source before its files changed
            if old != path:
                old.unlink()
    except OSError as error:
        warnings.warn(f"{path}: the cache cannot be written ({_first_line(error)}).", stacklevel=3)
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

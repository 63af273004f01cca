"""Content of one source: images decoded, checked and resized, with a row of the table for each."""

import hashlib
import importlib.util
import json
import math
import os
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from fmfl.errors import UserError, first_few
from fmfl.sources import metadata, phantom, readers
from fmfl.sources.files import IMAGE_SUFFIXES, Found, SkippedFile, list_files
from fmfl.sources.mask_files import organ_of
from fmfl.sources.pixels import read_image, resize
from fmfl.sources.readers import Record

SIZES = (16, 2048)  # pixels a side


class Content(NamedTuple):
    """Images of one source with their masks and rows, and the files that are not used."""

    images: np.ndarray  # [N, H, W] uint8
    masks: np.ndarray  # [N, H, W] uint8, 0 or 1
    rows: list[dict[str, Any]]  # site and patient_id as given, or empty
    digest: str  # SHA-256 of images, masks and rows
    left_out: Sequence[dict[str, Any]] = ()  # file, reason, detail, defect
    remarks: Sequence[str] = ()


class Preview(NamedTuple):
    """Rows of one source and its first images, without the time of decoding the others."""

    rows: list[dict[str, Any]]  # as in `Content`, but for what only a decoded file tells
    images: np.ndarray  # [n, H, W] uint8
    masks: np.ndarray  # [n, H, W] uint8, 0 or 1
    seconds: float  # to decode all images, by the time that these few took


class Plan(NamedTuple):
    """Reading of one source, and all that its content depends on; a look at it takes a number of images."""

    read: Callable[[], Content]
    look: Callable[[int], Preview]
    settings: Mapping[str, Any]
    files: Sequence[Found] = ()


def sha256(*pieces: Any) -> str:
    """Return the SHA-256 of bytes and arrays, one after another."""
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece)
    return digest.hexdigest()


def _digest(images: np.ndarray, masks: np.ndarray, rows: list[dict[str, Any]]) -> str:
    text = json.dumps([images.shape, rows], sort_keys=True)
    return sha256(text.encode(), images, np.packbits(masks))


def of_phantoms(num_images: int, seed: int, size: int) -> Plan:
    """Plan the drawing of synthetic X-rays."""
    if num_images < 1:
        raise UserError(f"num_phantoms is {num_images!r}: give the number of synthetic X-rays, at least 1")
    settings = {"size": size, "num_images": num_images, "seed": seed, "numpy": np.__version__}
    # Their drawing is this project's own code, which changes without a file of the user's changing.
    settings["code"] = sha256(Path(phantom.__file__).read_bytes())
    drawing = (num_images, seed, size)
    return Plan(partial(_draw_phantoms, *drawing), partial(_look_at_phantoms, *drawing), settings)


def _draw_phantoms(num_images: int, seed: int, size: int) -> Content:
    images, masks, table = phantom.generate(num_images, size, seed)
    rows = table.to_dict("records")
    return Content(images, masks, rows, _digest(images, masks, rows))


def _look_at_phantoms(num_images: int, seed: int, size: int, few: int) -> Preview:
    rows = phantom.table(num_images, seed).to_dict("records")
    few, started = min(few, num_images), time.perf_counter()
    images, masks, _ = phantom.generate(few, size, seed)
    return Preview(rows, images, masks, (time.perf_counter() - started) * num_images / few)


def of_folder(folder: Path, size: int, mask_class: str, workers: int | None, title: str) -> Plan:
    """Plan the reading of a folder on `workers` threads, with a bar of that title, "" for no bar."""
    files = list_files(folder)
    if not files:
        raise UserError(f"{folder}: this folder is empty; give a folder with images and masks")
    settings = {"folder": str(folder.resolve()), "size": size, "mask_class": mask_class}
    settings["pydicom"] = importlib.util.find_spec("pydicom") is not None
    look = partial(_look_at_folder, folder, size, mask_class, workers)
    return Plan(partial(_read_folder, folder, size, mask_class, workers, title), look, settings, files)


def _read_folder(folder: Path, size: int, mask_class: str, workers: int | None, title: str) -> Content:
    records, skipped = _records(folder, mask_class)
    images = np.empty((len(records), size, size), np.uint8)
    masks = np.empty_like(images)
    rows: list[dict[str, Any]] = []
    remarked: dict[str, list[str]] = defaultdict(list)
    # Threads, since Pillow gives the lock back while it decodes and resizes.
    with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        results = pool.map(partial(_decode_or_skip, size=size), records)
        bar = tqdm(results, title, len(records), unit="image", disable=not title, leave=False)
        for result in bar:
            if isinstance(result, SkippedFile):
                skipped.append(result)
                continue
            images[len(rows)], masks[len(rows)], row, remarks = result
            rows.append(row)
            for remark in remarks:
                remarked[remark].append(row["image_id"])
    if not rows:
        raise UserError(_nothing_usable(folder, skipped, mask_class))
    images, masks = images[: len(rows)], masks[: len(rows)]
    left_out = [one.entry(folder) for one in skipped]
    left_out.sort(key=lambda entry: (entry["file"], entry["reason"]))
    sentences = [f"{len(ids)} images with {what}: {first_few(ids)}" for what, ids in remarked.items()]
    return Content(images, masks, rows, _digest(images, masks, rows), left_out, sentences)


def _look_at_folder(folder: Path, size: int, mask_class: str, workers: int | None, few: int) -> Preview:
    records, skipped = _records(folder, mask_class)
    skipped += [_not_annotated(record) for record in records if record.mask is None]
    records = [record for record in records if record.mask is not None]
    if not records:
        raise UserError(_nothing_usable(folder, skipped, mask_class))
    chosen = records[:: math.ceil(len(records) / few)]
    started = time.perf_counter()
    with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        results = list(pool.map(partial(_decode_or_skip, size=size), chosen))
    seconds = (time.perf_counter() - started) * len(records) / len(chosen)
    decoded = [result for result in results if not isinstance(result, SkippedFile)]
    images, masks = (
        np.array([one[part] for one in decoded], np.uint8).reshape(-1, size, size) for part in (0, 1)
    )
    ids = [record.row["patient_id"] or record.row["image_id"] for record in records]
    rows = [record.row | {"patient_id": own} for record, own in zip(records, ids, strict=True)]
    return Preview(rows, images, masks, seconds)


def _records(folder: Path, mask_class: str) -> tuple[list[Record], list[SkippedFile]]:
    """Return the records of a folder by image_id, and the files skipped: images of one id among them."""
    records: dict[str, list[Record]] = defaultdict(list)
    skipped: list[SkippedFile] = []
    for result in readers.reader(folder)(folder, mask_class):
        if isinstance(result, SkippedFile):
            skipped.append(result)
        else:
            records[result.row["image_id"]].append(result)
    for image_id, several in records.items():
        if len(several) > 1:
            detail = f"{len(several)} images have the image_id {image_id}: whose mask it is, is unknown"
            skipped += [SkippedFile(record.image, "image_id twice", detail) for record in several]
    return [records[image_id][0] for image_id in sorted(records) if len(records[image_id]) == 1], skipped


def _nothing_usable(folder: Path, skipped: list[SkippedFile], mask_class: str) -> str:
    if all(one.reason == "not an image" and not one.defect for one in skipped):
        return f"{folder}: there is no image file in it (looked for {', '.join(sorted(IMAGE_SUFFIXES))})"
    reasons = Counter(one.reason for one in skipped).most_common()
    counted = ", ".join(f"{count} x {reason}" for reason, count in reasons)
    first = next(one for one in skipped if one.reason == reasons[0][0])
    file = first.file.relative_to(folder)
    unknown = f"no {organ_of(mask_class).name} mask" in {one.reason for one in skipped}
    remedy = readers.which_classes(folder, mask_class) if unknown else ""
    return f"{folder}: no usable image ({counted}); the first is {file}: {first.detail}{remedy}"


def _not_annotated(record: Record) -> SkippedFile:
    detail = "nothing of the mask class is annotated"
    return SkippedFile(record.image, record.without_mask, detail, defect=False)


#: One image: [H, W] uint8 0..255, its mask [H, W] uint8 0 or 1, its row, and remarks to look at.
Decoded = tuple[np.ndarray, np.ndarray, dict[str, Any], list[str]]


def _decode_or_skip(record: Record, size: int) -> Decoded | SkippedFile:
    try:
        return decode(record, size)
    except SkippedFile as reason:
        return reason


def read_xray(path: Path) -> tuple[np.ndarray, dict[str, Any]]:
    """Read a picture and its header as `read_image` does, and refuse one that can be no X-ray.

    Raises:
        SkippedFile: it cannot be read, shows nothing, or is too small.
    """
    grey, header = read_image(path)
    height, width = grey.shape
    if grey.min() == grey.max():
        raise SkippedFile(path, "constant image", "all its pixels are the same: it shows nothing")
    if min(height, width) < SIZES[0]:
        detail = f"it has {width} x {height} pixels: an image has at least {SIZES[0]} a side"
        raise SkippedFile(path, "image too small", detail)
    return grey, header


def decode(record: Record, size: int) -> Decoded:
    """Decode one image and its mask, and finish its row by what only the file knows.

    That is its own size where no other is given, and a DICOM header's age, sex, patient and view where no
    table has them.

    Raises:
        SkippedFile: the image cannot be read or shows nothing, its mask is empty, or the two do not fit
            together.
    """
    if record.mask is None:
        raise _not_annotated(record)
    grey, header = read_xray(record.image)
    height, width = grey.shape
    mask, remark = record.mask(grey)
    if not mask.any():
        raise SkippedFile(record.image, record.without_mask, "its mask is empty", defect=False)
    small = resize(mask.astype(np.uint8) * 255, size) >= 128
    if not small.any():
        detail = f"its mask has {mask.sum()} pixels, of which nothing is left at a size of {size}"
        raise SkippedFile(record.image, "mask too small", detail)
    row, aged = _with_header(record.image, record.row, header)
    row["original_width"] = row["original_width"] or width
    row["original_height"] = row["original_height"] or height
    return resize(grey, size), small.astype(np.uint8), row, [*filter(None, (remark, aged))]


def _with_header(
    image: Path, row: Mapping[str, Any], header: Mapping[str, Any]
) -> tuple[dict[str, Any], str]:
    """Return a row with what a DICOM header adds to it, and a remark.

    Raises:
        SkippedFile: the age or patient_id that the row takes from the header is not valid.
    """
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

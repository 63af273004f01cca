"""Layouts of a source: folder, Darwin JSON 1.0 and 2.0, COCO. Each has a reader that yields plain `Record`s.

An annotation lies on the image that it names, at the size that it was drawn at, or it is left out with its
reason: never on one that is only called alike. One that names no image or class of its file may be the lung
of any of them, so it makes no image one "without lungs".
"""

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fmfl.errors import UserError
from fmfl.sources import metadata
from fmfl.sources.files import ImageIndex, SkippedFile, annotation_files, image_root, is_folder, read_json
from fmfl.sources.mask_files import read_mask
from fmfl.sources.metadata import Table, whole
from fmfl.sources.outlines import Shape, coco_shapes, fill_even_odd, from_runs, points, unite

# Height and width of an image -> [H, W] bool mask, and a remark on it, "" without one.
Drawing = Callable[[int, int], tuple[np.ndarray, str]]
# [H, W] uint8 image -> [H, W] bool mask, and a remark on how it was read, "" without one.
MaskRule = Callable[[np.ndarray], tuple[np.ndarray, str]]

# Of V7's tags on one image the first of these is the finding: the special before the general.
DARWIN_FINDINGS = {
    "COVID-19": "covid-19",
    "Viral Pneumonia": "viral pneumonia",
    "Bacterial Pneumonia": "bacterial pneumonia",
    "Fungal Pneumonia": "fungal pneumonia",
    "No Pneumonia (healthy)": "normal",
}
# Forms of a Darwin annotation that are not read as areas.
OTHER_FORMS = frozenset(
    {"ellipse", "line", "keypoint", "skeleton", "cuboid", "frames", "mask", "bounding_box"}
)


@dataclass(frozen=True)
class Record:
    """What a reader says of one image, before anything is decoded."""

    image: Path
    mask: MaskRule | None  # None: nothing of the mask class is annotated
    row: dict[str, Any]  # from `metadata.row`
    without_mask: str  # the reason to give if there is no mask, or an empty one


Reader = Callable[[Path, str], Iterator[Record | SkippedFile]]


def reader(folder: Path) -> Reader:
    """The reader for what the folder holds. Mask files win over annotations: they need no interpretation."""
    if is_folder(folder / "images") and is_folder(folder / "masks"):
        return read_folder
    broken = None
    for path in annotation_files(folder):
        try:
            content = read_json(path)
        except SkippedFile as reason:
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


def read_folder(folder: Path, mask_class: str) -> Iterator[Record | SkippedFile]:
    """images/, masks/ and an optional metadata.csv.

    With a metadata.csv, an image that it does not list is left out: without its patient_id it might land on
    both sides of a split.
    """
    images, masks = ImageIndex(folder / "images"), ImageIndex(folder / "masks")
    yield from images.others
    yield from masks.others
    table = yield from metadata.read(folder, images)
    of_key: dict[str, list[Path]] = defaultdict(list)
    for path in masks.files:
        of_key[masks.key(path)].append(path)
    named = {images.key(image) for image in images.files}
    for key in list(of_key):
        if key not in named and key.removesuffix("_mask") in named:
            of_key[key.removesuffix("_mask")] += of_key.pop(key)
    for key, paths in of_key.items():
        if key not in named:
            for path in paths:
                yield SkippedFile(path, "mask without an image", f"there is no image file images/{key}.*")
    for image in images.files:
        image_id = images.key(image)
        try:
            values = _listed(image, image_id, table, required=True)
            row = metadata.row(image, image_id, values)
        except SkippedFile as reason:
            yield reason
            continue
        without_mask = _why_no_mask(row["view"], mask_class)
        found = of_key.get(image_id, [])
        if len(found) > 1:
            names = " and ".join(path.name for path in found)
            yield SkippedFile(image, "several masks", f"it is not told which is its mask: {names}")
        elif not found and without_mask == _why_no_mask("", mask_class):
            yield SkippedFile(image, "missing mask", f"there is no mask file masks/{image_id}.*")
        else:
            rule = partial(read_mask, found[0]) if found else None
            yield Record(image, rule, row, without_mask)


def _listed(image: Path, image_id: str, table: Table | None, required: bool) -> dict[str, str]:
    """What metadata.csv says of an image; LeftOut where it should but does not."""
    if table is None:
        return {}
    if image_id in table.refused:
        raise SkippedFile(image, "image_id twice", "lines of metadata.csv say different things of it")
    if image_id not in table.rows and required:
        raise SkippedFile(image, "not in metadata.csv", f"metadata.csv has no row with image_id {image_id}")
    return table.rows.get(image_id, {})


def read_darwin(folder: Path, mask_class: str) -> Iterator[Record | SkippedFile]:
    """V7's export, Darwin JSON 1.0 or 2.0, one file an image.

    Tags carry the table: `Age:`, `Sex/`, `PatientID:`, `View/` and the findings; 2.0 may hold the same as
    properties. All polygons of the mask class are united; any other class, "Ignore" among them, leaves the
    mask as it is. Of a 2.0 item with several slots the first is read.

    Reference: docs.v7labs.com/reference/darwin-json and /reference/legacy-darwin-json-10.
    """
    images = ImageIndex(image_root(folder))
    yield from images.others
    table = yield from metadata.read(folder, images)
    contents: dict[Path, dict[str, Any]] = {}
    names: dict[Path, list[str]] = {}
    broken: dict[Path, SkippedFile] = {}
    for path in annotation_files(folder):
        names[path] = [path.stem]  # a broken file is at least that image's
        try:
            contents[path] = read_json(path)
            names[path] = _darwin_names(contents[path])
        except SkippedFile as reason:
            broken[path] = reason
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            broken[path] = _not_darwin(path, error)
    found = images.match(names)
    used = Counter(image for image in found.values() if isinstance(image, Path))
    for path, image in found.items():
        try:
            if path in broken:
                raise broken[path]
            if not isinstance(image, Path):
                raise SkippedFile(path, "missing image", f"its image {names[path][0]} {image}")
            if used[image] > 1:
                raise SkippedFile(
                    path, "image_id twice", f"{used[image]} annotation files are of {image.name}"
                )
            yield _darwin_record(path, contents[path], image, images.key(image), table, mask_class)
        except SkippedFile as reason:
            yield reason
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            yield _not_darwin(path, error)
    for image in images.files:
        if image not in used:
            yield SkippedFile(image, "not annotated", "there is no annotation file for it", defect=False)


def _not_darwin(path: Path, error: Exception) -> SkippedFile:
    return SkippedFile(path, "broken JSON", f"not Darwin JSON as V7 writes it: {error!r}")


def _darwin_record(
    path: Path, content: Mapping[str, Any], image: Path, image_id: str, table: Table | None, mask_class: str
) -> Record:
    declared, slot = _darwin_size(content)
    tags = _darwin_tags(content)
    known = _listed(image, image_id, table, required=_needs_row(table, tags))
    row = metadata.row(image, image_id, tags | declared | known)
    shapes = _darwin_shapes(path, content, mask_class, slot)
    size = whole(declared["width"]), whole(declared["height"])
    rule = partial(_drawn, [partial(unite, path, shapes, size)]) if shapes else None
    return Record(image, rule, row, "CT slice" if tags["ct"] else _why_no_mask(row["view"], mask_class))


def _needs_row(table: Table | None, values: Mapping[str, Any]) -> bool:
    """True where only metadata.csv knows the patients, so that an image without a row may be anyone's."""
    return table is not None and table.has_patients and not values.get("patient_id")


def read_coco(folder: Path, mask_class: str) -> Iterator[Record | SkippedFile]:
    """COCO instances files: an image's annotations of the mask class are united, over all files.

    COCO knows no patients: a metadata.csv, or columns of the same names among an image's own entries, say
    what is known of them.

    Reference: cocodataset.org/#format-data and the mask API of cocoapi.
    """
    images = ImageIndex(image_root(folder))
    yield from images.others
    table = yield from metadata.read(folder, images)
    entries: list[_Entry] = []
    for path in annotation_files(folder):
        content = read_json(path, fatal=True)
        if not isinstance(content, dict) or not {"images", "annotations"} <= content.keys():
            continue
        try:
            entries += yield from _coco_entries(path, content, mask_class)
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path}: not a COCO instances file: {error!r}; export it again.") from None
    found = images.match({place: [one.name] for place, one in enumerate(entries)})
    of_image: dict[Path, list[_Entry]] = defaultdict(list)
    for entry, image in zip(entries, map(found.get, range(len(entries))), strict=True):
        if isinstance(image, Path):
            of_image[image].append(entry)
        else:
            yield SkippedFile(entry.path, "missing image", f"its image {entry.name} {image}")
    for image, several in of_image.items():
        try:
            yield _coco_record(image, images.key(image), several, table, mask_class)
        except SkippedFile as reason:
            yield reason
    for image in images.files:
        if image not in of_image:
            yield SkippedFile(image, "not annotated", "no instances file lists it", defect=False)


@dataclass
class _Entry:
    """One image of one instances file."""

    path: Path
    name: str
    values: dict[str, Any]
    annotations: list[Mapping[str, Any]] = field(default_factory=list)
    doubt: str = ""  # why annotations may be missing here


def _coco_entries(
    path: Path, content: Mapping[str, Any], mask_class: str
) -> Generator[SkippedFile, None, list[_Entry]]:
    """Yield what of an instances file points nowhere, and return its images."""
    licences = {_id(one["id"]): one["name"] for one in content.get("licenses") or []}
    classes = {_id(one["id"]): one["name"] for one in content.get("categories") or []}
    if len(classes) < len(content.get("categories") or []):
        raise UserError(f"{path}: two categories have one id; export it again.")
    ids = Counter(_id(one["id"]) for one in content["images"])
    found: list[_Entry] = []
    for one in content["images"]:
        number, licence = _id(one["id"]), licences.get(_id(one.get("license")), "")
        found.append(_Entry(path, str(one["file_name"]), {"licence": licence} | one))
        if ids[number] > 1:
            found[-1].doubt = f"{ids[number]} images of {path.name} have the id {number}"
    entries = dict(zip((_id(one["id"]) for one in content["images"]), found, strict=True))
    astray = 0
    for one in content["annotations"]:
        number, group = _id(one.get("image_id")), _id(one.get("category_id"))
        known = classes.get(group)
        if known is not None and not is_class(known, mask_class):
            continue
        if number not in entries:
            astray += 1
            detail = f"annotation {one.get('id')} is of image {number or 'nothing'}, which it does not list"
            yield SkippedFile(path, "annotation without an image", detail)
        elif known is None:
            detail = f"annotation {one.get('id')} is of category {group or 'nothing'}, which it does not list"
            yield SkippedFile(path, "annotation without a category", detail)
            entries[number].doubt = detail
        else:
            entries[number].annotations.append(one)
    for entry in found:
        if astray and not entry.annotations:
            entry.doubt = (
                entry.doubt or f"it has no annotation, while {astray} in {path.name} are of no image"
            )
    return found


def _coco_record(
    image: Path, image_id: str, entries: Sequence[_Entry], table: Table | None, mask_class: str
) -> Record:
    doubt = next((one.doubt for one in entries if one.doubt), "")
    if doubt:
        raise SkippedFile(image, "annotation unclear", doubt)
    if len({one.path for one in entries}) < len(entries):
        raise SkippedFile(image, "image_id twice", f"{len(entries)} images of one file have its file_name")
    rules, known = [], {}
    for entry in entries:
        known |= {key: value for key, value in entry.values.items() if value not in (None, "")}
        shapes: list[Shape] = []
        try:
            for one in entry.annotations:
                shapes += coco_shapes(one["segmentation"])
        except (KeyError, TypeError, ValueError, IndexError) as error:
            detail = f"its segmentation in {entry.path.name} is broken: {error!r}"
            raise SkippedFile(image, "broken JSON", detail) from None
        size = whole(entry.values.get("width")), whole(entry.values.get("height"))
        if shapes:
            rules.append(partial(unite, entry.path, shapes, size))
    row = metadata.row(image, image_id, known | _listed(image, image_id, table, _needs_row(table, known)))
    rule = partial(_drawn, rules) if rules else None
    return Record(image, rule, row, _why_no_mask(row["view"], mask_class))


def _id(value: Any) -> str:
    """An id as text: 7, 7.0 and "7" are one."""
    text = "" if value is None else str(value).strip()
    return text[:-2] if re.fullmatch(r"\d+\.0", text) else text


def _drawn(drawings: Sequence[Drawing], grey: np.ndarray) -> tuple[np.ndarray, str]:
    """A mask out of outlines or runs: a `MaskRule`."""
    masks, remarks = zip(*(drawing(*grey.shape) for drawing in drawings), strict=True)
    return np.logical_or.reduce(masks), next(filter(None, remarks), "")


def _darwin_names(content: Mapping[str, Any]) -> list[str]:
    """The paths under which the image may lie: the item's own first, then those of its first slot's file."""
    if "item" in content:  # 2.0
        item = content["item"]
        slot = (item.get("slots") or [{}])[0]
        files = [one["file_name"] for one in slot.get("source_files") or [] if one.get("file_name")]
        # With several slots an item is a folder of its own.
        names = [item["name"], *files, *(f"{item['name']}/{file}" for file in files)]
    else:
        item = content["image"]
        names = [item[key] for key in ("filename", "original_filename") if item.get(key)]
        names[0]  # IndexError: it names no image
    inside = str(item.get("path") or "/").strip("/")
    return [f"{inside}/{name}" if inside else str(name) for name in names]


def _darwin_size(content: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """(the image's declared sizes, the name of its first slot, "" for 1.0)."""
    if "item" in content:
        slot = (content["item"].get("slots") or [{}])[0]
        return {key: slot.get(key) for key in ("width", "height")}, str(slot.get("slot_name", "0"))
    keys = ("width", "height", "original_width", "original_height")
    return {key: content["image"].get(key) for key in keys}, ""


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
            valued.setdefault(re.sub(r"[\W_]+", "", key.lower()), value.strip())
    plain = {name.lower() for name in names} | {value.lower() for value in valued.values()}
    return {
        "age": valued.get("age", ""),
        "sex": valued.get("sex", ""),
        "patient_id": valued.get("patientid", ""),
        "view": valued.get("view", "").replace("_", " "),
        "finding": next((ours for theirs, ours in DARWIN_FINDINGS.items() if theirs.lower() in plain), ""),
        "ct": "ct" in plain,
    }


def _darwin_shapes(path: Path, content: Mapping[str, Any], mask_class: str, slot: str) -> list[Shape]:
    """The shapes of the mask class: polygons (1.0, 2.0), complex polygons (1.0) and raster masks (2.0).

    Raises:
        LeftOut: an annotation of the class is in none of these forms, or belongs to no slot or layer.
    """
    slots = {str(one.get("slot_name", "0")) for one in content.get("item", {}).get("slots") or []} | {slot}
    here = [one for one in content["annotations"] if slot in (one.get("slot_names") or [slot])]
    ours = [one for one in content["annotations"] if is_class(one["name"], mask_class) and "tag" not in one]
    layers = [one["raster_layer"] for one in here if "raster_layer" in one]
    labelled = {number for layer in layers for number in layer["mask_annotation_ids_mapping"]}
    shapes: list[Shape] = []
    for one in ours:
        if not slots & set(one.get("slot_names") or [slot]):
            raise SkippedFile(
                path, "annotation unclear", f"its {one['name']} lies on a slot that it does not have"
            )
        if slot not in (one.get("slot_names") or [slot]):
            continue
        outlines = _darwin_outlines(one)
        if any(len(outline) > 2 for outline in outlines):
            shapes.append(partial(fill_even_odd, outlines))
        elif "mask" not in one or one.get("id") not in labelled:
            form = next((key for key in one if key in OTHER_FORMS), "an outline without points")
            detail = f"its {one['name']} is given as {form}, which encloses no area; export polygons or masks"
            raise SkippedFile(path, "annotation unclear", detail)
    for layer in layers:
        labels = layer["mask_annotation_ids_mapping"]
        wanted = [labels[mask["id"]] for mask in ours if mask.get("id") in labels]
        pairs = np.asarray(layer["dense_rle"], np.int64).reshape(-1, 2)  # label, run length; row by row
        if wanted:
            shapes.append(partial(from_runs, np.isin(pairs[:, 0], wanted), pairs[:, 1], "C"))
    return shapes


def _darwin_outlines(annotation: Mapping[str, Any]) -> list[np.ndarray]:
    polygon = annotation.get("polygon") or {}
    outlines = list(polygon.get("paths") or []) + list(polygon.get("additional_paths") or [])
    outlines += [polygon["path"]] if polygon.get("path") else []
    outlines += list((annotation.get("complex_polygon") or {}).get("path") or [])
    return [points([[point["x"], point["y"]] for point in outline]) for outline in outlines if outline]


def _why_no_mask(view: str, mask_class: str) -> str:
    lateral = view.lower() in {"l", "ll", "rl", "lat"} or "lateral" in view.lower()
    return "lateral view" if lateral else f"no {mask_class} mask"


def words(name: str) -> list[str]:
    """The words of a class's name, in lower case."""
    return re.findall(r"[^\W_]+", re.sub(r"([a-z])([A-Z])", r"\1 \2", name).lower())


def is_class(name: str, mask_class: str) -> bool:
    """True for names of the mask class: "Lung", "left lung" and "Lungs" are lung, "Lung opacity" is not."""
    found = [word for word in words(name) if word not in {"left", "right", "l", "r"}]
    wanted = words(mask_class)
    return found in (wanted, [*wanted[:-1], wanted[-1] + "s"])

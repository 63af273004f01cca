"""Layouts of a source: folder, Darwin JSON 1.0 and 2.0, COCO. Each has a reader that yields plain `Record`s.

An annotation lies on the image that it names, at the size that it was drawn at, or it is left out with its
reason: never on one that only has a similar name. One that names no image or class of its file may be the
lung of any of them, so it makes no image one "without lungs".
"""

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fmfl.errors import UserError, first_few
from fmfl.sources import metadata
from fmfl.sources.files import ImageIndex, SkippedFile, annotation_files, image_root, is_folder, read_json
from fmfl.sources.mask_files import labels_of, organ_of, read_mask
from fmfl.sources.metadata import Table, plain, whole, without_fraction, words
from fmfl.sources.outlines import Shape, coco_shapes, fill_even_odd, from_runs, points, unite

#: [H, W] uint8 image -> [H, W] bool mask, and a remark on how it was read, "" without one.
MaskRule = Callable[[np.ndarray], tuple[np.ndarray, str]]

#: Ends of a mask's name behind that of its image, as in `x_mask.png` and `x-seg.png`.
MASK_ENDING = re.compile(r"[_-](masks?|seg|segmentation|labels?|gt)$", re.IGNORECASE)
#: If an image has several of V7's tags, the first match here is its finding (specific before general).
DARWIN_FINDINGS = {
    "COVID-19": "covid-19",
    "Viral Pneumonia": "viral pneumonia",
    "Bacterial Pneumonia": "bacterial pneumonia",
    "Fungal Pneumonia": "fungal pneumonia",
    "No Pneumonia (healthy)": "normal",
}
#: Forms of a Darwin annotation that are not read as areas.
OTHER_FORMS = ("ellipse", "line", "keypoint", "skeleton", "cuboid", "frames", "mask", "bounding_box")
#: Mask files that are looked at for their labels, where none has the one that is named.
MASKS_TO_LOOK_AT = 20
#: Errors of JSON that has another structure than its format.
NOT_AS_EXPECTED = (KeyError, TypeError, AttributeError)


class Record(NamedTuple):
    """One image of a source, before anything is decoded."""

    image: Path
    mask: MaskRule | None  # None: nothing of the mask class is annotated
    row: dict[str, Any]  # from `metadata.row`
    without_mask: str  # the reason to give if there is no mask, or an empty one


Reader = Callable[[Path, str], Iterator[Record | SkippedFile]]


def reader(folder: Path) -> Reader:
    """Return the reader of a folder. Mask files win over annotations: they need no interpretation."""
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
        raise UserError(f"{broken.file}: {broken.detail}; mend it, no other file tells the folder's layout")
    raise UserError(
        f"{folder}: in no known layout: looked for images/ with masks/, for Darwin JSON files in annotations/"
        " and for a COCO instances file in annotations/ or at the top; arrange it in one of these"
    )


def read_folder(folder: Path, mask_class: str) -> Iterator[Record | SkippedFile]:
    """Read images/, masks/ and an optional metadata.csv.

    With a metadata.csv, an image that it does not list is left out: without its patient_id it might land on
    both sides of a split.
    """
    images, masks = ImageIndex(folder / "images"), ImageIndex(folder / "masks")
    organ = organ_of(mask_class)
    yield from images.others
    yield from masks.others
    table = yield from metadata.read(folder, images)
    masks_of = yield from _masks_by_image(images, masks)
    for image in images.files:
        image_id = images.key(image)
        try:
            row = metadata.row(image, image_id, _listed(image, image_id, table, required=True))
        except SkippedFile as reason:
            yield reason
            continue
        paths, without_mask = masks_of[image_id], _why_no_mask(row["view"], organ.name)
        if len(paths) > 1:
            names = " and ".join(path.name for path in paths)
            yield SkippedFile(image, "several masks", f"which is its mask is unknown: {names}")
        elif not paths and without_mask == _why_no_mask("", organ.name):
            yield SkippedFile(image, "missing mask", f"there is no mask file masks/{image_id}.*")
        else:
            rule = partial(read_mask, paths[0], organ=organ) if paths else None
            yield Record(image, rule, row, without_mask)


def _masks_by_image(
    images: ImageIndex, masks: ImageIndex
) -> Generator[SkippedFile, None, dict[str, list[Path]]]:
    """Yield the masks without an image, and return the others by the id of their image."""
    named = {images.key(image) for image in images.files}
    masks_of: dict[str, list[Path]] = defaultdict(list)
    for path in masks.files:
        key = masks.key(path)
        if key not in named and (image := MASK_ENDING.sub("", key)) in named:
            key = image
        if key in named:
            masks_of[key].append(path)
        else:
            detail = f"there is no image file images/{key}.*; name a mask as its image, or with _mask behind"
            yield SkippedFile(path, "mask without an image", detail)
    return masks_of


def _listed(image: Path, image_id: str, table: Table | None, required: bool) -> dict[str, str]:
    """Return what metadata.csv says of an image; raise a SkippedFile where it should but does not."""
    if table is None:
        return {}
    if image_id in table.refused:
        raise SkippedFile(image, "image_id twice", "lines of metadata.csv say different things of it")
    if image_id not in table.rows and required:
        raise SkippedFile(image, "not in metadata.csv", f"metadata.csv has no row with image_id {image_id}")
    return table.rows.get(image_id, {})


def _why_no_mask(view: str, mask_class: str) -> str:
    lateral = view.lower() in ("l", "ll", "rl", "lat") or "lateral" in view.lower()
    return "lateral view" if lateral else f"no {mask_class} mask"


def is_class(name: str, mask_class: str) -> bool:
    """Return True for the mask class: "Lung", "left lung" and "Lungs" are lung, "Lung opacity" is not."""
    rest, expected = _without_side(name), words(mask_class)
    return rest in (expected, [*expected[:-1], expected[-1] + "s"])


def _without_side(name: str) -> list[str]:
    return [word for word in words(name) if word not in {"left", "right", "l", "r"}]


# What to name instead, where nothing of the mask class is there.


def which_classes(folder: Path, mask_class: str) -> str:
    """Return a clause that names the classes or the labels that a folder has; "" where it has none."""
    organ = organ_of(mask_class)
    if reader(folder) is not read_folder:
        classes = _annotated_classes(folder)
        return f"; annotated are {first_few(classes, 12)}: name one as mask_class" if classes else ""
    masks = ImageIndex(folder / "masks").files[:MASKS_TO_LOOK_AT] if organ.labels else []
    labels = [str(label) for label in sorted({label for path in masks for label in labels_of(path)})]
    if not labels:
        return ""
    example = f"mask_class={organ.name}:{labels[0]}"
    return f"; labels of its mask files are {first_few(labels, 12)}: name them as in {example}"


def _annotated_classes(folder: Path) -> list[str]:
    """Return the classes in annotation files, each as a mask class would name it; tags are none."""
    names: set[str] = set()
    for path in annotation_files(folder):
        with suppress(SkippedFile, *NOT_AS_EXPECTED):
            content = read_json(path)
            groups = content.get("categories") or content["annotations"]
            names |= {" ".join(_without_side(one["name"])) for one in groups if "tag" not in one}
    return sorted(names - {""})


# Annotation files, Darwin and COCO.


@dataclass
class _Entry:
    """One image as one annotation file describes it."""

    path: Path  # the annotation file
    names: list[str]  # paths under which the image may lie, the likeliest first
    values: dict[str, Any] = field(default_factory=dict)  # see `metadata.row`; `ct` is True for a CT slice
    shapes: list[Shape] = field(default_factory=list)  # of the mask class
    fault: SkippedFile | None = None  # of the annotation file
    doubt: tuple[str, str] | None = None  # reason and detail why the image cannot be used


def _read_annotated(
    folder: Path,
    mask_class: str,
    read_file: Callable[[Path, str], list[_Entry | SkippedFile]],
    one_file_an_image: bool,
) -> Iterator[Record | SkippedFile]:
    """Lay each entry on its image; without `one_file_an_image` the masks of several files are united."""
    if organ_of(mask_class).labels:
        raise UserError(
            f"{folder}: its annotation files name their classes, and mask_class={mask_class} names a label: "
            "give the class's name alone"
        )
    images = ImageIndex(image_root(folder))
    yield from images.others
    table = yield from metadata.read(folder, images)
    results = [result for path in annotation_files(folder) for result in read_file(path, mask_class)]
    yield from (result for result in results if isinstance(result, SkippedFile))
    entries = [result for result in results if isinstance(result, _Entry)]
    matches = images.match({number: entry.names for number, entry in enumerate(entries)})
    entries_of: dict[Path, list[_Entry]] = defaultdict(list)
    for number, entry in enumerate(entries):
        if isinstance(image := matches[number], Path):
            entries_of[image].append(entry)
        else:
            detail = f"its image {entry.names[0]} {image}"
            yield entry.fault or SkippedFile(entry.path, "missing image", detail)
    for image, several in entries_of.items():
        if one_file_an_image and len(several) > 1:
            detail = f"{len(several)} annotation files are of {image.name}"
            yield from (one.fault or SkippedFile(one.path, "image_id twice", detail) for one in several)
            continue
        try:
            yield _record(image, images.key(image), several, table, mask_class)
        except SkippedFile as reason:
            yield reason
    for image in images.files:
        if image not in entries_of:
            yield SkippedFile(image, "not annotated", "no annotation file is of it", defect=False)


def _record(
    image: Path, image_id: str, entries: Sequence[_Entry], table: Table | None, mask_class: str
) -> Record:
    known, drawings = {}, []
    for entry in entries:
        if entry.fault:
            raise entry.fault
        if entry.doubt:
            raise SkippedFile(image, *entry.doubt)
        known |= {key: value for key, value in entry.values.items() if value not in (None, "")}
        size = whole(entry.values.get("width")), whole(entry.values.get("height"))
        if entry.shapes:
            drawings.append(partial(unite, entry.path, entry.shapes, size))
    if len({entry.path for entry in entries}) < len(entries):
        raise SkippedFile(image, "image_id twice", f"{len(entries)} images of one file have its file_name")
    # Where only metadata.csv knows the patients, an image without a row may be anyone's.
    required = table is not None and table.has_patients and "patient_id" not in known
    row = metadata.row(image, image_id, known | _listed(image, image_id, table, required))
    rule = partial(_draw, drawings) if drawings else None
    reason = "CT slice" if known.get("is a CT slice") else _why_no_mask(row["view"], mask_class)
    return Record(image, rule, row, reason)


def _draw(drawings: Sequence[Callable], grey: np.ndarray) -> tuple[np.ndarray, str]:
    """Unite masks out of outlines or runs: a `MaskRule`."""
    masks, remarks = zip(*(drawing(*grey.shape) for drawing in drawings), strict=True)
    return np.logical_or.reduce(masks), next(filter(None, remarks), "")


def read_darwin(folder: Path, mask_class: str) -> Iterator[Record | SkippedFile]:
    """Read V7's export, Darwin JSON 1.0 or 2.0, one file an image.

    Tags carry the table: `Age:`, `Sex/`, `PatientID:`, `View/` and the findings; 2.0 may hold the same as
    properties. All polygons of the mask class are united; any other class, "Ignore" among them, leaves the
    mask as it is. Of a 2.0 item with several slots the first is read.

    Reference: docs.v7labs.com/reference/darwin-json and /reference/legacy-darwin-json-10.
    """
    return _read_annotated(folder, mask_class, _darwin_file, one_file_an_image=True)


def _darwin_file(path: Path, mask_class: str) -> list[_Entry]:
    entry = _Entry(path, [path.stem])  # a broken file is at least that image's
    try:
        content = read_json(path)
        entry.names, sizes, slot = _darwin_item(content)
        entry.values = _darwin_tags(content) | sizes
        entry.shapes = _darwin_shapes(path, content, mask_class, slot)
    except SkippedFile as reason:
        entry.fault = reason
    except (*NOT_AS_EXPECTED, ValueError, IndexError) as error:
        entry.fault = SkippedFile(path, "broken JSON", f"not Darwin JSON as V7 writes it: {error!r}")
    return [entry]


def _darwin_item(content: Mapping[str, Any]) -> tuple[list[str], dict[str, Any], str]:
    """Return the paths under which the image may lie, its declared sizes, and its slot's name, "" for 1.0."""
    if "item" in content:  # 2.0
        item = content["item"]
        image = (item.get("slots") or [{}])[0]
        slot = str(image.get("slot_name", "0"))
        files = [one["file_name"] for one in image.get("source_files") or [] if one.get("file_name")]
        # With several slots an item is a folder of its own.
        names = [item["name"], *files, *(f"{item['name']}/{file}" for file in files)]
    else:
        item = image = content["image"]
        slot = ""
        names = [image[key] for key in ("filename", "original_filename") if image.get(key)]
        names[0]  # IndexError: it names no image
    inside = str(item.get("path") or "/").strip("/")
    names = [f"{inside}/{name}" if inside else str(name) for name in names]
    sizes = ("width", "height", "original_width", "original_height")
    return names, {key: image.get(key) for key in sizes}, slot


def _darwin_tags(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the image's tags say, under our column names; `ct` is True for a CT slice."""
    tags = [one for one in content["annotations"] if "tag" in one]
    names = [tag["name"] for tag in tags]
    for holder in (content, *tags):
        for one in holder.get("properties") or []:
            if one.get("value") is not None:
                names.append(f"{one['name']}:{one['value']}")
    valued = {}
    for name in names:
        key, mark, value = re.match(r"([^:/]*)([:/]?)(.*)", name, re.DOTALL).groups()
        if mark:
            valued.setdefault(plain(key), value.strip())
    texts = {name.lower() for name in names} | {value.lower() for value in valued.values()}
    return {
        "age": valued.get("age", ""),
        "sex": valued.get("sex", ""),
        "patient_id": valued.get("patientid", ""),
        "view": valued.get("view", "").replace("_", " "),
        "finding": next((ours for theirs, ours in DARWIN_FINDINGS.items() if theirs.lower() in texts), ""),
        "is a CT slice": "ct" in texts,
    }


def _darwin_shapes(path: Path, content: Mapping[str, Any], mask_class: str, slot: str) -> list[Shape]:
    """Return the shapes of the mask class: polygons (1.0, 2.0), complex polygons (1.0), raster masks (2.0).

    Raises:
        SkippedFile: an annotation of the class is in none of these forms, or belongs to no slot or layer.
    """
    slots = {str(one.get("slot_name", "0")) for one in content.get("item", {}).get("slots") or []} | {slot}
    areas = [(one, one.get("slot_names") or [slot]) for one in content["annotations"] if "tag" not in one]
    layers = [one["raster_layer"] for one, on in areas if slot in on and "raster_layer" in one]
    ours = [(one, on) for one, on in areas if is_class(one["name"], mask_class)]
    labelled = {number for layer in layers for number in layer["mask_annotation_ids_mapping"]}
    unclear = partial(SkippedFile, path, "annotation unclear")
    shapes: list[Shape] = []
    for one, on in ours:
        if not slots & set(on):
            raise unclear(f"its {one['name']} lies on a slot that it does not have")
        if slot not in on:
            continue
        outlines = _darwin_outlines(one)
        if any(len(outline) > 2 for outline in outlines):
            shapes.append(partial(fill_even_odd, outlines))
        elif "mask" not in one or one.get("id") not in labelled:
            given = f"its {one['name']} is given as "
            given += next((key for key in one if key in OTHER_FORMS), "an outline without points")
            raise unclear(f"{given}, which encloses no area; export polygons or masks")
    for layer in layers:
        labels = layer["mask_annotation_ids_mapping"]
        chosen = [labels[mask["id"]] for mask, _ in ours if mask.get("id") in labels]
        pairs = np.asarray(layer["dense_rle"], np.int64).reshape(-1, 2)  # label, run length; row by row
        if chosen:
            shapes.append(partial(from_runs, np.isin(pairs[:, 0], chosen), pairs[:, 1], "C"))
    return shapes


def _darwin_outlines(annotation: Mapping[str, Any]) -> list[np.ndarray]:
    polygon = annotation.get("polygon") or {}
    outlines = list(polygon.get("paths") or []) + list(polygon.get("additional_paths") or [])
    outlines += [polygon["path"]] if polygon.get("path") else []
    outlines += list((annotation.get("complex_polygon") or {}).get("path") or [])
    return [points([[point["x"], point["y"]] for point in outline]) for outline in outlines if outline]


def read_coco(folder: Path, mask_class: str) -> Iterator[Record | SkippedFile]:
    """Read COCO instances files: an image's annotations of the mask class are united, over all files.

    COCO knows no patients: a metadata.csv, or columns of the same names among an image's own entries, say
    what is known of them.

    Reference: cocodataset.org/#format-data and the mask API of cocoapi.
    """
    return _read_annotated(folder, mask_class, _coco_file, one_file_an_image=False)


def _coco_file(path: Path, mask_class: str) -> list[_Entry | SkippedFile]:
    try:
        content = read_json(path)
        if not isinstance(content, dict) or not {"images", "annotations"} <= content.keys():
            return []
        entries = _coco_images(path, content)
        astray = _coco_annotations(path, content, mask_class, entries)
    except SkippedFile as reason:
        raise UserError(f"{path}: {reason.detail}; export it again") from None
    except NOT_AS_EXPECTED as error:
        raise UserError(f"{path}: not a COCO instances file: {error!r}; export it again") from None
    return [*astray, *entries]


def _coco_images(path: Path, content: Mapping[str, Any]) -> list[_Entry]:
    licences = {_id(one["id"]): one["name"] for one in content.get("licenses") or []}
    counts = Counter(_id(one["id"]) for one in content["images"])
    entries = []
    for one in content["images"]:
        number, licence = _id(one["id"]), licences.get(_id(one.get("license")), "")
        entry = _Entry(path, [str(one["file_name"])], {"licence": licence} | one)
        if counts[number] > 1:
            detail = f"{counts[number]} images of {path.name} have the id {number}"
            entry.doubt = ("annotation unclear", detail)
        entries.append(entry)
    return entries


def _coco_annotations(
    path: Path, content: Mapping[str, Any], mask_class: str, entries: list[_Entry]
) -> list[SkippedFile]:
    """Add each annotation of the mask class to its entry, and return those that point nowhere."""
    classes = {_id(one["id"]): one["name"] for one in content.get("categories") or []}
    if len(classes) < len(content.get("categories") or []):
        raise UserError(f"{path}: two categories have one id; export it again")
    entry_of = {_id(one["id"]): entry for one, entry in zip(content["images"], entries, strict=True)}
    astray = []
    for one in content["annotations"]:
        number, group = _id(one.get("image_id")), _id(one.get("category_id"))
        if group in classes and not is_class(classes[group], mask_class):
            continue
        is_of = f"annotation {one.get('id')} is of"
        if number not in entry_of:
            detail = f"{is_of} image {number or 'nothing'}, which it does not list"
            astray.append(SkippedFile(path, "annotation without an image", detail))
        elif group not in classes:
            detail = f"{is_of} category {group or 'nothing'}, which it does not list"
            astray.append(SkippedFile(path, "annotation without a category", detail))
            entry_of[number].doubt = ("annotation unclear", detail)
        else:
            _add_coco_shapes(entry_of[number], one)
    lost = sum(reason.reason == "annotation without an image" for reason in astray)
    for entry in entries:
        if lost and not entry.shapes and not entry.doubt:
            detail = f"it has no annotation, while {lost} in {path.name} are of no image"
            entry.doubt = ("annotation unclear", detail)
    return astray


def _add_coco_shapes(entry: _Entry, annotation: Mapping[str, Any]) -> None:
    try:
        entry.shapes += coco_shapes(annotation["segmentation"])
    except (*NOT_AS_EXPECTED, ValueError, IndexError) as error:
        entry.doubt = ("broken JSON", f"its segmentation in {entry.path.name} is broken: {error!r}")


def _id(value: Any) -> str:
    """Return an id as text: 7, 7.0 and "7" are one."""
    return "" if value is None else without_fraction(str(value).strip())

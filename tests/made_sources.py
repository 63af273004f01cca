"""Small sources whose truth is known: pictures with two lungs, in each layout."""

import json

import numpy as np
import pytest
from PIL import Image

from fmfl import data
from fmfl.sources.outlines import fill_even_odd

SIZE = 32

LEFT = [[4, 6], [14, 6], [14, 26], [4, 26]]  # x, y: two lungs on a 40 x 32 picture

RIGHT = [[22, 6], [34, 4], [36, 28], [22, 24]]

HOLE = [[7, 10], [11, 10], [11, 16], [7, 16]]


def picture(seed, height=32, width=40):
    return np.random.default_rng(seed).integers(0, 256, (height, width), dtype=np.uint8)


def save(path, array, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)
    return path


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text if isinstance(text, str) else json.dumps(text), encoding="utf-8")
    return path


def lungs(*outlines, height=32, width=40):
    filled = [fill_even_odd([np.array(one, float)], height, width) for one in outlines]
    return np.logical_or.reduce(filled)


def load(*sources, **options):
    options = {"size": SIZE, "cache": None, "progress": False} | options
    return data.load([str(source) for source in sources], **options)


def make_folder(folder, names=("a", "b", "c"), metadata=None):
    for seed, name in enumerate(names):
        save(folder / "images" / f"{name}.png", picture(seed))
        save(folder / "masks" / f"{name}.png", lungs(LEFT, RIGHT))
    if metadata is not None:
        write(folder / "metadata.csv", metadata)
    return folder


def reasons(cohort):
    return dict(zip(cohort.left_out["file"], cohort.left_out["reason"], strict=True))


def points(outline):
    return [{"x": x, "y": y} for x, y in outline]


def make_darwin(folder, version, tags=("Age:55", "Sex/M", "PatientID:12", "View/AP_Supine"), extra=()):
    """One picture with two lungs, a hole in the left one, and a device to ignore."""
    save(folder / "images" / "one.png", picture(5))
    ignored = [[0, 0], [30, 0], [30, 30], [0, 30]]
    if version == 1:
        annotations = [
            {"name": "Lung", "complex_polygon": {"path": [points(LEFT), points(HOLE)]}},
            {"name": "Lung", "polygon": {"path": points(RIGHT)}},
            {"name": "Ignore", "polygon": {"path": points(ignored)}},
        ]
        annotations += [{"name": tag, "tag": {}} for tag in tags]
        image = {"filename": "one.png", "original_filename": "x.jpeg", "width": 40, "height": 32}
        content = {"dataset": "d", "image": image, "annotations": [*annotations, *extra]}
    else:
        here = {"slot_names": ["0"], "properties": []}
        annotations = [
            here | {"id": "1", "name": "Lung", "polygon": {"paths": [points(LEFT), points(HOLE)]}},
            here | {"id": "2", "name": "Lung", "polygon": {"paths": [points(RIGHT)]}},
            here | {"id": "3", "name": "Ignore", "polygon": {"paths": [points(ignored)]}},
            {"id": "4", "name": "Lung", "slot_names": ["1"], "polygon": {"paths": [points(ignored)]}},
        ]
        annotations += [here | {"id": tag, "name": tag, "tag": {}} for tag in tags]
        files = [{"file_name": "one.png", "url": "u"}]
        slot = {"type": "image", "slot_name": "0", "width": 40, "height": 32, "source_files": files}
        item = {"name": "one", "path": "/", "slots": [slot, {"slot_name": "1", "width": 9, "height": 9}]}
        content = {"version": "2.0", "item": item, "annotations": [*annotations, *extra]}
    write(folder / "annotations" / "one.json", content)
    return folder


def compress(counts):
    """COCO's RLE text, written the other way round than the decoder reads it."""
    text = ""
    for i, count in enumerate(counts):
        rest = count - (counts[i - 2] if i > 2 else 0)
        while True:
            bits, rest = rest & 31, rest >> 5
            done = rest == (-1 if bits & 16 else 0)
            text += chr(48 + bits + (0 if done else 32))
            if done:
                break
    return text


def runs_of(mask):
    """Column by column, zeros first."""
    flat = mask.T.ravel().astype(int)
    starts = np.flatnonzero(np.diff(flat, prepend=-1))
    counts = np.diff(starts, append=flat.size).tolist()
    return counts if flat[0] == 0 else [0, *counts]


def make_coco(folder, segmentations, place="annotations/instances_all.json", **image):
    save(folder / "images" / "one.png", picture(5))
    categories = [{"id": 3, "name": "left lung"}, {"id": 4, "name": "Right_Lung"}, {"id": 5, "name": "heart"}]
    annotations = [
        {"id": i, "image_id": 9, "category_id": number, "segmentation": segmentation}
        for i, (number, segmentation) in enumerate(segmentations)
    ]
    images = [{"id": 9, "file_name": "one.png", "width": 40, "height": 32, "license": 2} | image]
    licences = [{"id": 2, "name": "CC BY 4.0"}]
    content = {"images": images, "categories": categories, "licenses": licences, "annotations": annotations}
    write(folder / place, content)
    return folder


def make_dicom(path, values, photometric, **header):
    pydicom = pytest.importorskip("pydicom")
    from pydicom.dataset import FileDataset, FileMetaDataset

    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.1.1"
    meta.MediaStorageSOPInstanceUID = pydicom.uid.generate_uid()
    meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    dataset = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    dataset.SOPClassUID, dataset.SOPInstanceUID = (
        meta.MediaStorageSOPClassUID,
        meta.MediaStorageSOPInstanceUID,
    )
    dataset.Rows, dataset.Columns = values.shape
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, photometric
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = 16, 12, 11, 0
    dataset.PixelData = values.astype(np.uint16).tobytes()
    for key, value in header.items():
        setattr(dataset, key, value)
    path.parent.mkdir(parents=True, exist_ok=True)
    dataset.save_as(path, enforce_file_format=True)
    return path

import json
import os
import shutil
import sys
import warnings

import numpy as np
import pytest
import torch
from matplotlib.path import Path as Outline
from PIL import Image

from fmfl import data
from fmfl.errors import UserError

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
    filled = [data.fill_even_odd([np.array(one, float)], height, width) for one in outlines]
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


# ------------------------------------------------------------------------------------------ the cohort


def test_a_cohort_holds_images_masks_and_a_table_of_the_promised_types(tmp_path):
    cohort = load(make_folder(tmp_path / "clinic"))

    assert cohort.images.shape == cohort.masks.shape == (3, 1, SIZE, SIZE)
    assert cohort.images.dtype == cohort.masks.dtype == torch.uint8
    assert cohort.masks.unique().tolist() == [0, 1]
    assert tuple(cohort.table.columns) == data.COLUMNS
    assert cohort.table.index.tolist() == [0, 1, 2]
    assert (len(cohort), cohort.size, cohort.device) == (3, SIZE, torch.device("cpu"))
    moved, beside = cohort.to("meta"), cohort.to("meta", resident=False)
    assert (moved.device.type, moved.images.device.type, moved.masks.device.type) == ("meta",) * 3
    assert (beside.device.type, beside.images.device.type, beside.masks.device.type) == ("meta", "cpu", "cpu")
    expected = np.asarray(Image.fromarray(picture(1)).resize((SIZE, SIZE), Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(cohort.images[1, 0], expected)
    assert cohort.masks[0].float().mean().item() == pytest.approx(lungs(LEFT, RIGHT).mean(), abs=0.01)


def test_patients_and_summary_count_what_was_made(tmp_path):
    metadata = "image_id,patient_id,age,view\na,P1,30,PA\nb,P1,,AP\nc,P2,40,AP\nd,P3,50,Lateral\n"
    folder = make_folder(tmp_path / "clinic", "abcd", metadata)
    (folder / "masks" / "d.png").unlink()
    cohort = load(folder)

    assert cohort.patients(torch.tensor([0, 1])) == {"clinic:P1"}
    assert cohort.patients([2, 0]) == {"clinic:P1", "clinic:P2"}
    assert cohort.patients(torch.tensor([], dtype=torch.int64)) == set()
    expected = {"images": 3, "patients": 2, "ages known": 2, "left out: lateral view": 1}
    assert cohort.summary().loc["clinic"].to_dict() == expected


def test_a_patient_is_the_same_where_site_and_patient_id_agree(tmp_path):
    """Two downloads of one hospital share their patients; two hospitals that both say "P1" do not."""
    first = make_folder(tmp_path / "first", "a", "image_id,patient_id,site\na,P1,north\n")
    again = make_folder(tmp_path / "again", "b", "image_id,patient_id,site\nb,P1,north\n")
    other = make_folder(tmp_path / "other", "c", "image_id,patient_id\nc,P1\n")
    cohort = load(first, again, other)

    assert cohort.table["patient_id"].tolist() == ["north:P1", "north:P1", "other:P1"]
    assert cohort.table["source"].tolist() == ["first", "again", "other"]


def test_sources_that_share_names_keep_their_images_and_patients_apart(tmp_path):
    folders = [make_folder(tmp_path / site / "train", "a") for site in ("north", "south")]
    table = load(*folders).table

    assert table["image_id"].tolist() == ["north/train/a", "south/train/a"]
    assert table["patient_id"].tolist() == ["north/train:a", "south/train:a"]


def test_the_synthetic_source_joins_a_folder_in_one_text(tmp_path):
    folder = make_folder(tmp_path / "clinic")
    cohort = load("phantom", folder, num_phantoms=2, size=16)
    joined = data.load(f"phantom, {folder}", num_phantoms=2, size=16, cache=None, progress=False)

    assert joined.table["source"].tolist() == ["phantom"] * 2 + ["clinic"] * 3
    assert joined.images.shape == (5, 1, 16, 16)
    assert joined.fingerprint == cohort.fingerprint
    assert joined.table["age"].notna().sum() == 2


# --------------------------------------------------------------------------------------- the fingerprint


def test_the_fingerprint_is_that_of_the_content_not_of_the_path_or_the_times(tmp_path):
    first = make_folder(tmp_path / "here")
    second = shutil.copytree(first, tmp_path / "elsewhere" / "renamed")
    os.utime(second / "images" / "a.png", (1, 1))

    assert load(first).fingerprint == load(second).fingerprint


@pytest.mark.parametrize("part", ["pixels", "mask", "table"])
def test_the_fingerprint_changes_with(part, tmp_path):
    folder = make_folder(tmp_path / "clinic")
    before = load(folder).fingerprint
    if part == "pixels":
        save(folder / "images" / "a.png", picture(99))
    elif part == "mask":
        save(folder / "masks" / "a.png", lungs(LEFT))
    else:
        write(folder / "metadata.csv", "image_id,age\na,50\nb,\nc,\n")
    assert load(folder).fingerprint != before


# ------------------------------------------------------------------------------------------ the layouts


def test_folder_layout_reads_masks_of_another_suffix_and_the_table(tmp_path):
    folder = tmp_path / "clinic"
    save(folder / "images" / "x.jpg", picture(0))
    save(folder / "images" / "deep" / "y.png", picture(1))
    save(folder / "masks" / "x_mask.png", lungs(LEFT))
    save(folder / "masks" / "deep" / "y.tif", lungs(RIGHT).astype(np.uint8))
    header = "image_id,patient_id,age,age_source,sex,finding,site,view,original_width,original_height,licence"
    write(
        folder / "metadata.csv",
        f"{header}\nx.jpg,7,3,cohort,female,normal,S,AP,900,800,CC0\ndeep/y,8,,,,,,,,,\n",
    )
    table = load(folder).table

    assert table["image_id"].tolist() == ["deep/y", "x"]
    x = table.iloc[1].to_dict()
    assert x == {
        "image_id": "x",
        "patient_id": "S:7",
        "age": 3.0,
        "age_source": "cohort",
        "sex": "F",
        "finding": "normal",
        "site": "S",
        "view": "AP",
        "source": "clinic",
        "original_width": 900,
        "original_height": 800,
        "licence": "CC0",
    }
    y = table.iloc[0]
    assert np.isnan(y["age"])
    assert (y["age_source"], y["site"], y["original_width"], y["original_height"]) == ("", "clinic", 40, 32)


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


def test_darwin_1_and_2_give_the_same_cohort_with_the_tags_in_the_table(tmp_path):
    old, new = (load(make_darwin(tmp_path / f"v{version}", version)) for version in (1, 2))

    expected = data.resize((lungs(LEFT, RIGHT) & ~lungs(HOLE)).astype(np.uint8) * 255, SIZE) >= 128
    np.testing.assert_array_equal(old.masks[0, 0].bool(), expected)
    assert torch.equal(old.masks, new.masks)
    assert old.fingerprint == new.fingerprint
    row = old.table.iloc[0]
    assert (row["patient_id"], row["age"], row["age_source"]) == ("v1:12", 55.0, "record")
    assert (row["sex"], row["view"], row["finding"]) == ("M", "AP Supine", "")


def test_darwin_2_item_properties_say_the_same_as_tags(tmp_path):
    tagged = load(make_darwin(tmp_path / "tags", 2, ["Age:55", "Sex/M", "PatientID:12", "COVID-19"]))
    folder = make_darwin(tmp_path / "properties", 2, tags=())
    path = folder / "annotations" / "one.json"
    values = {"Age": "55", "Sex": "M", "PatientID": "12", "Finding": "COVID-19"}
    properties = [{"name": key, "value": value, "frame_index": None} for key, value in values.items()]
    write(path, json.loads(path.read_text()) | {"properties": properties})

    assert load(folder).fingerprint == tagged.fingerprint
    assert tagged.table["finding"].tolist() == ["covid-19"]


def test_darwin_2_raster_masks_are_read(tmp_path):
    """A raster layer is runs of (label, length) along the rows; other labels are other classes."""
    mask = lungs(RIGHT)
    flat = np.where(mask, 3, 0).ravel()
    flat[0] = 7
    starts = np.flatnonzero(np.diff(flat, prepend=-1))
    runs = np.stack([flat[starts], np.diff(starts, append=flat.size)], 1).ravel().tolist()
    layer = {"dense_rle": runs, "mask_annotation_ids_mapping": {"m": 3, "n": 7}, "total_pixels": flat.size}
    extra = [
        {"id": "m", "name": "Lung", "mask": {}, "slot_names": ["0"]},
        {"id": "n", "name": "Heart", "mask": {}, "slot_names": ["0"]},
        {"id": "r", "name": "__raster_layer__", "raster_layer": layer, "slot_names": ["0"]},
    ]
    folder = make_darwin(tmp_path / "d", 2, extra=extra)
    path = folder / "annotations" / "one.json"
    content = json.loads(path.read_text())
    content["annotations"] = [one for one in content["annotations"] if "polygon" not in one]
    write(path, content)

    expected = data.resize(mask.astype(np.uint8) * 255, SIZE) >= 128
    np.testing.assert_array_equal(load(folder).masks[0, 0].bool(), expected)


def test_darwin_images_without_lungs_are_counted_by_reason_and_are_no_defects(tmp_path):
    folder = make_darwin(tmp_path / "d", 1)
    for name, tags in {"ct": ["CT", "View/Axial"], "side": ["View/Lateral"], "bare": ["View/PA"]}.items():
        save(folder / "images" / f"{name}.png", picture(1))
        annotations = [{"name": tag, "tag": {}} for tag in tags]
        annotations += [{"name": "Lung opacity", "polygon": {"path": points(LEFT)}}]
        image = {"filename": f"{name}.png", "width": 40, "height": 32}
        write(folder / "annotations" / f"{name}.json", {"image": image, "annotations": annotations})
    save(folder / "images" / "new.png", picture(1))
    cohort = load(folder, strict=True)

    assert reasons(cohort) == {
        "images/ct.png": "CT slice",
        "images/side.png": "lateral view",
        "images/bare.png": "no lung mask",
        "images/new.png": "not annotated",
    }
    assert len(cohort) == 1


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


def test_coco_polygons_and_both_rle_forms_give_the_same_cohort(tmp_path):
    flat = [np.ravel(one).tolist() for one in (LEFT, RIGHT)]
    heart = (5, [[0.0, 0.0, 40.0, 0.0, 40.0, 32.0]])
    rle = [{"size": [32, 40], "counts": runs_of(lungs(one))} for one in (LEFT, RIGHT)]
    text = [one | {"counts": compress(one["counts"])} for one in rle]
    forms = {
        "polygons": [(3, [flat[0]]), (4, [flat[1]]), heart],
        "parts": [(3, flat), heart],
        "rle": [(3, rle[0]), (4, rle[1]), heart],
        "compressed": [(3, text[0]), (4, text[1]), heart],
    }
    cohorts = [load(make_coco(tmp_path / name, form)) for name, form in forms.items()]

    expected = data.resize(lungs(LEFT, RIGHT).astype(np.uint8) * 255, SIZE) >= 128
    np.testing.assert_array_equal(cohorts[0].masks[0, 0].bool(), expected)
    assert len({cohort.fingerprint for cohort in cohorts}) == 1
    assert cohorts[0].table["licence"].tolist() == ["CC BY 4.0"]


def test_coco_takes_patients_from_the_image_entry_and_from_metadata(tmp_path):
    folder = make_coco(tmp_path / "c", [(3, [np.ravel(LEFT).tolist()])], "all.json", patient_id="P4", age=61)
    row = load(folder).table.iloc[0]
    assert (row["patient_id"], row["age"]) == ("c:P4", 61.0)

    write(folder / "metadata.csv", "image_id,age\none,62\n")
    row = load(folder).table.iloc[0]
    assert (row["patient_id"], row["age"]) == ("c:P4", 62.0)


def test_compressed_counts_by_hand():
    """3, 2 and 4 stand as they are; then 1 as 1 - 2 = -1 (five set bits: 31, "O") and 104 as 104 - 4 = 100.

    100 is 3 * 32 + 4: first 4 with the bit for more (4 + 32 + 48 = 84, "T"), then 3 ("3").
    """
    assert data.decode_coco_counts("324OT3").tolist() == [3, 2, 4, 1, 104]


# ------------------------------------------------------------------------------------------- geometry


def test_a_rectangle_between_pixel_edges_has_its_own_area():
    mask = data.fill_even_odd([np.array([[2, 1], [7, 1], [7, 4], [2, 4]], float)], 6, 9)
    assert mask.sum() == 5 * 3
    assert mask[1:4, 2:7].all()


def test_a_triangle_by_hand():
    """Corners (0, 0), (4, 0), (0, 4): the centre (c + .5, r + .5) is inside where c + r + 1 < 4."""
    mask = data.fill_even_odd([np.array([[0, 0], [4, 0], [0, 4]], float)], 4, 4)
    # On the line c + r = 3 the centre lies on the edge itself: a right edge does not count as inside.
    assert mask.astype(int).tolist() == [[1, 1, 1, 0], [1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]


def test_even_odd_leaves_a_hole_and_fills_an_island_in_it():
    def square(a, b):
        return np.array([[a, a], [b, a], [b, b], [a, b]], float)

    mask = data.fill_even_odd([square(0, 10), square(2, 8), square(4, 6)], 10, 10)
    assert mask.sum() == 100 - 36 + 4
    assert mask[5, 5]
    assert not mask[3, 3]


def test_filling_agrees_with_a_point_in_polygon_test_of_every_pixel_centre():
    """matplotlib asks each point for itself; outlines reach beyond the picture on all sides."""
    rng = np.random.default_rng(3)
    rows, columns = np.mgrid[:24, :30] + 0.5
    centres = np.stack([columns.ravel(), rows.ravel()], 1)
    for _ in range(20):
        angles = np.sort(rng.uniform(0, 2 * np.pi, 15))
        radii = rng.uniform(3, 20, 15)
        outline = np.stack([15 + radii * np.cos(angles), 12 + radii * np.sin(angles)], 1)
        expected = Outline(outline).contains_points(centres).reshape(24, 30)
        np.testing.assert_array_equal(data.fill_even_odd([outline], 24, 30), expected)


def test_resizing_keeps_the_edges_of_a_mask_in_place():
    """Over all positions of an edge the mean error is nothing; growing or shrinking masks would show."""
    shift = []
    for edge in range(13, 108):
        mask = np.zeros((120, 120), np.uint8)
        mask[:, :edge] = 255
        shift.append((data.resize(mask, 47) >= 128).mean() * 120 - edge)
    assert abs(np.mean(shift)) < 0.05
    assert np.abs(shift).max() <= 120 / 47 / 2 + 1e-9


def test_resizing_averages_what_it_shrinks():
    stripes = np.tile(np.array([0, 200], np.uint8), (64, 32))
    assert np.abs(data.resize(stripes, 16).astype(int)[:, 1:-1] - 100).max() <= 2


# ---------------------------------------------------------------------------------------------- pixels

GREY = np.array([[0, 60], [120, 255], [30, 90]], np.uint8)


def as_palette():
    image = Image.fromarray((GREY // 30).astype(np.uint8)).convert("P")
    image.putpalette([value for i in range(256) for value in (min(255, i * 30),) * 3])
    return image


MODES = {
    "8-bit": (Image.fromarray(GREY), GREY),
    "1-bit": (Image.fromarray(GREY > 50), np.where(GREY > 50, 255, 0)),
    "16-bit": (Image.fromarray(1000 + GREY.astype(np.uint16) * 12), GREY),
    "RGB": (Image.merge("RGB", [Image.fromarray(GREY)] * 3), GREY),
    "red": (Image.merge("RGB", [Image.fromarray(c) for c in (GREY, GREY * 0, GREY * 0)]), GREY * 0.299),
    "RGBA": (Image.merge("RGBA", [Image.new("L", (2, 3), 255)] * 3 + [Image.fromarray(GREY)]), GREY),
    "grey and alpha": (Image.merge("LA", [Image.new("L", (2, 3), 255), Image.fromarray(GREY)]), GREY),
    "palette": (as_palette(), np.minimum(255, GREY // 30 * 30)),
}


@pytest.mark.parametrize("mode", MODES)
def test_png_of_each_mode_gives_the_right_grey(mode, tmp_path):
    image, expected = MODES[mode]
    image.save(tmp_path / "x.png")
    grey, header = data.read_image(tmp_path / "x.png")

    assert grey.dtype == np.uint8
    assert header == {}
    assert np.abs(grey.astype(float) - expected).max() <= 1


def test_float_tiff_is_stretched_and_a_flat_one_is_black(tmp_path):
    save(tmp_path / "x.tif", GREY.astype(np.float32) / 255 - 0.3)
    save(tmp_path / "flat.tif", np.full((3, 2), 7.5, np.float32))
    np.testing.assert_array_equal(data.read_image(tmp_path / "x.tif")[0], GREY)
    assert not data.read_image(tmp_path / "flat.tif")[0].any()


def test_jpeg_is_turned_as_its_exif_tag_says(tmp_path):
    upright = np.zeros((32, 64), np.uint8)
    upright[:16] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show it rotated by 90 degrees clockwise
    save(tmp_path / "x.jpg", np.ascontiguousarray(np.rot90(upright)), exif=exif, quality=95)
    grey, _ = data.read_image(tmp_path / "x.jpg")

    assert grey.shape == upright.shape
    assert np.abs(grey.astype(int) - upright).mean() < 5


@pytest.mark.parametrize("form", ["0/1", "0/255", "labels", "16-bit", "palette", "red", "jpeg"])
def test_mask_files_of_each_kind_say_the_same(form, tmp_path):
    mask = lungs(LEFT, RIGHT)
    grey = mask.astype(np.uint8)
    path = tmp_path / ("m.jpg" if form == "jpeg" else "m.png")
    if form == "palette":  # the picture's colours count, not their numbers: here 0 is white
        image = Image.fromarray(1 - grey)
        image.putpalette([255, 255, 255, 0, 0, 0])
        image.save(path)
    else:
        array = {
            "0/1": grey,
            "0/255": grey * 255,
            "labels": grey + lungs(RIGHT),
            "16-bit": grey.astype(np.uint16) * 4000,
            "red": np.stack([grey * 255, grey * 0, grey * 0], 2),
            "jpeg": grey * 255,
        }[form]
        save(path, array)
    np.testing.assert_array_equal(data.mask_from_file(path, 32, 40), mask)


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


def test_dicom_monochrome1_is_inverted(tmp_path):
    values = GREY.astype(int) * 16
    make_dicom(tmp_path / "two.dcm", values, "MONOCHROME2")
    make_dicom(tmp_path / "one.dcm", values, "MONOCHROME1")
    np.testing.assert_array_equal(data.read_image(tmp_path / "two.dcm")[0], GREY)
    np.testing.assert_array_equal(data.read_image(tmp_path / "one.dcm")[0], 255 - GREY)


def test_dicom_is_rescaled_and_shown_in_its_window(tmp_path):
    """Stored 0..400 means -100..300 after slope 1 and intercept -100; the window shows about 0..200 of it."""
    values = np.array([[0, 100], [200, 300], [400, 400]])
    header = {"RescaleSlope": 1, "RescaleIntercept": -100, "WindowCenter": 100, "WindowWidth": 201}
    make_dicom(tmp_path / "x.dcm", values, "MONOCHROME2", **header)
    grey, _ = data.read_image(tmp_path / "x.dcm")
    expected = np.array([[0, 0], [128, 255], [255, 255]])
    assert np.abs(grey.astype(int) - expected).max() <= 1


def test_dicom_headers_fill_what_no_table_says(tmp_path):
    folder = tmp_path / "clinic"
    for name, age in {"a": "006M", "b": "045Y"}.items():
        header = {"PatientAge": age, "PatientSex": "F", "PatientID": f"H{name}", "ViewPosition": "PA"}
        make_dicom(folder / "images" / f"{name}.dcm", picture(1) * 16.0, "MONOCHROME2", **header)
        save(folder / "masks" / f"{name}.png", lungs(LEFT))
    table = load(folder).table
    assert table["age"].tolist() == [0.5, 45.0]
    assert table["patient_id"].tolist() == ["clinic:Ha", "clinic:Hb"]
    assert (table["sex"] == "F").all()
    assert (table["view"] == "PA").all()

    write(folder / "metadata.csv", "image_id,patient_id,age\na,T1,7\nb,,\n")
    table = load(folder).table
    assert table["age"].tolist() == [7.0, 45.0]
    assert table["patient_id"].tolist() == ["clinic:T1", "clinic:Hb"]


def test_without_pydicom_one_sentence_says_what_to_install(tmp_path, monkeypatch):
    folder = make_folder(tmp_path / "clinic", "a")
    write(folder / "images" / "b.dcm", "x")
    save(folder / "masks" / "b.png", lungs(LEFT))
    monkeypatch.setitem(sys.modules, "pydicom", None)
    cohort = load(folder)
    assert reasons(cohort) == {"images/b.dcm": "pydicom not installed"}
    assert "pip install pydicom" in cohort.left_out["detail"].iloc[0]


# ------------------------------------------------------------------------------------------- the cache


@pytest.fixture
def decoded(monkeypatch):
    """The names of the images decoded so far."""
    names = []
    decode = data.decode

    def counting(record, size):
        names.append(record.image.name)
        return decode(record, size)

    monkeypatch.setattr(data, "decode", counting)
    return names


def same(one, other):
    return (
        torch.equal(one.images, other.images)
        and torch.equal(one.masks, other.masks)
        and one.table.equals(other.table)
        and one.left_out.equals(other.left_out)
        and one.fingerprint == other.fingerprint
    )


def test_the_second_load_decodes_nothing_and_gives_the_same(tmp_path, decoded):
    metadata = "image_id,age,patient_id\na,0.1,P\nb,,\nc,77,\nd,-1,\n"
    folder = make_folder(tmp_path / "clinic", "abcd", metadata)
    options = {"cache": tmp_path / "cache", "size": 17}  # 17 x 17 bits do not fill whole bytes
    first = load(folder, **options)
    assert sorted(decoded) == ["a.png", "b.png", "c.png"]
    second = load(folder, **options)

    assert len(decoded) == 3
    assert same(first, second)
    assert len(first.left_out) == 1
    second.images[0] = 0  # a cohort from the cache is as writable as a decoded one


def test_the_synthetic_source_is_cached_too(tmp_path, monkeypatch):
    first = load("phantom", num_phantoms=2, size=16, cache=tmp_path)
    monkeypatch.setattr(data.phantom, "generate", None)
    assert same(first, load("phantom", num_phantoms=2, size=16, cache=tmp_path))


@pytest.mark.parametrize("change", ["image", "mask", "metadata", "new image", "size", "class"])
def test_the_cache_is_not_used_after_a_change_of(change, tmp_path, decoded):
    folder = make_folder(tmp_path / "clinic")
    options = {"cache": tmp_path / "cache"}
    load(folder, **options)
    del decoded[:]
    if change in ("image", "mask"):
        path = folder / f"{change}s" / "a.png"
        stat = path.stat()
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1_000_000_000))
    elif change == "metadata":
        write(folder / "metadata.csv", "image_id,age\na,3\nb,3\nc,3\n")
    elif change == "new image":
        make_folder(folder, "abcd")
    elif change == "size":
        options["size"] = 16
    else:
        options["mask_class"] = "heart"
    load(folder, **options)

    assert len(decoded) >= 3
    kept = 2 if change in ("size", "class") else 1  # what the older files gave is removed
    assert len(list((tmp_path / "cache").iterdir())) == kept


@pytest.mark.parametrize("damage", ["a flipped byte", "cut short", "not a zip file", "empty"])
def test_a_damaged_cache_is_made_again_with_a_warning(damage, tmp_path, decoded):
    folder = make_folder(tmp_path / "clinic")
    first = load(folder, cache=tmp_path / "cache")
    (path,) = (tmp_path / "cache").iterdir()
    content = bytearray(path.read_bytes())
    if damage == "a flipped byte":
        content[content.index(first.images[1].numpy().tobytes()) + 5] ^= 1
    damaged = {"cut short": content[: len(content) // 2], "not a zip file": b"x" * 99, "empty": b""}
    path.write_bytes(damaged.get(damage, content))

    with pytest.warns(UserWarning, match="damaged cache"):
        again = load(folder, cache=tmp_path / "cache")
    assert same(first, again)
    assert len(decoded) == 6
    with warnings.catch_warnings(action="error"):
        load(folder, cache=tmp_path / "cache")
    assert len(decoded) == 6


def test_a_cache_that_cannot_be_written_costs_a_warning_only(tmp_path):
    folder = make_folder(tmp_path / "clinic")
    write(tmp_path / "file", "")
    with pytest.warns(UserWarning, match="cannot be written"):
        assert len(load(folder, cache=tmp_path / "file" / "cache")) == 3


# ------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"size": 15}, "size"),
        ({"size": 2049}, "size"),
        ({"size": 64.0}, "size"),
        ({"mask_class": " "}, "mask_class"),
        ({"workers": 0}, "workers"),
        ({"device": "toaster"}, "toaster"),
    ],
)
def test_a_parameter_out_of_range_is_named(options, word, tmp_path):
    with pytest.raises(UserError, match=word):
        load(make_folder(tmp_path / "clinic"), **options)


def test_sources_that_cannot_be_used_are_named(tmp_path):
    folder = make_folder(tmp_path / "clinic")
    (tmp_path / "empty").mkdir()
    write(tmp_path / "unknown" / "notes.txt", "hello")
    (tmp_path / "bare" / "images").mkdir(parents=True)
    (tmp_path / "bare" / "masks").mkdir()
    write(tmp_path / "bare" / "masks" / "readme.txt", "x")
    for sources, words in [
        ([], "sources is empty"),
        ([tmp_path / "nowhere"], "nowhere: there is no such folder"),
        ([folder / "images" / "a.png"], "a.png: is a file, not a folder"),
        ([tmp_path / "empty"], "empty: this folder is empty"),
        ([tmp_path / "unknown"], "unknown: in no known layout: looked for images/ with masks/"),
        ([tmp_path / "bare"], "bare: there is no image file in it"),
        ([folder, folder / "images" / ".."], "given twice"),
        (["phantom", "phantom"], "given twice"),
    ]:
        with pytest.raises(UserError) as caught:
            load(*sources)
        assert words in str(caught.value)
    with pytest.raises(UserError, match="num_phantoms"):
        load("phantom", num_phantoms=0)


def broken_image(folder):
    (folder / "images" / "b.png").write_bytes(b"not an image")
    return "images/b.png", "unreadable image"


def cut_image(folder):
    path = folder / "images" / "b.png"
    path.write_bytes(path.read_bytes()[:300])
    return "images/b.png", "unreadable image"


def broken_mask(folder):
    (folder / "masks" / "b.png").write_bytes(b"not an image")
    return "masks/b.png", "unreadable mask"


def mask_of_another_size(folder):
    save(folder / "masks" / "b.png", lungs(LEFT)[:-1])
    return "masks/b.png", "mask of another size"


def missing_mask(folder):
    (folder / "masks" / "b.png").unlink()
    return "images/b.png", "missing mask"


def nan_age(folder):
    write(folder / "metadata.csv", "image_id,age\na,1\nb,nan\nc,3\n")
    return "images/b.png", "age not valid"


def negative_age(folder):
    write(folder / "metadata.csv", "image_id,age\na,1\nb,-1\nc,3\n")
    return "images/b.png", "age not valid"


def age_in_words(folder):
    write(folder / "metadata.csv", "image_id,age\na,1\nb,old\nc,NA\n")
    return "images/b.png", "age not valid"


def same_image_id(folder):
    save(folder / "images" / "b.jpg", picture(8))
    return "images/b.png", "image_id twice"


def same_line(folder):
    write(folder / "metadata.csv", "image_id,patient_id\na,1\nb,2\nc,3\nb,4\n")
    return "metadata.csv", "image_id twice"


def unlisted_image(folder):
    write(folder / "metadata.csv", "image_id\na\nc\n")
    return "images/b.png", "not in metadata.csv"


def line_without_image(folder):
    write(folder / "metadata.csv", "image_id\na\nb\nc\nd\n")
    return "metadata.csv", "missing image"


DEFECTS = [
    broken_image,
    cut_image,
    broken_mask,
    mask_of_another_size,
    missing_mask,
    nan_age,
    negative_age,
    age_in_words,
    same_image_id,
    same_line,
    unlisted_image,
    line_without_image,
]


@pytest.mark.parametrize("spoil", DEFECTS)
def test_one_bad_file_is_left_out_and_with_strict_it_is_an_error_that_names_it(spoil, tmp_path):
    folder = make_folder(tmp_path / "clinic")
    file, reason = spoil(folder)
    cohort = load(folder)

    assert reasons(cohort) == {file: reason}
    assert cohort.left_out["defect"].all()
    assert {"a", "c"} <= set(cohort.table["image_id"])
    with pytest.raises(UserError) as caught:
        load(folder, strict=True)
    assert str(folder / file) in str(caught.value)
    assert cohort.left_out["detail"].iloc[0] in str(caught.value)


def test_an_empty_mask_is_no_defect(tmp_path):
    folder = make_folder(tmp_path / "clinic")
    save(folder / "masks" / "b.png", np.zeros((32, 40), np.uint8))
    assert reasons(load(folder, strict=True)) == {"images/b.png": "no lung mask"}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{", "broken JSON"),
        ([1, 2], "broken JSON"),
        (
            {"image": {"filename": "one.png"}, "annotations": [{"name": "Lung", "polygon": {"path": [{}]}}]},
            "broken JSON",
        ),
        ({"image": {"filename": "gone.png"}, "annotations": []}, "missing image"),
    ],
)
def test_one_bad_darwin_file_is_left_out_and_named(content, reason, tmp_path):
    folder = make_darwin(tmp_path / "d", 1)
    write(folder / "annotations" / "bad.json", content)
    assert reasons(load(folder)) == {"annotations/bad.json": reason}
    with pytest.raises(UserError, match=r"bad\.json"):
        load(folder, strict=True)


def test_annotations_of_another_size_than_the_image_are_left_out(tmp_path):
    folder = make_darwin(tmp_path / "d", 1)
    save(folder / "images" / "two.png", picture(1, 20, 20))
    image = {"filename": "two.png", "width": 40, "height": 32}
    lung = {"name": "Lung", "polygon": {"path": points(LEFT)}}
    write(folder / "annotations" / "two.json", {"image": image, "annotations": [lung]})
    cohort = load(folder)
    assert reasons(cohort) == {"annotations/two.json": "mask of another size"}
    assert "40 x 32" in cohort.left_out["detail"].iloc[0]


def test_broken_coco_files_and_entries(tmp_path):
    good = (3, [np.ravel(LEFT).tolist()])
    folder = make_coco(tmp_path / "c", [good])
    path = folder / "annotations" / "instances_all.json"
    content = json.loads(path.read_text())
    save(folder / "images" / "two.png", picture(1))
    content["images"] += [{"id": 10, "file_name": "two.png"}, {"id": 11, "file_name": "gone.png"}]
    rle = {"size": [32, 40], "counts": [5, 5]}
    content["annotations"] += [{"image_id": 10, "category_id": 3, "segmentation": rle}]
    write(path, content)
    expected = {"annotations/instances_all.json": "missing image", "images/two.png": "broken JSON"}
    assert reasons(load(folder)) == expected

    write(path, content | {"images": [{"id": 1}]})
    with pytest.raises(UserError, match=r"instances_all\.json: not a COCO"):
        load(folder)
    write(path, content)
    write(folder / "annotations" / "other.json", "{")
    with pytest.raises(UserError, match=r"other\.json: broken JSON"):
        load(folder)


def test_a_folder_of_broken_json_only_is_named_by_its_first_file(tmp_path):
    folder = make_darwin(tmp_path / "d", 1)
    write(folder / "annotations" / "one.json", "{")
    with pytest.raises(UserError, match=r"one\.json: broken JSON"):
        load(folder)


@pytest.mark.parametrize("content", ["name,age\na,3\n", "", "image_id\n\xff".encode("latin-1")])
def test_a_table_that_cannot_be_read_is_an_error_that_names_it(content, tmp_path):
    folder = make_folder(tmp_path / "clinic")
    path = folder / "metadata.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=r"metadata\.csv: "):
        load(folder)


def test_a_source_without_one_usable_image_says_why(tmp_path):
    folder = make_folder(tmp_path / "clinic")
    for name in "abc":
        (folder / "images" / f"{name}.png").write_bytes(b"?")
    with pytest.raises(UserError, match=r"clinic: no usable image \(3 x unreadable image\).*a\.png"):
        load(folder, cache=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()

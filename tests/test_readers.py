import json

import numpy as np
import pytest
from made_sources import (
    HOLE,
    LEFT,
    RIGHT,
    SIZE,
    compress,
    load,
    lungs,
    make_coco,
    make_darwin,
    picture,
    points,
    reasons,
    runs_of,
    save,
    write,
)

from fmfl.errors import UserError
from fmfl.pixels import resize


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


def test_darwin_1_and_2_give_the_same_cohort_with_the_tags_in_the_table(tmp_path):
    old, new = (load(make_darwin(tmp_path / f"v{version}", version)) for version in (1, 2))

    expected = resize((lungs(LEFT, RIGHT) & ~lungs(HOLE)).astype(np.uint8) * 255, SIZE) >= 128
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

    expected = resize(mask.astype(np.uint8) * 255, SIZE) >= 128
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

    expected = resize(lungs(LEFT, RIGHT).astype(np.uint8) * 255, SIZE) >= 128
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

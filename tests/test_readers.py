import json

import numpy as np
import pytest
import torch
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
from fmfl.sources import readers
from fmfl.sources.pixels import resize


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
            {"image": {"filename": "two.png"}, "annotations": [{"name": "Lung", "polygon": {"path": [{}]}}]},
            "broken JSON",
        ),
        ({"image": {"filename": "gone.png"}, "annotations": []}, "missing image"),
    ],
)
def test_one_bad_darwin_file_is_left_out_and_named(content, reason, tmp_path):
    folder = make_darwin(tmp_path / "d", 1)
    write(folder / "annotations" / "bad.json", content)
    save(folder / "images" / "two.png", picture(1))
    found = reasons(load(folder))
    assert found.pop("annotations/bad.json") == reason
    assert found in ({}, {"images/two.png": "not annotated"})
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


# ------------------------------------------------------------------------ whose outline, and of which size

FLAT_LEFT, FLAT_RIGHT = (np.ravel(one).tolist() for one in (LEFT, RIGHT))


def shown(*outlines):
    return resize(lungs(*outlines).astype(np.uint8) * 255, SIZE) >= 128


def masks(cohort):
    return dict(zip(cohort.table["image_id"], cohort.masks[:, 0].bool().numpy(), strict=True))


def coco(folder, images, annotations, categories=((1, "lung"), (2, "heart"))):
    """Images (id, file_name) and annotations (image_id, category_id, outline) as an instances file."""
    content = {
        "images": [{"id": one, "file_name": name, "width": 40, "height": 32} for one, name in images],
        "annotations": [
            {"id": 50 + i, "image_id": one, "category_id": group, "segmentation": [outline]}
            for i, (one, group, outline) in enumerate(annotations)
        ],
        "categories": [{"id": one, "name": name} for one, name in categories],
    }
    write(folder / "annotations" / "instances.json", content)
    return folder


def darwin_2(folder, file, name, path="/", outline=LEFT, source=None, **tags):
    slot = {"slot_name": "0", "width": 40, "height": 32, "source_files": [{"file_name": source or name}]}
    annotations = [{"name": "Lung", "slot_names": ["0"], "polygon": {"paths": [points(outline)]}}]
    annotations += [{"name": f"{key}:{value}", "tag": {}} for key, value in tags.items()]
    item = {"name": name, "path": path, "slots": [slot]}
    write(folder / "annotations" / file, {"version": "2.0", "item": item, "annotations": annotations})


def images_at(folder, *names):
    for seed, name in enumerate(names):
        save(folder / "images" / name, picture(seed))
    return folder


TWINS = [(1, "a/x.png"), (2, "b/x.png")]
DRAWN = [(1, 1, FLAT_LEFT), (2, 1, FLAT_RIGHT)]


def test_twins_in_two_folders_keep_their_own_outlines(tmp_path):
    first = load(coco(images_at(tmp_path / "c", "a/x.png", "b/x.png"), TWINS, DRAWN))
    folder = images_at(tmp_path / "d", "a/x.png", "b/x.png")
    darwin_2(folder, "x.json", "x.png", "/a", LEFT)
    darwin_2(folder, "x_1.json", "x.png", "/b", RIGHT)
    for cohort in (first, load(folder)):
        found = masks(cohort)
        np.testing.assert_array_equal(found["a/x"], shown(LEFT))
        np.testing.assert_array_equal(found["b/x"], shown(RIGHT))


@pytest.mark.parametrize("listed", [TWINS, TWINS[:1]])
def test_a_twins_outline_is_not_laid_on_the_other_picture(listed, tmp_path):
    """Only b/x.png was downloaded; with or without its own annotation it never takes that of a/x.png."""
    folder = coco(
        images_at(tmp_path / "c", "b/x.png", "z.png"), [*listed, (3, "z.png")], [*DRAWN, (3, 1, FLAT_LEFT)]
    )
    cohort = load(folder)
    assert reasons(cohort)["annotations/instances.json"] == "missing image"
    found = masks(cohort)
    assert ("b/x" in found) == (len(listed) == 2)
    if "b/x" in found:
        np.testing.assert_array_equal(found["b/x"], shown(RIGHT))


def test_a_darwin_twin_keeps_its_patient_too(tmp_path):
    folder = images_at(tmp_path / "d", "b/x.png")
    darwin_2(folder, "x.json", "x.png", "/a", LEFT, PatientID="P1")
    darwin_2(folder, "x_1.json", "x.png", "/b", RIGHT, PatientID="P2")
    cohort = load(folder)
    assert cohort.table["patient_id"].tolist() == ["d:P2"]
    np.testing.assert_array_equal(masks(cohort)["b/x"], shown(RIGHT))
    assert reasons(cohort) == {"annotations/x.json": "missing image"}


def test_an_annotation_files_own_name_points_at_no_picture(tmp_path):
    """x_1.json is of /b/x.png, which is missing; images/x_1.png is another picture."""
    folder = images_at(tmp_path / "d", "x_1.png", "z.png")
    darwin_2(folder, "x_1.json", "x.png", "/b", LEFT)
    darwin_2(folder, "z.json", "z.png")
    assert reasons(load(folder)) == {
        "annotations/x_1.json": "missing image",
        "images/x_1.png": "not annotated",
    }


def test_a_flat_download_of_two_folders_is_nobodys(tmp_path):
    folder = coco(
        images_at(tmp_path / "c", "x.png", "z.png"), [*TWINS, (3, "z.png")], [*DRAWN, (3, 1, FLAT_LEFT)]
    )
    cohort = load(folder)
    assert list(masks(cohort)) == ["z"]
    assert cohort.left_out["reason"].tolist() == ["missing image"] * 2 + ["not annotated"]


def test_two_entries_of_one_name_are_not_united(tmp_path):
    """Whoever flattened two folders overwrote one of the pictures."""
    folder = coco(
        images_at(tmp_path / "c", "x.png", "z.png"),
        [(1, "x.png"), (2, "x.png"), (3, "z.png")],
        [*DRAWN, (3, 1, FLAT_LEFT)],
    )
    assert reasons(load(folder)) == {"images/x.png": "image_id twice"}


def test_a_darwin_item_of_several_slots_is_a_folder(tmp_path):
    folder = images_at(tmp_path / "d", "case1/front.png", "case2/front.png")
    for case, outline in (("case1", LEFT), ("case2", RIGHT)):
        darwin_2(folder, f"{case}.json", case, outline=outline, source="front.png")
    found = masks(load(folder))
    np.testing.assert_array_equal(found["case1/front"], shown(LEFT))
    np.testing.assert_array_equal(found["case2/front"], shown(RIGHT))


@pytest.mark.parametrize("number", [7, "7", 7.0, " 7"])
@pytest.mark.parametrize("group", [1, "1"])
def test_ids_as_text_and_as_numbers_agree(number, group, tmp_path):
    folder = coco(images_at(tmp_path / "c", "x.png"), [(7, "x.png")], [(number, group, FLAT_LEFT)])
    np.testing.assert_array_equal(masks(load(folder))["x"], shown(LEFT))


@pytest.mark.parametrize(
    ("astray", "reason"),
    [
        ((8, 1, FLAT_LEFT), "annotation without an image"),
        ((None, 1, FLAT_LEFT), "annotation without an image"),
        ((7, 3, FLAT_LEFT), "annotation without a category"),
        ((7, None, FLAT_LEFT), "annotation without a category"),
    ],
)
def test_an_annotation_that_points_nowhere_makes_no_image_one_without_lungs(astray, reason, tmp_path):
    folder = coco(
        images_at(tmp_path / "c", "x.png", "z.png"),
        [(7, "x.png"), (9, "z.png")],
        [astray, (9, 1, FLAT_RIGHT)],
    )
    cohort = load(folder)
    assert reasons(cohort) == {"annotations/instances.json": reason, "images/x.png": "annotation unclear"}
    assert cohort.left_out["defect"].all() and list(masks(cohort)) == ["z"]
    with pytest.raises(UserError, match="annotation 50"):
        load(folder, strict=True)


def test_another_class_that_points_nowhere_is_no_matter(tmp_path):
    folder = coco(images_at(tmp_path / "c", "x.png"), [(7, "x.png")], [(8, 2, FLAT_LEFT), (7, 1, FLAT_LEFT)])
    assert load(folder, strict=True).left_out.empty


def test_images_that_share_an_id_are_left_out(tmp_path):
    folder = coco(
        images_at(tmp_path / "c", "x.png", "y.png", "z.png"),
        [(1, "x.png"), ("1", "y.png"), (2, "z.png")],
        DRAWN,
    )
    assert reasons(load(folder)) == dict.fromkeys(("images/x.png", "images/y.png"), "annotation unclear")


@pytest.mark.parametrize("segmentation", [[], [[]], [[1, 2, 3, 4]], None])
def test_a_lung_without_an_outline_is_a_defect_and_no_image_without_lungs(segmentation, tmp_path):
    folder = coco(images_at(tmp_path / "c", "x.png", "z.png"), [(1, "x.png"), (2, "z.png")], DRAWN)
    path = folder / "annotations" / "instances.json"
    content = json.loads(path.read_text())
    content["annotations"][0]["segmentation"] = segmentation
    write(path, content)
    cohort = load(folder)
    assert reasons(cohort) == {"images/x.png": "broken JSON"} and cohort.left_out["defect"].all()


@pytest.mark.parametrize(
    "outline", [[0.1, 0.1, 0.4, 0.1, 0.4, 0.9], [100, 50, 140, 50, 140, 90], [1, 1, 9, 9, 5, 5]]
)
def test_outlines_that_enclose_no_pixel_are_a_defect_and_no_image_without_lungs(outline, tmp_path):
    """In fractions of the picture, beside it, on one line."""
    folder = make_coco(tmp_path / "c", [(3, [outline])])
    with pytest.raises(UserError, match=r"1 x annotation unclear.*enclose no pixel"):
        load(folder)
    assert len(load(make_coco(tmp_path / "d", [(3, [outline]), (3, [FLAT_LEFT])]))) == 1  # a stray click


def test_outlines_far_beyond_their_picture_are_remarked(tmp_path):
    twice = [2 * value for value in FLAT_LEFT]
    assert load(make_coco(tmp_path / "c", [(3, [FLAT_LEFT])])).remarks == ()
    assert "far beyond their picture" in load(make_coco(tmp_path / "d", [(3, [twice])])).remarks[0]


def test_a_darwin_tag_of_a_patient_may_have_spaces_and_underscores(tmp_path):
    for number, tag in enumerate(("PatientID:12", "Patient ID: 12", "patient_id/12")):
        table = load(make_darwin(tmp_path / str(number), 2, tags=(tag,))).table
        assert table["patient_id"].tolist() == [f"{number}:12"]


@pytest.mark.parametrize(
    "given", [{"ellipse": {}}, {"bounding_box": {"x": 1}}, {"mask": {}, "id": "m"}, {"slot_names": ["5"]}, {}]
)
def test_a_darwin_lung_of_another_form_is_a_defect(given, tmp_path):
    folder = make_darwin(tmp_path / "d", 2)
    save(folder / "images" / "two.png", picture(2))
    darwin_2(folder, "two.json", "two.png")
    path = folder / "annotations" / "two.json"
    content = json.loads(path.read_text())
    content["annotations"] = [{"name": "Left Lung", "slot_names": ["0"]} | given]
    write(path, content)
    cohort = load(folder)
    assert (
        reasons(cohort) == {"annotations/two.json": "annotation unclear"} and cohort.left_out["defect"].all()
    )


def test_two_annotation_files_of_one_image_are_not_chosen_from(tmp_path):
    folder = make_darwin(tmp_path / "d", 1)
    save(folder / "images" / "two.png", picture(2))
    for name, outline in (("two.json", LEFT), ("copy.json", RIGHT)):
        darwin_2(folder, name, "two.png", outline=outline)
    assert reasons(load(folder)) == dict.fromkeys(
        ("annotations/copy.json", "annotations/two.json"), "image_id twice"
    )


def test_an_rle_of_turned_size_is_left_out(tmp_path):
    """Both its size and its runs were written as [width, height]; the number of pixels agrees."""
    turned = {"size": [40, 32], "counts": runs_of(lungs(LEFT).T)}
    with pytest.raises(UserError, match=r"1 x mask of another size\).*40 rows of 32 pixels"):
        load(make_coco(tmp_path / "c", [(3, turned)]))


@pytest.mark.parametrize(
    "declared", [{"width": 80, "height": 64}, {"width": 32, "height": 40}, {"width": 80}]
)
def test_outlines_drawn_at_another_size_are_left_out(declared, tmp_path):
    with pytest.raises(UserError, match="1 x mask of another size"):
        load(make_coco(tmp_path / "c", [(3, [FLAT_LEFT])], **declared))


def test_outlines_need_the_size_that_they_were_drawn_at_and_an_rle_has_its_own(tmp_path):
    unknown = {"width": None, "height": None}
    with pytest.raises(UserError, match="1 x mask of unknown size"):
        load(make_coco(tmp_path / "c", [(3, [FLAT_LEFT])], **unknown))
    rle = {"size": [32, 40], "counts": runs_of(lungs(LEFT))}
    assert len(load(make_coco(tmp_path / "r", [(3, rle)], **unknown))) == 1
    assert len(load(make_coco(tmp_path / "t", [(3, [FLAT_LEFT])], width="40", height=32.0))) == 1


@pytest.mark.parametrize(
    ("name", "is_lung"), [("LeftLung", True), ("lung_R", True), ("Lungs", True), ("LungOpacity", False)]
)
def test_names_of_classes(name, is_lung):
    assert readers.is_class(name, "lung") == is_lung

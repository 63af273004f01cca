import re
import shutil

import numpy as np
import pytest
from made_sources import LEFT, load, lungs, make_folder, picture, save, write
from matplotlib.colors import to_rgb
from PIL import Image

from fmfl import split
from fmfl.analysis import plots
from fmfl.errors import UserError
from fmfl.study import inspection

ALL = [[12, 0], [28, 0], [40, 10], [40, 22], [28, 32], [12, 32], [0, 22], [0, 10]]
DOT = [[20, 20], [22, 20], [22, 22], [20, 22]]


def rows(count, images=1, age=lambda i: 20 + i % 60):
    lines = [f"i{i:03},P{i // images},{age(i)}" for i in range(count)]
    return "\n".join(["image_id,patient_id,age", *lines]) + "\n"


def made(folder, count, **options):
    return make_folder(folder, [f"i{i:03}" for i in range(count)], rows(count, **options))


def said(cohort):
    return "\n".join(inspection.warnings(cohort))


def test_a_source_that_is_fit_for_a_study_gets_no_warning(tmp_path):
    assert said(load(made(tmp_path / "clinic", 300), size=16)) == ""


@pytest.mark.parametrize(("outline", "words"), [(DOT, "under 1%"), (ALL, "over 70%")])
def test_masks_that_cover_too_little_or_too_much_are_named(outline, words, tmp_path):
    folder = made(tmp_path / "clinic", 4)
    save(folder / "masks" / "i002.png", lungs(outline))
    assert f"1 masks cover {words} of their picture, which is not what lungs do: i002" in said(load(folder))


def test_masks_with_grey_levels_are_named(tmp_path):
    folder = made(tmp_path / "clinic", 4)
    soft = Image.fromarray(lungs(LEFT).repeat(4, 0).repeat(4, 1).astype(np.uint8) * 255).resize((161, 130), 2)
    soft.save(folder / "masks" / "i001.png")
    save(folder / "images" / "i001.png", picture(1, 130, 161))
    assert "1 images with grey levels between lung and background: i001" in said(load(folder))


def test_images_without_a_patient_are_counted(tmp_path):
    assert "bare: no image has a patient_id" in said(load(make_folder(tmp_path / "bare")))
    some = make_folder(tmp_path / "some", metadata="image_id,patient_id\na,P1\nb,\nc,\n")
    assert "some: 2 of 3 images have no patient_id" in said(load(some))
    one = make_folder(tmp_path / "one", metadata="image_id,patient_id\na,P1\nb,P1\nc,P2\n")
    assert "one: 2 of 3 images are of one patient, one:P1" in said(load(one))


@pytest.mark.parametrize(
    ("age", "words"),
    [
        (lambda i: "", "0 of 60 images have an age"),
        (lambda i: 3, "60 of 60 images have an age, and all the same, 3 years"),
    ],
)
def test_too_few_ages_name_the_splits_that_work(age, words, tmp_path):
    cohort = load(made(tmp_path / "clinic", 60, age=age), size=16)
    (line,) = [line for line in inspection.warnings(cohort) if "age" in line]
    assert words in line
    (names,) = re.findall(r"use --splits ([a-z,]+)", line)
    assert names == "iid,quantity"  # one site cannot be dealt to three clients
    parts = split.holdout(cohort.table)
    for name in names.split(","):
        assert len(split.partition(cohort.table, parts.federated, name)) == 3


def test_few_test_patients_come_with_the_option_that_mends_it(tmp_path):
    cohort = load(made(tmp_path / "clinic", 120, images=2), size=16)
    (found,) = re.findall(r"would hold (\d+) patients, .* -p test=(\d+) holds 20", said(cohort))
    assert int(found[0]) == len(cohort.patients(split.holdout(cohort.table).test)) < 20
    assert len(cohort.patients(split.holdout(cohort.table, test=int(found[1])).test)) >= 20


def test_too_few_patients_cannot_be_mended_by_an_option(tmp_path):
    assert "more patients are needed" in said(load(made(tmp_path / "clinic", 120, images=4), size=16))


def test_a_contact_sheet_shows_doubtful_covers_first_and_at_most_sixty(tmp_path):
    folder = made(tmp_path / "clinic", 70)
    write(folder / "masks" / "note.txt", "x")
    save(folder / "masks" / "i065.png", lungs(DOT))
    file = tmp_path / "new" / "sheet.png"
    assert inspection.sheet(load(folder, size=16), file) == inspection.SHEET_IMAGES
    pixels = np.asarray(Image.open(file).convert("RGB")).astype(int)
    away = np.abs(pixels - np.array(to_rgb(plots.TRUTH)) * 255).max(axis=-1)
    assert (away < 40).sum() > 1000  # contours


def test_a_contact_sheet_that_cannot_be_written_is_one_sentence(tmp_path):
    cohort = load(make_folder(tmp_path / "clinic"))
    with pytest.raises(UserError, match=r"ends in \.png"):
        inspection.sheet(cohort, tmp_path / "sheet.pdf")
    write(tmp_path / "file", "")
    with pytest.raises(UserError, match="cannot be written"):
        inspection.sheet(cohort, tmp_path / "file" / "sheet.png")


def test_one_patients_id_in_two_ways_is_named(tmp_path):
    ids = ["P01", "p 1", "7", "007", "1-12", "11-2", "8"]
    names = [f"i{number}" for number in range(len(ids))]
    lines = [f"{name},{patient}" for name, patient in zip(names, ids, strict=True)]
    folder = make_folder(tmp_path / "near", names, "\n".join(["image_id,patient_id", *lines]))
    warning = said(load(folder))
    assert "2 times patient ids differ by case, spaces, marks or zeros in front alone" in warning
    assert "'near:P01' and 'near:p 1', 'near:007' and 'near:7'; write" in warning


def test_copies_under_two_patients_are_named_and_of_one_are_not(tmp_path):
    folder = make_folder(tmp_path / "clinic", metadata="image_id,patient_id\na,P1\nb,P1\nc,P2\n")
    shutil.copy(folder / "images" / "a.png", folder / "images" / "b.png")
    assert "under several patients" not in said(load(folder))
    shutil.copy(folder / "images" / "a.png", folder / "images" / "c.png")
    assert "1 pictures occur under several patients" in said(load(folder))

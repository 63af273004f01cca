import re

import numpy as np
import pytest
from made_sources import LEFT, load, make_coco, make_folder, picture, reasons, save, write

from fmfl.errors import UserError

IDS = "abcd"


def made(tmp_path, text, name="clinic"):
    return make_folder(tmp_path / name, IDS, text)


def table(tmp_path, text):
    found = load(made(tmp_path, text)).table.set_index("image_id")
    return {key: (row["patient_id"].removeprefix("clinic:"), row["age"]) for key, row in found.iterrows()}


ROWS = "image_id,patient_id,age\na,P2,30\nb,P1,40\nc,P2,50\nd,P1,60\n"
TOLD = {"a": ("P2", 30.0), "b": ("P1", 40.0), "c": ("P2", 50.0), "d": ("P1", 60.0)}


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text,
        lambda text: re.sub(r"(\d)\n", r"\1,\n", text),  # a delimiter at each row's end, none in the header
        lambda text: re.sub(r"(\d)\n", r"\1,,,\n", text),
        lambda text: text.replace("\n", ",\n"),  # in the header too
        lambda text: text.replace("\n", "\n\n"),
        lambda text: text.replace("\n", "\r\n"),
        lambda text: text.replace(",", ", "),
        lambda text: text.replace("\na,", '\n"a",').replace("image_id", '"image_id"'),
        lambda text: text.replace("\n", "\n7,").replace("image_id", ",image_id")[:-2],  # an index of pandas
        lambda text: "\ufeff" + text,
    ],
)
def test_a_table_as_programs_write_it_is_read_as_it_is_written(change, tmp_path):
    assert table(tmp_path, change(ROWS)) == TOLD


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (ROWS.replace("a,P2,30", "a,P2,30,x"), 2),
        (ROWS.replace("b,P1,40", "b,P1"), 3),
        (ROWS.replace("c,P2,50", "c,P2,50,"), 4),  # alone: it may be "P, 2" without quotes
        (re.sub(r"(\d)\n", r"\1,x\n", ROWS), 2),
        (ROWS.replace("P2,30", "P,2,30"), 2),
    ],
)
def test_a_row_with_another_number_of_fields_is_refused_and_named(text, line, tmp_path):
    with pytest.raises(UserError, match=rf"metadata\.csv: line {line} has \d fields"):
        load(made(tmp_path, text))


@pytest.mark.parametrize("name", ["patientid", "PatientID", "Patient ID", "PATIENT_ID", " patient-id "])
def test_case_spaces_and_underscores_of_a_name_do_not_matter(name, tmp_path):
    text = ROWS.replace("patient_id", name).replace("age", "Age").replace("image_id", "Image ID")
    assert table(tmp_path, text) == TOLD


@pytest.mark.parametrize(
    "name",
    [
        "subject_id",
        "SubjectID",
        "subject",
        "patient",
        "patient_number",
        "pid",
        "case_id",
        "patinet_id",
        "participant",
        "Patientennummer",
        "person_id",
        "patient id nr",
    ],
)
def test_patients_under_another_name_are_refused(name, tmp_path):
    """Passed over, each image would be a patient of its own, and patients lie on both sides of a split."""
    with pytest.raises(UserError, match=rf"its column '{name}' is not read; name it patient_id"):
        load(made(tmp_path, ROWS.replace("patient_id", name)))


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("patient_age", "age"),
        ("age_years", "age"),
        ("AgeAtScan", "age"),
        ("gender", "sex"),
        ("hospital", "site"),
        ("findings", "finding"),
    ],
)
def test_another_column_under_another_name_is_counted(theirs, ours, tmp_path):
    text = "image_id,patient_id,{}\n" + "".join(f"{one},P{one},1\n" for one in IDS)
    cohort = load(made(tmp_path, text.format(theirs)))
    assert reasons(cohort) == {"metadata.csv": "column not read"}
    assert cohort.left_out["defect"].all()
    assert f"name it {ours}" in cohort.left_out["detail"].iloc[0]


def test_columns_that_are_none_of_ours_are_left_aside(tmp_path):
    text = "image_id,patient_id,age,stage,image_quality,patient_weight,notes\n"
    text += "".join(f"{one},P,9,3,good,70,x\n" for one in IDS)
    assert load(made(tmp_path, text), strict=True).table["age"].tolist() == [9.0] * 4


@pytest.mark.parametrize(
    "header", ["image_id,age,age", "image_id,patient_id,Patient ID", "image_id,ImageID,age"]
)
def test_two_columns_of_one_name_are_refused(header, tmp_path):
    with pytest.raises(UserError, match="two columns are named"):
        load(made(tmp_path, f"{header}\na,1,2\n"))


@pytest.mark.parametrize(
    "word", ["nan", "NaN", "None", "null", "NA", "N/A", "unknown", "Anonymous", "-", "?"]
)
def test_a_word_for_no_patient_joins_no_images(word, tmp_path):
    cohort = load(made(tmp_path, f"image_id,patient_id\na,{word}\nb,{word}\nc,7\nd,\n"))
    assert cohort.table["patient_id"].tolist() == ["clinic:7", "clinic:d"]
    expected = dict.fromkeys(("images/a.png", "images/b.png"), "patient_id not valid")
    assert reasons(cohort) == expected and cohort.left_out["defect"].all()


def test_a_patients_number_that_became_a_fraction_is_the_same_and_leading_zeros_are_not(tmp_path):
    patients = table(tmp_path, "image_id,patient_id\na,7\nb,7.0\nc,007\nd,7.5\n")
    assert [patient for patient, _ in patients.values()] == ["7", "7", "007", "7.5"]


@pytest.mark.parametrize(
    "age", ["-1", "121", "45Y", "018M", "45 years", "4_5", "1e1", "nan", "inf", "40-50", "None"]
)
def test_an_age_that_is_no_number_of_years_is_left_out(age, tmp_path):
    cohort = load(made(tmp_path, f"image_id,age\na,{age}\nb,0\nc,120\nd,unknown\n"))
    assert reasons(cohort) == {"images/a.png": "age not valid"}
    np.testing.assert_array_equal(cohort.table["age"], [0, 120, np.nan])


def test_repeated_rows_count_once_and_rows_that_disagree_not_at_all(tmp_path):
    cohort = load(made(tmp_path, "image_id,patient_id\na,1\na.png,1\nb,2\nb,3\nc,4\nd,5\n"))
    assert cohort.table["image_id"].tolist() == ["a", "c", "d"]
    assert reasons(cohort) == dict.fromkeys(("metadata.csv", "images/b.png"), "image_id twice")


def test_a_row_is_of_the_image_in_its_own_folder(tmp_path):
    folder = make_folder(
        tmp_path / "clinic", ("b/x", "c/y"), "image_id,patient_id\na/x,P1\nb\\x.png,P2\ny,P3\n"
    )
    cohort = load(folder)
    assert cohort.table["patient_id"].tolist() == ["clinic:P2", "clinic:P3"]
    assert reasons(cohort) == {"metadata.csv": "missing image"}
    assert "line 2" in cohort.left_out["detail"].iloc[0]


@pytest.mark.parametrize(
    "name",
    [
        "Metadata.csv",
        "metadata.CSV.txt.csv",
        "metadata.xlsx",
        "meta_data.csv",
        "metadata (1).csv",
        "metadata.csv.txt",
        "metadata.txt",
        "metadata",
        "Metadata.csv.gz",
    ],
)
def test_a_table_that_is_nearly_called_metadata_is_refused(name, tmp_path):
    folder = make_folder(tmp_path / "clinic")
    write(folder / name, ROWS)
    with pytest.raises(UserError, match=r"save it as metadata\.csv"):
        load(folder)


def test_a_folder_in_the_tables_place_is_refused(tmp_path):
    folder = make_folder(tmp_path / "clinic")
    (folder / "metadata.csv").mkdir()
    with pytest.raises(UserError, match=r"metadata\.csv: this is a folder"):
        load(folder)


def test_notes_on_the_table_are_no_table(tmp_path):
    folder = make_folder(tmp_path / "clinic")
    write(folder / "metadata.md", "x")
    write(folder / "readme.txt", "x")
    assert load(folder).left_out.empty


@pytest.mark.parametrize("rounded", ["1.23457E+12", "2e+15", '"1,5E+11"'])
def test_a_number_that_a_spreadsheet_rounded_is_no_patient(rounded, tmp_path):
    """All of a hospital's long numbers would become one patient's."""
    folder = make_folder(
        tmp_path / "clinic", metadata=f"image_id,patient_id\na,{rounded}\nb,{rounded}\nc,1E5\n"
    )
    cohort = load(folder)
    assert reasons(cohort) == dict.fromkeys(("images/a.png", "images/b.png"), "patient_id not valid")
    assert cohort.table["patient_id"].tolist() == ["clinic:1E5"]


def test_a_sex_in_other_words_is_named_and_counts_as_unknown(tmp_path):
    folder = make_folder(tmp_path / "clinic", metadata="image_id,sex\na,W\nb,Female\nc,unknown\n")
    cohort = load(folder)
    assert cohort.table["sex"].tolist() == ["", "F", ""]
    assert cohort.left_out["reason"].tolist() == ["sex not read"] and "'W'" in cohort.left_out["detail"][0]


def test_another_table_is_counted(tmp_path):
    folder = make_folder(tmp_path / "clinic")
    write(folder / "patients.csv", ROWS)
    assert reasons(load(folder)) == {"patients.csv": "table not read"}


def test_a_metadata_that_is_a_link_to_nowhere_is_refused(tmp_path):
    folder = make_folder(tmp_path / "clinic")
    (folder / "metadata.csv").symlink_to("/nowhere/metadata.csv")
    with pytest.raises(UserError, match=r"metadata\.csv: not a CSV table"):
        load(folder)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (ROWS.replace(",", ";"), "separated by ';'"),
        (ROWS.replace(",", "\t"), "separated by"),
        (ROWS.encode("utf-16"), "save it as UTF-8"),
        (ROWS.replace("P2", "Müller").encode("latin-1"), "save it as UTF-8"),
        (ROWS.replace("P2", '"P2'), "not a CSV table"),
    ],
)
def test_a_table_of_another_form_is_refused(content, words, tmp_path):
    folder = make_folder(tmp_path / "clinic", IDS)
    (folder / "metadata.csv").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=words):
        load(folder)


def test_a_cell_with_a_comma_in_quotes_is_one(tmp_path):
    text = 'image_id,finding,patient_id\na,"pneumonia, left",P1\nb,,P2\nc,,P3\nd,,P4\n'
    found = load(made(tmp_path, text)).table
    assert found["finding"].tolist() == ["pneumonia, left", "", "", ""]
    assert found["patient_id"].iloc[0] == "clinic:P1"


def test_with_a_table_of_patients_an_image_of_a_coco_file_needs_a_row(tmp_path):
    """Nobody knows whose it is, and COCO itself knows no patients."""
    folder = make_coco(tmp_path / "c", [(3, [np.ravel(LEFT).tolist()])])
    save(folder / "images" / "other.png", picture(3))
    write(folder / "metadata.csv", "image_id,patient_id\nother,P1\n")
    with pytest.raises(UserError, match=r"1 x not in metadata\.csv"):
        load(folder)

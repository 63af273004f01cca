"""`fmfl predict` gives the masks of the training code, in each image's own size, and writes over nothing."""

import os
import shutil
import sys
import weakref

import made_runs
import numpy as np
import pandas as pd
import pytest
import torch
from made_sources import make_dicom, picture, save
from PIL import Image

from fmfl import models, train, use
from fmfl.errors import UserError
from fmfl.sources.pixels import read_image
from fmfl.study import cli, predictions, students


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return made_runs.make_run(tmp_path_factory.mktemp("run"))


@pytest.fixture
def fmfl(monkeypatch, capsys):
    """The command as a shell runs it: exit code, what it says, what it complains of."""

    def command(*arguments):
        monkeypatch.setattr(sys, "argv", ["fmfl", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        said = capsys.readouterr()
        return ended.value.code or 0, said.out, said.err

    return command


@pytest.fixture(scope="module")
def images():
    return made_runs.cohort().images


@pytest.fixture
def xrays(tmp_path, images):
    """Three synthetic X-rays at the run's size, one of them enlarged to 90 x 70 pixels."""
    folder = tmp_path / "xrays"
    for number in range(3):
        save(folder / f"x{number}.png", images[number, 0].numpy())
    large = Image.fromarray(images[3, 0].numpy()).resize((90, 70), Image.Resampling.BICUBIC)
    save(folder / "deep" / "large.png", np.asarray(large))
    return folder


def mask(file):
    return np.asarray(Image.open(file))


def test_masks_are_those_of_the_training_code(fmfl, run, xrays, images, tmp_path):
    """What a notebook computes on the run's test images: `train.predict` above 0, at the run's size."""
    code, _out, err = fmfl("predict", run, xrays, "--out", tmp_path / "out")
    assert (code, err) == (0, "")
    model = models.build(made_runs.STUDENT)
    models.load_state(model, students.load(students.choose(run)[0]).state_dict())
    expected = train.predict(model, images, torch.arange(3))[:, 0].numpy() > 0
    found = np.stack([mask(tmp_path / "out" / "masks" / f"x{number}.png") for number in range(3)])
    np.testing.assert_array_equal(found, 255 * expected)
    assert 0.05 < expected.mean() < 0.95, "the student has learned something to compare"


def test_a_mask_has_its_images_own_size_and_the_table_says_all(fmfl, run, xrays, tmp_path):
    out = tmp_path / "out"
    _code, said, _ = fmfl("predict", run, xrays, "--out", out)
    table = pd.read_csv(out / "predictions.csv", keep_default_na=False).set_index("mask")
    assert list(table.reset_index()[[*predictions.COLUMNS]]) == list(predictions.COLUMNS) and len(table) == 4
    row = table.loc["masks/deep/large.png"]
    assert (row.width, row.height) == (90, 70) == Image.open(out / "masks" / "deep" / "large.png").size
    assert row.area_pixels == (mask(out / "masks" / "deep" / "large.png") == 255).sum()
    assert (out / row.overlay).is_file() and row.image.endswith("deep/large.png")
    assert (table.area_cm2 == "").all(), "a PNG does not tell the size of its pixels"
    final, _ = students.choose(run)
    assert set(table.weights) == {final.file.name} and set(table.weights_sha256) == {final.sha256}
    assert f"weights: {final}" in said and "why: the federated arm" in said
    assert "images: 4 segmented\n" in said and f"table: {out / 'predictions.csv'}" in said
    assert said.rstrip().endswith("Research only: this is not a medical device, and must not be used for "
                                  "diagnosis or treatment.")  # fmt: skip


def test_other_weights_give_other_rows(fmfl, run, xrays, tmp_path):
    fmfl("predict", run, xrays, "--out", tmp_path / "out", "--init", "random", "--seed", "1")
    table = pd.read_csv(tmp_path / "out" / "predictions.csv")
    assert set(table.weights) == {"federated-age-random-seed1.safetensors"}
    code, _out, err = fmfl("predict", run, xrays, "--out", tmp_path / "no", "--init", "imagenet")
    assert code == 2 and "there is: fm, random" in err and err.count("\n") == 1
    assert not (tmp_path / "no").exists()


def test_what_cannot_be_used_is_named_and_ends_with_1(fmfl, run, xrays, tmp_path):
    (xrays / "broken.png").write_text("no picture")
    save(xrays / "flat.png", np.full((40, 40), 7, np.uint8))
    (xrays / "notes.txt").write_text("usual beside images")
    (xrays / "volume.nii").write_text("of another kind")
    code, out, err = fmfl("predict", run, xrays, "--out", tmp_path / "out")
    assert code == 1
    assert "images: 4 segmented, 3 left out\nnot images: 1 file (notes.txt)\n" in out
    lines = err.splitlines()
    assert len(lines) == 3 and all(line.startswith("left out: ") for line in lines)
    assert any("flat.png: all its pixels are the same" in line for line in lines)
    assert any("broken.png: not readable as an image" in line for line in lines)
    assert any("volume.nii: neither its suffix nor its content" in line for line in lines)


def test_files_that_are_usual_beside_images_are_counted_and_no_mistake(fmfl, run, xrays, tmp_path):
    for name in ("notes.txt", "DICOMDIR", "deep/a.csv", "deep/b.md"):
        (xrays / name).write_text("usual beside images")
    code, out, err = fmfl("predict", run, xrays, "--out", tmp_path / "out")
    assert (code, err) == (0, "")
    assert "images: 4 segmented\nnot images: 4 files (DICOMDIR, a.csv, b.md and 1 more)\n" in out


def test_nothing_usable_is_one_sentence_and_no_file(fmfl, run, tmp_path):
    (tmp_path / "x.png").write_text("no picture")
    code, _out, err = fmfl("predict", run, tmp_path / "x.png", "--out", tmp_path / "out")
    assert code == 2 and "no image could be used; the first is" in err
    assert list((tmp_path / "out").iterdir()) == []
    for missing, says in ((tmp_path / "none", "there is no such file"), (tmp_path / "out", "no image file")):
        code, _, err = fmfl("predict", run, missing, "--out", tmp_path / "other")
        assert code == 2 and says in err
        assert not (tmp_path / "other").exists()


def dicom(tmp_path, images, **header):
    values = images[0, 0].numpy().astype(float) * 16
    return make_dicom(tmp_path / "clinic" / "a.dcm", values, "MONOCHROME2", PatientID="P", **header)


def one_row(run, file, out):
    model = students.load(final := students.choose(run)[0])
    done = predictions.predict(model, made_runs.SIZE, [file], out, weights=final)
    return done.table.iloc[0], predictions.in_words(done, out)


@pytest.mark.parametrize(
    ("header", "factor", "tag"),
    [
        ({"PixelSpacing": [0.5, 0.2]}, 0.5 * 0.2 / 100, "PixelSpacing"),
        ({"ImagerPixelSpacing": [0.4, 0.4]}, 0.4 * 0.4 / 100, "ImagerPixelSpacing"),
        ({"ImagerPixelSpacing": [0.4, 0.4], "PixelSpacing": [2, 3]}, 0.06, "PixelSpacing"),
        # Equal values are those of the detector, by the standard.
        ({"ImagerPixelSpacing": [0.4, 0.4], "PixelSpacing": [0.4, 0.4]}, 0.0016, "ImagerPixelSpacing"),
    ],
)
def test_areas_are_in_cm2_where_dicom_tells_the_pixels_size(run, images, tmp_path, header, factor, tag):
    row, said = one_row(run, dicom(tmp_path, images, **header), tmp_path / "out")
    assert row.area_cm2 == pytest.approx(row.area_pixels * factor, abs=0.006) and row.area_cm2 > 0
    assert row.spacing_from == tag
    assert any("at the detector" in line for line in said) == (tag == "ImagerPixelSpacing")


@pytest.mark.parametrize(
    ("header", "written"),
    [
        ({"PixelSpacing": 0.4}, b""),
        ({"PixelSpacing": "0.123456"}, b"0,1\\0,25"),
        ({"PatientOrientation": "PA"}, b""),
    ],
)
def test_a_tag_that_is_not_valid_costs_its_own_answer_alone(tmp_path, images, header, written):
    """The picture is read as without the tag: a study's images must not depend on it."""
    usual, _ = read_image(dicom(tmp_path, images))
    file = dicom(tmp_path, images, **header)
    if written:  # what pydicom would not write
        assert file.read_bytes().count(b"0.123456") == 1
        file.write_bytes(file.read_bytes().replace(b"0.123456", written))
    grey, about = read_image(file)
    np.testing.assert_array_equal(grey, usual)
    assert not {"spacing", "orientation"} & set(about)


def test_colours_tell_a_side_only_where_the_table_does(tmp_path, monkeypatch):
    """Blue at the image's left would name the wrong lung of a mirrored image, or a lung of a lateral one."""
    drawn = []
    monkeypatch.setattr(use, "overlay", lambda grey, labels: drawn.append(labels) or grey)
    rows, columns = np.mgrid[:64, :96]
    mask = sum(((rows - 32) / 20) ** 2 + ((columns - x) / 12) ** 2 < 1 for x in (25, 70))
    logits, grey = torch.tensor(np.where(mask, 5.0, -5.0))[None], np.full((64, 96), 90, np.uint8)

    def row_of(**header):
        return predictions._segmented(predictions.Source(tmp_path, "x"), grey, header, logits, "lung").row

    row = row_of(orientation="L\\F", view="PA")
    assert row["right_pixels"] > 0 and row["left_pixels"] > 0 and {*np.unique(drawn[-1])} == {0, 1, 2}
    for header in ({"orientation": "R\\F"}, {"view": "LL"}):
        row = row_of(**header)
        assert row["right_pixels"] is row["left_pixels"] is None and {*np.unique(drawn[-1])} == {0, 3}
        assert row["area_pixels"] == (drawn[-1] > 0).sum()


def test_no_side_is_told_where_dicom_says_that_the_image_is_turned(run, images, tmp_path, monkeypatch):
    row, _ = one_row(run, dicom(tmp_path, images, PatientOrientation=["R", "F"]), tmp_path / "out")
    assert row.right_pixels is None and row.left_pixels is None
    assert "PatientOrientation is R\\F" in row.remark
    usual, _ = one_row(run, dicom(tmp_path, images, PatientOrientation=["L", "F"]), tmp_path / "out")
    assert "PatientOrientation" not in usual.remark


def test_a_run_on_another_organ_gives_masks_without_sides(fmfl, xrays, tmp_path):
    run = made_runs.make_run(tmp_path / "kidneys", mask_class="kidney:2")
    code, _out, err = fmfl("predict", run, xrays, "--out", tmp_path / "out")
    assert (code, err) == (0, "")
    table = pd.read_csv(tmp_path / "out" / "predictions.csv")
    assert table[["right_pixels", "left_pixels", "remark"]].isna().all(axis=None)
    assert students.organ(run) == "kidney"


def test_a_lateral_view_is_remarked(run, images, tmp_path):
    row, _ = one_row(run, dicom(tmp_path, images, ViewPosition="LL"), tmp_path / "out")
    assert "the view is LL, and students are trained on frontal views" in row.remark


def test_a_name_that_is_no_utf8_is_left_out(fmfl, run, xrays, tmp_path):
    """In a folder it is; given by itself it is no traceback either."""
    strange = tmp_path / os.fsdecode(b"caf\xe9.png")
    try:
        shutil.copy(xrays / "x0.png", strange)
    except OSError:
        pytest.skip("this file system takes UTF-8 alone")
    code, out, err = fmfl("predict", run, strange, xrays, "--out", tmp_path / "out")
    assert code == 1 and "4 segmented, 1 left out" in out
    assert (
        "its name is not valid UTF-8" in err and len(pd.read_csv(tmp_path / "out" / "predictions.csv")) == 4
    )


# ------------------------------------------------------------------------------------------- the folder


def test_an_earlier_prediction_is_replaced_and_nothing_else(fmfl, run, xrays, tmp_path):
    out = tmp_path / "out"
    fmfl("predict", run, xrays, "--out", out)
    save(out / "masks" / "mine.png", picture(0))
    (xrays / "x2.png").unlink()
    assert fmfl("predict", run, xrays, "--out", out)[0] == 0
    assert sorted(file.name for file in (out / "masks").glob("*.png")) == ["mine.png", "x0.png", "x1.png"]
    assert len(pd.read_csv(out / "predictions.csv")) == 3


def test_a_mask_that_somebody_has_corrected_is_not_lost(fmfl, run, xrays, tmp_path):
    out = tmp_path / "out"
    fmfl("predict", run, xrays, "--out", out)
    save(out / "masks" / "x1.png", corrected := picture(3))
    code, _, err = fmfl("predict", run, xrays, "--out", out)
    assert code == 2 and "x1.png has been changed since it was made: name another --out" in err
    np.testing.assert_array_equal(mask(out / "masks" / "x1.png"), corrected)
    assert (out / "masks" / "x0.png").is_file(), "and no other one is taken away"


@pytest.mark.parametrize("name", ["masks/x1.png", "overlays/x1.jpg", "predictions.csv"])
def test_somebody_elses_file_is_not_written_over(fmfl, run, xrays, tmp_path, name):
    file = tmp_path / "out" / name
    file.parent.mkdir(parents=True)
    file.write_text("image,mask\nmine,../../precious.png\n")
    code, _, err = fmfl("predict", run, xrays, "--out", tmp_path / "out")
    assert code == 2 and "is there, and no prediction of fmfl made it" in err
    assert file.read_text().startswith("image,mask")


def test_a_table_that_names_files_elsewhere_takes_none_of_them_away(fmfl, run, xrays, tmp_path):
    """As one would that a careless hand, or a malicious one, has changed."""
    out, precious = tmp_path / "out", tmp_path / "precious.png"
    fmfl("predict", run, xrays, "--out", out)
    precious.write_text("mine")
    table = (out / "predictions.csv").read_text().replace("overlays/x1.jpg", "overlays/../../precious.png")
    (out / "predictions.csv").write_text(table)
    fmfl("predict", run, xrays, "--out", out)
    assert precious.read_text() == "mine"


def test_a_folder_within_the_images_is_refused(fmfl, run, xrays):
    for out in (xrays, xrays / "out"):
        code, _, err = fmfl("predict", run, xrays, "--out", out)
        assert code == 2 and "lies in the folder of images" in err
    assert not (xrays / "masks").exists() and not (xrays / "out").exists()


def test_images_of_one_name_get_masks_of_their_own(tmp_path):
    for place in ("a/x.png", "a/y.png", "b/x.png", "b/z.png"):
        save(tmp_path / place, picture(1))
    save(tmp_path / "b" / "z.jpg", picture(2))
    sources, left_out = predictions.find_images([tmp_path / "a", tmp_path / "b", tmp_path / "a" / "x.png"])
    assert not left_out
    assert sorted(one.name for one in sources) == ["a/x.png", "b/x.png", "b/z.jpg", "b/z.png", "y"]
    save(tmp_path / "again" / "a" / "x.png", picture(3))
    with pytest.raises(UserError, match=r"two images are called a/x\.png"):
        predictions.find_images([tmp_path / "a", tmp_path / "again" / "a"])


def test_a_source_with_masks_gives_its_images_alone(tmp_path):
    for place in ("images/x.png", "masks/x.png"):
        save(tmp_path / place, picture(1))
    assert [one.name for one in predictions.find_images([tmp_path])[0]] == ["x"]


def test_memory_holds_a_group_of_images_and_not_all(run, images, tmp_path, monkeypatch):
    """Decoded pictures that are alive at a time, counted by weak references."""

    class Counted(np.ndarray):
        pass

    alive, most = weakref.WeakSet(), []
    read = predictions.read_xray

    class Holder(dict):
        __hash__ = object.__hash__

    def counting(path):
        grey, header = read(path)
        holder = Holder(header)  # travels with the picture
        alive.add(holder)
        most.append(len(alive))
        return grey, holder

    monkeypatch.setattr(predictions, "read_xray", counting)
    monkeypatch.setattr(predictions, "IMAGES_A_CORE", 2)
    monkeypatch.setattr(predictions.os, "cpu_count", lambda: 2)
    for number in range(40):
        save(tmp_path / "xrays" / f"{number}.png", images[number, 0].numpy())
    model = students.load(final := students.choose(run)[0])
    done = predictions.predict(model, made_runs.SIZE, [tmp_path / "xrays"], tmp_path / "out", weights=final)
    assert len(done.table) == len(most) == 40
    assert max(most) <= 8, "the group that is finished, and the one that is read"

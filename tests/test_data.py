import os
import shutil
import warnings

import numpy as np
import pytest
import torch
from made_sources import LEFT, RIGHT, SIZE, load, lungs, make_folder, picture, reasons, save, write
from PIL import Image

from fmfl import data
from fmfl.errors import UserError
from fmfl.sources import contents

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


# ------------------------------------------------------------------------------------------ the fingerprint


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


# ------------------------------------------------------------------------------------------ the cache


@pytest.fixture
def decoded(monkeypatch):
    """The names of the images decoded so far."""
    names = []
    decode = contents.decode

    def counting(record, size):
        names.append(record.image.name)
        return decode(record, size)

    monkeypatch.setattr(contents, "decode", counting)
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
    monkeypatch.setattr(contents.phantom, "generate", None)
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


@pytest.mark.parametrize("damage", ["a flipped byte", "cut short", "another file", "empty"])
def test_a_damaged_cache_is_made_again_with_a_warning(damage, tmp_path, decoded):
    folder = make_folder(tmp_path / "clinic")
    first = load(folder, cache=tmp_path / "cache")
    (path,) = (tmp_path / "cache").iterdir()
    content = bytearray(path.read_bytes())
    if damage == "a flipped byte":
        content[content.index(first.images[1].numpy().tobytes()) + 5] ^= 1
    damaged = {"cut short": content[: len(content) // 2], "another file": b"x" * 99, "empty": b""}
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


# ------------------------------------------------------------------------------------------ bad input


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


def same_line(folder):
    write(folder / "metadata.csv", "image_id,patient_id\na,1\nb,2\nc,3\nb,2\n")
    return "metadata.csv", "image_id twice"


def lines_that_contradict_each_other(folder):
    write(folder / "metadata.csv", "image_id,patient_id\na,1\nb,2\nc,3\nb,4\n")
    return "images/b.png", "image_id twice"


def flat_image(folder):
    save(folder / "images" / "b.png", np.full((32, 40), 0, np.uint8))
    return "images/b.png", "constant image"


def mask_that_is_the_image(folder):
    shutil.copy(folder / "images" / "b.png", folder / "masks" / "b.png")
    return "masks/b.png", "mask is its image"


def mask_without_an_image(folder):
    save(folder / "masks" / "d.png", lungs(LEFT))
    return "masks/d.png", "mask without an image"


def two_masks(folder):
    save(folder / "masks" / "b_mask.png", lungs(LEFT))
    return "images/b.png", "several masks"


def link_to_nowhere(folder):
    (folder / "images" / "b.png").unlink()
    (folder / "images" / "b.png").symlink_to("/nowhere/b.png")
    return "images/b.png", "broken link"


def patient_in_a_word_for_none(folder):
    write(folder / "metadata.csv", "image_id,patient_id\na,1\nb,None\nc,3\n")
    return "images/b.png", "patient_id not valid"


def file_of_an_unknown_kind(folder):
    write(folder / "images" / "d.nii.gz", "x")
    return "images/d.nii.gz", "not an image"


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
    same_line,
    lines_that_contradict_each_other,
    flat_image,
    mask_that_is_the_image,
    mask_without_an_image,
    two_masks,
    link_to_nowhere,
    patient_in_a_word_for_none,
    file_of_an_unknown_kind,
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


def test_two_pictures_that_share_a_mask_are_both_left_out(tmp_path):
    """b.png and b.jpg would both take masks/b.png; which one it was drawn on is not told."""
    folder = make_folder(tmp_path / "clinic")
    save(folder / "images" / "b.jpg", picture(8))
    assert reasons(load(folder)) == dict.fromkeys(("images/b.jpg", "images/b.png"), "image_id twice")


def test_an_empty_mask_is_no_defect(tmp_path):
    folder = make_folder(tmp_path / "clinic")
    save(folder / "masks" / "b.png", np.zeros((32, 40), np.uint8))
    assert reasons(load(folder, strict=True)) == {"images/b.png": "no lung mask"}


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


@pytest.mark.parametrize(("height", "width"), [(1, 200), (15, 40)])
def test_a_picture_of_a_few_pixels_is_no_x_ray(height, width, tmp_path):
    folder = make_folder(tmp_path / "clinic")
    save(folder / "images" / "a.png", picture(1, height, width))
    save(folder / "masks" / "a.png", np.arange(height * width).reshape(height, width) % 7 == 0)
    assert reasons(load(folder)) == {"images/a.png": "image too small"}


def test_a_mask_of_which_nothing_is_left_is_a_defect_and_no_image_without_lungs(tmp_path):
    folder = make_folder(tmp_path / "clinic")
    save(folder / "images" / "a.png", picture(1, 320, 400))
    save(folder / "masks" / "a.png", lungs([[100, 100], [103, 100], [103, 103]], height=320, width=400))
    cohort = load(folder)
    assert reasons(cohort) == {"images/a.png": "mask too small"} and cohort.left_out["defect"].all()

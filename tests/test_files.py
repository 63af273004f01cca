import os

import numpy as np
import pytest
from made_sources import LEFT, load, lungs, make_dicom, make_folder, picture, reasons, save, write

from fmfl.errors import UserError
from fmfl.sources import files


def test_a_link_that_leads_back_up_is_named_and_not_followed(tmp_path):
    folder = make_folder(tmp_path / "clinic")
    (folder / "images" / "up").symlink_to("..")
    cohort = load(folder)
    assert len(cohort) == 3 and reasons(cohort) == {"images/up": "broken link"}
    assert "leads back" in cohort.left_out["detail"].iloc[0]


def test_two_folders_that_link_to_each_other_end(tmp_path):
    folder = make_folder(tmp_path / "clinic")
    for one, other in (("x", "y"), ("y", "x")):
        (tmp_path / one).mkdir()
        (tmp_path / one / "to").symlink_to(tmp_path / other)
    (folder / "images" / "x").symlink_to(tmp_path / "x")
    cohort = load(folder)
    assert len(cohort) == 3 and list(reasons(cohort).values()) == ["broken link"]


def test_a_link_to_itself_and_links_to_nowhere_are_named(tmp_path):
    folder = make_folder(tmp_path / "clinic")
    (folder / "images" / "self").symlink_to("self")
    (folder / "images" / "gone.png").symlink_to("/nowhere/gone.png")
    save(folder / "masks" / "gone.png", lungs(LEFT))
    (folder / "masks" / "b.png").unlink()
    (folder / "masks" / "b.png").symlink_to("/nowhere/b.png")
    cohort = load(folder)
    names = ("images/self", "images/gone.png", "masks/b.png")
    assert reasons(cohort) == dict.fromkeys(names, "broken link") and cohort.left_out["defect"].all()
    assert "/nowhere/b.png" in " ".join(cohort.left_out["detail"])


def test_linked_folders_and_files_are_read(tmp_path):
    source = make_folder(tmp_path / "source")
    folder = tmp_path / "linked"
    (folder / "images").mkdir(parents=True)
    for name in "abc":
        (folder / "images" / f"{name}.png").symlink_to(source / "images" / f"{name}.png")
    (folder / "masks").symlink_to(source / "masks")
    assert load(folder).fingerprint == load(source).fingerprint


@pytest.mark.parametrize("part", ["images", "masks", "images/inner", "annotations"])
def test_a_folder_that_may_not_be_read_is_one_sentence(part, tmp_path, monkeypatch):
    folder = make_folder(tmp_path / "clinic")
    (folder / part).mkdir(exist_ok=True)
    scandir = os.scandir

    def refuse(path):
        if str(path).rstrip("/") == str(folder / part):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(files.os, "scandir", refuse)  # as root every folder may be read
    with pytest.raises(UserError, match=rf"{part}/?: this folder cannot be read \(Permission denied\)"):
        load(folder)


def test_dicom_is_known_by_its_content_whatever_its_name(tmp_path):
    folder = make_folder(tmp_path / "clinic", "ab")
    for name in ("IM0001", "1.2.840.113.7", "scan.x"):
        make_dicom(folder / "images" / name, picture(1) * 16.0, "MONOCHROME2")
        save(folder / "masks" / f"{name}.png", lungs(LEFT))
    cohort = load(folder)
    assert cohort.table["image_id"].tolist() == ["1.2.840.113.7", "IM0001", "a", "b", "scan.x"]
    assert cohort.left_out.empty


def test_every_other_file_among_images_and_masks_is_counted(tmp_path):
    """What may be an image is a defect; what usually lies beside images is none."""
    folder = make_folder(tmp_path / "clinic")
    for name in ("images/IM7", "images/x.nii.gz", "images/x.gif", "masks/x.npy"):
        write(folder / name, "no DICOM")
    for name in ("images/Thumbs.db", "images/readme.txt"):
        write(folder / name, "x")
    write(folder / "images" / ".hidden", "x")
    make_dicom(folder / "images" / "DICOMDIR", picture(1) * 16.0, "MONOCHROME2")
    cohort = load(folder)
    defects = cohort.left_out[cohort.left_out["defect"]]
    assert set(cohort.left_out["reason"]) == {"not an image"} and len(cohort.left_out) == 7
    assert set(defects["file"]) == {"images/IM7", "images/x.nii.gz", "images/x.gif", "masks/x.npy"}


def test_a_name_in_another_encoding_is_left_out_and_can_be_printed(tmp_path):
    folder = make_folder(tmp_path / "clinic")
    for part in ("images", "masks"):
        try:
            os.rename(folder / part / "a.png", os.fsencode(folder / part) + b"/\xe9.png")
        except OSError:
            pytest.skip("this file system takes names in UTF-8 alone")
    cohort = load(folder)
    assert reasons(cohort) == {r"images/\udce9.png": "name not valid", r"masks/\udce9.png": "name not valid"}
    with pytest.raises(UserError, match="no usable image"):
        load(make_folder(tmp_path / "none", [os.fsdecode(b"\xe9")]))
    with pytest.raises(UserError, match="this name is not valid UTF-8"):
        load(make_folder(tmp_path / os.fsdecode(b"\xe9")))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_pipe_is_not_waited_for(tmp_path):
    folder = make_folder(tmp_path / "clinic")
    os.mkfifo(folder / "images" / "pipe.png")
    save(folder / "masks" / "pipe.png", lungs(LEFT))
    assert reasons(load(folder))["images/pipe.png"] == "not a file"


@pytest.fixture
def index(tmp_path):
    def make(*names):
        for name in names:
            save(tmp_path / "images" / name, np.zeros((2, 2), np.uint8))
        return files.ImageIndex(tmp_path / "images")

    return make


@pytest.mark.parametrize(
    ("there", "wanted", "found"),
    [
        (["x.png"], ["x.png"], ["x"]),
        (["x.png"], ["images/x.png"], ["x"]),
        (["x.png"], ["x"], ["x"]),
        (["x.png"], ["x.jpeg"], ["x"]),  # converted since
        (["a/x.png"], ["a\\x.png"], ["a/x"]),
        (["a/x.png"], ["x.png"], ["a/x"]),
        (["x.png"], ["train/x.png"], ["x"]),
        (["a/x.png"], ["/data/set/a/x.png"], ["a/x"]),
        (["a/x.png", "b/x.png"], ["b/x.png", "a/x.png"], ["b/x", "a/x"]),
        (["a/x.png", "b/x.png"], ["x.png"], [None]),
        (["b/x.png"], ["a/x.png"], [None]),
        (["b/x.png"], ["a/x.png", "b/x.png"], [None, "b/x"]),
        (["x.png"], ["a/x.png", "b/x.png"], [None, None]),
        (["x.png"], ["x.png", "a/x.png"], ["x", None]),
        (["1.2.3.png"], ["1.2.3"], ["1.2.3"]),
        (["x.png"], ["y.png"], [None]),
        (["x.png"], [""], [None]),
    ],
)
def test_a_name_means_the_image_in_its_own_folder_or_none(there, wanted, found, index):
    images = index(*there)
    matched = images.match({place: [name] for place, name in enumerate(wanted)})
    keys = [images.key(one) if not isinstance(one, str) else None for one in matched.values()]
    assert keys == found

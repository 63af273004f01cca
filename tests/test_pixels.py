import struct
import sys
import warnings

import numpy as np
import pytest
from made_sources import LEFT, load, lungs, make_dicom, make_folder, picture, reasons, save, write
from PIL import Image

from fmfl.sources import pixels
from fmfl.sources.files import SkippedFile


def test_resizing_keeps_the_edges_of_a_mask_in_place():
    """Over all positions of an edge the mean error is nothing; growing or shrinking masks would show."""
    shift = []
    for edge in range(13, 108):
        mask = np.zeros((120, 120), np.uint8)
        mask[:, :edge] = 255
        shift.append((pixels.resize(mask, 47) >= 128).mean() * 120 - edge)
    assert abs(np.mean(shift)) < 0.05
    assert np.abs(shift).max() <= 120 / 47 / 2 + 1e-9


def test_resizing_averages_what_it_shrinks():
    stripes = np.tile(np.array([0, 200], np.uint8), (64, 32))
    assert np.abs(pixels.resize(stripes, 16).astype(int)[:, 1:-1] - 100).max() <= 2


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
    grey, header = pixels.read_image(tmp_path / "x.png")

    assert grey.dtype == np.uint8
    assert header == {}
    assert np.abs(grey.astype(float) - expected).max() <= 1


def test_float_tiff_is_stretched_and_a_flat_one_is_black(tmp_path):
    save(tmp_path / "x.tif", GREY.astype(np.float32) / 255 - 0.3)
    save(tmp_path / "flat.tif", np.full((3, 2), 7.5, np.float32))
    np.testing.assert_array_equal(pixels.read_image(tmp_path / "x.tif")[0], GREY)
    assert not pixels.read_image(tmp_path / "flat.tif")[0].any()


def test_jpeg_is_turned_as_its_exif_tag_says(tmp_path):
    upright = np.zeros((32, 64), np.uint8)
    upright[:16] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show it rotated by 90 degrees clockwise
    save(tmp_path / "x.jpg", np.ascontiguousarray(np.rot90(upright)), exif=exif, quality=95)
    grey, _ = pixels.read_image(tmp_path / "x.jpg")

    assert grey.shape == upright.shape
    assert np.abs(grey.astype(int) - upright).mean() < 5


def test_dicom_monochrome1_is_inverted(tmp_path):
    values = GREY.astype(int) * 16
    make_dicom(tmp_path / "two.dcm", values, "MONOCHROME2")
    make_dicom(tmp_path / "one.dcm", values, "MONOCHROME1")
    np.testing.assert_array_equal(pixels.read_image(tmp_path / "two.dcm")[0], GREY)
    np.testing.assert_array_equal(pixels.read_image(tmp_path / "one.dcm")[0], 255 - GREY)


def test_dicom_is_rescaled_and_shown_in_its_window(tmp_path):
    """Stored 0..400 means -100..300 after slope 1 and intercept -100; the window shows about 0..200 of it."""
    values = np.array([[0, 100], [200, 300], [400, 400]])
    header = {"RescaleSlope": 1, "RescaleIntercept": -100, "WindowCenter": 100, "WindowWidth": 201}
    make_dicom(tmp_path / "x.dcm", values, "MONOCHROME2", **header)
    grey, _ = pixels.read_image(tmp_path / "x.dcm")
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


@pytest.mark.parametrize(
    ("text", "years"),
    [("42", 42.0), ("042Y", 42.0), ("42y", 42.0), ("018M", 1.5), ("000Y", 0.0), ("", None), ("NA", None)],
)
def test_dicom_ages_are_read_and_one_without_a_unit_is_remarked(text, years, tmp_path):
    header = {"PatientID": "P", "PatientAge": text}
    with warnings.catch_warnings(action="ignore"):  # pydicom's, for what is no age string
        make_dicom(tmp_path / "clinic" / "images" / "a.dcm", picture(1) * 16.0, "MONOCHROME2", **header)
        save(tmp_path / "clinic" / "masks" / "a.png", lungs(LEFT))
        cohort = load(tmp_path / "clinic")
    np.testing.assert_array_equal(cohort.table["age"], [np.nan if years is None else years])
    assert any("without its unit" in one for one in cohort.remarks) == (text == "42")


@pytest.mark.parametrize(
    ("key", "value"), [("PatientAge", "999Y"), ("PatientAge", "old"), ("PatientID", "ANONYMOUS")]
)
def test_dicom_headers_that_are_not_valid_leave_out_their_image_unless_a_table_says(key, value, tmp_path):
    folder = tmp_path / "clinic"
    for name in "ab":
        header = {"PatientID": f"P{name}", "PatientAge": "040Y"} | ({key: value} if name == "a" else {})
        with warnings.catch_warnings(action="ignore"):
            make_dicom(folder / "images" / f"{name}.dcm", picture(1) * 16.0, "MONOCHROME2", **header)
        save(folder / "masks" / f"{name}.png", lungs(LEFT))
    with warnings.catch_warnings(action="ignore"):
        assert list(reasons(load(folder)).values()) in (["age not valid"], ["patient_id not valid"])
        write(folder / "metadata.csv", "image_id,patient_id,age\na,T1,7\nb,,\n")
        assert load(folder).table["age"].tolist() == [7.0, 40.0]


def test_dicom_palettes_are_applied(tmp_path):
    """Stored are the numbers of 256 greys in another order, on 16 bits a colour, as the standard has them."""
    order = np.random.default_rng(1).permutation(256)
    table = (np.argsort(order) * 257).astype("<u2").tobytes()
    header = {"BitsAllocated": 16, "BitsStored": 8, "HighBit": 7}
    for colour in ("Red", "Green", "Blue"):
        header[f"{colour}PaletteColorLookupTableDescriptor"] = [256, 0, 16]
        header[f"{colour}PaletteColorLookupTableData"] = table
    make_dicom(tmp_path / "x.dcm", order[GREY], "PALETTE COLOR", **header)
    np.testing.assert_array_equal(pixels.read_image(tmp_path / "x.dcm")[0], GREY)


def test_a_file_of_several_pictures_is_left_out(tmp_path):
    pages = [Image.fromarray(GREY), Image.fromarray(255 - GREY)]
    pages[0].save(tmp_path / "x.tif", save_all=True, append_images=pages[1:])
    with pytest.raises(SkippedFile, match="2 pictures"):
        pixels.read_image(tmp_path / "x.tif")


def tiff(path, values, photometric):
    """A TIFF file of one strip, by hand: Pillow does not write white as zero in 16 bits."""
    height, width = values.shape
    data = values.astype(values.dtype.newbyteorder("<")).tobytes()
    tags = {256: width, 257: height, 258: 8 * values.itemsize, 259: 1, 262: photometric, 273: 8}
    tags |= {277: 1, 278: height, 279: len(data)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    directory = struct.pack("<H", len(tags)) + entries + bytes(4)
    path.write_bytes(b"II*\0" + struct.pack("<I", 8 + len(data)) + data + directory)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_a_tiff_whose_zero_is_white_is_turned_round_at_every_depth(dtype, tmp_path):
    deep = GREY.astype(dtype) * (np.iinfo(dtype).max // 255)
    tiff(tmp_path / "black.tif", deep, photometric=1)
    tiff(tmp_path / "white.tif", np.iinfo(dtype).max - deep, photometric=0)
    black, white = (pixels.read_image(tmp_path / f"{name}.tif")[0] for name in ("black", "white"))
    np.testing.assert_array_equal(black, white)


@pytest.mark.parametrize("kind", ["MONOCHROME1", "MONOCHROME2"])
def test_dicom_padding_is_black_and_takes_no_grey_levels_from_the_picture(kind, tmp_path):
    grey = GREY.copy()
    grey[:, 0] = 0
    stored = (255 - grey if kind == "MONOCHROME1" else grey) * 16.0
    stored[0, 0], stored[1:, 0] = 60000, 65535
    header = {"BitsStored": 16, "HighBit": 15, "PixelPaddingValue": 60000, "PixelPaddingRangeLimit": 65535}
    make_dicom(tmp_path / "x.dcm", stored, kind, **header)
    got, inside = pixels.read_image(tmp_path / "x.dcm")[0], grey[:, 1:].astype(float)
    assert not got[:, 0].any()
    wanted = (inside - inside.min()) * 255 / np.ptp(inside)
    assert np.abs(got[:, 1:] - wanted).max() <= 1


def test_a_dicom_that_is_all_padding_by_its_header_is_read_as_it_is(tmp_path):
    make_dicom(
        tmp_path / "x.dcm", GREY * 16.0, "MONOCHROME2", PixelPaddingValue=0, PixelPaddingRangeLimit=4095
    )
    assert np.ptp(pixels.read_image(tmp_path / "x.dcm")[0]) == 255


def test_a_dicom_header_that_contradicts_itself_on_its_polarity_is_left_out(tmp_path):
    make_dicom(tmp_path / "x.dcm", GREY * 16.0, "MONOCHROME2", PresentationLUTShape="INVERSE")
    with pytest.raises(SkippedFile, match="INVERSE"):
        pixels.read_image(tmp_path / "x.dcm")

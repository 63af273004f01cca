import io

import numpy as np
import pytest
from made_sources import LEFT, RIGHT, lungs, picture, save
from PIL import Image
from scipy import ndimage

from fmfl.sources import mask_files
from fmfl.sources.files import SkippedFile

HEIGHT, WIDTH = 96, 120
A = lungs([[12, 18], [42, 18], [42, 78], [12, 78]], height=HEIGHT, width=WIDTH)
B = lungs([[66, 18], [102, 12], [108, 84], [66, 72]], height=HEIGHT, width=WIDTH)
BOTH = A | B
HEART = lungs([[44, 40], [64, 40], [64, 80], [44, 80]], height=HEIGHT, width=WIDTH)
XRAY = picture(0, HEIGHT, WIDTH)


def levels(a, b, background=0):
    return np.where(A, a, np.where(B, b, background))


def jpeg(values, quality):
    file = io.BytesIO()
    Image.fromarray(values.astype(np.uint8)).save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file))


def smooth(values, sigma):
    return ndimage.gaussian_filter(values.astype(float), sigma)


def overlap(mask, other):
    return (mask & other).sum() / (mask | other).sum()


# What programs write for two lungs; each is right to the pixel but for the edges that it has itself smoothed.
RIGHT_MASKS = {
    "0 and 1": BOTH * 1,
    "1 and 2": 1 + BOTH,
    "8 and 250": np.where(BOTH, 250, 8),
    "labels 1 and 2": levels(1, 2),
    "127 and 255": levels(127, 255),
    "100 and 200": levels(100, 200),
    "85 and 170": levels(85, 170),
    "40 and 255": levels(40, 255),
    "16 bits": (levels(20000, 65535)).astype(np.uint16),
    "probabilities": np.where(BOTH, 0.97, 0.02).astype(np.float32),
    "fractions of two grey levels": levels(127 / 255, 1.0, 0.0),
    "smooth probabilities": smooth(BOTH, 1.0),
    "smooth 8 bits": np.rint(255 * smooth(BOTH, 1.0)).astype(np.uint8),
    "smooth 16 bits": np.rint(65535 * smooth(BOTH, 1.0)).astype(np.uint16),
    "smooth, two grey levels": np.rint(smooth(levels(100, 200), 1.0)).astype(np.uint8),
    "noise": np.where(BOTH, 250, 8) + np.random.default_rng(0).integers(-3, 4, BOTH.shape),
    "JPEG's traces in a PNG": jpeg(levels(127, 255), 60),
}


@pytest.mark.parametrize("form", RIGHT_MASKS)
def test_both_lungs_are_read_from(form):
    mask, _ = mask_files.lung_pixels(np.asarray(RIGHT_MASKS[form]))
    assert overlap(mask, BOTH) > (0.98 if "smooth" in form else 0.9999)


@pytest.mark.parametrize("quality", [30, 60, 90])
@pytest.mark.parametrize(("a", "b"), [(255, 255), (127, 255), (85, 170)])
def test_the_noise_of_jpeg_is_forgiven(a, b, quality):
    mask, between = mask_files.lung_pixels(jpeg(levels(a, b), quality), lossy=True)
    assert between and overlap(mask, BOTH) > 0.99


def test_antialiased_edges_are_cut_at_half_of_their_own_lung():
    """Four times as fine, then the mean of 4 x 4 pixels: a pixel is lung where at least half of it is."""
    fine = [
        [[4 * x + 2, 4 * y + 2] for x, y in one]
        for one in ([[12, 18], [42, 18], [30, 78]], [[66, 18], [108, 84], [66, 72]])
    ]
    a, b = (lungs(one, height=4 * HEIGHT, width=4 * WIDTH) for one in fine)
    mean = lambda fine: fine.reshape(HEIGHT, 4, WIDTH, 4).mean((1, 3))  # noqa: E731
    mask, between = mask_files.lung_pixels(np.rint(mean(100.0 * a + 200.0 * b)).astype(np.uint8))
    assert between
    np.testing.assert_array_equal(mask, mean((a | b) * 1.0) >= 0.5)


UNCLEAR = {
    "three labels": levels(1, 2) + 3 * HEART,
    "three grey levels": levels(85, 170) + 255 * HEART,
    "five lobes": (np.digitize(np.mgrid[:HEIGHT, :WIDTH][0], [30, 45, 60, 75]) + 1) * BOTH,
    "an unlikely probability beside a likely one": levels(0.3, 0.97, 0.02),
    "no probability of a half": np.where(BOTH, 0.4, 0.1),
    "logits": np.where(BOTH, 3.3, -4.2),
    "not finite": np.where(BOTH, np.nan, 0.0),
    "one value everywhere": np.full(BOTH.shape, 255),
    "outlines brighter than the labels": np.where(ndimage.binary_dilation(BOTH) & ~BOTH, 255, levels(1, 2)),
    "a photograph": np.rint(smooth(np.random.default_rng(0).normal(0, 1, BOTH.shape), 4) * 600 + 128),
    "sensor noise": XRAY,
}


@pytest.mark.parametrize("form", UNCLEAR)
def test_what_does_not_tell_its_lungs_is_refused(form):
    with pytest.raises(ValueError, match=r"\w"):
        mask_files.lung_pixels(np.asarray(UNCLEAR[form]))


def test_labels_in_a_jpeg_are_refused_and_a_black_one_is_empty():
    with pytest.raises(ValueError, match="noise"):
        mask_files.lung_pixels(levels(1, 2), lossy=True)
    assert not mask_files.lung_pixels(0 * levels(1, 2), lossy=True)[0].any()


def palette(*colours):
    image = Image.fromarray(levels(1, 2).astype(np.uint8), "P")
    image.putpalette([value for colour in colours for value in colour])
    return image


PICTURES = {
    "1 bit": Image.fromarray(BOTH),
    "a black palette": palette((0, 0, 0), (0, 0, 0), (0, 0, 0)),
    "a palette with one black lung": palette((0, 0, 0), (0, 0, 0), (255, 255, 255)),
    "a palette of a bright and a dark lung": palette((0, 0, 0), (255, 255, 255), (20, 20, 20)),
    "a palette of two colours": palette((0, 0, 0), (128, 0, 0), (0, 128, 0)),
    "red and green": Image.fromarray(np.stack([A * 255, B * 255, A * 0], 2).astype(np.uint8)),
    "red on nothing": Image.fromarray(np.stack([BOTH * 255, A * 0, A * 0, BOTH * 128], 2).astype(np.uint8)),
    "black on nothing": Image.fromarray(np.stack([A * 0, A * 0, A * 0, BOTH * 255], 2).astype(np.uint8)),
}


@pytest.mark.parametrize("form", PICTURES)
def test_both_lungs_are_read_from_a_picture_of(form, tmp_path):
    PICTURES[form].save(tmp_path / "m.png")
    mask, remark = mask_files.read_mask(tmp_path / "m.png", XRAY)
    np.testing.assert_array_equal(mask, BOTH)
    assert remark == ""


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (~BOTH, "mask unclear"),  # lungs in black
        (np.stack([A * 255, B * 255, HEART * 255], 2), "mask unclear"),
        (XRAY, "mask is its image"),
        (np.clip(XRAY * 0.9 + 5, 0, 255), "mask is its image"),
        (levels(1, 2)[:-1], "mask of another size"),
        (np.pad(~BOTH[2:-2, 2:-2], 2), "mask unclear"),  # lungs in black, with a black frame
        (np.pad(np.ones((56, 80), bool), 20), "mask unclear"),  # a box
        (BOTH & ~ndimage.binary_erosion(BOTH), "mask unclear"),  # contours
        (levels(1, 1) + 255 * HEART, "mask unclear"),  # labels, with what to ignore
    ],
)
def test_a_mask_file_that_is_none_is_left_out(values, reason, tmp_path):
    values = values if values.dtype == bool else values.astype(np.uint8)
    save(tmp_path / "m.png", values)
    with pytest.raises(SkippedFile) as caught:
        mask_files.read_mask(tmp_path / "m.png", XRAY)
    assert caught.value.reason == reason


def test_several_pages_are_not_read_as_the_first(tmp_path):
    pages = [Image.fromarray(one) for one in (A, B)]
    pages[0].save(tmp_path / "m.tif", save_all=True, append_images=pages[1:])
    with pytest.raises(SkippedFile, match="2 pictures"):
        mask_files.read_mask(tmp_path / "m.tif", XRAY)


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
    np.testing.assert_array_equal(mask_files.read_mask(path, picture(0))[0], mask)

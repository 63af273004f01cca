"""Masks come back in an image's own size, and the two lungs are told apart, by hand and by Pillow."""

import made_runs
import made_sources
import numpy as np
import pytest
import torch
from PIL import Image

from fmfl import models, train, use


def picture(*parts, height=40, width=60):
    """A mask with rectangles, each (top, bottom, left, right)."""
    mask = np.zeros((height, width), bool)
    for top, bottom, left, right in parts:
        mask[top:bottom, left:right] = True
    return mask


#: At the image's left 20 x 10 pixels, at its right 20 x 15.
ONE, OTHER = (10, 30, 10, 20), (10, 30, 35, 50)


def test_the_patients_right_lung_is_at_the_images_left():
    found = use.lungs(picture(ONE, OTHER))
    assert (found.right, found.left, found.area, found.parts, found.remark) == (200, 300, 500, 2, "")
    assert set(found.labels[10:30, 10:20].ravel()) == {1} and set(found.labels[10:30, 35:50].ravel()) == {2}
    assert (found.labels > 0).sum() == 500


def test_a_mirrored_image_exchanges_the_lungs():
    found = use.lungs(picture(ONE, OTHER)[:, ::-1])
    assert (found.right, found.left) == (300, 200)


@pytest.mark.parametrize(
    ("parts", "number", "says"),
    [
        ([], 0, "no lung was found"),
        ([ONE], 1, "1 part instead of 2: the lungs touch, or one is missing"),
        ([ONE, OTHER, (15, 16, 20, 35)], 1, "1 part instead of 2"),
        ([ONE, OTHER, (32, 38, 25, 33)], 3, "3 parts instead of 2"),
        ([(2, 12, 10, 20), (20, 38, 12, 22)], 2, "2 parts, and one lies above the other"),
    ],
)
def test_what_is_not_two_lungs_side_by_side_is_said_and_has_no_sides(parts, number, says):
    mask = picture(*parts)
    found = use.lungs(mask)
    assert found.parts == number and found.remark.startswith(says)
    assert found.right is None and found.left is None
    assert found.area == mask.sum()


def test_parts_that_touch_at_a_corner_are_one():
    assert use.lungs(picture((5, 15, 5, 15), (15, 30, 15, 30))).parts == 1


def test_a_speck_counts_in_the_area_and_not_as_a_part():
    found = use.lungs(picture(ONE, OTHER, (35, 36, 25, 27)))
    assert (found.right, found.left, found.area, found.parts) == (200, 300, 502, 2)
    assert found.remark == "1 speck beside them"


def test_another_organ_has_parts_and_no_sides():
    mask = np.zeros((40, 40), bool)
    mask[5:15, 5:15] = mask[5:15, 25:35] = mask[25:35, 5:15] = True
    mask[39, 39] = True
    found = use.parts_of(mask)
    assert (found.area, found.parts, found.right, found.left, found.remark) == (301, 3, None, None, "")
    assert set(np.unique(found.labels)) == {0, 3} and (found.labels > 0).sum() == 301


@pytest.mark.parametrize(("height", "width"), [(32, 32), (97, 64), (300, 401)])
def test_a_mask_in_the_images_own_size_is_pillows_bilinear_one(height, width):
    """Pillow enlarges floats by the same rule, by other code; values at the edge of rounding are left out."""
    logits = torch.randn(1, 32, 32, generator=torch.Generator().manual_seed(0))
    mine = use.mask_in_own_size(logits, height, width)
    pillows = np.asarray(
        Image.fromarray(logits[0].numpy()).resize((width, height), Image.Resampling.BILINEAR)
    )
    sure = np.abs(pillows) > 1e-5
    assert mine.shape == (height, width) and sure.mean() > 0.99
    np.testing.assert_array_equal(mine[sure], pillows[sure] > 0)


def test_in_the_students_own_size_nothing_is_interpolated():
    logits = torch.randn(1, 32, 32, generator=torch.Generator().manual_seed(1))
    np.testing.assert_array_equal(use.mask_in_own_size(logits, 32, 32), logits[0].numpy() > 0)


def test_pictures_are_squeezed_as_a_study_reads_them(tmp_path):
    folder = made_sources.make_folder(tmp_path / "source")
    expected = made_sources.load(folder).images
    pictures = [made_sources.picture(seed) for seed in range(3)]
    torch.testing.assert_close(use.squeeze(pictures, made_sources.SIZE), expected, rtol=0, atol=0)


def test_logits_are_those_of_the_training_code():
    """The scores of a study come from `train.predict`."""
    model = models.build(made_runs.STUDENT)
    models.load_state(model, made_runs.trained())
    images = made_runs.cohort().images[:5]
    expected = train.predict(model, images, torch.arange(5))
    mine = use.logits(model, [image[0].numpy() for image in images], made_runs.SIZE)
    torch.testing.assert_close(mine, expected, rtol=0, atol=0)
    assert use.logits(model, [], made_runs.SIZE).shape == (0, 1, made_runs.SIZE, made_runs.SIZE)


def test_an_overlay_has_outlines_in_the_parts_colours_and_leaves_the_rest():
    grey = np.full((40, 60), 100, np.uint8)
    drawn = use.overlay(grey, use.lungs(picture(ONE, OTHER)).labels)
    assert drawn.shape == (40, 60, 3)
    assert tuple(drawn[10, 10]) == use.COLOURS["right"] and tuple(drawn[29, 49]) == use.COLOURS["left"]
    assert tuple(drawn[20, 15]) == (100, 100, 100), "inside a lung the X-ray is seen"
    changed = (drawn != 100).any(axis=2)
    assert changed.sum() == (2 * 20 + 2 * 8) + (2 * 20 + 2 * 13), "the rims of 20 x 10 and 20 x 15 pixels"


def test_a_large_overlay_is_made_smaller():
    grey = np.zeros((1500, 3000), np.uint8)
    assert use.overlay(grey, grey).shape == (512, 1024, 3)

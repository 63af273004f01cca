"""The batched augmentation against albumentations, against OpenCV and by hand.

Tolerances. OpenCV moves 8-bit pictures with exact coordinates, so after rounding only ties may differ: at
most one grey level (times the contrast), on few pixels. It moves floating-point maps with coordinates rounded
to 1/32 pixel, so logits may differ by their slope times 1/64 pixel along each axis.
"""

import os
import subprocess
import sys

import cv2
import numpy as np
import pytest
import torch

from fmfl import augment
from fmfl.augment import AUGMENTATIONS, BACKGROUND_LOGIT, apply, draw
from fmfl.errors import UserError

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")),
]
NOTHING = {"rotation": 0, "horizontal_flip": 0, "vertical_flip": 0, "brightness": 0, "contrast": 0}
ONLY = {
    "rotation": NOTHING | {"rotation": 25},
    "horizontal flip": NOTHING | {"horizontal_flip": 0.5},
    "vertical flip": NOTHING | {"vertical_flip": 0.5},
    "brightness": NOTHING | {"brightness": 0.3},
    "contrast": NOTHING | {"contrast": 0.3},
    "everything": {"rotation": 25, "vertical_flip": 0.5, "brightness": 0.3, "contrast": 0.3},
}
MAX_SLOPE = 1.3  # of the test picture's logits along one axis, logits a pixel: 6 / 9 + 6 / 11


def batch(num_images: int = 12, height: int = 64, width: int = 64):
    """Smooth pictures without any symmetry, masks of their bright parts, logits that repeat their values."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    phase = torch.arange(num_images).view(-1, 1, 1, 1)
    images = (
        (127 + 60 * torch.sin(x / 9 + phase) + 60 * torch.cos(y / 11 - phase * x / 99))
        .round()
        .to(torch.uint8)
    )
    return images, (images > 140).to(torch.uint8), logits_of(images.float())


def logits_of(grey: torch.Tensor) -> torch.Tensor:
    return (grey - 127) / 10


def some_draws(num_images: int = 12, seed: int = 0, **settings) -> torch.Tensor:
    return draw(num_images, torch.Generator().manual_seed(seed), **settings)


def one_draw(angle=0.0, horizontal=0.0, vertical=0.0, brightness=0.0, contrast=1.0) -> torch.Tensor:
    return torch.tensor([[angle, horizontal, vertical, brightness, contrast]])


def well_inside(draws: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Pixels of the result that come from at least two pixels inside the input."""
    inner = torch.zeros(len(draws), 1, height, width, dtype=torch.uint8)
    inner[..., 2:-2, 2:-2] = 255
    draws = draws * torch.tensor([1.0, 1, 1, 0, 0]) + torch.tensor([0.0, 0, 0, 0, 1])
    return apply(inner, inner, draws)[0] == 1


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("size", [(64, 64), (48, 72)], ids=["square", "wide"])
@pytest.mark.parametrize("name", ONLY)
def test_equals_albumentations_on_the_same_draws(name, size, device):
    images, masks, logits = batch(12, *size)
    draws = some_draws(**ONLY[name])
    ours = [x.cpu() for x in apply(*(x.to(device) for x in (images, masks, draws, logits)))]
    theirs = augment.albumentations(images, masks, draws, logits)

    grey_levels = 255 * (ours[0] - theirs[0]).abs()
    assert grey_levels.mean() < 0.01
    assert grey_levels.max() <= 1.31  # one grey level times the largest contrast
    assert (ours[1] == theirs[1]).float().mean() > 0.995
    logit_error = (ours[2] - theirs[2]).abs()[well_inside(draws, *size)]
    assert logit_error.max() < 2 * MAX_SLOPE / 64
    assert [x.dtype for x in ours] == [x.dtype for x in theirs] == [torch.float32] * 3


def turned_by_opencv(images: torch.Tensor, draws: torch.Tensor, centre: tuple[float, float]) -> torch.Tensor:
    """Counter-clockwise about a centre (x, y) in pixels, whose own centres are whole numbers."""
    height, width = images.shape[-2:]
    turned = [
        cv2.warpAffine(
            image, cv2.getRotationMatrix2D(centre, angle, 1.0), (width, height), flags=cv2.INTER_LINEAR
        )
        for image, angle in zip(images[:, 0].numpy(), draws[:, 0].tolist(), strict=True)
    ]
    return torch.from_numpy(np.stack(turned))[:, None].float()


def test_a_wrong_sign_or_a_centre_half_a_pixel_off_would_be_seen():
    """The twin could share a mistake: OpenCV's own matrix decides, and shows that the tolerance is strict."""
    images, masks, _ = batch()
    draws = some_draws(**ONLY["rotation"])
    ours = 255 * apply(images, masks, draws)[0]

    def error(centre: tuple[float, float], sign: int = 1) -> float:
        return (ours - turned_by_opencv(images, sign * draws, centre)).abs().mean().item()

    assert error((31.5, 31.5)) < 0.01
    assert error((32.0, 32.0)) > 0.3
    assert error((31.5, 31.5), sign=-1) > 10


def test_a_quarter_turn_is_counter_clockwise():
    images = torch.zeros(1, 1, 5, 5, dtype=torch.uint8)
    images[0, 0, 2, 4] = 255  # the right end of the middle row
    pictures, masks, _ = apply(images, images.bool(), one_draw(angle=90))
    assert pictures[0, 0].nonzero().tolist() == [[0, 2]]  # the top of the middle column
    assert masks[0, 0].nonzero().tolist() == [[0, 2]]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("size", [(64, 64), (96, 96), (37, 51)])
def test_flips_and_doing_nothing_are_exact(size, device):
    images, masks, logits = (x.to(device) for x in batch(4, *size))
    for horizontal, vertical, axes in ((0, 0, []), (1, 0, [-1]), (0, 1, [-2]), (1, 1, [-1, -2])):
        draws = one_draw(horizontal=horizontal, vertical=vertical).expand(4, -1).to(device)
        pictures, moved_masks, moved_logits = apply(images, masks, draws, logits)
        assert pictures.equal(images.flip(axes) / 255)
        assert moved_masks.equal(masks.flip(axes).float())
        torch.testing.assert_close(moved_logits, logits.flip(axes), rtol=0, atol=1e-4)


@pytest.mark.parametrize(("brightness", "contrast"), [(0.2, 1.0), (-0.2, 1.0), (0.0, 1.2), (0.1, 0.8)])
def test_brightness_adds_parts_of_white_and_contrast_multiplies(brightness, contrast):
    images = torch.tensor([0, 51, 204, 255], dtype=torch.uint8).view(1, 1, 2, 2)
    masks = torch.tensor([0, 1, 1, 0], dtype=torch.uint8).view(1, 1, 2, 2)
    draws = one_draw(brightness=brightness, contrast=contrast)
    pictures, moved_masks, moved_logits = apply(images, masks, draws, logits_of(images.float()))
    expected = [min(max(x * contrast + brightness, 0), 1) for x in (0, 0.2, 0.8, 1)]
    assert pictures.flatten().tolist() == pytest.approx(expected, abs=1e-6)
    assert moved_masks.equal(masks.float())
    torch.testing.assert_close(moved_logits, logits_of(images.float()))


def test_masks_and_logits_move_with_the_picture():
    """Mask and logits are functions of the picture's grey value; they must still be after any movement."""
    images, masks, logits = batch()
    draws = some_draws(**(ONLY["everything"] | {"brightness": 0, "contrast": 0}))
    pictures, moved_masks, moved_logits = apply(images, masks, draws, torch.cat((logits, -logits), dim=1))
    inside = well_inside(draws, 64, 64)
    grey = 255 * pictures[inside]
    assert (logits_of(grey) - moved_logits[:, :1][inside]).abs().max() < 0.06  # half a grey level of rounding
    assert (logits_of(grey) + moved_logits[:, 1:][inside]).abs().max() < 0.06
    clear = (grey - 140).abs() > 12  # grey levels further from the threshold than neighbours differ
    assert (moved_masks[inside][clear] == (grey[clear] > 140)).all()
    assert moved_masks.unique().tolist() == [0, 1]


def test_what_lies_outside_the_picture_is_background():
    full = torch.full((1, 1, 32, 32), 255, dtype=torch.uint8)
    for augmentation in (apply, augment.albumentations):
        pictures, masks, logits = augmentation(
            full, full > 0, one_draw(angle=45), torch.full((1, 2, 32, 32), 8.0)
        )
        assert pictures[0, 0, 0, 0] == masks[0, 0, 0, 0] == 0
        assert logits[0, :, 0, 0].tolist() == [BACKGROUND_LOGIT] * 2
        assert logits.min() >= BACKGROUND_LOGIT and logits.max() < 8.001
        assert pictures[0, 0, 16, 16] == masks[0, 0, 16, 16] == 1


def test_each_image_follows_its_own_draw():
    images, masks, logits = batch()
    draws = some_draws(**ONLY["everything"])
    together = apply(images, masks, draws, logits)
    for i in range(len(images)):
        alone = apply(images[i : i + 1], masks[i : i + 1], draws[i : i + 1], logits[i : i + 1])
        for one, all_of_them in zip(alone, together, strict=True):
            torch.testing.assert_close(one[0], all_of_them[i])


def test_dtype_and_memory_layout_do_not_matter():
    images, masks, logits = batch()
    draws = some_draws(**ONLY["everything"])
    expected = apply(images, masks, draws, logits.half().float())
    variant = (images.to(memory_format=torch.channels_last), masks.bool(), draws, logits.half())
    for got, wanted in zip(apply(*variant), expected, strict=True):
        torch.testing.assert_close(got, wanted)


def test_nothing_is_read_back_from_the_device():
    """Tensors on the meta device have shapes and no values, so any read of a value raises."""
    on_meta = [x.to("meta") for x in (*batch()[:2], some_draws(), batch()[2])]
    assert [tuple(x.shape) for x in apply(*on_meta)] == [(12, 1, 64, 64)] * 3


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_the_choices_are_interchangeable(name):
    images, masks, logits = batch(3)
    originals = [x.clone() for x in (images, masks, logits)]
    pictures, moved_masks, moved_logits = AUGMENTATIONS[name](images, masks, some_draws(3), logits)
    for result in (pictures, moved_masks, moved_logits):
        assert result.dtype == torch.float32 and result.shape == images.shape
    assert pictures.min() >= 0 and pictures.max() <= 1
    assert AUGMENTATIONS[name](images, masks, some_draws(3))[2] is None
    for before, after in zip(originals, (images, masks, logits), strict=True):
        assert before.equal(after)  # the cohort itself is never written to


def test_none_only_converts():
    images, masks, logits = batch()
    pictures, same_masks, same_logits = AUGMENTATIONS["none"](images, masks, some_draws(), logits)
    assert pictures.equal(images / 255) and pictures.equal(augment.to_float(images))
    assert same_masks.equal(masks.float()) and same_logits.equal(logits)


def test_albumentations_is_imported_when_used_and_never_asks_for_updates():
    code = "import sys, fmfl.augment; sys.exit('albumentations' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    augment.albumentations(*batch(1)[:2], one_draw())
    assert os.environ["NO_ALBUMENTATIONS_UPDATE"] == "1"


def test_the_same_seed_draws_the_same():
    assert some_draws(100, seed=1).equal(some_draws(100, seed=1))
    assert not some_draws(100, seed=1).equal(some_draws(100, seed=2))


def test_draws_fill_their_ranges():
    draws = some_draws(
        4000, rotation=15, horizontal_flip=0.25, vertical_flip=0.75, brightness=0.2, contrast=0.1
    )
    assert draws.dtype == torch.float32 and draws.shape == (4000, 5)
    lowest, highest = draws.amin(0).tolist(), draws.amax(0).tolist()
    assert lowest == pytest.approx([-15, 0, 0, -0.2, 0.9], abs=0.05)
    assert highest == pytest.approx([15, 1, 1, 0.2, 1.1], abs=0.05)
    assert draws.mean(0).tolist() == pytest.approx([0, 0.25, 0.75, 0, 1], abs=0.5)
    assert draws[:, 1:3].mean(0).tolist() == pytest.approx([0.25, 0.75], abs=0.03)
    assert draws[:, 1:3].unique().tolist() == [0, 1]


def test_the_default_never_stands_an_x_ray_on_its_head():
    assert some_draws(1000)[:, 2].sum() == 0


def test_changing_one_setting_leaves_the_other_draws():
    default, flat = some_draws(50), some_draws(50, rotation=0)
    assert flat[:, 0].abs().sum() == 0
    assert flat[:, 1:].equal(default[:, 1:])


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("rotation", -1),
        ("rotation", 181),
        ("horizontal_flip", 1.5),
        ("vertical_flip", -0.1),
        ("brightness", 2),
        ("contrast", float("nan")),
    ],
)
def test_a_setting_outside_its_range_is_named(setting, value):
    with pytest.raises(UserError, match=f"{setting} is {value}"):
        some_draws(**{setting: value})


@pytest.mark.parametrize("augmentation", AUGMENTATIONS.values(), ids=AUGMENTATIONS.keys())
def test_shapes_that_do_not_belong_together_are_refused(augmentation):
    images, masks, logits = batch(3)
    draws = some_draws(3)
    with pytest.raises(ValueError, match="masks"):
        augmentation(images, masks[..., 1:], draws)
    with pytest.raises(ValueError, match="draws"):
        augmentation(images, masks, draws[:2])
    with pytest.raises(ValueError, match="extra"):
        augmentation(images, masks, draws, logits[:1])
    with pytest.raises(ValueError, match="uint8"):
        augmentation(images.float(), masks, draws)

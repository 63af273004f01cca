"""Scores by hand, against MONAI and the definition written out slowly, and on empty masks."""

import math

import numpy as np
import pandas as pd
import pytest
import torch
from monai.metrics import (
    compute_average_surface_distance,
    compute_dice,
    compute_hausdorff_distance,
    compute_iou,
)

from fmfl import metrics
from fmfl.metrics import assd, calibration_error, dice, hd95, iou, reliability, score

SCORES = {"dice": dice, "iou": iou, "hd95": hd95, "assd": assd}


def box(top: int, bottom: int, left: int, right: int, size: tuple[int, int] = (10, 10)) -> torch.Tensor:
    """uint8 [1, 1, H, W]: 1 in rows top..bottom - 1 and columns left..right - 1."""
    mask = torch.zeros(1, 1, *size, dtype=torch.uint8)
    mask[..., top:bottom, left:right] = 1
    return mask


def blobs(seed: int, num_images: int = 6, height: int = 40, width: int = 56) -> torch.Tensor:
    """Smooth random shapes with islands and holes, many touching the image's edge: bool [B, 1, H, W]."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(num_images, 1, height // 8, width // 8, generator=generator)
    return torch.nn.functional.interpolate(noise, (height, width), mode="bicubic") > 0.2


def test_two_boxes_by_hand():
    """Boxes of 4 x 4 pixels, one two columns to the right of the other: 8 pixels shared, 16 + 16 in all.

    Dice 2 * 8 / 32 = 1/2; IoU 8 / (32 - 8) = 1/3. Of the 12 surface pixels of each box, numbered by column
    (4, 2, 2, 4 pixels), seen from the left box whose columns are 0..3 (the other's are 2..5):
        column 0: 2 away for each of its 4 pixels (top row and bottom row meet the other's own rows);
        column 1: its 2 pixels are 1 away;
        column 2: its 2 pixels lie on the other's first column: 0;
        column 3: top and bottom lie on the other's rows: 0; the middle two are 1 from column 2.
    Sum 4*2 + 2*1 + 0 + 2*1 = 12, and by symmetry 12 from the right box: ASSD = 24 / 24 = 1.
    Sorted distances 0,0,0,0,1,1,1,1,2,2,2,2: the 95th percentile is 2, and so is HD95.
    """
    left, right = box(3, 7, 2, 6), box(3, 7, 4, 8)
    assert dice(left, right).item() == pytest.approx(1 / 2)
    assert iou(left, right).item() == pytest.approx(1 / 3)
    assert assd(left, right).item() == pytest.approx(1)
    assert hd95(left, right).item() == pytest.approx(2)


def test_hd95_takes_the_percentile_before_the_larger_direction():
    """A prediction of one pixel of a row of 21: from it 0; from the row 0..20, whose 95th percentile is 19.

    Pooling both directions first would give 18.95, and the full Hausdorff distance is 20.
    """
    pixel, row = box(4, 5, 0, 1, (9, 21)), box(4, 5, 0, 21, (9, 21))
    assert hd95(pixel, row).item() == pytest.approx(19)
    assert hd95(row, pixel).item() == pytest.approx(19)
    assert assd(pixel, row).item() == pytest.approx(sum(range(21)) / 22)


@pytest.mark.filterwarnings("ignore:monai:FutureWarning")  # MONAI's calls to its own deprecated arguments
@pytest.mark.parametrize("seed", range(3))
def test_all_scores_equal_monais(seed):
    predicted, masks = blobs(seed), blobs(seed + 100)
    oracles = {
        "dice": compute_dice(predicted, masks),
        "iou": compute_iou(predicted, masks),
        "hd95": compute_hausdorff_distance(predicted, masks, include_background=True, percentile=95),
        "assd": compute_average_surface_distance(predicted, masks, include_background=True, symmetric=True),
    }
    for name, expected in oracles.items():
        torch.testing.assert_close(
            SCORES[name](predicted, masks), expected[:, 0].float(), rtol=1e-5, atol=1e-5
        )


def test_surface_distances_equal_the_definition_written_out():
    """Every surface pixel against every other, found by looking at four neighbours one at a time."""

    def surface(mask: np.ndarray) -> list[tuple[int, int]]:
        inside = {(int(y), int(x)) for y, x in np.argwhere(mask)}
        return [(y, x) for y, x in inside if {(y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)} - inside]

    predicted, masks = blobs(7, 2, 24, 32), blobs(8, 2, 24, 32)
    for i in range(2):
        ours, theirs = surface(predicted[i, 0].numpy()), surface(masks[i, 0].numpy())
        there = [min(math.dist(a, b) for b in theirs) for a in ours]
        back = [min(math.dist(a, b) for a in ours) for b in theirs]
        assert assd(predicted, masks)[i].item() == pytest.approx(np.mean(there + back), rel=1e-5)
        expected = max(np.percentile(there, 95), np.percentile(back, 95))
        assert hd95(predicted, masks)[i].item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("pairs", [2**26, 2**14, 1])
def test_comparing_all_points_gives_the_k_d_trees_distances(monkeypatch, pairs):
    """A GPU's way, at any amount of memory: blobs, noise, a filled image, and one or both masks empty."""
    predicted, masks = blobs(0, 12), blobs(1, 12)
    predicted[3] = torch.rand(predicted[3].shape, generator=torch.Generator().manual_seed(2)) > 0.5
    predicted[4], masks[5], predicted[6], masks[6], masks[7] = False, False, False, False, True
    predicted[8] = False
    predicted[8, 0, 7, 9] = True
    expected = metrics._surface_scores(predicted, masks)
    monkeypatch.setattr(metrics, "_PAIRS", pairs)
    surfaces = torch.cat((metrics._surface(predicted), metrics._surface(masks)), dim=1)
    torch.testing.assert_close(metrics._compare_all(surfaces).float(), expected, rtol=0, atol=1e-5)
    assert metrics._compare_all(surfaces[:0]).shape == (0, 2)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gives_the_scores_of_a_cpu():
    predicted, masks = blobs(0, 40, 96, 96), blobs(1, 40, 96, 96)
    expected, found = score(predicted, masks), score(predicted.cuda(), masks.cuda())
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def test_a_mask_that_fills_the_image_has_the_images_edge_as_its_surface():
    """Of the 32 edge pixels of 9 x 9, the farthest 5 % from the middle are corners, (4, 4) away."""
    full, middle = box(0, 9, 0, 9, (9, 9)), box(4, 5, 4, 5, (9, 9))
    assert hd95(middle, full).item() == pytest.approx(math.hypot(4, 4))
    assert hd95(full, full).item() == 0
    assert assd(full, full).item() == 0


def test_equal_masks_are_perfect():
    masks = blobs(1)
    assert dice(masks, masks).tolist() == iou(masks, masks).tolist() == [1.0] * 6
    assert hd95(masks, masks).tolist() == assd(masks, masks).tolist() == [0.0] * 6


def test_empty_masks_follow_the_stated_rule():
    """Both empty, only the prediction empty, only the mask empty; a 6 x 8 image has a diagonal of 10."""
    empty, some = box(0, 0, 0, 0, (6, 8)), box(1, 3, 1, 3, (6, 8))
    predicted, masks = torch.cat((empty, empty, some)), torch.cat((empty, some, empty))
    assert dice(predicted, masks).tolist() == iou(predicted, masks).tolist() == [1, 0, 0]
    assert hd95(predicted, masks).tolist() == assd(predicted, masks).tolist() == [0, 10, 10]
    assert np.isfinite(score(predicted, masks).to_numpy()).all()


@pytest.mark.parametrize("name", SCORES)
def test_a_batch_equals_its_images_one_by_one(name):
    predicted, masks = blobs(2), blobs(3)
    predicted[1] = False
    alone = [SCORES[name](predicted[i : i + 1], masks[i : i + 1]) for i in range(6)]
    together = SCORES[name](predicted, masks)
    assert together.dtype == torch.float32 and together.shape == (6,)
    assert together.equal(torch.cat(alone))


@pytest.mark.parametrize("name", SCORES)
def test_scores_do_not_depend_on_how_a_mask_is_stored(name):
    predicted, masks = blobs(2), blobs(3)
    expected = SCORES[name](predicted, masks)
    for variant in (
        masks.to(torch.uint8),
        255 * masks.to(torch.uint8),
        masks.float(),
        0.4 + 0.2 * masks.double(),
    ):
        assert SCORES[name](variant, predicted).equal(expected)  # all four scores are symmetric
        assert SCORES[name](predicted, variant).equal(expected)


def test_an_empty_batch_has_no_scores():
    nothing = torch.zeros(0, 1, 8, 8)
    assert [len(function(nothing, nothing)) for function in SCORES.values()] == [0] * 4
    assert score(nothing, nothing).shape == (0, 4)


def test_score_is_a_table_of_the_four():
    masks = blobs(3)
    probabilities = torch.rand(masks.shape, generator=torch.Generator().manual_seed(0))
    table = score(probabilities, masks, threshold=0.7)
    assert list(table.columns) == list(SCORES)
    for name, function in SCORES.items():
        assert table[name].tolist() == function(probabilities > 0.7, masks).tolist()
    pd.testing.assert_frame_equal(score(probabilities, masks, 0.7, surface=False), table[["dice", "iou"]])


@pytest.mark.parametrize("wrong", [-0.1, 1.1, math.nan])
def test_logits_given_as_probabilities_are_refused(wrong):
    values = torch.full((1, 1, 4, 4), 0.5)
    values[0, 0, 1, 2] = wrong
    for function in (score, reliability, calibration_error):
        with pytest.raises(ValueError, match="sigmoid"):
            function(values, torch.zeros(1, 1, 4, 4))


def test_calibration_by_hand():
    """Two bins. Lower: 0.1, 0.1, 0.4 (mean 0.2), one of three is lung: gap 2/15. Upper: 0.9, lung: gap 1/10.

    Error: (3 * 2/15 + 1 * 1/10) / 4 = 1/8.
    """
    probabilities = torch.tensor([0.1, 0.1, 0.4, 0.9], dtype=torch.float64).view(1, 1, 2, 2)
    masks = torch.tensor([0, 0, 1, 1], dtype=torch.uint8).view(1, 1, 2, 2)
    table = reliability(probabilities, masks, bins=2)
    assert table.lower.tolist() == [0, 0.5] and table.upper.tolist() == [0.5, 1]
    assert table.pixels.tolist() == [3, 1]
    assert table.probability.tolist() == pytest.approx([0.2, 0.9])
    assert table.frequency.tolist() == pytest.approx([1 / 3, 1])
    assert calibration_error(probabilities, masks, bins=2) == pytest.approx(1 / 8)


def test_calibration_equals_a_group_by_of_pandas():
    generator = torch.Generator().manual_seed(0)
    probabilities = torch.rand(4, 1, 32, 32, generator=generator) ** 2
    masks = torch.rand(4, 1, 32, 32, generator=generator) < probabilities.sqrt()
    pixels = pd.DataFrame({"p": probabilities.flatten().double(), "y": masks.flatten().double()})
    groups = pixels.groupby(pd.cut(pixels.p, np.linspace(0, 1, 16), right=False), observed=True)
    expected = (groups.y.mean() - groups.p.mean()).abs() @ groups.size() / len(pixels)
    assert expected > 0.1
    assert calibration_error(probabilities, masks) == pytest.approx(expected)


def test_certain_and_right_is_calibrated_and_certain_and_wrong_is_not():
    """Also the edges: probabilities of exactly 0 and 1 have a bin, and empty bins count nothing."""
    masks = blobs(1)
    assert calibration_error(masks.float(), masks) == 0
    assert calibration_error(1 - masks.float(), masks) == 1
    table = reliability(masks.float(), masks, bins=5)
    assert table.pixels.sum() == masks.numel() and table.pixels[1:4].sum() == 0
    assert table.frequency[1:4].isna().all()


def test_honest_probabilities_have_almost_no_error():
    """Masks drawn with the stated probabilities: what is left is the noise of 100,000 coins, about 0.003."""
    generator = torch.Generator().manual_seed(0)
    probabilities = torch.rand(1, 1, 250, 400, generator=generator)
    masks = torch.rand(1, 1, 250, 400, generator=generator) < probabilities
    assert calibration_error(probabilities, masks) < 0.008
    assert calibration_error(probabilities**2, masks) > 0.1


@pytest.mark.parametrize("function", [*SCORES.values(), score, reliability, calibration_error])
def test_shapes_that_differ_are_refused(function):
    for predicted, masks in (((2, 1, 4, 4), (1, 1, 4, 4)), ((1, 1, 4, 4), (1, 1, 4, 5)), ((4, 4), (4, 4))):
        with pytest.raises(ValueError, match="must both be"):
            function(torch.zeros(predicted), torch.zeros(masks))


def test_calibration_needs_a_bin():
    with pytest.raises(ValueError, match="bins"):
        reliability(torch.zeros(1, 1, 4, 4), torch.zeros(1, 1, 4, 4), bins=0)

"""Scores of predicted masks, one value an image (Dice, IoU, HD95, ASSD), and calibration of probabilities.

Empty masks. Both empty: the prediction is right, so dice = iou = 1 and hd95 = assd = 0. Exactly one empty:
nothing was found or all was made up, so dice = iou = 0, and hd95 = assd = the image's diagonal in pixels,
the largest distance there can be; a finite value, so that means over images exist.

Surfaces are the mask's pixels with a neighbour (above, below, left, right) outside the mask or the image, and
distances are in pixels of the masks as given. This is MONAI's definition (`compute_hausdorff_distance` with
percentile 95, `compute_average_surface_distance(symmetric=True)`), and MONAI is the oracle of the tests. It
is not used here: its import alone takes some seconds of every notebook, and its two calls take five times as
long as one search, since each finds the surfaces and the distances again, image by image.
"""

import math

import numpy as np
import pandas as pd
import scipy
import torch
from torch import Tensor
from torch.nn import functional as F


def dice(predicted: Tensor, masks: Tensor) -> Tensor:
    """Return the Dice score 2 |P and Y| / (|P| + |Y|), image by image.

    Args:
        predicted: [B, 1, H, W]; values above 0.5 are lung: bool, 0 and 1, 0 and 255 or probabilities.
        masks: [B, 1, H, W], read in the same way.

    Returns:
        float32 [B] in 0..1 on the device of `predicted`; empty masks as stated at the top.

    Raises:
        ValueError: the shapes differ.
    """
    shared, total = _overlap(predicted, masks)
    return torch.where(total == 0, 1.0, 2 * shared / total)


def iou(predicted: Tensor, masks: Tensor) -> Tensor:
    """Return the intersection over union |P and Y| / |P or Y|, image by image; see `dice`."""
    shared, total = _overlap(predicted, masks)
    return torch.where(total == 0, 1.0, shared / (total - shared))


def hd95(predicted: Tensor, masks: Tensor) -> Tensor:
    """Return the 95th percentile of the Hausdorff distance, image by image.

    The larger of two percentiles: of the distances from each surface pixel of the prediction to the nearest
    of the mask, and the other way round. (Tools that pool both directions first give smaller values.)

    Args and errors as for `dice`.

    Returns:
        float32 [B] in pixels on the CPU; empty masks as stated at the top.
    """
    return _surface_scores(predicted, masks)[:, 0]


def assd(predicted: Tensor, masks: Tensor) -> Tensor:
    """Return the average symmetric surface distance, image by image: the mean over both directions.

    Args, returns and errors as for `hd95`.
    """
    return _surface_scores(predicted, masks)[:, 1]


def score(probabilities: Tensor, masks: Tensor, threshold: float = 0.5, surface: bool = True) -> pd.DataFrame:
    """Return all scores of all images.

    Args:
        probabilities: [B, 1, H, W] in 0..1, or masks already (bool).
        masks: [B, 1, H, W] of 0 and 1, in any dtype.
        threshold: values above it are lung.
        surface: also hd95 and assd, about a millisecond an image.

    Returns:
        One row an image, in order: dice, iou and, with `surface`, hd95 and assd in pixels.

    Raises:
        ValueError: the shapes differ, or the probabilities leave 0..1 (logits need a sigmoid first).
    """
    _check_probabilities(probabilities, masks)
    predicted = probabilities > threshold
    columns = {"dice": dice(predicted, masks), "iou": iou(predicted, masks)}
    if surface:
        columns["hd95"], columns["assd"] = _surface_scores(predicted, masks).unbind(dim=1)
    return pd.DataFrame({name: values.cpu().numpy() for name, values in columns.items()})


def reliability(probabilities: Tensor, masks: Tensor, bins: int = 15) -> pd.DataFrame:
    """Return the reliability diagram: the share of lung among all pixels predicted at 70 %, and so on.

    Args:
        probabilities: [B, 1, H, W] in 0..1.
        masks: [B, 1, H, W] of 0 and 1, in any dtype.
        bins: of equal width over 0..1, each with its lower edge and without its upper, the last with both.

    Returns:
        One row a bin, in order, empty bins included: lower, upper (the edges), pixels, probability (their
        mean) and frequency (the share of them that is lung); the last two are NaN in an empty bin.

    Raises:
        ValueError: the shapes differ, the probabilities leave 0..1, or there are no bins.
    """
    _check_probabilities(probabilities, masks)
    if bins < 1:
        raise ValueError(f"bins is {bins}, but must be at least 1")
    values = probabilities.double().flatten().cpu().numpy()
    truth = _as_bool(masks).flatten().cpu().numpy()
    index = np.minimum((values * bins).astype(np.int64), bins - 1)
    pixels = np.bincount(index, minlength=bins)
    filled = np.where(pixels > 0, pixels, np.nan)
    edges = np.linspace(0, 1, bins + 1)
    return pd.DataFrame(
        {
            "lower": edges[:-1],
            "upper": edges[1:],
            "pixels": pixels,
            "probability": np.bincount(index, weights=values, minlength=bins) / filled,
            "frequency": np.bincount(index, weights=truth, minlength=bins) / filled,
        }
    )


def calibration_error(probabilities: Tensor, masks: Tensor, bins: int = 15) -> float:
    """Return the expected calibration error, 0..1: over pixels, the mean of |frequency - probability|.

    The form with bins is that of Guo et al. 2017, arXiv 1706.04599, section 2, here of the probability of
    lung instead of the likelier class's. Most of an image is background of which every student is sure, and
    those pixels dilute the error: it compares students on the same images, not studies.

    Arguments and errors as for `reliability`.
    """
    table = reliability(probabilities, masks, bins)
    gaps = (table.frequency - table.probability).abs()
    return float((gaps * table.pixels).sum() / table.pixels.sum())


def _overlap(predicted: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    """Return |P and Y| and |P| + |Y|, int32 [B]: whole numbers, six times as fast as int64 sums of bool."""
    _check_shapes(predicted, masks)
    predicted, masks = _as_bool(predicted).flatten(1), _as_bool(masks).to(predicted.device).flatten(1)
    shared, ours, theirs = (x.sum(1, dtype=torch.int32) for x in (predicted & masks, predicted, masks))
    return shared, ours + theirs


def _surface_scores(predicted: Tensor, masks: Tensor) -> Tensor:
    """Return hd95 and assd, float32 [B, 2] on the CPU.

    The surfaces of all images are found at once on the device. On a CPU each image then searches the nearest
    of some hundred points in a k-d tree, which costs less than distance transforms of the whole image. A GPU
    compares all points of one surface with all of the other.
    """
    _check_shapes(predicted, masks)
    surfaces = torch.cat((_surface(predicted), _surface(masks).to(predicted.device)), dim=1)
    if surfaces.device.type != "cpu":
        return _compare_all(surfaces).float().cpu()
    diagonal = math.hypot(*predicted.shape[-2:])
    scores = np.zeros((len(surfaces), 2))
    for i, (ours, theirs) in enumerate(surfaces.numpy()):
        ours, theirs = np.argwhere(ours), np.argwhere(theirs)
        if len(ours) and len(theirs):
            there = scipy.spatial.KDTree(theirs).query(ours)[0]
            back = scipy.spatial.KDTree(ours).query(theirs)[0]
            scores[i, 0] = max(np.percentile(there, 95), np.percentile(back, 95))
            scores[i, 1] = np.concatenate((there, back)).mean()
        elif len(ours) or len(theirs):
            scores[i] = diagonal
    return torch.from_numpy(scores).float()


#: Pairs of points whose distances are in memory at once, 12 bytes each while they are squared.
_PAIRS = 2**26


def _compare_all(surfaces: Tensor) -> Tensor:
    """Return hd95 and assd, float64 [B, 2], of surfaces bool [B, 2, H, W] on their device.

    Squared distances of pixels are whole numbers that float32 holds exactly up to sides of 2,896 pixels.
    """
    sizes = surfaces.flatten(2).sum(2)
    diagonal = math.hypot(*surfaces.shape[-2:])
    scores = torch.where(sizes.amax(1) > 0, diagonal, 0.0).double()[:, None].repeat(1, 2)
    both = (sizes.amin(1) > 0).nonzero()[:, 0]
    # Images with surfaces of like size together: a group's points are padded to its largest.
    order = both[sizes[both].sum(1).argsort()]
    largest = sizes[order].amax(1).tolist()
    while largest:
        number = max(1, min(len(largest), _PAIRS // largest[-1] ** 2))
        group, order = order[-number:], order[:-number]
        del largest[-number:]
        points = [_points(surfaces[group, side]) for side in range(2)]
        distances = torch.cat([_nearest(*points), _nearest(*points[::-1])], dim=1)
        width = points[0].shape[1]
        ways = distances[:, :width], distances[:, width:]
        scores[group, 0] = torch.stack([way.nanquantile(0.95, dim=1) for way in ways]).amax(0)
        scores[group, 1] = distances.nanmean(1)
    return scores


def _points(surface: Tensor) -> Tensor:
    """Return the pixels of surfaces bool [G, H, W] as float32 [G, P, 2], filled up with NaN."""
    image, *place = surface.nonzero(as_tuple=True)
    sizes = surface.flatten(1).sum(1)
    number = torch.arange(len(image), device=surface.device) - (sizes.cumsum(0) - sizes)[image]
    points = torch.full((len(surface), int(sizes.max()), 2), torch.nan, device=surface.device)
    points[image, number] = torch.stack(place, dim=1).float()
    return points


def _nearest(points: Tensor, others: Tensor) -> Tensor:
    """Return each point's distance to the nearest of the others, float64 [G, P]; NaN for a filled-up one."""
    nearest = []
    rows = max(1, _PAIRS // (len(others) * others.shape[1]))
    for part in points.split(rows, dim=1):
        squares = (part[:, :, None] - others[:, None]).square_().sum(3)
        nearest.append(squares.nan_to_num_(torch.inf).amin(2))
    squares = torch.cat(nearest, dim=1).double()
    return torch.where(points[..., 0].isnan(), torch.nan, squares).sqrt()


def _surface(masks: Tensor) -> Tensor:
    """Return the mask's pixels with a neighbour outside it: bool [B, 1, H, W]."""
    masks = _as_bool(masks)
    padded = F.pad(masks, (1, 1, 1, 1))
    above, below = padded[..., :-2, 1:-1], padded[..., 2:, 1:-1]
    left, right = padded[..., 1:-1, :-2], padded[..., 1:-1, 2:]
    return masks & ~(above & below & left & right)


def _as_bool(masks: Tensor) -> Tensor:
    return masks if masks.dtype == torch.bool else masks > 0.5


def _check_shapes(predicted: Tensor, masks: Tensor) -> None:
    if predicted.shape != masks.shape or predicted.ndim != 4 or predicted.shape[1] != 1:
        raise ValueError(
            f"predicted {tuple(predicted.shape)} and masks {tuple(masks.shape)} must both be [B, 1, H, W]"
        )


def _check_probabilities(probabilities: Tensor, masks: Tensor) -> None:
    _check_shapes(probabilities, masks)
    if probabilities.numel() and not (probabilities.min() >= 0 and probabilities.max() <= 1):
        raise ValueError("probabilities must lie in 0..1 and be finite; logits need a sigmoid first")

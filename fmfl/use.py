"""Use of a trained student on new X-rays: masks in an image's own size, and the areas of the two lungs.

An image of any size is squeezed to the square that the student was trained at. The logits come back to the
image's own size by bilinear interpolation, and a pixel is lung where they are above 0: where its probability
is above one half.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import scipy  # its parts are imported where they are first used
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from fmfl import train
from fmfl.sources.pixels import resize

#: Share of a mask's area below which a connected part counts as a speck and not as a lung.
SPECK = 0.01

#: Longest side of an overlay in pixels, and its colours: of the patient's right lung, of the left, of others.
OVERLAY_SIDE = 1024
COLOURS = {"right": (0, 158, 255), "left": (255, 140, 0), "other": (230, 60, 200)}


def squeeze(pictures: Sequence[np.ndarray], size: int) -> Tensor:
    """Squeeze pictures to the students' square, as `fmfl.data.load` does.

    Args:
        pictures: each [H, W] uint8 of any size.
        size: pixels a side.

    Returns:
        [n, 1, size, size] uint8.
    """
    small = [resize(picture, size) for picture in pictures]
    return torch.from_numpy(np.stack(small) if small else np.empty((0, size, size), np.uint8))[:, None]


def logits(model: nn.Module, pictures: Sequence[np.ndarray], size: int) -> Tensor:
    """Return a student's logits of pictures at its own size, [n, 1, size, size] on the CPU; see `squeeze`."""
    images = squeeze(pictures, size).to(next(model.parameters()).device)
    rows = torch.arange(len(images), device=images.device)
    return train.predict(model, images, rows).cpu()


def mask_in_own_size(logits: Tensor, height: int, width: int) -> np.ndarray:
    """Return the mask of one image in the image's own size.

    Args:
        logits: [1, S, S] of the squeezed image.
        height, width: of the image, in pixels.

    Returns:
        [height, width] bool.
    """
    own = F.interpolate(logits[None].float(), (height, width), mode="bilinear", align_corners=False)
    return (own[0, 0] > 0).numpy()


class Lungs(NamedTuple):
    """Areas in a mask, in pixels.

    Attributes:
        area: of the whole mask.
        right, left: of the patient's right and left lung; None where the parts do not tell them.
        parts: number of connected parts, specks aside.
        remark: a sentence where the parts are not two lungs side by side, or where there are specks; else "".
        labels: [H, W] uint8: 1 in the right lung, 2 in the left, 3 in any other part, 0 elsewhere.
    """

    area: int
    right: int | None
    left: int | None
    parts: int
    remark: str
    labels: np.ndarray


def lungs(mask: np.ndarray) -> Lungs:
    """Tell the patient's right lung, which a frontal X-ray shows at the image's left, from the left one.

    Two parts are two lungs if the middle of each lies outside the columns that the other one covers. Pixels
    belong to one part if they touch at a side or a corner. Parts smaller than SPECK of the mask count in its
    area alone.

    Args:
        mask: [H, W] bool.
    """
    numbered, count = scipy.ndimage.label(mask, np.ones((3, 3)))
    sizes = np.bincount(numbered.ravel(), minlength=count + 1)[1:]
    area = int(sizes.sum())
    large = np.flatnonzero(sizes >= SPECK * area)
    labels = np.where(mask, 3, 0).astype(np.uint8)
    few = count - len(large)
    specks = f"; {few} speck{'s' if few > 1 else ''} beside them" if few else ""
    if len(large) != 2:
        return Lungs(area, None, None, len(large), _not_two(len(large)) + specks, labels)
    middles = scipy.ndimage.center_of_mass(mask, numbered, large + 1)
    columns = [part[1] for part in scipy.ndimage.find_objects(numbered)]
    right, left = sorted(range(2), key=lambda part: middles[part][1])
    apart = (
        middles[right][1] < columns[large[left]].start and middles[left][1] > columns[large[right]].stop - 1
    )
    if not apart:
        return Lungs(area, None, None, 2, f"2 parts, and one lies above the other{specks}", labels)
    for value, part in ((1, right), (2, left)):
        labels[numbered == large[part] + 1] = value
    own = [int(sizes[large[part]]) for part in (right, left)]
    return Lungs(area, *own, 2, specks.removeprefix("; "), labels)


def parts_of(mask: np.ndarray) -> Lungs:
    """Measure the mask of another organ: its area and connected parts, without sides or a remark."""
    numbered, count = scipy.ndimage.label(mask, np.ones((3, 3)))
    sizes = np.bincount(numbered.ravel(), minlength=count + 1)[1:]
    large = int((sizes >= SPECK * sizes.sum()).sum())
    return Lungs(int(sizes.sum()), None, None, large, "", np.where(mask, 3, 0).astype(np.uint8))


def _not_two(parts: int) -> str:
    """Say that a mask is not two parts."""
    if parts == 0:
        return "no lung was found"
    if parts == 1:
        return "1 part instead of 2: the lungs touch, or one is missing"
    return f"{parts} parts instead of 2"


def overlay(grey: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Draw the outlines of a mask's parts on an X-ray: the patient's right lung blue, the left orange.

    Args:
        grey: [H, W] uint8.
        labels: [H, W], from `lungs`.

    Returns:
        [h, w, 3] uint8, the longer side at most OVERLAY_SIDE.
    """
    scale = min(1.0, OVERLAY_SIDE / max(grey.shape))
    height, width = (max(1, round(scale * side)) for side in grey.shape)
    picture = Image.fromarray(grey).resize((width, height), Image.Resampling.BILINEAR).convert("RGB")
    drawn = np.array(picture)
    shown = np.asarray(Image.fromarray(labels).resize((width, height), Image.Resampling.NEAREST))
    thickness = max(1, round(max(height, width) / 400))
    for value, colour in enumerate(COLOURS.values(), start=1):
        part = np.pad(shown == value, 1)  # so that a part at the picture's border has an outline there
        inner = scipy.ndimage.binary_erosion(part, iterations=thickness)
        drawn[(part & ~inner)[1:-1, 1:-1]] = colour
    return drawn

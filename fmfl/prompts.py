"""Box prompts for the teacher: exact, jittered, predicted by another network, or round the whole image."""

from collections.abc import Callable

import numpy as np
import scipy
import torch
from torch import Tensor

from fmfl.config import BOX_RULES, BOXES_PER_IMAGE, PARAMETERS
from fmfl.errors import UserError

#: Share of the picture from which on a part has a box of its own: 5 pixels at a size of 96, 33 at 256.
PART_AREA = 0.0005
#: The most boxes of an image. Each is a call of the teacher's decoder.
MAX_PARTS = 8


def boxes_from_masks(masks: Tensor, *, per_image: str = "per_lung") -> Tensor:
    """Return the bounding boxes of masks, in each image from left to right.

    Args:
        masks: [B, 1, H, W] uint8 or bool.
        per_image: `per_lung` for a box round each of the two largest connected parts; `one` for a single box
            round all; `per_part` for a box round each part of at least `PART_AREA` of the picture, the
            `MAX_PARTS` largest of them (the largest part has a box at any size).

    Returns:
        [B, n, 4] float32 on the masks' device: x0 y0 x1 y1, the outermost pixels' indices. n is 2 for
        `per_lung`, 1 for `one`, and the most parts that an image has for `per_part`. An image with fewer
        parts has rows of NaN at the end.

    Raises:
        UserError: `per_image` is unknown.
        ValueError: a mask is empty.
    """
    if per_image not in (known := PARAMETERS["boxes_per_image"].choices):
        raise UserError(f"boxes_per_image {per_image!r} is unknown: choose one of {', '.join(known)}")
    parts = []
    for number, mask in enumerate(masks[:, 0].cpu().numpy() > 0):
        if not mask.any():
            raise ValueError(f"mask {number} is empty, so it has no box")
        parts.append(_PARTS[per_image](mask))
    width = 2 if per_image == "per_lung" else max(map(len, parts), default=1)
    boxes = np.full((len(masks), width, 4), np.nan, np.float32)
    for number, of_image in enumerate(parts):
        for slot, (rows, columns) in enumerate(of_image):
            boxes[number, slot] = columns.start, rows.start, columns.stop - 1, rows.stop - 1
    return torch.from_numpy(boxes).to(masks.device)


def compared(per_image: str) -> tuple[str, str]:
    """Return two ways to draw boxes for a comparison: a box for each part, and one round all."""
    return BOXES_PER_IMAGE if per_image in BOXES_PER_IMAGE else (per_image, "one")


#: Rows and columns of one part.
Part = tuple[slice, slice]


def _whole(mask: np.ndarray) -> list[Part]:
    return scipy.ndimage.find_objects(mask * 1)


def _two_largest(mask: np.ndarray) -> list[Part]:
    # A speck left by resizing is not a lung: a part counts from a twentieth of the largest on.
    return _largest(mask, 2, lambda areas: areas.max() / 20)


def _all_parts(mask: np.ndarray) -> list[Part]:
    return _largest(mask, MAX_PARTS, lambda areas: min(areas.max(), PART_AREA * mask.size))


def _largest(mask: np.ndarray, most: int, least_area: Callable[[np.ndarray], float]) -> list[Part]:
    """Return rows and columns of the largest parts of a [H, W] mask, from left to right."""
    labels, count = scipy.ndimage.label(mask)
    areas = np.bincount(labels.ravel(), minlength=count + 1)[1:]
    least = least_area(areas)
    largest = [k for k in np.argsort(-areas, kind="stable")[:most] if areas[k] >= least]
    parts = scipy.ndimage.find_objects(labels)
    return sorted((parts[k] for k in largest), key=lambda part: (part[1].start, part[0].start))


_PARTS = {"per_lung": _two_largest, "one": _whole, "per_part": _all_parts}


def jitter(boxes: Tensor, size: int, generator: torch.Generator, *, pixels: float = 5.0) -> Tensor:
    """Return boxes as a hurried hand draws them, with every side moved by up to `pixels`.

    Args:
        boxes: [..., 4] in pixels; NaN rows stay.
        size: side of the images; the moved boxes are clipped to it.
        generator: on the CPU.
        pixels: half-width of the uniform shift of each side.

    Returns:
        Boxes of the same shape whose sides keep their order.
    """
    shift = (torch.rand(boxes.shape, generator=generator) * 2 - 1) * pixels
    moved = (boxes + shift.to(boxes.device)).clamp(0, size - 1)
    first, second = moved[..., :2], moved[..., 2:]
    return torch.cat([torch.minimum(first, second), torch.maximum(first, second)], -1)


def prompt(
    masks: Tensor,
    rule: str = "ground_truth",
    *,
    per_image: str = "per_lung",
    jitter_pixels: float = 5.0,
    seed: int = 0,
) -> Tensor:
    """Return boxes by a named rule.

    Args:
        masks: [B, 1, H, W] ground truth; its values are not looked at for `whole_image`. For `predicted`,
            another network's masks; where such a mask is empty, the box is the whole image.
        rule: one of `BOX_RULES`.
        per_image: as for `boxes_from_masks`; `whole_image` gives one box in any case.
        jitter_pixels: for `ground_truth_jitter`.
        seed: for `ground_truth_jitter`.

    Returns:
        [B, n, 4] float32: x0 y0 x1 y1.

    Raises:
        UserError: `rule` or `per_image` is unknown.
    """
    if rule not in BOX_RULES:
        raise UserError(f"box_rule {rule!r} is unknown: choose one of {', '.join(BOX_RULES)}")
    height, width = masks.shape[-2:]
    if rule == "whole_image":
        whole = torch.tensor([0.0, 0.0, width - 1, height - 1], device=masks.device)
        return whole.expand(len(masks), 1, 4)
    if rule == "predicted":
        empty = ~(masks > 0).flatten(1).any(1)
        masks = masks.masked_fill(empty[:, None, None, None], 1)
    boxes = boxes_from_masks(masks, per_image=per_image)
    if rule == "ground_truth_jitter":
        boxes = jitter(boxes, width, torch.Generator().manual_seed(seed), pixels=jitter_pixels)
    return boxes

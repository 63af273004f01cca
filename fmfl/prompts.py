"""Box prompts for the teacher: exact, jittered, predicted by another network, or round the whole image."""

import numpy as np
import scipy
import torch
from torch import Tensor

from fmfl.config import BOX_RULES, BOXES_PER_IMAGE
from fmfl.errors import UserError


def boxes_from_masks(masks: Tensor, *, per_image: str = "per_lung") -> Tensor:
    """Return the bounding boxes of masks.

    Args:
        masks: [B, 1, H, W] uint8 or bool.
        per_image: `per_lung` for a box round each of the two largest connected parts, ordered from
            left to right (the second row is NaN where there is one part); `one` for a single box.

    Returns:
        [B, 2, 4] or [B, 1, 4] float32 on the masks' device: x0 y0 x1 y1, the outermost pixels' indices.

    Raises:
        UserError: `per_image` is unknown.
        ValueError: a mask is empty.
    """
    if per_image not in BOXES_PER_IMAGE:
        raise UserError(
            f"boxes_per_image {per_image!r} is unknown: choose one of {', '.join(BOXES_PER_IMAGE)}"
        )
    boxes = np.full((len(masks), 2 if per_image == "per_lung" else 1, 4), np.nan, np.float32)
    for number, mask in enumerate(masks[:, 0].cpu().numpy() > 0):
        if not mask.any():
            raise ValueError(f"mask {number} is empty, so it has no box")
        parts = _largest_parts(mask) if per_image == "per_lung" else scipy.ndimage.find_objects(mask * 1)
        for slot, (rows, columns) in enumerate(parts):
            boxes[number, slot] = columns.start, rows.start, columns.stop - 1, rows.stop - 1
    return torch.from_numpy(boxes).to(masks.device)


def _largest_parts(mask: np.ndarray) -> list[tuple[slice, slice]]:
    """Return rows and columns of the one or two largest parts of a [H, W] mask, from left to right."""
    labels, count = scipy.ndimage.label(mask)
    areas = np.bincount(labels.ravel(), minlength=count + 1)[1:]
    # A speck left by resizing is not a lung: a part counts from a twentieth of the largest on.
    largest = [k for k in np.argsort(-areas, kind="stable")[:2] if areas[k] >= areas.max() / 20]
    parts = scipy.ndimage.find_objects(labels)
    return sorted((parts[k] for k in largest), key=lambda part: (part[1].start, part[0].start))


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
        per_image: one of `BOXES_PER_IMAGE`; `whole_image` gives one box in any case.
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

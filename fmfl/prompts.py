"""Prompts for the teacher: boxes from masks, exact, jittered, predicted or round the whole image."""

from collections.abc import Iterator

import numpy as np
import scipy
import torch
from torch import Tensor

from fmfl.errors import UserError

#: Where a prompt comes from. The paper prompts with the ground truth's bounding box. `predicted` is a box
#: round what another network found, `point` a click in the middle of each lung.
BOX_RULES = ("ground_truth", "ground_truth_jitter", "whole_image", "predicted", "point")


#: One box round each lung, or one round both.
BOXES_PER_IMAGE = ("per_lung", "one")


def _parts(masks: Tensor, per_image: str) -> Iterator[tuple[int, list[np.ndarray]]]:
    """Each mask's number and its one or two parts as [H, W] bool, from left to right.

    Raises:
        UserError: `per_image` is unknown.
        ValueError: a mask is empty.
    """
    if per_image not in BOXES_PER_IMAGE:
        raise UserError(
            f"boxes_per_image {per_image!r} is unknown: choose one of {', '.join(BOXES_PER_IMAGE)}"
        )
    for number, mask in enumerate(masks[:, 0].cpu().numpy() > 0):
        if not mask.any():
            raise ValueError(f"mask {number} is empty, so it has no box")
        if per_image == "one":
            yield number, [mask]
            continue
        labels, count = scipy.ndimage.label(mask)
        areas = np.bincount(labels.ravel(), minlength=count + 1)[1:]
        # A speck left by resizing is not a lung: a part counts from a twentieth of the largest on.
        kept = [k for k in np.argsort(-areas, kind="stable")[:2] if areas[k] >= areas.max() / 20]
        corners = scipy.ndimage.find_objects(labels)
        kept.sort(key=lambda k: (corners[k][1].start, corners[k][0].start))
        yield number, [labels == k + 1 for k in kept]


def boxes_from_masks(masks: Tensor, *, per_image: str = "per_lung") -> Tensor:
    """Bounding boxes of the ground truth, the paper's prompt.

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
    found = np.full((len(masks), 2 if per_image == "per_lung" else 1, 4), np.nan, np.float32)
    for number, parts in _parts(masks, per_image):
        for slot, part in enumerate(parts):
            rows, columns = np.flatnonzero(part.any(1)), np.flatnonzero(part.any(0))
            found[number, slot] = columns[0], rows[0], columns[-1], rows[-1]
    return torch.from_numpy(found).to(masks.device)


def points_from_masks(masks: Tensor, *, per_image: str = "per_lung") -> Tensor:
    """A click in the middle of each part: the pixel that lies deepest inside (distance to the border).

    Args and errors as for `boxes_from_masks`.

    Returns:
        [B, 2, 2] or [B, 1, 2] float32: x y; NaN where there is one part.
    """
    found = np.full((len(masks), 2 if per_image == "per_lung" else 1, 2), np.nan, np.float32)
    for number, parts in _parts(masks, per_image):
        for slot, part in enumerate(parts):
            # Padded, because the image's edge is a border too.
            depth = scipy.ndimage.distance_transform_edt(np.pad(part, 1))[1:-1, 1:-1]
            y, x = np.unravel_index(depth.argmax(), depth.shape)
            found[number, slot] = x, y
    return torch.from_numpy(found).to(masks.device)


def jitter(boxes: Tensor, size: int, generator: torch.Generator, *, pixels: float = 5.0) -> Tensor:
    """Boxes as a hurried hand draws them: every side moved by up to `pixels`.

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
    """Prompts by a named rule.

    Args:
        masks: [B, 1, H, W] ground truth; its values are not looked at for `whole_image`. For `predicted`,
            what another network found; where that is nothing, the box is the whole image.
        rule: one of `BOX_RULES`.
        per_image: one of `BOXES_PER_IMAGE`; `whole_image` gives one box in any case.
        jitter_pixels: for `ground_truth_jitter`.
        seed: for `ground_truth_jitter`.

    Returns:
        [B, n, 4] float32 boxes; [B, n, 2] clicks for `point`.
    """
    if rule not in BOX_RULES:
        raise UserError(f"box_rule {rule!r} is unknown: choose one of {', '.join(BOX_RULES)}")
    height, width = masks.shape[-2:]
    if rule == "whole_image":
        whole = torch.tensor([0.0, 0.0, width - 1, height - 1], device=masks.device)
        return whole.expand(len(masks), 1, 4)
    if rule == "point":
        return points_from_masks(masks, per_image=per_image)
    if rule == "predicted":
        nothing = ~(masks > 0).flatten(1).any(1)
        masks = masks.masked_fill(nothing[:, None, None, None], 1)
    boxes = boxes_from_masks(masks, per_image=per_image)
    if rule == "ground_truth_jitter":
        boxes = jitter(boxes, width, torch.Generator().manual_seed(seed), pixels=jitter_pixels)
    return boxes

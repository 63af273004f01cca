"""Rotation, flips, brightness and contrast: drawn on the CPU, applied to a whole batch on its device.

The paper names these four and no amounts (Li & Yang 2023, arXiv 2311.15463, section 3). Augmenting takes two
steps, so that every arm, engine and device sees the same pictures:

    draws = draw(num_images, generator)                                    # a whole epoch, on the CPU
    images, masks, logits = apply(images, masks, draws, teacher_logits)    # a batch, on its device

The mask and the teacher's cached logits move with the picture; brightness and contrast change the picture
alone. `albumentations` is the twin of `apply` built from that library, an image at a time on the CPU: the
tests hold the two against each other, and a study may choose either by name (`AUGMENTATIONS`).
"""

import os
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from fmfl.errors import UserError

#: Teacher logit outside the picture, which a rotation brings in: background, p = 0.00005.
BACKGROUND_LOGIT = -10.0

#: Images [B, 1, H, W] in 0..1, masks [B, 1, H, W] of 0 and 1, extra [B, C, H, W] or None; all float32.
Augmented = tuple[Tensor, Tensor, Tensor | None]


def draw(
    num_images: int,
    generator: torch.Generator,
    *,
    rotation: float = 15.0,
    horizontal_flip: float = 0.5,
    vertical_flip: float = 0.0,
    brightness: float = 0.2,
    contrast: float = 0.2,
) -> Tensor:
    """Draw five numbers for each image: angle, two flips, brightness, contrast.

    Every image uses five uniform numbers whatever the settings, so changing one setting leaves the others'
    draws as they were. The vertical flip is off: the paper says "flips", but no chest X-ray of a hospital
    stands on its head, and a student that learns such pictures has fewer weights left for real ones.

    Args:
        num_images: how many rows.
        generator: of the CPU, so that a laptop and a GPU draw alike.
        rotation: angles are uniform in -rotation..rotation, degrees, 0..180.
        horizontal_flip: probability of mirroring left and right, 0..1.
        vertical_flip: probability of mirroring top and bottom, 0..1.
        brightness: b is uniform in -brightness..brightness, in parts of white, 0..1.
        contrast: c is uniform in 1 - contrast..1 + contrast, 0..1.

    Returns:
        float32 [num_images, 5] on the CPU: angle (degrees, positive turns counter-clockwise), horizontal flip
        (0 or 1), vertical flip (0 or 1), b, c; the picture x in 0..1 becomes c x + b.

    Raises:
        UserError: a setting lies outside its range.
    """
    limits = {"rotation": (rotation, 180), "horizontal_flip": (horizontal_flip, 1)}
    limits |= {"vertical_flip": (vertical_flip, 1), "brightness": (brightness, 1), "contrast": (contrast, 1)}
    for name, (value, highest) in limits.items():
        if not 0 <= value <= highest:
            raise UserError(f"{name} is {value}, but must lie in 0..{highest}; 0 turns it off.")
    uniform = torch.rand(num_images, 5, generator=generator)
    symmetric = 2 * uniform - 1
    return torch.stack(
        (
            rotation * symmetric[:, 0],
            (uniform[:, 1] < horizontal_flip).float(),
            (uniform[:, 2] < vertical_flip).float(),
            brightness * symmetric[:, 3],
            1 + contrast * symmetric[:, 4],
        ),
        dim=1,
    )


def apply(images: Tensor, masks: Tensor, draws: Tensor, extra: Tensor | None = None) -> Augmented:
    """Mirror, turn about the centre, then change brightness and contrast: one resampling for the batch.

    Picture, mask and extra maps are channels of one tensor that is sampled bilinearly once. Outside the
    picture lie black, background and `BACKGROUND_LOGIT`. The moved picture is rounded to whole grey levels,
    as a stored one is. That also takes out the sampler's rounding error: without a rotation, every pixel is
    kept exactly.

    Nothing is read back to the host and no image is handled alone.

    Args:
        images: uint8 [B, 1, H, W].
        masks: [B, 1, H, W] of 0 and 1, in any dtype.
        draws: [B, 5] as `draw` gives them, best on the device of the images.
        extra: logits that belong to the pictures, float [B, C, H, W].

    Returns:
        `Augmented`.

    Raises:
        ValueError: the shapes do not belong together.
    """
    _check_shapes(images, masks, draws, extra)
    channels = [images.float(), masks.float()]
    if extra is not None:
        channels.append(extra.float() - BACKGROUND_LOGIT)  # the sampler pads with 0: make 0 mean background
    draws = draws.to(images.device)
    moved = F.grid_sample(
        torch.cat(channels, dim=1),
        _where_from(draws, *images.shape[-2:]),
        mode="bilinear",
        padding_mode="zeros",
        align_corners=False,
    )
    brightness, contrast = draws[:, 3:, None, None, None].unbind(dim=1)
    pictures = (moved[:, :1].round() / 255 * contrast + brightness).clamp(0, 1)
    moved_masks = (moved[:, 1:2] > 0.5).float()
    return pictures, moved_masks, None if extra is None else moved[:, 2:] + BACKGROUND_LOGIT


def albumentations(images: Tensor, masks: Tensor, draws: Tensor, extra: Tensor | None = None) -> Augmented:
    """Apply the same draws by albumentations' own transforms, an image at a time: the twin of `apply`.

    Args, returns and errors are those of `apply`; the results lie on the device of the images.
    """
    os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"  # else its import asks the package index for a newer version
    import albumentations as A
    import cv2

    _check_shapes(images, masks, draws, extra)
    layers = masks.float()
    if extra is not None:
        layers = torch.cat((layers, extra.float() - BACKGROUND_LOGIT), dim=1)
    moved_images, moved_layers = [], []
    for image, layer, (angle, horizontal, vertical, brightness, contrast) in zip(
        images[:, 0].cpu().numpy(), layers.permute(0, 2, 3, 1).cpu().numpy(), draws.tolist(), strict=True
    ):
        geometry = A.Compose(
            [
                A.HorizontalFlip(p=horizontal),
                A.VerticalFlip(p=vertical),
                A.Affine(rotate=(angle, angle), mask_interpolation=cv2.INTER_LINEAR, p=1),
            ]
        )
        light = A.RandomBrightnessContrast(
            brightness_limit=(brightness, brightness), contrast_limit=(contrast - 1, contrast - 1), p=1
        )
        moved = geometry(image=image, mask=layer)
        lit = light(image=moved["image"].astype("float32") / 255)["image"]
        moved_images.append(torch.from_numpy(lit))
        moved_layers.append(torch.from_numpy(moved["mask"]))
    pictures = torch.stack(moved_images)[:, None].to(images.device)
    moved_layers = torch.stack(moved_layers).permute(0, 3, 1, 2).contiguous().to(images.device)
    moved_masks = (moved_layers[:, :1] > 0.5).float()
    return pictures, moved_masks, None if extra is None else moved_layers[:, 1:] + BACKGROUND_LOGIT


def unchanged(images: Tensor, masks: Tensor, draws: Tensor, extra: Tensor | None = None) -> Augmented:
    """Leave the images as they are, in the form of `apply`; the draws are not used."""
    _check_shapes(images, masks, draws, extra)
    return to_float(images), masks.float(), None if extra is None else extra.float()


def to_float(images: Tensor) -> Tensor:
    """Turn uint8 [..., H, W] in 0..255 into float32 in 0..1, as students and `apply` have them."""
    return images.float() / 255


#: The choices of a study, by name.
AUGMENTATIONS: dict[str, Callable[..., Augmented]] = {
    "device": apply,
    "albumentations": albumentations,
    "none": unchanged,
}


def _where_from(draws: Tensor, height: int, width: int) -> Tensor:
    """Return each result pixel's source in the input: [B, H, W, 2], x then y, in -1..1.

    In pixels from the centre, x to the right and y down, a counter-clockwise turn by t comes from

        x' = x cos t - y sin t,    y' = x sin t + y cos t

    and a flip before it changes the sign of x' or y'. Turning in pixels, not in -1..1, keeps angles true in
    pictures that are not square. Written out instead of `affine_grid`, which multiplies matrices: under TF32
    or autocast those round a place to a tenth of a pixel.
    """
    angle, horizontal, vertical = draws[:, :3].float().view(-1, 3, 1, 1).unbind(dim=1)
    cos, sin = torch.cos(torch.deg2rad(angle)), torch.sin(torch.deg2rad(angle))
    x = torch.arange(width, device=draws.device) - (width - 1) / 2
    y = (torch.arange(height, device=draws.device) - (height - 1) / 2)[:, None]
    x_scale = (1 - 2 * horizontal) * 2 / width
    y_scale = (1 - 2 * vertical) * 2 / height
    return torch.stack(
        (x_scale * cos * x - x_scale * sin * y, y_scale * sin * x + y_scale * cos * y),
        dim=-1,
    )


def _check_shapes(images: Tensor, masks: Tensor, draws: Tensor, extra: Tensor | None) -> None:
    batch, _, *size = images.shape
    if images.dtype != torch.uint8:
        raise ValueError(f"images must be uint8 (0..255), not {images.dtype}")
    if masks.shape != images.shape or images.shape[1] != 1:
        raise ValueError(
            f"images {tuple(images.shape)} and masks {tuple(masks.shape)} must both be [B, 1, H, W]"
        )
    if draws.shape != (batch, 5):
        raise ValueError(f"draws {tuple(draws.shape)} must be [{batch}, 5], one row an image")
    if extra is not None and (extra.ndim != 4 or extra.shape[0] != batch or list(extra.shape[2:]) != size):
        raise ValueError(f"extra {tuple(extra.shape)} must be [{batch}, C, {size[0]}, {size[1]}]")

"""Published relatives of Segment Anything: their networks, and how their authors call them.

SAM (Kirillov et al. 2023, arXiv 2304.02643) and MedSAM (Ma et al. 2024, arXiv 2304.12306) are the
`segment-anything` package's own networks. SAM-Med2D (Cheng et al. 2023, arXiv 2308.16184) is that package's
ViT-B at 256 pixels with an adapter in each block of the image encoder. Each prepares images, boxes and masks
in its own way, and answers worse when it is called in another's.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fmfl.errors import UserError
from fmfl.teachers import checkpoints

if TYPE_CHECKING:
    from segment_anything.modeling import Sam
    from segment_anything.utils.transforms import ResizeLongestSide

#: Mean and standard deviation of red, green and blue (0..255), by which SAM and SAM-Med2D normalise.
PIXEL_MEAN = (123.675, 116.28, 103.53)
PIXEL_STD = (58.395, 57.12, 57.375)


class Adapter(nn.Module):
    """SAM-Med2D's addition to a transformer block of `width` channels.

    A gate weights channels by their mean over the image. Convolutions of stride 2, down and up, mix
    neighbours. The result is added to the input and normalised. Attributes are named as in the authors'
    checkpoints.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        inside = width // 4
        self.norm = nn.LayerNorm(width)
        self.channel = nn.Sequential(
            nn.Linear(width, inside, bias=False),
            nn.ReLU(),
            nn.Linear(inside, width, bias=False),
            nn.Sigmoid(),
        )
        self.spatial = nn.Sequential(
            nn.Conv2d(width, width, 3, stride=2, padding=1, bias=False),
            nn.ReLU(),
            nn.ConvTranspose2d(width, width, 4, stride=2, padding=1, bias=False),
            nn.ReLU(),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return [B, h, w, width] for [B, h, w, width] with even h and w."""
        gated = x * self.channel(x.mean((1, 2)))[:, None, None]
        correction = self.spatial(gated.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return self.norm(x + correction)


def add_adapters(sam: "Sam") -> None:
    """Give each block of the image encoder an adapter: x + mlp(norm2(x)) + adapter(norm2(x)), in place."""
    for block in sam.image_encoder.blocks:
        block.Adapter = Adapter(block.norm2.normalized_shape[0])
        # The mlp's input is norm2(x) and its output is added to x, so what is added to its output is too.
        block.mlp.register_forward_hook(
            lambda mlp, inputs, output, adapter=block.Adapter: output + adapter(*inputs)
        )


def resize(sam: "Sam", size: int) -> None:
    """Interpolate a network's positions to an input of `size` pixels a side, in place.

    Absolute positions are resized bilinearly. Relative ones of blocks with windows stay; those of global
    blocks are resized linearly, as the package's own `get_rel_pos` does.

    Raises:
        UserError: `size` is no multiple of the patch's side.
    """
    encoder, prompts = sam.image_encoder, sam.prompt_encoder
    patch = encoder.patch_embed.proj.kernel_size[0]
    if size < patch or size % patch:
        raise UserError(
            f"a teacher's input of {size} pixels is no multiple of its patch: choose one of {patch}"
        )
    if size == encoder.img_size:
        return
    grid = size // patch
    position = F.interpolate(
        encoder.pos_embed.detach().permute(0, 3, 1, 2), (grid, grid), mode="bilinear", align_corners=False
    )
    encoder.pos_embed = nn.Parameter(position.permute(0, 2, 3, 1).contiguous())
    for block in encoder.blocks:
        if block.window_size == 0:
            for name in ("rel_pos_h", "rel_pos_w"):
                old = getattr(block.attn, name).detach()
                new = F.interpolate(old.T[None], 2 * grid - 1, mode="linear", align_corners=False)
                setattr(block.attn, name, nn.Parameter(new[0].T.contiguous()))
    encoder.img_size = size
    prompts.input_image_size = (size, size)
    prompts.image_embedding_size = (grid, grid)
    prompts.mask_input_size = (4 * grid, 4 * grid)


@dataclass(frozen=True)
class Convention:
    """The authors' way from images and boxes into a network, and from its masks out.

    Attributes:
        image: [B, 1, H, W] uint8 and the network's size to the image encoder's input, [B, C, size, size].
        boxes: [..., 4] x0 y0 x1 y1 in pixels of the images, size, H and W to pixels of the network's input.
        mask: [P, 1, h, w] low-resolution logits, size, H and W to [P, 1, H, W] logits.
        multimask: take the best of three masks by predicted IoU instead of the single mask.
    """

    image: Callable[[Tensor, int], Tensor]
    boxes: Callable[[Tensor, int, int, int], Tensor]
    mask: Callable[[Tensor, int, int, int], Tensor]
    multimask: bool = False


def bilinear(x: Tensor, height: int, width: int) -> Tensor:
    """Resize [B, C, h, w] to [B, C, height, width] by pixel centres."""
    return F.interpolate(x, (height, width), mode="bilinear", align_corners=False)


def scaled_by_sides(boxes: Tensor, size: int, height: int, width: int) -> Tensor:
    """Multiply coordinates by new side over old, the convention of SAM's relatives, without a half pixel."""
    return boxes * boxes.new_tensor([size / width, size / height] * 2)


def _normalised(images: Tensor) -> Tensor:
    """Return [B, 3, H, W] for [B, 1, H, W] in 0..255, with SAM's mean and standard deviation taken out."""
    mean, std = (images.new_tensor(v, dtype=torch.float32)[:, None, None] for v in (PIXEL_MEAN, PIXEL_STD))
    return (images.float() - mean) / std


def _longest_side(size: int) -> "ResizeLongestSide":
    """Return the package's own resizing of images and boxes, which keeps the aspect ratio."""
    from segment_anything.utils.transforms import ResizeLongestSide

    return ResizeLongestSide(size)


def _sam_image(images: Tensor, size: int) -> Tensor:
    """Resize the longest side as the package does (Pillow, uint8), normalise, pad with zeros."""
    arrays = images.cpu().numpy()[:, 0, ..., None]
    resized = [torch.from_numpy(_longest_side(size).apply_image(array)) for array in arrays]
    x = _normalised(torch.stack(resized)[:, None].to(images.device))
    return F.pad(x, (0, size - x.shape[-1], 0, size - x.shape[-2]))


def _sam_boxes(boxes: Tensor, size: int, height: int, width: int) -> Tensor:
    return _longest_side(size).apply_boxes_torch(boxes, (height, width)).reshape(boxes.shape)


def _sam_mask(low: Tensor, size: int, height: int, width: int) -> Tensor:
    """Resize to the padded square, cut the padding off, resize to the image."""
    inner_height, inner_width = _longest_side(size).get_preprocess_shape(height, width, size)
    return bilinear(bilinear(low, size, size)[..., :inner_height, :inner_width], height, width)


def _sam_med2d_image(images: Tensor, size: int) -> Tensor:
    """Normalise first, then squeeze to the square by nearest neighbour."""
    return F.interpolate(_normalised(images), (size, size), mode="nearest")


def _sam_med2d_mask(low: Tensor, size: int, height: int, width: int) -> Tensor:
    return bilinear(bilinear(low, size, size), height, width)


def _medsam_image(images: Tensor, size: int) -> Tensor:
    """Squeeze to the square (bicubic, antialiased), then scale by its own minimum and maximum to 0..1."""
    x = images.float()
    if x.shape[-2:] != (size, size):
        low, high = x.amin((1, 2, 3), keepdim=True), x.amax((1, 2, 3), keepdim=True)
        x = F.interpolate(x, (size, size), mode="bicubic", antialias=True, align_corners=False)
        x = x.clamp(low, high)  # a cubic overshoots
    low, high = x.amin((1, 2, 3), keepdim=True), x.amax((1, 2, 3), keepdim=True)
    return ((x - low) / (high - low).clamp_min(1e-8)).expand(-1, 3, -1, -1)


def _medsam_mask(low: Tensor, size: int, height: int, width: int) -> Tensor:
    """Resize probabilities, as MedSAM does, and return their logits."""
    return bilinear(low.sigmoid(), height, width).logit(eps=1e-6)


@dataclass(frozen=True)
class Family:
    """A published network: the package's builder, the side of its input in pixels, and its convention."""

    builder: str
    size: int
    convention: Convention
    adapters: bool = False


_SAM = Convention(_sam_image, _sam_boxes, _sam_mask)
_MEDSAM = Convention(_medsam_image, scaled_by_sides, _medsam_mask)
_SAM_MED2D = Convention(_sam_med2d_image, scaled_by_sides, _sam_med2d_mask, multimask=True)

#: The published teachers by name.
FAMILIES = {
    "sam-med2d": Family("vit_b", 256, _SAM_MED2D, adapters=True),
    "sam_vit_b": Family("vit_b", 1024, _SAM),
    "sam_vit_l": Family("vit_l", 1024, _SAM),
    "sam_vit_h": Family("vit_h", 1024, _SAM),
    "medsam": Family("vit_b", 1024, _MEDSAM),
}


def network(name: str, *, size: int | None = None) -> "Sam":
    """Return a family's network, untrained, from the package's own builder.

    Args:
        name: one of `FAMILIES`.
        size: side of its input in pixels; None for the family's own.
    """
    # Imported here: it takes seconds, which a notebook without a teacher need not wait for.
    from segment_anything import sam_model_registry

    family = FAMILIES[name]
    sam = sam_model_registry[family.builder]()
    resize(sam, size or family.size)
    if family.adapters:
        add_adapters(sam)
    return sam


def load(name: str, path: Path, size: int | None = None) -> "Sam":
    """Return a family's network with a checkpoint's weights, its positions interpolated to `size`.

    Raises:
        UserError: a key is missing, unexpected or of another shape, or `size` is no multiple of the patch's.
    """
    state = checkpoints.read(path)
    position = state.get("image_encoder.pos_embed")  # [1, size / 16, size / 16, C]
    made_for = None if position is None or position.ndim != 4 else 16 * position.shape[1]
    with torch.random.fork_rng(devices=[]):
        sam = network(name, size=made_for)
    if problems := checkpoints.differences(state, sam.state_dict()):
        raise UserError(f"{path} does not fit teacher {name!r}: {problems}")
    checkpoints.usable(path, state, sam.state_dict())
    sam.load_state_dict(state)
    resize(sam, size or FAMILIES[name].size)
    return sam

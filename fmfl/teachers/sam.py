"""Published relatives of Segment Anything: their networks, and how their authors call them.

SAM (Kirillov et al. 2023, arXiv 2304.02643) and MedSAM (Ma et al. 2024, arXiv 2304.12306) are the
`segment-anything` package's own networks. SAM-Med2D (Cheng et al. 2023, arXiv 2308.16184) is that package's
ViT-B at 256 pixels with an adapter in each block of the image encoder. The three differ as much in what is
done to an image, a box and a mask on the way: a network that is called as its relative is, answers worse.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fmfl.errors import UserError

if TYPE_CHECKING:
    from segment_anything.modeling import Sam

#: What SAM and SAM-Med2D subtract from red, green and blue (0..255), and divide them by.
PIXEL_MEAN = (123.675, 116.28, 103.53)
PIXEL_STD = (58.395, 57.12, 57.375)


# ------------------------------------------------------------------------------------------ networks


class Adapter(nn.Module):
    """SAM-Med2D's addition to a transformer block: a gate on channels, then a look at the neighbours.

    Channels are weighted by what they hold on average over the image; a convolution of stride 2 and a
    transposed one mix them in space; both are a correction of the input, which is added again and normalised.

    The attributes are named as in the authors' checkpoints.

    Args:
        width: channels of the block.
        ratio: channels inside the gate as a fraction of `width`.
    """

    def __init__(self, width: int, ratio: float = 0.25) -> None:
        super().__init__()
        inside = int(width * ratio)
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
        """(B, h, w, width) to the same shape; h and w are even."""
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
    """Make a network answer at another input size, in place: its positions are interpolated.

    Absolute positions are resized bilinearly. Relative ones reach as far as a block attends: those of the
    blocks with windows stay, those of the global blocks are resized linearly, as the package's own
    `get_rel_pos` does.

    Args:
        size: side of the input in pixels, a multiple of the patch's.
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


# ------------------------------------------------------------------------------------------ conventions


@dataclass(frozen=True)
class Convention:
    """How a network is called by its authors.

    Attributes:
        image: [B, 1, H, W] uint8 and the network's size to what the image encoder takes, (B, C, size, size).
        boxes: [..., 4] x0 y0 x1 y1 or [..., 2] x y in pixels of the images, size, H and W to pixels of the
            network's input.
        mask: (P, 1, h, w) low-resolution logits, size, H and W to (P, 1, H, W) logits.
        multimask: whether the best of three masks by predicted IoU is taken, or the single one.
    """

    image: Callable[[Tensor, int], Tensor]
    boxes: Callable[[Tensor, int, int, int], Tensor]
    mask: Callable[[Tensor, int, int, int], Tensor]
    multimask: bool = False


def bilinear(x: Tensor, height: int, width: int) -> Tensor:
    """[B, C, h, w] resized to (B, C, height, width) by pixel centres."""
    return F.interpolate(x, (height, width), mode="bilinear", align_corners=False)


def scaled_by_sides(boxes: Tensor, size: int, height: int, width: int) -> Tensor:
    """Coordinates times new side over old, the convention of SAM's relatives, without a half pixel."""
    return boxes * boxes.new_tensor([size / width, size / height]).repeat(boxes.shape[-1] // 2)


def _normalised(images: Tensor) -> Tensor:
    """[B, 1, H, W] in 0..255 to [B, 3, H, W] with SAM's mean and standard deviation taken out."""
    mean, std = (images.new_tensor(v, dtype=torch.float32)[:, None, None] for v in (PIXEL_MEAN, PIXEL_STD))
    return (images.float() - mean) / std


def _sam_image(images: Tensor, size: int) -> Tensor:
    """The longest side to `size` as the package does it (Pillow, uint8), normalised, padded with zeros."""
    from segment_anything.utils.transforms import ResizeLongestSide

    transform = ResizeLongestSide(size)
    arrays = images.cpu().numpy()[:, 0, ..., None]
    small = torch.stack([torch.from_numpy(transform.apply_image(array)) for array in arrays])
    x = _normalised(small[:, None].to(images.device))
    return F.pad(x, (0, size - x.shape[-1], 0, size - x.shape[-2]))


def _sam_sides(size: int, height: int, width: int) -> tuple[int, int]:
    """Height and width of the image inside SAM's padded square."""
    from segment_anything.utils.transforms import ResizeLongestSide

    return ResizeLongestSide.get_preprocess_shape(height, width, size)


def _sam_boxes(boxes: Tensor, size: int, height: int, width: int) -> Tensor:
    inner_height, inner_width = _sam_sides(size, height, width)
    return boxes * boxes.new_tensor([inner_width / width, inner_height / height]).repeat(boxes.shape[-1] // 2)


def _sam_mask(low: Tensor, size: int, height: int, width: int) -> Tensor:
    """Up to the padded square, the padding cut off, then to the image."""
    inner_height, inner_width = _sam_sides(size, height, width)
    return bilinear(bilinear(low, size, size)[..., :inner_height, :inner_width], height, width)


def _sam_med2d_image(images: Tensor, size: int) -> Tensor:
    """Normalised first, then squeezed to the square by nearest neighbour."""
    return F.interpolate(_normalised(images), (size, size), mode="nearest")


def _sam_med2d_mask(low: Tensor, size: int, height: int, width: int) -> Tensor:
    return bilinear(bilinear(low, size, size), height, width)


def _medsam_image(images: Tensor, size: int) -> Tensor:
    """Squeezed to the square (bicubic, antialiased), then by its own minimum and maximum to 0..1."""
    x = images.float()
    if x.shape[-2:] != (size, size):
        low, high = x.amin((1, 2, 3), keepdim=True), x.amax((1, 2, 3), keepdim=True)
        x = F.interpolate(x, (size, size), mode="bicubic", antialias=True, align_corners=False)
        x = x.clamp(low, high)  # a cubic overshoots
    low, high = x.amin((1, 2, 3), keepdim=True), x.amax((1, 2, 3), keepdim=True)
    return ((x - low) / (high - low).clamp_min(1e-8)).expand(-1, 3, -1, -1)


def _medsam_mask(low: Tensor, size: int, height: int, width: int) -> Tensor:
    """MedSAM resizes probabilities, not logits: the logit of the result keeps them and their mask."""
    return bilinear(low.sigmoid(), height, width).logit(eps=1e-6)


@dataclass(frozen=True)
class Family:
    """A published network: which of the package's it is, at which size, and how it is called."""

    builder: str
    size: int
    convention: Convention
    adapters: bool = False


_SAM = Convention(_sam_image, _sam_boxes, _sam_mask)

FAMILIES = {
    "sam-med2d": Family(
        "vit_b",
        256,
        Convention(_sam_med2d_image, scaled_by_sides, _sam_med2d_mask, multimask=True),
        adapters=True,
    ),
    "sam_vit_b": Family("vit_b", 1024, _SAM),
    "sam_vit_l": Family("vit_l", 1024, _SAM),
    "sam_vit_h": Family("vit_h", 1024, _SAM),
    "medsam": Family("vit_b", 1024, Convention(_medsam_image, scaled_by_sides, _medsam_mask)),
}


def network(name: str, *, size: int | None = None, adapters: bool | None = None) -> "Sam":
    """A family's network, untrained, from the package's own builder.

    Args:
        name: one of `FAMILIES`.
        size: side of its input in pixels; None for the family's own.
        adapters: whether the image encoder has adapters; None for the family's own.
    """
    # Imported here: it takes seconds, which a notebook without a teacher need not wait for.
    from segment_anything import sam_model_registry

    family = FAMILIES[name]
    sam = sam_model_registry[family.builder]()
    resize(sam, size or family.size)
    if family.adapters if adapters is None else adapters:
        add_adapters(sam)
    return sam

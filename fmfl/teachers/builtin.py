"""The built-in teacher: a small Segment Anything network (Kirillov et al. 2023, arXiv 2304.02643).

It is made of the `segment-anything` package's own modules and trained by `tools/train_builtin_teacher.py`
(recorded in data/README.md), so that a fresh machine runs the real path without a download.
"""

import contextlib
import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn import functional as F

from fmfl.errors import UserError
from fmfl.teachers import checkpoints, sam

if TYPE_CHECKING:
    from segment_anything.modeling import Sam


def network(
    *,
    size: int = 128,
    patch_size: int = 8,
    width: int = 128,
    depth: int = 4,
    num_heads: int = 4,
    window_size: int = 8,
    global_attention: tuple[int, ...] = (1, 3),
    prompt_width: int = 128,
) -> "Sam":
    """Return the network, untrained, at a size that two cores can train.

    Args:
        size: input side in pixels.
        patch_size: side of a ViT patch; the logits leave the decoder at `4 * size / patch_size`.
        width: channels of the image encoder.
        depth: transformer blocks of the image encoder.
        num_heads: attention heads of a block.
        window_size: side of an attention window in patches; half the grid at 128 pixels.
        global_attention: the blocks that attend over the whole grid instead.
        prompt_width: channels of prompts, decoder and image embedding.
    """
    # Imported here: it takes seconds, which a notebook without a teacher need not wait for.
    from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, Sam, TwoWayTransformer

    grid = size // patch_size
    encoder = ImageEncoderViT(
        img_size=size,
        patch_size=patch_size,
        in_chans=1,
        embed_dim=width,
        depth=depth,
        num_heads=num_heads,
        out_chans=prompt_width,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        use_rel_pos=True,
        window_size=window_size,
        global_attn_indexes=tuple(global_attention),
    )
    prompts = PromptEncoder(prompt_width, (grid, grid), (size, size), mask_in_chans=16)
    decoder = MaskDecoder(
        transformer_dim=prompt_width,
        transformer=TwoWayTransformer(2, prompt_width, num_heads=4, mlp_dim=4 * prompt_width),
        iou_head_hidden_dim=prompt_width,
    )
    return Sam(encoder, prompts, decoder)


def load(path: Path) -> "Sam":
    """Return the network that a file's metadata describe, with the file's weights.

    Raises:
        UserError: the file does not hold the network's weights, all of them and no others.
    """
    state, settings = checkpoints.read(path), "{}"
    # A file in PyTorch's format has no metadata: it holds the shipped size.
    with contextlib.suppress(SafetensorError), safe_open(path, "pt") as file:
        settings = (file.metadata() or {}).get("network", settings)
    try:
        built = network(**json.loads(settings))
        built.load_state_dict(state)
    except (RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:120]
        raise UserError(f"{path} does not hold the built-in teacher's weights ({reason})") from None
    checkpoints.usable(path, state, built.state_dict())
    return built


def standardise(images: Tensor) -> Tensor:
    """Return images of mean 0 and standard deviation 1: exposure differs between hospitals, anatomy does not.

    Args:
        images: [B, 1, H, W] float, any range.
    """
    mean = images.mean((1, 2, 3), keepdim=True)
    std = images.std((1, 2, 3), keepdim=True)
    return (images - mean) / (std + 1e-6)


def _image(images: Tensor, size: int) -> Tensor:
    x = images.float()
    if x.shape[-2:] != (size, size):
        x = F.interpolate(x, (size, size), mode="bilinear", antialias=True, align_corners=False)
    return standardise(x)


def _boxes(boxes: Tensor, size: int, height: int, width: int) -> Tensor:
    # Pixel indices name centres: (i + 1/2) scales, i does not.
    return sam.scaled_by_sides(boxes + 0.5, size, height, width) - 0.5


def _mask(low: Tensor, size: int, height: int, width: int) -> Tensor:
    return sam.bilinear(low, height, width)


#: The built-in teacher's own way from image, boxes and decoder to logits.
CONVENTION = sam.Convention(_image, _boxes, _mask)

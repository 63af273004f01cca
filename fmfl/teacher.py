"""The teacher: a frozen promptable segmenter, its box prompts, and its logits, computed once and cached.

Every teacher answers one question, ``logits(images, boxes)``: SAM-Med2D (the paper's), SAM and MedSAM from
their authors' checkpoints (:mod:`fmfl.sam`), or the built-in one. That is a small Segment Anything model
(Kirillov et al. 2023, arXiv 2304.02643), made of the ``segment-anything`` package's own modules and trained
by this project (``python -m fmfl.teacher_training``, recorded in data/README.md), so that a fresh machine
runs the real path without a download.
"""

import hashlib
import json
import time
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from scipy import ndimage
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from fmfl import checkpoints, paths, sam, states
from fmfl.checkpoints import State
from fmfl.errors import UserError
from fmfl.sam import Convention

if TYPE_CHECKING:
    from segment_anything.modeling import Sam

BUILTIN_WEIGHTS = paths.DATA / "builtin_teacher.safetensors"

#: Where a box comes from. The paper prompts with the ground truth's bounding box.
BOX_RULES = ("ground_truth", "ground_truth_jitter", "whole_image")

#: One box round each lung, or one round both.
BOXES_PER_IMAGE = ("per_lung", "one")


def builtin_sam(
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
    """The built-in teacher's network, untrained: Segment Anything at a size that two cores can train.

    Args:
        size: input side in pixels.
        patch_size: side of a ViT patch; the logits leave the decoder at ``4 * size / patch_size``.
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
    prompts = PromptEncoder(
        embed_dim=prompt_width,
        image_embedding_size=(grid, grid),
        input_image_size=(size, size),
        mask_in_chans=16,
    )
    decoder = MaskDecoder(
        transformer_dim=prompt_width,
        transformer=TwoWayTransformer(
            depth=2, embedding_dim=prompt_width, num_heads=4, mlp_dim=4 * prompt_width
        ),
        num_multimask_outputs=3,
        iou_head_hidden_dim=prompt_width,
    )
    return Sam(encoder, prompts, decoder)


def standardise(images: Tensor) -> Tensor:
    """Each image to mean 0 and standard deviation 1: exposure differs between hospitals, anatomy does not.

    Args:
        images: (B, 1, H, W) float, any range.
    """
    mean = images.mean((1, 2, 3), keepdim=True)
    std = images.std((1, 2, 3), keepdim=True)
    return (images - mean) / (std + 1e-6)


def _builtin_image(images: Tensor, size: int) -> Tensor:
    x = images.float()
    if x.shape[-2:] != (size, size):
        x = F.interpolate(x, (size, size), mode="bilinear", antialias=True, align_corners=False)
    return standardise(x)


def _builtin_boxes(boxes: Tensor, size: int, height: int, width: int) -> Tensor:
    # Pixel indices name centres: (i + 1/2) scales, i does not.
    return sam.scaled_by_sides(boxes + 0.5, size, height, width) - 0.5


def _builtin_mask(low: Tensor, size: int, height: int, width: int) -> Tensor:
    return sam.bilinear(low, height, width)


#: How the built-in teacher is called.
BUILTIN = Convention(_builtin_image, _builtin_boxes, _builtin_mask)


def decode(
    sam: "Sam", embeddings: Tensor, boxes: Tensor, *, multimask: bool = False
) -> tuple[Tensor, Tensor]:
    """Masks for many (image, box) pairs in one call of the package's decoder.

    The package decodes several boxes of *one* image: it repeats the image embedding and adds the dense
    prompt. Here each pair has an image of its own, so the image embedding travels in the dense prompt
    and the repeated one is zero: 0 + (dense + image) is the sum that the package would have made.

    Args:
        embeddings: (P, C, h, w), one a pair.
        boxes: (P, 4), x0 y0 x1 y1 in pixels of the network's input.
        multimask: three masks a box, of parts and whole, instead of one.

    Returns:
        Low-resolution logits (P, 1 or 3, 4h, 4w) and predicted IoU (P, 1 or 3).
    """
    sparse, dense = sam.prompt_encoder(points=None, boxes=boxes, masks=None)
    return sam.mask_decoder(
        image_embeddings=torch.zeros_like(embeddings[:1]),
        image_pe=sam.prompt_encoder.get_dense_pe(),
        sparse_prompt_embeddings=sparse,
        dense_prompt_embeddings=dense + embeddings,
        multimask_output=multimask,
    )


@dataclass
class Teacher:
    """A frozen promptable segmenter.

    Attributes:
        name: as given to :func:`load`.
        sam: the network, in evaluation mode, without gradients.
        size: side of the network's input in pixels.
        convention: what is done to images, boxes and masks on the way.
        sha256: of the weights' file.
        calls: how many images the image encoder has seen; a cached distillation leaves it at 0.
    """

    name: str
    sam: "Sam"
    size: int
    convention: Convention
    sha256: str
    calls: int = 0

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return self.sam.device

    @property
    def num_parameters(self) -> int:
        """Parameters of the network, trained or not."""
        return sum(parameter.numel() for parameter in self.sam.parameters())

    @property
    def batch_size(self) -> int:
        """Images a forward pass, by default: global attention's memory grows with the side's fourth power."""
        return max(1, min(32, int(32 * (256 / self.size) ** 4)))

    @torch.inference_mode()
    def logits(self, images: Tensor, boxes: Tensor, *, batch_size: int | None = None) -> Tensor:
        """The teacher's raw scores for the union of what the boxes hold.

        Several boxes of an image give one mask: the maximum of their logits, so that a pixel is inside
        the joined mask exactly when it is inside one of the single masks.

        Args:
            images: (B, 1, H, W) uint8.
            boxes: (B, 4) or (B, n, 4) float, x0 y0 x1 y1 as pixel indices of these images; a row of
                NaN is no box (an image with one visible lung among images with two).
            batch_size: images a forward pass; None for :attr:`batch_size`.

        Returns:
            (B, 1, H, W) float32: the decoder's low-resolution logits, resized as the network's authors do it.

        Raises:
            ValueError: the shapes do not fit, or an image has no box at all.
        """
        return self.answers(images, [boxes], batch_size=batch_size)[0]

    @torch.inference_mode()
    def answers(
        self, images: Tensor, prompts: list[Tensor], *, batch_size: int | None = None
    ) -> list[Tensor]:
        """:meth:`logits` for several sets of boxes, with each image encoded once.

        The image encoder is the dear part and does not see the boxes.

        Args:
            images: (B, 1, H, W) uint8.
            prompts: each (B, 4) or (B, n, 4), as for :meth:`logits`.
            batch_size: images a forward pass; None for :attr:`batch_size`.

        Returns:
            One (B, 1, H, W) float32 for each set of boxes.

        Raises:
            ValueError: see :meth:`logits`.
        """
        if images.ndim != 4 or images.shape[1] != 1:
            raise ValueError(f"images {tuple(images.shape)} must be (B, 1, H, W)")
        prompts = [boxes[:, None] if boxes.ndim == 2 else boxes for boxes in prompts]
        for boxes in prompts:
            if boxes.ndim != 3 or boxes.shape[0] != images.shape[0] or boxes.shape[2] != 4:
                raise ValueError(
                    f"boxes {tuple(boxes.shape)} must be (B, 4) or (B, n, 4) with B = {images.shape[0]}"
                )
            if boxes.isnan().any(-1).all(-1).any():
                raise ValueError("every image needs at least one box")
        found: list[list[Tensor]] = [[] for _ in prompts]
        for rows in torch.arange(len(images), device=images.device).split(batch_size or self.batch_size):
            embeddings = self._embed(images[rows])
            for boxes, parts in zip(prompts, found, strict=True):
                parts.append(self._decode(embeddings, boxes[rows.to(boxes.device)], *images.shape[-2:]))
        return [torch.cat(parts) for parts in found]

    def _embed(self, images: Tensor) -> Tensor:
        """(B, C, h, w) image embeddings."""
        self.calls += len(images)
        return self.sam.image_encoder(self.convention.image(images.to(self.device), self.size))

    def _decode(self, embeddings: Tensor, boxes: Tensor, height: int, width: int) -> Tensor:
        """(B, 1, height, width) logits of (B, n, 4) boxes in pixels of that size."""
        scaled = self.convention.boxes(boxes.to(self.device, torch.float32), self.size, height, width)
        image, slot = (~scaled.isnan().any(-1)).nonzero(as_tuple=True)
        multimask = self.convention.multimask
        low, iou = decode(self.sam, embeddings[image], scaled[image, slot], multimask=multimask)
        best = low.float()[torch.arange(len(low), device=low.device), iou.argmax(1)]
        full = self.convention.mask(best[:, None], self.size, height, width)
        joined = full.new_full((len(boxes), boxes.shape[1], height, width), -torch.inf)
        joined[image, slot] = full[:, 0]
        return joined.amax(1, keepdim=True)


#: Names that :func:`load` knows.
NAMES = ("builtin", *sam.FAMILIES)


def load(
    name: str = "builtin",
    checkpoint: str | Path | None = None,
    device: str | torch.device = "cpu",
    *,
    adapter: bool = True,
    size: int | None = None,
    allow: Iterable[str] = (),
) -> Teacher:
    """A frozen teacher by name, from its authors' checkpoint.

    Args:
        name: one of :data:`NAMES`; ``builtin`` is the small Segment Anything model that this project ships.
        checkpoint: file of its weights; None for the shipped ones, which only ``builtin`` has.
        device: where it runs.
        adapter: False runs SAM-Med2D's weights without the adapters, or plain SAM's as SAM-Med2D is called.
        size: side of the network's input in pixels; None for the family's own. A checkpoint of another
            size has its positions interpolated (:func:`fmfl.sam.resize`). ``builtin`` keeps its file's.
        allow: keys of the network or of the checkpoint that need not agree, ``*`` for anything; what is
            missing keeps random values, the same in each run.

    Raises:
        UserError: the name or the file is not usable, or a key is missing, unexpected or of another shape.
    """
    if name not in NAMES:
        raise UserError(f"teacher {name!r} is unknown: choose {', '.join(NAMES[:-1])} or {NAMES[-1]}")
    path = Path(checkpoint) if checkpoint else BUILTIN_WEIGHTS
    if name == "builtin":
        network, convention = _load_builtin(path), BUILTIN
    elif checkpoint is None:
        raise UserError(f"teacher {name!r} needs its authors' weights: name their file with --checkpoint")
    else:
        network, convention = _load_published(name, path, adapter, size, allow), sam.FAMILIES[name].convention
    return Teacher(
        name=name,
        sam=network.to(device).eval().requires_grad_(False),
        size=network.image_encoder.img_size,
        convention=convention,
        sha256=checkpoints.sha256_of(path),
    )


def _load_builtin(path: Path) -> "Sam":
    """The built-in network as its file describes it, with the file's weights."""
    if not path.is_file():
        raise UserError(
            f"the teacher's weights {path} are not there: name an existing file with --checkpoint"
        )
    try:
        with safe_open(path, "pt") as file:
            settings = json.loads((file.metadata() or {}).get("network", "{}"))
        network = builtin_sam(**settings)
        state = {key: value.float() for key, value in load_file(path).items()}
        network.load_state_dict(state, strict=True)
    except (OSError, SafetensorError, RuntimeError, TypeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{path} does not hold the built-in teacher's weights as safetensors ({reason})"
        ) from None
    return network


def _load_published(name: str, path: Path, adapter: bool, size: int | None, allow: Iterable[str]) -> "Sam":
    """A family's network with a checkpoint's weights, all of them or those that ``allow`` leaves."""
    state, adapters = checkpoints.read(path), adapter and sam.FAMILIES[name].adapters
    if sam.FAMILIES[name].adapters and not adapter:
        state = {key: value for key, value in state.items() if ".Adapter." not in key}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = sam.network(name, size=_input_size(state), adapters=adapters)
    fit = checkpoints.compare(state, network.state_dict())
    if problems := fit.without(allow).sentence():
        raise UserError(f"{path} does not fit teacher {name!r}: {problems}")
    network.load_state_dict({key: state[key] for key in fit.matched}, strict=False)
    sam.resize(network, size or sam.FAMILIES[name].size)
    return network


def _input_size(state: State) -> int | None:
    """Side in pixels of the input that a checkpoint was made for; None where it does not tell."""
    position = state.get("image_encoder.pos_embed")
    square = position is not None and position.ndim == 4 and position.shape[1] == position.shape[2] > 0
    return 16 * position.shape[1] if square else None


def boxes_from_masks(masks: Tensor, *, per_image: str = "per_lung") -> Tensor:
    """Bounding boxes of the ground truth, the paper's prompt.

    Args:
        masks: (B, 1, H, W) uint8 or bool.
        per_image: ``per_lung`` for a box round each of the two largest connected parts, ordered from
            left to right (the second row is NaN where there is one part); ``one`` for a single box.

    Returns:
        (B, 2, 4) or (B, 1, 4) float32 on the masks' device: x0 y0 x1 y1, the outermost pixels' indices.

    Raises:
        UserError: ``per_image`` is unknown.
        ValueError: a mask is empty.
    """
    if per_image not in BOXES_PER_IMAGE:
        raise UserError(
            f"boxes_per_image {per_image!r} is unknown: choose one of {', '.join(BOXES_PER_IMAGE)}"
        )
    found = np.full((len(masks), 2 if per_image == "per_lung" else 1, 4), np.nan, np.float32)
    for number, mask in enumerate(masks[:, 0].cpu().numpy() > 0):
        if not mask.any():
            raise ValueError(f"mask {number} is empty, so it has no box")
        parts, count = ndimage.label(mask) if per_image == "per_lung" else (mask.astype(int), 1)
        slices = ndimage.find_objects(parts)
        areas = np.bincount(parts.ravel(), minlength=count + 1)[1:]
        # A speck left by resizing is not a lung: a part counts from a twentieth of the largest on.
        kept = [k for k in np.argsort(-areas, kind="stable")[:2] if areas[k] >= areas.max() / 20]
        rows = [
            (slices[k][1].start, slices[k][0].start, slices[k][1].stop - 1, slices[k][0].stop - 1)
            for k in kept
        ]
        found[number, : len(rows)] = sorted(rows)
    return torch.from_numpy(found).to(masks.device)


def jitter(boxes: Tensor, size: int, generator: torch.Generator, *, pixels: float = 5.0) -> Tensor:
    """Boxes as a hurried hand draws them: every side moved by up to ``pixels``.

    Args:
        boxes: (..., 4) in pixels; NaN rows stay.
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
    """Box prompts by a named rule.

    Args:
        masks: (B, 1, H, W) ground truth; its values are not looked at for ``whole_image``.
        rule: one of :data:`BOX_RULES`.
        per_image: one of :data:`BOXES_PER_IMAGE`; ``whole_image`` gives one box in any case.
        jitter_pixels: for ``ground_truth_jitter``.
        seed: for ``ground_truth_jitter``.

    Returns:
        (B, n, 4) float32.
    """
    size = masks.shape[-1]
    if rule == "whole_image":
        return torch.tensor([0.0, 0.0, size - 1, masks.shape[-2] - 1], device=masks.device).expand(
            len(masks), 1, 4
        )
    if rule not in BOX_RULES:
        raise UserError(f"box_rule {rule!r} is unknown: choose one of {', '.join(BOX_RULES)}")
    boxes = boxes_from_masks(masks, per_image=per_image)
    if rule == "ground_truth_jitter":
        boxes = jitter(boxes, size, torch.Generator().manual_seed(seed), pixels=jitter_pixels)
    return boxes


class CachedLogits(NamedTuple):
    """A teacher's answers, and what they have cost."""

    logits: Tensor  # (B, 1, H, W) float16
    seconds: float  # that the teacher took, on the day when it was asked


def cached_logits(
    teacher: Teacher,
    images: Tensor,
    masks: Tensor,
    *,
    rule: str = "ground_truth",
    per_image: str = "per_lung",
    jitter_pixels: float = 5.0,
    seed: int = 0,
    cache: Path = paths.CACHE,
    progress: bool = True,
) -> CachedLogits:
    """The teacher's logits of a set of images, computed once for (weights, images, box rule).

    A file that is damaged is found out by its digest, and computed again.

    Args:
        images: (B, 1, H, W) uint8.
        masks: (B, 1, H, W), for the boxes.
        rule, per_image, jitter_pixels, seed: see :func:`prompt`.
        cache: folder of the cached files.
        progress: show a bar while computing.

    Returns:
        (B, 1, H, W) float16 on the images' device, and the seconds that it took to ask.
    """
    boxes = prompt(masks, rule, per_image=per_image, jitter_pixels=jitter_pixels, seed=seed)
    made_by = states.code_digest(("teacher.py", "sam.py", "checkpoints.py"))
    key = hashlib.sha256(f"{made_by} {teacher.name} {teacher.sha256} {tuple(images.shape)}".encode())
    for tensor in (images, boxes):
        key.update(tensor.cpu().contiguous().numpy().tobytes())
    file = cache / f"logits-{key.hexdigest()[:24]}.safetensors"
    if (stored := states.read_state(file, device=images.device)) is not None:
        return CachedLogits(stored[0]["logits"], stored[1]["seconds"])
    started = time.perf_counter()
    steps = zip(images.split(32), boxes.split(32), strict=True)
    bar = tqdm(steps, total=-(-len(images) // 32), desc="teacher", disable=not progress, leave=False)
    logits = torch.cat([teacher.logits(*step).half() for step in bar])
    seconds = time.perf_counter() - started
    try:
        states.write_state(file, {"logits": logits}, seconds=seconds)
    except OSError as error:
        warnings.warn(f"the teacher's logits cannot be kept in {cache} ({error.strerror})", stacklevel=2)
    return CachedLogits(logits.to(images.device), seconds)

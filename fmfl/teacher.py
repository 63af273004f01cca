"""The teacher: a frozen promptable segmenter, its box prompts, and its logits, computed once and cached.

Every teacher answers one question, `logits(images, boxes)`: SAM-Med2D (the paper's), SAM and MedSAM from
their authors' checkpoints (`sam`), or the built-in one. That is a small Segment Anything model
(Kirillov et al. 2023, arXiv 2304.02643), made of the `segment-anything` package's own modules and trained
by this project (`python tools/train_builtin_teacher.py`, recorded in data/README.md), so that a fresh machine
runs the real path without a download.
"""

import contextlib
import hashlib
import json
import time
import warnings
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import psutil
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from fmfl import parallel, paths, states
from fmfl.errors import UserError
from fmfl.teachers import checkpoints, sam
from fmfl.teachers.checkpoints import Fit, State
from fmfl.teachers.sam import Convention

if TYPE_CHECKING:
    from segment_anything.modeling import Sam

BUILTIN_WEIGHTS = paths.DATA / "builtin_teacher.safetensors"


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
        images: [B, 1, H, W] float, any range.
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
    sam: "Sam", embeddings: Tensor, prompts: Tensor, *, multimask: bool = False
) -> tuple[Tensor, Tensor]:
    """Masks for many (image, prompt) pairs in one call of the package's decoder.

    The package decodes several prompts of *one* image: it repeats the image embedding and adds the dense
    prompt. Here each pair has an image of its own, so the image embedding travels in the dense prompt
    and the repeated one is zero: 0 + (dense + image) is the sum that the package would have made.

    Args:
        embeddings: (P, C, h, w), one a pair.
        prompts: (P, 4) boxes x0 y0 x1 y1, or (P, 2) clicks x y inside, in pixels of the network's input.
        multimask: three masks a prompt, of parts and whole, instead of one.

    Returns:
        Low-resolution logits (P, 1 or 3, 4h, 4w) and predicted IoU (P, 1 or 3).
    """
    clicks, boxes = None, prompts
    if prompts.shape[-1] == 2:
        inside = torch.ones(len(prompts), 1, dtype=torch.int, device=prompts.device)
        clicks, boxes = (prompts[:, None], inside), None
    sparse, dense = sam.prompt_encoder(points=clicks, boxes=boxes, masks=None)
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
        name: as given to `load`.
        sam: the network, in evaluation mode, without gradients.
        size: side of the network's input in pixels.
        convention: what is done to images, boxes and masks on the way.
        sha256: of the weights' file.
        precision: of the image encoder, float32 or bfloat16; the decoder, a hundredth of the work, is always
            float32.
        fit: how the file's keys compared with the network's.
        noise: what was added to each weight, in its tensor's standard deviations; 0 for the teacher as it is.
        calls: how many images the image encoder has seen; a cached distillation leaves it at 0.
    """

    name: str
    sam: "Sam"
    size: int
    convention: Convention
    sha256: str
    precision: str = "float32"
    fit: Fit = field(default_factory=Fit)
    noise: float = 0.0
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
    def adapters(self) -> bool:
        """Whether the image encoder has SAM-Med2D's adapters."""
        return hasattr(self.sam.image_encoder.blocks[0], "Adapter")

    @property
    def batch_size(self) -> int:
        """Images a forward pass: as many as half of the device's memory holds, 32 at most.

        Reckoned from the memory that the device has, not from what is free just now: answers differ in their
        last bits with the batch, and a run shall not depend on who else is there.
        """
        # Global attention holds its (patches x patches) weights about three times over, for every head.
        encoder = self.sam.image_encoder
        patches = (self.size // encoder.patch_embed.proj.kernel_size[0]) ** 2
        one_image = 3 * 4 * encoder.blocks[0].attn.num_heads * patches**2
        if self.device.type == "cuda":
            memory = torch.cuda.get_device_properties(self.device).total_memory
        else:
            memory = psutil.virtual_memory().total
        return max(1, min(32, memory // 2 // one_image))

    def about(self) -> dict[str, object]:
        """Which weights these are, as JSON values for a manifest."""
        return {
            "name": self.name,
            "sha256": self.sha256,
            "published_as": checkpoints.published_as(self.sha256),
            "parameters": self.num_parameters,
            "input_size": self.size,
            "adapters": self.adapters,
            "precision": self.precision,
            "keys_matched": len(self.fit.matched),
            "keys_passed_over": self.fit.problems,
        } | ({"noise": self.noise} if self.noise else {})

    def logits(self, images: Tensor, boxes: Tensor, *, batch_size: int | None = None) -> Tensor:
        """The teacher's raw scores for the union of what the boxes hold.

        Several boxes of an image give one mask: the maximum of their logits, so that a pixel is inside
        the joined mask exactly when it is inside one of the single masks.

        Args:
            images: [B, 1, H, W] uint8.
            boxes: [B, 4] or [B, n, 4] float, x0 y0 x1 y1 as pixel indices of these images; a row of
                NaN is no box (an image with one visible lung among images with two). Or clicks x y inside
                what is meant, [B, 2] or [B, n, 2], each decoded by itself as a box is.
            batch_size: images a forward pass; None for `batch_size`.

        Returns:
            [B, 1, H, W] float32: the decoder's low-resolution logits, resized as the network's authors do it.

        Raises:
            ValueError: the shapes do not fit, or an image has no box at all.
            UserError: the built-in teacher is asked with clicks.
        """
        return self.answers(images, [boxes], batch_size=batch_size)[0]

    @torch.inference_mode()
    def answers(
        self, images: Tensor, prompts: list[Tensor], *, batch_size: int | None = None
    ) -> list[Tensor]:
        """`logits` for several sets of boxes, with each image encoded once.

        The image encoder is the dear part and does not see the boxes.

        Args:
            images: [B, 1, H, W] uint8.
            prompts: each as for `logits`.
            batch_size: images a forward pass; None for `batch_size`.

        Returns:
            One [B, 1, H, W] float32 for each set of boxes.

        Raises:
            ValueError, UserError: see `logits`.
        """
        if images.ndim != 4 or images.shape[1] != 1:
            raise ValueError(f"images {tuple(images.shape)} must be (B, 1, H, W)")
        prompts = [boxes[:, None] if boxes.ndim == 2 else boxes for boxes in prompts]
        for boxes in prompts:
            if boxes.ndim != 3 or boxes.shape[0] != images.shape[0] or boxes.shape[2] not in (2, 4):
                raise ValueError(
                    f"boxes {tuple(boxes.shape)} must be [B, 4] or [B, n, 4], clicks [B, 2] or [B, n, 2], "
                    f"with B = {images.shape[0]}"
                )
            if boxes.isnan().any(-1).all(-1).any():
                raise ValueError("every image needs at least one box")
            if boxes.shape[2] == 2 and self.name == "builtin":
                raise UserError("the built-in teacher was trained on boxes alone: choose another box_rule")
        found: list[list[Tensor]] = [[] for _ in prompts]
        # On one thread sums have one order, so the bytes do not depend on the cores. The published networks
        # are too large to leave all cores but one idle.
        alone = parallel.one_thread(self.device) if self.name == "builtin" else contextlib.nullcontext()
        with alone:
            for rows in torch.arange(len(images), device=images.device).split(batch_size or self.batch_size):
                embeddings = self._embed(images[rows])
                for boxes, parts in zip(prompts, found, strict=True):
                    parts.append(self._decode(embeddings, boxes[rows.to(boxes.device)], *images.shape[-2:]))
        return [torch.cat(parts) for parts in found]

    def _embed(self, images: Tensor) -> Tensor:
        """[B, C, h, w] image embeddings."""
        self.calls += len(images)
        x = self.convention.image(images.to(self.device), self.size)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bfloat16"):
            return self.sam.image_encoder(x).float()

    def _decode(self, embeddings: Tensor, prompts: Tensor, height: int, width: int) -> Tensor:
        """(B, 1, height, width) logits of [B, n, 4] boxes or [B, n, 2] clicks in pixels of that size."""
        scaled = self.convention.boxes(prompts.to(self.device, torch.float32), self.size, height, width)
        image, slot = (~scaled.isnan().any(-1)).nonzero(as_tuple=True)
        multimask = self.convention.multimask
        low, iou = decode(self.sam, embeddings[image], scaled[image, slot], multimask=multimask)
        best = low.float()[torch.arange(len(low), device=low.device), iou.argmax(1)]
        full = self.convention.mask(best[:, None], self.size, height, width)
        joined = full.new_full((len(prompts), prompts.shape[1], height, width), -torch.inf)
        joined[image, slot] = full[:, 0]
        return joined.amax(1, keepdim=True)


#: Names that `load` knows.
NAMES = ("builtin", *sam.FAMILIES)


def load(
    name: str = "builtin",
    checkpoint: str | Path | None = None,
    device: str | torch.device = "cpu",
    *,
    adapter: bool = True,
    size: int | None = None,
    allow: Iterable[str] = (),
    precision: str = "float32",
    noise: float = 0.0,
) -> Teacher:
    """A frozen teacher by name, from its authors' checkpoint.

    Args:
        name: one of `NAMES`; `builtin` is the small Segment Anything model that this project ships.
        checkpoint: file of its weights; None for the shipped ones of `builtin`, or for those that
            `fmfl teacher download` has fetched.
        device: where it runs.
        adapter: False runs SAM-Med2D's weights without the adapters, or plain SAM's as SAM-Med2D is called.
        size: side of the network's input in pixels; None for the family's own. A checkpoint of another
            size has its positions interpolated (`sam.resize`). `builtin` keeps its file's.
        allow: keys of the network or of the checkpoint that need not agree, `*` for anything; what is
            missing keeps random values, the same in each run.
        precision: of the image encoder, float32 or bfloat16.
        noise: makes the teacher worse on purpose: normal noise on each weight, in standard deviations of its
            tensor, the same in each run.

    Raises:
        UserError: the name or the file is not usable, or a key is missing, unexpected or of another shape.
    """
    if name not in NAMES:
        raise UserError(f"teacher {name!r} is unknown: choose {', '.join(NAMES[:-1])} or {NAMES[-1]}")
    path = Path(checkpoint) if checkpoint else default_file(name)
    if name == "builtin":
        network, convention = _load_builtin(path), BUILTIN
        fit = Fit(matched=list(network.state_dict()))
    else:
        network, fit = _load_published(name, path, adapter, size, allow)
        convention = sam.FAMILIES[name].convention
    if noise:
        _disturb(network, noise)
    return Teacher(
        name=name,
        sam=network.to(device).eval().requires_grad_(False),
        size=network.image_encoder.img_size,
        convention=convention,
        sha256=checkpoints.sha256_of(path),
        precision=precision,
        fit=fit,
        noise=noise,
    )


@torch.no_grad()
def _disturb(network: nn.Module, noise: float) -> None:
    """Add normal noise to each weight, in standard deviations of its tensor; see `load`."""
    rng = torch.Generator().manual_seed(0)
    for weight in network.parameters():
        if weight.numel() > 1:
            drawn = torch.randn(weight.shape, generator=rng)
            weight += noise * weight.std() * drawn.to(weight)


def default_file(name: str) -> Path:
    """The weights that stand for a name when no file is given.

    Raises:
        UserError: they are not there; how to get them.
    """
    if name == "builtin":
        return BUILTIN_WEIGHTS
    if (file := checkpoints.PUBLISHED[name].file).is_file():
        return file
    raise UserError(
        f"teacher {name!r} needs its authors' weights: name their file with --checkpoint, or see "
        f"`fmfl teacher download {name}`"
    )


def _load_builtin(path: Path) -> "Sam":
    """The built-in network as its file describes it, with the file's weights."""
    network, stored = _builtin_parts(path)
    checkpoints.usable(path, stored, network.state_dict())
    return network


def _builtin_parts(path: Path) -> tuple["Sam", State]:
    """The built-in network with a file's weights, and these as they are stored."""
    if not path.is_file():
        raise UserError(
            f"the teacher's weights {path} are not there: name an existing file with --checkpoint"
        )
    try:
        if zipfile.is_zipfile(path):  # PyTorch's format, which says nothing of the network
            network, stored = builtin_sam(), checkpoints.read(path)
        else:
            with safe_open(path, "pt") as file:
                settings = json.loads((file.metadata() or {}).get("network", "{}"))
            network, stored = builtin_sam(**settings), load_file(path)
        state = {key: value.float() for key, value in stored.items()}
        network.load_state_dict(state, strict=True)
    except UserError:
        raise
    except (OSError, SafetensorError, RuntimeError, TypeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{path} does not hold the built-in teacher's weights as safetensors ({reason})"
        ) from None
    return network, stored


def _load_published(
    name: str, path: Path, adapter: bool, size: int | None, allow: Iterable[str]
) -> tuple["Sam", Fit]:
    """A family's network with a checkpoint's weights, all of them or those that `allow` leaves."""
    state, adapters = checkpoints.read(path), adapter and sam.FAMILIES[name].adapters
    if sam.FAMILIES[name].adapters and not adapter:
        state = {key: value for key, value in state.items() if ".Adapter." not in key}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = sam.network(name, size=_input_size(state), adapters=adapters)
    fit = checkpoints.compare(state, network.state_dict())
    if problems := fit.without(allow).sentence():
        raise UserError(f"{path} does not fit teacher {name!r}: {problems}")
    checkpoints.usable(path, {key: state[key] for key in fit.matched}, network.state_dict())
    network.load_state_dict({key: state[key] for key in fit.matched}, strict=False)
    sam.resize(network, size or sam.FAMILIES[name].size)
    return network, fit


@dataclass(frozen=True)
class Checked:
    """What a file of weights is.

    Attributes:
        sha256: of the file.
        published_as: the teacher whose published checksum this is; None for any other file.
        state: the tensors.
        name: the teacher that was asked for, or that its keys look like; None where they look like none.
        input_size: side in pixels that its positions were made for; None where it has none.
        fit: its keys against that teacher's network; None without one.
        not_finite, constant: what is wrong with its numbers, see the functions of `checkpoints`.
    """

    sha256: str
    published_as: str | None
    state: State
    name: str | None
    input_size: int | None
    fit: Fit | None
    not_finite: str = ""
    constant: str = ""


def check(path: str | Path, name: str | None = None) -> Checked:
    """A look at a checkpoint: which file, which family, and how its keys compare.

    Args:
        path: the file.
        name: the teacher that it shall be; None to tell from the keys. MedSAM's are those of SAM ViT-B.

    Raises:
        UserError: the file is no checkpoint, or the name is unknown.
    """
    path = Path(path)
    if name is not None and name not in NAMES:
        raise UserError(f"teacher {name!r} is unknown: choose {', '.join(NAMES[:-1])} or {NAMES[-1]}")
    state = checkpoints.read(path)
    sha256, input_size, fit, expected = checkpoints.sha256_of(path), _input_size(state), None, {}
    name = name or checkpoints.published_as(sha256) or _looks_like(state)
    if name == "builtin":
        expected = _builtin_parts(path)[0].state_dict()
    elif name:
        with torch.device("meta"):
            expected = sam.network(name, size=input_size).state_dict()
    if name:
        fit = checkpoints.compare(state, expected)
    numbers = [find(state, expected) for find in (checkpoints.not_finite, checkpoints.constant)]
    return Checked(sha256, checkpoints.published_as(sha256), state, name, input_size, fit, *numbers)


def _looks_like(state: State) -> str | None:
    """The family whose image encoder has this width and depth and, or not, adapters."""
    weight = state.get("image_encoder.patch_embed.proj.weight")
    if weight is None or weight.ndim != 4:
        return None
    if weight.shape[1] == 1:  # grey: only ours
        return "builtin"
    if any(".Adapter." in key for key in state):
        return "sam-med2d"
    return {768: "sam_vit_b", 1024: "sam_vit_l", 1280: "sam_vit_h"}.get(weight.shape[0])


def _input_size(state: State) -> int | None:
    """Side in pixels of the input that a checkpoint was made for; None where it does not tell."""
    position = state.get("image_encoder.pos_embed")
    square = position is not None and position.ndim == 4 and position.shape[1] == position.shape[2] > 0
    weight = state.get("image_encoder.patch_embed.proj.weight")
    patch = 16 if weight is None or weight.ndim != 4 else weight.shape[-1]
    return patch * position.shape[1] if square else None


class CachedLogits(NamedTuple):
    """A teacher's answers, and what they have cost."""

    logits: Tensor  # [B, 1, H, W] float16
    seconds: float  # that the teacher took when it was asked: of CPU time on a CPU, else on the wall


def cached_logits(
    teacher: Teacher,
    images: Tensor,
    boxes: Tensor,
    *,
    cache: Path = paths.CACHE,
    progress: bool = True,
) -> CachedLogits:
    """The teacher's logits of a set of images, computed once for (weights, images, boxes, way of asking).

    A file that is damaged is found out by its digest, and computed again.

    Args:
        images: [B, 1, H, W] uint8.
        boxes: as for `Teacher.logits`, from `prompt`.
        cache: folder of the cached files.
        progress: show a bar while computing.

    Returns:
        [B, 1, H, W] float16 on the images' device, and the seconds that it took to ask.
    """
    made_by = states.code_digest(("teacher.py", "teachers/sam.py", "teachers/checkpoints.py"))
    asked = (teacher.name, teacher.sha256, teacher.size, teacher.adapters, teacher.precision, teacher.noise)
    key = hashlib.sha256(f"{made_by} {asked} {tuple(images.shape)} {tuple(boxes.shape)}".encode())
    for tensor in (images, boxes):
        key.update(tensor.cpu().contiguous().numpy().tobytes())
    file = cache / f"logits-{key.hexdigest()[:24]}.safetensors"
    if (stored := states.read_state(file, device=images.device)) is not None:
        return CachedLogits(stored[0]["logits"], stored[1]["seconds"])
    # The clock of training (see train.fit): a CPU's own time, here of all its cores; elsewhere wall time.
    clock = time.process_time if teacher.device.type == "cpu" else time.perf_counter
    started = clock()
    steps = zip(images.split(32), boxes.split(32), strict=True)
    bar = tqdm(steps, total=-(-len(images) // 32), desc="teacher", disable=not progress, leave=False)
    logits = torch.cat([teacher.logits(*step).half() for step in bar])
    logits.flatten()[-1:].tolist()  # wait for the device
    seconds = clock() - started
    try:
        states.write_state(file, {"logits": logits}, seconds=seconds)
    except OSError as error:
        warnings.warn(f"the teacher's logits cannot be kept in {cache} ({error.strerror})", stacklevel=2)
    return CachedLogits(logits.to(images.device), seconds)

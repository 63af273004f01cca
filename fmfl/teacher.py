"""The teacher: a frozen promptable segmenter, its logits for box prompts, computed once and cached.

Every teacher has one interface, `logits(images, boxes)`: SAM-Med2D (the paper's), SAM and MedSAM from their
authors' checkpoints (`teachers.sam`), or the one that this project ships (`teachers.builtin`).
"""

import contextlib
import hashlib
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import psutil
import torch
from torch import Tensor
from tqdm.auto import tqdm

from fmfl import parallel, paths, states
from fmfl.errors import UserError
from fmfl.teachers import builtin, checkpoints, sam
from fmfl.teachers.sam import Convention

if TYPE_CHECKING:
    from segment_anything.modeling import Sam

#: Modules that decide a teacher's logits: a cache made by other code is made again.
CODE = ("teacher.py", "teachers/sam.py", "teachers/builtin.py", "teachers/checkpoints.py")

#: The built-in teacher's weights, which this project ships.
BUILTIN_WEIGHTS = paths.DATA / "builtin_teacher.safetensors"


def decode(
    sam: "Sam", embeddings: Tensor, boxes: Tensor, *, multimask: bool = False
) -> tuple[Tensor, Tensor]:
    """Decode the masks of many (image, box) pairs in one call of the package's decoder.

    The package decodes several boxes of *one* image: it repeats the image embedding and adds the dense
    prompt. Here each pair has an image of its own, so the image embedding travels in the dense prompt
    and the repeated one is zero: 0 + (dense + image) is the sum that the package would have made.

    Args:
        embeddings: [P, C, h, w], one a pair.
        boxes: [P, 4] x0 y0 x1 y1 in pixels of the network's input.
        multimask: three masks a box, of parts and whole, instead of one.

    Returns:
        Low-resolution logits [P, 1 or 3, 4h, 4w] and predicted IoU [P, 1 or 3].
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
        name: as given to `load`.
        sam: the network, in evaluation mode, without gradients.
        size: side of the network's input in pixels.
        convention: the authors' way from images and boxes to logits.
        sha256: of the weights' file.
        precision: of the image encoder, float32 or bfloat16; the decoder, a hundredth of the work, is always
            float32.
        calls: images that the image encoder has seen; cached logits leave it as it is.
    """

    name: str
    sam: "Sam"
    size: int
    convention: Convention
    sha256: str
    precision: str = "float32"
    calls: int = 0

    @property
    def device(self) -> torch.device:
        """The network's device."""
        return self.sam.device

    @property
    def num_parameters(self) -> int:
        """Parameters of the network, trained or not."""
        return sum(parameter.numel() for parameter in self.sam.parameters())

    @property
    def batch_size(self) -> int:
        """Images a forward pass: as many as half of the device's memory holds, 32 at most.

        Logits differ in their last bits with the batch, so it depends on the memory that the device has and
        not on what is free just now.
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
        """Return the identity of the weights as JSON values for a manifest."""
        return {
            "name": self.name,
            "sha256": self.sha256,
            "published_as": checkpoints.published_as(self.sha256),
            "parameters": self.num_parameters,
            "input_size": self.size,
            "precision": self.precision,
        }

    def logits(self, images: Tensor, boxes: Tensor, *, batch_size: int | None = None) -> Tensor:
        """Return the teacher's raw scores for the union of the boxes.

        Several boxes of an image give one mask: the maximum of their logits, so that a pixel is inside
        the joined mask exactly when it is inside one of the single masks.

        Args:
            images: [B, 1, H, W] uint8.
            boxes: [B, 4] or [B, n, 4] float, x0 y0 x1 y1 as pixel indices of these images; a row of
                NaN is no box (an image with one visible lung among images with two).
            batch_size: images a forward pass; None for `batch_size`.

        Returns:
            [B, 1, H, W] float32: the decoder's low-resolution logits, resized as the network's authors do it.

        Raises:
            ValueError: the shapes do not fit, or an image has no box at all.
        """
        return self.answers(images, [boxes], batch_size=batch_size)[0]

    @torch.inference_mode()
    def answers(
        self, images: Tensor, prompts: list[Tensor], *, batch_size: int | None = None
    ) -> list[Tensor]:
        """Return the `logits` of each of several sets of boxes, with each image encoded once.

        Encoding is the expensive part and does not depend on the boxes.
        """
        if images.ndim != 4 or images.shape[1] != 1:
            raise ValueError(f"images {tuple(images.shape)} must be [B, 1, H, W]")
        prompts = [boxes[:, None] if boxes.ndim == 2 else boxes for boxes in prompts]
        for boxes in prompts:
            if boxes.ndim != 3 or boxes.shape[::2] != (len(images), 4):
                raise ValueError(
                    f"boxes {tuple(boxes.shape)} must be [B, 4] or [B, n, 4] with B = {len(images)}"
                )
            if boxes.isnan().any(-1).all(-1).any():
                raise ValueError("every image needs at least one box")
        answers: list[list[Tensor]] = [[] for _ in prompts]
        with self._threads():
            for rows in torch.arange(len(images), device=images.device).split(batch_size or self.batch_size):
                embeddings = self._embed(images[rows])
                for boxes, parts in zip(prompts, answers, strict=True):
                    parts.append(self._decode(embeddings, boxes[rows.to(boxes.device)], *images.shape[-2:]))
        return [torch.cat(parts) for parts in answers]

    def encoded(self, images: Tensor) -> Callable[[Tensor], Tensor]:
        """Encode images once, and return the function from their boxes to `logits`: for a box on the move."""
        with torch.inference_mode(), self._threads():
            embeddings = self._embed(images)

        def answer(boxes: Tensor) -> Tensor:
            boxes = boxes[:, None] if boxes.ndim == 2 else boxes
            with torch.inference_mode(), self._threads():
                return self._decode(embeddings, boxes, *images.shape[-2:])

        return answer

    def _threads(self) -> contextlib.AbstractContextManager:
        # On one thread sums have one order, so the bytes do not depend on the cores. The published networks
        # are too large to leave all cores but one idle.
        return parallel.one_thread(self.device) if self.name == "builtin" else contextlib.nullcontext()

    def _embed(self, images: Tensor) -> Tensor:
        """Return [B, C, h, w] image embeddings."""
        self.calls += len(images)
        x = self.convention.image(images.to(self.device), self.size)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bfloat16"):
            return self.sam.image_encoder(x).float()

    def _decode(self, embeddings: Tensor, boxes: Tensor, height: int, width: int) -> Tensor:
        """Return [B, 1, height, width] logits for [B, n, 4] boxes in pixels of that size."""
        scaled = self.convention.boxes(boxes.to(self.device, torch.float32), self.size, height, width)
        image, slot = (~scaled.isnan().any(-1)).nonzero(as_tuple=True)
        multimask = self.convention.multimask
        low, iou = decode(self.sam, embeddings[image], scaled[image, slot], multimask=multimask)
        best = low.float()[torch.arange(len(low), device=low.device), iou.argmax(1)]
        full = self.convention.mask(best[:, None], self.size, height, width)
        joined = full.new_full((*boxes.shape[:2], height, width), -torch.inf)
        joined[image, slot] = full[:, 0]
        return joined.amax(1, keepdim=True)


#: Names that `load` knows.
NAMES = ("builtin", *sam.FAMILIES)


def load(
    name: str = "builtin",
    checkpoint: str | Path | None = None,
    device: str | torch.device = "cpu",
    *,
    size: int | None = None,
    precision: str = "float32",
) -> Teacher:
    """Return a frozen teacher by name, with all the weights of a checkpoint and no others.

    Args:
        name: one of `NAMES`; `builtin` is the small Segment Anything model that this project ships.
        checkpoint: file of its weights; None for the shipped ones of `builtin`, or for those that
            `fmfl teacher download` has fetched.
        device: of the network.
        size: side of the network's input in pixels; None for the family's own. A checkpoint of another
            size has its positions interpolated (`sam.resize`). `builtin` keeps its file's.
        precision: of the image encoder, float32 or bfloat16.

    Raises:
        UserError: the name or the file is not usable, or a key is missing, unexpected or of another shape.
    """
    if name not in NAMES:
        raise UserError(f"teacher {name!r} is unknown: choose {', '.join(NAMES[:-1])} or {NAMES[-1]}")
    path = Path(checkpoint) if checkpoint else default_file(name)
    if name == "builtin":
        network, convention = builtin.load(path), builtin.CONVENTION
    else:
        network, convention = sam.load(name, path, size), sam.FAMILIES[name].convention
    return Teacher(
        name=name,
        sam=network.to(device).eval().requires_grad_(False),
        size=network.image_encoder.img_size,
        convention=convention,
        sha256=checkpoints.sha256_of(path),
        precision=precision,
    )


def default_file(name: str) -> Path:
    """Return a teacher's shipped or downloaded weights.

    Raises:
        UserError: the weights are not there.
    """
    if name == "builtin":
        return BUILTIN_WEIGHTS
    if (file := checkpoints.PUBLISHED[name].file).is_file():
        return file
    raise UserError(
        f"teacher {name!r} needs its authors' weights: name their file with --checkpoint, or see "
        f"`fmfl teacher download {name}`"
    )


class CachedLogits(NamedTuple):
    """A teacher's logits, and the time that they took.

    Attributes:
        logits: [B, 1, H, W] float16.
        seconds: of computing them the first time; CPU time on a CPU, else wall time.
    """

    logits: Tensor
    seconds: float


def cached_logits(
    teacher: Teacher,
    images: Tensor,
    boxes: Tensor,
    *,
    cache: Path = paths.CACHE,
    progress: bool = True,
) -> CachedLogits:
    """Return a teacher's logits on the images' device, computed once for (code, weights, images, boxes).

    Deterministic algorithms give other last digits on a GPU, so theirs are computed and kept apart.

    A file whose digest shows damage is computed again.

    Args:
        images: [B, 1, H, W] uint8.
        boxes: as for `Teacher.logits`.
        cache: folder of the cached files.
        progress: show a bar while computing.
    """
    made_by = (states.code_digest(CODE), teacher.name, teacher.sha256, teacher.size, teacher.precision)
    made_by += (torch.are_deterministic_algorithms_enabled(),)
    key = hashlib.sha256(f"{made_by} {tuple(images.shape)} {tuple(boxes.shape)}".encode())
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

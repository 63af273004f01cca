"""The training loop of a client's round, of pre-training and of distillation.

Everything is on the device before an epoch begins: the images, the shuffled indices and the drawn
augmentations. A step is one gather, one warp, one pass through the student. Images for which the device has
no room stay in the host's memory: they are gathered there, and the batch is sent.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fmfl import augment, losses
from fmfl.devices import autocast
from fmfl.parallel import interrupted, side_by_side
from fmfl.seeds import generator

#: (student logits, masks, teacher logits or None), each [B, 1, H, W], to a scalar.
Loss = Callable[[Tensor, Tensor, Tensor | None], Tensor]

LOSSES: dict[str, Loss] = {
    "dice": lambda logits, masks, _: losses.dice_loss(logits, masks),
    "dice_bce": lambda logits, masks, _: (
        losses.dice_loss(logits, masks) + F.binary_cross_entropy_with_logits(logits.float(), masks)
    ),
}


@dataclass
class Examples:
    """Training images in place: the stored tensors and the rows of them that are used.

    Attributes:
        images: [N, 1, H, W] uint8, all stored ones.
        masks: [N, 1, H, W] uint8, 0 or 1.
        indices: [n] int64, the ones trained on.
        teacher_logits: [n, 1, H, W] float, row i for `indices[i]`, or None.
        ask: instead of them, a function that takes augmented images [B, 1, H, W] uint8 and their masks to
            teacher logits.
        device: of the batches; None: of the images.
    """

    images: Tensor
    masks: Tensor
    indices: Tensor
    teacher_logits: Tensor | None = None
    ask: Callable[[Tensor, Tensor], Tensor] | None = None
    device: torch.device | None = None

    def __post_init__(self) -> None:
        self.device = self.device or self.images.device

    def __len__(self) -> int:
        return len(self.indices)


def fetch(stored: Tensor, rows: Tensor, device: torch.device) -> Tensor:
    """Fetch chosen rows to a device; from the host's memory they are sent while the device still computes.

    Args:
        stored: [N, ...], on the device or on the host.
        rows: [n] int64, where `stored` is.
    """
    if stored.device == device:
        return stored[rows]
    # Only from pinned memory can a copy run beside the device's work.
    pinned = torch.empty((len(rows), *stored.shape[1:]), dtype=stored.dtype, pin_memory=device.type == "cuda")
    return torch.index_select(stored, 0, rows, out=pinned).to(device, non_blocking=True)


def batches(
    examples: Examples, batch_size: int, rng: torch.Generator, *, augmentation: str = "device"
) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    """Yield one epoch of augmented batches, every example once.

    The epoch is cut into ceil(n / batch_size) batches whose sizes differ by at most one: a last batch of
    a single image would leave BatchNorm without a variance.

    Yields:
        images [B, 1, H, W] in 0..1, masks [B, 1, H, W] of 0 and 1, teacher logits or None; all float32.
    """
    device, teacher_logits = examples.device, examples.teacher_logits
    order = torch.randperm(len(examples), generator=rng).to(examples.images.device)
    draws = augment.draw(len(examples), rng).to(device)
    warp = augment.AUGMENTATIONS[augmentation]
    steps = -(-len(examples) // batch_size)
    for rows, drawn in zip(order.tensor_split(steps), draws.tensor_split(steps), strict=True):
        chosen = examples.indices[rows]
        extra = None if teacher_logits is None else fetch(teacher_logits, rows, device).float()
        stored = fetch(examples.images, chosen, device), fetch(examples.masks, chosen, device)
        images, masks, extra = warp(*stored, drawn, extra)
        if examples.ask is not None:
            extra = examples.ask((images * 255).round().to(torch.uint8), masks)
        yield images.contiguous(memory_format=torch.channels_last), masks, extra


@dataclass
class FitResult:
    """Result of a training, besides the weights in the model.

    Attributes:
        losses: mean training loss of each epoch.
        images_seen: images that went through the student, repeats counted.
        seconds: on a CPU the thread's own time, elsewhere wall time.
    """

    losses: list[float] = field(default_factory=list)
    images_seen: int = 0
    seconds: float = 0.0


def adam(model: nn.Module, learning_rate: float) -> torch.optim.Adam:
    """Return the paper's optimizer, Adam (Kingma & Ba 2015), in its fused form."""
    return torch.optim.Adam(model.parameters(), lr=learning_rate, fused=True)


def fit(
    model: nn.Module,
    examples: Examples,
    loss: Loss,
    *,
    epochs: int,
    batch_size: int,
    optimizer: torch.optim.Optimizer,
    key: tuple[int, ...],
    augmentation: str = "device",
    precision: str = "float32",
) -> FitResult:
    """Train a model in place; every arm of the study goes through here.

    Args:
        model: trained in place, on the device where the examples' batches are wanted.
        examples: the images, masks and, for Eq. 5, teacher logits.
        loss: see `Loss`.
        epochs: passes of the examples.
        batch_size: images a step.
        optimizer: over the model's parameters; its state is used and changed.
        key: names the random order and augmentation, for example (seed, client, round); an epoch adds
            its own number.
        augmentation: a name in `augment.AUGMENTATIONS`.
        precision: see `autocast`.
    """
    device = examples.device
    # A core's own time, where trainings share the machine: else one would be charged for the other's.
    clock = time.thread_time if device.type == "cpu" else time.perf_counter
    started = clock()
    means = []
    model.train()
    for epoch in range(epochs):
        if interrupted.is_set():
            raise KeyboardInterrupt
        total = torch.zeros((), device=device)
        for images, masks, teacher_logits in batches(
            examples, batch_size, generator(*key, epoch), augmentation=augmentation
        ):
            with autocast(device, precision):
                logits = model(images)
            value = loss(logits.float(), masks, teacher_logits)
            optimizer.zero_grad(set_to_none=True)
            value.backward()
            optimizer.step()
            total += value.detach() * len(images)
        means.append(total / len(examples))
    losses_by_epoch = torch.stack(means).tolist() if means else []  # the only wait for the device
    return FitResult(losses_by_epoch, epochs * len(examples), clock() - started)


def predict(
    model: nn.Module,
    images: Tensor,
    indices: Tensor,
    *,
    batch_size: int | None = None,
    precision: str = "float32",
) -> Tensor:
    """Return the logits of chosen images, without augmentation; on a CPU one batch a core.

    Args:
        images: [N, 1, H, W] uint8.
        indices: [n] int64, where the images are.
        batch_size: None: 16 on a CPU and 64 elsewhere, at which the device is fast.

    Returns:
        [n, 1, H, W] float32 on the model's device.
    """
    device = next(model.parameters()).device
    model.eval()

    def answer(chosen: Tensor) -> Tensor:
        with torch.inference_mode(), autocast(device, precision):
            x = augment.to_float(fetch(images, chosen, device)).contiguous(memory_format=torch.channels_last)
            return model(x).float()

    batches = indices.split(batch_size or (16 if device.type == "cpu" else 64)) if len(indices) else []
    logits = side_by_side(answer, batches, device)
    return torch.cat(logits) if logits else torch.empty((0, 1, *images.shape[2:]), device=device)


def proximal(loss: Loss, model: nn.Module, mu: float) -> Loss:
    """Add to a loss the term of FedProx (Li et al. 2020, arXiv 1812.06127), which holds the weights in place.

        loss + mu / 2 * ||w - w_now||^2

    The norm runs over the trained parameters; buffers follow the data.
    """
    now = [parameter.detach().clone() for parameter in model.parameters()]

    def held(logits: Tensor, masks: Tensor, teacher_logits: Tensor | None) -> Tensor:
        away = [(w - w_now).square().sum() for w, w_now in zip(model.parameters(), now, strict=True)]
        return loss(logits, masks, teacher_logits) + mu / 2 * torch.stack(away).sum()

    return held

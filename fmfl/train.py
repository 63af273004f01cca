"""The training loop of a client's round, of pre-training and of distillation.

Everything is on the device before an epoch begins: the images, the shuffled indices and the drawn
augmentations. A step is one gather, one warp, one pass through the student; on a GPU it is recorded once and
replayed (`capture`). Images for which the device has
no room stay in the host's memory: they are gathered there, and the batch is sent.
"""

import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fmfl import augment, capture, losses
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


def draw_epoch(
    examples: Examples, batch_size: int, rng: torch.Generator
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Draw one epoch's order and augmentation, every example once, and yield a batch's at a time.

    The epoch is cut into ceil(n / batch_size) batches whose sizes differ by at most one: a last batch of
    a single image would leave BatchNorm without a variance.

    Yields:
        rows of `examples.indices` [B] int64 and the images that they name [B] int64, both where the images
        are; the augmentation's numbers [B, 5], on the batches' device.
    """
    order = _send(torch.randperm(len(examples), generator=rng), examples.images.device)
    draws = _send(augment.draw(len(examples), rng), examples.device)
    steps = -(-len(examples) // batch_size)
    chosen = examples.indices[order]
    yield from zip(*(part.tensor_split(steps) for part in (order, chosen, draws)), strict=True)


def _send(drawn: Tensor, device: torch.device) -> Tensor:
    """Bring what was drawn on the CPU to a device; a GPU still computes meanwhile."""
    return drawn.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else drawn.to(device)


def make_batch(
    examples: Examples, rows: Tensor, chosen: Tensor, draws: Tensor, augmentation: str = "device"
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gather one batch and augment it; rows, chosen and draws are those of `draw_epoch`.

    Returns:
        images [B, 1, H, W] in 0..1, masks [B, 1, H, W] of 0 and 1, teacher logits or None; all float32.
    """
    device, extra = examples.device, None
    if examples.teacher_logits is not None:
        extra = fetch(examples.teacher_logits, rows, device).float()
    stored = fetch(examples.images, chosen, device), fetch(examples.masks, chosen, device)
    images, masks, extra = augment.AUGMENTATIONS[augmentation](*stored, draws, extra)
    if examples.ask is not None:
        extra = examples.ask((images * 255).round().to(torch.uint8), masks)
    return images.contiguous(memory_format=torch.channels_last), masks, extra


def batches(
    examples: Examples, batch_size: int, rng: torch.Generator, *, augmentation: str = "device"
) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    """Yield one epoch of augmented batches, every example once; see `draw_epoch` and `make_batch`."""
    for drawn in draw_epoch(examples, batch_size, rng):
        yield make_batch(examples, *drawn, augmentation)


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
    """Return the paper's optimizer, Adam (Kingma & Ba 2015), in its fused form and without a history.

    On a GPU a model has one, whose moments are set to 0 here: recorded steps hold its memory.
    """
    device = next(model.parameters()).device
    if not capture.usable(device):
        return torch.optim.Adam(model.parameters(), lr=learning_rate, fused=True)
    kept = capture.resident(model, device).kept
    if ("adam", learning_rate) not in kept:
        for name in [name for name in kept if name[0] == "adam"]:
            del kept[name]
        kept["adam", learning_rate] = torch.optim.Adam(
            model.parameters(), lr=learning_rate, fused=True, capturable=True
        )
    optimizer = kept["adam", learning_rate]
    if begun := [value for moments in optimizer.state.values() for value in moments.values()]:
        torch._foreach_zero_(begun)  # by themselves they are hundreds of launches for every client and round
    return optimizer


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

    On a GPU the steps are recorded and replayed, see `capture`.

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
    step = _step(model, examples, loss, optimizer, augmentation, precision)
    with capture.resident(model, device).own_stream():
        for epoch in range(epochs):
            if interrupted.is_set():
                raise KeyboardInterrupt
            total = torch.zeros((), device=device)
            for drawn in draw_epoch(examples, batch_size, generator(*key, epoch)):
                total += step(*drawn) * len(drawn[0])
            means.append(total / len(examples))
        losses_by_epoch = torch.stack(means).tolist() if means else []  # the only wait for the device
    return FitResult(losses_by_epoch, epochs * len(examples), clock() - started)


def _step(
    model: nn.Module,
    examples: Examples,
    loss: Loss,
    optimizer: torch.optim.Optimizer,
    augmentation: str,
    precision: str,
) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Return an optimizer step from what `draw_epoch` yields to the batch's loss."""
    device = examples.device
    # A recording lives as long as the model: it must not hold the model in turn.
    network = weakref.proxy(model)

    def step(rows: Tensor, chosen: Tensor, draws: Tensor) -> Tensor:
        images, masks, teacher_logits = make_batch(examples, rows, chosen, draws, augmentation)
        with autocast(device, precision):
            logits = network(images)
        value = loss(logits.float(), masks, teacher_logits)
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        optimizer.step()
        return value.detach()

    resident = examples.images.device == examples.masks.device == device
    if not capture.usable(device) or not resident or examples.ask or augmentation == "albumentations":
        return step
    stored = (examples.images, examples.masks, examples.teacher_logits)
    parts = (*stored, loss, optimizer, augmentation, precision)
    return partial(capture.resident(model, device).step, parts, step)


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


class Proximal:
    """A loss with the term of FedProx (Li et al. 2020, arXiv 1812.06127), which holds the weights in place.

        loss + mu / 2 * ||w - w_0||^2

    The norm runs over the trained parameters; buffers follow the data.
    """

    def __init__(self, loss: Loss, model: nn.Module, mu: float) -> None:
        self.loss, self.mu, self.weights = loss, mu, list(model.parameters())
        self.begun = [weight.detach().clone() for weight in self.weights]

    @torch.no_grad()
    def begin(self) -> None:
        """Let w_0 be the weights as they are now."""
        torch._foreach_copy_(self.begun, self.weights)

    def __call__(self, logits: Tensor, masks: Tensor, teacher_logits: Tensor | None) -> Tensor:
        """Return the loss with its term; see `Loss`."""
        away = [(w - begun).square().sum() for w, begun in zip(self.weights, self.begun, strict=True)]
        return self.loss(logits, masks, teacher_logits) + self.mu / 2 * torch.stack(away).sum()


def proximal(loss: Loss, model: nn.Module, mu: float) -> Proximal:
    """Return a loss that holds a model's weights near where they are now; a model has one for each mu."""
    kept, name = capture.resident(model, next(model.parameters()).device).kept, ("proximal", loss, mu)
    if name not in kept:
        kept[name] = Proximal(loss, model, mu)
    kept[name].begin()
    return kept[name]

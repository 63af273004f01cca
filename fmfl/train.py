"""The one training loop, and what it is used for: a client's round, pre-training, distillation.

Everything is on the device before an epoch begins: the images, the shuffled indices and the drawn
augmentations. A step is one gather, one warp, one pass through the student. Images for which the device has
no room stay in the host's memory: they are gathered there, and the batch is sent.
"""

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fmfl import augment, losses, models
from fmfl.config import DistillConfig, RunConfig
from fmfl.errors import UserError
from fmfl.states import State, code_digest, fingerprint, read_state, tensor_digest, write_state
from fmfl.teachers.checkpoints import sha256_of

T = TypeVar("T")
R = TypeVar("R")

Loss = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""(student logits, masks, teacher logits or None), each [B, 1, H, W], to a scalar."""

LOSSES: dict[str, Loss] = {
    "dice": lambda logits, masks, _: losses.dice_loss(logits, masks),
    "dice_bce": lambda logits, masks, _: (
        losses.dice_loss(logits, masks) + F.binary_cross_entropy_with_logits(logits.float(), masks)
    ),
}


def generator(*key: int) -> torch.Generator:
    """Random numbers that depend on the key alone: the same on every device, for every initial state.

    Args:
        key: whole numbers >= 0, such as (seed, client, round, epoch).
    """
    seed = int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> np.uint64(1))
    return torch.Generator().manual_seed(seed)


def device_of(cfg: RunConfig) -> torch.device:
    """The device that `auto` means here."""
    if cfg.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(cfg.device)


def set_determinism(cfg: RunConfig) -> None:
    """Make a GPU give the same bytes twice, or let it be fast; to be called before it multiplies anything.

    An operation that has no deterministic form then raises PyTorch's error, which names it. Training on a CPU
    is deterministic as it is (`side_by_side`).
    """
    if device_of(cfg).type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what cuBLAS asks for
        torch.use_deterministic_algorithms(cfg.deterministic)
        torch.backends.cudnn.benchmark = False  # it would choose kernels by their speed of the day


def precision_of(cfg: RunConfig) -> str:
    """What `auto` means here: bfloat16 on a GPU that has it, float32 elsewhere.

    Many CPUs emulate bfloat16 at a hundredth of the speed, so `auto` never picks it there.
    """
    if cfg.precision != "auto":
        return cfg.precision
    return "bfloat16" if device_of(cfg).type == "cuda" and torch.cuda.is_bf16_supported() else "float32"


def autocast(device: torch.device, precision: str = "float32") -> contextlib.AbstractContextManager:
    """Mixed precision by name, float32 or bfloat16."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16")


interrupted = threading.Event()
"""Set while trainings that run side by side shall end at their next epoch."""


def side_by_side(task: Callable[[T], R], items: Iterable[T], device: torch.device) -> list[R]:
    """Independent trainings at once: on a CPU one a core, each on a single thread; elsewhere one by one.

    A small network's layers are too short to be worth dividing: two trainings beside each other took 0.5 to
    0.7 of the time of one after the other on both cores (`python -m bench threads`). A single thread also
    adds in one order only, so the same seed gives the same bytes whatever the number of cores.

    Args:
        task: called once for each item; it must not use the global random state.
        items: what to train.
        device: where the tensors are.

    Returns:
        The tasks' results, in the items' order.

    Raises:
        Exception: the first one that a task raised; the others end at their next epoch.
    """
    cores = torch.get_num_threads()
    if device.type != "cpu" or cores == 1:  # one core, or beside another training already
        return [task(item) for item in items]
    items = list(items)
    left = _Left(cores, len(items))

    def counted(item: T) -> R:
        try:
            return task(item)
        finally:
            left.end_one()

    with one_thread(device), left:
        try:
            with ThreadPoolExecutor(cores) as pool:
                running = [pool.submit(counted, item) for item in items]
                try:
                    return [future.result() for future in running]
                except BaseException:  # Ctrl-C as well
                    interrupted.set()
                    pool.shutdown(cancel_futures=True)
                    raise
        finally:
            interrupted.clear()


class _Left:
    """How many of the trainings beside each other have not ended: at the end, some cores have none."""

    now: "_Left | None" = None

    def __init__(self, cores: int, trainings: int) -> None:
        self.cores, self.trainings, self.lock = cores, trainings, threading.Lock()

    def __enter__(self) -> None:
        _Left.now = self

    def __exit__(self, *error: object) -> None:
        _Left.now = None

    def end_one(self) -> None:
        with self.lock:
            self.trainings -= 1

    def cores_each(self) -> int:
        return max(1, self.cores // max(1, self.trainings))


def places(device: torch.device) -> list[torch.device]:
    """Where the clients of one run can train side by side: on cores of a CPU, on every GPU.

    Beside other runs (`side_by_side`) a run has one core, and more when fewer runs than cores are left.
    """
    if device.type == "cpu":
        return [device] * (_Left.now.cores_each() if _Left.now else torch.get_num_threads())
    if device.type == "cuda" and torch.cuda.device_count() > 1:
        first = device.index or 0
        number = torch.cuda.device_count()
        return [device, *(torch.device("cuda", (first + k) % number) for k in range(1, number))]
    return [device]


@contextlib.contextmanager
def one_thread(device: torch.device) -> Iterator[None]:
    """On a CPU let every operation run on a single thread: it adds in one order, so it gives one result."""
    threads = torch.get_num_threads()
    if device.type != "cpu" or threads == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@dataclass
class Examples:
    """Images to train on, where they already are.

    Attributes:
        images: [N, 1, H, W] uint8, all stored ones.
        masks: [N, 1, H, W] uint8, 0 or 1.
        indices: [n] int64, the ones trained on.
        teacher_logits: [n, 1, H, W] float, row i for `indices[i]`, or None.
        ask: instead of them, augmented images [B, 1, H, W] uint8 and their masks to the teacher's logits.
        device: where batches are wanted; None: where the images lie, as all other tensors do.
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
    """Chosen rows on a device; from the host's memory they are sent while the device still computes.

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
    """One epoch of augmented batches, every example once.

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
    """What a piece of training leaves behind, besides the weights in the model.

    Attributes:
        losses: mean training loss of each epoch.
        images_seen: images that went through the student, repeats counted.
        seconds: on a CPU the thread's own time, elsewhere wall time.
    """

    losses: list[float] = field(default_factory=list)
    images_seen: int = 0
    seconds: float = 0.0


def adam(model: nn.Module, learning_rate: float) -> torch.optim.Adam:
    """The paper's optimizer (Kingma & Ba 2015) in its fused form."""
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
        examples: what it is trained on.
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
    found = torch.stack(means).tolist() if means else []  # the only wait for the device
    return FitResult(found, epochs * len(examples), clock() - started)


def predict(
    model: nn.Module,
    images: Tensor,
    indices: Tensor,
    *,
    batch_size: int | None = None,
    precision: str = "float32",
) -> Tensor:
    """Logits of chosen images, without augmentation; on a CPU a batch a core, whose sums have one order.

    Args:
        images: [N, 1, H, W] uint8.
        indices: [n] int64, where the images are.
        batch_size: None: what the device is fast with, 16 on a CPU and 64 elsewhere.

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
    found = side_by_side(answer, batches, device)
    return torch.cat(found) if found else torch.empty((0, 1, *images.shape[2:]), device=device)


@dataclass
class InitialState:
    """Where a federated run begins, and what it has cost to get there.

    Attributes:
        name: random, pretraining, fm.
        state: the student's weights.
        fitted: of the training on the proxy set; empty for `random`.
        reused: whether it was read from a file instead of being made.
    """

    name: str
    state: State
    fitted: FitResult
    reused: bool = False


def initial_state(
    name: str,
    proxy: Examples,
    cfg: DistillConfig,
    *,
    batch_size: int,
    seed: int,
    precision: str = "float32",
    augmentation: str = "device",
    batch_norm: str = "average",
    file: Path | None = None,
    teacher_key: str = "",
    teacher_seconds: float = 0.0,
) -> InitialState:
    """One of the paper's three initial states (section 2.3), all from the same random weights, or another.

    - `random`: the student as built.
    - `pretraining`: trained on the proxy set's masks alone, which is Eq. 5 with alpha = 0.
    - `fm`: trained on Eq. 5 with the teacher's logits.
    - `imagenet`: the student as built, with its encoder's weights from `cfg.encoder_file`.
    - `file`: the weights in `cfg.init_file`, as they are.

    Args:
        name: one of these.
        proxy: the proxy set, with the teacher's logits, or a way to ask it, for `fm`.
        cfg: student, alpha, temperature, epochs, learning rate.
        batch_size: images a step.
        seed: of weights, order and augmentation.
        batch_norm: see `models.build`.
        file: where the state is kept; a file made with the same settings and images is read instead.
        teacher_key: what the teacher's answers depend on, for recognising that file.
        teacher_seconds: what they have cost; charged to `fm`.
    """
    alpha = cfg.alpha if name == "fm" else 0.0
    epochs = cfg.proxy_epochs if name in ("pretraining", "fm") else 0
    given = sha256_of(weights_of(name, cfg)) if name in GIVEN else ""
    training = (alpha, cfg.temperature, epochs, cfg.proxy_learning_rate, batch_size, precision, augmentation)
    taught = (cfg.teacher_labels, teacher_key) if alpha else ()
    seen = [tensor_digest(stored[proxy.indices]) for stored in (proxy.images, proxy.masks)] if epochs else []
    device = proxy.device
    key = fingerprint(
        code_digest(), name, cfg.student, batch_norm == "group", seed, training, seen,
        taught, given, torch.are_deterministic_algorithms_enabled(),
    )  # fmt: skip
    if file is not None and (stored := read_state(file, fingerprint=key, device=device)) is not None:
        state, record = stored
        return InitialState(name, state, FitResult(**record["fitted"]), reused=True)

    def loss(logits: Tensor, masks: Tensor, teacher_logits: Tensor | None) -> Tensor:
        if alpha == 0:  # the teacher has no say, so it need not be asked
            return losses.dice_loss(logits, masks)
        if cfg.teacher_labels == "hard":
            teacher_logits = losses.hard(teacher_logits, cfg.temperature)
        return losses.distillation_loss(logits, teacher_logits, masks, alpha, cfg.temperature)

    model = models.build(cfg.student, seed=seed, device=device, batch_norm=batch_norm)
    if name in GIVEN:
        models.load_weights(model, weights_of(name, cfg), encoder_only=name == "imagenet")
    fitted = fit(
        model,
        proxy if alpha else replace(proxy, teacher_logits=None, ask=None),
        loss,
        epochs=epochs,
        batch_size=batch_size,
        optimizer=adam(model, cfg.proxy_learning_rate),
        key=(seed, PROXY_KEY),
        augmentation=augmentation,
        precision=precision,
    )
    if alpha:
        fitted.seconds += teacher_seconds
    state = models.copy_state(model)
    if file is not None:
        write_state(file, state, fingerprint=key, fitted=vars(fitted), init=name)
    return InitialState(name, state, fitted)


GIVEN = {"imagenet": "encoder_file", "file": "init_file"}
"""Starts whose weights come from a file, and the setting that names it."""


def weights_of(name: str, cfg: DistillConfig) -> Path:
    """The file of a start in `GIVEN`.

    Raises:
        UserError: none is named, or it is not there.
    """
    file = getattr(cfg, GIVEN[name])
    if not file or not Path(file).is_file():
        what = f"{file} is not there" if file else "none is named"
        raise UserError(f"start {name!r} needs a file of weights, but {what}: set {GIVEN[name]} to one")
    return Path(file)


def epochs_for_equal_steps(epochs: int, num_images: int, num_learned: int) -> int:
    """Epochs over some of the images that show a student about as many as `epochs` over all of them."""
    return round(epochs * num_images / max(1, num_learned))


def predicted_masks(
    examples: Examples,
    patients: Sequence[str],
    cfg: DistillConfig,
    *,
    known: Tensor | None = None,
    batch_size: int,
    seed: int,
    precision: str = "float32",
    augmentation: str = "device",
) -> tuple[Tensor, float]:
    """Masks of images by a student that has learned from others: where a predicted box comes from.

    Where all masks are known, two students learn from half of the patients each and answer for the other
    half. One that answered for the images that it learned from would return their masks almost as they are,
    and the box with them. Where only some are known, one student learns from these and answers for the rest.

    Args:
        examples: n images and their masks, without a teacher.
        patients: who each of the n is.
        cfg: student, epochs (over all images) and learning rate, as for pre-training.
        known: [n] bool, whose masks may be looked at; they are returned as they are. None for all.
        batch_size: images a step.
        seed: of the halves, weights, order and augmentation.

    Returns:
        [n, 1, H, W] uint8 masks on the images' device, and the seconds that the students took.

    Raises:
        UserError: there are not two patients, or no mask is known.
    """
    if known is not None and not known.any():
        raise UserError(
            "box_rule predicted needs proxy images with masks: raise labelled or choose another rule"
        )
    names = sorted(set(patients))
    if len(names) < 2:
        raise UserError("box_rule predicted needs two patients in the proxy set: give it more images")
    order = torch.randperm(len(names), generator=generator(seed, PROXY_KEY)).tolist()
    first = {names[k] for k in order[: len(names) // 2]}
    inside = torch.tensor([patient in first for patient in patients], device=examples.indices.device)
    found = torch.zeros_like(examples.images[examples.indices])
    epochs = cfg.proxy_epochs
    if known is not None:
        epochs = epochs_for_equal_steps(epochs, len(known), int(known.sum()))

    def answer(learned_from: Tensor) -> float:
        rest = ~learned_from
        model = models.build(cfg.student, seed=seed, device=examples.device)
        fitted = fit(
            model,
            replace(examples, indices=examples.indices[learned_from]),
            LOSSES["dice"],
            epochs=epochs,
            batch_size=batch_size,
            optimizer=adam(model, cfg.proxy_learning_rate),
            key=(seed, PROXY_KEY),
            augmentation=augmentation,
            precision=precision,
        )
        logits = predict(model, examples.images, examples.indices[rest], precision=precision)
        found[rest] = (logits > 0).to(found.device, torch.uint8)
        return fitted.seconds

    if known is not None:
        known = known.to(found.device)
        found[known] = examples.masks[examples.indices[known]]
    halves = (inside, ~inside) if known is None else (known,)
    seconds = side_by_side(answer, halves, examples.device)
    return found, sum(seconds)


def proximal(loss: Loss, model: nn.Module, mu: float) -> Loss:
    """FedProx (Li et al. 2020, arXiv 1812.06127): a loss that also holds the weights near where they are now.

        loss + mu / 2 * ||w - w_now||^2

    The norm runs over the trained parameters; buffers follow the data.
    """
    now = [parameter.detach().clone() for parameter in model.parameters()]

    def held(logits: Tensor, masks: Tensor, teacher_logits: Tensor | None) -> Tensor:
        away = [(w - w_now).square().sum() for w, w_now in zip(model.parameters(), now, strict=True)]
        return loss(logits, masks, teacher_logits) + mu / 2 * torch.stack(away).sum()

    return held


PROXY_KEY = 2**32 - 1
"""Stands for the proxy set where a client's number stands in a random key; no client is called that."""

LABELS = 2**32 - 4
"""Stands for the choice of the proxy images that have masks, likewise."""

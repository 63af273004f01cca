"""Initial states (the paper, section 2.3): random, supervised pre-training, and distillation by Eq. 5."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fmfl import deadline, losses, models, parallel, seeds, train
from fmfl.config import DistillConfig
from fmfl.errors import OutOfTime, UserError
from fmfl.states import State, code_digest, fingerprint, read_state, tensor_digest, write_state
from fmfl.teachers.checkpoints import sha256_of
from fmfl.train import Examples, FitResult, Loss

#: Initial states whose weights come from a file, and the setting that names it.
GIVEN = {"imagenet": "encoder_file", "file": "init_file"}


@dataclass
class InitialState:
    """The weights that a federated run begins with, and their cost.

    Attributes:
        name: random, pretraining, fm.
        state: the student's weights.
        fit: of the training on the proxy set; empty for `random`.
        reused: True where it was read from a file instead of being made.
    """

    name: str
    state: State
    fit: FitResult
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
    """Make one of the paper's three initial states, all from the same random weights, or another.

    - `random`: the student as built.
    - `pretraining`: trained on the proxy set's masks alone, which is Eq. 5 with alpha = 0.
    - `fm`: trained on Eq. 5 with the teacher's logits.
    - `imagenet`: the student as built, with its encoder's weights from `cfg.encoder_file`.
    - `file`: the weights in `cfg.init_file`, as they are.

    Args:
        name: one of these.
        proxy: the proxy set, with the teacher's logits, or a function that asks it, for `fm`.
        cfg: student, alpha, temperature, epochs, learning rate.
        batch_size: images a step.
        seed: of weights, order and augmentation.
        batch_norm: see `models.build`.
        file: keeps the state; a file made with the same settings, images and code is read instead.
        teacher_key: names all that the teacher's logits depend on.
        teacher_seconds: their cost; charged to `fm`.

    Raises:
        OutOfTime: it would have to be trained, and the study's time limit has passed.
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
        return InitialState(name, state, FitResult(**record["fit"]), reused=True)
    if epochs and deadline.has_passed():
        raise OutOfTime(f"the time is up before the start {name} is trained")
    model = models.build(cfg.student, seed=seed, device=device, batch_norm=batch_norm)
    if name in GIVEN:
        models.load_weights(model, weights_of(name, cfg), encoder_only=name == "imagenet")
    examples = proxy if alpha else replace(proxy, teacher_logits=None, ask=None)
    how = {"batch_size": batch_size, "augmentation": augmentation, "precision": precision}
    result = _fit(model, examples, eq5(alpha, cfg), cfg, epochs, seed, **how)
    if alpha:
        result.seconds += teacher_seconds
    state = models.copy_state(model)
    if file is not None:
        write_state(file, state, fingerprint=key, fit=vars(result), init=name)
    return InitialState(name, state, result)


def _fit(
    model: nn.Module, examples: Examples, loss: Loss, cfg: DistillConfig, epochs: int, seed: int, **how: Any
) -> FitResult:
    """Train a student on proxy images, under the random key of the proxy set; see `train.fit`."""
    optimizer = train.adam(model, cfg.proxy_learning_rate)
    return train.fit(
        model, examples, loss, epochs=epochs, optimizer=optimizer, key=(seed, seeds.PROXY), **how
    )


def eq5(alpha: float, cfg: DistillConfig) -> Loss:
    """Return Eq. 5 as a loss of (student logits, masks, teacher logits); with alpha 0 the Dice loss alone."""

    def loss(logits: Tensor, masks: Tensor, teacher_logits: Tensor | None) -> Tensor:
        if alpha == 0:
            return losses.dice_loss(logits, masks)
        if cfg.teacher_labels == "hard":
            teacher_logits = losses.harden(teacher_logits, cfg.temperature)
        return losses.distillation_loss(logits, teacher_logits, masks, alpha, cfg.temperature)

    return loss


def weights_of(name: str, cfg: DistillConfig) -> Path:
    """Return the file of an initial state in `GIVEN`.

    Raises:
        UserError: none is named, or it is not there.
    """
    file = getattr(cfg, GIVEN[name])
    if not file or not Path(file).is_file():
        what = f"{file} is not there" if file else "none is named"
        raise UserError(f"start {name!r} needs a file of weights, but {what}: set {GIVEN[name]} to one")
    return Path(file)


def epochs_for_equal_steps(epochs: int, num_images: int, num_learned: int) -> int:
    """Return the epochs over some images that show a student about as many as `epochs` over all of them."""
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
    """Predict masks by a student that has learned from other patients, for boxes of the rule `predicted`.

    Where all masks are known, two students learn from half of the patients each and predict the other half.
    Their own images they would predict almost as they are, and the box with them. Where only some masks are
    known, one student learns from these and predicts the rest.

    Args:
        examples: n images and their masks, without a teacher.
        patients: of each of the n images.
        cfg: student, epochs (over all images) and learning rate, as for pre-training.
        known: [n] bool, images whose masks may be used; they are returned as they are. None for all.
        batch_size: images a step.
        seed: of the halves, weights, order and augmentation.

    Returns:
        [n, 1, H, W] uint8 masks on the images' device, and the seconds of training and prediction.

    Raises:
        UserError: there are not two patients, or no mask is known.
    """
    if known is not None and not known.any():
        raise UserError(
            "box_rule predicted needs proxy images with masks: raise labelled or choose another rule"
        )
    parts = _halves(patients, seed, examples.indices.device)
    masks = torch.zeros_like(examples.images[examples.indices])
    epochs = cfg.proxy_epochs
    if known is not None:
        known = known.to(masks.device)
        masks[known] = examples.masks[examples.indices[known]]
        epochs = epochs_for_equal_steps(epochs, len(known), int(known.sum()))
        parts = (known,)

    def predict_rest(learned_from: Tensor) -> float:
        model = models.build(cfg.student, seed=seed, device=examples.device)
        part = replace(examples, indices=examples.indices[learned_from])
        how = {"batch_size": batch_size, "augmentation": augmentation, "precision": precision}
        result = _fit(model, part, train.LOSSES["dice"], cfg, epochs, seed, **how)
        rest = ~learned_from
        logits = train.predict(model, examples.images, examples.indices[rest], precision=precision)
        masks[rest] = (logits > 0).to(masks.device, torch.uint8)
        return result.seconds

    seconds = parallel.side_by_side(predict_rest, parts, examples.device)
    return masks, sum(seconds)


def _halves(patients: Sequence[str], seed: int, device: torch.device) -> tuple[Tensor, ...]:
    """Split images into two halves by patient, [n] bool each."""
    names = sorted(set(patients))
    if len(names) < 2:
        raise UserError("box_rule predicted needs two patients in the proxy set: give it more images")
    order = torch.randperm(len(names), generator=seeds.generator(seed, seeds.PROXY)).tolist()
    first = {names[k] for k in order[: len(names) // 2]}
    inside = torch.tensor([patient in first for patient in patients], device=device)
    return inside, ~inside

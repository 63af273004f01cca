"""Initial states (the paper, section 2.3): random, supervised pre-training, and distillation by Eq. 5."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from fmfl import losses, models
from fmfl.config import DistillConfig
from fmfl.errors import UserError
from fmfl.parallel import side_by_side
from fmfl.seeds import PROXY, generator
from fmfl.states import State, code_digest, fingerprint, read_state, tensor_digest, write_state
from fmfl.teachers.checkpoints import sha256_of
from fmfl.train import LOSSES, Examples, FitResult, adam, fit, predict


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
        key=(seed, PROXY),
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
    order = torch.randperm(len(names), generator=generator(seed, PROXY)).tolist()
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
            key=(seed, PROXY),
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

"""Losses of a student: Kullback-Leibler to the teacher (Eq. 4), soft Dice to the masks, and both (Eq. 5).

Reference: Li & Yang 2023, arXiv 2311.15463, section 2.2. Its Eq. 4 has no temperature, which is T = 1;
softening with its factor T^2 is Hinton, Vinyals & Dean 2015, arXiv 1503.02531, section 2. The Dice loss is
Milletari, Navab & Ahmadi 2016, arXiv 1606.04797, with the plain sums (not squares) in the denominator.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from fmfl.errors import UserError

#: Pixels added above and below the Dice fraction: an empty mask predicted empty costs 0 instead of 0/0.
SMOOTHING = 1.0


def kl_divergence(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Eq. 4: the mean over pixels of KL(teacher || student).

    Each pixel is a coin with two outcomes, lung and background. With p = sigmoid(teacher / T) and
    q = sigmoid(student / T),

        loss = T^2 * mean over pixels of [p log(p / q) + (1 - p) log((1 - p) / (1 - q))]

    Since log(1 - p) = log p - teacher / T, the bracket is log p - log q + (1 - p) (student - teacher) / T:
    two log-sigmoids a pixel, finite however certain the masks are, and exactly 0 where they agree. The factor
    T^2 keeps the gradient of the same size whatever T is; the paper has T = 1.

    Args:
        student_logits: [B, 1, H, W] raw scores.
        teacher_logits: [B, 1, H, W] raw scores; constants, no gradient flows into them.
        temperature: T > 0; the larger, the softer both masks.

    Returns:
        Scalar in nats, 0 where the two agree.

    Raises:
        ValueError: the shapes differ (broadcasting would hide it).
        UserError: the temperature is not positive.
    """
    _check_shapes("student logits", student_logits, "teacher logits", teacher_logits)
    if not temperature > 0:
        raise UserError(f"temperature is {temperature}, but must be above 0 (the paper's value is 1)")
    student = _full_precision(student_logits) / temperature
    teacher = teacher_logits.detach().to(student.dtype) / temperature
    log_ratio = F.logsigmoid(teacher) - F.logsigmoid(student)
    background = (-teacher).sigmoid()
    return temperature**2 * (log_ratio + background * (student - teacher)).mean()


def dice_loss(logits: Tensor, masks: Tensor) -> Tensor:
    """Soft Dice loss: 1 - Dice of the probabilities, image by image, then the mean.

    With p = sigmoid(logits), y the mask and e = 1 pixel (`SMOOTHING`), for one image

        loss = 1 - (2 sum(p y) + e) / (sum(p) + sum(y) + e)

    Summing within each image gives a small lung the weight of a large one, as the reported score does; sums
    over the whole batch would not, and the loss would depend on who shares a batch with whom.

    Args:
        logits: [B, 1, H, W] raw scores.
        masks: [B, 1, H, W] of 0 and 1, in any dtype.

    Returns:
        Scalar in 0..1, 0 for a perfect and certain mask.

    Raises:
        ValueError: the shapes differ.
    """
    _check_shapes("logits", logits, "masks", masks)
    probabilities = _full_precision(logits).sigmoid().flatten(start_dim=1)
    truth = masks.to(probabilities.dtype).flatten(start_dim=1)
    shared = (probabilities * truth).sum(dim=1)
    total = probabilities.sum(dim=1) + truth.sum(dim=1)
    return (1 - (2 * shared + SMOOTHING) / (total + SMOOTHING)).mean()


def distillation_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    masks: Tensor,
    alpha: float = 0.6,
    temperature: float = 1.0,
) -> Tensor:
    """Eq. 5: alpha * `kl_divergence` + (1 - alpha) * `dice_loss`.

    Args:
        student_logits: [B, 1, H, W] raw scores.
        teacher_logits: [B, 1, H, W] raw scores; constants.
        masks: [B, 1, H, W] of 0 and 1, in any dtype.
        alpha: the teacher's share, 0 (masks alone) to 1 (teacher alone); the paper has 0.6.
        temperature: T > 0 of the teacher's term.

    Returns:
        Scalar.

    Raises:
        ValueError: the shapes differ.
        UserError: alpha lies outside 0..1, or the temperature is not positive.
    """
    if not 0 <= alpha <= 1:
        raise UserError(f"alpha is {alpha}, but must lie in 0..1 (the paper's value is 0.6)")
    distil = kl_divergence(student_logits, teacher_logits, temperature)
    segment = dice_loss(student_logits, masks)
    return alpha * distil + (1 - alpha) * segment


def harden(teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Turn the teacher's mask into logits certain of every pixel: Eq. 4 becomes cross-entropy with that mask.

    Args:
        teacher_logits: [B, 1, H, W] raw scores; above 0 is lung.
        temperature: T > 0 that `kl_divergence` will divide by.

    Returns:
        [B, 1, H, W] of +50 T and -50 T, where a float32 sigmoid is 1 and (nearly) 0.
    """
    return torch.where(teacher_logits > 0, 50.0, -50.0) * temperature


def _full_precision(logits: Tensor) -> Tensor:
    """Raise to at least float32: a sum over 256 x 256 pixels overflows float16 and stalls in bfloat16."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _check_shapes(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    if tensor.shape != other.shape:
        raise ValueError(
            f"{name} {tuple(tensor.shape)} and {other_name} {tuple(other.shape)} must have one shape"
        )

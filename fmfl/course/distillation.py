"""Checks of part 3: Eq. 4, the divergence from the teacher's mask, and Eq. 5, the whole loss."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from fmfl import losses
from fmfl.course.answers import Mistake, NotYet, asked, judge

#: Two images of two pixels, at T = 2 in the checks.
TEACHER = torch.tensor([2.0, -1.0, 0.5, -3.0]).reshape(2, 1, 1, 2)
STUDENT = torch.tensor([0.5, 1.0, -1.0, -2.0]).reshape(2, 1, 1, 2)
MASKS = torch.tensor([1.0, 0.0, 1.0, 0.0]).reshape(2, 1, 1, 2)
T, ALPHA = 2.0, 0.25


def _coin(p: Tensor, q: Tensor) -> Tensor:
    """Return p log(p / q) + (1 - p) log((1 - p) / (1 - q)), pixel by pixel."""
    return p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()


def kl_mistakes() -> list[Mistake]:
    """Return what typical mistakes in Eq. 4 give for the case."""
    return _mistakes_of_form() + _mistakes_of_size()


def _mistakes_of_form() -> list[Mistake]:
    """Return mistakes in what stands between the brackets of Eq. 4."""
    p, q = (TEACHER / T).sigmoid(), (STUDENT / T).sigmoid()
    right, lung = T**2 * _coin(p, q).mean(), T**2 * (p * (p / q).log()).mean()
    cross = -(T**2) * (p * q.log() + (1 - p) * (1 - q).log()).mean()
    return [
        Mistake(
            "arguments swapped",
            T**2 * _coin(q, p).mean(),
            "This is KL(student || teacher). In Eq. 4 the teacher stands first: p is its probability, and "
            "the logarithms are weighted with p.",
        ),
        Mistake(
            "the background is missing",
            lung,
            "This is p log(p / q) alone. A pixel has two outcomes: add (1 - p) log((1 - p) / (1 - q)).",
        ),
        Mistake(
            "cross-entropy instead of the divergence",
            cross,
            "This is not 0 where the two agree: subtract the teacher's own entropy, or keep the logarithm "
            "of p / q.",
        ),
        Mistake("the sign is turned", -right, "A divergence is at least 0: log(p / q) is log p less log q."),
        Mistake(
            "softmax over one channel",
            torch.tensor(0.0),
            "A softmax over one channel is 1 everywhere. Each pixel is a coin: take the sigmoid.",
        ),
        Mistake(
            "logits taken for probabilities",
            torch.tensor(math.nan),
            "The logarithm of a negative number is NaN. Logits become probabilities by the sigmoid, and "
            "not by a softmax over one channel, which is 1 everywhere and leaves 0 for the background.",
        ),
    ]


def _mistakes_of_size() -> list[Mistake]:
    """Return mistakes in the temperature, its factor, and the mean of Eq. 4."""
    p, q = (TEACHER / T).sigmoid(), (STUDENT / T).sigmoid()
    sharp_p, sharp_q = TEACHER.sigmoid(), STUDENT.sigmoid()
    right = T**2 * _coin(p, q).mean()
    temper = "Divide both logits by T, before the sigmoid."
    return [
        Mistake(
            "T squared is forgotten",
            right / T**2,
            "Softening divides the gradient by T twice. Multiply by T^2, so that its size does not depend "
            "on T.",
        ),
        Mistake(
            "T instead of T squared", right / T, "The factor is T^2: the gradient shrinks with each of two T."
        ),
        Mistake(
            "a sum instead of the mean",
            right * TEACHER.numel(),
            "The sum grows with the image: twice the side, four times the loss. Take the mean over pixels.",
        ),
        Mistake(
            "a mean within the image only",
            right * len(TEACHER),
            "This adds the images up, so that a large batch has a large loss. Take the mean over everything.",
        ),
        Mistake("logarithm to base 2", right / math.log(2), "The loss is in nats: take `torch.log`."),
        Mistake("only the teacher is softened", T**2 * _coin(p, sharp_q).mean(), temper),
        Mistake("only the student is softened", T**2 * _coin(sharp_p, q).mean(), temper),
        Mistake("nothing is softened", T**2 * _coin(sharp_p, sharp_q).mean(), temper),
        Mistake("nothing is softened", _coin(sharp_p, sharp_q).mean(), temper),
    ]


def check_kl(kl: Callable) -> None:
    """Check Eq. 4: the value at T = 2 by its definition, then that it is one number, finite, and trains."""
    answer = asked("kl", kl, STUDENT, TEACHER, T)
    if isinstance(answer, Tensor) and answer.ndim:
        raise NotYet(
            "one value a pixel", f"kl returns a tensor of shape {list(answer.shape)}: end with `.mean()`."
        )
    right = T**2 * _coin((TEACHER / T).sigmoid(), (STUDENT / T).sigmoid()).mean()
    judge("kl(student, teacher, T=2)", answer, right, kl_mistakes())
    certain = asked("kl", kl, STUDENT, 200 * TEACHER.sign(), 1.0)
    if not math.isfinite(certain):
        raise NotYet(
            "infinite where the teacher is certain",
            f"For logits of ±200 a float32 probability is exactly 1 or 0, and kl is {float(certain)}. Take "
            "`F.logsigmoid(x)` for log p and `F.logsigmoid(-x)` for log(1 - p): they stay finite.",
        )
    check_gradient(kl)
    print("Right: the teacher first, two outcomes a pixel, T^2, the mean, and finite.")


def check_gradient(kl: Callable) -> None:
    """Check that the loss moves the student and leaves the teacher alone."""
    student, teacher = STUDENT.clone().requires_grad_(), TEACHER.clone().requires_grad_()
    value = kl(student, teacher, T)
    if not isinstance(value, Tensor) or not value.requires_grad:
        raise NotYet(
            "no gradient reaches the student",
            "The loss is cut off from the student's logits: no `.item()`, `.detach()` or `float()` on "
            "their way.",
        )
    value.backward()
    if student.grad is None:
        raise NotYet("no gradient reaches the student", "Detach the teacher's logits, not the student's.")
    if teacher.grad is not None and teacher.grad.any():
        raise NotYet(
            "a gradient flows into the teacher",
            "The teacher is frozen: its logits are constants. Begin with `teacher_logits = "
            "teacher_logits.detach()`.",
        )


def eq5_mistakes() -> list[Mistake]:
    """Return what typical mistakes in Eq. 5 give for the case."""
    distil, segment = losses.kl_divergence(STUDENT, TEACHER, T), losses.dice_loss(STUDENT, MASKS)
    swapped = losses.kl_divergence(TEACHER, STUDENT, T)
    return [
        Mistake(
            "alpha stands at the other term",
            (1 - ALPHA) * distil + ALPHA * segment,
            "alpha is the teacher's share: it multiplies Eq. 4, and 1 - alpha the Dice loss.",
        ),
        Mistake(
            "1 - alpha is missing",
            ALPHA * distil + segment,
            "The Dice loss counts in full. Its share is 1 - alpha, so that alpha = 1 is the teacher alone.",
        ),
        Mistake("alpha is missing", distil + segment, "The terms have shares: alpha and 1 - alpha."),
        Mistake(
            "the temperature is lost",
            ALPHA * losses.kl_divergence(STUDENT, TEACHER) + (1 - ALPHA) * segment,
            "Eq. 4 was taken at T = 1: hand `temperature` on to kl.",
        ),
        Mistake(
            "Dice instead of its loss",
            ALPHA * distil + (1 - ALPHA) * (1 - segment),
            "This grows as the masks agree. The loss is 1 - Dice, which `dice_loss` already is.",
        ),
        Mistake(
            "Dice with the teacher",
            ALPHA * distil + (1 - ALPHA) * losses.dice_loss(TEACHER, MASKS),
            "The Dice loss compares the *student* with the true masks. The teacher cannot be trained.",
        ),
        Mistake(
            "arguments swapped",
            ALPHA * swapped + (1 - ALPHA) * segment,
            "kl takes the student first and the teacher second, whatever stands first in the formula.",
        ),
    ]


def check_eq5(eq5: Callable) -> None:
    """Check Eq. 5 at alpha = 0.25 and T = 2."""
    answer = asked("eq5", eq5, STUDENT, TEACHER, MASKS, ALPHA, T)
    distil, segment = losses.kl_divergence(STUDENT, TEACHER, T), losses.dice_loss(STUDENT, MASKS)
    judge("eq5 at alpha = 0.25, T = 2", answer, ALPHA * distil + (1 - ALPHA) * segment, eq5_mistakes())
    print("Right: alpha is the teacher's share, and 1 - alpha that of the masks.")

"""Eq. 4 against torch.distributions, Dice by hand and against two libraries, Eq. 5 by its limits."""

import math

import pytest
import torch
from monai.losses import DiceLoss as MonaiDice
from segmentation_models_pytorch.losses import DiceLoss as SmpDice
from torch.distributions import Bernoulli
from torch.distributions import kl_divergence as kl_of_distributions

from fmfl.errors import UserError
from fmfl.losses import SMOOTHING, dice_loss, distillation_loss, harden, kl_divergence

SHAPE = (3, 1, 6, 5)


def logits(seed: int, scale: float = 3.0, shape: tuple[int, ...] = SHAPE) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(shape, generator=generator, dtype=torch.float64)


def masks(seed: int, shape: tuple[int, ...] = SHAPE) -> torch.Tensor:
    """Masks of unequal size, so that the mean over images is not the Dice of the batch."""
    generator = torch.Generator().manual_seed(seed)
    share = torch.linspace(0.1, 0.9, shape[0]).view(-1, 1, 1, 1)
    return (torch.rand(shape, generator=generator) < share).to(torch.uint8)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_kl_equals_that_of_torch_distributions(temperature):
    """Teacher first: the KL is not symmetric, so a swapped order fails."""
    student, teacher = logits(0), logits(1)
    expected = kl_of_distributions(
        Bernoulli(logits=teacher / temperature), Bernoulli(logits=student / temperature)
    )
    torch.testing.assert_close(kl_divergence(student, teacher, temperature), temperature**2 * expected.mean())


def test_kl_of_one_pixel_by_hand():
    """Teacher p = 3/4, student q = 1/2: 3/4 ln(3/2) + 1/4 ln(1/2)."""
    teacher = torch.full((1, 1, 1, 1), math.log(3.0))
    student = torch.zeros(1, 1, 1, 1)
    expected = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert kl_divergence(student, teacher).item() == pytest.approx(expected, rel=1e-5)


def test_kl_is_zero_for_equal_masks_and_positive_otherwise():
    student = logits(0).float()
    assert kl_divergence(student, student.clone()).item() == 0
    assert kl_divergence(student, student + 0.1).item() > 0


def test_kl_moves_the_student_and_never_the_teacher():
    """With T = 1 the gradient is (q - p) / pixels."""
    student, teacher = logits(0).requires_grad_(), logits(1).requires_grad_()
    kl_divergence(student, teacher).backward()
    assert teacher.grad is None
    expected = (student.sigmoid() - teacher.sigmoid()).detach() / student.numel()
    torch.testing.assert_close(student.grad, expected)


def test_the_temperature_softens_but_keeps_the_size_of_the_gradient():
    """Small logits: q - p = (s - t) / 4T, so its T^2 / T is one gradient at every T (Hinton, section 2)."""
    gradients = []
    for temperature in (1.0, 10.0):
        student = (logits(0, scale=1e-3)).requires_grad_()
        kl_divergence(student, logits(1, scale=1e-3), temperature=temperature).backward()
        gradients.append(student.grad)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=0)


def test_certain_logits_give_a_finite_loss_and_gradient():
    student = torch.tensor([200.0, -200.0, 200.0, -200.0]).view(1, 1, 2, 2).requires_grad_()
    teacher = torch.tensor([200.0, -200.0, -200.0, 200.0]).view(1, 1, 2, 2)
    loss = kl_divergence(student, teacher)
    loss.backward()
    assert loss.item() == pytest.approx(100.0)  # two of four pixels cost 200 nats each
    assert student.grad.isfinite().all()


def test_dice_loss_by_hand():
    """Image 1: p = 1/2 on 4 pixels, mask of 2: 1 - (2*1 + 1) / (2 + 2 + 1) = 2/5.
    Image 2: p = 1/2 on 4 pixels, empty mask: 1 - (0 + 1) / (2 + 0 + 1) = 2/3."""
    truth = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0]], dtype=torch.uint8).view(2, 1, 2, 2)
    assert dice_loss(torch.zeros(2, 1, 2, 2), truth).item() == pytest.approx((2 / 5 + 2 / 3) / 2)


def test_dice_loss_equals_two_libraries_image_by_image():
    predicted, truth = logits(2), masks(3)
    # segmentation-models-pytorch smooths sum(p y) / (sum(p + y) / 2), where half of ours means the same.
    expected = [
        SmpDice("binary", smooth=SMOOTHING / 2)(p[None], y[None])
        for p, y in zip(predicted, truth, strict=True)
    ]
    torch.testing.assert_close(dice_loss(predicted, truth), torch.stack(expected).mean())
    monai = MonaiDice(sigmoid=True, smooth_nr=SMOOTHING, smooth_dr=SMOOTHING, batch=False)
    torch.testing.assert_close(dice_loss(predicted, truth), monai(predicted, truth.double()))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bool, torch.float32, torch.float64])
def test_dice_loss_takes_masks_of_any_dtype(dtype):
    predicted, truth = logits(2).float(), masks(3)
    torch.testing.assert_close(dice_loss(predicted, truth.to(dtype)), dice_loss(predicted, truth))


def test_dice_loss_of_perfect_and_empty_masks_is_zero():
    truth = masks(3)
    assert dice_loss((truth.float() - 0.5) * 1e4, truth).item() == pytest.approx(0, abs=1e-6)
    assert dice_loss(torch.full(SHAPE, -1e4), torch.zeros(SHAPE)).item() == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_are_summed_in_full_precision(dtype):
    """256 x 256 pixels of mask sum to 65,536, which float16 cannot hold."""
    predicted = torch.full((1, 1, 256, 256), 2.0)
    truth = torch.ones_like(predicted)
    torch.testing.assert_close(dice_loss(predicted.to(dtype), truth), dice_loss(predicted, truth))
    torch.testing.assert_close(
        kl_divergence(predicted.to(dtype), truth.to(dtype)), kl_divergence(predicted, truth)
    )


def test_alpha_divides_the_loss_between_teacher_and_masks():
    student, teacher, truth = logits(0), logits(1), masks(3)
    distil, segment = kl_divergence(student, teacher, 2.0), dice_loss(student, truth)
    for alpha, expected in ((1.0, distil), (0.0, segment), (0.25, 0.25 * distil + 0.75 * segment)):
        torch.testing.assert_close(distillation_loss(student, teacher, truth, alpha, 2.0), expected)


def test_the_defaults_are_the_papers():
    student, teacher, truth = logits(0), logits(1), masks(3)
    expected = 0.6 * kl_divergence(student, teacher, 1.0) + 0.4 * dice_loss(student, truth)
    torch.testing.assert_close(distillation_loss(student, teacher, truth), expected)


def test_gradients_agree_with_finite_differences():
    student, teacher, truth = (
        logits(0, shape=(2, 1, 2, 2)),
        logits(1, shape=(2, 1, 2, 2)),
        masks(3, (2, 1, 2, 2)),
    )
    assert torch.autograd.gradcheck(
        lambda scores: distillation_loss(scores, teacher, truth, 0.4, 2.0), student.requires_grad_()
    )


def test_shapes_that_would_broadcast_are_refused():
    with pytest.raises(ValueError, match=r"student logits \(3, 1, 6, 5\) and teacher logits \(3, 1, 1, 1\)"):
        kl_divergence(logits(0), torch.zeros(3, 1, 1, 1))
    with pytest.raises(ValueError, match="one shape"):
        dice_loss(logits(0), torch.zeros(3, 6, 5))


@pytest.mark.parametrize("alpha", [-0.1, 1.1, math.nan])
def test_alpha_outside_its_range_is_named(alpha):
    with pytest.raises(UserError, match="alpha"):
        distillation_loss(logits(0), logits(1), masks(3), alpha=alpha)


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan])
def test_a_temperature_that_is_not_positive_is_named(temperature):
    with pytest.raises(UserError, match="temperature"):
        kl_divergence(logits(0), logits(1), temperature=temperature)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_hard_labels_turn_eq_4_into_cross_entropy_with_the_teachers_mask(temperature):
    generator = torch.Generator().manual_seed(0)
    student, teacher = (3 * torch.randn(2, 1, 8, 8, generator=generator) for _ in range(2))
    found = kl_divergence(student, harden(teacher, temperature), temperature)
    expected = torch.nn.functional.binary_cross_entropy_with_logits(
        student / temperature, (teacher > 0).float()
    )
    torch.testing.assert_close(found, temperature**2 * expected, rtol=1e-4, atol=1e-5)

"""The teacher's training: which pixels count, what it is prompted with, and a file that can be loaded."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from fmfl import data, prompts, teacher
from fmfl.prompts import boxes_from_masks
from tools import train_builtin_teacher as teacher_training

SIZE = 64


def drawing(*rows: str) -> np.ndarray:
    return np.array([[c == "#" for c in row] for row in rows])


def test_between_the_lungs_is_background_with_lung_on_both_sides():
    mask = drawing("........", ".#..#...", ".##...#.", "#..#..#.", "..##....", "########")
    expected = drawing("........", "..##....", "...###..", ".##.##..", "........", "........")
    assert np.array_equal(teacher_training.between_the_lungs(mask.astype(np.uint8)), expected)


def lungs(num: int = 40) -> torch.Tensor:
    """Two lungs an image; every fourth image shows one, every third has boxes that overlap."""
    masks = torch.zeros(num, 1, SIZE, SIZE, dtype=torch.uint8)
    for i in range(num):
        masks[i, 0, 10:40, 8 : 28 - i % 5] = 1
        if i % 4 == 0:
            continue
        masks[i, 0, 14:50, 36 + i % 5 : 58] = 1
        if i % 3 == 0:
            masks[i, 0, 38:40, 28 - i % 5 : 46] = 1  # the left lung's foot below ...
            masks[i, 0, 36:, 36 + i % 5 : 58] = 0  # ... the right lung
    return masks


def test_each_prompt_asks_for_the_lung_in_its_box():
    masks = lungs()
    both = ~boxes_from_masks(masks).isnan().any(-1).any(-1)
    image, boxes, targets = teacher_training.drawn_prompts(masks, SIZE, torch.Generator().manual_seed(0))
    assert len(image) == len(boxes) == len(targets)
    assert targets.shape[1:] == (1, SIZE, SIZE)
    assert set(image.tolist()) == set(range(len(masks)))
    kinds = set()
    for i in range(len(masks)):
        asked = (image == i).nonzero().flatten().tolist()
        parts = targets[asked]
        assert torch.equal(parts.sum(0), masks[i].float()), "together they are the mask, and share no pixel"
        if len(asked) == 1:
            kinds.add("both lungs")
            continue
        kinds.add("one lung")
        assert both[i]
        for part, box in zip(parts, boxes[asked], strict=True):
            assert part.any()
            extent = boxes_from_masks(part[None].to(torch.uint8), per_image="one")[0, 0]
            if i % 3:  # where no foot lies in the other lung's box, a target fills its box
                assert (extent - box).abs().max() <= 8, "moved by 8 pixels at most"
    assert kinds == {"one lung", "both lungs"}
    assert (boxes >= 0).all() and (boxes <= SIZE - 1).all()
    assert (boxes[:, :2] <= boxes[:, 2:]).all()


def test_a_third_of_the_prompts_is_exact_and_some_are_the_whole_image():
    masks = lungs(200)
    image, boxes, targets = teacher_training.drawn_prompts(masks, SIZE, torch.Generator().manual_seed(0))
    whole = (boxes == torch.tensor([0.0, 0.0, SIZE - 1, SIZE - 1])).all(1)
    assert 0.01 < whole.float().mean() < 0.2
    together = boxes_from_masks(masks, per_image="one")[image, 0]
    exact = (boxes == together).all(1)
    assert exact.float().mean() > 0.05
    assert torch.equal(targets[exact], masks[image[exact]].float())


def test_prompts_are_reproducible_by_seed():
    first, again, other = (
        teacher_training.drawn_prompts(lungs(), SIZE, torch.Generator().manual_seed(seed))[1]
        for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert first.shape != other.shape or not torch.equal(first, other)


def test_the_loss_by_hand():
    """Four pixels, of which the last is not scored; logits 0, so p = 1/2; target 1, 0, 0.

    Cross-entropy: 3 ln 2 over 4 pixels. Dice: 1 - (2 * 1/2 + 1) / (3/2 + 1 + 1) = 3/7. Nothing is above 0,
    so the true IoU is 0; the predicted one is 0.4: 0.05 * 0.16.
    """
    logits, iou = torch.zeros(1, 1, 1, 4), torch.tensor([[0.4]])
    targets, scored = torch.tensor([[[[1.0, 0, 0, 1]]]]), torch.tensor([[[[1.0, 1, 1, 0]]]])
    loss = teacher_training.loss_of(logits, iou, targets, scored)
    assert loss.item() == pytest.approx(0.75 * np.log(2) + 3 / 7 + 0.008)


def test_what_is_not_scored_teaches_nothing():
    """The loss of an image with its heart excluded does not change with what is said about the heart."""
    generator = torch.Generator().manual_seed(0)
    targets = (torch.rand(2, 1, 8, 8, generator=generator) > 0.5).float()
    scored = torch.ones_like(targets)
    scored[..., 3:5] = 0
    logits = torch.randn(2, 1, 8, 8, generator=generator).requires_grad_()
    teacher_training.loss_of(logits, torch.rand(2, 1, generator=generator), targets, scored).backward()
    assert logits.grad[..., 3:5].eq(0).all()
    assert logits.grad[..., :3].ne(0).all()


def test_a_perfect_answer_costs_nothing():
    targets = (torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)) > 0.5).float()
    loss = teacher_training.loss_of(
        (targets - 0.5) * 100, torch.ones(2, 1), targets, torch.ones_like(targets)
    )
    assert loss.item() == pytest.approx(0, abs=1e-6)


def test_scores_are_the_dice_under_each_way_of_asking():
    """A teacher that fills its boxes: with a box a lung it is right, with one for both it is not."""

    class BoxFiller(teacher.Teacher):
        def answers(self, images, prompts, *, batch_size=32):
            rows, columns = torch.arange(SIZE)[:, None], torch.arange(SIZE)
            found = []
            for boxes in prompts:
                x0, y0, x1, y1 = boxes[..., None, None].unbind(-3)
                inside = (columns >= x0) & (columns <= x1) & (rows >= y0) & (rows <= y1)
                found.append(inside.any(1, keepdim=True).float() - 0.5)
            return found

    masks = torch.zeros(2, 1, SIZE, SIZE, dtype=torch.uint8)
    masks[..., 10:30, 10:20] = 1
    masks[..., 10:30, 40:60] = 1
    found = teacher_training.scores(BoxFiller("boxes", None, SIZE, None, ""), masks, masks)
    assert found["ground_truth, per_lung"] == 1
    assert found["ground_truth, one"] == round(2 * 600 / (600 + 1000), 4)
    assert found["whole_image"] == round(2 * 600 / (600 + SIZE**2), 4)
    assert 0.5 < found["ground_truth_jitter, per_lung"] < 1


def test_augmentation_moves_image_and_mask_together_and_repeats_by_seed():
    mask = lungs(2)[1, 0].numpy()
    image = (mask * 200).astype(np.uint8)
    found = []
    for seed in (0, 0, 1):
        transform = teacher_training.augmentation()
        transform.set_random_seed(seed)
        found.append([transform(image=image, mask=mask) for _ in range(8)])
    for first, again in zip(found[0], found[1], strict=True):
        assert np.array_equal(first["image"], again["image"])
        assert np.array_equal(first["mask"], again["mask"])
    assert any(not np.array_equal(a["mask"], b["mask"]) for a, b in zip(found[0], found[2], strict=True))
    for moved in found[0] + found[2]:
        assert moved["image"].shape == moved["mask"].shape == (SIZE, SIZE)
        assert set(np.unique(moved["mask"])) <= {0, 1}
        inside = moved["image"][moved["mask"] == 1]
        outside = moved["image"][moved["mask"] == 0]
        assert inside.mean() > outside.mean() + 20


@pytest.mark.slow
def test_a_short_training_leaves_a_teacher_with_its_record(tmp_path):
    corpus, out = tmp_path / "corpus", tmp_path / "made" / "teacher.safetensors"
    for folder in ("images", "masks"):
        (corpus / folder).mkdir(parents=True)
    rows = ["image_id,patient_id,site"]
    noise = np.random.default_rng(0)
    y, x = np.mgrid[:SIZE, :SIZE] / SIZE  # round: a box is no lung's mask
    for i in range(24):
        found = [((x - middle) / 0.18) ** 2 + ((y - 0.5) / 0.3) ** 2 < 1 for middle in (0.27 + i / 500, 0.73)]
        mask = np.logical_or(*found).astype(np.uint8)
        pixels = (120 * mask + noise.integers(0, 100, mask.shape)).astype(np.uint8)
        Image.fromarray(pixels).save(corpus / "images" / f"x{i}.png")
        Image.fromarray(mask * 255).save(corpus / "masks" / f"x{i}.png")
        rows.append(f"x{i},p{i},{'montgomery' if i % 2 else 'elsewhere'}")
    (corpus / "metadata.csv").write_text("\n".join(rows) + "\n")

    teacher_training.train(
        corpus=str(corpus),
        out=out,
        steps=2,
        batch_size=2,
        learning_rate=1e-3,
        weight_decay=0.05,
        num_phantoms=4,
        phantom_share=0.5,
        size=SIZE,
        seed=3,
        device="cpu",
        progress=False,
    )

    frozen = teacher.load("builtin", out)
    assert frozen.size == SIZE
    cohort = data.load(corpus, size=SIZE, progress=False)
    logits = frozen.logits(cohort.images[:2], prompts.prompt(cohort.masks[:2]))
    assert logits.isfinite().all()
    with safe_open(out, "pt") as opened:
        metadata = opened.metadata()
        assert {opened.get_tensor(key).dtype for key in opened.keys()} == {torch.float16}  # noqa: SIM118
    record = json.loads(metadata["training"])
    assert (record["steps"], record["planned_steps"], record["seed"]) == (2, 2, 3)
    assert (record["corpus_images"], record["held_out_images"]) == (24, 2), "a twelfth of the patients"
    assert record["corpus_fingerprint"] == cohort.fingerprint
    assert len(record["held_out_dice"]) == 5
    assert metadata["licence"] == "CC BY 4.0"
    assert [file.name for file in out.parent.iterdir()] == [out.name], "no unfinished file stays"

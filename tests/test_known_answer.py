"""The shipped teacher against its recorded answer, and every family against the `segment-anything` package.

The record, `known_answer.json`, holds the logits of one drawn picture at every 16th pixel, as the package's
modules compute them box by box: `python tests/test_known_answer.py` writes it again for other weights.
"""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import Tensor

from fmfl import metrics, teacher
from fmfl.prompts import boxes_from_masks
from fmfl.teacher import Teacher
from fmfl.teachers import builtin, sam

RECORD = Path(__file__).with_name("known_answer.json")
STEP = 16  # pixels between the recorded places
NEAR = 1e-3  # logits that differ by less are equal


def drawn_chest() -> tuple[Tensor, Tensor]:
    """Two dark lungs on a bright ground with a fine pattern: whole numbers alone, the same everywhere.

    Returns:
        image and mask, each [1, 1, 112, 96] uint8; not square, so that mixed-up axes show.
    """
    y, x = torch.arange(112)[:, None], torch.arange(96)[None]
    # An ellipse without a division: (x - x0)^2 b^2 + (y - y0)^2 a^2 < a^2 b^2
    a, b = 17, 38
    inside = [(x - x0) ** 2 * b**2 + (y - 56) ** 2 * a**2 < a**2 * b**2 for x0 in (26, 70)]
    mask = (inside[0] | inside[1]).to(torch.uint8)
    image = 185 - 115 * mask.long() + (7 * x + 13 * y) % 17
    return image.to(torch.uint8)[None, None], mask[None, None]


IMAGE, MASK = drawn_chest()
BOXES = boxes_from_masks(MASK)


@torch.inference_mode()
def by_the_package(frozen: Teacher) -> Tensor:
    """`Teacher.logits` of the picture as the package computes it: encoder, prompt, decoder, box by box.

    Of the project's own code only the convention for images, boxes and masks is used.
    """
    network, convention, size = frozen.sam, frozen.convention, IMAGE.shape[-2:]
    embedding = network.image_encoder(convention.image(IMAGE, frozen.size))
    answers = []
    for box in BOXES[0].split(1):
        scaled = convention.boxes(box[:, None], frozen.size, *size)[:, 0]
        sparse, dense = network.prompt_encoder(points=None, boxes=scaled, masks=None)
        masks, iou = network.mask_decoder(
            image_embeddings=embedding,
            image_pe=network.prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=convention.multimask,
        )
        best = masks[:, int(iou.argmax())][:, None]
        answers.append(convention.mask(best.float(), frozen.size, *size))
    return torch.cat(answers).amax(0, keepdim=True)


def recorded(logits: Tensor) -> Tensor:
    return logits[0, 0, ::STEP, ::STEP]


def write_record() -> None:
    frozen = teacher.load()
    rows = [[round(value, 5) for value in row] for row in recorded(by_the_package(frozen)).tolist()]
    lines = ",\n  ".join(json.dumps(row) for row in rows)
    about = {"teacher": frozen.name, "sha256": frozen.sha256, "every": STEP, "logits": []}
    text = json.dumps(about, indent=1).replace("[]", f"[\n  {lines}\n ]")
    RECORD.write_text(text + "\n", encoding="utf-8")


def distance(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max())


@pytest.fixture
def shipped() -> Teacher:
    return teacher.load()


@pytest.fixture(scope="module")
def record() -> dict:
    return json.loads(RECORD.read_text(encoding="utf-8"))


def test_the_picture_is_two_dark_lungs_that_are_not_square():
    image, mask = IMAGE[0, 0].numpy(), MASK[0, 0].numpy()
    assert image.shape == mask.shape == (112, 96) and image.dtype == mask.dtype == np.uint8
    labels, count = ndimage.label(mask)
    assert count == 2
    # The area of an ellipse with the half-axes 17 and 38, but for the pixels on its border.
    assert np.bincount(labels.ravel())[1:] == pytest.approx([np.pi * 17 * 38] * 2, rel=0.02)
    assert image[mask == 1].max() < image[mask == 0].min() - 50
    assert BOXES[0].tolist() == [[10, 19, 42, 93], [54, 19, 86, 93]]


def test_the_shipped_teacher_gives_the_recorded_answer(shipped, record):
    both, *singles = shipped.answers(IMAGE, [BOXES, *BOXES[0].split(1)])
    assert distance(recorded(both), torch.tensor(record["logits"])) < NEAR
    assert distance(both, by_the_package(shipped)) < NEAR
    assert distance(both, torch.maximum(*singles)) < NEAR
    assert metrics.dice(both > 0, MASK) > 0.8


def test_the_record_is_the_packages_answer_of_the_shipped_weights(shipped, record):
    assert record["sha256"] == shipped.sha256
    kept = torch.tensor(record["logits"])
    assert kept.shape == (7, 6) and kept.std() > 5, "lungs and what is none"
    assert distance(recorded(by_the_package(shipped)), kept) < NEAR


def test_a_small_change_of_the_weights_is_seen(shipped, record):
    """As if a file had been damaged but kept its name: a hundredth on one layer's weights."""
    with torch.no_grad():
        shipped.sam.image_encoder.blocks[0].mlp.lin1.weight.mul_(1.01)
    assert distance(recorded(shipped.logits(IMAGE, BOXES)), torch.tensor(record["logits"])) > NEAR


def test_another_way_of_decoding_is_seen(shipped, record, monkeypatch):
    """Boxes whose sides are mixed up, which the network itself cannot notice."""
    right = Teacher._decode

    def mixed_up(self, embeddings, boxes, height, width):
        return right(self, embeddings, boxes.flip(-2) * 0.9, height, width)

    monkeypatch.setattr(Teacher, "_decode", mixed_up)
    logits = shipped.logits(IMAGE, BOXES)
    assert distance(recorded(logits), torch.tensor(record["logits"])) > NEAR
    assert distance(logits, by_the_package(shipped)) > NEAR


@pytest.mark.parametrize("name", ["sam_vit_b", "sam-med2d", "medsam"])
def test_every_family_answers_as_the_package(name):
    """Small networks with made weights; three masks and the best by predicted IoU for SAM-Med2D."""
    torch.manual_seed(0)
    small = builtin.network(size=64, patch_size=16, width=32, depth=2, num_heads=2, window_size=2,
                            global_attention=(1,), prompt_width=32)  # fmt: skip
    small.image_encoder.patch_embed.proj = torch.nn.Conv2d(3, 32, 16, 16)
    for parameter in small.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    small = small.eval().requires_grad_(False)
    frozen = Teacher(name, small, 64, sam.FAMILIES[name].convention, sha256="0" * 64)
    expected = by_the_package(frozen)
    both, *singles = frozen.answers(IMAGE, [BOXES, *BOXES[0].split(1)])
    assert expected.std() > 0.01, "else all would agree"
    assert distance(both, expected) < NEAR
    assert distance(both, torch.maximum(*singles)) < NEAR


def test_published_weights_are_known_by_their_checksum(shipped):
    published = (
        "ec2df62732614e57411cdcf32a23ffdf28910380d03139ee0f4fcbe91eb8c912"  # Meta's sam_vit_b_01ec64.pth
    )
    assert replace(shipped, sha256=published).about()["published_as"] == "sam_vit_b"
    assert shipped.about()["published_as"] == "builtin"
    assert replace(shipped, sha256="0" * 64).about()["published_as"] is None


if __name__ == "__main__":
    write_record()

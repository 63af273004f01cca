"""Each check says no, or not known, where it should: of weights that were changed, and of a decoder that was.

The recorded answer itself was computed by the package's modules; that it holds is a test of the loader, the
resizing and the decoding of this project.
"""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from scipy import ndimage

from fmfl import teacher
from fmfl.errors import UserError
from fmfl.prompts import boxes_from_masks
from fmfl.teacher import Teacher
from fmfl.teachers import known_answer, sam
from fmfl.teachers.known_answer import UNKNOWN, by_the_package, checks, drawn_chest

LOGITS, PACKAGE, TOGETHER = (
    "the recorded logits",
    "the package, box by box",
    "two boxes at once and one by one",
)


@pytest.fixture(scope="module")
def who() -> Teacher:
    return teacher.load()


def test_the_picture_is_two_dark_lungs_that_are_not_square():
    image, mask = (part[0, 0].numpy() for part in drawn_chest())
    assert image.shape == mask.shape == (112, 96) and image.dtype == mask.dtype == np.uint8
    labels, count = ndimage.label(mask)
    assert count == 2
    # The area of an ellipse with the half-axes 17 and 38, but for the pixels on its border.
    assert np.bincount(labels.ravel())[1:] == pytest.approx([np.pi * 17 * 38] * 2, rel=0.02)
    assert image[mask == 1].max() < image[mask == 0].min() - 50
    assert boxes_from_masks(drawn_chest()[1])[0].tolist() == [[10, 19, 42, 93], [54, 19, 86, 93]]


def test_the_shipped_teacher_gives_the_recorded_answer(who):
    found = checks(who)
    assert (found.holds == "yes").all()
    assert float(found.found["Dice on the drawn lungs"]) > 0.8
    assert who.calls == 0, "the audit is not counted as a question"


def test_the_record_is_the_packages_answer(who, tmp_path):
    known_answer.write_record(who, tmp_path / "again.json")
    again, kept = known_answer.record(tmp_path / "again.json"), known_answer.record()
    assert again["sha256"] == kept["sha256"] == who.sha256
    torch.testing.assert_close(again["logits"], kept["logits"], rtol=0, atol=1e-3)
    assert kept["logits"].shape == (7, 6) and kept["logits"].std() > 5, "lungs and what is none"


def test_a_small_change_of_the_weights_is_seen(who):
    """As if a file had been damaged but kept its name: a hundredth on one layer's weights."""
    changed = replace(who, sam=teacher.load().sam)
    with torch.no_grad():
        changed.sam.image_encoder.blocks[0].mlp.lin1.weight.mul_(1.01)
    assert checks(changed).holds[LOGITS] == "no"


def test_another_way_of_decoding_is_seen(who, monkeypatch):
    """Boxes whose sides are mixed up, which the network itself cannot notice."""
    right = Teacher._decode

    def mixed_up(self, embeddings, prompts, height, width):
        return right(self, embeddings, prompts.flip(-2) * 0.9, height, width)

    monkeypatch.setattr(Teacher, "_decode", mixed_up)
    found = checks(who).holds
    assert found[LOGITS] == found[PACKAGE] == "no"


def test_weights_of_ones_own_are_no_mistake_but_not_known(tmp_path):
    """A built-in network that somebody has trained further."""
    with safe_open(teacher.BUILTIN_WEIGHTS, "pt") as file:
        about = file.metadata()
    state = load_file(teacher.BUILTIN_WEIGHTS)
    state["mask_decoder.iou_prediction_head.layers.0.bias"] += 1
    save_file(state, tmp_path / "mine.safetensors", about)
    found = checks(teacher.load("builtin", tmp_path / "mine.safetensors")).holds
    assert found["SHA-256 of the weights"] == found[LOGITS] == UNKNOWN
    assert found[PACKAGE] == found[TOGETHER] == "yes"


@pytest.mark.parametrize("name", ["sam_vit_b", "sam-med2d", "medsam"])
def test_every_family_is_held_against_the_package(name, monkeypatch):
    """Small networks with made weights; three masks and the best by predicted IoU for SAM-Med2D."""
    torch.manual_seed(0)
    small = teacher.builtin_sam(size=64, patch_size=16, width=32, depth=2, num_heads=2, window_size=2,
                                global_attention=(1,), prompt_width=32)  # fmt: skip
    encoder = small.image_encoder
    encoder.patch_embed.proj = torch.nn.Conv2d(3, 32, 16, 16)
    for parameter in small.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    small = small.eval().requires_grad_(False)
    who = Teacher(name, small, 64, sam.FAMILIES[name].convention, sha256="0" * 64)
    found = checks(who).holds
    assert found["SHA-256 of the weights"] == found[LOGITS] == UNKNOWN
    assert found[PACKAGE] == found[TOGETHER] == "yes"
    image, mask = drawn_chest()
    answer = by_the_package(who, image, boxes_from_masks(mask)[0])
    assert answer.std() > 0.01, "else all would agree"


def test_published_weights_are_known_by_their_checksum(who):
    published = (
        "ec2df62732614e57411cdcf32a23ffdf28910380d03139ee0f4fcbe91eb8c912"  # Meta's sam_vit_b_01ec64.pth
    )
    as_sam = replace(who, name="sam_vit_b", sha256=published)
    assert known_answer._checksum(as_sam)[2] == "yes"
    assert known_answer._checksum(replace(as_sam, sha256="0" * 64))[2] == UNKNOWN
    assert known_answer._checksum(replace(as_sam, name="medsam"))[:1] == ("none is published",)


@pytest.mark.parametrize("content", [None, "{", json.dumps({"sha256": ""})])
def test_a_damaged_record_is_one_sentence(tmp_path, content):
    file = tmp_path / "record.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(UserError, match="missing or damaged: restore it"):
        known_answer.record(file)

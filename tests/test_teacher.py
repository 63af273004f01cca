"""The teacher against the segment-anything package, boxes by hand, files and caches that may be broken.

All but the last tests use a randomly initialised network: what it answers has no meaning, but the ways in
which it can be asked must agree.
"""

import functools
import hashlib
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, Sam
from torch import Tensor
from torch.nn import functional as F

from fmfl import metrics, paths, teacher
from fmfl.errors import UserError
from fmfl.prompts import boxes_from_masks, jitter, prompt
from fmfl.sources import phantom
from fmfl.teacher import Teacher, cached_logits, decode
from fmfl.teachers import builtin, sam

SIZE = 64
NETWORK = dict(
    size=SIZE,
    patch_size=8,
    width=32,
    depth=2,
    num_heads=2,
    window_size=4,
    global_attention=[1],
    prompt_width=32,
)


def network(seed: int = 0) -> Sam:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return builtin.network(**NETWORK)


@pytest.fixture
def weights(tmp_path):
    """A file as the training writes it: float16, with the network's settings."""
    file = tmp_path / "weights.safetensors"
    state = {key: value.half().contiguous() for key, value in network().state_dict().items()}
    save_file(state, file, {"network": json.dumps(NETWORK)})
    return file


@pytest.fixture
def frozen(weights) -> Teacher:
    return teacher.load("builtin", weights)


def some_images(num: int = 3, height: int = SIZE, width: int = SIZE) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (num, 1, height, width), generator=generator, dtype=torch.uint8)


def some_masks(num: int = 3, size: int = SIZE) -> Tensor:
    """Two lungs an image, at places that differ."""
    masks = torch.zeros(num, 1, size, size, dtype=torch.uint8)
    for i in range(num):
        masks[i, 0, 10 + i : 40, 8 : 26 - i] = 1
        masks[i, 0, 12 : 44 + i, 34 + i : 56] = 1
    return masks


SOME_BOXES = torch.tensor([[5.0, 6.0, 30.0, 50.0], [33.0, 4.5, 60.0, 47.0], [0.0, 0.0, 63.0, 63.0]])


# ------------------------------------------------------------------------------------------ the network


def test_the_builtin_teacher_is_made_of_the_packages_own_modules():
    sam = network()
    assert type(sam) is Sam
    assert type(sam.image_encoder) is ImageEncoderViT
    assert type(sam.prompt_encoder) is PromptEncoder
    assert type(sam.mask_decoder) is MaskDecoder


def by_the_package(sam: Sam, embeddings: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
    """One image at a time, as the package's own predictor does it."""
    found = []
    for embedding, box in zip(embeddings, boxes, strict=True):
        sparse, dense = sam.prompt_encoder(points=None, boxes=box[None], masks=None)
        found.append(
            sam.mask_decoder(
                image_embeddings=embedding[None],
                image_pe=sam.prompt_encoder.get_dense_pe(),
                sparse_prompt_embeddings=sparse,
                dense_prompt_embeddings=dense,
                multimask_output=False,
            )
        )
    return tuple(torch.cat(part) for part in zip(*found, strict=True))


@torch.no_grad()
def test_decoding_many_images_at_once_is_the_packages_decoder_image_by_image():
    """The image embedding travels in the dense prompt: 0 + (dense + image) = image + dense."""
    sam = network().eval()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        embeddings = 3 * torch.randn(3, 32, 8, 8)
    embeddings = torch.cat([embeddings, embeddings[:1]])  # the first image again, with another box
    boxes = torch.cat([SOME_BOXES, SOME_BOXES[1:2]])
    masks, iou = decode(sam, embeddings, boxes)
    expected_masks, expected_iou = by_the_package(sam, embeddings, boxes)
    assert masks.shape == (4, 1, 32, 32)
    assert iou.shape == (4, 1)
    torch.testing.assert_close(masks, expected_masks, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(iou, expected_iou, rtol=1e-5, atol=1e-6)
    scale = masks.std()
    assert (masks[0] - masks[1]).abs().max() > 0.1 * scale, "images matter"
    assert (masks[0] - masks[3]).abs().max() > 1e-3 * scale, "boxes matter"


@torch.no_grad()
def test_decoding_equals_the_package_also_for_many_boxes_of_one_image():
    """The one case of several boxes that the package itself can do in one call."""
    sam = network().eval()
    embedding = torch.randn(1, 32, 8, 8, generator=torch.Generator().manual_seed(1))
    sparse, dense = sam.prompt_encoder(points=None, boxes=SOME_BOXES, masks=None)
    expected, _ = sam.mask_decoder(
        image_embeddings=embedding,
        image_pe=sam.prompt_encoder.get_dense_pe(),
        sparse_prompt_embeddings=sparse,
        dense_prompt_embeddings=dense,
        multimask_output=False,
    )
    masks, _ = decode(sam, embedding.expand(3, -1, -1, -1), SOME_BOXES)
    torch.testing.assert_close(masks, expected, rtol=1e-5, atol=1e-6)


def test_standardising_takes_out_exposure():
    images = some_images().float()
    plain = builtin.standardise(images)
    torch.testing.assert_close(plain.mean((1, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(plain.std((1, 2, 3)), torch.ones(3))
    torch.testing.assert_close(builtin.standardise(0.3 * images + 40), plain, rtol=1e-3, atol=1e-4)
    assert builtin.standardise(torch.full((1, 1, 4, 4), 7.0)).eq(0).all(), "a black image is no division by 0"


# ------------------------------------------------------------------------------------------ logits


def test_many_images_are_answered_as_one_by_one(frozen):
    images, boxes = some_images(), SOME_BOXES
    together = frozen.logits(images, boxes)
    assert together.shape == images.shape
    assert together.dtype == torch.float32
    for batch_size in (1, 2):
        torch.testing.assert_close(
            frozen.logits(images, boxes, batch_size=batch_size), together, rtol=1e-4, atol=1e-5
        )
    shuffled = frozen.logits(images[[2, 0, 1]], boxes[[2, 0, 1]])
    torch.testing.assert_close(shuffled, together[[2, 0, 1]], rtol=1e-4, atol=1e-5)


def test_two_boxes_give_the_union(frozen):
    """The larger logit: inside the joined mask is what is inside one of the single ones."""
    images, first, second = some_images(2), SOME_BOXES[:2], SOME_BOXES[[1, 2]]
    single = [frozen.logits(images, boxes) for boxes in (first, second)]
    joined = frozen.logits(images, torch.stack([first, second], 1))
    torch.testing.assert_close(joined, torch.maximum(*single), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(single[0], single[1], atol=1e-3)


def test_a_box_of_nan_is_no_box(frozen):
    images = some_images(2)
    pair = torch.stack([SOME_BOXES[:2], SOME_BOXES[[1, 2]]], 1)
    pair[0, 1] = torch.nan
    found = frozen.logits(images, pair)
    torch.testing.assert_close(found[:1], frozen.logits(images[:1], SOME_BOXES[:1]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[1:], frozen.logits(images[1:], pair[1:]), rtol=1e-4, atol=1e-5)
    assert found.isfinite().all()


def test_several_prompts_cost_one_encoding(frozen):
    """Each answer is the one that the prompt would have got alone."""
    images, pair = some_images(), torch.stack([SOME_BOXES, SOME_BOXES.flip(0)], 1)
    prompts = [SOME_BOXES, pair, prompt(images, "whole_image")]
    answers = frozen.answers(images, prompts, batch_size=2)
    assert frozen.calls == 3
    for boxes, answer in zip(prompts, answers, strict=True):
        torch.testing.assert_close(answer, frozen.logits(images, boxes), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("height", "width"), [(96, 160), (48, 32), (64, 64)])
def test_images_of_another_size_are_answered_in_their_own_pixels(frozen, height, width):
    """As in the slow way: resize, scale the box by pixel edges, decode, resize back."""
    images = some_images(1, height, width)
    x0, y0, x1, y1 = box = 0.2 * width, 0.1 * height, 0.7 * width - 1, 0.8 * height - 1
    scaled = [
        (x0 + 0.5) * SIZE / width - 0.5,
        (y0 + 0.5) * SIZE / height - 0.5,
        (x1 + 0.5) * SIZE / width - 0.5,
        (y1 + 0.5) * SIZE / height - 0.5,
    ]
    resize = functools.partial(F.interpolate, mode="bilinear", align_corners=False)
    with torch.no_grad():
        small = resize(images.float(), (SIZE, SIZE), antialias=True)
        embedding = frozen.sam.image_encoder(builtin.standardise(small))
        low, _ = by_the_package(frozen.sam, embedding, torch.tensor([scaled]))
        expected = resize(low, (height, width))
    found = frozen.logits(images, torch.tensor([box]))
    assert found.shape == (1, 1, height, width)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("images", "boxes", "message"),
    [
        (torch.zeros(2, 3, SIZE, SIZE), SOME_BOXES[:2], r"images \(2, 3, 64, 64\) must be"),
        (torch.zeros(2, SIZE, SIZE), SOME_BOXES[:2], "must be"),
        (torch.zeros(2, 1, SIZE, SIZE), SOME_BOXES, r"boxes \(3, 1, 4\) must be .* with B = 2"),
        (torch.zeros(3, 1, SIZE, SIZE), SOME_BOXES[:, :3], "must be"),
        (torch.zeros(2, 1, SIZE, SIZE), torch.full((2, 2, 4), torch.nan), "at least one box"),
    ],
)
def test_images_and_boxes_that_do_not_fit_are_refused(frozen, images, boxes, message):
    with pytest.raises(ValueError, match=message):
        frozen.logits(images.to(torch.uint8), boxes)
    assert frozen.calls == 0


def test_the_teacher_is_frozen(frozen):
    assert not frozen.sam.training
    assert not any(parameter.requires_grad for parameter in frozen.sam.parameters())
    assert {parameter.dtype for parameter in frozen.sam.parameters()} == {torch.float32}
    assert frozen.num_parameters == sum(parameter.numel() for parameter in network().parameters())


# ------------------------------------------------------------------------------------------ files


def test_the_weights_in_the_file_are_those_of_the_teacher(frozen, weights):
    expected = network().state_dict()
    assert frozen.sam.state_dict().keys() == expected.keys()
    for key, value in frozen.sam.state_dict().items():
        assert torch.equal(value, expected[key].half().float())
    assert frozen.sha256 == hashlib.sha256(weights.read_bytes()).hexdigest()
    assert (frozen.size, frozen.name, frozen.calls) == (SIZE, "builtin", 0)


def write_other_tensors(file):
    save_file({"conv1.weight": torch.zeros(4, 3, 3, 3)}, file)


def write_one_tensor_less(file):
    state = network().state_dict()
    state.popitem()
    save_file(state, file, {"network": json.dumps(NETWORK)})


def write_another_width(file):
    save_file(network().state_dict(), file, {"network": json.dumps(NETWORK | {"width": 64})})


def write_unknown_setting(file):
    save_file(network().state_dict(), file, {"network": json.dumps(NETWORK | {"layers": 64})})


def write_broken_settings(file):
    save_file(network().state_dict(), file, {"network": "{"})


def write_settings_of_another_kind(file):
    save_file(network().state_dict(), file, {"network": "[1, 2]"})


def write_truncated(file):
    save_file(network().state_dict(), file, {"network": json.dumps(NETWORK)})
    file.write_bytes(file.read_bytes()[:-100])


def write_page(file):
    file.write_text("<!DOCTYPE html>\n<html><body>404 Not Found</body></html>\n")


def write_pickle(file):
    torch.save(network().state_dict(), file)


def write_nothing(file):
    file.write_bytes(b"")


def write_folder(file):
    file.mkdir()


def write_not_at_all(file):
    pass


@pytest.mark.parametrize(
    "write",
    [
        write_not_at_all,
        write_folder,
        write_nothing,
        write_page,
        write_truncated,
        write_pickle,
        write_other_tensors,
        write_one_tensor_less,
        write_another_width,
        write_unknown_setting,
        write_broken_settings,
        write_settings_of_another_kind,
    ],
)
def test_a_file_that_is_no_teacher_gets_one_sentence_with_its_name(tmp_path, write):
    file = tmp_path / "weights.safetensors"
    write(file)
    with pytest.raises(UserError) as caught:
        teacher.load("builtin", file)
    sentence = str(caught.value)
    assert str(file) in sentence
    assert "\n" not in sentence
    assert len(sentence) < len(str(file)) + 250, "not a list of all tensors"
    assert caught.value.__cause__ is None


def test_an_unknown_teacher_is_named():
    with pytest.raises(UserError, match="teacher 'sam-med3d' is unknown"):
        teacher.load("sam-med3d")


# ------------------------------------------------------------------------------------------ boxes


def a_mask(*rows: str) -> Tensor:
    """[1, 1, H, W] from a drawing: # is lung."""
    return torch.tensor([[c == "#" for c in row] for row in rows], dtype=torch.uint8)[None, None]


TWO_LUNGS = a_mask(
    "..........",
    "......##..",
    ".##...###.",
    ".##...###.",
    "......###.",
    "..........",
)


def test_boxes_by_hand():
    """x0 y0 x1 y1 are the outermost pixels; the left part of the image comes first, though it is smaller."""
    assert boxes_from_masks(TWO_LUNGS).tolist() == [[[1, 2, 2, 3], [6, 1, 8, 4]]]
    assert boxes_from_masks(TWO_LUNGS, per_image="one").tolist() == [[[1, 1, 8, 4]]]
    assert boxes_from_masks(TWO_LUNGS.bool()).dtype == torch.float32


def test_a_mask_of_one_part_has_one_box():
    boxes = boxes_from_masks(a_mask(".##.", ".##."))
    assert boxes[0, 0].tolist() == [1, 0, 2, 1]
    assert boxes[0, 1].isnan().all()


def test_masks_with_one_and_with_two_parts_share_a_batch():
    one = torch.zeros_like(TWO_LUNGS)
    one[..., 5, 9] = 1  # the last pixel of the image
    boxes = boxes_from_masks(torch.cat([one, TWO_LUNGS]))
    assert boxes[0, 0].tolist() == [9, 5, 9, 5]
    assert boxes[0, 1].isnan().all()
    assert boxes[1].isfinite().all()


def test_a_speck_is_no_lung():
    """A part counts from a twentieth of the largest on: 10 of 200 pixels do, 9 do not."""
    mask = torch.zeros(2, 1, 30, 30, dtype=torch.uint8)
    mask[:, :, 5:25, 10:20] = 1
    mask[0, :, 10:20, 3] = 1
    mask[1, :, 10:19, 3] = 1
    boxes = boxes_from_masks(mask)
    assert boxes[0].tolist() == [[3, 10, 3, 19], [10, 5, 19, 24]]
    assert boxes[1, 0].tolist() == [10, 5, 19, 24]
    assert boxes[1, 1].isnan().all()


def test_of_three_parts_the_two_largest_have_boxes():
    mask = a_mask("#..##..###", "#..##..###", "...##..###")
    assert boxes_from_masks(mask).tolist() == [[[3, 0, 4, 2], [7, 0, 9, 2]]]


def test_parts_that_touch_at_a_corner_are_two():
    boxes = boxes_from_masks(a_mask("##..", "##..", "..##", "..##"))
    assert boxes.tolist() == [[[0, 0, 1, 1], [2, 2, 3, 3]]]


def test_an_empty_mask_has_no_box():
    with pytest.raises(ValueError, match="mask 1 is empty"):
        boxes_from_masks(torch.cat([TWO_LUNGS, torch.zeros_like(TWO_LUNGS)]))


def test_jitter_stays_near_and_inside_and_keeps_the_order():
    generator = torch.Generator().manual_seed(0)
    boxes = torch.tensor([[10.0, 20.0, 40.0, 50.0], [0.0, 0.0, 2.0, 63.0], [torch.nan] * 4]).repeat(200, 1)
    moved = jitter(boxes, SIZE, generator, pixels=5.0)
    there = ~boxes.isnan()
    assert torch.equal(moved.isnan(), boxes.isnan())
    assert (moved[there] >= 0).all() and (moved[there] <= SIZE - 1).all()
    held = moved[there.all(1)]
    assert (held[:, :2] <= held[:, 2:]).all()
    shift = (moved - boxes)[::3]  # away from the edge nothing is cut
    assert shift.abs().max() <= 5
    assert shift.abs().max() > 4.5
    assert shift.mean(0).abs().max() < 1, "to both sides alike"
    assert shift.std(0).min() > 2, "every side by itself"


def test_prompts_by_rule():
    masks = some_masks()
    exact = boxes_from_masks(masks)
    assert torch.equal(prompt(masks, "ground_truth"), exact)
    assert prompt(masks, "ground_truth", per_image="one").shape == (3, 1, 4)
    assert prompt(torch.zeros(2, 1, 6, 10), "whole_image").tolist() == [[[0, 0, 9, 5]]] * 2
    assert torch.equal(prompt(masks, "ground_truth_jitter", jitter_pixels=0.0), exact)
    one, again, other = (prompt(masks, "ground_truth_jitter", seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert (one - exact).abs().max() <= 5


def test_where_nothing_was_predicted_the_whole_image_is_asked_about():
    masks = some_masks(2)
    masks[1] = 0
    boxes = prompt(masks, "predicted")
    assert torch.equal(boxes[0], boxes_from_masks(masks[:1])[0])
    assert boxes[1, 0].tolist() == [0, 0, SIZE - 1, SIZE - 1]
    assert masks[1].sum() == 0, "the caller's masks stay"


def test_batches_are_sized_to_the_devices_memory(frozen, monkeypatch):
    """64 patches, 2 heads, 4 bytes, three times: 98,304 bytes an image, in half of the memory."""
    assert frozen.batch_size == 32
    for total, images in ((98_304 * 2 * 7 + 1, 7), (1, 1)):
        memory = SimpleNamespace(total=total)
        monkeypatch.setattr(teacher.psutil, "virtual_memory", lambda memory=memory: memory)
        assert frozen.batch_size == images


def test_unknown_rules_are_named_with_the_known_ones():
    with pytest.raises(UserError, match="box_rule 'point' is unknown: choose one of ground_truth, "):
        prompt(some_masks(), "point")
    with pytest.raises(UserError, match="boxes_per_image 'two' is unknown: choose one of per_lung, one"):
        boxes_from_masks(some_masks(), per_image="two")


# ------------------------------------------------------------------------------------------ the cache


def test_the_teacher_is_asked_once(frozen, tmp_path):
    images, masks = some_images(), some_masks()
    ask = functools.partial(
        cached_logits, frozen, images, prompt(masks), cache=tmp_path / "cache", progress=False
    )
    first = ask()
    assert (first.logits.shape, first.logits.dtype) == (images.shape, torch.float16)
    assert frozen.calls == 3
    assert torch.equal(first.logits, frozen.logits(images, prompt(masks)).half())
    frozen.calls = 0
    again = ask()
    assert frozen.calls == 0
    assert torch.equal(again.logits, first.logits)
    assert again.seconds == first.seconds > 0, "what it has cost is remembered"
    assert len(list((tmp_path / "cache").iterdir())) == 1, "no unfinished file stays"


@pytest.mark.parametrize(
    "change", ["boxes", "weights", "precision", "deterministic", "size", "image", "fewer"]
)
def test_the_teacher_is_asked_again_when_anything_its_answer_depends_on_changes(
    frozen, tmp_path, change, monkeypatch
):
    images, boxes = some_images(), prompt(some_masks())
    cached_logits(frozen, images, boxes, cache=tmp_path, progress=False)
    frozen.calls = 0
    if change == "boxes":
        boxes[2, 1, 3] += 1
    elif change == "weights":
        frozen.sha256 = "another"
    elif change == "precision":
        frozen.precision = "bfloat16"
    elif change == "deterministic":
        monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    elif change == "size":
        sam.resize(frozen.sam, 32)
        frozen.size = 32
    elif change == "image":
        images[2, 0, 5, 5] ^= 1
    elif change == "fewer":
        images, boxes = images[:2], boxes[:2]
    found = cached_logits(frozen, images, boxes, cache=tmp_path, progress=False)
    assert found.logits.shape == images.shape
    assert frozen.calls == len(images)


@pytest.mark.parametrize("damage", ["cut", "empty", "one bit"])
def test_a_damaged_cache_is_made_again(frozen, tmp_path, damage):
    ask = functools.partial(
        cached_logits, frozen, some_images(), prompt(some_masks()), cache=tmp_path / "cache", progress=False
    )
    expected = ask().logits
    (file,) = (tmp_path / "cache").iterdir()
    whole = file.read_bytes()
    flipped = whole[:-1] + bytes([whole[-1] ^ 1])
    file.write_bytes({"cut": whole[:-1], "empty": b"", "one bit": flipped}[damage])
    for calls in (3, 0):  # made again once, and whole
        frozen.calls = 0
        assert torch.equal(ask().logits, expected)
        assert frozen.calls == calls


# ------------------------------------------------------------------------------------------ as shipped


def test_the_shipped_weights_say_where_they_come_from():
    file = teacher.BUILTIN_WEIGHTS
    assert file.parent == paths.DATA
    assert file.stat().st_size <= 16 * 2**20
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    assert metadata["licence"] == "CC BY 4.0"
    assert json.loads(metadata["network"])["size"] == 128
    record = json.loads(metadata["training"])
    assert {"steps", "seed", "learning_rate", "batch_size", "corpus_fingerprint", "held_out_dice"} <= set(
        record
    )
    assert all(0 < dice < 1 for dice in record["held_out_dice"].values())
    assert teacher.load().sha256 == hashlib.sha256(file.read_bytes()).hexdigest()


def test_the_shipped_teacher_knows_lungs_it_has_not_seen():
    """40 synthetic X-rays of a seed that its training did not draw, with true boxes."""
    images, masks, _ = phantom.generate(40, size=128, seed=7)
    images, masks = (torch.from_numpy(np.ascontiguousarray(part))[:, None] for part in (images, masks))
    frozen = teacher.load()
    dice = metrics.dice(frozen.logits(images, prompt(masks)) > 0, masks)
    assert dice.mean() > 0.95
    assert dice.min() > 0.8


def test_the_built_in_teacher_gives_the_same_bytes_on_any_number_of_cores():
    images, masks, _ = phantom.generate(5, 96, 0)
    images = torch.as_tensor(images).reshape(-1, 1, 96, 96)
    boxes = prompt(torch.as_tensor(masks).reshape(-1, 1, 96, 96), "ground_truth")
    frozen, threads, found = teacher.load("builtin"), torch.get_num_threads(), []
    try:
        for cores in (1, 2, 3):
            torch.set_num_threads(cores)
            found.append(frozen.logits(images, boxes))
            assert torch.get_num_threads() == cores
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])

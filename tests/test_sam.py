"""SAM, MedSAM and SAM-Med2D against the package's own predictor, a known answer, and their authors' steps.

Weights are made up: what the networks answer has no meaning, but it must be what others' code answers. The
known answer of SAM-Med2D is no part of this project: it is looked for in `FMFL_REFERENCE`, or in
`../shared/reference` beside it.
"""

import hashlib
import json
import math
import os
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import segment_anything
import torch
from PIL import Image
from safetensors.torch import save_file
from segment_anything import SamPredictor
from segment_anything.build_sam import _build_sam
from segment_anything.modeling import Sam
from segment_anything.modeling.image_encoder import get_rel_pos
from torch import Tensor
from torch.nn import functional as F

from fmfl import paths, teacher
from fmfl.errors import UserError
from fmfl.teacher import decode
from fmfl.teachers import sam

REFERENCE = Path(os.environ.get("FMFL_REFERENCE", paths.ROOT.parent / "shared" / "reference")) / "sam_med2d"
needs_reference = pytest.mark.skipif(
    not (REFERENCE / "golden.npz").is_file(),
    reason="SAM-Med2D's known answer is not here: set FMFL_REFERENCE",
)


def made(shapes: dict[str, list[int]]) -> dict[str, Tensor]:
    """Weights from their names, the ones of the known answer."""
    state = {}
    for key, shape in shapes.items():
        rng = np.random.default_rng([20231127, int(hashlib.sha256(key.encode()).hexdigest()[:8], 16)])
        a = rng.standard_normal(shape).astype(np.float32)
        if a.ndim >= 2:
            a *= np.float32(1 / math.sqrt(max(1, math.prod(shape[1:]))))
        elif key.endswith("weight"):
            a = 1 + np.float32(0.1) * a
        else:
            a *= np.float32(0.1)
        state[key] = torch.from_numpy(a)
    return state


def shapes_of(network: Sam) -> dict[str, list[int]]:
    return {key: list(value.shape) for key, value in network.state_dict().items()}


@pytest.fixture
def small(monkeypatch):
    """The package's builder with an image encoder of two narrow blocks; the rest is the real thing."""
    builder = partial(
        _build_sam,
        encoder_embed_dim=32,
        encoder_depth=2,
        encoder_num_heads=2,
        encoder_global_attn_indexes=[1],
    )
    monkeypatch.setitem(segment_anything.sam_model_registry, "vit_b", builder)


def weights(tmp_path, name: str, **settings) -> tuple[Path, dict[str, Tensor]]:
    """A family's checkpoint with made weights, as a bare state dict."""
    state = made(shapes_of(sam.network(name, **settings)))
    file = tmp_path / "weights.pth"
    torch.save(state, file)
    return file, state


def x_ray(height: int, width: int, seed: int = 0) -> Tensor:
    """[1, 1, H, W] uint8, smooth, so that an error in resizing is small and an error in place is not."""
    rng = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 1, 7, 7, generator=rng)
    return (255 * F.interpolate(coarse, (height, width), mode="bicubic").clamp(0, 1)).to(torch.uint8)


BOX = torch.tensor([[20.0, 12.0, 70.0, 66.0]])


def by_the_package(network: Sam, embedding: Tensor, boxes: Tensor, multimask: bool) -> tuple[Tensor, Tensor]:
    sparse, dense = network.prompt_encoder(points=None, boxes=boxes, masks=None)
    return network.mask_decoder(
        image_embeddings=embedding,
        image_pe=network.prompt_encoder.get_dense_pe(),
        sparse_prompt_embeddings=sparse,
        dense_prompt_embeddings=dense,
        multimask_output=multimask,
    )


# ------------------------------------------------------------------------------------------ networks


def test_an_adapter_is_added_beside_the_mlp(small):
    network = sam.network("sam-med2d").eval()
    block = network.image_encoder.blocks[0]
    x = torch.randn(2, 16, 16, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        adapted = block(x)
        block.mlp._forward_hooks.clear()
        plain = block(x)
        seen = []
        block.norm2.register_forward_hook(lambda module, inputs, output: seen.append(output))
        block(x)
        expected = plain + block.Adapter(seen[0])
    torch.testing.assert_close(adapted, expected, rtol=1e-4, atol=1e-5)
    assert (adapted - plain).abs().mean() > 0.1


def test_positions_are_interpolated_as_the_package_does_it(small):
    """Relative ones by its own get_rel_pos; those of a block with windows stay."""
    large, resized = (sam.network("sam_vit_b") for _ in range(2))
    state = made(shapes_of(large))
    large.load_state_dict(state)
    resized.load_state_dict(state)
    sam.resize(resized, 256)
    old, new = large.image_encoder, resized.image_encoder
    assert new.pos_embed.shape == (1, 16, 16, 32)
    # Each new position is the mean of the two in the middle of the four old ones that it replaces.
    middle = old.pos_embed[:, 1::4, 1::4] + old.pos_embed[:, 1::4, 2::4]
    middle = (middle + old.pos_embed[:, 2::4, 1::4] + old.pos_embed[:, 2::4, 2::4]) / 4
    torch.testing.assert_close(new.pos_embed, middle)
    for name in ("rel_pos_h", "rel_pos_w"):
        assert torch.equal(getattr(new.blocks[0].attn, name), getattr(old.blocks[0].attn, name))
        after = getattr(new.blocks[1].attn, name)
        assert after.shape == (31, 16)
        expected = get_rel_pos(16, 16, getattr(old.blocks[1].attn, name))
        torch.testing.assert_close(get_rel_pos(16, 16, after), expected)
    assert shapes_of(resized) == shapes_of(sam.network("sam_vit_b", size=256))
    with torch.no_grad():
        embedding = new(torch.zeros(1, 3, 256, 256))
        low, _ = by_the_package(resized, embedding, BOX, multimask=False)
    assert low.shape == (1, 1, 64, 64)


def test_a_size_that_no_patch_divides_is_refused(small, tmp_path):
    file, _ = weights(tmp_path, "sam_vit_b", size=64)
    with pytest.raises(UserError, match="250 pixels is no multiple of its patch"):
        teacher.load("sam_vit_b", file, size=250)


# ------------------------------------------------------------------------------------------ conventions


@torch.no_grad()
def check_against_the_predictor(file: Path, image: Tensor, builder: str = "vit_b"):
    frozen = teacher.load(f"sam_{builder}", file)
    predictor = SamPredictor(segment_anything.sam_model_registry[builder](checkpoint=str(file)))
    predictor.set_image(image[0].permute(1, 2, 0).expand(-1, -1, 3).numpy())
    boxes = predictor.transform.apply_boxes_torch(BOX, image.shape[-2:])
    expected, _, _ = predictor.predict_torch(
        None, None, boxes=boxes, multimask_output=False, return_logits=True
    )
    found = frozen.logits(image, BOX)
    assert found.shape == image.shape
    assert expected.std() > 0.05
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("height", "width"), [(90, 120), (1100, 300)])
def test_sam_answers_as_the_packages_own_predictor(small, tmp_path, height, width):
    file, _ = weights(tmp_path, "sam_vit_b")
    check_against_the_predictor(file, x_ray(height, width))


@pytest.mark.slow
def test_sam_vit_b_answers_as_the_packages_own_predictor(tmp_path):
    file, _ = weights(tmp_path, "sam_vit_b")
    check_against_the_predictor(file, x_ray(90, 120))


@torch.no_grad()
def test_medsam_is_called_as_its_authors_call_it(small, tmp_path):
    """Squeezed by Pillow's bicubic, its own minimum and maximum to 0..1; the sigmoid is resized."""
    image = x_ray(90, 120) // 2 + 30
    file, _ = weights(tmp_path, "medsam")
    network = segment_anything.sam_model_registry["vit_b"](checkpoint=str(file))
    square = Image.fromarray(image[0, 0].numpy().astype(np.float32)).resize((1024, 1024), Image.BICUBIC)
    x = torch.from_numpy(np.array(square)).clamp(image.min(), image.max())
    x = ((x - x.min()) / (x.max() - x.min())).expand(1, 3, -1, -1)
    box = BOX / torch.tensor([120, 90, 120, 90]) * 1024
    low, _ = by_the_package(network, network.image_encoder(x), box, multimask=False)
    expected = F.interpolate(low.sigmoid(), (90, 120), mode="bilinear", align_corners=False)
    found = teacher.load("medsam", file).logits(image, BOX)
    torch.testing.assert_close(found.sigmoid(), expected, rtol=1e-4, atol=1e-4)
    assert expected.std() > 0.01


@torch.no_grad()
def test_sam_med2d_is_called_as_its_authors_call_it(small, tmp_path):
    """Normalised, then nearest neighbour to 256; the best of three masks by predicted IoU."""
    image = x_ray(90, 120)
    file, state = weights(tmp_path, "sam-med2d")
    network = sam.network("sam-med2d").eval()
    network.load_state_dict(state)
    rgb = image[0].permute(1, 2, 0).expand(-1, -1, 3).numpy()
    normalised = (rgb - np.array([123.675, 116.28, 103.53])) / np.array([58.395, 57.12, 57.375])
    nearest = normalised[np.arange(256) * 90 // 256][:, np.arange(256) * 120 // 256]
    embedding = network.image_encoder(torch.from_numpy(nearest).float().permute(2, 0, 1)[None])
    box = BOX * torch.tensor([256 / 120, 256 / 90, 256 / 120, 256 / 90])
    low, iou = by_the_package(network, embedding, box, multimask=True)
    best = low[:, iou[0].argmax()][:, None]
    up = F.interpolate(best, (256, 256), mode="bilinear", align_corners=False)
    expected = F.interpolate(up, (90, 120), mode="bilinear", align_corners=False)
    found = teacher.load("sam-med2d", file).logits(image, BOX)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    others = [k for k in range(3) if k != iou[0].argmax()]
    assert all((low[:, k] - best[:, 0]).abs().max() > 0.01 for k in others)


# ------------------------------------------------------------------------------------------ loading


def test_a_checkpoint_of_1024_pixels_is_used_at_256(small, tmp_path):
    file, state = weights(tmp_path, "sam_vit_b")
    expected = sam.network("sam_vit_b")
    expected.load_state_dict(state)
    sam.resize(expected, 256)
    frozen = teacher.load("sam_vit_b", file, size=256)
    assert frozen.size == 256
    for key, value in expected.state_dict().items():
        assert torch.equal(frozen.sam.state_dict()[key], value)
    assert frozen.logits(x_ray(90, 120), BOX).isfinite().all()


def test_a_checkpoint_without_adapters_is_no_sam_med2d(small, tmp_path):
    file, state = weights(tmp_path, "sam-med2d")
    torch.save({key: value for key, value in state.items() if ".Adapter." not in key}, file)
    with pytest.raises(UserError, match="12 keys of the adapters missing"):
        teacher.load("sam-med2d", file)


def test_a_partial_checkpoint_is_refused(small, tmp_path):
    """The mask decoder that silently stayed untrained is the mistake that this is for."""
    _, state = weights(tmp_path, "sam_vit_b", size=64)
    file = tmp_path / "encoder.pth"
    torch.save({key: value for key, value in state.items() if not key.startswith("mask_decoder.")}, file)
    with pytest.raises(
        UserError, match=r"does not fit teacher 'sam_vit_b': 1.. keys of the mask decoder missing"
    ):
        teacher.load("sam_vit_b", file, size=64)


def test_a_network_of_another_kind_is_refused(small, tmp_path):
    file = tmp_path / "resnet.pth"
    torch.save({"conv1.weight": torch.zeros(4, 3, 3, 3), "fc.bias": torch.zeros(4)}, file)
    with pytest.raises(
        UserError, match=r"does not fit teacher 'medsam': .* keys of the image encoder missing"
    ):
        teacher.load("medsam", file)


def test_loading_leaves_the_random_numbers_alone(small, tmp_path):
    file, _ = weights(tmp_path, "sam_vit_b", size=64)
    before = torch.get_rng_state()
    teacher.load("sam_vit_b", file, size=64)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_published_teacher_needs_a_file():
    with pytest.raises(UserError, match="'medsam' needs its authors' weights: name their file"):
        teacher.load("medsam")


# ------------------------------------------------------------------------------------------ known answer


@pytest.fixture(scope="module")
def golden():
    answer = dict(np.load(REFERENCE / "golden.npz"))
    answer = {key: torch.from_numpy(value) for key, value in answer.items()}
    return answer, made(json.loads((REFERENCE / "state_dict.json").read_text()))


@needs_reference
def test_sam_med2d_has_the_authors_keys_and_shapes():
    with torch.device("meta"):
        network = sam.network("sam-med2d")
    expected = json.loads((REFERENCE / "state_dict.json").read_text())
    assert len(expected) == 386
    assert list(shapes_of(network).items()) == list(expected.items())
    assert round(sum(p.numel() for p in network.parameters()) / 1e6, 1) == 271.2


def save_bare(state, file):
    torch.save(state, file)


@torch.enable_grad()
def save_beside_an_optimizer(state, file):
    """As a training script does: the optimizer whole, not its state."""
    optimizer = torch.optim.Adam([torch.nn.Parameter(torch.zeros(3))])
    optimizer.param_groups[0]["params"][0].sum().backward()
    optimizer.step()
    torch.save({"model": state, "optimizer": optimizer, "epoch": 3}, file)


@needs_reference
@pytest.mark.slow
@pytest.mark.parametrize("save", [save_bare, save_beside_an_optimizer, save_file])
@torch.no_grad()
def test_sam_med2d_gives_the_known_answer(golden, tmp_path, save):
    answer, state = golden
    file = tmp_path / "sam-med2d_b.pth"
    save(state, file)
    frozen = teacher.load("sam-med2d", file)
    file.unlink()  # a gigabyte
    image = answer["image"][None, None]
    embedding = frozen.sam.image_encoder(frozen.convention.image(image, 256))
    close = partial(torch.testing.assert_close, rtol=0, atol=1e-3)
    close(embedding.mean((2, 3)), answer["embedding_mean"])
    close(embedding[0, :8, :4, :4], answer["embedding_corner"])
    boxes = answer["boxes"].float()
    pair = embedding.expand(2, -1, -1, -1)
    low, iou = decode(frozen.sam, pair, boxes)
    close(low, answer["low_res_logits"])
    close(iou, answer["iou"])
    for k in range(2):
        one, one_iou = decode(frozen.sam, embedding, boxes[k : k + 1])
        close(one, low[k : k + 1], atol=1e-5)
        close(one_iou, iou[k : k + 1], atol=1e-5)
    three, three_iou = decode(frozen.sam, pair, boxes, multimask=True)
    # Kept as float16, whose steps are 2e-3 wide here: rounding alone is 1e-3.
    close(three, answer["low_res_logits_multimask"].float(), atol=2e-3)
    close(three_iou, answer["iou_multimask"].float())
    # The teacher takes the best of the three by predicted IoU, and of both boxes the larger logit.
    best = answer["low_res_logits_multimask"].float()[torch.arange(2), answer["iou_multimask"].argmax(1)]
    full = F.interpolate(best[:, None], (256, 256), mode="bilinear", align_corners=False)
    close(frozen.logits(image, boxes[None]), full.amax(0, keepdim=True), atol=2e-3)

"""Students: their shapes, their seeds, and what they weigh, counted by hand."""

import random

import numpy as np
import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from fmfl import config, models, states
from fmfl.errors import UserError
from fmfl.unet import UNet

SLOW = {"resnet18_unet", "resnet34_unet", "unet"}


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in models.STUDENTS],
)
def test_a_student_gives_one_logit_a_pixel(name):
    model = models.build(name).eval()
    images = torch.rand(2, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = model(images)
    assert logits.shape == images.shape
    assert logits.dtype == torch.float32
    assert logits.min() < 0 or logits.max() > 1, "raw scores, no sigmoid"
    assert logits[0].ne(logits[1]).any()


def test_weights_depend_on_the_seed_alone():
    digests = []
    for seed in (3, 3, 4):
        torch.rand(1)  # the global generator has moved on
        digests.append(states.state_digest(models.build("tiny_unet", seed=seed).state_dict()))
    assert digests[0] == digests[1] != digests[2]


def test_building_leaves_everybody_elses_random_numbers_alone():
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002 (the global state is what this is about)
    random.seed(0)
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002
    models.build("tiny_unet", seed=1)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])  # noqa: NPY002
    assert random.getstate() == before[2]


def test_convolutions_are_channels_last():
    weights = [p for p in models.build("tiny_unet").parameters() if p.ndim == 4]
    assert weights and all(p.is_contiguous(memory_format=torch.channels_last) for p in weights)


def test_the_plain_unet_has_ronnebergers_layers():
    """Counted by hand: nine pairs of convolutions, four that enlarge, one that ends; BatchNorm for biases."""
    pairs = [(1, 64), (64, 128), (128, 256), (256, 512), (512, 1024)]  # Fig. 1, from the top to the bottom
    pairs += [(1024, 512), (512, 256), (256, 128), (128, 64)]
    both = sum(9 * (inputs * outputs + outputs * outputs) + 4 * outputs for inputs, outputs in pairs)
    enlarge = sum(4 * below * below // 2 + below // 2 for below in (1024, 512, 256, 128))
    assert models.num_parameters(models.build("unet")) == both + enlarge + 64 + 1


def test_the_plain_unet_computes_what_its_picture_says():
    """The same weights in functions, level by level, on a small one in evaluation."""
    model = UNet((4, 8, 16)).eval()
    weights = model.state_dict()

    def pair(x: torch.Tensor, name: str) -> torch.Tensor:
        for convolution, norm in ((0, 1), (3, 4)):
            x = F.conv2d(x, weights[f"{name}.{convolution}.weight"], padding=1)
            kept = [weights[f"{name}.{norm}.{key}"][:, None, None] for key in ("running_mean", "running_var")]
            scale, shift = (weights[f"{name}.{norm}.{key}"][:, None, None] for key in ("weight", "bias"))
            x = ((x - kept[0]) / (kept[1] + 1e-5).sqrt() * scale + shift).relu()
        return x

    def enlarged(x: torch.Tensor, name: str) -> torch.Tensor:
        return F.conv_transpose2d(x, weights[f"{name}.weight"], weights[f"{name}.bias"], stride=2)

    images = torch.rand(2, 1, 16, 16)
    top = pair(images, "stem")
    middle = pair(F.max_pool2d(top, 2), "down.0")
    bottom = pair(F.max_pool2d(middle, 2), "down.1")
    middle = pair(torch.cat((middle, enlarged(bottom, "enlarge.1")), 1), "up.1")
    top = pair(torch.cat((top, enlarged(middle, "enlarge.0")), 1), "up.0")
    with torch.no_grad():
        torch.testing.assert_close(model(images), F.conv2d(top, weights["head.weight"], weights["head.bias"]))


@pytest.mark.parametrize("name", ["small", "tiny_unet", "mobile_unet", "resnet18_unet"])
def test_features_stay_in_channels_last_and_in_bfloat16(monkeypatch, name):
    """Each change of layout or precision is a copy of all features, which took most of a GPU's step."""
    monkeypatch.setitem(models.STUDENTS, "small", lambda: UNet((8, 16, 32)))
    model, strays = models.build(name).train(), []

    def look(module: nn.Module, inputs: tuple, output: torch.Tensor) -> None:
        if isinstance(output, torch.Tensor) and output.ndim == 4:
            last = output.is_contiguous(memory_format=torch.channels_last)
            if not last or output.dtype != torch.bfloat16:
                strays.append((type(module).__name__, tuple(output.shape), output.dtype, last))

    for module in model.modules():
        module.register_forward_hook(look)
    images = torch.rand(2, 1, 64, 64).contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        model(images)
    assert strays == []


def test_enlarging_in_bfloat16_changes_no_number():
    """The library's own decoder block, gives the same float32 bytes."""
    import segmentation_models_pytorch as smp

    ours = models.build("resnet18_unet", seed=3).eval()
    plain = smp.Unet(
        "resnet18", encoder_weights=None, in_channels=1, classes=1, decoder_channels=(256, 128, 64, 32, 16)
    )
    plain.load_state_dict(ours.state_dict())
    images = torch.rand(1, 1, 64, 64)
    with torch.no_grad():
        assert torch.equal(ours(images), plain.to(memory_format=torch.channels_last).eval()(images))


def test_group_norm_takes_batchnorms_place_and_its_activation_stays():
    """As many weights; each group of 8 channels of an image has mean 0 and variance 1, whatever the batch."""
    one, other = models.build("tiny_unet"), models.build("tiny_unet", batch_norm="group").eval()
    assert len(models.norm_keys(one)) == 5 * sum(isinstance(m, models.NORMS) for m in one.modules()) > 0
    assert not models.norm_keys(other)
    assert models.num_parameters(one) == models.num_parameters(other)
    groups = [module for module in other.modules() if isinstance(module, nn.GroupNorm)]
    assert len(groups) == sum(isinstance(module, models.NORMS) for module in one.modules())
    assert {norm.num_channels // norm.num_groups for norm in groups} == {8}

    def activations(model: nn.Module) -> int:
        return sum(isinstance(module, nn.Hardswish | nn.ReLU) for module in model.modules())

    assert activations(one) == activations(other) > 0
    x = torch.randn(2, groups[0].num_channels, 4, 4)
    found = groups[0](x).view(2, groups[0].num_groups, -1)
    torch.testing.assert_close(found.mean(-1), torch.zeros(found.shape[:2]), atol=1e-5, rtol=0)
    torch.testing.assert_close(found.var(-1, correction=0), torch.ones(found.shape[:2]), atol=1e-3, rtol=0)
    images = torch.rand(2, 1, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(other(images)[:1], other(images[:1]), atol=1e-5, rtol=1e-4)


def test_weights_that_are_no_norms_do_not_depend_on_the_norm():
    one, other = (
        models.build("tiny_unet", seed=2, batch_norm=norm).state_dict() for norm in ("local", "group")
    )
    same = [name for name, value in one.items() if value.ndim == 4]
    assert same and all(torch.equal(one[name], other[name]) for name in same)


def test_batchnorms_part_of_a_state_is_named():
    model = nn.Sequential(
        nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.Sequential(nn.BatchNorm2d(2, affine=False))
    )
    counts = {"running_mean", "running_var", "num_batches_tracked"}
    expected = {f"1.{key}" for key in counts | {"weight", "bias"}} | {f"2.0.{key}" for key in counts}
    assert models.norm_keys(model) == expected


def test_an_unknown_student_is_named_with_the_known_ones():
    with pytest.raises(UserError, match=r"'mobile-unet' is unknown: choose one of tiny_unet, mobile_unet"):
        models.build("mobile-unet")


def test_parameters_bytes_and_flops_of_a_small_network_by_hand():
    """A 3 x 3 convolution from 2 to 4 channels with bias, then BatchNorm, on a 5 x 6 image.

    Parameters: 4 * 2 * 3 * 3 weights + 4 biases + 4 scales + 4 shifts = 84. Buffers: 4 means, 4 variances,
    one int64 count. Bytes: (84 + 8) * 4 + 8 = 376. A value that the convolution gives takes 2 * 3 * 3
    multiplications and as many additions: 4 * 5 * 6 * 18 * 2 = 4,320 (bias and BatchNorm are not counted).
    """
    model = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4))
    assert models.num_parameters(model) == 84
    assert models.num_bytes(model.state_dict()) == 376
    assert models.flops(model, torch.zeros(1, 2, 5, 6)) == 4320
    assert models.flops(model, torch.zeros(3, 2, 5, 6)) == 3 * 4320


def test_bytes_follow_the_dtype():
    assert (
        models.num_bytes({"a": torch.zeros(10, dtype=torch.float16), "b": torch.zeros((), dtype=int)}) == 28
    )


def test_counting_flops_changes_nothing():
    model = models.build("tiny_unet")
    before = models.copy_state(model)
    models.flops(model, torch.ones(2, 1, 32, 32))
    assert model.training, "it is left in the mode in which it was"
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_copied_state_does_not_follow_the_model():
    model = nn.Linear(2, 1)
    copied = models.copy_state(model)
    kept = copied["weight"].clone()
    with torch.no_grad():
        model.weight.add_(1)
    assert torch.equal(copied["weight"], kept)
    assert not copied["weight"].requires_grad


def test_a_loaded_state_is_what_pytorch_would_load_and_a_copy_of_its_own():
    state = models.copy_state(models.build("tiny_unet", seed=1))
    state = {key: value + 3 if value.ndim == 0 else value.contiguous() for key, value in state.items()}
    model, other = models.build("tiny_unet"), models.build("tiny_unet")
    strides = [parameter.stride() for parameter in model.parameters()]
    models.load_state(model, state)
    other.load_state_dict(state)
    assert all(torch.equal(value, other.state_dict()[key]) for key, value in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert strides == [parameter.stride() for parameter in model.parameters()], "channels stay last"
    with torch.no_grad():
        next(model.parameters()).zero_()
    assert next(iter(state.values())).any(), "the state does not follow the model"


@pytest.mark.parametrize(
    "state", [{}, {"weight": torch.ones(1, 2)}, {"weight": torch.ones(1), "bias": torch.ones(1)}]
)
def test_a_state_of_another_model_is_refused(state):
    """(1, 2) would take a weight of shape (1,) by broadcasting, and nobody would see it."""
    model = nn.Linear(2, 1)
    with pytest.raises(RuntimeError, match="in loading state_dict"):
        models.load_state(model, state)


@pytest.mark.slow
def test_students_are_ordered_by_size_and_the_papers_is_the_largest():
    sizes = [models.num_parameters(models.build(name)) for name in models.STUDENTS]
    assert sizes == sorted(sizes)
    assert 30_900_000 < sizes[-1] < 31_300_000, "the U-Net of 2015 has 31 million parameters"


# ------------------------------------------------------------------------------------------ given weights


def test_an_imagenet_encoder_sees_grey_as_the_same_grey_in_three_colours(tmp_path):
    """torchvision's own network is the oracle, with made weights; what names its classes is left out."""
    torch.manual_seed(0)
    published = torchvision.models.resnet18(weights=None).eval()
    torch.save(published.state_dict(), tmp_path / "resnet18.pth")
    model = models.build("resnet18_unet").eval()
    decoder = {k: v.clone() for k, v in model.state_dict().items() if not k.startswith("encoder.")}
    models.load_weights(model, tmp_path / "resnet18.pth", encoder_only=True)
    grey = torch.rand(2, 1, 64, 64)
    with torch.no_grad():
        _, first, *_, last = model.encoder(grey)
        x = published.relu(published.bn1(published.conv1(grey.expand(-1, 3, -1, -1))))
        torch.testing.assert_close(first, x, atol=1e-5, rtol=1e-4)
        x = published.maxpool(x)
        for layer in (published.layer1, published.layer2, published.layer3, published.layer4):
            x = layer(x)
        torch.testing.assert_close(last, x, atol=1e-4, rtol=1e-3)
    assert all(torch.equal(model.state_dict()[k], v) for k, v in decoder.items())


def test_a_mobile_students_encoder_takes_its_librarys_names(tmp_path):
    """As published: without the prefix, for three colours, with a head that a student has no use for."""
    prefix, other = "encoder.model.", models.build("mobile_unet", seed=9).state_dict()
    published = {k.removeprefix(prefix): v for k, v in other.items() if k.startswith(prefix)}
    published["conv_stem.weight"] = published["conv_stem.weight"].repeat(1, 3, 1, 1) / 3
    save_file(published | {"classifier.weight": torch.zeros(3, 4)}, tmp_path / "mobilenet.safetensors")
    model = models.build("mobile_unet", seed=5)
    models.load_weights(model, tmp_path / "mobilenet.safetensors", encoder_only=True)
    for key, value in model.state_dict().items():
        if key.startswith(prefix):
            torch.testing.assert_close(value, other[key])


def test_a_students_own_weights_come_back_bit_by_bit(tmp_path):
    other = models.build("tiny_unet", seed=3).state_dict()
    states.write_state(tmp_path / "any.safetensors", other)
    model = models.build("tiny_unet", seed=0)
    models.load_weights(model, tmp_path / "any.safetensors")
    assert states.state_digest(model.state_dict()) == states.state_digest(other)


def test_weights_that_do_not_fit_are_one_sentence(tmp_path):
    state = {k: v.contiguous() for k, v in models.build("tiny_unet").state_dict().items()}
    key = next(iter(state))
    cases = {
        "missing": {k: v for k, v in state.items() if k != key},
        "unexpected": state | {"more": torch.zeros(1)},
        "of another shape": state | {key: torch.zeros(7)},
    }
    for name, wrong in cases.items():
        file = tmp_path / f"{name}.safetensors"
        save_file(wrong, file)
        with pytest.raises(UserError, match=name) as caught:
            models.load_weights(models.build("tiny_unet"), file)
        assert str(file) in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(UserError, match="are not there"):
        models.load_weights(models.build("tiny_unet"), tmp_path / "nowhere.pth")
    with pytest.raises(UserError, match="no published encoder"):
        models.load_weights(models.build("unet"), tmp_path / "missing.safetensors", encoder_only=True)


def test_the_parameter_lists_the_students():
    assert config.PARAMETERS["student"].meaning == f"network: {', '.join(models.STUDENTS)}"

"""Students: the small U-Nets that clients train and exchange, by name, and their size."""

import math
import threading
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fmfl.errors import UserError
from fmfl.states import State
from fmfl.unet import UNet

# The model libraries are imported where a model is built: they take seconds, which a notebook that only
# looks at data or results need not wait for.


def _smp_unet(encoder: str, decoder_channels: tuple[int, ...]) -> nn.Module:
    import segmentation_models_pytorch as smp

    model = smp.Unet(
        encoder, encoder_weights=None, in_channels=1, classes=1, decoder_channels=decoder_channels
    )
    for block in model.decoder.blocks:
        block.__class__ = _decoder_block()
    return model


@cache
def _decoder_block() -> type[nn.Module]:
    """Return the library's decoder block, but one that enlarges in the precision that it is given.

    Autocast enlarges in float32, although copying numbers needs no precision.
    """
    from segmentation_models_pytorch.decoders.unet.decoder import UnetDecoderBlock

    class DecoderBlock(UnetDecoderBlock):
        def forward(self, features: Tensor, height: int, width: int, skip_connection: Tensor | None = None):
            with torch.autocast(features.device.type, enabled=False):
                features = F.interpolate(features, size=(height, width), mode=self.interpolation_mode)
            if skip_connection is not None:
                features = torch.cat((features, skip_connection), dim=1)
            return self.conv2(self.conv1(features))

    return DecoderBlock


#: `unet` is the paper's; `mobile_unet` (1.7 M parameters) is the default that two cores can train.
STUDENTS: dict[str, Callable[[], nn.Module]] = {
    # Thin decoders: at full resolution a wide one costs more than the whole encoder.
    "tiny_unet": lambda: _smp_unet("tu-mobilenetv3_small_050", (48, 32, 16, 16, 8)),
    "mobile_unet": lambda: _smp_unet("tu-mobilenetv3_small_100", (96, 48, 32, 16, 8)),
    "resnet18_unet": lambda: _smp_unet("resnet18", (256, 128, 64, 32, 16)),
    "resnet34_unet": lambda: _smp_unet("resnet34", (256, 128, 64, 32, 16)),
    "unet": UNet,
}


_building = threading.Lock()


def build(
    name: str, *, seed: int = 0, device: str | torch.device = "cpu", batch_norm: str = "average"
) -> nn.Module:
    """Build a student with random weights that depend on `seed` alone.

    Args:
        name: one of `STUDENTS`.
        seed: of the initial weights; the global random state is left as it was.
        device: where the model is put, its convolutions in channels-last order.
        batch_norm: `group` puts GroupNorm in BatchNorm's place; other choices are for the rounds.

    Returns:
        A module from [B, 1, H, W] float in 0..1 to [B, 1, H, W] logits; H and W divisible by 32
        (by 16 for `unet`).

    Raises:
        UserError: the name is unknown.
    """
    if name not in STUDENTS:
        raise UserError(f"student {name!r} is unknown: choose one of {', '.join(STUDENTS)}")
    # The lock, because models may be built in several threads and the seeded random state is everybody's.
    with _building, torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = STUDENTS[name]()
    if batch_norm == "group":
        _group_norms(model)
    return model.to(device, memory_format=torch.channels_last)


def load_weights(model: nn.Module, file: str | Path, *, encoder_only: bool = False) -> None:
    """Give a student the weights in a file: all of them, or those of its encoder.

    An encoder published for images of three colours is given grey ones: the sum over the colours in its first
    convolution is what it would have made of the same grey in all three. What it has besides, such as the
    layer that names ImageNet's classes, is left out; what is missing or of another shape is an error.

    Args:
        model: a student.
        file: bare tensors by name, in PyTorch's format or safetensors (see `checkpoints.read`).
        encoder_only: the file holds the encoder's weights under its library's names.

    Raises:
        UserError: there is no such file, or it does not fit.
    """
    from fmfl.teachers import checkpoints

    if not Path(file).is_file():
        raise UserError(f"the start's weights {file} are not there: name an existing file")
    given, own = checkpoints.read(file), model.state_dict()
    wanted = own
    if encoder_only:
        prefixes = [p for p in ("encoder.model.", "encoder.") if any(key.startswith(p) for key in own)]
        if not prefixes:
            raise UserError("the student has no published encoder: choose mobile_unet or resnet18_unet")
        wanted = {key: value for key, value in own.items() if key.startswith(prefixes[0])}
        given = {prefixes[0] + key: value for key, value in given.items() if prefixes[0] + key in wanted}
        for key, value in given.items():
            if value.ndim == 4 and value.shape[1] == 3 and wanted[key].shape[1] == 1:
                given[key] = value.sum(1, keepdim=True)
    if problems := checkpoints.differences(given, wanted):
        raise UserError(f"{file} does not fit the student: {problems}")
    checkpoints.usable(Path(file), given, wanted)
    model.load_state_dict(own | {key: value.to(own[key]) for key, value in given.items()})


@torch.no_grad()
def smallest_batch(model: nn.Module, size: int) -> int:
    """Return the images that a training step needs at this size: 2 where a BatchNorm sees one pixel, else 1.

    BatchNorm needs two values of each channel to have a variance.
    """
    pixels: list[int] = []
    hooks = [
        norm.register_forward_pre_hook(lambda norm, inputs: pixels.append(inputs[0][0, 0].numel()))
        for norm in model.modules()
        if isinstance(norm, NORMS)
    ]
    training, device = model.training, next(model.parameters()).device
    model.eval()(torch.zeros(1, 1, size, size, device=device))
    model.train(training)
    for hook in hooks:
        hook.remove()
    return 2 if 1 in pixels else 1


#: Base class of every kind of BatchNorm.
NORMS = nn.modules.batchnorm._BatchNorm


def _group_norms(model: nn.Module, channels_a_group: int = 8) -> None:
    """Put GroupNorm (Wu & He 2018, arXiv 1803.08494) in place of each BatchNorm.

    A fixed number of channels a group, not of groups: in a thin layer, 32 groups would leave a channel alone.
    A layer that is more than BatchNorm, such as timm's with its activation, keeps the rest.
    """
    for parent in list(model.modules()):
        for name, norm in list(parent.named_children()):
            if isinstance(norm, NORMS):
                channels = norm.num_features
                groups = channels // math.gcd(channels, channels_a_group)
                group = nn.GroupNorm(groups, channels, eps=norm.eps)
                rest = list(norm.children())
                setattr(parent, name, nn.Sequential(group, *rest) if rest else group)


def norm_keys(model: nn.Module) -> set[str]:
    """Name all BatchNorm tensors of a state: weights, biases, running statistics, counts."""
    return {
        f"{name}.{key}"
        for name, norm in model.named_modules()
        if isinstance(norm, NORMS)
        for key in norm.state_dict()
    }


def copy_state(model: nn.Module) -> State:
    """Copy the model's state: later training does not change the copy."""
    return {key: value.detach().clone() for key, value in model.state_dict().items()}


@torch.no_grad()
def load_state(model: nn.Module, state: State) -> None:
    """Load a state like `model.load_state_dict`, at a quarter of the cost that every client pays in a round.

    Raises:
        RuntimeError: names or shapes differ, as PyTorch says it.
    """
    own = model.state_dict()
    if own.keys() != state.keys() or any(own[key].shape != value.shape for key, value in state.items()):
        model.load_state_dict(state)
        return
    for floating in (True, False):  # one launch each on a GPU, where a launch a tensor would be hundreds
        keys = [key for key, value in own.items() if value.is_floating_point() == floating]
        if keys:
            torch._foreach_copy_([own[key] for key in keys], [state[key] for key in keys])


def flat(state: State, names: Iterable[str]) -> Tensor:
    """Join some tensors of a state into one float32 vector of its own."""
    return torch.cat([state[name].flatten().float() for name in names])


def num_parameters(model: nn.Module) -> int:
    """Count the trained numbers of the model."""
    return sum(parameter.numel() for parameter in model.parameters())


def num_bytes(state: State) -> int:
    """Count the bytes of a state on the wire, uncompressed."""
    return sum(value.numel() * value.element_size() for value in state.values())


def flops(model: nn.Module, *inputs: Tensor) -> int:
    """Count the floating point operations of one forward pass, a multiply-add as two."""
    from torch.utils.flop_counter import FlopCounterMode

    training = model.training
    model.eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(*inputs)
    model.train(training)
    return counter.get_total_flops()

"""The U-Net of Ronneberger, Fischer & Brox 2015 (arXiv 1505.04597), padded and with BatchNorm.

Its convolutions are padded, so that the mask has the image's size, and each is followed by BatchNorm and
ReLU; the rest is the paper's. Nothing in it leaves the order of memory (channels last) or the precision that
it is given: no padding by a general function, no copy, no detour through float32.
"""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

#: Channels from the top to the bottom, as in Fig. 1 of the paper.
CHANNELS = (64, 128, 256, 512, 1024)


def two_convolutions(inputs: int, outputs: int) -> nn.Sequential:
    """Return two 3 x 3 convolutions, each with BatchNorm, which makes their biases redundant, and ReLU."""
    layers: list[nn.Module] = []
    for channels in (inputs, outputs):
        layers += [nn.Conv2d(channels, outputs, 3, padding=1, bias=False)]
        layers += [nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


class UNet(nn.Module):
    """A contracting path, an expanding path, and a connection across at each resolution.

    Args:
        channels: at each resolution, the first being the image's; each level halves its sides.
    """

    def __init__(self, channels: Sequence[int] = CHANNELS) -> None:
        super().__init__()
        pairs = list(itertools.pairwise(channels))
        self.stem = two_convolutions(1, channels[0])
        self.down = nn.ModuleList([two_convolutions(above, below) for above, below in pairs])
        self.pool = nn.MaxPool2d(2)
        self.enlarge = nn.ModuleList(
            [nn.ConvTranspose2d(below, above, 2, stride=2) for above, below in pairs]
        )
        self.up = nn.ModuleList([two_convolutions(2 * above, above) for above, _ in pairs])
        self.head = nn.Conv2d(channels[0], 1, 1)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):  # variance 2 / N, section 3 of the paper
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        """Return logits [B, 1, H, W] for images [B, 1, H, W]; H and W are divisible by 2^levels."""
        features = self.stem(images)
        across = []
        for block in self.down:
            across.append(features)
            features = block(self.pool(features))
        for enlarge, block in zip(reversed(self.enlarge), reversed(self.up), strict=True):
            features = block(torch.cat((across.pop(), enlarge(features)), dim=1))
        return self.head(features)

"""Why a start helps, or does not: the ground between the clients' models, and how sharp a start's own is.

Two questions of the work on pre-trained starts (Nguyen et al. 2023, arXiv 2210.08090; Chen et al. 2023, arXiv
2206.11488), asked on a batch of images that stays the same. BatchNorm takes the batch's own statistics, since
a model between two others has none that belong to it (Jordan et al. 2023, arXiv 2211.08403). How far the
clients go and how much they agree is measured while they train: `federate.Drift`.
"""

import copy
import math
from collections.abc import Iterable
from dataclasses import replace
from itertools import combinations
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from fmfl import augment, federate, parallel, train
from fmfl.data import Cohort
from fmfl.federate import Server
from fmfl.states import State
from fmfl.train import Loss


def line(one: State, other: State, share: float) -> State:
    """The state at (1 - share) one + share other; integer buffers are the first one's."""
    return {
        name: torch.lerp(value, other[name], share) if value.is_floating_point() else value
        for name, value in one.items()
    }


@torch.no_grad()
def losses_between(
    model: nn.Module, one: State, other: State, images: Tensor, masks: Tensor, *, points: int = 11
) -> list[float]:
    """The Dice loss along the straight line between two models.

    Args:
        model: takes the states in turn and is left with the last one.
        one, other: its states.
        images: [B, 1, H, W] float in 0..1, on the model's device.
        masks: [B, 1, H, W] of 0 and 1.
        points: places on the line, both ends included.
    """
    found = []
    for share in torch.linspace(0, 1, points).tolist():
        model.load_state_dict(line(one, other, share))
        model.train()  # the batch's own statistics
        found.append(float(train.LOSSES["dice"](model(images), masks, None)))
    return found


def barrier(along: Iterable[float]) -> float:
    """How far the loss on a line rises above the straight line between its ends; 0 where it does not.

    max over s of  L(s) - [(1 - s) L(0) + s L(1)]            (Frankle et al. 2020, arXiv 1912.05671)
    """
    heights = torch.tensor(list(along), dtype=torch.float64)
    return float((heights - torch.linspace(heights[0], heights[-1], len(heights), dtype=torch.float64)).max())


def sharpness(
    model: nn.Module,
    images: Tensor,
    masks: Tensor,
    *,
    loss: Loss = train.LOSSES["dice"],
    steps: int = 10,
    tolerance: float = 5e-2,
    reach: float = 1e-2,
    seed: int = 0,
) -> float:
    """The Hessian's eigenvalue of largest size at a model, by power iteration.

    A product with the Hessian is the change of the gradient along the direction, by a central difference: not
    every activation of the students has a second derivative in PyTorch.

    Args:
        model: as it is; its weights stay.
        images: [B, 1, H, W] float in 0..1, on the model's device.
        masks: [B, 1, H, W] of 0 and 1.
        loss: of logits and masks.
        steps: products at most.
        tolerance: it ends once the eigenvalue changes by less than this share.
        reach: length of the two steps of the difference.
        seed: of the first direction.
    """
    model.train()
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    here = [weight.detach().clone() for weight in weights]

    def gradient(direction: list[Tensor], length: float) -> list[Tensor]:
        with torch.no_grad():
            for weight, start, way in zip(weights, here, direction, strict=True):
                weight.copy_(start + length * way)
        return list(torch.autograd.grad(loss(model(images), masks, None), weights))

    rng = torch.Generator().manual_seed(seed)
    direction = _unit([torch.randn(weight.shape, generator=rng).to(weight) for weight in weights])
    found = float("nan")
    try:
        for _ in range(steps):
            ahead, behind = gradient(direction, reach), gradient(direction, -reach)
            product = [(a - b) / (2 * reach) for a, b in zip(ahead, behind, strict=True)]
            before, found = found, float(sum((a * b).sum() for a, b in zip(product, direction, strict=True)))
            if abs(found - before) <= tolerance * abs(found):
                break
            direction = _unit(product)
    finally:
        with torch.no_grad():
            for weight, start in zip(weights, here, strict=True):
                weight.copy_(start)
    return found


def _unit(vector: list[Tensor]) -> list[Tensor]:
    norm = torch.stack([part.square().sum() for part in vector]).sum().sqrt().clamp_min(1e-30)
    return [part / norm for part in vector]


def of_starts(
    servers: Iterable[Server], cohort: Cohort, *, images: int = 16, clients: int = 6
) -> pd.DataFrame:
    """Each federated run's start, and the ground between the clients' models after the first round.

    Clients train their first round again; the runs stay as they are.

    Args:
        servers: the runs; those of other arms are passed over.
        cohort: their images.
        images: of the clients' own, evenly taken, that the losses are measured on.
        clients: at most, evenly taken: all of their pairs are looked at.

    Returns:
        One row a run: init; sharpness at the start; barrier between two clients' models, in units of the Dice
        loss (mean over pairs; NaN with one client).
    """
    runs = [server for server in servers if server.arm == "federated"]
    trained = []  # each run's clients beside each other, as in its own first round
    for server in runs:
        fresh = replace(server, state=server.initial, round_number=0, kept={}, drift=federate.Drift())
        asked = list(server.clients)[:: math.ceil(len(server.clients) / clients)]
        trained.append([state for state, _ in federate.train_clients(fresh, asked)])

    def look(at: tuple[Server, list[State]]) -> dict[str, Any]:
        server, ends = at
        held = torch.cat([examples.indices for examples in server.clients.values()]).sort().values
        some = held[torch.linspace(0, len(held) - 1, min(images, len(held))).long()]
        x = augment.to_float(train.fetch(cohort.images, some, cohort.device))
        y = train.fetch(cohort.masks, some, cohort.device).float()
        model = copy.deepcopy(server.model)
        lines = [losses_between(model, one, other, x, y, points=5) for one, other in combinations(ends, 2)]
        model.load_state_dict(server.initial)
        return {
            "init": server.init,
            "sharpness": sharpness(model, x, y),
            "barrier": float(pd.Series([barrier(along) for along in lines], dtype=float).mean()),
        }

    zipped = zip(runs, trained, strict=True)
    return pd.DataFrame(parallel.side_by_side(look, zipped, cohort.device))

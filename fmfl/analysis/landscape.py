"""Drift of the clients' updates, loss barriers between their models, and sharpness of an initial state.

Two questions of the work on pre-trained starts (Nguyen et al. 2023, arXiv 2210.08090; Chen et al. 2023, arXiv
2206.11488). Barriers and sharpness are measured on a batch of images that stays the same. BatchNorm takes the
batch's own statistics, since a model between two others has none that belong to it (Jordan et al. 2023, arXiv
2211.08403). Drift is measured while clients train: `watched` looks at a round from outside.
"""

import copy
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import combinations
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from fmfl import augment, federate, models, parallel, runs, train
from fmfl.data import Cohort
from fmfl.federate import ClientUpdate
from fmfl.runs import Run
from fmfl.states import State
from fmfl.train import Loss

#: Measures of a federated round's updates, see `Drift`, and the global state's distance from the initial one.
DRIFT = ("update_norm", "update_cosine", "update_diversity", "distance_from_start")


class Drift:
    """Distance of a round's clients from the global state, and their agreement.

    Sums alone are kept, so memory does not grow with the clients. With client k's update d_k (of the trained
    weights), its unit vector u_k and its weight w_k in the average, over K clients:

        update_norm       mean of ||d_k||
        update_cosine     mean over pairs of cos(d_j, d_k) = (||sum u_k||^2 - K) / (K (K - 1))
        update_diversity  mean of ||d_k||^2 over ||mean of d_k||^2, weighted by w_k: 1 where all agree, K
                          where all are orthogonal, of one length and weight (gradient diversity: Yin et al.
                          2018, arXiv 1706.05699)

    An update that is not finite does not count.

    Args:
        theta: the global state that the round began with.
        names: of the trained weights.
    """

    def __init__(self, theta: State, names: Iterable[str]) -> None:
        self.names = list(names)
        self.before = models.flat(theta, self.names)
        self.mean, self.units = torch.zeros_like(self.before), torch.zeros_like(self.before)
        self.clients = self.weight = self.norms = self.squares = 0.0

    def add(self, state: State, weight: float) -> None:
        """Add a client's state; the device is not waited for."""
        update = models.flat(state, self.names).sub_(self.before)
        norm = torch.linalg.vector_norm(update)
        counts = norm.isfinite().to(norm.dtype)
        update, norm = update.nan_to_num_(0, 0, 0).mul_(counts), norm.nan_to_num(0, 0, 0)
        self.clients += counts
        self.weight += weight * counts
        self.norms += norm
        self.squares += weight * norm**2
        self.mean.add_(update, alpha=weight)
        self.units.add_(update.div_(norm.clamp_min(1e-30)))

    def measures(self) -> dict[str, float | None]:
        """Return the three by name; None with fewer than two clients, or where no weight has moved."""
        k = float(self.clients)
        if k < 2 or float(self.norms) == 0:
            return dict.fromkeys(("update_norm", "update_cosine", "update_diversity"))
        mean = (torch.linalg.vector_norm(self.mean) / self.weight) ** 2
        cosine = (torch.linalg.vector_norm(self.units) ** 2 - k) / (k * (k - 1))
        return {
            "update_norm": float(self.norms / k),
            "update_cosine": float(cosine),
            "update_diversity": float(self.squares / self.weight / mean) if mean > 0 else None,
        }


def watched(train_round: Callable[[Run], Iterable[ClientUpdate]]) -> Callable[[Run], Iterable[ClientUpdate]]:
    """Measure the drift of each federated round that an engine trains; its updates pass through unchanged.

    The measures go into the round's record, see `Run.measures`.
    """

    def observed(run: Run) -> Iterator[ClientUpdate]:
        if run.arm != "federated":
            yield from train_round(run)
            return
        drift = Drift(run.theta, federate.trained_keys(run.model, run.cfg))
        for update in train_round(run):
            drift.add(update.state, update.num_examples)
            yield update
            del update  # else it would be held while the next client trains
        run.measures = drift.measures()

    return observed


def drift_by_round(finished: Iterable[Run]) -> pd.DataFrame:
    """Return drift.csv: the measures of DRIFT, one row a federated round from 1 on."""
    rows = [
        {"init": run.init, "split": run.split, "seed": run.cfg.seed, "round": number}
        | {name: done.get(name) for name in DRIFT}
        for run in finished
        if run.arm == "federated"
        for number, done in enumerate(run.rounds[1:], 1)
    ]
    return pd.DataFrame(rows, columns=["init", "split", "seed", "round", *DRIFT]).astype(
        dict.fromkeys(DRIFT, float)
    )


def interpolate(one: State, other: State, share: float) -> State:
    """Return the state (1 - share) one + share other; integer buffers are the first one's."""
    return {
        name: torch.lerp(value, other[name], share) if value.is_floating_point() else value
        for name, value in one.items()
    }


@torch.no_grad()
def losses_between(
    model: nn.Module, one: State, other: State, images: Tensor, masks: Tensor, *, points: int = 11
) -> list[float]:
    """Return the Dice loss along the straight line between two models.

    Args:
        model: takes the states in turn and is left with the last one.
        one, other: its states.
        images: [B, 1, H, W] float in 0..1, on the model's device.
        masks: [B, 1, H, W] of 0 and 1.
        points: places on the line, both ends included.
    """
    found = []
    for share in torch.linspace(0, 1, points).tolist():
        model.load_state_dict(interpolate(one, other, share))
        model.train()  # the batch's own statistics
        found.append(float(train.LOSSES["dice"](model(images), masks, None)))
    return found


def barrier(along: Iterable[float]) -> float:
    """Return the rise of the loss on a line above the straight line between its ends; 0 without one.

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
    """Return the Hessian's eigenvalue of largest size at a model, by power iteration.

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


def of_starts(begun: Iterable[Run], cohort: Cohort, *, images: int = 16, clients: int = 6) -> pd.DataFrame:
    """Measure each federated run's initial state, and the barriers between clients after the first round.

    Clients train their first round again; the runs stay as they are.

    Args:
        begun: the runs; those of other arms are left out.
        cohort: their images.
        images: of the clients' own, evenly taken, that the losses are measured on.
        clients: at most, evenly taken: all of their pairs are looked at.

    Returns:
        One row a run: init; sharpness at the initial state; barrier between two clients' models, in units of
        the Dice loss (mean over pairs; NaN with one client).
    """
    chosen_runs = [run for run in begun if run.arm == "federated"]
    trained = []  # each run's clients beside each other, as in its own first round
    for run in chosen_runs:
        fresh = replace(run, theta=run.initial, round_number=0, memory={})
        chosen = list(run.clients)[:: math.ceil(len(run.clients) / clients)]
        trained.append([update.state for update in runs.train_clients(fresh, chosen)])

    def measure(at: tuple[Run, list[State]]) -> dict[str, Any]:
        run, ends = at
        stored = torch.cat([examples.indices for examples in run.clients.values()]).sort().values
        rows = stored[torch.linspace(0, len(stored) - 1, min(images, len(stored))).long()]
        x = augment.to_float(train.fetch(cohort.images, rows, cohort.device))
        y = train.fetch(cohort.masks, rows, cohort.device).float()
        model = copy.deepcopy(run.model)
        lines = [losses_between(model, *pair, x, y, points=5) for pair in combinations(ends, 2)]
        model.load_state_dict(run.initial)
        return {
            "init": run.init,
            "sharpness": sharpness(model, x, y),
            "barrier": float(pd.Series([barrier(along) for along in lines], dtype=float).mean()),
        }

    return pd.DataFrame(parallel.side_by_side(measure, zip(chosen_runs, trained, strict=True), cohort.device))

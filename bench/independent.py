"""The study's rounds in a second hand: a plain loop that imports nothing of `fmfl.train` or `fmfl.federate`.

It takes the images, the parts, the augmentation and the networks from the package, and writes out what the
package's own loop does with them: Eq. 2 (local training with Adam), Eq. 3 (the average weighted by images),
Eq. 5 (the starts) and the score. `python -m bench independent` holds its rounds against a committed study's.
Experiments that need a fault on purpose stand on this loop (`bench/collapse.py`), so that the package never
offers the fault as a setting.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from bench import measure
from fmfl import augment, data, losses, models, prompts, split, teacher
from fmfl.data import Cohort
from fmfl.split import Holdout

PROXY, POOLED = 2**32 - 1, 2**32 - 2  # stand for a client's number in the random keys of fmfl
BATCH_SIZE = 8

State = dict[str, Tensor]


@dataclass(frozen=True)
class Setting:
    """One experiment's images and who holds them.

    Attributes:
        cohort: all images.
        parts: proxy, test and federated indices.
        clients: (K) index tensors.
        logits: [n, 1, H, W] the teacher's, of the proxy images.
    """

    cohort: Cohort
    parts: Holdout
    clients: list[Tensor]
    logits: Tensor


def load(
    sources: str, *, scheme: str = "age", seed: int = 0, federated: int = 1000, size: int = 96
) -> Setting:
    """The images of docs/results/v7-cpu, dealt as there."""
    cohort = data.load(sources, size=size, progress=False)
    parts = split.holdout(cohort.table, 0, federated=federated)
    clients = split.partition(cohort.table, parts.federated, scheme, 3, seed)
    masks = cohort.masks[parts.proxy]
    boxes = prompts.prompt(masks, "ground_truth", per_image="per_lung")
    asked = teacher.cached_logits(teacher.load("builtin"), cohort.images[parts.proxy], boxes, progress=False)
    return Setting(cohort, parts, clients, asked.logits)


def generator(*key: int) -> torch.Generator:
    """Random numbers named by whole numbers, drawn as in the package."""
    words = np.random.SeedSequence(key).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(words[0] >> np.uint64(1)))


class Client:
    """One client's network and its Adam."""

    def __init__(self, model: nn.Module, state: State, learning_rate: float) -> None:
        self.model = model
        self.model.load_state_dict(state)
        self.optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate, fused=True)

    def train(
        self,
        cohort: Cohort,
        indices: Tensor,
        key: tuple[int, ...],
        *,
        epochs: int = 1,
        alpha: float = 0.0,
        logits: Tensor | None = None,
    ) -> State:
        """Eq. 2 with the Dice loss, or Eq. 5 where there is a teacher.

        Args:
            indices: [n] int64, the client's images.
            key: (seed, client, round); an epoch adds its number.
            logits: [n, 1, H, W] the teacher's.
        """
        self.model.train()
        for epoch in range(epochs):
            rng = generator(*key, epoch)
            order = torch.randperm(len(indices), generator=rng)
            draws = augment.draw(len(indices), rng)
            steps = -(-len(indices) // BATCH_SIZE)
            for rows, drawn in zip(order.tensor_split(steps), draws.tensor_split(steps), strict=True):
                chosen = indices[rows]
                answer = None if logits is None else logits[rows].float()
                images, masks, answer = augment.apply(
                    cohort.images[chosen], cohort.masks[chosen], drawn, answer
                )
                out = self.model(images.contiguous(memory_format=torch.channels_last))
                loss = (
                    losses.dice_loss(out, masks)
                    if answer is None
                    else losses.distillation_loss(out, answer, masks, alpha)
                )
                self.optimizer.zero_grad()
                loss.backward()
                self.optimizer.step()
        return {name: value.detach().clone() for name, value in self.model.state_dict().items()}


def average(states: list[State], images: list[int]) -> State:
    """Eq. 3 over the whole state: floating tensors weighted by images, counts from the first client."""
    mean = dict(states[0])
    for name, value in mean.items():
        if value.is_floating_point():
            total = sum(n * state[name].double() for state, n in zip(states, images, strict=True))
            mean[name] = (total / sum(images)).to(value.dtype)
    return mean


@torch.inference_mode()
def dice_by_image(model: nn.Module, state: State, cohort: Cohort, indices: Tensor) -> np.ndarray:
    """Dice of the thresholded mask, one value an image: 2 |P and Y| / (|P| + |Y|)."""
    model.load_state_dict(state)
    model.eval()
    found = []
    for rows in indices.split(16):
        images = (cohort.images[rows].float() / 255).contiguous(memory_format=torch.channels_last)
        predicted, truth = model(images) > 0, cohort.masks[rows] > 0
        shared = (predicted & truth).flatten(1).sum(1)
        total = predicted.flatten(1).sum(1) + truth.flatten(1).sum(1)
        found.append(torch.where(total == 0, 1.0, 2 * shared / total))
    return torch.cat(found).numpy()


def initial_state(
    name: str,
    setting: Setting,
    *,
    student: str = "tiny_unet",
    seed: int = 0,
    epochs: int = 8,
    learning_rate: float = 1e-3,
    batch_norm: str = "average",
) -> State:
    """The start `random`, `pretraining` or `fm` (Eq. 5 with alpha 0.6), from the same random weights."""
    model = models.build(student, seed=seed, batch_norm=batch_norm)
    client = Client(model, model.state_dict(), learning_rate)
    logits, alpha = (setting.logits, 0.6) if name == "fm" else (None, 0.0)
    passes = 0 if name == "random" else epochs
    key = (seed, PROXY)
    return client.train(setting.cohort, setting.parts.proxy, key, epochs=passes, alpha=alpha, logits=logits)


def federated_rounds(
    setting: Setting,
    theta: State,
    *,
    student: str = "tiny_unet",
    seed: int = 0,
    learning_rate: float = 1e-3,
    batch_norm: str = "average",
    rounds: int = 10,
) -> Iterator[tuple[State, list[State]]]:
    """Federated averaging with a new Adam a round and one local epoch.

    Yields:
        After each round the global state and the clients' states.
    """
    for number in range(1, rounds + 1):
        states = []
        for k, indices in enumerate(setting.clients):
            client = Client(models.build(student, batch_norm=batch_norm), theta, learning_rate)
            states.append(client.train(setting.cohort, indices, (seed, k, number)))
        theta = average(states, [len(indices) for indices in setting.clients])
        yield theta, states


def alone_rounds(
    setting: Setting,
    theta: State,
    indices: Tensor,
    number: int,
    *,
    student: str = "tiny_unet",
    seed: int = 0,
    learning_rate: float = 1e-3,
    batch_norm: str = "average",
    rounds: int = 10,
) -> Iterator[State]:
    """One client that goes on with its own Adam: the standalone arm, and with all images the centralised one.

    Yields:
        The state after each epoch.
    """
    client = Client(models.build(student, batch_norm=batch_norm), theta, learning_rate)
    for epoch in range(1, rounds + 1):
        yield client.train(setting.cohort, indices, (seed, number, epoch))


def run(
    sources: str = "v7_covid,v7_guangzhou",
    against: Path = Path("docs/results/v7-cpu/results.csv"),
    inits: str = "random,fm",
    rounds: int = 10,
    out: Path | None = None,
) -> None:
    """Mean Dice by round beside a committed study's: age skew, seed 0, 96², tiny_unet, 1,000 images."""
    settings: dict[str, Any] = {"against": str(against), "inits": inits, "rounds": rounds}
    torch.set_num_threads(1)
    setting = load(sources)
    committed = pd.read_csv(against).query("arm == 'federated' and split == 'age' and seed == 0")
    judge, rows = models.build("tiny_unet"), []
    for init in inits.split(","):
        theta = initial_state(init, setting)
        states = [theta, *(state for state, _ in federated_rounds(setting, theta, rounds=rounds))]
        theirs = committed[committed.init == init].set_index("round").dice
        for number, state in enumerate(states):
            dice = float(dice_by_image(judge, state, setting.cohort, setting.parts.test).mean())
            row = {"init": init, "round": number, "independent": dice, "study": theirs.loc[number]}
            rows.append(row | {"apart": abs(dice - theirs.loc[number])})
    found = {"largest difference": max(row["apart"] for row in rows)}
    measure.report("independent", settings, rows, found, out)

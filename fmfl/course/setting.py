"""Setting of the exercises: a few synthetic X-rays at three hospitals, and a small student."""

from dataclasses import dataclass

import torch
from torch import nn

from fmfl import data, federate, metrics, models, seeds, split, train
from fmfl.config import FederateConfig
from fmfl.data import Cohort
from fmfl.split import Holdout
from fmfl.states import State
from fmfl.train import Examples

#: The smallest student: a round of the exercises takes a second or two.
STUDENT = "tiny_unet"


@dataclass(frozen=True)
class Setting:
    """Images, who holds them, and the network that is trained.

    Attributes:
        cohort: all images.
        parts: proxy, test and federated indices.
        clients: an index tensor for each hospital.
        model: a student to train in; its weights are replaced all the time.
        random: the student's random weights, the same for everybody.
        cfg: of the local training.
    """

    cohort: Cohort
    parts: Holdout
    clients: list[torch.Tensor]
    model: nn.Module
    random: State
    cfg: FederateConfig


def load(scheme: str = "age", *, num_phantoms: int = 160, size: int = 64, batch_size: int = 4) -> Setting:
    """Make the synthetic X-rays, and deal them to a proxy set, a test set and three hospitals.

    Args:
        scheme: `iid`, `age` or `quantity`; see `fmfl.split.partition`.
        num_phantoms: synthetic X-rays.
        size: pixels a side.
        batch_size: images a step.
    """
    cohort = data.load("phantom", size=size, num_phantoms=num_phantoms)
    parts = split.holdout(cohort.table, proxy=0.3, test=0.2)
    clients = split.partition(cohort.table, parts.federated, scheme)
    model = models.build(STUDENT)
    cfg = FederateConfig(split=scheme, batch_size=batch_size)
    return Setting(cohort, parts, clients, model, models.copy_state(model), cfg)


def examples(setting: Setting, indices: torch.Tensor, teacher_logits: torch.Tensor | None = None) -> Examples:
    """Return images with their masks, and the teacher's logits where there are some, to train on."""
    return Examples(setting.cohort.images, setting.cohort.masks, indices, teacher_logits)


def updates(setting: Setting, theta: State, round_number: int) -> list[tuple[State, int]]:
    """Do Eq. 2 at every hospital: train from the global state, return states and numbers of images."""
    results = [
        federate.train_client(
            setting.model, theta, examples(setting, indices), setting.cfg, key=(0, client, round_number)
        )
        for client, indices in enumerate(setting.clients)
    ]
    return [(result.state, result.num_examples) for result in results]


def trained(
    setting: Setting, loss: train.Loss, epochs: int, teacher_logits: torch.Tensor | None = None
) -> State:
    """Train the student on the proxy set, from its random weights.

    Args:
        setting: with the proxy set.
        loss: see `fmfl.train.Loss`.
        epochs: passes of the proxy set.
        teacher_logits: [n, 1, H, W] of the proxy images.
    """
    models.load_state(setting.model, setting.random)
    train.fit(
        setting.model,
        examples(setting, setting.parts.proxy, teacher_logits),
        loss,
        epochs=epochs,
        batch_size=setting.cfg.batch_size,
        optimizer=train.adam(setting.model, setting.cfg.learning_rate),
        key=(0, seeds.PROXY),
    )
    return models.copy_state(setting.model)


def dice(setting: Setting, theta: State) -> float:
    """Return the mean Dice of a state on the test images, in per cent."""
    models.load_state(setting.model, theta)
    test = setting.parts.test
    logits = train.predict(setting.model, setting.cohort.images, test)
    return 100 * metrics.dice(logits > 0, setting.cohort.masks[test]).mean().item()

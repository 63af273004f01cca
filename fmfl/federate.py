"""Federated averaging (McMahan et al. 2017, arXiv 1602.05629): Eq. 2 at a client, Eq. 3 at the server.

The round loop itself stands in `notebooks/04_federate.ipynb`; its steps stand here, and `runs` keeps their
results. Centralised training is the same loop with one client that holds everything, standalone training is
the loop with one real client, so the arms differ in nothing but who averages with whom.
"""

import warnings
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fmfl import models, train
from fmfl.config import FederateConfig
from fmfl.states import State
from fmfl.train import Examples, FitResult, Loss


class ClientUpdate(NamedTuple):
    """Result of one client's local training in one round.

    Attributes:
        state: the client's weights and buffers, theta_k in Eq. 3.
        num_examples: its weight in the average, n_k in Eq. 3: images, or 1 where all clients weigh alike.
        fit: losses, images and seconds of the training.
        memory: tensors that the client keeps for its next round: Adam's moments under `adam/`, its own
            BatchNorm under `norm/`. Empty where it keeps nothing.
    """

    state: State
    num_examples: int
    fit: FitResult
    memory: State


def train_client(
    model: nn.Module,
    theta: State,
    examples: Examples,
    cfg: FederateConfig,
    *,
    key: tuple[int, int, int],
    memory: State | None = None,
    precision: str = "float32",
    loss: Loss | None = None,
) -> ClientUpdate:
    """Eq. 2: train from the global state for E local epochs on a client's own images.

        theta_k = argmin of the loss on D_k, begun at theta

    E epochs of Adam stand in for the argmin.

    Order and augmentation depend on the key and the epoch alone, so a client sees the same batches from every
    initial state: the arms are paired.

    Args:
        model: a student to train in; its weights are replaced.
        theta: the global state.
        examples: the client's n_k images.
        cfg: local epochs, batch size, learning rate, loss, and what a client keeps between rounds.
        key: (seed, client, round), the round counted from 1.
        memory: of this client's last update; None or empty in its first round.
        precision: see `devices.autocast`.
        loss: instead of the one that `cfg` names, as Eq. 5 for a teacher that stays in the rounds.
    """
    memory = memory or {}
    models.load_state(model, theta | _part(memory, "norm/"))
    optimizer = train.adam(model, cfg.learning_rate)
    if moments := _part(memory, "adam/"):
        load_moments(optimizer, moments)
    loss = loss or train.LOSSES[cfg.loss]
    fit = train.fit(
        model,
        examples,
        train.proximal(loss, model, cfg.proximal) if cfg.proximal else loss,
        epochs=cfg.local_epochs,
        batch_size=cfg.batch_size,
        optimizer=optimizer,
        key=key,
        augmentation=cfg.augmentation,
        precision=precision,
    )
    state = models.copy_state(model)
    weight = len(examples) if cfg.client_weights == "images" else 1
    return ClientUpdate(state, weight, fit, _memory(model, state, optimizer, cfg, memory))


def _memory(
    model: nn.Module, state: State, optimizer: torch.optim.Optimizer, cfg: FederateConfig, before: State
) -> State:
    """Collect what a client keeps for its next round; nothing that is not finite, which would spoil it."""
    memory: State = {}
    if cfg.optimizer_state == "keep":
        moments = moments_of(optimizer)
        memory |= {f"adam/{path}": value for path, value in moments.items()} if is_finite(moments) else {}
    if own := local_keys(model, cfg):
        norm = {name: state[name] for name in own} if is_finite(state) else _part(before, "norm/")
        memory |= {f"norm/{name}": value for name, value in norm.items()}
    return memory


def _part(memory: State, prefix: str) -> State:
    return {name.removeprefix(prefix): value for name, value in memory.items() if name.startswith(prefix)}


def local_keys(model: nn.Module, cfg: FederateConfig) -> set[str]:
    """Name the tensors that belong to each client: BatchNorm's under FedBN, else none."""
    return models.norm_keys(model) if cfg.batch_norm == "local" else set()


def trained_keys(model: nn.Module, cfg: FederateConfig) -> list[str]:
    """Name the weights that clients train and share."""
    own = local_keys(model, cfg)
    return [name for name, _ in model.named_parameters() if name not in own]


def aggregate(updates: Iterable[tuple[State, int] | ClientUpdate]) -> State:
    """Eq. 3: the average of the clients' states, weighted by the images that each holds.

        theta = sum_k (n_k / n) theta_k,    n = sum_k n_k

    Every floating tensor is averaged, BatchNorm's running mean and variance included: left out, the global
    model would be scored with statistics that belong to none of its weights. Integer buffers (BatchNorm's
    count of batches) come from the first client. The sum runs in float64 and in the order given, so memory
    does not grow with the clients, the same clients give the same bytes, and one client gives its own state
    bit by bit.

    A client whose state holds a NaN or an infinity is left out of the round with a warning.

    Args:
        updates: `ClientUpdate`s, or pairs of (state, number of images). A generator is consumed one client
            at a time: a state is let go before the next one is asked for.

    Returns:
        The averaged state, each tensor in its own dtype.

    Raises:
        ValueError: a client's names or shapes differ from the first one's, or it has no image.
        RuntimeError: no client is left to average.
    """
    sums: State = {}
    kept: State = {}
    number, averaged, total = -1, 0, 0
    # Not enumerate(): it would hold the last client's state while the next client trains.
    for update in updates:
        number += 1
        state, num_examples = update[:2]
        del update
        if num_examples <= 0:
            raise ValueError(f"update {number} comes from {num_examples} images: a client needs at least one")
        if not is_finite(state):
            warnings.warn(f"update {number} is not finite and is left out of this round", stacklevel=2)
            del state
            continue
        if not kept:
            kept = {key: value.clone() for key, value in state.items()}
            sums = {
                key: torch.zeros_like(value, dtype=torch.float64)
                for key, value in state.items()
                if value.is_floating_point()
            }
        if {k: v.shape for k, v in state.items()} != {k: v.shape for k, v in kept.items()}:
            raise ValueError(f"update {number} has other tensors than the first: all clients need one model")
        for key, running in sums.items():
            running.add_(state[key].to(running.device, torch.float64), alpha=num_examples)
        averaged += 1
        total += num_examples
        del state
    if averaged == 0:
        raise RuntimeError("no client gave a finite update, so there is nothing to average")
    if averaged == 1:  # n x / n is not x to the last bit in every dtype
        return kept
    return kept | {key: (running / total).to(kept[key].dtype) for key, running in sums.items()}


def is_finite(state: State) -> bool:
    """Tell if no floating tensor holds a NaN or an infinity; the device is waited for once.

    Either one spoils a sum, and float64 has room for any sum of float32: one pass and no copy take a quarter
    of the time that a look at every number takes.
    """
    sums = [value.sum(dtype=torch.float64) for value in state.values() if value.is_floating_point()]
    return not sums or bool(torch.stack(sums).isfinite().all())


def server_step(
    state: State, average: State, names: Iterable[str], cfg: FederateConfig, moments: State
) -> tuple[State, State]:
    """Update the global state: `average` replaces it; `momentum` and `adam` take a step towards the average.

    The difference between state and average serves as a gradient (Reddi et al. 2021, arXiv 2003.00295):

        momentum    v <- beta v + (theta - average),   theta <- theta - lr v       FedAvgM, arXiv 1909.06335
        adam        Adam's step with that gradient                                 FedAdam

    Adam is PyTorch's, which corrects the first rounds for moments that begin at 0; FedAdam's does not. Only
    the weights in `names` take a step. All other tensors, BatchNorm's running statistics among them, are
    the average: they follow the data, and an optimizer could make a variance negative.

    Args:
        state: the global state of the last round.
        average: from `aggregate`.
        names: of the trained weights.
        moments: from the last round's step; empty before the first.

    Returns:
        The new global state, and the optimizer's moments.
    """
    if cfg.server == "average":
        return average, {}
    weights = {name: state[name].clone() for name in names}
    for name, weight in weights.items():
        weight.grad = weight - average[name]
    rate = cfg.server_learning_rate or {"momentum": 1.0, "adam": 0.01}[cfg.server]
    if cfg.server == "momentum":
        optimizer = torch.optim.SGD(weights.values(), lr=rate, momentum=cfg.server_momentum)
    else:
        betas = (cfg.server_momentum, cfg.server_beta2)
        optimizer = torch.optim.Adam(weights.values(), lr=rate, betas=betas, eps=cfg.server_epsilon)
    if moments:
        load_moments(optimizer, moments)
    optimizer.step()
    return average | {name: weight.detach() for name, weight in weights.items()}, moments_of(optimizer)


def moments_of(optimizer: torch.optim.Optimizer) -> State:
    """Return Adam's step counts and moments, to be kept between rounds and in checkpoints."""
    state = optimizer.state_dict()["state"]
    return {f"{index}/{name}": value.clone() for index, held in state.items() for name, value in held.items()}


@torch.no_grad()
def load_moments(optimizer: torch.optim.Optimizer, moments: State) -> None:
    """Give an optimizer the moments that `moments_of` has taken from one of the same weights.

    Moments that it has already are overwritten in place: recorded steps hold their memory.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for path, value in moments.items():
        index, name = path.split("/")
        parameter = parameters[int(index)]
        if name in optimizer.state.get(parameter, {}):
            optimizer.state[parameter][name].copy_(value)
            continue
        # Fused Adam on a CPU reads memory in the order in which it lies: moments from a checkpoint (row by
        # row) have to be laid out as their parameter is (channels last), or they go to other weights.
        like = parameter.detach() if value.shape == parameter.shape else value
        state.setdefault(int(index), {})[name] = torch.empty_like(like, dtype=value.dtype).copy_(value)
    if state:
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": state, "param_groups": groups})

"""Federated averaging (McMahan et al. 2017, arXiv 1602.05629): Eq. 2 at a client, Eq. 3 at the server.

The round loop itself stands in `notebooks/04_federate.ipynb`; its steps stand here. Centralised training is
the same loop with one client that holds everything, standalone training is the loop with one real client, so
the arms differ in nothing but who averages with whom.
"""

import contextlib
import copy
import itertools
import json
import os
import warnings
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor, nn

from fmfl import metrics, models, parallel, seeds, train
from fmfl.config import FederateConfig
from fmfl.data import Cohort
from fmfl.distill import InitialState
from fmfl.errors import UserError, first_few
from fmfl.seeds import POOLED, SAMPLING
from fmfl.states import (
    TRAINING_CODE,
    State,
    code_digest,
    fingerprint,
    previous,
    read_record,
    read_state,
    state_digest,
    write_state,
)
from fmfl.train import Examples, FitResult

KEPT = "kept/"
"""Begins the names of the tensors in a checkpoint that are not the model's: see `Server.kept`."""


def aggregate(updates: Iterable[tuple[State, int]]) -> State:
    """Eq. 3: the average of the clients' states, weighted by how many images each holds.

        theta = sum_k (n_k / n) theta_k,    n = sum_k n_k

    Every floating tensor is averaged, BatchNorm's running mean and variance included: left out, the global
    model would be scored with statistics that belong to none of its weights. Integer buffers (BatchNorm's
    count of batches) come from the first client. The sum runs in float64 and in the order given, so memory
    does not grow with the clients, the same clients give the same bytes, and one client gives its own state
    bit by bit.

    A client whose state holds a NaN or an infinity is left out of the round with a warning.

    Args:
        updates: pairs of (state, number of images). A generator is consumed one client at a time: a state is
            let go before the next one is asked for.

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
    for state, num_examples in updates:
        number += 1
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
    """Whether no floating tensor holds a NaN or an infinity; the device is waited for once.

    Either makes a sum what it is itself, or NaN, and float64 has room for any sum of float32: one pass and
    no copy, a quarter of the time that asking every number takes.
    """
    sums = [value.sum(dtype=torch.float64) for value in state.values() if value.is_floating_point()]
    return not sums or bool(torch.stack(sums).isfinite().all())


def server_step(
    state: State, average: State, names: Iterable[str], cfg: FederateConfig, moments: State
) -> tuple[State, State]:
    """What the server makes of Eq. 3's average: `average` takes it; the others step towards it.

    The way from the average to the old state is taken for a gradient (Reddi et al. 2021, arXiv 2003.00295):

        momentum    v <- beta v + (theta - average),   theta <- theta - lr v       FedAvgM, arXiv 1909.06335
        adam        Adam's step with that gradient                                 FedAdam

    Adam is PyTorch's, which corrects the first rounds for moments that begin at 0; FedAdam's does not. Only
    the weights in `names` take a step. All other tensors, BatchNorm's running statistics among them, are
    the average: they follow the data, and an optimizer could make a variance negative.

    Args:
        state: the global state of the last round.
        average: from `aggregate`.
        names: of the trained weights.
        moments: what the last round's step gave; empty before the first.

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
        _load_moments(optimizer, moments)
    optimizer.step()
    return average | {name: weight.detach() for name, weight in weights.items()}, _moments(optimizer)


def _flat(state: State, names: Iterable[str]) -> Tensor:
    """Some tensors' numbers as one float32 vector of its own."""
    return torch.cat([state[name].flatten().float() for name in names])


class Drift:
    """How far a round's clients went from the global state, and how much they agree.

    Sums alone are kept, so memory does not grow with the clients. With client k's update d_k (of the trained
    weights), its unit vector u_k and its weight w_k in the average, over K clients:

        update_norm       mean of ||d_k||
        update_cosine     mean over pairs of cos(d_j, d_k) = (||sum u_k||^2 - K) / (K (K - 1))
        update_diversity  mean of ||d_k||^2 over ||mean of d_k||^2, weighted by w_k: 1 where all agree, K
                          where all are orthogonal, of one length and weight (gradient diversity: Yin et al.
                          2018, arXiv 1706.05699)

    An update that is not finite does not count.
    """

    def __init__(self) -> None:
        self.clients = self.weight = self.norms = self.squares = 0.0
        self.before: Tensor | None = None

    def add(self, before: State, after: State, names: Iterable[str], weight: float) -> None:
        """A client's update of the weights in `names`; the device is not waited for.

        Args:
            before: the same for all clients; it is looked at once.
        """
        names = list(names)
        if self.before is None:
            self.before = _flat(before, names)
            self.mean, self.units = torch.zeros_like(self.before), torch.zeros_like(self.before)
        update = _flat(after, names).sub_(self.before)
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
        """The three by name; None where there are not two clients, or where nobody has moved."""
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


def clients_of(cohort: Cohort, parts: Iterable[Tensor]) -> dict[int, Examples]:
    """Client numbers and their images, from `split.partition`."""
    return {k: _examples(cohort, indices) for k, indices in enumerate(parts)}


def pooled(cohort: Cohort, indices: Tensor) -> dict[int, Examples]:
    """The centralised arm's one client, which holds every federated image."""
    return {POOLED: _examples(cohort, indices)}


def _examples(cohort: Cohort, indices: Tensor) -> Examples:
    return Examples(cohort.images, cohort.masks, indices, device=cohort.device)


@dataclass(frozen=True)
class Traffic:
    """What went between the server and its clients in one round, measured by an engine that sends messages.

    Attributes:
        clients: those whose updates go into the average.
        bytes_up: from the clients, those left out included.
        bytes_down: to the clients.
        faults: client to what was wrong with it, for those that were asked or expected in vain.
    """

    clients: list[int]
    bytes_up: int
    bytes_down: int
    faults: dict[int, str]


@dataclass
class Server:
    """One run over its rounds: the global state, what was measured, and the file it continues from.

    Attributes:
        arm: federated, centralised or standalone.
        init: name of the initial state.
        split: name of the partition; `pooled` for the centralised arm.
        client: the standalone client's number; -1 for a global model.
        clients: number to images of those who train.
        model: the one resident student; clients' states are loaded into it in turn.
        state: the global state after the last finished round.
        round_number: the last finished round; 0 before any.
        history: one row a scored round.
        bytes_up, bytes_down: from and to all clients so far.
        rounds: of each round, from 0: SHA-256 of the global state, the clients that took part, the faults of
            others where there were any, and in the federated arm `Drift`'s measures and the global
            state's distance from the initial one.
        initial: the state before any round.
        drift: of the clients that have trained in the round to come.
        kept: what is kept between rounds besides the state: `adam-{client}`, a client's moments;
            `norm-{client}`, its own BatchNorm; `server`, the moments of the server's optimizer.
        file: the checkpoint, and at the end the final weights.
        made_of: all that the run's bytes depend on, by name; `fingerprint` is its short name.
        exchange: of the round to be finished, where an engine has measured it; else it is reckoned.
        replicas: of the model, and `spread`, the clients' images, where several devices train side by side.
    """

    arm: str
    init: str
    split: str
    client: int
    clients: Mapping[int, Examples]
    cfg: FederateConfig
    precision: str
    model: nn.Module
    state: State
    file: Path
    fingerprint: str
    made_of: dict = field(default_factory=dict)
    round_number: int = 0
    seconds: float = 0.0
    images_seen: int = 0
    bytes_up: int = 0
    bytes_down: int = 0
    history: list[dict] = field(default_factory=list)
    rounds: list[dict] = field(default_factory=list)
    initial: State = field(default_factory=dict)
    drift: Drift = field(default_factory=Drift)
    kept: dict[str, State] = field(default_factory=dict)
    exchange: Traffic | None = None
    replicas: dict[int, nn.Module] = field(default_factory=dict)
    spread: dict[int, Examples] = field(default_factory=dict)

    @classmethod
    def start_or_resume(
        cls,
        run_dir: Path,
        initial: InitialState,
        clients: Mapping[int, Examples],
        cfg: FederateConfig,
        *,
        student: str,
        cohort: Cohort,
        test: Tensor,
        arm: str = "federated",
        precision: str = "float32",
        engine: object = "local",
        move_aside: bool = True,
    ) -> "Server":
        """A server at the round where the same run stopped, or before the first one.

        What makes a run the same one is the initial state's bytes, the cohort, who holds which images, the
        test images and every setting; with anything else changed it starts anew. The rounds of another run
        are never deleted: see `aside`.

        Args:
            run_dir: the study's folder; the checkpoint is `weights/{arm}-{split}-{init}-seed{seed}...`.
            initial: where it begins, and what that has cost.
            clients: see `clients_of` and `pooled`.
            test: [n] int64, the images it is scored on.
            engine: what brings the clients' updates, and all of its settings that a result depends on.
            move_aside: False refuses a file that holds another run, instead of moving it.

        Raises:
            UserError: the file holds another run, and it is not to be moved.
        """
        split = "pooled" if arm == "centralised" else cfg.split
        client = next(iter(clients)) if arm == "standalone" else -1
        cfg = own_settings(cfg, arm)
        made_of = {
            "settings": {"arm": arm, "student": student, "precision": precision} | run_settings(cfg, arm),
            "code": code_digest((*TRAINING_CODE, "metrics.py")),
            "data": cohort.fingerprint,
            "start": state_digest(initial.state),
            "clients": fingerprint({k: examples.indices.tolist() for k, examples in clients.items()}),
            "test images": fingerprint(test.tolist()),
            "deterministic": torch.are_deterministic_algorithms_enabled(),
            "engine": engine if arm == "federated" else "local",
        }
        suffix = f"-client{client}" if arm == "standalone" else ""
        file = run_dir / "weights" / f"{arm}-{split}-{initial.name}-seed{cfg.seed}{suffix}.safetensors"
        server = cls(
            arm=arm,
            init=initial.name,
            split=split,
            client=client,
            clients=clients,
            cfg=cfg,
            precision=precision,
            model=models.build(student, device=cohort.device, batch_norm=cfg.batch_norm),
            state=initial.state,
            initial=initial.state,
            file=file,
            fingerprint=fingerprint(made_of),
            made_of=made_of,
            seconds=initial.fitted.seconds,
            images_seen=initial.fitted.images_seen,
        )
        if not move_aside:
            _refuse_other(file, made_of)
        if (stored := _last_checkpoint(file, made_of, cohort.device)) is not None:
            tensors, record = stored
            server.state = {k: v for k, v in tensors.items() if not k.startswith(KEPT)}
            for name, value in tensors.items():
                if name.startswith(KEPT):
                    whose, rest = name.removeprefix(KEPT).split("/", 1)
                    server.kept.setdefault(whose, {})[rest] = value
            for name in STORED:
                setattr(server, name, record[name])
        else:
            server.rounds.append({"sha256": state_digest(server.state), "clients": []})
            server.score(cohort, test)
        return server

    def remaining_rounds(self) -> Iterator[int]:
        """The numbers of the rounds still to do, each begun when the one before it is finished."""
        while self.round_number < self.cfg.num_rounds and not parallel.interrupted.is_set():
            yield self.round_number + 1

    def participants(self) -> list[int]:
        """The clients of the round to come, in their order: a fraction C of all, at least one.

        They depend on (seed, round) alone, so all starts meet the same ones.
        """
        number = max(1, round(self.cfg.participation * len(self.clients)))
        if number == len(self.clients):
            return list(self.clients)
        rng = seeds.generator(self.cfg.seed, SAMPLING, self.round_number + 1)
        chosen = torch.randperm(len(self.clients), generator=rng)[:number].sort().values
        return [list(self.clients)[place] for place in chosen.tolist()]

    def examples_at(self, number: int, device: torch.device) -> Examples:
        """A client's images for training on a device, brought there once if they are not."""
        examples = self.clients[number]
        if device == examples.device:
            return examples
        if number not in self.spread:
            own = (stored[examples.indices].to(device) for stored in (examples.images, examples.masks))
            self.spread[number] = Examples(*own, torch.arange(len(examples), device=device))
        return self.spread[number]

    @property
    def own_keys(self) -> set[str]:
        """What of a state belongs to each client: BatchNorm's tensors under FedBN, else nothing."""
        return models.norm_keys(self.model) if self.cfg.batch_norm == "local" else set()

    def finish_round(self, average: State, cohort: Cohort, test: Tensor) -> None:
        """Take the server's step to the round's average, score where a score is due, write the checkpoint.

        Under FedBN the average of the clients' BatchNorm goes into the state too: the global model is scored
        with it, and a client begins its first round with it. Later rounds begin with the client's own.
        """
        exchange, self.exchange = self.exchange or self._reckoned(average), None
        moments, trained = self.kept.pop("server", {}), self.trained_keys
        self.state, self.kept["server"] = server_step(self.state, average, trained, self.cfg, moments)
        self.round_number += 1
        done = {"sha256": state_digest(self.state), "clients": exchange.clients}
        faults = {"faults": exchange.faults} if exchange.faults else {}
        self.rounds.append(done | faults | self._moved())
        self.bytes_up += exchange.bytes_up
        self.bytes_down += exchange.bytes_down
        last = self.round_number == self.cfg.num_rounds
        if last or self.round_number % self.cfg.score_every == 0:
            self.score(cohort, test)
        # The last file is a result: the model alone, and none before it.
        kept = {} if last else self.kept
        flat = {f"{KEPT}{whose}/{name}": v for whose, held in kept.items() for name, v in held.items()}
        write_state(
            self.file,
            self.state | flat,
            keep_previous=not last,
            fingerprint=self.fingerprint,
            made_of=self.made_of,
            arm=self.arm,
            init=self.init,
            split=self.split,
            client=self.client,
            seed=self.cfg.seed,
            **{name: getattr(self, name) for name in STORED},
        )

    def _reckoned(self, average: State) -> Traffic:
        """The exchange where all is one process: each client gets and gives all but its own part."""
        clients, own = self.participants(), self.own_keys
        sent = {name: value for name, value in average.items() if name not in own}
        each_way = len(clients) * models.num_bytes(sent) if self.arm == "federated" else 0
        return Traffic(clients, each_way, each_way, {})

    @property
    def trained_keys(self) -> list[str]:
        """The names of the weights that clients train and share."""
        own = self.own_keys
        return [name for name, _ in self.model.named_parameters() if name not in own]

    def _moved(self) -> dict[str, float | None]:
        """What `rounds` says of a federated round's way; nothing in the other arms."""
        found, self.drift = self.drift.measures(), Drift()
        if self.arm != "federated":
            return {}
        away = Drift()
        away.add(self.initial, self.state, self.trained_keys, 1)
        return found | {"distance_from_start": float(away.norms)}

    def scores(self, cohort: Cohort, test: Tensor) -> pd.DataFrame:
        """The global state's scores, one row a test image; see `metrics.score`."""
        self.model.load_state_dict(self.state)
        logits = train.predict(self.model, cohort.images, test, precision=self.precision)
        return metrics.score(logits.sigmoid(), cohort.masks[test])

    def score(self, cohort: Cohort, test: Tensor) -> None:
        """Add the current round's row to the history."""
        means = self.scores(cohort, test)[["dice", "iou", "hd95"]].mean()
        self.history.append(
            {
                "arm": self.arm,
                "init": self.init,
                "split": self.split,
                "seed": self.cfg.seed,
                "round": self.round_number,
                **{name: float(value) for name, value in means.items()},
                "seconds": self.seconds,
                "bytes_up": self.bytes_up,
                "bytes_down": self.bytes_down,
                "images_seen": self.images_seen,
            }
        )

    def per_image(self, cohort: Cohort, test: Tensor) -> pd.DataFrame:
        """The current state's scores by image, with who and what the image is."""
        rows = test.tolist()
        about = cohort.table.iloc[rows][["image_id", "patient_id", "site", "age"]].reset_index(drop=True)
        key = {
            "arm": self.arm,
            "init": self.init,
            "split": self.split,
            "seed": self.cfg.seed,
            "client": self.client,
        }
        return pd.concat([about.assign(**key)[[*key, *about]], self.scores(cohort, test)], axis=1)


#: What a checkpoint's record holds of a run, besides what names it.
STORED = ("round_number", "seconds", "images_seen", "bytes_up", "bytes_down", "history", "rounds")

#: Settings that the centralised arm does not depend on: one run serves all splits.
PARTITION_SETTINGS = ("split", "age_strength", "quantity_ratio", "dirichlet_concentration", "num_clients")

#: Settings that the federated arm alone depends on, besides FedBN.
FEDERATED_SETTINGS = (
    *("proximal", "participation", "client_weights", "server"),
    *("server_learning_rate", "server_momentum", "server_beta2", "server_epsilon"),
)


def own_settings(cfg: FederateConfig, arm: str) -> FederateConfig:
    """Take from the settings what an arm has no use for: a server's or federation's choices are its alone.

    A stateless client begins each round with a new Adam; where no server comes in between, as in the
    centralised and standalone arms, resetting it would only be a handicap.
    """
    if arm == "federated":
        return cfg
    plain = FederateConfig()
    cfg = replace(cfg, optimizer_state="keep", **{k: getattr(plain, k) for k in FEDERATED_SETTINGS})
    # FedBN's own BatchNorm is what there is anyway with one client.
    return replace(cfg, batch_norm="average") if cfg.batch_norm == "local" else cfg


def run_settings(cfg: FederateConfig, arm: str) -> dict[str, object]:
    """The settings of `own_settings` that an arm's run depends on, by name."""
    # Who holds which images is told by the clients themselves.
    left_out = ("arms", "inits", "images_without_age", *(PARTITION_SETTINGS if arm == "centralised" else ()))
    return {name: value for name, value in asdict(own_settings(cfg, arm)).items() if name not in left_out}


def unlike(record: Mapping, made_of: Mapping) -> list[str]:
    """Name what differs between a checkpoint's record and another run, each difference in a few words."""
    there = record.get("made_of")
    if not isinstance(there, dict):
        return ["an older version of fmfl wrote it"]
    there, here = ({**one.get("settings", {}), **one} for one in (there, made_of))
    # As JSON gives them back.
    here = json.loads(json.dumps(here, default=str))
    found = []
    for name in sorted({*there, *here} - {"settings"}):
        one, other = there.get(name), here.get(name)
        if one != other:
            found.append(IDENTITIES.get(name, f"{name} {one}, now {other}"))
    return found


#: What `Server.made_of` holds as digests, which say nothing to a reader, and words for another one.
IDENTITIES = {
    "code": "other code",
    "data": "other images",
    "start": "other weights to begin with",
    "clients": "other images at the clients",
    "test images": "other test images",
    "engine": "another engine",
}


def aside(file: Path, record: Mapping) -> Path:
    """Name the file that keeps another run's checkpoint: in `aside/`, with 8 characters of its fingerprint.

    It stays a file of safetensors. No table or manifest takes it for a result, but a run of its very
    fingerprint goes on from it.
    """
    return file.parent / "aside" / f"{file.stem}.{str(record.get('fingerprint', ''))[:8]}{file.suffix}"


def _others(file: Path, made_of: Mapping) -> list[tuple[Path, dict]]:
    """The whole checkpoints of other runs under a run's name, each with its record, the newest first."""
    key, found = fingerprint(made_of), []
    for place in (file, previous(file)):
        record = read_record(place)
        other = record.get("fingerprint") != key and read_state(place) is not None
        # The one before it adds nothing to a newer one of the same run.
        if other and record.get("fingerprint") not in {of.get("fingerprint") for _, of in found}:
            found.append((place, record))
    return found


def _refuse_other(file: Path, made_of: Mapping) -> None:
    for place, record in _others(file, made_of):
        raise UserError(
            f"{place} holds {record.get('round_number', 0)} rounds made with other settings, test images or "
            f"version of fmfl ({first_few(unlike(record, made_of))}): name another folder with --out, "
            "or the same settings to go on"
        )


def _move_aside(place: Path, file: Path, record: Mapping, why: list[str]) -> None:
    """Move the checkpoint of another run out of the way of this one, over no other file."""
    kept = first = aside(file, record)
    for number in itertools.count(1):
        if not kept.exists():
            break
        kept = first.with_name(f"{first.stem}.{number}{first.suffix}")
    kept.parent.mkdir(exist_ok=True)
    os.replace(place, kept)
    warnings.warn(
        f"{file} held {record.get('round_number', 0)} rounds of another run ({first_few(why)}): "
        f"they are kept in {kept}",
        stacklevel=4,
    )


def _last_checkpoint(file: Path, made_of: Mapping, device: torch.device) -> tuple[State, dict] | None:
    """The newest whole checkpoint of a run, or None; a damaged one gives way to the one before it.

    The rounds of other runs under the same name are moved aside, and those of this one come back from there.
    """
    key = fingerprint(made_of)
    if (newest := read_state(file, fingerprint=key, device=device)) is not None:
        return newest
    for place, record in _others(file, made_of):
        _move_aside(place, file, record, unlike(record, made_of))
    kept = aside(file, {"fingerprint": key})
    places = [previous(file), *kept.parent.glob(f"{kept.stem}*{kept.suffix}")]
    for place in sorted(places, key=lambda one: -read_record(one).get("round_number", 0)):
        if (before := read_state(place, fingerprint=key, device=device)) is not None:
            if file.exists():
                warnings.warn(
                    f"{file} is damaged: the run continues from the checkpoint before it", stacklevel=3
                )
            os.replace(place, file)  # else the next round would keep the damaged one
            return before
    if file.exists():
        warnings.warn(f"{file} is damaged: the run begins anew", stacklevel=3)
    return None


def train_client(server: Server, number: int) -> tuple[State, int]:
    """Eq. 2: one client's local training of this round, begun from the global state.

    The random order and augmentation depend on (seed, client, round, epoch) alone, so a client sees the same
    batches whatever the initial state: the arms are paired.

    Returns:
        The client's state and its weight in the average: how many images it holds, or 1.
    """
    return _received(server, number, *_trained(server, number, server.model, server.clients[number]))


def train_clients(
    server: Server, numbers: Iterable[int], devices: Sequence[torch.device] | None = None
) -> Iterator[tuple[State, int]]:
    """Eq. 2 of several clients, in their order: `train_client` of each, with the same bytes.

    With several devices the clients train side by side: client k on device k mod n, where its images are
    brought once. At most two states a device wait for the average, so memory does not grow with the clients.

    Args:
        devices: where to train; None: on a CPU one place a core (none to spare where the runs of a study
            share the cores already), else every GPU that PyTorch sees.
    """
    numbers = list(numbers)
    home = next(server.model.parameters()).device
    places = list(devices or parallel.places(home))[: len(numbers)]
    if len(places) < 2:
        with parallel.one_thread(home):  # as side by side, so that the bytes do not depend on the cores
            for number in numbers:
                yield train_client(server, number)
        return
    models_at = {0: server.model} | {
        place: server.replicas.setdefault(place, copy.deepcopy(server.model).to(device))
        for place, device in enumerate(places)
        if place
    }

    def task(number: int, place: int) -> tuple[State, FitResult, State]:
        return _trained(server, number, models_at[place], server.examples_at(number, places[place]), home)

    # Where images are moved, a client stays where its own are; the cores of one memory take turns.
    moved = len(set(places)) > 1
    with parallel.one_thread(home), contextlib.ExitStack() as stack:
        pools = [stack.enter_context(ThreadPoolExecutor(1)) for _ in places]
        waiting: deque[tuple[int, Future]] = deque()
        try:
            for turn, number in enumerate(numbers):
                place = (number if moved else turn) % len(places)
                waiting.append((number, pools[place].submit(task, number, place)))
                if len(waiting) == 2 * len(places):
                    first, future = waiting.popleft()
                    yield _received(server, first, *future.result())
                    del future  # and the state with it
            while waiting:
                first, future = waiting.popleft()
                yield _received(server, first, *future.result())
                del future
        except BaseException:  # Ctrl-C, and a round that is given up
            for _, future in waiting:
                future.cancel()
            raise


def _trained(
    server: Server, number: int, model: nn.Module, examples: Examples, home: torch.device | None = None
) -> tuple[State, FitResult, State]:
    """A client's local training, which changes nothing but the model; see `train_client`.

    Args:
        home: where the results are wanted; None: where they are.

    Returns:
        The client's state, what training it has cost, and its Adam's moments where they are kept.
    """
    cfg = server.cfg
    models.load_state(model, server.state | server.kept.get(f"norm-{number}", {}))
    optimizer = train.adam(model, cfg.learning_rate)
    if f"adam-{number}" in server.kept:
        _load_moments(optimizer, server.kept[f"adam-{number}"])
    loss = train.LOSSES[cfg.loss]
    fitted = train.fit(
        model,
        examples,
        train.proximal(loss, model, cfg.proximal) if cfg.proximal else loss,
        epochs=cfg.local_epochs,
        batch_size=cfg.batch_size,
        optimizer=optimizer,
        key=(cfg.seed, number, server.round_number + 1),
        augmentation=cfg.augmentation,
        precision=server.precision,
    )
    moments = _moments(optimizer) if cfg.optimizer_state == "keep" else {}
    state = models.copy_state(model)
    if home is not None:
        state, moments = ({k: v.to(home) for k, v in part.items()} for part in (state, moments))
    return state, fitted, moments


def _received(
    server: Server, number: int, state: State, fitted: FitResult, moments: State
) -> tuple[State, int]:
    """Enter a client's training in the server's books; returns its state and its weight in the average."""
    adam, cfg = f"adam-{number}", server.cfg
    if cfg.optimizer_state == "keep":
        # After a round that came to NaN or infinity the client begins with a new Adam: moments that are not
        # finite would spoil all its later rounds too.
        if is_finite(moments):
            server.kept[adam] = moments
        else:
            server.kept.pop(adam, None)
    if (own := server.own_keys) and is_finite(state):
        server.kept[f"norm-{number}"] = {name: state[name] for name in own}
    server.seconds += fitted.seconds
    server.images_seen += fitted.images_seen
    weight = len(server.clients[number]) if cfg.client_weights == "images" else 1
    if server.arm == "federated":
        server.drift.add(server.state, state, server.trained_keys, weight)
    return state, weight


def _moments(optimizer: torch.optim.Optimizer) -> State:
    """Adam's step counts and moments as flat tensors, to be kept between rounds and in checkpoints."""
    state = optimizer.state_dict()["state"]
    return {f"{index}/{name}": value.clone() for index, held in state.items() for name, value in held.items()}


def _load_moments(optimizer: torch.optim.Optimizer, moments: State) -> None:
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for path, value in moments.items():
        index, name = path.split("/")
        parameter = parameters[int(index)]
        # Fused Adam on a CPU reads memory in the order in which it lies: moments from a checkpoint (row by
        # row) have to be laid out as their parameter is (channels last), or they go to other weights.
        like = parameter.detach() if value.shape == parameter.shape else value
        state.setdefault(int(index), {})[name] = torch.empty_like(like, dtype=value.dtype).copy_(value)
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


DRIFT = ("update_norm", "update_cosine", "update_diversity", "distance_from_start")
"""What `drift` tells of a round."""


def drift(servers: Iterable[Server]) -> pd.DataFrame:
    """How the clients' updates went, one row a federated round from 1 on: see `Drift`."""
    rows = [
        {"init": server.init, "split": server.split, "seed": server.cfg.seed, "round": number}
        | {name: done.get(name) for name in DRIFT}
        for server in servers
        if server.arm == "federated"
        for number, done in enumerate(server.rounds[1:], 1)
    ]
    return pd.DataFrame(rows, columns=["init", "split", "seed", "round", *DRIFT]).astype(
        dict.fromkeys(DRIFT, float)
    )


def results(servers: Iterable[Server]) -> pd.DataFrame:
    """The rows of results.csv, one a scored round.

    Standalone clients of one split become one row: the mean of their scores, the sum of what they cost.

    Raises:
        UserError: a run has not finished its rounds.
    """
    rows = []
    for server in servers:
        if server.round_number < server.cfg.num_rounds:
            raise UserError(
                f"run {server.file.stem} stands at round {server.round_number} of {server.cfg.num_rounds}: "
                "run the round loop to its end first"
            )
        rows += server.history
    how = dict.fromkeys(("dice", "iou", "hd95"), "mean")
    how |= dict.fromkeys(("seconds", "bytes_up", "bytes_down", "images_seen"), "sum")
    table = pd.DataFrame(rows)
    return table.groupby(["arm", "init", "split", "seed", "round"], sort=False).agg(how).reset_index()

"""A run over its rounds: who trains, what was measured, and the checkpoint that it goes on from.

`federate` holds the steps of a round, `notebooks/04_federate.ipynb` the loop over them.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor, nn

from fmfl import capture, config, deadline, federate, metrics, models, parallel, resume, seeds, train
from fmfl.config import FederateConfig
from fmfl.data import Cohort
from fmfl.distill import InitialState
from fmfl.errors import OutOfTime, UserError
from fmfl.federate import ClientUpdate
from fmfl.states import TRAINING_CODE, State, code_digest, fingerprint, state_digest, write_state
from fmfl.train import Examples

#: Parts of a checkpoint's record that make up a run, besides its name.
STORED = ("round_number", "seconds", "images_seen", "bytes_up", "bytes_down", "history", "rounds")

#: Modules that decide what a run's checkpoint holds.
RUN_CODE = (*TRAINING_CODE, "runs.py", "metrics.py")

#: Begins the names of the tensors in a checkpoint that are not the model's.
KEPT = "kept/"


@dataclass(frozen=True)
class Traffic:
    """Messages between the server and its clients in one round.

    Attributes:
        clients: those whose updates go into the average.
        bytes_up: from the clients, those left out included.
        bytes_down: to the clients.
        faults: client to what was wrong with it, for those that were asked or expected in vain.
    """

    clients: list[int]
    bytes_up: int
    bytes_down: int
    faults: dict[int, str] = field(default_factory=dict)


@dataclass
class Run:
    """One run over its rounds: the global state, what was measured, and the file it continues from.

    Attributes:
        arm: federated, centralised or standalone.
        init: name of the initial state.
        split: name of the partition; `pooled` for the centralised arm.
        client: the standalone client's number; -1 for a global model.
        clients: number to images of those who train.
        model: the one resident student; clients' states are loaded into it in turn.
        theta: the global state after the last finished round.
        initial: the state before any round.
        file: the checkpoint, and at the end the final weights.
        made_of: all that the run's bytes depend on, by name.
        round_number: the last finished round; 0 before any.
        seconds, images_seen: of training so far, the initial state's included.
        bytes_up, bytes_down: from and to all clients so far.
        history: one row a scored round.
        rounds: of each round, from 0: SHA-256 of the global state, the clients that took part, the faults of
            others where there were any, and what an observer has measured.
        memory: of each client, see `federate.ClientUpdate`.
        server_moments: of the server's optimizer.
        traffic: of the round to be finished, where an engine has measured it; else it is estimated.
        measures: an observer's numbers for the record of the round to be finished.
        observers: called with the run after each finished round; they change nothing in it.
        replicas, copies: of the model and of the clients' images, where several devices train side by side.
    """

    arm: str
    init: str
    split: str
    client: int
    clients: Mapping[int, Examples]
    cfg: FederateConfig
    precision: str
    model: nn.Module
    theta: State
    initial: State
    file: Path
    made_of: dict = field(default_factory=dict)
    round_number: int = 0
    seconds: float = 0.0
    images_seen: int = 0
    bytes_up: int = 0
    bytes_down: int = 0
    history: list[dict] = field(default_factory=list)
    rounds: list[dict] = field(default_factory=list)
    memory: dict[int, State] = field(default_factory=dict)
    server_moments: State = field(default_factory=dict)
    traffic: Traffic | None = None
    measures: dict[str, float | None] = field(default_factory=dict)
    observers: list[Callable[["Run"], None]] = field(default_factory=list)
    replicas: dict[int, nn.Module] = field(default_factory=dict)
    copies: dict[int, Examples] = field(default_factory=dict)

    @property
    def fingerprint(self) -> str:
        """Short name of all that the run's bytes depend on."""
        return fingerprint(self.made_of)

    def remaining_rounds(self) -> Iterator[int]:
        """Yield the numbers of the rounds still to do, each when the one before it is finished."""
        while self.round_number < self.cfg.num_rounds and not parallel.interrupted.is_set():
            if deadline.has_passed():
                return
            yield self.round_number + 1

    def participants(self) -> list[int]:
        """Choose the clients of the coming round: a fraction C of all, at least one, in their order.

        The choice depends on (seed, round) alone, so all initial states meet the same clients.
        """
        number = max(1, round(self.cfg.participation * len(self.clients)))
        if number == len(self.clients):
            return list(self.clients)
        rng = seeds.generator(self.cfg.seed, seeds.SAMPLING, self.round_number + 1)
        chosen = torch.randperm(len(self.clients), generator=rng)[:number].sort().values
        return [list(self.clients)[place] for place in chosen.tolist()]

    def note(self, number: int, update: ClientUpdate) -> ClientUpdate:
        """Enter a client's costs and memory in the books, and pass its update on."""
        self.seconds += update.fit.seconds
        self.images_seen += update.fit.images_seen
        if update.memory:
            self.memory[number] = update.memory
        else:
            self.memory.pop(number, None)
        return update

    def finish_round(self, average: State, cohort: Cohort, test: Tensor) -> None:
        """Take the server's step to the round's average, score where a score is due, write the checkpoint.

        Under FedBN the average of the clients' BatchNorm goes into the state too: the global model is scored
        with it, and a client begins its first round with it. Later rounds begin with the client's own.
        """
        traffic, self.traffic = self.traffic or _estimated_traffic(self, average), None
        names = federate.trained_keys(self.model, self.cfg)
        self.theta, self.server_moments = federate.server_step(
            self.theta, average, names, self.cfg, self.server_moments
        )
        self.round_number += 1
        done = {"sha256": state_digest(self.theta), "clients": traffic.clients}
        faults = {"faults": traffic.faults} if traffic.faults else {}
        self.rounds.append(done | faults | self.measures | _distance_from_start(self))
        self.measures = {}
        self.bytes_up += traffic.bytes_up
        self.bytes_down += traffic.bytes_down
        last = self.round_number == self.cfg.num_rounds
        if last or self.round_number % self.cfg.score_every == 0:
            self.score(cohort, test)
        _write(self, last)
        if last:
            for model in (self.model, *self.replicas.values()):
                capture.release(model)
            self.copies.clear()

    def _scores(self, cohort: Cohort, test: Tensor) -> pd.DataFrame:
        self.model.load_state_dict(self.theta)
        logits = train.predict(self.model, cohort.images, test, precision=self.precision)
        return metrics.score(logits.sigmoid(), cohort.masks[test])

    def score(self, cohort: Cohort, test: Tensor) -> None:
        """Add the current round's row to the history."""
        means = self._scores(cohort, test)[["dice", "iou", "hd95"]].mean()
        about = {"arm": self.arm, "init": self.init, "split": self.split, "seed": self.cfg.seed}
        costs = {name: getattr(self, name) for name in ("seconds", "bytes_up", "bytes_down", "images_seen")}
        scores = {name: float(value) for name, value in means.items()}
        self.history.append(about | {"round": self.round_number} | scores | costs)

    def per_image(self, cohort: Cohort, test: Tensor) -> pd.DataFrame:
        """Score the current state, one row a test image, with its patient, site and age."""
        rows = test.tolist()
        about = cohort.table.iloc[rows][["image_id", "patient_id", "site", "age"]].reset_index(drop=True)
        key = {"arm": self.arm, "init": self.init, "split": self.split, "seed": self.cfg.seed}
        key |= {"client": self.client}
        return pd.concat([about.assign(**key)[[*key, *about]], self._scores(cohort, test)], axis=1)


def start_or_resume(
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
) -> Run:
    """Return a run at the round where the same run stopped, or before the first one.

    Two runs are the same if they agree in the initial state's bytes, the cohort, the clients' images, the
    test images, the code and every setting. The rounds of another run are never deleted: see `resume.aside`.

    Args:
        run_dir: the study's folder; the checkpoint is `weights/{arm}-{split}-{init}-seed{seed}...`.
        initial: the initial state, and its cost.
        clients: see `clients_of` and `pooled`.
        student: name in `models.STUDENTS`.
        test: [n] int64, the images it is scored on.
        engine: name of what brings the clients' updates, and those of its settings that a result depends on.
        move_aside: False refuses a file that holds another run, instead of moving it.

    Raises:
        UserError: the file holds another run, and it is not to be moved.
    """
    cfg, split = own_settings(cfg, arm), "pooled" if arm == "centralised" else cfg.split
    client = next(iter(clients)) if arm == "standalone" else -1
    suffix = f"-client{client}" if arm == "standalone" else ""
    run = Run(
        arm=arm,
        init=initial.name,
        split=split,
        client=client,
        clients=clients,
        cfg=cfg,
        precision=precision,
        model=models.build(student, device=cohort.device, batch_norm=cfg.batch_norm),
        theta=initial.state,
        initial=initial.state,
        file=run_dir / "weights" / f"{arm}-{split}-{initial.name}-seed{cfg.seed}{suffix}.safetensors",
        seconds=initial.fit.seconds,
        images_seen=initial.fit.images_seen,
    )
    run.made_of = _made_of(run, student, cohort, test, engine if arm == "federated" else "local")
    if not move_aside:
        resume.refuse_other(run.file, run.made_of)
    if (stored := resume.last_checkpoint(run.file, run.made_of, cohort.device)) is not None:
        _restore(run, *stored)
    else:
        run.rounds.append({"sha256": state_digest(run.theta), "clients": []})
        run.score(cohort, test)
    return run


def _made_of(run: Run, student: str, cohort: Cohort, test: Tensor, engine: object) -> dict[str, object]:
    """Name all that a run's bytes depend on; long things by their digests."""
    about = {"arm": run.arm, "student": student, "precision": run.precision}
    return {
        "settings": about | run_settings(run.cfg, run.arm),
        "code": code_digest(RUN_CODE),
        "data": cohort.fingerprint,
        "start": state_digest(run.initial),
        "clients": fingerprint({k: examples.indices.tolist() for k, examples in run.clients.items()}),
        "test images": fingerprint(test.tolist()),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "engine": engine,
    }


def _restore(run: Run, tensors: State, record: Mapping) -> None:
    """Take a run back to a checkpoint of its own."""
    run.theta = {name: value for name, value in tensors.items() if not name.startswith(KEPT)}
    for path, value in tensors.items():
        if path.startswith(KEPT):
            owner, name = path.removeprefix(KEPT).split("/", 1)
            kept = run.server_moments if owner == "server" else run.memory.setdefault(int(owner), {})
            kept[name] = value
    for name in STORED:
        setattr(run, name, record[name])


def _write(run: Run, last: bool) -> None:
    """Write a run's checkpoint, then tell its observers.

    The last checkpoint is a result: the model alone, and no file before it.
    """
    kept = {} if last else {"server": run.server_moments} | run.memory
    flat = {f"{KEPT}{owner}/{name}": value for owner, part in kept.items() for name, value in part.items()}
    write_state(
        run.file,
        run.theta | flat,
        keep_previous=not last,
        fingerprint=run.fingerprint,
        made_of=run.made_of,
        arm=run.arm,
        init=run.init,
        split=run.split,
        client=run.client,
        seed=run.cfg.seed,
        **{name: getattr(run, name) for name in STORED},
    )
    for observer in run.observers:
        observer(run)


def _estimated_traffic(run: Run, average: State) -> Traffic:
    """Estimate the bytes where no messages are sent: every client receives and sends all shared tensors."""
    clients, own = run.participants(), federate.local_keys(run.model, run.cfg)
    sent = {name: value for name, value in average.items() if name not in own}
    each_way = len(clients) * models.num_bytes(sent) if run.arm == "federated" else 0
    return Traffic(clients, each_way, each_way)


def _distance_from_start(run: Run) -> dict[str, float]:
    """Measure the L2 distance of the trained weights from the initial ones; in the federated arm only."""
    if run.arm != "federated":
        return {}
    names = federate.trained_keys(run.model, run.cfg)
    away = models.flat(run.theta, names) - models.flat(run.initial, names)
    return {"distance_from_start": float(torch.linalg.vector_norm(away))}


def clients_of(cohort: Cohort, parts: Iterable[Tensor]) -> dict[int, Examples]:
    """Number the clients' images, from `split.partition`."""
    return {k: _examples(cohort, indices) for k, indices in enumerate(parts)}


def pooled(cohort: Cohort, indices: Tensor) -> dict[int, Examples]:
    """Give all federated images to one client, for the centralised arm."""
    return {seeds.POOLED: _examples(cohort, indices)}


def _examples(cohort: Cohort, indices: Tensor) -> Examples:
    return Examples(cohort.images, cohort.masks, indices, device=cohort.device)


def own_settings(cfg: FederateConfig, arm: str) -> FederateConfig:
    """Set to their defaults the settings that an arm has no use for.

    A stateless client begins each round with a new Adam. Without a server in between, as in the centralised
    and standalone arms, that would only be a handicap, so these keep it.
    """
    if arm == "federated":
        return cfg
    plain = FederateConfig()
    cfg = replace(cfg, optimizer_state="keep", **{k: getattr(plain, k) for k in config.tagged("server")})
    # With one client FedBN's own BatchNorm is the global one.
    return replace(cfg, batch_norm="average") if cfg.batch_norm == "local" else cfg


def run_settings(cfg: FederateConfig, arm: str) -> dict[str, object]:
    """Return the settings of `own_settings` that an arm's run depends on, by name."""
    # The clients' images themselves tell how they were dealt.
    left_out = config.tagged("plan") | (config.tagged("partition") if arm == "centralised" else set())
    return {name: value for name, value in asdict(own_settings(cfg, arm)).items() if name not in left_out}


def train_clients(
    run: Run, numbers: Iterable[int] | None = None, devices: Sequence[torch.device] | None = None
) -> Iterator[ClientUpdate]:
    """Eq. 2 of a run's coming round: `federate.train_client` of each client, in their order.

    On several devices the clients train side by side, with the same bytes: client k on device k mod n, where
    its images are brought once. At most two updates a device wait for the average, so memory does not grow
    with the clients.

    Args:
        numbers: clients; None: the round's participants.
        devices: where to train; None: on a CPU one place a core (none to spare where the runs of a study
            share the cores already), else every GPU that PyTorch sees.
    """
    numbers = run.participants() if numbers is None else list(numbers)
    home = next(run.model.parameters()).device
    places = list(devices or parallel.places(home))[: len(numbers)]
    students = {0: run.model} | {
        place: run.replicas.setdefault(place, copy.deepcopy(run.model).to(device))
        for place, device in enumerate(places)
        if place
    }

    def task(number: int, place: int) -> ClientUpdate:
        update = federate.train_client(
            students[place],
            run.theta,
            _examples_at(run, number, places[place]),
            run.cfg,
            key=(run.cfg.seed, number, run.round_number + 1),
            memory=run.memory.get(number),
            precision=run.precision,
        )
        state, memory = ({k: v.to(home) for k, v in part.items()} for part in (update.state, update.memory))
        return update._replace(state=state, memory=memory)

    # Where images are moved, a client stays where its own are; the cores of one memory take turns.
    moved = len(set(places)) > 1
    where = [(number if moved else turn) % len(places) for turn, number in enumerate(numbers)]
    with parallel.one_thread(home):
        results = parallel.ordered_map(task, numbers, where)
        for number in numbers:
            yield run.note(number, next(results))


def _examples_at(run: Run, number: int, device: torch.device) -> Examples:
    """Bring a client's images to a device for training, once."""
    examples = run.clients[number]
    if device == examples.device:
        return examples
    if number not in run.copies:
        own = (stored[examples.indices].to(device) for stored in (examples.images, examples.masks))
        run.copies[number] = Examples(*own, torch.arange(len(examples), device=device))
    return run.copies[number]


def results(runs: Iterable[Run]) -> pd.DataFrame:
    """Return the rows of results.csv, one a scored round.

    Standalone clients of one split become one row: the mean of their scores, the sum of their costs.

    Raises:
        UserError: a run has not finished its rounds.
        OutOfTime: the study's time limit has stopped it.
    """
    rows = []
    for run in runs:
        if run.round_number < run.cfg.num_rounds:
            raise (OutOfTime if deadline.has_passed() else UserError)(
                f"run {run.file.stem} stands at round {run.round_number} of {run.cfg.num_rounds}: "
                "run the round loop to its end first"
            )
        rows += run.history
    how = dict.fromkeys(("dice", "iou", "hd95"), "mean")
    how |= dict.fromkeys(("seconds", "bytes_up", "bytes_down", "images_seen"), "sum")
    table = pd.DataFrame(rows)
    return table.groupby(["arm", "init", "split", "seed", "round"], sort=False).agg(how).reset_index()

"""The same study on Flower: a ServerApp and a ClientApp around federate.py, and the messages between them.

A client trains with `federate.train_client` under the same random keys, the server averages in the
clients' order with `federate.aggregate`, so the rounds end in the same bytes as those of the local
engine. What crosses: to a client the settings, the round's number and the weights; from it the weights, its
number, how many images it has trained on, and its seconds. No image, no mask and no row of its table does.

There are two ways to run it. `simulated` keeps all nodes in this process, behind Flower's messages, and
needs no Ray, as Flower's own simulation does. `server_app` and `client_app` are what `flwr run`
takes from the folder `fmfl/flower/app`: docs/hospitals.md goes from there to several hospitals.
"""

import logging
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Context,
    Error,
    Message,
    MessageType,
    MetricRecord,
    RecordDict,
)
from flwr.clientapp import ClientApp
from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.message_pb2 import Message as MessageProto
from flwr.serverapp import Grid, ServerApp
from flwr.supercore.task_identity import TaskIdentity
from torch import Tensor

from fmfl import config, data, devices, federate, models, parallel, states
from fmfl.config import Settings
from fmfl.data import Cohort
from fmfl.distill import InitialState
from fmfl.errors import UserError
from fmfl.federate import Server, Traffic
from fmfl.states import State
from fmfl.study import outputs, stages
from fmfl.train import Examples, FitResult

log = logging.getLogger("fmfl.flower")

HELD_OUT = "held_out"
"""The value of `test_data` that stands for the test images of `data`."""

# ------------------------------------------------------------------------------------------ what crosses


def pack(state: State) -> ArrayRecord:
    """A state as one flat array a dtype: a few large pieces cross instead of hundreds of small ones.

    Each array that crosses costs about a kilobyte of names and headers, and a student has hundreds. They
    stand in the order of their names: a state from a file has another than its model's.
    """
    flat: dict[str, list[Tensor]] = {}
    for _, value in sorted(state.items()):
        flat.setdefault(str(value.dtype).removeprefix("torch."), []).append(value.detach().cpu().reshape(-1))
    return ArrayRecord({dtype: Array(torch.cat(parts).numpy()) for dtype, parts in flat.items()})


def unpack(record: ArrayRecord, like: State) -> State:
    """The state that `pack` took apart.

    Args:
        record: flat arrays by dtype.
        like: names, shapes and dtypes; the tensors come to its device.

    Raises:
        ValueError: the arrays are not those of such a state.
    """
    flat = {}
    for dtype in dict.fromkeys(str(value.dtype).removeprefix("torch.") for value in like.values()):
        if dtype not in record:
            raise ValueError(f"the weights hold no {dtype} numbers")
        try:
            flat[dtype] = torch.from_numpy(record[dtype].numpy().copy())
        except (TypeError, ValueError) as error:
            raise ValueError(f"the {dtype} numbers of the weights cannot be read: {error}") from None
    found: State = {}
    taken = dict.fromkeys(flat, 0)
    for name, value in sorted(like.items()):
        dtype = str(value.dtype).removeprefix("torch.")
        part = flat[dtype][taken[dtype] : taken[dtype] + value.numel()]
        taken[dtype] += value.numel()
        if part.dtype != value.dtype or part.shape != (value.numel(),):
            raise ValueError("the weights are not as many numbers as this student has, or of another kind")
        found[name] = part.view(value.shape).to(value.device)
    if len(record) > len(flat) or any(len(flat[dtype]) != number for dtype, number in taken.items()):
        raise ValueError("the weights are more numbers than this student has")
    return {name: found[name] for name in like}


def layout(state: State) -> str:
    """A fingerprint of names, shapes and dtypes: equal ones can be averaged."""
    return states.fingerprint([(name, list(v.shape), str(v.dtype)) for name, v in sorted(state.items())])


def num_bytes(message: Message) -> int:
    """Bytes of a message as Flower serialises it."""
    return message_to_proto(message).ByteSize()


def settings_of(context: Context) -> Settings:
    """The run's settings from Flower's run config, under the same contract as a notebook's parameters.

    Raises:
        UserError: a parameter is unknown, mistyped or out of range.
    """
    return config.settings(dict(context.run_config) | {"engine": "flower"})


# ------------------------------------------------------------------------------------------ the client


@dataclass
class ClientData:
    """What a client has.

    Attributes:
        number: its place among the clients, from 0.
        examples: its images.
        kept: what it keeps between rounds, see `federate.Server.kept`; None: in Flower's context.
        model: a student to train in; None: one is built.
    """

    number: int
    examples: Examples
    kept: dict[str, State] | None = None
    model: torch.nn.Module | None = None


def make_client_app(holds: Callable[[Context, Settings], ClientData]) -> ClientApp:
    """Flower's ClientApp: it answers who it is, and trains from the weights that it is sent.

    Args:
        holds: finds the client's number and images.
    """
    app = ClientApp()

    @app.query()
    def who(message: Message, context: Context) -> Message:
        """Number and images of this client, and the code that it would train with."""
        held = holds(context, settings_of(context))
        about = {"client": held.number, "images": len(held.examples), "code": node_code()}
        return Message(RecordDict({"about": ConfigRecord(about)}), reply_to=message)

    @app.train()
    def fit(message: Message, context: Context) -> Message:
        """Eq. 2, from the weights in the message to those in the reply."""
        cfg = settings_of(context)
        held = holds(context, cfg)
        device, asked = held.examples.device, message.content["config"]
        model = held.model or models.build(
            cfg.distill.student, device=device, batch_norm=cfg.federate.batch_norm
        )
        given = models.copy_state(model)
        if asked["layout"] != layout(given):
            raise UserError(f"the server's weights are not those of a {cfg.distill.student}")
        # A stand-in for the server: train_client asks no more of it than this.
        own = Server(
            arm="federated",
            init="",
            split=cfg.federate.split,
            client=-1,
            clients={held.number: held.examples},
            cfg=cfg.federate,
            precision=devices.precision_of(cfg.run),
            model=model,
            state=unpack(message.content["weights"], given),
            file=Path(),
            fingerprint="",
            round_number=int(asked["round"]) - 1,
            kept=_kept(context) if held.kept is None else held.kept,
        )
        with parallel.one_thread(device):
            state, weight = federate.train_client(own, held.number)
        if held.kept is None:
            _keep(context, own.kept)
        about = {"client": held.number, "layout": layout(state)}
        numbers = {"weight": weight, "images_seen": own.images_seen, "seconds": own.seconds}
        records = {
            "weights": pack(state),
            "about": ConfigRecord(about),
            "numbers": MetricRecord(numbers),
        }
        return Message(RecordDict(records), reply_to=message)

    return app


def node_code() -> str:
    """What a node and its server must have in common: the code of training, of images and of messages."""
    return states.code_digest((*states.TRAINING_CODE, "data.py", "flower/engine.py"))


def _kept(context: Context) -> dict[str, State]:
    """What this client has kept since its last round."""
    found: dict[str, State] = {}
    for path, value in context.state.array_records.get("kept", ArrayRecord()).items():
        whose, name = path.split("/", 1)
        found.setdefault(whose, {})[name] = torch.from_numpy(value.numpy().copy())
    return found


def _keep(context: Context, kept: dict[str, State]) -> None:
    flat = {f"{whose}/{name}": value for whose, held in kept.items() for name, value in held.items()}
    context.state["kept"] = ArrayRecord(
        {path: Array(value.detach().cpu().contiguous().numpy()) for path, value in flat.items()}
    )


def own_images(context: Context, cfg: Settings) -> ClientData:
    """A SuperNode's images: all of its own folder, or its part of `data` where it names no folder.

    The node's configuration says `data` (folders) and `partition-id`, the client's number.

    Raises:
        UserError: there is no number, or the folder holds no usable image.
    """
    number = context.node_config.get("partition-id")
    if not isinstance(number, int) or not 0 <= number < cfg.federate.num_clients:
        raise UserError(
            f"this node's partition-id is {number!r}: give it a number from 0 to "
            f"{cfg.federate.num_clients - 1} (num_clients is {cfg.federate.num_clients})"
        )
    folder = context.node_config.get("data")
    if folder is None:
        cohort = stages.load_cohort(cfg)
        federated = stages.holdout(cfg, cohort).federated
        indices = stages.partition(cohort, federated, cfg.federate)[number]
    else:
        cohort = _load(str(folder), cfg)
        indices = torch.arange(len(cohort), device=cohort.images.device)
    return ClientData(number, Examples(cohort.images, cohort.masks, indices, device=cohort.device))


def _load(sources: str, cfg: Settings) -> Cohort:
    wanted = cfg.data
    cohort = data.load(
        sources, size=wanted.size, mask_class=wanted.mask_class, strict=wanted.strict, progress=False
    )
    return cohort.to(devices.device_of(cfg.run))


# ------------------------------------------------------------------------------------------ the server


class Nodes:
    """The clients as the server sees them, through Flower's grid: who is there, and a round of training.

    Attributes:
        node_of: client to its node, for those who have said who they are.
    """

    def __init__(self, grid: Grid, cfg: Settings, *, poll: float = 0.25):
        self.grid, self.cfg, self.poll = grid, cfg, poll
        self.node_of: dict[int, int] = {}
        self.images_of: dict[int, object] = {}  # client -> how many it has said that it holds
        self._asked: dict[str, int] = {}  # message -> node that has not said yet who it is
        self._refused: dict[int, float] = {}  # node -> when it was
        self._first = True

    def train(self, server: Server) -> list[tuple[State, int]]:
        """One round of Eq. 2 at the clients: their good updates, in their order.

        A client that is silent until `round_timeout`, fails, or answers with something other than finite
        weights of this student is left out; what was wrong is logged and goes to `server.exchange`. A
        silent client is asked again who it is before it is counted on again.

        Raises:
            UserError: fewer than `min_clients` good updates; the run goes on at this round when it is
                started again.
        """
        number, flower = server.round_number + 1, self.cfg.flower
        wanted = server.participants()
        needed = min(flower.min_clients, len(wanted))
        self._wait(server, set(wanted), len(wanted) if self._first else needed)
        self._first = False
        faults = {k: "is not there" for k in wanted if k not in self.node_of}
        about = {"round": number, "layout": layout(server.state)}
        content = RecordDict({"weights": pack(server.state), "config": ConfigRecord(about)})
        messages, nodes = [], []
        for k in wanted:
            if k in self.node_of:
                nodes.append(k)
                messages.append(self._message(content, self.node_of[k], MessageType.TRAIN, str(number)))
        down = sum(map(num_bytes, messages))
        pending = dict(zip(self.grid.push_messages(messages), nodes, strict=True))
        replies = self._collect(pending, flower.round_timeout)
        updates: dict[int, tuple[State, int]] = {}
        for k in nodes:
            if k not in replies:
                faults[k] = f"gave no answer within {flower.round_timeout:g} s"
                self.node_of.pop(k, None)
                continue
            try:
                updates[k] = self._update(replies[k], k, server)
            except ValueError as error:
                faults[k] = str(error)
                if replies[k].has_error() and replies[k].error.code != ErrorCode.CLIENT_APP_RAISED_EXCEPTION:
                    self.node_of.pop(k, None)  # the node is gone, or its answer was lost
        for k, fault in faults.items():
            log.warning("round %d: client %d %s", number, k, fault)
        up = sum(map(num_bytes, replies.values()))
        server.exchange = Traffic(sorted(updates), up, down, faults)
        if len(updates) < needed:
            said = "; ".join(f"client {k} {fault}" for k, fault in faults.items())
            raise UserError(
                f"round {number} has {len(updates)} good updates and min_clients asks for {needed} ({said}): "
                "see to these clients and start the run again, it goes on at this round"
            )
        for state, weight in updates.values():
            server.drift.add(server.state, state, server.trained_keys, weight)
        return list(updates.values())

    def _message(self, content: RecordDict, node: int, kind: str, group: str = "") -> Message:
        return Message(
            content, node, kind, ttl=self.cfg.flower.round_timeout + 60, group_id=group
        )  # a node that wakes later finds nothing to do

    def _wait(self, server: Server, wanted: set[int], enough: int) -> None:
        """Look until enough of the round's clients are there, or for `join_timeout`."""
        until = time.monotonic() + self.cfg.flower.join_timeout
        self._look(server)
        while len(wanted & set(self.node_of)) < enough and time.monotonic() < until:
            time.sleep(self.poll)
            self._look(server)

    def _look(self, server: Server) -> None:
        """Ask new nodes who they are, take in those that have answered, let go of those that have left."""
        there = set(self.grid.get_node_ids())
        self.node_of = {k: node for k, node in self.node_of.items() if node in there}
        self._asked = {message: node for message, node in self._asked.items() if node in there}
        lately = {node for node, when in self._refused.items() if time.monotonic() - when < 30}
        new = sorted(there - {*self.node_of.values(), *self._asked.values(), *lately})
        if new:
            empty = RecordDict({"config": ConfigRecord({})})
            ids = self.grid.push_messages([self._message(empty, node, MessageType.QUERY) for node in new])
            self._asked |= {message: node for message, node in zip(ids, new, strict=True) if message}
        for reply in self.grid.pull_messages(list(self._asked)) if self._asked else ():
            node = self._asked.pop(reply.metadata.reply_to_message_id, None)
            if node is None:
                continue
            if fault := self._admit(reply, node, server):
                log.warning("node %d is not taken in: %s", node, fault)
                self._refused[node] = time.monotonic()

    def _admit(self, reply: Message, node: int, server: Server) -> str:
        """Take a node in as the client that it says it is, or say why not."""
        if reply.has_error():
            return _reason(reply)
        about = reply.content.config_records.get("about", {})
        k = about.get("client")
        if k not in server.clients:
            return f"it says that it is client {k!r}, and there is none of that number"
        if k in self.node_of:
            return f"it says that it is client {k}, who is there already"
        if about.get("code") != node_code():
            return f"client {k} has another version of fmfl: install the server's"
        self.node_of[k], self.images_of[k] = node, about.get("images")
        log.info("client %d is there with %s images", k, about.get("images"))
        return ""

    def _collect(self, pending: dict[str, int], seconds: float) -> dict[int, Message]:
        """The answers to messages, by client, that come within some seconds."""
        pending = {message: k for message, k in pending.items() if message}
        replies: dict[int, Message] = {}
        until = time.monotonic() + seconds
        while pending:
            for reply in self.grid.pull_messages(list(pending)):
                k = pending.pop(reply.metadata.reply_to_message_id, None)
                if k is not None:
                    replies[k] = reply
            if time.monotonic() > until or parallel.interrupted.is_set():
                break
            if pending:
                time.sleep(self.poll)
        return replies

    def _update(self, reply: Message, k: int, server: Server) -> tuple[State, int]:
        """A client's state and weight from its reply.

        Raises:
            ValueError: what is wrong with it, as the end of a sentence about the client.
        """
        if reply.has_error():
            raise ValueError(f"failed: {_reason(reply)}")
        records = reply.content
        about = records.config_records.get("about", {})
        numbers = records.metric_records.get("numbers", {})
        if about.get("client") != k:
            raise ValueError(f"answers as client {about.get('client')!r}")
        if about.get("layout") != layout(server.state):
            raise ValueError("gives tensors of other names, shapes or dtypes than this student's")
        weight, images, seconds = (numbers.get(name) for name in ("weight", "images_seen", "seconds"))
        if not isinstance(weight, int) or weight <= 0 or not isinstance(images, int) or images <= 0:
            raise ValueError(f"has trained on {images!r} images with weight {weight!r}")
        due = 1 if self.cfg.federate.client_weights == "uniform" else self.images_of.get(k)
        if weight != due:  # a wrong one could make this client the average
            raise ValueError(f"asks for weight {weight} where it has {due}")
        try:
            state = unpack(records.array_records.get("weights", ArrayRecord()), server.state)
        except ValueError as error:
            raise ValueError(f"gives no usable update: {error}") from None
        if not federate.is_finite(state):
            raise ValueError("gives weights that are not finite")
        server.images_seen += images
        server.seconds += seconds if isinstance(seconds, float) and 0 <= seconds < math.inf else 0.0
        return state, weight


def _reason(reply: Message) -> str:
    """Why a node failed: of an exception its own words alone."""
    reason = reply.error.reason or f"error {reply.error.code}"
    return reason.partition(":<'")[2].removesuffix("'>") or reason


# ------------------------------------------------------------------------------------------ in this process


class InProcess(Grid):
    """A Flower grid whose nodes live in this process: messages are serialised, delivered and answered.

    Flower's own simulation needs Ray; for a study on one machine this gives the same bytes without it.
    """

    def __init__(self, app: ClientApp, contexts: Iterable[Context]):
        self.app = app
        self.contexts = {context.node_id: context for context in contexts}
        self.posted: dict[str, bytes] = {}
        # A message takes its sender from here; a process of Flower's has had them set.
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, SUPERLINK_NODE_ID, 1

    def set_run(self, run: object) -> None:
        """There is but one."""

    @property
    def run(self) -> Any:
        """There is nothing to say of it."""
        raise NotImplementedError

    create_message = None

    def get_node_ids(self) -> list[int]:
        """All nodes, which never leave."""
        return list(self.contexts)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Post messages; a node wakes when its answer is wanted."""
        ids = []
        for message in messages:
            proto = message_to_proto(message)
            proto.metadata.message_id = f"{message.metadata.dst_node_id}-{id(message)}-{len(self.posted)}"
            self.posted[proto.metadata.message_id] = proto.SerializeToString()
            ids.append(proto.metadata.message_id)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Let the nodes answer, one after the other."""
        replies = []
        for posted in message_ids:
            message = message_from_proto(MessageProto.FromString(self.posted.pop(posted)))
            try:
                reply = self.app(message, self.contexts[message.metadata.dst_node_id])
            except Exception as error:  # as Flower's own processes do
                reason = f"{type(error)}:<'{error}'>"
                reply = Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason), reply_to=message)
            sent = message_to_proto(reply).SerializeToString()
            replies.append(message_from_proto(MessageProto.FromString(sent)))
        return replies

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Both at once."""
        return self.pull_messages(self.push_messages(messages))


def simulated(cfg: Settings, server: Server) -> Nodes:
    """Nodes for a run whose clients' images are all here; each sees its own through Flower's messages alone.

    What a client keeps between rounds lies in the server's checkpoint, as with the local engine, so that a
    stopped run goes on in the same bytes.
    """

    def holds(context: Context, _: Settings) -> ClientData:
        number = int(context.node_config["partition-id"])
        return ClientData(number, server.clients[number], server.kept, server.model)

    run_config = cfg.flat()
    contexts = [Context(1, 1000 + k, {"partition-id": k}, RecordDict(), run_config) for k in server.clients]
    return Nodes(InProcess(make_client_app(holds), contexts), cfg)


# ------------------------------------------------------------------------------------------ a deployment


def serve(grid: Grid, cfg: Settings) -> Server:
    """All rounds of a deployment, from its start state or its last checkpoint; the results go to its folder.

    `results.csv` and `faults.csv` are written after each round, `per_image.csv` at the end.

    Raises:
        UserError: a setting does not fit, the folder holds another run, or a round had too few good updates.
    """
    cohort, test = _test_images(cfg)
    initial = _start(cfg, cohort.device)
    _check_folder(cfg, initial.name)
    none = torch.empty(0, dtype=torch.int64, device=cohort.images.device)
    server = Server.start_or_resume(
        cfg.run_dir,
        initial,
        {k: Examples(cohort.images, cohort.masks, none) for k in range(cfg.federate.num_clients)},
        cfg.federate,
        student=cfg.distill.student,
        cohort=cohort,
        test=test,
        precision=devices.precision_of(cfg.run),
        engine=stages.engine_key(cfg),
        move_aside=False,
    )
    (cfg.run_dir / "per_image.csv").unlink(missing_ok=True)
    log.info("start %s, round %d of %d", server.init, server.round_number, cfg.federate.num_rounds)
    nodes = Nodes(grid, cfg)
    for number in server.remaining_rounds():
        try:
            updates = nodes.train(server)
        except UserError:
            _write(cfg, server, stopped=number)
            raise
        with parallel.one_thread(cohort.device):
            server.finish_round(federate.aggregate(updates), cohort, test)
        _write(cfg, server)
        log.info("round %d: %s", number, _said(server))
    if len(test):
        outputs.write_text(cfg.run_dir / "per_image.csv", server.per_image(cohort, test).to_csv(index=False))
    return server


def _check_folder(cfg: Settings, init: str) -> None:
    """Raise a UserError where the folder's results.csv is of a study, or of a deployment's other run."""
    if any((cfg.run_dir / "cells").glob("*/cell.json")):
        raise UserError(f"{cfg.run_dir} holds a study: name another folder with --out")
    own = f"federated-{cfg.federate.split}-{init}-seed{cfg.federate.seed}"
    for file in sorted((cfg.run_dir / "weights").glob("federated-*.safetensors")):
        if file.stem != own:
            raise UserError(f"{file} is of another run than {own}: name another folder with --out")


def _said(server: Server) -> str:
    clients = server.rounds[-1]["clients"]
    scored = server.history[-1]
    dice = f", Dice {scored['dice']:.4f}" if scored["round"] == server.round_number else ""
    return f"{len(clients)} clients ({', '.join(map(str, clients))}){dice}"


def _write(cfg: Settings, server: Server, stopped: int = 0) -> None:
    """The rounds so far, and what was wrong in them; `stopped` is a round that could not be finished."""
    outputs.write_text(cfg.run_dir / "results.csv", pd.DataFrame(server.history).to_csv(index=False))
    rounds = list(enumerate(done.get("faults", {}) for done in server.rounds))
    if stopped and server.exchange:
        rounds.append((stopped, server.exchange.faults))
    rows = [(number, int(k), fault) for number, faults in rounds for k, fault in faults.items()]
    table = pd.DataFrame(rows, columns=["round", "client", "fault"])
    outputs.write_text(cfg.run_dir / "faults.csv", table.to_csv(index=False))


def _test_images(cfg: Settings) -> tuple[Cohort, Tensor]:
    """What the server scores on: its own folders, what `data` holds out, or nothing."""
    if cfg.flower.test_data == HELD_OUT:
        cohort = stages.load_cohort(cfg)
        return cohort, stages.holdout(cfg, cohort).test
    if cfg.flower.test_data:
        cohort = _load(cfg.flower.test_data, cfg)
        return cohort, torch.arange(len(cohort), device=cohort.images.device)
    device, size = devices.device_of(cfg.run), cfg.data.size
    nothing = torch.empty((0, 1, size, size), dtype=torch.uint8, device=device)
    table = pd.DataFrame(columns=list(data.COLUMNS))
    cohort = Cohort(nothing, nothing, table, pd.DataFrame(), "no test images")
    return cohort, torch.empty(0, dtype=torch.int64, device=device)


def _start(cfg: Settings, device: torch.device) -> InitialState:
    """The state that a deployment begins from: a file's, or random weights."""
    model = models.build(
        cfg.distill.student, seed=cfg.federate.seed, device=device, batch_norm=cfg.federate.batch_norm
    )
    random = models.copy_state(model)
    if not cfg.flower.start:
        return InitialState("random", random, FitResult())
    file = Path(cfg.flower.start)
    if (found := states.read_state(file, device=device)) is None:
        raise UserError(f"start {file} is missing or damaged: name a file of safetensors, such as an init-*")
    state, record = found
    own = {name: value for name, value in state.items() if not name.startswith(federate.KEPT)}
    if layout(own) != layout(random):  # one with BatchNorm has all names of one with GroupNorm, and more
        raise UserError(
            f"start {file} does not hold the weights of student {cfg.distill.student!r} with batch_norm "
            f"{cfg.federate.batch_norm!r}: choose the student and the batch_norm that it was made with"
        )
    spent = FitResult(**record["fitted"]) if "fitted" in record else FitResult()
    return InitialState(record.get("init", file.stem), {name: state[name] for name in random}, spent)


def run_config() -> dict[str, Any]:
    """Every parameter that a run on Flower's nodes takes, at its default: what the app's folder lists."""
    return {name: value for name, value in config.defaults().items() if name in config.taken_by("F")}


client_app = make_client_app(own_images)
server_app = ServerApp()


@server_app.main()
def main(grid: Grid, context: Context) -> None:
    """What Flower calls on the server."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    log.setLevel(logging.INFO)
    cfg = settings_of(context)
    try:
        serve(grid, cfg)
    except UserError as error:
        log.error("%s", error)
        raise

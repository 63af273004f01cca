"""The clients as a server sees them: nodes of a Flower grid, and a round of training at them."""

import logging
import time

from flwr.app import ConfigRecord, Message, MessageType, RecordDict
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid

from fmfl import parallel
from fmfl.config import Settings
from fmfl.errors import UserError
from fmfl.federate import ClientUpdate
from fmfl.flower import messages
from fmfl.flower.client import node_code
from fmfl.runs import Run, Traffic

log = logging.getLogger("fmfl.flower")

#: Seconds after which a node that was not taken in is asked again.
ASK_AGAIN = 30.0


class Nodes:
    """Nodes of a Flower grid, each taken in as the client that it says it is.

    Attributes:
        node_of: client to its node, for those that have been taken in.
        images_of: client to the number of its images, as it has told.
    """

    def __init__(self, grid: Grid, cfg: Settings, *, poll: float = 0.25):
        self.grid, self.cfg, self.poll = grid, cfg, poll
        self.node_of: dict[int, int] = {}
        self.images_of: dict[int, object] = {}
        self._queried: dict[str, int] = {}  # message -> node that has not answered it yet
        self._refused: dict[int, float] = {}  # node -> when it was

    def wait(self, clients: set[int], enough: int) -> None:
        """Take nodes in until enough of these clients are there, or for `join_timeout`."""
        until = time.monotonic() + self.cfg.flower.join_timeout
        self._look()
        while len(clients & set(self.node_of)) < enough and time.monotonic() < until:
            time.sleep(self.poll)
            self._look()

    def weight(self, client: int) -> object:
        """Return a client's due weight in the average."""
        return 1 if self.cfg.federate.client_weights == "uniform" else self.images_of.get(client)

    def ask(self, clients: list[int], task: RecordDict, round_number: int) -> tuple[dict[int, Message], int]:
        """Send a round's task; a node that is silent or gone is asked again who it is in the next round.

        Returns:
            The replies by client, and the bytes sent.
        """
        sent = [self._message(task, self.node_of[k], MessageType.TRAIN, str(round_number)) for k in clients]
        bytes_down = sum(map(messages.num_bytes, sent))
        replies = self._collect(dict(zip(self.grid.push_messages(sent), clients, strict=True)))
        for k in clients:
            reply = replies.get(k)
            raised = ErrorCode.CLIENT_APP_RAISED_EXCEPTION
            if reply is None or (reply.has_error() and reply.error.code != raised):
                self.node_of.pop(k, None)
        return replies, bytes_down

    def _message(self, content: RecordDict, node: int, kind: str, group: str = "") -> Message:
        # A node that wakes later finds nothing to do.
        return Message(content, node, kind, ttl=self.cfg.flower.round_timeout + 60, group_id=group)

    def _collect(self, pending: dict[str, int]) -> dict[int, Message]:
        """Gather the replies to messages, by client, for `round_timeout`."""
        pending = {message: k for message, k in pending.items() if message}
        replies: dict[int, Message] = {}
        until = time.monotonic() + self.cfg.flower.round_timeout
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

    def _look(self) -> None:
        """Ask new nodes who they are, take in those that have answered, let go of those that have left."""
        there = set(self.grid.get_node_ids())
        self.node_of = {k: node for k, node in self.node_of.items() if node in there}
        self._queried = {message: node for message, node in self._queried.items() if node in there}
        lately = {node for node, when in self._refused.items() if time.monotonic() - when < ASK_AGAIN}
        new = sorted(there - {*self.node_of.values(), *self._queried.values(), *lately})
        if new:
            empty = RecordDict({"config": ConfigRecord({})})
            ids = self.grid.push_messages([self._message(empty, node, MessageType.QUERY) for node in new])
            self._queried |= {message: node for message, node in zip(ids, new, strict=True) if message}
        for reply in self.grid.pull_messages(list(self._queried)) if self._queried else ():
            node = self._queried.pop(reply.metadata.reply_to_message_id, None)
            if node is not None and (fault := self._admit(reply, node)):
                log.warning("node %d is not taken in: %s", node, fault)
                self._refused[node] = time.monotonic()

    def _admit(self, reply: Message, node: int) -> str:
        """Take a node in as the client that it says it is, or return why not."""
        if reply.has_error():
            return messages.reason(reply)
        about = reply.content.config_records.get("about", {})
        k = about.get("client")
        if not isinstance(k, int) or not 0 <= k < self.cfg.federate.num_clients:
            return f"it says that it is client {k!r}, and there is none of that number"
        if k in self.node_of:
            return f"it says that it is client {k}, who is there already"
        if about.get("code") != node_code():
            return f"client {k} has another version of fmfl: install the server's"
        self.node_of[k], self.images_of[k] = node, about.get("images")
        log.info("client %d is there with %s images", k, about.get("images"))
        return ""


def train_round(nodes: Nodes, run: Run) -> list[ClientUpdate]:
    """Train a round's clients at their nodes (Eq. 2); return the good updates in the clients' order.

    A client is left out if it is silent until `round_timeout`, fails, or answers with something other than
    finite weights of this student. Its fault is logged and goes to `run.traffic`. The first round waits for
    all clients, later ones for `min_clients`.

    Raises:
        UserError: fewer than `min_clients` good updates; a new start goes on at this round.
    """
    number, flower = run.round_number + 1, nodes.cfg.flower
    wanted = run.participants()
    needed = min(flower.min_clients, len(wanted))
    nodes.wait(set(wanted), needed if nodes.images_of else len(wanted))
    there = [k for k in wanted if k in nodes.node_of]
    faults = {k: "is not there" for k in wanted if k not in there}
    replies, bytes_down = nodes.ask(there, messages.pack_task(number, run.theta), number)
    updates: dict[int, ClientUpdate] = {}
    for k in there:
        try:
            if k not in replies:
                raise ValueError(f"gave no answer within {flower.round_timeout:g} s")
            updates[k] = messages.unpack_update(replies[k], k, run.theta, nodes.weight(k))
        except ValueError as error:
            faults[k] = str(error)
    for k, fault in faults.items():
        log.warning("round %d: client %d %s", number, k, fault)
    bytes_up = sum(map(messages.num_bytes, replies.values()))
    run.traffic = Traffic(list(updates), bytes_up, bytes_down, faults)
    if len(updates) < needed:
        sentences = "; ".join(f"client {k} {fault}" for k, fault in faults.items())
        raise UserError(
            f"round {number} has {len(updates)} good updates and min_clients asks for {needed} "
            f"({sentences}): see to these clients and start the run again, it goes on at this round"
        )
    return [run.note(k, update) for k, update in updates.items()]

"""The study's engine `flower`: a round's clients train behind Flower's messages, in this process.

The clients train under the same random keys as without messages and are averaged in the same order, so the
rounds end in the same bytes. docs/hospitals.md goes from here to several machines.
"""

from collections.abc import Callable, Iterable

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.message_pb2 import Message as MessageProto
from flwr.supercore.task_identity import TaskIdentity

from fmfl import runs
from fmfl.config import Settings
from fmfl.federate import ClientUpdate
from fmfl.flower.client import ClientData, make_client_app, recall, remember
from fmfl.flower.nodes import Nodes, train_round
from fmfl.runs import Run

#: Client k is node FIRST_NODE + k.
FIRST_NODE = 1000


def connect(cfg: Settings) -> Callable[[Run], Iterable[ClientUpdate]]:
    """Return the function that trains a round's clients behind messages.

    Centralised and standalone runs exchange nothing and train without.
    """

    def train(run: Run) -> Iterable[ClientUpdate]:
        if run.arm != "federated":
            return runs.train_clients(run)
        nodes = simulated(cfg, run)
        updates = train_round(nodes, run)
        # Into the checkpoint, so that a stopped run goes on in the same bytes; of clients left out as well.
        kept = {k: recall(nodes.grid.contexts[FIRST_NODE + k]) for k in run.clients}
        run.memory = {k: memory for k, memory in kept.items() if memory}
        return updates

    return train


def simulated(cfg: Settings, run: Run) -> Nodes:
    """Return the nodes of a run whose clients' images are all here; each sees its own and its messages."""

    def data_of(context: Context, _: Settings) -> ClientData:
        number = int(context.node_config["partition-id"])
        return ClientData(number, run.clients[number], run.model)

    contexts = []
    for k in run.clients:
        contexts.append(Context(1, FIRST_NODE + k, {"partition-id": k}, RecordDict(), cfg.flat()))
        remember(contexts[-1], run.memory.get(k, {}))
    return Nodes(InProcess(make_client_app(data_of), contexts), cfg)


class InProcess:
    """A Flower grid whose nodes live in this process: messages are serialised, delivered and answered.

    It has the methods of `flwr.serverapp.Grid` that `Nodes` calls. Flower's own simulation needs Ray; on
    one machine this gives the same bytes without it.
    """

    def __init__(self, app: ClientApp, contexts: Iterable[Context]):
        self.app = app
        self.contexts = {context.node_id: context for context in contexts}
        self.posted: dict[str, bytes] = {}
        # A message takes its sender from here, where Flower's own processes have it.
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, SUPERLINK_NODE_ID, 1

    def get_node_ids(self) -> list[int]:
        """Return all nodes, which never leave."""
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

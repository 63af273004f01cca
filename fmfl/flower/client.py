"""A client behind Flower's messages: it says which one it is, and trains from the weights that it is sent."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from torch import nn

from fmfl import config, data, devices, federate, models, parallel, states
from fmfl.config import Settings
from fmfl.data import Cohort
from fmfl.errors import UserError
from fmfl.flower import messages
from fmfl.states import State
from fmfl.study import stages
from fmfl.train import Examples


@dataclass
class ClientData:
    """Data of one client.

    Attributes:
        number: its place among the clients, from 0.
        examples: its images.
        model: a student to train in; None: one is built.
    """

    number: int
    examples: Examples
    model: nn.Module | None = None


def make_client_app(data_of: Callable[[Context, Settings], ClientData]) -> ClientApp:
    """Return Flower's ClientApp for the clients whose data a function finds."""
    app = ClientApp()

    @app.query()
    def introduce(message: Message, context: Context) -> Message:
        """Tell the client's number, how many images it has, and the code that it would train with."""
        own = data_of(context, settings_of(context))
        about = {"client": own.number, "images": len(own.examples), "code": node_code()}
        return Message(RecordDict({"about": ConfigRecord(about)}), reply_to=message)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        """Eq. 2, from the weights in the message to those in the reply."""
        cfg = settings_of(context)
        return Message(_train(message.content, context, cfg, data_of(context, cfg)), reply_to=message)

    return app


def _train(task: RecordDict, context: Context, cfg: Settings, own: ClientData) -> RecordDict:
    device = own.examples.device
    model = own.model or models.build(cfg.distill.student, device=device, batch_norm=cfg.federate.batch_norm)
    round_number, theta = messages.unpack_task(task, models.copy_state(model))
    with parallel.one_thread(device):
        update = federate.train_client(
            model,
            theta,
            own.examples,
            cfg.federate,
            key=(cfg.federate.seed, own.number, round_number),
            memory=recall(context),
            precision=devices.precision_of(cfg.run),
        )
    remember(context, update.memory)
    return messages.pack_update(own.number, update)


def settings_of(context: Context) -> Settings:
    """Return the run's settings from Flower's run config, under the checks of every other run.

    Raises:
        UserError: a parameter is unknown, mistyped or out of range.
    """
    return config.settings(dict(context.run_config) | {"engine": "flower"})


def node_code() -> str:
    """Return the digest of the code that a node and its server must share: training, images, messages."""
    own = ("data.py", "sources/contents.py", "flower/messages.py", "flower/client.py")
    return states.code_digest((*states.TRAINING_CODE, *own))


def remember(context: Context, memory: State) -> None:
    """Keep a client's memory in Flower's context until its next round."""
    context.state["memory"] = ArrayRecord(
        {name: Array(value.detach().cpu().contiguous().numpy()) for name, value in memory.items()}
    )


def recall(context: Context) -> State:
    """Return a client's memory from its last round."""
    record = context.state.array_records.get("memory", ArrayRecord())
    return {name: torch.from_numpy(value.numpy().copy()) for name, value in record.items()}


def own_images(context: Context, cfg: Settings) -> ClientData:
    """Read a SuperNode's images: all of its own folder, or its part of the run's `data`.

    The node's configuration names the folder in `data` and the client's number in `partition-id`.

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
        cohort = load(str(folder), cfg)
        indices = torch.arange(len(cohort), device=cohort.images.device)
    return ClientData(number, Examples(cohort.images, cohort.masks, indices, device=cohort.device))


def load(sources: str, cfg: Settings) -> Cohort:
    """Read folders of images at the run's size, on its device."""
    devices.set_determinism(cfg.run)
    cohort = data.load(
        sources,
        size=cfg.data.size,
        mask_class=cfg.data.mask_class,
        strict=cfg.data.strict,
        progress=False,
    )
    return cohort.to(devices.device_of(cfg.run))


client_app = make_client_app(own_images)

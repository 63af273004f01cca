"""Messages between a server and its clients.

To a client cross the round's number and the global state; from it its state, its number, how many images it
has trained on and its seconds. No image, no mask and no row of its table does.
"""

import math

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.common.serde import message_to_proto
from torch import Tensor

from fmfl import federate, states
from fmfl.federate import ClientUpdate
from fmfl.states import State
from fmfl.train import FitResult


def pack(state: State) -> ArrayRecord:
    """Return a state as one flat array a dtype, in the order of its tensors' names.

    Each array that crosses costs about a kilobyte of names and headers; a student has hundreds of tensors.
    """
    flat: dict[str, list[Tensor]] = {}
    for _, value in sorted(state.items()):
        flat.setdefault(_dtype(value), []).append(value.detach().cpu().reshape(-1))
    return ArrayRecord({dtype: Array(torch.cat(parts).numpy()) for dtype, parts in flat.items()})


def unpack(record: ArrayRecord, like: State) -> State:
    """Return the state that `pack` took apart.

    Args:
        record: flat arrays by dtype.
        like: names, shapes and dtypes; the tensors come to its device.

    Raises:
        ValueError: the arrays are not those of such a state.
    """
    names: dict[str, list[str]] = {}
    for name, value in sorted(like.items()):
        names.setdefault(_dtype(value), []).append(name)
    state: State = {}
    for dtype, group in names.items():
        if dtype not in record:
            raise ValueError(f"the weights hold no {dtype} numbers")
        try:
            flat = torch.from_numpy(record[dtype].numpy().copy())
        except (TypeError, ValueError) as error:
            raise ValueError(f"the {dtype} numbers of the weights cannot be read: {error}") from None
        sizes = [like[name].numel() for name in group]
        if _dtype(flat) != dtype or flat.shape != (sum(sizes),):
            raise ValueError("the weights are not as many numbers as this student has, or of another kind")
        for name, part in zip(group, flat.split(sizes), strict=True):
            state[name] = part.view(like[name].shape).to(like[name].device)
    if len(record) > len(names):
        raise ValueError("the weights hold numbers of a kind that this student has not")
    return {name: state[name] for name in like}


def _dtype(value: Tensor) -> str:
    return str(value.dtype).removeprefix("torch.")


def layout(state: State) -> str:
    """Return a fingerprint of names, shapes and dtypes: equal ones can be averaged."""
    return states.fingerprint([(name, list(v.shape), str(v.dtype)) for name, v in sorted(state.items())])


def num_bytes(message: Message) -> int:
    """Count the bytes of a message as Flower serialises it."""
    return message_to_proto(message).ByteSize()


def pack_task(round_number: int, theta: State) -> RecordDict:
    """Return a round's task for its clients."""
    about = {"round": round_number, "layout": layout(theta)}
    return RecordDict({"weights": pack(theta), "config": ConfigRecord(about)})


def unpack_task(records: RecordDict, like: State) -> tuple[int, State]:
    """Return the round's number and the global state.

    Raises:
        ValueError: the state is of another student than `like`.
    """
    about = records["config"]
    if about["layout"] != layout(like):
        raise ValueError("the weights are of another student")
    return int(about["round"]), unpack(records["weights"], like)


def pack_update(number: int, update: ClientUpdate) -> RecordDict:
    """Return a client's reply to a round's task."""
    numbers = {
        "weight": update.num_examples,
        "images_seen": update.fit.images_seen,
        "seconds": update.fit.seconds,
    }
    about = {"client": number, "layout": layout(update.state)}
    return RecordDict(
        {"weights": pack(update.state), "about": ConfigRecord(about), "numbers": MetricRecord(numbers)}
    )


def unpack_update(reply: Message, number: int, theta: State, weight: object) -> ClientUpdate:
    """Return the update in a client's reply.

    Args:
        number: the client's.
        theta: names, shapes and dtypes of the weights.
        weight: the client's due weight; another one could make it the whole average.

    Raises:
        ValueError: what is wrong with the reply, as the end of a sentence about the client.
    """
    if reply.has_error():
        raise ValueError(f"failed: {reason(reply)}")
    records = reply.content
    about = records.config_records.get("about", {})
    numbers = records.metric_records.get("numbers", {})
    if about.get("client") != number:
        raise ValueError(f"answers as client {about.get('client')!r}")
    if about.get("layout") != layout(theta):
        raise ValueError("gives tensors of other names, shapes or dtypes than this student's")
    claimed, images, seconds = (numbers.get(name) for name in ("weight", "images_seen", "seconds"))
    if not isinstance(claimed, int) or claimed <= 0 or not isinstance(images, int) or images <= 0:
        raise ValueError(f"has trained on {images!r} images with weight {claimed!r}")
    if claimed != weight:
        raise ValueError(f"asks for weight {claimed} where it has {weight}")
    try:
        state = unpack(records.array_records.get("weights", ArrayRecord()), theta)
    except ValueError as error:
        raise ValueError(f"gives no usable update: {error}") from None
    if not federate.is_finite(state):
        raise ValueError("gives weights that are not finite")
    if not isinstance(seconds, float) or not 0 <= seconds < math.inf:
        seconds = 0.0
    return ClientUpdate(state, claimed, FitResult(images_seen=images, seconds=seconds), {})


def reason(reply: Message) -> str:
    """Return why a node failed: of an exception its own words alone."""
    text = reply.error.reason or f"error {reply.error.code}"
    return text.partition(":<'")[2].removesuffix("'>") or text

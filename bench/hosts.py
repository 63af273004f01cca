"""The deployment with every node a host of its own: Linux network namespaces, and the bytes that crossed."""

import contextlib
import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from bench import deployment, measure
from fmfl import models
from fmfl.errors import UserError

CLIENTS = 3
PREFIX = "fmfl-bench"


def _ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True, timeout=20).stdout


@contextlib.contextmanager
def hosts(clients: int) -> Iterator[None]:
    """A namespace for the server and one for each client, with a cable between; all are removed at the end.

    Client K is 10.231.K.2 and finds the server at 10.231.K.1. No namespace has a way out.
    """
    names = [f"{PREFIX}-server", *(f"{PREFIX}-client-{k}" for k in range(clients))]
    made = []
    try:
        for name in names:
            _ip("netns", "add", name)
            made.append(name)
            _ip("-n", name, "link", "set", "lo", "up")
        for k in range(clients):
            near, far = f"fmfl-s{k}", f"fmfl-c{k}"
            _ip(
                *("link", "add", near, "netns", names[0], "type", "veth"),
                *("peer", "name", far, "netns", names[1 + k]),
            )
            for name, device, last in ((names[0], near, 1), (names[1 + k], far, 2)):
                _ip("-n", name, "address", "add", f"10.231.{k}.{last}/24", "dev", device)
                _ip("-n", name, "link", "set", device, "up")
        yield
    finally:
        for name in made:
            subprocess.run(["ip", "netns", "del", name], check=False, timeout=20)


def crossed(k: int) -> dict[str, int]:
    """Bytes on client K's cable, whole Ethernet frames, from (up) and to the client (down)."""
    base = f"/sys/class/net/fmfl-c{k}/statistics"
    found = _ip(
        "netns", "exec", f"{PREFIX}-client-{k}", "cat", f"{base}/tx_bytes", f"{base}/rx_bytes"
    ).split()
    return {"up": int(found[0]), "down": int(found[1])}


def run(
    size: int = 64,
    student: str = "mobile_unet",
    images: int = 60,
    rounds: int = 5,
    limit: float = 900,
    out: Path | None = None,
) -> None:
    """A server and three clients, each in its own network namespace: bytes against the model's; as root."""
    settings = {key: value for key, value in locals().items() if key != "out"}
    if os.name != "posix" or os.geteuid() != 0:
        raise UserError("network namespaces can be made by root on Linux alone: run it there")
    given = {"size": size, "student": student, "num_phantoms": images, "num_rounds": rounds}
    given |= {"num_clients": CLIENTS, "device": "cpu"}
    with tempfile.TemporaryDirectory() as folder, hosts(CLIENTS):
        before = [crossed(k) for k in range(CLIENTS)]
        deployment.deployed(
            Path(folder),
            given,
            inside=lambda name: ("ip", "netns", "exec", f"{PREFIX}-{name}"),
            server_of=lambda k: f"10.231.{k}.1",
            host="0.0.0.0",
            limit=limit,
        )
        after = [crossed(k) for k in range(CLIENTS)]
    weights = rounds * models.num_bytes(models.build(student).state_dict())
    rows = []
    for k in range(CLIENTS):
        for way in ("up", "down"):
            number = after[k][way] - before[k][way]
            rows.append({"client": k, "way": way, "bytes": number, "over_weights": number / weights})
    found = {
        "bytes_of_weights_each_way": weights,
        "largest_over_weights": max(row["over_weights"] for row in rows),
    }
    measure.report("hosts", settings, rows, found, out, ("torch", "flwr"))

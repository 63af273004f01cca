"""A deployment by Flower's own programs: a SuperLink at the server, a SuperNode at each client.

The SuperLink lets in the SuperNodes whose public keys it knows, over TLS, and runs the app that `write_app`
writes. The SuperNodes wait for the SuperLink and outlive its restarts: see docs/hospitals.md.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fmfl import config, paths, states
from fmfl.errors import UserError
from fmfl.flower import keys as keyring

#: Port of the SuperLink.
PORT = 8000

#: Port of a SuperNode's own processes on the loopback device; client k takes this plus k.
NODE_PORT = 9094

#: Variables of Flower's programs: no telemetry, no look for updates, and no second's wait for a message.
ENVIRONMENT = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.1",
}

#: The app's project file; its parameters follow.
PROJECT = """[project]
name = "fmfl-study"
version = "0.1.0"
description = "Federated segmentation of chest X-rays from a given start"
license = "Apache-2.0"
dependencies = [] # fmfl itself is installed at every node

[tool.flwr.app]
publisher = "fmfl"

[tool.flwr.app.components]
serverapp = "fmfl_app:server"
clientapp = "fmfl_app:client"

[tool.flwr.app.config]
"""

#: The app's code: the two apps of the installed package.
CODE = """from fmfl.flower.client import client_app as client
from fmfl.flower.server import server_app as server

__all__ = ["client", "server"]
"""


def environment(home: Path) -> dict[str, str]:
    """Return the variables for Flower's programs, whose own files go to `home`."""
    home.mkdir(parents=True, exist_ok=True)
    # Flower starts its parts by their names.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    return os.environ | ENVIRONMENT | {"FLWR_HOME": str(home), "PATH": path}


def program(name: str) -> str:
    """Find one of Flower's programs in this Python's own environment."""
    file = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    if file is None:
        raise UserError(
            f"Flower's program {name} is not installed: pip install -c requirements.lock -e '.[flower]'"
        )
    return file


def flwr(home: Path, *arguments: str) -> str:
    """Run a command of `flwr` and return its output.

    Raises:
        UserError: it failed.
    """
    command = [program("flwr"), *arguments]
    ended = subprocess.run(command, env=environment(home), capture_output=True, text=True, check=False)
    if ended.returncode:
        lines = (ended.stdout + ended.stderr).strip().splitlines() or ["no message"]
        raise UserError(f"flwr {arguments[0]} failed: {lines[-1]}")
    return ended.stdout


# ------------------------------------------------------------------------------------------ the server


def run_config() -> dict[str, Any]:
    """Return every parameter of a run on Flower's nodes, at its default."""
    return {name: value for name, value in config.defaults().items() if name in config.taken_by("F")}


def write_app(folder: Path, given: dict[str, Any]) -> None:
    """Write a run as a Flower app, for `flwr run FOLDER` on any SuperLink.

    Flower refuses a parameter that the app's project file does not list, so it lists all of them.

    Args:
        given: parameters that differ from their defaults.

    Raises:
        UserError: a parameter is unknown, mistyped, out of range, or not one of a run on Flower.
    """
    defaults = run_config()
    config.settings(given)
    if unknown := sorted(set(given) - set(defaults)):
        raise UserError(f"parameter {unknown[0]!r} is not one of a run on Flower: leave it out")
    listed = [f"{name} = {json.dumps(value)}\n" for name, value in (defaults | given).items()]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "pyproject.toml").write_text(PROJECT + "".join(listed), encoding="utf-8")
    (folder / "fmfl_app.py").write_text(CODE, encoding="utf-8")


def serve(keys: Path, out: Path, given: dict[str, Any], *, host: str = "0.0.0.0", port: int = PORT) -> None:
    """Run a SuperLink and the app on it, to its last round; the log goes to standard output.

    Args:
        keys: the folder `server` of `keys.make`.
        out: the results; a run that was stopped goes on from there.
        given: parameters that differ from their defaults.
        host: address to listen on.
        port: the one port that clients have to reach.

    Raises:
        UserError: a parameter or a key is wrong, the port is taken, or the run did not reach its end.
    """
    home = out / "flower"
    keyring.read(keys, "server.pem", "server.key")
    write_app(home / "app", given | {"run_name": str(out)})
    # Ended from outside, it still ends the SuperLink.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with superlink(keys, home, host=host, port=port, known=registry(keys)):
        started = flwr(home, "run", str(home / "app"), "fmfl", "--format", "json")
        number = str(json.loads(started)["run-id"])
        while not (status := run_status(home, number)).startswith("finished"):
            stream = [program("flwr"), "log", number, "fmfl", "--stream"]
            subprocess.run(stream, env=environment(home), check=False)
            time.sleep(1)  # a stream may break off while the run goes on
    if status != "finished:completed":
        raise UserError(
            f"the run ended as {status}, for the reason above: see to it and give the same command again, "
            "it goes on at the round that is not finished"
        )


def run_status(home: Path, number: str) -> str:
    """Return a run's status in Flower's words."""
    listed = json.loads(flwr(home, "list", "--run-id", number, "fmfl", "--format", "json"))
    return listed["runs"][0]["status"]


def registry(keys: Path) -> Path:
    """Return the SuperLink's database in which these public keys are registered; made once for the same keys.

    Each start of a server begins with a copy: it knows its clients from the first moment and after a restart,
    and no message of an older run is left.
    """
    publics = sorted(keys.glob("client-*.pub"))
    if not publics:
        raise UserError(f"{keys} holds no client's public key (client-*.pub): nobody could join")
    file = keys / f"registry-{states.fingerprint([public.read_text() for public in publics])[:8]}.db"
    if file.exists():
        return file
    partial = file.with_suffix(".partial")
    partial.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory() as folder, socket.create_server(("127.0.0.1", 0)) as probe:
        home, port = Path(folder), probe.getsockname()[1]
        probe.close()
        with superlink(keys, home, host="127.0.0.1", port=port):
            for public in publics:
                flwr(home, "supernode", "register", str(public), "fmfl")
        with contextlib.closing(sqlite3.connect(home / "superlink.db")) as database:
            database.execute("VACUUM INTO ?", [str(partial)])
    return partial.replace(file)


def lay_registry(known: Path, home: Path) -> None:
    """Put a copy of a registry where a SuperLink has its database, without what a killed one left."""
    for suffix in ("-wal", "-shm"):  # SQLite would replay them into the copy
        (home / f"superlink.db{suffix}").unlink(missing_ok=True)
    shutil.copyfile(known, home / "superlink.db")


@contextmanager
def superlink(keys: Path, home: Path, *, host: str, port: int, known: Path | None = None) -> Iterator[None]:
    """Run a SuperLink, which has the name `fmfl` in `home`, Flower's own folder.

    Args:
        known: database of registered clients to begin with; None: nobody is known.

    Raises:
        UserError: a key is missing, or the port is taken.
    """
    certificate, key = keyring.read(keys, "server.pem", "server.key")
    try:
        socket.create_server((host, port)).close()
    except OSError as error:
        raise UserError(
            f"{host}:{port} cannot be listened on ({error.strerror}): choose --host or --port"
        ) from None
    here = "127.0.0.1" if host == "0.0.0.0" else host
    env = environment(home)
    if known:
        lay_registry(known, home)
    (home / "config.toml").write_text(
        "[superlink]\ndefault = 'fmfl'\n\n[superlink.fmfl]\n"
        f"address = {json.dumps(f'{here}:{port}')}\n"
        f"root-certificates = {json.dumps(str(certificate.resolve()))}\n"
    )
    command = [
        *(program("flower-superlink"), "--host", host, "--port", str(port)),
        *("--ssl-certfile", certificate, "--ssl-keyfile", key, "--ssl-ca-certfile", certificate),
        *("--database", home / "superlink.db", "--enable-supernode-auth"),
        "--disable-runtime-dependency-installation",
    ]
    with (home / "superlink.log").open("ab") as log:
        running = subprocess.Popen(command, env=env, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
    try:
        _wait_for(running, here, port, home / "superlink.log")
        yield
    finally:
        running.terminate()
        try:
            running.wait(20)
        except subprocess.TimeoutExpired:
            running.kill()


def _wait_for(running: subprocess.Popen, host: str, port: int, log: Path, seconds: float = 120) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until and running.poll() is None:
        with socket.socket() as probe:
            probe.settimeout(1)
            if probe.connect_ex((host, port)) == 0:
                return
        time.sleep(0.2)
    raise UserError(f"Flower's SuperLink did not start: see {log}")


# ------------------------------------------------------------------------------------------ a client


def client_command(data: str | None, server: str, keys: Path, port: int | None = None) -> list[str]:
    """Return the command of Flower's SuperNode for one client.

    Args:
        data: its folders, joined by commas, absolute; None: its part of the run's `data`.
        server: host:port.
        keys: the folder `client-K` of `keys.make`; K is the client's number.
        port: for the SuperNode's own processes on this machine; None: 9094 + K.

    Raises:
        UserError: a key is missing, or a folder's name does not do.
    """
    number = re.fullmatch(r"client-(\d+)", keys.resolve().name)
    if not number:
        raise UserError(f"--keys {keys}: the folder's name tells the client's number, so call it client-K")
    if data and ("'" in data or '"' in data):
        raise UserError(f"--data {data}: Flower takes no quotation mark in a folder's name, rename it")
    certificate, key = keyring.read(keys, "server.pem", "client.key")
    about = f"partition-id={number[1]}" + (f' data="{data}"' if data else "")
    return [
        *(program("flower-supernode"), "--superlink", server, "--root-certificates", str(certificate)),
        *("--auth-supernode-private-key", str(key), "--port", str(port or NODE_PORT + int(number[1]))),
        *("--node-config", about),
    ]


def client(data: str, server: str, keys: Path, port: int | None = None) -> None:
    """Become a client's SuperNode, which waits for its server and trains until it is stopped."""
    command = client_command(data, server, keys, port)
    os.execve(command[0], command, environment(paths.CACHE / "flower" / keys.resolve().name))

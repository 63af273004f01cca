"""A deployment in three commands over Flower's own: keys for all, a server, a client at each hospital.

The server is Flower's SuperLink with TLS, which lets in the SuperNodes whose public keys it has, and one run
of the app beside this file. A client is Flower's SuperNode with a private key and a folder of images.
See docs/hospitals.md.
"""

import contextlib
import datetime
import ipaddress
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from fmfl import paths
from fmfl.config import settings
from fmfl.errors import UserError

APP = Path(__file__).parent / "app"
"""What `flwr run` takes."""

PORT = 8000
NODE_PORT = 9094
"""Where a SuperNode talks with its own processes, on the loopback device; client k takes this plus k."""

#: Nothing is told to Flower's makers, and a message that has come is not left waiting for a second.
ENVIRONMENT = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.1",
}


def environment(home: Path) -> dict[str, str]:
    """Variables for Flower's programs, whose own files go to `home`."""
    home.mkdir(parents=True, exist_ok=True)
    # Flower starts its parts by their names.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    return os.environ | ENVIRONMENT | {"FLWR_HOME": str(home), "PATH": path}


def program(name: str) -> str:
    """One of Flower's programs, from this Python's own environment."""
    found = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    if found is None:
        raise UserError(
            f"Flower's program {name} is not installed: pip install -c requirements.lock -e '.[flower]'"
        )
    return found


# ------------------------------------------------------------------------------------------ keys


def keys(folder: Path, hosts: list[str], clients: int, days: int = 365) -> None:
    """Make what a server and its clients know each other by: a folder for each of them, to be handed over.

    `server/` holds `ca.pem`, `server.pem` and `server.key` for TLS and the clients' public keys;
    `client-K/` holds `ca.pem` and the client's private `client.key`. The key that signed the server's
    certificate is thrown away, so that nobody can sign another.

    Args:
        folder: made new.
        hosts: names or addresses under which clients reach the server; this machine's own are added.
        clients: how many.
        days: how long the certificate is valid.

    Raises:
        UserError: the folder is there already.
    """
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder} holds something already: name a new folder, old keys are not written over")
    now = datetime.datetime.now(datetime.UTC)
    authority = ec.generate_private_key(ec.SECP256R1())
    issuer = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "fmfl study")])

    def certificate(name: x509.Name, key: ec.EllipticCurvePrivateKey, is_ca: bool) -> x509.CertificateBuilder:
        return (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(issuer)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(minutes=5))
            .not_valid_after(now + datetime.timedelta(days=days))
            .add_extension(x509.BasicConstraints(ca=is_ca, path_length=None), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.public_key()), critical=False
            )
        )

    usage = dict.fromkeys(
        (
            *("digital_signature", "content_commitment", "key_encipherment", "data_encipherment"),
            *("key_agreement", "key_cert_sign", "crl_sign", "encipher_only", "decipher_only"),
        ),
        False,
    )
    ca = certificate(issuer, authority, True).add_extension(
        x509.KeyUsage(**usage | {"key_cert_sign": True, "crl_sign": True}), critical=True
    )
    ca_pem = ca.sign(authority, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
    server_key = ec.generate_private_key(ec.SECP256R1())
    names = list(dict.fromkeys([*hosts, "localhost", "127.0.0.1"]))
    server = certificate(
        x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, names[0])]), server_key, False
    ).add_extension(x509.SubjectAlternativeName([_general_name(name) for name in names]), critical=False)
    server_pem = server.sign(authority, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)

    _write(folder / "server" / "ca.pem", ca_pem)
    _write(folder / "server" / "server.pem", server_pem)
    _write(folder / "server" / "server.key", _private(server_key, serialization.PrivateFormat.PKCS8))
    for k in range(clients):
        key = ec.generate_private_key(ec.SECP384R1())
        public = key.public_key().public_bytes(
            serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
        )
        _write(folder / f"client-{k}" / "ca.pem", ca_pem)
        _write(folder / f"client-{k}" / "client.key", _private(key, serialization.PrivateFormat.OpenSSH))
        _write(folder / "server" / f"client-{k}.pub", public + b"\n")


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _private(key: ec.EllipticCurvePrivateKey, kind: serialization.PrivateFormat) -> bytes:
    return key.private_bytes(serialization.Encoding.PEM, kind, serialization.NoEncryption())


def _write(file: Path, content: bytes) -> None:
    """Write a new file that its owner alone can read."""
    file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with open(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as opened:
        opened.write(content)


def _known(folder: Path, *names: str) -> list[Path]:
    files = [folder / name for name in names]
    for file in files:
        if not file.is_file():
            raise UserError(f"{file} is not there: make all keys with `fmfl flower keys FOLDER`")
    return files


# ------------------------------------------------------------------------------------------ the server


def serve(keys: Path, out: Path, given: dict[str, Any], *, host: str = "0.0.0.0", port: int = PORT) -> None:
    """Run a SuperLink and the app on it, to its last round; the log goes to standard output.

    Args:
        keys: the folder `server` that `keys` made.
        out: the results; a run that was stopped goes on from there.
        given: parameters that differ from their defaults.
        host: what to listen on.
        port: the one port that clients have to reach.

    Raises:
        UserError: a parameter or a key is wrong, the port is taken, or the run did not reach its end.
    """
    from fmfl.flower import engine

    unknown = sorted(set(given) - set(engine.run_config()))
    if unknown:
        raise UserError(f"parameter {unknown[0]!r} is not one of a run on Flower: see fmfl/flower/app")
    settings(given | {"run_name": out})
    # Ended from outside, it still ends what it has started.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with superlink(keys, out / "flower", host=host, port=port) as home:
        listed = out / "flower" / "run.toml"
        values = given | {"run_name": str(out)}
        listed.write_text("".join(f"{name} = {json.dumps(value)}\n" for name, value in values.items()))
        started = flwr(home, "run", str(APP), "fmfl", "--run-config", str(listed), "--format", "json")
        number = json.loads(started)["run-id"]
        _stream(home, number)
        while not (status := run_status(home, number)).startswith("finished"):
            time.sleep(2)  # the log has broken off, and the run goes on
            _stream(home, number)
        if status != "finished:completed":
            raise UserError(
                f"the run ended as {status}: what stopped it stands above; the same command goes on at the "
                "round that is not finished"
            )


@contextmanager
def superlink(keys: Path, home: Path, *, host: str, port: int) -> Iterator[Path]:
    """A running SuperLink that knows the clients' public keys; gives Flower's home, where it is `fmfl`."""
    ca, certificate, key = _known(keys, "ca.pem", "server.pem", "server.key")
    publics = sorted(keys.glob("client-*.pub"))
    if not publics:
        raise UserError(f"{keys} holds no client's public key (client-*.pub): nobody could join")
    with socket.socket() as free:
        free.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            free.bind((host, port))
        except OSError as error:
            raise UserError(
                f"{host}:{port} cannot be listened on ({error.strerror}): choose --host or --port"
            ) from None
    here = "127.0.0.1" if host == "0.0.0.0" else host
    env = environment(home)
    (home / "config.toml").write_text(
        "[superlink]\ndefault = 'fmfl'\n\n[superlink.fmfl]\n"
        f"address = {json.dumps(f'{here}:{port}')}\nroot-certificates = {json.dumps(str(ca.resolve()))}\n"
    )
    command = [
        *(program("flower-superlink"), "--host", host, "--port", str(port)),
        *("--ssl-certfile", str(certificate), "--ssl-keyfile", str(key), "--ssl-ca-certfile", str(ca)),
        *("--enable-supernode-auth", "--disable-runtime-dependency-installation"),
    ]
    with (home / "superlink.log").open("ab") as log:
        running = subprocess.Popen(command, env=env, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
    try:
        _wait_for(running, here, port, home / "superlink.log")
        with ThreadPoolExecutor() as pool:  # each is a process that takes seconds to start
            list(pool.map(lambda public: flwr(home, "supernode", "register", str(public), "fmfl"), publics))
        yield home
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


def flwr(home: Path, *arguments: str) -> str:
    """What a command of `flwr` prints.

    Raises:
        UserError: it failed.
    """
    ended = subprocess.run(
        [program("flwr"), *arguments], env=environment(home), capture_output=True, text=True, check=False
    )
    if ended.returncode:
        said = (ended.stdout + ended.stderr).strip().splitlines() or ["without a word"]
        raise UserError(f"flwr {arguments[0]} failed: {said[-1]}")
    return ended.stdout


def _stream(home: Path, number: str) -> None:
    """Show a run's log until it ends."""
    command = [program("flwr"), "log", str(number), "fmfl", "--stream"]
    subprocess.run(command, env=environment(home), check=False)


def run_status(home: Path, number: str) -> str:
    """How a run stands, in Flower's words."""
    listed = json.loads(flwr(home, "list", "--run-id", str(number), "fmfl", "--format", "json"))
    return listed["runs"][0]["status"]


# ------------------------------------------------------------------------------------------ a client


def client_command(
    data: str | None, server: str, keys: Path, number: int, clients: int, port: int | None = None
) -> list[str]:
    """Flower's SuperNode for one client.

    Args:
        data: its folders, joined by commas, absolute; None: its part of the run's `data`, by its number.
        server: host:port.
        keys: the folder `client-K` that `keys` made.
        number: K.
        clients: how many there are.
        port: for the SuperNode's own processes on this machine.
    """
    ca, key = _known(keys, "ca.pem", "client.key")
    held = f"partition-id={number} num-partitions={clients}"
    if data is not None:
        held += f' data="{data}"'
    if data and ("'" in data or '"' in data):
        raise UserError(f"--data {data}: Flower takes no quotation mark in a folder's name, rename it")
    return [
        *(program("flower-supernode"), "--superlink", server, "--root-certificates", str(ca)),
        *("--auth-supernode-private-key", str(key), "--port", str(port or NODE_PORT + number)),
        *("--node-config", held),
    ]


def client(
    data: str,
    server: str,
    keys: Path,
    number: int,
    clients: int = 3,
    port: int | None = None,
    patience: float = 120.0,
) -> None:
    """Run a client's SuperNode until it is stopped; it waits for a server that is not there.

    A server that has just been started learns the clients' keys one by one: a client that comes earlier is
    turned away and tries again. A server that was started again does not know the nodes that were there:
    their SuperNodes end, and are started anew.

    Args:
        patience: seconds for which a client that is turned away tries again.

    Raises:
        UserError: the server does not take this client's key, or it is another client's.
        SystemExit: the SuperNode was stopped, or could not begin.
    """
    if (whose := re.fullmatch(r"client-(\d+)", keys.name)) and int(whose[1]) != number:
        raise UserError(f"--keys {keys} are client {whose[1]}'s, and --number is {number}: name the same one")
    command = client_command(data, server, keys, number, clients, port)
    env = environment(paths.CACHE / "flower" / f"client-{number}")
    until = time.monotonic() + patience
    while True:
        began = time.monotonic()
        code, refused, stopped = _run_node(command, env)
        was_in = time.monotonic() - began > SETTLED_SECONDS
        if stopped or not (was_in or refused):
            raise SystemExit(code)
        if was_in:
            until = time.monotonic() + patience
        if time.monotonic() > until:
            raise UserError(f"the server at {server} does not know the key in {keys}: ask for its public key")
        time.sleep(AGAIN_SECONDS)


AGAIN_SECONDS = 5.0
"""Between a SuperNode that has ended and the next one."""

SETTLED_SECONDS = 20.0
"""A SuperNode that has run for longer had been taken in: what it cannot do ends it sooner."""

REFUSED = "[code: 2004]"
"""What a SuperNode says where the SuperLink does not know its key."""


def _run_node(command: list[str], env: dict[str, str]) -> tuple[int, bool, bool]:
    """Run a SuperNode; its exit code, whether it was turned away, and whether it was stopped from here."""
    refused, stopped = threading.Event(), threading.Event()
    # A group of its own: a SuperNode that is turned away leaves its helper behind.
    node = subprocess.Popen(
        command,
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )

    def show() -> None:
        for line in node.stdout:
            if REFUSED in line:
                refused.set()
            print(line, end="", flush=True)

    reader = threading.Thread(target=show, daemon=True)
    reader.start()

    def stop(*_: object) -> None:
        stopped.set()
        node.terminate()

    # A terminal that closes hangs up; the SuperNode, in its own group, would not notice. nohup ignores that.
    signals = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    heeded = [number for number in signals if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, stop) for number in heeded}
    try:
        node.wait()
    except KeyboardInterrupt:
        stop()
        node.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        end_group(node)
    reader.join(5)
    return node.returncode, refused.is_set(), stopped.is_set()


def end_group(process: subprocess.Popen, *, patience: float = 20.0) -> None:
    """End a process, and what is left of its group, where the system has groups of processes.

    A SuperLink and a SuperNode end their helpers if they are asked to end; killed, they leave them behind.

    Args:
        patience: seconds to end by itself; 0: killed at once, as by `kill -9`.
    """
    if patience:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience)
    if os.name != "posix":
        process.kill()
        return
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)

"""Real processes on loopback: a SuperLink with TLS and keys, three SuperNodes each with its own folder."""

import asyncio
import contextlib
import csv
import os
import signal
import socket
import sqlite3
import ssl
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path
from typing import IO

import cv2
import numpy as np
import pandas as pd
import psutil
import pytest
import torch
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.serialization import load_ssh_public_key
from flwr.supercore.primitives.asymmetric import public_key_to_bytes

from bench.deployment import end_group
from fmfl import config, data, federate, models, parallel, paths, runs, states
from fmfl.distill import InitialState
from fmfl.errors import UserError
from fmfl.flower import deploy
from fmfl.flower import keys as keyring
from fmfl.sources import phantom
from fmfl.study.cli import main
from fmfl.train import Examples, FitResult

SIZE, IMAGES, CLIENTS, ROUNDS = 64, 6, 3, 3


def run_cli(*arguments: object) -> int:
    """The exit code of `fmfl` with these arguments."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["fmfl", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
    return ended.value.code or 0


# ------------------------------------------------------------------------------------------ keys


def test_keys_are_apart_and_the_certificate_names_the_server(tmp_path):
    keyring.make(tmp_path / "keys", ["fl.example.org", "10.1.2.3"], 2)
    folders = {p.name: {f.name for f in p.iterdir()} for p in (tmp_path / "keys").iterdir()}
    assert folders == {
        "server": {"server.pem", "server.key", "client-0.pub", "client-1.pub"},
        "client-0": {"server.pem", "client.key"},
        "client-1": {"server.pem", "client.key"},
    }
    server = x509.load_pem_x509_certificate((tmp_path / "keys/server/server.pem").read_bytes())
    at_client = x509.load_pem_x509_certificate((tmp_path / "keys/client-1/server.pem").read_bytes())
    assert at_client == server
    server.verify_directly_issued_by(server)
    assert not server.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    names = server.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["fl.example.org", "localhost"]
    assert [str(a) for a in names.get_values_for_type(x509.IPAddress)] == ["10.1.2.3", "127.0.0.1"]
    for k in range(2):
        private = serialization.load_ssh_private_key(
            (tmp_path / f"keys/client-{k}/client.key").read_bytes(), None
        )
        public = (tmp_path / f"keys/server/client-{k}.pub").read_bytes().strip()
        made = private.public_key().public_bytes(
            serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
        )
        assert made == public


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
def test_private_keys_are_their_owners_alone(tmp_path):
    keyring.make(tmp_path / "keys", ["localhost"], 1)
    for file in (tmp_path / "keys").rglob("*.key"):
        assert file.stat().st_mode & 0o077 == 0


def test_keys_are_not_written_over(tmp_path, capsys):
    assert run_cli("flower", "keys", tmp_path / "keys") == 0
    assert run_cli("flower", "keys", tmp_path / "keys") == 2
    assert "holds something already" in capsys.readouterr().err


def test_what_a_person_can_get_wrong_is_one_sentence(tmp_path, capsys):
    keyring.make(tmp_path / "keys", ["localhost"], 1)
    server, client = tmp_path / "keys/server", tmp_path / "keys/client-0"
    whole = ("flower", "client", "--server", "localhost:1")
    for arguments, says in (
        ((*whole, "--keys", client, "--data", tmp_path / "none"), "there is no such folder"),
        ((*whole, "--keys", server, "--data", tmp_path), "so call it client-K"),
        ((*whole, "--keys", tmp_path / "client-7", "--data", tmp_path), "server.pem is not there"),
        (("flower", "server", "--keys", client), "server.key is not there"),
        (("flower", "server", "--keys", server, "-p", "numrounds=3"), "did you mean num_rounds?"),
        (("flower", "server", "--keys", server, "-p", "alpha=0.5"), "not one of a run on Flower"),
        (("flower", "server", "--keys", server, "-p", "run_name=x"), "use --out"),
    ):
        assert run_cli(*arguments) == 2
        error = capsys.readouterr().err
        assert says in error and error.count("\n") == 1


def test_a_port_that_is_taken_is_said(tmp_path):
    keyring.make(tmp_path / "keys", ["localhost"], 1)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with (
            pytest.raises(UserError, match=f"127.0.0.1:{port} cannot be listened on"),
            deploy.superlink(tmp_path / "keys/server", tmp_path / "home", host="127.0.0.1", port=port),
        ):
            pass


def test_a_client_is_its_supernode(tmp_path, monkeypatch):
    """Signals, a closed terminal and exit codes are Flower's own: no process of ours stands in between."""
    keyring.make(tmp_path / "keys", ["localhost"], 2)
    monkeypatch.setattr(paths, "CACHE", tmp_path)
    monkeypatch.setattr(os, "execve", lambda *given: ran.append(given))
    ran = []
    assert run_cli("flower", "client", "--data", tmp_path, "--keys", tmp_path / "keys/client-1",
                   "--server", "fl.example.org:8000") == 0  # fmt: skip
    ((program, command, env),) = ran
    assert Path(program).name == "flower-supernode" and Path(program).is_file()
    config_of_node = command[command.index("--node-config") + 1]
    assert config_of_node == f'partition-id=1 data="{tmp_path}"'
    assert command[command.index("--port") + 1] == str(deploy.NODE_PORT + 1)
    assert env["FLWR_TELEMETRY_ENABLED"] == "0"


# ------------------------------------------------------------------------------------------ the deployment


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def a_hospital(folder: Path, k: int) -> Path:
    """A folder with images, masks and a table whose texts occur nowhere else."""
    images, masks, table = phantom.generate(IMAGES, SIZE, 10 + k)
    names = [f"xray-of-hospital-{k}-{i}" for i in range(IMAGES)]
    for part, arrays in (("images", images), ("masks", masks * 255)):
        (folder / part).mkdir(parents=True)
        for name, array in zip(names, arrays, strict=True):
            cv2.imwrite(str(folder / part / f"{name}.png"), array.squeeze())
    table = table[["age", "sex"]].assign(
        image_id=names, patient_id=[f"Jane-Doe-{k}-{i}" for i in range(IMAGES)]
    )
    table.to_csv(folder / "metadata.csv", index=False)
    return folder


class Listener:
    """Between SuperNodes and SuperLink, with the server's own certificate: keeps every byte, deciphered.

    One thread with an event loop: two threads that read and write one SSL connection at once crash Python.
    """

    def __init__(self, keys: Path, port: int):
        self.there, self.kept = port, {"up": [], "down": []}
        self.inward = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.inward.load_cert_chain(keys / "server.pem", keys / "server.key")
        self.outward = ssl.create_default_context(cafile=str(keys / "server.pem"))
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()
        self.server = self.wait(asyncio.start_server(self.connect, "127.0.0.1", 0, ssl=self.inward))
        self.port = self.server.sockets[0].getsockname()[1]

    def wait(self, coroutine):
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(30)

    def crossed(self, way: str) -> bytes:
        return b"".join(bytes(stream) for stream in self.kept[way])

    async def connect(self, reader, writer):
        try:
            far = await asyncio.open_connection(
                "127.0.0.1", self.there, ssl=self.outward, server_hostname="localhost"
            )
        except OSError:
            writer.close()
            return
        await asyncio.gather(self.copy(reader, far[1], "up"), self.copy(far[0], writer, "down"))

    async def copy(self, source, target, way):
        stream = bytearray()  # one a connection, so that no other's bytes come in between
        self.kept[way].append(stream)
        with contextlib.suppress(OSError):
            while piece := await source.read(65536):
                stream += piece
                target.write(piece)
                await target.drain()
        target.close()

    def close(self):
        async def end():
            self.server.close()
            rest = asyncio.all_tasks() - {asyncio.current_task()}
            for task in rest:
                task.cancel()
            await asyncio.gather(*rest, return_exceptions=True)

        self.wait(end())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(30)
        self.loop.close()


def wait_for(what, seconds: float, why: str):
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if found := what():
            return found
        time.sleep(0.1)
    raise AssertionError(f"waited {seconds:.0f} s in vain for {why}")


def scored_rounds(out: Path) -> int:
    file = out / "results.csv"
    return len(file.read_text().splitlines()) - 2 if file.exists() else -1


FMFL = [sys.executable, "-m", "fmfl"]


def server_command(keys: Path, out: Path, own: Path, port: int, **given: object) -> list[str]:
    """A deployment's server of small pictures, which it scores on its own."""
    given = {"student": "tiny_unet", "size": SIZE, "batch_size": 3, "device": "cpu"} | given
    options = [part for name, value in given.items() for part in ("-p", f"{name}={value}")]
    where = ["--keys", keys / "server", "--out", out, "--test-data", own]
    where += ["--host", "127.0.0.1", "--port", port]
    return [*FMFL, "flower", "server", *map(str, where), *options]


def start_process(command: list[str], at: Path, name: str, log: IO[str]) -> subprocess.Popen:
    """A command with a group, a home and one thread of its own, as on a machine of its own."""
    env = deploy.environment(at / "home" / name) | {"FMFL_CACHE": str(at / "cache"), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
        start_new_session=True,
    )  # fmt: skip


@pytest.fixture(scope="module")
def deployment(tmp_path_factory):
    """Three rounds of three hospitals, a listener between; the third is killed in round 2; and a stranger."""
    at = tmp_path_factory.mktemp("deployment")
    keys, out, port = at / "keys", at / "out", free_port()
    keyring.make(keys, ["localhost"], CLIENTS + 1)
    (keys / "server" / f"client-{CLIENTS}.pub").unlink()  # so the server does not know the last one
    folders = [a_hospital(at / f"hospital-{k}", k) for k in range(CLIENTS + 1)]
    own = a_hospital(at / "server-own", 9)
    listener = Listener(keys / "server", port)
    logs = {name: (at / f"{name}.log").open("w+") for name in ("server", "stranger", "plain", "0", "1", "2")}
    processes: dict[str, subprocess.Popen] = {}

    def start(name: str, command: list[str]) -> subprocess.Popen:
        processes[name] = start_process(command, at, name, logs[name])
        return processes[name]

    def node(name: str, k: int, address: str) -> list[str]:
        return deploy.client_command(str(folders[k]), address, keys / f"client-{k}", port=free_port())

    def log_of(name: str) -> str:
        return Path(logs[name].name).read_text()

    found = {"folders": folders, "out": out, "listener": listener}
    try:
        given = {"num_rounds": ROUNDS, "round_timeout": 90, "min_clients": 2}
        start("server", server_command(keys, out, own, port, **given))
        for k in range(CLIENTS):
            start(str(k), node(str(k), k, f"localhost:{listener.port}"))
        start("stranger", node("stranger", CLIENTS, f"localhost:{port}"))
        wait_for(lambda: scored_rounds(out) >= 1, 300, "the first round")
        # The third hospital gets its message for the second round, and dies.
        receiving = "Receiving: train"
        wait_for(lambda: log_of("2").count(receiving) >= 2, 60, "the second round at the third hospital")
        end_group(processes["2"], patience=0)  # kill -9
        processes["server"].wait(400)
        processes["stranger"].wait(60)
    finally:
        for process in processes.values():
            end_group(process)
        listener.close()
    found |= {"code": processes["server"].returncode, "logs": {name: log_of(name) for name in logs}}
    found["stranger"] = processes["stranger"].returncode
    return found


@pytest.mark.slow
def test_a_hospital_that_is_killed_costs_the_others_no_round(deployment):
    assert deployment["code"] == 0, deployment["logs"]["server"][-3000:]
    table = pd.read_csv(deployment["out"] / "results.csv")
    assert list(table["round"]) == [0, 1, 2, 3] and table.dice.between(0, 1).all()
    seen = table.images_seen.diff()[1:].tolist()
    assert seen == [3 * IMAGES, 2 * IMAGES, 2 * IMAGES]
    record = states.read_record(deployment["out"] / "weights" / "federated-age-random-seed0.safetensors")
    assert [done["clients"] for done in record["rounds"]] == [[], [0, 1, 2], [0, 1], [0, 1]]
    with (deployment["out"] / "faults.csv").open() as file:
        faults = [(int(row["round"]), int(row["client"])) for row in csv.DictReader(file)]
    assert faults == [(2, 2), (3, 2)]
    assert "round 2: client 2 " in deployment["logs"]["server"]


@pytest.mark.slow
def test_the_rounds_end_in_the_local_engines_bytes(deployment, tmp_path):
    """With all hospitals, and with the two that are left."""
    record = states.read_record(deployment["out"] / "weights" / "federated-age-random-seed0.safetensors")
    cfg = config.settings(
        {"run_name": tmp_path, "num_rounds": ROUNDS, "batch_size": 3, "student": "tiny_unet"}
    )
    held = [data.load(folder, size=SIZE, progress=False) for folder in deployment["folders"][:CLIENTS]]
    clients = {k: Examples(c.images, c.masks, torch.arange(len(c))) for k, c in enumerate(held)}
    start = InitialState("random", models.build("tiny_unet", seed=0).state_dict(), FitResult())
    test = torch.arange(2)
    run = runs.start_or_resume(
        tmp_path, start, clients, cfg.federate, student="tiny_unet", cohort=held[0], test=test
    )
    with parallel.one_thread(torch.device("cpu")):
        for number in run.remaining_rounds():
            updates = runs.train_clients(run, record["rounds"][number]["clients"])
            run.finish_round(federate.aggregate(updates), held[0], test)
    assert [done["sha256"] for done in run.rounds] == [done["sha256"] for done in record["rounds"]]


@pytest.mark.slow
def test_a_node_with_a_key_that_the_server_does_not_know_is_refused(deployment):
    assert deployment["stranger"] not in (0, None)
    assert "[code: 2004]" in deployment["logs"]["stranger"]
    assert "SuperNode ID" not in deployment["logs"]["stranger"] and "SuperNode ID" in deployment["logs"]["0"]
    assert f"client {CLIENTS}" not in deployment["logs"]["server"]


@pytest.mark.slow
def test_nothing_of_a_hospitals_data_leaves_it(deployment):
    """All that crossed, deciphered: the weights are in it, so an image would be found."""
    up, down = (deployment["listener"].crossed(way) for way in ("up", "down"))
    start = models.build("tiny_unet", seed=0).state_dict()
    first = max((v for k, v in start.items() if v.is_floating_point()), key=lambda v: v.numel())
    assert first.numpy().tobytes()[:4096] in down and b"tiny_unet" in down
    for k, folder in enumerate(deployment["folders"]):
        for secret in (f"xray-of-hospital-{k}", f"Jane-Doe-{k}", f"hospital-{k}"):
            assert secret.encode() not in up + down
        for file in [*sorted((folder / "images").iterdir())[:3], *sorted((folder / "masks").iterdir())[:3]]:
            assert file.read_bytes()[60:200] not in up
            pixels = cv2.imread(str(file), cv2.IMREAD_GRAYSCALE)
            rows = [row for row in pixels if len(np.unique(row)) > 1][10:13]
            for row in rows:
                for form in (
                    row,
                    (row > 127).astype(np.uint8),
                    row.astype(np.float32),
                    np.float32(row / 255),
                ):
                    assert form.tobytes() not in up
    weights = models.num_bytes(start)
    # Up: three updates, then two, and what a killed one had sent; each a message with little around it.
    assert 7 * weights < len(up) < 8 * 1.05 * weights + 100_000


@pytest.mark.slow
def test_the_bytes_in_the_results_are_those_that_crossed(deployment):
    table = pd.read_csv(deployment["out"] / "results.csv")
    up = len(deployment["listener"].crossed("up"))
    assert table.bytes_up.iloc[-1] == pytest.approx(up, rel=0.05)


@pytest.mark.slow
def test_keys_are_registered_once_and_a_key_that_is_taken_away_is_unknown(tmp_path):
    keyring.make(tmp_path / "keys", ["localhost"], 2)
    server = tmp_path / "keys/server"

    def nodes(file: Path) -> list[bytes]:
        with contextlib.closing(sqlite3.connect(file)) as database:
            return [key for (key,) in database.execute("SELECT public_key FROM node")]

    both = deploy.registry(server)
    assert len(set(nodes(both))) == 2 and deploy.registry(server) == both
    (server / "client-1.pub").unlink()
    (left,) = nodes(deploy.registry(server))
    assert left == public_key_to_bytes(load_ssh_public_key((server / "client-0.pub").read_bytes()))


@pytest.mark.slow
def test_a_plain_text_connection_is_refused(tmp_path):
    keyring.make(tmp_path / "keys", ["localhost"], 1)
    port = free_port()
    with deploy.superlink(tmp_path / "keys/server", tmp_path / "home", host="127.0.0.1", port=port):
        with (
            pytest.raises((OSError, ValueError)),
            urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=10),
        ):
            pass
        node = [deploy.program("flower-supernode"), "--insecure", "--superlink", f"127.0.0.1:{port}"]
        node += ["--port", str(free_port()), "--max-retries", "1"]
        process = subprocess.Popen(
            node, env=deploy.environment(tmp_path / "node"), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, start_new_session=True,
        )  # fmt: skip
        try:
            process.wait(120)
        finally:
            end_group(process)
        said = process.stdout.read()
        assert process.returncode != 0 and "SuperNode ID" not in said
    assert "Activated node_id" not in (tmp_path / "home" / "superlink.log").read_text()
    assert process.returncode != -signal.SIGKILL


def alive(process: subprocess.Popen) -> list[int]:
    """The processes of a group that has a session of its own."""
    process.poll()
    group = []
    for other in psutil.process_iter(["status"]):
        with contextlib.suppress(ProcessLookupError):
            if os.getpgid(other.pid) == process.pid and other.info["status"] != psutil.STATUS_ZOMBIE:
                group.append(other.pid)
    return group


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="kill -9 of a group of processes")
def test_a_server_that_is_killed_and_started_again_finds_its_clients(tmp_path):
    """The commands of the clients are left alone."""
    keys, out, port = tmp_path / "keys", tmp_path / "out", free_port()
    keyring.make(keys, ["localhost"], 2)
    own = a_hospital(tmp_path / "own", 9)
    server = server_command(keys, out, own, port, num_rounds=3, num_clients=2)
    processes: list[subprocess.Popen] = []

    def start(name: str, command: list[str]) -> subprocess.Popen:
        with (tmp_path / f"{name}.log").open("a") as log:
            processes.append(start_process(command, tmp_path, name, log))
        return processes[-1]

    def client(k: int) -> list[str]:
        folder = a_hospital(tmp_path / f"hospital-{k}", k)
        given = ["--data", folder, "--keys", keys / f"client-{k}"]
        given += ["--server", f"localhost:{port}", "--port", free_port()]
        return [*FMFL, "flower", "client", *map(str, given)]

    try:
        first = start("server", server)
        clients = [start(f"client-{k}", client(k)) for k in range(2)]
        wait_for(lambda: scored_rounds(out) >= 1, 240, "the first round")
        end_group(first, patience=0)  # kill -9
        before = scored_rounds(out)
        again = start("server", server)
        assert again.wait(300) == 0, (tmp_path / "server.log").read_text()[-3000:]
        assert before < 3 and [client.poll() for client in clients] == [None, None]
        # SIGHUP: a terminal was closed.
        for client, name in zip(clients, (signal.SIGTERM, signal.SIGHUP), strict=True):
            client.send_signal(name)
            wait_for(lambda process=client: not alive(process), 120, "the SuperNode and its helpers to end")
    finally:
        for process in processes[::-1]:
            end_group(process)
    assert pd.read_csv(out / "results.csv")["round"].tolist() == [0, 1, 2, 3]
    record = states.read_record(out / "weights" / "federated-age-random-seed0.safetensors")
    assert [done["clients"] for done in record["rounds"]] == [[], [0, 1], [0, 1], [0, 1]]


def test_a_registry_is_not_mixed_with_what_a_killed_server_left(tmp_path):
    """SQLite would replay the log of the old database into the fresh copy."""
    home, known = tmp_path / "home", tmp_path / "registry.db"
    home.mkdir()
    for suffix in ("", "-wal", "-shm"):
        (home / f"superlink.db{suffix}").write_text("of a killed server")
    known.write_text("fresh")
    deploy.lay_registry(known, home)
    assert {file.name: file.read_text() for file in home.iterdir()} == {"superlink.db": "fresh"}


def test_a_clients_number_is_its_folders_also_from_inside_it(tmp_path, monkeypatch):
    keyring.make(tmp_path / "keys", ["localhost"], 2)
    monkeypatch.chdir(tmp_path / "keys" / "client-1")
    assert "partition-id=1" in " ".join(deploy.client_command(None, "localhost:1", Path()))

"""What a round costs behind Flower's messages and in a deployment of real processes, against local rounds."""

import contextlib
import itertools
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from bench import measure
from fmfl import config, federate, models
from fmfl.distill import InitialState
from fmfl.flower import deploy, keys
from fmfl.states import read_record
from fmfl.study import stages
from fmfl.train import FitResult

FMFL = [sys.executable, "-m", "fmfl"]


def in_process(folder: Path, engine: str, given: dict[str, Any]) -> tuple[list[float], list[str]]:
    """Seconds of each round in this process on one thread, and each state's digest."""
    cfg = config.settings(
        given | {"engine": engine, "run_name": str(folder), "arms": "federated", "inits": "random"}
    )
    cohort = stages.load_cohort(cfg)
    parts = stages.holdout(cfg, cohort)
    clients = stages.partition(cohort, parts.federated, cfg.federate)
    model = models.build(cfg.distill.student, seed=cfg.federate.seed)
    start = InitialState("random", models.copy_state(model), FitResult())
    (run,) = stages.start_runs(cfg, cohort, parts, clients, {"random": start})
    train_round = stages.engine(cfg)
    seconds = []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for _ in run.remaining_rounds():
            began = time.perf_counter()
            run.finish_round(federate.aggregate(train_round(run)), cohort, parts.test)
            seconds.append(time.perf_counter() - began)
    finally:
        torch.set_num_threads(threads)
    return seconds, [done["sha256"] for done in run.rounds]


def deployed(
    folder: Path,
    given: dict[str, Any],
    *,
    inside: Callable[[str], Sequence[str]] = lambda _: (),
    server_of: Callable[[int], str] = lambda _: "127.0.0.1",
    host: str = "127.0.0.1",
    port: int = 8765,
    limit: float = 900.0,
) -> list[float]:
    """When each round was finished, from the first one on, in a deployment that this starts and ends.

    Each node takes its part of `data` by its number.

    Args:
        folder: for keys, logs and results.
        given: parameters of the run.
        inside: what to begin a command with, for `server` and `client-K`.
        server_of: where client K finds the server.
        host: what the server listens on.
        port: likewise.
        limit: seconds after which it is given up.

    Raises:
        RuntimeError: it did not end well in time.
    """
    clients = given["num_clients"]
    addresses = [server_of(k) for k in range(clients)]
    keys.make(folder / "keys", addresses, clients)
    options = [part for name, value in given.items() for part in ("-p", f"{name}={value}")]
    server = [*FMFL, "flower", "server", "--keys", folder / "keys" / "server", "--out", folder / "out"]
    server += ["--test-data", "held_out", "--host", host, "--port", port, *options]
    running = []

    def start(name: str, command: Sequence[object]) -> subprocess.Popen:
        env = deploy.environment(folder / "home" / name) | {"OMP_NUM_THREADS": "1"}
        with (folder / f"{name}.log").open("wb") as log:
            running.append(
                subprocess.Popen(
                    [*inside(name), *map(str, command)], env=env, stdin=subprocess.DEVNULL, stdout=log,
                    stderr=subprocess.STDOUT, start_new_session=True,
                )
            )  # fmt: skip
        return running[-1]

    finished: list[float] = []
    try:
        serving = start("server", server)
        until = time.monotonic() + limit
        for k in range(clients):
            own = folder / "keys" / f"client-{k}"
            node = deploy.client_command(None, f"{addresses[k]}:{port}", own, port=port + 1 + k)
            start(f"client-{k}", node)
        results = folder / "out" / "results.csv"
        while len(finished) < given["num_rounds"]:
            _go_on(serving, until, folder)
            done = len(results.read_text().splitlines()) - 2 if results.exists() else 0
            finished += [time.monotonic()] * (done - len(finished))
        serving.wait(60)
    finally:
        for process in running:
            end_group(process)
    return finished


def end_group(process: subprocess.Popen, *, patience: float = 20.0) -> None:
    """End a process that was started with a session of its own, and what is left of its group.

    Args:
        patience: seconds to end by itself; 0: killed at once, as by `kill -9`.
    """
    if patience:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _go_on(serving: subprocess.Popen, until: float, folder: Path) -> None:
    if serving.poll() not in (None, 0) or time.monotonic() > until:
        raise RuntimeError(f"the deployment did not end well: see {folder / 'server.log'}")
    time.sleep(0.02)


def run(
    size: int = 96,
    student: str = "mobile_unet",
    images: int = 160,
    rounds: int = 6,
    repeats: int = 3,
    out: Path | None = None,
) -> None:
    """Seconds a round of 3 clients: local, behind Flower's messages, and in a deployment on loopback.

    `--images` is of the whole synthetic cohort. A deployment's first round is left out: in it clients join.
    """
    settings = {key: value for key, value in locals().items() if key != "out"}
    given = {"size": size, "student": student, "num_phantoms": images, "num_rounds": rounds}
    given |= {"num_clients": 3, "device": "cpu"}
    taken: dict[str, list[float]] = {"local": [], "flower": [], "deployment": []}
    digests = set()
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(repeats):
            for engine in ("local", "flower"):
                seconds, found = in_process(Path(folder) / f"{engine}{turn}", engine, given)
                taken[engine] += seconds[1:]
                digests.add(tuple(found))
        whole = Path(folder) / "deployment"
        finished = deployed(whole, given)
        taken["deployment"] = [b - a for a, b in itertools.pairwise(finished)]
        digests.add(tuple(digests_of(whole / "out")))
    rows = [
        {"engine": name, "rounds": len(values), "seconds_a_round": statistics.median(values)}
        for name, values in taken.items()
    ]
    local = statistics.median(taken["local"])
    found = {
        "seconds_a_round_over_local": {
            name: measure.spread(value - local for value in taken[name]) for name in ("flower", "deployment")
        },
        "same_states_in_all_rounds": len(digests) == 1,
        "load_of_the_machine": os.getloadavg()[0],
    }
    measure.report("deployment", settings, rows, found, out, ("torch", "flwr"))


def digests_of(out: Path) -> list[str]:
    """The digest of each round's state, from a finished deployment's weights."""
    (file,) = (out / "weights").glob("federated-*.safetensors")
    return [done["sha256"] for done in read_record(file)["rounds"]]

"""`kill -9` at random instants of a small study: it ends as one that was left alone."""

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import psutil

from bench import measure
from fmfl import paths, states
from fmfl.errors import UserError
from fmfl.study import cli, execute, outputs
from fmfl.study.cells import Cell

SMALL = (
    *("-p", "size=32", "-p", "num_phantoms=24", "-p", "proxy=6", "-p", "test=4", "-p", "batch_size=4"),
    *("-p", "student=tiny_unet", "-p", "proxy_epochs=2", "-p", "num_rounds=3"),
)
"""A study of some seconds in which all is there: three starts, three arms, five notebooks."""

BEGINS = "begins: "
"""What `announced` prints before a notebook's name."""


def announced() -> None:
    """The command `fmfl`, which also says when a notebook begins: so a kill knows what it has hit."""

    def telling(run: Callable[..., None]) -> Callable[..., None]:
        def told(cell: Cell, *how: Any) -> None:
            print(BEGINS + cell.name, flush=True)
            run(cell, *how)

        return told

    execute.in_kernel, execute.plain = telling(execute.in_kernel), telling(execute.plain)

    sys.argv[0] = "fmfl"
    cli.main()


@dataclass
class Study:
    """One study's command, its folder, and a cache of its own, so that nothing is found ready.

    Attributes:
        folder: of the results; the cache and what was printed lie beside it.
        arguments: of `fmfl study`.
    """

    folder: Path
    arguments: list[str]

    @property
    def log(self) -> Path:
        """What the last command printed."""
        return self.folder.with_suffix(".log")

    def start(self) -> subprocess.Popen:
        """The command, begun or continued, in a process group of its own."""
        caches = {"FMFL_CACHE": str(self.folder.with_suffix(".cache"))}
        with self.log.open("w") as log:
            return subprocess.Popen(
                [
                    *(sys.executable, "-c", "from bench.kills import announced; announced()", "study"),
                    *("--out", str(self.folder), "--no-progress", *self.arguments),
                ],
                cwd=paths.ROOT,
                env=os.environ | caches,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def finish(self) -> dict[str, float]:
        """Run it to its end.

        Returns:
            The seconds until its first notebook began, and until the end.
        """
        started = time.perf_counter()
        process = self.start()
        while process.poll() is None and len(self.begun()) == 1:
            time.sleep(0.01)
        first = time.perf_counter() - started
        self.check(process.wait())
        return {"start": first, "whole": time.perf_counter() - started}

    def check(self, code: int) -> None:
        """Raise an error unless the command has ended well."""
        if code != 0:
            raise UserError(f"the study failed: {self.log.read_text().strip().splitlines()[-1]}")

    def begun(self) -> list[str]:
        """The parts of the study that the last command has begun, in order."""
        lines = self.log.read_text().splitlines()
        names = [line.removeprefix(BEGINS).split("-")[0] for line in lines if line.startswith(BEGINS)]
        return ["start", *names]

    def seconds(self) -> dict[str, float]:
        """Each notebook's seconds, those of several splits together."""
        found: Counter[str] = Counter()
        for marker in sorted((self.folder / "cells").glob("*/done.json")):
            found[marker.parent.name.split("-")[0]] += outputs.read_json(marker)["seconds"]
        return dict(found)

    def killed_in(self, part: str, after: float, whom: str) -> str | None:
        """Start or continue it, and kill it some seconds after a part has begun.

        Returns:
            The part that was hit; None where the study came to its end before.
        """
        process = self.start()
        while process.poll() is None and part not in self.begun():
            time.sleep(0.01)
        try:
            process.wait(after)
        except subprocess.TimeoutExpired:
            kill(process, whom)
            return self.begun()[-1]
        self.check(process.returncode)
        return None

    def outcome(self) -> dict[str, Any]:
        """All that must not depend on a kill: every file's name, weights' hashes, scores but the seconds."""
        scores = pd.read_csv(self.folder / "results.csv").drop(columns="seconds")
        manifest = outputs.read_json(self.folder / "manifest.json")
        weights = {
            file.name: states.state_digest(states.read_state(file)[0])
            for file in sorted((self.folder / "weights").glob("*.safetensors"))
        }
        return {
            "files": sorted(
                str(file.relative_to(self.folder)) for file in self.folder.rglob("*") if file.is_file()
            ),
            "weights": weights,
            "weights in the manifest": manifest["weights"],
            "rounds in the manifest": manifest["rounds"],
            "results.csv": scores.to_csv(index=False).splitlines(),
            "per_image.csv": (self.folder / "per_image.csv").read_text().splitlines(),
        }


def kill(process: subprocess.Popen, whom: str) -> None:
    """`kill -9` for the command, for its kernels, or for all of them at once, and wait for the command.

    A command whose kernel is killed ends by itself, with an error; a kernel without its command ends itself.
    """
    try:
        kernels = psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        kernels = []
    victims = {"all": [process.pid, *(k.pid for k in kernels)], "command": [process.pid]}
    for pid in victims.get(whom) or [kernel.pid for kernel in kernels] or [process.pid]:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    process.wait()


def parts_of(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """In what two outcomes differ."""
    return [name for name in one if one[name] != other[name]]


def run(
    instants: int = 30,
    jupyter: bool = False,
    only: str = "",
    seed: int = 0,
    splits: str = "age",
    out: Path | None = None,
) -> None:
    """Kill a small study at random instants: it must end in the same weights and scores.

    A study is killed once while it starts and once in each notebook, at an instant drawn from the time that
    the part takes, and started again each time; then it is left to end and compared, and the next one begins.
    `--only` names the parts to hit (start, 01_data, ...). `--jupyter` runs the notebooks in kernels, and
    kills the command, its kernel or both; else all is one process.
    """
    settings = {key: value for key, value in locals().items() if key != "out"}
    if not hasattr(os, "killpg"):
        raise UserError("this system has no kill -9: run the kill test on Linux or macOS")
    arguments = [*SMALL, "--splits", splits, *([] if jupyter else ["--plain"])]
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        whole = Study(Path(folder) / "undisturbed", arguments)
        seconds = whole.finish()
        expected, parts = whole.outcome(), {"start": seconds["start"]} | whole.seconds()
        hit: list[str] = []
        different: list[str] = []
        studies = 0
        while len(hit) < instants:
            studies += 1
            one = Study(Path(folder) / f"killed-{studies}", arguments)
            wanted = [part for part in parts if not only or part in only.split(",")]
            chosen = rng.sample(wanted, min(len(wanted), instants - len(hit)))
            for part in sorted(chosen, key=list(parts).index):
                whom = rng.choice(("all", "command", "kernel")) if jupyter else "all"
                if (found := one.killed_in(part, rng.random() * parts[part], whom)) is not None:
                    hit.append(found)
            one.finish()
            different += [f"study {studies}: {name}" for name in parts_of(one.outcome(), expected)]
    found = {
        "seconds_undisturbed": seconds["whole"],
        "kills": len(hit),
        "studies": studies,
        "weights_compared": len(expected["weights"]),
        "rows_compared": len(expected["results.csv"]) - 1,
        "different": different or "nothing",
    }
    rows = [{"hit": part, "seconds": took, "kills": hit.count(part)} for part, took in parts.items()]
    measure.report("kills", settings, rows, found, out, ("torch",))
    if different:
        raise SystemExit(1)

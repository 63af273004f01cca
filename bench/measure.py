"""What the benchmarks share: images, paired runs, peaks of memory, and results that name machines by kind."""

import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import psutil
import torch
from torch import Tensor

from fmfl import models, paths, runs
from fmfl.data import Cohort
from fmfl.distill import InitialState
from fmfl.runs import Run
from fmfl.study import outputs, provenance
from fmfl.train import FitResult

MIB = 2**20

# ------------------------------------------------------------------------------------------ what is run


def a_cohort(num: int, size: int, device: str | torch.device = "cpu") -> Cohort:
    """Grey noise with a bright disc, which is the mask: what a step costs does not depend on the picture."""
    rng = torch.Generator().manual_seed(0)
    images = torch.randint(20, 120, (num, 1, size, size), dtype=torch.uint8, generator=rng)
    centres = (torch.rand(num, 2, 1, 1, generator=rng) / 4 + 0.375) * size
    places = torch.arange(size)
    masks = (places[:, None] - centres[:, :1]) ** 2 + (places - centres[:, 1:]) ** 2 < (size / 4) ** 2
    images += 100 * masks
    names = [str(i) for i in range(num)]
    table = pd.DataFrame({"image_id": names, "patient_id": names, "site": "", "age": np.nan})
    return Cohort(images.to(device), masks.to(device, torch.uint8), table, pd.DataFrame(), f"bench {num}")


def a_run(folder: Path, cohort: Cohort, parts: list[Tensor], cfg: Any, student: str, precision: str) -> Run:
    """A federated run that is scored once, before its first round, and never ends by itself."""
    initial = InitialState(
        "random", models.copy_state(models.build(student, device=cohort.device)), FitResult()
    )
    return runs.start_or_resume(
        folder,
        initial,
        runs.clients_of(cohort, parts),
        cfg,
        student=student,
        cohort=cohort,
        test=parts[0][:1],
        precision=precision,
    )


def the_device(name: str) -> torch.device:
    """The device by its name; `auto` is a GPU where there is one."""
    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)


# ------------------------------------------------------------------------------------------ time


@dataclass(frozen=True)
class Taken:
    """Seconds of one run: on the wall, and of all this process's threads."""

    wall: float
    cpu: float


def timed(run: Callable[[], object], device: torch.device) -> Taken:
    """Run it once; a GPU is waited for."""
    wait = torch.cuda.synchronize if device.type == "cuda" else (lambda: None)
    wait()
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    wait()
    return Taken(time.perf_counter() - wall, time.process_time() - cpu)


def interleaved(
    sides: dict[str, Callable[[], object]], repeats: int, device: torch.device
) -> dict[str, list[Taken]]:
    """Each side once to warm up, then all of them in turn; every other turn in the opposite order.

    A machine that slows down slows all sides of a turn, so the ratios are taken turn by turn.
    """
    for run in sides.values():
        run()
    taken: dict[str, list[Taken]] = {name: [] for name in sides}
    for turn in range(repeats):
        for name in list(sides)[:: -1 if turn % 2 else 1]:
            taken[name].append(timed(sides[name], device))
    return taken


def spread(values: Iterable[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, median, high = np.percentile(list(values), [25, 50, 75])
    return {"median": float(median), "low": float(low), "high": float(high)}


def ratio(above: list[Taken], below: list[Taken], clock: str = "wall") -> dict[str, float]:
    """Median and quartiles of the ratio of two sides' times, turn by turn."""
    return spread(getattr(a, clock) / getattr(b, clock) for a, b in zip(above, below, strict=True))


def fastest(above: list[Taken], below: list[Taken]) -> float:
    """Ratio of the two sides' shortest times, which other work on the machine has disturbed least."""
    return min(one.wall for one in above) / min(one.wall for one in below)


def median_seconds(taken: list[Taken], clock: str = "wall") -> float:
    """The middle of the times."""
    return statistics.median(getattr(one, clock) for one in taken)


# ------------------------------------------------------------------------------------------ memory


def peak_memory() -> int:
    """The most bytes of memory that this process has held so far.

    Not `ru_maxrss` on Linux: a new process takes over what the one that started it had held.
    """
    status = Path("/proc/self/status")
    if status.exists():
        return 1024 * int(status.read_text().split("VmHWM:")[1].split()[0])
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def held_memory() -> int:
    """Bytes of memory that this process holds now."""
    return psutil.Process().memory_info().rss


def forget_peak() -> None:
    """Let `peak_memory` begin anew; only Linux can."""
    refs = Path("/proc/self/clear_refs")
    if refs.exists():
        refs.write_text("5")


def in_own_process(module: str, function: str, **arguments: object) -> dict[str, Any]:
    """The result of a function of this package, called in a new Python process."""
    code = (
        "import importlib, json, sys; module, function, arguments = json.loads(sys.argv[1]);"
        "found = getattr(importlib.import_module(module), function)(**arguments); print(json.dumps(found))"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code, json.dumps([module, function, arguments])],
        cwd=paths.ROOT,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(ended.stdout.splitlines()[-1])


# ------------------------------------------------------------------------------------------ the result


def machine() -> dict[str, Any]:
    """What the numbers were measured on, by kind: neither names nor paths."""
    return {
        "cpu": provenance.processor(),
        "cores": os.cpu_count(),
        "memory_gib": provenance.memory_gib(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": platform.system(),
    }


def versions(*packages: str) -> dict[str, str]:
    """Python's and packages' versions."""
    found = {"python": platform.python_version()}
    return found | {package: importlib.metadata.version(package) for package in packages}


def report(
    bench: str,
    settings: dict[str, Any],
    rows: list[dict[str, Any]],
    found: dict[str, Any],
    out: Path | None = None,
    packages: tuple[str, ...] = ("torch", "numpy"),
) -> None:
    """Print a table of the rows, the single numbers below it, and all of it as one JSON line.

    Args:
        bench: the command's name.
        settings: what was asked for.
        rows: of the table.
        found: single numbers; a dictionary of median, low and high is one with its quartiles.
        out: a file that the JSON is written to as well.
        packages: whose versions are named.
    """
    if rows:
        print(pd.DataFrame(rows).to_string(index=False, float_format=lambda x: f"{x:.4g}"))
    for name, value in found.items():
        print(f"{name:36} {_readable(value)}")
    whole = {
        "bench": bench,
        "settings": settings,
        "rows": rows,
        **found,
        "machine": machine(),
        "versions": versions(*packages),
        "commit": provenance.commit(),
    }
    print(json.dumps(whole))
    if out is not None:
        outputs.write_text(out, json.dumps(whole, indent=1) + "\n")


def _readable(value: object) -> str:
    if isinstance(value, dict) and set(value) == {"median", "low", "high"}:
        return f"{value['median']:.4g} (quartiles {value['low']:.4g} to {value['high']:.4g})"
    return f"{value:.4g}" if isinstance(value, float) else str(value)

"""Memory of averaging, and of a whole round, against the number of clients."""

import gc
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from bench import measure, rounds
from fmfl import federate, models
from fmfl.config import FederateConfig
from fmfl.states import State


def aggregation(clients: int, student: str, device: str) -> dict[str, float]:
    """The peak of averaging made states, above what was held before; in the process it is called in."""
    where = measure.the_device(device)
    start = models.copy_state(models.build(student, device=where))

    def updates() -> Iterator[tuple[State, int]]:
        for k in range(clients):
            yield (
                {name: value + k if value.is_floating_point() else value for name, value in start.items()},
                1,
            )

    state = models.num_bytes(start) / measure.MIB
    peak = above(where, lambda: federate.aggregate(updates()))
    return {"peak_mib": peak, "state_mib": state}


def a_round(
    clients: int, images: int, size: int, student: str, batch_size: int, device: str
) -> dict[str, float]:
    """The peak of one round, above what the cohort, the model and the run hold between rounds."""
    where = measure.the_device(device)
    torch.set_num_threads(1)
    cohort = measure.a_cohort(images * clients, size, where)
    parts = list(torch.arange(images * clients, device=where).tensor_split(clients))
    cfg = FederateConfig(
        num_clients=clients, batch_size=batch_size, num_rounds=2 * rounds.FOREVER, score_every=rounds.FOREVER
    )
    with tempfile.TemporaryDirectory() as folder:
        run = measure.a_run(Path(folder), cohort, parts, cfg, student, "float32")
        gc.collect()
        peak = above(where, lambda: rounds.fmfl_round(run, cohort))
        return {"peak_mib": peak, "state_mib": models.num_bytes(run.theta) / measure.MIB}


def above(device: torch.device, run: Any) -> float:
    """MiB of the peak while it runs, above what is held when it begins."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return (torch.cuda.max_memory_allocated() - before) / measure.MIB
    before = measure.held_memory()
    measure.forget_peak()
    run()
    return (measure.peak_memory() - before) / measure.MIB


def run(
    clients: str = "3,30,300,1000",
    images: int = 2,
    size: int = 64,
    student: str = "mobile_unet",
    batch_size: int = 8,
    repeats: int = 3,
    device: str = "cpu",
    out: Path | None = None,
) -> None:
    """Peaks of aggregation and of a round of clients with `--images` each, every one in its own process.

    Peaks are above what was held before; `states` is the peak in copies of the student's weights.
    """
    settings = {key: value for key, value in locals().items() if key != "out"}
    rows = []
    found: dict[str, Any] = {}
    how = {
        "aggregation": dict(student=student, device=device),
        "a_round": dict(images=images, size=size, student=student, batch_size=batch_size, device=device),
    }
    for name, arguments in how.items():
        for number in map(int, clients.split(",")):
            taken = [
                measure.in_own_process("bench.memory", name, clients=number, **arguments)
                for _ in range(repeats)
            ]
            peak = measure.spread(one["peak_mib"] for one in taken)["median"]
            rows.append(
                {"what": name, "clients": number, "peak_mib": peak, "states": peak / taken[0]["state_mib"]}
            )
        peaks = [row["peak_mib"] for row in rows if row["what"] == name]
        found[f"{name}_most_over_least"] = max(peaks) / min(peaks)
    found["state_mib"] = taken[0]["state_mib"]
    measure.report("memory", settings, rows, found, out)

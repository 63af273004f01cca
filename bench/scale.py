"""The same images dealt to ever more clients: what a client costs by itself, in seconds and in memory."""

import gc
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench import measure, rounds
from fmfl.config import FederateConfig


def one(
    clients: int, images: int, size: int, student: str, batch_size: int, device: str, precision: str
) -> dict[str, float]:
    """Seconds of a client's share of a warm round, and the peak; measured in the process it is called in."""
    where = measure.the_device(device)
    torch.set_num_threads(1)  # as a study trains on a CPU
    cohort = measure.a_cohort(images, size, where)
    parts = list(torch.arange(images, device=where).tensor_split(clients))
    cfg = FederateConfig(
        num_clients=clients,
        batch_size=batch_size,
        num_rounds=2 * rounds.FOREVER,
        score_every=rounds.FOREVER,
    )
    with tempfile.TemporaryDirectory() as folder:
        run = measure.a_run(Path(folder), cohort, parts, cfg, student, precision)
        whole = run.clients
        # The first steps of a process are slow, and they take its largest pieces of memory.
        run.clients = dict(list(whole.items())[:3])
        rounds.fmfl_round(run, cohort)
        run.clients = whole
        gc.collect()
        taken = measure.timed(lambda: rounds.fmfl_round(run, cohort), where)
    on_gpu = where.type == "cuda"
    peak = torch.cuda.max_memory_allocated() if on_gpu else measure.peak_memory()
    return {"wall": taken.wall, "cpu": taken.cpu, "peak_mib": peak / measure.MIB}


def line(clients: list[int], seconds: list[float]) -> dict[str, float]:
    """The straight line seconds = images' part + clients x a client's cost, and how far from it they lie.

    Least squares of relative distances, so that each number of clients counts the same.
    """
    weights = 1 / np.array(seconds)
    a_client, base = np.polyfit(clients, seconds, 1, w=weights)
    away = (base + a_client * np.array(clients)) * weights - 1
    return {
        "milliseconds_a_client": 1e3 * float(a_client),
        "seconds_for_the_images": float(base),
        "largest_distance_from_the_line": float(np.abs(away).max()),
    }


def run(
    clients: str = "3,30,300,1000",
    images: int = 2000,
    size: int = 64,
    student: str = "mobile_unet",
    batch_size: int = 8,
    repeats: int = 3,
    device: str = "cpu",
    precision: str = "float32",
    out: Path | None = None,
) -> None:
    """One round of ever more clients that hold `--images` together: seconds, peak memory, cost a client.

    Every measurement is a process of its own, the numbers of clients in turn. The cost a client is the slope
    of a line through all of them: the smaller batches of small clients are part of it.
    """
    settings = {key: value for key, value in locals().items() if key != "out"}
    numbers = [int(part) for part in clients.split(",")]
    taken: dict[int, list[dict[str, float]]] = {number: [] for number in numbers}
    for turn in range(repeats):
        for number in numbers[:: -1 if turn % 2 else 1]:
            how: dict[str, Any] = dict(
                images=images, size=size, student=student, batch_size=batch_size,
                device=device, precision=precision,
            )  # fmt: skip
            taken[number].append(measure.in_own_process("bench.scale", "one", clients=number, **how))
    rows = [
        {
            "clients": number,
            "images_a_client": images / number,
            **{key: measure.spread(one[key] for one in found)["median"] for key in found[0]},
        }
        for number, found in taken.items()
    ]
    peaks = [row["peak_mib"] for row in rows]
    found: dict[str, Any] = {"peak_over_the_fewest_clients": max(peaks) / peaks[0]}
    for clock in ("wall", "cpu"):
        for name, value in line(numbers, [row[clock] for row in rows]).items():
            found[f"{name}_{clock}"] = value
    measure.report("scale", settings, rows, found, out)

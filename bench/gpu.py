"""One command that finds out what a GPU gives: speed, bytes, memory, and the time of the paper's grid.

Each part is timed, and one that does not fit into the minutes that are left is left out and named. A part
that fails is named with its error, and the others go on. `--device cpu` runs the same parts on a CPU.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import measure, rounds, teachers
from fmfl import augment, capture, config, devices, metrics, models, prompts, runs, seeds, train
from fmfl.federate import aggregate
from fmfl.states import State
from fmfl.study import execute, grid, outputs, stages

Row = dict[str, Any]

#: A study of a minute, for bytes and for the smoke study's parts that do not depend on its size.
TINY = ("student=tiny_unet", "size=64", "num_phantoms=60", "num_rounds=2", "proxy_epochs=2", "alpha_sweep=")
TINY += ("diagnostics=false",)


@dataclass
class Bench:
    """Settings of all parts, and what they have measured.

    Attributes:
        pairs: student and batch size.
        scale: 1; less makes every part smaller, for a test.
    """

    device: torch.device
    size: int
    pairs: list[tuple[str, int]]
    precision: str
    data: str
    scale: float
    folder: Path
    rows: list[Row] = field(default_factory=list)
    single: dict[str, Any] = field(default_factory=dict)

    def number(self, full: int, least: int = 1) -> int:
        """Return a number of images, steps or repeats at this scale."""
        return max(least, round(full * self.scale))


# ------------------------------------------------------------------------------------------ a step, a round


def bare_step(bench: Bench, student: str, batch: int) -> tuple[Callable[[int], None], Callable[[int], None]]:
    """Return what takes steps on one resident batch: recorded, and launched kernel by kernel."""
    model = models.build(student, device=bench.device).train()
    optimizer = train.adam(model, 1e-3)
    cohort = measure.a_cohort(batch, bench.size, bench.device)
    drawn = augment.draw(batch, seeds.generator(0)).to(bench.device)
    images, masks, _ = augment.apply(cohort.images, cohort.masks, drawn)
    images = images.contiguous(memory_format=torch.channels_last)

    network = weakref.proxy(model)  # as in `train`: else a recording would keep its model, and peaks add up

    def step(images: Tensor, masks: Tensor) -> Tensor:
        rounds.bare_step(network, optimizer, images, masks, bench.precision)
        return images

    def recorded(number: int) -> None:
        resident = capture.resident(model, bench.device)
        with resident.own_stream():
            for _ in range(number):
                resident.step(("bare",), step, images, masks)

    def launched(number: int) -> None:
        for _ in range(number):
            rounds.bare_step(model, optimizer, images, masks, bench.precision)

    return (recorded if capture.usable(bench.device) else launched), launched


def speeds(bench: Bench, student: str, batch: int) -> Iterator[Row]:
    """Images a second: steps launched one by one, bare recorded steps, and a whole round of fmfl."""
    images = bench.number(8) * min(batch, 32)  # larger batches take fewer steps, so that all parts fit
    if bench.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    sides = rounds.Sides(bench.folder, bench.size, student, images, batch, str(bench.device), bench.precision)
    recorded, launched = bare_step(bench, student, batch)
    taken = measure.interleaved(
        {
            "launched one by one": lambda: launched(sides.steps),
            "recorded": lambda: recorded(sides.steps),
            "round": sides.fmfl,
        },
        bench.number(5),
        bench.device,
    )
    seen = dict.fromkeys(taken, sides.steps * batch) | {"round": rounds.CLIENTS * rounds.EPOCHS * images}
    row: Row = {"student": student, "batch": batch}
    row |= {f"{name}, images/s": seen[name] / measure.median_seconds(times) for name, times in taken.items()}
    row["round over recorded"] = measure.ratio(taken["round"], taken["recorded"])["median"]
    if bench.device.type == "cuda":
        row["steps were recorded"] = capture.resident(sides.run.model, bench.device).recordable
        row["peak MiB"] = torch.cuda.max_memory_allocated() / measure.MIB
    yield row


def side_by_side(bench: Bench) -> None:
    """Clients of one round side by side on the card: images a second, and if their bytes stay."""
    student, batch = bench.pairs[0]
    images, clients = bench.number(8) * batch, 6
    cohort = measure.a_cohort(clients * images, bench.size, bench.device)
    cfg = config.FederateConfig(num_clients=clients, batch_size=batch, num_rounds=10**5, score_every=10**5)
    parts = list(torch.arange(len(cohort), device=bench.device).tensor_split(clients))
    run = measure.a_run(bench.folder / "side", cohort, parts, cfg, student, bench.precision)
    first: dict[str, Tensor] = {}
    for number in (1, 2, 3):
        places = [cohort.device] * number

        def one_round(places: list[torch.device] = places) -> State:
            return aggregate(runs.train_clients(run, devices=places))

        state = one_round()  # which records the steps
        taken = measure.timed(one_round, bench.device)
        first = first or state
        name = f"{student}, {number} clients at once"
        bench.single[f"{name}, images/s"] = len(cohort) / taken.wall
        bench.single[f"{name}, largest difference"] = rounds.difference(first, state)


def paper_grid(bench: Bench) -> None:
    """Hours of the paper's grid for one seed, from the speed of a round with its student."""
    measured = [row for row in bench.rows if row.get("student") == "unet" and row["batch"] == 16]
    speed = (measured or bench.rows)[-1]["round, images/s"]
    images = 4500 * 5 * 100
    federated, others = 3 * 3 * images, 2 * images
    proxy = 2 * 1504 * config.PROFILES["paper"]["proxy_epochs"]
    bench.single["student of the paper's grid"] = (measured or bench.rows)[-1]["student"]
    bench.single["the paper's grid, one seed, hours"] = (federated + others + proxy) / speed / 3600


# ------------------------------------------------------------------------------------------ around the step


def scoring(bench: Bench) -> None:
    """Milliseconds an image to score: HD95 and ASSD on the device and by trees on the CPU."""
    number = bench.number(256, 4)
    cohort = measure.a_cohort(number, bench.size)
    predicted = cohort.masks.roll(3, dims=2) > 0
    for device in dict.fromkeys((bench.device, torch.device("cpu"))):
        masks, answer = cohort.masks.to(device), predicted.to(device)
        score = measure.interleaved({"": lambda a=answer, m=masks: metrics.score(a, m)}, 3, device)[""]
        bench.single[f"scoring on {device.type}, ms an image"] = 1e3 * measure.median_seconds(score) / number


def teacher(bench: Bench) -> None:
    """Images a second of the built-in teacher with two boxes an image."""
    frozen, number = teachers.made("builtin", bench.device), bench.number(512, 2)
    cohort = measure.a_cohort(number, bench.size, bench.device)
    boxes = prompts.prompt(cohort.masks, "ground_truth", per_image="one")
    taken = measure.interleaved({"": lambda: frozen.logits(cohort.images, boxes)}, 3, bench.device)[""]
    bench.single["built-in teacher, images/s"] = number / measure.median_seconds(taken)


def audit(bench: Bench) -> None:
    """Seconds of notebook 02 on the images of --data, or on synthetic ones, decoded beforehand."""
    given: dict[str, Any] = {"data": bench.data, "run_name": str(bench.folder / "audit")}
    given |= {"num_phantoms": bench.number(500, 40), "size": bench.size, "student": bench.pairs[0][0]}
    given |= {"proxy_epochs": 2, "device": bench.device.type}
    cfg = config.settings(given)
    cohort = stages.load_cohort(cfg)
    cell = next(cell for cell in grid.plan(cfg, [0], ["iid"]) if cell.notebook == "02_teacher")
    started = time.perf_counter()
    execute.plain(cell, bench.folder / "audit" / "02_teacher.ipynb")
    bench.single["02_teacher, seconds"] = time.perf_counter() - started
    bench.single["02_teacher, images"] = len(cohort)


# ------------------------------------------------------------------------------------------ whole studies


def study(
    bench: Bench,
    name: str,
    *settings: str,
    device: str | None = None,
    profile: str = "smoke",
    own_cache: bool = False,
) -> Path:
    """Run a study in its own process, without Jupyter, and return its folder.

    Args:
        own_cache: read nothing that another study has left, such as a teacher's answers.
    """
    out = bench.folder / name
    cache = {"FMFL_CACHE": str(bench.folder / f"{name}-cache")} if own_cache else {}
    parameters = [f"-p{setting}" for setting in settings]
    subprocess.run(
        [
            *(sys.executable, "-m", "fmfl", "study", "--plain", "--no-progress", "--splits", "iid"),
            *("--profile", profile, "--device", device or bench.device.type, "--out", out, *parameters),
        ],
        check=True,
        capture_output=True,
        text=True,
        env=os.environ | cache,
    )
    return out


def verified(one: Path, other: Path, *options: str) -> str:
    """Return what `fmfl verify` says last of two studies."""
    command = [sys.executable, "-m", "fmfl", "verify", one, other, *options]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    return "equal" if ended.returncode == 0 else (ended.stdout + ended.stderr).strip().splitlines()[-1]


def determinism(bench: Bench) -> None:
    """Two studies with `deterministic`, compared round by round to the byte; then one on a CPU."""
    one, other = (
        study(bench, name, *TINY, "deterministic=true", own_cache=True) for name in ("once", "twice")
    )
    bench.single["deterministic twice"] = verified(one, other)
    if bench.device.type != "cpu":
        exact = study(bench, "exact", *TINY, "deterministic=true", "precision=float32", own_cache=True)
        on_cpu = study(bench, "cpu", *TINY, device="cpu", own_cache=True)
        bench.single["float32 against a CPU, tolerance 1e-3"] = verified(exact, on_cpu, "--tolerance", "1e-3")


def smoke(bench: Bench) -> None:
    """Seconds of the smoke profile's study under one split, start of Python included."""
    started = time.perf_counter()
    study(bench, "smoke", *(TINY if bench.scale < 1 else ()))
    bench.single["smoke study, seconds"] = time.perf_counter() - started


def parts_of(bench: Bench) -> Iterator[tuple[str, float, Callable[[], Any]]]:
    """Yield each part's name, its minutes on an H200 by estimate, and the part; the most telling first."""
    for student, batch in bench.pairs:
        yield (
            f"{student}, batch {batch}",
            0.6,
            lambda student=student, batch=batch: bench.rows.extend(speeds(bench, student, batch)),
        )
    yield "the paper's grid", 0.0, lambda: paper_grid(bench)
    yield "deterministic studies", 1.5, lambda: determinism(bench)
    yield "scoring", 0.2, lambda: scoring(bench)
    yield "teacher", 0.2, lambda: teacher(bench)
    yield "clients side by side", 0.4, lambda: side_by_side(bench)
    yield "audit of the teacher", 1.0, lambda: audit(bench)
    yield "smoke study", 1.0, lambda: smoke(bench)


def run(
    minutes: float = 8.0,
    out: Path = Path("bench/results"),
    device: str = "auto",
    students: str = "mobile_unet:16,resnet18_unet:16,unet:16,mobile_unet:64,resnet18_unet:64,unet:64",
    size: int = 256,
    precision: str = "auto",
    data: str = "phantom",
    scale: float = 1.0,
) -> None:
    """Find out what a GPU gives, in so many minutes; the result is OUT/gpu-CARD.json.

    `--students` has pairs of a student and a batch size; `--data` has the images of the audit; `--scale`
    below 1 makes all parts smaller.
    """
    started = time.monotonic()
    os.environ["TQDM_DISABLE"] = "1"
    where = measure.the_device(device)
    precision = devices.precision_of(config.RunConfig(device=where.type, precision=precision))
    pairs = [(name, int(batch)) for name, batch in (pair.split(":") for pair in students.split(","))]
    settings = {
        "minutes": minutes,
        "size": size,
        "precision": precision,
        "students": students,
        "scale": scale,
    }
    card = torch.cuda.get_device_name(where) if where.type == "cuda" else "cpu"
    file = out / f"{'-'.join(['gpu', *card.lower().replace('/', ' ').split()])}.json"
    left_out: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(where, size, pairs, precision, data, scale, Path(folder))
        for name, estimate, part in parts_of(bench):
            left = minutes - (time.monotonic() - started) / 60
            if estimate > left:
                left_out[name] = f"{left:.1f} minutes were left, about {estimate:g} are needed"
                continue
            begun = time.monotonic()
            try:
                part()
            except subprocess.CalledProcessError as error:
                left_out[name] = ((error.stderr or "").strip() or str(error)).splitlines()[-1]
            except Exception as error:  # the other parts are worth having
                left_out[name] = f"{type(error).__name__}: {error}".splitlines()[0]
            print(f"{name}: {time.monotonic() - begun:.0f} s", left_out.get(name, ""), flush=True)
            # A machine's own time limit may end the command before its last part.
            so_far = {"bench": "gpu", "settings": settings, "rows": bench.rows, **bench.single}
            outputs.write_text(file, json.dumps(so_far | {"left out": left_out}, indent=1) + "\n")
    bench.single |= {"left out": left_out, "seconds": round(time.monotonic() - started)}
    measure.report("gpu", settings, bench.rows, bench.single, file)


if __name__ == "__main__":  # for a machine without the other benchmarks' packages
    import typer

    typer.run(run)

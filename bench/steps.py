"""One optimizer step of each student in other ways than fmfl's: precision, memory layout, compiled."""

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from bench import measure
from fmfl import augment, devices, models, parallel, train
from fmfl.config import FederateConfig


def ways(device: torch.device) -> dict[str, dict[str, Any]]:
    """What each way changes; the first is the base of the ratios."""
    found: dict[str, dict[str, Any]] = {
        "float32": {},
        "bfloat16": {"precision": "bfloat16"},
        "contiguous": {"layout": torch.contiguous_format},
        "compiled": {"compiled": "default"},
    }
    if device.type == "cuda":
        found["compiled, CUDA graphs"] = {"compiled": "reduce-overhead"}
    return found


def a_step(
    student: str,
    batch: tuple[torch.Tensor, torch.Tensor],
    device: torch.device,
    *,
    precision: str = "float32",
    layout: torch.memory_format = torch.channels_last,
    compiled: str = "",
) -> Callable[[], None]:
    """A step of a student of its own on a batch that lies on the device."""
    cfg = FederateConfig()
    model = models.build(student, device=device).to(memory_format=layout).train()
    optimizer = train.adam(model, cfg.learning_rate)
    run = torch.compile(model, mode=compiled) if compiled else model
    images, masks = batch[0].contiguous(memory_format=layout), batch[1]
    loss = train.LOSSES[cfg.loss]

    def step() -> None:
        with devices.autocast(device, precision):
            logits = run(images)
        value = loss(logits.float(), masks, None)
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        optimizer.step()

    return step


@contextmanager
def no_compiler_cache() -> Iterator[None]:
    """Let PyTorch's compiler begin with nothing: else a second run would find what the first has made."""
    name = "TORCHINDUCTOR_CACHE_DIR"
    before = os.environ.pop(name, None)
    with tempfile.TemporaryDirectory() as empty:
        os.environ[name] = empty
        try:
            yield
        finally:
            del os.environ[name]
            if before is not None:
                os.environ[name] = before


def run(
    students: str = "mobile_unet,unet",
    size: int = 96,
    batch_size: int = 8,
    steps: int = 2,
    repeats: int = 9,
    device: str = "cpu",
    out: Path | None = None,
) -> None:
    """Milliseconds a step, and how many steps it takes until a slow first one (compiling) has paid."""
    settings = {key: value for key, value in locals().items() if key != "out"}
    where = measure.the_device(device)
    cohort = measure.a_cohort(batch_size, size, where)
    batch = augment.to_float(cohort.images), cohort.masks.float()
    rows, found = [], {}
    with no_compiler_cache(), parallel.one_thread(where):  # one thread, as a study trains on a CPU
        for student in students.split(","):
            sides: dict[str, Callable[[], object]] = {}
            first: dict[str, float] = {}
            for name, changed in ways(where).items():
                step = a_step(student, batch, where, **changed)
                try:
                    first[name] = measure.timed(step, where).wall
                except Exception as error:  # PyTorch cannot compile every network
                    found[f"{student} {name}"] = f"fails with {type(error).__name__}"
                    continue
                sides[name] = lambda step=step: [step() for _ in range(steps)]
            taken = measure.interleaved(sides, repeats, where)
            base = next(iter(taken))
            for name, times in taken.items():
                ratio = measure.ratio(times, taken[base])
                seconds = measure.median_seconds(times) / steps
                saved = seconds / ratio["median"] - seconds
                rows.append(
                    {
                        "student": student,
                        "way": name,
                        "milliseconds": 1e3 * seconds,
                        "over_float32": ratio["median"],
                        "low": ratio["low"],
                        "high": ratio["high"],
                        "first_step_s": first[name],
                        "pays_after_steps": max(0.0, first[name] - first[base]) / saved
                        if saved > 0
                        else None,
                    }
                )
    measure.report("steps", settings, rows, found, out)

"""The cost of a teacher's logits: images a second and peak memory, with made weights."""

from pathlib import Path
from typing import Any

import torch

from bench import measure
from fmfl import prompts
from fmfl.teacher import Teacher
from fmfl.teachers import builtin, sam


def made(name: str, device: torch.device) -> Teacher:
    """Return a teacher with random weights, which cost as much as its authors': no file is needed."""
    torch.manual_seed(0)
    if name == "builtin":
        network, convention = builtin.network(), builtin.CONVENTION
    else:
        network, convention = sam.network(name), sam.FAMILIES[name].convention
    network = network.to(device).eval().requires_grad_(False)
    return Teacher(name, network, network.image_encoder.img_size, convention, sha256="")


def one(name: str, size: int, images: int, repeats: int, device: str) -> dict[str, Any]:
    """Measure a row of the table in the process that calls it."""
    where = measure.the_device(device)
    before = measure.peak_memory()
    frozen = made(name, where)
    batch = min(frozen.batch_size, images)
    cohort = measure.a_cohort(images, size, where)
    boxes = prompts.prompt(cohort.masks, "ground_truth", per_image="one")

    def ask() -> None:
        frozen.logits(cohort.images, boxes, batch_size=batch)

    taken = measure.interleaved({name: ask}, repeats, where)[name]
    on_gpu = where.type == "cuda"
    peak = torch.cuda.max_memory_allocated() if on_gpu else measure.peak_memory() - before
    return {
        "teacher": name,
        "input": frozen.size,
        "parameters": frozen.num_parameters,
        "batch": batch,
        "images_per_second": images / measure.median_seconds(taken),
        "cpu_seconds_per_image": measure.median_seconds(taken, "cpu") / images,
        "peak_mib": peak / measure.MIB,
    }


def run(
    names: str = "builtin,sam-med2d,sam_vit_b",
    size: int = 256,
    images: int = 4,
    repeats: int = 3,
    device: str = "auto",
    out: Path | None = None,
) -> None:
    """Measure images a second of each teacher with one box an image, and its peak memory.

    Memory is the GPU's, or the process's beyond that of its imports.
    """
    settings = {key: value for key, value in locals().items() if key != "out"}
    rows = [
        measure.in_own_process(
            "bench.teachers", "one", name=name, size=size, images=images, repeats=repeats, device=device
        )
        for name in names.split(",")
    ]
    machine = {"threads": torch.get_num_threads(), "precision": "float32"}
    measure.report("teachers", settings, rows, machine, out, ("torch", "segment-anything"))

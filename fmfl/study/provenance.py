"""Provenance: the code, versions and device behind a study's numbers."""

import importlib.metadata
import os
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

import fmfl
from fmfl import devices, models, paths
from fmfl.config import Settings

#: Packages whose versions numbers depend on.
PACKAGES = ("torch", "torchvision", "numpy", "pandas", "scipy", "segmentation-models-pytorch",
            "segment-anything")  # fmt: skip


#: Folders of the project that a study's numbers depend on.
CODE = ("fmfl", "notebooks", "data")


def where(cfg: Settings) -> dict[str, Any]:
    """Describe the code, versions and device with which a result is computed."""
    device = devices.device_of(cfg.run)
    cuda = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return {
        "fmfl": fmfl.__version__,
        "commit": commit(),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "versions": {package: importlib.metadata.version(package) for package in PACKAGES},
        "device": {
            "kind": device.type,
            "name": cuda or processor(),
            "instructions": "" if cuda else torch.backends.cpu.get_cpu_capability(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "memory_gib": memory_gib(),
            "system": platform.system(),
        },
    }


def processor() -> str:
    """Return the processor's name: another one adds in another order, see docs/reproducibility.md.

    Where the system does not tell it, as Linux on ARM, it is the architecture's.
    """
    cpuinfo = Path("/proc/cpuinfo")  # on Linux `platform` knows the architecture alone
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return next(iter(names), platform.processor() or platform.machine())


def memory_gib() -> float | None:
    """Return the machine's memory; None where the system does not tell (Windows)."""
    if not hasattr(os, "sysconf"):
        return None
    return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)


def commit(*folders: str) -> str:
    """Return the checkout's commit, with `+changes` where files differ; empty outside git.

    Args:
        folders: that count, from the project's root; none: those of `CODE`.
    """

    def git(*arguments: str) -> str:
        return subprocess.check_output(
            ["git", *arguments], cwd=paths.ROOT, stderr=subprocess.DEVNULL, text=True
        ).strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", *(folders or CODE))
        return git("rev-parse", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return ""


def student_card(name: str, size: int, batch_norm: str = "average") -> dict[str, Any]:
    """Describe a student's cost: parameters, bytes on the wire, FLOPs of one image of size x size pixels."""
    model = models.build(name, batch_norm=batch_norm)
    return {
        "student": name,
        "norm": "group" if batch_norm == "group" else "batch",
        "parameters": models.num_parameters(model),
        "bytes": models.num_bytes(model.state_dict()),
        "flops": models.flops(model, torch.zeros(1, 1, size, size)),
    }

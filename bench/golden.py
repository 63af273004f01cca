"""One digest for all that a small study has computed: a change that moves code must not change it."""

import hashlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import pandas as pd
from safetensors import safe_open

from bench import measure

STUDY = [
    *("study", "--plain", "--profile", "smoke", "--splits", "iid,age,quantity"),
    *(f"-p{setting}" for setting in ("student=tiny_unet", "size=64", "num_phantoms=60", "num_rounds=2")),
    *(f"-p{setting}" for setting in ("proxy_epochs=2", "alpha_sweep=", "diagnostics=false")),
]
"""Three starts, three partitions, all arms, on synthetic images."""


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of each state in a study's folder and of results.csv without its seconds, by name."""
    found = {}
    for file in sorted((folder / "weights").glob("*.safetensors")):
        digest = hashlib.sha256()
        with safe_open(file, "numpy") as opened:
            for name in sorted(opened.keys()):
                tensor = opened.get_tensor(name)
                digest.update(f"{name} {tensor.dtype} {tensor.shape}".encode() + tensor.tobytes())
        found[file.stem] = digest.hexdigest()
    table = pd.read_csv(folder / "results.csv", dtype=str).drop(columns="seconds")
    rows = sorted(json.dumps(row, sort_keys=True) for row in table.to_dict("records"))
    found["results.csv"] = hashlib.sha256("\n".join(rows).encode()).hexdigest()
    return found


def run(folder: Path | None = None, out: Path | None = None) -> None:
    """Run the small study, or read one that has run, and print its digests."""
    with tempfile.TemporaryDirectory() as scratch:
        if folder is None:
            folder = Path(scratch) / "golden"
            fmfl = Path(sys.executable).with_name("fmfl")
            subprocess.run([fmfl, *STUDY, "--out", folder], check=True)
        found = digests(folder)
    whole = hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()
    rows = [{"what": name, "sha256": digest[:16]} for name, digest in found.items()]
    measure.report("golden", {"study": " ".join(STUDY)}, rows, {"all": whole}, out)

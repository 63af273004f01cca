"""Paths of the project, found from the package's own file: the same from every working folder."""

import os
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
ROOT = PACKAGE.parent
NOTEBOOKS = ROOT / "notebooks"
DATA = ROOT / "data"
CACHE = Path(os.environ.get("FMFL_CACHE", DATA / "cache"))
WEIGHTS = DATA / "weights"  # fetched by `fmfl teacher download`
RUNS = ROOT / "runs"

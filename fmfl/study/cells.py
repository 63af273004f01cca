"""Cells of a study, and the decision whether one is run again: `Cell.is_done`.

A cell is one notebook with one set of settings. It is done when its `done.json` holds its fingerprint (see
`fingerprints`) and all its files are there (see `Cell.missing`); anything else is run again. Trained states
within a cell are found by fingerprints of their own, so running a cell twice trains nothing twice.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fmfl import config, paths, states
from fmfl.config import Settings, split_list
from fmfl.study import outputs
from fmfl.study.outputs import read_json, read_record

#: Modules whose code changes no number.
NO_NUMBERS = (
    "__main__.py",
    "deadline.py",
    "flower/deploy.py",
    *(f"study/{name}.py" for name in ("cli", "execute", "grid", "inspection", "interrupt", "locks")),
    *(f"study/{name}.py" for name in ("merge", "options", "preflight", "verify")),
)

#: Files of a finished study, besides figures, weights and executed notebooks.
FILES = ("results.csv", "per_image.csv", "table1.csv", "claims.csv", "manifest.json", "report.html")


@dataclass(frozen=True)
class Cell:
    """One notebook with one set of settings.

    Attributes:
        notebook: its name without suffix.
        cfg: all settings.
        needs: keys of the cells that it continues.
        rounds: federated rounds that it trains, a standalone client's counted by its share.
        variant: the one setting in which it differs from the study, "name=value"; empty for the study itself.
    """

    notebook: str
    cfg: Settings
    needs: tuple[str, ...] = ()
    rounds: int = 0
    variant: str = ""

    @property
    def name(self) -> str:
        """Name in the run's folder."""
        return outputs.cell_name(self.cfg, self.notebook)

    @property
    def key(self) -> str:
        """Name in the whole study."""
        return f"{self.variant}/{self.name}" if self.variant else self.name

    @property
    def parameters(self) -> dict[str, Any]:
        """Values to inject: every setting that the notebook depends on, and where it runs."""
        names = config.taken_by(self.notebook)
        return {name: value for name, value in self.cfg.flat().items() if name in names}

    @property
    def executed(self) -> Path:
        """File of the executed notebook."""
        return self.cfg.run_dir / "notebooks" / f"{self.name}.ipynb"

    @property
    def marker(self) -> Path:
        """File of the fingerprint with which the cell was done."""
        return self.cfg.run_dir / "cells" / self.name / "done.json"

    def is_done(self, fingerprint: str) -> bool:
        """Return whether the cell was run with this fingerprint and left all its files."""
        return read_record(self.marker).get("fingerprint") == fingerprint and not self.missing()

    def missing(self) -> list[str]:
        """Name the files that the cell has to leave and that are not there, below the run's folder."""
        cfg, own = self.cfg.federate, f"cells/{self.name}"
        record = read_record(self.cfg.run_dir / own / "cell.json")
        files = [f"notebooks/{self.name}.ipynb", f"{own}/cell.json"]
        files += [f"figures/{name}" for name in record.get("figures", [])]
        if self.notebook == "03_distill":
            files += [f"weights/init-{init}-seed{cfg.seed}.safetensors" for init in split_list(cfg.inits)]
        if self.notebook == "04_federate":
            files += [f"{own}/results.csv", f"{own}/per_image.csv"]
            files += [f"weights/{name}.safetensors" for name in training_runs(self.cfg)]
        if self.notebook == "05_analysis":
            files += [*FILES, "figures/fig2.png", "figures/fig3.png"]
        return [name for name in files if not (self.cfg.run_dir / name).exists()]


def training_runs(cfg: Settings) -> dict[str, float]:
    """Name the runs of one split and seed as their files in `weights/`, each with its share of a run.

    The standalone clients together count as one run.
    """
    cfg, seed = cfg.federate, f"seed{cfg.federate.seed}"
    runs = {
        "federated": {f"federated-{cfg.split}-{init}-{seed}": 1.0 for init in split_list(cfg.inits)},
        "centralised": {f"centralised-pooled-random-{seed}": 1.0},
        "standalone": {
            f"standalone-{cfg.split}-random-{seed}-client{k}": 1 / cfg.num_clients
            for k in range(cfg.num_clients)
        },
    }
    return {name: share for arm in split_list(cfg.arms) for name, share in runs[arm].items()}


def notebook_code(notebook: str) -> list[str]:
    """Return a notebook's code cells; outputs and text are left out."""
    content = read_json(paths.NOTEBOOKS / f"{notebook}.ipynb")
    return ["".join(cell["source"]) for cell in content["cells"] if cell["cell_type"] == "code"]


def fingerprints(cells: list[Cell], inputs: dict[str, str]) -> dict[str, str]:
    """Fingerprint of each cell by its key, over everything that its results depend on.

    That is its settings, the images and the teacher's weights, the code of its notebook and of the package,
    and the fingerprints of the cells that it continues.

    Args:
        cells: in an order in which they can run.
        inputs: fingerprints of the images ("data") and of the weights ("teacher").
    """
    modules = sorted(file.relative_to(paths.PACKAGE).as_posix() for file in paths.PACKAGE.rglob("*.py"))
    code = states.code_digest(tuple(name for name in modules if name not in NO_NUMBERS))
    keys: dict[str, str] = {}
    for cell in cells:
        names = outputs.depends_on(cell.notebook)
        settings = {name: value for name, value in cell.parameters.items() if name in names}
        given = [inputs[name] for name in inputs if name in names]
        before = sorted(keys[key] for key in cell.needs)  # the order of splits and variants changes nothing
        keys[cell.key] = states.fingerprint(
            "cell-3", code, notebook_code(cell.notebook), settings, given, before
        )
    return keys

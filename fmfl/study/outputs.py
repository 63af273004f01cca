"""Outputs of a study's cells: the settings that each notebook depends on, and the files that it leaves."""

import io
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

if TYPE_CHECKING:  # a client of Flower draws nothing
    from matplotlib.figure import Figure
from fmfl import config, states
from fmfl.analysis import landscape, tables
from fmfl.config import Settings
from fmfl.errors import UserError, first_few
from fmfl.study.provenance import where

#: Settings in which the cells of one study may differ.
FREE = config.tagged("free") | config.tagged("where")

#: Folder of a study's variants.
VARY = "vary"


def depends_on(notebook: str) -> set[str]:
    """Return the settings that a notebook's numbers depend on."""
    return config.taken_by(notebook) - config.tagged("where")


#: Of each thing that differs, such as a setting, its value there and here.
Differences = dict[str, tuple[Any, Any]]


def changed(about: dict[str, Any], cfg: Settings, by: str = "05_analysis") -> Differences:
    """Compare the settings that made a cell with others.

    Args:
        about: the cell's record, see `save`; a parameter that came later was at its default then.
        cfg: the other settings.
        by: the notebook that has them; what it does not depend on is not compared.

    Returns:
        The settings that differ, without those in `FREE`.
    """
    used, here = config.defaults() | about["settings"], cfg.flat()
    if here["images_without_age"] == "auto":  # as the study has decided
        here["images_without_age"] = used["images_without_age"]
    names = (depends_on(about["notebook"]) & depends_on(by)).difference(FREE)
    differences = {name: (used[name], here[name]) for name in here if name in names}
    differences |= {name: (used[name], "gone") for name in config.REMOVED if name in used}
    as_if_here = here | config.REMOVED
    return {name: pair for name, pair in differences.items() if pair[0] != as_if_here[name]}


def in_words(differences: Differences) -> str:
    """Name the first three differences, as `num_rounds is 5 there and 3 here`."""
    return first_few(
        f"{name} is {there!r} there and {here!r} here" for name, (there, here) in differences.items()
    )


def cell_records(run_dir: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield name and record of each cell in a run's folder, in the story's order, without damaged ones."""
    for file in sorted((run_dir / "cells").glob("*/cell.json"), key=lambda file: _in_story(file.parent.name)):
        about = read_record(file)
        if about.get("notebook") in config.NOTEBOOKS and isinstance(about.get("settings"), dict):
            yield file.parent.name, about


def _in_story(cell: str) -> list[int | str]:
    """Sort key of a cell's name, by notebook, split and seed: seed 10 after seed 9."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", cell)]


def check_run(cfg: Settings, notebook: str) -> None:
    """Stop a notebook that trains before it writes over a run that other settings made.

    A run's folder holds the weights and results of one set of settings. Cells of 01_data and 02_teacher do
    not count: they are made again in a moment, and 05_analysis leaves out those that do not belong. Nor does
    `images_without_age`, which a study changes when it adds a split by age: rounds of other images move
    aside and come back, and 05_analysis does not mix them.

    Raises:
        UserError: the folder holds starts or results of other settings.
    """
    other: Differences = {}
    for _, about in cell_records(cfg.run_dir):
        if about["notebook"] in ("03_distill", "04_federate"):
            other |= changed(about, cfg, notebook)
    other.pop("images_without_age", None)
    if other:
        name, (_, here) = next(iter(other.items()))
        own = re.sub(r"[^\w.=-]+", "_", f"{cfg.run_dir.name}-{name}={Path(as_text(here)).name}")
        raise UserError(
            f"run {cfg.run.run_name!r} holds results of other settings ({in_words(other)}), and would lose "
            f"them: name a run of its own in the parameters cell, such as run_name = {own!r}"
        )


def variant_dir(cfg: Settings, variant: str) -> Path:
    """Folder of the cells and weights of a variant, the study with one setting changed, "name=value"."""
    return cfg.run_dir / VARY / variant.replace("/", "_")


def cell_name(cfg: Settings, notebook: str) -> str:
    """Name of a notebook's results in the run's folder: by split and seed where it depends on them."""
    seed = f"-seed{cfg.federate.seed}"
    return notebook + {"03_distill": seed, "04_federate": f"-{cfg.federate.split}{seed}"}.get(notebook, "")


def save(cfg: Settings, notebook: str, record: dict[str, Any], **tables: pd.DataFrame) -> Path:
    """Write a cell's tables and a record of its settings, each file whole or not at all.

    Args:
        cfg: the run's settings.
        notebook: the notebook's name without suffix.
        record: JSON values that the manifest shall show for this cell.
        **tables: written as `{name}.csv`.

    Returns:
        The cell's folder.
    """
    folder = cfg.run_dir / "cells" / cell_name(cfg, notebook)
    folder.mkdir(parents=True, exist_ok=True)
    for name, table in tables.items():
        write_text(folder / f"{name}.csv", table.to_csv(index=False))
    about = {"notebook": notebook, "settings": cfg.flat(), "run": where(cfg), "record": record}
    about["figures"] = list(drawn.pop(cfg.run_dir, {}))
    write_text(folder / "cell.json", json.dumps(about, indent=1, default=str))
    return folder


#: To each run's folder the figures drawn since the last cell was saved, in their order: the cell's own.
drawn: dict[Path, dict[str, None]] = {}


def save_figure(cfg: Settings, name: str, figure: "Figure") -> "Figure":
    """Keep a figure under `figures/{name}.png` and give it back to be shown."""
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=200, bbox_inches="tight")
    states.write_bytes(cfg.run_dir / "figures" / f"{name}.png", png.getvalue())
    drawn.setdefault(cfg.run_dir, {})[f"{name}.png"] = None
    return figure


def write_text(file: Path, text: str) -> None:
    """Write a text file whole or not at all; see `states.write_bytes`."""
    states.write_bytes(file, text.encode("utf-8"))


def collect(cfg: Settings) -> tuple[pd.DataFrame, pd.DataFrame, list[str]]:
    """Read all cells' results that were made with this run's settings.

    Returns:
        The rows of results.csv and of per_image.csv, and the names of cells, of all notebooks, that are left
        out because other settings made them.

    Raises:
        UserError: no cell has results with these settings, or two cells were made from different images or
            by different code.
    """
    cells = list(_federations(cfg.run_dir, cfg))
    own = [(folder, about["record"]) for folder, about, other in cells if not other]
    if not own:
        raise _no_results(cfg, [other for *_, other in cells])
    inputs = {(record.get("images"), record.get("code")): folder.name for folder, record in reversed(own)}
    if len(inputs) > 1:
        raise UserError(
            f"{' and '.join(sorted(inputs.values()))} in {cfg.run_dir} were made from different images or by "
            "different code: run 04_federate for all of them again"
        )
    key = ["arm", "init", "split", "seed", "round"]
    results, images = (
        pd.concat([tables.read_table(folder / f"{name}.csv") for folder, _ in own], ignore_index=True)
        for name in ("results", "per_image")
    )
    repeated = results[results.duplicated(key, keep=False)]
    if len(repeated) and (repeated.groupby(key).dice.nunique() > 1).any():
        raise UserError(
            f"{cfg.run_dir / 'cells'} holds two different results for one run: delete it and run again"
        )
    others = [folder.name for folder, _, other in cells if other]
    for name, about in cell_records(cfg.run_dir):
        if about["notebook"] not in ("04_federate", "05_analysis") and changed(about, cfg):
            others.append(name)
    return (
        results.drop_duplicates(key, ignore_index=True),
        images.drop_duplicates(["arm", "init", "split", "seed", "client", "image_id"], ignore_index=True),
        others,
    )


def of_run(cfg: Settings, given: Iterable[str]) -> Settings:
    """Return the settings that made a run's results, for an analysis that was told little but its folder.

    Where the folder has results of several settings, those of most cells count, of equally many the first.

    Args:
        cfg: the analysis' settings.
        given: names of the parameters that somebody gave: these stay, and `collect` names those that differ.
    """
    own = FREE | config.tagged("where") | {"images_without_age", *given}
    made: list[dict[str, Any]] = [
        {name: value for name, value in about["settings"].items() if name in config.PARAMETERS.keys() - own}
        for _, about in cell_records(cfg.run_dir)
        if about["notebook"] == "04_federate"
    ]
    return _decided(config.settings(cfg.flat() | max(made, key=made.count))) if made else cfg


def _no_results(cfg: Settings, others: list[Differences]) -> UserError:
    """Say that a folder has no results of these settings, and in what those that it has differ."""
    if not others:
        return UserError(f"{cfg.run_dir} holds no results of these settings: run 04_federate first")
    apart = {name: values for other in others for name, values in other.items()}
    return UserError(
        f"{cfg.run_dir} holds results of other settings alone ({in_words(apart)}): give the run's own "
        "values, or run 04_federate with these first"
    )


def _federations(run_dir: Path, cfg: Settings) -> Iterator[tuple[Path, dict[str, Any], Differences]]:
    """Yield folder, record and differing settings of each 04_federate cell in a run's folder."""
    cfg = _decided(cfg)
    for folder in sorted((run_dir / "cells").glob("04_federate-*")):
        about = read_json(folder / "cell.json")
        yield folder, about, changed(about, cfg)


def _decided(cfg: Settings) -> Settings:
    """Set `images_without_age` from auto to leave_out where a cell of the run has it: no table has both."""
    if cfg.federate.images_without_age == "auto" and any(
        about["settings"].get("images_without_age") == "leave_out"
        for _, about in cell_records(cfg.run_dir)
        if about["notebook"] == "04_federate"
    ):
        return replace(cfg, federate=replace(cfg.federate, images_without_age="leave_out"))
    return cfg


def collect_drift(cfg: Settings) -> pd.DataFrame:
    """Read how the clients' updates went in all cells of these settings: see `landscape.drift_by_round`."""
    drifts = [
        pd.read_csv(folder / "drift.csv")
        for folder, _, other in _federations(cfg.run_dir, cfg)
        if not other and (folder / "drift.csv").exists()
    ]
    empty = pd.DataFrame(columns=["init", "split", "seed", "round", *landscape.DRIFT])
    return pd.concat(drifts, ignore_index=True) if drifts else empty


def collect_variants(cfg: Settings) -> pd.DataFrame:
    """Read scores by image of the study's variants: those that differ from these settings in one alone.

    Returns:
        The columns of per_image.csv, and axis (the setting's name), value (its value there) and own (here),
        both as text.
    """
    scores = []
    for variant in sorted((cfg.run_dir / VARY).glob("*=*")):
        for folder, _, other in _federations(variant, cfg):
            if len(other) == 1:
                ((axis, values),) = other.items()
                value, own = (_on_axis(axis, value) for value in values)
                table = tables.read_table(folder / "per_image.csv")
                scores.append(table.assign(axis=axis, value=value, own=own))
    empty = pd.DataFrame(columns=["arm", "init", "split", "seed", "axis", "value", "own"])
    return pd.concat(scores, ignore_index=True) if scores else empty


def _on_axis(axis: str, value: object) -> str:
    return "all" if (axis, value) in {("labelled", 1.0), ("federated", 0.0)} else as_text(value)


def as_text(value: object) -> str:
    """Write a setting's value as in the name of a variant."""
    return f"{value:g}" if isinstance(value, float) else str(value)


def read_json(file: Path) -> dict[str, Any]:
    """Return a JSON file's content.

    Raises:
        UserError: it is missing or damaged.
    """
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{file} is missing: run the notebook that writes it again") from None
    except ValueError:
        raise UserError(f"{file} is damaged: delete it and run the notebook that writes it again") from None


def read_record(file: Path) -> dict[str, Any]:
    """Return a JSON file's object; empty where it is missing or damaged."""
    try:
        content = read_json(file)
    except (OSError, UserError):
        return {}
    return content if isinstance(content, dict) else {}

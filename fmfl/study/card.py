"""MODEL_CARD.md of a run: its weights, what they are for, and how well they do, from the run's own files.

The form is that of Mitchell et al. 2019, "Model Cards for Model Reporting" (arXiv 1810.03993). A sentence is
written only where a file gives its facts; what is not known is said to be so.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd

from fmfl import states
from fmfl.analysis import markdown, tables, words
from fmfl.analysis.statistics import contrast
from fmfl.config import ARMS
from fmfl.sources.mask_files import is_lung, organ_of
from fmfl.study import outputs

#: File of the card.
NAME = "MODEL_CARD.md"


def write(directory: Path) -> Path | None:
    """Write the card of a run; None where the folder holds no weights that a card could be about.

    Args:
        directory: a study's folder with manifest.json and per_image.csv.
    """
    manifest = outputs.read_record(directory / "manifest.json")
    files = weight_files(directory, manifest)
    if not files:
        return None
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=False,
    )
    per_image = tables.read_table(directory / "per_image.csv")
    if "age" not in per_image:
        per_image["age"] = float("nan")
    page = environment.get_template("card.md.j2").render(_contents(manifest, per_image, files))
    path = directory / NAME
    states.write_bytes(path, (page.rstrip() + "\n").encode("utf-8"))
    return path


def weight_files(directory: Path, manifest: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Return name, SHA-256 of the file and SHA-256 of the tensors of the run's weights that are there."""
    there = ((directory / "weights" / name, digest) for name, digest in manifest.get("weights", {}).items())
    return [
        (file.name, hashlib.sha256(file.read_bytes()).hexdigest(), digest)
        for file, digest in there
        if file.is_file()
    ]


def _contents(
    manifest: Mapping[str, Any], per_image: pd.DataFrame, files: list[tuple[str, str, str]]
) -> dict[str, object]:
    """Return all that the template shows, by name."""
    settings = manifest["settings"]
    sources = [part.strip() for part in str(settings.get("data") or "").split(",") if part.strip()]
    phantoms = [source == "phantom" for source in sources]
    error = manifest.get("teacher", {}).get("calibration_error")
    organ = organ_of(str(settings.get("mask_class") or "lung")).name
    return {
        "manifest": manifest,
        "settings": settings,
        "student": manifest.get("student", {}),
        "organ": "lung" if is_lung(organ) else organ,
        "chest": is_lung(organ),
        # A card is passed on: it names folders, not where they lie on this machine.
        "sources": ", ".join(Path(source).name or source for source in sources) or "not stated",
        "synthetic": "all" if phantoms and all(phantoms) else "some" if any(phantoms) else "",
        "data": _data(manifest.get("data", {}), per_image),
        "training": _training(manifest),
        "tested_on": words.tested_on(per_image),
        "scores": _scores(per_image),
        "differences": _differences(per_image),
        "weakest": _weakest(per_image),
        "limits": {"patients": tables.GROUP_PATIENTS, "images": tables.GROUP_IMAGES},
        "calibration": "" if error is None else f"{error:.3f}",
        "weights": files,
    }


def _data(data: Mapping[str, Any], per_image: pd.DataFrame) -> dict[str, str]:
    """Return rows on the images: their number, parts, and the test patients' ages."""
    rows = {}
    if "images" in data:
        rows["images"] = f"{data['images']:,} with a mask, of {words.counted(data['patients'], 'patient')}"
    if left_out := data.get("left_out"):
        rows["left out"] = ", ".join(f"{count} × {reason}" for reason, count in left_out.items())
    parts = {"proxy": "proxy set, for the starts", "federated": "clients", "test": "test set"}
    for name, label in parts.items():
        if name in data:
            rows[label] = words.counted(data[name], "image")
    if data.get("without_age"):
        rows["clients' images without an age"] = f"{data['without_age']:,}"
    rows["test patients' ages"] = _ages(per_image)
    if "fingerprint" in data:
        rows["fingerprint"] = f"`{data['fingerprint']}`"
    return rows


def _ages(per_image: pd.DataFrame) -> str:
    """Describe the ages of the test patients."""
    ages = per_image.drop_duplicates("patient_id").age
    known = ages.dropna()
    if known.empty:
        return "not known"
    text = f"{known.min():g} to {known.max():g} years, median {known.median():g}"
    return text + (f"; of {len(ages) - len(known)} patients not known" if len(known) < len(ages) else "")


def _training(manifest: Mapping[str, Any]) -> dict[str, str]:
    """Return rows on how the weights came about, each where the manifest has it."""
    settings, teacher = manifest["settings"], manifest.get("teacher", {})
    device = manifest.get("device") or {}
    named = (str(device[name]) for name in ("kind", "name", "instructions") if device.get(name))

    def listed(name: str) -> str:
        return ", ".join(map(str, settings.get(name) or ()))

    rate = settings.get("learning_rate")
    rows = {
        "arms": listed("arms"),
        "partitions over clients": listed("splits"),
        "starts": listed("inits"),
        "seeds": listed("seeds"),
        "clients": settings.get("num_clients"),
        "rounds": settings.get("num_rounds"),
        "local epochs a round": settings.get("local_epochs"),
        "a local step": f"{settings.get('batch_size')} images, Adam at {rate:g}" if rate is not None else "",
        "loss of the clients": settings.get("loss"),
        "BatchNorm": settings.get("batch_norm"),
        "step of the server": settings.get("server"),
        "teacher of the start fm": _teacher(teacher),
        "device": ", ".join(named),
        "commit": f"`{manifest['commit']}`" if manifest.get("commit") else "",
        "made": manifest.get("created"),
    }
    return {name: str(value) for name, value in rows.items() if value not in (None, "")}


def _teacher(teacher: Mapping[str, Any]) -> str:
    if not teacher.get("name"):
        return ""
    dice = teacher.get("dice")
    return teacher["name"] + (f", Dice {100 * dice:.1f} % on the proxy images" if dice is not None else "")


def _scores(per_image: pd.DataFrame) -> str:
    """Return a table of final Dice with intervals, one row a (partition, start)."""
    rows: dict[tuple[str, str], dict[str, str]] = {}
    splits = tables.known_first(per_image.split, words.SPLITS)
    cells = per_image[tables.RUN[:3]].drop_duplicates()
    for arm, init, split in sorted(cells.itertuples(index=False), key=lambda cell: splits.index(cell.split)):
        cell = contrast(per_image, {(arm, init, split): 1})
        rows.setdefault((split, init), {})[arm] = words.estimate(cell["value"], cell["low"], cell["high"])
    arms = [arm for arm in ARMS if any(arm in row for row in rows.values())]
    lines = [
        [words.split_name(split), words.init_name(init), *(row.get(arm, words.DASH) for arm in arms)]
        for (split, init), row in rows.items()
    ]
    return "\n".join(markdown.table(["partition", "start", *arms], lines))


def _differences(per_image: pd.DataFrame) -> str:
    """Return a table of the differences between starts; "" where none can be compared."""
    rows = [words.difference_row(row) for row in tables.paired_differences(per_image).to_dict("records")]
    columns = ["partition", "difference", "points (95 %)", "reading"]
    return (
        "\n".join(markdown.table(columns, [[row[name] for name in columns] for row in rows])) if rows else ""
    )


def _weakest(per_image: pd.DataFrame) -> str:
    """Return a table of distances, failures and the weakest groups, one row an (arm, start, partition)."""
    columns = ["arm", "start", "partition", "worst tenth", "worst age band", "below 0.8", "HD95", "ASSD"]
    rows = [words.weakest_row(row) for row in tables.weakest(per_image).to_dict("records")]
    lines = [[row[name].replace("\n", ", ") or "none is large enough" for name in columns] for row in rows]
    return "\n".join(markdown.table(columns, lines))

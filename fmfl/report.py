"""One page that answers the question: DIR/report.html from the tables, figures and manifest in DIR.

The page stands alone: figures and data are inside it as data URIs, and its security policy forbids the
browser to fetch anything. Every sentence of the methods is made of the manifest's values; a value that is
not there takes its sentence with it.
"""

import base64
import gzip
import io
import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import jinja2
import numpy as np
import pandas as pd
from PIL import Image

from fmfl import analysis, paths
from fmfl.errors import UserError
from fmfl.markdown import BEGIN, END, headline, write_into  # noqa: F401  the command line takes it from here
from fmfl.plots import NAMES, SPLITS

TITLE = "Where should federated segmentation begin?"
PAGE_BYTES = 3_000_000  # what a phone on a slow line still takes
FIGURE_BYTES = 150_000  # a heavier picture is reduced to 256 colours
FIGURE_WIDTH = 1600  # pixels, two for each that is shown
CSV_BYTES = 200_000  # longer data go in compressed, and stay beside the page if they are as long even so

TABLES = {
    "results.csv": [*analysis.RUN, "round", "dice"],
    "per_image.csv": [*analysis.RUN, "image_id", "patient_id", "dice"],
    "table1.csv": ["init", "split", *analysis.ARMS],
    "claims.csv": ["claim", "paper", "ours", "low", "high", "n", "seeds", "verdict", "why"],
}

#: Tables that a study may have besides, each shown in a section of its own with the data beside it.
MORE_TABLES = {
    "speed.csv": (
        "How soon",
        "Rounds to the target Dice (mean over the seeds that reach it, 95 % interval over seeds), megabytes "
        "sent by then, and the mean height of the curve over all rounds in %.",
    ),
    "gap.csv": (
        "The gap closed",
        "Share of the way from the random start to centralised training, with 95 % interval over patients; "
        "none where that way is not longer than the noise.",
    ),
    "weakest.csv": (
        "Who fares worst",
        "Final Dice in %: all test images, the tenth with the lowest, the worst age band, and the mixture of "
        "the worst client; images below 0.8 in %; surface distances in pixels.",
    ),
}

CAPTIONS = {  # by how a figure's file name begins, the longest that fits
    "ages": "Ages of the patients.",
    "augmented": "Images as the network sees them, augmented with their masks.",
    "boxes": "Box prompts and the teacher's mask.",
    "clients": "The partition over clients: sizes and ages.",
    "dice_by_alpha": "Students before any round, by the teacher's share in their loss.",
    "dice_by_jitter": "The teacher's scores when its boxes' sides are moved; 95 % intervals over images.",
    "dice_by_round": "Dice by round.",
    "dice_by_rule": "The teacher's Dice and HD95 by how its box prompts are made.",
    "fig2": "Final federated Dice by partition and start. Large markers: means over seeds, with 95 % "
    "intervals over patients; small markers: single seeds; dashed: centralised training.",
    "fig3": "Dice by round; right, the top enlarged. Lines: means over seeds; bands: their range; dashed: "
    "the end of centralised training.",
    "images": "Images of the cohort with their masks.",
    "loss_curves": "Loss while the initial states are made.",
    "per_image": "Final Dice of each test image by start; points are images below 0.8.",
    "reliability": "The teacher's calibration: of the pixels called so likely lung, how many are.",
    "teacher_gallery": "The teacher's best, median and worst masks.",
    "when_it_pays": "Points of final Dice that the teacher's student gains over the other starts where one "
    "setting of the study is changed, with 95 % intervals over patients; hollow: inside the noise.",
    "why": "The clients' updates by round (means over seeds), and for the first seed the barrier between two "
    "clients' models after the first round and the sharpness of each start.",
    "worst_cases": "The test images with the lowest Dice.",
}

METHODS = (  # paragraphs of sentences; {a.b} is the manifest's value, and a sentence needs all of its values
    (
        "The images are those of {settings.data}.",
        "{data.images} images of {data.patients} patients have a mask.",
        "Left out were {data.left_out}.",
        "Images are grey, {settings.size} × {settings.size} pixels.",
        "Whole patients were dealt to the parts: {data.proxy} proxy images, {data.test} test images and "
        "{data.federated} images of the clients.",
    ),
    (
        "The teacher is {teacher.name}.",
        "The teacher has {teacher.parameters} parameters and stays frozen.",
        "The teacher's box prompts follow the rule {settings.box_rule}.",
        "The teacher's mean Dice is {teacher.dice}.",
        "{teacher.note}",
        "The student, which is also the network that the clients train, is {settings.student}.",
        "The fm start is the student after {settings.proxy_epochs} epochs on the proxy images (Eq. 5).",
        "Eq. 5 gives weight {settings.alpha} to the divergence from the teacher's mask (Eq. 4, "
        "temperature {settings.temperature}) and the rest to the true mask.",
    ),
    (
        "{settings.num_clients} clients trained for {settings.num_rounds} rounds of {settings.local_epochs} "
        "local epochs (Eq. 2), and the server averaged their weights (Eq. 3).",
        "The clients' weights in that average: {settings.client_weights}.",
        "A local step of Adam took {settings.batch_size} images at learning rate {settings.learning_rate}.",
        "Each client's update was clipped to length {privacy.clipping} and their sum was noised with "
        "deviation {privacy.noise} times that: epsilon is {privacy.epsilon} for a client at delta "
        "{privacy.delta}, over {privacy.rounds} rounds of one run. Centralised and standalone training and "
        "the scores are not noised. What it cost in Dice is the difference from the same study without it "
        "(--vary privacy=none puts both on the map).",
        "The {privacy.runs} federated runs here come together to epsilon {privacy.epsilon_of_all_runs} for a "
        "client who took part in all of them.",
        "Partitions: {settings.splits}.",
        "Starts: {settings.inits}.",
        "Seeds: {settings.seeds}.",
    ),
)
STATISTICS = (
    "Scores are those of the last round; the test images select nothing. Intervals are 95 %: over the test "
    "set's patients by bootstrap, seeds averaged first and images paired, and over seeds by Student's t. "
    "Differences are tested on patients' means by Wilcoxon's signed-rank test and by permutation of signs, "
    "each with Holm's correction; the effect size is d_z, the patients' mean over their standard deviation."
)
VERDICTS = (
    "Reproduced: a difference in the paper's direction, outside the noise of images and of at least two "
    "seeds, and at least half the paper's size; or a number within "
    f"{analysis.MARGIN:g} points, interval included. Direction only: the paper's direction, but one seed, "
    "seeds that differ too much, another size or another number. Not testable here: an arm is missing, or "
    "the noise is too large to say."
)


def write(directory: str | Path) -> Path:
    """Build DIR/report.html from the tables, the manifest and the figures in DIR.

    It reads the files of TABLES, manifest.json and figures/*.png. Figures fig2.png and fig3.png have their
    places; all others follow in the order of their names, each with the data beside it if figures/NAME.csv
    exists. The page appears whole or not at all.

    Raises:
        UserError: one of these files is missing or cannot be read.
    """
    directory = Path(directory)
    tables = {name: _table(directory / name, columns) for name, columns in TABLES.items()}
    manifest = _manifest(directory / "manifest.json")
    for name in ("fig2.png", "fig3.png"):
        _required(directory / "figures" / name)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(paths.PACKAGE), autoescape=True, undefined=jinja2.StrictUndefined
    )
    page = environment.get_template("report.html.j2").render(_contents(directory, tables, manifest))
    path = directory / "report.html"
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text(page, encoding="utf-8")
    os.replace(unfinished, path)
    return path


def methods(manifest: Mapping) -> list[str]:
    """Paragraphs of METHODS with the manifest's values in place, without the sentences that lack one."""
    values = _flat(manifest)

    def said(sentence: str) -> str:
        names = re.findall(r"\{([\w.]+)\}", sentence)
        if any(values.get(name, "") == "" for name in names):
            return ""
        return re.sub(r"\{([\w.]+)\}", lambda name: values[name[1]], sentence)

    paragraphs = [" ".join(filter(None, map(said, sentences))) for sentences in METHODS]
    return [*filter(None, paragraphs), STATISTICS]


# What is read


def _required(path: Path) -> Path:
    if not path.is_file():
        raise UserError(f"{path} is missing: the report is made from it; run the study to its end first.")
    return path


def _table(path: Path, columns: Iterable[str]) -> pd.DataFrame:
    try:
        table = pd.read_csv(_required(path), dtype={"paper": str, "image_id": str, "patient_id": str})
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path} cannot be read as CSV ({error}): run the study again to rewrite it."
        ) from error
    missing = [name for name in columns if name not in table]
    if missing:
        raise UserError(f"{path} has no column {', '.join(missing)}: run the study again to rewrite it.")
    return table


def _manifest(path: Path) -> dict:
    try:
        manifest = json.loads(_required(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}): run the study again to rewrite it.") from error
    if not isinstance(manifest, dict):
        raise UserError(f"{path} holds no JSON object: run the study again to rewrite it.")
    return manifest


# What is shown


def _contents(directory: Path, tables: Mapping[str, pd.DataFrame], manifest: Mapping) -> dict[str, object]:
    results, per_image, table1, claims = (tables[name] for name in TABLES)
    differences = analysis.paired_differences(per_image)
    last = analysis.final(results)
    files = {name: _download(name, (directory / name).read_bytes()) for name in [*TABLES, "manifest.json"]}
    files["differences.csv"] = _download("differences.csv", _csv(differences))
    data = {"fig2": _csv(last), "fig3": _csv(results[results.arm == "federated"])}
    beside = {"when_it_pays": "gains.csv", "why": "drift.csv"}
    data |= {
        stem: (directory / name).read_bytes() for stem, name in beside.items() if (directory / name).exists()
    }

    pictures = sorted((directory / "figures").glob("*.png"))
    figures = {path.stem: _figure(path, last, data.get(path.stem)) for path in pictures}
    used = sum(len(file["uri"]) for file in files.values()) + 50_000  # the page itself
    used += sum(_weight(figures[stem]) for stem in ("fig2", "fig3", "when_it_pays") if stem in figures)
    others, left_out = [], []
    for stem, item in figures.items():
        if stem not in ("fig2", "fig3", "when_it_pays"):
            fits = used + _weight(item) <= PAGE_BYTES
            (others if fits else left_out).append(item if fits else f"{stem}.png")
            used += _weight(item) * fits
    split = str(table1.split.iloc[0]) if len(table1) else ""
    return {
        "title": TITLE,
        "answer": [*headline(results, differences, claims, split or None), *_note(manifest)],
        "split": SPLITS.get(split, split),
        "arms": analysis.ARMS,
        "table1": _table1_rows(table1),
        "counted": _counted(per_image),
        "differences": [_difference_row(row) for row in differences.itertuples()],
        "claims": [_claim_row(row) for row in claims.itertuples()],
        "verdicts": VERDICTS,
        "fig2": figures["fig2"],
        "fig3": figures["fig3"],
        "map": figures.get("when_it_pays"),
        "tables": _more_tables(directory),
        "others": others,
        "left_out": left_out,
        "methods": methods(manifest),
        "run": _run(manifest),
        "files": files,
    }


def _note(manifest: Mapping) -> list[str]:
    """What the teacher is, where that limits the answer."""
    note = (manifest.get("teacher") or {}).get("note")
    return [note] if note else []


def _table1_rows(table: pd.DataFrame) -> list[dict[str, object]]:
    paper = {(arm, init): value for (arm, init, _), value in analysis.PAPER.items()}
    gap = analysis.gap_closed(table).set_index("init").gap_closed
    start, top = analysis.PAPER[analysis.RANDOM], analysis.PAPER[analysis.CENTRALISED]
    rows = []
    for row in table.to_dict("records"):
        init = row["init"]
        cells = [
            {
                "arm": arm,
                "ours": _number(row[arm]),
                "interval": _interval(row.get(f"{arm}_low", np.nan), row.get(f"{arm}_high", np.nan), 2),
                "paper": _number(paper[arm, init]) if (arm, init) in paper else "",
            }
            for arm in analysis.ARMS
        ]
        informed = ("federated", init) in paper and init != "random"
        rows.append(
            {
                "name": NAMES.get(init, init),
                "cells": cells,
                "gap": _percent(gap.get(init, np.nan)),
                "paper_gap": _percent((paper["federated", init] - start) / (top - start)) if informed else "",
            }
        )
    return rows


def _more_tables(directory: Path) -> list[dict[str, object]]:
    found = []
    for name, (title, caption) in MORE_TABLES.items():
        path = directory / name
        if not path.is_file():
            continue
        rows = _MORE_ROWS[name](_table(path, ()))
        columns = list(rows[0]) if rows else []
        numbers = [c for c in columns if c not in ("start", "arm", "split", "worst band", "why")]
        page = {"id": path.stem, "title": title, "caption": caption, "columns": columns, "numbers": numbers}
        found.append(page | {"rows": rows, "file": _download(name, path.read_bytes())})
    return found


def _who(row: Mapping) -> dict[str, str]:
    split = SPLITS.get(row["split"], row["split"])
    return {"start": NAMES.get(row["init"], row["init"]), "arm": row["arm"], "split": split}


def _speed_rows(table: pd.DataFrame) -> list[dict[str, str]]:
    return [
        _who(row)
        | {
            "rounds": _number(row["rounds"], 1),
            "95 % over seeds": _interval(row["rounds_low"], row["rounds_high"]),
            "reached": f"{row['reached']} of {row['seeds']}",
            "MB": _number(row["bytes"] / 1e6, 0),
            "curve": _number(row["curve"]),
        }
        for row in table.to_dict("records")
    ]


def _gap_rows(table: pd.DataFrame) -> list[dict[str, str]]:
    return [
        {
            "start": NAMES.get(row["init"], row["init"]),
            "gap closed": _percent(row["gap_closed"]),
            "95 %": "" if pd.isna(row["low"]) else f"{_percent(row['low'])} to {_percent(row['high'])}",
            "why": "" if pd.isna(row["why"]) else row["why"],
        }
        for row in table.to_dict("records")
    ]


def _weakest_rows(table: pd.DataFrame) -> list[dict[str, str]]:
    return [
        _who(row)
        | {
            "all": _number(row["dice"]),
            "worst tenth": _number(row["worst_tenth"]),
            "worst band": "" if pd.isna(row["worst_band"]) else f"{row['worst_band']} years",
            "its Dice": _number(row["worst_band_dice"]),
            "worst client": _number(row["worst_client_dice"]),
            "below 0.8": f"{_number(row['failures'], 1)} %",
            "HD95": _number(row.get("hd95", np.nan), 1),
            "ASSD": _number(row.get("assd", np.nan), 1),
        }
        for row in table.to_dict("records")
    ]


_MORE_ROWS = {"speed.csv": _speed_rows, "gap.csv": _gap_rows, "weakest.csv": _weakest_rows}


def _difference_row(row) -> dict[str, str]:
    return {
        "split": SPLITS.get(row.split, row.split),
        "pair": f"{NAMES.get(row.higher, row.higher)} less {NAMES.get(row.lower, row.lower)}",
        "value": _number(row.value, sign=True),
        "interval": _interval(row.low, row.high, 2),
        "seed_interval": _interval(row.seed_low, row.seed_high, 2),
        "p": "< 0.001"
        if max(row.p_holm, row.p_permutation_holm) < 0.001
        else _number(max(row.p_holm, row.p_permutation_holm), 3),
        "effect": _number(row.effect),
        "reading": row.reading,
    }


def _claim_row(row) -> dict[str, str]:
    kinds = {"reproduced": "reproduced", "direction only": "direction", "not reproduced": "not"}
    return {
        "claim": row.claim,
        "paper": "" if pd.isna(row.paper) else str(row.paper).replace("-", "−"),
        "ours": _number(row.ours),
        "interval": _interval(row.low, row.high, 2),
        "n": f"{row.n:g} / {row.seeds:g}",
        "verdict": row.verdict,
        "kind": kinds.get(row.verdict, "untested"),
        "why": "" if pd.isna(row.why) else row.why,
        "run": "" if pd.isna(getattr(row, "run", np.nan)) else row.run,
    }


def _counted(per_image: pd.DataFrame) -> str:
    people, seeds = per_image.patient_id.nunique(), per_image.seed.nunique()
    images = per_image.image_id.nunique()
    return f"{images} test images of {people} patients, {seeds} seed{'s' * (seeds != 1)}."


def _run(manifest: Mapping) -> list[tuple[str, str]]:
    """Who computed what, with what: the manifest's own words, without what the methods already say."""
    values = _flat(manifest)
    names = {
        "fmfl": "fmfl",
        "commit": "Commit",
        "created": "Made",
        "settings.seeds": "Seeds",
        "device.name": "Device",
        "device.kind": "Kind of device",
        "device.cores": "Cores",
        "device.memory_gib": "Memory, GiB",
        "data.fingerprint": "Fingerprint of the data",
        "teacher.sha256": "Teacher's weights, SHA-256",
        "versions": "Versions",
    }
    rows = [(label, values[name]) for name, label in names.items() if values.get(name, "") != ""]
    for name, digest in (manifest.get("weights") or {}).items():
        rows.append((f"{name}, SHA-256", str(digest)))
    settings = manifest.get("settings") or {}
    if settings:
        rows.append(
            ("All settings", ", ".join(f"{name} = {_text(value)}" for name, value in settings.items()))
        )
    return rows


# Figures and files inside the page


def _figure(path: Path, last: pd.DataFrame, data: bytes | None) -> dict[str, object]:
    name = max((name for name in CAPTIONS if path.stem.startswith(name)), key=len, default="")
    caption = CAPTIONS.get(name, path.stem.replace("_", " ").capitalize() + ".")
    if name and path.stem != name:
        caption = f"{caption[:-1]} ({path.stem[len(name) :].strip('_').replace('_', ' ')})."
    alt = caption
    if path.stem in ("fig2", "fig3"):
        means = last[last.arm == "federated"].groupby(["split", "init"], sort=False).dice.mean()
        ends = means.mul(100).round(1).items()
        alt += (
            " Final Dice: "
            + "; ".join(f"{SPLITS.get(s, s)}, {NAMES.get(i, i)} {d} %" for (s, i), d in ends)
            + "."
        )
    if data is None and path.with_suffix(".csv").is_file():
        data = path.with_suffix(".csv").read_bytes()
    picture, width, height = _png(path)
    return {
        "stem": path.stem,
        "uri": _uri("image/png", picture),
        "width": width,
        "height": height,
        "alt": alt,
        "caption": caption,
        "data": _download(f"{path.stem}.csv", data) if data is not None else None,
    }


def _png(path: Path) -> tuple[bytes, int, int]:
    """A figure's bytes, reduced where it is heavy, and the size at which it is shown."""
    try:
        with Image.open(path) as image:
            image.load()
            picture = path.read_bytes()
            if len(picture) > FIGURE_BYTES:
                image = image.convert("RGB")
                image.thumbnail((FIGURE_WIDTH, 2 * FIGURE_WIDTH))
                buffer = io.BytesIO()
                image.quantize(256).save(buffer, "PNG", optimize=True)
                picture = min(picture, buffer.getvalue(), key=len)
            return picture, *image.size
    except OSError as error:
        raise UserError(f"{path} cannot be read as a picture ({error}): draw it again.") from error


def _download(name: str, content: bytes) -> dict[str, str]:
    """A file inside the page, compressed where it is long; without a URI where it is too long even so."""
    if len(content) > CSV_BYTES:
        packed = gzip.compress(content, mtime=0)
        if len(packed) > CSV_BYTES:
            return {"name": name, "uri": ""}
        return {"name": f"{name}.gz", "uri": _uri("application/gzip", packed)}
    return {"name": name, "uri": _uri("application/json" if name.endswith(".json") else "text/csv", content)}


def _uri(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"


def _weight(item: Mapping) -> int:
    return len(item["uri"]) + (len(item["data"]["uri"]) if item["data"] else 0)


def _csv(table: pd.DataFrame) -> bytes:
    return table.to_csv(index=False).encode()


# Words for values


def _flat(manifest: Mapping, prefix: str = "") -> dict[str, str]:
    """{"settings.size": "96", ...}; a nested object also stands as a whole, "settings": "size 96, ..."."""
    flat = {}
    for name, value in manifest.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}.")
        flat[f"{prefix}{name}"] = _text(value)
    return flat


def _text(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_text(part)}" for name, part in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_text, value))
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int) and not isinstance(value, bool) and value >= 10_000:
        return f"{value:,}"
    return str(value)


def _number(value: float, digits: int = 2, *, sign: bool = False) -> str:
    if pd.isna(value):
        return "–"
    return f"{value:{'+' if sign else ''}.{digits}f}".replace("-", "−")


def _percent(share: float) -> str:
    return "–" if pd.isna(share) else f"{100 * share:.0f} %".replace("-", "−")


def _interval(low: float, high: float, digits: int = 1) -> str:
    return "" if pd.isna(low) or pd.isna(high) else f"{_number(low, digits)} to {_number(high, digits)}"

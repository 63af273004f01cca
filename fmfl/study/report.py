"""DIR/report.html: one page that answers the question, from the tables, figures and manifest in DIR.

The page stands alone: figures and data are inside it as data URIs, and its security policy forbids the
browser to fetch anything. Every sentence of the methods is made of the manifest's values; a value that is
not there takes its sentence with it. The paper's numbers stand on the page only where the organ is the
paper's, and a banner says where the images are synthetic.
"""

import base64
import gzip
import io
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import jinja2
import numpy as np
import pandas as pd
from PIL import Image

from fmfl import states
from fmfl.analysis import claims, statistics, tables, words
from fmfl.analysis.words import DASH, counted, estimate, init_name, percent, split_name
from fmfl.config import ARMS
from fmfl.errors import UserError
from fmfl.sources.mask_files import is_lung, organ_of
from fmfl.study import card
from fmfl.study.outputs import read_json

#: Bytes that a phone on a slow line still takes.
PAGE_BYTES = 3_000_000
#: Longer data go in compressed, and stay beside the page if they are as long even so.
CSV_BYTES = 200_000
#: A heavier picture is reduced to 256 colours and to so many pixels across, two for each that is shown.
FIGURE_BYTES, FIGURE_WIDTH = 150_000, 1600
#: Pixels of the page for an inch of a figure, and the fewest at which 9 points of text are 9 pixels: a figure
#: that is wider than the 358 pixels that a phone's page leaves it is scrolled.
FIGURE_SCALE, READABLE_SCALE, PHONE_WIDTH = 120, 72, 358

#: The tables that the page needs, with the columns that it reads.
TABLES = {
    "results.csv": [*tables.RUN, "round", "dice"],
    "per_image.csv": [*tables.RUN, "image_id", "patient_id", "dice"],
    "table1.csv": ["init", "split", *ARMS],
    "claims.csv": ["claim", "paper", "ours", "low", "high", "n", "seeds", "verdict", "why"],
}

#: Tables that a study may have besides, with the writers of their rows.
MORE_TABLES = {"speed": words.speed_row, "gap": words.gap_row, "weakest": words.weakest_row}
#: Columns that hold words, and so stand at the left.
TEXT_COLUMNS = {"start", "partition", "arm", "why there is none", "reading", "difference", "worst age band"}

#: Captions of the figures by stage, in the order of the story. A figure's name begins with one of these
#: names, and the longest that fits is its own.
STORY = {
    "Images and clients": {
        "images": "Images with their masks.",
        "ages": "Ages of the patients.",
        "clients": "The partition over clients: images, patients and ages.",
    },
    "Teacher": {
        "boxes": "Box prompts and the teacher's mask.",
        "teacher_gallery": "The teacher's best, median and worst masks.",
        "dice_by_rule": "The teacher's Dice and HD95 by how its box prompts are made.",
        "dice_by_jitter": "The teacher's scores when the sides of its boxes are moved. Bars: 95 % intervals "
        "over images.",
        "reliability": "The teacher's calibration: share of pixels in the mask by predicted probability.",
    },
    "Starts": {
        "augmented": "Images as the network sees them, augmented with their masks.",
        "loss_curves": "Loss while the starts are trained.",
        "dice_by_alpha": "Students before any round, by the teacher's share in their loss.",
        "worst_cases": "The test images with the lowest Dice.",
    },
    "Rounds": {"dice_by_round": "Dice by round."},
    "Results": {
        "fig2": "Final federated Dice by partition and start. Large markers: means over seeds. Lines: 95 % "
        "intervals. Small markers: single seeds. Dashed: centralised training.",
        "fig3": "Dice by round. One panel enlarges the top. Lines: means over seeds. Bands: their range. "
        "Dashed: the end of centralised training.",
        "per_image": "Final Dice of each test image by start. Points: images below 0.8.",
        "when_it_pays": "Points of final Dice that the teacher's student gains over the other starts where "
        "one setting of the study is changed. Bars: 95 % intervals. Hollow: inside the noise.",
        "why": "The clients' updates by round (means over seeds). For the first seed: the barrier between "
        "two clients' models after the first round, and the sharpness of each start. Clients that agree "
        "have a cosine near 1 and a diversity near 1. Without a barrier, the loss does not rise on the way "
        "from one client's model to another's.",
    },
}
CAPTIONS = {name: caption for captions in STORY.values() for name, caption in captions.items()}
#: Figures with a section of their own.
PLACED = ("fig2", "fig3", "when_it_pays")

#: Paragraphs with a sentence a line. {a.b} is the manifest's value, {a.b|image} a number of images; a
#: sentence needs all of its values.
METHODS = """\
Images: {data.source}.
{data.images|image} with a mask, of {data.patients|patient}.
Left out: {data.left_out}.
Each is grey, {settings.size} × {settings.size} pixels.
Parts: {data.proxy|proxy image}, {data.test|test image} and {data.federated|image} of the clients; \
no patient is in two parts.

Teacher: {teacher.name}, {teacher.parameters|parameter}, frozen.
Its box prompts: rule {settings.box_rule}.
Its mean Dice on the proxy images: {teacher.percent} %.
{teacher.note}
The student is {settings.student}; the clients train the same network.
The fm start is the student after {settings.proxy_epochs|epoch} on the proxy images (Eq. 5).
Eq. 5 gives weight {settings.alpha} to the divergence from the teacher's mask (Eq. 4, temperature \
{settings.temperature}) and the rest to the true mask.

{settings.num_clients|client} trained for {settings.num_rounds|round} of \
{settings.local_epochs|local epoch} (Eq. 2).
The server averaged their weights (Eq. 3), weighted by: {settings.client_weights}.
A local step of Adam: {settings.batch_size|image}, learning rate {settings.learning_rate}.
Partitions: {settings.splits}.
Starts: {settings.inits}.
Seeds: {settings.seeds}."""
#: The numbers that the page's prose names.
LIMITS = {
    "margin": f"{claims.MARGIN:g}",
    "equivalence": f"{statistics.EQUIVALENCE:g}",
    "patients": statistics.MIN_PATIENTS,
    "group_patients": tables.GROUP_PATIENTS,
}
#: Values of the manifest that "This run" names.
RUN = {
    "fmfl": "fmfl",
    "commit": "Commit",
    "created": "Made",
    "settings.seeds": "Seeds",
    "device.name": "Device",
    "device.kind": "Kind of device",
    "device.instructions": "Instruction set",
    "device.cores": "Cores",
    "device.memory_gib": "Memory, GiB",
    "data.fingerprint": "Fingerprint of the data",
    "teacher.sha256": "Teacher's weights, SHA-256",
    "versions": "Versions",
}


def write(directory: str | Path) -> Path:
    """Build DIR/report.html from the tables, the manifest and the figures in DIR.

    It reads the files of TABLES, manifest.json and figures/*.png: those that the manifest lists, or else
    those of STORY. The figures of PLACED have their sections; the others follow in the story's order, each
    with the data beside it if figures/NAME.csv exists. The page appears whole or not at all. Where weights/
    has the study's weights, MODEL_CARD.md is written too, see `card.write`.

    Raises:
        UserError: one of these files is missing or cannot be read.
    """
    directory = Path(directory)
    read = {name: _table(directory / name, columns) for name, columns in TABLES.items()}
    manifest = _manifest(directory / "manifest.json")
    for name in ("fig2.png", "fig3.png"):
        _required(directory / "figures" / name)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
    )
    page = environment.get_template("report.html.j2").render(_contents(directory, read, manifest))
    path = directory / "report.html"
    states.write_bytes(path, page.encode("utf-8"))
    card.write(directory)
    return path


def methods(manifest: Mapping) -> list[str]:
    """Return the paragraphs of METHODS with the manifest's values, without sentences that lack one."""
    values = _flat(manifest)
    settings, teacher, data = (manifest.get(name) or {} for name in ("settings", "teacher", "data"))
    if settings.get("data"):
        values["data.source"] = _subject(manifest)["images"]
    if isinstance(left_out := data.get("left_out"), Mapping):
        values["data.left_out"] = ", ".join(f"{name} ({_text(count)})" for name, count in left_out.items())
    if isinstance(dice := teacher.get("dice"), int | float):
        values["teacher.percent"] = words.number(100 * dice, 1)
    place = r"\{([\w.]+)(?:\|([\w ]+))?\}"

    def word(match: re.Match) -> str:
        value, noun = values[match[1]], match[2]
        return value if noun is None else f"{value} {noun}{'s' * (value != '1')}"

    paragraphs = [
        " ".join(
            re.sub(place, word, sentence)
            for sentence in paragraph.splitlines()
            if all(values.get(name) for name, _ in re.findall(place, sentence))
        )
        for paragraph in METHODS.split("\n\n")
    ]
    return list(filter(None, paragraphs))


# Reading


def _required(path: Path) -> Path:
    if not path.is_file():
        raise UserError(f"{path} is missing: the report is made from it; run the study to its end first")
    return path


def _table(path: Path, columns: Iterable[str] = ()) -> pd.DataFrame:
    table = tables.read_table(_required(path), ("paper",))
    missing = [name for name in columns if name not in table]
    if missing:
        raise UserError(f"{path} has no column {', '.join(missing)}: run the study again to rewrite it")
    return table


def _manifest(path: Path) -> dict:
    manifest = read_json(_required(path))
    if not isinstance(manifest, dict):
        raise UserError(f"{path} holds no JSON object: run the study again to rewrite it")
    return manifest


# Contents


def _contents(directory: Path, read: Mapping[str, pd.DataFrame], manifest: Mapping) -> dict[str, object]:
    """Return all that the template shows, by name."""
    results, per_image, table1, ledger = (read[name] for name in TABLES)
    subject = _subject(manifest)
    differences = tables.paired_differences(per_image)
    names = [name for name in TABLES if subject["compared"] or name != "claims.csv"]
    files = {name: _download(name, (directory / name).read_bytes()) for name in [*names, "manifest.json"]}
    files["differences.csv"] = _download("differences.csv", _csv(differences))
    # Verdicts are counted where the organ is the paper's. Older ledgers have no kinds.
    counted_here = subject["compared"] and "kind" in ledger
    counted_claims = ledger if counted_here else ledger.head(0).assign(kind="")
    split = str(table1.split.iloc[0]) if len(table1) else ""
    figures, left_out = _figures(directory, results, manifest, files)
    further = {name: figure for name, figure in figures.items() if name not in PLACED}
    tested = {_tested_on(row) for row in ledger.to_dict("records")} - {""}
    values = _flat(manifest)
    return {
        "subject": subject,
        "answer": words.headline(results, differences, counted_claims, split or None),
        "note": values.get("teacher.note"),
        "facts": _facts(results, per_image, manifest, subject),
        "split": split_name(split),
        "tested_on": words.tested_on(per_image),
        "tables": {
            "table1": _rows(_table1(table1, per_image, split, subject), files["table1.csv"]),
            "differences": _rows(_differences(differences), files["differences.csv"]),
            **_more_tables(directory),
        },
        "text_columns": TEXT_COLUMNS,
        "limits": LIMITS,
        "ledger": _ledger(ledger) if subject["compared"] else [],
        "tested": tested.pop() if len(tested) == 1 else "",
        "figures": figures,
        "stages": {
            stage: [figure for name, figure in further.items() if _stage(name) == stage] for stage in STORY
        },
        "left_out": left_out,
        "methods": methods(manifest),
        "run": {label: values[name] for name, label in RUN.items() if values.get(name)},
        "details": _details(manifest),
        "files": files,
    }


def _subject(manifest: Mapping) -> dict[str, object]:
    """Return the images' organ and source, and which of them are synthetic ("", "all" or "some")."""
    settings, data = manifest.get("settings") or {}, manifest.get("data") or {}
    organ = organ_of(str(data.get("organ") or settings.get("mask_class") or "lung")).name
    sources = [source.strip() for source in str(settings.get("data") or "").split(",") if source.strip()]
    drawn = [source == "phantom" for source in sources]
    synthetic = data.get("kind") == "synthetic" or (bool(drawn) and all(drawn))
    phantoms = "the built-in synthetic chest X-rays"
    names = ", ".join(phantoms if source == "phantom" else source for source in sources)
    return {
        "organ": organ,
        "images": names or (phantoms if synthetic else "not stated"),
        "compared": is_lung(organ),
        "synthetic": "all" if synthetic else "some" if any(drawn) else "",
    }


def _facts(
    results: pd.DataFrame, per_image: pd.DataFrame, manifest: Mapping, subject: Mapping
) -> dict[str, str]:
    teacher = manifest.get("teacher") or {}
    name = {"builtin": "built-in"}.get(teacher.get("name"), _text(teacher.get("name")))
    dice = teacher.get("dice")
    measured = isinstance(dice, int | float) and math.isfinite(dice)
    rounds = results["round"][results.arm == "federated"]
    images, patients, seeds = (per_image[name].nunique() for name in ("image_id", "patient_id", "seed"))
    facts = {
        "Images": subject["images"],
        "Organ": subject["organ"],
        "Test set": f"{counted(images, 'image')} of {counted(patients, 'patient')}",
        "Teacher": name + (f", mean Dice {100 * dice:.1f} % on the proxy images" if measured else ""),
        "Runs": counted(seeds, "seed") + (f", {counted(rounds.max(), 'round')}" if len(rounds) else ""),
    }
    return {label: value for label, value in facts.items() if value}


# Tables


def _rows(rows: list[dict[str, str]], file: Mapping) -> dict[str, object]:
    """Return a table as the page shows it: no empty cell, and no column without content."""
    columns = [
        column for column in (rows[0] if rows else ()) if any(row[column] not in ("", DASH) for row in rows)
    ]
    rows = [{column: row[column] or DASH for column in columns} for row in rows]
    return {
        "columns": columns,
        "rows": rows,
        "dashes": any(DASH in row.values() for row in rows),
        "file": file,
    }


def _table1(table: pd.DataFrame, per_image: pd.DataFrame, split: str, subject: Mapping) -> list[dict]:
    gap = tables.gap(per_image, table.init.drop_duplicates(), split).set_index("init").gap_closed
    paper = {(arm, init): words.number(value) for (arm, init, _), value in claims.PAPER.items()}
    paper |= {("gap closed", init): percent(share) for init, share in claims.PAPER_GAP.items()}
    rows = []
    for row in table.to_dict("records"):
        cells = {arm: _arm(row, arm) for arm in ARMS if table[arm].notna().any()}
        cells["gap closed"] = percent(gap.get(row["init"], np.nan))
        for name, cell in cells.items():
            if subject["compared"] and (name, row["init"]) in paper:
                cells[name] = f"{cell}\npaper {paper[name, row['init']]}"
        rows.append({"start": init_name(row["init"])} | cells)
    return rows


def _arm(row: Mapping, arm: str) -> str:
    if pd.isna(row[arm]):
        return "not run"
    return estimate(row[arm], row.get(f"{arm}_low", np.nan), row.get(f"{arm}_high", np.nan))


def _differences(differences: pd.DataFrame) -> list[dict[str, str]]:
    rows = [words.difference_row(row) for row in differences.to_dict("records")]
    return [{name: cell for name, cell in row.items() if "alone" not in name} for row in rows]


def _more_tables(directory: Path) -> dict[str, dict[str, object]]:
    sections = {}
    for name, row_of in MORE_TABLES.items():
        path = directory / f"{name}.csv"
        if not path.is_file():
            continue
        rows = [row_of(row) for row in _table(path).to_dict("records")]
        for row in rows:
            row.pop("paper", None)  # the paper's share of the gap stands in Table 1
        rows = [{"start": row["start"]} | row for row in rows]  # the title of a card on a phone
        sections[name] = _rows(rows, _download(path.name, path.read_bytes()))
    return sections


# The ledger


def _ledger(ledger: pd.DataFrame) -> list[dict[str, object]]:
    """Return the claims by group ("Claim 1", "Table 1"); a reason that rows of a group share stands once.

    Returns:
        One dict a group: name, and parts: {shared reason, "" where each row has its own: rows}.
    """
    groups: dict[str, list[dict[str, str]]] = {}
    for row in ledger.to_dict("records"):
        name, rest = re.match(r"([^,:]*)[,:]?\s*(.*)", str(row["claim"]), re.DOTALL).groups()
        rest = rest or name
        shown = words.claim_row(row) | {"claim": rest[:1].upper() + rest[1:], "tested": _tested_on(row)}
        groups.setdefault(name, []).append(shown)
    sections = []
    for name, rows in groups.items():
        reasons = [row["why"] for row in rows]
        parts: dict[str, list[dict[str, str]]] = {}
        for row in rows:
            parts.setdefault(row["why"] if reasons.count(row["why"]) > 1 else "", []).append(row)
        sections.append({"name": name, "parts": parts})
    return sections


def _tested_on(row: Mapping) -> str:
    """Return the numbers of images, patients where they are known, and seeds behind a claim."""
    counts = {"image": row["n"], "patient": row.get("patients", np.nan), "seed": row["seeds"]}
    return ", ".join(counted(int(count), noun) for noun, count in counts.items() if count > 0)


# Figures and files inside the page


def _figures(
    directory: Path, results: pd.DataFrame, manifest: Mapping, files: Mapping
) -> tuple[dict[str, dict], list[str]]:
    """Return figures by name in the story's order, those of PLACED first, and the names of the others."""
    last = tables.final(results)
    data = {"fig2": _csv(last), "fig3": _csv(results[results.arm == "federated"])}
    for stem, name in (("when_it_pays", "gains.csv"), ("why", "drift.csv")):
        if (directory / name).is_file():
            data[stem] = (directory / name).read_bytes()
    stems = _story(directory, results, manifest)
    spent = sum(len(file["uri"]) for file in files.values()) + 50_000  # the page itself
    figures, left_out = {}, []
    for stem in sorted(stems, key=lambda stem: stem not in PLACED):
        path = directory / "figures" / f"{stem}.png"
        figure = None if _repeated(stem, stems) else _figure(path, last, data.get(stem))
        if figure is None or (stem not in PLACED and spent + figure["weight"] > PAGE_BYTES):
            left_out.append(path.name)
        elif stem in PLACED or not figure["blank"]:
            figures[stem] = figure
            spent += figure["weight"]
    return figures, left_out


def _story(directory: Path, results: pd.DataFrame, manifest: Mapping) -> list[str]:
    """Return the names of the study's figures in the story's order: the manifest's, or else those of STORY.

    Left out: partitions that no run of the study used, and a sweep that holds one student.
    """
    there = {path.stem for path in (directory / "figures").glob("*.png")}
    if isinstance(listed := manifest.get("figures"), list):
        stems = [*(Path(str(name)).stem for name in listed), "fig2", "fig3"]
    else:
        order = list(CAPTIONS)
        stems = sorted(filter(_kind, there), key=lambda stem: (order.index(_kind(stem)), stem))
    settings = manifest.get("settings") or {}
    sweeps = any(settings.get(name, "?") for name in ("alpha_sweep", "temperature_sweep", "variants"))
    unused = {stem for stem in there if stem.startswith("clients_")}
    unused -= {f"clients_{split}" for split in results.split}
    unused |= {stem for stem in there if stem.startswith("dice_by_alpha") and not sweeps}
    return [stem for stem in dict.fromkeys(stems) if stem in there - unused]


def _kind(stem: str) -> str:
    """Return the name in STORY that a figure's name begins with, "" if none does."""
    return max((name for name in CAPTIONS if re.match(rf"{name}(_|\d|$)", stem)), key=len, default="")


def _stage(stem: str) -> str:
    return next((stage for stage, names in STORY.items() if _kind(stem) in names), list(STORY)[-1])


def _repeated(stem: str, stems: Iterable[str]) -> bool:
    """Return true for a figure that an earlier seed's already shows: NAME_seed1 beside NAME_seed0."""
    name, _, seed = stem.rpartition("_seed")
    seeds = [other.rpartition("_seed")[2] for other in stems if other.startswith(f"{name}_seed")]
    return bool(name) and int(seed) > min(map(int, seeds))


def _figure(path: Path, last: pd.DataFrame, data: bytes | None) -> dict[str, object]:
    """Return a figure with its name, caption, alternative text, data and weight in bytes."""
    kind = _kind(path.stem)
    caption = CAPTIONS.get(kind, path.stem.replace("_", " ").capitalize() + ".")
    if kind and path.stem != kind:
        details = path.stem[len(kind) :].strip("_").replace("seed", "seed ").split("_")
        caption = f"{caption[:-1]} ({', '.join(map(split_name, details))})."
    alt = caption
    if path.stem in ("fig2", "fig3"):
        means = last[last.arm == "federated"].groupby(["split", "init"], sort=False).dice.mean()
        ends = [
            f"{split_name(split)}, {init_name(init)} {100 * dice:.1f} %"
            for (split, init), dice in means.items()
        ]
        alt += f" Final Dice: {'; '.join(ends)}."
    if data is None and path.with_suffix(".csv").is_file():
        data = path.with_suffix(".csv").read_bytes()
    figure = _picture(path) | {"stem": path.stem, "alt": alt, "caption": caption, "data": None}
    if data is not None:
        figure["data"] = _download(f"{path.stem}.csv", data)
    return figure | {"weight": len(figure["uri"]) + len(figure["data"]["uri"] if figure["data"] else "")}


def _picture(path: Path) -> dict[str, object]:
    """Return a picture, reduced where it is heavy.

    Returns:
        uri; width and height in pixels of the page; least, the width below which its text would be too small
        (0 where a phone shows it whole); blank, true where nothing is drawn.
    """
    try:
        with Image.open(path) as image:
            image.load()
            inches = image.width / (image.info.get("dpi") or (FIGURE_SCALE,))[0]
            height = round(FIGURE_SCALE * inches * image.height / image.width)
            blank = all(low == high for low, high in np.atleast_2d(image.convert("RGB").getextrema()))
            content = path.read_bytes()
            if len(content) > FIGURE_BYTES:
                image = image.convert("RGB")
                image.thumbnail((FIGURE_WIDTH, 2 * FIGURE_WIDTH))
                buffer = io.BytesIO()
                image.quantize(256).save(buffer, "PNG", optimize=True)
                content = min(content, buffer.getvalue(), key=len)
    except OSError as error:
        raise UserError(f"{path} cannot be read as a picture ({error}): draw it again") from error
    least = round(READABLE_SCALE * inches)
    return {
        "uri": _uri("image/png", content),
        "width": round(FIGURE_SCALE * inches),
        "height": height,
        "least": least if least > PHONE_WIDTH else 0,
        "blank": blank,
    }


def _download(name: str, content: bytes) -> dict[str, str]:
    """Return a file for the page, compressed where it is long, without a URI where that is still too long."""
    if len(content) > CSV_BYTES:
        packed = gzip.compress(content, mtime=0)
        if len(packed) > CSV_BYTES:
            return {"name": name, "uri": ""}
        return {"name": f"{name}.gz", "uri": _uri("application/gzip", packed)}
    return {"name": name, "uri": _uri("application/json" if name.endswith(".json") else "text/csv", content)}


def _uri(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"


def _csv(table: pd.DataFrame) -> bytes:
    return table.to_csv(index=False).encode()


# The manifest in words


def _details(manifest: Mapping) -> dict[str, dict[str, str]]:
    """Return the long lists that the page shows on demand: {title: {name: value}}."""
    weights, settings = manifest.get("weights") or {}, manifest.get("settings") or {}
    details = {
        f"SHA-256 of {counted(len(weights), 'weights file')}": weights,
        "All settings": {name: _text(value) or "none" for name, value in settings.items()},
    }
    return {title: rows for title, rows in details.items() if rows}


def _flat(manifest: Mapping, prefix: str = "") -> dict[str, str]:
    """Return {"settings.size": "96", ...}; a nested object also as a whole, "settings": "size 96, ..."."""
    flat = {}
    for name, value in manifest.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}.")
        flat[f"{prefix}{name}"] = _text(value)
    return flat


def _text(value: object) -> str:
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
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

"""One page that answers the question: DIR/report.html from the tables, figures and manifest in DIR.

The page stands alone: figures and data are inside it as data URIs, and its security policy forbids the
browser to fetch anything. Every sentence of the methods is made of the manifest's values; a value that is
not there takes its sentence with it. The paper's numbers stand on the page only where the organ is the
paper's, and a banner says where the images are synthetic.
"""

import base64
import gzip
import io
import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import jinja2
import numpy as np
import pandas as pd
from PIL import Image

from fmfl import states
from fmfl.analysis import statistics, tables
from fmfl.analysis.markdown import decimals, estimate, headline, largest_p, number, reading
from fmfl.analysis.plots import NAMES, SPLITS
from fmfl.errors import UserError

TITLE = "Where should federated segmentation begin?"
DASH = "–"  # stands in a table where there is no number; a line below the table says why
PAGE_BYTES = 3_000_000  # what a phone on a slow line still takes
FIGURE_BYTES = 150_000  # a heavier picture is reduced to 256 colours
FIGURE_WIDTH = 1600  # pixels, two for each that is shown
FIGURE_SCALE = 120  # pixels of the page for an inch of a figure
READABLE_SCALE = 72  # the fewest: 9 points of text are 9 pixels; a wider figure is scrolled on a phone
PHONE_WIDTH = 358  # pixels that a page of 390 leaves for a figure
CSV_BYTES = 200_000  # longer data go in compressed, and stay beside the page if they are as long even so

TABLES = {
    "results.csv": [*tables.RUN, "round", "dice"],
    "per_image.csv": [*tables.RUN, "image_id", "patient_id", "dice"],
    "table1.csv": ["init", "split", *tables.ARMS],
    "claims.csv": ["claim", "paper", "ours", "low", "high", "n", "seeds", "verdict", "why"],
}

#: Tables that a study may have besides, each shown in a section of its own with the data beside it:
#: title, caption, and what a dash in it means.
MORE_TABLES = {
    "speed.csv": (
        "How soon",
        "Rounds until the mean Dice of the test images is at the target: mean over seeds, with 95 % interval "
        "where there are several. Seconds, images and megabytes are those spent until then. A run that does "
        "not get there counts with its whole length, so that the numbers are at least (≥) what it takes. "
        "Curve: mean Dice in % over all rounds.",
        "the target was not reached",
    ),
    "gap.csv": (
        "The gap closed",
        "Share of the way from the random start to centralised training, with 95 % interval where there is "
        "a share.",
        "no share, for the reason beside it",
    ),
    "weakest.csv": (
        "Who fares worst",
        "Final Dice in %: all test images, the tenth with the lowest, and, where groups have at least "
        f"{tables.GROUP_PATIENTS} test patients, the worst age band and the mixture of the worst client. "
        "Below 0.8: share of the images with a Dice under 0.8. HD95 and ASSD in pixels.",
        "not measured, or no group with enough patients",
    ),
}

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
        "two clients' models after the first round, and the sharpness of each start.",
    },
}
CAPTIONS = {name: caption for captions in STORY.values() for name, caption in captions.items()}

METHODS = (
    # Paragraphs of sentences. {a.b} is the manifest's value, {a.b|image} a number of images; a sentence needs
    # all of its values.
    (
        "Images: {data.source}.",
        "{data.images|image} with a mask, of {data.patients|patient}.",
        "Left out: {data.left_out}.",
        "Each is grey, {settings.size} × {settings.size} pixels.",
        "Parts: {data.proxy|proxy image}, {data.test|test image} and {data.federated|image} of the clients; "
        "no patient is in two parts.",
    ),
    (
        "Teacher: {teacher.name}, {teacher.parameters|parameter}, frozen.",
        "Its box prompts: rule {settings.box_rule}.",
        "Its mean Dice on the proxy images: {teacher.percent} %.",
        "{teacher.note}",
        "The student is {settings.student}; the clients train the same network.",
        "The fm start is the student after {settings.proxy_epochs|epoch} on the proxy images (Eq. 5).",
        "Eq. 5 gives weight {settings.alpha} to the divergence from the teacher's mask (Eq. 4, "
        "temperature {settings.temperature}) and the rest to the true mask.",
    ),
    (
        "{settings.num_clients|client} trained for {settings.num_rounds|round} of "
        "{settings.local_epochs|local epoch} (Eq. 2).",
        "The server averaged their weights (Eq. 3), weighted by: {settings.client_weights}.",
        "A local step of Adam: {settings.batch_size|image}, learning rate {settings.learning_rate}.",
        "Partitions: {settings.splits}.",
        "Starts: {settings.inits}.",
        "Seeds: {settings.seeds}.",
    ),
)
STATISTICS = (
    "Scores are those of the last round; the test images select nothing. Intervals are 95 % over seeds "
    "and test patients together; with one seed, over patients alone. All seeds share one draw of proxy,"
    " test and client images: what another draw would give is in no interval. Differences are paired by"
    " image and seed. They are tested on patients' means by Wilcoxon's signed-rank test and by "
    "permutation of signs, and by the two-way t test, each with Holm's correction. Two starts are "
    f"equivalent where two one-sided tests place their difference within {tables.EQUIVALENCE:g} "
    f"points. With fewer than {tables.MIN_PATIENTS} test patients there is no interval and no test. "
    "The effect size is d_z, the patients' mean over their standard deviation."
)
VERDICTS = (
    f"Reproduced: a number within {tables.MARGIN:g} points of the paper's, noise included; or a "
    "difference in the paper's direction, outside the noise and at least half the paper's size. "
    "Direction only: outside the noise, but smaller. Not reproduced: outside the noise the other way, "
    "or alike, or another number. Not testable here: an arm is missing, one seed, fewer than "
    f"{tables.MIN_PATIENTS} test patients, a skew by which the random start does not lose outside the "
    "noise, or an interval too wide to say, be it by the correction for several tests alone."
)


def write(directory: str | Path) -> Path:
    """Build DIR/report.html from the tables, the manifest and the figures in DIR.

    It reads the files of TABLES, manifest.json and figures/*.png: those that the manifest lists, or else
    those of STORY. Figures fig2.png and fig3.png have their places; the others follow in the story's order,
    each with the data beside it if figures/NAME.csv exists. The page appears whole or not at all.

    Raises:
        UserError: one of these files is missing or cannot be read.
    """
    directory = Path(directory)
    main = {name: _table(directory / name, columns) for name, columns in TABLES.items()}
    manifest = _manifest(directory / "manifest.json")
    for name in ("fig2.png", "fig3.png"):
        _required(directory / "figures" / name)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
    )
    page = environment.get_template("report.html.j2").render(_contents(directory, main, manifest))
    path = directory / "report.html"
    states.write_bytes(path, page.encode("utf-8"))
    return path


def methods(manifest: Mapping) -> list[str]:
    """Paragraphs of METHODS with the manifest's values in place, without the sentences that lack one."""
    values = _flat(manifest)
    settings, teacher, data = (manifest.get(name) or {} for name in ("settings", "teacher", "data"))
    if settings.get("data"):
        values["data.source"] = _subject(manifest)["images"]
    if isinstance(left_out := data.get("left_out"), Mapping):
        values["data.left_out"] = ", ".join(f"{name} ({_text(count)})" for name, count in left_out.items())
    if isinstance(dice := teacher.get("dice"), int | float):
        values["teacher.percent"] = number(100 * dice, 1)

    def word(match: re.Match) -> str:
        value, noun = values[match[1]], match[2]
        return value if noun is None else f"{value} {noun}{'s' * (value != '1')}"

    def said(sentence: str) -> str:
        if any(values.get(name, "") == "" for name, _ in re.findall(_PLACE, sentence)):
            return ""
        return re.sub(_PLACE, word, sentence)

    paragraphs = [" ".join(filter(None, map(said, sentences))) for sentences in METHODS]
    return [*filter(None, paragraphs), STATISTICS]


_PLACE = r"\{([\w.]+)(?:\|([\w ]+))?\}"


# What is read


def _required(path: Path) -> Path:
    if not path.is_file():
        raise UserError(f"{path} is missing: the report is made from it; run the study to its end first.")
    return path


def _table(path: Path, columns: Iterable[str]) -> pd.DataFrame:
    table = tables.read_table(_required(path), ("paper",))
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


def _contents(directory: Path, main: Mapping[str, pd.DataFrame], manifest: Mapping) -> dict[str, object]:
    results, per_image, table1, claims = (main[name] for name in TABLES)
    subject = _subject(manifest)
    differences = tables.paired_differences(per_image)
    last = tables.final(results)
    names = [name for name in TABLES if subject["compared"] or name != "claims.csv"]
    files = {name: _download(name, (directory / name).read_bytes()) for name in [*names, "manifest.json"]}
    files["differences.csv"] = _download("differences.csv", _csv(differences))
    split = str(table1.split.iloc[0]) if len(table1) else ""
    shown, others, left_out = _figures(directory, results, manifest, subject, files)
    return {
        "title": TITLE,
        "subject": subject,
        "answer": _answer(results, differences, claims, split or None, subject),
        "note": _text((manifest.get("teacher") or {}).get("note")),
        "facts": _facts(per_image, last, manifest, subject),
        "table1": _table1(table1, per_image, subject, files["table1.csv"]),
        "differences": _differences(differences, per_image, files["differences.csv"]),
        "ledger": _ledger(claims) if subject["compared"] else [],
        "tested": _tested(claims),
        "verdicts": VERDICTS,
        **shown,
        "tables": _more_tables(directory, manifest),
        "stages": others,
        "left_out": left_out,
        "methods": methods(manifest),
        "run": _run(manifest),
        "details": _details(manifest),
        "files": files,
    }


def _subject(manifest: Mapping) -> dict[str, object]:
    """What the images are: of which organ, from where, synthetic or not, and so beside whose numbers."""
    settings, data = manifest.get("settings") or {}, manifest.get("data") or {}
    organ = str(data.get("organ") or settings.get("mask_class") or "lung")
    sources = [source.strip() for source in str(settings.get("data") or "").split(",") if source.strip()]
    drawn = [source == "phantom" for source in sources]
    synthetic = data.get("kind") == "synthetic" or (bool(drawn) and all(drawn))
    phantoms = "the built-in synthetic chest X-rays"
    named = ", ".join(phantoms if source == "phantom" else source for source in sources)
    lungs = organ.lower() in ("lung", "lungs")
    warning = "these X-rays were drawn by a program. The numbers say nothing about patients"
    if any(drawn) and not synthetic:
        warning = "some of these X-rays were drawn by a program. The numbers say little about patients"
    return {
        "organ": organ,
        "images": named or (phantoms if synthetic else "not stated"),
        "compared": lungs,
        "synthetic": synthetic or any(drawn),
        "banner": "SYNTHETIC IMAGES" if synthetic else "PARTLY SYNTHETIC IMAGES",
        "warning": warning + (" and cannot be compared with the paper's." if lungs else "."),
    }


def _answer(results, differences, claims, split: str | None, subject: Mapping) -> list[str]:
    """The headline, which counts the paper's claims only where they are about the same organ."""
    if not subject["compared"] or "kind" not in claims:  # which older ledgers lack
        claims = claims.head(0).assign(kind="")
    return headline(results, differences, claims, split)


def _facts(
    per_image: pd.DataFrame, last: pd.DataFrame, manifest: Mapping, subject: Mapping
) -> dict[str, str]:
    teacher = manifest.get("teacher") or {}
    name = {"builtin": "built-in"}.get(teacher.get("name"), _text(teacher.get("name")))
    dice = teacher.get("dice")
    measured = isinstance(dice, int | float) and math.isfinite(dice)
    rounds = last.loc[last.arm == "federated", "round"]
    facts = {
        "Images": subject["images"],
        "Organ": subject["organ"],
        "Test set": _many(per_image.image_id.nunique(), "image")
        + f" of {_many(per_image.patient_id.nunique(), 'patient')}",
        "Teacher": name + (f", mean Dice {100 * dice:.1f} % on the proxy images" if measured else ""),
        "Runs": _many(per_image.seed.nunique(), "seed")
        + (f", {_many(int(rounds.max()), 'round')}" if len(rounds) else ""),
    }
    return {label: value for label, value in facts.items() if value}


def _counted(per_image: pd.DataFrame) -> str:
    people, seeds, images = (per_image[name].nunique() for name in ("patient_id", "seed", "image_id"))
    few = f" Fewer than {tables.MIN_PATIENTS} patients: no intervals and no tests."
    counts = f"{_many(images, 'test image')} of {_many(people, 'patient')}, {_many(seeds, 'seed')}."
    return counts + few * (people < statistics.MIN_PATIENTS)


def _with_interval(per_image: pd.DataFrame) -> str:
    few = per_image.patient_id.nunique() < statistics.MIN_PATIENTS
    return "" if few else ", with 95 % interval"


# Tables


def _section(name: str, title: str, caption: str, rows: list[dict], file: Mapping, dash: str) -> dict:
    """A table as the page shows it: without columns that say nothing, and no cell empty."""
    said = [
        column for column in (rows[0] if rows else ()) if any(row[column] not in ("", DASH) for row in rows)
    ]
    rows = [{column: row[column] or DASH for column in said} for row in rows]
    return {
        "id": name,
        "title": title,
        "caption": caption,
        "columns": said,
        "words": {"start", "split", "arm", "why", "reading", "difference", "worst age band"},
        "rows": rows,
        "dash": f"{DASH}: {dash}." if any(DASH in row.values() for row in rows) else "",
        "file": file,
    }


def _start(init: str) -> str:
    return NAMES.get(init, init)


def _paper(arm: str, init: str) -> str:
    found = [value for (known, start, _), value in tables.PAPER.items() if (known, start) == (arm, init)]
    return number(found[0]) if found else ""


def _table1_cell(row: Mapping, arm: str) -> str:
    if pd.isna(row[arm]):
        return "not run"
    return estimate(row[arm], row.get(f"{arm}_low", np.nan), row.get(f"{arm}_high", np.nan))


def _table1(table: pd.DataFrame, per_image: pd.DataFrame, subject: Mapping, file: Mapping) -> dict:
    split = str(table.split.iloc[0]) if len(table) else ""
    # From the scores by image, as the ledger has it: none where it would be a number over nothing.
    gap = tables.gap(per_image, table.init.drop_duplicates(), split).set_index("init").gap_closed
    arms = [arm for arm in tables.ARMS if table[arm].notna().any()]
    rows = []
    for row in table.to_dict("records"):
        init, paper = row["init"], {arm: _paper(arm, row["init"]) for arm in tables.ARMS}
        cells = {arm: _table1_cell(row, arm) for arm in arms} | {
            "gap closed": _percent(gap.get(init, np.nan))
        }
        paper["gap closed"] = _percent(tables.PAPER_GAP[init]) if init in tables.PAPER_GAP else ""
        if subject["compared"]:
            cells = {k: f"{cell}\npaper {paper[k]}" if paper[k] else cell for k, cell in cells.items()}
        rows.append({"start": _start(init)} | cells)
    caption = (
        f"Final Dice on the test images in % under {SPLITS.get(split, split)}{_with_interval(per_image)}. "
        f"{_counted(per_image)} "
    )
    caption += "Gap closed: the share of the way from the random start to centralised training."
    if subject["compared"]:
        caption += " Below each number the paper's, from other images, under age skew."
    title = "Table 1: starts compared" if subject["compared"] else "Starts compared"
    return _section("table1", title, caption, rows, file, "no share of a gap")


def _differences(table: pd.DataFrame, per_image: pd.DataFrame, file: Mapping) -> dict[str, object]:
    caption = (
        f"Points of final Dice, paired by image and seed{_with_interval(per_image)}. “Higher” and "
        "“lower” only outside the noise: the interval excludes zero and each test, corrected by Holm, stays "
        "below 5 %. p is the largest of the tests'; d is the effect size d_z."
    )
    rows = [_difference_row(row) for row in table.itertuples()]
    return _section("differences", "Differences between starts", caption, rows, file, "not tested")


def _difference_row(row) -> dict[str, str]:
    return {
        "split": SPLITS.get(row.split, row.split),
        "difference": f"{_start(row.higher)} less {_start(row.lower)}",
        "points": _points(row.value, row.low, row.high),
        "p": largest_p(row),
        "d": number(row.effect),
        "reading": reading(row) or "not compared",
    }


def _more_tables(directory: Path, manifest: Mapping) -> list[dict[str, object]]:
    found = []
    for name, (title, caption, dash) in MORE_TABLES.items():
        path = directory / name
        if not path.is_file():
            continue
        table = _table(path, ())
        if name == "speed.csv" and "target" not in table:
            target = (manifest.get("settings") or {}).get("target_dice", np.nan)
            table = table.assign(target=target if target else np.nan)
        rows = [_MORE_ROWS[name](row) for row in table.to_dict("records")]
        found.append(_section(path.stem, title, caption, rows, _download(name, path.read_bytes()), dash))
    return found


def _who(row: Mapping) -> dict[str, str]:
    return {"start": _start(row["init"]), "arm": row["arm"], "split": SPLITS.get(row["split"], row["split"])}


def _speed_row(row: Mapping) -> dict[str, str]:
    some = row["reached"] > 0
    rounds = estimate(row["rounds"], max(row["rounds_low"], 0), row["rounds_high"], 1)
    least = "≥ " if row.get("capped") else ""  # older tables have no such column, nor such rows
    rounds = f"{least}{number(row['rounds'], 1)}" if least else rounds

    def spent(value: float, digits: int = 0) -> str:
        return f"{least}{value:,.{digits}f}" if some and pd.notna(value) else DASH

    return _who(row) | {
        "target, %": number(100 * row["target"], 0),
        "seeds that reach it": f"{row['reached']} of {row['seeds']}",
        "rounds": rounds if some else DASH,
        "seconds": spent(row["seconds"], 1),
        "images seen": spent(row.get("images_seen", np.nan)),
        "MB": spent(row["bytes"] / 1e6),
        "curve": estimate(row["curve"], row["curve_low"], row["curve_high"], 1),
    }


def _gap_row(row: Mapping) -> dict[str, str]:
    low, high = _percent(row["low"]), _percent(row["high"])
    share = _percent(row["gap_closed"])
    return {
        "start": _start(row["init"]),
        "split": SPLITS.get(row.get("split"), row.get("split")) or "",
        "gap closed": share if DASH in (low, high) else f"{share} ({low} to {high})",
        "why": row["why"] if isinstance(row["why"], str) else "",
    }


def _weakest_row(row: Mapping) -> dict[str, str]:
    band = row["worst_band"]
    band = f"{band} years: {number(row['worst_band_dice'], 1)}" if isinstance(band, str) and band else ""
    if band and pd.notna(row.get("worst_band_images", np.nan)):
        people = _many(int(row["worst_band_patients"]), "patient")
        band += f"\n{_many(int(row['worst_band_images']), 'image')} of {people}"
    return _who(row) | {
        "all": number(row["dice"], 1),
        "worst tenth": number(row["worst_tenth"], 1),
        "worst age band": band,
        "worst client": number(row["worst_client_dice"], 1),
        "below 0.8": f"{number(row['failures'], 1)} %",
        "HD95": number(row.get("hd95", np.nan), 1),
        "ASSD": number(row.get("assd", np.nan), 1),
    }


_MORE_ROWS = {"speed.csv": _speed_row, "gap.csv": _gap_row, "weakest.csv": _weakest_row}


# The ledger


def _ledger(claims: pd.DataFrame) -> list[dict[str, object]]:
    """The claims by group ("Claim 1", "Table 1"); in each group a reason that several rows share stands once.

    Returns:
        One dict a group: name, and parts of rows with their shared reason (why, "" where each has its own).
    """
    groups: dict[str, list[dict[str, str]]] = {}
    for row in claims.to_dict("records"):
        name, rest = re.match(r"([^,:]*)[,:]?\s*(.*)", str(row["claim"]), re.DOTALL).groups()
        groups.setdefault(name, []).append(_claim_row(row, rest or name))
    ledger = []
    for name, rows in groups.items():
        reasons = [row["why"] for row in rows]
        parts: dict[str, list[dict[str, str]]] = {}
        for row in rows:
            parts.setdefault(row["why"] if reasons.count(row["why"]) > 1 else "", []).append(row)
        ledger.append({"name": name, "parts": [{"why": why, "rows": found} for why, found in parts.items()]})
    return ledger


def _claim_row(row: Mapping, name: str) -> dict[str, str]:
    kinds = {"reproduced": "reproduced", "direction only": "direction", "not reproduced": "not"}
    ours, low, high = row["ours"], row["low"], row["high"]
    if "points" in name:
        shown = _points(ours, low, high)
    else:
        digits = 0 if name.startswith("%") else 1 if "rounds" in name else 2
        shown = estimate(ours, low, high, digits)
    return {
        "claim": name[:1].upper() + name[1:],
        "paper": DASH if pd.isna(row["paper"]) else str(row["paper"]).replace("-", "−"),
        "ours": shown if pd.notna(ours) else DASH if row["n"] > 0 else "not run",
        "tested": _on(row),
        "verdict": row["verdict"],
        "kind": kinds.get(row["verdict"], "untested"),
        "why": "" if pd.isna(row["why"]) else row["why"],
    }


def _on(row: Mapping) -> str:
    """On how much a claim was tested: images, patients where they are known, seeds."""
    counts = {"image": row["n"], "patient": row.get("patients", np.nan), "seed": row["seeds"]}
    if (
        "patients" not in row and row["n"] == row["seeds"]
    ):  # so older studies count what was tested over seeds
        del counts["image"]
    return ", ".join(
        _many(int(count), noun) for noun, count in counts.items() if pd.notna(count) and count > 0
    )


def _tested(claims: pd.DataFrame) -> str:
    """What all claims were tested on, "" where it differs: then each row says it."""
    found = {_on(row) for row in claims.to_dict("records")} - {""}
    return found.pop() if len(found) == 1 else ""


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
    return [(label, values[name]) for name, label in names.items() if values.get(name, "") != ""]


def _details(manifest: Mapping) -> list[tuple[str, list[tuple[str, str]]]]:
    """Long lists that the page shows when they are asked for: title, and pairs of a name and its value."""
    weights = [(name, str(digest)) for name, digest in (manifest.get("weights") or {}).items()]
    settings = [(name, _text(value) or "none") for name, value in (manifest.get("settings") or {}).items()]
    found = [(f"SHA-256 of {_many(len(weights), 'weights file')}", weights), ("All settings", settings)]
    return [(title, rows) for title, rows in found if rows]


# Figures and files inside the page


def _figures(
    directory: Path, results: pd.DataFrame, manifest: Mapping, subject: Mapping, files: Mapping
) -> tuple[dict, list[dict], list[str]]:
    """The figures with a place of their own, the others by stage, and the names of those that do not fit."""
    last = tables.final(results)
    data = {"fig2": _csv(last), "fig3": _csv(results[results.arm == "federated"])}
    beside = {"when_it_pays": "gains.csv", "why": "drift.csv"}
    data |= {
        stem: (directory / name).read_bytes() for stem, name in beside.items() if (directory / name).exists()
    }
    listed = _story(directory, results, manifest)
    placed = {"fig2": "fig2", "fig3": "fig3", "when_it_pays": "map"}
    shown = {"map": None}
    used = sum(len(file["uri"]) for file in files.values()) + 50_000  # the page itself
    for stem in [stem for stem in placed if stem in listed]:
        path = directory / "figures" / f"{stem}.png"
        shown[placed[stem]] = item = _figure(path, last, data.get(stem))
        used += _weight(item)
    stages: dict[str, list[dict]] = {stage: [] for stage in STORY}
    left_out = []
    for stem in [stem for stem in listed if stem not in placed]:
        path = directory / "figures" / f"{stem}.png"
        item = None if stem in _repeated(listed) else _figure(path, last, data.get(stem))
        if item is None or used + _weight(item) > PAGE_BYTES:
            left_out.append(path.name)
        elif not item["blank"]:
            stages[_stage(stem)].append(item)
            used += _weight(item)
    return shown, [{"title": name, "figures": found} for name, found in stages.items() if found], left_out


def _known(stem: str) -> str:
    """The name in STORY that a figure's name begins with, "" if none does."""
    return max((name for name in CAPTIONS if re.match(rf"{name}(_|\d|$)", stem)), key=len, default="")


def _stage(stem: str) -> str:
    return next((stage for stage, names in STORY.items() if _known(stem) in names), list(STORY)[-1])


def _story(directory: Path, results: pd.DataFrame, manifest: Mapping) -> list[str]:
    """Stems of the study's figures in the story's order: of the manifest's, or else of STORY's names.

    Left out: partitions that no run of the study used, and a sweep that holds one student.
    """
    there = {path.stem for path in (directory / "figures").glob("*.png")}
    listed = manifest.get("figures")
    if isinstance(listed, list):
        stems = [Path(str(name)).stem for name in listed]
        stems += [stem for stem in ("fig2", "fig3") if stem not in stems]
    else:
        order = {name: place for place, name in enumerate(CAPTIONS)}
        stems = sorted((s for s in there if _known(s)), key=lambda s: (order[_known(s)], s))
    splits = {f"clients_{split}" for split in results.split}
    settings = manifest.get("settings") or {}
    sweeps = [settings.get(name, "?") for name in ("alpha_sweep", "temperature_sweep", "variants")]
    return [
        stem
        for stem in dict.fromkeys(stems)
        if stem in there
        and not (stem.startswith("clients_") and stem not in splits)
        and not (stem.startswith("dice_by_alpha") and not any(sweeps))
    ]


def _repeated(stems: list[str]) -> set[str]:
    """Figures that another seed's already shows: NAME_seed1 beside NAME_seed0."""
    first: dict[str, str] = {}
    parts = {stem: re.fullmatch(r"(.*)_seed(\d+)", stem) for stem in stems}
    for stem, match in sorted(parts.items(), key=lambda item: int(item[1][2]) if item[1] else 0):
        if match:
            first.setdefault(match[1], stem)
    return {stem for stem, match in parts.items() if match and first[match[1]] != stem}


def _figure(path: Path, last: pd.DataFrame, data: bytes | None) -> dict[str, object]:
    name = _known(path.stem)
    caption = CAPTIONS.get(name, path.stem.replace("_", " ").capitalize() + ".")
    if name and path.stem != name:
        detail = path.stem[len(name) :].strip("_").replace("_", ", ").replace("seed", "seed ")
        caption = f"{caption[:-1]} ({', '.join(SPLITS.get(part, part) for part in detail.split(', '))})."
    alt = caption
    if path.stem in ("fig2", "fig3"):
        means = last[last.arm == "federated"].groupby(["split", "init"], sort=False).dice.mean()
        ends = means.mul(100).round(1).items()
        alt += (
            " Final Dice: " + "; ".join(f"{SPLITS.get(s, s)}, {_start(i)} {d} %" for (s, i), d in ends) + "."
        )
    if data is None and path.with_suffix(".csv").is_file():
        data = path.with_suffix(".csv").read_bytes()
    return _png(path) | {
        "stem": path.stem,
        "alt": alt,
        "caption": caption,
        "data": _download(f"{path.stem}.csv", data) if data is not None else None,
    }


def _png(path: Path) -> dict[str, object]:
    """A figure's uri, reduced where it is heavy.

    Returns:
        uri; width and height in pixels of the page; least, the width below which its text would be too small
        (0 where a phone shows it whole); blank, true where nothing is drawn.
    """
    try:
        with Image.open(path) as image:
            image.load()
            inches = image.width / (image.info.get("dpi") or (FIGURE_SCALE,))[0]
            size = round(FIGURE_SCALE * inches), round(FIGURE_SCALE * inches * image.height / image.width)
            blank = all(low == high for low, high in np.atleast_2d(image.convert("RGB").getextrema()))
            picture = path.read_bytes()
            if len(picture) > FIGURE_BYTES:
                image = image.convert("RGB")
                image.thumbnail((FIGURE_WIDTH, 2 * FIGURE_WIDTH))
                buffer = io.BytesIO()
                image.quantize(256).save(buffer, "PNG", optimize=True)
                picture = min(picture, buffer.getvalue(), key=len)
    except OSError as error:
        raise UserError(f"{path} cannot be read as a picture ({error}): draw it again.") from error
    least = round(READABLE_SCALE * inches)
    return {
        "uri": _uri("image/png", picture),
        "width": size[0],
        "height": size[1],
        "least": least if least > PHONE_WIDTH else 0,
        "blank": blank,
    }


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


def _many(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'s' * (count != 1)}"


def _points(value: float, low: float, high: float) -> str:
    """A difference with its interval."""
    return estimate(value, low, high, decimals(value, low, high), sign=True)


def _percent(share: float) -> str:
    return DASH if pd.isna(share) else f"{100 * share:.0f} %".replace("-", "−")

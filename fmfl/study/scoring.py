"""Scores of a run's final weights on images from elsewhere: by image, and by group with intervals."""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from fmfl import metrics, split, train
from fmfl.analysis import statistics, tables, words
from fmfl.config import split_list
from fmfl.data import Cohort
from fmfl.errors import UserError
from fmfl.sources.files import printable
from fmfl.sources.mask_files import is_lung
from fmfl.study import students
from fmfl.study.outputs import write_text
from fmfl.study.students import Final

#: What images can be grouped by: columns of a cohort's table; age stands for its bands.
GROUPS = ("site", "source", "age", "sex", "view", "finding")

#: Scores, and the range of each.
METRICS = {"dice": (0.0, 1.0), "iou": (0.0, 1.0), "hd95": (0.0, np.inf), "assd": (0.0, np.inf)}

#: Images whose logits are in memory at a time.
CHUNK = 512

#: Tables by image and by group.
SCORES, SUMMARY = "scores.csv", "summary.csv"

#: Beside the tables: the images that they are of, one source a line, below a line of its own.
SOURCES, SOURCES_LINE = "sources.txt", "scored:\n"

#: Stands below every scoring, with an example where the organ is the lung.
NOTE = (
    "Other sets may outline the {organ} otherwise{example}. A lower Dice there is a difference of outlines "
    "as well as of networks."
)
LUNGS = ": the masks of V7 include most of the heart, those of Montgomery and JSRT leave it out"


def by_image(finals: Iterable[Final], cohort: Cohort) -> Iterator[pd.DataFrame]:
    """Score final weights on every image of a cohort, at the cohort's size and on its device.

    Yields:
        Of each file of weights a table, one row an image: arm, init, split, seed, client, image_id,
        patient_id, the columns of GROUPS, dice, iou, hd95, assd.
    """
    about = cohort.table[["image_id", "patient_id", *GROUPS]]
    for final in finals:
        model = students.load(final, cohort.device)
        key = {name: getattr(final, name) for name in (*tables.RUN, "client")}
        parts = []
        for rows in torch.arange(len(cohort), device=cohort.images.device).split(CHUNK):
            logits = train.predict(model, cohort.images, rows)
            parts.append(metrics.score(logits.sigmoid(), cohort.masks[rows].to(logits.device)))
        yield pd.concat([about.assign(**key)[[*key, *about]], pd.concat(parts, ignore_index=True)], axis=1)


def summary(scores: pd.DataFrame, by: str = "site") -> pd.DataFrame:
    """Return mean scores with 95 % intervals, of all images and of each group.

    The interval is over seeds and patients together, with one seed over patients alone; there is none with
    fewer than `statistics.MIN_PATIENTS` patients. A standalone image's score is its mean over clients.

    Args:
        scores: from `by_image`, of all weights together.
        by: one of GROUPS.

    Returns:
        One row a group and (arm, init, split): group, these, images, patients, seeds, and for each of METRICS
        its mean and {metric}_low and {metric}_high: Dice and IoU 0..1, distances in pixels of the cohort.
    """
    group = pd.Series(split.age_bands(scores.age), scores.index) if by == "age" else scores[by]
    group = group.replace("", "unknown")
    names = tables.known_first(sorted(group.unique()), split.AGE_BANDS)
    rows = []
    for name, chosen in [("all", scores), *((name, scores[group == name]) for name in names)]:
        for key, runs in chosen.groupby(tables.RUN[:3], sort=False):
            rows.append({"group": name} | dict(zip(tables.RUN[:3], key, strict=True)) | _estimates(runs))
    return pd.DataFrame(rows)


def _estimates(runs: pd.DataFrame) -> dict[str, float]:
    """Return images, patients and seeds of one cell, and each score with its interval."""
    patients = runs.drop_duplicates("image_id").set_index("image_id").patient_id
    row = {"images": len(patients), "patients": patients.nunique(), "seeds": runs.seed.nunique()}
    for metric, limits in METRICS.items():
        by_seed = runs.groupby(["image_id", "seed"])[metric].mean().unstack("seed").dropna()
        own = patients.reindex(by_seed.index)
        low = high = np.nan
        if row["patients"] >= statistics.MIN_PATIENTS:
            if row["seeds"] > 1:
                low, high = statistics.two_way(by_seed.to_numpy(), own).interval()
            else:
                low, high = statistics.bootstrap_mean(by_seed.mean(axis=1).to_numpy(), own)
            low, high = np.clip([low, high], *limits)
        row |= {metric: by_seed.to_numpy().mean(), f"{metric}_low": low, f"{metric}_high": high}
    return row


def own_images(finals: Iterable[Final], cohort: Cohort, run_dir: Path) -> list[str]:
    """Return a warning where the run trained on these images, or on a source of that name."""
    if cohort.fingerprint in {final.made_of.get("data") for final in finals}:
        return ["these are the images of the run itself, which has trained on most: see its per_image.csv"]
    trained = {Path(part).name for part in str(students.settings(run_dir).get("data", "")).split(",")}
    if same := sorted(trained & set(cohort.table.source)):
        return [
            f"the run trained on a source of the same name ({', '.join(same)}): it may know some of these"
        ]
    return []


def score(
    finals: Sequence[Final], cohort: Cohort, by: str, *, progress: bool = False
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return `by_image` of all weights as one table, and its `summary`."""
    weights = tqdm(finals, unit="weights", disable=not progress, leave=False)
    scores = pd.concat(by_image(weights, cohort), ignore_index=True)
    return scores, summary(scores, by)


def folder_of(run_dir: Path, sources: str) -> Path:
    """Return the folder of the tables where a person names none; a number tells sources of one name apart."""
    own = run_dir / "scores" / "+".join(Path(place).name for place in _places(sources))
    later = (own.with_name(f"{own.name}.{number}") for number in itertools.count(2))
    return next(folder for folder in itertools.chain([own], later) if not _of_others(folder, sources))


def _places(sources: str) -> list[str]:
    return [part if part == "phantom" else str(Path(part).resolve()) for part in split_list(sources)]


def _of_others(folder: Path, sources: str) -> bool:
    """Return True where a folder holds the scores of other images; older tables do not tell."""
    file = folder / SOURCES
    return file.is_file() and file.read_text(encoding="utf-8", errors="replace") != _listed(sources)


def _listed(sources: str) -> str:
    return SOURCES_LINE + "".join(f"{printable(place)}\n" for place in _places(sources))


def check_folder(folder: Path, by: str) -> Path:
    """Return a folder into which the tables may be written.

    Raises:
        UserError: `by` is none of GROUPS, or one of the files there is somebody else's.
    """
    if by not in GROUPS:
        raise UserError(f"--by {by}: choose one of {', '.join(GROUPS)}")
    begins = {SCORES: "arm,init,split,seed,client,image_id", SUMMARY: "group,arm,init,split"}
    for name, first in (begins | {SOURCES: SOURCES_LINE}).items():
        file = folder / name
        if file.exists() and not file.read_text(encoding="utf-8", errors="replace").startswith(first):
            raise UserError(f"{file} is there, and `fmfl score` did not make it: name another --out")
    return folder


def write(folder: Path, sources: str, scores: pd.DataFrame, by_group: pd.DataFrame) -> None:
    """Write scores.csv, summary.csv and the sources that they are of."""
    write_text(folder / SOURCES, _listed(sources))
    for name, table in ((SCORES, scores), (SUMMARY, by_group)):
        write_text(folder / name, table.to_csv(index=False))


def in_words(
    finals: Sequence[Final], by_group: pd.DataFrame, cohort: Cohort, run_dir: Path, folder: Path
) -> list[str]:
    """Return lines with the Dice of each cell, notes on what they mean, and where the tables are."""
    rows = [
        [
            row["group"],
            row["arm"],
            words.split_name(row["split"]),
            words.init_name(row["init"]),
            f"{row['images']} of {row['patients']}",
            str(row["seeds"]),
            words.estimate(*(100 * row[name] for name in ("dice", "dice_low", "dice_high")), 1),
        ]
        for row in by_group.to_dict("records")
    ]
    columns = ["group", "arm", "split", "start", "images of patients", "seeds", "Dice in % (95 %)"]
    lines = pd.DataFrame(rows, columns=columns).to_string(index=False).splitlines()
    left_out = len(cohort.left_out)
    lines.append(f"images: {len(cohort)} scored, {left_out} left out (`fmfl data` says why)")
    lines += [f"warning: {text}" for text in own_images(finals, cohort, run_dir)]
    organ = students.organ(run_dir)
    lines.append(f"note: {NOTE.format(organ=organ, example=LUNGS if is_lung(organ) else '')}")
    return [*lines, f"tables: {folder / SCORES} and {folder / SUMMARY}"]

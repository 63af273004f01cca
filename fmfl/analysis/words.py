"""Words for numbers: names, intervals and rows that pages, the report and figures share, and the answer."""

import math
import re
from collections.abc import Mapping

import pandas as pd

from fmfl.analysis.claims import PAPER_GAP, VERDICTS
from fmfl.analysis.statistics import ALPHA, EQUIVALENCE, MIN_PATIENTS, TOO_FEW
from fmfl.analysis.tables import TARGETS, final, reference_split, speed

#: Starts and splits as a reader knows them; the splits are in the order of figures.
INITS = {
    "random": "random",
    "pretraining": "pre-training",
    "fm": "foundation model",
    "imagenet": "ImageNet",
    "file": "given weights",
}
SPLITS = {
    "iid": "IID",
    "age": "age skew",
    "quantity": "quantity skew",
    "site": "split by site",
    "dirichlet": "Dirichlet over ages",
}
#: Stands where there is no number.
DASH = "–"


def init_name(init: str) -> str:
    """Return a start's name."""
    return INITS.get(init, init)


def split_name(split: str) -> str:
    """Return a split's name."""
    return SPLITS.get(split, split)


def counted(count: int, noun: str) -> str:
    """Return "1 image" or "1,000 images"."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def number(value: float, digits: int = 2, *, sign: bool = False) -> str:
    """Return a number as text; a dash where there is none, and no sign of zero."""
    if pd.isna(value):
        return DASH
    text = f"{value:{'+' if sign else ''}.{digits}f}".replace("-", "−")
    return text.replace("+", "").replace("−", "") if float(f"{value:.{digits}f}") == 0 else text


def interval(low: float, high: float, digits: int = 2, *, sign: bool = False) -> str:
    """Return "low to high"; nothing where there is none."""
    if pd.isna(low) or pd.isna(high):
        return ""
    return f"{number(low, digits, sign=sign)} to {number(high, digits, sign=sign)}"


def estimate(value: float, low: float, high: float, digits: int = 2, *, sign: bool = False) -> str:
    """Return "value (low to high)"."""
    within = interval(low, high, digits, sign=sign)
    return number(value, digits, sign=sign) + (f" ({within})" if within else "")


def percent(share: float) -> str:
    """Return a share of 1 as "63 %"."""
    return DASH if pd.isna(share) else f"{number(100 * share, 0)} %"


def reading(row: Mapping) -> str:
    """Return the reading of a difference, with what stands beside it: the correction alone, equivalence."""
    text = row["reading"]
    alone = [row.get(name, math.nan) for name in ("p", "p_permutation", "p_two_way")]
    if text == "inside the noise" and all(p < ALPHA for p in alone):
        text += " after correction"
    return text + f"; equivalent within {EQUIVALENCE:g}" * bool(text and row["equivalent"])


def largest_p(row: Mapping) -> str:
    """Return the largest of a difference's corrected p-values, on which its reading stands."""
    p = max(row[f"{name}_holm"] for name in ("p", "p_permutation", "p_two_way"))
    return DASH if pd.isna(p) else "< 0.001" if p < 0.001 else f"{p:.3f}"


def tested_on(per_image: pd.DataFrame) -> str:
    """Return the numbers of test images, patients and seeds, and what intervals are over."""
    images, patients, seeds = (per_image[name].nunique() for name in ("image_id", "patient_id", "seed"))
    text = f"{counted(images, 'test image')} of {counted(patients, 'patient')}, {counted(seeds, 'seed')}."
    if patients < MIN_PATIENTS:
        return f"{text} Fewer than {MIN_PATIENTS} patients: no intervals, no tests."
    return f"{text} Intervals are 95 % over {'seeds and patients together' if seeds > 1 else 'patients'}."


# Rows of tables: {column: text}


def difference_row(row: Mapping) -> dict[str, str]:
    """Return a row of `tables.paired_differences`."""
    return {
        "partition": split_name(row["split"]),
        "difference": f"{init_name(row['higher'])} less {init_name(row['lower'])}",
        "points (95 %)": estimate(row["value"], row["low"], row["high"], sign=True),
        "patients alone": interval(row["patient_low"], row["patient_high"], sign=True),
        "seeds alone": interval(row["seed_low"], row["seed_high"], sign=True),
        "p, corrected": largest_p(row),
        "d": number(row["effect"]),
        "reading": reading(row) or "not compared",
    }


def gain_row(row: Mapping) -> dict[str, str]:
    """Return a row of `tables.gains`."""
    return {
        "setting": row["axis"],
        "value": row["value"],
        "difference": f"{init_name(row['higher'])} less {init_name(row['lower'])}",
        "points (95 %)": estimate(row["gain"], row["low"], row["high"], sign=True),
        "p, corrected": largest_p(row),
        "reading": reading(row),
    }


def speed_row(row: Mapping) -> dict[str, str]:
    """Return a row of `tables.speed`; numbers of a capped row are the least that it takes."""
    least = "≥ " if row.get("capped") else ""  # older tables have no such column, nor such rows

    def spent(value: float, digits: int = 0) -> str:
        return DASH if pd.isna(value) else f"{least}{value:,.{digits}f}"

    rounds = estimate(row["rounds"], row["rounds_low"], row["rounds_high"], 1)
    return {
        "to a Dice of": percent(row.get("target", float("nan"))),
        "arm": row["arm"],
        "start": init_name(row["init"]),
        "partition": split_name(row["split"]),
        "seeds there": f"{row['reached']} of {row['seeds']}",
        "rounds (95 % over seeds)": spent(row["rounds"], 1) if least else rounds,
        "images": spent(row.get("images_seen", float("nan"))),
        "seconds": spent(row["seconds"], 1),
        "MB": spent(row["bytes"] / 1e6),
        "curve": estimate(row["curve"], row["curve_low"], row["curve_high"], 1),
    }


def gap_row(row: Mapping) -> dict[str, str]:
    """Return a row of `tables.gap`, with the paper's share."""
    within = interval(100 * row["low"], 100 * row["high"], 0)
    return {
        "start": init_name(row["init"]),
        "gap closed (95 %)": percent(row["gap_closed"]) + (f" ({within})" if within else ""),
        "paper": percent(PAPER_GAP[row["init"]]) if row["init"] in PAPER_GAP else "",
        "why there is none": "" if pd.isna(row["why"]) else row["why"],
    }


def weakest_row(row: Mapping) -> dict[str, str]:
    """Return a row of `tables.weakest`."""
    band = "" if pd.isna(row["worst_band"]) else row["worst_band"]
    if band:
        band += f" years: {number(row['worst_band_dice'])}"
    if band and pd.notna(row.get("worst_band_images", float("nan"))):
        patients = counted(int(row["worst_band_patients"]), "patient")
        band += f"\n{counted(int(row['worst_band_images']), 'image')} of {patients}"
    return {
        "arm": row["arm"],
        "start": init_name(row["init"]),
        "partition": split_name(row["split"]),
        "all": number(row["dice"]),
        "worst tenth": number(row["worst_tenth"]),
        "worst age band": band,
        "worst client": number(row["worst_client_dice"]),
        "below 0.8": f"{number(row['failures'], 1)} %",
        "HD95": number(row.get("hd95", float("nan")), 1),
        "ASSD": number(row.get("assd", float("nan")), 1),
    }


def claim_row(row: Mapping) -> dict[str, str]:
    """Return a row of `claims.ledger`: rounds have one decimal, shares of the gap none, Dice two."""
    claim = str(row["claim"])
    digits = 0 if "% of the way" in claim else 1 if "rounds" in claim else 2
    ours = estimate(row["ours"], row["low"], row["high"], digits, sign="points" in claim)
    return {
        "claim": claim,
        "paper": _minus(row["paper"]) or DASH,
        "ours (95 %)": "not run" if pd.isna(row["ours"]) and not row["n"] > 0 else ours,
        "verdict": row["verdict"],
        "why": _minus(row["why"]),
    }


def _minus(text: object) -> str:
    """Return text with a minus before numbers, "" for NaN; hyphens stay."""
    return "" if pd.isna(text) else re.sub(r"-(?=\d)", "−", str(text))


# The answer


def headline(
    results: pd.DataFrame, differences: pd.DataFrame, ledger: pd.DataFrame, split: str | None = None
) -> list[str]:
    """Return the answer in a few sentences; "above" and "below" are said only outside the noise.

    Args:
        results: the run's scored rounds.
        differences: `tables.paired_differences`.
        ledger: `claims.ledger`.
        split: what the answer is about, `tables.reference_split` if not given.
    """
    split = reference_split(results) if split is None else split
    last = final(results)
    fm = last[(last.arm == "federated") & (last.init == "fm") & (last.split == split)]
    if fm.empty:
        return ["These results hold no federated run from the teacher's student."]
    seeds = f"{len(fm)} seeds" if len(fm) > 1 else "one seed"
    sentences = [
        f"Under {split_name(split)}, federated training that starts from the teacher's student ends at "
        f"a mean Dice of {100 * fm.dice.mean():.1f} % after {fm['round'].max()} rounds ({seeds})."
    ]
    for row in differences[(differences.split == split) & (differences.higher == "fm")].itertuples():
        sentences += _difference(row)
    sentences += _speed(results[(results.arm == "federated") & (results.split == split)])
    if len(fm) > 1:
        sentences.append("All seeds share one draw of proxy, test and client images.")
    return [*sentences, *verdict_counts(ledger)]


def decimals(*numbers: float) -> int:
    """Return the decimals of a difference in a sentence: two where a number is under a point, else one."""
    return 2 if any(abs(value) < 1 for value in numbers if pd.notna(value)) else 1


def _difference(row) -> list[str]:
    against = {"random": "a random start", "pretraining": "a start from supervised pre-training"}
    other = against.get(row.lower, row.lower)
    digits = decimals(row.value, row.low, row.high)
    size = f"{number(row.value, digits, sign=True)} points"
    if row.reading == TOO_FEW:
        return [f"Its difference from {other} is {size}, on {row.patients} test patients: {TOO_FEW}."]
    over = "patients" if row.seeds == 1 else "seeds and patients"
    size += f" (95 % interval over {over} {interval(row.low, row.high, digits)})"
    if row.reading != "inside the noise":
        sentences = [f"It ends {'above' if row.value > 0 else 'below'} {other}: {size}."]
    else:
        alike = f": the two are equivalent within {EQUIVALENCE:g} points (two one-sided tests)"
        alike = alike if row.equivalent else ""
        sentences = [f"Its difference from {other}, {size}, is inside the noise{alike}."]
    if row.seeds == 1:
        sentences.append("That is one training run of each: the noise between runs is unknown.")
    return sentences


def _speed(runs: pd.DataFrame) -> list[str]:
    """Return how soon the student and the random start come to a fixed Dice, and after how many images."""
    if not {"random", "fm"} <= set(runs.init) or "images_seen" not in runs:
        return []
    spent = speed(runs, TARGETS[:1]).set_index("init")
    fm, random = spent.loc["fm"], spent.loc["random"]
    if fm.capped:
        return []
    least = "at least " if random.capped else ""
    return [
        f"To a Dice of {100 * fm.target:g} % it needs {fm.rounds:.3g} rounds and {fm.images_seen:,.0f} "
        f"training images, those of its making included; the random start needs {least}{random.rounds:.1f} "
        f"rounds and {least}{random.images_seen:,.0f} images."
    ]


def verdict_counts(ledger: pd.DataFrame) -> list[str]:
    """Return the numbers of verdicts, the paper's numbers and its directions apart."""
    kinds = {"size": "numbers of the paper", "direction": "differences whose sign it gives"}
    sentences = []
    for kind, name in kinds.items():
        counts = ledger.verdict[ledger.kind == kind].value_counts()
        text = ", ".join(f"{counts[verdict]} {verdict}" for verdict in VERDICTS if verdict in counts)
        if text:
            sentences.append(f"Of {counts.sum()} {name}: {text}.")
    return sentences

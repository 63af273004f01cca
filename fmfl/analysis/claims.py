"""The ledger: each number and claim of the paper beside ours, with a verdict.

docs/verdicts.md states the rules in words; `judge_number` and `judge_difference` are the rules. The paper is
Li & Yang 2023, arXiv 2311.15463.
"""

from collections.abc import Callable, Iterable, Mapping

import numpy as np
import pandas as pd

from fmfl.analysis.statistics import (
    ALPHA,
    EQUIVALENCE,
    MIN_PATIENTS,
    TOO_FEW,
    Cell,
    TwoWay,
    compare,
    contrast,
    seed_interval,
)
from fmfl.analysis.tables import CENTRALISED, PAPER_INITS, PAPER_SPLIT, TARGETS, gap_closed, speed

VERDICTS = ("reproduced", "direction only", "not reproduced", "not testable here")
REPRODUCED, DIRECTION_ONLY, NOT_REPRODUCED, NOT_TESTABLE = VERDICTS
ONE_SEED = "one seed: the noise between training runs is unknown"

RANDOM, PRETRAINING, FM = [("federated", init, PAPER_SPLIT) for init in PAPER_INITS]
STANDALONE: Cell = ("standalone", "random", PAPER_SPLIT)
#: The paper's Table 1, Dice in %.
PAPER = {RANDOM: 74.67, PRETRAINING: 83.92, FM: 85.38, CENTRALISED: 89.41, STANDALONE: 67.20}
#: The share of the way from random to centralised that a start goes in the paper: 63 % and 73 %.
PAPER_GAP = {
    init: (PAPER[cell] - PAPER[RANDOM]) / (PAPER[CENTRALISED] - PAPER[RANDOM])
    for init, cell in (("pretraining", PRETRAINING), ("fm", FM))
}
#: Fig. 3: informed starts are up in fewer rounds, the random start in more.
PAPER_ROUNDS = 40
#: Dice: a curve is "up" once it is this close to its last round.
PLATEAU = 0.01
#: Points of Dice, and % of the gap, within which a number counts as the paper's.
MARGIN, GAP_MARGIN = 2.0, 10.0


def _extra_loss(first: str, second: str, split: str) -> dict[Cell, float]:
    """Return the points of Dice that one start loses from IID to `split` more than another."""
    return {
        ("federated", first, "iid"): 1,
        ("federated", first, split): -1,
        ("federated", second, "iid"): -1,
        ("federated", second, split): 1,
    }


#: Differences of final Dice that are above zero in the paper.
PAPER_DIFFERENCES: dict[str, dict[Cell, float]] = {
    "Claim 1, points of final Dice: fm above random": {FM: 1, RANDOM: -1},
    "Claim 1, points of final Dice: pretraining above random": {PRETRAINING: 1, RANDOM: -1},
    "Claim 2, points of final Dice: fm above pretraining": {FM: 1, PRETRAINING: -1},
    "Table 1, points of final Dice: centralised above federated": {CENTRALISED: 1, RANDOM: -1},
    "Table 1, points of final Dice: federated above standalone": {RANDOM: 1, STANDALONE: -1},
} | {
    f"Claim 3, points lost from IID to {split} skew: {a} more than {b}": _extra_loss(a, b, split)
    for split, pairs in {
        "age": [("random", "fm"), ("random", "pretraining"), ("pretraining", "fm")],
        "quantity": [("random", "fm"), ("random", "pretraining")],
    }.items()
    for a, b in pairs
}


def judge_number(paper: float, margin: float, row: Mapping[str, object]) -> tuple[str, str]:
    """Return the verdict on a number of the paper ("size"), and the reason.

    Two one-sided tests place a number within `margin` where its 90 % interval lies within.

    Args:
        paper: the paper's number.
        margin: how far from it a number still counts as the same, in its unit.
        row: low, high (95 %), inner_low, inner_high (90 %), patients, seeds and missing.
    """
    if why := _untestable(row):
        return NOT_TESTABLE, why
    if row["inner_low"] > paper - margin and row["inner_high"] < paper + margin:
        return REPRODUCED, f"within {margin:g} of the paper's number by two one-sided tests"
    if row["low"] > paper + margin or row["high"] < paper - margin:
        return NOT_REPRODUCED, f"the interval lies outside the paper's number ± {margin:g}"
    return NOT_TESTABLE, f"the interval reaches into and out of the paper's number ± {margin:g}"


def judge_difference(
    row: Mapping[str, object], paper: float | None = None, check: str = ""
) -> tuple[str, str]:
    """Return the verdict on a difference that the paper has above zero ("direction"), and the reason.

    Inside the noise is no denial: a difference is "not reproduced" there only where it is equivalent to zero,
    or where an interval no wider than the paper's size excludes that size.

    Args:
        row: value, low, high, patients, seeds, inside_noise, equivalent and missing as in `compare`.
        paper: the paper's difference in points, None where it gives no number.
        check: why the manipulation had no effect here, "" where it had or where there is none.
    """
    value, low, high = row["value"], row["low"], row["high"]
    if why := _untestable(row, check):
        return NOT_TESTABLE, why
    if not row["inside_noise"]:
        if value < 0:
            return NOT_REPRODUCED, "below zero outside the noise"
        if paper is not None and value < paper / 2:
            return DIRECTION_ONLY, f"outside the noise, but {value / paper:.0%} of the paper's size"
        return REPRODUCED, "outside the noise"
    if row["equivalent"]:
        return NOT_REPRODUCED, f"equivalent within {EQUIVALENCE:g} points by two one-sided tests"
    if low > 0 or high < 0:
        why = "the interval excludes zero, but the correction for several tests takes it back"
        return NOT_TESTABLE, why
    if paper is not None and high - low <= paper and high < paper:
        return NOT_REPRODUCED, "inside the noise, and the interval excludes the paper's size"
    effect = EQUIVALENCE if paper is None else paper
    return NOT_TESTABLE, f"inside the noise, and too wide to exclude an effect of {effect:g} points"


def _untestable(row: Mapping[str, object], check: str = "") -> str:
    """Return the reason why nothing can be said about a claim here, "" if there is none."""
    if row["missing"]:
        return str(row["missing"])
    if row["patients"] < MIN_PATIENTS:
        return TOO_FEW
    return check or (ONE_SEED if row["seeds"] == 1 else "")


def ledger(results: pd.DataFrame, per_image: pd.DataFrame) -> pd.DataFrame:
    """Return each number and claim of the paper beside ours: `judge_number` and `judge_difference` judge.

    Numbers ("size") and signs of differences ("direction") are rows of their own, and none says what another
    says. Holm's correction takes all differences of final Dice in this ledger as one family. Statements about
    rounds and about the state before any round have no scores by image: their interval is over seeds alone.

    Returns:
        claim, kind, paper (text: a number, or a bound such as "< 40"), ours, low, high (95 %), n (test
        images), patients, seeds, verdict, why, run (names of the runs behind it as in `weights/`, without
        their seeds).
    """
    rows = [_table1_claim(per_image, cell, paper) for cell, paper in PAPER.items()]
    rows += [_gap_claim(per_image, init) for init in PAPER_GAP]
    compared = compare(per_image, PAPER_DIFFERENCES)
    for name, cells in PAPER_DIFFERENCES.items():
        known = cells.keys() <= PAPER.keys()
        paper = sum(weight * PAPER[cell] for cell, weight in cells.items()) if known else None
        ours = compared.loc[name].to_dict()
        verdict = judge_difference(ours, paper, _no_loss_by_skew(per_image, cells))
        rows.append(_row(name, "direction", f"{paper:+.2f}" if known else "> 0", ours, verdict, cells))
    return pd.DataFrame(rows + _claims_about_rounds(results, per_image))


def _row(
    claim: str,
    kind: str,
    paper: str,
    ours: Mapping[str, object],
    verdict: tuple[str, str],
    cells: Iterable[Cell],
) -> dict[str, object]:
    row = {"claim": claim, "kind": kind, "paper": paper, "ours": ours["value"]}
    row |= {"low": ours["low"], "high": ours["high"], "n": ours["images"]}
    row |= {"patients": ours["patients"], "seeds": ours["seeds"], "verdict": verdict[0], "why": verdict[1]}
    runs = ", ".join(f"{arm}-{split}-{init}" for arm, init, split in cells)
    return row | {"run": runs if ours["seeds"] else ""}


# Numbers


def _table1_claim(per_image: pd.DataFrame, cell: Cell, paper: float) -> dict[str, object]:
    ours = contrast(per_image, {cell: 1})
    inner = TwoWay(*(ours[name] for name in ("value", "error", "df"))).interval(1 - 2 * ALPHA)
    ours |= dict(zip(("inner_low", "inner_high"), inner, strict=True))
    name = f"Table 1, Dice in %: {cell[0]}, {cell[1]} start"
    return _row(name, "size", f"{paper:.2f}", ours, judge_number(paper, MARGIN, ours), [cell])


def _gap_claim(per_image: pd.DataFrame, init: str) -> dict[str, object]:
    paper = 100 * PAPER_GAP[init]
    ours = gap_closed(per_image, init, PAPER_SPLIT)
    inner = gap_closed(per_image, init, PAPER_SPLIT, level=1 - 2 * ALPHA)
    row = ours | {"missing": ours["why"], "value": 100 * ours["gap_closed"]}
    row |= {end: 100 * ours[end] for end in ("low", "high")}
    row |= {f"inner_{end}": 100 * inner[end] for end in ("low", "high")}
    name = f"Gap closed, % of the way from random to centralised: {init}"
    cells = [("federated", init, PAPER_SPLIT), RANDOM, CENTRALISED]
    return _row(name, "size", f"{paper:.0f}", row, judge_number(paper, GAP_MARGIN, row), cells)


def _no_loss_by_skew(per_image: pd.DataFrame, cells: Mapping[Cell, float]) -> str:
    """Return the reason why a claim about skew cannot be tested: the random start loses nothing by it."""
    (split,) = {split for _, _, split in cells} - {"iid"} if len(cells) == 4 else [""]
    if not split:
        return ""
    lost = contrast(per_image, {("federated", "random", "iid"): 1, ("federated", "random", split): -1})
    if lost["missing"] or lost["low"] > 0:
        return ""
    size = f"{lost['value']:.2f} points, {lost['low']:.2f} to {lost['high']:.2f}"
    return f"the random start itself does not lose by this skew outside the noise ({size})"


# Rounds


def _claims_about_rounds(results: pd.DataFrame, per_image: pd.DataFrame) -> list[dict[str, object]]:
    runs = results[(results.arm == "federated") & (results.split == PAPER_SPLIT)]
    scored = per_image[(per_image.arm == "federated") & (per_image.split == PAPER_SPLIT)]
    tested = {"images": scored.image_id.nunique(), "patients": scored.patient_id.nunique()}
    rows = [_fewer_rounds(runs, tested, init) for init in ("fm", "pretraining")]
    rows += claims_of_fig3(runs, tested)
    fm, pretraining = (_by_seed(runs, init, lambda c: c.get(0, np.nan)) for init in ("fm", "pretraining"))
    lead = 100 * (fm - pretraining)
    ours = _over_seeds(lead, "round 0 of fm and pretraining was not scored", tested, 100)
    claim = "Claim 2, points of Dice before any round: fm above pretraining"
    return [*rows, _row(claim, "direction", "> 0", ours, judge_difference(ours), [FM, PRETRAINING])]


def _by_seed(runs: pd.DataFrame, init: str, rule: Callable[[pd.Series], float]) -> pd.Series:
    """Return a number a seed, by a rule from the curve (Dice by round) of each of a start's runs."""
    by_seed = runs[runs.init == init].sort_values("round").groupby("seed")
    return pd.Series({seed: rule(run.set_index("round").dice) for seed, run in by_seed}, dtype=float)


def _first_round(curve: pd.Series, level: float) -> float:
    """Return the first round at `level` or above; the run's length where there is none."""
    reached = curve.index[curve >= level]
    return reached[0] if len(reached) else curve.index[-1]


def _over_seeds(
    values: pd.Series, missing: str, tested: Mapping[str, int], reach: float
) -> dict[str, object]:
    """Return the row that `judge_difference` reads, of a number a seed, with an interval within ±`reach`."""
    values = values.dropna()
    few = tested["patients"] < MIN_PATIENTS
    low, high = (np.nan, np.nan) if few else np.clip(seed_interval(values), -reach, reach)
    error = values.std(ddof=1) / np.sqrt(len(values)) if len(values) > 1 else np.nan
    mean = TwoWay(values.mean(), error, len(values) - 1)
    return {
        "value": mean.value,
        "low": low,
        "high": high,
        "seeds": len(values),
        "inside_noise": not (low > 0 or high < 0),
        "equivalent": len(values) > 1 and mean.p_equivalent(EQUIVALENCE) < ALPHA,
        "missing": "" if len(values) else missing,
        **tested,
    }


def _length(runs: pd.DataFrame) -> int:
    return int(runs["round"].max()) if len(runs) else 0


def _fewer_rounds(runs: pd.DataFrame, tested: Mapping[str, int], init: str) -> dict[str, object]:
    """Return the claim that a start needs fewer rounds to a fixed Dice than the random one."""
    target = TARGETS[0]
    spent = [_by_seed(runs, name, lambda curve: _first_round(curve, target)) for name in ("random", init)]
    missing = f"federated random and {init} under {PAPER_SPLIT} were not both run"
    ours = _over_seeds(spent[0] - spent[1], missing, tested, _length(runs))
    if not ours["missing"] and not runs.dice[runs.init.isin(["random", init])].max() >= target:
        ours["missing"] = f"no run comes to {100 * target:g} %"
        ours |= dict.fromkeys(("value", "low", "high"), np.nan)
    ours["equivalent"] = False  # the margin is one of Dice
    verdict = judge_difference(ours)
    if verdict[1].startswith("inside"):
        verdict = NOT_TESTABLE, "the seeds do not agree on who is sooner"
    if verdict[0] == REPRODUCED:
        images = speed(runs, [target]).set_index("init").images_seen
        images = f"{images[init]:,.0f} images for {init} and {images['random']:,.0f} for random"
        verdict = REPRODUCED, f"outside the noise of seeds; its making included, {images}"
    claim = f"Claim 1, rounds to a Dice of {100 * target:g} %: {init} fewer than random"
    cells = [RANDOM, ("federated", init, PAPER_SPLIT)]
    return _row(claim, "direction", "> 0", ours, verdict, cells)


def claims_of_fig3(runs: pd.DataFrame, tested: Mapping[str, int]) -> list[dict[str, object]]:
    """Return the claims on how many rounds each start takes until it is near its last Dice.

    Args:
        runs: federated runs under the paper's split: init, seed, round and dice, in 0..1.
        tested: number of test `images` and `patients`.
    """
    return [_plateau(runs, tested, init) for init in PAPER_INITS]


def _plateau(runs: pd.DataFrame, tested: Mapping[str, int], init: str) -> dict[str, object]:
    """Return the claim that a start is near its last Dice before PAPER_ROUNDS, the random one after."""
    sign, bound = (1, ">") if init == "random" else (-1, "<")
    rounds = _by_seed(runs, init, lambda curve: _first_round(curve, curve.iloc[-1] - PLATEAU))
    missing = f"federated {init} under {PAPER_SPLIT} was not run"
    ours = _over_seeds(rounds, missing, tested, _length(runs))
    ours["low"] = max(0.0, ours["low"]) if pd.notna(ours["low"]) else np.nan
    beyond = _over_seeds(sign * (rounds - PAPER_ROUNDS), missing, tested, np.inf) | {"equivalent": False}
    verdict = judge_difference(beyond)
    if not ours["missing"] and _length(runs) <= PAPER_ROUNDS:
        why = f"the run has {_length(runs)} rounds: whether more would help is not seen"
        verdict = NOT_TESTABLE, why
    elif verdict[1].startswith("inside"):
        verdict = NOT_TESTABLE, f"the seeds lie on both sides of {PAPER_ROUNDS} rounds"
    elif verdict[0] == NOT_REPRODUCED:
        verdict = NOT_REPRODUCED, f"on the other side of {PAPER_ROUNDS} rounds, outside the noise of seeds"
    claim = f"Fig. 3, rounds until {init} is within {100 * PLATEAU:g} point of its last Dice"
    cell = ("federated", init, PAPER_SPLIT)
    return _row(claim, "direction", f"{bound} {PAPER_ROUNDS}", ours, verdict, [cell])

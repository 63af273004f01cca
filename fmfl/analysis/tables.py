"""What the results say, and how sure that is: Table 1, paired differences, cost, the claims.

Every function takes the tables of a run and gives a new one.

- `results`: one row a scored round with arm, init, split, seed, round (0 is before any training), dice (mean
  over the test images, 0..1), and the running totals seconds, bytes_up, bytes_down, images_seen, which start
  at the cost of making the initial state.
- `per_image`: one row a test image after the last round with arm, init, split, seed, client, image_id,
  patient_id, dice (0..1).

Numbers that come out are Dice in % and differences in points, as in the paper. Intervals are 95 % over seeds
and test patients together, and tests are corrected for being several: see `analysis.statistics`. With fewer
than MIN_PATIENTS test patients there is no interval and no test. docs/verdicts.md states the rules in words.

All seeds of a study share one draw of proxy, test and client images (`holdout_seed`). What another draw would
give is in no interval.

Every function that draws at random takes `resamples` (draws) and `seed` (of the draws) and gives the same
numbers for the same seed.

Reference: the paper is Li & Yang 2023, arXiv 2311.15463.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import pandas as pd
import scipy

from fmfl.analysis.statistics import (
    ALPHA,
    EQUIVALENCE,
    MIN_PATIENTS,
    TOO_FEW,
    Cell,
    TwoWay,
    compare,
    contrast,
    paired_scores,
    seed_interval,
    two_way,
)
from fmfl.errors import UserError
from fmfl.split import age_bands

RUN = ["arm", "init", "split", "seed"]
INITS = ("random", "pretraining", "fm")
ARMS = ("federated", "centralised", "standalone")
PAIRS = (("fm", "random"), ("fm", "pretraining"), ("pretraining", "random"))
PAPER_SPLIT = "age"
RANDOM, PRETRAINING, FM = [("federated", init, PAPER_SPLIT) for init in INITS]
CENTRALISED, STANDALONE = ("centralised", "random", "pooled"), ("standalone", "random", PAPER_SPLIT)
PAPER = {  # Table 1, Dice in %
    RANDOM: 74.67,
    PRETRAINING: 83.92,
    FM: 85.38,
    CENTRALISED: 89.41,
    STANDALONE: 67.20,
}
PAPER_GAP = {  # the share of the way from random to centralised that a start goes: 63 % and 73 %
    init: (PAPER[cell] - PAPER[RANDOM]) / (PAPER[CENTRALISED] - PAPER[RANDOM])
    for init, cell in (("pretraining", PRETRAINING), ("fm", FM))
}
PAPER_ROUNDS = 40  # Fig. 3: informed starts are up in fewer rounds, the random start in more
MARGIN = 2.0  # points of Dice within which a number counts as the paper's
GAP_MARGIN = 10.0  # the same for a share of the gap, in % of it
PLATEAU = 0.01  # Dice: a curve is "up" once it is this close to its last round
TARGETS = (0.90, 0.92, 0.94)  # Dice: named beforehand, and no run's own
FAILURE = 0.8  # Dice below which a mask counts as failed
GROUP_PATIENTS, GROUP_IMAGES = 10, 10  # test patients and images below which no group is named as worst
VERDICTS = ("reproduced", "direction only", "not reproduced", "not testable here")


def _extra_loss(first: str, second: str, split: str) -> dict[Cell, float]:
    """Give how much more Dice the first start loses from IID to `split` than the second."""
    return {
        ("federated", first, "iid"): 1,
        ("federated", first, split): -1,
        ("federated", second, "iid"): -1,
        ("federated", second, split): 1,
    }


PAPER_DIFFERENCES: dict[str, dict[Cell, float]] = {  # each above zero in the paper
    "Claim 1, points of final Dice: fm above random": {FM: 1, RANDOM: -1},
    "Claim 1, points of final Dice: pretraining above random": {PRETRAINING: 1, RANDOM: -1},
    "Claim 2, points of final Dice: fm above pretraining": {FM: 1, PRETRAINING: -1},
    "Table 1, points of final Dice: centralised above federated": {CENTRALISED: 1, RANDOM: -1},
    "Table 1, points of final Dice: federated above standalone": {RANDOM: 1, STANDALONE: -1},
} | {
    f"Claim 3, points lost from IID to {split} skew: {first} more than {second}": _extra_loss(
        first, second, split
    )
    for split, pairs in {
        "age": [("random", "fm"), ("random", "pretraining"), ("pretraining", "fm")],
        "quantity": [("random", "fm"), ("random", "pretraining")],
    }.items()
    for first, second in pairs
}


# Tables of runs

NAMED = ("image_id", "patient_id", "site")
"""Columns of names, which stay as they were written: "01", "1" and "NA" are three images."""


def read_table(file: Path, text: Iterable[str] = ()) -> pd.DataFrame:
    """Read a table that a run has left: `NAMED` as they are, and other columns as text, NaN if empty.

    Raises:
        UserError: it is no CSV.
    """
    try:
        others = pd.read_csv(file, nrows=0).columns.difference(NAMED)
        return pd.read_csv(
            file,
            dtype=dict.fromkeys((*NAMED, *text), str),
            keep_default_na=False,
            na_values={name: [""] for name in others},
        )
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
        raise UserError(
            f"{file} cannot be read as CSV ({error}): run the study again to rewrite it."
        ) from error


def final(results: pd.DataFrame) -> pd.DataFrame:
    """The last scored round of each run (arm, init, split, seed); no round is picked by its test score."""
    last = results.sort_values("round", kind="stable").groupby(RUN, sort=False).tail(1)
    return last.sort_values(RUN, kind="stable").reset_index(drop=True)


def reference_split(results: pd.DataFrame) -> str:
    """The split the tables speak of: age, as in the paper, or else the first that was run ("" if none)."""
    splits = list(dict.fromkeys(results.loc[results.arm != "centralised", "split"]))
    return PAPER_SPLIT if PAPER_SPLIT in splits else next(iter(splits), "")


def ordered_inits(results: pd.DataFrame) -> list[str]:
    """The starts that were run: the paper's three in its order, then the others as they come."""
    seen = list(dict.fromkeys(results.init))
    return [init for init in INITS if init in seen] + [init for init in seen if init not in INITS]


def rounds_to_target(results: pd.DataFrame, target: float) -> pd.DataFrame:
    """First scored round with Dice >= `target` (0..1), by run; NaN where no round gets there.

    Returns:
        One row a run: arm, init, split, seed, rounds.
    """
    reached = results[results.dice >= target].groupby(RUN)["round"].min()
    return reached.reindex(_runs(results)).rename("rounds").reset_index()


def cost(results: pd.DataFrame, target: float) -> pd.DataFrame:
    """Give what each run had spent when its Dice first was >= `target` (0..1).

    Pre-training and distillation are paid at round 0 by the start that uses them, so a start that is
    there before any round is not free. NaN where a run never gets there.

    Returns:
        One row a run: arm, init, split, seed, rounds, seconds, bytes (both ways), images_seen.
    """
    reached = results[results.dice >= target].sort_values("round", kind="stable")
    first = reached.groupby(RUN).first()
    spent = pd.DataFrame(
        {
            "rounds": first["round"],
            "seconds": first.seconds,
            "bytes": first.bytes_up + first.bytes_down,
            "images_seen": first.images_seen,
        }
    )
    return spent.reindex(_runs(results)).reset_index()


def iid_to_skew_loss(results: pd.DataFrame) -> pd.DataFrame:
    """Points of final Dice that a start loses from the IID split to each other one, paired by seed.

    Returns:
        One row an (init, split) of the federated arm: loss (mean over seeds, positive is worse than IID),
        low, high (95 % t interval over seeds, NaN for one), seeds. Empty where IID or all others are missing.
    """
    dice = 100 * final(results).query("arm == 'federated'").set_index(["init", "split", "seed"]).dice
    rows = []
    for init in ordered_inits(results):
        by_split = (
            dice.loc[[init]].droplevel("init").unstack("split") if init in dice.index else pd.DataFrame()
        )
        for split in by_split.columns.drop("iid") if "iid" in by_split else ():
            loss = (by_split["iid"] - by_split[split]).dropna()
            if len(loss):
                low, high = seed_interval(loss)
                rows.append((init, split, loss.mean(), low, high, len(loss)))
    return pd.DataFrame(rows, columns=["init", "split", "loss", "low", "high", "seeds"])


def speed(results: pd.DataFrame, targets: Iterable[float] = TARGETS) -> pd.DataFrame:
    """Count what each start has spent when it comes to a Dice that was fixed beforehand, over seeds.

    A run that never comes to the target counts with all its rounds and all that they cost, so its numbers are
    the least that it would take. What making the start has cost is part of it.

    Args:
        results: the run's scored rounds.
        targets: Dice, 0..1.

    Returns:
        One row an (arm, init, split, target): seeds; reached, how many of them get there; capped, true where
        not all do; rounds, seconds, images_seen and bytes until then (means over seeds), with rounds_low and
        rounds_high (95 % t interval over seeds, within the run; NaN for one); curve, the mean Dice in % over
        all rounds by trapezoids, with curve_low and curve_high (likewise, within 0..100).
    """
    rows = []
    curves = results.sort_values("round").groupby(RUN)[["round", "dice"]].apply(_mean_height)
    last = final(results).set_index(RUN)
    whole = pd.DataFrame({name: last[name] for name in ("seconds", "images_seen")})
    whole["rounds"], whole["bytes"] = last["round"], last.bytes_up + last.bytes_down
    for target in targets:
        for key, runs in cost(results, target).set_index(RUN).groupby(RUN[:3], sort=False):
            reached = runs.rounds.notna()
            spent = runs.fillna(whole.loc[runs.index])
            low, high = np.clip(seed_interval(spent.rounds), 0, whole.rounds[runs.index].max())
            heights = curves.loc[key]
            curve_low, curve_high = np.clip(seed_interval(heights), 0, 100)
            rows.append(
                dict(zip(RUN[:3], key, strict=True))
                | {"target": target, "seeds": len(runs), "reached": int(reached.sum())}
                | {"rounds": spent.rounds.mean(), "rounds_low": low, "rounds_high": high}
                | {"capped": not reached.all()}
                | spent[["seconds", "images_seen", "bytes"]].mean().to_dict()
                | {"curve": heights.mean(), "curve_low": curve_low, "curve_high": curve_high}
            )
    return pd.DataFrame(rows)


def _mean_height(curve: pd.DataFrame) -> float:
    """Area under Dice by round over the rounds' range, in %; the last Dice where there is one round."""
    length = curve["round"].max() - curve["round"].min()
    if length == 0:
        return 100 * curve.dice.iloc[-1]
    return 100 * np.trapezoid(curve.dice, curve["round"]) / length


def weakest(per_image: pd.DataFrame, mixtures: pd.DataFrame | None = None) -> pd.DataFrame:
    """Find who fares worst: the client, the age band and the tenth of the images with the lowest final Dice.

    The test images are nobody's, so a client's Dice is what its own mixture would give: the test images'
    means by site and age band, weighted by the client's images of each. A band, or a site's part of one,
    counts from GROUP_PATIENTS test patients and GROUP_IMAGES test images on.

    Args:
        per_image: with site, age (years, NaN where unknown) and, where measured, hd95 and assd.
        mixtures: one row a (split, seed, client, site, band) with images, from `split.composition`.

    Returns:
        One row an (arm, init, split): dice and worst_tenth in %, failures (% of images below FAILURE), hd95
        and assd in pixels, worst_band (its name; "" unless two bands are large enough), worst_band_dice,
        worst_band_images and worst_band_patients, worst_client_dice (mean over seeds; NaN without mixtures,
        with fewer than two test groups that are large enough, or where these stand for less than half of a
        client's images).
    """
    rows = []
    scores = per_image.assign(band=age_bands(per_image.age))
    for (arm, init, split), runs in scores.groupby(RUN[:3], sort=False):
        by_image = 100 * runs.groupby("image_id").dice.mean().sort_values()
        row = {"arm": arm, "init": init, "split": split, "dice": by_image.mean()}
        row["worst_tenth"] = by_image.iloc[: max(1, round(len(by_image) / 10))].mean()
        row["failures"] = 100 * (runs.dice < FAILURE).mean()
        row |= {name: runs[name].mean() for name in ("hd95", "assd") if name in runs}
        bands = _groups(runs[runs.band != ""], ["band"])
        if len(bands) < 2:  # the worst of one is no finding
            bands = bands.head(0)
        worst = bands.dice.idxmin() if len(bands) else ""
        row["worst_band"] = worst
        for name in ("dice", "images", "patients"):
            row[f"worst_band_{name}"] = bands[name][worst] if worst else np.nan
        row["worst_client_dice"] = _worst_client(runs, mixtures, split)
        rows.append(row)
    return pd.DataFrame(rows)


def _groups(runs: pd.DataFrame, by: list[str]) -> pd.DataFrame:
    """Mean Dice in %, images and patients of each group of test images that is large enough."""
    grouped = runs.groupby(by)
    found = pd.DataFrame(
        {
            "dice": 100 * grouped.dice.mean(),
            "images": grouped.image_id.nunique(),
            "patients": grouped.patient_id.nunique(),
        }
    )
    return found[(found.patients >= GROUP_PATIENTS) & (found.images >= GROUP_IMAGES)]


def _worst_client(runs: pd.DataFrame, mixtures: pd.DataFrame | None, split: str) -> float:
    if mixtures is None or split not in set(mixtures.split):
        return np.nan
    found = []
    for seed, scores in runs.groupby("seed"):
        strata = _groups(scores, ["site", "band"]).dice.reset_index()
        if len(strata) < 2:  # nothing to tell one client's mixture from another's by
            return np.nan
        held = mixtures[(mixtures.split == split) & (mixtures.seed == seed)]
        known = held.merge(strata, on=["site", "band"])
        share = known.groupby("client").images.sum() / held.groupby("client").images.sum()
        if not (share >= 0.5).all():
            return np.nan
        by_client = known.groupby("client")[["dice", "images"]]
        found.append(by_client.apply(lambda own: np.average(own.dice, weights=own.images)).min())
    return float(np.mean(found)) if found else np.nan


def _runs(results: pd.DataFrame) -> pd.MultiIndex:
    return pd.MultiIndex.from_frame(results[RUN].drop_duplicates().sort_values(RUN))


# The paper's tables


def table1(
    results: pd.DataFrame,
    per_image: pd.DataFrame,
    split: str | None = None,
    *,
    resamples: int = 2000,
    seed: int = 0,
) -> pd.DataFrame:
    """The paper's Table 1: final Dice by start (rows) and arm (columns), in %.

    The federated and standalone columns are under `split`, by default `reference_split`.

    Returns:
        One row a start: init, split, and for each arm {arm} (mean Dice), {arm}_low, {arm}_high (95 %, seeds
        and patients together), {arm}_images, {arm}_patients, {arm}_seeds. NaN and 0 where a cell was not run.
        A cell without scores by image keeps its mean and has no interval.
    """
    split = reference_split(results) if split is None else split
    last = final(results)
    rows = []
    for init in [*INITS, *(i for i in ordered_inits(results) if i not in INITS)]:
        row: dict[str, object] = {"init": init, "split": split}
        for arm in ARMS:
            where = "pooled" if arm == "centralised" else split
            cell = contrast(per_image, {(arm, init, where): 1}, resamples=resamples, seed=seed)
            if cell["missing"]:
                runs = last[(last.arm == arm) & (last.init == init) & (last.split == where)]
                cell |= {"value": 100 * runs.dice.mean(), "seeds": len(runs)}
            row |= {arm: cell["value"]} | {
                f"{arm}_{key}": cell[key] for key in ("low", "high", "images", "patients", "seeds")
            }
        rows.append(row)
    return pd.DataFrame(rows)


def gap_closed(table: pd.DataFrame) -> pd.DataFrame:
    """Share of the way from the random start to centralised training that each start goes, from `table1`.

    The paper's Table 1 gives (85.38 - 74.67) / (89.41 - 74.67) = 73 % for fm and 63 % for pretraining.

    Returns:
        One row a start but random: init, gap_closed (1 is all of it; NaN where there is no gap), why.
    """
    by_init = table.set_index("init")
    random = by_init.federated.get("random", np.nan)
    centralised = by_init.centralised.get("random", np.nan)
    if np.isnan(centralised):  # pooled training was run from another start only
        centralised = by_init.centralised.max()
    rows = []
    for init, value in by_init.federated.drop("random", errors="ignore").items():
        if np.isnan([random, centralised, value]).any():
            rows.append((init, np.nan, "an arm is missing"))
        elif centralised <= random:
            rows.append((init, np.nan, "centralised training is no better than the random start"))
        else:
            rows.append((init, (value - random) / (centralised - random), ""))
    return pd.DataFrame(rows, columns=["init", "gap_closed", "why"])


def gap(per_image: pd.DataFrame, inits: Iterable[str], split: str) -> pd.DataFrame:
    """Give `gap_interval` of each start.

    Returns:
        One row a start: init, split, gap_closed, low, high, images, patients, seeds, why.
    """
    rows = [{"init": init, "split": split} | gap_interval(per_image, init, split) for init in inits]
    names = ["init", "split", "gap_closed", "low", "high", "images", "patients", "seeds", "why"]
    return pd.DataFrame(rows, columns=names)


def gap_interval(per_image: pd.DataFrame, init: str, split: str, *, level: float = 0.95) -> dict[str, object]:
    """Give `gap_closed` of one start from the scores by image, with Fieller's interval of a ratio.

    A share belongs to the interval where own - random - share * (centralised - random) is not told from zero
    by the two-way error (Fieller 1954, Journal of the Royal Statistical Society B 16(2)).

    Returns:
        gap_closed, low, high (1 is all of it), images, patients, seeds, and why there is no share: an arm was
        not run, there are too few test patients, or centralised training is not above the random start
        outside the noise, so that the share would be a number over nothing.
    """
    random = ("federated", "random", split)
    found: dict[str, object] = {"gap_closed": np.nan, "low": np.nan, "high": np.nan}
    found |= {"images": 0, "patients": 0, "seeds": 0}
    whole, missing = paired_scores(per_image, {CENTRALISED: 1, random: -1})
    own, also_missing = paired_scores(per_image, {("federated", init, split): 1, random: -1})
    if missing or also_missing:
        return found | {"why": missing or also_missing}
    whole, own = whole.align(own, join="inner")
    patients = per_image.drop_duplicates("image_id").set_index("image_id").patient_id.reindex(whole.index)
    found |= {"images": len(whole), "patients": patients.nunique(), "seeds": whole.shape[1]}
    if patients.nunique() < MIN_PATIENTS:
        return found | {"why": TOO_FEW}
    if not two_way(whole.to_numpy(), patients).interval(level)[0] > 0:
        return found | {"why": "centralised training is not above the random start outside the noise"}
    share = float(own.to_numpy().mean() / whole.to_numpy().mean())

    def beyond(candidate: float) -> float:
        """Below zero where the candidate belongs to the interval."""
        low, high = two_way((own - candidate * whole).to_numpy(), patients).interval(level)
        return max(low, -high)

    ends = []
    for step in (-0.01, 0.01):
        while beyond(share + step) < 0 and abs(step) < 1e6:
            step *= 2
        ends.append(scipy.optimize.brentq(beyond, share, share + step) if beyond(share) < 0 else share)
    return found | {"gap_closed": share, "low": min(ends), "high": max(ends), "why": ""}


#: What the map asks of each of its points: the first start's final Dice less the second's.
MAP_PAIRS = (("fm", "random"), ("fm", "pretraining"))


def gains(
    per_image: pd.DataFrame, variants: pd.DataFrame, *, resamples: int = 2000, seed: int = 0
) -> pd.DataFrame:
    """The map: what the teacher's student gains over the other starts where one setting is changed.

    Args:
        per_image: scores by image of the whole study, of which the federated arm under the variants' split
            stands for each axis's own value, and for a start that the axis cannot change.
        variants: the same of all variants, with columns axis, value and own (the study's own value).
        resamples, seed: see `analysis.statistics`.

    Returns:
        One row an (axis, value, pair): axis, value, higher, lower and `compare`'s columns; the study's own
        value among the others on every axis, and no pair with a start that was run nowhere. All of them are
        one family for Holm's correction, to which the study's own setting belongs once.
    """
    family, scores = {}, [per_image.assign(axis="", value="")]
    known = {init for table in (per_image, variants) for init in table.init[table.arm == "federated"]}
    pairs = [pair for pair in MAP_PAIRS if known.issuperset(pair)]
    for axis, of_axis in variants.groupby("axis", sort=False):
        own = of_axis.own.iloc[0]
        points = {own: None} | dict.fromkeys(of_axis.value)
        for value in sorted(points, key=_axis_order):
            rows = of_axis[of_axis.value == value]
            split = of_axis.split.iloc[0]
            if len(rows):
                # A point is a split of its own, so that cells are told apart.
                scores.append(rows.assign(split=f"{axis}={value}"))
            for first, second in pairs:
                run = set(rows.init)
                cells = {
                    ("federated", init, f"{axis}={value}" if init in run else split): sign
                    for init, sign in ((first, 1), (second, -1))
                }
                family[axis, value, first, second] = cells
    if not family:
        return pd.DataFrame(columns=["axis", "value", "higher", "lower", *_MAPPED])
    compared = compare(pd.concat(scores, ignore_index=True), family, resamples=resamples, seed=seed)
    names = pd.DataFrame(list(family), columns=["axis", "value", "higher", "lower"])
    compared = compared.rename(columns={"value": "gain"}).reset_index(drop=True)
    return pd.concat([names, compared[_MAPPED]], axis=1)


def variant_scores(
    per_image: pd.DataFrame, variants: pd.DataFrame, *, resamples: int = 2000, seed: int = 0
) -> pd.DataFrame:
    """Final Dice of each start where one setting is changed, as `gains` takes them.

    Returns:
        One row an (axis, value, init): these, dice in % and SCORED, of `contrast`'s columns.
    """
    rows = []
    for axis, of_axis in variants.groupby("axis", sort=False):
        own, split = of_axis.own.iloc[0], of_axis.split.iloc[0]
        for value in sorted({own, *of_axis.value}, key=_axis_order):
            source = per_image if value == own else of_axis[of_axis.value == value]
            for init in ordered_inits(source[source.arm == "federated"]):
                cell = contrast(source, {("federated", init, split): 1}, resamples=resamples, seed=seed)
                if not cell["missing"]:
                    keep = {"dice": cell["value"]} | {name: cell[name] for name in SCORED}
                    rows.append({"axis": axis, "value": value, "init": init} | keep)
    return pd.DataFrame(rows, columns=["axis", "value", "init", "dice", *SCORED])


SCORED = [
    "low",
    "high",
    "patient_low",
    "patient_high",
    "seed_low",
    "seed_high",
    "images",
    "patients",
    "seeds",
]


def _axis_order(value: object) -> tuple:
    """Numbers by size, before words by name."""
    try:
        return (0, float(str(value)), "")
    except ValueError:
        return (1, 0.0, str(value))


def paired_differences(
    per_image: pd.DataFrame,
    splits: Iterable[str] | None = None,
    pairs: Iterable[tuple[str, str]] = PAIRS,
    *,
    resamples: int = 2000,
    seed: int = 0,
) -> pd.DataFrame:
    """Final federated Dice of one start less another's, on the same images and seeds, by split.

    The family for Holm's correction is the whole table. Pairs that were not both run are left out.

    Returns:
        One row a (split, pair): split, higher, lower (the pair's names, the first less the second), and
        `compare`'s columns.
    """
    federated = per_image[per_image.arm == "federated"]
    splits = list(dict.fromkeys(federated.split)) if splits is None else list(splits)
    have = set(federated[["init", "split"]].itertuples(index=False, name=None))
    family = {
        (split, first, second): {("federated", first, split): 1, ("federated", second, split): -1}
        for split in splits
        for first, second in pairs
        if {(first, split), (second, split)} <= have
    }
    names = pd.DataFrame(list(family), columns=["split", "higher", "lower"])
    if names.empty:
        return names.reindex(columns=[*names, *COMPARED])
    compared = compare(per_image, family, resamples=resamples, seed=seed).reset_index(drop=True)
    return pd.concat([names, compared[COMPARED]], axis=1)


COMPARED = [
    *("value", "low", "high", "p", "p_holm", "p_permutation", "p_permutation_holm"),
    *("p_two_way", "p_two_way_holm", "p_equivalence", "p_equivalence_holm", "effect", "error", "df"),
    *("patient_low", "patient_high", "seed_low", "seed_high"),
    *("images", "patients", "seeds", "inside_noise", "equivalent", "reading"),
]


_MAPPED = [name if name != "value" else "gain" for name in COMPARED]


# The ledger

ONE_SEED = "one seed: the noise between training runs is unknown"


def judge_number(paper: float, margin: float, row: Mapping[str, object]) -> tuple[str, str]:
    """Give the verdict on a number of the paper ("size"), and why.

    - not testable here: not run, fewer than MIN_PATIENTS test patients, one seed, or an interval that reaches
      both into and out of the paper's number plus and minus `margin`;
    - reproduced: within `margin` of the paper's number by two one-sided tests, so by the 90 % interval;
    - not reproduced: the 95 % interval lies outside the paper's number plus and minus `margin`.

    Args:
        paper: the paper's number.
        margin: how far from it a number still counts as the same, in its unit.
        row: low, high (95 %), inner_low, inner_high (90 %), patients, seeds and missing.
    """
    if row["missing"]:
        return "not testable here", str(row["missing"])
    if row["patients"] < MIN_PATIENTS:
        return "not testable here", TOO_FEW
    if row["seeds"] == 1:
        return "not testable here", ONE_SEED
    if row["inner_low"] > paper - margin and row["inner_high"] < paper + margin:
        return "reproduced", f"within {margin:g} of the paper's number by two one-sided tests"
    if row["low"] > paper + margin or row["high"] < paper - margin:
        return "not reproduced", f"the interval lies outside the paper's number ± {margin:g}"
    return "not testable here", f"the interval reaches into and out of the paper's number ± {margin:g}"


def judge_difference(
    row: Mapping[str, object], paper: float | None = None, check: str = ""
) -> tuple[str, str]:
    """Give the verdict on a difference that the paper has above zero ("direction"), and why.

    - not testable here: an arm is missing; fewer than MIN_PATIENTS test patients; one seed; the check of the
      manipulation fails; or the difference is inside the noise, and either its interval is wider than the
      effect asked about (the paper's size; EQUIVALENCE where the paper gives none), or it excludes zero and
      only Holm's correction takes that back;
    - reproduced: above zero outside the noise, and at least half the paper's size where it gives one;
    - direction only: above zero outside the noise, but less than half the paper's size;
    - not reproduced: below zero outside the noise; equivalent to zero within EQUIVALENCE points by two
      one-sided tests; or inside the noise with an interval that holds zero and excludes the paper's size.

    Args:
        row: value, low, high, patients, seeds, inside_noise, equivalent and missing as in `compare`.
        paper: the paper's difference in points, None where it gives no number.
        check: why the manipulation had no effect here, "" where it had or where there is none.
    """
    value, low, high = row["value"], row["low"], row["high"]
    if row["missing"]:
        return "not testable here", str(row["missing"])
    if row["patients"] < MIN_PATIENTS:
        return "not testable here", TOO_FEW
    if check:
        return "not testable here", check
    if row["seeds"] == 1:
        return "not testable here", ONE_SEED
    if not row["inside_noise"]:
        if value < 0:
            return "not reproduced", "below zero outside the noise"
        if paper is not None and value < paper / 2:
            return "direction only", f"outside the noise, but {value / paper:.0%} of the paper's size"
        return "reproduced", "outside the noise"
    if row["equivalent"]:
        return "not reproduced", f"equivalent within {EQUIVALENCE:g} points by two one-sided tests"
    if low > 0 or high < 0:
        return (
            "not testable here",
            "the interval excludes zero, but the correction for several tests takes it back",
        )
    if paper is not None and high - low <= paper and high < paper:
        return "not reproduced", "inside the noise, and the interval excludes the paper's size"
    asked = EQUIVALENCE if paper is None else paper
    return "not testable here", f"inside the noise, and too wide to exclude an effect of {asked:g} points"


def claims(
    results: pd.DataFrame, per_image: pd.DataFrame, *, resamples: int = 2000, seed: int = 0
) -> pd.DataFrame:
    """Set each number and claim of the paper beside ours: `judge_number` and `judge_difference` judge.

    Numbers ("size") and signs of differences ("direction") are rows of their own, and none says what another
    says. Holm's correction takes all differences of final Dice in this ledger as one family. Statements about
    rounds and about the state before any round have no scores by image: their interval is over seeds alone.

    Returns:
        claim, kind, paper (text: a number, or a bound such as "< 40"), ours, low, high (95 %), n (test
        images), patients, seeds, verdict, why, run (names of the runs behind it as in `weights/`, without
        their seeds).
    """
    rows = _numbers_of_table1(per_image, resamples, seed)
    rows += [_gap_claim(per_image, init) for init in INITS if init != "random"]
    compared = compare(per_image, PAPER_DIFFERENCES, resamples=resamples, seed=seed)
    for name, cells in PAPER_DIFFERENCES.items():
        known = cells.keys() <= PAPER.keys()
        paper = sum(weight * PAPER[cell] for cell, weight in cells.items()) if known else None
        ours = compared.loc[name].to_dict()
        verdict = judge_difference(ours, paper, _loses_nothing(per_image, cells))
        rows.append(_claim(name, "direction", f"{paper:+.2f}" if known else "> 0", ours, verdict, cells))
    return pd.DataFrame(rows + _claims_about_rounds(results, per_image, PAPER_SPLIT))


def _claim(
    claim: str,
    kind: str,
    paper: str,
    row: Mapping[str, object],
    verdict: tuple[str, str],
    cells: Iterable[Cell],
) -> dict[str, object]:
    return {
        "claim": claim,
        "kind": kind,
        "paper": paper,
        "ours": row["value"],
        "low": row["low"],
        "high": row["high"],
        "n": row["images"],
        "patients": row["patients"],
        "seeds": row["seeds"],
        "verdict": verdict[0],
        "why": verdict[1],
        "run": ", ".join(f"{arm}-{split}-{init}" for arm, init, split in cells) if row["seeds"] else "",
    }


def _numbers_of_table1(per_image: pd.DataFrame, resamples: int, seed: int) -> list[dict[str, object]]:
    rows = []
    for cell, paper in PAPER.items():
        ours = contrast(per_image, {cell: 1}, resamples=resamples, seed=seed)
        inner = TwoWay(*(ours[name] for name in ("value", "error", "df"))).interval(1 - 2 * ALPHA)
        ours |= dict(zip(("inner_low", "inner_high"), inner, strict=True))
        name = f"Table 1, Dice in %: {cell[0]}, {cell[1]} start"
        rows.append(_claim(name, "size", f"{paper:.2f}", ours, judge_number(paper, MARGIN, ours), [cell]))
    return rows


def _gap_claim(per_image: pd.DataFrame, init: str) -> dict[str, object]:
    cell = ("federated", init, PAPER_SPLIT)
    paper = 100 * PAPER_GAP[init]
    ours = gap_interval(per_image, init, PAPER_SPLIT)
    inner = gap_interval(per_image, init, PAPER_SPLIT, level=1 - 2 * ALPHA)
    row = {name: 100 * ours[key] for name, key in (("value", "gap_closed"), ("low", "low"), ("high", "high"))}
    row |= {f"inner_{end}": 100 * inner[end] for end in ("low", "high")}
    row |= {name: ours[name] for name in ("images", "patients", "seeds")} | {"missing": ours["why"]}
    name = f"Gap closed, % of the way from random to centralised: {init}"
    cells = [cell, RANDOM, CENTRALISED]
    return _claim(name, "size", f"{paper:.0f}", row, judge_number(paper, GAP_MARGIN, row), cells)


def _loses_nothing(per_image: pd.DataFrame, cells: Mapping[Cell, float]) -> str:
    """Check the manipulation of a claim about skew: say so where the random start loses nothing by it."""
    (split,) = {split for _, _, split in cells} - {"iid"} if len(cells) == 4 else [""]
    if not split:
        return ""
    lost = contrast(
        per_image, {("federated", "random", "iid"): 1, ("federated", "random", split): -1}, resamples=200
    )
    if lost["missing"] or lost["low"] > 0:
        return ""
    size = f"{lost['value']:.2f} points, {lost['low']:.2f} to {lost['high']:.2f}"
    return f"the random start itself does not lose by this skew outside the noise ({size})"


def _over_seeds(
    values: pd.Series, missing: str, tested: Mapping[str, int], reach: float
) -> dict[str, object]:
    """One number a seed in the shape that `judge_difference` reads; its interval stays within ±`reach`."""
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


class _Curves:
    """Dice by round of the federated runs under one split, asked seed by seed."""

    def __init__(self, results: pd.DataFrame, per_image: pd.DataFrame, split: str):
        runs = results[(results.arm == "federated") & (results.split == split)]
        scored = per_image[(per_image.arm == "federated") & (per_image.split == split)]
        self.split = split
        self.dice = runs.set_index(["init", "seed", "round"]).dice.sort_index()
        self.length = int(runs["round"].max()) if len(runs) else 0
        self.tested = {"images": scored.image_id.nunique(), "patients": scored.patient_id.nunique()}

    def by_seed(self, init: str, rule) -> pd.Series:
        """A number a seed, from its curve (Dice by round)."""
        known = init in self.dice.index.get_level_values("init")
        seeds = self.dice.loc[init].groupby(level="seed") if known else ()
        return pd.Series({seed: rule(curve.droplevel("seed")) for seed, curve in seeds}, dtype=float)

    def first(self, curve: pd.Series, level: float) -> float:
        """The first round at `level` or above; the run's length where there is none."""
        reached = curve.index[curve >= level]
        return reached[0] if len(reached) else curve.index[-1]

    def over_seeds(self, values: pd.Series, missing: str, reach: float | None = None) -> dict[str, object]:
        return _over_seeds(values, missing, self.tested, self.length if reach is None else reach)

    def cells(self, *inits: str) -> list[Cell]:
        return [("federated", init, self.split) for init in inits]


def _claims_about_rounds(
    results: pd.DataFrame, per_image: pd.DataFrame, split: str
) -> list[dict[str, object]]:
    curves = _Curves(results, per_image, split)
    rows = [_fewer_rounds(curves, init, results) for init in ("fm", "pretraining")]
    rows += [_plateau(curves, init) for init in INITS]
    start = {init: curves.by_seed(init, lambda curve: curve.get(0, np.nan)) for init in ("fm", "pretraining")}
    missing = "round 0 of fm and pretraining was not scored"
    head = curves.over_seeds(100 * (start["fm"] - start["pretraining"]), missing, 100)
    claim = "Claim 2, points of Dice before any round: fm above pretraining"
    return [*rows, _claim(claim, "direction", "> 0", head, judge_difference(head), curves.cells(*start))]


def _fewer_rounds(curves: _Curves, init: str, results: pd.DataFrame) -> dict[str, object]:
    """Rounds to a fixed Dice that a start needs fewer than the random one; a run's length is the most."""
    target = TARGETS[0]
    spent = {
        name: curves.by_seed(name, lambda curve: curves.first(curve, target)) for name in ("random", init)
    }
    best = [curves.by_seed(name, lambda curve: curve.max()).max() for name in spent]
    saved = curves.over_seeds(
        spent["random"] - spent[init], f"federated random and {init} under {curves.split} were not both run"
    )
    if not saved["missing"] and not max(best) >= target:
        saved["missing"] = f"no run comes to {100 * target:g} %"
    saved["equivalent"] = False  # the margin is one of Dice
    verdict = judge_difference(saved)
    if verdict[1].startswith("inside"):
        verdict = "not testable here", "the seeds do not agree on who is sooner"
    if verdict[0] == "reproduced":
        runs = results[(results.arm == "federated") & (results.split == curves.split)]
        seen = speed(runs, [target]).set_index("init").images_seen
        seen = f"{seen[init]:,.0f} images for {init} and {seen['random']:,.0f} for random"
        verdict = "reproduced", f"outside the noise of seeds; its making included, {seen}"
    claim = f"Claim 1, rounds to a Dice of {100 * target:g} %: {init} fewer than random"
    return _claim(claim, "direction", "> 0", saved, verdict, curves.cells("random", init))


def _plateau(curves: _Curves, init: str) -> dict[str, object]:
    sign, bound = (1, ">") if init == "random" else (-1, "<")
    rounds = curves.by_seed(init, lambda curve: curves.first(curve, curve.iloc[-1] - PLATEAU))
    missing = f"federated {init} under {curves.split} was not run"
    ours = curves.over_seeds(rounds, missing)
    ours["low"] = max(0.0, ours["low"]) if ours["low"] == ours["low"] else np.nan
    beside = curves.over_seeds(sign * (rounds - PAPER_ROUNDS), missing, np.inf) | {"equivalent": False}
    verdict = judge_difference(beside)
    if not ours["missing"] and curves.length <= PAPER_ROUNDS:
        why = f"the run has {curves.length} rounds: whether more would help is not seen"
        verdict = "not testable here", why
    elif verdict[1].startswith("inside"):
        verdict = "not testable here", f"the seeds lie on both sides of {PAPER_ROUNDS} rounds"
    claim = f"Fig. 3, rounds until {init} is within {100 * PLATEAU:g} point of its last Dice"
    return _claim(claim, "direction", f"{bound} {PAPER_ROUNDS}", ours, verdict, curves.cells(init))

"""What the results say, and how sure that is: Table 1, paired differences, cost, the claims.

Every function takes the tables of a run and gives a new one.

- `results`: one row a scored round with arm, init, split, seed, round (0 is before any training), dice (mean
  over the test images, 0..1), and the running totals seconds, bytes_up, bytes_down, images_seen, which start
  at the cost of making the initial state.
- `per_image`: one row a test image after the last round with arm, init, split, seed, client, image_id,
  patient_id, dice (0..1).

Numbers that come out are Dice in % and differences in points, as in the paper. Two kinds of noise are told
apart:

- between patients: bootstrap over the test set's patients, because images of one patient are no independent
  evidence. Seeds are averaged first and images are paired, so what both arms find hard cancels;
- between training runs: Student's t interval of the seeds' means. One seed has none, and says so.

A difference is called higher or lower only where both exclude zero and two tests, Wilcoxon's and the paired
permutation test, stay below 5 % after Holm's correction; otherwise it is inside the noise. Every function
that draws at random takes `resamples` (draws) and `seed` (of the draws) and gives the same numbers for the
same seed.

References: the paper is Li & Yang 2023, arXiv 2311.15463. Bootstrap of clusters: Davison & Hinkley 1997,
section 3.8; the widened percentile interval: Hesterberg 2015, The American Statistician 69(4). Holm 1979,
Scandinavian Journal of Statistics 6(2). Permutation by signs: Good 2005, Permutation, Parametric and
Bootstrap Tests of Hypotheses, section 3.2. The effect size d_z: Cohen 1988, section 2.3.5.
"""

import itertools
from collections.abc import Iterable, Mapping

import numpy as np
import pandas as pd
import scipy

from fmfl.split import age_bands

Cell = tuple[str, str, str]  # arm, init, split

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
PAPER_ROUNDS = 40  # Fig. 3: informed starts are up in fewer rounds, the random start in more
MARGIN = 2.0  # points of Dice within which a number counts as the paper's
PLATEAU = 0.01  # Dice: a curve is "up" once it is this close to its last round
ALPHA = 0.05
FAILURE = 0.8  # Dice below which a mask counts as failed
VERDICTS = ("reproduced", "direction only", "not reproduced", "not testable here")
ROUNDS_SAVED = "Claim 1, rounds saved by fm to reach the random start's final Dice"


def _extra_loss(first: str, second: str, split: str) -> dict[Cell, float]:
    """How much more Dice the first start loses from IID to `split` than the second."""
    return {
        ("federated", first, "iid"): 1,
        ("federated", first, split): -1,
        ("federated", second, "iid"): -1,
        ("federated", second, split): 1,
    }


PAPER_DIFFERENCES: dict[str, dict[Cell, float]] = {  # each above zero in the paper
    "Claim 1, points of final Dice: fm above random": {FM: 1, RANDOM: -1},
    "Claim 1, points of final Dice: pretraining above random": {PRETRAINING: 1, RANDOM: -1},
    "Claims 1 and 2, points of final Dice: fm above pretraining": {FM: 1, PRETRAINING: -1},
    "Table 1, points of final Dice: centralised above federated": {CENTRALISED: 1, RANDOM: -1},
    "Table 1, points of final Dice: federated above standalone": {RANDOM: 1, STANDALONE: -1},
    "Claim 3, points lost from IID to age skew: random more than fm": _extra_loss("random", "fm", "age"),
    "Claim 3, points lost from IID to age skew: random more than pretraining": _extra_loss(
        "random", "pretraining", "age"
    ),
    "Claim 3, points lost from IID to age skew: pretraining more than fm": _extra_loss(
        "pretraining", "fm", "age"
    ),
    "Claim 3, points lost from IID to quantity skew: random more than fm": _extra_loss(
        "random", "fm", "quantity"
    ),
}
PAPER_ORDER = {  # the difference that places each number of Table 1 beside its neighbour
    RANDOM: "Table 1, points of final Dice: centralised above federated",
    PRETRAINING: "Claim 1, points of final Dice: pretraining above random",
    FM: "Claim 1, points of final Dice: fm above random",
    CENTRALISED: "Table 1, points of final Dice: centralised above federated",
    STANDALONE: "Table 1, points of final Dice: federated above standalone",
}


# Tables of runs


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
    """What each run had spent when its Dice first was >= `target` (0..1).

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


def speed(results: pd.DataFrame, target: float) -> pd.DataFrame:
    """How soon each start is up, and what that has cost, over seeds.

    Returns:
        One row an (arm, init, split): seeds; reached, how many of them come to a Dice of `target` (0..1);
        rounds, seconds and bytes until then (means of those that do, as `cost` counts them), with rounds_low
        and rounds_high (95 % t interval, NaN unless all seeds get there); curve, the mean Dice in % over all
        rounds by trapezoids, with curve_low and curve_high.
    """
    rows = []
    curves = results.sort_values("round").groupby(RUN)[["round", "dice"]].apply(_mean_height)
    for key, runs in cost(results, target).groupby(RUN[:3], sort=False):
        reached = runs.rounds.notna()
        rounds_low, rounds_high = seed_interval(runs.rounds) if reached.all() else (np.nan, np.nan)
        heights = curves.loc[key]
        low, high = seed_interval(heights)
        rows.append(
            dict(zip(RUN[:3], key, strict=True))
            | {"seeds": len(runs), "reached": int(reached.sum())}
            | runs[["rounds", "seconds", "bytes"]].mean().to_dict()
            | {"rounds_low": rounds_low, "rounds_high": rounds_high}
            | {"curve": heights.mean(), "curve_low": low, "curve_high": high}
        )
    return pd.DataFrame(rows)


def _mean_height(curve: pd.DataFrame) -> float:
    """Area under Dice by round over the rounds' range, in %; the last Dice where there is one round."""
    length = curve["round"].max() - curve["round"].min()
    if length == 0:
        return 100 * curve.dice.iloc[-1]
    return 100 * np.trapezoid(curve.dice, curve["round"]) / length


def weakest(per_image: pd.DataFrame, mixtures: pd.DataFrame | None = None) -> pd.DataFrame:
    """Who fares worst: the client, the age band and the tenth of the images with the lowest final Dice.

    The test images are nobody's, so a client's Dice is what its own mixture would give: the test images'
    means by site and age band, weighted by the client's images of each (those that the test set has).

    Args:
        per_image: with site, age (years, NaN where unknown) and, where measured, hd95 and assd.
        mixtures: one row a (split, seed, client, site, band) with images, from `split.mixture`.

    Returns:
        One row an (arm, init, split): dice and worst_tenth in %, failures (% of images below FAILURE), hd95
        and assd in pixels, worst_band (its name) and worst_band_dice, worst_client_dice (mean over seeds; NaN
        without mixtures).
    """
    rows = []
    scores = per_image.assign(band=age_bands(per_image.age))
    for (arm, init, split), runs in scores.groupby(RUN[:3], sort=False):
        by_image = 100 * runs.groupby("image_id").dice.mean().sort_values()
        bands = 100 * runs[runs.band != ""].groupby("band").dice.mean()
        row = {"arm": arm, "init": init, "split": split, "dice": by_image.mean()}
        row["worst_tenth"] = by_image.iloc[: max(1, round(len(by_image) / 10))].mean()
        row["failures"] = 100 * (runs.dice < FAILURE).mean()
        row |= {name: runs[name].mean() for name in ("hd95", "assd") if name in runs}
        row["worst_band"] = bands.idxmin() if len(bands) else ""
        row["worst_band_dice"] = bands.min() if len(bands) else np.nan
        row["worst_client_dice"] = _worst_client(runs, mixtures, split)
        rows.append(row)
    return pd.DataFrame(rows)


def _worst_client(runs: pd.DataFrame, mixtures: pd.DataFrame | None, split: str) -> float:
    if mixtures is None or split not in set(mixtures.split):
        return np.nan
    found = []
    for seed, scores in runs.groupby("seed"):
        strata = (100 * scores.groupby(["site", "band"]).dice.mean()).rename("dice").reset_index()
        held = mixtures[(mixtures.split == split) & (mixtures.seed == seed)].merge(
            strata, on=["site", "band"]
        )
        if len(held):
            by_client = held.groupby("client")[["dice", "images"]]
            found.append(by_client.apply(lambda own: np.average(own.dice, weights=own.images)).min())
    return float(np.mean(found)) if found else np.nan


def _runs(results: pd.DataFrame) -> pd.MultiIndex:
    return pd.MultiIndex.from_frame(results[RUN].drop_duplicates().sort_values(RUN))


# Uncertainty


def bootstrap_mean(
    values: np.ndarray, patients: Iterable, *, level: float = 0.95, resamples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Interval of the mean of `values` when whole patients are drawn again.

    The percentile interval is too short for few clusters; it is widened to the level at which it has the
    t interval's width on normal data (Hesterberg 2015, the expanded percentile interval).

    Args:
        values: (n,) one number an image.
        patients: (n,) whose image it is.
        level: how often the interval shall hold the true mean, 0..1.
        resamples: bootstrap draws.
        seed: of the draws.

    Returns:
        low, high, in the values' unit; NaN, NaN with fewer than two patients.
    """
    codes, _ = pd.factorize(np.asarray(patients))
    num_patients = codes.max(initial=-1) + 1
    if num_patients < 2:
        return np.nan, np.nan
    sums = np.bincount(codes, weights=values)
    counts = np.bincount(codes)
    drawn = np.random.default_rng(seed).multinomial(
        num_patients, np.full(num_patients, 1 / num_patients), resamples
    )
    means = (drawn @ sums) / (drawn @ counts)
    t = scipy.stats.t.ppf((1 + level) / 2, num_patients - 1)
    tail = scipy.stats.norm.cdf(-t * np.sqrt(num_patients / (num_patients - 1)))
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high)


def seed_interval(values: Iterable[float], *, level: float = 0.95) -> tuple[float, float]:
    """Student's t interval of the mean over seeds; NaN, NaN for a single one."""
    values = np.asarray(list(values), dtype=float)
    if len(values) < 2:
        return np.nan, np.nan
    half = scipy.stats.t.ppf((1 + level) / 2, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values))
    return float(values.mean() - half), float(values.mean() + half)


def holm(p: Iterable[float]) -> np.ndarray:
    """p-values corrected for being a family (Holm 1979); NaN stays NaN and does not count."""
    p = np.asarray(list(p), dtype=float)
    corrected = np.full_like(p, np.nan)
    known = np.flatnonzero(~np.isnan(p))
    order = known[np.argsort(p[known], kind="stable")]
    corrected[order] = np.maximum.accumulate(p[order] * np.arange(len(order), 0, -1)).clip(max=1)
    return corrected


def sign_permutation(values: np.ndarray, *, resamples: int = 9999, seed: int = 0) -> float:
    """Two-sided p that the mean of paired differences is zero, from signs that could as well be the other.

    All 2^n signs for up to 13 differences, else `resamples` draws with the one observed counted in.

    Args:
        values: (n,) one difference a patient.
        resamples: draws.
        seed: of the draws.
    """
    # SciPy's permutation_test gives the same at ten times the time, which the map's many points would feel.
    values = np.asarray(values, dtype=float)
    if len(values) <= 13:
        signs = np.array(list(itertools.product((-1, 1), repeat=len(values))), dtype=float)
        as_far = np.abs(signs @ values) >= abs(values.sum()) * (1 - 1e-12)
        return float(as_far.mean())
    signs = 1.0 - 2.0 * np.random.default_rng(seed).integers(0, 2, (resamples, len(values)), dtype=np.int8)
    as_far = np.abs(signs @ values) >= abs(values.sum()) * (1 - 1e-12)
    return float((as_far.sum() + 1) / (resamples + 1))


def contrast(
    per_image: pd.DataFrame, cells: Mapping[Cell, float], *, resamples: int = 2000, seed: int = 0
) -> dict[str, object]:
    """A weighted sum of cells' Dice, image by image on the same test images and seeds.

    One cell with weight 1 is its mean; {fm: 1, random: -1} is their difference; four cells make the
    difference of two losses from IID to skew. A standalone image's score is its mean over clients.

    Returns:
        value, low, high (points of Dice, 95 % by patient), p and p_permutation (Wilcoxon signed-rank and
        permutation of signs on patients' means, against zero), effect (d_z: the patients' mean over their
        standard deviation), seed_low, seed_high (95 % t interval over seeds), images, patients, seeds, and
        missing: why there is no value ("" if there is one).
    """
    empty = dict.fromkeys(
        ["value", "low", "high", "p", "p_permutation", "effect", "seed_low", "seed_high"], np.nan
    )
    empty |= {"images": 0, "patients": 0, "seeds": 0, "missing": ""}
    total = 0
    for (arm, init, split), weight in cells.items():
        rows = per_image[(per_image.arm == arm) & (per_image.init == init) & (per_image.split == split)]
        if rows.dice.count() == 0:
            return empty | {"missing": f"{arm} {init} under {split} was not run"}
        total = total + 100 * weight * rows.groupby(["image_id", "seed"]).dice.mean().unstack("seed")
    total = total.dropna(how="all").dropna(how="all", axis=1)  # images and seeds that every cell has
    if total.empty:
        return empty | {"missing": "the runs to be compared share no seed and test image"}

    by_image = total.mean(axis=1)
    patients = per_image.drop_duplicates("image_id").set_index("image_id").patient_id.reindex(by_image.index)
    low, high = bootstrap_mean(by_image.to_numpy(), patients, resamples=resamples, seed=seed)
    by_patient = by_image.groupby(patients.to_numpy()).mean().to_numpy()
    p = scipy.stats.wilcoxon(by_patient).pvalue if np.any(by_patient) else 1.0
    spread = by_patient.std(ddof=1) if len(by_patient) > 1 else np.nan
    by_seed = total.mean()
    seed_low, seed_high = seed_interval(by_seed)
    return {
        "value": by_image.mean(),
        "low": low,
        "high": high,
        "p": float(p),
        "p_permutation": sign_permutation(by_patient, seed=seed),
        "effect": by_patient.mean() / spread if spread > 0 else np.nan,
        "seed_low": seed_low,
        "seed_high": seed_high,
        "images": len(by_image),
        "patients": len(by_patient),
        "seeds": len(by_seed),
        "missing": "",
    }


def compare(
    per_image: pd.DataFrame,
    family: Mapping[object, Mapping[Cell, float]],
    *,
    resamples: int = 2000,
    seed: int = 0,
) -> pd.DataFrame:
    """The contrasts of a family, corrected for being several.

    Returns:
        A table indexed by the family's names: `contrast`'s columns, then p_holm, p_permutation_holm,
        inside_noise and reading: "higher" | "lower" | "inside the noise", with ", one seed" where the noise
        between training runs is unknown, or "" where the contrast is missing.
    """
    rows = [contrast(per_image, cells, resamples=resamples, seed=seed) for cells in family.values()]
    table = pd.DataFrame(rows, index=pd.Index(list(family), tupleize_cols=False))
    table["p_holm"] = holm(table.p)
    table["p_permutation_holm"] = holm(table.p_permutation)
    table["inside_noise"] = [_inside_noise(row) for row in table.itertuples()]
    table["reading"] = [_reading(row) for row in table.itertuples()]
    return table


def _inside_noise(row) -> bool:
    beyond_patients = row.low > 0 or row.high < 0
    beyond_seeds = row.seeds == 1 or row.seed_low > 0 or row.seed_high < 0
    beyond_chance = row.p_holm < ALPHA and row.p_permutation_holm < ALPHA
    return not (beyond_patients and beyond_seeds and beyond_chance)


def _reading(row) -> str:
    if row.missing:
        return ""
    if row.inside_noise:
        return "inside the noise"
    return ("higher" if row.value > 0 else "lower") + (", one seed" if row.seeds == 1 else "")


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
        One row a start: init, split, and for each arm {arm} (mean Dice), {arm}_low, {arm}_high (95 % by
        patient), {arm}_images, {arm}_seeds. NaN and 0 where a cell was not run. A cell without scores by
        image keeps its mean and has no interval.
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
                f"{arm}_{key}": cell[key] for key in ("low", "high", "images", "seeds")
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


def gap_interval(
    per_image: pd.DataFrame, init: str, split: str, *, resamples: int = 2000, seed: int = 0
) -> dict[str, object]:
    """`gap_closed` of one start from the scores by image, with a bootstrap interval over patients.

    Returns:
        gap_closed, low, high (1 is all of it) and why there is none: an arm was not run, or centralised
        training is not above the random start outside the noise of the test images, so that the share would
        be a number over nothing.
    """
    cells = {
        "random": ("federated", "random", split),
        "own": ("federated", init, split),
        "centralised": CENTRALISED,
    }
    empty = {"gap_closed": np.nan, "low": np.nan, "high": np.nan}
    whole = contrast(
        per_image, {cells["centralised"]: 1, cells["random"]: -1}, resamples=resamples, seed=seed
    )
    if whole["missing"]:
        return empty | {"why": whole["missing"]}
    if not whole["low"] > 0:
        return empty | {"why": "centralised training is not above the random start outside the noise"}
    means = {}
    for name, (arm, start, where) in cells.items():
        rows = per_image[(per_image.arm == arm) & (per_image.init == start) & (per_image.split == where)]
        if rows.empty:
            return empty | {"why": f"{arm} {start} under {where} was not run"}
        means[name] = rows.groupby("image_id").dice.mean()
    table = pd.DataFrame(means).dropna()
    patients = per_image.drop_duplicates("image_id").set_index("image_id").patient_id.reindex(table.index)
    sums = table.groupby(patients.to_numpy()).sum().to_numpy()
    number = len(sums)
    drawn = np.random.default_rng(seed).multinomial(number, np.full(number, 1 / number), resamples) @ sums
    at_random, own, centralised = (drawn[:, list(table).index(name)] for name in cells)
    low, high = np.quantile((own - at_random) / (centralised - at_random), [0.025, 0.975])
    mean = table.mean()
    share = (mean.own - mean.random) / (mean.centralised - mean.random)
    return {"gap_closed": float(share), "low": float(low), "high": float(high), "why": ""}


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
        resamples, seed: see :mod:`fmfl.analysis`.

    Returns:
        One row an (axis, value, pair): axis, value, higher, lower and `compare`'s columns; the study's own
        value among the others, and no pair with a start that was run nowhere. All of them are one family for
        Holm's correction.
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
    """Final Dice of each start where one setting is changed, as :func:`gains` takes them.

    Returns:
        One row an (axis, value, init): these, dice, low, high (%, 95 % by patient), images, seeds.
    """
    rows = []
    for axis, of_axis in variants.groupby("axis", sort=False):
        own, split = of_axis.own.iloc[0], of_axis.split.iloc[0]
        for value in sorted({own, *of_axis.value}, key=_axis_order):
            source = per_image if value == own else of_axis[of_axis.value == value]
            for init in ordered_inits(source[source.arm == "federated"]):
                cell = contrast(source, {("federated", init, split): 1}, resamples=resamples, seed=seed)
                if not cell["missing"]:
                    keep = {"dice": cell["value"]} | {k: cell[k] for k in ("low", "high", "images", "seeds")}
                    rows.append({"axis": axis, "value": value, "init": init} | keep)
    return pd.DataFrame(rows, columns=["axis", "value", "init", "dice", "low", "high", "images", "seeds"])


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
    *("value", "low", "high", "p", "p_holm", "p_permutation", "p_permutation_holm", "effect"),
    *("seed_low", "seed_high"),
    *("images", "patients", "seeds", "inside_noise", "reading"),
]


_MAPPED = [name if name != "value" else "gain" for name in COMPARED]


# The ledger


def judge_number(
    paper: float, low: float, high: float, *, seed_low: float, seed_high: float, seeds: int, order: str
) -> tuple[str, str]:
    """Verdict on a number of Table 1, and why.

    With the interval by patient and the one over seeds joined into one:

    - not testable here: not run; or the interval holds the paper's number and is too wide for a yes;
    - reproduced: at least two seeds, and the whole interval within MARGIN points of the paper's number;
    - direction only: the same with one seed; or another number, but above or below its neighbour in Table 1
      (the random start; for that one, centralised training) as in the paper, outside the noise;
    - not reproduced: otherwise.

    Numbers are Dice in %: the paper's, our 95 % interval by patient, and the one over seeds (NaN for one).
    `order` is `compare`'s reading of the difference that the paper has above zero ("" if it was not run).
    """
    if not seeds:
        return "not testable here", "not run"
    low, high = np.fmin(low, seed_low), np.fmax(high, seed_high)
    if low >= paper - MARGIN and high <= paper + MARGIN:
        if seeds == 1:
            return (
                "direction only",
                f"within {MARGIN:g} points, but one seed: the noise between runs is unknown",
            )
        return "reproduced", f"within {MARGIN:g} points"
    if np.isnan(low) or low <= paper <= high:
        return (
            "not testable here",
            f"too noisy: over images and seeds it may lie from {low:.2f} to {high:.2f}",
        )
    if order.startswith("higher"):
        return "direction only", "another number, the same order of arms" + order.removeprefix("higher")
    return "not reproduced", "another number, and not the paper's order of arms outside the noise"


def judge_difference(row: Mapping[str, object], paper: float | None = None) -> tuple[str, str]:
    """Verdict on a difference that the paper has above zero, and why.

    - not testable here: an arm is missing; or the interval by patient holds both zero and the paper's size,
      so the data cannot tell them apart;
    - not reproduced: zero or below; or the interval by patient holds zero: inside the noise;
    - direction only: above zero for the test images, but there is one seed, or seeds or Holm's correction
      leave it inside the noise, or it is less than half the paper's size;
    - reproduced: above zero outside the noise, with at least two seeds, and at least half the paper's size
      where the paper gives one.

    Args:
        row: value, low, high, seeds, inside_noise and missing as in `compare`.
        paper: the paper's difference in points, None where it gives no number.
    """
    value, low, high, seeds = (row[key] for key in ("value", "low", "high", "seeds"))
    if row["missing"]:
        return "not testable here", str(row["missing"])
    if paper is not None and low <= 0 <= high and low <= paper <= high:
        return "not testable here", "too noisy: the interval holds both no difference and the paper's"
    if value <= 0 and not high > 0:
        return "not reproduced", "no difference" if value == 0 else "it points the other way"
    if value <= 0 or low <= 0:
        return "not reproduced", "inside the noise"
    if seeds == 1:
        return "direction only", "one seed: the noise between runs is unknown"
    if row["inside_noise"]:
        return (
            "direction only",
            "the test images agree, but seeds or the number of comparisons leave it in the noise",
        )
    if paper is not None and value < paper / 2:
        return "direction only", f"outside the noise, but {value / paper:.0%} of the paper's size"
    return "reproduced", "outside the noise"


def claims(
    results: pd.DataFrame, per_image: pd.DataFrame, *, resamples: int = 2000, seed: int = 0
) -> pd.DataFrame:
    """Each number and claim of the paper beside ours: `judge_number` and `judge_difference` state the rules.

    Holm's correction takes all differences of final Dice in this ledger as one family. Statements about
    rounds and about the state before any round have no scores by image: their interval is over seeds.

    Returns:
        claim, paper (text: a number, or a bound such as "< 40"), ours, low, high (95 %), n (test images; runs
        for statements about rounds), seeds, verdict, why, run (names of the runs behind it as in
        ``weights/``, without their seeds).
    """
    compared = compare(per_image, PAPER_DIFFERENCES, resamples=resamples, seed=seed)
    rows = []
    for cell, paper in PAPER.items():
        ours = contrast(per_image, {cell: 1}, resamples=resamples, seed=seed)
        noise = {key: ours[key] for key in ("low", "high", "seed_low", "seed_high", "seeds")}
        verdict, why = judge_number(paper, **noise, order=compared.reading[PAPER_ORDER[cell]])
        arm, init, _ = cell
        name = f"Table 1, Dice in %: {arm}, {init} start"
        rows.append(_claim(name, f"{paper:.2f}", ours, verdict, ours["missing"] or why, [cell]))
    for name, cells in PAPER_DIFFERENCES.items():
        ours = compared.loc[name].to_dict()
        paper = (
            sum(weight * PAPER[cell] for cell, weight in cells.items())
            if cells.keys() <= PAPER.keys()
            else None
        )
        verdict, why = judge_difference(ours, paper)
        rows.append(_claim(name, f"{paper:+.2f}" if paper else "> 0", ours, verdict, why, cells))
    return pd.DataFrame(rows + _claims_about_rounds(results, PAPER_SPLIT))


def _claim(
    claim: str, paper: str, row: Mapping[str, object], verdict: str, why: str, cells: Iterable[Cell]
) -> dict[str, object]:
    return {
        "claim": claim,
        "paper": paper,
        "ours": row["value"],
        "low": row["low"],
        "high": row["high"],
        "n": row["images"],
        "seeds": row["seeds"],
        "verdict": verdict,
        "why": why,
        "run": ", ".join(f"{arm}-{split}-{init}" for arm, init, split in cells) if row["seeds"] else "",
    }


def _over_seeds(values: pd.Series, missing: str) -> dict[str, object]:
    """One number a seed in the shape that `judge_difference` reads."""
    values = values.dropna()
    low, high = seed_interval(values)
    return {
        "value": values.mean(),
        "low": low,
        "high": high,
        "images": len(values),
        "seeds": len(values),
        "inside_noise": len(values) > 1 and not low > 0,
        "missing": "" if len(values) else missing,
    }


def _claims_about_rounds(results: pd.DataFrame, split: str) -> list[dict[str, object]]:
    runs = results[(results.arm == "federated") & (results.split == split)]
    curves = runs.set_index(["init", "seed", "round"]).dice.sort_index()
    last_round = runs.groupby(["init", "seed"])["round"].max()

    def by_seed(init: str, rule) -> pd.Series:
        seeds = curves.loc[init].groupby(level="seed") if init in curves else ()
        return pd.Series({seed: rule(seed, curve.droplevel("seed")) for seed, curve in seeds}, dtype=float)

    def first_round(curve: pd.Series, level: float) -> float:
        reached = curve.index[curve >= level]
        return reached[0] if len(reached) else curve.index[-1] + 1  # later than the last: at least that

    rows = []

    goal = by_seed("random", lambda _, curve: curve.iloc[-1])
    random = by_seed("random", lambda seed, curve: first_round(curve, goal[seed]))
    fm = by_seed("fm", lambda seed, curve: first_round(curve, goal[seed]) if seed in goal else np.nan)
    saved = _over_seeds(random - fm, f"federated random and fm under {split} were not both run")
    both = [("federated", init, split) for init in ("random", "fm")]
    rows.append(_claim(ROUNDS_SAVED, "> 0", saved, *judge_difference(saved), both))

    for init in INITS:
        sign, bound = (1, ">") if init == "random" else (-1, "<")
        rounds = by_seed(init, lambda _, curve: first_round(curve, curve.iloc[-1] - PLATEAU))
        ours = _over_seeds(rounds, f"federated {init} under {split} was not run")
        length = last_round.loc[init].min() if init in curves else 0
        if ours["missing"]:
            verdict, why = "not testable here", ours["missing"]
        elif length <= PAPER_ROUNDS:
            verdict, why = (
                "not testable here",
                f"the run has {length} rounds: whether more would help is not seen",
            )
        else:
            verdict, why = judge_difference(_over_seeds(sign * (rounds - PAPER_ROUNDS), ""))
        claim = f"Fig. 3: rounds until {init} is within {100 * PLATEAU:g} point of its last Dice"
        rows.append(
            _claim(claim, f"{bound} {PAPER_ROUNDS}", ours, verdict, why, [("federated", init, split)])
        )

    start = {init: by_seed(init, lambda _, curve: curve.get(0, np.nan)) for init in ("fm", "pretraining")}
    head = _over_seeds(
        100 * (start["fm"] - start["pretraining"]), "round 0 of fm and pretraining was not scored"
    )
    claim = "Claim 2, points of Dice before any round: fm above pretraining"
    both = [("federated", init, split) for init in start]
    rows.append(_claim(claim, "> 0", head, *judge_difference(head), both))
    return rows

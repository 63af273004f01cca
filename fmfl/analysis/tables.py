"""Tables of a study: final scores, differences of starts, cost, the gap closed, the weakest groups, the map.

Every function takes the tables of a run and gives a new one.

- `results`: one row a scored round with arm, init, split, seed, round (0 is before any training), dice (mean
  over the test images, 0..1), and the running totals seconds, bytes_up, bytes_down, images_seen, which start
  at the cost of making the initial state.
- `per_image`: one row a test image after the last round with arm, init, split, seed, client, image_id,
  patient_id, dice (0..1).

Numbers that come out are Dice in % and differences in points, as in the paper (Li & Yang 2023, arXiv
2311.15463). Intervals are 95 % over seeds and test patients together, and tests are corrected for being
several: see `analysis.statistics`. With fewer than MIN_PATIENTS test patients there is no interval and no
test. All seeds of a study share one draw of proxy, test and client images (`holdout_seed`): what another draw
would give is in no interval.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import scipy

from fmfl.analysis.statistics import (
    MIN_PATIENTS,
    TOO_FEW,
    Cell,
    compare,
    contrast,
    paired_scores,
    patients_of,
    seed_interval,
    two_way,
)
from fmfl.config import ARMS, INITS
from fmfl.errors import UserError
from fmfl.split import age_bands

RUN = ["arm", "init", "split", "seed"]
#: The paper's starts and its split. Its centralised training has no split.
PAPER_INITS = INITS[:3]
PAPER_SPLIT = "age"
CENTRALISED: Cell = ("centralised", "random", "pooled")
#: Pairs of starts whose final Dice is compared, and those of the map.
PAIRS = (("fm", "random"), ("fm", "pretraining"), ("pretraining", "random"))
MAP_PAIRS = PAIRS[:2]
#: Dice, fixed beforehand and no run's own, whose first round is counted.
TARGETS = (0.90, 0.92, 0.94)
#: Dice below which a mask counts as failed.
FAILURE = 0.8
#: Test patients and images below which no group is named as the worst.
GROUP_PATIENTS, GROUP_IMAGES = 10, 10
#: Columns of names, which stay as they were written: "01", "1" and "NA" are three images.
NAMED = ("image_id", "patient_id", "site")
#: Columns of a difference, after those that name it.
COMPARED = [
    *("value", "low", "high", "p", "p_holm", "p_permutation", "p_permutation_holm"),
    *("p_two_way", "p_two_way_holm", "p_equivalence", "p_equivalence_holm", "effect", "error", "df"),
    *("patient_low", "patient_high", "seed_low", "seed_high"),
    *("images", "patients", "seeds", "inside_noise", "equivalent", "reading"),
]
#: Columns of a variant's final Dice, after those that name it and the Dice.
SCORED = [
    *("low", "high", "patient_low", "patient_high", "seed_low", "seed_high"),
    *("images", "patients", "seeds"),
]


def read_table(file: Path, text: Iterable[str] = ()) -> pd.DataFrame:
    """Read a table that a run has left: NAMED as they are, and other columns as text, NaN if empty.

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
            f"{file} cannot be read as CSV ({error}): run the study again to rewrite it"
        ) from error


def final(results: pd.DataFrame) -> pd.DataFrame:
    """Return the last scored round of each run; no round is picked by its test score."""
    last = results.sort_values("round", kind="stable").groupby(RUN, sort=False).tail(1)
    return last.sort_values(RUN, kind="stable").reset_index(drop=True)


def known_first(values: Iterable[str], known: Iterable[str]) -> list[str]:
    """Return each value once: those of `known` in its order, then the others as they come."""
    seen = list(dict.fromkeys(values))
    return [name for name in known if name in seen] + [name for name in seen if name not in known]


def ordered_inits(results: pd.DataFrame) -> list[str]:
    """Return the starts that were run, in the order of `config.INITS`, then the others."""
    return known_first(results.init, INITS)


def reference_split(results: pd.DataFrame) -> str:
    """Return the split that Table 1 is about: the paper's, or the first that was run ("" if none)."""
    return next(iter(known_first(results.split[results.arm != "centralised"], [PAPER_SPLIT])), "")


# Final scores and their differences


def table1(results: pd.DataFrame, per_image: pd.DataFrame, split: str | None = None) -> pd.DataFrame:
    """Return the paper's Table 1: final Dice by start (rows) and arm (columns), in %.

    The federated and standalone columns are under `split`, by default `reference_split`.

    Returns:
        One row a start: init, split, and for each arm {arm} (mean Dice), {arm}_low, {arm}_high (95 %, seeds
        and patients together), {arm}_images, {arm}_patients, {arm}_seeds. NaN and 0 where a cell was not run.
        A cell without scores by image keeps its mean and has no interval.
    """
    split = reference_split(results) if split is None else split
    last = final(results)
    rows = []
    for init in known_first([*PAPER_INITS, *ordered_inits(results)], PAPER_INITS):
        row: dict[str, object] = {"init": init, "split": split}
        for arm in ARMS:
            where = "pooled" if arm == "centralised" else split
            cell = contrast(per_image, {(arm, init, where): 1})
            if cell["missing"]:
                runs = last[(last.arm == arm) & (last.init == init) & (last.split == where)]
                cell |= {"value": 100 * runs.dice.mean(), "seeds": len(runs)}
            row[arm] = cell["value"]
            row |= {f"{arm}_{key}": cell[key] for key in ("low", "high", "images", "patients", "seeds")}
        rows.append(row)
    return pd.DataFrame(rows)


def paired_differences(per_image: pd.DataFrame, pairs: Iterable[tuple[str, str]] = PAIRS) -> pd.DataFrame:
    """Return final federated Dice of one start less another's, on the same images and seeds, by split.

    The family for Holm's correction is the whole table. Pairs that were not both run are left out.

    Returns:
        One row a (split, pair): split, higher, lower (the pair's names, the first less the second), and
        COMPARED.
    """
    federated = per_image[per_image.arm == "federated"]
    have = set(federated[["init", "split"]].itertuples(index=False, name=None))
    family = {
        (split, first, second): {("federated", first, split): 1, ("federated", second, split): -1}
        for split in dict.fromkeys(federated.split)
        for first, second in pairs
        if {(first, split), (second, split)} <= have
    }
    names = pd.DataFrame(list(family), columns=["split", "higher", "lower"])
    if names.empty:
        return names.reindex(columns=[*names, *COMPARED])
    return pd.concat([names, compare(per_image, family).reset_index(drop=True)[COMPARED]], axis=1)


def gap(per_image: pd.DataFrame, inits: Iterable[str], split: str) -> pd.DataFrame:
    """Return `gap_closed` of each start.

    Returns:
        One row a start: init, split, gap_closed, low, high, images, patients, seeds, why.
    """
    rows = [{"init": init, "split": split} | gap_closed(per_image, init, split) for init in inits]
    names = ["init", "split", "gap_closed", "low", "high", "images", "patients", "seeds", "why"]
    return pd.DataFrame(rows, columns=names)


def gap_closed(per_image: pd.DataFrame, init: str, split: str, *, level: float = 0.95) -> dict[str, object]:
    """Return the share of the way from the random start to centralised training that a start goes.

    The paper's Table 1 gives (85.38 - 74.67) / (89.41 - 74.67) = 73 % for fm and 63 % for pretraining. The
    interval of the ratio is Fieller's (1954, Journal of the Royal Statistical Society B 16(2)): a share
    belongs to it where own - random - share * (centralised - random) is not told from zero by the two-way
    error.

    Returns:
        gap_closed, low, high (1 is all of it), images, patients, seeds, and why there is no share: an arm was
        not run, there are too few test patients, or centralised training is not above the random start
        outside the noise, so that the share would be a number over nothing. The random start itself has none.
    """
    random = ("federated", "random", split)
    result = dict.fromkeys(("gap_closed", "low", "high"), np.nan)
    result |= dict.fromkeys(("images", "patients", "seeds"), 0)
    if init == "random":
        return result | {"why": "the way begins at the random start"}
    whole, missing = paired_scores(per_image, {CENTRALISED: 1, random: -1})
    own, own_missing = paired_scores(per_image, {("federated", init, split): 1, random: -1})
    if missing or own_missing:
        return result | {"why": missing or own_missing}
    whole, own = whole.align(own, join="inner")
    patients = patients_of(per_image, whole.index)
    result |= {"images": len(whole), "patients": patients.nunique(), "seeds": whole.shape[1]}
    if patients.nunique() < MIN_PATIENTS:
        return result | {"why": TOO_FEW}
    if not two_way(whole.to_numpy(), patients).interval(level)[0] > 0:
        return result | {"why": "centralised training is not above the random start outside the noise"}
    share = float(own.to_numpy().mean() / whole.to_numpy().mean())

    def outside(candidate: float) -> float:
        """Return a number below zero where the candidate belongs to the interval."""
        low, high = two_way((own - candidate * whole).to_numpy(), patients).interval(level)
        return max(low, -high)

    ends = []
    for step in (-0.01, 0.01):
        while outside(share + step) < 0 and abs(step) < 1e6:
            step *= 2
        ends.append(scipy.optimize.brentq(outside, share, share + step) if outside(share) < 0 else share)
    return result | {"gap_closed": share, "low": min(ends), "high": max(ends), "why": ""}


# Cost


def cost(results: pd.DataFrame, target: float) -> pd.DataFrame:
    """Return what each run had spent when its Dice first was >= `target` (0..1).

    Pre-training and distillation are paid at round 0 by the start that uses them, so a start that is
    there before any round is not free. NaN where a run never gets there.

    Returns:
        One row a run: arm, init, split, seed, rounds, seconds, bytes (both ways), images_seen.
    """
    reached = results[results.dice >= target].sort_values("round", kind="stable")
    runs = pd.MultiIndex.from_frame(results[RUN].drop_duplicates().sort_values(RUN))
    return _spent(reached.groupby(RUN).first()).reindex(runs).reset_index()


def _spent(rounds: pd.DataFrame) -> pd.DataFrame:
    spent = rounds[["round", "seconds"]].rename(columns={"round": "rounds"})
    return spent.assign(bytes=rounds.bytes_up + rounds.bytes_down, images_seen=rounds.images_seen)


def speed(results: pd.DataFrame, targets: Iterable[float] = TARGETS) -> pd.DataFrame:
    """Return what each start has spent when it comes to a Dice that was fixed beforehand, over seeds.

    A run that never comes to the target counts with all its rounds and all that they cost, so its numbers are
    the least that it would take. The cost of making the start is part of it.

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
    whole = _spent(final(results).set_index(RUN))
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
    """Return the area under Dice by round over the rounds' range, in %; the Dice of a single round."""
    length = curve["round"].max() - curve["round"].min()
    if length == 0:
        return 100 * curve.dice.iloc[-1]
    return 100 * np.trapezoid(curve.dice, curve["round"]) / length


# The weakest groups


def weakest(per_image: pd.DataFrame, mixtures: pd.DataFrame | None = None) -> pd.DataFrame:
    """Return the client, the age band and the tenth of the images with the lowest final Dice.

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
        bands = _large_groups(runs[runs.band != ""], ["band"])
        worst = bands.dice.idxmin() if len(bands) > 1 else ""  # the worst of one is no finding
        row["worst_band"] = worst
        for name in ("dice", "images", "patients"):
            row[f"worst_band_{name}"] = bands[name][worst] if worst else np.nan
        row["worst_client_dice"] = _worst_client(runs, mixtures, split)
        rows.append(row)
    return pd.DataFrame(rows)


def _large_groups(runs: pd.DataFrame, by: list[str]) -> pd.DataFrame:
    """Return mean Dice in %, images and patients of each group of test images that is large enough."""
    groups = runs.groupby(by).agg(
        dice=("dice", "mean"), images=("image_id", "nunique"), patients=("patient_id", "nunique")
    )
    groups["dice"] *= 100
    return groups[(groups.patients >= GROUP_PATIENTS) & (groups.images >= GROUP_IMAGES)]


def _worst_client(runs: pd.DataFrame, mixtures: pd.DataFrame | None, split: str) -> float:
    if mixtures is None or split not in set(mixtures.split):
        return np.nan
    lowest = []
    for seed, scores in runs.groupby("seed"):
        strata = _large_groups(scores, ["site", "band"]).dice.reset_index()
        if len(strata) < 2:  # then clients' mixtures cannot be told apart
            return np.nan
        clients = mixtures[(mixtures.split == split) & (mixtures.seed == seed)]
        known = clients.merge(strata, on=["site", "band"])
        share = known.groupby("client").images.sum() / clients.groupby("client").images.sum()
        if not (share >= 0.5).all():
            return np.nan
        by_client = known.groupby("client")[["dice", "images"]]
        lowest.append(by_client.apply(lambda own: np.average(own.dice, weights=own.images)).min())
    return float(np.mean(lowest)) if lowest else np.nan


# The map of variants


def gains(per_image: pd.DataFrame, variants: pd.DataFrame) -> pd.DataFrame:
    """Return the map: points that the teacher's student gains over other starts where a setting is changed.

    Args:
        per_image: scores by image of the whole study, of which the federated arm under the variants' split
            stands for each axis's own value, and for a start that the axis cannot change.
        variants: the same of all variants, with columns axis, value and own (the study's own value).

    Returns:
        One row an (axis, value, pair): axis, value, higher, lower, gain and the rest of COMPARED; the study's
        own value among the others on every axis, and no pair with a start that was run nowhere. All of them
        are one family for Holm's correction, to which the study's own setting belongs once.
    """
    family, scores = {}, [per_image.assign(axis="", value="")]
    known = {init for table in (per_image, variants) for init in table.init[table.arm == "federated"]}
    for axis, value, _, split, rows in _map_points(variants):
        point = f"{axis}={value}"  # a split of its own, so that cells are told apart
        if len(rows):
            scores.append(rows.assign(split=point))
        own = {init: point if init in set(rows.init) else split for init in known}
        for first, second in MAP_PAIRS:
            if known.issuperset((first, second)):
                cells = {("federated", first, own[first]): 1, ("federated", second, own[second]): -1}
                family[axis, value, first, second] = cells
    columns = [name if name != "value" else "gain" for name in COMPARED]
    names = pd.DataFrame(list(family), columns=["axis", "value", "higher", "lower"])
    if names.empty:
        return names.reindex(columns=[*names, *columns])
    compared = compare(pd.concat(scores, ignore_index=True), family).rename(columns={"value": "gain"})
    return pd.concat([names, compared.reset_index(drop=True)[columns]], axis=1)


def variant_scores(per_image: pd.DataFrame, variants: pd.DataFrame) -> pd.DataFrame:
    """Return the final Dice of each start where a setting is changed; arguments as of `gains`.

    Returns:
        One row an (axis, value, init): these, dice in % and SCORED.
    """
    rows = []
    for axis, value, is_own, split, of_point in _map_points(variants):
        source = per_image if is_own else of_point
        for init in ordered_inits(source[source.arm == "federated"]):
            cell = contrast(source, {("federated", init, split): 1})
            if not cell["missing"]:
                scored = {"dice": cell["value"]} | {name: cell[name] for name in SCORED}
                rows.append({"axis": axis, "value": value, "init": init} | scored)
    return pd.DataFrame(rows, columns=["axis", "value", "init", "dice", *SCORED])


def _map_points(variants: pd.DataFrame) -> Iterator[tuple[str, object, bool, str, pd.DataFrame]]:
    """Yield axis, value, true for the study's own value, the split, and the variants' scores at the value."""
    for axis, scores in variants.groupby("axis", sort=False):
        own, split = scores.own.iloc[0], scores.split.iloc[0]
        for value in sorted({own, *scores.value}, key=_by_size):
            yield axis, value, value == own, split, scores[scores.value == value]


def _by_size(value: object) -> tuple[int, float, str]:
    """Return the key that sorts numbers by size, before words by name."""
    try:
        return 0, float(str(value)), ""
    except ValueError:
        return 1, 0.0, str(value)

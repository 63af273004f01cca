"""Intervals and tests: how sure a mean Dice is, and whether two means differ or are alike.

Two kinds of noise are told apart, and then taken together:

- between patients: another set of test patients would give another mean. Images of one patient are no
  independent evidence, so whole patients count.
- between training runs: another seed would give another network.

The two-way interval holds both: its squared standard error is the sum of those by patients and by seeds, and
Student's t has Satterthwaite's degrees of freedom. The noise of single runs on single patients is in both
terms, so the sum is a little too large rather than too small. A pigeonhole bootstrap (Owen 2007), which draws
patients and seeds anew, covers too rarely with three seeds: tests/test_statistics.py compares the two. With
one seed the interval is over patients alone.

References: variance components and their degrees of freedom: Satterthwaite 1946, Biometrics Bulletin 2(6);
Searle, Casella & McCulloch 1992, Variance Components, section 4.3. Bootstrap of crossed factors: Owen 2007,
Annals of Applied Statistics 1(2). Bootstrap of clusters: Davison & Hinkley 1997, section 3.8; the widened
percentile interval: Hesterberg 2015, The American Statistician 69(4). Holm 1979, Scandinavian Journal of
Statistics 6(2). Permutation by signs: Good 2005, Permutation, Parametric and Bootstrap Tests of Hypotheses,
section 3.2. Two one-sided tests of equivalence: Schuirmann 1987, Journal of Pharmacokinetics and
Biopharmaceutics 15(6). The effect size d_z: Cohen 1988, section 2.3.5.
"""

import itertools
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np
import pandas as pd
import scipy

Cell = tuple[str, str, str]  # arm, init, split

ALPHA = 0.05
#: Test patients below which there is no interval and no test.
MIN_PATIENTS = 20
TOO_FEW = "too few test patients to say"
#: Points of Dice: a third of the smallest difference that the paper reports (1.46).
EQUIVALENCE = 0.5
#: The numbers of a contrast, NaN where there is none.
CONTRAST = ("value", "low", "high", "p", "p_permutation", "p_two_way", "p_equivalence", "effect", "error",
            "df", "patient_low", "patient_high", "seed_low", "seed_high")  # fmt: skip


def bootstrap_mean(
    values: np.ndarray, patients: Iterable, *, level: float = 0.95, resamples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Return the interval of the mean of `values` when whole patients are drawn again.

    The percentile interval is too short for few clusters; it is widened to the level at which it has the
    t interval's width on normal data (Hesterberg 2015, the expanded percentile interval).

    Args:
        values: [n] one number an image.
        patients: [n] the patient of each image.
        level: how often the interval shall hold the true mean, 0..1.
        resamples: bootstrap draws, from `seed`.

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
    """Return Student's t interval of the mean over seeds; NaN, NaN for a single one."""
    values = np.asarray(list(values), dtype=float)
    if len(values) < 2:
        return np.nan, np.nan
    half = scipy.stats.t.ppf((1 + level) / 2, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values))
    return float(values.mean() - half), float(values.mean() + half)


def holm(p: Iterable[float]) -> np.ndarray:
    """Return p-values corrected for being a family (Holm 1979); NaN stays NaN and does not count."""
    p = np.asarray(list(p), dtype=float)
    corrected = np.full_like(p, np.nan)
    known = np.flatnonzero(~np.isnan(p))
    order = known[np.argsort(p[known], kind="stable")]
    corrected[order] = np.maximum.accumulate(p[order] * np.arange(len(order), 0, -1)).clip(max=1)
    return corrected


def sign_permutation(values: np.ndarray, *, resamples: int = 9999, seed: int = 0) -> float:
    """Return the two-sided p that the mean of paired differences is zero, by changing their signs at random.

    All 2^n signs for up to 13 differences, else `resamples` draws with the one observed counted in.

    Args:
        values: [n] one difference a patient.
        resamples: draws, from `seed`.
    """
    # SciPy's permutation_test gives the same at ten times the time, which the map's many points would feel.
    values = np.asarray(values, dtype=float)
    number = len(values)
    if number <= 13:
        signs = np.array(list(itertools.product((-1, 1), repeat=number)), dtype=float)
    else:
        signs = 1.0 - 2.0 * np.random.default_rng(seed).integers(0, 2, (resamples, number), dtype=np.int8)
    as_far = np.abs(signs @ values) >= abs(values.sum()) * (1 - 1e-12)
    return float(as_far.mean() if number <= 13 else (as_far.sum() + 1) / (resamples + 1))


class TwoWay(NamedTuple):
    """A mean with the noise of patients and of seeds.

    Attributes:
        value: the mean over images and seeds.
        error: its standard error, patients and seeds together; patients alone with one seed.
        df: degrees of freedom of its Student's t.
    """

    value: float
    error: float
    df: float

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """Return low and high; both are the value where there is no spread at all."""
        half = scipy.stats.t.ppf((1 + level) / 2, self.df) * self.error if self.error > 0 else 0.0
        return float(self.value - half), float(self.value + half)

    def p_different(self) -> float:
        """Return the two-sided p that the true mean is zero."""
        if not self.error > 0:
            return 1.0 if self.value == 0 else 0.0
        return float(2 * scipy.stats.t.sf(abs(self.value) / self.error, self.df))

    def p_equivalent(self, margin: float, to: float = 0.0) -> float:
        """Return the p of two one-sided tests: small where the true mean is within `margin` of `to`."""
        inside = margin - abs(self.value - to)
        if not self.error > 0:
            return 0.0 if inside > 0 else 1.0
        return float(scipy.stats.t.sf(inside / self.error, self.df))


def two_way(scores: np.ndarray, patients: Iterable) -> TwoWay:
    """Return a mean with the noise of patients and of seeds together.

    With r the images' means over seeds less the overall mean, R_p their sum over patient p's images, P
    patients, N images and S seeds:

        V_patients = P / (P - 1) * sum_p R_p^2 / N^2
        V_seeds    = (variance of the S seeds' means) / S

    Args:
        scores: [images, seeds], every image scored by every seed.
        patients: [images] the patient of each image.

    Returns:
        value, and error and df, which are NaN with fewer than two patients.
    """
    codes, seeds = pd.factorize(np.asarray(patients))[0], scores.shape[1]
    number, value = codes.max(initial=-1) + 1, float(scores.mean())
    if number < 2:
        return TwoWay(value, np.nan, np.nan)
    by_patients = _squared_error(scores.mean(axis=1), codes)
    by_seeds = scores.mean(axis=0).var(ddof=1) / seeds if seeds > 1 else 0.0
    return TwoWay(value, *joined(by_patients, number, by_seeds, seeds))


def _squared_error(values: np.ndarray, codes: np.ndarray) -> float:
    """Return V_patients of `two_way`: values are [images], codes [images] the patients as 0 to P - 1."""
    number = codes.max() + 1
    sums = np.bincount(codes, weights=values - values.mean())
    return float(number / (number - 1) * (sums**2).sum() / len(values) ** 2)


def with_seeds(scores: np.ndarray, patients: Iterable, seeds: int) -> TwoWay:
    """Estimate what `two_way` would find with another number of seeds, and the same patients.

    The seeds' part falls as 1 / S. Of the patients' part, what each seed has of its own does, too:

        I             = the mean over S seeds of V_patients of (a seed's scores less their mean over seeds)
                        * S / (S - 1)
        V_patients(n) = max(0, V_patients - I / S) + I / n

    Args:
        scores: [images, S >= 2].
        patients: [images], of two patients at least.
        seeds: n.
    """
    codes, known = pd.factorize(np.asarray(patients))[0], scores.shape[1]
    mean = scores.mean(axis=1)
    own = np.mean([_squared_error(one - mean, codes) for one in scores.T]) * known / (known - 1)
    by_patients = max(0.0, _squared_error(mean, codes) - own / known) + own / seeds
    by_seeds = scores.mean(axis=0).var(ddof=1) / seeds
    return TwoWay(float(mean.mean()), *joined(by_patients, codes.max() + 1, by_seeds, seeds))


def joined(by_patients: float, patients: int, by_seeds: float, seeds: int) -> tuple[float, float]:
    """Return the error of two squared standard errors together, and Satterthwaite's degrees of freedom."""
    total = by_patients + by_seeds
    spread = by_patients**2 / (patients - 1) + (by_seeds**2 / (seeds - 1) if seeds > 1 else 0.0)
    return float(np.sqrt(total)), float(total**2 / spread) if spread > 0 else np.inf


def paired_scores(per_image: pd.DataFrame, cells: Mapping[Cell, float]) -> tuple[pd.DataFrame, str]:
    """Return the weighted sum of cells' Dice in points by image and seed, and the reason if there is none.

    A standalone image's score is its mean over clients. Only images and seeds that every cell has are kept.

    Returns:
        [images, seeds] indexed by image_id and seed, and "" or the reason why it is empty.
    """
    total = 0
    for (arm, init, split), weight in cells.items():
        rows = per_image[(per_image.arm == arm) & (per_image.init == init) & (per_image.split == split)]
        if rows.dice.count() == 0:
            return pd.DataFrame(), f"{arm} {init} under {split} was not run"
        total = total + 100 * weight * rows.groupby(["image_id", "seed"]).dice.mean().unstack("seed")
    total = total.dropna(how="all", axis=1).dropna()
    return total, "the runs to be compared share no seed and test image" if total.empty else ""


def patients_of(per_image: pd.DataFrame, images: pd.Index) -> pd.Series:
    """Return the patient of each image."""
    return per_image.drop_duplicates("image_id").set_index("image_id").patient_id.reindex(images)


def contrast(per_image: pd.DataFrame, cells: Mapping[Cell, float]) -> dict[str, object]:
    """Return a weighted sum of cells' Dice, image by image on the same test images and seeds, and its noise.

    One cell with weight 1 is its mean; {fm: 1, random: -1} is their difference; four cells make the
    difference of two losses from IID to skew. With fewer than MIN_PATIENTS test patients the value stands
    alone: no interval, no test.

    Returns:
        value (points of Dice); low, high (95 %, seeds and patients together, see `two_way`; patients alone
        with one seed; never outside what Dice can be) with error and df; p and p_permutation (Wilcoxon
        signed-rank and permutation of signs on patients' means, against zero); p_two_way (against zero) and
        p_equivalence (within EQUIVALENCE points of zero, NaN with one seed) by the two-way error; effect
        (d_z: the patients' mean over their standard deviation); patient_low, patient_high (95 % bootstrap
        over patients alone); seed_low, seed_high (95 % t interval over seeds alone); images, patients,
        seeds; and missing: the reason if there is no value ("" if there is one).
    """
    result = dict.fromkeys(CONTRAST, np.nan) | {"images": 0, "patients": 0, "seeds": 0, "missing": ""}
    total, missing = paired_scores(per_image, cells)
    if missing:
        return result | {"missing": missing}
    patients = patients_of(per_image, total.index)
    by_image, by_seed = total.mean(axis=1), total.mean()
    by_patient = by_image.groupby(patients.to_numpy()).mean().to_numpy()
    result |= {"value": float(by_image.mean()), "images": len(by_image)}
    result |= {"patients": len(by_patient), "seeds": len(by_seed)}
    if len(by_patient) < MIN_PATIENTS:
        return result
    whole = two_way(total.to_numpy(), patients)
    over_patients, over_seeds = bootstrap_mean(by_image.to_numpy(), patients), seed_interval(by_seed)
    several = len(by_seed) > 1
    lowest = sum(min(0.0, 100 * weight) for weight in cells.values())
    highest = sum(max(0.0, 100 * weight) for weight in cells.values())
    low, high = np.clip(whole.interval() if several else over_patients, lowest, highest)
    spread = by_patient.std(ddof=1)
    return result | {
        "low": float(low),
        "high": float(high),
        "p": float(scipy.stats.wilcoxon(by_patient).pvalue) if np.any(by_patient) else 1.0,
        "p_permutation": sign_permutation(by_patient),
        "p_two_way": whole.p_different(),
        "p_equivalence": whole.p_equivalent(EQUIVALENCE) if several else np.nan,
        "effect": by_patient.mean() / spread if spread > 0 else np.nan,
        "error": whole.error,
        "df": whole.df,
        **dict(zip(("patient_low", "patient_high"), over_patients, strict=True)),
        **dict(zip(("seed_low", "seed_high"), over_seeds, strict=True)),
    }


def compare(per_image: pd.DataFrame, family: Mapping[object, Mapping[Cell, float]]) -> pd.DataFrame:
    """Return the contrasts of a family, corrected for being several. A contrast named twice counts once.

    Returns:
        A table indexed by the family's names: `contrast`'s columns, then `corrected`'s.
    """
    once: dict[frozenset, Mapping[Cell, float]] = {}
    for cells in family.values():
        once.setdefault(frozenset(cells.items()), cells)
    table = corrected(pd.DataFrame([contrast(per_image, cells) for cells in once.values()]))
    place = {key: number for number, key in enumerate(once)}
    rows = table.loc[[place[frozenset(cells.items())] for cells in family.values()]]
    return rows.set_axis(pd.Index(list(family), tupleize_cols=False))


def corrected(table: pd.DataFrame) -> pd.DataFrame:
    """Return a family of contrasts corrected by Holm's method, each with its reading.

    Args:
        table: one row a contrast, each once, with `contrast`'s columns.

    Returns:
        The same with p_holm, p_permutation_holm, p_two_way_holm, p_equivalence_holm; inside_noise; equivalent
        (within EQUIVALENCE points of zero, by two one-sided tests after the correction); and reading:
        "higher" | "lower" | "inside the noise", with ", one seed" where the noise between training runs is
        unknown; TOO_FEW; or "" where the contrast is missing.
    """
    table = table.copy()
    for name in ("p", "p_permutation", "p_two_way", "p_equivalence"):
        table[f"{name}_holm"] = holm(table[name])
    table["inside_noise"] = [_inside_noise(row) for row in table.itertuples()]
    table["equivalent"] = table.p_equivalence_holm < ALPHA
    table["reading"] = [_reading(row) for row in table.itertuples()]
    return table


def _inside_noise(row) -> bool:
    beyond_both = row.p_two_way_holm < ALPHA and (row.low > 0 or row.high < 0)
    beyond_chance = row.p_holm < ALPHA and row.p_permutation_holm < ALPHA
    return not (beyond_both and beyond_chance)


def _reading(row) -> str:
    if row.missing:
        return ""
    if row.patients < MIN_PATIENTS:
        return TOO_FEW
    if row.inside_noise:
        return "inside the noise"
    return ("higher" if row.value > 0 else "lower") + (", one seed" if row.seeds == 1 else "")

"""The statistics against made data whose answer is known."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from fmfl import analysis

ARMS = [("federated", "random"), ("federated", "pretraining"), ("federated", "fm")]


def scores(means, *, patients=60, images=3, seeds=3, taste=0.0, seed=0):
    """Scores by image in which a cell's true mean Dice is known, with images shared over cells and seeds.

    `means`: {(arm, init, split): Dice in %}. Patients and images are as hard for every cell, but for `taste`,
    the spread in points of how well a cell does on a patient.
    """
    rng = np.random.default_rng(seed)
    hard = np.repeat(rng.normal(0, 3, patients), images) + rng.normal(0, 2, patients * images)
    hard -= hard.mean()
    frames = []
    for (arm, init, split), mean in means.items():
        tastes = np.repeat(rng.normal(0, taste, patients), images)
        for run in range(seeds):
            dice = mean + hard + tastes + rng.normal(0, 0.5, len(hard))
            image_id = [f"image{i}" for i in range(len(hard))]
            patient_id = [f"patient{i // images}" for i in range(len(hard))]
            frame = pd.DataFrame({"image_id": image_id, "patient_id": patient_id, "dice": dice / 100})
            frames.append(frame.assign(arm=arm, init=init, split=split, seed=run, client=-1))
    return pd.concat(frames, ignore_index=True)


def curves(finals, *, rounds=8, seeds=3, start=None):
    """Results in which Dice climbs in equal steps from `start` to each cell's final Dice (in %)."""
    rows = []
    for (arm, init, split), mean in finals.items():
        first = (start or {}).get(init, 40)
        for seed in range(seeds):
            for number in range(rounds + 1):
                dice = (first + (mean - first) * number / rounds) / 100
                paid = 0 if init == "random" else 1000
                rows.append(
                    (
                        arm,
                        init,
                        split,
                        seed,
                        number,
                        dice,
                        number + paid,
                        10 * number,
                        20 * number,
                        5 * number + paid,
                    )
                )
    names = ["round", "dice", "seconds", "bytes_up", "bytes_down", "images_seen"]
    return pd.DataFrame(rows, columns=[*analysis.RUN, *names])


PAPER_CELLS = dict(analysis.PAPER)
PAPER_CELLS |= {("federated", "random", "iid"): 80.0, ("federated", "fm", "iid"): 86.0}
PAPER_CELLS |= {("federated", "pretraining", "iid"): 85.5, ("federated", "random", "quantity"): 70.0}
PAPER_CELLS |= {("federated", "fm", "quantity"): 85.0}


def test_final_takes_the_last_round_and_not_the_best():
    results = curves({("federated", "fm", "age"): 90}, seeds=2)
    results.loc[results["round"] == 3, "dice"] = 0.99

    last = analysis.final(results.sample(frac=1, random_state=0))  # the order of rows does not matter

    assert list(last["round"]) == [8, 8]
    assert list(last.seed) == [0, 1]
    assert np.allclose(last.dice, 0.90)


def test_rounds_and_cost_charge_the_start_with_its_making():
    results = curves(
        {("federated", "random", "age"): 80, ("federated", "fm", "age"): 80}, seeds=1, start={"fm": 75}
    )

    rounds = analysis.rounds_to_target(results, 0.75).set_index("init").rounds
    spent = analysis.cost(results, 0.75).set_index("init")

    assert rounds["fm"] == 0  # there before any round,
    assert spent.seconds["fm"] == 1000  # and not for nothing
    assert rounds["random"] == 7  # 40 + 5 * 7 = 75
    assert (spent.bytes["random"], spent.images_seen["random"]) == (7 * 30, 35)
    assert analysis.cost(results, 0.9)[["rounds", "seconds", "bytes"]].isna().all(axis=None)
    assert analysis.rounds_to_target(results, 0.9).rounds.isna().all()


def test_loss_from_iid_to_skew_is_paired_by_seed():
    results = curves({("federated", "fm", "iid"): 90, ("federated", "fm", "age"): 88}, seeds=3)
    results["dice"] += 0.05 * results.seed  # seeds differ much, but alike under both splits

    (row,) = analysis.iid_to_skew_loss(results).itertuples()

    assert (row.init, row.split, row.seeds) == ("fm", "age", 3)
    assert row.loss == pytest.approx(2)
    assert row.high - row.low == pytest.approx(0, abs=1e-9)
    assert analysis.iid_to_skew_loss(results[results.split == "age"]).empty


@pytest.mark.parametrize("images_of", [lambda rng: np.full(25, 4), lambda rng: rng.integers(1, 9, 25)])
def test_bootstrap_interval_covers_at_its_rate(images_of):
    """500 simulated studies, a patient's images alike; 3 standard errors of the rate are 2.9 %."""
    rng = np.random.default_rng(0)
    covered = 0
    for study in range(500):
        counts = images_of(rng)
        patients = np.repeat(np.arange(25), counts)
        values = 2 + rng.normal(0, 1, 25)[patients] + rng.normal(0, 0.3, len(patients))
        low, high = analysis.bootstrap_mean(values, patients, resamples=500, seed=study)
        covered += low <= 2 <= high
    assert 0.921 <= covered / 500 <= 0.979


def test_bootstrap_draws_patients_and_not_images():
    """With identical images a patient's copies add no evidence: the interval is that of one image each."""
    values = np.random.default_rng(0).normal(0, 1, 30)
    once = analysis.bootstrap_mean(values, range(30))
    copied = analysis.bootstrap_mean(np.repeat(values, 5), np.repeat(np.arange(30), 5))
    assert copied == pytest.approx(once)
    assert np.diff(once) == pytest.approx(
        2 * stats.t.ppf(0.975, 29) * values.std(ddof=1) / np.sqrt(30), rel=0.1
    )
    assert analysis.bootstrap_mean(values, range(30)) == once  # the same draws for the same seed
    assert analysis.bootstrap_mean(values, range(30), seed=1) != once
    assert np.isnan(analysis.bootstrap_mean(values, ["one patient"] * 30)).all()


def test_seed_interval_is_students():
    values = [1.0, 2.0, 4.0]
    expected = stats.t.interval(0.95, 2, loc=np.mean(values), scale=stats.sem(values))
    assert analysis.seed_interval(values) == pytest.approx(expected)
    assert np.isnan(analysis.seed_interval([1.0])).all()


def test_holm_by_hand():
    """Sorted .01 .02 .03 .04 times 4 3 2 1 is .04 .06 .06 .04, and no p falls below one before it."""
    corrected = analysis.holm([0.04, 0.01, np.nan, 0.03, 0.02])
    np.testing.assert_allclose(corrected, [0.06, 0.04, np.nan, 0.06, 0.06])
    np.testing.assert_allclose(analysis.holm([0.6, 0.7]), [1, 1])


@pytest.mark.parametrize("number", [4, 10, 40])
def test_permutation_of_signs_is_scipys(number):
    """Exact for few patients; with many, both draw, so they agree within the draws' own noise."""
    values = np.random.default_rng(number).normal(0.4, 1, number)
    reference = stats.permutation_test(
        (values,), np.mean, permutation_type="samples", n_resamples=9999, rng=np.random.default_rng(1)
    ).pvalue
    tolerance = 1e-12 if number <= 10 else 4 * np.sqrt(reference * (1 - reference) / 9999) * np.sqrt(2)
    assert analysis.sign_permutation(values) == pytest.approx(reference, abs=tolerance)
    assert analysis.sign_permutation(-values) == analysis.sign_permutation(values)
    assert analysis.sign_permutation(np.zeros(number)) == 1


def test_permutation_of_signs_keeps_its_level():
    """500 samples without an effect: below 5 % as often as 5 %, within 3 standard errors."""
    rng = np.random.default_rng(0)
    below = [analysis.sign_permutation(rng.normal(0, 1, 20), resamples=999) < 0.05 for _ in range(500)]
    assert abs(np.mean(below) - 0.05) <= 3 * np.sqrt(0.05 * 0.95 / 500)


def test_effect_is_the_mean_over_the_deviation_of_patients():
    cells = {("federated", "random", "age"): 80.0, ("federated", "fm", "age"): 82.0}
    per_image = scores(cells, taste=2.0)
    found = analysis.contrast(per_image, dict(zip(cells, [-1, 1], strict=True)))
    by_cell = 100 * per_image.groupby(["init", "patient_id"]).dice.mean().unstack("init")
    difference = by_cell.fm - by_cell.random
    assert found["effect"] == pytest.approx(difference.mean() / difference.std())


def test_contrast_finds_the_known_difference_whatever_the_images_hardness():
    cells = {("federated", "random", "age"): 80.0, ("federated", "fm", "age"): 82.0}
    per_image = scores(cells)

    mean = analysis.contrast(per_image, {("federated", "fm", "age"): 1})
    difference = analysis.contrast(per_image, dict(zip(cells, [-1, 1], strict=True)))

    assert mean["value"] == pytest.approx(82, abs=0.1)
    assert difference["low"] < 2 < difference["high"]
    assert difference["high"] - difference["low"] < 0.2 * (mean["high"] - mean["low"])  # pairing pays
    assert (difference["images"], difference["patients"], difference["seeds"]) == (180, 60, 3)
    assert difference["p"] < 1e-9


def test_contrast_uses_only_what_the_cells_share():
    cells = {("federated", "random", "age"): 80.0, ("federated", "fm", "age"): 82.0}
    per_image = scores(cells)
    extra = (per_image.init == "fm") & ((per_image.seed == 2) | (per_image.image_id == "image0"))
    per_image.loc[extra, "dice"] = 0.0
    per_image = per_image[
        ~((per_image.init == "random") & ((per_image.seed == 2) | (per_image.image_id == "image0")))
    ]

    shared = analysis.contrast(per_image, dict(zip(cells, [-1, 1], strict=True)))

    assert (shared["images"], shared["seeds"]) == (179, 2)
    assert shared["value"] == pytest.approx(2, abs=0.1)
    apart = per_image[(per_image.init == "fm") == (per_image.seed == 1)]
    assert "share no seed" in analysis.contrast(apart, dict(zip(cells, [-1, 1], strict=True)))["missing"]


def test_standalone_score_is_the_mean_over_clients():
    cell = ("standalone", "random", "age")
    clients = [scores({cell: mean}).assign(client=k) for k, mean in enumerate((60, 63, 72))]
    result = analysis.contrast(pd.concat(clients), {cell: 1})
    assert result["value"] == pytest.approx(65, abs=0.1)
    assert result["images"] == 180


def test_false_positive_rate_of_the_reading_stays_below_five_percent():
    """500 studies without a true difference, a patient's images alike: 5 % plus 3 standard errors."""
    equal = {("federated", "fm", "age"): 80.0, ("federated", "random", "age"): 80.0}
    called = []
    for study in range(500):
        per_image = scores(equal, patients=20, seeds=1, taste=2.0, seed=study)
        row = analysis.paired_differences(per_image, pairs=[("fm", "random")], resamples=500, seed=study)
        called.append(row.reading[0] != "inside the noise")
    assert 0 < np.mean(called) <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / 500)


def test_paired_differences_reads_each_pair_and_corrects_over_the_table():
    cells = {("federated", "random", "age"): 80.0, ("federated", "pretraining", "age"): 84.0}
    cells |= {
        ("federated", "fm", "age"): 84.0,
        ("federated", "fm", "iid"): 85.0,
        ("federated", "random", "iid"): 86.0,
    }
    table = analysis.paired_differences(scores(cells, seed=1)).set_index(["split", "higher", "lower"])

    assert table.reading["age", "fm", "random"] == "higher"
    assert table.reading["age", "fm", "pretraining"] == "inside the noise"
    assert table.reading["iid", "fm", "random"] == "lower"
    assert ("iid", "fm", "pretraining") not in table.index  # not run
    np.testing.assert_allclose(table.p_holm, analysis.holm(table.p))
    assert analysis.paired_differences(scores({("centralised", "random", "pooled"): 9.0})).empty


def test_one_small_p_among_several_comparisons_is_inside_the_noise():
    """Ranks 5 and 6 of 12 against the rest give Wilcoxon's p = 0.027: enough alone, not as one of five."""
    ranks = np.arange(1, 13) * np.where(np.isin(np.arange(1, 13), [5, 6]), -1, 1)
    cells = {init: ("federated", init, "age") for init in ("random", "fm", "a", "b", "c", "d")}
    names = {"image_id": [f"i{k}" for k in range(12)], "patient_id": [f"p{k}" for k in range(12)]}
    frames = [
        pd.DataFrame(names | {"arm": arm, "init": i, "split": split}) for arm, i, split in cells.values()
    ]
    per_image = pd.concat(frames, ignore_index=True).assign(seed=0, dice=0.8)
    per_image.loc[per_image.init == "fm", "dice"] += ranks / 100
    real = {"fm": {cells["fm"]: 1, cells["random"]: -1}}
    nothing = {init: {cells[init]: 1, cells["random"]: -1} for init in "abcd"}

    alone = analysis.compare(per_image, real)
    together = analysis.compare(per_image, real | nothing)

    assert alone.p["fm"] == pytest.approx(stats.wilcoxon(ranks).pvalue) == pytest.approx(0.027, abs=1e-3)
    assert alone.reading["fm"] == "higher, one seed"
    assert together.p_holm["fm"] == pytest.approx(5 * alone.p["fm"])
    assert together.low["fm"] > 0
    assert set(together.reading) == {"inside the noise"}


def test_seeds_that_disagree_put_a_difference_inside_the_noise():
    """All test images agree on +2 points, but the seeds say -2, 2 and 6."""
    per_image = scores({("federated", "random", "age"): 80.0, ("federated", "fm", "age"): 82.0})
    fm = per_image.init == "fm"
    per_image.loc[fm, "dice"] += 0.04 * (per_image.seed[fm] - 1)

    row = analysis.paired_differences(per_image).iloc[0]
    assert row.low > 0
    assert row.p_holm < 0.05
    assert row.seed_low < 0
    assert row.reading == "inside the noise"
    one = analysis.paired_differences(per_image[per_image.seed == 1]).iloc[0]
    assert one.reading == "higher, one seed"


def test_table1_and_the_gap_closed_are_the_papers_on_the_papers_numbers():
    table = analysis.table1(curves(PAPER_CELLS), scores(PAPER_CELLS)).set_index("init")

    assert list(table.index) == ["random", "pretraining", "fm"]
    assert table.federated.to_list() == pytest.approx([74.67, 83.92, 85.38], abs=0.1)
    assert table.centralised["random"] == pytest.approx(89.41, abs=0.1)
    assert table.standalone["random"] == pytest.approx(67.20, abs=0.1)
    assert np.isnan(table.centralised["fm"])
    assert (table.federated_low < table.federated).all()
    assert (table.federated < table.federated_high).all()
    assert (table.federated_images["fm"], table.federated_seeds["fm"]) == (180, 3)
    closed = analysis.gap_closed(table.reset_index()).set_index("init").gap_closed
    assert closed.round(2).to_dict() == {"pretraining": 0.63, "fm": 0.73}


def test_table1_of_another_split_says_so_and_a_closed_gap_has_no_share():
    cells = {("federated", "random", "quantity"): 90.0, ("centralised", "random", "pooled"): 89.0}
    cells |= {("federated", "fm", "quantity"): 91.0}
    table = analysis.table1(curves(cells), scores(cells))
    assert set(table.split) == {"quantity"}
    closed = analysis.gap_closed(table).set_index("init")
    assert closed.gap_closed.isna().all()
    assert "no better" in closed.why["fm"]
    assert closed.why["pretraining"] == "an arm is missing"


def test_table1_without_scores_by_image_keeps_the_mean():
    cells = {("federated", "fm", "age"): 85.0}
    row = analysis.table1(curves(cells), scores(cells).iloc[:0]).set_index("init").loc["fm"]
    assert row.federated == pytest.approx(85)
    assert np.isnan(row.federated_low)
    assert (row.federated_images, row.federated_seeds) == (0, 3)


def number(low, high, *, seeds=3, order="higher", seed_low=None, seed_high=None):
    seed_low, seed_high = (low, high) if seed_low is None and seeds > 1 else (seed_low, seed_high)
    nan = float("nan")
    return analysis.judge_number(
        80.0,
        low,
        high,
        seed_low=nan if seed_low is None else seed_low,
        seed_high=nan if seed_high is None else seed_high,
        seeds=seeds,
        order=order,
    )[0]


def test_verdict_on_a_number():
    assert number(79, 81) == "reproduced"
    assert number(78.0, 82.0) == "reproduced"
    assert number(79, 81, seeds=1) == "direction only"
    assert number(79, 81, seed_low=75, seed_high=85) == "not testable here"  # the seeds' noise counts too
    assert number(70, 90) == "not testable here"
    assert number(90, 92) == "direction only"
    assert number(90, 92, order="higher, one seed") == "direction only"
    assert number(90, 92, order="inside the noise") == "not reproduced"
    assert number(90, 92, order="lower") == "not reproduced"
    assert number(90, 92, order="") == "not reproduced"
    assert number(float("nan"), float("nan"), seeds=0) == "not testable here"
    assert number(float("nan"), float("nan"), seeds=1) == "not testable here"  # a single patient


def difference(value, low, high, *, seeds=3, inside_noise=False, missing="", paper=None):
    row = {
        "value": value,
        "low": low,
        "high": high,
        "seeds": seeds,
        "inside_noise": inside_noise,
        "missing": missing,
    }
    return analysis.judge_difference(row, paper)


def test_verdict_on_a_difference():
    assert difference(2, 1, 3)[0] == "reproduced"
    assert difference(2, 1, 3, paper=3)[0] == "reproduced"
    assert difference(2, 1, 3, paper=10) == (
        "direction only",
        "outside the noise, but 20% of the paper's size",
    )
    assert difference(2, 1, 3, seeds=1)[0] == "direction only"
    assert difference(2, 1, 3, inside_noise=True)[0] == "direction only"
    assert difference(1, -1, 3, inside_noise=True) == ("not reproduced", "inside the noise")
    assert difference(1, -1, 3, inside_noise=True, paper=2)[0] == "not testable here"
    assert difference(-1, -3, 1, inside_noise=True, paper=2)[0] == "not reproduced"
    assert difference(-2, -3, -1)[1] == "it points the other way"
    assert difference(0, 0, 0, inside_noise=True) == ("not reproduced", "no difference")
    nan = float("nan")
    assert difference(nan, nan, nan, seeds=0, missing="fm was not run") == (
        "not testable here",
        "fm was not run",
    )


def ledger(finals, **options):
    rounds = {key: options.pop(key) for key in ("rounds", "start") if key in options}
    results = curves(finals, seeds=options.get("seeds", 3), **rounds)
    return analysis.claims(results, scores(finals, **options)).set_index("claim")


def test_ledger_on_the_papers_own_numbers_reproduces_the_paper():
    table = ledger(PAPER_CELLS, rounds=100, start={"fm": 85.0, "pretraining": 83.0, "random": 20.0}, seed=3)
    assert table.verdict.to_dict() == dict.fromkeys(table.index, "reproduced")
    assert len(table) == 5 + 9 + 5
    assert list(table.paper[:5]) == ["74.67", "83.92", "85.38", "89.41", "67.20"]
    assert table.paper["Claims 1 and 2, points of final Dice: fm above pretraining"] == "+1.46"
    assert table.paper["Fig. 3: rounds until fm is within 1 point of its last Dice"] == "< 40"


def test_ledger_says_reproduced_nowhere_when_all_starts_are_equal():
    table = ledger(
        dict.fromkeys(PAPER_CELLS, 93.0), start={"fm": 50, "pretraining": 50, "random": 50}, seed=2
    )
    assert "reproduced" not in set(table.verdict)
    assert set(table.verdict) == {"not reproduced", "not testable here"}


def test_ledger_with_one_seed_never_says_reproduced():
    table = ledger(PAPER_CELLS, rounds=100, start={"fm": 85.0, "pretraining": 83.0, "random": 20.0}, seeds=1)
    assert set(table.verdict) == {"direction only"}


def test_ledger_of_a_partial_study_names_what_is_missing():
    table = ledger({("federated", "random", "age"): 74.67, ("federated", "fm", "age"): 85.38})

    why = table.why[table.verdict == "not testable here"]
    assert (
        why["Table 1, Dice in %: centralised, random start"] == "centralised random under pooled was not run"
    )
    assert why["Claims 1 and 2, points of final Dice: fm above pretraining"].startswith(
        "federated pretraining"
    )
    assert "8 rounds" in why["Fig. 3: rounds until fm is within 1 point of its last Dice"]
    assert table.verdict["Claim 1, points of final Dice: fm above random"] == "reproduced"
    assert (why != "").all()

    other = ledger({("federated", "random", "iid"): 80.0})
    assert set(other.verdict) == {"not testable here"}


def test_rounds_saved_are_counted_from_the_random_starts_own_end():
    """Random climbs 40, 45, ... 80 in 8 rounds; fm climbs 60, 65, ... 100, or stays below 80."""
    cells = {("federated", "random", "age"): 80.0, ("federated", "fm", "age"): 100.0}
    faster = ledger(cells, start={"fm": 60}).loc[analysis.ROUNDS_SAVED]
    assert (faster.ours, faster.verdict) == (4, "reproduced")  # 60 + 5 * 4 = 80
    never = ledger(cells | {("federated", "fm", "age"): 79.0}).loc[analysis.ROUNDS_SAVED]
    assert (never.ours, never.verdict) == (-1, "not reproduced")  # later than the last round


# How soon, who fares worst, where it pays


def test_speed_counts_seeds_that_get_there_and_the_height_of_the_curve():
    """From 40 to 80 and to 88 % in 8 equal steps: 60 % is reached at half and at a third of the way up."""
    results = curves({("federated", "random", "age"): 80, ("federated", "fm", "age"): 88})
    late = (results.init == "random") & (results.seed == 2)
    results.loc[late, "dice"] = 0.4
    found = analysis.speed(results, 0.6).set_index("init")
    assert found.reached.to_dict() == {"random": 2, "fm": 3} and (found.seeds == 3).all()
    assert found.rounds.to_dict() == {"random": 4, "fm": 4}
    assert np.isnan(found.rounds_low["random"]) and found.rounds_low["fm"] == 4
    assert found.bytes["fm"] == 4 * 30 and found.seconds["fm"] == 1004
    assert found.curve["fm"] == pytest.approx((40 + 88) / 2)
    assert found.curve["random"] == pytest.approx((60 + 60 + 40) / 3)


def test_the_weakest_are_found_by_hand():
    """Four images: a child at each of two sites, an adult, and one of unknown age."""
    rows = pd.DataFrame(
        {
            "image_id": list("abcd"),
            "patient_id": list("abcd"),
            "site": ["x", "y", "y", "x"],
            "age": [3.0, 4.0, 50.0, np.nan],
            "dice": [0.9, 0.7, 0.6, 0.95],
            "hd95": [1.0, 2.0, 3.0, 4.0],
        }
    ).assign(arm="federated", init="fm", split="age", seed=0, client=-1)
    mixtures = pd.DataFrame(
        [("age", 0, 0, "x", "0-5", 30), ("age", 0, 1, "y", "0-5", 30), ("age", 0, 1, "y", "50-59", 10)],
        columns=["split", "seed", "client", "site", "band", "images"],
    )
    (found,) = analysis.weakest(rows, mixtures).to_dict("records")
    assert found["dice"] == pytest.approx(78.75) and found["worst_tenth"] == pytest.approx(60)
    assert found["failures"] == 50 and found["hd95"] == 2.5 and "assd" not in found
    assert (found["worst_band"], found["worst_band_dice"]) == ("50-59", pytest.approx(60))
    assert found["worst_client_dice"] == pytest.approx((70 * 30 + 60 * 10) / 40)
    assert np.isnan(analysis.weakest(rows)["worst_client_dice"][0])


def test_the_gap_has_an_interval_and_none_where_there_is_no_gap():
    paper = {cell: mean for cell, mean in analysis.PAPER.items() if cell != analysis.STANDALONE}
    per_image = scores(paper)
    for init, share in (("fm", 0.727), ("pretraining", 0.628)):
        found = analysis.gap_interval(per_image, init, "age")
        assert found["gap_closed"] == pytest.approx(share, abs=0.02) and found["why"] == ""
        assert share - 0.05 < found["low"] < found["gap_closed"] < found["high"] < share + 0.05
    level = scores(dict.fromkeys(paper, 90.0), taste=2.0)
    found = analysis.gap_interval(level, "fm", "age")
    assert np.isnan(found["gap_closed"]) and "outside the noise" in found["why"]
    assert "was not run" in analysis.gap_interval(per_image, "imagenet", "age")["why"]


def test_the_map_takes_from_the_study_what_an_axis_cannot_change():
    """With fewer labels pre-training loses and the teacher's student does not; random is the study's own."""
    base = scores(
        {("federated", init, "age"): mean for init, mean in zip(analysis.INITS, (80, 88, 88), strict=True)}
    )
    few = {"10": 82, "100": 86}
    variants = pd.concat(
        [
            scores(
                {("federated", "pretraining", "age"): mean, ("federated", "fm", "age"): 88}, seed=0
            ).assign(axis="labelled", value=value, own="all")
            for value, mean in few.items()
        ]
    )
    found = analysis.gains(base, variants).set_index(["value", "lower"])
    assert list(dict.fromkeys(found.index.get_level_values("value"))) == ["10", "100", "all"]
    assert (found.higher == "fm").all() and (found.axis == "labelled").all()
    expected = {"10": (8, 6), "100": (8, 2), "all": (8, 0)}
    for value, (over_random, over_pretraining) in expected.items():
        assert found.gain[value, "random"] == pytest.approx(over_random, abs=0.2)
        assert found.gain[value, "pretraining"] == pytest.approx(over_pretraining, abs=0.2)
    assert found.reading["10", "pretraining"] == "higher"
    assert found.inside_noise["all", "pretraining"]
    levels = analysis.variant_scores(base, variants).set_index(["value", "init"]).dice
    assert levels["10", "pretraining"] == pytest.approx(82, abs=0.2)
    assert ("10", "random") not in levels and levels["all", "random"] == pytest.approx(80, abs=0.2)
    assert analysis.gains(base, variants.head(0)).empty
    without = [table[table.init != "pretraining"] for table in (base, variants)]
    assert set(analysis.gains(*without).lower) == {"random"}  # what was run nowhere has no row
    assert analysis.gains(*[table[table.init == "fm"] for table in without]).empty

"""The sentences of the headline say no more than the tables."""

import math

import numpy as np
import pandas as pd
import pytest

from fmfl.analysis import claims, statistics, tables, words


def said(*, gain=3.0, spread=0.3, seeds=3, patients=40, start=(0.5, 0.7), then=(0.95, 0.95), level=90):
    """The headline of two rounds: fm ends `gain` points above the others, which end at `level`."""
    rng = np.random.default_rng(0)
    hard = rng.normal(0, 1, patients)
    runs, scores = [], []
    for init in tables.PAPER_INITS:
        for seed in range(seeds):
            dice = (level + gain * (init == "fm") + hard + rng.normal(0, spread, patients)) / 100
            base = {"arm": "federated", "init": init, "split": "age", "seed": seed}
            names = {"image_id": [f"i{k}" for k in range(patients)], "patient_id": range(patients)}
            scores.append(pd.DataFrame(names | {"dice": dice}).assign(**base, client=-1))
            for number, value in enumerate((start[init == "fm"], then[init == "fm"], dice.mean())):
                paid = 0 if init == "random" else 1000
                spent = {"seconds": 1.0, "bytes_up": 0, "bytes_down": 0, "images_seen": 10 * number + paid}
                runs.append(base | {"round": number, "dice": value} | spent)
    results, per_image = pd.DataFrame(runs), pd.concat(scores)
    found = tables.paired_differences(per_image), claims.ledger(results, per_image)
    return " ".join(words.headline(results, *found))


def test_a_difference_under_one_point_has_two_decimals_and_its_sign():
    text = said(gain=-0.05, spread=0.02)
    assert "−0.05 points (95 % interval over seeds and patients −0.0" in text or "−0.06 points" in text
    assert "0.1 points" not in text


def test_equivalence_is_said_only_where_it_was_tested_for():
    assert "equivalent within 0.5 points (two one-sided tests)" in said(gain=0.0, spread=0.3)
    noisy = said(gain=0.0, spread=6.0)
    assert "is inside the noise" in noisy and "equivalent" not in noisy
    assert "no difference" not in noisy


def test_few_patients_have_a_difference_and_no_judgement():
    text = said(gain=60.0, patients=7)
    assert "Its difference from a random start is +60" in text
    assert "on 7 test patients: too few test patients to say" in text
    assert "interval" not in text and "above" not in text and "inside the noise" not in text
    assert "Of 16 differences whose sign it gives: 16 not testable here." in text


def test_one_seed_is_called_that():
    text = said(seeds=1)
    assert "(one seed)" in text and "the noise between runs is unknown" in text
    assert "95 % interval over patients" in text and "over seeds" not in text
    assert "All seeds share" not in text


def test_all_seeds_share_one_draw_of_images_and_the_page_says_so():
    assert "All seeds share one draw of proxy, test and client images." in said()


def test_rounds_come_with_the_images_that_they_and_the_start_took():
    text = said(start=(0.5, 0.92))
    assert (
        "To a Dice of 90 % it needs 0 rounds and 1,000 training images, those of its making included" in text
    )
    assert "the random start needs 1.0 rounds and 10 images" in text
    never = said(start=(0.5, 0.92), then=(0.6, 0.95), level=80, gain=15.0)
    assert "the random start needs at least 2.0 rounds and at least 20 images" in never
    assert "To a Dice" not in said(then=(0.6, 0.6), level=80)  # the student does not come there


def test_numbers_and_directions_are_counted_apart():
    text = said()
    assert "Of 7 numbers of the paper: " in text and "Of 16 differences whose sign it gives: " in text


@pytest.mark.parametrize(
    ("reading", "p", "equivalent", "text"),
    [
        ("higher", (0.001, 0.001, 0.001), False, "higher"),
        ("higher", (0.001, 0.001, 0.001), True, "higher; equivalent within 0.5"),
        ("inside the noise", (0.3, 0.01, 0.01), False, "inside the noise"),
        ("inside the noise", (0.01, 0.02, 0.04), False, "inside the noise after correction"),
        ("inside the noise", (0.01, 0.02, math.nan), False, "inside the noise"),
        ("inside the noise", (0.9, 0.9, 0.9), True, "inside the noise; equivalent within 0.5"),
        (statistics.TOO_FEW, (math.nan,) * 3, False, statistics.TOO_FEW),
        ("", (math.nan,) * 3, False, ""),
    ],
)
def test_a_reading_tells_the_correction_and_the_equivalence(reading, p, equivalent, text):
    row = dict(zip(("p", "p_permutation", "p_two_way"), p, strict=True))
    assert words.reading(row | {"reading": reading, "equivalent": equivalent}) == text

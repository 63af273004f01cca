"""Checks of part 6, read the ledger critically: a fair difference, faulty comparisons, and sentences."""

from collections.abc import Callable

import pandas as pd

from fmfl.course import starts
from fmfl.course.answers import Mistake, NotYet, asked, judge, labels

FAULTS = {
    "fair": "same split, same round, all seeds, federated",
    "best round": "a round is chosen by the test score",
    "seeds chosen": "not all seeds, or not the same ones",
    "two splits": "the two starts are taken from different splits",
    "two rounds": "the two starts are scored after different rounds",
    "two arms": "one is federated and the other is not",
}

WORDS = {
    "holds": "the sentence says what the table says",
    "noise": "a difference inside the noise is read as one",
    "no evidence": "no evidence of a difference is read as evidence of none",
    "cost left out": "what it took to make the start is not counted",
    "too wide": "the interval is said to cover what it does not cover",
    "a limit": "the end of the run is read as a result",
    "many tests": "the correction for several tests is left out",
    "no test": "what was to be tested did not take place",
}

SENTENCES = {
    "1": "Under age skew the teacher's student ends 1.00 points above a random start (0.69 to 1.32).",
    "2": "The teacher's student is worse than pre-training: it ends at 93.94 %, pre-training at 94.00 %.",
    "3": "With a teacher's student one needs no round at all to a Dice of 90 %, so it is the cheapest start.",
    "4": "Whatever patients one had drawn for proxy, test and clients, the difference would lie between "
    "0.69 and 1.32.",
    "5": "The random start needs 10 rounds to a Dice of 94 %.",
    "6": "Federated training is above standalone training: the interval 0.30 to 0.99 excludes zero.",
    "7": "The teacher's student does not protect against age skew: the interval -0.43 to 0.52 holds zero.",
    "8": "IID, fm and pretraining: p is 0.49, so the two starts are equal.",
}

MEANT = {
    "1": "holds", "2": "noise", "3": "cost left out", "4": "too wide",
    "5": "a limit", "6": "many tests", "7": "no test", "8": "no evidence",
}  # fmt: skip

LOOK = {
    "1": "a sound sentence doubted: Look at the first row of `differences`: value, interval, and p after "
    "the correction.",
    "2": "noise read as a difference: Look at its row in `differences`: where does the interval of -0.05 "
    "lie?",
    "3": "the cost of the start left out: Look at `images_seen` in `speed`: the start has been trained "
    "before round 1.",
    "4": "an interval asked for too much: docs/verdicts.md says what an interval covers. All seeds share "
    "one draw of proxy, test and client images (`holdout_seed`): another draw is covered by none.",
    "5": "a limit read as a result: Look at `reached` and `capped` in `speed`. Had any seed got there "
    "when the run ended?",
    "6": "the correction ignored: Read `why` in that row of `claims`: what does it say about several tests?",
    "7": "a check of the manipulation ignored: Read `why` in that row of `claims`: did the random start "
    "itself lose by the skew? If not, there was nothing to protect against.",
    "8": "no evidence read as evidence: A large p never shows that two are equal. What shows it are two "
    "one-sided tests (`equivalent`): the sentence may be true, but not for this reason.",
}


def last_round(results: pd.DataFrame, **where: str) -> pd.Series:
    """Return the last round's Dice of one arm, start and split in per cent, by seed."""
    rows = results[(results[list(where)] == pd.Series(where)).all(axis=1)]
    return 100 * rows[rows["round"] == rows["round"].max()].set_index("seed").dice


def _all_rounds(results: pd.DataFrame, init: str) -> pd.DataFrame:
    rows = results[(results.arm == "federated") & (results.split == "age") & (results.init == init)]
    return 100 * rows.pivot(index="round", columns="seed", values="dice")


def comparisons(results: pd.DataFrame) -> dict[str, tuple[str, float]]:
    """Return six comparisons of fm and random under age skew: how each is made, and its points."""
    fm, random = _all_rounds(results, "fm"), _all_rounds(results, "random")
    fm_iid = last_round(results, arm="federated", split="iid", init="fm")
    alone = last_round(results, arm="standalone", split="age", init="random")
    made = {
        "A": ("each run's highest Dice, fm less random", fm.max().mean() - random.max().mean()),
        "B": (
            "after round 10, fm less random, mean of seeds 0, 1, 2",
            (fm.iloc[-1] - random.iloc[-1]).mean(),
        ),
        "C": (
            "after round 10, the best fm run less the worst random run",
            fm.iloc[-1].max() - random.iloc[-1].min(),
        ),
        "D": (
            "after round 10, fm under IID less random under age skew",
            fm_iid.mean() - random.iloc[-1].mean(),
        ),
        "E": ("fm after round 10 less random after round 3", fm.iloc[-1].mean() - random.loc[3].mean()),
        "F": ("after round 10, fm federated less random standalone", fm.iloc[-1].mean() - alone.mean()),
    }
    return {name: (how, float(points)) for name, (how, points) in made.items()}


PLANTED = {
    "A": "best round", "B": "fair", "C": "seeds chosen", "D": "two splits", "E": "two rounds", "F": "two "
    "arms",
}  # fmt: skip

WHY = {
    "A": "a round chosen by the test score: Who knows in which round a run is highest? The test set "
    "selects nothing. That the number is the same as another one's is luck: every run here is highest in "
    "its last round.",
    "B": "a fair comparison doubted: Same split, same round, same arm, all three seeds: what would you "
    "object to?",
    "C": "runs chosen by their outcome: The best of one and the worst of the other: how many seeds are left?",
    "D": "two things changed at once: The starts differ, and so do the splits.",
    "E": "different amounts of training: How many rounds has each had?",
    "F": "two arms compared as if they were two starts: The starts differ, and so do the arms.",
}


def _falling(results: pd.DataFrame) -> pd.DataFrame:
    """Return other results, in which two runs fall in the last round: the best round is not the last."""
    results = results.sample(frac=1, random_state=0).reset_index(drop=True)
    last = (results["round"] == results["round"].max()) & (results.arm == "federated")
    results.loc[last & (results.init == "fm") & (results.seed == 1), "dice"] -= 0.05
    results.loc[last & (results.init == "random") & (results.seed == 2), "dice"] -= 0.02
    return results


def _difference(results: pd.DataFrame) -> float:
    """Return fm less random in points, as the mean over whatever rows there are."""
    ends = 100 * results.groupby("init").dice.mean()
    return float(ends["fm"] - ends["random"])


def difference_mistakes(results: pd.DataFrame) -> list[Mistake]:
    """Return what typical mistakes make of the difference between fm and random."""
    fm, random = _all_rounds(results, "fm"), _all_rounds(results, "random")
    right = float((fm.iloc[-1] - random.iloc[-1]).mean())
    last = results[results["round"] == results["round"].max()]
    splits, arms = _difference(last[last.arm == "federated"]), _difference(last[last.split == "age"])
    other = "Keep only arm `federated` and split `age`."
    return [
        Mistake("the sign is turned", -right, "Take fm less random."),
        Mistake(
            "a fraction instead of points", right / 100, "A point is a hundredth of Dice: multiply by 100."
        ),
        Mistake(
            "the best round",
            float(fm.max().mean() - random.max().mean()),
            "The highest Dice of each run is chosen by the test set. Take the last round.",
        ),
        Mistake(
            "all rounds averaged",
            float(fm.mean().mean() - random.mean().mean()),
            "This is the mean over all rounds, the start included. Take the last round.",
        ),
        Mistake("all splits together", splits, f"This mixes three splits. {other}"),
        Mistake("all arms together", arms, f"Standalone training has a random start too. {other}"),
        Mistake("all arms together", _difference(last), f"This mixes three arms and splits. {other}"),
        *(
            Mistake(
                "one seed",
                float(fm.iloc[-1][seed] - random.iloc[-1][seed]),
                f"This is seed {seed} alone. Take the mean over the three seeds.",
            )
            for seed in fm.columns
        ),
    ]


def check_fair_difference(fair_difference: Callable) -> None:
    """Check a function from the results to fm less random under age skew, in points."""
    results = _falling(starts.table("results"))
    answer = asked("fair_difference", fair_difference, results)
    if isinstance(answer, (pd.Series, pd.DataFrame)):
        raise NotYet("a table instead of a number", "Take the mean over the seeds: one number, in points.")
    right = float((_all_rounds(results, "fm").iloc[-1] - _all_rounds(results, "random").iloc[-1]).mean())
    judge("fair_difference(results)", answer, right, difference_mistakes(results))
    real = fair_difference(starts.table("results"))
    print(f"Right: {real:.2f} points on the study's results, as in the first row of `differences`.")


def check_faults(faults: object) -> None:
    """Check what is wrong with each of the six comparisons."""
    labels("faults", faults, PLANTED, FAULTS, WHY)
    print("Right: one of six is fair, and the others say up to several points more.")


def check_sentences(sentences: object) -> None:
    """Check the reading of the eight sentences."""
    labels("sentences", sentences, MEANT, WORDS, LOOK)
    print("Right: one sentence holds as it stands. The others say more than the tables do.")


def differences() -> pd.DataFrame:
    """Return the columns of the differences between starts that a reader needs."""
    columns = [
        "split",
        "higher",
        "lower",
        "value",
        "low",
        "high",
        "p",
        "p_two_way_holm",
        "equivalent",
        "reading",
    ]
    return starts.table("differences")[columns]

"""Checks of part 5, choose a start: its cost, what it gains, and a decision for three situations."""

from numbers import Real

import pandas as pd

from fmfl import paths
from fmfl.course.answers import Mistake, NotYet, demand, judge, labels

#: The committed studies that the part reads.
STUDY, LABELS = (paths.ROOT / "docs" / "results" / name for name in ("v7-cpu", "v7-labels"))

SITUATIONS = {
    "A": "No image may leave a hospital, and no public set fits: there is no proxy set.",
    "B": "There are 796 proxy images with masks. A mask was drawn for each; the line between hospitals is "
    "slow.",
    "C": "There are 796 proxy images, 30 of them with masks. The others have a sloppy box a lung.",
}
DECISIONS = {"A": "random", "B": "pretraining", "C": "fm"}
STARTS = {"random": "", "pretraining": "", "fm": ""}
REASONS = {
    "A": "no proxy set, no informed start: Pre-training and distillation both need images that are held "
    "in one place.",
    "B": "a cost without a gain: The two informed starts are equivalent within 0.5 points and end about 1 "
    "point above the random one. Of the two, take the one that costs less to make (`cost`, seconds).",
    "C": "masks that are not there: Look at the row with 30 masks in `few_masks`. Which start is higher "
    "there, and does its interval exclude zero?",
}
READINGS = {
    "higher": "the first is higher, outside the noise",
    "equivalent": "the two are within 0.5 points, by two one-sided tests",
    "cannot say": "inside the noise, and not shown to be alike",
}
READ = {
    "fm less random": "a difference overlooked: Its interval excludes zero, and p_two_way_holm is below "
    "0.05.",
    "fm less pretraining": "noise read as a difference: Its interval holds zero, and `equivalent` says "
    "what the two one-sided tests show.",
    "pretraining less random": "a difference overlooked: Its interval excludes zero, and p_two_way_holm "
    "is below 0.05.",
}


def table(name: str) -> pd.DataFrame:
    """Read a table of docs/results/v7-cpu, such as `speed` or `differences`."""
    return pd.read_csv(STUDY / f"{name}.csv")


def few_masks() -> pd.DataFrame:
    """Return what the teacher's student gains over pre-training where few proxy images have masks."""
    gains = pd.read_csv(LABELS / "gains.csv")
    rows = gains[(gains.higher == "fm") & (gains.lower == "pretraining")]
    columns = ["gain", "low", "high", "p_two_way_holm", "equivalent", "reading"]
    return rows.rename(columns={"value": "masks"})[["masks", *columns]].reset_index(drop=True)


def _images(split: str, target: float, column: str = "images_seen") -> dict[str, float]:
    speed = table("speed")
    rows = speed[(speed.arm == "federated") & (speed.split == split) & (speed.target == target)]
    return rows.set_index("init")[column].to_dict()


def check_images(images: object) -> None:
    """Check the images to a Dice of 90 % under age skew, those that made the start included."""
    demand(images, "images")
    if not isinstance(images, dict) or set(images) != set(STARTS) or ... in images.values():
        raise NotYet("still open", "Fill in a number of images for each of random, pretraining and fm.")
    if not all(isinstance(value, Real) for value in images.values()):
        raise NotYet("no numbers", "Fill in numbers of images, without quotes.")
    right = _whole(_images("age", 0.9))
    without = {name: value if name == "random" else 0 for name, value in right.items()}
    judge(
        "images",
        _whole(images),
        right,
        [
            Mistake(
                "the making of the start is left out",
                without,
                "An informed start needs no round, but 8 passes of 796 proxy images before it. Count them.",
            ),
            Mistake(
                "rounds instead of images",
                _whole(_images("age", 0.9, "rounds")),
                "This is the column `rounds`. The images are in `images_seen`.",
            ),
            Mistake(
                "another split", _whole(_images("iid", 0.9)), "These are the rows of IID. Take split `age`."
            ),
            Mistake(
                "another target",
                _whole(_images("age", 0.92)),
                "These are the rows of target 0.92. Take 0.90.",
            ),
            Mistake(
                "a limit read as a result",
                _whole(_images("age", 0.94)),
                "These are the rows of target 0.94, which most runs never reach (`capped`). Take 0.90.",
            ),
        ],
    )
    ratio = right["fm"] / right["random"]
    print(f"Right: to a Dice of 90 % an informed start takes {ratio:.1f} times the random one's images.")


def _whole(values: dict[str, float]) -> dict[str, int]:
    return {name: round(float(value)) for name, value in sorted(values.items())}


def check_price(price: object) -> None:
    """Check the points of Dice that the random start ends below pre-training under age skew."""
    rows = table("differences").set_index(["split", "higher", "lower"]).value
    right = float(rows["age", "pretraining", "random"])
    rounded = round(float(price), 2) if isinstance(price, Real) else price
    judge(
        "price",
        rounded,
        round(right, 2),
        [
            Mistake(
                "a fraction instead of points",
                round(right / 100, 2),
                "The tables are in points of Dice already.",
            ),
            Mistake("the sign is turned", round(-right, 2), "A price is positive: pretraining less random."),
            Mistake(
                "the paper's number",
                9.25,
                "This is the paper's. Take what was measured here (`differences`).",
            ),
            Mistake(
                "another difference",
                round(float(rows["age", "fm", "random"]), 2),
                "This is fm less random. Take pretraining less random.",
            ),
            Mistake(
                "another split",
                round(float(rows["iid", "pretraining", "random"]), 2),
                "This is IID. Take split `age`.",
            ),
            Mistake(
                "another split",
                round(float(rows["quantity", "pretraining", "random"]), 2),
                "This is quantity skew. Take split `age`.",
            ),
        ],
    )
    print(f"Right: {right:.2f} points after ten rounds; the paper reports 9.25.")


def check_readings(readings: object) -> None:
    """Check what the differences under age skew say."""
    right = {
        "fm less random": "higher",
        "fm less pretraining": "equivalent",
        "pretraining less random": "higher",
    }
    labels("readings", readings, right, READINGS, READ)
    print("Right: both informed starts end higher than the random one, and alike.")


def check_decisions(decisions: object) -> None:
    """Check the start chosen for each situation."""
    labels("decisions", decisions, DECISIONS, STARTS, REASONS)
    print("Right: a start is chosen by what is there, what it costs and what it gains, not by its name.")

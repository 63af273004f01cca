"""Checks of part 4, break it: faults made on purpose, and the gap between two starts.

The faults live here and in the exercise. No setting of `fmfl` leads to them.
"""

from collections.abc import Callable

import pandas as pd
import torch

from fmfl.course import server
from fmfl.course.answers import Mistake, NotYet, asked, judge
from fmfl.states import State

#: Scores of two starts in per cent of Dice; the random start falls once, and the rows are in no order.
HISTORY = pd.DataFrame(
    {
        "start": ["informed", "random", "random", "informed", "random", "informed", "informed", "random"],
        "round": [2, 0, 3, 0, 1, 3, 1, 2],
        "dice": [86.0, 50.0, 80.0, 81.0, 58.0, 83.0, 88.0, 82.0],
    }
)


def start() -> State:
    """Return a start whose statistics differ from 0, 1 and from both hospitals' states."""
    return {name: torch.full_like(value, 5) for name, value in server.states()[0].items()}


def check_forget_statistics(forget_statistics: Callable) -> None:
    """Check the fault: weights averaged by Eq. 3, running statistics those of the start."""
    answer = server.averaged_state("forget_statistics", forget_statistics, start())
    one, other = server.states()
    right, begun = server.weighted(one, other), start()
    server.check_names(answer)
    for name in (server.MEAN, server.VARIANCE):
        first = Mistake(
            "statistics of one hospital", one[name], "This is the first hospital's. Take them from `start`."
        )
        fresh = torch.zeros(2) if name == server.MEAN else torch.ones(2)
        reset = Mistake(
            "statistics reset", fresh, "These are those of a new network. The fault keeps those of `start`."
        )
        whole = Mistake(
            "nothing is broken",
            right[name],
            f"{name} is still averaged. Replace what ends with running_mean or running_var by the start's.",
        )
        judge(f"{name} after the fault", answer[name], begun[name], [whole, first, reset])
    for name in (server.WEIGHT, server.SCALE, server.SHIFT):
        too_much = Mistake(
            "too much is forgotten",
            begun[name],
            f"{name} is a weight that the hospitals have trained, though it belongs to BatchNorm: average "
            "it. Only running_mean and running_var are statistics.",
        )
        typical = [too_much, *server.weighting_mistakes(one[name], other[name])]
        judge(f"the average of {name}", answer[name], right[name], typical)
    print("Right: the weights are averaged, and the running statistics are those of the start. It is broken.")


def check_forget_sizes(forget_sizes: Callable) -> None:
    """Check the fault: every hospital counts alike."""
    answer = server.averaged_state("forget_sizes", forget_sizes)
    one, other = server.states()
    server.check_names(answer)
    total = sum(server.IMAGES)
    for name in server.weighted(one, other):
        plain = server.mixed(one[name], other[name], (0.5, 0.5))
        typical = [
            Mistake(
                "nothing is broken",
                server.mixed(one[name], other[name], tuple(n / total for n in server.IMAGES)),
                "The hospitals are still weighted by their images. For this fault each counts 1.",
            ),
            *server.weighting_mistakes(one[name], other[name])[1:],
        ]
        judge(f"the average of {name}", answer[name], plain, typical)
    server.check_count(answer)
    print("Right: a hospital with 10 images has as much to say as one with 30. It is broken.")


def check_gap(gap: Callable) -> None:
    """Check a function that tells by how many points the informed start is ahead after a round."""
    answer = asked("gap", gap, HISTORY, 2)
    if isinstance(answer, pd.Series):
        raise NotYet("a column instead of a number", "Take the one value of each start, with `.item()`.")
    by_start = dict(iter(HISTORY.groupby("start").dice))
    typical = [
        Mistake("the sign is turned", -4.0, "Take the informed start less the random one."),
        Mistake(
            "the round before",
            30.0,
            "This is the gap after round 1. Rounds count from 0, before any training: choose by the "
            "column `round`.",
        ),
        Mistake(
            "rows taken by position",
            float(by_start["informed"].iloc[2] - by_start["random"].iloc[2]),
            "The rows are in no order. Choose the row whose `round` is the one asked for.",
        ),
        Mistake("the last round", 3.0, "Choose the round asked for, not the last one."),
        Mistake("the best round", 6.0, "Choose the round asked for, not the highest Dice."),
        Mistake("a fraction instead of points", 0.04, "The column `dice` is in per cent already."),
    ]
    judge("gap(history, 2)", answer, 4.0, typical)
    print("Right: the informed start less the random one, after the same round.")

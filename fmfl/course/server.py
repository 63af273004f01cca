"""Checks of part 2, be the server: the average of Eq. 3, its weights, statistics and counts."""

from collections.abc import Callable

import torch
from torch import Tensor

from fmfl.course.answers import Mistake, NotYet, asked, judge
from fmfl.states import State

#: Images of the two hospitals. In batches of 8 they take 4 and 2 steps, so that 4 : 2 differs from 3 : 1.
IMAGES = (30, 10)
#: Names of the student's first layers, so that whoever goes through its trained names does so here too.
WEIGHT, NORM = "encoder.model.conv_stem.weight", "encoder.model.bn1"
SCALE, SHIFT, COUNT = f"{NORM}.weight", f"{NORM}.bias", f"{NORM}.num_batches_tracked"
MEAN, VARIANCE = f"{NORM}.running_mean", f"{NORM}.running_var"


def states() -> list[State]:
    """Return two small states like a layer with BatchNorm, with values that no two rules average alike."""
    one, other = (0.0, 8.0, -2.0, 1.0), (4.0, 0.0, 6.0, 9.0)
    return [
        {
            WEIGHT: torch.tensor([[a, b], [b, a]]),
            SCALE: torch.tensor([1.0 + a, 1.0 + b]),
            SHIFT: torch.tensor([c, a]),
            MEAN: torch.tensor([c, d]),
            VARIANCE: torch.tensor([d, 2 * d]),
            COUNT: torch.tensor(count),
        }
        for (a, b, c, d), count in ((one, 40), (other, 15))
    ]


def mixed(one: Tensor, other: Tensor, weights: tuple[float, float]) -> Tensor:
    """Return the weighted sum of two tensors."""
    return weights[0] * one.double() + weights[1] * other.double()


def weighting_mistakes(one: Tensor, other: Tensor) -> list[Mistake]:
    """Return what typical mistakes in the weights of Eq. 3 make of two tensors."""
    total = sum(IMAGES)
    advice = "Eq. 3 weighs a hospital by its images: n_k / n with n = sum of all n_k."
    return [
        Mistake("unweighted mean", mixed(one, other, (0.5, 0.5)), f"All hospitals count alike. {advice}"),
        Mistake(
            "weighted by batches",
            mixed(one, other, (4 / 6, 2 / 6)),
            "30 and 10 images are 4 and 2 batches of 8. The last batch is small, so batches are no "
            f"measure. {advice}",
        ),
        Mistake("not divided", mixed(one, other, IMAGES), f"This is the sum of n_k theta_k. {advice}"),
        Mistake("a sum", mixed(one, other, (1, 1)), f"This is the sum of the states. {advice}"),
        Mistake(
            "divided by the number of hospitals",
            mixed(one, other, tuple(n / 2 for n in IMAGES)),
            f"Divide by the number of images of all hospitals, not by the number of hospitals. {advice}",
        ),
        Mistake(
            "weights swapped",
            mixed(one, other, (IMAGES[1] / total, IMAGES[0] / total)),
            f"The small hospital has the large weight. {advice}",
        ),
        Mistake("only the first hospital", one, f"The second hospital's state is nowhere in it. {advice}"),
        Mistake("only the last hospital", other, f"Each turn of the loop replaces the last one's. {advice}"),
    ]


def weighted(one: State, other: State) -> State:
    """Return Eq. 3 over the floating tensors of two states."""
    total = sum(IMAGES)
    return {
        name: mixed(one[name], other[name], tuple(n / total for n in IMAGES)) for name in one if name != COUNT
    }


def averaged_state(task: str, function: Callable, *more: object) -> State:
    """Call a participant's average on the two states; it has to return a state."""
    updates = list(zip(states(), IMAGES, strict=True))
    answer = asked(task, function, updates, *more)
    if not isinstance(answer, dict):
        raise NotYet(
            "not a state", f"{task} returns {type(answer).__name__}: return a dictionary of tensors."
        )
    return {name: torch.as_tensor(value) for name, value in answer.items()}


def check_names(answer: State) -> None:
    """Raise NotYet where a name of the state is missing, or is too much."""
    if missing := [name for name in (MEAN, VARIANCE) if name not in answer]:
        raise NotYet(
            "running statistics forgotten",
            f"{missing[0]} is not in the average. An optimizer does not train it, and the score needs it: "
            "go through all names of a state, not through the trained weights.",
        )
    if COUNT not in answer:
        raise NotYet(
            "the count is missing", f"{COUNT} is not in the average: take the first hospital's as it is."
        )
    if set(answer) != set(states()[0]):
        raise NotYet("other names", f"The average has the names {sorted(answer)}: keep those of the states.")


def check_count(answer: State) -> None:
    """Raise NotYet where the integer count has been averaged."""
    counts = [int(state[COUNT]) for state in states()]
    if answer[COUNT].is_floating_point() or int(answer[COUNT]) not in counts:
        raise NotYet(
            "integer buffers averaged",
            f"{COUNT} counts batches, {counts[0]} and {counts[1]}, and becomes {answer[COUNT].item():g} as "
            f"{answer[COUNT].dtype}: half a batch there is not. Take the first hospital's count as it is "
            "(`value.is_floating_point()` tells which tensors to average).",
        )


def check_aggregate(aggregate: Callable) -> None:
    """Check Eq. 3 on two states done by hand: weights, running statistics, counts."""
    answer = averaged_state("aggregate", aggregate)
    one, other = states()
    right = weighted(one, other)
    check_names(answer)
    mistakes = weighting_mistakes(one[WEIGHT], other[WEIGHT])
    judge(f"the average of {WEIGHT}", answer[WEIGHT], right[WEIGHT], mistakes)
    for name in (MEAN, VARIANCE):
        only_first = (
            "The weights are averaged, and this is the first hospital's: BatchNorm scores with statistics "
        )
        only_first += "that belong to one hospital alone. Average them like the weights."
        typical = [
            Mistake("running statistics forgotten", one[name], only_first),
            Mistake("running statistics forgotten", torch.zeros(2), only_first),
            *weighting_mistakes(one[name], other[name]),
        ]
        judge(f"the average of {name}", answer[name], right[name], typical)
    check_count(answer)
    for name in right:
        judge(f"the average of {name}", answer[name], right[name], weighting_mistakes(one[name], other[name]))
    print("Right: weighted by images, running statistics included, counts left whole.")


def check_untrained(share: object, state: State, trained: set[str]) -> None:
    """Check the share of a state's tensors that no optimizer trains, in per cent."""
    right = 100 * len(set(state) - trained) / len(state)
    numbers = {name: value.numel() for name, value in state.items()}
    by_numbers = 100 * sum(numbers[name] for name in set(state) - trained) / sum(numbers.values())
    judge(
        "untrained",
        share,
        right,
        [
            Mistake(
                "a fraction where per cent are asked",
                right / 100,
                "A share runs from 0 to 1: multiply it by 100.",
            ),
            Mistake(
                "the trained ones", 100 - right, "This is the share of the trained tensors: take the others."
            ),
            Mistake(
                "numbers counted instead of tensors",
                by_numbers,
                "This counts the single numbers. Count tensors: an average goes wrong tensor by tensor.",
            ),
        ],
    )
    print(f"Right: {right:.0f} % of the tensors are not trained, and all but the counts have to be averaged.")

# %% [markdown]
# # Part 4 · Break it
#
# [part 3, the teacher's loss](3_teach.ipynb) · next: [part 5, choose a start](5_start.ipynb)
#
# **Goal:** build three faults that published code and papers have had, and learn which of them a score shows.
# **Time:** 45 minutes; the computer needs about half a minute.

# %% [markdown]
# ## Set up

# %% tags=["parameters"]
participant: str = "me"
num_phantoms: int = 160  # synthetic X-rays
num_rounds: int = 8
epochs: int = 8  # passes of the proxy set, for the informed start

# %% [markdown]
# Two starts: **random**, and **informed**, which has been trained on the masks of the proxy set.

# %% tags=["training"]
import pandas as pd

import fmfl
from fmfl.analysis import plots, show
from fmfl.course import answers, faults
from fmfl.course import setting as course

plots.use_style()
by_age = course.load("age", num_phantoms=num_phantoms, batch_size=8)
informed = course.trained(by_age, fmfl.train.LOSSES["dice"], epochs)
starts = {"random": by_age.random, "informed": informed}
{name: round(course.dice(by_age, state), 1) for name, state in starts.items()}

# %% [markdown]
# ## Predict the first fault
#
# A server averages the weights by Eq. 3, and **forgets the running statistics** of BatchNorm: they stay
# those of the start. At least
# four public code bases had this fault. Hospitals train on the statistics of their batches, so the training
# does not notice; the score does.
#
# To how many per cent of Dice does each start come after the last round?

# %%
# BEGIN STUB
# random_start = ...  # per cent of Dice
# informed_start = ...  # per cent of Dice
# BEGIN SOLUTION
random_start = 70
informed_start = 70
# END SOLUTION
answers.predict(participant, "random start, statistics forgotten", random_start, 0, 100, "%")
answers.predict(participant, "informed start, statistics forgotten", informed_start, 0, 100, "%")

# %% [markdown]
# ## Forget the running statistics
#
# Build the fault: average the weights rightly (use `fmfl.federate.aggregate`), and put the statistics of
# `start` in place. Their
# names end in `running_mean` and `running_var`. BatchNorm's `weight` and `bias` are weights like others.
#
# <details><summary>Hint</summary>
#
# `name.endswith(("running_mean", "running_var"))` tells a statistic by its name.
#
# </details>


# %% tags=["task"]
def forget_statistics(updates, start):
    """Return Eq. 3 over the weights, with the running statistics of the start."""
    # BEGIN SOLUTION
    average = fmfl.federate.aggregate(updates)
    statistics = ("running_mean", "running_var")
    return {name: start[name] if name.endswith(statistics) else average[name] for name in average}
    # END SOLUTION


# %%
faults.check_forget_statistics(forget_statistics)

# %% [markdown]
# Both servers see the same training, so one run gives both scores.

# %% tags=["training"]
rows = []
for name, start in starts.items():
    theta = start
    for number in range(1, num_rounds + 1):
        updates = course.updates(by_age, theta, number)
        theta = fmfl.federate.aggregate(updates)
        broken = forget_statistics(updates, start)
        rows.append((name, number, course.dice(by_age, theta), course.dice(by_age, broken)))
history = pd.DataFrame(rows, columns=["start", "round", "dice", "forgotten"])

# %% [markdown]
# The last round, and your predictions beside it.

# %%
last = history[history["round"] == num_rounds].set_index("start")
for name in starts:
    outcome = float(last.forgotten[name])
    answers.compare(participant, f"{name} start, statistics forgotten", outcome, "%")
show.table(last[["dice", "forgotten"]], 1)

# %% [markdown]
# On real X-rays the same happens ([docs/results/collapse](/docs/results/collapse/README.md)): at a Dice of
# 93 % with averaged statistics, the random start
# falls to between 0 and 60 %, and the informed one to 92 %. **Why?** The informed start's statistics are
# those of a trained network, and
# stay nearly right. Those of the random start are mean 0 and variance 1, which fit no trained network.
#
# So a fault of the server can look like a merit of the start.
#
# ## Predict the second fault
#
# A server **forgets how many images** each hospital has: all count alike. Under quantity skew the hospitals
# hold images 9 : 3 : 1. How many
# points of Dice does the random start lose by it after the last round? (0 if you expect no difference,
# below 0 if you expect a gain.)

# %%
# BEGIN STUB
# prediction = ...  # points of Dice
# BEGIN SOLUTION
prediction = 10
# END SOLUTION
answers.predict(participant, "points lost by forgetting sizes", prediction, -100, 100, "points")

# %% [markdown]
# ## Forget the weights
#
# Build the fault: the plain mean of the states. (`fmfl.federate.aggregate` takes pairs of a state and a
# weight.)
#
# <details><summary>Hint</summary>
#
# What does Eq. 3 become where all $n_k$ are equal?
#
# </details>


# %% tags=["task"]
def forget_sizes(updates):
    """Return the average in which every hospital counts alike."""
    # BEGIN SOLUTION
    return fmfl.federate.aggregate([(state, 1) for state, _ in updates])
    # END SOLUTION


# %%
faults.check_forget_sizes(forget_sizes)

# %% tags=["training"]
by_quantity = course.load("quantity", num_phantoms=num_phantoms, batch_size=8)
ends = {}
for server in (fmfl.federate.aggregate, forget_sizes):
    theta = by_quantity.random
    for number in range(1, num_rounds + 1):
        theta = server(course.updates(by_quantity, theta, number))
    ends[server.__name__] = course.dice(by_quantity, theta)
answers.compare(
    participant, "points lost by forgetting sizes", ends["aggregate"] - ends["forget_sizes"], "points"
)

# %% [markdown]
# One seed and few images: the size of this loss is not to be trusted, and nothing in a single run says so.
# What is forgotten here is that the
# large hospital has taken nine steps where the small one has taken one.
#
# ## Score too early
#
# Write a function that says by how many points the informed start is ahead of the random one after a round.
# `history` has the columns `start`
# (`random`, `informed`), `round` and `dice` (in per cent), in any order of rows.
#
# <details><summary>Hint</summary>
#
# `history[(history.start == "random") & (history["round"] == number)].dice.item()` is one score.
#
# </details>


# %% tags=["task"]
def gap(history, number):
    """Return the informed start's Dice less the random one's after a round, in points."""
    # BEGIN SOLUTION
    dice = history[history["round"] == number].set_index("start").dice
    return float(dice["informed"] - dice["random"])
    # END SOLUTION


# %%
faults.check_gap(gap)

# %% [markdown]
# The gap after the first and the last round. A paper that scores after the first would report the one, and
# a patient one the other.

# %%
early, late = gap(history, 1), gap(history, num_rounds)
print(f"after round 1: {early:.1f} points; after round {num_rounds}: {late:.1f} points")
plots.dice_by_round(history.assign(init=history.start, dice=history.dice / 100))

# %% [markdown]
# ## Talk about it
#
# - Which of the three faults would you notice if you ran one start alone? Which test would have found the
#   first one?
# - The paper's random start ends 10.7 points below the teacher's student. Name two explanations that need
#   no teacher.
#
# ---
# [part 3, the teacher's loss](3_teach.ipynb) · next: [part 5, choose a start](5_start.ipynb)

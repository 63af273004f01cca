# %% [markdown]
# # Part 2 · Be the server
#
# [part 1, look at the data](1_look.ipynb) · next: [part 3, the teacher's loss](3_teach.ipynb)
#
# **Goal:** write Eq. 3, the average that makes one network out of the hospitals' three.
# **Time:** 35 minutes; the computer needs about a quarter of a minute.

# %% [markdown]
# ## Set up

# %% tags=["parameters"]
participant: str = "me"
num_phantoms: int = 160  # synthetic X-rays
num_rounds: int = 4

# %% [markdown]
# Three hospitals hold synthetic X-rays, the second one a third and the third one a ninth of the first
# one's. `setting.random` is the
# **state** of the student: a dictionary of tensors by name.

# %%
import pandas as pd
import torch

import fmfl
from fmfl.analysis import plots
from fmfl.course import answers, server
from fmfl.course import setting as course

plots.use_style()
setting = course.load("quantity", num_phantoms=num_phantoms)
[len(rows) for rows in setting.clients]

# %% [markdown]
# ## Predict
#
# A server averages states, not networks. How many per cent of the **tensors** in the student's state are
# trained by no
# optimizer? Guess before you look.

# %%
# BEGIN STUB
# prediction = ...  # per cent of the tensors
# BEGIN SOLUTION
prediction = 10
# END SOLUTION
answers.predict(participant, "tensors that are not trained", prediction, 0, 100, "%")

# %% [markdown]
# ## Look into a state
#
# A convolution and the BatchNorm after it. BatchNorm has two trained tensors, `weight` and `bias`, and
# three that
# no optimizer trains: the running mean and variance of what flows through it, and a count of batches.

# %%
for name, value in list(setting.random.items())[:8]:
    print(f"{name:<32} {list(value.shape)!s:<16} {value.dtype}")

# %% [markdown]
# `trained` holds the names that an optimizer sees. How many per cent of the state's tensors are **not**
# among them?
#
# <details><summary>Hint</summary>
#
# `set(setting.random) - trained` are the names that are left. `len` counts them.
#
# </details>

# %% tags=["task"]
trained = {name for name, _ in setting.model.named_parameters()}
# BEGIN STUB
# untrained = ...  # in per cent
# BEGIN SOLUTION
untrained = 100 * len(set(setting.random) - trained) / len(setting.random)
# END SOLUTION

# %%
server.check_untrained(untrained, setting.random, trained)
answers.compare(participant, "tensors that are not trained", untrained, "%")

# %% [markdown]
# ## Write Eq. 3
#
# The server gets from each hospital $k$ its state $\theta_k$ and the number of images $n_k$ that it was
# trained on:
#
# $$\theta = \sum_k \frac{n_k}{n}\, \theta_k, \qquad n = \sum_k n_k.$$
#
# `updates` is a list of pairs (state, number of images). Return a state with **all** names. Average what is
# a floating
# number; whole numbers, the counts of batches, come from the first hospital. Change no hospital's tensors.
#
# <details><summary>Hint 1</summary>
#
# Go through the names of the first state. For each, add up `number * state[name]` over the updates, and
# divide.
#
# </details>
# <details><summary>Hint 2</summary>
#
# `state[name].is_floating_point()` is true for weights and running statistics, and false for counts.
#
# </details>


# %% tags=["task"]
def aggregate(updates):
    """Return the average state of Eq. 3 from pairs (state, number of images)."""
    # BEGIN SOLUTION
    first, _ = updates[0]
    total = sum(number for _, number in updates)
    average = dict(first)
    for name, value in first.items():
        if value.is_floating_point():
            average[name] = sum(number * state[name] for state, number in updates) / total
    return average
    # END SOLUTION


# %%
server.check_aggregate(aggregate)

# %% [markdown]
# ## Be the server
#
# Now for real: in each round every hospital trains from the global state (Eq. 2), and your server averages.

# %% tags=["training"]
theta = setting.random
scores = [course.dice(setting, theta)]
for round_number in range(1, num_rounds + 1):
    updates = course.updates(setting, theta, round_number)
    theta = aggregate(updates)
    scores.append(course.dice(setting, theta))

# %% [markdown]
# Your rounds. The random start says *lung* or *not lung* nearly everywhere; then it learns.

# %%
history = pd.DataFrame({"round": range(len(scores)), "dice": [dice / 100 for dice in scores]})
plots.dice_by_round(history)
# %% [markdown]
# ## Compare with the library
#
# The library's server gives the same state, name by name.

# %%
library = fmfl.federate.aggregate(updates)
for name, value in library.items():
    torch.testing.assert_close(aggregate(updates)[name], value, msg=lambda text, name=name: f"{name}: {text}")
print("Your server and the library agree on", len(library), "tensors.")

# %% [markdown]
# ## Talk about it
#
# - The first hospital has nine times the images of the third. Whose X-rays will the network know best? Is
#   that fair?
# - No image has moved. What could the server still learn from the states?
#
# The library's server is [`aggregate`](/fmfl/federate.py); it also leaves out hospitals whose training has
# failed.
#
# ---
# [part 1, look at the data](1_look.ipynb) · next: [part 3, the teacher's loss](3_teach.ipynb)

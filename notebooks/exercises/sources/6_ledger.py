# %% [markdown]
# # Part 6 · Read the ledger critically
#
# [part 5, choose a start](5_start.ipynb)
#
# **Goal:** tell a fair comparison from a faulty one, and a sentence that holds from one that says too much.
# **Time:** 40 minutes; the computer needs a few seconds.
#
# The numbers are those of [docs/results/v7-cpu](/docs/results/v7-cpu/README.md). How a verdict is reached
# stands in [docs/verdicts.md](/docs/verdicts.md).

# %% [markdown]
# ## Set up

# %% tags=["parameters"]
participant: str = "me"

# %%
import pandas as pd

from fmfl.analysis import show
from fmfl.course import answers, ledger, starts

results = starts.table("results")
results.head(3)

# %% [markdown]
# ## Predict
#
# The paper has 7 numbers that this study repeats on other X-rays: five scores and two shares. How many are
# **reproduced**, within 2 points or 10 %?

# %%
# BEGIN STUB
# prediction = ...  # of 7
# BEGIN SOLUTION
prediction = 3
# END SOLUTION
answers.predict(participant, "numbers reproduced", prediction, 0, 7)

# %% [markdown]
# ## A fair difference
#
# `results` has a row a run and round. By how many points does `fm` end above `random`? Compare what differs
# in nothing but the start: arm
# `federated`, split `age`, the **last** round, the mean over the seeds. The column `dice` runs from 0 to 1;
# a point is a hundredth.
#
# <details><summary>Hint</summary>
#
# Choose the rows first, then `rows[rows.init == "fm"].dice.mean()`. The last round is the largest value of
# `round`.
#
# </details>


# %% tags=["task"]
def fair_difference(results):
    """Return fm less random under age skew after the last round, in points of Dice."""
    # BEGIN SOLUTION
    rows = results[(results.arm == "federated") & (results.split == "age")]
    rows = rows[rows["round"] == rows["round"].max()]
    ends = 100 * rows.groupby("init").dice.mean()
    return float(ends["fm"] - ends["random"])
    # END SOLUTION


# %%
ledger.check_fair_difference(fair_difference)

# %% [markdown]
# ## Six comparisons, one of them fair
#
# Each claims to be the gain of `fm` over `random` under age skew.

# %%
pd.set_option("display.max_colwidth", None)
made = ledger.comparisons(results)
show.table(pd.DataFrame([(name, *row) for name, row in made.items()], columns=["name", "how", "points"]))

# %% [markdown]
# What is wrong with each? The words to choose from:

# %%
show.table(ledger.FAULTS)

# %% [markdown]
# <details><summary>Hint</summary>
#
# Ask of each: same arm, same split, same round, same seeds? Who has chosen the round, and by what?
#
# </details>

# %% tags=["task"]
# BEGIN STUB
# faults = {"A": ..., "B": ..., "C": ..., "D": ..., "E": ..., "F": ...}
# BEGIN SOLUTION
faults = {
    "A": "best round",
    "B": "fair",
    "C": "seeds chosen",
    "D": "two splits",
    "E": "two rounds",
    "F": "two arms",
}
# END SOLUTION

# %%
ledger.check_faults(faults)

# %% [markdown]
# ## Eight sentences
#
# The ledger: each claim of the paper beside ours, with a verdict and why.

# %%
claims = starts.table("claims")
outcome = int(((claims.kind == "size") & (claims.verdict == "reproduced")).sum())
answers.compare(participant, "numbers reproduced", outcome)
show.table(claims[["claim", "paper", "ours", "low", "high", "verdict", "why"]], interval_of="ours")

# %% [markdown]
# The differences between starts, and the speed.

# %%
show.table(ledger.differences(), {"p": 3, "p_two_way_holm": 3})

# %%
columns = ["arm", "init", "split", "target", "seeds", "reached", "rounds", "capped", "images_seen"]
show.table(starts.table("speed").query("split in ['age', 'pooled']")[columns], {"images_seen": 0})

# %% [markdown]
# Somebody has written a summary. **Which of its sentences hold**, and what is wrong with the others?

# %%
show.table(ledger.SENTENCES)

# %% [markdown]
# The words to choose from:

# %%
show.table(ledger.WORDS)

# %% [markdown]
# <details><summary>Hint</summary>
#
# One sentence holds, and each of the other words is needed once.
#
# </details>

# %% tags=["task"]
# BEGIN STUB
# sentences = {"1": ..., "2": ..., "3": ..., "4": ..., "5": ..., "6": ..., "7": ..., "8": ...}
# BEGIN SOLUTION
sentences = {
    "1": "holds",
    "2": "noise",
    "3": "cost left out",
    "4": "too wide",
    "5": "a limit",
    "6": "many tests",
    "7": "no test",
    "8": "no evidence",
}
# END SOLUTION

# %%
ledger.check_sentences(sentences)

# %% [markdown]
# ## Talk about it
#
# - All seeds share one draw of patients. What would you run to learn how much another draw changes?
# - Write one sentence on the question of the paper that you would put your name to.
#
# `make study` writes such a ledger for images of your own ([docs/data.md](/docs/data.md)).
#
# ---
# [part 5, choose a start](5_start.ipynb)

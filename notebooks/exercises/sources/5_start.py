# %% [markdown]
# # Part 5 · Choose a start
#
# [part 4, break it](4_break.ipynb) · next: [part 6, read the ledger](6_ledger.ipynb)
#
# **Goal:** decide, with costs, where a federation should begin.
# **Time:** 30 minutes; the computer needs a few seconds.
#
# The numbers are those of a study on real X-rays ([docs/results/v7-cpu](/docs/results/v7-cpu/README.md)): 3
# hospitals, 3 seeds, 10 rounds, 265 test images of 139 patients.

# %% [markdown]
# ## Set up

# %% tags=["parameters"]
participant: str = "me"

# %%
from fmfl.analysis import show
from fmfl.course import answers, ledger, starts

# %% [markdown]
# ## Predict
#
# In the paper the teacher's student (`fm`) ends 1.46 points of Dice above supervised pre-training on the
# same proxy images. How
# many points will it be in this study, under age skew, with all masks there? (Below 0 if you expect a loss.)

# %%
# BEGIN STUB
# prediction = ...  # points of Dice
# BEGIN SOLUTION
prediction = 1
# END SOLUTION
answers.predict(participant, "fm above pretraining", prediction, -50, 50, "points")

# %% [markdown]
# ## How soon, and for how much
#
# Rounds, images and seconds until a Dice that was fixed beforehand. `images_seen` counts all images that
# went through the student
# until then, with those that made the start. `capped` says that a run ended before it got there.

# %%
speed = starts.table("speed")
columns = ["init", "split", "target", "reached", "rounds", "capped", "images_seen", "seconds"]
show.table(speed.loc[speed.arm == "federated", columns], {"target": 2, "images_seen": 0, "seconds": 0})

# %% [markdown]
# How many images is the student trained on until a Dice of **90 %** under **age** skew? Read it from
# `speed`, or compute it.
#
# <details><summary>Hint</summary>
#
# An informed start has no rounds to go, but its making is not free: 8 passes of 796 images.
#
# </details>

# %% tags=["task"]
# BEGIN STUB
# images = {"random": ..., "pretraining": ..., "fm": ...}
# BEGIN SOLUTION
chosen = speed[(speed.arm == "federated") & (speed.split == "age") & (speed.target == 0.9)]
images = chosen.set_index("init").images_seen.to_dict()
# END SOLUTION

# %%
starts.check_images(images)

# %% [markdown]
# ## What is gained
#
# Differences after the last round, in points of Dice. The interval (95 %) covers patients and seeds.
# `p_two_way_holm` is corrected for nine tests;
# `equivalent` says that two one-sided tests hold the difference within 0.5 points.

# %%
differences = ledger.differences()
show.table(differences, {"p": 3, "p_two_way_holm": 3})

# %% [markdown]
# What do the three rows under **age** skew say? Choose for each: `"higher"` (the first one is, outside the
# noise), `"equivalent"`, or `"cannot say"`.
#
# <details><summary>Hint</summary>
#
# *Inside the noise* alone says little. Look at the column `equivalent`, too.
#
# </details>

# %% tags=["task"]
# BEGIN STUB
# readings = {"fm less random": ..., "fm less pretraining": ..., "pretraining less random": ...}
# BEGIN SOLUTION
readings = {
    "fm less random": "higher",
    "fm less pretraining": "equivalent",
    "pretraining less random": "higher",
}
# END SOLUTION

# %%
starts.check_readings(readings)
gained = differences.query("split == 'age' and higher == 'fm' and lower == 'pretraining'").value
answers.compare(participant, "fm above pretraining", float(gained.item()), "points")

# %% [markdown]
# Whoever has no proxy set begins at random. What is the **price** under age skew after ten rounds: how many
# points of Dice does the random start end below
# pre-training? Two decimals are enough.

# %% tags=["task"]
# BEGIN STUB
# price = ...  # points of Dice
# BEGIN SOLUTION
price = 1.06
# END SOLUTION

# %%
starts.check_price(price)

# %% [markdown]
# ## Decide
#
# Two more tables. The seconds that it took to make a start and to reach 90 % (seed by seed), and what `fm`
# gains over pre-training where few
# proxy images have masks ([docs/results/v7-labels](/docs/results/v7-labels/README.md)).

# %%
cost = starts.table("cost").query("arm == 'federated' and split == 'age'")
show.table(cost.groupby("init")[["rounds", "images_seen", "seconds", "bytes"]].mean().reset_index(), 0)

# %%
show.table(starts.few_masks(), {"p_two_way_holm": 3})

# %% [markdown]
# Three federations ask you for advice.

# %%
show.table(starts.SITUATIONS)

# %% [markdown]
# Choose a start for each, the cheaper one where two are alike: `"random"`, `"pretraining"` or `"fm"`.
#
# <details><summary>Hint</summary>
#
# Ask first what can be made at all, then what gains something outside the noise, then what it costs.
#
# </details>

# %% tags=["task"]
# BEGIN STUB
# decisions = {"A": ..., "B": ..., "C": ...}
# BEGIN SOLUTION
decisions = {"A": "random", "B": "pretraining", "C": "fm"}
# END SOLUTION

# %%
starts.check_decisions(decisions)

# %% [markdown]
# ## Talk about it
#
# - A mask takes minutes, a box seconds. At which number of masks would you turn from `fm` to pre-training?
# - Which of these numbers would you not dare to carry over to your own hospital, and why?
#
# ---
# [part 4, break it](4_break.ipynb) · next: [part 6, read the ledger](6_ledger.ipynb)

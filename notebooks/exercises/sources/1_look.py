# %% [markdown]
# # Part 1 · Look at the data
#
# next: [part 2, be the server](2_server.ipynb)
#
# **Goal:** count patients, find a leak, and deal patients to hospitals by age.
# **Time:** 30 minutes; the computer needs a few seconds.
#
# Run the cells from the top with Shift and Enter. Where you see three dots, write something. The check below
# says if it is right, and if not, what is wrong.

# %% [markdown]
# ## Set up
#
# `participant` names your own folder below `runs/class`. It keeps your predictions.

# %% tags=["parameters"]
participant: str = "me"
num_phantoms: int = 160  # synthetic X-rays

# %% [markdown]
# The X-rays are synthetic. Their lungs, ages, hospitals and repeated visits are made like those of real
# collections.

# %%
import numpy as np

import fmfl
from fmfl.analysis import plots, show
from fmfl.course import answers, patients

plots.use_style()
cohort = fmfl.data.load("phantom", size=96, num_phantoms=num_phantoms)
table = cohort.table

# %% [markdown]
# ## Predict
#
# Later in this part you deal the patients to three hospitals, sorted by age. By how many years will the
# mean ages of
# the youngest and the oldest hospital differ? Write your guess down **before** you look at an age. The
# first one counts.

# %%
# BEGIN STUB
# prediction = ...  # years
# BEGIN SOLUTION
prediction = 30
# END SOLUTION
answers.predict(participant, "years between the hospitals", prediction, 0, 100, "years")

# %% [markdown]
# ## Look
#
# A cohort is images, masks and a table with a row for each image. The contour is the mask of the lungs.

# %%
plots.images(cohort, range(8))
# %% [markdown]
# The first rows of the table.

# %%
show.table(table[["image_id", "patient_id", "age", "site", "finding"]].head(8))

# %% [markdown]
# ## Count
#
# How many **patients** are there? Compute it from `table`.
#
# <details><summary>Hint</summary>
#
# A column has a method `nunique`.
#
# </details>

# %% tags=["task"]
# BEGIN STUB
# num_patients = ...
# BEGIN SOLUTION
num_patients = table.patient_id.nunique()
# END SOLUTION

# %%
patients.check_num_patients(num_patients, table)

# %% [markdown]
# ## Find the leak
#
# Somebody has dealt every second image to training and the others to the test. Write a function that
# returns the set
# of patients who are on **both** sides. `one` and `other` are lists of row numbers, counted from 0.
#
# <details><summary>Hint</summary>
#
# `table.patient_id.iloc[rows]` are the patients of some rows, and `set(a) & set(b)` is what two sets share.
#
# </details>


# %% tags=["task"]
def shared_patients(table, one, other):
    """Return the set of patients with images in both lists of row numbers."""
    # BEGIN SOLUTION
    return set(table.patient_id.iloc[one]) & set(table.patient_id.iloc[other])
    # END SOLUTION


# %%
patients.check_shared_patients(shared_patients)

# %% [markdown]
# How many per cent of the **test images** are of a patient whom the training has seen?
#
# <details><summary>Hint</summary>
#
# `table.patient_id.iloc[test].isin(shared)` is true where a test image is of a shared patient. The mean of
# true and
# false is a share.
#
# </details>

# %% tags=["task"]
training, test = list(range(0, len(table), 2)), list(range(1, len(table), 2))
shared = shared_patients(table, training, test)
# BEGIN STUB
# leak = ...  # in per cent of the test images
# BEGIN SOLUTION
leak = 100 * table.patient_id.iloc[test].isin(shared).mean()
# END SOLUTION

# %%
patients.check_leak(leak, table, training, test)

# %% [markdown]
# ## Deal by age
#
# Write a function that deals the **patients** of some rows to hospitals: sorted by age, the youngest at the
# first
# hospital, about as many patients at each. A patient's age is the mean over the visits. Return a list of row
# numbers for each hospital.
#
# <details><summary>Hint 1</summary>
#
# First a row for each patient: `table.iloc[rows].groupby("patient_id").age.mean().sort_values()`.
#
# </details>
# <details><summary>Hint 2</summary>
#
# `np.array_split(ages.index, num_hospitals)` cuts the patients, and loses none. Then collect the rows of
# each piece.
#
# </details>


# %% tags=["task"]
def deal_by_age(table, rows, num_hospitals):
    """Return a list of row numbers for each hospital: whole patients, the youngest first."""
    # BEGIN SOLUTION
    ages = table.iloc[rows].groupby("patient_id").age.mean().sort_values()
    pieces = [set(piece) for piece in np.array_split(ages.index, num_hospitals)]
    return [[row for row in rows if table.patient_id.iloc[row] in piece] for piece in pieces]
    # END SOLUTION


# %%
patients.check_deal_by_age(deal_by_age)

# %% [markdown]
# ## Look again
#
# Your hospitals, and how far their mean ages are apart.

# %%
rows = [row for row in range(len(table)) if not np.isnan(table.age.iloc[row])]
hospitals = deal_by_age(table, rows, 3)
means = [float(table.age.iloc[part].mean()) for part in hospitals]
plots.clients(table, hospitals, title="dealt by age")
answers.compare(participant, "years between the hospitals", means[-1] - means[0], "years")

# %% [markdown]
# ## Talk about it
#
# - In real collections children come from one hospital and the old from another. What else do they share,
#   besides their age?
# - You split by patient. What would leak if two hospitals had treated the same person under two numbers?
#
# The library's own functions are [`holdout` and `partition`](/fmfl/split.py).
#
# ---
# next: [part 2, be the server](2_server.ipynb)

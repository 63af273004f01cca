# %% [markdown]
# # Part 3 · The teacher's loss
#
# [part 2, be the server](2_server.ipynb) · next: [part 4, break it](4_break.ipynb)
#
# **Goal:** write Eq. 4 and Eq. 5, by which a small student learns from a large teacher, and train with them.
# **Time:** 40 minutes; the computer needs about half a minute.

# %% [markdown]
# ## Set up

# %% tags=["parameters"]
participant: str = "me"
num_phantoms: int = 120  # synthetic X-rays
epochs: int = 4  # passes of the proxy set

# %%
import torch
from torch.nn import functional as F

import fmfl
from fmfl.analysis import plots, show
from fmfl.course import answers, distillation
from fmfl.course import setting as course

plots.use_style()
setting = course.load("iid", num_phantoms=num_phantoms)
proxy = setting.parts.proxy

# %% [markdown]
# ## Predict
#
# At one pixel one of the two is nearly sure of lung (99 %), and the other undecided (50 %). A divergence
# has a direction. Which is
# larger: *sure first*, KL(0.99 || 0.5), or *undecided first*, KL(0.5 || 0.99), or are they *equal*?

# %%
# BEGIN STUB
# prediction = ...  # "sure first", "undecided first" or "equal"
# BEGIN SOLUTION
prediction = "equal"
# END SOLUTION
answers.choose(participant, "larger divergence", prediction, ["sure first", "undecided first", "equal"])

# %% [markdown]
# ## Ask the teacher
#
# The teacher gets an image and a box a lung. Its answer is a **logit** a pixel: above 0 is lung. The
# sigmoid makes it a
# probability.

# %% tags=["training"]
masks = setting.cohort.masks[proxy]
boxes = fmfl.prompts.prompt(masks)
teacher = fmfl.teacher.load("builtin")
answered = fmfl.teacher.cached_logits(teacher, setting.cohort.images[proxy], boxes, progress=False)
teacher_logits = answered.logits.float()
dice = fmfl.metrics.dice(teacher_logits > 0, masks)
plots.teacher_gallery(setting.cohort.images[proxy], masks, teacher_logits > 0, dice)

# %% [markdown]
# ## Write Eq. 4
#
# Each pixel is a coin with two outcomes. With $p = \sigma(\text{teacher} / T)$ and $q =
# \sigma(\text{student} / T)$:
#
# $$D_{KL} = T^2 \cdot \operatorname{mean}\Big[\, p \log\frac{p}{q} + (1-p) \log\frac{1-p}{1-q} \,\Big].$$
#
# The teacher is a constant: no gradient flows into it. Teachers are sure of most pixels: for logits of ±200
# the result has to stay finite.
#
# <details><summary>Hint 1</summary>
#
# `torch.sigmoid(x)` is the probability of lung, and `torch.sigmoid(-x)` that of the background.
#
# </details>
# <details><summary>Hint 2</summary>
#
# `F.logsigmoid(x)` is the logarithm of the first and `F.logsigmoid(-x)` of the second. They are finite for
# any logit.
#
# </details>


# %% tags=["task"]
def kl(student_logits, teacher_logits, temperature):
    """Return Eq. 4, one number, for logits [B, 1, H, W] of the student and the teacher."""
    # BEGIN SOLUTION
    teacher, student = teacher_logits.detach() / temperature, student_logits / temperature
    lung = teacher.sigmoid() * (F.logsigmoid(teacher) - F.logsigmoid(student))
    background = (-teacher).sigmoid() * (F.logsigmoid(-teacher) - F.logsigmoid(-student))
    return temperature**2 * (lung + background).mean()
    # END SOLUTION


# %%
distillation.check_kl(kl)

# %% [markdown]
# Back to your prediction. The logit of 0.99 is 4.6, that of 0.5 is 0. Your own function answers (the
# student stands first in its arguments).

# %%
sure, undecided = torch.full((1, 1, 1, 1), 4.6), torch.zeros(1, 1, 1, 1)
sure_first, undecided_first = kl(undecided, sure, 1).item(), kl(sure, undecided, 1).item()
print(f"sure first {sure_first:.2f}, undecided first {undecided_first:.2f}")
outcome = "sure first" if sure_first > undecided_first else "undecided first"
answers.compare(participant, "larger divergence", outcome)

# %% [markdown]
# ## Write Eq. 5
#
# The teacher has the share $\alpha$, the true masks have the rest:
#
# $$\mathcal{L} = \alpha\, D_{KL} + (1-\alpha)\, \mathcal{L}_{\text{Dice}}.$$
#
# Use your `kl`. The Dice loss is there: `fmfl.losses.dice_loss(logits, masks)`.
#
# <details><summary>Hint</summary>
#
# Which of the two is compared with the masks, the student or the teacher? Which of them can learn?
#
# </details>


# %% tags=["task"]
def eq5(student_logits, teacher_logits, masks, alpha, temperature):
    """Return Eq. 5, one number."""
    # BEGIN SOLUTION
    distil = kl(student_logits, teacher_logits, temperature)
    return alpha * distil + (1 - alpha) * fmfl.losses.dice_loss(student_logits, masks)
    # END SOLUTION


# %%
distillation.check_eq5(eq5)

# %% [markdown]
# ## Train with it
#
# The same student, from the same random weights, for a few passes of the proxy set: with the masks alone
# ($\alpha = 0$), with both, and with the
# teacher alone ($\alpha = 1$), which never sees a true mask.

# %% tags=["training"]
scores = {}
for alpha in (0.0, 0.6, 1.0):

    def loss(logits, masks, teacher_logits, alpha=alpha):
        """Return Eq. 5 as the training calls it."""
        return eq5(logits, teacher_logits, masks, alpha, 1.0)

    state = course.trained(setting, loss, epochs, teacher_logits)
    scores[f"alpha = {alpha}"] = course.dice(setting, state)

# %%
show.table(scores, 1)

# %% [markdown]
# ## Talk about it
#
# - These are few images, few passes and one seed. Which of the differences would you report, and what would
#   you need to do so?
# - Where can a student learn more from a teacher's probabilities than from a mask? Think of the border of a
#   lung.
#
# The library's losses are [`kl_divergence` and `distillation_loss`](/fmfl/losses.py).
#
# ---
# [part 2, be the server](2_server.ipynb) · next: [part 4, break it](4_break.ipynb)

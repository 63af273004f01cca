"""Tables, figure and page of the experiments; intervals are over seeds and patients together."""

import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench import lessons
from bench.independent import BATCH_SIZE
from fmfl.analysis import claims, markdown, plots, statistics, words
from fmfl.analysis.tables import PAPER_INITS

#: Names of `lessons.NAMES` on a page.
LESSONS = {
    "own_masks": "proxy masks alone",
    "corpus_masks": "proxy and corpus masks",
    "guangzhou_masks": "proxy and Guangzhou's corpus masks",
    "shipped": "the shipped teacher",
    "corpus": "a teacher of the same images",
    "montgomery": "a teacher of Montgomery's images",
    "synthetic": "a teacher of synthetic X-rays",
    "kidneys": "a teacher of drawn kidneys",
}

#: Images of the study's proxy set.
PROXY_IMAGES = 796

#: Numbers of proxy images with a mask, by the name of the lessons' settings.
BUDGETS = {"10 masks": 10, "30 masks": 30, "100 masks": 100, "all masks": PROXY_IMAGES}

#: Titles of a figure's panels, where a setting's name is no good one.
PANELS = {
    "balanced_iid": "balanced, IID",
    "balanced_age": "balanced, by age",
    "balanced_site": "balanced, by hospital",
    "balanced_iid, E=5": "balanced, IID, 5 epochs",
    "balanced_age, E=5": "balanced, by age, 5 epochs",
    "age": "age",
    "age_with_proxy": "age, proxy images inside",
    "age, cosine": "age, decaying rate",
    "age_with_proxy, cosine": "age, proxy images inside,\ndecaying rate",
    "iid, cosine": "IID, decaying rate",
}

#: Columns that name a run.
RUN = ["split", "arm", "init", "seed"]

#: Images of a round of one local epoch in the study's parts, and of an informed start: 8 epochs of 796.
CLIENTS_IMAGES, START_IMAGES = 969, 8 * PROXY_IMAGES

#: Steps of a round in the study's parts by age or IID, and of ten by number, where one client is large.
CLIENTS_STEPS, QUANTITY_STEPS = 41, 840

#: Images of a random start's ten rounds.
RANDOM_IMAGES = 10 * CLIENTS_IMAGES

#: In the balanced deals: images and steps of a random start's 20 rounds IID, and steps of an informed start.
SKEW_IMAGES, SKEW_STEPS, SKEW_START_STEPS = 6220, 260, 408

#: Arm, initial state and setting, as `statistics.contrast` has them.
Cell = tuple[str, str, str]


class Contrast(NamedTuple):
    """A weighted sum of cells in one round, for one group of test images.

    Attributes:
        label: text of the page.
        cells: to weights.
        round: 0 is the start; -1 the last.
        group: all, adults or children.
        images: in place of a round: each run's last one that has seen no more training images than this,
            those of its start included.
        steps: in place of a round: each run's last one with no more steps one after another than this.
    """

    label: str
    cells: dict[Cell, float]
    round: int = -1
    group: str = "all"
    images: int | None = None
    steps: int | None = None


def setting_name(trial: dict) -> str:
    """Name all that the trials of a cell share: the deal, local epochs and schedule."""
    parts = [trial["deal"], f"E={trial['epochs']}" * (trial["epochs"] > 1)]
    parts += [trial["schedule"] * (trial["schedule"] != "constant"), "more epochs" * trial["equal_steps"]]
    if trial.get("alpha"):
        parts.append("teacher stays")
    if trial.get("lesson"):
        parts = [trial["lesson"], f"{trial['labelled'] or 'all'} masks"]
    return ", ".join(filter(None, parts))


def batches(images: int) -> int:
    """Number of batches, and so of steps, in one epoch."""
    return math.ceil(images / BATCH_SIZE)


def scores_of(finished: list[dict[str, Any]]) -> pd.DataFrame:
    """Scores of finished trials: one row a test image and round; Dice is in 0..1.

    `images_seen` counts all images that went through the student, those of its start included. `steps` counts
    batches one after another: clients train side by side, so a round is as long as its largest client's. It
    holds for starts that have learned from the whole proxy set, not for those of `taught`.
    """
    tables = []
    for trial in finished:
        images = {"image_id": trial["images"], "patient_id": trial["patients"], "age": trial["ages"]}
        key = {name: trial[name] for name in ("arm", "init", "seed")} | {"split": setting_name(trial)}
        start_steps = batches(trial["proxy"]) * trial["images_seen"][0] // trial["proxy"]
        largest = sum(trial["clients"]) if trial["arm"] == "centralised" else max(trial["clients"])
        round_steps = trial["epochs"] * batches(largest)
        for number, dice in enumerate(trial["dice"]):
            seen = trial["images_seen"][number]
            about = {"round": number, "images_seen": seen, "teacher_dice": trial.get("teacher_dice")}
            about["steps"] = start_steps + number * round_steps
            table = pd.DataFrame(images).assign(**key, **about, dice=dice)
            tables.append(table)
    return pd.concat(tables, ignore_index=True)


def chosen(
    scores: pd.DataFrame,
    round: int = -1,
    group: str = "all",
    images: int | None = None,
    steps: int | None = None,
) -> pd.DataFrame:
    """Scores of one round, or of each run within a budget, and of one group of test images.

    Args:
        round, group, images, steps: see `Contrast`.
    """
    if images is not None and steps is not None:
        raise ValueError("a budget counts images or steps, not both")
    if images is None and steps is None:
        rows = scores[scores["round"] == (scores["round"].max() if round < 0 else round)]
    else:
        within = scores[scores.steps <= steps] if images is None else scores[scores.images_seen <= images]
        rows = within[within["round"] == within.groupby(RUN)["round"].transform("max")]
    if group == "adults":
        return rows[rows.age >= 18]
    return rows[rows.age < 18] if group == "children" else rows


# ------------------------------------------------------------------------------------------ what is compared


def difference(label: str, one: Cell, other: Cell, **where: object) -> Contrast:
    """One cell less another."""
    return Contrast(label, {one: 1, other: -1}, **where)


def difference_at_most(label: str, one: Cell, other: Cell, **most: int) -> Contrast:
    """One cell less another where each has had no more than so many `images` or `steps`."""
    ((what, number),) = most.items()
    return difference(f"{label}, at most {number:,} {what}", one, other, **most)


def of_skew() -> Iterator[Contrast]:
    """The manipulation check, the starts' differences under each deal, and the difference of two losses."""
    for epochs in ("", ", E=5"):
        iid = f"balanced_iid{epochs}"
        for name in ("age", "site") if not epochs else ("age",):
            skewed = f"balanced_{name}{epochs}"
            for init in PAPER_INITS:
                cells = ("federated", init, iid), ("federated", init, skewed)
                yield difference(f"{words.INITS[init]}: IID less {name}{epochs}", *cells)
            for init in PAPER_INITS[1:]:
                cells = {("federated", "random", iid): 1, ("federated", "random", skewed): -1}
                cells |= {("federated", init, iid): -1, ("federated", init, skewed): 1}
                yield Contrast(f"loss of random less loss of {words.INITS[init]}, {name}{epochs}", cells)
        for deal in ("iid", "age", "site") if not epochs else ("iid", "age"):
            skewed = f"balanced_{deal}{epochs}"
            fm, pretraining, random = (
                ("federated", init, skewed) for init in ("fm", "pretraining", "random")
            )
            yield difference(f"foundation model less random, {deal}{epochs}", fm, random)
            if not epochs:
                yield difference_at_most(
                    f"foundation model less random, {deal}", fm, random, images=SKEW_IMAGES
                )
            yield difference(f"pre-training less random, {deal}{epochs}", pretraining, random)
            yield difference(f"foundation model less pre-training, {deal}{epochs}", fm, pretraining)
    random, skewed = ("federated", "random", "balanced_iid"), ("federated", "random", "balanced_age")
    for group in ("adults", "children"):
        yield difference(f"random: IID less age, {group}", random, skewed, group=group)
        fm = ("federated", "fm", "balanced_age")
        yield difference(f"foundation model less random, age, {group}", fm, skewed, group=group)
    for init in PAPER_INITS:
        iid, site = (("federated", init, f"balanced_{deal}") for deal in ("iid", "site"))
        steps = SKEW_STEPS + (SKEW_START_STEPS if init != "random" else 0)
        yield difference_at_most(f"{words.INITS[init]}: IID less site", iid, site, steps=steps)
    yield difference(
        "centralised less federated, random, age", ("centralised", "random", "balanced_age"), skewed
    )
    yield difference(
        "federated less standalone, random, age", skewed, ("standalone", "random", "balanced_age")
    )


def of_budgets() -> Iterator[Contrast]:
    """What an informed start is worth against the same images and steps given otherwise."""
    fm, pretraining, random = (("federated", init, "age") for init in ("fm", "pretraining", "random"))
    inside = ("federated", "random", "age_with_proxy")
    everything = ("centralised", "random", "age_with_proxy")
    for number in (1, 2, 4, 10):
        about = f"{number} round" + "s" * (number > 1)
        yield difference(f"foundation model less random, {about}", fm, random, round=number)
        yield difference(f"foundation model less pre-training, {about}", fm, pretraining, round=number)
    for label, one in (("foundation model", fm), ("pre-training", pretraining)):
        yield difference_at_most(f"{label} less random", one, random, images=RANDOM_IMAGES)
    about = "random with the proxy images inside less random"
    yield difference(about, inside, random)
    yield difference_at_most(about, inside, random, images=RANDOM_IMAGES)
    for label, one in (("foundation model", fm), ("pre-training", pretraining)):
        about = f"{label} less random with the proxy images inside"
        yield difference(about, one, inside)
        yield difference_at_most(about, one, inside, images=START_IMAGES + RANDOM_IMAGES)
    yield difference("centralised from random on all images less foundation model", everything, fm)
    for init in PAPER_INITS[1:]:
        one, other = ("centralised", init, "age"), ("centralised", "random", "age")
        about = f"centralised from {words.INITS[init]} less centralised from random"
        yield difference(about, one, other)
        yield difference_at_most(about, one, other, images=RANDOM_IMAGES)
    alone = [("centralised", init, "age") for init in ("fm", "random")]
    yield Contrast(
        f"the student's lead: federated less centralised, at most {RANDOM_IMAGES:,} images",
        {fm: 1, random: -1, alone[0]: -1, alone[1]: 1},
        images=RANDOM_IMAGES,
    )
    yield difference_at_most("random: federated less centralised", random, alone[1], steps=10 * CLIENTS_STEPS)
    for init in ("random", "fm"):
        one, other = ("federated", init, "age, teacher stays"), ("federated", init, "age")
        yield difference(f"{words.INITS[init]}: the teacher stays less it does not", one, other)
    yield difference(
        "random, the teacher stays, less foundation model", ("federated", "random", "age, teacher stays"), fm
    )
    for init in PAPER_INITS:
        one, other = ("federated", init, "quantity, more epochs"), ("federated", init, "quantity")
        yield difference(
            f"{words.INITS[init]}, quantity skew: more epochs for the smallest client less equal epochs",
            one,
            other,
        )
    for how in ("quantity", "quantity, more epochs"):
        one, other = ("federated", "fm", how), ("federated", "random", how)
        yield difference(f"foundation model less random, {how}", one, other)
        yield difference_at_most(f"foundation model less random, {how}", one, other, steps=QUANTITY_STEPS)


def of_plateau() -> Iterator[Contrast]:
    """The starts' differences after 10, 20, 40 and 60 rounds, at equal images and at equal steps.

    The control's clients hold the proxy images beside their own.
    """
    for setting in ("age, cosine", "iid, cosine", "age", "iid"):
        fm, pretraining, random = (("federated", init, setting) for init in ("fm", "pretraining", "random"))
        for number in (10, 20, 40, 60):
            about = f"{setting}, {number} rounds"
            yield difference(f"foundation model less random, {about}", fm, random, round=number)
            yield difference(f"foundation model less pre-training, {about}", fm, pretraining, round=number)
        for number in (20, 40, 60):
            images = number * CLIENTS_IMAGES
            yield difference_at_most(f"foundation model less random, {setting}", fm, random, images=images)
        for number in (20, 30, 40, 60):
            steps = number * CLIENTS_STEPS
            yield difference_at_most(f"foundation model less random, {setting}", fm, random, steps=steps)
    fm, random = (("federated", init, "age, cosine") for init in ("fm", "random"))
    inside = ("federated", "random", "age_with_proxy, cosine")
    about, control = "age, cosine, 60 rounds", "random with the proxy images inside"
    yield difference(f"{control} less random, {about}", inside, random)
    yield difference(f"foundation model less {control}, {about}", fm, inside)


def of_taught() -> Iterator[Contrast]:
    """Each lesson less pre-training on the proxy images' masks, and the teacher's less those of its masks."""
    pairs = [("shipped", masks) for masks in lessons.SUPERVISED[1:]]
    pairs += [(name, "own_masks") for name in (*lessons.TAUGHT, *lessons.SUPERVISED[1:])]
    for number, when in ((0, "before any round"), (-1, "after two rounds")):
        for budget in BUDGETS:
            for one, other in pairs:
                cells = (("federated", lessons.init_of(name), f"{name}, {budget}") for name in (one, other))
                label = f"{LESSONS[one]} less {LESSONS[other]}, {budget}, {when}"
                yield difference(label, *cells, round=number)


CONTRASTS = {"skew": of_skew, "budgets": of_budgets, "plateau": of_plateau, "taught": of_taught}


def differences(scores: pd.DataFrame, contrasts: Iterable[Contrast]) -> pd.DataFrame:
    """All contrasts of an experiment that its finished trials allow, corrected together."""
    contrasts, rows = list(contrasts), []
    for one in contrasts:
        where = {name: getattr(one, name) for name in ("round", "group", "images", "steps")}
        rows.append(statistics.contrast(chosen(scores, **where), one.cells))
    kept = [number for number, row in enumerate(rows) if not row["missing"]]
    if not kept:
        return pd.DataFrame(columns=["difference", "reading"])
    table = statistics.corrected(pd.DataFrame([rows[number] for number in kept]))
    return table.assign(difference=[contrasts[number].label for number in kept])


def means(scores: pd.DataFrame, number: int = -1) -> pd.DataFrame:
    """Dice of every cell after a round, in %, with its interval; -1 is the last."""
    last = chosen(scores, number)
    rows = []
    for cell in last[["split", "arm", "init"]].drop_duplicates().itertuples(index=False):
        about = cell._asdict()
        found = statistics.contrast(last, {(cell.arm, cell.init, cell.split): 1})
        own = last[(last[list(about)] == pd.Series(about)).all(axis=1)]
        costs = {"images_seen": round(own.images_seen.mean()), "teacher_dice": own.teacher_dice.mean()}
        rows.append(about | costs | found)
    return pd.DataFrame(rows)


def fig3(scores: pd.DataFrame) -> pd.DataFrame:
    """The paper's claims on rounds, judged on runs that are longer than the rounds it names."""
    scores = scores[scores.split == "age, cosine"]
    tested = {"images": scores.image_id.nunique(), "patients": scores.patient_id.nunique()}
    runs = scores.groupby(["init", "seed", "round"]).dice.mean().reset_index()
    return pd.DataFrame(claims.claims_of_fig3(runs, tested))


def power(scores: pd.DataFrame, seeds: Iterable[int] = (4, 8, 16, 32, 64, 128, 256)) -> pd.DataFrame:
    """Half-widths in points that the last differences under age skew would have with so many seeds."""
    last, rows = chosen(scores), []
    for lower in PAPER_INITS[:2]:
        cells = {("federated", "fm", "age, cosine"): 1, ("federated", lower, "age, cosine"): -1}
        total, missing = statistics.paired_scores(last, cells)
        if missing or total.shape[1] < 2:
            continue
        patients = statistics.patients_of(last, total.index)
        for number in seeds:
            low, high = statistics.with_seeds(total.to_numpy(), patients, number).interval()
            rows.append({"lower": lower, "seeds": number, "half_width": (high - low) / 2})
    return pd.DataFrame(rows, columns=["lower", "seeds", "half_width"])


# ------------------------------------------------------------------------------------------ page and figure


def means_block(table: pd.DataFrame) -> list[str]:
    """Markdown of the final scores."""
    columns = ["setting", "arm", "start", "Dice in %", "seeds", "images seen"]
    rows = [
        [
            row.split,
            row.arm,
            words.init_name(row.init),
            words.estimate(row.value, row.low, row.high),
            str(row.seeds),
            f"{row.images_seen:,}",
        ]
        for row in table.itertuples()
    ]
    return markdown.table(columns, rows)


def starts_block(before: pd.DataFrame, after: pd.DataFrame) -> list[str]:
    """Markdown of the scores before any round and after the last, by lesson and number of masks."""
    columns = ["learned from", "masks", "teacher's Dice", "before any round", "after two rounds", "seeds"]
    joined = before.merge(after, on="split", suffixes=("", "_after"))
    lessons_in_order, budgets_in_order = list(LESSONS), list(BUDGETS)
    rows = {}
    for row in joined.itertuples():
        lesson, masks = row.split.split(", ")
        taught = "" if pd.isna(row.teacher_dice) else words.number(100 * row.teacher_dice, 1)
        rows[budgets_in_order.index(masks), lessons_in_order.index(lesson)] = [
            LESSONS[lesson],
            masks.removesuffix(" masks"),
            taught,
            words.estimate(row.value, row.low, row.high),
            words.estimate(row.value_after, row.low_after, row.high_after),
            str(row.seeds),
        ]
    return markdown.table(columns, [rows[place] for place in sorted(rows)])


def differences_block(table: pd.DataFrame) -> list[str]:
    """Markdown of the contrasts."""
    columns = ["difference", "points (95 %)", "seeds", "p, corrected", "reading"]
    rows = []
    for row in table.fillna({"reading": ""}).itertuples():
        estimate = words.estimate(row.value, row.low, row.high, sign=True)
        p = words.largest_p(row._asdict())
        rows.append([row.difference, estimate, str(row.seeds), p, words.reading(row._asdict())])
    return markdown.table(columns, rows)


def power_block(table: pd.DataFrame) -> list[str]:
    """Markdown of the half-widths by number of seeds."""
    widths = table.pivot(index="lower", columns="seeds", values="half_width")
    rows = [
        [f"foundation model less {words.INITS[lower]}", *(f"±{width:.2f}" for width in row)]
        for lower, row in zip(widths.index, widths.to_numpy(), strict=True)
    ]
    return markdown.table(["seeds", *map(str, widths.columns)], rows)


#: Horizontal axes of a figure: the column, its label, and by how much it is divided.
BY_ROUND = "round", "round", 1
BY_IMAGES = "images_seen", "training images seen, thousands", 1000
BY_STEPS = "steps", "steps one after another, hundreds", 100


def figure(scores: pd.DataFrame, by: tuple[str, str, int] = BY_ROUND, lowest: float = 80) -> Figure:
    """Mean Dice of federated runs by round, images or steps: a panel a setting; thin lines are seeds."""
    plots.use_style()
    federated = scores[scores.arm == "federated"]
    settings = list(dict.fromkeys(federated.split))
    columns = min(3, len(settings))
    rows = -(-len(settings) // columns)
    drawn, axes = plt.subplots(
        rows, columns, figsize=(max(3.6 * columns, 6.4), 2.8 * rows + 0.6), sharey=True, squeeze=False
    )
    for axis in axes.flat[len(settings) :]:
        axis.set_visible(False)
    for axis, setting in zip(axes.flat, settings, strict=False):
        _panel(axis, federated[federated.split == setting], by)
        axis.set_ylim(lowest, 96)
        axis.set_title(PANELS.get(setting, setting))
        axis.set_xlabel(by[1])
    for axis in axes[:, 0]:
        axis.set_ylabel("Dice, %")
    lines = lines_of(drawn)
    drawn.legend(lines.values(), lines.keys(), loc="outside upper center", ncols=len(lines))
    return drawn


def lines_of(figure: Figure) -> dict[str, Artist]:
    """Return the labelled lines of all axes by label, each label once: for one legend over all of them."""
    return {
        label: line
        for axis in figure.axes
        for line, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }


def _panel(axis: Axes, scores: pd.DataFrame, by: tuple[str, str, int]) -> None:
    """One line a start, thick for the mean over seeds."""
    colour = plots.colours(PAPER_INITS)
    column, _, unit = by
    scores = scores.assign(place=scores[column] / unit, dice=100 * scores.dice)
    points = scores.groupby(["init", "seed", "round"])[["place", "dice"]].mean()
    for init in (init for init in PAPER_INITS if init in points.index.get_level_values("init")):
        for _, one in points.loc[init].groupby("seed"):
            axis.plot(one.place, one.dice, color=colour[init], linewidth=0.6, alpha=0.5)
        # By round, since seeds may have seen other numbers of images by then.
        mean = points.loc[init].groupby("round").mean()
        axis.plot(mean.place, mean.dice, color=colour[init], label=words.INITS[init])


def lessons_figure(scores: pd.DataFrame) -> Figure:
    """Dice of each start before any round by number of masks, and its gain by the Dice of its teacher."""
    plots.use_style()
    begun = scores[scores["round"] == 0]
    dice = 100 * begun.groupby(["split", "seed"]).dice.mean().unstack()
    taught = 100 * begun.groupby("split").teacher_dice.mean()
    colour = dict(zip(LESSONS, sns.color_palette("colorblind", len(LESSONS)), strict=True))
    drawn, (left, right) = plt.subplots(1, 2, figsize=(9.6, 4.8))
    for lesson, label in LESSONS.items():
        known = [masks for masks in BUDGETS if f"{lesson}, {masks}" in dice.index]
        values = [dice.loc[f"{lesson}, {masks}"] for masks in known]
        line = [value.mean() for value in values]
        left.plot([BUDGETS[masks] for masks in known], line, "o-", color=colour[lesson], label=label)
        for masks, marker in (("10 masks", "o"), ("all masks", "s")):
            own, cell = f"own_masks, {masks}", f"{lesson}, {masks}"
            if cell in dice.index and own in dice.index and pd.notna(taught[cell]):
                gain = (dice.loc[cell] - dice.loc[own]).mean()
                right.plot(taught[cell], gain, marker, color=colour[lesson])
    left.set(xscale="log", xlabel="proxy images with a mask", ylabel="Dice before any round, %")
    left.set_xticks(list(BUDGETS.values()), list(map(str, BUDGETS.values())))
    left.minorticks_off()
    left.set_ylim(84, 94)
    right.set(xlim=(82, 97), ylim=(-7, 4))  # the teacher of kidneys lies far below: see the table
    right.axhline(0, color="0.6", linewidth=0.8)
    right.set(xlabel="teacher's Dice on the proxy set, %", ylabel="gain over proxy masks alone, points")
    for marker, masks in (("o", "10 masks"), ("s", "all masks")):
        right.plot([], [], marker, color="0.4", label=masks)
    right.legend(loc="lower right")
    drawn.legend(*left.get_legend_handles_labels(), loc="outside upper center", ncols=2, fontsize="small")
    return drawn


def write(name: str, finished: list[dict[str, Any]], out: Path) -> None:
    """Write means.csv, differences.csv, by_round.csv, the figures, and the tables of an existing page."""
    scores = scores_of(finished)
    out.mkdir(parents=True, exist_ok=True)
    means(scores).round(5).to_csv(out / "means.csv", index=False)
    if name == "taught":
        means(scores, 0).round(5).to_csv(out / "starts.csv", index=False)
    differences(scores, CONTRASTS[name]()).round(5).to_csv(out / "differences.csv", index=False)
    by_round = (
        (100 * scores.groupby([*RUN, "round", "images_seen"], sort=False).dice.mean()).round(3).reset_index()
    )
    by_round.to_csv(out / "by_round.csv", index=False)
    if name == "plateau":
        fig3(scores).round(5).to_csv(out / "claims.csv", index=False)
        power(scores).round(5).to_csv(out / "power.csv", index=False)
    if name == "taught":
        lessons_figure(scores).savefig(out / f"{name}.png", dpi=130)
    elif (scores.arm == "federated").any():
        lowest = 90 if name == "plateau" else 80
        figure(scores, lowest=lowest).savefig(out / f"{name}.png", dpi=130)
        figure(scores, BY_IMAGES, lowest).savefig(out / f"{name}-images.png", dpi=130)
        figure(scores, BY_STEPS, lowest).savefig(out / f"{name}-steps.png", dpi=130)
    page(out)


def page(out: Path) -> None:
    """Write the page's tables again from the committed ones."""
    if (out / "README.md").exists():
        blocks = {
            "means": lambda _: means_block(pd.read_csv(out / "means.csv")),
            "differences": lambda _: differences_block(pd.read_csv(out / "differences.csv")),
            "claims": markdown.BLOCKS["claims"],
            "power": lambda _: power_block(pd.read_csv(out / "power.csv")),
            "starts": lambda _: starts_block(pd.read_csv(out / "starts.csv"), pd.read_csv(out / "means.csv")),
        }
        markdown.write_into(out / "README.md", out, blocks)

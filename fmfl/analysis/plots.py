"""The study's figures, one function each: tables or tensors in, a matplotlib Figure out.

Every function draws with pyplot, so a notebook shows the figure where it is called (end the line with `;`),
and returns it, so that a caller can save it. Axes carry their unit. A start has one colour and one marker
everywhere: the colours are Okabe & Ito's, told apart with any colour vision, the markers in grey print too.
Clients, sites and the teacher have colours of their own. A figure is no wider than a phone's page can show
with its text still readable, unless it holds many groups.
Images and masks may be tensors on any device or arrays, [B, 1, H, W] or [B, H, W]: whole numbers 0..255, or
floats 0..1 as a network sees them; masks 0/1 or bool.
"""

from collections.abc import Iterable, Mapping, Sequence
from itertools import cycle

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from fmfl.analysis.statistics import contrast, seed_interval
from fmfl.analysis.tables import FAILURE, final, known_first, ordered_inits, reference_split
from fmfl.analysis.words import SPLITS, init_name, split_name

PALETTE = {
    "random": "#E69F00",
    "pretraining": "#0072B2",
    "fm": "#009E73",
    "centralised": "#000000",
    "standalone": "#7F7F7F",
    "imagenet": "#CC79A7",
}
MARKERS = {
    "random": "o",
    "pretraining": "s",
    "fm": "^",
    "centralised": "D",
    "standalone": "v",
    "imagenet": "P",
}
TRUTH, PREDICTED, BOX = "#56B4E9", "#D55E00", "#F0E442"  # contours on X-rays
LINES = {TRUTH: "solid", PREDICTED: (0, (3, 1.5)), BOX: "dotted"}  # for those to whom two colours are one
TEACHER = "#5B2A86"
OTHERS = ("#56B4E9", "#D55E00", "#F0E442")
WIDTH = 4.8  # inches; at 390 pixels a page shows 72 pixels of each, so that 10 points are 10 pixels
SMALL = 9  # points, the least size of text


def use_style() -> None:
    """Set the look of every figure after this call."""
    sns.set_theme(context="notebook", style="ticks", palette=list(PALETTE.values()))
    plt.rcParams.update(
        {
            "axes.grid": True,
            "axes.grid.axis": "y",
            "axes.labelsize": 10,
            "axes.titlesize": 10,
            "axes.spines.right": False,
            "axes.spines.top": False,
            "figure.dpi": 100,
            "figure.constrained_layout.use": True,
            "figure.titlesize": 10,
            "font.size": 10,
            "grid.alpha": 0.4,
            "image.cmap": "gray",
            "legend.fontsize": 10,
            "legend.frameon": False,
            "savefig.dpi": 200,
            "xtick.labelsize": 10,
            "ytick.labelsize": 10,
        }
    )


def colours(inits: Iterable[str]) -> dict[str, str]:
    """One colour a start: the study's own where it has one, else the next that is free."""
    inits = list(dict.fromkeys(inits))
    free = iter(OTHERS * (1 + len(inits) // len(OTHERS)))
    return {init: PALETTE.get(init) or next(free) for init in inits}


def group_colours(number: int) -> list[str]:
    """Colours of `number` clients, sites or other groups, light to dark: none is that of a start."""
    return sns.light_palette(TEACHER, number + 1).as_hex()[1:]


# Images


def images(cohort, indices: Iterable[int], *, columns: int = 4) -> Figure:
    """X-rays of a Cohort with the contour of their mask; below each its site and age."""
    indices = [int(index) for index in indices]
    figure, axes = _gallery(len(indices), columns)
    for axis, index in zip(axes, indices, strict=False):
        row = cohort.table.iloc[index]
        _xray(axis, cohort.images[index], {TRUTH: cohort.masks[index]})
        age = "age unknown" if pd.isna(row.age) else f"{row.age:g} years"
        axis.set_xlabel(f"{row.site}\n{age}", fontsize=SMALL)
    return figure


def augmented(images, masks, *, columns: int = 4) -> Figure:
    """Images as the network sees them, after augmentation, with their masks moved along."""
    pictures, outlines = _pixels(images), _pixels(masks)
    figure, axes = _gallery(len(pictures), columns, text=0)
    for axis, picture, outline in zip(axes, pictures, outlines, strict=False):
        _xray(axis, picture, {TRUTH: outline})
    return figure


def boxes(image, boxes, *, teacher_mask=None, mask=None) -> Figure:
    """One image with its box prompts, the teacher's mask and the true one.

    Args:
        image: [1, H, W] or [H, W].
        boxes: [4] or [n, 4] as x0 y0 x1 y1 in pixels of the image.
        teacher_mask: what the teacher makes of the boxes, like `image`.
        mask: the ground truth, like `image`.
    """
    figure, axis = plt.subplots(figsize=(0.8 * WIDTH, 0.85 * WIDTH), layout="constrained")
    _xray(axis, image, {TRUTH: mask, PREDICTED: teacher_mask})
    _boxes(axis, boxes)
    labels = {"ground truth": TRUTH, "teacher": PREDICTED, "box prompt": BOX}
    shown = [
        label for label, what in zip(labels, (mask, teacher_mask, boxes), strict=True) if what is not None
    ]
    _key(figure, {label: labels[label] for label in shown})
    return figure


def teacher_gallery(images, masks, predicted, dice, *, boxes=None, count: int = 2) -> Figure:
    """The teacher's best, median and worst masks by Dice, beside the truth, `count` of each.

    Args:
        images: [B, 1, H, W], as are `masks` and `predicted` (0/1 or bool).
        masks: the ground truth.
        predicted: the teacher's masks.
        dice: [B], 0..1.
        boxes: [B, 4] or [B, n, 4] prompts in pixels, drawn if given.
        count: images of each kind; fewer where there are not 3 * count images.
    """
    dice = _numbers(dice)
    order = np.argsort(-dice, kind="stable")
    count = max(1, min(count, len(order) // 3))
    middle = (len(order) - count) // 2
    kinds = (order[:count], order[middle : middle + count], order[::-1][:count])
    chosen = np.stack(kinds, axis=1).ravel()  # a column a kind
    figure = _compared(images, masks, predicted, dice, chosen, boxes=boxes, columns=3)
    for axis, kind in zip(figure.axes, ("best", "median", "worst"), strict=False):
        axis.set_title(kind)
    return figure


def worst_cases(images, masks, predicted, dice, *, count: int = 6) -> Figure:
    """The `count` images with the lowest Dice, the worst first: truth and prediction. Arguments as above."""
    dice = _numbers(dice)
    return _compared(images, masks, predicted, dice, np.argsort(dice, kind="stable")[:count], columns=3)


# Data


def ages(table: pd.DataFrame, groups: str | Mapping[str, Iterable[int]] = "site") -> Figure:
    """Histogram of ages, stacked by group; images without an age are counted in the legend.

    Args:
        table: a Cohort's table.
        groups: a column of it, or names with the row numbers (indices) that they stand for.
    """
    if isinstance(groups, str):
        groups = {str(name): rows.index for name, rows in table.groupby(groups, sort=True)}
    values = {name: table.age.iloc[_indices(rows)] for name, rows in groups.items()}
    frame = pd.concat([pd.DataFrame({"age": v.dropna(), "name": name}) for name, v in values.items()])
    labels = {
        name: f"{name}: {len(v)}" + (f" ({v.isna().sum()} without age)" if v.isna().any() else "")
        for name, v in values.items()
    }
    figure, axis = plt.subplots(figsize=(WIDTH, 3.2), layout="constrained")
    if len(frame):
        hue = frame.name.map(labels)
        bins = np.arange(0, max(10, frame.age.max()) + 5, 5)
        sns.histplot(
            frame,
            x="age",
            hue=hue,
            hue_order=list(labels.values()),
            multiple="stack",
            bins=bins,
            palette=group_colours(len(labels)),
            alpha=1,
            ax=axis,
        )
        sns.move_legend(axis, "lower left", bbox_to_anchor=(0, 1), ncols=2, title="")
    axis.set(xlabel="age (years)", ylabel="images")
    return figure


def clients(table: pd.DataFrame, clients: Sequence[Iterable[int]], *, title: str = "") -> Figure:
    """A partition: how many images each client holds, and how old their patients are.

    Args:
        table: a Cohort's table.
        clients: one index tensor a client, row numbers of the table.
        title: say how skewed it is here.
    """
    parts = [table.iloc[_indices(indices)] for indices in clients]
    names = [f"client {k}" for k in range(len(parts))]
    palette = dict(zip(names, group_colours(len(names)), strict=True))
    figure, (sizes, ages) = plt.subplots(
        1, 2, figsize=(WIDTH, 0.9 + 0.5 * len(parts)), width_ratios=[2, 3], sharey=True, layout="constrained"
    )
    counts = [len(part) for part in parts]
    bars = sizes.barh(names, counts, color=palette.values())
    people = [f"{len(part)} ({part.patient_id.nunique()})" for part in parts]
    sizes.bar_label(bars, people, padding=3, fontsize=SMALL)
    sizes.set(xlabel="images (patients)", xlim=(0, 2.2 * max([*counts, 1])))
    sizes.xaxis.get_major_locator().set_params(nbins=3)
    frame = pd.concat(
        [
            pd.DataFrame({"age": part.age.dropna(), "client": name})
            for name, part in zip(names, parts, strict=True)
        ]
    )
    if len(frame):
        sns.boxplot(
            frame,
            x="age",
            y="client",
            hue="client",
            order=names,
            palette=palette,
            legend=False,
            ax=ages,
            fliersize=2,
            width=0.6,
        )
    ages.set(xlabel="age (years)", ylabel="")
    for axis in (sizes, ages):
        axis.grid(axis="x")
        axis.grid(visible=False, axis="y")
    figure.suptitle(title)
    return figure


# Training


def dice_by_rule(scores: pd.DataFrame) -> Figure:
    """The teacher's Dice and HD95 by box rule: one point an image, the median as a line.

    Args:
        scores: one row an image and rule, columns rule, dice (0..1) and hd95 (pixels).
    """
    rules = list(dict.fromkeys(scores.rule))
    figure, axes = plt.subplots(
        1, 2, figsize=(WIDTH, 0.8 + 0.6 * len(rules)), sharey=True, width_ratios=[3, 2], layout="constrained"
    )
    for axis, score in zip(axes, ("dice", "hd95"), strict=True):
        common = dict(data=scores, x=score, y="rule", order=rules, ax=axis)
        sns.boxplot(**common, color=group_colours(5)[0], showfliers=False, width=0.6)
        sns.stripplot(**common, color=TEACHER, size=2, alpha=0.5)
        axis.grid(axis="x")
        axis.grid(visible=False, axis="y")
    means = scores.groupby("rule")[["dice", "hd95"]].mean()
    labels = [
        f"{rule.replace(', ', chr(10))}\n{means.dice[rule]:.3f}, {means.hd95[rule]:.1f} px" for rule in rules
    ]
    axes[0].set_yticks(range(len(rules)), labels, fontsize=SMALL)
    axes[0].set(xlabel="teacher's Dice", ylabel="rule, and mean scores")
    axes[1].set(xlabel="HD95 (pixels)", ylabel="")
    return figure


def dice_by_jitter(scores: pd.DataFrame) -> Figure:
    """The teacher's Dice and HD95 by how far its boxes are off: means and their 95 % intervals over images.

    Args:
        scores: one row an image and distance, columns pixels, dice (0..1) and hd95 (pixels).
    """
    figure, axes = plt.subplots(1, 2, figsize=(WIDTH, 2.6), layout="constrained")
    for axis, score, label in zip(axes, ("dice", "hd95"), ("Dice", "HD95 (pixels)"), strict=True):
        sns.lineplot(
            scores,
            x="pixels",
            y=score,
            ax=axis,
            color=TEACHER,
            marker="o",
            err_style="bars",
            seed=0,
        )
        axis.set(xlabel="", ylabel=f"teacher's mean {label}")
        axis.grid(axis="y")
    figure.supxlabel("each side of the box moved by up to so many pixels", fontsize=10)
    return figure


def reliability(table: pd.DataFrame, error: float) -> Figure:
    """Share of the pixels that are in the mask, by the probability predicted for them; ideal: the diagonal.

    Args:
        table: from `metrics.reliability`.
        error: the expected calibration error, 0..1, for the title.
    """
    filled = table.dropna()
    figure, axis = plt.subplots(figsize=(4.2, 4.0), layout="constrained")
    axis.plot([0, 1], [0, 1], color="0.6", linewidth=1, linestyle="--")
    axis.plot(filled.probability, filled.frequency, marker="o", color=TEACHER)
    axis.set(
        xlabel="predicted probability", ylabel="share of pixels in the mask", xlim=(0, 1), ylim=(0, 1),
        title=f"expected calibration error {error:.4f}", aspect="equal",
    )  # fmt: skip
    return figure


def loss_curves(history: pd.DataFrame) -> Figure:
    """Loss by epoch, a line a start.

    Args:
        history: one row an epoch, with epoch and loss, and init where it holds several starts. Other columns
            that end in _loss (the parts of Eq. 5) are drawn dashed and dotted.
    """
    parts = [name for name in history if name == "loss" or str(name).endswith("_loss")]
    runs = dict(tuple(history.groupby("init", sort=False))) if "init" in history else {"": history}
    palette = colours(runs)
    figure, axis = plt.subplots(figsize=(WIDTH, 3.2), layout="constrained")
    for init, run in runs.items():
        for part, line in zip(parts, ["-", "--", ":", "-."], strict=False):
            name = part.removesuffix("_loss") if part != "loss" else ("loss" if len(parts) == 1 else "sum")
            label = ", ".join(filter(None, [init_name(init), name if len(parts) > 1 else ""]))
            marker = "o" if len(run) == 1 else None  # a line through one epoch is not to be seen
            axis.plot(run.epoch, run[part], line, marker=marker, color=palette[init], label=label or None)
    axis.set(xlabel="epoch", ylabel="each start's own training loss" if len(runs) > 1 else "loss")
    axis.xaxis.get_major_locator().set_params(integer=True)
    _legend_above(figure, axis)
    return figure


def dice_by_alpha(table: pd.DataFrame, teacher: float | None = None) -> Figure:
    """Dice of distilled students by the teacher's share alpha: a line a temperature, others as points.

    At alpha = 0 the teacher has no say, so that student begins every line.

    Args:
        table: one row a student, with alpha, temperature, labels (soft, hard), views (cached, fresh) and
            dice (0..1).
        teacher: its own Dice, 0..1, drawn as a level.
    """
    usual = (table.labels == "soft") & (table["views"] == "cached")
    alone = table[table.alpha == 0]
    lines = table[usual & (table.alpha > 0)]
    figure, axis = plt.subplots(figsize=(WIDTH, 3.6), layout="constrained")
    temperatures = list(lines.groupby("temperature"))
    palette = group_colours(max(1, len(temperatures)))
    for color, marker, (temperature, rows) in zip(palette, cycle("os^Dv"), temperatures, strict=False):
        rows = pd.concat([alone, rows]).sort_values("alpha")
        label = f"T = {temperature:g}"
        axis.plot(rows.alpha, 100 * rows.dice, marker=marker, color=color, label=label)
    if lines.empty:
        axis.plot(alone.alpha, 100 * alone.dice, "o", color=palette[0], label="masks alone")
    others = table[~usual & (table.alpha > 0)]
    for marker, row in zip("^sDvP", others.itertuples(), strict=False):
        label = ", ".join(
            [f"{row.labels} labels"] * (row.labels != "soft")
            + [f"{row.views} views"] * (row.views != "cached")
        )
        axis.plot(row.alpha, 100 * row.dice, marker, color="black", fillstyle="none", label=label)
    if teacher is not None:
        label = f"the teacher, told the box: {100 * teacher:.1f}"
        axis.axhline(100 * teacher, color="black", linestyle="--", linewidth=1.2, label=label)
    axis.set(
        xlabel="alpha: the teacher's share in the loss\n(0: Dice loss alone, 1: KL divergence alone)",
        ylabel="Dice on the test images (%)",
        xlim=(-0.04, 1.04),
    )
    _legend_above(figure, axis)
    return figure


def dice_by_round(history: pd.DataFrame) -> Figure:
    """Dice on the test images by round, a line a start.

    Args:
        history: one row a scored round, with round and dice (0..1), and init where it holds several starts.
    """
    figure, axis = plt.subplots(figsize=(WIDTH, 3.6), layout="constrained")
    _rounds(axis, history if "init" in history else history.assign(init=""))
    _legend_above(figure, axis)
    return figure


# Results


def fig2(results: pd.DataFrame, per_image: pd.DataFrame | None = None) -> Figure:
    """The paper's Fig. 2: final federated Dice by split and start, centralised training as a line.

    A large marker is the mean over seeds, small ones are the seeds. The line is the 95 % interval: over seeds
    and patients together where `per_image` is given, else Student's t over seeds. Markers and not
    bars, because bars from zero would hide the differences and cut bars would exaggerate them.
    """
    last = final(results)
    federated = last[last.arm == "federated"]
    inits, splits = ordered_inits(federated), known_first(federated.split, SPLITS)
    palette = colours(inits)
    width = max(WIDTH, 0.7 + 0.45 * len(inits) * len(splits))  # the means' labels side by side
    figure, axis = plt.subplots(figsize=(width, 4), layout="constrained")
    _level(axis, last)
    step = 0.75 / max(1, len(inits))
    for i, init in enumerate(inits):
        label = init_name(init)
        for j, split in enumerate(splits):
            dice = 100 * federated[(federated.init == init) & (federated.split == split)].dice
            if dice.empty:
                continue
            x = j + (i - (len(inits) - 1) / 2) * step
            low, high = _interval(dice, per_image, init, split)
            style = {"color": palette[init], "marker": MARKERS.get(init, "X")}
            axis.plot([x, x], [low, high], color=palette[init], linewidth=2)
            axis.plot(x, dice.mean(), linestyle="", markersize=9, label=label, **style)
            if len(dice) > 1:
                axis.plot(
                    np.full(len(dice), x + 0.22 * step), dice, linestyle="", markersize=4, alpha=0.6, **style
                )
            top = np.nanmax([dice.mean(), high])
            at = {"xytext": (0, 4), "textcoords": "offset points", "ha": "center", "fontsize": SMALL}
            axis.annotate(f"{dice.mean():.1f}", (x, top), **at)
            label = None
    axis.set_xticks(range(len(splits)), [split_name(split) for split in splits])
    axis.set(ylabel="Dice on the test images (%)", xlim=(-0.6, len(splits) - 0.4))
    _legend_above(figure, axis)
    return figure


def fig3(results: pd.DataFrame, split: str | None = None) -> Figure:
    """The paper's Fig. 3: Dice by round under one split, whole above and its top enlarged below.

    A line is the mean over seeds, its band their range; the dashed line is centralised training's end. The
    split is `reference_split` if not given.
    """
    split = reference_split(results) if split is None else split
    runs = results[(results.arm == "federated") & (results.split == split)]
    figure, (whole, top) = plt.subplots(2, 1, figsize=(WIDTH, 6.4), layout="constrained")
    for axis in (whole, top):
        _level(axis, final(results))
        _rounds(axis, runs)
        axis.set_xlabel(f"round ({split_name(split)})")
    ends = final(runs)
    informed = ends[ends.init != "random"]  # a start far below would leave nothing to enlarge
    lowest = 100 * (informed if len(informed) else ends).dice.min() - 2
    if np.isfinite(lowest):
        top.set(ylim=(lowest, 100 * results.dice.max() + 1), ylabel="the same, enlarged (%)")
    _legend_above(figure, whole)
    return figure


def per_image(per_image: pd.DataFrame, split: str | None = None) -> Figure:
    """Draw final Dice of the test images by start: a box, and a point for each image below 0.8.

    An image's score is its mean over seeds. The federated arm under `split` is shown, by default
    `reference_split`, and the centralised one where it was run.
    """
    split = reference_split(per_image) if split is None else split
    federated = per_image[(per_image.arm == "federated") & (per_image.split == split)]
    centralised = per_image[per_image.arm == "centralised"].assign(init="centralised")
    frame = (
        pd.concat([federated, centralised])
        .groupby(["init", "image_id"], sort=False)
        .dice.mean()
        .reset_index()
    )
    inits = ordered_inits(frame)
    palette = colours(inits)
    figure, axis = plt.subplots(figsize=(WIDTH, 0.9 + 0.7 * len(inits)), layout="constrained")
    sns.boxplot(
        frame,
        x="dice",
        y="init",
        order=inits,
        hue="init",
        palette=palette,
        ax=axis,
        legend=False,
        width=0.5,
        showfliers=False,
        boxprops={"alpha": 0.6},
    )
    failed = frame[frame.dice < FAILURE]
    if len(failed):
        apart = np.random.default_rng(0).uniform(-0.1, 0.1, len(failed))  # so that points do not hide others
        place = failed.init.map(inits.index) + apart
        axis.scatter(failed.dice, place, s=16, c=failed.init.map(palette), zorder=3)
    axis.axvline(FAILURE, color="black", linewidth=1, linestyle=":")
    below = failed.init.value_counts()
    labels = [f"{init_name(init)}\n{below.get(init, 0)} below {FAILURE:g}" for init in inits]
    axis.set_yticks(range(len(inits)), labels)
    axis.set(xlabel=f"Dice of a test image ({split_name(split)})", ylabel="")
    axis.grid(axis="x")
    return figure


def when_it_pays(gains: pd.DataFrame) -> Figure:
    """The map: points of final Dice that the teacher's student gains where one setting is changed.

    A row an axis, a column a pair of starts; bars are 95 % intervals over seeds and patients, hollow markers
    are gains inside the noise, and the study's own value is among the others.

    Args:
        gains: from `analysis.gains`.
    """
    axes_ = list(dict.fromkeys(gains.axis))
    pairs = list(dict.fromkeys(zip(gains.higher, gains.lower, strict=True)))
    size = (max(WIDTH, 2.2 * len(pairs) + 0.4), 2.1 * len(axes_) + 0.4)
    figure, grid = plt.subplots(len(axes_), len(pairs), figsize=size, squeeze=False, layout="constrained")
    for column, (higher, lower) in enumerate(pairs):
        grid[0, column].set_title(f"{init_name(higher)}\nabove {init_name(lower)}")
        for axis, name in zip(grid[:, column], axes_, strict=True):
            points = gains[(gains.axis == name) & (gains.higher == higher) & (gains.lower == lower)]
            _gains(axis, points, colours([lower])[lower], MARKERS[higher])
            axis.set_xlabel(name)
            axis.set_ylabel("" if column else "points of Dice")
    return figure


DRIFT = {
    "update_norm": "length of an update",
    "update_cosine": "cosine of two updates",
    "update_diversity": "diversity of the updates",
    "distance_from_start": "distance from the start",
}


def why(drift: pd.DataFrame, starts: pd.DataFrame, split: str) -> Figure:
    """What the rounds from each start are like: the clients' updates by round, and the ground at the start.

    Args:
        drift: from `federate.drift`; lines are means over seeds.
        starts: from `diagnostics.of_starts`: init, sharpness, barrier.
        split: the partition that is shown.
    """
    runs = drift[drift.split == split]
    palette = colours(ordered_inits(starts if len(starts) else runs))
    ground = {
        "barrier": "barrier between two\nclients (Dice loss)",
        "sharpness": "sharpness of the start\n(top eigenvalue)",
    }
    measured = [name for name in DRIFT if runs[name].notna().any()]
    measured += [name for name in ground if starts[name].notna().any()]
    height = 2.1 * -(-len(measured) // 2) + 0.4
    figure, grid = plt.subplots(-(-len(measured) // 2) or 1, 2, figsize=(WIDTH, height), squeeze=False)
    for axis in grid.flat[len(measured) :]:
        axis.remove()
    for axis, name in zip(grid.flat, measured, strict=False):
        if name in DRIFT:
            _drift(axis, runs, name, palette)
        else:
            _ground(axis, starts, name, palette)
            axis.set_ylabel(ground[name])
    _legend_above(figure, grid.flat[0])
    return figure


# Parts of figures


def _gains(axis: Axes, points: pd.DataFrame, color: str, marker: str) -> None:
    """Gains of one pair along one axis of the map, with their intervals; hollow inside the noise."""
    places = np.arange(len(points))
    errors = [points.gain - points.low, points.high - points.gain]
    axis.errorbar(places, points.gain, errors, fmt="none", ecolor=color, capsize=3)
    for place, point in zip(places, points.itertuples(), strict=True):
        fill = "white" if point.inside_noise else color
        axis.plot(place, point.gain, marker, color=color, markerfacecolor=fill)
    axis.axhline(0, color="black", linewidth=1)
    labels = [str(value) for value in points["value"]]
    axis.set_xticks(places, labels)
    if sum(map(len, labels)) > 12:  # side by side they would run into each other
        plt.setp(axis.get_xticklabels(), rotation=30, ha="right", rotation_mode="anchor")
    axis.margins(x=0.15)


def _drift(axis: Axes, runs: pd.DataFrame, name: str, palette: Mapping[str, str]) -> None:
    """One measure of the clients' updates by round: a line a start, the mean over seeds."""
    for init, color in palette.items():
        mean = runs[runs.init == init].groupby("round")[name].mean()
        marker, label = MARKERS.get(init, "X"), init_name(init)
        axis.plot(mean.index, mean, color=color, marker=marker, markersize=4, label=label)
    axis.set(xlabel="round", ylabel=DRIFT[name])
    axis.xaxis.get_major_locator().set_params(integer=True)


def _ground(axis: Axes, starts: pd.DataFrame, name: str, palette: Mapping[str, str]) -> None:
    """One measure of the loss around each start: a bar with its number."""
    bars = axis.bar(range(len(starts)), starts[name], color=[palette[init] for init in starts.init])
    axis.bar_label(bars, fmt="%.2g", fontsize=SMALL)  # a barrier of 0 has no bar to be seen
    if starts[name].max() <= 0:
        axis.set_ylim(0, 1)
    names = [init_name(init) for init in starts.init]
    axis.set_xticks(
        range(len(starts)), names, fontsize=SMALL, rotation=30, ha="right", rotation_mode="anchor"
    )


def _interval(dice: pd.Series, per_image: pd.DataFrame | None, init: str, split: str) -> tuple[float, float]:
    """95 % interval of a federated cell in %; `dice` holds its seeds."""
    if per_image is not None:
        cell = contrast(per_image, {("federated", init, split): 1})
        if not cell["missing"]:
            return cell["low"], cell["high"]
    return seed_interval(dice)


def _rounds(axis: Axes, runs: pd.DataFrame) -> None:
    """A line a start: mean Dice over seeds by round, their range as a band."""
    palette = colours(ordered_inits(runs))
    for init, color in palette.items():
        dice = (100 * runs[runs.init == init].groupby("round").dice.agg(["mean", "min", "max"])).reset_index()
        axis.plot(
            dice["round"],
            dice["mean"],
            color=color,
            marker=MARKERS.get(init, "X"),
            markersize=5,
            markevery=max(1, len(dice) // 12),
            label=init_name(init) or None,
        )
        axis.fill_between(dice["round"], dice["min"], dice["max"], color=color, alpha=0.2, linewidth=0)
    axis.set(xlabel="round", ylabel="Dice on the test images (%)")
    axis.xaxis.get_major_locator().set_params(integer=True)


def _level(axis: Axes, last: pd.DataFrame) -> None:
    """The final Dice of centralised training as a line: the random start's, where there are several."""
    centralised = last[last.arm == "centralised"]
    if len(centralised):
        level = 100 * centralised[centralised.init == ordered_inits(centralised)[0]].dice.mean()
        label = f"centralised {level:.1f}"
        axis.axhline(level, color=PALETTE["centralised"], linestyle="--", linewidth=1.2, label=label)


def _legend_above(figure: Figure, axis: Axes) -> None:
    handles, labels = axis.get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside upper left", ncols=2)


def _gallery(number: int, columns: int, text: float = 0.4) -> tuple[Figure, np.ndarray]:
    """A grid of `number` pictures; the axes that are left over are gone.

    Args:
        text: inches below each picture, by default for two lines, and once more for a key.
    """
    columns = max(1, min(columns, number))
    rows = max(1, -(-number // columns))
    side = WIDTH / max(columns, 3)
    size = (side * columns, (side + text) * rows + text)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    for axis in axes.flat[number:]:
        axis.remove()
    return figure, axes.ravel()[:number]


def _compared(images, masks, predicted, dice, chosen, *, boxes=None, columns: int) -> Figure:
    """Chosen images with the contours of truth and prediction, their Dice below."""
    pictures, truths, guesses = _pixels(images), _pixels(masks), _pixels(predicted)
    figure, axes = _gallery(len(chosen), columns)
    for axis, index in zip(axes, chosen, strict=True):
        _xray(axis, pictures[index], {TRUTH: truths[index], PREDICTED: guesses[index]})
        axis.set_xlabel(f"Dice {dice[index]:.3f}")
        if boxes is not None:
            _boxes(axis, boxes[index])
    _key(
        figure,
        {"ground truth": TRUTH, "predicted": PREDICTED} | ({"box prompt": BOX} if boxes is not None else {}),
    )
    return figure


def _xray(axis: Axes, image, contours: Mapping[str, object]) -> None:
    """One image in grey with masks as contours, {colour: mask or None}."""
    pixels = _numbers(image).squeeze()
    white = 1 if np.issubdtype(pixels.dtype, np.floating) else 255
    axis.imshow(pixels, cmap="gray", vmin=0, vmax=white)
    for color, mask in contours.items():
        outline = None if mask is None else _numbers(mask).squeeze()
        if outline is not None and outline.any() and not outline.all():  # else there is no contour
            axis.contour(outline, levels=[0.5], colors=[color], linestyles=[LINES[color]], linewidths=1.5)
    axis.set(xticks=[], yticks=[])
    axis.grid(visible=False)
    sns.despine(ax=axis, left=True, bottom=True)


def _boxes(axis: Axes, boxes) -> None:
    for x0, y0, x1, y1 in _numbers(boxes).reshape(-1, 4):
        axis.add_patch(
            Rectangle(
                (x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor=BOX, linewidth=1.5, linestyle=LINES[BOX]
            )
        )


def _key(figure: Figure, entries: Mapping[str, str]) -> None:
    lines = [
        plt.Line2D([], [], color=color, linestyle=LINES[color], label=label)
        for label, color in entries.items()
    ]
    figure.legend(handles=lines, loc="outside lower center", ncols=len(lines), columnspacing=1)


def _numbers(values) -> np.ndarray:
    """Array of a tensor on any device, or of anything numpy takes.

    Booleans become 0 and 1, and floats float32 (numpy has no bfloat16); whole numbers stay what they are,
    because that tells stored pixels (0..255) from a network's (0..1).
    """
    if hasattr(values, "detach"):
        values = values.detach().cpu()
        values = (values.float() if values.is_floating_point() else values).numpy()
    values = np.asarray(values)
    if values.dtype == bool:
        return values.astype(np.uint8)
    return values.astype(np.float32) if np.issubdtype(values.dtype, np.floating) else values


def _pixels(values) -> np.ndarray:
    """[B, H, W] of [B, 1, H, W] or [B, H, W]."""
    values = _numbers(values)
    return values.squeeze(1) if values.ndim == 4 else values


def _indices(values: Iterable[int]) -> np.ndarray:
    return np.asarray(_numbers(values) if hasattr(values, "detach") else list(values), dtype=np.int64)

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

#: Colour and marker of each start and arm.
LOOKS = {
    "random": ("#E69F00", "o"),
    "pretraining": ("#0072B2", "s"),
    "fm": ("#009E73", "^"),
    "centralised": ("#000000", "D"),
    "standalone": ("#7F7F7F", "v"),
    "imagenet": ("#CC79A7", "P"),
}
PALETTE = {name: colour for name, (colour, _) in LOOKS.items()}
MARKERS = {name: marker for name, (_, marker) in LOOKS.items()}
#: Colours of starts without one of their own.
OTHERS = ("#56B4E9", "#D55E00", "#F0E442")
#: Contours on X-rays, also told apart by their lines where two colours look alike.
TRUTH, PREDICTED, BOX = "#56B4E9", "#D55E00", "#F0E442"
LINES = {TRUTH: "solid", PREDICTED: (0, (3, 1.5)), BOX: "dotted"}
TEACHER = "#5B2A86"
#: Inches; at 390 pixels a page shows 72 pixels of each, so that 10 points are 10 pixels.
WIDTH = 4.8
#: Points, the least size of text.
SMALL = 9
SLANTED = {"rotation": 30, "ha": "right", "rotation_mode": "anchor"}
DRIFT = {
    "update_norm": "length of an update",
    "update_cosine": "cosine of two updates",
    "update_diversity": "diversity of the updates",
    "distance_from_start": "distance from the start",
}
LANDSCAPE = {
    "barrier": "barrier between two\nclients (Dice loss)",
    "sharpness": "sharpness of the start\n(top eigenvalue)",
}


def use_style() -> None:
    """Set the look of every figure after this call."""
    sns.set_theme(context="notebook", style="ticks", palette=list(PALETTE.values()))
    sizes = ("axes.labelsize", "axes.titlesize", "figure.titlesize", "font.size", "legend.fontsize")
    plt.rcParams.update(
        dict.fromkeys((*sizes, "xtick.labelsize", "ytick.labelsize"), 10)
        | {"axes.grid": True, "axes.grid.axis": "y", "grid.alpha": 0.4, "image.cmap": "gray"}
        | {"axes.spines.right": False, "axes.spines.top": False, "legend.frameon": False}
        | {"figure.dpi": 100, "figure.constrained_layout.use": True, "savefig.dpi": 200}
    )


def colours(inits: Iterable[str]) -> dict[str, str]:
    """Return one colour a start: the study's own where it has one, else the next that is free."""
    inits = list(dict.fromkeys(inits))
    free = iter(OTHERS * (1 + len(inits) // len(OTHERS)))
    return {init: PALETTE.get(init) or next(free) for init in inits}


def group_colours(number: int) -> list[str]:
    """Return colours of `number` clients, sites or other groups, light to dark: none is that of a start."""
    return sns.light_palette(TEACHER, number + 1).as_hex()[1:]


# Images


def images(cohort, indices: Iterable[int], *, columns: int = 4) -> Figure:
    """Draw X-rays of a Cohort with the contour of their mask; below each its site and age."""
    indices = [int(index) for index in indices]
    figure, axes = _gallery(len(indices), columns)
    for axis, index in zip(axes, indices, strict=False):
        row = cohort.table.iloc[index]
        _xray(axis, cohort.images[index], {TRUTH: cohort.masks[index]})
        age = "age unknown" if pd.isna(row.age) else f"{row.age:g} years"
        axis.set_xlabel(f"{row.site}\n{age}", fontsize=SMALL)
    return figure


def augmented(images, masks, *, columns: int = 4) -> Figure:
    """Draw images as the network sees them, after augmentation, with their masks moved along."""
    pictures, outlines = _pixels(images), _pixels(masks)
    figure, axes = _gallery(len(pictures), columns, text=0)
    for axis, picture, outline in zip(axes, pictures, outlines, strict=False):
        _xray(axis, picture, {TRUTH: outline})
    return figure


def boxes(image, boxes, *, teacher_mask=None, mask=None) -> Figure:
    """Draw one image with its box prompts, the teacher's mask and the true one.

    Args:
        image: [1, H, W] or [H, W].
        boxes: [4] or [n, 4] as x0 y0 x1 y1 in pixels of the image.
        teacher_mask: the teacher's answer to the boxes, like `image`.
        mask: the ground truth, like `image`.
    """
    figure, axis = _figure(0.85 * WIDTH, width=0.8 * WIDTH)
    _xray(axis, image, {TRUTH: mask, PREDICTED: teacher_mask})
    _boxes(axis, boxes)
    entries = {
        "ground truth": (TRUTH, mask),
        "teacher": (PREDICTED, teacher_mask),
        "box prompt": (BOX, boxes),
    }
    _key(figure, {label: colour for label, (colour, content) in entries.items() if content is not None})
    return figure


def teacher_gallery(images, masks, predicted, dice, *, boxes=None, count: int = 2) -> Figure:
    """Draw the teacher's best, median and worst masks by Dice, beside the truth, `count` of each.

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
    figure = _compared(images, masks, predicted, dice, chosen, boxes=boxes)
    for axis, kind in zip(figure.axes, ("best", "median", "worst"), strict=False):
        axis.set_title(kind)
    return figure


def worst_cases(images, masks, predicted, dice, *, count: int = 6) -> Figure:
    """Draw the `count` images with the lowest Dice, the worst first; arguments of `teacher_gallery`."""
    dice = _numbers(dice)
    return _compared(images, masks, predicted, dice, np.argsort(dice, kind="stable")[:count])


def predictions(image, mask, predicted: Mapping[str, object], *, columns: int = 4) -> Figure:
    """Draw one image once for each of several masks, each with its contour, its name below, and the truth.

    Args:
        image: [1, H, W] or [H, W].
        mask: the ground truth, like `image`.
        predicted: a mask by the text that stands below it, such as its maker and its Dice.
    """
    figure, axes = _gallery(len(predicted), columns)
    for axis, (name, answer) in zip(axes, predicted.items(), strict=True):
        _xray(axis, image, {TRUTH: mask, PREDICTED: answer})
        axis.set_xlabel(name, fontsize=SMALL)
    _key(figure, {"ground truth": TRUTH, "predicted": PREDICTED})
    return figure


# Data


def ages(table: pd.DataFrame, groups: str | Mapping[str, Iterable[int]] = "site") -> Figure:
    """Draw a histogram of ages, stacked by group; images without an age are counted in the legend.

    Args:
        table: a Cohort's table.
        groups: a column of it, or names with the row numbers (indices) that they stand for.
    """
    if isinstance(groups, str):
        groups = {str(name): rows.index for name, rows in table.groupby(groups, sort=True)}
    labelled = {}
    for name, rows in groups.items():
        values = table.age.iloc[_indices(rows)]
        missing = f" ({values.isna().sum()} without age)" if values.isna().any() else ""
        labelled[f"{name}: {len(values)}{missing}"] = values.dropna()
    frame = pd.concat(labelled, names=["group"]).reset_index("group")
    figure, axis = _figure(3.2)
    if len(frame):
        style = {"multiple": "stack", "palette": group_colours(len(labelled)), "alpha": 1}
        bins = np.arange(0, max(10, frame.age.max()) + 5, 5)
        sns.histplot(frame, x="age", hue="group", hue_order=list(labelled), bins=bins, ax=axis, **style)
        sns.move_legend(axis, "lower left", bbox_to_anchor=(0, 1), ncols=2, title="")
    axis.set(xlabel="age (years)", ylabel="images")
    if frame.empty:
        _say_no_age(axis)
    return figure


def clients(table: pd.DataFrame, clients: Sequence[Iterable[int]], *, title: str = "") -> Figure:
    """Draw a partition: how many images each client holds, and how old their patients are.

    Args:
        table: a Cohort's table.
        clients: one index tensor a client, row numbers of the table.
        title: the measure of the skew.
    """
    parts = {f"client {k}": table.iloc[_indices(indices)] for k, indices in enumerate(clients)}
    palette = dict(zip(parts, group_colours(len(parts)), strict=True))
    figure, (sizes, ages) = _figure(0.9 + 0.5 * len(parts), columns=2, width_ratios=[2, 3], sharey=True)
    counts = [len(part) for part in parts.values()]
    bars = sizes.barh(list(parts), counts, color=palette.values())
    people = [f"{len(part)} ({part.patient_id.nunique()})" for part in parts.values()]
    sizes.bar_label(bars, people, padding=3, fontsize=SMALL)
    sizes.set(xlabel="images (patients)", xlim=(0, 2.2 * max([*counts, 1])))
    sizes.xaxis.get_major_locator().set_params(nbins=3)
    frame = pd.concat({name: part.age.dropna() for name, part in parts.items()}, names=["client"])
    frame = frame.reset_index("client")
    if len(frame):
        style = {"palette": palette, "legend": False, "fliersize": 2, "width": 0.6}
        sns.boxplot(frame, x="age", y="client", hue="client", order=list(parts), ax=ages, **style)
    ages.set(xlabel="age (years)", ylabel="")
    _grid_of_x(sizes, ages)
    if frame.empty:
        _say_no_age(ages)
    figure.suptitle(title)
    return figure


# Training


def dice_by_rule(scores: pd.DataFrame) -> Figure:
    """Draw the teacher's Dice and HD95 by box rule: one point an image, the median as a line.

    Args:
        scores: one row an image and rule, columns rule, dice (0..1) and hd95 (pixels).
    """
    rules = list(dict.fromkeys(scores.rule))
    # Spread by a generator of its own: seaborn's strips would be other pixels each time.
    spread = np.random.default_rng(0).uniform(-0.1, 0.1, len(scores))
    places = scores.rule.map({rule: place for place, rule in enumerate(rules)}) + spread
    figure, axes = _figure(0.8 + 0.6 * len(rules), columns=2, width_ratios=[3, 2], sharey=True)
    for axis, score in zip(axes, ("dice", "hd95"), strict=True):
        common = {"data": scores, "x": score, "y": "rule", "order": rules, "ax": axis}
        sns.boxplot(**common, color=group_colours(5)[0], showfliers=False, width=0.6)
        axis.scatter(scores[score], places, color=TEACHER, s=4, linewidths=0, alpha=0.5, zorder=2.5)
    _grid_of_x(*axes)
    means = scores.groupby("rule")[["dice", "hd95"]].mean()
    labels = [
        f"{rule.replace(', ', chr(10))}\n{means.dice[rule]:.3f}, {means.hd95[rule]:.1f} px" for rule in rules
    ]
    axes[0].set_yticks(range(len(rules)), labels, fontsize=SMALL)
    axes[0].set(xlabel="teacher's Dice", ylabel="rule, and mean scores")
    axes[1].set(xlabel="HD95 (pixels)", ylabel="")
    return figure


def dice_by_jitter(scores: pd.DataFrame) -> Figure:
    """Draw the teacher's Dice and HD95 by how far its boxes are off: means and 95 % intervals over images.

    Args:
        scores: one row an image and distance, columns pixels, dice (0..1) and hd95 (pixels).
    """
    figure, axes = _figure(2.6, columns=2)
    style = {"color": TEACHER, "marker": "o", "err_style": "bars", "seed": 0}
    for axis, score, label in zip(axes, ("dice", "hd95"), ("Dice", "HD95 (pixels)"), strict=True):
        sns.lineplot(scores, x="pixels", y=score, ax=axis, **style)
        axis.set(xlabel="", ylabel=f"teacher's mean {label}")
        axis.grid(axis="y")
    figure.supxlabel("each side of the box moved by up to so many pixels", fontsize=10)
    return figure


def reliability(table: pd.DataFrame, error: float) -> Figure:
    """Draw the share of the pixels that are in the mask, by the probability predicted for them.

    Args:
        table: from `metrics.reliability`.
        error: the expected calibration error, 0..1, for the title.
    """
    known = table.dropna()
    figure, axis = _figure(4.0, width=4.2)
    axis.plot([0, 1], [0, 1], color="0.6", linewidth=1, linestyle="--")  # the ideal
    axis.plot(known.probability, known.frequency, marker="o", color=TEACHER)
    axis.set(xlabel="predicted probability", ylabel="share of pixels in the mask", xlim=(0, 1), ylim=(0, 1))
    axis.set(title=f"expected calibration error {error:.4f}", aspect="equal")
    return figure


def loss_curves(history: pd.DataFrame) -> Figure:
    """Draw the loss by epoch, a line a start.

    Args:
        history: one row an epoch, with epoch and loss, and init where it holds several starts. Other columns
            that end in _loss (the parts of Eq. 5) are drawn dashed and dotted.
    """
    parts = [name for name in history if name == "loss" or str(name).endswith("_loss")]
    runs = dict(tuple(history.groupby("init", sort=False))) if "init" in history else {"": history}
    palette = colours(runs)
    figure, axis = _figure(3.2)
    for init, run in runs.items():
        for part, line in zip(parts, ["-", "--", ":", "-."], strict=False):
            name = "sum" if part == "loss" else part.removesuffix("_loss")
            label = ", ".join(filter(None, [init_name(init), name if len(parts) > 1 else ""]))
            marker = "o" if len(run) == 1 else None  # a line through one epoch is not to be seen
            axis.plot(run.epoch, run[part], line, marker=marker, color=palette[init], label=label or None)
    axis.set(xlabel="epoch", ylabel="each start's own training loss" if len(runs) > 1 else "loss")
    axis.xaxis.get_major_locator().set_params(integer=True)
    return _legend_above(figure, axis)


def loss_by_pixel(image, mask, predicted, distances, pull) -> Figure:
    """Draw one image, the student's distance from the teacher by pixel, and where the loss pulls its logits.

    Args:
        image: [1, H, W] or [H, W], as all others.
        mask: the ground truth.
        predicted: the student's mask.
        distances: the divergence of each pixel (Eq. 4 before its mean), in nats.
        pull: the loss's gradient by the student's logits, with its sign turned: above 0 towards lung.
    """
    figure, axes = _figure(2.6, columns=3)
    _xray(axes[0], image, {TRUTH: mask, PREDICTED: predicted})
    axes[0].set_xlabel("the student\n(truth: blue)", fontsize=SMALL)
    far, most = _numbers(distances).squeeze(), float(abs(_numbers(pull)).max()) or 1.0
    maps = ((far, "viridis", 0, max(float(far.max()), 1e-6)), (_numbers(pull).squeeze(), "PuOr", -1, 1))
    labels = ("from the teacher\n(nats)", "pull of the loss\n(1: towards lung)")
    for axis, label, (values, colours, low, high) in zip(axes[1:], labels, maps, strict=True):
        shown = axis.imshow(values / most if low < 0 else values, cmap=colours, vmin=low, vmax=high)
        bar = figure.colorbar(shown, ax=axis, location="bottom", ticks=[low, high], pad=0.02)
        bar.set_label(label, fontsize=SMALL)
        bar.set_ticklabels([f"{tick:.2g}" for tick in (low, high)])
        axis.set_frame_on(False)
        axis.set(xticks=[], yticks=[])
        axis.grid(visible=False)
    return figure


def round_by_round(probabilities, mask, dice: Sequence[float]) -> Figure:
    """Draw the global model's probabilities on one image after a round, and its Dice up to there.

    Args:
        probabilities: [1, H, W] or [H, W], 0..1.
        mask: the ground truth, likewise.
        dice: of the rounds 0, 1, ... so far, 0..1.
    """
    figure, (picture, curve) = _figure(2.4, columns=2, width_ratios=[2, 3])
    _xray(picture, _numbers(probabilities).astype(np.float32), {TRUTH: mask})
    picture.set_xlabel("probability of lung:\nwhite is 1", fontsize=SMALL)
    curve.plot(range(len(dice)), 100 * np.asarray(dice), "o-", color=PALETTE["random"], markersize=4)
    curve.set(xlabel="round", ylabel="Dice (%)", xlim=(-0.5, max(10, len(dice)) + 0.5), ylim=(0, 100))
    curve.xaxis.get_major_locator().set_params(integer=True)
    return figure


def dice_by_alpha(table: pd.DataFrame, teacher: float | None = None) -> Figure:
    """Draw the Dice of distilled students by alpha: a line a temperature, others as points.

    At alpha = 0 the teacher has no part in the loss, so that student begins every line.

    Args:
        table: one row a student, with alpha, temperature, labels (soft, hard), views (cached, fresh) and
            dice (0..1).
        teacher: its own Dice, 0..1, drawn as a level.
    """
    usual = (table.labels == "soft") & (table["views"] == "cached")
    masks_only, with_teacher = table[table.alpha == 0], table[usual & (table.alpha > 0)]
    figure, axis = _figure(3.6)
    temperatures = list(with_teacher.groupby("temperature"))
    palette = group_colours(max(1, len(temperatures)))
    for color, marker, (temperature, rows) in zip(palette, cycle("os^Dv"), temperatures, strict=False):
        rows = pd.concat([masks_only, rows]).sort_values("alpha")
        axis.plot(rows.alpha, 100 * rows.dice, marker=marker, color=color, label=f"T = {temperature:g}")
    if with_teacher.empty:
        axis.plot(masks_only.alpha, 100 * masks_only.dice, "o", color=palette[0], label="masks alone")
    others = table[~usual & (table.alpha > 0)]
    for marker, row in zip("^sDvP", others.itertuples(), strict=False):
        labels = [f"{row.labels} labels"] * (row.labels != "soft")
        labels += [f"{row.views} views"] * (row.views != "cached")
        style = {"color": "black", "fillstyle": "none", "label": ", ".join(labels)}
        axis.plot(row.alpha, 100 * row.dice, marker, **style)
    if teacher is not None:
        _level(axis, 100 * teacher, f"the teacher, told the box: {100 * teacher:.1f}")
    axis.set(
        xlabel="alpha: the teacher's share in the loss\n(0: Dice loss alone, 1: KL divergence alone)",
        ylabel="Dice on the test images (%)",
        xlim=(-0.04, 1.04),
    )
    return _legend_above(figure, axis)


def dice_by_round(history: pd.DataFrame) -> Figure:
    """Draw Dice on the test images by round, a line a start.

    Args:
        history: one row a scored round, with round and dice (0..1), and init where it holds several starts.
    """
    figure, axis = _figure(3.6)
    _rounds(axis, history if "init" in history else history.assign(init=""))
    return _legend_above(figure, axis)


# Results


def fig2(results: pd.DataFrame, per_image: pd.DataFrame | None = None) -> Figure:
    """Draw the paper's Fig. 2: final federated Dice by split and start, centralised training as a line.

    A large marker is the mean over seeds, small ones are the seeds. The line is the 95 % interval: over seeds
    and patients together where `per_image` is given, else Student's t over seeds. Markers and not
    bars, because bars from zero would hide the differences and cut bars would exaggerate them.
    """
    last = final(results)
    federated = last[last.arm == "federated"]
    inits, splits = ordered_inits(federated), known_first(federated.split, SPLITS)
    step = 0.75 / max(1, len(inits))
    # The means' labels stand side by side.
    figure, axis = _figure(4, width=max(WIDTH, 0.7 + 0.45 * len(inits) * len(splits)))
    _centralised(axis, last)
    for i, init in enumerate(inits):
        look = _look(init, colours(inits))
        for j, split in enumerate(splits):
            dice = 100 * federated[(federated.init == init) & (federated.split == split)].dice
            if len(dice):
                x = j + (i - (len(inits) - 1) / 2) * step
                _estimate(axis, x, dice, _interval(dice, per_image, init, split), look, 0.22 * step)
                look["label"] = None
    axis.set_xticks(range(len(splits)), [split_name(split) for split in splits])
    axis.set(ylabel="Dice on the test images (%)", xlim=(-0.6, len(splits) - 0.4))
    return _legend_above(figure, axis)


def fig3(results: pd.DataFrame, split: str | None = None) -> Figure:
    """Draw the paper's Fig. 3: Dice by round under one split, whole above and its top enlarged below.

    A line is the mean over seeds, its band their range; the dashed line is centralised training's end. The
    split is `reference_split` if not given.
    """
    split = reference_split(results) if split is None else split
    runs = results[(results.arm == "federated") & (results.split == split)]
    figure, (whole, top) = _figure(6.4, rows=2)
    for axis in (whole, top):
        _centralised(axis, final(results))
        _rounds(axis, runs)
        axis.set_xlabel(f"round ({split_name(split)})")
    ends = final(runs)
    informed = ends[ends.init != "random"]  # a start far below would leave nothing to enlarge
    lowest = 100 * (informed if len(informed) else ends).dice.min() - 2
    if np.isfinite(lowest):
        top.set(ylim=(lowest, 100 * results.dice.max() + 1), ylabel="the same, enlarged (%)")
    return _legend_above(figure, whole)


def per_image(per_image: pd.DataFrame, split: str | None = None) -> Figure:
    """Draw final Dice of the test images by start: a box, and a point for each image below 0.8.

    An image's score is its mean over seeds. The federated arm under `split` is shown, by default
    `reference_split`, and the centralised one where it was run.
    """
    split = reference_split(per_image) if split is None else split
    federated = per_image[(per_image.arm == "federated") & (per_image.split == split)]
    centralised = per_image[per_image.arm == "centralised"].assign(init="centralised")
    scores = pd.concat([federated, centralised])
    frame = scores.groupby(["init", "image_id"], sort=False).dice.mean().reset_index()
    inits = ordered_inits(frame)
    palette = colours(inits)
    figure, axis = _figure(0.9 + 0.7 * len(inits))
    style = {"legend": False, "width": 0.5, "showfliers": False, "boxprops": {"alpha": 0.6}}
    sns.boxplot(frame, x="dice", y="init", order=inits, hue="init", palette=palette, ax=axis, **style)
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
    """Draw the map: points of final Dice that the teacher's student gains where one setting is changed.

    A row an axis, a column a pair of starts; bars are 95 % intervals over seeds and patients, hollow markers
    are gains inside the noise, and the study's own value is among the others.

    Args:
        gains: from `tables.gains`.
    """
    names = list(dict.fromkeys(gains.axis))
    pairs = list(dict.fromkeys(zip(gains.higher, gains.lower, strict=True)))
    size = {"height": 2.1 * len(names) + 0.4, "width": max(WIDTH, 2.2 * len(pairs) + 0.4)}
    figure, grid = _figure(**size, rows=len(names), columns=len(pairs), squeeze=False)
    for column, (higher, lower) in enumerate(pairs):
        grid[0, column].set_title(f"{init_name(higher)}\nabove {init_name(lower)}")
        for axis, name in zip(grid[:, column], names, strict=True):
            points = gains[(gains.axis == name) & (gains.higher == higher) & (gains.lower == lower)]
            _gains(axis, points, colours([lower])[lower], MARKERS[higher])
            axis.set(xlabel=name, ylabel="" if column else "points of Dice")
    return figure


def why(drift: pd.DataFrame, starts: pd.DataFrame, split: str) -> Figure:
    """Draw the clients' updates by round, and the loss landscape at the start.

    Args:
        drift: the measures of DRIFT by round; lines are means over seeds.
        starts: from `landscape.of_starts`: init, sharpness, barrier.
        split: the partition that is shown.
    """
    runs = drift[drift.split == split]
    palette = colours(ordered_inits(starts if len(starts) else runs))
    measured = [name for name in DRIFT if runs[name].notna().any()]
    measured += [name for name in LANDSCAPE if starts[name].notna().any()]
    rows = -(-len(measured) // 2)
    figure, grid = _figure(2.1 * rows + 0.4, rows=rows or 1, columns=2, squeeze=False)
    for axis in grid.flat[len(measured) :]:
        axis.remove()
    for axis, name in zip(grid.flat, measured, strict=False):
        if name in DRIFT:
            _drift(axis, runs, name, palette)
        else:
            _landscape(axis, starts, name, palette)
    return _legend_above(figure, grid.flat[0])


# Parts of figures


def _figure(height: float, width: float = WIDTH, rows: int = 1, columns: int = 1, **options):
    return plt.subplots(rows, columns, figsize=(width, height), layout="constrained", **options)


def _grid_of_x(*axes: Axes) -> None:
    for axis in axes:
        axis.grid(axis="x")
        axis.grid(visible=False, axis="y")


def _say_no_age(axis: Axes) -> None:
    """Write into an empty panel why it is empty."""
    axis.text(0.5, 0.5, "no image has an age", ha="center", va="center", transform=axis.transAxes)
    axis.xaxis.set_ticks([])


def _legend_above(figure: Figure, axis: Axes) -> Figure:
    handles, labels = axis.get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside upper left", ncols=2)
    return figure


def _look(init: str, palette: Mapping[str, str]) -> dict[str, object]:
    """Return a start's colour, marker and label."""
    return {"color": palette[init], "marker": MARKERS.get(init, "X"), "label": init_name(init) or None}


def _level(axis: Axes, level: float, label: str) -> None:
    axis.axhline(level, color=PALETTE["centralised"], linestyle="--", linewidth=1.2, label=label)


def _centralised(axis: Axes, last: pd.DataFrame) -> None:
    """Draw the final Dice of centralised training: the random start's, where there are several."""
    runs = last[last.arm == "centralised"]
    if len(runs):
        level = 100 * runs[runs.init == ordered_inits(runs)[0]].dice.mean()
        _level(axis, level, f"centralised {level:.1f}")


def _rounds(axis: Axes, runs: pd.DataFrame) -> None:
    """Draw a line a start: mean Dice over seeds by round, their range as a band."""
    palette = colours(ordered_inits(runs))
    for init, color in palette.items():
        dice = (100 * runs[runs.init == init].groupby("round").dice.agg(["mean", "min", "max"])).reset_index()
        every = max(1, len(dice) // 12)
        axis.plot(dice["round"], dice["mean"], markersize=5, markevery=every, **_look(init, palette))
        axis.fill_between(dice["round"], dice["min"], dice["max"], color=color, alpha=0.2, linewidth=0)
    axis.set(xlabel="round", ylabel="Dice on the test images (%)")
    axis.xaxis.get_major_locator().set_params(integer=True)


def _estimate(axis: Axes, x: float, dice: pd.Series, within: tuple[float, float], look: dict, side: float):
    """Draw a cell of Fig. 2: its interval, its mean with the number, and its seeds beside it."""
    axis.plot([x, x], within, color=look["color"], linewidth=2)
    axis.plot(x, dice.mean(), linestyle="", markersize=9, **look)
    if len(dice) > 1:
        seeds = look | {"label": None, "linestyle": "", "markersize": 4, "alpha": 0.6}
        axis.plot(np.full(len(dice), x + side), dice, **seeds)
    at = {"xytext": (0, 4), "textcoords": "offset points", "ha": "center", "fontsize": SMALL}
    axis.annotate(f"{dice.mean():.1f}", (x, np.nanmax([dice.mean(), within[1]])), **at)


def _interval(dice: pd.Series, per_image: pd.DataFrame | None, init: str, split: str) -> tuple[float, float]:
    """Return the 95 % interval of a federated cell in %; `dice` holds its seeds."""
    if per_image is not None:
        cell = contrast(per_image, {("federated", init, split): 1})
        if not cell["missing"]:
            return cell["low"], cell["high"]
    return seed_interval(dice)


def _gains(axis: Axes, points: pd.DataFrame, color: str, marker: str) -> None:
    """Draw gains of one pair along one axis of the map, with their intervals; hollow inside the noise."""
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
        plt.setp(axis.get_xticklabels(), **SLANTED)
    axis.margins(x=0.15)


def _drift(axis: Axes, runs: pd.DataFrame, name: str, palette: Mapping[str, str]) -> None:
    """Draw one measure of the clients' updates by round: a line a start, the mean over seeds."""
    for init in palette:
        mean = runs[runs.init == init].groupby("round")[name].mean()
        axis.plot(mean.index, mean, markersize=4, **_look(init, palette))
    axis.set(xlabel="round", ylabel=DRIFT[name])
    axis.xaxis.get_major_locator().set_params(integer=True)


def _landscape(axis: Axes, starts: pd.DataFrame, name: str, palette: Mapping[str, str]) -> None:
    """Draw one measure of the loss around each start: a bar with its number."""
    places = range(len(starts))
    bars = axis.bar(places, starts[name], color=[palette[init] for init in starts.init])
    axis.bar_label(bars, fmt="%.2g", fontsize=SMALL)  # a barrier of 0 has no bar to be seen
    if starts[name].max() <= 0:
        axis.set_ylim(0, 1)
    axis.set_xticks(places, [init_name(init) for init in starts.init], fontsize=SMALL, **SLANTED)
    axis.set_ylabel(LANDSCAPE[name])


def _gallery(number: int, columns: int, text: float = 0.4) -> tuple[Figure, np.ndarray]:
    """Return a grid for `number` pictures, without the axes that are left over.

    Args:
        text: inches below each picture, by default for two lines, and once more for a key.
    """
    columns = max(1, min(columns, number))
    rows = max(1, -(-number // columns))
    side = WIDTH / max(columns, 3)
    size = {"height": (side + text) * rows + text, "width": side * columns}
    figure, axes = _figure(**size, rows=rows, columns=columns, squeeze=False)
    for axis in axes.flat[number:]:
        axis.remove()
    return figure, axes.ravel()[:number]


def _compared(images, masks, predicted, dice, chosen, *, boxes=None) -> Figure:
    """Draw chosen images with the contours of truth and prediction, their Dice below."""
    pictures, truths, guesses = _pixels(images), _pixels(masks), _pixels(predicted)
    figure, axes = _gallery(len(chosen), columns=3)
    for axis, index in zip(axes, chosen, strict=True):
        _xray(axis, pictures[index], {TRUTH: truths[index], PREDICTED: guesses[index]})
        axis.set_xlabel(f"Dice {dice[index]:.3f}")
        if boxes is not None:
            _boxes(axis, boxes[index])
    box = {} if boxes is None else {"box prompt": BOX}
    _key(figure, {"ground truth": TRUTH, "predicted": PREDICTED} | box)
    return figure


def _xray(axis: Axes, image, contours: Mapping[str, object]) -> None:
    """Draw one image in grey with masks as contours, {colour: mask or None}."""
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
    style = {"fill": False, "edgecolor": BOX, "linewidth": 1.5, "linestyle": LINES[BOX]}
    for x0, y0, x1, y1 in _numbers(boxes).reshape(-1, 4):
        axis.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, **style))


def _key(figure: Figure, entries: Mapping[str, str]) -> None:
    lines = [plt.Line2D([], [], color=c, linestyle=LINES[c], label=label) for label, c in entries.items()]
    figure.legend(handles=lines, loc="outside lower center", ncols=len(lines), columnspacing=1)


def _numbers(values) -> np.ndarray:
    """Return the array of a tensor on any device, or of anything numpy takes.

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
    """Return [B, H, W] of [B, 1, H, W] or [B, H, W]."""
    values = _numbers(values)
    return values.squeeze(1) if values.ndim == 4 else values


def _indices(values: Iterable[int]) -> np.ndarray:
    return np.asarray(_numbers(values) if hasattr(values, "detach") else list(values), dtype=np.int64)

"""The figures show the numbers they are given, with units, and stand partial results."""

import itertools

import matplotlib

matplotlib.use("agg")

from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure
from scipy import stats

from fmfl.analysis import plots, statistics, tables

SPREAD = 0.01 * np.linspace(-3, 3, 12)  # of Dice over images


@pytest.fixture(autouse=True)
def _style():
    plots.use_style()
    yield
    plt.close("all")


def results(inits=tables.PAPER_INITS, splits=("iid", "age"), seeds=2, rounds=4, centralised=True):
    """Dice that climbs from 40 % in equal steps; each later start ends 4 points higher, seed 1 one point."""
    rows = []
    cells = [("federated", init, split) for init in inits for split in splits]
    for arm, init, split in cells + [("centralised", "random", "pooled")] * centralised:
        final = 95 if arm == "centralised" else 80 + 4 * inits.index(init) - splits.index(split)
        for seed in range(seeds):
            for number in range(rounds + 1):
                dice = 40 + (final - 40) * number / rounds + seed
                rows.append((arm, init, split, seed, number, dice / 100))
    return pd.DataFrame(rows, columns=["arm", "init", "split", "seed", "round", "dice"])


def per_image(table):
    """Scores of twelve images around each run's final Dice."""
    names = {"image_id": [f"i{k}" for k in range(12)], "patient_id": [f"p{k}" for k in range(12)]}
    frames = [
        pd.DataFrame(names).assign(
            arm=row.arm, init=row.init, split=row.split, seed=row.seed, dice=row.dice + SPREAD
        )
        for row in tables.final(table).itertuples()
    ]
    return pd.concat(frames, ignore_index=True)


def squares(number=6, size=32):
    """Images and masks whose prediction is shifted more from image to image, so Dice falls."""
    images = torch.randint(0, 256, (number, 1, size, size), dtype=torch.uint8)
    masks = torch.zeros_like(images)
    masks[..., 8:24, 8:20] = 1
    predicted = torch.stack([torch.roll(mask, k, dims=-1) for k, mask in enumerate(masks)])
    dice = 2 * (masks * predicted).sum((1, 2, 3)) / (masks.sum((1, 2, 3)) + predicted.sum((1, 2, 3)))
    return images, masks, predicted, dice


def table(number=6):
    return pd.DataFrame(
        {
            "patient_id": [f"p{k // 2}" for k in range(number)],
            "age": [1.0, 2.0, 30.0, np.nan, 60.0, 81.0][:number],
            "site": ["a", "b"] * (number // 2),
        }
    )


def labels(figure):
    return [axis.get_xlabel() for axis in figure.axes], [axis.get_ylabel() for axis in figure.axes]


def legend(figure):
    boxes = [*figure.legends, *(axis.get_legend() for axis in figure.axes)]
    return [text.get_text() for box in boxes if box for text in box.get_texts()]


def drawn(axis, init, style):
    """y of each line of a start: style "None" for markers alone, "-" for intervals."""
    lines = [line for line in axis.lines if line.get_color() == plots.PALETTE[init]]
    return [np.asarray(line.get_ydata()).tolist() for line in lines if line.get_linestyle() == style]


def test_fig2_places_means_seeds_and_intervals():
    table = results()
    once = per_image(table)
    twice = pd.concat([once, once.assign(image_id="b" + once.image_id, patient_id="b" + once.patient_id)])
    axis = plots.fig2(table, twice).axes[0]

    mean, seeds, mean_age, seeds_age = drawn(axis, "fm", "None")  # two seeds, a point apart
    assert [*mean, *seeds] == pytest.approx([88.5, 88, 89])
    assert [*mean_age, *seeds_age] == pytest.approx([87.5, 87, 88])
    interval, _ = drawn(axis, "fm", "-")
    by_patient = np.var(np.tile(100 * SPREAD, 2), ddof=1) / 24
    by_seed = np.var([88, 89], ddof=1) / 2
    df = (by_patient + by_seed) ** 2 / (by_patient**2 / 23 + by_seed**2 / 1)  # Satterthwaite
    half = stats.t.ppf(0.975, df) * np.sqrt(by_patient + by_seed)
    assert interval == pytest.approx([max(0, 88.5 - half), min(100, 88.5 + half)])
    assert [text.get_text() for text in axis.get_xticklabels()] == ["IID", "age skew"]
    assert axis.get_ylabel() == "Dice on the test images (%)"


def test_fig2_without_scores_by_image_takes_the_seeds():
    axis = plots.fig2(results(inits=("fm",), splits=("age",))).axes[0]
    assert drawn(axis, "fm", "-") == [pytest.approx(statistics.seed_interval([80, 81]))]


def test_fig3_draws_the_mean_of_seeds_their_range_and_the_centralised_level():
    figure = plots.fig3(results())
    whole, top = figure.axes

    lines = {line.get_label(): line for line in whole.lines}
    np.testing.assert_allclose(lines["random"].get_ydata(), [40.5, 50.25, 60, 69.75, 79.5])
    assert lines["centralised 95.5"].get_ydata()[0] == pytest.approx(95.5)
    band = whole.collections[0].get_paths()[0].vertices[:, 1]
    assert (band.min(), band.max()) == pytest.approx((40, 80))
    assert top.get_ylim()[0] == pytest.approx(81)  # 2 points below the lowest end of an informed start
    assert whole.get_xlabel() == "round (age skew)"


def test_partial_results_still_make_figures():
    alone = results(inits=("fm",), splits=("site",), seeds=1, centralised=False)
    assert isinstance(plots.fig2(alone, per_image(alone)), Figure)
    assert plots.fig3(alone).axes[0].get_xlabel() == "round (split by site)"
    assert isinstance(plots.per_image(per_image(alone)), Figure)
    assert isinstance(plots.fig2(alone.iloc[:0]), Figure)
    assert isinstance(plots.fig3(alone.iloc[:0]), Figure)


def test_per_image_counts_and_draws_the_failures():
    table = results(inits=("random", "fm"), splits=("age",), centralised=False)
    scores = per_image(table)
    scores.loc[(scores.init == "fm") & scores.image_id.isin(["i0", "i1"]), "dice"] = 0.5  # in both seeds
    axis = plots.per_image(scores).axes[0]

    names = [text.get_text() for text in axis.get_yticklabels()]
    assert names[1] == "foundation model\n2 below 0.8"
    points = np.concatenate([np.asarray(group.get_offsets()) for group in axis.collections])
    assert (points[:, 0] == 0.5).sum() == 2
    again = [group.get_offsets() for group in plots.per_image(scores).axes[0].collections]
    np.testing.assert_array_equal(np.concatenate(again), points, "the same scores give another picture")


def test_a_start_has_one_colour_and_no_two_starts_share_one():
    found = plots.colours(["fm", "mine", "random", "other", "fm"])
    assert found["fm"] == plots.PALETTE["fm"]
    assert len(set(found.values())) == len(found) == 4


def test_galleries_show_the_images_they_name():
    images, masks, predicted, dice = squares()

    worst = plots.worst_cases(images, masks, predicted, dice, count=2)
    assert labels(worst)[0] == [f"Dice {dice[5]:.3f}", f"Dice {dice[4]:.3f}"]
    np.testing.assert_array_equal(worst.axes[0].images[0].get_array(), images[5, 0])

    boxes = torch.tensor([[8.0, 8, 20, 24]]).repeat(6, 1)
    teacher = plots.teacher_gallery(images, masks, predicted, dice, boxes=boxes, count=1)
    assert [axis.get_title() for axis in teacher.axes] == ["best", "median", "worst"]
    shown = [float(text.removeprefix("Dice ")) for text in labels(teacher)[0]]
    assert shown == pytest.approx(dice[[0, 2, 5]].tolist(), abs=5e-4)
    assert legend(teacher) == ["ground truth", "predicted", "box prompt"]
    (patch,) = teacher.axes[0].patches
    assert patch.get_bbox().extents.tolist() == [8, 8, 20, 24]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_stored_and_network_images_have_the_same_greys(dtype):
    """A pixel of 51 of 255 is a fifth of white, and so is 0.2 of 1."""
    stored = torch.tensor([[51, 255], [0, 51]], dtype=torch.uint8)[None, None]
    masks = torch.tensor([[True, False], [False, False]])[None, None]
    greys = []
    for images in (stored, stored.numpy(), (stored / 255).to(dtype)):
        picture = plots.augmented(images, masks).axes[0].images[0]
        greys.append(picture.norm(picture.get_array()))
    np.testing.assert_allclose(greys[0], [[0.2, 1], [0, 0.2]])
    np.testing.assert_allclose(greys[1], greys[0])
    np.testing.assert_allclose(greys[2], greys[0], atol=1e-3)


def test_images_of_a_cohort_carry_site_and_age():
    images, masks, *_ = squares()
    cohort = SimpleNamespace(images=images, masks=masks, table=table())
    figure = plots.images(cohort, torch.tensor([3, 4]))
    assert labels(figure)[0] == ["b\nage unknown", "a\n60 years"]
    np.testing.assert_array_equal(figure.axes[1].images[0].get_array(), images[4, 0])
    assert len(plots.augmented(images, masks, columns=4).axes) == 6


def test_boxes_draws_one_or_several_and_an_empty_mask():
    images, masks, *_ = squares()
    one = plots.boxes(images[0], torch.tensor([1.0, 2, 3, 4]), mask=masks[0])
    two = plots.boxes(images[0], np.array([[1, 2, 3, 4], [5, 6, 9, 9]]), teacher_mask=0 * masks[0])
    assert len(one.axes[0].patches) == 1
    assert len(two.axes[0].patches) == 2
    assert legend(one) == ["ground truth", "box prompt"]


def test_ages_counts_images_without_age():
    by_site = plots.ages(table())
    assert legend(by_site) == ["a: 3", "b: 3 (1 without age)"]
    assert sum(bar.get_height() for bar in by_site.axes[0].patches) == 5
    assert by_site.axes[0].get_xlabel() == "age (years)"
    parts = plots.ages(table(), {"proxy": torch.tensor([0, 1]), "test": [3]})
    assert legend(parts) == ["proxy: 2", "test: 1 (1 without age)"]


def test_clients_draws_sizes_and_counts_patients():
    figure = plots.clients(table(), [torch.tensor([0, 1, 2]), torch.tensor([4, 5])], title="sizes 1.5 : 1")
    sizes, ages = figure.axes
    assert [bar.get_width() for bar in sizes.patches] == [3, 2]
    assert [text.get_text() for text in sizes.texts] == ["3 (2)", "2 (1)"]
    assert ages.get_xlabel() == "age (years)"


def test_loss_and_dice_curves():
    inits = ["fm", "fm", "random", "random"]
    history = pd.DataFrame({"epoch": [1, 2, 1, 2], "loss": [4.0, 3, 2, 1], "init": inits})
    axis = plots.loss_curves(history).axes[0]
    assert [line.get_ydata().tolist() for line in axis.lines] == [[4, 3], [2, 1]]
    assert axis.lines[0].get_color() == plots.PALETTE["fm"]

    axis = plots.dice_by_round(pd.DataFrame({"round": [0, 1], "dice": [0.2, 0.9]})).axes[0]
    np.testing.assert_allclose(axis.lines[0].get_ydata(), [20, 90])


def test_dice_by_rule_writes_each_rules_mean():
    scores = pd.DataFrame({"rule": ["box", "box", "whole"], "dice": [0.9, 0.8, 0.5], "hd95": [2.0, 3.0, 9.0]})
    dice, hd95 = plots.dice_by_rule(scores).axes
    assert [text.get_text() for text in dice.get_yticklabels()] == [
        "box\n0.850, 2.5 px",
        "whole\n0.500, 9.0 px",
    ]
    (dots,) = hd95.collections
    points = [(x, round(y)) for x, y in np.asarray(dots.get_offsets())]
    assert points == [(2, 0), (3, 0), (9, 1)], "each in its rule's row"


def test_dice_by_jitter_draws_the_means():
    scores = {"pixels": [0, 0, 5, 5], "dice": [0.9, 1.0, 0.6, 0.8], "hd95": [1.0, 2.0, 4.0, 8.0]}
    dice, hd95 = plots.dice_by_jitter(pd.DataFrame(scores)).axes
    np.testing.assert_allclose(dice.lines[0].get_xydata(), [[0, 0.95], [5, 0.7]])
    np.testing.assert_allclose(hd95.lines[0].get_xydata(), [[0, 1.5], [5, 6]])


def distilled(*rows) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=["alpha", "temperature", "labels", "views", "dice"])


def test_dice_by_alpha_is_a_line_a_temperature_from_the_masks_alone():
    rows = [(0.6, 1.0, "soft", "cached", 0.9), (0.0, 1.0, "soft", "cached", 0.8)]
    rows += [(1.0, 1.0, "soft", "cached", 0.85), (1.0, 3.0, "soft", "cached", 0.7)]
    rows += [(0.6, 1.0, "hard", "cached", 0.75), (0.6, 1.0, "soft", "fresh", 0.95)]
    figure = plots.dice_by_alpha(distilled(*rows), teacher=0.97)
    warm, hot, hard, fresh, level = figure.axes[0].lines
    np.testing.assert_allclose(warm.get_xydata(), [[0, 80], [0.6, 90], [1, 85]])
    np.testing.assert_allclose(hot.get_xydata(), [[0, 80], [1, 70]])
    np.testing.assert_allclose([hard.get_xydata()[0], fresh.get_xydata()[0]], [[0.6, 75], [0.6, 95]])
    np.testing.assert_allclose(level.get_ydata(), 97)
    assert legend(figure) == [
        "T = 1",
        "T = 3",
        "hard labels",
        "fresh views",
        "the teacher, told the box: 97.0",
    ]


@pytest.mark.parametrize("alpha", [0.0, 0.6])
def test_dice_by_alpha_of_one_student(alpha):
    (line,) = plots.dice_by_alpha(distilled((alpha, 1.0, "soft", "cached", 0.8))).axes[0].lines
    np.testing.assert_allclose(line.get_xydata(), [[alpha, 80]])


def test_reliability_leaves_out_empty_bins():
    table = pd.DataFrame({"probability": [0.1, np.nan, 0.8], "frequency": [0.2, np.nan, 0.7]})
    axis = plots.reliability(table, 0.0123).axes[0]
    diagonal, curve = axis.lines
    np.testing.assert_allclose(diagonal.get_xydata(), [[0, 0], [1, 1]])
    np.testing.assert_allclose(curve.get_xydata(), [[0.1, 0.2], [0.8, 0.7]])
    assert "0.0123" in axis.get_title()


def test_the_map_has_a_panel_for_each_axis_and_pair_with_hollow_points_in_the_noise():
    rows = []
    for axis, values in (("labelled", ["10", "all"]), ("server", ["adam", "average"])):
        for value in values:
            for lower in ("random", "pretraining"):
                noise = lower == "pretraining" and value == "all"
                rows.append((axis, value, "fm", lower, 2.0, 1.0, 4.0, noise))
    names = ["axis", "value", "higher", "lower", "gain", "low", "high", "inside_noise"]
    figure = plots.when_it_pays(pd.DataFrame(rows, columns=names))
    assert [axis.get_xlabel() for axis in figure.axes] == ["labelled", "labelled", "server", "server"]
    assert [axis.get_title() for axis in figure.axes[:2]] == [
        "foundation model\nabove random",
        "foundation model\nabove pre-training",
    ]
    assert [tick.get_text() for tick in figure.axes[0].get_xticklabels()] == ["10", "all"]
    hollow = [
        line.get_markerfacecolor() == "white"
        for axis in figure.axes
        for line in axis.lines
        if line.get_marker() == plots.MARKERS["fm"]
    ]
    assert hollow == [False, False, False, True] + [False] * 4


def test_the_maps_values_do_not_run_into_each_other():
    values = {"server": ("adam", "average", "momentum"), "proximal": ("0", "0.01")}
    rows = [(axis, value, "fm", "random", 2.0, 1.0, 4.0, False) for axis in values for value in values[axis]]
    names = ["axis", "value", "higher", "lower", "gain", "low", "high", "inside_noise"]
    figure = plots.when_it_pays(pd.DataFrame(rows, columns=names))
    words, numbers = (axis.get_xticklabels() for axis in figure.axes)
    assert {label.get_rotation() for label in words} == {30}
    assert {label.get_rotation() for label in numbers} == {0}
    figure.draw_without_rendering()
    one, other = (label.get_window_extent() for label in numbers)
    assert one.x1 < other.x0
    ends = [label.get_window_extent().x1 for label in words]  # slanted: a line's height from end to end
    line = words[0].get_fontsize() * figure.dpi / 72
    assert all(right - left > 2 * line for left, right in itertools.pairwise(ends))


def test_why_shows_each_measure_by_round_and_both_of_the_ground():
    drift = pd.DataFrame(
        [("fm", "age", seed, number, 1.0 * number, 0.5, 1.2, 3.0) for seed in (0, 1) for number in (1, 2)],
        columns=["init", "split", "seed", "round", *plots.DRIFT],
    )
    starts = pd.DataFrame({"init": ["random", "fm"], "sharpness": [5.0, 2.0], "barrier": [0.3, 0.1]})
    figure = plots.why(drift, starts, "age")
    labels = [axis.get_ylabel() for axis in figure.axes]
    assert labels[:4] == list(plots.DRIFT.values()) and len(labels) == 6
    (line,) = [line for line in figure.axes[0].lines if len(line.get_xdata())]
    assert list(line.get_ydata()) == [1.0, 2.0]
    assert [bar.get_height() for bar in figure.axes[4].patches] == [0.3, 0.1]
    assert plots.why(drift, starts.head(0), "age")


def test_why_has_no_panel_without_a_measurement():
    drift = pd.DataFrame(
        [("fm", "age", 0, number, 1.0, 0.5, 1.2, 3.0) for number in (1, 2)],
        columns=["init", "split", "seed", "round", *plots.DRIFT],
    )
    nothing = pd.DataFrame(columns=["init", "sharpness", "barrier"])
    assert len(plots.why(drift, nothing, "age").axes) == 4
    starts = pd.DataFrame({"init": ["fm"], "sharpness": [np.nan], "barrier": [0.0]})
    assert len(plots.why(drift.assign(update_cosine=np.nan), starts, "age").axes) == 4


def test_a_loss_of_one_epoch_is_seen():
    history = pd.DataFrame({"epoch": [1, 1], "loss": [4.0, 2.0], "init": ["fm", "pretraining"]})
    assert [line.get_marker() for line in plots.loss_curves(history).axes[0].lines] == ["o", "o"]


# Seen by everyone, on every screen

#: Linear RGB as people without one kind of cone see it: Machado, Oliveira & Fernandes 2009, severity 1.
VISION = {
    "common": np.eye(3),
    "protanopia": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deuteranopia": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
    "tritanopia": [
        [1.255528, -0.076749, -0.178779],
        [-0.078411, 0.930809, 0.147602],
        [0.004733, 0.691367, 0.303900],
    ],
}


def lab(colour, vision="common"):
    """CIE L*a*b* (D65) of an sRGB colour as it is seen with that vision."""
    stored = np.array(matplotlib.colors.to_rgb(colour))
    linear = np.where(stored <= 0.04045, stored / 12.92, ((stored + 0.055) / 1.055) ** 2.4)
    seen = np.clip(np.asarray(VISION[vision]) @ linear, 0, 1)
    to_xyz = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    x, y, z = np.asarray(to_xyz) @ seen / [0.9505, 1, 1.089]
    x, y, z = (np.cbrt(v) if v > 0.008856 else 7.787 * v + 16 / 116 for v in (x, y, z))
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def apart(one, other, vision="common"):
    """Distance of two colours (CIE 1976): 2 is just seen, 10 at a glance."""
    return np.linalg.norm(lab(one, vision) - lab(other, vision))


def test_the_measure_of_colours_knows_which_ones_merge():
    assert lab("white") == pytest.approx([100, 0, 0], abs=0.1) and lab("black") == pytest.approx([0, 0, 0])
    assert lab("red") == pytest.approx([53.2, 80.1, 67.2], abs=0.2)  # as published for sRGB
    red, green = "#B23A3A", "#6B7A1F"
    assert apart(red, green) > 60 and apart(red, green, "deuteranopia") < 25


@pytest.mark.parametrize("vision", VISION)
def test_truth_prediction_and_box_are_told_apart_with_any_colour_vision(vision):
    """The green and vermilion that they once had are 53 apart for deuteranopes and 37 for protanopes."""
    assert apart(plots.TRUTH, plots.PREDICTED, vision) > 80
    assert apart(plots.TRUTH, plots.BOX, vision) > 30 and apart(plots.PREDICTED, plots.BOX, vision) > 30


def test_the_truth_is_solid_the_prediction_dashed_and_the_box_dotted_in_picture_and_key():
    images, masks, predicted, dice = squares()
    figure = plots.worst_cases(images, masks, predicted, dice, count=1)
    truth, guess = figure.axes[0].collections
    solid = (0, None)
    assert truth.get_linestyle()[0] == solid and guess.get_linestyle()[0] != solid
    assert [line.get_linestyle() for line in figure.legends[0].get_lines()] == ["-", "--"]
    boxed = plots.boxes(images[0], [1, 2, 3, 4], mask=masks[0], teacher_mask=predicted[1])
    assert boxed.axes[0].patches[0].get_linestyle() == plots.LINES[plots.BOX] == "dotted"


@pytest.mark.parametrize("number", [1, 2, 3, 5])
def test_clients_and_other_groups_have_no_colour_of_a_start(number):
    starts = [*plots.PALETTE.values(), *plots.OTHERS]
    found = plots.group_colours(number)
    assert len(found) == number
    assert min(apart(group, start) for group in found for start in starts) > 15
    assert all(apart(*pair, vision) > 9 for pair in itertools.pairwise(found) for vision in VISION)


def test_the_clients_bars_and_the_sites_bars_are_of_those_colours():
    bars = plots.clients(table(), [torch.tensor([0, 1, 2]), torch.tensor([4, 5])]).axes[0].patches
    assert [matplotlib.colors.to_hex(bar.get_facecolor()) for bar in bars] == plots.group_colours(2)
    shown = {matplotlib.colors.to_hex(bar.get_facecolor()) for bar in plots.ages(table()).axes[0].patches}
    assert shown == set(plots.group_colours(2))


def gains_of(axes, pairs=2):
    names = ["axis", "value", "higher", "lower", "gain", "low", "high", "inside_noise"]
    rows = [
        (axis, value, "fm", lower, 2.0, 1.0, 4.0, False)
        for axis in axes
        for value in ("average", "momentum", "adam")
        for lower in ("random", "pretraining")[:pairs]
    ]
    return pd.DataFrame(rows, columns=names)


@pytest.fixture(scope="module")
def every_figure():
    """Name -> figure of every function, drawn, with as long words as a study has."""
    plots.use_style()
    figures = dict(_every_figure())
    for figure in figures.values():
        figure.draw_without_rendering()
    return figures


def _every_figure():
    images, masks, predicted, dice = squares(9)
    scores = per_image(results(splits=("iid", "age", "quantity")))
    ends = results(splits=("iid", "age", "quantity"))
    drift = pd.DataFrame(
        [(init, "age", 0, n, 1.0 * n, 0.5, 1.2, 3.0) for init in tables.PAPER_INITS for n in range(11)],
        columns=["init", "split", "seed", "round", *plots.DRIFT],
    )
    starts = pd.DataFrame({"init": tables.PAPER_INITS, "sharpness": [5.0, 2, 1], "barrier": [0.3, 0.1, 0]})
    rules = [f"{rule}, per_lung" for rule in ("ground_truth", "ground_truth_jitter", "predicted")]
    by_rule = pd.DataFrame({"rule": rules * 2, "dice": np.linspace(0.8, 0.9, 6), "hd95": np.arange(6.0)})
    by_pixels = {"pixels": [0, 0, 5, 5], "dice": [0.9, 1.0, 0.6, 0.8], "hd95": [1.0, 2.0, 4.0, 8.0]}
    epochs = pd.DataFrame(
        {"epoch": [1, 2] * 2, "loss": 1.0, "dice_loss": 0.5, "init": ["fm"] * 2 + ["random"] * 2}
    )
    people = pd.DataFrame(
        {"patient_id": range(9), "age": 9.0 * np.arange(9), "site": ["children", "archive", "clinic"] * 3}
    )
    cohort = SimpleNamespace(images=images, masks=masks, table=people)
    parts = [torch.arange(3), torch.arange(3, 9)]
    yield "images", plots.images(cohort, range(9))
    yield "augmented", plots.augmented(images, masks)
    yield "boxes", plots.boxes(images[0], [1, 2, 9, 9], teacher_mask=predicted[0], mask=masks[0])
    yield "teacher_gallery", plots.teacher_gallery(images, masks, predicted, dice, boxes=[[1, 2, 3, 4]] * 9)
    yield "worst_cases", plots.worst_cases(images, masks, predicted, dice)
    yield "predictions", plots.predictions(images[0], masks[0], {"fm\nDice 0.9": predicted[0]})
    yield "ages", plots.ages(people)
    yield "clients", plots.clients(people, parts, title="quantity: ages 22 years apart, sizes 9.4 : 1")
    yield "dice_by_rule", plots.dice_by_rule(by_rule)
    yield "dice_by_jitter", plots.dice_by_jitter(pd.DataFrame(by_pixels))
    yield (
        "reliability",
        plots.reliability(pd.DataFrame({"probability": [0.1, 1], "frequency": [0.2, 1]}), 0.01),
    )
    yield "loss_curves", plots.loss_curves(epochs)
    pull = masks[0] - 0.5
    yield "loss_by_pixel", plots.loss_by_pixel(images[0], masks[0], predicted[0], masks[0], pull)
    yield "round_by_round", plots.round_by_round(masks[0], masks[0], [0.2, 0.5])
    yield "dice_by_alpha", plots.dice_by_alpha(distilled((0.6, 1.0, "soft", "cached", 0.9)), teacher=0.97)
    yield "dice_by_round", plots.dice_by_round(ends[ends.arm == "federated"])
    yield "fig2", plots.fig2(ends, scores)
    yield "fig3", plots.fig3(ends)
    yield "per_image", plots.per_image(scores)
    yield "when_it_pays", plots.when_it_pays(gains_of(("optimizer_state", "server")))
    yield "why", plots.why(drift, starts, "age")


def test_every_figures_text_is_readable_where_the_page_is_390_pixels_wide(every_figure):
    """The page leaves 358 pixels, and a saved figure has 0.1 inches around it: no text under 9 pixels."""
    for name, figure in every_figure.items():
        width = figure.get_tightbbox().width + 0.2
        texts = [
            text for text in figure.findobj(matplotlib.text.Text) if text.get_text() and text.get_visible()
        ]
        smallest = min(text.get_fontsize() for text in texts) if texts else np.inf
        assert smallest / 72 * 358 / width >= 9, f"{name}: {smallest} points, {width:.2f} inches wide"
    style = {"use_style", "colours", "group_colours"}
    own = {name for name, found in vars(plots).items() if getattr(found, "__module__", "") == plots.__name__}
    assert {name for name in own if not name.startswith("_")} - style == set(every_figure)


def test_no_figures_words_run_into_each_other(every_figure):
    for name, figure in every_figure.items():
        for axis in figure.axes:
            for labels_ in (axis.get_xticklabels(), axis.get_yticklabels(), axis.texts):
                boxes = [
                    text.get_window_extent() for text in labels_ if text.get_text() and text.get_visible()
                ]
                if any(text.get_rotation() for text in labels_):
                    continue  # slanted boxes overlap where their words do not; see the map's own test
                for one, other in itertools.combinations(boxes, 2):
                    assert not one.shrunk(0.9, 0.9).overlaps(other.shrunk(0.9, 0.9)), name

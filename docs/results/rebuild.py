"""Write tables, figures and pages again from the committed scores: `python docs/results/rebuild.py`.

It reads results.csv, per_image.csv, drift.csv, starts.csv and, where a study's variants left no scores by
image, the intervals over patients alone and over seeds alone in gains.csv and by_variant.csv, and the seeds'
scores by round. It writes the studies' other tables, the figures that are drawn from tables, the report, the
map, and the text between the marks of the pages. The experiments' folders (budgets, collapse, plateau, skew,
taught) are written by `python -m bench`, as their pages say: run that first, since the map reads them.
"""

import sys
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import scipy
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fmfl.analysis import claims, markdown, plots, statistics, tables, words
from fmfl.study import report

ROOT = Path(__file__).resolve().parents[2]
STUDIES = ("v7-cpu", "v7-labels")  # all tables
REPORTED = "v7-cpu"
VARIED = ("v7-labels", "v7-choices")  # the map
ROUNDS = {"v7-labels": "before_any_round", "v7-choices": "by_round"}  # every choice's and seed's scores


def main(root: Path = ROOT, *, figures: bool = True) -> None:
    """Rebuild the studies, the map and the pages below `root`, a checkout of the project."""
    results = root / "docs" / "results"
    for name in STUDIES:
        analyse(results / name)
    for name in VARIED:
        gains(results / name)
        scores_of_variants(results / name)
    elsewhere(results / "elsewhere")
    the_map(results).round(5).to_csv(results / "when-it-pays" / "gains.csv", index=False)
    if figures:
        draw(results)
    report.write(results / REPORTED)
    for name, blocks in PAGES.items():
        markdown.write_into(results / name / "README.md", results / name, markdown.BLOCKS | blocks)
    markdown.write_into(root / "docs" / "findings.md", results / REPORTED)


def analyse(folder: Path) -> None:
    """Write a study's tables from its scores."""
    results, per_image = (tables.read_table(folder / f"{name}.csv") for name in ("results", "per_image"))
    informed = [init for init in tables.ordered_inits(results) if init != "random"]
    written = {
        "table1": tables.table1(results, per_image),
        "claims": claims.ledger(results, per_image),
        "differences": tables.paired_differences(per_image),
        "cost": tables.cost(results, tables.TARGETS[0]),
        "gap": tables.gap(per_image, informed, tables.reference_split(results)),
        "speed": tables.speed(results),
        "weakest": tables.weakest(per_image),
    }
    for name, table in written.items():
        table.to_csv(folder / f"{name}.csv", index=False)


# The variants, of which intervals over patients alone and over seeds alone are left


def together(table: pd.DataFrame, value: str) -> list[statistics.TwoWay]:
    """Join the two intervals of each row as `statistics.two_way` joins squared errors."""
    means = []
    for row in table.to_dict("records"):
        squared = [
            ((row[f"{of}_high"] - row[f"{of}_low"]) / 2 / scipy.stats.t.ppf(0.975, row[number] - 1)) ** 2
            for of, number in (("patient", "patients"), ("seed", "seeds"))
        ]
        error = statistics.joined(squared[0], row["patients"], squared[1], row["seeds"])
        means.append(statistics.TwoWay(row[value], *error))
    return means


def gains(folder: Path) -> None:
    """Write gains.csv again: two-way intervals, and each contrast once in the family."""
    table = pd.read_csv(folder / "gains.csv", dtype={"value": str})
    means = together(table, "gain")
    table["low"], table["high"] = zip(*(mean.interval() for mean in means), strict=True)
    table["error"], table["df"] = [mean.error for mean in means], [mean.df for mean in means]
    table["p_two_way"] = [mean.p_different() for mean in means]
    table["p_equivalence"] = [mean.p_equivalent(statistics.EQUIVALENCE) for mean in means]
    same = ["higher", "lower", "gain", "p"]  # the study's own setting stands on every axis
    once = table.drop_duplicates(same).assign(missing="")
    once = once.rename(columns={"gain": "value", "value": "setting"})
    judged = statistics.corrected(once).rename(columns={"value": "gain"})
    table = table[[*same, *(name for name in table if name not in {*same, *JUDGED})]]
    table = table.merge(judged[[*same, *JUDGED]], on=same, how="left")
    columns = ["axis", "value", "higher", "lower", "gain", *(c for c in tables.COMPARED if c != "value")]
    table[columns].to_csv(folder / "gains.csv", index=False)


JUDGED = (
    *("p_holm", "p_permutation_holm", "p_two_way_holm", "p_equivalence_holm"),
    *("inside_noise", "equivalent", "reading"),
)


def scores_of_variants(folder: Path) -> None:
    """Write by_variant.csv again with two-way intervals."""
    table = pd.read_csv(folder / "by_variant.csv", dtype={"value": str})
    table["low"], table["high"] = zip(*(mean.interval() for mean in together(table, "dice")), strict=True)
    table[["axis", "value", "init", "dice", *tables.SCORED]].to_csv(folder / "by_variant.csv", index=False)


# The map: what the teacher's student gains where one thing is changed, from all experiments

IMAGES = "test images, 10 rounds"
SPLITS = {"iid": "IID", "age": "by age", "site": "by hospital", "quantity": "by number"}

#: Of each experiment: the label of a difference to the map's axis, its value, and the lower start.
MAPPED = {
    "budgets": {
        f"foundation model less {start}, {number} round{'s' * (number > 1)}": ("rounds", str(number), init)
        for start, init in (("random", "random"), ("pre-training", "pretraining"))
        for number in (1, 2, 4)
    },
    "plateau": {
        f"foundation model less {start}, age, cosine, 60 rounds": ("rounds", "60, decaying rate", init)
        for start, init in (("random", "random"), ("pre-training", "pretraining"))
    },
    "skew": {
        f"foundation model less {start}, {split}": ("balanced split, 20 rounds", SPLITS[split], init)
        for start, init in (("random", "random"), ("pre-training", "pretraining"))
        for split in ("iid", "age", "site")
    },
    "taught": {
        f"{label} less proxy masks alone, 10 masks, before any round": ("teacher", value, "pretraining")
        for value, label in (
            ("shipped", "the shipped teacher"),
            ("same images, 1,200 steps", "a teacher of the same images"),
            ("Montgomery's images", "a teacher of Montgomery's images"),
            ("synthetic X-rays", "a teacher of synthetic X-rays"),
            ("drawn kidneys", "a teacher of drawn kidneys"),
        )
    },
}
#: Names of the map's axes, where an experiment's own are too short.
AXES = {
    "batch_norm": "BatchNorm, 4 rounds",
    "labelled": "proxy masks, 4 rounds",
    "rounds": "rounds, age skew",
    "server": "server, 4 rounds",
    "teacher": "teacher, 10 masks, no round",
}


def the_map(results: Path) -> pd.DataFrame:
    """Return the gains of the teacher's student from all experiments, each with its experiment's reading.

    Returns:
        axis, value, higher, lower, gain, low, high, seeds, p, p_permutation, p_two_way, inside_noise,
        equivalent, reading.
    """
    labels, choices = (
        pd.read_csv(results / name / "gains.csv", dtype={"value": str}).rename(columns={"gain": "points"})
        for name in VARIED
    )
    choices = choices[choices.axis.isin(["server", "batch_norm"]) & (choices.value != "group")]
    study = pd.read_csv(results / "v7-cpu" / "differences.csv").rename(columns={"value": "points"})
    study = study[study.higher == "fm"].assign(axis="split, 10 rounds", value=study.split.map(SPLITS))
    sites = pd.read_csv(results / "elsewhere" / "differences.csv").rename(columns={"set": "value"})
    sites = sites[(sites.higher == "fm") & (sites.value != "own test set")].assign(axis=IMAGES)
    statistics_kept = _by_running_statistics(pd.read_csv(results / "collapse" / "per_image.csv"))
    rows = [study, *(_picked(results / name, chosen) for name, chosen in MAPPED.items())]
    table = pd.concat([labels, *rows, sites, choices, statistics_kept], ignore_index=True)
    table = table.assign(axis=table.axis.replace(AXES), gain=table.points)
    columns = ["axis", "value", "higher", "lower", "gain", "low", "high", "seeds"]
    return table[[*columns, "p", "p_permutation", "p_two_way", "inside_noise", "equivalent", "reading"]]


def _picked(folder: Path, labels: dict[str, tuple[str, str, str]]) -> pd.DataFrame:
    """Return the differences of an experiment that the map shows.

    Raises:
        KeyError: the experiment has none of that label.
    """
    table = pd.read_csv(folder / "differences.csv").rename(columns={"value": "points"})
    picked = table.set_index("difference").loc[list(labels)].reset_index(drop=True)
    about = pd.DataFrame(list(labels.values()), columns=["axis", "value", "lower"])
    return pd.concat([picked, about.assign(higher="fm")], axis=1)


def forest(gains: pd.DataFrame) -> Figure:
    """Draw the map: a row a setting, a column a pair of starts.

    Bars and markers are those of `plots.when_it_pays`. Where gains go beyond ten points, the scale is
    logarithmic beyond ±1, so that tenths are seen as well.
    """
    pairs = list(dict.fromkeys(zip(gains.higher, gains.lower, strict=True)))
    settings = list(dict.fromkeys(zip(gains.axis, gains["value"], strict=True)))
    groups = list(dict.fromkeys(gains.axis))
    # A free row above each group holds its name.
    place = {one: row + 1.3 * (groups.index(one[0]) + 1) for row, one in enumerate(settings)}
    bottom = max(place.values()) + 0.8
    size = 3.6 * len(pairs), 0.2 * bottom + 1
    figure, axes = plt.subplots(1, len(pairs), figsize=size, sharey=True, layout="constrained")
    for axis, pair in zip(axes, pairs, strict=True):
        _gains(axis, gains[(gains.higher == pair[0]) & (gains.lower == pair[1])], place)
        axis.set_title(" above ".join(map(words.init_name, pair)), fontsize="medium")
    for group in groups:
        above = min(row for (name, _), row in place.items() if name == group) - 1
        where = {"transform": axes[0].get_yaxis_transform(), "ha": "right", "va": "center"}
        axes[0].text(-0.03, above, group, fontweight="bold", fontsize="small", **where)
    axes[0].set_yticks(list(place.values()), [value for _, value in settings], fontsize="small")
    axes[0].set_ylim(bottom, -0.3)
    return figure


def _gains(axis: Axes, points: pd.DataFrame, place: dict[tuple[str, str], float]) -> None:
    """Draw the gains of one pair of starts, hollow inside the noise."""
    for point in points.itertuples():
        color = plots.colours([point.lower])[point.lower]
        fill = "white" if point.inside_noise else color
        row = place[point.axis, point.value]
        axis.plot([point.low, point.high], [row, row], color=color)
        axis.plot(point.gain, row, plots.MARKERS["fm"], color=color, markerfacecolor=fill, markersize=5)
    axis.axvline(0, color="black", linewidth=1)
    if points[["low", "high"]].abs().to_numpy().max() > 10:
        axis.set_xscale("symlog", linthresh=1)
    axis.set_xlim(min(-0.5, 1.6 * points.low.min()), max(0.5, 1.6 * points.high.max()))
    axis.xaxis.set_major_formatter("{x:g}")
    axis.minorticks_off()
    axis.set_xlabel("points of Dice")
    axis.grid(axis="x")
    axis.grid(visible=False, axis="y")


def elsewhere(folder: Path) -> None:
    """Write Dice and the starts' differences by set of images, all differences corrected together."""
    scores = pd.read_csv(folder / "scores.csv", dtype={"image_id": str})
    means, differences = [], []
    cells = {init: ("federated", init, "age") for init in tables.PAPER_INITS}
    for name, own in scores.groupby("set", sort=False):
        for init, cell in cells.items():
            means.append({"set": name, "init": init} | statistics.contrast(own, {cell: 1}))
        for higher, lower in (("fm", "random"), ("pretraining", "random"), ("fm", "pretraining")):
            about = {"set": name, "higher": higher, "lower": lower}
            differences.append(about | statistics.contrast(own, {cells[higher]: 1, cells[lower]: -1}))
    judged = statistics.corrected(pd.DataFrame(differences)).rename(columns={"value": "points"})
    judged.round(5).to_csv(folder / "differences.csv", index=False)
    table = pd.DataFrame(means).rename(columns={"value": "points"})
    table.round(5).to_csv(folder / "means.csv", index=False)


def _by_running_statistics(scores: pd.DataFrame) -> pd.DataFrame:
    """Return gains by what a server does with BatchNorm's running statistics."""
    scores = scores[(scores.arm == "federated") & (scores.norm == "batch") & (scores.learning_rate == 1e-3)]
    scores = scores[scores.split == "age"].assign(dice=scores.dice / 100)
    rows = []
    for server, value in (("all", "averaged"), ("client 0", "one client's"), ("start", "forgotten")):
        for lower in ("random", "pretraining"):
            cells = {("federated", "fm", "age"): 1, ("federated", lower, "age"): -1}
            result = statistics.contrast(scores[scores.server == server], cells)
            about = {"axis": "running statistics, 10 rounds", "higher": "fm", "lower": lower}
            rows.append(about | {"server": value} | result)
    table = statistics.corrected(pd.DataFrame(rows))
    return table.rename(columns={"value": "points", "server": "value"})


def draw(results: Path) -> None:
    """Draw the figures that tables hold all of; those with images or teachers stay as the study drew them."""
    plots.use_style()
    for name in STUDIES:
        folder = results / name
        runs, per_image, drift, starts = (
            tables.read_table(folder / f"{name}.csv") for name in ("results", "per_image", "drift", "starts")
        )
        split = tables.reference_split(runs)
        _save(plots.fig2(runs, per_image), folder / "figures" / "fig2.png")
        _save(plots.fig3(runs, split), folder / "figures" / "fig3.png")
        _save(plots.per_image(per_image, split), folder / "figures" / "per_image.png")
        _save(plots.why(drift, starts, split), folder / "figures" / "why.png")
    for name in VARIED:
        gained = pd.read_csv(results / name / "gains.csv", dtype={"value": str})
        _save(plots.when_it_pays(gained), results / name / "figures" / "when_it_pays.png")
    gained = pd.read_csv(results / "when-it-pays" / "gains.csv", dtype={"value": str})
    _save(forest(gained), results / "when-it-pays" / "figures" / "map.png")
    sites = tables.read_table(results / "elsewhere" / "differences.csv")
    sites = sites[sites.higher == "fm"].rename(columns={"set": "value", "points": "gain"}).assign(axis=IMAGES)
    _save(forest(sites), results / "elsewhere" / "figures" / "elsewhere.png")


def _save(figure, file: Path) -> None:
    figure.savefig(file, dpi=200, bbox_inches="tight", metadata={"Software": None})


# Blocks that one page alone has


def epochs(study: markdown.Folder) -> list[str]:
    """Return Dice by epoch of one run."""
    runs = study["results"].sort_values("round")
    return markdown.table(
        ["epoch", *runs["round"].astype(str)], [["Dice, %", *(f"{100 * dice:.1f}" for dice in runs.dice)]]
    )


def end(study: markdown.Folder) -> list[str]:
    """Return the last epoch's Dice with its interval."""
    mean = statistics.contrast(study["per_image"], {tables.CENTRALISED: 1})
    hd95 = tables.final(study["results"]).hd95.iloc[0]
    within = words.interval(mean["low"], mean["high"])
    return [
        f"At the end: **{mean['value']:.2f} %** (95 % interval over patients {within}; one seed, so the "
        f"noise between runs is unknown), HD95 {hd95:.1f} pixels."
    ]


def starts(study: markdown.Folder) -> list[str]:
    """Return each start before any round, on real and on synthetic images."""
    real, synthetic = (study[name].set_index("init") for name in ("v7", "phantom"))
    rows = []
    for init in real.index:
        cells = [words.INITS.get(init, "the teacher itself, told the true boxes")]
        for table in (real, synthetic):
            row = table.loc[init]
            cells += [f"{row.dice:.3f}", f"{row.hd95:.1f}", f"{row['calibration error']:.3f}"]
        rows.append(cells)
    scores = ("Dice", "HD95 in pixels", "calibration error")
    columns = [f"real: {scores[0]}", *scores[1:], f"synthetic: {scores[0]}", *scores[1:]]
    return markdown.table(["start", *columns], rows)


def mixes(study: markdown.Folder) -> list[str]:
    """Return students by the teacher's share in their loss."""
    rows = []
    for row in study["v7_variants"].to_dict("records"):
        paper = row["alpha"] == 0.6 and row["temperature"] == 1
        gain = words.estimate(*(100 * row[name] for name in ("gain", "low", "high")), sign=True)
        rows.append(
            (
                f"{row['alpha']:g}",
                f"{row['temperature']:g}" if row["alpha"] else "",
                f"{row['dice']:.4f}",
                "" if paper else gain,
                f"{row['hd95']:.1f}",
                f"{row['calibration error']:.3f}",
            )
        )
    columns = ["alpha", "T", "Dice", "gain over alpha 0.6, T 1, in points", "HD95 in pixels"]
    return markdown.table([*columns, "calibration error"], rows)


def _rounds(study: markdown.Folder) -> pd.DataFrame:
    """Return every choice's and seed's scores by round, with the choice's name as `choice`."""
    table = study[ROUNDS[study.directory.name]]
    return table.rename(columns={"labelled": "choice"}).astype({"choice": str})


def _order(choice: str) -> tuple:
    return (choice.isalpha() and choice != "default", float(choice) if choice.isdigit() else 0.0, choice)


def by_round(study: markdown.Folder) -> list[str]:
    """Return Dice of each choice and start by round, mean over seeds, with the seeds' range at the end."""
    table = _rounds(study)
    last, rows = table["round"].max(), []
    for choice in sorted(table.choice.unique(), key=_order):
        for init in tables.PAPER_INITS:
            runs = table[(table.choice == choice) & (table.init == init)]
            if runs.empty:
                continue
            means = 100 * runs.groupby("round").dice.mean()
            ends = 100 * runs[runs["round"] == last].dice
            through = [words.number(means[number]) for number in (0, 1, 2, last)]
            cells = [choice, words.INITS[init], *through, words.interval(ends.min(), ends.max())]
            rows.append([*cells, f"{runs[runs['round'] == 0].hd95.mean():.1f}"])
    columns = ["start", "before any round", "after 1", "after 2", f"after {last}"]
    columns += ["seeds", "HD95 before, pixels"]
    return markdown.table(["setting", *columns], rows)


def _over_seeds(changes: dict[tuple[str, str], pd.Series]) -> list[tuple[str, str, str, str]]:
    """Return a row a change: its interval over seeds alone, and its p after Holm's correction."""
    p = {
        name: scipy.stats.ttest_1samp(values, 0).pvalue
        if values.std(ddof=1) > 0
        else float(values.mean() == 0)
        for name, values in changes.items()
    }
    corrected = dict(zip(p, statistics.holm(p.values()), strict=True))
    rows = []
    for name, values in changes.items():
        size = words.estimate(values.mean(), *statistics.seed_interval(values), sign=True)
        rows.append((*name, size, f"{corrected[name]:.2f}"))
    return rows


def changes(study: markdown.Folder) -> list[str]:
    """Return changes of the final Dice by each choice, seed by seed."""
    table = _rounds(study)
    ends = (
        table[table["round"] == table["round"].max()].set_index(["choice", "init", "seed"]).dice.sort_index()
    )
    differences = {}
    for choice in [c for c in sorted(table.choice.unique(), key=_order) if c != "default"]:
        for init in ("random", "fm"):
            differences[choice, words.INITS[init]] = 100 * (ends[choice, init] - ends["default", init])
    columns = ["choice", "start", "points (95 % over three seeds alone)", "p, corrected for twelve"]
    return markdown.table(columns, _over_seeds(differences))


def head_start(study: markdown.Folder) -> list[str]:
    """Return the student's lead over pre-training before any round and at the end, by the number of masks."""
    table = _rounds(study)
    before = table[table["round"] == 0].set_index(["choice", "init", "seed"]).dice.sort_index()
    masks = sorted(table.choice.unique(), key=_order)
    lead = {(choice, ""): 100 * (before[choice, "fm"] - before[choice, "pretraining"]) for choice in masks}
    of_round0 = {choice: cells for choice, _, *cells in _over_seeds(lead)}
    ends = study["gains"]
    ends = ends[ends.lower == "pretraining"].set_index("value")
    rows = []
    for choice in masks:
        row = ends.loc[choice]
        size = words.estimate(row.gain, row.low, row.high, sign=True)
        rows.append((choice, *of_round0[choice], size, words.largest_p(row), words.reading(row)))
    columns = ["masks", "before any round (95 % over seeds alone)", "p, corrected for four"]
    columns += ["after 4 rounds (95 %)", "p, corrected for eight", "reading of the last"]
    return markdown.table(columns, rows)


def by_set(study: markdown.Folder) -> list[str]:
    """Return Dice by set of images and start."""
    rows = []
    for name, own in study["means"].groupby("set", sort=False):
        cells = [words.estimate(row.points, row.low, row.high) for row in own.itertuples()]
        rows.append([name, f"{own.images.iloc[0]:,} of {own.patients.iloc[0]:,}", *cells])
    return markdown.table(["images", "number, of patients", *map(words.init_name, tables.PAPER_INITS)], rows)


def differences_by_set(study: markdown.Folder) -> list[str]:
    """Return the starts' differences by set of images."""
    rows = []
    for row in study["differences"].to_dict("records"):
        size = words.estimate(row["points"], row["low"], row["high"], sign=True)
        pair = f"{words.INITS[row['higher']]} less {words.INITS[row['lower']]}"
        rows.append([row["set"], pair, size, str(row["seeds"]), words.largest_p(row), words.reading(row)])
    return markdown.table(["images", "difference", "points (95 %)", "seeds", "p, corrected", "reading"], rows)


def mapped(study: markdown.Folder) -> list[str]:
    """Return the map as a table."""
    rows = []
    for row in study["gains"].to_dict("records"):
        size = words.estimate(row["gain"], row["low"], row["high"], sign=True)
        what = [row["axis"], row["value"], words.INITS[row["lower"]]]
        rows.append([*what, size, str(row["seeds"]), words.reading(row)])
    return markdown.table(["axis", "value", "gain over", "points (95 %)", "seeds", "reading"], rows)


PAGES: dict[str, dict[str, markdown.Block]] = {
    "v7-cpu": {},
    "v7-labels": {"by_round": by_round, "head_start": head_start},
    "v7-choices": {"by_round": by_round, "changes": changes},
    "centralised-128": {"epochs": epochs, "end": end},
    "guangzhou-centralised": {"epochs": epochs},
    "distillation": {"starts": starts, "mixes": mixes},
    "elsewhere": {"by_set": by_set, "differences_by_set": differences_by_set},
    "when-it-pays": {"mapped": mapped},
}

if __name__ == "__main__":
    main(figures="--no-figures" not in sys.argv)

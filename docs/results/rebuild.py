"""Write tables, figures and pages again from the committed scores: `python docs/results/rebuild.py`.

It reads results.csv, per_image.csv, drift.csv, starts.csv and, where a study's variants left no scores by
image, the intervals over patients alone and over seeds alone in gains.csv and by_variant.csv, and the seeds'
scores by round. It writes all other tables, the figures that are drawn from tables, the report, and the text
between the marks of the pages.
"""

import sys
from pathlib import Path

import pandas as pd
import scipy

from fmfl.analysis import claims, markdown, plots, statistics, tables, words
from fmfl.study import report

ROOT = Path(__file__).resolve().parents[2]
STUDIES = ("v7-cpu", "v7-labels")  # all tables
REPORTED = "v7-cpu"
VARIED = ("v7-labels", "v7-choices")  # the map
ROUNDS = {"v7-labels": "before_any_round", "v7-choices": "by_round"}  # every choice's and seed's scores


def main(root: Path = ROOT, *, figures: bool = True) -> None:
    """Rebuild everything below `root`, a checkout of the project."""
    results = root / "docs" / "results"
    for name in STUDIES:
        analyse(results / name)
    for name in VARIED:
        gains(results / name)
        scores_of_variants(results / name)
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
#: Of each experiment: the label of a difference to the map's axis, its value, and the lower start.
MAPPED = {
    "budgets": {
        f"foundation model less {start}, {number} round{'s' * (number > 1)}": ("rounds", str(number), init)
        for start, init in (("random", "random"), ("pre-training", "pretraining"))
        for number in (1, 2, 4, 10)
    },
    "skew": {
        f"foundation model less {start}, {split}": ("split, 20 rounds", split, init)
        for start, init in (("random", "random"), ("pre-training", "pretraining"))
        for split in ("iid", "age", "site")
    },
    "taught": {
        f"{label} less own masks, 10 masks, before any round": ("teacher, no round", value, "pretraining")
        for value, label in (
            ("shipped", "shipped teacher"),
            ("briefer", "teacher corpus"),
            ("Montgomery", "teacher montgomery"),
            ("synthetic", "teacher synthetic"),
            ("kidneys", "teacher kidneys"),
        )
    },
}


def the_map(results: Path) -> pd.DataFrame:
    """Return every experiment's gains of the teacher's student: axis, value, lower start, gain, interval."""
    rows = []
    labels = pd.read_csv(results / "v7-labels" / "gains.csv", dtype={"value": str})
    choices = pd.read_csv(results / "v7-choices" / "gains.csv", dtype={"value": str})
    server = choices[choices.axis.isin(["server", "batch_norm"]) & (choices.value != "group")]
    rows += [labels.assign(axis="masks"), server.assign(axis=server.axis.replace("batch_norm", "BatchNorm"))]
    rows.append(_servers_that_forget(pd.read_csv(results / "collapse" / "per_image.csv")))
    for name, labels_of in MAPPED.items():
        table = pd.read_csv(results / name / "differences.csv").rename(columns={"value": "gain"})
        table = table[table.difference.isin(labels_of)]
        about = pd.DataFrame([labels_of[label] for label in table.difference], index=table.index)
        rows.append(table.assign(axis=about[0], value=about[1], lower=about[2], higher="fm"))
    columns = ["axis", "value", "higher", "lower", "gain", "low", "high", "seeds", "inside_noise"]
    return pd.concat(rows, ignore_index=True)[columns]


def _servers_that_forget(scores: pd.DataFrame) -> pd.DataFrame:
    """Return gains by what a server does with BatchNorm's running statistics, corrected together."""
    scores = scores[(scores.arm == "federated") & (scores.norm == "batch") & (scores.learning_rate == 1e-3)]
    scores = scores[scores.split == "age"].assign(dice=scores.dice / 100)
    rows = []
    for server, value in (("all", "averaged"), ("client 0", "one client's"), ("start", "forgotten")):
        for lower in ("random", "pretraining"):
            cells = {("federated", "fm", "age"): 1, ("federated", lower, "age"): -1}
            found = statistics.contrast(scores[scores.server == server], cells)
            about = {"axis": "running statistics", "server": value, "higher": "fm", "lower": lower}
            rows.append(about | found)
    table = statistics.corrected(pd.DataFrame(rows))
    return table.rename(columns={"value": "gain", "server": "value"})


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
    _save(plots.when_it_pays(gained), results / "when-it-pays" / "figures" / "map.png")


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
        for init in ("random", "pretraining", "fm"):
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


def mapped(study: markdown.Folder) -> list[str]:
    """Return the map as a table."""
    rows = []
    for row in study["gains"].to_dict("records"):
        size = words.estimate(row["gain"], row["low"], row["high"], sign=True)
        noise = "inside the noise" if row["inside_noise"] else "higher" if row["gain"] > 0 else "lower"
        rows.append([row["axis"], row["value"], words.INITS[row["lower"]], size, str(row["seeds"]), noise])
    return markdown.table(["axis", "value", "above", "points (95 %)", "seeds", "reading"], rows)


PAGES: dict[str, dict[str, markdown.Block]] = {
    "v7-cpu": {},
    "v7-labels": {"by_round": by_round, "head_start": head_start},
    "v7-choices": {"by_round": by_round, "changes": changes},
    "centralised-128": {"epochs": epochs, "end": end},
    "guangzhou-centralised": {"epochs": epochs},
    "distillation": {"starts": starts, "mixes": mixes},
    "when-it-pays": {"mapped": mapped},
}

if __name__ == "__main__":
    main(figures="--no-figures" not in sys.argv)

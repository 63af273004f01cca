"""Why a random start can collapse: what is averaged, at which learning rate, under which normalisation.

Federated averaging trains every client on batch statistics; the running statistics of BatchNorm serve the
score alone. So one training gives the scores of three servers:

    all       the whole state is averaged (Eq. 3), as `fmfl.federate.aggregate` does it
    start     the weights alone are averaged, and the running statistics stay those of the start
    client 0  the weights alone are averaged, and the running statistics are the first client's

The last two are faults that public code had (TsingZ0/PFLlib issue 260, owkin/FLamby issue 260,
SymbioticLab/FedScale issue 57, APPFL issue 94). They live here and in an exercise, and are no setting of
`fmfl`. GroupNorm has no running statistics: there the three are one.

`python -m bench collapse run` trains what is missing, one JSON file a run, and can be stopped at any time.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
import typer
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench import experiment_tables, independent, trials
from bench.experiment_tables import Contrast, difference
from bench.independent import POOLED, Setting, State
from fmfl import models, paths
from fmfl.analysis import markdown, plots, statistics, words
from fmfl.analysis.tables import PAPER_INITS
from fmfl.states import code_digest, fingerprint, read_state, tensor_digest, write_state
from fmfl.teachers.checkpoints import sha256_of

SERVERS = ("all", "start", "client 0")
BUFFERS = ("running_mean", "running_var")
STUDENT = "tiny_unet"
COMMITTED = paths.ROOT / "docs" / "results" / "collapse"

app = typer.Typer(no_args_is_help=True, help=__doc__)


class Run(NamedTuple):
    """One training; its start was made with a learning rate of its own, the proxy rate."""

    arm: str
    init: str
    split: str
    norm: str
    learning_rate: float
    seed: int
    proxy_rate: float = 1e-3

    @property
    def start(self) -> str:
        """Name of its initial state, without the seed."""
        return self.init + f"-proxy{self.proxy_rate:g}" * (self.proxy_rate != 1e-3)

    @property
    def batch_norm(self) -> str:
        """The network's normalisation, as `models.build` takes it."""
        return "group" if self.norm == "group" else "average"

    @property
    def name(self) -> str:
        """Its file's name without suffix."""
        return f"{self.norm}-{self.split}-{self.learning_rate:g}-{self.arm}-{self.start}-seed{self.seed}"


def plan(seeds: range) -> list[Run]:
    """All runs, the most telling first."""
    arms = [("federated", init) for init in PAPER_INITS]
    arms += [("centralised", "random"), ("standalone", "random")]
    rates = (1e-3, 1e-4)
    batch = [Run(*arm, "age", "batch", rate, seed) for seed in seeds for rate in rates for arm in arms]
    group = [Run(*arm, "age", "group", rate, seed) for seed in seeds for rate in rates for arm in arms]
    iid = [Run(*arm, "iid", "batch", 1e-3, seed) for seed in seeds for arm in arms[:3]]
    slow = [Run(*arm, "age", "batch", 1e-4, seed, proxy_rate=1e-4) for seed in seeds for arm in arms[1:3]]
    return batch + iid + group + slow


def with_buffers(theta: State, other: State) -> State:
    """The weights of one state with another's running statistics."""
    return {name: other[name] if name.endswith(BUFFERS) else value for name, value in theta.items()}


def scored(setting: Setting, run: Run, start: State, rounds: int) -> Iterator[dict[str, list[State]]]:
    """Train a run, round by round from 0.

    Yields:
        For each server, the states whose scores are averaged: one a client where each stands alone.
    """
    how: dict[str, Any] = dict(
        student=STUDENT,
        seed=run.seed,
        learning_rate=run.learning_rate,
        batch_norm=run.batch_norm,
        rounds=rounds,
    )
    servers = SERVERS if run.norm == "batch" and run.arm == "federated" else SERVERS[:1]
    yield {server: [start] for server in servers}
    if run.arm == "federated":
        for theta, states in independent.federated_rounds(setting, start, **how):
            buffers = {"all": theta, "start": start, "client 0": states[0]}
            yield {server: [with_buffers(theta, buffers[server])] for server in servers}
        return
    held = dict(enumerate(setting.clients))
    if run.arm == "centralised":
        held = {POOLED: torch.cat(setting.clients).sort().values}
    alone = [independent.alone_rounds(setting, start, rows, k, **how) for k, rows in held.items()]
    for states in zip(*alone, strict=True):
        yield {"all": list(states)}


def train(setting: Setting, run: Run, start: State, rounds: int) -> dict[str, Any]:
    """Train and score one run: Dice by image, a list of rounds for each server."""
    judge = models.build(STUDENT, batch_norm=run.batch_norm)
    test = setting.parts.test
    dice: dict[str, list[list[float]]] = {}
    for states in scored(setting, run, start, rounds):
        known: dict[int, np.ndarray] = {}  # the start is the same state under every server
        for server, some in states.items():
            for state in some:
                if id(state) not in known:
                    known[id(state)] = independent.dice_by_image(judge, state, setting.cohort, test)
            mean = np.mean([known[id(state)] for state in some], axis=0)
            dice.setdefault(server, []).append([round(float(x), 5) for x in mean])
    held = [len(indices) for indices in setting.clients]
    rows = setting.cohort.table.iloc[test.tolist()]
    return {
        "clients": held,
        "images": rows.image_id.tolist(),
        "patients": rows.patient_id.tolist(),
        "dice": dice,
    }


def start_of(folder: Path, setting: Setting, run: Run) -> State:
    """The run's initial state, made once for all runs that share it; other images or code make another."""
    file = folder / f"start-{run.norm}-{run.start}-seed{run.seed}.safetensors"
    lesson = setting.cohort.fingerprint, setting.parts.proxy.tolist(), tensor_digest(setting.logits)
    code = code_digest(), sha256_of(Path(independent.__file__))
    key = fingerprint(file.name, lesson, code)
    if found := read_state(file, fingerprint=key):
        return found[0]
    state = independent.initial_state(
        run.init,
        setting,
        student=STUDENT,
        seed=run.seed,
        learning_rate=run.proxy_rate,
        batch_norm=run.batch_norm,
    )
    write_state(file, state, fingerprint=key)
    return state


@app.command("run")
def run_all(
    sources: str = "v7_covid,v7_guangzhou",
    folder: Path | None = None,
    starts: Path = Path("runs/collapse"),
    seeds: Annotated[int, typer.Option(min=1)] = 3,
    rounds: Annotated[int, typer.Option(min=1)] = 10,
    worker: trials.Worker = 0,
    workers: trials.Workers = 1,
) -> None:
    """Train the runs that have no file yet; worker i of n takes every n-th, from the i-th on."""
    torch.set_num_threads(1)
    trials.check_worker(worker, workers)
    folder = folder or COMMITTED / "runs"
    made_by, first = trials.made_by(), independent.load(sources)
    about = {"rounds": rounds, "data": first.cohort.fingerprint}
    settings: dict[tuple[str, int], Setting] = {("age", 0): first}
    for run in trials.pending(plan(range(seeds)), folder, worker, workers, **about):
        key = run.split, run.seed
        if key not in settings:
            settings = {key: independent.load(sources, scheme=run.split, seed=run.seed)}
        found = train(settings[key], run, start_of(starts, settings[key], run), rounds)
        trials.keep(folder, run, made_by | about | found)
        last = {server: round(100 * float(np.mean(dice[-1])), 2) for server, dice in found["dice"].items()}
        print(run.name, last, flush=True)


#: Columns that name a cell.
CELL = ["norm", "server", "learning_rate", "proxy_rate"]

#: Dice in % of a mask that covers each of the 265 test images whole, the mean of 2 |Y| / (|Y| + 96 x 96): a
#: network that says lung everywhere.
ALL_LUNG = 50.3

TOLD = {"all": "averaged (Eq. 3)", "start": "the start's", "client 0": "client 0's"}
PAPER = {  # Table 1 of arXiv 2311.15463, Dice in %
    ("federated", "random"): 74.67,
    ("federated", "pretraining"): 83.92,
    ("federated", "fm"): 85.38,
    ("centralised", "random"): 89.41,
    ("standalone", "random"): 67.20,
}


def read(folder: Path) -> pd.DataFrame:
    """All finished runs: one row an image, round and server, Dice in %."""
    tables = []
    finished = trials.finished(folder)
    trials.warn_of_mixed(finished)
    for found in finished:
        key = {name: found[name] for name in Run._fields if name in found}
        key = Run._field_defaults | key  # older files have no proxy rate: it was the default
        for server, by_round in found["dice"].items():
            for number, dice in enumerate(by_round):
                table = pd.DataFrame({"image_id": found["images"], "patient_id": found["patients"]})
                tables.append(table.assign(**key, server=server, round=number, dice=100 * np.array(dice)))
    return pd.concat(tables, ignore_index=True)


def by_round(scores: pd.DataFrame) -> pd.DataFrame:
    """Mean Dice over the test images, one row a run, server and round."""
    key = [*Run._fields, "server", "round"]
    return scores.groupby(key, sort=False).dice.mean().round(3).reset_index()


def distances(rounds: pd.DataFrame) -> pd.DataFrame:
    """The distance of each cell from the paper's five numbers, at every round.

    A cell is a server, a normalisation, a learning rate and a proxy rate under age skew. Centralised and
    standalone training have no server, so their numbers are those of the normalisation and the rate, and a
    random start has no proxy rate. The distance is the root mean square over the five differences of means
    over seeds, in points.
    """
    aged = rounds[rounds.split == "age"]
    rows = []
    for key, federated in aged[aged.arm == "federated"].groupby(CELL[:-1], sort=False):
        for proxy_rate in federated.proxy_rate.unique():
            cell = dict(zip(CELL, (*key, proxy_rate), strict=True))
            own = aged[(aged.norm == cell["norm"]) & (aged.learning_rate == cell["learning_rate"])]
            own = own[(own.server == cell["server"]) | (own.arm != "federated")]
            own = own[(own.proxy_rate == proxy_rate) | (own.init == "random")]
            table = own.groupby(["round", "arm", "init"]).dice.mean().unstack(["arm", "init"])
            table = table.reindex(columns=pd.MultiIndex.from_tuples(PAPER))
            away = table - pd.Series(PAPER)
            seeds = own.groupby(["arm", "init"]).seed.nunique().min()
            for number, numbers in table.iterrows():
                five = {f"{arm} {init}": value for (arm, init), value in numbers.round(2).items()}
                rms = float(np.sqrt((away.loc[number] ** 2).mean(skipna=False)))
                rows.append(cell | {"round": number, "seeds": seeds} | five | {"distance": round(rms, 2)})
    return pd.DataFrame(rows)


def distances_by_seed(rounds: pd.DataFrame) -> pd.DataFrame:
    """The nearest round's distance of each cell for each seed alone, a column a seed."""
    nearest = {
        seed: distances(own).groupby(CELL).distance.min() for seed, own in rounds.groupby("seed", sort=True)
    }
    return pd.DataFrame(nearest).reset_index()


def setting_of(
    server: str = "all",
    split: str = "age",
    learning_rate: float = 1e-3,
    norm: str = "batch",
    proxy_rate: float = 1e-3,
) -> str:
    """Name all that the runs of a setting share, and the server."""
    return f"{norm}, {server}, {split}, {learning_rate:g}" + f", proxy {proxy_rate:g}" * (proxy_rate != 1e-3)


def contrasts() -> Iterator[Contrast]:
    """The losses by a fault, by split and rate; the normalisations; and the paper's order of the arms."""
    for split, rate in (("age", 1e-3), ("age", 1e-4), ("iid", 1e-3)):
        for init in PAPER_INITS:
            one, other = (("federated", init, setting_of(server, split, rate)) for server in ("all", "start"))
            yield difference(
                f"{words.INITS[init]}, {words.SPLITS[split]}, {rate:g}: averaged less the start's", one, other
            )
    for rate in (1e-3, 1e-4):
        average = ("federated", "random", setting_of("all", "age", rate))
        yield difference(
            f"random, {rate:g}: averaged less client 0's",
            average,
            ("federated", "random", setting_of("client 0", "age", rate)),
        )
        yield difference(
            f"random, {rate:g}: GroupNorm less BatchNorm, averaged",
            ("federated", "random", setting_of("all", "age", rate, "group")),
            average,
        )
    for rate, proxy_rate in ((1e-3, 1e-3), (1e-4, 1e-3), (1e-4, 1e-4)):
        central = ("centralised", "random", setting_of("all", "age", rate))
        for server in SERVERS[:2]:
            for init in PAPER_INITS[1:]:
                proxy = ", the starts' too" * (proxy_rate != 1e-3)
                yield difference(
                    f"{words.INITS[init]}, {rate:g}{proxy}, {TOLD[server]}: less centralised",
                    ("federated", init, setting_of(server, "age", rate, proxy_rate=proxy_rate)),
                    central,
                )


def named_settings(last: pd.DataFrame) -> pd.DataFrame:
    """Scores by image of one round with the names of `setting_of` as `split`, Dice in 0..1."""
    columns = ["server", "split", "learning_rate", "norm", "proxy_rate"]
    names = [setting_of(*row) for row in last[columns].itertuples(index=False)]
    return last.assign(split=names, dice=last.dice / 100)


PANELS = {  # column of the figure: normalisation, server, title
    ("batch", "all"): "BatchNorm, all averaged",
    ("batch", "start"): "BatchNorm, running statistics\nstay the start's",
    ("batch", "client 0"): "BatchNorm, running statistics\nof client 0",
    ("group", "all"): "GroupNorm",
}


def figure(rounds: pd.DataFrame) -> Figure:
    """Mean Dice by round under age skew: a row a learning rate, a column a server; thin lines are seeds.

    Starts that were made at the slower rate are left out.
    """
    plots.use_style()
    rounds = rounds[(rounds.split == "age") & (rounds.proxy_rate == 1e-3)]
    rates = sorted(rounds.learning_rate.unique(), reverse=True)
    panels = [key for key in PANELS if len(rounds[(rounds.norm == key[0]) & (rounds.server == key[1])])]
    size = (3.1 * len(panels), 2.9 * len(rates) + 0.9)
    drawn, axes = plt.subplots(len(rates), len(panels), figsize=size, sharex=True, sharey=True, squeeze=False)
    for row, rate in enumerate(rates):
        axes[row, 0].set_ylabel(f"Dice, %\n(learning rate {rate:g})")
        for axis, (norm, server) in zip(axes[row], panels, strict=True):
            own = rounds[(rounds.norm == norm) & (rounds.learning_rate == rate)]
            _panel(axis, own[own.server.eq(server) | own.arm.ne("federated")])
    for axis, key in zip(axes[0], panels, strict=True):
        axis.set_title(PANELS[key])
    for axis in axes[-1]:
        axis.set_xlabel("round")
    lines = experiment_tables.lines_of(drawn)
    names = [
        name for name in (*map(words.INITS.get, PAPER_INITS), "centralised", "standalone") if name in lines
    ]
    drawn.legend([lines[name] for name in names], names, loc="outside upper center", ncols=5)
    return drawn


def _panel(axis: Axes, own: pd.DataFrame) -> None:
    """One line an arm and start, thick for the mean over seeds."""
    colour = plots.colours(PAPER_INITS)
    for (arm, init), runs in own.groupby(["arm", "init"], sort=False):
        federated = arm == "federated"
        look = {"color": colour[init] if federated else "0.35"}
        look["linestyle"] = {"federated": "-", "centralised": "--", "standalone": ":"}[arm]
        for _, one in runs.groupby("seed"):
            axis.plot(one["round"], one.dice, **look, linewidth=0.6, alpha=0.5)
        label = words.INITS[init] if federated else arm
        axis.plot(runs.groupby("round").dice.mean(), **look, label=label)
    axis.axhline(ALL_LUNG, color="0.7", linewidth=0.8, zorder=0)
    axis.set_ylim(0, 100)


def in_words(cell: dict[str, Any]) -> list[str]:
    """A cell's normalisation, running statistics and learning rate, as a table has them."""
    rate = f"{cell['learning_rate']:g}" + ", the starts' too" * (cell["proxy_rate"] != 1e-3)
    return [cell["norm"], TOLD[cell["server"]] if cell["norm"] == "batch" else "none", rate]


def final(last: pd.DataFrame) -> list[str]:
    """Markdown of the last round: Dice by cell and start, with intervals over seeds and patients together."""
    rows = []
    federated = last[last.arm == "federated"]
    for key, some in federated.groupby([*CELL, "split"], sort=False):
        cells = []
        for init in PAPER_INITS:
            own = some[some.init == init].pivot_table(
                index=["image_id", "patient_id"], columns="seed", values="dice"
            )
            if own.empty:  # a random start has no proxy rate; others may be still to be run
                cells.append("")
                continue
            mean = statistics.two_way(own.to_numpy(), own.index.get_level_values("patient_id"))
            number = f", {own.shape[1]} seeds" if own.shape[1] < 3 else ""
            low, high = np.clip(mean.interval(), 0, 100)  # what Dice can be
            cells.append(words.estimate(mean.value, low, high) + number)
        rows.append([*in_words(dict(zip(CELL, key[:-1], strict=True))), key[-1], *cells])
    columns = ["normalisation", "running statistics", "learning rate", "split"]
    return markdown.table([*columns, *map(words.INITS.get, PAPER_INITS)], rows)


def nearest(rounds: pd.DataFrame) -> list[str]:
    """Markdown of each cell's round that comes nearest to the paper's five numbers.

    Beside it: the range of the seeds' own nearest distances, and the distance after the last round, which is
    no choice.
    """
    five = [f"{arm} {init}" for arm, init in PAPER]
    rows = [["the paper", "", "", "", *(f"{value:.2f}" for value in PAPER.values()), "", "", ""]]
    found = distances(rounds)
    alone = distances_by_seed(rounds).set_index(CELL)
    last = found[found["round"] == found["round"].max()].set_index(CELL).distance
    best = found.dropna().sort_values("distance").groupby(CELL).head(1)
    for row in best.to_dict("records"):
        place = tuple(row[name] for name in CELL)
        numbers = [f"{row[name]:.2f}" for name in five]
        seeds = f"{alone.loc[place].min():.1f} to {alone.loc[place].max():.1f}"
        rows.append(
            [*in_words(row), row["round"], *numbers, f"{row['distance']:.1f}", seeds, f"{last[place]:.1f}"]
        )
    columns = ["normalisation", "running statistics", "learning rate", "round"]
    return markdown.table(
        [*columns, *five, "distance, points", "each seed's", f"after {rounds['round'].max()}"], rows
    )


@app.command()
def tables(folder: Path | None = None, out: Path | None = None) -> None:
    """Write the tables, the figure and the page's tables of the finished runs."""
    out = out or COMMITTED
    scores = read(folder or out / "runs")
    rounds = by_round(scores)
    out.mkdir(parents=True, exist_ok=True)
    rounds.to_csv(out / "by_round.csv", index=False)
    distances(rounds).to_csv(out / "distances.csv", index=False)
    figure(rounds).savefig(out / "collapse.png", dpi=130)
    last = scores[scores["round"] == scores["round"].max()]
    last.drop(columns="round").assign(dice=last.dice.round(2)).to_csv(out / "per_image.csv", index=False)
    compared = experiment_tables.differences(named_settings(last), contrasts())
    compared.round(5).to_csv(out / "differences.csv", index=False)
    page(out)


@app.command()
def page(out: Path | None = None) -> None:
    """Write the page's tables again from the committed ones."""
    out = out or COMMITTED
    if (out / "README.md").exists():
        blocks = {
            "final": lambda study: final(study["per_image"]),
            "nearest": lambda study: nearest(study["by_round"]),
            "differences": lambda study: experiment_tables.differences_block(study["differences"]),
        }
        markdown.write_into(out / "README.md", out, blocks)


if __name__ == "__main__":
    app()

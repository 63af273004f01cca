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

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
import typer
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from safetensors.torch import load_file, save_file

from bench import independent
from bench.independent import POOLED, Setting, State
from fmfl import models
from fmfl.analysis import markdown, plots, statistics, words

SERVERS = ("all", "start", "client 0")
BUFFERS = ("running_mean", "running_var")
STUDENT = "tiny_unet"
COMMITTED = Path("docs/results/collapse")

app = typer.Typer(no_args_is_help=True, help=__doc__)


class Run(NamedTuple):
    """One training."""

    arm: str
    init: str
    split: str
    norm: str
    learning_rate: float
    seed: int

    @property
    def name(self) -> str:
        """Its file's name without suffix."""
        return f"{self.norm}-{self.split}-{self.learning_rate:g}-{self.arm}-{self.init}-seed{self.seed}"


def plan(seeds: range) -> list[Run]:
    """All runs, the most telling first."""
    arms = [("federated", init) for init in ("random", "pretraining", "fm")]
    arms += [("centralised", "random"), ("standalone", "random")]
    rates = (1e-3, 1e-4)
    batch = [Run(*arm, "age", "batch", rate, seed) for seed in seeds for rate in rates for arm in arms]
    group = [Run(*arm, "age", "group", rate, seed) for seed in seeds for rate in rates for arm in arms]
    iid = [Run(*arm, "iid", "batch", 1e-3, seed) for seed in seeds for arm in arms[:3]]
    return batch + iid + group


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
        batch_norm="group" if run.norm == "group" else "average",
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
    judge = models.build(STUDENT, batch_norm="group" if run.norm == "group" else "average")
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
    return run._asdict() | {
        "rounds": rounds,
        "clients": held,
        "images": rows.image_id.tolist(),
        "patients": rows.patient_id.tolist(),
        "dice": dice,
    }


def start_of(folder: Path, setting: Setting, run: Run) -> State:
    """The run's initial state, made once for all runs that share it."""
    file = folder / f"start-{run.norm}-{run.init}-seed{run.seed}.safetensors"
    if not file.exists():
        norm = "group" if run.norm == "group" else "average"
        state = independent.initial_state(run.init, setting, student=STUDENT, seed=run.seed, batch_norm=norm)
        unfinished = file.with_name(f".{file.name}.{os.getpid()}")
        save_file({name: value.contiguous() for name, value in state.items()}, unfinished)
        os.replace(unfinished, file)
    return load_file(file)


@app.callback()
def _named() -> None:
    """Let a single command have a name."""


@app.command("run")
def run_all(
    sources: str = "v7_covid,v7_guangzhou",
    folder: Path = COMMITTED / "runs",
    starts: Path = Path("runs/collapse"),
    seeds: int = 3,
    rounds: int = 10,
    worker: int = 0,
    workers: int = 1,
) -> None:
    """Train the runs that have no file yet; worker i of n takes every n-th, from the i-th on."""
    torch.set_num_threads(1)
    for needed in (folder, starts):
        needed.mkdir(parents=True, exist_ok=True)
    settings: dict[tuple[str, int], Setting] = {}
    for run in plan(range(seeds))[worker::workers]:
        file = folder / f"{run.name}.json"
        if file.exists():
            continue
        key = run.split, run.seed
        if key not in settings:
            settings = {key: independent.load(sources, scheme=run.split, seed=run.seed)}
        found = train(settings[key], run, start_of(starts, settings[key], run), rounds)
        unfinished = file.with_name(f".{file.name}.{os.getpid()}")
        unfinished.write_text(json.dumps(found))
        os.replace(unfinished, file)
        last = {server: round(100 * np.mean(scores[-1]), 2) for server, scores in found["dice"].items()}
        print(run.name, last, flush=True)


INITS = ("random", "pretraining", "fm")
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
    for file in sorted(folder.glob("*.json")):
        found = json.loads(file.read_text())
        key = {name: found[name] for name in Run._fields}
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

    A cell is a server, a normalisation and a learning rate under age skew. Centralised and standalone
    training have no server, so their numbers are those of the normalisation and the rate. The distance is the
    root mean square over the five differences of means over seeds, in points.
    """
    aged = rounds[rounds.split == "age"]
    rows = []
    for (norm, rate), some in aged.groupby(["norm", "learning_rate"], sort=False):
        federated = some[some.arm == "federated"]
        for server in federated.server.unique():
            own = pd.concat([federated[federated.server == server], some[some.arm != "federated"]])
            table = own.groupby(["round", "arm", "init"]).dice.mean().unstack(["arm", "init"])
            table = table.reindex(columns=pd.MultiIndex.from_tuples(PAPER))
            away = table - pd.Series(PAPER)
            cell = {"norm": norm, "server": server, "learning_rate": rate}
            seeds = federated.groupby("init").seed.nunique().min()
            for number, numbers in table.iterrows():
                five = {f"{arm} {init}": value for (arm, init), value in numbers.round(2).items()}
                rms = float(np.sqrt((away.loc[number] ** 2).mean(skipna=False)))
                rows.append(cell | {"round": number, "seeds": seeds} | five | {"distance": round(rms, 2)})
    return pd.DataFrame(rows)


PANELS = {  # column of the figure: normalisation, server, title
    ("batch", "all"): "BatchNorm, all averaged",
    ("batch", "start"): "BatchNorm, running statistics\nstay the start's",
    ("batch", "client 0"): "BatchNorm, running statistics\nof client 0",
    ("group", "all"): "GroupNorm",
}


def figure(rounds: pd.DataFrame) -> Figure:
    """Mean Dice by round under age skew: a row a learning rate, a column a server; thin lines are seeds."""
    plots.use_style()
    rounds = rounds[rounds.split == "age"]
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
    lines = dict(zip(*axes[0, 0].get_legend_handles_labels()[::-1], strict=True))
    names = [*map(words.INITS.get, INITS), "centralised", "standalone"]
    drawn.legend([lines[name] for name in names], names, loc="outside upper center", ncols=5)
    return drawn


def _panel(axis: Axes, own: pd.DataFrame) -> None:
    """One line an arm and start, thick for the mean over seeds."""
    colour = plots.colours(INITS)
    for (arm, init), runs in own.groupby(["arm", "init"], sort=False):
        federated = arm == "federated"
        look = {"color": colour[init] if federated else "0.35"}
        look["linestyle"] = {"federated": "-", "centralised": "--", "standalone": ":"}[arm]
        for _, one in runs.groupby("seed"):
            axis.plot(one["round"], one.dice, **look, linewidth=0.6, alpha=0.5)
        label = words.INITS[init] if federated else arm
        axis.plot(runs.groupby("round").dice.mean(), **look, label=label)
    axis.set_ylim(0, 100)


def final(last: pd.DataFrame) -> list[str]:
    """Markdown of the last round: Dice by cell and start, with intervals over seeds and patients together."""
    columns = ["normalisation", "running statistics", "split", "learning rate", *map(words.INITS.get, INITS)]
    rows = []
    federated = last[last.arm == "federated"]
    for key, some in federated.groupby(["norm", "server", "split", "learning_rate"], sort=False):
        if set(some.init) < set(INITS):  # still to be run
            continue
        cells = []
        for init in INITS:
            own = some[some.init == init].pivot_table(
                index=["image_id", "patient_id"], columns="seed", values="dice"
            )
            mean = statistics.two_way(own.to_numpy(), own.index.get_level_values("patient_id"))
            number = f", {own.shape[1]} seeds" if own.shape[1] < 3 else ""
            low, high = np.clip(mean.interval(), 0, 100)  # what Dice can be
            cells.append(words.estimate(mean.value, low, high) + number)
        norm, server, split, rate = key
        rows.append([norm, TOLD[server] if norm == "batch" else "none", split, f"{rate:g}", *cells])
    return markdown.table(columns, rows)


def nearest(found: pd.DataFrame) -> list[str]:
    """Markdown of each cell's round that comes nearest to the paper's five numbers."""
    five = [f"{arm} {init}" for arm, init in PAPER]
    rows = [["the paper", "", "", "", *(f"{value:.2f}" for value in PAPER.values()), ""]]
    best = found.dropna().sort_values("distance").groupby(["norm", "server", "learning_rate"]).head(1)
    for row in best.sort_values("distance").to_dict("records"):
        server = TOLD[row["server"]] if row["norm"] == "batch" else "none"
        start = [row["norm"], server, f"{row['learning_rate']:g}", row["round"]]
        rows.append([*start, *(f"{row[name]:.2f}" for name in five), f"{row['distance']:.1f}"])
    columns = ["normalisation", "running statistics", "learning rate", "round"]
    return markdown.table([*columns, *five, "distance, points"], rows)


@app.command()
def tables(folder: Path = COMMITTED / "runs", out: Path = COMMITTED) -> None:
    """Write the tables, the figure and the page's tables of the finished runs."""
    scores = read(folder)
    rounds = by_round(scores)
    out.mkdir(parents=True, exist_ok=True)
    rounds.to_csv(out / "by_round.csv", index=False)
    distances(rounds).to_csv(out / "distances.csv", index=False)
    figure(rounds).savefig(out / "collapse.png", dpi=130)
    last = scores[scores["round"] == scores["round"].max()].drop(columns="round")
    last.assign(dice=last.dice.round(2)).to_csv(out / "per_image.csv", index=False)
    page(out)


@app.command()
def page(out: Path = COMMITTED) -> None:
    """Write the page's tables again from the committed ones."""
    if (out / "README.md").exists():
        blocks = {
            "final": lambda study: final(study["per_image"]),
            "nearest": lambda study: nearest(study["distances"]),
        }
        markdown.write_into(out / "README.md", out, blocks)


if __name__ == "__main__":
    app()

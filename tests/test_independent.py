"""A second loop ends in the study's bytes; the experiment on it tells its three servers apart."""

import json
import shutil

import numpy as np
import pandas as pd
import pytest
import torch

from bench import collapse, independent, measure
from fmfl import distill, federate, models, parallel, paths, runs, train
from fmfl.config import DistillConfig, FederateConfig
from fmfl.distill import InitialState
from fmfl.split import Holdout
from fmfl.train import FitResult


@pytest.fixture(scope="module")
def setting() -> independent.Setting:
    cohort = measure.a_cohort(24, 32)
    parts = Holdout(torch.arange(6), torch.arange(6, 10), torch.arange(10, 24))
    clients = [torch.arange(10, 14), torch.arange(14, 24)]  # unequal, so that the weights matter
    logits = 4.0 * cohort.masks[parts.proxy] - 2
    return independent.Setting(cohort, parts, clients, logits)


@pytest.fixture(autouse=True)
def one_thread():
    with parallel.one_thread(torch.device("cpu")):
        yield


@pytest.mark.parametrize("init", ["random", "pretraining", "fm"])
def test_a_plain_loop_makes_the_same_start_to_the_bit(setting, init):
    proxy = train.Examples(setting.cohort.images, setting.cohort.masks, setting.parts.proxy, setting.logits)
    cfg = DistillConfig(student="tiny_unet", proxy_epochs=2, alpha=0.6)
    theirs = distill.initial_state(init, proxy, cfg, batch_size=independent.BATCH_SIZE, seed=3).state
    ours = independent.initial_state(init, setting, seed=3, epochs=2)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_a_plain_loop_of_rounds_ends_in_the_same_bytes_and_scores(setting, tmp_path):
    start = models.copy_state(models.build("tiny_unet"))
    server = runs.start_or_resume(
        tmp_path,
        InitialState("random", start, FitResult()),
        runs.clients_of(setting.cohort, setting.clients),
        FederateConfig(num_rounds=2),
        student="tiny_unet",
        cohort=setting.cohort,
        test=setting.parts.test,
    )
    for _ in server.remaining_rounds():
        updates = runs.train_clients(server, server.participants())
        server.finish_round(federate.aggregate(updates), setting.cohort, setting.parts.test)
    *_, (theta, _) = independent.federated_rounds(setting, start, rounds=2)
    assert all(torch.equal(theta[key], value) for key, value in server.theta.items())
    dice = independent.dice_by_image(models.build("tiny_unet"), theta, setting.cohort, setting.parts.test)
    assert dice.mean() == pytest.approx(server.history[-1]["dice"], abs=1e-6)


def test_the_three_servers_share_their_weights_and_differ_in_running_statistics_alone(setting):
    start = models.copy_state(models.build("tiny_unet"))
    run = collapse.Run("federated", "random", "age", "batch", 1e-3, 0)
    before, after = collapse.scored(setting, run, start, rounds=1)
    assert all(before[server][0] is start for server in collapse.SERVERS)
    states = {server: some[0] for server, some in after.items()}
    for name, value in states["all"].items():
        same = torch.equal(value, states["start"][name]), torch.equal(value, states["client 0"][name])
        assert same == ((False, False) if name.endswith(collapse.BUFFERS) else (True, True)), name
        if name.endswith(collapse.BUFFERS):
            assert torch.equal(states["start"][name], start[name])


def test_the_distance_of_a_cell_that_misses_each_number_by_three_points_is_three():
    rows = [
        {"arm": arm, "init": init, "split": "age", "norm": "batch", "learning_rate": 1e-3, "seed": seed}
        | {"proxy_rate": 1e-3}
        | {"server": "all", "round": 1, "dice": dice + sign * 3 + (seed - 0.5)}
        for seed in (0, 1)
        for sign, ((arm, init), dice) in zip((1, -1, 1, 1, -1), collapse.PAPER.items(), strict=True)
    ]
    (found,) = collapse.distances(pd.DataFrame(rows)).to_dict("records")
    assert found["distance"] == pytest.approx(3) and found["seeds"] == 2
    assert found["federated random"] == pytest.approx(77.67)


def test_the_experiment_is_run_read_and_drawn(setting, tmp_path, monkeypatch):
    """A run that has its file is not trained again."""
    loads = []
    monkeypatch.setattr(independent, "load", lambda *_, **how: loads.append(how) or setting)
    runs = [run for run in collapse.plan(range(1)) if run.split == "age" and run.norm == "batch"]
    monkeypatch.setattr(collapse, "plan", lambda seeds: runs)
    folder = tmp_path / "collapse"
    for _ in range(2):
        collapse.run_all("none", folder, tmp_path / "starts", rounds=1)
    assert len(loads) == 2 and len(list(folder.glob("*.json"))) == len(runs) == 12
    collapse.tables(folder, tmp_path / "out")
    rounds = pd.read_csv(tmp_path / "out" / "by_round.csv")
    assert len(rounds) == 2 * (8 * 3 + 4)
    found = json.loads((folder / f"{runs[0].name}.json").read_text())
    row = rounds[(rounds.init == "random") & (rounds.arm == "federated") & (rounds["round"] == 1)]
    row = row[(row.server == "start") & (row.learning_rate == 1e-3)]
    assert row.dice.item() == pytest.approx(100 * np.mean(found["dice"]["start"][1]), abs=1e-3)
    assert (tmp_path / "out" / "collapse.png").stat().st_size > 10_000


def test_the_committed_page_is_what_the_command_writes(tmp_path, emptied):
    committed = paths.ROOT / "docs" / "results" / "collapse"
    for name in ("per_image.csv", "by_round.csv", "differences.csv"):
        shutil.copy(committed / name, tmp_path / name)
    page = (committed / "README.md").read_text()
    (tmp_path / "README.md").write_text(emptied(page))
    collapse.page(tmp_path)
    assert (tmp_path / "README.md").read_text() == (committed / "README.md").read_text()


@pytest.mark.slow
def test_the_committed_tables_are_those_of_the_committed_runs(tmp_path):
    collapse.tables(collapse.COMMITTED / "runs", tmp_path)
    for file in collapse.COMMITTED.glob("*.csv"):
        again, committed = pd.read_csv(tmp_path / file.name), pd.read_csv(file)
        pd.testing.assert_frame_equal(again, committed, rtol=1e-6, atol=1e-5)


def test_the_committed_distances_follow_from_the_committed_rounds():
    """By hand: the nearest cell's root mean square over the paper's five numbers."""
    committed = paths.ROOT / "docs" / "results" / "collapse"
    rounds, found = (pd.read_csv(committed / f"{name}.csv") for name in ("by_round", "distances"))
    best = found.dropna().sort_values("distance").iloc[0]
    cell = rounds[
        (rounds.split == "age")
        & (rounds.norm == best.norm)
        & (rounds.learning_rate == best.learning_rate)
        & (rounds["round"] == best["round"])
        & ((rounds.server == best.server) | (rounds.arm != "federated"))
        & ((rounds.proxy_rate == best.proxy_rate) | (rounds.init == "random"))
    ]
    away = [
        cell[(cell.arm == arm) & (cell.init == init)].dice.mean() - paper
        for (arm, init), paper in {
            ("federated", "random"): 74.67,
            ("federated", "pretraining"): 83.92,
            ("federated", "fm"): 85.38,
            ("centralised", "random"): 89.41,
            ("standalone", "random"): 67.20,
        }.items()
    ]
    assert best.distance == pytest.approx((sum(x * x for x in away) / 5) ** 0.5, abs=0.01)

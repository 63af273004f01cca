"""The ground at a start: lines, barriers and sharpness where they are known."""

from dataclasses import replace

import pandas as pd
import pytest
import torch
from torch import nn

from fmfl import config, federate, runs, train
from fmfl.analysis import landscape
from fmfl.states import state_digest
from fmfl.study import stages


def squares(logits, masks, _):
    """A loss whose Hessian is known: half the squares, summed."""
    return (logits - masks).square().sum() / 2


def test_the_state_half_way_is_the_mean_and_counts_stay():
    one = {"w": torch.tensor([0.0, 2.0]), "n": torch.tensor(3)}
    other = {"w": torch.tensor([1.0, 4.0]), "n": torch.tensor(5)}
    middle = landscape.interpolate(one, other, 0.5)
    assert middle["w"].tolist() == [0.5, 3.0] and middle["n"] == 3
    assert torch.equal(landscape.interpolate(one, other, 1.0)["w"], other["w"])


@pytest.mark.parametrize(
    ("along", "height"),
    [([1, 2, 3], 0), ([1, 5, 3], 3), ([0, 1, 4, 0], 4), ([2, 0, 2], 0), ([4, 3.5, 1], 1)],
)
def test_a_barrier_is_the_rise_above_the_line_between_the_ends(along, height):
    assert landscape.barrier(along) == pytest.approx(height)


def test_losses_between_two_models_begin_and_end_at_theirs():
    torch.manual_seed(0)
    model, images = nn.Conv2d(1, 1, 1), torch.rand(2, 1, 4, 4)
    masks = (images > 0.5).float()
    one = {"weight": torch.full((1, 1, 1, 1), 9.0), "bias": torch.tensor([-4.5])}
    other = {"weight": torch.full((1, 1, 1, 1), -9.0), "bias": torch.tensor([4.5])}
    along = landscape.losses_between(model, one, other, images, masks, points=3)
    # Half way every weight is zero and every pixel 1/2: 1 - (2 s/2 + 1) / (n/2 + s + 1) for s pixels of n.
    pixels = masks.flatten(1).sum(1)
    expected = (1 - (pixels + 1) / (8 + pixels + 1)).mean()
    assert along[1] == pytest.approx(float(expected), abs=1e-6)
    assert along[0] < 0.2 and along[2] > along[0]


def test_sharpness_is_the_largest_eigenvalue_of_the_hessian():
    """Of a linear model under squares the Hessian is sum x x^T, whose eigenvalues NumPy's solver knows."""
    torch.manual_seed(0)
    model = nn.Linear(6, 1).double()
    x, y = torch.randn(40, 6).double() * torch.arange(1, 7), torch.randn(40, 1).double()
    with_one = torch.cat([x, torch.ones(40, 1)], 1)
    largest = float(torch.linalg.eigvalsh(with_one.T @ with_one)[-1])
    before = state_digest(model.state_dict())
    found = landscape.sharpness(model, x, y, loss=squares, steps=200, tolerance=1e-10)
    assert found == pytest.approx(largest, rel=1e-4)
    assert state_digest(model.state_dict()) == before


def test_the_ground_is_looked_at_without_changing_a_run(tmp_path):
    tiny = {"run_name": tmp_path, "size": 32, "num_phantoms": 40, "student": "tiny_unet", "proxy_epochs": 1}
    cfg = config.settings(tiny | {"inits": "random,pretraining", "num_rounds": 1})
    cohort, (results, begun) = stages.load_cohort(cfg), a_round(cfg)
    files = {file: file.read_bytes() for file in tmp_path.rglob("*.*")}
    servers, why_not = stages.first_runs(cfg, cohort, results)
    before = [(state_digest(server.theta), server.round_number) for server in servers]
    assert why_not == "" and before == [(digest, 0) for digest in begun]
    found = landscape.of_starts(servers, cohort, images=4)
    assert found.init.tolist() == ["random", "pretraining"]
    assert (found.barrier >= 0).all() and found.sharpness.notna().all()
    assert [(state_digest(server.theta), server.round_number) for server in servers] == before
    alone = landscape.of_starts(servers, cohort, images=4, clients=1)
    assert alone.barrier.isna().all() and alone.sharpness.equals(found.sharpness)
    assert {file: file.read_bytes() for file in tmp_path.rglob("*.*")} == files, "it only reads"


@pytest.mark.parametrize("gone", ["start", "run", "another start", "other results"])
def test_where_starts_are_missing_or_stale_diagnostics_are_left_out_and_nothing_is_trained(
    tmp_path, monkeypatch, gone
):
    tiny = {"run_name": tmp_path, "size": 32, "num_phantoms": 40, "student": "tiny_unet", "proxy_epochs": 1}
    cfg = config.settings(tiny | {"inits": "random,pretraining", "num_rounds": 1})
    cohort, (results, _) = stages.load_cohort(cfg), a_round(cfg)
    start = tmp_path / "weights" / "init-pretraining-seed0.safetensors"
    if gone == "start":
        start.unlink()
    elif gone == "run":
        (tmp_path / "weights" / "federated-age-pretraining-seed0.safetensors").unlink()
    elif gone == "another start":
        start.write_bytes((tmp_path / "weights" / "init-random-seed0.safetensors").read_bytes())
    else:
        results.dice += 0.01
    files = {file: file.read_bytes() for file in tmp_path.rglob("*.*")}
    monkeypatch.setattr(train, "fit", None)
    servers, why_not = stages.first_runs(cfg, cohort, results)
    assert servers == [] and len(landscape.of_starts(servers, cohort)) == 0
    wanted = "random" if gone == "other results" else "pretraining"
    assert (
        f"weights/init-{wanted}-seed0.safetensors" in why_not and "run 03_distill and 04_federate" in why_not
    )
    assert {file: file.read_bytes() for file in tmp_path.rglob("*.*")} == files


def a_round(cfg: config.Settings) -> tuple[pd.DataFrame, list[str]]:
    """The results of one round from each start, as 04_federate leaves them, and the starts' digests."""
    cohort = stages.load_cohort(cfg)
    parts = stages.holdout(cfg, cohort)
    clients = stages.partition(cohort, parts.federated, cfg.federate)
    starts = stages.initial_states(cfg, cohort, parts.proxy, ["random", "pretraining"])
    cfg = replace(cfg, federate=replace(cfg.federate, arms="federated"))
    servers = stages.start_runs(cfg, cohort, parts, clients, starts)
    for server in servers:
        state = federate.aggregate(runs.train_clients(server, server.participants()))
        server.finish_round(state, cohort, parts.test)
    return runs.results(servers), [state_digest(start.state) for start in starts.values()]

"""Points for TensorBoard: what it reads is what was measured, each once, and no number depends on them."""

import subprocess
import sys

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from typer.testing import CliRunner

from fmfl import config, federate, parallel, runs, states
from fmfl.errors import UserError
from fmfl.study import cli, outputs, stages, tracking

TINY = {"size": 32, "num_phantoms": 40, "num_rounds": 3, "proxy_epochs": 2, "student": "tiny_unet"}
TINY |= {"inits": "random,fm", "arms": "federated,standalone", "split": "iid", "num_clients": 2}


def federation(folder, rounds=3, **given):
    """The runs of a small federation after some rounds, continued where they stopped."""
    cfg = config.settings(TINY | {"run_name": str(folder)} | given)
    cohort = stages.load_cohort(cfg)
    parts = stages.holdout(cfg, cohort)
    clients = stages.partition(cohort, parts.federated, cfg.federate)
    starts = stages.initial_states(cfg, cohort, parts.proxy, ["random", "fm"])
    begun = stages.start_runs(cfg, cohort, parts, clients, starts)
    with parallel.one_thread(cohort.device):
        for run in begun:
            for number in run.remaining_rounds():
                if number > rounds:
                    break
                run.finish_round(federate.aggregate(runs.train_clients(run)), cohort, parts.test)
    return begun


def points(folder, name, curve):
    """Step and value of each point of a curve, as TensorBoard reads them."""
    read = EventAccumulator(str(folder / "tensorboard" / name)).Reload()
    return [(event.step, event.value) for event in read.Scalars(curve)]


@pytest.fixture(scope="module")
def tracked(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tracked")
    return folder, federation(folder, track="tensorboard")


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    return folder, federation(folder)


def test_each_run_has_the_points_of_its_history(tracked):
    folder, finished = tracked
    assert len(finished) == 4
    for run in finished:
        for curve in ("dice", "iou", "hd95", "seconds", "images_seen", "bytes_up"):
            expected = [(row["round"], pytest.approx(row[curve])) for row in run.history]
            assert points(folder, run.file.stem, curve) == expected
        assert [row["round"] for row in run.history] == [0, 1, 2, 3]


def test_a_start_has_its_loss_by_epoch(tracked):
    folder, _ = tracked
    record = states.read_record(folder / "weights" / "init-fm-seed0.safetensors")
    expected = [(epoch, pytest.approx(loss)) for epoch, loss in enumerate(record["fit"]["losses"], 1)]
    assert len(expected) == 2
    assert points(folder, "init-fm-seed0", "loss") == expected
    assert not (folder / "tensorboard" / "init-random-seed0").exists()


def test_no_byte_of_a_result_depends_on_tracking(tracked, plain):
    """Weights and scores are equal to the last bit, and each run would go on from the other's checkpoint."""
    for one, other in zip(tracked[1], plain[1], strict=True):
        assert one.fingerprint == other.fingerprint
        assert [done["sha256"] for done in one.rounds] == [done["sha256"] for done in other.rounds]
        rows = [[{k: v for k, v in row.items() if k != "seconds"} for row in r.history] for r in (one, other)]
        assert rows[0] == rows[1]
        assert all(torch.equal(one.theta[name], other.theta[name]) for name in one.theta)
    assert not (plain[0] / "tensorboard").exists()


@pytest.mark.parametrize("before", ["tensorboard", "none"])
def test_a_run_that_goes_on_has_each_round_once(tmp_path, tracked, before):
    federation(tmp_path, rounds=1, track=before)
    for run in federation(tmp_path, track="tensorboard"):
        assert [step for step, _ in points(tmp_path, run.file.stem, "dice")] == [0, 1, 2, 3]
        assert points(tmp_path, run.file.stem, "dice") == points(tracked[0], run.file.stem, "dice")


def test_points_are_there_while_the_run_goes_on(tmp_path):
    run, *_ = federation(tmp_path, rounds=1, track="tensorboard", arms="federated", inits="random")
    assert run.round_number == 1
    assert [step for step, _ in points(tmp_path, run.file.stem, "dice")] == [0, 1]


def test_a_missing_package_is_one_sentence_before_anything_is_read(monkeypatch, tmp_path):
    monkeypatch.setattr(tracking, "find_spec", lambda name: None)
    cfg = config.settings({"track": "tensorboard", "data": str(tmp_path / "nothing")})
    with pytest.raises(UserError, match=r"^track is tensorboard, but that package is not installed: pip"):
        stages.load_cohort(cfg)
    result = CliRunner().invoke(cli.app, ["study", "-p", "track=tensorboard", "--out", str(tmp_path / "out")])
    assert isinstance(result.exception, UserError) and "set track to none" in str(result.exception)
    assert not (tmp_path / "out").exists()
    tracking.check(config.settings())


def test_cells_of_a_study_may_differ_in_it():
    assert "track" in outputs.FREE and "track" not in outputs.depends_on("04_federate")
    assert config.PARAMETERS["track"].default == "none"


def test_the_package_is_not_loaded_unless_it_is_asked_for():
    code = "import sys; from fmfl.study import stages; print('tensorboard' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "False"

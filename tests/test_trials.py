"""Plans and files of trainings: what is pending, what is kept, and what does not belong together."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from bench import collapse, experiments, lessons, trials
from bench.experiments import Trial
from fmfl import data, paths, split, states, teacher
from fmfl.errors import UserError
from fmfl.split import Holdout
from fmfl.study import provenance

PLAN = [Trial("age", "federated", "random", seed) for seed in range(5)]


def test_workers_share_a_plan_and_leave_out_what_has_a_file(tmp_path):
    trials.keep(tmp_path, PLAN[2], {"dice": []})
    found = [list(trials.pending(PLAN, tmp_path, worker, 2)) for worker in (0, 1)]
    assert found == [[PLAN[0], PLAN[4]], [PLAN[1], PLAN[3]]]


def test_a_worker_that_does_not_exist_is_refused(tmp_path):
    with pytest.raises(UserError, match="--worker 2: the 2 workers are counted from 0 to 1"):
        next(trials.pending(PLAN, tmp_path, 2, 2))


def test_a_file_of_another_training_is_not_taken_for_this_one(tmp_path):
    """Rounds are no part of a file's name, and data are none of a trial."""
    trials.keep(tmp_path, PLAN[4]._replace(rounds=3), {"data": "these"})
    with pytest.raises(UserError, match=r"seed4\.json was trained with rounds 3, not 10"):
        next(trials.pending(PLAN, tmp_path, 0, 1))
    trials.keep(tmp_path, PLAN[4], {"data": "these"})
    with pytest.raises(UserError, match=r"seed4\.json was trained with data these, not others"):
        next(trials.pending(PLAN, tmp_path, 0, 1, data="others"))
    assert list(trials.pending(PLAN, tmp_path, 0, 1, data="these")) == PLAN[:4]


def test_trainings_that_do_not_belong_together_make_no_table(tmp_path):
    with pytest.raises(UserError, match="holds no finished training"):
        trials.finished(tmp_path)
    trials.keep(tmp_path, PLAN[0], {"data": "these"})
    trials.keep(tmp_path, PLAN[1], {"data": "others"})
    with pytest.raises(UserError, match="with data others and these"):
        trials.finished(tmp_path)
    trials.keep(tmp_path, PLAN[1]._replace(rounds=3), {"data": "these"})
    with pytest.raises(UserError, match="with rounds 10 and 3"):
        trials.finished(tmp_path)


def test_a_damaged_file_is_named(tmp_path):
    trials.keep(tmp_path, PLAN[0], {})
    file = tmp_path / f"{PLAN[0].name}.json"
    file.write_text(file.read_text()[:20])
    for read in (lambda: trials.finished(tmp_path), lambda: next(trials.pending(PLAN, tmp_path, 0, 1))):
        with pytest.raises(UserError, match=r"seed0\.json is damaged"):
            read()


def test_a_seed_of_two_processors_is_named():
    found = [(0, "one"), (0, "one"), (1, "one"), (1, "other"), (2, None), (3, None), (3, "one")]
    found = [{"seed": seed, "processor": processor} for seed, processor in found]
    assert trials.mixed_processors(found) == [
        "seed 1 has trials of one, other",
        "seed 3 has trials of a processor that was not recorded, one",
    ]


@pytest.mark.parametrize("name", [*experiments.PLANS, "collapse"])
def test_each_seed_of_the_committed_trainings_is_of_one_processor(name):
    assert trials.mixed_processors(trials.finished(experiments.RESULTS / name / "runs")) == []


def test_an_experiment_is_run_once_and_its_files_name_their_origin(tmp_path, monkeypatch):
    cohort = data.load("phantom", size=32, num_phantoms=40, progress=False)
    parts = split.holdout(cohort.table, 0, federated=12)
    asked = []
    deal = (lambda _: asked.append(1) or parts), experiments.DEALS["age"][1]
    monkeypatch.setattr(data, "load", lambda *_, **__: cohort)
    monkeypatch.setitem(experiments.PLANS, "skew", lambda: [PLAN[0]._replace(rounds=1)])
    monkeypatch.setattr(experiments, "DEALS", experiments.DEALS | {"age": deal})
    for _ in range(2):
        experiments.run_all("skew", "made", tmp_path / "runs", tmp_path / "starts")
    (found,) = trials.finished(tmp_path / "runs")
    assert len(asked) == 1 and found["data"] == cohort.fingerprint and found["rounds"] == 1
    assert found["processor"] == provenance.processor() and found["code"] == states.code_digest()
    assert found["commit"] == provenance.commit(*provenance.CODE, "bench")


def test_a_teacher_with_other_answers_has_another_lesson(tmp_path, monkeypatch):
    """The built-in teacher's weights are halved: another key, so no start of the other lesson is read."""
    cohort = data.load("phantom", size=32, num_phantoms=12, progress=False)
    before = lessons.exact(cohort, torch.arange(4))
    shipped, load = teacher.default_file("builtin"), teacher.load
    with safe_open(shipped, "pt") as opened:
        metadata = opened.metadata()
    halved = {name: value / 2 for name, value in load_file(shipped).items()}
    save_file(halved, tmp_path / "halved.safetensors", metadata)
    monkeypatch.setattr(teacher, "load", lambda name: load(name, tmp_path / "halved.safetensors"))
    after = lessons.exact(cohort, torch.arange(4))
    assert not torch.equal(before.examples.teacher_logits, after.examples.teacher_logits)
    assert before.key != after.key


def test_collapse_begins_from_no_start_of_other_images(tmp_path):
    run = collapse.Run("federated", "pretraining", "age", "batch", 1e-3, 0)
    settings = []
    for seed in (1, 2):
        cohort = data.load("phantom", size=32, num_phantoms=12, phantom_seed=seed, progress=False)
        parts = Holdout(torch.arange(4), torch.arange(4, 6), torch.arange(6, 12))
        logits = 4.0 * cohort.masks[parts.proxy] - 2
        settings.append(collapse.Setting(cohort, parts, [parts.federated], logits))
    one, other, again = (collapse.start_of(tmp_path, setting, run) for setting in (*settings, settings[0]))
    assert states.state_digest(one) == states.state_digest(again) != states.state_digest(other)
    slow = collapse.start_of(tmp_path, settings[0], run._replace(proxy_rate=1e-4))
    assert states.state_digest(slow) != states.state_digest(one)


def test_a_file_is_json_that_names_its_trial(tmp_path):
    trials.keep(tmp_path, PLAN[0], {"dice": [[0.5]]})
    (file,) = tmp_path.iterdir()
    assert file.name == f"{PLAN[0].name}.json"
    assert json.loads(file.read_text()) == PLAN[0]._asdict() | {"dice": [[0.5]]}


def test_committed_trainings_of_collapse_belong_together():
    found = trials.finished(paths.ROOT / "docs" / "results" / "collapse" / "runs")
    assert {trial["rounds"] for trial in found} == {10}

"""Experiments: who holds what, steps and rates by hand, and rounds equal to a loop of another hand."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from bench import experiment_tables, experiments, independent, lessons, trials
from bench.experiments import Setting, Trial
from bench.lessons import Lesson
from fmfl import data, federate, losses, models, prompts, states, teacher, train
from fmfl.errors import UserError
from fmfl.split import Holdout
from fmfl.train import Examples


@pytest.fixture(scope="module")
def cohort():
    return data.load("phantom", size=32, num_phantoms=40, progress=False)


@pytest.fixture(scope="module")
def setting(cohort):
    parts = Holdout(torch.arange(8), torch.arange(8, 14), torch.arange(14, 34))
    logits = torch.randn(8, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    proxy = Examples(cohort.images, cohort.masks, parts.proxy, teacher_logits=logits)
    return Setting(cohort, parts, Lesson(proxy, 8), list(parts.federated.split([10, 7, 3])))


def test_a_balanced_deal_has_as_many_adults_as_children_and_no_patient_twice():
    """A made table: 30 adults with two images, 90 children with one, 10 people of unknown age with three."""
    ages = np.repeat([40.0, 3.0, np.nan], [60, 90, 30])
    patients = [*np.repeat(range(30), 2), *range(30, 120), *np.repeat(range(120, 130), 3)]
    table = pd.DataFrame({"patient_id": [f"p{number}" for number in patients], "age": ages})
    cohort = type("Cohort", (), {"table": table})
    parts = experiments.balanced_parts(cohort, test_patients=10, proxy=20)
    rows = {name: table.iloc[part.tolist()] for name, part in parts._asdict().items()}
    assert {name: ((part.age >= 18).sum(), (part.age < 18).sum()) for name, part in rows.items()} == {
        "proxy": (0, 20),
        "test": (20, 20),
        "federated": (40, 40),
    }
    assert rows["proxy"].age.isna().sum() == 30
    with pytest.raises(UserError, match="the proxy part needs 60 images of children, and 30 are left"):
        experiments.balanced_parts(cohort, test_patients=10, proxy=60)
    seen = [set(part.patient_id) for part in rows.values()]
    assert sum(map(len, seen)) == len(set.union(*seen))


@pytest.mark.parametrize("arm", ["federated", "centralised", "standalone"])
def test_rounds_are_those_of_the_loop_that_imports_nothing(setting, arm):
    trial = Trial("age", arm, "random", seed=1, rounds=2)
    start = models.copy_state(models.build("tiny_unet", seed=1))
    ours = list(experiments.states_by_round(trial, setting, start))
    other = independent.Setting(setting.cohort, setting.parts, setting.clients, None)
    held = dict(enumerate(setting.clients))
    if arm == "federated":
        theirs = [[theta] for theta, _ in independent.federated_rounds(other, start, seed=1, rounds=2)]
    else:
        if arm == "centralised":
            held = {independent.POOLED: setting.parts.federated}
        alone = [
            independent.alone_rounds(other, start, rows, k, seed=1, rounds=2) for k, rows in held.items()
        ]
        theirs = list(zip(*alone, strict=True))
    digests = [[states.state_digest(state) for state in some] for some in ours]
    assert digests == [[states.state_digest(state) for state in some] for some in ([start], *theirs)]


def test_a_client_trains_with_its_epochs_at_the_rate_of_its_round(setting):
    """Two epochs, and the second of three rounds at 3/4 of the rate: the cosine by hand."""
    trial = Trial("age", "federated", "random", seed=1, epochs=2, rounds=3, schedule="cosine")
    start = models.copy_state(models.build("tiny_unet", seed=1))
    _, (first,), (second,), _ = experiments.states_by_round(trial, setting, start)
    for before, after, number, rate in ((start, first, 1, 1e-3), (first, second, 2, 0.75e-3)):
        trained = []
        for k, rows in enumerate(setting.clients):
            client = independent.Client(models.build("tiny_unet"), before, rate)
            trained.append(client.train(setting.cohort, rows, (1, k, number), epochs=2))
        theirs = independent.average(trained, list(map(len, setting.clients)))
        for name, value in theirs.items():
            torch.testing.assert_close(after[name], value, rtol=1e-6, atol=1e-7)


def test_a_standalone_score_is_the_mean_over_its_clients(setting, tmp_path):
    trial = Trial("age", "standalone", "random", seed=1, rounds=1)
    found = experiments.train_trial(trial, setting, tmp_path)["dice"]
    start = models.copy_state(models.build("tiny_unet", seed=1))
    *_, last = experiments.states_by_round(trial, setting, start)
    assert len(last) == 3
    model = models.build("tiny_unet")
    by_hand = [independent.dice_by_image(model, one, setting.cohort, setting.parts.test) for one in last]
    assert found[1] == pytest.approx(np.mean(by_hand, axis=0), abs=1e-5)
    assert np.ptp(by_hand, axis=0).max() > 1e-3


def test_a_cosine_begins_at_the_rate_and_is_halved_in_the_middle():
    trial = Trial("age", "federated", "fm", 0, rounds=60, schedule="cosine")
    assert experiments.learning_rate(trial, 1) == experiments.CONFIG.learning_rate
    assert experiments.learning_rate(trial, 31) == pytest.approx(experiments.CONFIG.learning_rate / 2)
    rates = [experiments.learning_rate(trial, number) for number in range(1, 61)]
    assert rates == sorted(rates, reverse=True) and 0 < rates[-1] < 1e-6
    assert experiments.learning_rate(replace_schedule(trial), 60) == experiments.CONFIG.learning_rate


def replace_schedule(trial: Trial) -> Trial:
    return trial._replace(schedule="constant")


def test_equal_steps_give_small_clients_more_epochs(setting):
    """90, 30 and 10 images: the mean is 43.3, so 1, 1 and 4 epochs of them."""
    clients = [torch.arange(number) for number in (90, 30, 10)]
    trial = Trial("quantity", "federated", "random", 0)
    assert experiments.local_epochs(trial, clients) == [1, 1, 1]
    assert experiments.local_epochs(trial._replace(equal_steps=True), clients) == [1, 1, 4]
    seen = experiments.images_by_round(trial._replace(equal_steps=True), replace(setting, clients=clients), 7)
    assert seen[:3] == [7, 7 + 90 + 30 + 40, 7 + 2 * 160]


def test_a_teacher_in_the_rounds_is_eq_5_with_the_answers_of_each_clients_images(setting):
    """The clients' loss by hand: half Eq. 4 against the answers, half Dice; with alpha 0 nothing changes."""
    trial = Trial("age", "federated", "random", seed=1, rounds=1)
    start = models.copy_state(models.build("tiny_unet", seed=1))
    plain = list(experiments.states_by_round(trial, setting, start))[-1][0]
    answers = torch.randn(setting.cohort.images.shape, generator=torch.Generator().manual_seed(2))
    stays = replace(setting, answers=answers)
    untouched = list(experiments.states_by_round(trial, stays, start))[-1][0]
    assert states.state_digest(plain) == states.state_digest(untouched)
    ours = list(experiments.states_by_round(trial._replace(alpha=0.5), stays, start))[-1][0]
    updates = []
    for k, rows in enumerate(setting.clients):
        model = models.build("tiny_unet")
        models.load_state(model, start)
        train.fit(
            model,
            Examples(setting.cohort.images, setting.cohort.masks, rows, answers[rows]),
            lambda z, y, t: losses.kl_divergence(z, t) / 2 + losses.dice_loss(z, y) / 2,
            epochs=1,
            batch_size=8,
            optimizer=train.adam(model, 1e-3),
            key=(1, k, 1),
        )
        updates.append((models.copy_state(model), len(rows)))
    theirs = federate.aggregate(updates)
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-5, atol=1e-6)
    assert states.state_digest(ours) != states.state_digest(plain)


def test_answers_lie_beside_their_images(cohort, setting, monkeypatch):
    deal = (lambda cohort: setting.parts, lambda seed, cohort, parts: setting.clients)
    monkeypatch.setitem(experiments.DEALS, "made", deal)
    trial = Trial("made", "federated", "random", seed=1, alpha=0.5)
    answers = experiments.setting_of(cohort, trial).answers
    for row in range(14, 34):
        expected = lessons.exact(cohort, torch.tensor([row])).examples.teacher_logits[0]
        torch.testing.assert_close(answers[row], expected, rtol=0.02, atol=0.02)
    assert not answers[:14].any() and not answers[34:].any()
    assert experiments.setting_of(cohort, trial._replace(alpha=0.0)).answers is None


def test_a_lesson_keeps_some_masks_and_has_the_teachers_answer_for_the_rest(cohort, tmp_path, monkeypatch):
    """Five of twelve images keep their mask; the corpus joins with all of its own, or without a site's."""
    material = lessons.Material("kidneys", tmp_path)
    proxy = torch.arange(3, 15)
    lesson = lessons.named("shipped", cohort, proxy, 5, 1, material)
    own = lessons.named("own_masks", cohort, proxy, 5, 1, material)
    known = set(own.examples.indices.tolist())
    assert len(known) == 5 and known < set(proxy.tolist()) and own.epochs(10) == 24
    few = lessons.named("own_masks", cohort, proxy, 2, 1, material).examples.indices.tolist()
    assert len(few) == 2 and set(few) < known
    for place, row in enumerate(proxy.tolist()):
        answer = lesson.examples.teacher_logits[place] > 0
        expected = cohort.masks[row] if row in known else answer.to(torch.uint8)
        assert torch.equal(lesson.examples.masks[row], expected)
    assert lesson.epochs(10) == 10 and 0.2 < lesson.teacher_dice <= 1
    corpus = data.load("phantom", size=32, num_phantoms=20, phantom_seed=5, progress=False)
    corpus.table["patient_id"] = [f"other {name}" for name in corpus.table.patient_id]
    monkeypatch.setattr(lessons.data, "load", lambda *args, **how: corpus)
    joined = lessons.named("corpus_masks", cohort, proxy, 5, 1, material)
    assert len(joined.examples) == 25 and joined.epochs(25) == 12
    assert torch.equal(joined.examples.images[joined.examples.indices[5:]], corpus.images)
    assert torch.equal(joined.examples.masks[joined.examples.indices[5:]], corpus.masks)
    corpus.table["site"] = ["montgomery", "guangzhou"] * 10
    without = lessons.named("guangzhou_masks", cohort, proxy, 5, 1, material).examples
    assert torch.equal(without.images[without.indices[5:]], corpus.images[1::2])
    corpus.table["patient_id"] = cohort.table.patient_id.iloc[:20].tolist()
    with pytest.raises(UserError, match="share 14 patients"):
        lessons.named("corpus_masks", cohort, proxy, 5, 1, material)


def test_a_teacher_is_read_from_its_own_file_and_asked_with_sloppy_boxes(cohort, tmp_path):
    """Its answers are those of its file's network; a file with other weights gives others."""
    shipped = teacher.default_file("builtin")
    with safe_open(shipped, "pt") as opened:
        metadata = opened.metadata()
    weights = {name: value * 0.9 for name, value in load_file(shipped).items()}
    save_file(weights, tmp_path / "kidneys.safetensors", metadata)
    proxy, material = torch.arange(6), lessons.Material("", tmp_path)
    boxes = prompts.prompt(cohort.masks[proxy], "ground_truth_jitter", per_image="per_lung")
    answers = {}
    for name, file in (("shipped", shipped), ("kidneys", tmp_path / "kidneys.safetensors")):
        asked = teacher.load("builtin", file).logits(cohort.images[proxy], boxes)
        answers[name] = lessons.named(name, cohort, proxy, 2, 0, material).examples.teacher_logits.float()
        torch.testing.assert_close(answers[name], asked.float(), rtol=0.01, atol=0.01)
    assert (answers["shipped"] - answers["kidneys"]).abs().max() > 1


def test_fewer_images_are_seen_more_often(cohort, setting, tmp_path):
    """Four of eight proxy images: 16 epochs of them, as many images as 8 epochs of all."""
    few = replace(setting.lesson.examples, indices=torch.arange(4), teacher_logits=None)
    trial = Trial("age", "federated", "pretraining", 0, rounds=1, lesson="own_masks", labelled=4)
    lesson = setting.lesson._replace(examples=few)
    result = experiments.train_trial(trial, replace(setting, lesson=lesson), tmp_path)
    assert lesson.epochs(experiments.DISTILL.proxy_epochs) == 2 * experiments.DISTILL.proxy_epochs
    assert result["images_seen"] == [64, 64 + 20] and len(result["dice"]) == 2


@pytest.mark.slow
@pytest.mark.parametrize("name", experiments.PLANS)
def test_committed_tables_are_those_of_the_committed_runs(tmp_path, name):
    folder = experiments.RESULTS / name
    experiment_tables.write(name, trials.finished(folder / "runs"), tmp_path)
    for file in folder.glob("*.csv"):
        again, committed = pd.read_csv(tmp_path / file.name), pd.read_csv(file)
        pd.testing.assert_frame_equal(again, committed, rtol=1e-6, atol=1e-5)


def test_a_name_that_is_no_experiment_is_refused_before_anything_is_loaded():
    for command in (experiments.run_all, experiments.tables):
        with pytest.raises(UserError, match="'nosuch' is no experiment"):
            command("nosuch")
    with pytest.raises(UserError, match="counted from 0 to 1"):
        experiments.run_all("skew", "no such folder", worker=2, workers=2)


@pytest.mark.parametrize("name", experiments.PLANS)
def test_a_committed_page_has_the_tables_of_its_files(tmp_path, name, emptied):
    folder = experiments.RESULTS / name
    shutil.copytree(folder, tmp_path / name, ignore=shutil.ignore_patterns("runs"))
    page, committed = tmp_path / name / "README.md", (folder / "README.md").read_text()
    page.write_text(emptied(committed))
    experiment_tables.page(tmp_path / name)
    assert page.read_text() == committed != emptied(committed)


def test_names_of_trials_are_their_own():
    for name, plan in experiments.PLANS.items():
        names = [trial.name for trial in plan()]
        assert len(set(names)) == len(names) > 0, name
        assert all(trial.deal in experiments.DEALS for trial in plan())


def test_tables_tell_the_difference_that_was_put_in(tmp_path):
    """Dice made by hand: fm is 2 points above random on each of 25 patients under age, 1 under IID."""
    runs = tmp_path / "runs"
    runs.mkdir()
    rng = np.random.default_rng(0)
    base = rng.uniform(0.8, 0.9, 25)
    for deal, gain in (("balanced_age", 0.02), ("balanced_iid", 0.01)):
        for init in ("random", "fm"):
            for seed in range(3):
                dice = base + gain * (init == "fm") + rng.normal(0, 1e-3, 25)
                trial = Trial(deal, "federated", init, seed, rounds=1)
                about = {"images": [f"i{k}" for k in range(25)], "patients": [f"p{k}" for k in range(25)]}
                about |= {"ages": [40.0] * 25, "dice": [(0 * dice).tolist(), dice.tolist()]}
                content = trial._asdict() | about | {"images_seen": [0, 10], "clients": [4, 3, 3], "proxy": 5}
                (runs / f"{trial.name}.json").write_text(json.dumps(content))
    experiment_tables.write("skew", trials.finished(runs), tmp_path)
    table = pd.read_csv(tmp_path / "differences.csv").set_index("difference")
    row = table.loc["foundation model less random, age"]
    assert row.value == pytest.approx(2, abs=0.1) and row.low < 2 < row.high and row.reading == "higher"
    loss = table.loc["loss of random less loss of foundation model, age"]
    assert loss.value == pytest.approx(1, abs=0.1)
    assert set(pd.read_csv(tmp_path / "means.csv").split) == {"balanced_age", "balanced_iid"}
    assert all((tmp_path / f"skew{by}.png").stat().st_size > 10_000 for by in ("", "-images"))
    (tmp_path / "README.md").write_text("<!-- means: begin -->\n<!-- means: end -->\n")
    experiment_tables.page(tmp_path)
    assert "| balanced_age | federated | foundation model |" in (tmp_path / "README.md").read_text()


def test_a_budget_of_images_takes_each_run_where_it_has_seen_no_more():
    """Made by hand: 20 images take a random start to round 2, and one that has cost 15 to round 0."""
    runs = [("random", seed, number, 10 * number) for seed in (0, 1) for number in range(4)]
    runs += [("fm", seed, number, 15 + 10 * number) for seed in (0, 1) for number in range(4)]
    scores = pd.DataFrame(runs, columns=["init", "seed", "round", "images_seen"])
    scores = scores.assign(arm="federated", split="age", age=40.0)
    rows = experiment_tables.chosen(scores, images=20)
    assert sorted(zip(rows.init, rows.seed, rows["round"], strict=True)) == [
        *(("fm", seed, 0) for seed in (0, 1)),
        *(("random", seed, 2) for seed in (0, 1)),
    ]
    assert set(experiment_tables.chosen(scores, images=14).init) == {"random"}


def test_steps_are_counted_one_after_another():
    """Batches of 8: a start of 2 x 36 images has 10, a round with the largest client 2, in one place 5."""
    trial = Trial("age", "federated", "fm", 0, rounds=1)._asdict() | {"clients": [8, 16, 12], "proxy": 36}
    trial |= {"images": ["i"], "patients": ["p"], "ages": [1.0], "dice": [[0.1], [0.2], [0.3]]}
    trial |= {"images_seen": [72, 108, 144]}
    scores = experiment_tables.scores_of([trial, trial | {"arm": "centralised"}])
    assert scores[scores.arm == "federated"].steps.tolist() == [10, 12, 14]
    assert scores[scores.arm == "centralised"].steps.tolist() == [10, 15, 20]
    rows = experiment_tables.chosen(scores, steps=13)
    assert dict(zip(rows.arm, rows.dice, strict=True)) == {"federated": 0.2, "centralised": 0.1}


def test_the_images_that_contrasts_name_are_those_of_the_study():
    """The committed runs say how many images a round and an informed start have cost."""
    seen = pd.read_csv(experiments.RESULTS / "budgets" / "by_round.csv")
    seen = seen[(seen.split == "age") & (seen.arm == "federated")]
    by_init = seen.groupby(["init", "round"]).images_seen.unique().map(lambda values: values.item())
    assert by_init["fm", 0] == by_init["pretraining", 0] == experiment_tables.START_IMAGES
    assert by_init["random", 1] == experiment_tables.CLIENTS_IMAGES


def test_the_steps_that_contrasts_name_are_those_of_the_trainings():
    """Rounds of three equal clients; in the balanced deals the clients' sizes differ a little by seed."""
    assert experiment_tables.CLIENTS_STEPS == experiment_tables.batches(324) == 41
    runs = trials.finished(experiments.RESULTS / "skew" / "runs")
    start = {(run["proxy"], run["images_seen"][0]) for run in runs if run["init"] != "random"}
    assert start == {(408, 8 * 408)} and experiment_tables.SKEW_START_STEPS == 8 * 408 // 8
    once = [run for run in runs if (run["deal"], run["epochs"], run["init"]) == ("balanced_iid", 1, "random")]
    assert {run["images_seen"][20] for run in once} == {experiment_tables.SKEW_IMAGES}
    steps = {20 * experiment_tables.batches(max(run["clients"])) for run in once}
    assert min(steps) == experiment_tables.SKEW_STEPS


def test_tables_of_lessons_tell_the_gain_that_was_put_in(tmp_path):
    """Dice made by hand: before any round the shipped teacher's student is 3 points higher with ten masks."""
    (tmp_path / "runs").mkdir()
    rng = np.random.default_rng(0)
    base = rng.uniform(0.8, 0.9, 25)
    for name, gain, teacher_dice in (("own_masks", 0, None), ("shipped", 0.03, 0.9), ("kidneys", -0.1, 0.2)):
        for seed in range(3):
            start = base + gain + rng.normal(0, 1e-3, 25)
            trial = experiments.taught()[0]._replace(
                init=lessons.init_of(name), lesson=name, labelled=10, seed=seed
            )
            about = {"images": [f"i{k}" for k in range(25)], "patients": [f"p{k}" for k in range(25)]}
            about |= {"ages": [40.0] * 25, "dice": [start.tolist(), base.tolist(), base.tolist()]}
            about |= {"images_seen": [100, 110, 120], "clients": [10], "proxy": 10}
            about["teacher_dice"] = teacher_dice
            (tmp_path / "runs" / f"{trial.name}.json").write_text(json.dumps(trial._asdict() | about))
    (tmp_path / "README.md").write_text("<!-- starts: begin -->\n<!-- starts: end -->\n")
    experiment_tables.write("taught", trials.finished(tmp_path / "runs"), tmp_path)
    table = pd.read_csv(tmp_path / "differences.csv").set_index("difference")
    assert table.value[
        "the shipped teacher less proxy masks alone, 10 masks, before any round"
    ] == pytest.approx(3, abs=0.1)
    assert table.value[
        "the shipped teacher less proxy masks alone, 10 masks, after two rounds"
    ] == pytest.approx(0)
    assert table.value[
        "a teacher of drawn kidneys less proxy masks alone, 10 masks, before any round"
    ] == pytest.approx(-10, abs=0.1)
    rows = (tmp_path / "README.md").read_text().splitlines()[3:6]
    assert [row.split(" | ")[:3] for row in rows] == [
        ["| proxy masks alone", "10", ""],
        ["| the shipped teacher", "10", "90.0"],
        ["| a teacher of drawn kidneys", "10", "20.0"],
    ]
    assert (tmp_path / "taught.png").stat().st_size > 10_000

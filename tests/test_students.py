"""The choice of weights follows a written rule that looks at no score, and says what else there is."""

import re
import sys

import pytest
import torch
from made_runs import RUNS, SIZE, make_manifest, make_run, name_of, trained

from fmfl import states
from fmfl.errors import UserError
from fmfl.study import cli, students


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("run"))


def test_all_final_weights_are_found_and_no_start_is(run):
    states.write_state(run / "weights" / "init-fm-seed0.safetensors", trained(), fingerprint="x")
    assert [one.name for one in students.finals(run)] == sorted(name_of(*one) for one in RUNS)


@pytest.mark.parametrize(
    ("wanted", "name"),
    [
        ({}, "federated-age-fm-seed0"),
        ({"init": "", "split": None}, "federated-age-fm-seed0"),
        ({"init": "random"}, "federated-age-random-seed0"),
        ({"seed": 1}, "federated-age-fm-seed1"),
        ({"split": "iid"}, "federated-iid-fm-seed0"),
        ({"arm": "centralised"}, "centralised-pooled-random-seed0"),
        ({"arm": "standalone"}, "standalone-age-random-seed0-client0"),
        ({"arm": "standalone", "client": 1}, "standalone-age-random-seed0-client1"),
    ],
)
def test_weights_are_chosen_by_name_and_else_by_the_rule(run, wanted, name):
    assert students.choose(run, **wanted)[0].name == name


def test_the_reason_names_the_rule_and_what_else_there_is(run):
    assert students.choose(run)[1] == (
        "the federated arm, the study's reference split, the start fm, the lowest seed; no score was looked "
        "at; others by --arm centralised or standalone, --split iid, --init random, --seed 1"
    )
    assert students.choose(run, init="random")[1].startswith(
        "the federated arm, the study's reference split, "
    )
    assert "--init random, the lowest seed;" in students.choose(run, init="random")[1]


def test_where_the_rules_first_choice_is_missing_the_next_is_named(tmp_path):
    run = make_run(
        tmp_path, [("federated", "iid", "random", 3, -1), ("federated", "iid", "pretraining", 3, -1)]
    )
    final, why = students.choose(run)
    assert final.name == "federated-iid-pretraining-seed3"
    assert "split iid, as the study's reference split is not among them" in why
    assert "init pretraining, as the start fm is not among them, the lowest seed" in why


def test_the_runs_own_reference_split_is_taken(tmp_path):
    assert students.choose(make_run(tmp_path, reference_split="iid"))[0].split == "iid"


@pytest.mark.parametrize(
    ("wanted", "says"),
    [
        ({"init": "imagenet"}, "--init imagenet: there are no such final weights for arm federated, split "
         "age; there is: fm, random"),
        ({"arm": "alone"}, "--arm alone: there are no such final weights; there is: federated, centralised"),
        ({"split": "site"}, "for arm federated; there is: age, iid"),
        ({"seed": 7}, "for arm federated, split age, init fm; there is: 0, 1"),
        ({"split": "iid", "seed": 1}, "for arm federated, split iid, init fm; there is: 0"),
        ({"client": 0}, "there is: none, as these weights are of all clients"),
    ],
)  # fmt: skip
def test_an_unknown_choice_lists_what_there_is(run, wanted, says):
    with pytest.raises(UserError) as caught:
        students.choose(run, **wanted)
    assert says in str(caught.value)


def test_a_folder_without_weights_is_one_sentence(tmp_path, monkeypatch, capsys):
    with pytest.raises(UserError, match="there is no such folder"):
        students.finals(tmp_path / "none")
    with pytest.raises(UserError, match="holds no final weights: run 04_federate or `fmfl study` into"):
        students.finals(tmp_path)
    says = rf"fmfl: {tmp_path} holds no finished study, .*\n"
    commands = [["export", "--onnx", "x.onnx"], ["predict", tmp_path, "--out", "masks"], ["score", "phantom"]]
    for name, *others in commands:
        monkeypatch.setattr(sys, "argv", ["fmfl", name, *map(str, (tmp_path, *others))])
        with pytest.raises(SystemExit):
            cli.main()
        assert re.fullmatch(says, capsys.readouterr().err)


def test_a_run_that_has_not_ended_is_not_used(tmp_path):
    run = make_run(tmp_path, RUNS[:1], done=1)
    with pytest.raises(UserError, match="stands at round 1: run the same study again"):
        students.choose(run)
    make_run(tmp_path, RUNS[2:3])
    assert [one.init for one in students.finals(run)] == ["fm"]


def test_weights_are_loaded_as_they_were_written(run):
    final, _ = students.choose(run, split="iid")
    state = students.load(final).state_dict()
    stored, record = states.read_state(final.file)
    assert states.state_digest(state) == record["sha256"] == states.state_digest(stored)
    assert not students.load(final).training


def test_damaged_weights_are_one_sentence(tmp_path):
    run = make_run(tmp_path, RUNS[:1])
    final, _ = students.choose(run)
    content = bytearray(final.file.read_bytes())
    content[-5] ^= 1
    final.file.write_bytes(content)
    with pytest.raises(UserError, match="is damaged: run the same study again"):
        students.load(final)


def test_weights_of_another_student_are_one_sentence(tmp_path):
    run = make_run(tmp_path, RUNS[:1])
    final, _ = students.choose(run)
    record = states.read_record(final.file)
    record.pop("sha256")
    states.write_state(final.file, {"a": torch.zeros(3)}, **record)
    with pytest.raises(UserError, match="does not hold the weights of student 'tiny_unet'"):
        students.load(final)


def test_the_size_comes_from_the_cells_or_the_manifest_or_the_person(tmp_path):
    assert students.image_size(make_run(tmp_path / "a", RUNS[:1])) == SIZE
    run = make_run(tmp_path / "b", RUNS[:1], cells=False)
    with pytest.raises(UserError, match="does not say the size that it was trained at: give it by --size"):
        students.image_size(run)
    assert students.image_size(run, 64) == 64
    make_manifest(run)
    assert students.image_size(run) == students.image_size(run, SIZE) == SIZE
    with pytest.raises(UserError, match=r"--size is 64, but .* was trained at 32"):
        students.image_size(run, 64)


def test_a_gpu_that_is_not_there_is_one_sentence(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert students.device("auto") == torch.device("cpu")
    with pytest.raises(UserError, match="PyTorch finds no GPU here"):
        students.device("cuda")

"""All splits of a study train on the same images, also where some images have no age."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from fmfl import config, runs, split
from fmfl.errors import UserError
from fmfl.study import grid, outputs, preflight, stages


@pytest.fixture
def cohort():
    """Sixty patients with an image each, every fifth of unknown age."""
    age = np.where(np.arange(60) % 5 == 0, np.nan, 20.0 + np.arange(60))
    table = pd.DataFrame({"patient_id": [f"p{k}" for k in range(60)], "site": "a", "age": age})
    return SimpleNamespace(table=table)


def held(cohort, scheme, **given):
    cfg = config.settings({"num_clients": 3} | given).federate
    return set(torch.cat(stages.partition(cohort, torch.arange(60), cfg, scheme)).tolist())


def test_every_split_deals_the_same_images_where_those_without_an_age_are_left_out(cohort):
    by_scheme = {s: held(cohort, s, images_without_age="leave_out") for s in ("iid", "age", "quantity")}
    assert by_scheme["iid"] == by_scheme["age"] == by_scheme["quantity"]
    assert by_scheme["iid"] == set(np.flatnonzero(cohort.table.age.notna()))
    assert held(cohort, "iid", images_without_age="keep") == set(range(60))


def test_images_with_an_age_are_named_or_one_sentence_says_there_are_none(cohort):
    chosen = torch.tensor([0, 3, 5, 7])
    assert split.with_age(cohort.table, chosen).tolist() == [3, 7]
    with pytest.raises(UserError, match="none of these images has an age"):
        split.with_age(cohort.table, torch.tensor([0, 5]))


@pytest.mark.parametrize(
    ("splits", "given", "expected"),
    [
        (["iid", "age", "quantity"], {}, "leave_out"),
        (["iid", "dirichlet"], {}, "leave_out"),
        (["iid", "quantity"], {}, "keep"),
        (["iid", "age"], {"images_without_age": "keep"}, "keep"),
        (["iid"], {"images_without_age": "leave_out"}, "leave_out"),
    ],
)
def test_a_study_decides_once_for_all_its_cells(splits, given, expected):
    cells = grid.plan(config.settings(given), [0, 1], splits, {"num_clients": [2]})
    assert {cell.cfg.federate.images_without_age for cell in cells} == {expected}
    assert all(
        cell.parameters["images_without_age"] == expected
        for cell in cells
        if cell.notebook in ("01_data", "04_federate", "05_analysis")
    )


def test_alone_a_notebook_deals_as_its_split_needs(cohort):
    assert config.defaults()["images_without_age"] == "auto"
    assert held(cohort, "iid") == set(range(60))
    assert held(cohort, "age") == held(cohort, "age", images_without_age="leave_out")


def test_who_holds_what_by_age_is_as_it_was(cohort):
    """Leaving the images out before or while dealing by age is the same deal."""
    cfg = config.settings({"images_without_age": "leave_out", "seed": 3}).federate
    ours = stages.partition(cohort, torch.arange(60), cfg, "age")
    theirs = stages.partition(cohort, torch.arange(60), replace(cfg, images_without_age="keep"), "age")
    assert all(map(torch.equal, ours, theirs))


def test_a_notebook_finds_the_cells_of_a_study_whatever_that_has_decided(tmp_path):
    """05_analysis opened by hand, at auto, on a folder that `fmfl study` has filled."""
    cfg = config.settings({"run_name": str(tmp_path)})
    made = config.settings({"run_name": str(tmp_path), "images_without_age": "leave_out"})
    table = pd.DataFrame(
        {"arm": ["federated"], "init": "fm", "split": "age", "seed": 0, "round": 1, "dice": 0.5}
    )
    scores = table.assign(client=-1, image_id="a", patient_id="a")
    outputs.save(made, "04_federate", {"images": "x", "code": "y"}, results=table, per_image=scores)
    found, _, others = outputs.collect(cfg)
    assert len(found) == 1 and others == []
    other = config.settings({"run_name": str(tmp_path), "images_without_age": "keep"})
    with pytest.raises(UserError, match="other settings"):
        outputs.collect(other)


def test_a_study_may_add_a_split_by_age_and_trains_nothing_again_where_all_images_have_one(tmp_path):
    """The clients' images, not the setting, make a run another one."""
    cfg = config.settings({"run_name": str(tmp_path)})
    before, after = (grid.plan(cfg, [0], splits) for splits in (["iid"], ["iid", "age"]))
    was, now = (cells[0].cfg.federate for cells in (before, after))
    assert (was.images_without_age, now.images_without_age) == ("keep", "leave_out")
    assert runs.run_settings(was, "federated") == runs.run_settings(now, "federated")
    outputs.save(before[0].cfg, "01_data", {"fingerprint": "x"})
    inputs = {"data": "x", "teacher": "y"}
    assert preflight.other_study(after, inputs) == {}
    assert "data (by its bytes)" in preflight.other_study(after, inputs | {"data": "z"})


def test_a_split_by_age_that_a_study_adds_is_not_refused_by_its_notebooks(tmp_path):
    """Only the answer to whose images the clients hold changes, and rounds of other images move aside."""
    cfg = config.settings({"run_name": str(tmp_path)})
    before, after = (grid.plan(cfg, [0], splits) for splits in (["iid"], ["iid", "age"]))
    for cell in before:
        outputs.save(cell.cfg, cell.notebook, {})
    for cell in after:
        if cell.notebook in ("03_distill", "04_federate"):
            outputs.check_run(cell.cfg, cell.notebook)


def test_a_notebook_never_mixes_cells_with_and_without_images_of_unknown_age(tmp_path):
    """A split by age was added to a study of two seeds with one of them: the other seed is left out."""
    cfg = config.settings({"run_name": str(tmp_path)})
    table = pd.DataFrame({"arm": ["federated"], "init": "fm", "round": 1, "dice": 0.5})
    scores = table.assign(client=-1, image_id="a", patient_id="a")
    for scheme, seed, whose in (("iid", 0, "leave_out"), ("age", 0, "leave_out"), ("iid", 1, "keep")):
        made = {"run_name": str(tmp_path), "split": scheme, "seed": seed, "images_without_age": whose}
        cell = {"split": scheme, "seed": seed}
        tables = {"results": table.assign(**cell), "per_image": scores.assign(**cell)}
        outputs.save(config.settings(made), "04_federate", {"images": "x", "code": "y"}, **tables)
    found, _, others = outputs.collect(cfg)
    assert sorted(found.split) == ["age", "iid"] and set(found.seed) == {0}
    assert others == ["04_federate-iid-seed1"]


def test_an_analysis_with_other_settings_is_told_which(tmp_path):
    """As after the exercise of 04_federate, whose run 05_analysis is asked for with its own three clients."""
    outputs.save(config.settings({"run_name": str(tmp_path), "num_clients": 1}), "04_federate", {})
    with pytest.raises(UserError, match=r"num_clients is 1 there and 3 here.*give the run's own values"):
        outputs.collect(config.settings({"run_name": str(tmp_path)}))

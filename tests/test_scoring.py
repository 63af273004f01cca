"""Scores on other images are those of `metrics.score`, and their intervals those of the study's tables."""

import sys

import made_runs
import numpy as np
import pandas as pd
import pytest
import torch
from made_sources import make_folder, picture, save

from fmfl import data, metrics, split, train
from fmfl.analysis import statistics
from fmfl.errors import UserError
from fmfl.study import cli, scoring, students


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return made_runs.make_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def cohort():
    return made_runs.cohort(60)


@pytest.fixture(scope="module")
def scores(run, cohort):
    return scoring.score(students.finals(run), cohort, "site")[0]


def test_each_image_has_the_scores_of_each_file_of_weights(run, cohort, scores, monkeypatch):
    monkeypatch.setattr(scoring, "CHUNK", 7)  # in pieces as in one go
    final, _ = students.choose(run, split="iid")
    (mine,) = scoring.by_image([final], cohort)
    logits = train.predict(students.load(final), cohort.images, torch.arange(len(cohort)))
    expected = metrics.score(logits.sigmoid(), cohort.masks)
    pd.testing.assert_frame_equal(mine[list(expected)], expected, atol=1e-5)
    assert list(mine.image_id) == list(cohort.table.image_id)
    assert len(scores) == len(made_runs.RUNS) * len(cohort)
    keys = scores[["arm", "split", "init", "seed", "client"]].drop_duplicates()
    assert sorted(keys.itertuples(index=False, name=None)) == sorted(made_runs.RUNS)


def test_means_and_intervals_of_dice_are_those_of_the_studys_tables(scores):
    """`statistics.contrast` is the oracle: two seeds by patients and seeds together, one by patients."""
    table = scoring.summary(scores, "site").set_index(["group", "arm", "init", "split"])
    for cell in (("federated", "fm", "age"), ("federated", "fm", "iid"), ("standalone", "random", "age")):
        expected, mine = statistics.contrast(scores, {cell: 1}), table.loc[("all", *cell)]
        got = [100 * mine[name] for name in ("dice", "dice_low", "dice_high")]
        np.testing.assert_allclose(got, [expected[name] for name in ("value", "low", "high")], rtol=1e-6)
        assert (mine.images, mine.patients, mine.seeds) == tuple(
            expected[name] for name in ("images", "patients", "seeds")
        )


def test_groups_are_scored_apart_and_few_patients_have_no_interval(scores, cohort):
    table = scoring.summary(scores, "site")
    sites = sorted(cohort.table.site.unique())
    assert list(dict.fromkeys(table.group)) == ["all", *sites] and len(sites) > 1
    cell = (table.arm == "federated") & (table.init == "fm") & (table.split == "iid")
    for site in sites:
        of_site = scores[(scores.site == site) & (scores.split == "iid")]
        row = table[cell & (table.group == site)].iloc[0]
        for name in scoring.METRICS:
            assert row[name] == pytest.approx(of_site[name].mean(), rel=1e-6)
        assert row.images == len(of_site) == (cohort.table.site == site).sum()
        few = row.patients < statistics.MIN_PATIENTS
        assert all(pd.isna(row[f"{name}_low"]) == few for name in scoring.METRICS)
    assert (table.patients < statistics.MIN_PATIENTS).any() and (table.group == "all").any()


def test_a_standalone_image_is_scored_by_the_mean_of_its_clients(scores):
    row = scoring.summary(scores).set_index(["group", "arm"]).loc[("all", "standalone")]
    assert row.assd == pytest.approx(scores[scores.arm == "standalone"].assd.mean(), rel=1e-6)
    assert row.images == scores.image_id.nunique(), "an image counts once"


def test_ages_are_grouped_by_bands_and_an_unknown_one_is_said(scores):
    some = scores.copy()
    some.loc[some.image_id == some.image_id.iloc[0], "age"] = np.nan
    table = scoring.summary(some, "age")
    groups = list(dict.fromkeys(table.group))
    known = [band for band in split.AGE_BANDS if band in groups]
    assert groups == ["all", *known, "unknown"] and len(known) > 3
    own = table[(table.split == "iid") & (table.group != "all")]
    assert own.images.sum() == some.image_id.nunique(), "each image is in one group"


@pytest.fixture
def fmfl(monkeypatch, capsys):
    def command(*arguments):
        monkeypatch.setattr(sys, "argv", ["fmfl", "score", *map(str, arguments)])
        code = 0
        try:
            cli.main()
        except SystemExit as ended:
            code = ended.code or 0
        said = capsys.readouterr()
        return code, said.out, said.err

    return command


def test_the_command_reads_what_fmfl_data_reads(tmp_path, fmfl):
    run = made_runs.make_run(tmp_path / "run", made_runs.RUNS[:2])
    folder = make_folder(
        tmp_path / "clinic", metadata="image_id,patient_id,site\na,1,north\nb,2,south\nc,2,south\n"
    )
    (folder / "masks" / "c.png").unlink()
    code, out, err = fmfl(run, folder)
    assert (code, err) == (0, "")
    tables = run / "scores" / "clinic"
    found = pd.read_csv(tables / "scores.csv")
    assert len(found) == 4 and set(found.site) == {"north", "south"}
    assert set(pd.read_csv(tables / "summary.csv").group) == {"all", "north", "south"}
    assert "images: 2 scored, 1 left out" in out and "V7 include most of the heart" in out
    assert "warning" not in out and f"{tables / 'scores.csv'}" in out
    assert fmfl(run, folder, "--by", "sex")[0] == 0, "its own tables are written again"
    code, _, err = fmfl(run, folder, "--by", "colour")
    assert code == 2 and "--by colour: choose one of site, source, age, sex, view, finding" in err


def test_masks_are_of_the_runs_organ_unless_another_is_named(tmp_path, fmfl):
    """A file of labels: 1 is another organ, which a default of lung would have scored without a word."""
    run = made_runs.make_run(tmp_path / "run", made_runs.RUNS[:1], mask_class="kidney:2")
    folder, sides = tmp_path / "clinic", {}
    labels = np.zeros((40, 40), np.uint8)
    labels[4:20, 4:20], labels[24:36, 10:30] = 1, 2
    for name in ("a", "b"):
        save(folder / "images" / f"{name}.png", picture(ord(name), 40))
        save(folder / "masks" / f"{name}.png", labels)
    for given in ("", "kidney:1"):
        code, out, err = fmfl(run, folder, *(("--mask-class", given) if given else ()))
        assert (code, err) == (0, "") and "outline the kidney otherwise. A lower" in out and "V7" not in out
        sides[given] = pd.read_csv(run / "scores" / "clinic" / "scores.csv").dice.tolist()
        cohort = data.load(folder, size=made_runs.SIZE, mask_class=given or "kidney:2", progress=False)
        expected = scoring.score(students.finals(run), cohort, "site")[0].dice.tolist()
        assert sides[given] == pytest.approx(expected, rel=1e-6)
    assert sides[""] != sides["kidney:1"]


def test_a_site_called_all_is_a_group_of_its_own(scores):
    first = scores.image_id.iloc[0]
    table = scoring.summary(scores.assign(site=np.where(scores.image_id == first, "all", "b")))
    cell = table[(table.split == "iid") & (table.group == "all")]
    assert cell.images.tolist() == [scores.image_id.nunique(), 1]


def test_the_runs_own_images_are_no_independent_test(tmp_path, cohort):
    run = made_runs.make_run(tmp_path, made_runs.RUNS[:1])
    (warning,) = scoring.own_images(students.finals(run), cohort, run)
    assert "the run trained on a source of the same name (phantom)" in warning
    final = students.finals(run)[0]
    final.made_of["data"] = cohort.fingerprint
    (warning,) = scoring.own_images([final], cohort, run)
    assert "these are the images of the run itself" in warning


def test_folders_of_one_name_keep_their_own_tables(tmp_path, fmfl, monkeypatch):
    run = made_runs.make_run(tmp_path / "run", made_runs.RUNS[:1])
    folders = [
        make_folder(tmp_path / place / "clinic", "abcd"[:number]) for number, place in ((2, "x"), (3, "y"))
    ]
    for folder in (*folders, *folders):
        assert fmfl(run, folder)[0] == 0
    monkeypatch.chdir(tmp_path / "x")
    assert fmfl(run, "clinic")[0] == 0, "the same folder by another path"
    found = {file.parent.name: len(pd.read_csv(file)) for file in (run / "scores").glob("*/scores.csv")}
    assert found == {"clinic": 2, "clinic.2": 3}
    (run / "scores" / "clinic" / "sources.txt").write_text("my notes")
    assert scoring.folder_of(run, str(folders[0])) == run / "scores" / "clinic.3"
    with pytest.raises(UserError, match=r"sources\.txt is there, and `fmfl score` did not make it"):
        scoring.check_folder(run / "scores" / "clinic", "site")


def test_somebody_elses_table_is_not_written_over(tmp_path, fmfl):
    run = made_runs.make_run(tmp_path / "run", made_runs.RUNS[:1])
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "scores.csv").write_text("mine\n")
    code, _, err = fmfl(run, make_folder(tmp_path / "clinic"), "--out", tmp_path / "out")
    assert code == 2 and "`fmfl score` did not make it" in err
    with pytest.raises(UserError, match="did not make it"):
        scoring.check_folder(tmp_path / "out", "site")
    assert (tmp_path / "out" / "scores.csv").read_text() == "mine\n"

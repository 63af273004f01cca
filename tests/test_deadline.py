"""A study stops by itself at its time limit, and ends in the bytes of one that never stopped."""

import json
import os
import sys
import time

import pandas as pd
import pytest
import torch
from pandas.testing import assert_frame_equal
from safetensors.torch import load_file

from fmfl import config, deadline, distill, paths, runs, states
from fmfl.errors import OutOfTime, UserError
from fmfl.study import cells, cli, execute, grid, options, preflight, provenance


def plan(folder, **given) -> list[cells.Cell]:
    tiny = {"size": 32, "num_phantoms": 40, "num_rounds": 2, "proxy_epochs": 1, "student": "tiny_unet"}
    tiny |= {"arms": "federated", "alpha_sweep": "", "diagnostics": False}
    return grid.plan(config.settings(tiny | {"run_name": folder} | given), [0], ["age"])


def run(planned: list[cells.Cell], **more) -> list[str]:
    """Names of the notebooks that ran, the last one where the time was up."""
    said: list[str] = []
    try:
        grid.run(planned, plain=True, progress=False, say=said.append, **more)
    except OutOfTime as error:
        said.append(str(error))
    return [line.split(":")[0] if line.endswith(" s") else line for line in said]


def time_is_up() -> None:
    os.environ[deadline.VARIABLE] = "0"


# ------------------------------------------------------------------------------------------ the clock


def test_the_limit_holds_inside_and_what_held_before_comes_back(monkeypatch):
    monkeypatch.delenv(deadline.VARIABLE, raising=False)
    assert not deadline.has_passed()
    with deadline.at(time.time() + 60):
        assert not deadline.has_passed()
        with deadline.at(time.time() - 1):
            assert deadline.has_passed()
            with deadline.at(float("inf")):
                assert deadline.has_passed(), "a command without a limit keeps its caller's"
        assert not deadline.has_passed()
    assert deadline.VARIABLE not in os.environ


def test_minutes_count_from_now():
    assert options.time_limit(None) == float("inf")
    assert options.time_limit(2.5) == pytest.approx(time.time() + 150, abs=1)


@pytest.mark.parametrize("minutes", ["0", "-1", "nan", "inf"])
def test_minutes_that_are_none_are_one_sentence(minutes, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["fmfl", "study", "--minutes", minutes])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    assert capsys.readouterr().err == f"fmfl: --minutes is {minutes}: it must be a number above 0\n"


def test_the_exit_code_is_75_and_the_sentence_no_traceback(tmp_path, monkeypatch, capsys):
    """75 is EX_TEMPFAIL in sysexits.h."""

    def out_of_time(cells, *, stop_at, **others):
        assert stop_at == pytest.approx(time.time() + 60, abs=30)
        raise OutOfTime("the time is up")

    monkeypatch.setattr(grid, "run", out_of_time)
    monkeypatch.setattr(sys, "argv", ["fmfl", "study", "--minutes", "1", "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 75 == getattr(os, "EX_TEMPFAIL", 75)
    assert capsys.readouterr().err == "fmfl: the time is up\n"


# ------------------------------------------------------------------------------------------ between notebooks


@pytest.fixture
def notebooks(tmp_path, monkeypatch):
    """Notebooks that leave the files of the real ones; `02_teacher` lasts until the time is up."""
    setup = "from fmfl import config\nfrom fmfl.study import cells, outputs\n"
    setup += "cfg = config.from_notebook(globals())\n"
    leave = "for name in {names}:\n    outputs.write_text(cfg.run_dir / name, 'left')\n"
    weights = "[f'weights/{name}.safetensors' for name in cells.training_runs(cfg)]"
    inits = "[f'weights/init-{init}-seed0.safetensors' for init in config.split_list(cfg.federate.inits)]"
    own = "cells/04_federate-age-seed0"
    last = {
        "01_data": "",
        "02_teacher": "import os\nif not (cfg.run_dir / 'again').exists():\n"
        f"    os.environ['{deadline.VARIABLE}'] = '0'\n",
        "03_distill": leave.format(names=inits),
        "04_federate": leave.format(names=f"['{own}/results.csv', '{own}/per_image.csv', *{weights}]"),
        "05_analysis": leave.format(names="[*cells.FILES, 'figures/fig2.png', 'figures/fig3.png']"),
    }
    for name, code in last.items():
        parts = ["# Parameters: none\nseed = 0", setup, f"{code}outputs.save(cfg, {name!r}, {{}})"]
        notebook = [{"cell_type": "code", "metadata": {}, "source": part, "outputs": []} for part in parts]
        notebook[0]["metadata"] = {"tags": ["parameters"]}
        text = json.dumps({"cells": notebook})
        (tmp_path / f"{name}.ipynb").write_text(text)
    monkeypatch.setattr(paths, "NOTEBOOKS", tmp_path)
    monkeypatch.setattr(preflight, "check", lambda cells: {"data": "images", "teacher": "weights"})
    monkeypatch.setattr(provenance, "commit", lambda: "")
    monkeypatch.delenv(deadline.VARIABLE, raising=False)


def test_no_notebook_is_begun_after_the_limit_and_the_rest_is_counted(tmp_path, notebooks):
    planned = plan(tmp_path / "run")
    assert run(planned) == [
        "01_data",
        "02_teacher",
        "the time is up: 3 of 5 notebooks and 6 of 6 rounds are left; the same command continues there",
    ]
    assert run(planned) == ["03_distill-seed0", "04_federate-age-seed0", "05_analysis"]
    assert run(planned, stop_at=0.0) == [], "a finished study is finished whatever the time"


def test_a_limit_before_anything_is_finished_is_a_mistake(tmp_path, notebooks):
    """A job that is queued again on exit code 75 would be queued forever."""
    with pytest.raises(UserError, match="give more --minutes") as caught:
        run(plan(tmp_path / "run"), stop_at=0.0)
    assert not isinstance(caught.value, OutOfTime)


def test_a_checkpoint_that_another_process_replaces_just_now_is_no_error(tmp_path):
    """Its name leads nowhere between the two renamings of `states.write_state`; so does this link."""
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "there.safetensors").write_text("a round")
    (tmp_path / "weights" / "away.safetensors").symlink_to(tmp_path / "nowhere")
    assert [file.stem for file in grid._finished_files(plan(tmp_path))] == ["there"]


# ------------------------------------------------------------------------------------------ some notebooks


def test_only_runs_a_notebook_and_what_it_needs(tmp_path):
    cfg = config.settings({"run_name": tmp_path})
    planned = grid.plan(cfg, [0, 1], ["iid", "age"], {"alpha": [0.5]})
    for keys, expected in (
        (["04_federate-age-seed1"], ["03_distill-seed1", "04_federate-age-seed1"]),
        (
            ["alpha=0.5/04_federate-age-seed0"],
            ["alpha=0.5/03_distill-seed0", "alpha=0.5/04_federate-age-seed0"],
        ),
        (["02_teacher", "01_data"], ["01_data", "02_teacher"]),
        (["05_analysis"], [cell.key for cell in planned]),
    ):
        assert [cell.key for cell in grid.only(planned, keys)] == expected
    with pytest.raises(UserError, match="--only 04_federate-site-seed0 is no notebook of this study"):
        grid.only(planned, ["04_federate-site-seed0"])


# ------------------------------------------------------------------------------------------ between rounds


def digests(folder) -> dict[str, tuple[str, list[str]]]:
    """Final weights of each run and start, and the digests of all rounds on the way."""
    return {
        file.stem: (
            states.state_digest(load_file(file)),
            [done["sha256"] for done in states.read_record(file).get("rounds", [])],
        )
        for file in (folder / "weights").glob("*.safetensors")
    }


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a study that never stopped."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    run(plan(folder))
    return folder


@pytest.mark.slow
def test_a_study_stopped_after_each_start_and_each_round_ends_in_the_same_bytes(tmp_path, whole, monkeypatch):
    """On one core, where trainings follow each other: of three starts two are trained, then 3 x 2 rounds."""
    write_state, finish_round = distill.write_state, runs.Run.finish_round

    def then_stop(function):
        def stopped(*arguments, **options):
            function(*arguments, **options)
            if function is finish_round or options["fit"]["images_seen"]:  # trained
                time_is_up()

        return stopped

    monkeypatch.setattr(distill, "write_state", then_stop(write_state))
    monkeypatch.setattr(runs.Run, "finish_round", then_stop(finish_round))
    monkeypatch.delenv(deadline.VARIABLE, raising=False)
    threads, stops = torch.get_num_threads(), []
    torch.set_num_threads(1)
    try:
        while (ended := run(plan(tmp_path / "run"))[-1]) != "05_analysis":
            stops.append(ended)
    finally:
        torch.set_num_threads(threads)
    left = [" ".join(stop.split()[4:13]) for stop in stops]
    assert left == [
        "3 of 5 notebooks and 6 of 6 rounds",  # pretraining is trained
        "2 of 5 notebooks and 6 of 6 rounds",  # fm is, and 03 is finished
        *(f"2 of 5 notebooks and {rounds} of 6 rounds" for rounds in (5, 4, 3, 2, 1)),
        "1 of 5 notebooks are left; the same command",
    ]
    assert digests(tmp_path / "run") == digests(whole)
    for name in ("results.csv", "per_image.csv"):
        one, two = (pd.read_csv(place / name).drop(columns="seconds", errors="ignore")
                    for place in (tmp_path / "run", whole))  # fmt: skip
        assert_frame_equal(one, two, check_exact=True)


@pytest.mark.slow
def test_a_kernel_stops_at_the_limit_too(tmp_path, whole, monkeypatch):
    """The starts are there and no round is begun."""
    planned = {cell.notebook: cell for cell in plan(tmp_path / "run")}
    (tmp_path / "run" / "weights").mkdir(parents=True)
    for file in (whole / "weights").glob("init-*"):
        (tmp_path / "run" / "weights" / file.name).write_bytes(file.read_bytes())
    before = sorted((tmp_path / "run").rglob("*"))
    with deadline.at(1.0), pytest.raises(OutOfTime, match="stands at round 0 of 2"):
        execute.in_kernel(planned["04_federate"], tmp_path / "executed.ipynb")
    assert sorted((tmp_path / "run").rglob("*")) == before

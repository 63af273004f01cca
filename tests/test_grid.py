"""What runs, in which order, with which parameters, once; and what is kept when something fails."""

import hashlib
import json
import multiprocessing
import os
import re
import signal
import sys
import threading
import time
import warnings
from pathlib import Path

import nbformat
import psutil
import pytest
import torch
from matplotlib import pyplot

from fmfl import config, data, paths, states, teacher
from fmfl.errors import UserError
from fmfl.study import cost, grid, outputs, preflight, provenance, stages
from fmfl.study.locks import CellLocks

ORDER = ["01_data", "02_teacher", "03_distill", "04_federate", "05_analysis"]
SPLITS = ["iid", "age", "quantity"]


def settings(folder: Path, **given) -> config.Settings:
    """The smallest study, with results in a folder."""
    tiny = {"size": 32, "num_phantoms": 40, "num_rounds": 2, "proxy_epochs": 1, "student": "tiny_unet"}
    return config.settings(tiny | {"run_name": folder, "inits": "random,fm"} | given)


# ------------------------------------------------------------------------------------------ the plan


def test_cells_stand_in_an_order_in_which_they_can_run(tmp_path):
    cells = grid.plan(settings(tmp_path), [0, 1], SPLITS)
    assert [cell.name for cell in cells] == [
        "01_data",
        "02_teacher",
        "03_distill-seed0",
        "04_federate-iid-seed0",
        "04_federate-age-seed0",
        "04_federate-quantity-seed0",
        "03_distill-seed1",
        "04_federate-iid-seed1",
        "04_federate-age-seed1",
        "04_federate-quantity-seed1",
        "05_analysis",
    ]
    for number, cell in enumerate(cells):
        assert set(cell.needs) <= {before.name for before in cells[:number]}
    assert set(cells[-1].needs) == {cell.name for cell in cells[:-1]}


@pytest.mark.parametrize(
    ("splits", "reference"), [(SPLITS, "age"), (["quantity", "iid"], "quantity"), (["iid"], "iid")]
)
def test_the_comparisons_of_table_1_are_trained_once_a_seed(tmp_path, splits, reference):
    """Under the reference split, age, or the first one where age is not asked for."""
    cells = [c for c in grid.plan(settings(tmp_path), [3, 4], splits) if c.notebook == "04_federate"]
    arms = {(c.cfg.federate.seed, c.cfg.federate.split): c.cfg.federate.arms for c in cells}
    assert arms == {
        (seed, split): "federated,centralised,standalone" if split == reference else "federated"
        for seed in (3, 4)
        for split in splits
    }


def test_a_split_without_an_arm_is_no_cell(tmp_path):
    cells = grid.plan(settings(tmp_path, arms="standalone"), [0], SPLITS)
    assert [c.name for c in cells if c.notebook == "04_federate"] == ["04_federate-age-seed0"]


def test_rounds_are_counted(tmp_path):
    """Two starts, and under age the pooled run and the standalone clients, which together are one run."""
    cells = grid.plan(settings(tmp_path, num_rounds=10), [0], ["iid", "age"])
    assert {c.name: c.rounds for c in cells if c.rounds} == {
        "04_federate-iid-seed0": 20,
        "04_federate-age-seed0": 40,
    }


def test_a_cell_gets_the_settings_it_depends_on_and_no_others(tmp_path):
    cells = {c.notebook: c.parameters for c in grid.plan(settings(tmp_path), [0], ["age"])}
    stages = {name: set(kind.__dataclass_fields__) for name, kind in config.STAGES.items()}
    where = {"run_name", "device", "cohort_device"}
    client = {"num_clients", "age_strength", "quantity_ratio", "images_without_age"}
    assert set(cells["01_data"]) == where | stages["data"] | client | {"seed"}
    of_predicted_boxes = {"precision", "proxy_epochs", "proxy_learning_rate", "batch_size", "augmentation"}
    assert set(cells["02_teacher"]) == (
        where | stages["data"] | stages["teacher"] | {"student"} | of_predicted_boxes
    )
    assert set(cells["03_distill"]) == (
        where | stages["data"] | stages["teacher"] | stages["distill"] | stages["sweep"]
        | {"precision", "deterministic", "track", "inits", "batch_size", "augmentation", "batch_norm", "seed"}
    )  # fmt: skip
    everything = set().union(*stages.values())
    assert set(cells["04_federate"]) == everything - stages["analysis"] - stages["sweep"]
    assert set(cells["05_analysis"]) == everything


def test_what_a_federation_does_not_know_of_its_analysis_may_differ(tmp_path):
    """05 takes a federation's results where all settings agree that the federation was given."""
    (cell,) = [c for c in grid.plan(settings(tmp_path), [0], ["iid"]) if c.notebook == "04_federate"]
    assert set(config.defaults()) - set(cell.parameters) <= set(outputs.FREE)


def test_every_injected_value_is_accepted(tmp_path):
    for cell in grid.plan(settings(tmp_path), [0, 7], SPLITS):
        assert {k: config.validate(k, v) for k, v in cell.parameters.items()} == cell.parameters


def test_seed_and_split_reach_their_cells(tmp_path):
    cells = grid.plan(settings(tmp_path), [5, 6], ["iid", "age"])
    asked = {c.name: (c.parameters.get("seed"), c.parameters.get("split")) for c in cells}
    assert asked == {
        "01_data": (5, None),  # shows the first seed's clients
        "02_teacher": (None, None),
        "03_distill-seed5": (5, None),
        "04_federate-iid-seed5": (5, "iid"),
        "04_federate-age-seed5": (5, "age"),
        "03_distill-seed6": (6, None),
        "04_federate-iid-seed6": (6, "iid"),
        "04_federate-age-seed6": (6, "age"),
        "05_analysis": (5, "age"),
    }


# ------------------------------------------------------------------------------------------ before it begins


def test_the_check_knows_the_images_and_the_weights_by_their_bytes(tmp_path):
    """And writes nothing: what it finds wrong, tests/test_cli.py has."""
    found = preflight.check(grid.plan(settings(tmp_path / "run"), [0, 1], SPLITS))
    assert found == {
        "data": data.load("phantom", size=32, num_phantoms=40).fingerprint,
        "teacher": hashlib.sha256(teacher.BUILTIN_WEIGHTS.read_bytes()).hexdigest(),
    }
    assert not (tmp_path / "run").exists()


# ------------------------------------------------------------------------------------------ what runs
# With notebooks that only leave the files of the real ones, so that a study takes milliseconds.

SETUP = """
from fmfl import config
from fmfl.study import cells, outputs, stages
cfg = config.from_notebook(globals())
def leave(*names):
    for name in names:
        file = cfg.run_dir / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("left behind")
"""
LEAVE = {
    "01_data": """
from matplotlib import pyplot
outputs.save_figure(cfg, "ages", pyplot.figure(figsize=(1, 1)))
outputs.save(cfg, "01_data", {"fingerprint": "these images"})
""",
    "02_teacher": """
outputs.save(cfg, "02_teacher", {"sha256": "these weights"})
""",
    "03_distill": """
outputs.save(cfg, "03_distill", {})
inits = config.split_list(cfg.federate.inits)
leave(*(f"weights/init-{init}-seed{cfg.federate.seed}.safetensors" for init in inits))
""",
    "04_federate": """
folder = outputs.save(cfg, "04_federate", {"images": "these images"}).relative_to(cfg.run_dir)
leave(folder / "results.csv", folder / "per_image.csv")
leave(*(f"weights/{name}.safetensors" for name in cells.training_runs(cfg)))
""",
    "05_analysis": """
outputs.save(cfg, "05_analysis", {})
leave(*cells.FILES, "figures/fig2.png", "figures/fig3.png")
""",
}


class Notebooks:
    """Notebooks in a folder of the test's own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in ORDER:
            self.write(name, LEAVE[name])

    def write(self, name: str, last_cell: str, text: str = "Some text.") -> None:
        cells = [
            nbformat.v4.new_markdown_cell(text, id="text"),
            nbformat.v4.new_code_cell(
                "# Parameters: none\nseed = 0", id="parameters", metadata={"tags": ["parameters"]}
            ),
            nbformat.v4.new_code_cell(SETUP, id="setup"),
            nbformat.v4.new_code_cell(last_cell, id="last"),
        ]
        python = {"language_info": {"name": "python"}}
        nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=python), self.folder / f"{name}.ipynb")


@pytest.fixture
def notebooks(tmp_path, monkeypatch):
    folder = tmp_path / "notebooks"
    folder.mkdir()
    monkeypatch.setattr(paths, "NOTEBOOKS", folder)
    monkeypatch.setattr(
        preflight, "check", lambda cells: {"data": "these images", "teacher": "these weights"}
    )
    monkeypatch.setattr(provenance, "commit", lambda: "")  # git takes longer than all the rest
    return Notebooks(folder)


def run(cfg, seeds=(0,), splits=("iid", "age"), **options) -> list[str]:
    """Names of the cells that ran."""
    said = []
    ran, done = grid.run(
        grid.plan(cfg, list(seeds), list(splits)),
        **{"plain": True, "progress": False} | options,
        say=said.append,
    )
    assert ran == len(said) and ran + done == 3 + len(seeds) * (1 + len(splits))
    return [line.split(":")[0] for line in said]


ALL = [
    "01_data",
    "02_teacher",
    "03_distill-seed0",
    "04_federate-iid-seed0",
    "04_federate-age-seed0",
    "05_analysis",
]
FEDERATE = ["04_federate-iid-seed0", "04_federate-age-seed0"]


def test_what_is_done_is_not_done_again(tmp_path, notebooks):
    cfg = settings(tmp_path / "run")
    assert run(cfg) == ALL
    assert run(cfg) == []


@pytest.mark.parametrize(
    ("changed", "again"),
    [
        ({"device": "cpu"}, []),
        ({"cohort_device": "host"}, []),
        ({"target_dice": 0.8}, ["05_analysis"]),
        ({"alpha_sweep": "0,1"}, ["03_distill-seed0", *FEDERATE, "05_analysis"]),
        ({"inits": "random,fm,pretraining"}, ["03_distill-seed0", *FEDERATE, "05_analysis"]),
    ],
)
def test_a_changed_setting_of_the_same_study_runs_what_depends_on_it(tmp_path, notebooks, changed, again):
    run(settings(tmp_path / "run"))
    assert run(settings(tmp_path / "run", **changed)) == again
    assert run(settings(tmp_path / "run", **changed)) == []


# ------------------------------------------------------------------------------------------ another study


def everything(folder: Path) -> dict[Path, bytes]:
    return {file.relative_to(folder): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


OTHER = {
    "deterministic": (True, "False there and True here"),
    "batch_norm": ("group", "'average' there and 'group' here"),
    "server": ("adam", "'average' there and 'adam' here"),
    "num_rounds": (3, "2 there and 3 here"),
    "learning_rate": (0.1, "0.001 there and 0.1 here"),
    "alpha": (0.5, "0.6 there and 0.5 here"),
    "jitter_pixels": (6.0, "5.0 there and 6.0 here"),
    "num_clients": (4, "3 there and 4 here"),
    "phantom_seed": (1, "0 there and 1 here"),
    "engine": ("flower", "'local' there and 'flower' here"),
}


@pytest.mark.parametrize(("name", "value"), [("teacher_noise", 1.0), ("privacy", "dp"), ("adapter", False)])
def test_a_study_made_with_a_parameter_that_has_gone_is_another_one(tmp_path, notebooks, name, value):
    folder = tmp_path / "run"
    run(settings(folder))
    record = folder / "cells" / "04_federate-age-seed0" / "cell.json"
    about = json.loads(record.read_text())
    about["settings"][name] = config.REMOVED[name]
    record.write_text(json.dumps(about))
    run(settings(folder))  # at its default it changed nothing
    about = json.loads(record.read_text())
    about["settings"][name] = value
    record.write_text(json.dumps(about))
    with pytest.raises(UserError, match=f"holds another study \\({name} is {value!r} there and 'gone' here"):
        run(settings(folder))


@pytest.mark.parametrize("name", OTHER)
def test_a_second_study_in_a_used_folder_is_refused(tmp_path, notebooks, name):
    """And it touches nothing."""
    value, said = OTHER[name]
    folder = tmp_path / "run"
    run(settings(folder))
    before = everything(folder)
    with pytest.raises(UserError) as caught:
        run(settings(folder, **{name: value}))
    assert str(caught.value) == (
        f"--out {folder} holds another study ({name} is {said}): name another folder, or add --replace, "
        f"which first moves that one to {folder}.1"
    )
    assert everything(folder) == before
    assert run(settings(folder)) == []


def test_the_first_three_differences_are_named(tmp_path, notebooks):
    run(settings(tmp_path / "run"))
    other = settings(tmp_path / "run", num_rounds=3, learning_rate=0.1, proximal=0.5, seed=1, batch_size=4)
    with pytest.raises(UserError, match=r"\(batch_size .*, num_rounds .*, learning_rate .* and 1 more\)"):
        run(other)


def test_replace_moves_another_study_aside_whole_and_says_so(tmp_path, notebooks):
    folder, said = tmp_path / "run", []
    (tmp_path / "run.1").mkdir()
    run(settings(folder))
    before = everything(folder)
    cells = grid.plan(settings(folder, num_rounds=3), [0], ["iid", "age"])
    grid.run(cells, plain=True, progress=False, replace_other=True, say=said.append)
    assert said[0] == f"{folder} held another study: it is now {folder}.2"
    assert [line.split(":")[0] for line in said[1:]] == ALL
    assert everything(tmp_path / "run.2") == before
    grid.run(cells, plain=True, progress=False, replace_other=True, say=said.append)
    assert len(said) == 1 + len(ALL) and not (tmp_path / "run.3").exists(), "the same study is no other"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs processes that begin as copies")
def test_a_study_that_is_being_run_is_not_moved(tmp_path, notebooks):
    cfg = settings(tmp_path / "run")
    run(cfg)
    held, cell = CellLocks(cfg.run_dir), grid.plan(cfg, [0], ["iid", "age"])[0]
    assert held.take([cell], lambda _: False) is cell

    def replace(_: int) -> None:
        with pytest.raises(UserError, match="another study that is being run"):
            run(settings(tmp_path / "run", num_rounds=3), replace_other=True)

    assert in_processes(1, replace) == [0]
    held.release(cell)


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        ({"data": "one image more", "teacher": "these weights"}, "data (by its bytes)"),
        ({"data": "these images", "teacher": "other weights"}, "teacher (by its bytes)"),
    ],
)
def test_other_images_or_weights_under_the_same_name_are_another_study(
    tmp_path, notebooks, monkeypatch, inputs, said
):
    run(settings(tmp_path / "run"))
    monkeypatch.setattr(preflight, "check", lambda cells: inputs)
    with pytest.raises(UserError, match=re.escape(f"({said} is 'of fingerprint these")):
        run(settings(tmp_path / "run"))


def test_the_same_images_in_another_place_are_no_other_study(tmp_path, notebooks):
    run(settings(tmp_path / "run"))
    assert run(settings(tmp_path / "run", data=str(tmp_path))) == ALL


def test_a_study_that_was_stopped_inside_a_cell_is_known_by_its_checkpoints(tmp_path, notebooks):
    """No record of a cell says yet what the rounds were made of."""
    cfg = settings(tmp_path / "run")
    made_of = {"settings": {"arm": "federated", "learning_rate": 0.25}, "data": "these images"}
    file = cfg.run_dir / "weights" / "federated-age-fm-seed0.safetensors"
    states.write_state(file, {"w": torch.ones(1)}, made_of=made_of, round_number=7)
    with pytest.raises(UserError, match=r"\(learning_rate is 0\.25 there and 0\.001 here\)"):
        run(cfg)
    made_of["settings"]["learning_rate"] = 0.001
    states.write_state(file, {"w": torch.ones(1)}, made_of=made_of | {"data": "theirs"}, round_number=7)
    with pytest.raises(UserError, match=r"\(data \(by its bytes\) is 'of fingerprint theirs'"):
        run(cfg)
    states.write_state(file, {"w": torch.ones(1)}, made_of=made_of, round_number=7)
    assert run(cfg) == ALL


def test_results_that_were_passed_on_without_their_cells_are_not_written_over(tmp_path, notebooks):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "results.csv").write_text("theirs")
    with pytest.raises(UserError, match=r"holds another study \(results.csv is"):
        run(settings(folder))
    about = {"settings": {"num_rounds": 100, "data": "rays"}, "data": {"fingerprint": "theirs"}}
    (folder / "manifest.json").write_text(json.dumps(about))
    with pytest.raises(UserError, match=r"\(num_rounds is 100 there and 2 here, data \(by its bytes\)"):
        run(settings(folder))
    assert (folder / "results.csv").read_text() == "theirs"


def test_a_variant_of_other_settings_than_the_studys_is_another_study(tmp_path, notebooks):
    cfg = settings(tmp_path / "run")
    own = settings(outputs.variant_dir(cfg, "labelled=10"), labelled=10.0, learning_rate=0.5)
    outputs.save(own, "04_federate", {"images": "these images"})
    with pytest.raises(UserError, match=r"\(learning_rate is 0\.5 there"):
        run(cfg)


def test_a_dry_run_says_too_that_the_folder_holds_another_study(tmp_path, notebooks):
    run(settings(tmp_path / "run"))
    cells = grid.plan(settings(tmp_path / "run", num_rounds=3), [0], ["age"])
    with pytest.raises(UserError, match="holds another study"):
        cost.estimate(cells)


def test_another_seed_or_split_runs_its_own_cells(tmp_path, notebooks):
    cfg = settings(tmp_path / "run")
    run(cfg)
    assert run(cfg, seeds=(0, 1)) == [
        "03_distill-seed1",
        "04_federate-iid-seed1",
        "04_federate-age-seed1",
        "05_analysis",
    ]
    assert run(cfg, seeds=(0, 1), splits=("iid", "age", "site")) == [
        "04_federate-site-seed0",
        "04_federate-site-seed1",
        "05_analysis",
    ]


def test_changed_code_of_a_notebook_runs_it_and_what_continues_it(tmp_path, notebooks):
    cfg = settings(tmp_path / "run")
    run(cfg)
    notebooks.write("03_distill", LEAVE["03_distill"] + "\n1 + 1")
    assert run(cfg) == ["03_distill-seed0", *FEDERATE, "05_analysis"]
    notebooks.write("05_analysis", LEAVE["05_analysis"] + "\n1 + 1")
    assert run(cfg) == ["05_analysis"]


def test_changed_text_and_outputs_of_a_notebook_run_nothing(tmp_path, notebooks):
    cfg = settings(tmp_path / "run")
    run(cfg)
    notebooks.write("02_teacher", LEAVE["02_teacher"], text="A better explanation.")
    file = notebooks.folder / "02_teacher.ipynb"
    content = nbformat.read(file, as_version=4)
    content.cells[-1].outputs = [nbformat.v4.new_output("stream", text="an output")]
    nbformat.write(content, file)
    assert run(cfg) == []


def test_changed_code_of_the_package_runs_everything(tmp_path, notebooks, monkeypatch):
    cfg = settings(tmp_path / "run")
    run(cfg)
    monkeypatch.setattr(states, "code_digest", lambda files: "other code")
    assert run(cfg) == ALL


def test_the_code_that_no_number_depends_on_is_left_out(tmp_path, notebooks, monkeypatch):
    seen = []
    monkeypatch.setattr(states, "code_digest", lambda files: seen.append(files) or "code")
    run(settings(tmp_path / "run"))
    every = {file.relative_to(paths.PACKAGE).as_posix() for file in paths.PACKAGE.rglob("*.py")}
    study = ("cli", "cost", "execute", "grid", "inspection", "interrupt", "locks", "merge", "options")
    study += ("predictions", "preflight", "progress", "scoring", "students", "verify")
    wings = {name for name in every if name.startswith(("course/", "widgets/"))}
    assert every - set(seen[0]) - wings == {
        *(f"study/{name}.py" for name in study),
        "__main__.py",
        "deadline.py",
        "export.py",
        "use.py",
        "flower/deploy.py",
    }


@pytest.mark.parametrize(
    ("file", "again"),
    [
        ("cells/02_teacher/cell.json", "02_teacher"),
        ("cells/02_teacher/done.json", "02_teacher"),
        ("notebooks/02_teacher.ipynb", "02_teacher"),
        ("figures/ages.png", "01_data"),
        ("weights/init-fm-seed0.safetensors", "03_distill-seed0"),
        ("cells/04_federate-iid-seed0/per_image.csv", "04_federate-iid-seed0"),
        ("weights/federated-iid-fm-seed0.safetensors", "04_federate-iid-seed0"),
        ("weights/centralised-pooled-random-seed0.safetensors", "04_federate-age-seed0"),
        ("weights/standalone-age-random-seed0-client2.safetensors", "04_federate-age-seed0"),
        ("report.html", "05_analysis"),
        ("table1.csv", "05_analysis"),
        ("figures/fig3.png", "05_analysis"),
    ],
)
def test_a_result_that_is_gone_is_made_again_by_its_cell_alone(tmp_path, notebooks, file, again):
    cfg = settings(tmp_path / "run")
    run(cfg)
    (cfg.run_dir / file).unlink()
    assert run(cfg) == [again]
    assert (cfg.run_dir / file).exists()


@pytest.mark.parametrize("damage", ["", "{", "[]", '"x"', '{"fingerprint": "another"}'])
def test_a_damaged_record_is_no_record(tmp_path, notebooks, damage):
    cfg = settings(tmp_path / "run")
    run(cfg)
    (cfg.run_dir / "cells" / "01_data" / "done.json").write_text(damage)
    assert run(cfg) == ["01_data"]


def test_what_a_killed_run_was_writing_is_removed(tmp_path, notebooks):
    cfg = settings(tmp_path / "run")
    run(cfg)
    before = sorted(cfg.run_dir.rglob("*"))
    for name in (
        "weights/.federated-iid-fm-seed0.safetensors.4711",
        ".results.csv.12",
        "figures/.fig2.png.12",
    ):
        (cfg.run_dir / name).write_text("half of")
    theirs = cfg.run_dir / "theirs"
    theirs.mkdir()
    kept = [cfg.run_dir / ".nobackup", cfg.run_dir / ".notes.2024", theirs / ".table.csv.12"]
    for file in kept:
        file.touch()
    assert run(cfg) == []
    assert sorted(cfg.run_dir.rglob("*")) == sorted([*before, theirs, *kept])


def test_what_another_run_began_to_overwrite_is_not_done(tmp_path, notebooks):
    """Run with some starts, fail with others after the first files, come back to the first."""
    fails = "assert cfg.federate.inits != 'fm', 'diverged'"
    notebooks.write("04_federate", LEAVE["04_federate"] + fails)
    run(settings(tmp_path / "run"))
    with pytest.raises(UserError, match=r"04_federate-iid-seed0 failed with AssertionError: diverged"):
        run(settings(tmp_path / "run", inits="fm"))
    assert run(settings(tmp_path / "run")) == ["03_distill-seed0", "04_federate-iid-seed0"]


def test_a_notebook_that_leaves_less_than_it_should_is_not_done(tmp_path, notebooks):
    cfg = settings(tmp_path / "run")
    notebooks.write("03_distill", "outputs.save(cfg, '03_distill', {})")
    with pytest.raises(UserError, match=r"03_distill-seed0\.ipynb ran but left no weights/init-random-seed0"):
        run(cfg)
    assert not (cfg.run_dir / "cells" / "03_distill-seed0" / "done.json").exists()


def test_rounds_are_counted_in_whole_numbers(tmp_path, monkeypatch):
    """Of six runs of two rounds: one ended, a pooled one and one of three standalone clients half way."""
    cfg = settings(tmp_path / "run")
    cells = grid.plan(cfg, [0], ["iid", "age"])
    rounds = {
        "federated-iid-fm-seed0": 2,
        "centralised-pooled-random-seed0": 1,
        "standalone-age-random-seed0-client0": 1,
    }
    monkeypatch.setattr(states, "read_record", lambda file: {"round_number": rounds.get(file.stem, 0)})
    assert grid._rounds_done(cells) == 3
    rounds |= {f"standalone-age-random-seed0-client{k}": 2 for k in range(3)}
    assert grid._rounds_done(cells) == 5


def test_the_bar_names_the_notebook_that_runs_and_its_number(tmp_path, notebooks, monkeypatch, capsys):
    """And it counts what is left alone: here two notebooks of six, of one and three estimated seconds."""
    cfg = settings(tmp_path / "run")
    run(cfg)
    notebooks.write("04_federate", LEAVE["04_federate"] + "import time; time.sleep(0.2)")
    asked = []

    def known(cells, plain):
        asked.extend(cell.key for cell in cells)
        return {cell.key: cost.Cost(0, 3.0 if "05" in cell.key else 1.0) for cell in cells}

    monkeypatch.setattr(cost, "of_checked", known)
    assert run(cfg, progress=True) == asked == [*FEDERATE, "05_analysis"]
    shown = capsys.readouterr().err
    titles = ["4 of 6: 04_federate-iid-seed0", "5 of 6: 04_federate-age-seed0", "6 of 6: 05_analysis"]
    assert [shown.index(title) for title in titles] == sorted(shown.index(title) for title in titles)
    assert "measuring this machine" in shown and "study 100%" in shown and "20%" in shown
    run(cfg, progress=True)
    assert capsys.readouterr().err == "", "nothing is measured where all is done"


# ------------------------------------------------------------------------------------------ the map's axes


def test_a_variant_differs_in_one_setting_and_trains_what_that_can_change(tmp_path):
    """A number of labels changes nothing about a random start, another learning rate does."""
    cfg = settings(tmp_path / "run")
    cells = grid.plan(cfg, [0], ["iid", "age"], {"labelled": [10.0], "learning_rate": [0.1]})
    variants = {cell.key: cell for cell in cells if cell.variant}
    assert list(variants) == [
        "labelled=10/03_distill-seed0",
        "labelled=10/04_federate-age-seed0",
        "learning_rate=0.1/03_distill-seed0",
        "learning_rate=0.1/04_federate-age-seed0",
    ]
    base, inits = cells[0].cfg.flat(), []
    for cell in variants.values():
        flat = cell.cfg.flat()
        free = {"run_name", "inits", "arms", "split", "seed"}
        changed = {name for name in base if flat[name] != base[name]} - free
        assert changed == {cell.variant.split("=")[0]}
        assert cell.cfg.run_dir == tmp_path / "run" / "vary" / cell.variant
        assert cell.cfg.federate.arms == "federated"
        inits.append(cell.cfg.federate.inits)
    assert inits == ["fm"] * 2 + ["random,fm"] * 2
    assert set(cells[-1].needs) == {cell.key for cell in cells[:-1]}


def test_a_variant_runs_beside_the_study_and_once(tmp_path, notebooks):
    cfg = settings(tmp_path / "run")

    def again(**vary):
        said = []
        grid.run(grid.plan(cfg, [0], ["age"], vary), plain=True, progress=False, say=said.append)
        return [line.split(":")[0] for line in said]

    own = [f"labelled=10/{name}" for name in ("03_distill-seed0", "04_federate-age-seed0")]
    assert again(labelled=[10.0])[-3:] == [*own, "05_analysis"]
    assert again(labelled=[10.0]) == []
    (tmp_path / "run/vary/labelled=10/cells/03_distill-seed0/cell.json").unlink()
    assert again(labelled=[10.0]) == own[:1]


# ------------------------------------------------------------------------------------------ several processes


def in_processes(number: int, task) -> list[int]:
    """Exit codes of processes that do a task at once; forked, so that they see the test's own notebooks."""
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=task, args=(k,)) for k in range(number)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    return [worker.exitcode for worker in workers]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs processes that begin as copies")
def test_two_processes_share_a_study_and_run_no_cell_twice(tmp_path, notebooks):
    for name in ORDER:
        notebooks.write(name, "import time; time.sleep(0.2)\n" + LEAVE[name])
    cfg = settings(tmp_path / "run")

    def work(number: int) -> None:
        said = []
        cells = grid.plan(cfg, [0, 1], ["iid", "age"])
        grid.run(cells, plain=True, progress=False, say=said.append)
        (tmp_path / f"said{number}").write_text("\n".join(line.split(":")[0] for line in said))

    assert in_processes(2, work) == [0, 0]
    one, other = ((tmp_path / f"said{number}").read_text().split() for number in (0, 1))
    assert one and other, "both had something to do"
    assert sorted(one + other) == sorted({*ALL, *(name.replace("seed0", "seed1") for name in ALL)})
    assert not (cfg.run_dir / "claims").exists()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs processes that begin as copies")
def test_what_a_dead_process_held_is_taken_over(tmp_path, notebooks):
    """It dies inside its first cell, which stays nobody's."""
    cfg = settings(tmp_path / "run")
    notebooks.write("01_data", "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)")

    assert in_processes(1, lambda _: run(cfg)) == [-signal.SIGKILL]
    assert (cfg.run_dir / "claims" / "01_data.lock").exists()
    notebooks.write("01_data", LEAVE["01_data"])
    assert run(cfg) == ALL


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs processes that begin as copies")
def test_what_another_process_is_writing_is_left_alone(tmp_path, notebooks):
    cfg = settings(tmp_path / "run")
    run(cfg)
    half = cfg.run_dir / "weights" / ".federated-iid-fm-seed0.safetensors.4711"
    half.write_text("half of")
    cell = grid.plan(cfg, [0], ["iid", "age"])[0]
    held = CellLocks(cfg.run_dir)
    assert held.take([cell], lambda _: False) is cell

    def look(_: int) -> None:
        other = CellLocks(cfg.run_dir)
        other.sweep()
        other.remove()  # as a process whose plan is done
        assert other.take([cell], lambda _: False) is None, "one process a cell"

    assert in_processes(1, look) == [0] and half.exists()
    held.release(cell)
    held.sweep()
    assert not half.exists()


SOCKETS = """
import json, pathlib
from ipykernel import get_connection_file
about = json.loads(pathlib.Path(get_connection_file()).read_text())
assert about["transport"] == "ipc" and pathlib.Path(about["ip"]).parent.stat().st_mode & 0o777 == 0o700
assert list(pathlib.Path(about["ip"]).parent.iterdir()) and not list(pathlib.Path.cwd().glob("*ipc*"))
with open({file!r}, "a") as file:
    print(about["ip"], file=file)
"""


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="TCP ports elsewhere")
def test_each_kernel_has_sockets_of_its_own(tmp_path, notebooks):
    """Those of two processes that start a kernel at the same instant; this one's surroundings stay."""
    file = tmp_path / "ips"
    for name in ("01_data", "02_teacher"):
        notebooks.write(name, SOCKETS.format(file=str(file)) + LEAVE[name])
    environment, folder = dict(os.environ), os.getcwd()
    assert run(settings(tmp_path / "run"), plain=False) == ALL
    assert os.getcwd() == folder and dict(os.environ) == environment
    one, other = (Path(line) for line in file.read_text().split())
    assert one.parent != other.parent and not one.parent.exists() and not other.parent.exists()


# ------------------------------------------------------------------------------------------ when it fails


def executed(cfg, name) -> nbformat.NotebookNode:
    """An executed notebook, valid and without anything that a later Jupyter will refuse."""
    with warnings.catch_warnings(action="error"):
        found = nbformat.read(cfg.run_dir / "notebooks" / f"{name}.ipynb", as_version=4)
        nbformat.validate(found)
    return found


def hidden(folder: Path) -> list[Path]:
    return [file for file in folder.rglob(".*") if file.is_file()]


@pytest.mark.parametrize("plain", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_notebook_that_fails_is_named_with_its_outputs(tmp_path, notebooks, plain):
    cfg = settings(tmp_path / "run")
    notebooks.write("02_teacher", "print('so far')\nx = 1 / 0\nprint('never')")
    with pytest.raises(UserError) as caught:
        run(cfg, plain=plain)
    sentence, output = str(caught.value), cfg.run_dir / "notebooks" / "02_teacher.ipynb"
    assert "notebook 02_teacher failed with ZeroDivisionError: division by zero" in sentence
    assert str(output) in sentence and "\n" not in sentence
    outputs = [out for cell in executed(cfg, "02_teacher").cells for out in cell.get("outputs", [])]
    assert any("so far" in out.get("text", "") for out in outputs)
    (error,) = [out for out in outputs if out.output_type == "error"]
    assert error.ename == "ZeroDivisionError" and "division by zero" in "".join(error.traceback)
    assert not (cfg.run_dir / "cells" / "02_teacher").exists()
    assert not (cfg.run_dir / "cells" / "03_distill-seed0").exists()
    assert hidden(cfg.run_dir) == []

    notebooks.write("02_teacher", LEAVE["02_teacher"])
    assert run(cfg) == ALL[1:]  # it goes on where it failed


def test_a_persons_mistake_in_a_notebook_is_its_sentence_alone(tmp_path, notebooks):
    """By papermill too: tests/test_notebooks.py."""
    notebooks.write("01_data", "from fmfl.errors import UserError\nraise UserError('mend this file')")
    with pytest.raises(UserError, match=r"^mend this file$"):
        run(settings(tmp_path / "run"))


def test_without_the_studys_bar_there_are_no_bars_at_all(tmp_path, notebooks, monkeypatch):
    """And afterwards the environment is what it was."""
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    seen = "assert not stages.show_bars()"
    notebooks.write("01_data", LEAVE["01_data"] + seen)
    run(settings(tmp_path / "run"), progress=False)
    assert stages.show_bars()
    monkeypatch.setenv("TQDM_DISABLE", "yes")
    run(settings(tmp_path / "other"), progress=False)
    assert os.environ["TQDM_DISABLE"] == "yes"


@pytest.mark.slow
def test_a_kernel_that_dies_is_one_sentence(tmp_path, notebooks):
    """As when the system ends it because memory is short."""
    cfg = settings(tmp_path / "run")
    notebooks.write("01_data", "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)")
    with pytest.raises(UserError, match=r"^notebook 01_data failed with DeadKernelError: .*01_data.ipynb$"):
        run(cfg, plain=False)
    assert not list(cfg.run_dir.rglob("done.json"))


@pytest.mark.slow
def test_ctrl_c_ends_the_kernel_too(tmp_path, notebooks, handled):
    handled(signal.SIGINT, signal.default_int_handler)  # a shell's background command ignores it
    cfg, pid = settings(tmp_path / "run"), tmp_path / "pid"
    wait = (
        f"import os, pathlib, time\npathlib.Path({str(pid)!r}).write_text(str(os.getpid()))\ntime.sleep(600)"
    )
    notebooks.write("01_data", wait)

    def stop() -> None:
        until = time.monotonic() + 60
        while not (pid.exists() and pid.read_text()) and time.monotonic() < until:
            time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=stop, daemon=True).start()
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run(cfg, plain=False)
    assert time.monotonic() - started < 90
    until = time.monotonic() + 10
    while psutil.pid_exists(int(pid.read_text())) and time.monotonic() < until:
        time.sleep(0.1)
    assert not psutil.pid_exists(int(pid.read_text()))
    notebooks.write("01_data", LEAVE["01_data"])
    assert run(cfg) == ALL


def test_without_papermill_the_way_out_is_named(tmp_path, notebooks, monkeypatch):
    monkeypatch.setitem(sys.modules, "papermill", None)
    with pytest.raises(UserError, match="--plain"):
        run(settings(tmp_path / "run"), plain=False)


def test_plain_runs_the_same_cells_as_a_kernel_would(tmp_path, notebooks):
    """A last expression is shown, `;` hides it, figures go to no window; names live on between cells."""
    cfg = settings(tmp_path / "run")
    notebooks.write("01_data", LEAVE["01_data"] + "print('printed')\n6 * 7")
    figure = "from matplotlib import pyplot\npyplot.plot([1, 2])\n"
    notebooks.write("02_teacher", LEAVE["02_teacher"] + figure + "6 * 7;")
    run(cfg)
    first, second = executed(cfg, "01_data"), executed(cfg, "02_teacher")
    assert [out.text for out in first.cells[-1].outputs] == ["printed\n42\n"]
    assert second.cells[-1].outputs == [] and pyplot.get_fignums() == []
    (injected,) = [c for c in first.cells if "injected-parameters" in c.metadata.get("tags", [])]
    names = {}
    exec(injected.source, names)
    wanted = grid.plan(cfg, [0], ["iid", "age"])[0].parameters
    assert {name: names[name] for name in wanted} == wanted
    assert first.cells.index(injected) == 2  # after the notebook's own parameters, before the set-up


def test_results_can_be_written_to_a_new_folder_and_not_to_a_file(tmp_path):
    preflight.check_folder(tmp_path / "new" / "folder")
    assert list((tmp_path / "new" / "folder").iterdir()) == []
    (tmp_path / "file").touch()
    for name in ("file", "file/below"):
        with pytest.raises(UserError, match=re.escape(str(tmp_path / name))):
            preflight.check_folder(tmp_path / name)

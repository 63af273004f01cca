"""A whole study in the smallest size: every file of it, what stands in them, and that it can be stopped.

The studies are slow tests; what a cell leaves behind and how cells come together is tested without training.
"""

import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path

import nbformat
import pandas as pd
import pytest
import torch
from matplotlib import pyplot
from pandas.testing import assert_frame_equal
from safetensors.torch import load_file

import fmfl
from fmfl import config, data, models, paths, split, states, teacher, train
from fmfl.errors import UserError
from fmfl.study import grid, manifest, outputs, provenance, stages

TINY = {
    "size": 32,
    "num_phantoms": 40,
    "num_rounds": 2,
    "local_epochs": 2,
    "proxy_epochs": 3,
    "student": "tiny_unet",
}
SPLITS = ["iid", "age"]
INITS = ["random", "pretraining", "fm"]
RESULTS = ["arm", "init", "split", "seed", "round", "dice", "iou", "hd95", "seconds", "bytes_up"]
RESULTS += ["bytes_down", "images_seen"]
PER_IMAGE = ["arm", "init", "split", "seed", "client", "image_id", "patient_id", "site", "age"]
PER_IMAGE += ["dice", "iou", "hd95", "assd"]
WEIGHTS = {
    *(f"init-{init}-seed0" for init in INITS),
    "variant-alpha1-temperature1-soft-cached-seed0",
    *(f"federated-{split}-{init}-seed0" for split in SPLITS for init in INITS),
    "centralised-pooled-random-seed0",
    *(f"standalone-age-random-seed0-client{k}" for k in range(3)),
}
CELLS = ["01_data", "02_teacher", "03_distill-seed0", "04_federate-iid-seed0", "04_federate-age-seed0"]
CELLS += ["05_analysis"]


def run(folder: Path, splits=SPLITS, *, plain: bool = True) -> list[str]:
    """Names of the cells that ran."""
    cfg, said = config.settings(TINY | {"run_name": folder}), []
    grid.run(grid.plan(cfg, [0], splits), plain=plain, progress=False, say=said.append)
    return [line.split(":")[0] for line in said]


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> Path:
    """The folder of a finished study."""
    folder = tmp_path_factory.mktemp("study") / "run"
    assert run(folder) == CELLS
    return folder


def table(folder: Path, name: str) -> pd.DataFrame:
    return pd.read_csv(folder / name)


def digests(folder: Path) -> dict[str, str]:
    return {f.stem: states.state_digest(load_file(f)) for f in (folder / "weights").glob("*.safetensors")}


def assert_same_study(folder: Path, whole: Path) -> None:
    """All but the time that it took, for the splits that the folder holds."""
    held = {*table(folder, "results.csv").split}
    for name in ("results.csv", "per_image.csv", "table1.csv"):
        one, two = (table(place, name).drop(columns="seconds", errors="ignore") for place in (folder, whole))
        assert_frame_equal(one, two[two.split.isin(held)].reset_index(drop=True), check_exact=True)
    states_here, states_there = digests(folder), digests(whole)
    assert {"init-fm-seed0", "federated-age-fm-seed0"} <= states_here.keys()
    assert states_here == {name: states_there[name] for name in states_here}


# ------------------------------------------------------------------------------------------ a whole study


@pytest.mark.slow
def test_a_study_leaves_every_file_of_the_contract_and_nothing_half_written(done):
    for name in ("results.csv", "per_image.csv", "table1.csv", "claims.csv", "report.html", "manifest.json"):
        assert (done / name).stat().st_size > 100
    assert {file.stem for file in (done / "weights").glob("*")} == WEIGHTS
    assert {file.stem for file in (done / "notebooks").glob("*")} == set(CELLS)
    figures = {file.stem for file in (done / "figures").glob("*")}
    shown = {"fig2", "fig3", "images", "clients_age", "teacher_gallery", "dice_by_round_iid_seed0", "why"}
    assert shown <= figures
    assert all(f.read_bytes()[:4] == b"\x89PNG" for f in (done / "figures").glob("*"))
    assert list(done.rglob(".*")) == []
    known = {"results.csv", "per_image.csv", "table1.csv", "claims.csv", "differences.csv", "cost.csv"}
    known |= {f"{name}.csv" for name in ("gap", "speed", "weakest", "drift", "starts", "gains", "by_variant")}
    known |= {"report.html", "manifest.json", "MODEL_CARD.md", "weights", "notebooks", "figures", "cells"}
    assert {file.name for file in done.iterdir()} == known


@pytest.mark.slow
def test_results_have_a_row_for_each_run_and_round(done):
    results = table(done, "results.csv")
    assert list(results.columns) == RESULTS
    runs = {("federated", init, split) for init in INITS for split in SPLITS}
    runs |= {("centralised", "random", "pooled"), ("standalone", "random", "age")}
    rows = list(results[["arm", "init", "split", "seed", "round"]].itertuples(index=False, name=None))
    assert sorted(rows) == sorted((*run, 0, number) for run in runs for number in (0, 1, 2))
    assert results[["dice", "iou"]].stack().between(0, 1).all()
    assert results.notna().all().all()
    assert (results.groupby(["arm", "init", "split"]).seconds.diff().dropna() > 0).all()


@pytest.mark.slow
def test_bytes_are_the_clients_states_both_ways_each_round(done):
    """Nothing travels where nobody averages."""
    state = models.build("tiny_unet").state_dict()
    size = sum(value.nelement() * value.element_size() for value in state.values())
    results = table(done, "results.csv")
    expected = results["round"] * 3 * size * (results.arm == "federated")
    assert (results.bytes_up == expected).all() and (results.bytes_down == expected).all()


@pytest.mark.slow
def test_images_seen_are_counted_by_hand(done):
    """A start pays for 3 passes of the proxy set, a round for 2 local passes of all federated images."""
    counts = json.loads((done / "manifest.json").read_text())["data"]
    assert counts["proxy"] + counts["test"] + counts["federated"] == counts["images"] == 40
    results = table(done, "results.csv")
    expected = 3 * counts["proxy"] * (results.init != "random") + 2 * counts["federated"] * results["round"]
    assert (results.images_seen == expected).all()


@pytest.mark.slow
def test_all_runs_begin_as_their_start_and_the_comparisons_as_random(done):
    first = table(done, "results.csv").query("round == 0").set_index(["arm", "init", "split"]).dice
    for init in INITS:
        assert first["federated", init, "iid"] == first["federated", init, "age"]
    for run in (("centralised", "random", "pooled"), ("standalone", "random", "age")):
        assert first[run] == pytest.approx(first["federated", "random", "age"], abs=1e-12)
    found = digests(done)
    assert len(set(found.values())) == len(found), "no two runs end in the same weights"


@pytest.mark.slow
def test_the_scores_by_image_are_those_of_the_last_round(done):
    """Their means are the rows of results.csv; standalone clients count alike."""
    images, results = table(done, "per_image.csv"), table(done, "results.csv")
    assert list(images.columns) == PER_IMAGE
    key = ["arm", "init", "split", "seed"]
    tested = json.loads((done / "manifest.json").read_text())["data"]["test"]
    assert set(images.groupby([*key, "client"]).image_id.nunique()) == {tested}
    assert len(images) == tested * (6 + 1 + 3)
    assert set(images[images.arm == "standalone"].client) == {0, 1, 2}
    assert set(images[images.arm != "standalone"].client) == {-1}
    last = results[results["round"] == 2].set_index(key)[["dice", "iou", "hd95"]].sort_index()
    means = images.groupby(key)[["dice", "iou", "hd95"]].mean()
    assert_frame_equal(means, last, rtol=1e-6, check_like=True)


@pytest.mark.slow
def test_table_1_is_of_the_reference_split(done):
    results = table(done, "results.csv")
    last = results[results["round"] == 2].set_index(["arm", "init", "split"]).dice
    found = table(done, "table1.csv").set_index("init")
    assert list(found.index) == INITS and set(found.split) == {"age"}
    for init in INITS:
        assert found.federated[init] == pytest.approx(100 * last["federated", init, "age"], abs=1e-3)
    assert found.centralised["random"] == pytest.approx(
        100 * last["centralised", "random", "pooled"], abs=1e-3
    )
    assert found.standalone["random"] == pytest.approx(100 * last["standalone", "random", "age"], abs=1e-3)
    assert found[["centralised", "standalone"]].drop("random").isna().all().all()


@pytest.mark.slow
def test_the_manifest_is_true(done):
    manifest = json.loads((done / "manifest.json").read_text())
    assert manifest["fmfl"] == fmfl.__version__
    assert manifest["commit"] == provenance.commit()
    for package, version in manifest["versions"].items():
        wanted = sys.version.split()[0] if package == "python" else importlib.metadata.version(package)
        assert version == wanted
    assert manifest["device"]["kind"] in ("cpu", "cuda") and manifest["device"]["name"]
    if manifest["device"]["kind"] == "cpu":
        assert manifest["device"]["name"] == provenance.processor()
        assert manifest["device"]["instructions"] == torch.backends.cpu.get_cpu_capability()
    cohort = data.load("phantom", size=32, num_phantoms=40)
    assert manifest["data"]["fingerprint"] == cohort.fingerprint
    assert manifest["data"]["patients"] == cohort.table.patient_id.nunique()
    weights = teacher.BUILTIN_WEIGHTS.read_bytes()
    assert manifest["teacher"]["sha256"] == hashlib.sha256(weights).hexdigest()
    assert manifest["student"]["parameters"] == models.num_parameters(models.build("tiny_unet"))
    compared = {name for name in digests(done) if name.startswith("variant-")}  # no run begins there
    assert manifest["weights"] == {
        f"{name}.safetensors": digest for name, digest in digests(done).items() if name not in compared
    }
    assert set(manifest["cells"]) == set(CELLS) - {"05_analysis"}
    settings = manifest["settings"]
    assert (settings.pop("seeds"), settings.pop("splits"), settings.pop("inits")) == ([0], SPLITS, INITS)
    assert settings.pop("arms") == sorted(config.ARMS)
    # One of the splits deals by age, so the study has decided.
    flat = config.settings(TINY | {"run_name": "run", "images_without_age": "leave_out"}).flat()
    assert settings == {name: flat[name] for name in flat if name not in ("seed", "split", "inits", "arms")}


@pytest.mark.slow
def test_what_is_passed_on_does_not_tell_where_it_lay(done):
    for name in ("manifest.json", "report.html", "MODEL_CARD.md", "results.csv", "per_image.csv"):
        assert str(done.parent) not in (done / name).read_text(encoding="utf-8")


@pytest.mark.slow
def test_executed_notebooks_hold_code_parameters_and_outputs(done):
    for file in (done / "notebooks").glob("*.ipynb"):
        with warnings.catch_warnings(action="error"):
            executed = nbformat.read(file, as_version=4)
            nbformat.validate(executed)
        source = nbformat.read(paths.NOTEBOOKS / f"{file.stem.split('-')[0]}.ipynb", as_version=4)
        injected = [c for c in executed.cells if "injected-parameters" in c.metadata.get("tags", [])]
        assert [c.source for c in executed.cells if c not in injected] == [c.source for c in source.cells]
        assert len(injected) == 1
        assert ("num_rounds = 2" in injected[0].source) == file.stem.startswith(("04", "05"))
        outputs = [out for c in executed.cells if c.cell_type == "code" for out in c.outputs]
        assert outputs and not [out for out in outputs if out.output_type == "error"]


@pytest.mark.slow
def test_running_again_runs_and_writes_nothing(done):
    before = {file: file.stat().st_mtime_ns for file in done.rglob("*")}
    assert run(done) == []
    assert {file: file.stat().st_mtime_ns for file in done.rglob("*")} == before


@pytest.mark.slow
def test_a_cell_that_runs_again_finds_its_training_done(done, tmp_path):
    """And a state that is gone is trained again to the same bytes, alone."""
    folder = tmp_path / "run"
    shutil.copytree(done, folder)
    gone = "federated-age-fm-seed0.safetensors"
    (folder / "weights" / gone).unlink()
    before = {file.name: file.stat().st_mtime_ns for file in (folder / "weights").iterdir()}
    assert run(folder) == ["04_federate-age-seed0"]
    after = {file.name: file.stat().st_mtime_ns for file in (folder / "weights").iterdir()}
    assert {name: when for name, when in after.items() if name != gone} == before
    assert_same_study(folder, done)


@pytest.mark.slow
def test_jupyter_and_plain_end_in_the_same_study(done, tmp_path, monkeypatch):
    """So do two runs of one study in two folders. Kernels leave figures, and neither bars nor warnings."""
    monkeypatch.setenv("FMFL_CACHE", str(tmp_path / "cache"))  # so that the teacher is asked in the kernel
    monkeypatch.setenv("MPLBACKEND", "Agg")
    ran = run(tmp_path / "run", ["age"], plain=False)
    assert ran == [name for name in CELLS if "iid" not in name]
    assert_same_study(tmp_path / "run", done)
    for name in ran:
        executed = nbformat.read(tmp_path / "run" / "notebooks" / f"{name}.ipynb", as_version=4)
        outputs = [out for c in executed.cells if c.cell_type == "code" for out in c.outputs]
        assert any("image/png" in out.get("data", {}) for out in outputs), f"{name} shows no figure"
        assert not [out for out in outputs if out.get("name") == "stderr"], f"{name} has a warning or a bar"
        assert not [out for out in outputs if "widget" in str(out.get("data", {}).keys())], (
            f"{name} has a bar"
        )


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs a signal that cannot be handled")
def test_a_study_killed_at_any_time_goes_on_and_ends_in_the_same_files(done, tmp_path):
    """Killed in the distillation, and between two rounds."""
    folder = tmp_path / "run"
    command = [sys.executable, "-c", "from fmfl.study.cli import main; main()", "study", "--plain"]
    command += ["--profile", "smoke", "--out", str(folder), "--splits", "age"]
    command += [part for name, value in TINY.items() for part in ("-p", f"{name}={value}")]
    weights = folder / "weights"
    for sign in (
        weights / "init-random-seed0.safetensors",
        weights / "federated-age-pretraining-seed0.safetensors",
    ):
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            while not sign.exists() and process.poll() is None:
                time.sleep(0.001)
            time.sleep(random.uniform(0, 0.2))
            os.kill(process.pid, signal.SIGKILL)
        assert process.returncode == -signal.SIGKILL, f"it ended before {sign.name}"
        assert not (folder / "report.html").exists()
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert "01_data" not in ended.stdout and "05_analysis" in ended.stdout
    assert_same_study(folder, done)
    assert list(folder.rglob(".*")) == []


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs a signal that cannot be handled")
def test_two_processes_that_share_a_study_and_are_stopped_end_in_the_files_of_one(done, tmp_path):
    """One is killed inside a cell, the other goes on, a third comes to help; then nothing is left to run."""
    folder = tmp_path / "run"
    command = [sys.executable, "-c", "from fmfl.study.cli import main; main()", "study", "--plain"]
    command += ["--profile", "smoke", "--out", str(folder), "--splits", ",".join(SPLITS)]
    command += [part for name, value in TINY.items() for part in ("-p", f"{name}={value}")]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **quiet) as one, subprocess.Popen(command, **quiet) as other:
        while not (folder / "weights" / "init-random-seed0.safetensors").exists():
            assert one.poll() is None and other.poll() is None, "it ended too soon"
            time.sleep(0.01)
        os.kill(one.pid, signal.SIGKILL)
        with subprocess.Popen(command, **quiet) as third:
            for process in (other, third):
                assert process.wait(300) == 0, process.stderr.read()
    assert_same_study(folder, done)
    assert not (folder / "claims").exists() and list(folder.rglob(".*")) == []
    assert run(folder) == []


# ------------------------------------------------------------------------------------------ few masks


def few(**given) -> tuple[config.Settings, data.Cohort, split.Holdout]:
    tiny = {"size": 32, "num_phantoms": 60, "student": "tiny_unet", "proxy_epochs": 1}
    cfg = config.settings(tiny | given)
    cohort = stages.load_cohort(cfg)
    return cfg, cohort, stages.holdout(cfg, cohort)


def test_a_smaller_budget_of_labels_lies_within_a_larger_one():
    parts = few()[2]
    chosen = []
    for budget in (0, 3, 0.5, 1.0):
        own = config.settings({"labelled": float(budget)})
        chosen.append(set(stages.labelled(own, parts.proxy).nonzero()[:, 0].tolist()))
    n = len(parts.proxy)
    assert [len(some) for some in chosen] == [0, 3, round(0.5 * n), n]
    assert chosen[0] < chosen[1] < chosen[2] < chosen[3]
    other = config.settings({"labelled": 3.0, "seed": 1})
    assert set(stages.labelled(other, parts.proxy).nonzero()[:, 0].tolist()) != chosen[1]
    with pytest.raises(UserError, match=f"labelled is 1000, but the proxy set has {n} images"):
        stages.labelled(config.settings({"labelled": 1000.0}), parts.proxy)


@pytest.mark.parametrize("box_rule", ["whole_image", "predicted"])
def test_masks_outside_the_budget_are_never_looked_at(tmp_path, monkeypatch, box_rule):
    """With boxes that need none: the starts are the same bytes whatever those masks hold."""
    monkeypatch.setattr(paths, "CACHE", tmp_path)
    cfg, cohort, parts = few(labelled=4.0, box_rule=box_rule, run_name=str(tmp_path / "a"))
    hidden = parts.proxy[~stages.labelled(cfg, parts.proxy)]
    inits = ("random", "pretraining", "fm")
    one = stages.initial_states(cfg, cohort, parts.proxy, inits)
    cohort.masks[hidden] = 1 - cohort.masks[hidden]
    cfg = replace(cfg, run=replace(cfg.run, run_name=str(tmp_path / "b")))
    other = stages.initial_states(cfg, cohort, parts.proxy, inits)
    for init in inits:
        assert not one[init].reused and not other[init].reused
        assert states.state_digest(one[init].state) == states.state_digest(other[init].state)
    seen = [one[init].fit.images_seen for init in inits]
    n = len(parts.proxy)
    assert seen[0] == 0 and seen[2] == n and abs(seen[1] - n) < 4, "as many images as the other start"


def test_where_there_is_no_mask_the_teachers_stands_in(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "CACHE", tmp_path)
    cfg, cohort, parts = few(labelled=0.0, box_rule="whole_image", run_name=str(tmp_path / "a"))
    taught = stages.taught(cfg, cohort, parts.proxy).examples
    stands = taught.masks[parts.proxy]
    assert torch.equal(stands, (taught.teacher_logits > 0).to(stands.dtype))
    assert torch.equal(taught.masks[parts.test], cohort.masks[parts.test])
    with pytest.raises(UserError, match="labelled is 0: leave pretraining out of inits"):
        stages.initial_states(cfg, cohort, parts.proxy, ["pretraining"])
    predicted = replace(cfg, teacher=replace(cfg.teacher, box_rule="predicted"))
    with pytest.raises(UserError, match="needs proxy images with masks"):
        stages.initial_states(predicted, cohort, parts.proxy, ["fm"])
    fresh = replace(cfg, distill=replace(cfg.distill, teacher_views="fresh"))
    with pytest.raises(UserError, match="teacher_views 'fresh' needs a mask of every proxy image"):
        stages.initial_states(fresh, cohort, parts.proxy, ["fm"])


# ------------------------------------------------------------------------------------------ cells, untrained


def cell(
    folder: Path, *, split="age", seed=0, dice=0.5, arms=("federated",), pixels="a", code="b", **given
) -> config.Settings:
    """One 04_federate cell as its notebook leaves it; dice after the only round."""
    cfg = config.settings({"run_name": folder, "num_rounds": 1, "split": split, "seed": seed} | given)
    rows, images = [], []
    for arm in arms:
        about = {"arm": arm, "init": "random", "split": "pooled" if arm == "centralised" else split}
        about |= {"seed": seed}
        spent = {"seconds": seed, "bytes_up": 0, "bytes_down": 0, "images_seen": 0}
        rows += [about | {"round": k, "dice": k * dice, "iou": 0.1, "hd95": 1.0} | spent for k in (0, 1)]
        images.append(about | {"client": -1, "image_id": "a", "patient_id": "p", "dice": dice})
    record = {"images": pixels, "code": code}
    outputs.save(cfg, "04_federate", record, results=pd.DataFrame(rows), per_image=pd.DataFrame(images))
    return cfg


def test_a_cell_is_named_by_what_it_depends_on():
    cfg = config.settings({"split": "iid", "seed": 3})
    names = [outputs.cell_name(cfg, name) for name in config.NOTEBOOKS]
    assert names == ["01_data", "02_teacher", "03_distill-seed3", "04_federate-iid-seed3", "05_analysis"]


def test_a_cells_record_says_what_made_it(tmp_path):
    cfg = config.settings({"run_name": tmp_path, "seed": 3})
    folder = outputs.save(cfg, "03_distill", {"weighs": 1}, losses=pd.DataFrame({"loss": [0.25]}))
    assert folder == tmp_path / "cells" / "03_distill-seed3"
    about = outputs.read_json(folder / "cell.json")
    assert about["settings"] == cfg.flat() and about["record"] == {"weighs": 1}
    assert about["run"]["versions"]["torch"] == importlib.metadata.version("torch")
    assert (folder / "losses.csv").read_text() == "loss\n0.25\n"
    assert sorted(file.name for file in folder.iterdir()) == ["cell.json", "losses.csv"]


def test_cells_come_together_whatever_seed_split_and_arms_they_have(tmp_path):
    cell(tmp_path, split="iid")
    cell(tmp_path, split="age", seed=1)
    cfg = cell(tmp_path, split="age", arms=("federated", "centralised"))
    results, images, others = outputs.collect(cfg)
    assert others == []
    assert set(zip(results.arm, results.split, results.seed, strict=True)) == {
        ("federated", "iid", 0),
        ("federated", "age", 0),
        ("federated", "age", 1),
        ("centralised", "pooled", 0),
    }
    assert len(results) == 8 and len(images) == 4


def test_names_of_images_stay_as_they_are(tmp_path):
    """Read as numbers, 01 and 1 would be one image, and NA none."""
    cfg = cell(tmp_path)
    file = tmp_path / "cells" / outputs.cell_name(cfg, "04_federate") / "per_image.csv"
    row = pd.read_csv(file).iloc[0].to_dict()
    names = ["01", "1", "1.0", "NA"]
    pd.DataFrame([row | {"image_id": name, "patient_id": name} for name in names]).to_csv(file, index=False)
    _, images, _ = outputs.collect(cfg)
    assert images.image_id.tolist() == names == images.patient_id.tolist()


def test_a_run_that_two_cells_hold_counts_once(tmp_path):
    """As the centralised one does that was trained under two splits."""
    cell(tmp_path, split="iid", arms=("federated", "centralised"))
    results, images, _ = outputs.collect(cell(tmp_path, arms=("federated", "centralised")))
    assert (results.arm == "centralised").sum() == 2 and (images.arm == "centralised").sum() == 1


def test_two_results_for_one_run_are_refused(tmp_path):
    cell(tmp_path, split="iid", arms=("centralised",), dice=0.25)
    with pytest.raises(UserError, match="two different results for one run"):
        outputs.collect(cell(tmp_path, arms=("centralised",)))


@pytest.mark.parametrize("other", [{"pixels": "c"}, {"code": "c"}])
def test_cells_of_other_images_or_other_code_are_not_mixed(tmp_path, other):
    cell(tmp_path, split="iid", **other)
    with pytest.raises(UserError, match="made from different images or by different code"):
        outputs.collect(cell(tmp_path))


def test_an_analysis_that_knows_its_folder_alone_takes_the_settings_of_the_run(tmp_path):
    """Those of two cells of three; seeds and splits are no settings of the run, target_dice is its own."""
    made = {"num_rounds": 1, "learning_rate": 0.5, "size": 64, "student": "tiny_unet", "data": str(tmp_path)}
    cell(tmp_path, split="iid", **made)
    cell(tmp_path, split="age", seed=4, **made)
    cell(tmp_path, split="quantity", learning_rate=0.25)
    asked = config.settings({"run_name": tmp_path, "target_dice": 0.8})
    cfg = outputs.of_run(asked, ["run_name", "target_dice"])
    assert cfg.changed() == made | {"run_name": str(tmp_path), "target_dice": 0.8}
    results, _, others = outputs.collect(cfg)
    assert set(results.split) == {"iid", "age"} and others == ["04_federate-quantity-seed0"]


def test_what_is_given_to_an_analysis_and_differs_from_the_run_is_named(tmp_path):
    """Also where it is given the default: nothing tells that apart in the settings."""
    cell(tmp_path, num_rounds=1, learning_rate=0.5, size=64)
    asked = config.settings({"run_name": tmp_path, "size": 96})
    with pytest.raises(
        UserError, match=r"other settings alone \(size is 64 there and 96 here\): give the run's"
    ):
        outputs.collect(outputs.of_run(asked, ["run_name", "size"]))


def test_an_analysis_of_a_folder_without_results_stays_as_it_is(tmp_path):
    outputs.save(config.settings({"run_name": tmp_path, "size": 64}), "01_data", {})
    asked = config.settings({"run_name": tmp_path})
    assert outputs.of_run(asked, []) == asked


def test_an_analysis_of_images_of_unknown_age_follows_the_study(tmp_path):
    cell(tmp_path, split="iid", images_without_age="leave_out")
    cell(tmp_path, split="age")
    asked = config.settings({"run_name": tmp_path})
    assert outputs.of_run(asked, []).federate.images_without_age == "leave_out"


def test_cells_of_other_settings_are_left_out_and_named(tmp_path):
    cell(tmp_path, split="iid", learning_rate=0.5)
    cfg = cell(tmp_path)
    results, _, others = outputs.collect(cfg)
    assert set(results.split) == {"age"} and others == ["04_federate-iid-seed0"]
    (tmp_path / "cells" / "04_federate-age-seed0" / "cell.json").unlink()
    with pytest.raises(UserError, match=r"cell\.json is missing"):
        outputs.collect(cfg)


@pytest.mark.parametrize(
    ("notebook", "given"),
    [
        ("01_data", {"age_strength": 0.5}),
        ("02_teacher", {"jitter_pixels": 20.0}),
        ("03_distill", {"alpha": 1.0}),
    ],
)
def test_cells_of_other_notebooks_with_other_settings_are_left_out_and_named(tmp_path, notebook, given):
    """As an exercise leaves them: neither their records nor their figures are the study's."""
    other = config.settings({"run_name": tmp_path, "num_rounds": 1} | given)
    outputs.save_figure(other, "theirs", pyplot.figure())
    outputs.save(other, notebook, {"theirs": True})
    cfg = cell(tmp_path)
    results, _, others = outputs.collect(cfg)
    assert others == [outputs.cell_name(other, notebook)]
    written = manifest.manifest(cfg, results, others)
    assert "theirs" not in json.dumps(written)
    # What it does not depend on does not matter, nor do seed and sweep.
    same = config.settings({"run_name": tmp_path, "num_rounds": 9, "seed": 7, "alpha_sweep": ""})
    outputs.save(same, "02_teacher", {})
    assert outputs.cell_name(same, "02_teacher") not in outputs.collect(cfg)[2]


def test_the_manifest_names_the_figures_of_the_studys_cells_in_the_order_of_the_story(tmp_path):
    def draw(cfg, notebook, *names):
        for name in names:
            outputs.save_figure(cfg, name, pyplot.figure())
        return outputs.save(cfg, notebook, {}) if notebook else None

    cfg = config.settings({"run_name": tmp_path, "num_rounds": 1})
    draw(config.settings({"run_name": tmp_path / "another"}), None, "of another folder")
    draw(config.settings({"run_name": tmp_path, "seed": 10}), "03_distill", "loss_seed10")
    draw(config.settings({"run_name": tmp_path, "seed": 9}), "03_distill", "loss_seed9")
    draw(cfg, "01_data", "images", "ages", "images")
    draw(cfg, "05_analysis", "of an earlier analysis")
    outputs.save_figure(cfg, "dice_by_round", pyplot.figure())
    results, *_ = outputs.collect(cell(tmp_path))
    draw(cfg, None, "fig2", "fig3")
    names = ["images", "ages", "loss_seed9", "loss_seed10", "dice_by_round", "fig2", "fig3"]
    assert manifest.manifest(cfg, results)["figures"] == [f"{name}.png" for name in names]
    pyplot.close("all")


# ------------------------------------------------------------------------------------------ a notebook alone


@pytest.mark.parametrize(
    ("made", "begun"),
    [("04_federate", "04_federate"), ("04_federate", "03_distill"), ("03_distill", "04_federate")],
)
def test_a_notebook_does_not_write_over_results_of_other_settings(tmp_path, made, begun):
    """Its sentence says which, and holds the line that helps."""
    outputs.save(config.settings({"run_name": tmp_path / "quick"}), made, {})
    other = config.settings({"run_name": tmp_path / "quick", "temperature": 2.0})
    with pytest.raises(UserError) as caught:
        outputs.check_run(other, begun)
    assert str(caught.value) == (
        f"run '{tmp_path}/quick' holds results of other settings (temperature is 1.0 there and 2.0 here), "
        "and would lose them: name a run of its own in the parameters cell, such as "
        "run_name = 'quick-temperature=2'"
    )
    outputs.check_run(
        config.settings({"run_name": tmp_path / "quick-temperature=2", "temperature": 2.0}), begun
    )


def test_a_notebook_goes_on_where_only_seed_split_starts_and_what_it_does_not_know_differ(tmp_path):
    outputs.save(config.settings({"run_name": tmp_path, "num_clients": 5}), "04_federate", {})
    outputs.save(config.settings({"run_name": tmp_path, "age_strength": 0.5}), "01_data", {})
    outputs.save(config.settings({"run_name": tmp_path, "jitter_pixels": 20.0}), "02_teacher", {})
    free = {"seed": 3, "split": "iid", "inits": "random", "arms": "federated", "device": "cpu"}
    outputs.check_run(config.settings({"run_name": tmp_path, "num_clients": 5} | free), "04_federate")
    outputs.check_run(config.settings({"run_name": tmp_path}), "03_distill")  # knows of no clients
    with pytest.raises(UserError, match="num_clients is 5 there and 3 here"):
        outputs.check_run(config.settings({"run_name": tmp_path}), "04_federate")
    (tmp_path / "cells" / "04_federate-age-seed0" / "cell.json").write_text("{")
    outputs.check_run(config.settings({"run_name": tmp_path}), "04_federate")


def test_variants_come_together_with_their_axis_and_the_studys_own_value(tmp_path):
    """One that differs in two settings is no point of the map."""
    cfg = cell(tmp_path)
    for variant, given in (
        ("labelled=10", {"labelled": 10.0}),
        ("labelled=30", {"labelled": 30.0}),
        ("server=adam", {"server": "adam"}),
        ("num_clients=4", {"num_clients": 4, "server": "adam"}),
    ):
        cell(outputs.variant_dir(cfg, variant), **given)
    found = outputs.collect_variants(cfg)
    rows = set(found[["axis", "value", "own"]].itertuples(index=False, name=None))
    assert rows == {("labelled", "10", "all"), ("labelled", "30", "all"), ("server", "adam", "average")}
    assert outputs.collect_variants(cell(tmp_path / "alone")).empty


def test_a_cell_made_before_a_parameter_came_had_it_at_its_default(tmp_path):
    cfg = cell(tmp_path)
    file = tmp_path / "cells" / "04_federate-age-seed0" / "cell.json"
    about = json.loads(file.read_text())
    del about["settings"]["labelled"]
    file.write_text(json.dumps(about))
    assert len(outputs.collect(cfg)[0]) == 2
    with pytest.raises(UserError, match=r"labelled is 1\.0 there and 5\.0 here"):
        outputs.collect(config.settings({"run_name": tmp_path, "num_rounds": 1, "labelled": 5.0}))


def test_no_results_of_these_settings_is_one_sentence(tmp_path):
    with pytest.raises(UserError, match=r"holds no results of these settings: run 04_federate first"):
        outputs.collect(config.settings({"run_name": tmp_path}))
    cell(tmp_path)
    with pytest.raises(UserError, match="holds results of other settings alone"):
        outputs.collect(config.settings({"run_name": tmp_path}))


@pytest.mark.parametrize(("content", "what"), [(None, "is missing"), ("{", "is damaged")])
def test_a_record_that_cannot_be_read_is_named(tmp_path, content, what):
    if content:
        (tmp_path / "cell.json").write_text(content)
    with pytest.raises(UserError, match=rf"cell\.json {what}"):
        outputs.read_json(tmp_path / "cell.json")


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    outputs.write_text(tmp_path / "new" / "file", "before")

    def broken(*_):
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", broken)
    with pytest.raises(OSError, match="no space left"):
        outputs.write_text(tmp_path / "new" / "file", "after")
    assert (tmp_path / "new" / "file").read_text() == "before"


def test_a_figure_half_written_is_no_figure(tmp_path, monkeypatch):
    """A report takes every *.png of the folder, hidden ones too."""
    cfg, figure = config.settings({"run_name": tmp_path}), pyplot.figure()
    assert outputs.save_figure(cfg, "fig9", figure) is figure
    assert [file.name for file in (tmp_path / "figures").glob("*.png")] == ["fig9.png"]
    monkeypatch.setattr(os, "replace", lambda *_: None)  # killed just before
    outputs.save_figure(cfg, "fig8", figure)
    assert [file.name for file in (tmp_path / "figures").glob("*.png")] == ["fig9.png"]
    pyplot.close(figure)


def test_the_manifest_shows_names_and_no_paths(tmp_path):
    given = {"data": "phantom,/home/somebody/rays", "checkpoint": "/home/somebody/weights.safetensors"}
    cfg = cell(tmp_path / "run", **given)
    results, *_ = outputs.collect(cfg)
    settings = manifest.manifest(cfg, results)["settings"]
    assert (settings["data"], settings["checkpoint"]) == ("phantom,rays", "weights.safetensors")
    assert settings["run_name"] == "run"


def test_the_commit_is_that_of_the_checkout(monkeypatch, tmp_path):
    git = shutil.which("git")
    if git and (paths.ROOT / ".git").exists():
        head = subprocess.run([git, "rev-parse", "HEAD"], cwd=paths.ROOT, capture_output=True, text=True)
        assert provenance.commit().removesuffix("+changes") == head.stdout.strip()
    monkeypatch.setattr(paths, "ROOT", tmp_path)
    assert provenance.commit() == "", "outside git"


# ------------------------------------------------------------------------------------------ distillations


def distillations(**given) -> list[tuple]:
    """Alpha, temperature, labels and views of what is compared, after the run's own."""
    own, *others = stages.variants(config.settings({"alpha_sweep": ""} | given))
    assert own == config.settings(given).distill
    return [(how.alpha, how.temperature, how.teacher_labels, how.teacher_views) for how in others]


def test_the_compared_distillations_are_those_asked_for():
    usual = ("soft", "cached")
    assert distillations() == []
    assert distillations(alpha_sweep="0,0.6,1") == [(0, 1, *usual), (1, 1, *usual)]
    assert distillations(temperature_sweep="1,3") == [(0.6, 3, *usual)]
    assert distillations(alpha_sweep="0.5,1", temperature_sweep="1,3") == [
        *((0.5, 1, *usual), (1, 1, *usual)),
        *((0.5, 3, *usual), (1, 3, *usual)),
    ]
    assert distillations(variants="kl_only,dice_only,hard,fresh,soft,cached") == [
        *((1, 1, *usual), (0, 1, *usual)),
        *((0.6, 1, "hard", "cached"), (0.6, 1, "soft", "fresh")),
    ]
    assert distillations(temperature=2.0, teacher_labels="hard", variants="soft") == [
        (0.6, 2, "soft", "cached")
    ]


def test_without_the_teachers_share_his_temperature_labels_and_views_are_all_one():
    assert distillations(alpha_sweep="0", temperature_sweep="1,2,3") == [(0, 1, "soft", "cached")]
    assert distillations(alpha=0.0, temperature_sweep="1,2,3", variants="hard,fresh") == []


@pytest.fixture
def asked(monkeypatch) -> list[int]:
    """How many images each call of an image encoder has seen."""
    found = []
    embed = teacher.Teacher._embed
    monkeypatch.setattr(
        teacher.Teacher, "_embed", lambda self, images: (found.append(len(images)), embed(self, images))[1]
    )
    return found


@pytest.fixture
def trained(monkeypatch) -> list[float]:
    """The learning rate of each training."""
    found = []
    fit = train.fit

    def counted(*args, **given):
        found.append(given["optimizer"].param_groups[0]["lr"])
        return fit(*args, **given)

    monkeypatch.setattr(train, "fit", counted)
    return found


def test_a_sweep_asks_the_teacher_once_and_again_not_at_all(tmp_path, monkeypatch, asked, trained):
    monkeypatch.setattr(paths, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(
        teacher, "cached_logits", functools.partial(teacher.cached_logits, cache=tmp_path / "cache")
    )
    sweep = {"alpha_sweep": "0,0.5,1", "temperature_sweep": "1,2", "variants": "hard", "proxy_epochs": 1}
    cfg = config.settings(TINY | sweep | {"run_name": tmp_path / "run", "alpha": 0.5})
    cohort = stages.load_cohort(cfg)
    proxy = stages.holdout(cfg, cohort).proxy
    starts = stages.initial_states(cfg, cohort, proxy, INITS)
    first = stages.distilled(cfg, cohort, proxy)
    assert sum(asked) == len(proxy), "once, for all students together"
    # random is not trained but built; of the sweep, alpha 0 and 0.5 at T = 1 are starts already.
    assert len(first) == 6 and len(trained) == 3 + 4
    asked.clear()
    trained.clear()
    again = stages.distilled(cfg, cohort, proxy)
    assert asked == [] == trained
    digests = [states.state_digest(start.state) for _, start in first]
    assert digests == [states.state_digest(start.state) for _, start in again]
    assert len(set(digests)) == 6
    for (how, start), init in ((first[0], "fm"), (first[1], "pretraining")):
        assert (how.alpha > 0) == (init == "fm")
        assert states.state_digest(start.state) == states.state_digest(starts[init].state)


def test_fresh_views_are_asked_in_every_epoch_and_the_others_not(tmp_path, asked):
    given = {"run_name": tmp_path / "run", "alpha_sweep": "", "variants": "fresh", "proxy_epochs": 2}
    cfg = config.settings(TINY | given)
    cohort = stages.load_cohort(cfg)
    proxy = stages.holdout(cfg, cohort).proxy
    stages.initial_states(cfg, cohort, proxy, ["fm"])
    asked.clear()
    (_, own), (how, fresh) = stages.distilled(cfg, cohort, proxy)
    assert sum(asked) == 2 * len(proxy)
    assert how.teacher_views == "fresh"
    assert states.state_digest(own.state) != states.state_digest(fresh.state)


@pytest.mark.parametrize("module", [*teacher.CODE, "prompts.py", "study/stages.py"])
def test_fresh_views_of_other_code_are_other_answers(tmp_path, monkeypatch, module):
    cfg = config.settings(TINY | {"run_name": tmp_path, "teacher_views": "fresh"})
    cohort = stages.load_cohort(cfg)
    proxy = stages.holdout(cfg, cohort).proxy
    key = stages.taught(cfg, cohort, proxy).key
    assert key == stages.taught(cfg, cohort, proxy).key
    digest = states.code_digest
    monkeypatch.setattr(
        states, "code_digest", lambda files=(): "edited" if module in files else digest(files)
    )
    assert stages.taught(cfg, cohort, proxy).key != key


def test_without_masks_there_is_no_student_of_masks_alone(tmp_path):
    given = {"run_name": tmp_path / "run", "alpha_sweep": "0,1", "labelled": 0.0, "proxy_epochs": 1}
    cfg = config.settings(TINY | given)
    cohort = stages.load_cohort(cfg)
    found = stages.distilled(cfg, cohort, stages.holdout(cfg, cohort).proxy)
    assert [how.alpha for how, _ in found] == [0.6, 1]


def test_the_processor_is_told_by_its_name(monkeypatch, tmp_path):
    """lscpu knows it as well; where there is no /proc/cpuinfo, or none with a name, platform has the rest."""
    if shutil.which("lscpu") and "model name" in Path("/proc/cpuinfo").read_text():
        told = subprocess.run(["lscpu"], capture_output=True, text=True, env=os.environ | {"LC_ALL": "C"})
        names = [line.partition(":")[2].strip() for line in told.stdout.splitlines() if "Model name" in line]
        assert not names or names[0] == provenance.processor()
    monkeypatch.setattr(platform, "processor", lambda: "a processor")
    for file in (tmp_path / "none", tmp_path / "unnamed"):
        monkeypatch.setattr(provenance, "Path", lambda _, file=file: file)
        assert provenance.processor() == "a processor"
        (tmp_path / "unnamed").write_text("processor : 0\nBogoMIPS : 50\n")


def test_the_machines_memory_is_told_where_the_system_tells_it(monkeypatch):
    assert provenance.memory_gib() is None or 0.1 < provenance.memory_gib() < 100_000
    monkeypatch.delattr(os, "sysconf", raising=False)
    assert provenance.memory_gib() is None

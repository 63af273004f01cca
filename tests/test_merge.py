"""Parts of a study, from machines that share no folder, become the folder that one machine would have left.

The oracle is the study that was run whole. Most tests run notebooks that leave the files of the real ones,
tables and weights by seed, so that a study takes milliseconds; the slow one runs the real study.
"""

import json
import re
import shutil
import sys
from pathlib import Path

import nbformat
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from fmfl import config, paths, states
from fmfl.errors import UserError
from fmfl.study import cli, grid, merge, preflight, provenance

SETUP = """
import time
import pandas as pd
import torch
from fmfl import config, runs, states
from fmfl.study import cells, outputs
cfg = config.from_notebook(globals())
weights = cfg.run_dir / "weights"
seconds = time.perf_counter()
"""
NOTEBOOKS = {
    "01_data": """
from matplotlib import pyplot
outputs.save_figure(cfg, "ages", pyplot.figure(figsize=(1, 1)))
outputs.save(cfg, "01_data", {"fingerprint": "these images"}, skew=pd.DataFrame({"skew": [0.1]}))
""",
    "02_teacher": """
outputs.save(cfg, "02_teacher", {"sha256": "these weights", "seconds": seconds})
""",
    "03_distill": """
for init in config.split_list(cfg.federate.inits):
    state = {"w": torch.tensor([len(init), cfg.federate.seed, cfg.distill.alpha])}
    file = weights / f"init-{init}-seed{cfg.federate.seed}.safetensors"
    states.write_state(file, state, fit={"seconds": seconds}, fingerprint=init)
losses = pd.DataFrame({"loss": [0.1 + cfg.federate.seed], "seconds": seconds})
outputs.save(cfg, "03_distill", {"parameters": 5}, losses=losses)
""",
    "04_federate": """
seed, split = cfg.federate.seed, cfg.federate.split
rows = []
for name in cells.training_runs(cfg):
    arm, dealt, init = name.split("-")[:3]
    start = states.read_record(weights / f"init-{init}-seed{seed}.safetensors").get("sha256", "random")
    about = {"arm": arm, "init": init, "split": dealt, "seed": seed}
    made_of = {"code": states.code_digest(runs.RUN_CODE), "data": "these images"}
    made_of["settings"] = {"arm": arm, "precision": "float32", "learning_rate": cfg.federate.learning_rate}
    state = {"w": torch.tensor([len(name), seed, cfg.distill.alpha, cfg.federate.learning_rate])}
    rounds = [{"sha256": start}, {"sha256": states.state_digest(state)}]
    record = about | {"made_of": made_of, "rounds": rounds, "round_number": 1, "seconds": seconds}
    states.write_state(weights / f"{name}.safetensors", state, **record)
    rows.append(about | {"round": 1, "dice": 0.5 + seed / 10, "seconds": seconds})
results = pd.DataFrame(rows).drop_duplicates(["arm", "init", "split"])
per_image = results.assign(client=-1, image_id="x", patient_id="p", site="s").drop(columns="seconds")
record = {"images": "these images", "code": states.code_digest()}
outputs.save(cfg, "04_federate", record, results=results, per_image=per_image)
""",
    "05_analysis": """
results, per_image, others = outputs.collect(cfg)
tables = {"results": results, "per_image": per_image, "table1": results.describe(), "claims": per_image}
tables["by_variant"] = outputs.collect_variants(cfg)
for name, table in tables.items():
    outputs.write_text(cfg.run_dir / f"{name}.csv", table.to_csv(index=False))
for name in ("manifest.json", "report.html", "MODEL_CARD.md", "figures/fig2.png", "figures/fig3.png"):
    outputs.write_text(cfg.run_dir / name, "{}")
outputs.save(cfg, "05_analysis", {})
""",
}


@pytest.fixture
def notebooks(tmp_path, monkeypatch):
    """Notebooks that leave files without training, in a folder of the test's own."""
    folder = tmp_path / "notebooks"
    folder.mkdir()
    parameters = {"id": "parameters", "metadata": {"tags": ["parameters"]}}
    for name, last in NOTEBOOKS.items():
        cells = [
            nbformat.v4.new_code_cell("# Parameters: none\nseed = 0", **parameters),
            nbformat.v4.new_code_cell(SETUP, id="setup"),
            nbformat.v4.new_code_cell(last, id="last"),
        ]
        nbformat.write(nbformat.v4.new_notebook(cells=cells), folder / f"{name}.ipynb")
    monkeypatch.setattr(paths, "NOTEBOOKS", folder)
    inputs = {"data": "these images", "teacher": "these weights"}
    monkeypatch.setattr(preflight, "check", lambda cells: inputs)
    monkeypatch.setattr(provenance, "commit", lambda: "")  # git takes longer than all the rest
    return inputs


def plan(folder: Path, seeds=(0, 2), splits=("iid", "age"), vary=None, **given) -> list:
    tiny = {"num_rounds": 1, "inits": "random,fm", "alpha_sweep": "", "run_name": folder}
    return grid.plan(config.settings(tiny | given), list(seeds), list(splits), vary)


def run(folder: Path, *arguments, only=(), **given) -> list[str]:
    """Names of the notebooks that ran."""
    cells, said = plan(folder, *arguments, **given), []
    grid.run(grid.only(cells, list(only)) if only else cells, plain=True, progress=False, say=said.append)
    return [line.split(":")[0] for line in said]


def merged(tmp_path, *parts: Path, **places) -> list[str]:
    """What a merge into `m` says."""
    said: list[str] = []
    merge.merge(list(parts), tmp_path / "m", plain=True, progress=False, say=said.append, **places)
    return said


def everything(folder: Path) -> dict[str, bytes]:
    return {f.relative_to(folder).as_posix(): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


#: What two runs of one study may differ in, wherever it stands in a record: how long it took, when it ended,
#: and where it lay.
OF_THIS_TIME = {"seconds", "teacher_seconds", "finished", "created", "run_name"}


def pruned(value):
    if isinstance(value, dict):
        return {name: pruned(part) for name, part in value.items() if name not in OF_THIS_TIME}
    return [pruned(part) for part in value] if isinstance(value, list) else value


def content(file: Path) -> object:
    """All of a file but `OF_THIS_TIME`.

    The columns `seconds` of tables; of executed notebooks the outputs, which print seconds, and the injected
    folder; the report, which is made of the tables and shows their seconds, is compared by its presence.
    """
    if file.suffix == ".csv":
        table = pd.read_csv(file, dtype=str, keep_default_na=False)
        return table[[name for name in table if "seconds" not in name]].to_csv()
    if file.suffix == ".json":
        return pruned(json.loads(file.read_text()))
    if file.suffix == ".safetensors":
        return states.state_digest(load_file(file)), pruned(states.read_record(file))
    if file.suffix == ".ipynb":
        lines = "".join(cell["source"] if isinstance(cell["source"], str) else "".join(cell["source"])
                        for cell in json.loads(file.read_text())["cells"]).splitlines()  # fmt: skip
        return [line for line in lines if not line.startswith("run_name = ")]
    if file.name == "MODEL_CARD.md":  # its time; digests of files, whose records have times: tensors' stay
        card = re.sub(r"^\| made \| .* \|$", "", file.read_text(), flags=re.M)
        return re.sub(r"(\.safetensors) \| `[0-9a-f]{64}` \|", r"\1 |", card)
    return None if file.suffix == ".html" else file.read_bytes()


def assert_same_files(one: Path, other: Path) -> None:
    assert everything(one).keys() == everything(other).keys()
    for name in everything(one):
        assert content(one / name) == content(other / name), name


# ------------------------------------------------------------------------------------------ the whole


@pytest.fixture
def halves(tmp_path, notebooks) -> list[Path]:
    """Seed 0 on one machine and seed 2 on another."""
    run(tmp_path / "a", [0])
    run(tmp_path / "b", [2])
    return [tmp_path / "a", tmp_path / "b"]


def test_halves_by_seed_become_the_files_of_the_whole(tmp_path, halves):
    """And nothing of it is run again: by order of the folders nothing changes either."""
    run(tmp_path / "w")
    before = [everything(half) for half in halves]
    said = merged(tmp_path, *reversed(halves))
    assert said[:2] == [f"{halves[1]}: 4 notebooks are done", f"{halves[0]}: 5 notebooks are done"]
    assert [line.split(":")[0] for line in said[2:]] == ["05_analysis"]
    assert_same_files(tmp_path / "m", tmp_path / "w")
    for file in (tmp_path / "m" / "cells").glob("*/cell.json"):
        assert json.loads(file.read_text())["settings"]["run_name"] == str(tmp_path / "m")
    assert run(tmp_path / "m") == []
    assert [everything(half) for half in halves] == before
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a", "b", "m", "notebooks", "w"]


def test_single_federations_become_the_whole_and_what_trains_nothing_is_run(tmp_path, notebooks):
    """01 and 02 are on no machine; the starts are on all of them, and taken once."""
    run(tmp_path / "w", [0], ["iid", "age", "quantity"])
    parts = []
    for split in ("quantity", "age", "iid"):
        parts.append(tmp_path / split)
        ran = run(parts[-1], [0], ["iid", "age", "quantity"], only=[f"04_federate-{split}-seed0"])
        assert ran == ["03_distill-seed0", f"04_federate-{split}-seed0"]
    said = merged(tmp_path, *parts)
    assert [line.split(":")[0] for line in said[3:]] == ["01_data", "02_teacher", "05_analysis"]
    assert_same_files(tmp_path / "m", tmp_path / "w")
    assert run(tmp_path / "m", [0], ["iid", "age", "quantity"]) == []


def test_variants_are_merged_too(tmp_path, notebooks):
    """Whatever order the command gives their values in."""
    vary = {"alpha": [0.9, 0.25], "learning_rate": [0.01]}
    for folder, seeds in (("w", [0, 2]), ("a", [0]), ("b", [2])):
        run(tmp_path / folder, seeds, ["age"], vary)
    merged(tmp_path, tmp_path / "a", tmp_path / "b")
    assert_same_files(tmp_path / "m", tmp_path / "w")
    assert len(pd.read_csv(tmp_path / "m" / "by_variant.csv")) == 2 * (1 + 1 + 2)
    assert run(tmp_path / "m", [0, 2], ["age"], vary) == []
    assert run(tmp_path / "m", [0, 2], ["age"], {"learning_rate": [0.01], "alpha": [0.25, 0.9]}) == []


def test_a_merged_study_is_a_part_of_a_larger_one(tmp_path, halves, notebooks):
    run(tmp_path / "w", [0, 1, 2])
    run(tmp_path / "c", [1])
    merged(tmp_path, *halves)
    (tmp_path / "m").rename(tmp_path / "ab")
    merged(tmp_path, tmp_path / "ab", tmp_path / "c")
    assert_same_files(tmp_path / "m", tmp_path / "w")


def test_images_that_lay_elsewhere_are_known_by_their_bytes(tmp_path, notebooks):
    """Each machine had them in a place of its own, and here they are in a third one."""
    for place in ("one", "two", "here"):
        (tmp_path / place).mkdir()
    run(tmp_path / "a", [0], data=str(tmp_path / "one"))
    run(tmp_path / "b", [2], data=str(tmp_path / "two"))
    (tmp_path / "one").rmdir()
    (tmp_path / "two").rmdir()
    with pytest.raises(UserError, match=r"one, which is not here: name their folders with --data"):
        merged(tmp_path, tmp_path / "a", tmp_path / "b")
    said = merged(tmp_path, tmp_path / "a", tmp_path / "b", data=str(tmp_path / "here"))
    assert [line.split(":")[0] for line in said[2:]] == ["05_analysis"]
    assert run(tmp_path / "m", data=str(tmp_path / "here")) == []


# ------------------------------------------------------------------------------------------ unfinished parts


def unfinished(folder: Path, run: str, number: int, **changes) -> Path:
    """Takes a run back to a checkpoint with a number of rounds, and leaves the one before it."""
    file = folder / "weights" / f"{run}.safetensors"
    record = states.read_record(file) | {"round_number": number} | changes
    state = {"w": torch.tensor([float(number)])}
    states.write_state(file, state, **{name: record[name] for name in record if name != "sha256"})
    shutil.copy(file, states.previous(file))
    return file


def test_what_is_not_finished_is_said_and_its_rounds_are_taken(tmp_path, notebooks):
    """Of two machines that have begun the same run, the rounds of the one that has come further."""
    run(tmp_path / "a", [0], ["iid", "age"], num_rounds=3)
    run(tmp_path / "b", [0], ["iid", "age"], num_rounds=3)
    for folder, rounds in (("a", 1), ("b", 2)):
        (tmp_path / folder / "cells" / "04_federate-age-seed0" / "done.json").unlink()
        newest = unfinished(tmp_path / folder, "federated-age-fm-seed0", rounds)
    for file in tmp_path.glob("*/weights/*-random-seed0*"):
        if file.name.startswith(("federated-age", "centralised", "standalone")):
            file.unlink()
    said = merged(tmp_path, tmp_path / "a", tmp_path / "b")
    assert said[2:] == ["missing: 04_federate-age-seed0: 2 of 12 rounds are there"]
    kept = tmp_path / "m" / "weights" / newest.name
    assert kept.read_bytes() == newest.read_bytes() == states.previous(kept).read_bytes()
    assert not (tmp_path / "m" / "results.csv").exists()
    ran = run(tmp_path / "m", [0], ["iid", "age"], num_rounds=3)
    assert ran == ["04_federate-age-seed0", "05_analysis"]


def test_a_finished_cell_wins_over_one_that_was_stopped(tmp_path, notebooks):
    run(tmp_path / "a", [0], ["age"])
    run(tmp_path / "b", [0], ["age"])
    (tmp_path / "a" / "cells" / "04_federate-age-seed0" / "done.json").unlink()
    unfinished(tmp_path / "a", "federated-age-fm-seed0", 0)
    merged(tmp_path, tmp_path / "a", tmp_path / "b")
    name = "weights/federated-age-fm-seed0.safetensors"
    assert (tmp_path / "m" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_unfinished_rounds_from_another_training_of_the_start_are_left_out(tmp_path, notebooks):
    run(tmp_path / "a", [0], ["iid", "age"], only=["03_distill-seed0"])
    run(tmp_path / "b", [0], ["iid", "age"], only=["04_federate-age-seed0"])
    (tmp_path / "b" / "cells" / "04_federate-age-seed0" / "done.json").unlink()
    file = unfinished(tmp_path / "b", "federated-age-fm-seed0", 1, rounds=[{"sha256": "another"}])
    merged(tmp_path, tmp_path / "a", tmp_path / "b")
    assert not (tmp_path / "m" / "weights" / file.name).exists()
    assert (tmp_path / "m" / "weights" / "federated-age-random-seed0.safetensors").exists()


# ------------------------------------------------------------------------------------------ refusals


def edited(file: Path, change) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def refused(tmp_path: Path, *parts: Path, **places) -> str:
    """The sentence of a refusal, which changes nothing and leaves nothing."""
    before = everything(tmp_path)
    with pytest.raises(UserError) as caught:
        merged(tmp_path, *parts, **places)
    assert everything(tmp_path) == before
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("num_rounds", 3, "num_rounds is 3 in {b} (04_federate-age-seed2) and 1 in {a}"),
        ("size", 64, "size is 64 in {b} (01_data) and 96 in {a}"),
        ("alpha_sweep", "0,1", "alpha_sweep is '0,1' in {b} (03_distill-seed2) and '' in {a}"),
        ("inits", "random", "inits is 'random' in {b} (03_distill-seed2) and 'random,fm' in {a}"),
        ("target_dice", 0.8, "target_dice is 0.8 in {b} (05_analysis) and 0.9 in {a}"),
    ],
)
def test_another_setting_is_named_with_folders_and_values(tmp_path, notebooks, name, value, said):
    run(tmp_path / "a", [0])
    run(tmp_path / "b", [2], **{name: value})
    begins = said.format(a=tmp_path / "a", b=tmp_path / "b")
    assert refused(tmp_path, tmp_path / "a", tmp_path / "b").startswith(begins)


def test_a_variants_other_setting_is_named(tmp_path, notebooks):
    run(tmp_path / "a", [0], ["age"], {"alpha": [0.25]})
    run(tmp_path / "b", [2], ["age"], {"alpha": [0.25]})
    record = tmp_path / "b" / "vary" / "alpha=0.25" / "cells" / "04_federate-age-seed2" / "cell.json"
    edited(record, lambda about: about["settings"].update(batch_size=4))
    said = refused(tmp_path, tmp_path / "a", tmp_path / "b")
    assert said.startswith(f"{tmp_path / 'b'} is no part of the same study: batch_size is 4 there and 8 in")


@pytest.mark.parametrize(
    ("cell", "name", "what"),
    [
        ("01_data", "fingerprint", "images"),
        ("04_federate-age-seed2", "images", "images"),
        ("02_teacher", "sha256", "teacher's weights"),
    ],
)
def test_other_images_or_weights_of_the_teacher_are_refused(tmp_path, halves, cell, name, what):
    edited(halves[1] / "cells" / cell / "cell.json", lambda about: about["record"].update({name: "others"}))
    said = refused(tmp_path, *halves)
    assert said.startswith(
        f"{halves[1]} is no part of the same study: its {what} have the fingerprint others"
    )
    assert f"and those of {halves[0]} these" in said


@pytest.mark.parametrize(("what", "option"), [("data", "data"), ("teacher", "checkpoint")])
def test_other_images_or_weights_on_this_machine_are_refused(tmp_path, halves, notebooks, what, option):
    notebooks[what] = "another"
    said = refused(tmp_path, *halves)
    assert "has the fingerprint another here, and in" in said and said.endswith(
        f"the same {what} with --{option}"
    )


def test_other_code_is_refused_with_its_commit(tmp_path, halves, monkeypatch):
    for cell in (halves[1] / "cells").iterdir():
        edited(cell / "cell.json", lambda about: about["run"].update(commit="f00d"))
        edited(cell / "done.json", lambda done: done.update(fingerprint="of other code"))
    said = refused(tmp_path, *halves)
    assert said.startswith(f"02_teacher in {halves[1]} was made by other code (commit f00d) than is here")


def test_unfinished_rounds_of_other_code_are_refused(tmp_path, halves):
    (halves[1] / "cells" / "04_federate-age-seed2" / "done.json").unlink()
    made_of = {"code": "c", "data": "these images", "settings": {"arm": "federated"}}
    file = unfinished(halves[1], "federated-age-fm-seed2", 1, made_of=made_of)
    assert refused(tmp_path, *halves).startswith(f"{file} was made by other code than is here")


@pytest.mark.parametrize(
    "spoil",
    [
        "cells/03_distill-seed0/losses.csv",
        "cells/03_distill-seed0/cell.json",
        "weights/init-fm-seed0.safetensors",
    ],
)
def test_the_same_cell_with_other_bytes_is_refused_by_name(tmp_path, notebooks, spoil):
    run(tmp_path / "a", [0])
    run(tmp_path / "b", [0])
    file = tmp_path / "b" / spoil
    if file.suffix == ".csv":
        file.write_text(file.read_text().replace("0.1", "0.10000000000000002"))
    elif file.suffix == ".json":
        edited(file, lambda about: about["record"].update(parameters=6))
    else:
        states.write_state(file, {"w": torch.tensor([0.0])})
    said = refused(tmp_path, tmp_path / "a", tmp_path / "b")
    assert said == (
        f"03_distill-seed0 is in {tmp_path / 'a'} and in {tmp_path / 'b'}, with other bytes in {spoil}: "
        "delete it in the one that shall not count"
    )


def test_a_run_that_began_from_another_training_of_its_start_is_refused(tmp_path, notebooks):
    """As where the cells of one seed are trained on two GPUs whose last digits differ."""
    only = ["04_federate-iid-seed0"], ["04_federate-age-seed0"]
    for folder, keys in zip("ab", only, strict=True):
        run(tmp_path / folder, [0], only=keys)
    shutil.rmtree(tmp_path / "b" / "cells" / "03_distill-seed0")
    unfinished(tmp_path / "b", "federated-age-fm-seed0", 1, rounds=[{"sha256": "another"}])
    said = refused(tmp_path, tmp_path / "a", tmp_path / "b")
    assert (
        "did not begin from" in said
        and "init-fm-seed0.safetensors, another training of the same start" in said
    )


def test_a_split_that_was_run_as_a_study_of_its_own_is_told_the_way(tmp_path, notebooks):
    """A study of one split trains all arms under it; in the whole study only the reference split has them."""
    run(tmp_path / "a", [0], ["iid"], images_without_age="leave_out")
    run(tmp_path / "b", [0], ["age"])
    said = refused(tmp_path, tmp_path / "a", tmp_path / "b")
    assert said.startswith(f"arms is 'federated,centralised,standalone' in {tmp_path / 'a'}")
    assert "--splits iid,age --only 04_federate-iid-seed0" in said
    run(tmp_path / "a", [0], ["iid", "age"], only=["04_federate-iid-seed0"])
    merged(tmp_path, tmp_path / "a", tmp_path / "b")
    assert run(tmp_path / "m", [0], ["iid", "age"]) == []


def test_splits_that_train_on_other_images_are_refused(tmp_path, notebooks):
    run(tmp_path / "a", [0], ["iid"])
    run(tmp_path / "b", [0], ["age"])
    said = refused(tmp_path, tmp_path / "a", tmp_path / "b")
    assert said.startswith(f"images_without_age is 'leave_out' in {tmp_path / 'b'}")
    assert said.endswith("run the part that keeps them again with -p images_without_age=leave_out")


def test_a_folder_that_was_not_copied_whole_is_refused(tmp_path, halves):
    file = halves[1] / "weights" / "federated-age-fm-seed2.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-3])
    assert refused(tmp_path, *halves).startswith(f"{file} is damaged: copy the folder here again")
    record = halves[1] / "cells" / "02_teacher" / "cell.json"
    about = record.read_text()
    record.write_text(about[:-3])
    assert refused(tmp_path, *halves) == f"cell.json in {record.parent} is damaged: copy it here again"
    record.write_text(about)
    file.unlink()
    said = refused(tmp_path, *halves)
    assert said.startswith(
        f"{halves[1]} lacks weights/{file.name}, though 04_federate-age-seed2 is done there"
    )


def test_places_are_checked(tmp_path, halves):
    a, b = halves
    assert refused(tmp_path, a).startswith("one folder alone is no merge")
    assert refused(tmp_path, a, a).startswith(f"{a} is named twice")
    assert refused(tmp_path, a, tmp_path / "gone").startswith(f"{tmp_path / 'gone'}: there is no such folder")
    assert "holds no start or federation" in refused(tmp_path, a, tmp_path / "notebooks")
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "notes.txt").write_text("mine")
    assert refused(tmp_path, a, b).startswith(f"--out {tmp_path / 'm'} exists: name a new folder")
    assert (tmp_path / "m" / "notes.txt").read_text() == "mine"
    with pytest.raises(UserError, match="which stays as it is"):
        merge.merge(halves, a / "inside")


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_what_is_cut_short_leaves_nothing(tmp_path, halves, monkeypatch, error):
    written = []

    def write(file: Path, content: bytes) -> None:
        written.append(file)
        if len(written) > 5:
            raise error
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)

    before = everything(tmp_path)
    monkeypatch.setattr(states, "write_bytes", write)
    with pytest.raises(type(error)):
        merged(tmp_path, *halves)
    assert everything(tmp_path) == before and not (tmp_path / "m").exists()


def test_an_analysis_that_ctrl_c_stops_leaves_nothing_and_one_that_fails_its_outputs(
    tmp_path, halves, notebooks, monkeypatch
):
    """The sentence of a failed notebook names them; the study goes on there."""

    def stop(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(grid, "run", stop)
        with pytest.raises(KeyboardInterrupt):
            merged(tmp_path, *halves)
    assert not (tmp_path / "m").exists()
    analysis = paths.NOTEBOOKS / "05_analysis.ipynb"
    good = analysis.read_text()
    analysis.write_text(good.replace("results, per_image, others", "results, others"))
    with pytest.raises(UserError, match="its outputs are in") as caught:
        merged(tmp_path, *halves)
    assert Path(str(caught.value).rsplit(" ", 1)[1]).is_file()
    analysis.write_text(good)
    assert run(tmp_path / "m") == ["05_analysis"]


# ------------------------------------------------------------------------------------------ the real study

TINY = {"size": 32, "num_phantoms": 40, "num_rounds": 2, "proxy_epochs": 1, "student": "tiny_unet"}
TINY |= {"inits": "random,fm", "arms": "federated,centralised", "alpha_sweep": "", "diagnostics": "false"}


@pytest.mark.slow
def test_two_real_halves_become_the_whole(tmp_path, monkeypatch, capsys):
    def fmfl(*arguments) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["fmfl", *map(str, arguments)])
        code = 0
        try:
            cli.main()
        except SystemExit as ended:
            code = ended.code or 0
        return code, capsys.readouterr().out

    study = ["study", "--plain", "--no-progress", "--profile", "smoke", "--splits", "age"]
    study += [part for name, value in TINY.items() for part in ("-p", f"{name}={value}")]
    for folder, seeds in (("a", "0"), ("b", "2"), ("w", "0,2")):
        assert fmfl(*study, "--seeds", seeds, "--out", tmp_path / folder)[0] == 0
    code, said = fmfl("merge", "--plain", tmp_path / "a", tmp_path / "b", "--out", tmp_path / "m")
    assert code == 0 and said.endswith(f"report: {tmp_path / 'm' / 'report.html'}\n")
    assert fmfl("verify", tmp_path / "m", tmp_path / "w")[0] == 0
    assert_same_files(tmp_path / "m", tmp_path / "w")
    code, said = fmfl(*study, "--seeds", "0,2", "--out", tmp_path / "m")
    assert code == 0 and said.startswith("0 notebooks run, 7 were done already")

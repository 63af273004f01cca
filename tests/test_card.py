"""The model card says what the run's files say, and nothing that they do not."""

import hashlib
import itertools
import re
import shlex

import made_runs
import numpy as np
import pandas as pd
import pytest
import typer
from PIL import Image

from fmfl import states
from fmfl.analysis import statistics
from fmfl.study import card, cli, students

SIZE = made_runs.SIZE


def scores(patients=30, ages=True):
    """Final Dice of two starts and two seeds on test images with known means."""
    rng = np.random.default_rng(0)
    tables = []
    for init, mean in (("random", 0.80), ("fm", 0.90)):
        for seed in (0, 1):
            about = {"arm": "federated", "init": init, "split": "age", "seed": seed, "client": -1}
            names = [f"p{number}" for number in range(patients)]
            table = pd.DataFrame({"image_id": names, "patient_id": names, "site": "here"})
            table["age"] = np.linspace(2, 80, patients) if ages else np.nan
            table["dice"] = mean + rng.normal(0, 0.01, patients)
            tables.append(table.assign(**about, iou=0.7, hd95=4.0, assd=1.0))
    return pd.concat(tables, ignore_index=True)


@pytest.fixture
def run(tmp_path):
    folder = made_runs.make_run(tmp_path / "run", made_runs.RUNS[:2])
    made_runs.make_manifest(folder)
    scores().to_csv(folder / "per_image.csv", index=False)
    return folder


def text(run):
    return card.write(run).read_text(encoding="utf-8")


def test_the_numbers_are_those_of_the_files(run):
    page = text(run)
    for fact in ("1,234 with a mask, of 321 patients", "7 × lateral view", "1,074 images", "`0123abcd`",
                 "2 to 80 years, median 41", "builtin, Dice 91.2 % on the proxy images", "472,425 parameters",
                 "1.9 MB", f"`[B, 1, {SIZE}, {SIZE}]`", "9.8.7",
                 "calibration error on the proxy images is 0.012",
                 "It stands in."):  # fmt: skip
        assert fact in page, fact
    cell = statistics.contrast(scores(), {("federated", "fm", "age"): 1})
    assert f"{cell['value']:.2f} ({cell['low']:.2f} to {cell['high']:.2f})" in page
    assert "30 test images of 30 patients, 2 seeds." in page


def test_the_weights_are_those_in_the_folder_with_the_digests_that_others_compute(run):
    page = text(run)
    rows = re.findall(r"^\| (\S+\.safetensors) \| `(\w+)` \| `(\w+)` \|$", page, re.M)
    files = sorted((run / "weights").glob("*.safetensors"))
    assert [name for name, *_ in rows] == [file.name for file in files]
    for file, (_, of_file, of_tensors) in zip(files, rows, strict=True):
        assert of_file == hashlib.sha256(file.read_bytes()).hexdigest()
        assert of_tensors == states.state_digest(states.read_state(file)[0])


def test_every_card_says_what_it_must_not_be_used_for(run):
    page = text(run)
    assert "This is not a medical device" in page and "## Intended use" in page and "**Not for**" in page
    assert "All images are synthetic" in page


def test_of_real_images_the_licence_is_left_to_the_person(run):
    manifest = made_runs.make_manifest(run)
    made_runs.make_manifest(
        run, settings=manifest["settings"] | {"data": "clinic,phantom", "teacher": "medsam"}
    )
    page = text(run)
    assert "sources | clinic, phantom |" in page and "Some of the images are synthetic" in page
    assert "does not know the images' licences" in page
    assert "CC BY 4.0" not in page, "that is the built-in teacher's"


def test_a_card_names_folders_and_no_paths_of_the_machine(run):
    manifest = made_runs.make_manifest(run)
    given = "/home/someone/clinic/, /mnt/secret/second"
    made_runs.make_manifest(run, settings=manifest["settings"] | {"data": given})
    page = text(run)
    assert "sources | clinic, second |" in page
    assert not any(word in page for word in ("someone", "/home", "/mnt", "secret"))


def test_a_card_of_another_organ_speaks_of_no_chest(run):
    manifest = made_runs.make_manifest(run)
    assert "Model card: tiny_unet for lungs on chest X-rays" in text(run)
    assert "has learnt from parts of the Guangzhou and the Montgomery County set" in text(run)
    made_runs.make_manifest(run, settings=manifest["settings"] | {"mask_class": "kidney:2"})
    page = text(run)
    assert page.startswith("# Model card: tiny_unet for kidney\n") and "a first outline of the kidney" in page
    for word in ("kidney:2", "kidneys", "chest", "heart", "lateral views", "CT slices", "lung", "Montgomery"):
        assert word not in page.split("## Scores")[0] + page.split("## Limits")[1].split("## Weights")[0], (
            word
        )


def test_what_is_not_known_is_not_said(run):
    """An older or poorer run: sentences go, and no word stands for a missing value."""
    made_runs.make_manifest(run, data={}, teacher={}, student={}, device={}, commit="", created=None)
    scores(patients=5, ages=False).to_csv(run / "per_image.csv", index=False)
    page = text(run)
    assert not re.search(r"\b(None|nan|NaN|Undefined)\b", page)
    assert "parameters" not in page and "proxy images is" not in page and "commit" not in page
    assert "| test patients' ages | not known |" in page
    assert (
        "Fewer than 20 patients: no intervals, no tests." in page
        and " to " not in page.split("## Scores")[1].split("|---")[2][:80]
    )


def test_tables_are_whole_so_that_github_shows_them(run):
    lines = text(run).splitlines()
    for above, line in itertools.pairwise(lines):
        if line.startswith("|") and above.startswith("|"):
            assert line.count("|") == above.count("|"), line
        if line.startswith("|") and not above.startswith("|"):
            assert above == "", "a table needs an empty line before it"
        if above.startswith("|") and not line.startswith("|"):
            assert line == "", "or the text after it becomes a row"
    assert "\n\n\n" not in "\n".join(lines)
    for link in re.findall(r"\]\(([^)]+)\)", "\n".join(lines)):
        assert link.startswith("https://"), "the card travels alone"


def test_its_commands_parse_and_its_python_runs(run, tmp_path, monkeypatch):
    page = text(run)
    _, commands, _, python, *_ = re.split(r"^```\w*\n", page, flags=re.M)
    for line in commands.splitlines():
        _, *arguments = shlex.split(line)
        known = typer.main.get_command(cli.app).commands[arguments[0]].params
        assert set(re.findall(r"--\w+", line)) <= {option for one in known for option in one.opts}
    monkeypatch.chdir(tmp_path)
    (tmp_path / "RUN").symlink_to(run)
    xray = np.asarray(Image.fromarray(made_runs.cohort().images[0, 0].numpy()).resize((50, 40)))
    Image.fromarray(xray).save("xray.png")
    names = {}
    exec(python, names)
    assert names["mask"].shape == (40, 50) and names["mask"].any() and not names["mask"].all()
    assert names["final"].name == students.choose(run)[0].name


def test_a_folder_without_weights_gets_no_card(run):
    """As the committed results, whose weights are not committed."""
    for file in (run / "weights").iterdir():
        file.unlink()
    assert card.write(run) is None and not (run / card.NAME).exists()

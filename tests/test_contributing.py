"""The recipes of CONTRIBUTING.md run, each in the module that it names."""

import re
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from made_sources import LEFT, RIGHT, load, lungs, picture, reasons, save

from fmfl import errors, federate, losses, models, paths, split, teacher
from fmfl.sources import readers
from fmfl.teachers import checkpoints, sam

TEXT = (paths.ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def recipe(title):
    """The one block of Python in a section."""
    (section,) = [part for part in TEXT.split("\n## ") if part.startswith(f"{title}\n")]
    (code,) = re.findall(r"```python\n(.*?)```", section, flags=re.S)
    assert code.count("\n") <= 13, f"{title} is no short recipe any more"
    return code


def run(title, module):
    """The module's names after its recipe; the module itself stays as it is."""
    names = dict(vars(module))
    exec(recipe(title), names)
    return names


def test_a_student_is_built_and_learns(monkeypatch):
    monkeypatch.setattr(models, "STUDENTS", dict(models.STUDENTS))
    run("Add a student", models)
    model = models.build("plain_cnn")
    logits = model(torch.rand(2, 1, 40, 56))
    assert logits.shape == (2, 1, 40, 56)
    losses.dice_loss(logits, torch.ones_like(logits, dtype=torch.bool)).backward()
    assert all(weight.grad is not None for weight in model.parameters())


def test_a_teachers_convention_prepares_images_and_its_weights_are_known_by_name(monkeypatch):
    from segment_anything import sam_model_registry

    monkeypatch.setattr(sam, "FAMILIES", dict(sam.FAMILIES))
    monkeypatch.setattr(checkpoints, "PUBLISHED", dict(checkpoints.PUBLISHED))
    run("Add a teacher", sam)
    family = sam.FAMILIES["my_sam"]
    assert family.builder in sam_model_registry
    bright = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    dark = bright // 2
    x, y = (family.convention.image(images, family.size) for images in (bright, dark))
    assert x.shape == (1, 3, 512, 512)
    assert (x - y).abs().max() < 0.05, "a picture of half the brightness is stretched to the same one"
    with pytest.raises(errors.UserError, match="'my_sam' needs its authors' weights"):
        teacher.default_file("my_sam")


def test_a_readers_folder_is_read(monkeypatch, tmp_path):
    names = run("Add a reader", readers)
    monkeypatch.setattr(readers, "reader", lambda folder: names["read_pairs"])
    for seed, name in enumerate(("p1_1", "p1_2", "p2_1")):
        save(tmp_path / f"{name}.png", picture(seed))
        save(tmp_path / f"{name}_mask.png", lungs(LEFT, RIGHT))
    save(tmp_path / "p3_1_mask.png", lungs(LEFT, RIGHT))
    cohort = load(tmp_path)
    assert list(cohort.table.image_id) == ["p1_1", "p1_2", "p2_1"]
    assert cohort.table.patient_id.nunique() == 2
    assert cohort.masks.sum() > 0
    assert reasons(cohort) == {"p3_1_mask.png": "mask without an image"}


def test_a_partition_deals_each_image_once_and_keeps_patients_whole(monkeypatch):
    monkeypatch.setattr(split, "_SCHEMES", dict(split._SCHEMES))
    monkeypatch.setitem(split.OPTIONS, "turns", {})
    run("Add a partition", split)
    patients = np.repeat([f"p{number}" for number in range(10)], 3)
    table = pd.DataFrame({"patient_id": patients, "age": 40.0, "site": "a"})
    clients = split.partition(table, torch.arange(30), "turns", num_clients=3)
    assert torch.equal(torch.cat(clients).sort().values, torch.arange(30))
    assert sorted(map(len, clients)) == [9, 9, 12]
    assert all(table.patient_id.iloc[part].value_counts().eq(3).all() for part in clients)


def test_a_server_rule_moves_weights_half_way_and_takes_other_tensors_as_averaged():
    code = recipe("Add a server rule")
    names = dict(vars(federate))
    body = "".join(f"    {line}\n" for line in code.splitlines())
    exec(f"def server_step(state, average, names, cfg, moments):\n{body}", names)
    state = {"weight": torch.tensor([0.0, 2.0]), "running_mean": torch.tensor([1.0])}
    average = {"weight": torch.tensor([4.0, 4.0]), "running_mean": torch.tensor([3.0])}
    new, kept = names["server_step"](state, average, ["weight"], SimpleNamespace(server="halfway"), {})
    torch.testing.assert_close(new, {"weight": torch.tensor([2.0, 3.0]), "running_mean": torch.tensor([3.0])})
    assert kept == {}

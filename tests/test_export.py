"""An exported student gives the network's answers in another runtime, and says what it takes."""

import sys

import made_runs
import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from fmfl import augment, export, models
from fmfl.errors import UserError
from fmfl.study import cli, students

SIZE = made_runs.SIZE


def session(content):
    return onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])


@pytest.fixture(scope="module")
def exported():
    model = models.build(made_runs.STUDENT)
    models.load_state(model, made_runs.trained())
    return model, export.to_onnx(model, SIZE, {"weights_sha256": "abc"})


def test_the_answers_are_the_networks_for_any_number_of_images(exported):
    model, content = exported
    images = augment.to_float(made_runs.cohort().images[:17])
    for number in (1, 2, 17):
        (logits,) = session(content).run(None, {"image": images[:number].numpy()})
        with torch.inference_mode():
            np.testing.assert_allclose(logits, model(images[:number]).numpy(), rtol=0, atol=export.TOLERANCE)
    assert (logits > 0).any() and (logits < 0).any(), "there is lung and background to compare"


def test_the_file_says_what_it_takes_and_has_no_other_size(exported):
    _, content = exported
    metadata = {entry.key: entry.value for entry in onnx.load_from_string(content).metadata_props}
    assert metadata["weights_sha256"] == "abc"
    assert "[B, 1, 32, 32]" in metadata["input"] and "0..1" in metadata["input"]
    assert "squeezed" in metadata["input"] and "not a medical device" in metadata["use"]
    (taken,) = session(content).get_inputs()
    batch, *rest = taken.shape
    assert (taken.name, taken.type, rest) == ("image", "tensor(float)", [1, SIZE, SIZE])
    assert isinstance(batch, str), "a name, not a number"


def test_other_weights_are_noticed(exported):
    model, content = exported
    images = made_runs.cohort().images[:5]
    assert export.largest_difference(content, model, images) <= export.TOLERANCE
    other = models.build(made_runs.STUDENT, seed=5)
    assert export.largest_difference(content, other, images) > 100 * export.TOLERANCE


def test_a_file_that_answers_otherwise_is_not_written(tmp_path, exported, monkeypatch):
    _, content = exported
    monkeypatch.setattr(export, "to_onnx", lambda *arguments: content)
    with pytest.raises(UserError, match=r"differs from the network by up to .* is not written"):
        export.write(tmp_path / "x.onnx", models.build(made_runs.STUDENT, seed=5), SIZE, {})
    assert list(tmp_path.iterdir()) == []


def test_the_command_names_the_weights_and_the_difference(tmp_path, exported, monkeypatch, capsys):
    run, file = made_runs.make_run(tmp_path / "run"), tmp_path / "student.onnx"

    def fmfl(*arguments):
        monkeypatch.setattr(sys, "argv", ["fmfl", "export", *map(str, arguments)])
        code = 0
        try:
            cli.main()
        except SystemExit as ended:
            code = ended.code or 0
        said = capsys.readouterr()
        return code, said.out, said.err

    code, out, err = fmfl(run, "--onnx", file)
    assert code == 0, err
    assert "largest difference from the network: " in out and "not a medical device" in out
    final, _ = students.choose(run)
    assert f"weights: {final}" in out and f"onnx: {file}" in out
    metadata = {entry.key: entry.value for entry in onnx.load(file).metadata_props}
    assert (metadata["weights"], metadata["weights_sha256"]) == (final.file.name, final.sha256)
    export.check_file(file)  # its own file may be replaced
    assert fmfl(run, "--onnx", file)[0] == 0

    before = file.read_bytes()
    code, out, err = fmfl(run, "--onnx", file, "--init", "random")
    assert code == 2 and out == "" and err.count("\n") == 1 and file.read_bytes() == before
    assert f"with other weights ({final.file.name}): name another file, or add --overwrite" in err
    code, out, err = fmfl(run, "--onnx", file, "--init", "random", "--overwrite")
    assert code == 0 and file.read_bytes() != before, err

    mine = tmp_path / "mine.onnx"
    mine.write_text("something else")
    code, out, err = fmfl(run, "--onnx", mine, "--overwrite")
    assert code == 2 and "no export of fmfl made it" in err and mine.read_text() == "something else"
    code, out, err = fmfl(run, "--onnx", tmp_path / "x.bin")
    assert code == 2 and "ends in .onnx" in err


def test_a_missing_package_is_one_sentence_with_the_command(monkeypatch, tmp_path):
    monkeypatch.setattr(export, "PACKAGES", ("onnx", "a_package_that_is_not_there"))
    with pytest.raises(UserError, match="needs the packages a_package_that_is_not_there: pip install"):
        export.check_file(tmp_path / "x.onnx")


OTHERS = [(name, "average") for name in models.STUDENTS if name != made_runs.STUDENT]


@pytest.mark.parametrize(
    ("student", "batch_norm"),
    [
        (made_runs.STUDENT, "group"),
        *(pytest.param(*one, marks=pytest.mark.slow, id=one[0]) for one in OTHERS),
    ],
)
def test_every_student_is_exported(student, batch_norm, tmp_path):
    model = models.build(student, batch_norm=batch_norm)
    assert export.write(tmp_path / "x.onnx", model, 64, {"weights_sha256": ""}) <= export.TOLERANCE

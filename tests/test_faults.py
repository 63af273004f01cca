"""Faults around a study end in one sentence: Ctrl-C, a full disk, braces in a path, another locale."""

import errno
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from fmfl import config, errors, models, states, teacher
from fmfl.errors import UserError
from fmfl.study import cli, execute, grid, interrupt, preflight

FMFL = [sys.executable, "-m", "fmfl"]
TINY = ["--profile", "smoke", "-p", "size=32", "-p", "num_rounds=1", "-p", "proxy_epochs=1"]
TINY += ["-p", "num_phantoms=40", "-p", "student=tiny_unet", "--splits", "iid"]


# ------------------------------------------------------------------------------------------ Ctrl-C


def stopped(arguments, ready) -> tuple[int, str]:
    """Exit code and standard error of a command in a group of its own that a terminal interrupts."""
    process = subprocess.Popen(
        [*FMFL, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    until = time.monotonic() + 60
    while not ready() and process.poll() is None and time.monotonic() < until:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=60)
    return process.returncode, said


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="process groups")
@pytest.mark.parametrize("seconds", [0.7, 2.5])
def test_ctrl_c_among_the_imports_is_the_sentence_alone(tmp_path, seconds):
    until = time.monotonic() + seconds
    found = stopped(["study", *TINY, "--out", tmp_path / "run"], lambda: time.monotonic() > until)
    assert found == (130, interrupt.STOPPED + "\n")


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="process groups")
def test_ctrl_c_while_a_kernel_starts_is_the_sentence_alone(tmp_path):
    notebook = tmp_path / "run" / "notebooks" / "01_data.ipynb"
    found = stopped(["study", *TINY, "--out", tmp_path / "run"], notebook.exists)
    assert found == (130, interrupt.STOPPED + "\n")


def test_an_error_that_ctrl_c_has_turned_into_is_the_sentence_too(monkeypatch, capsys, handled):
    """As NumPy, interrupted while it is imported, says that it could not be imported."""
    handled(signal.SIGINT, signal.default_int_handler)

    def app():
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)
        except KeyboardInterrupt:
            raise ImportError("failed to import") from None

    monkeypatch.setattr(cli, "app", app)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 130 and capsys.readouterr().err == interrupt.STOPPED + "\n"


# ------------------------------------------------------------------------------------------ the disk


def full(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_what_a_full_disk_cuts_short_is_not_left_behind(tmp_path, monkeypatch):
    file = tmp_path / "a.csv"
    states.write_bytes(file, b"before")
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left") as caught:
            states.write_bytes(file, b"after")
    assert caught.value.filename == str(file)
    assert [found.name for found in tmp_path.iterdir()] == ["a.csv"] and file.read_bytes() == b"before"


@pytest.mark.parametrize("number", sorted(errors.FULL | errors.CLOSED))
def test_a_refusal_in_a_notebook_is_the_sentence_of_the_system(tmp_path, number):
    """Of another process's error only its text comes here."""
    error = OSError(number, os.strerror(number), "/runs/weights/a.safetensors")
    said = str(execute.failure(tmp_path / "notebooks" / "x.ipynb", type(error).__name__, str(error)))
    assert said == errors.of_the_system(error)
    assert "/runs/weights/a.safetensors" in said and os.strerror(number) in said and "\n" not in said


def test_a_refusal_of_the_system_is_no_traceback(tmp_path, monkeypatch, capsys):
    def app():
        raise OSError(errno.ENOSPC, "No space left on device", "/runs/a")

    monkeypatch.setattr(cli, "app", app)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    said = capsys.readouterr().err
    assert ended.value.code == 2 and said.count("\n") == 1
    assert said.startswith("fmfl: there is no room for /runs/a (No space left on device): make some there")


# ------------------------------------------------------------------------------------------ paths and locale


@pytest.mark.slow
def test_braces_in_a_path_are_taken_as_they_are(tmp_path):
    """Papermill puts a parameter's value in place of its name."""
    run_dir = tmp_path / "{size} {x}"
    cfg = config.settings({"run_name": str(run_dir), "size": 32, "num_phantoms": 40})
    cell = grid.plan(cfg, [0], ["iid"])[0]
    execute.in_kernel(cell, run_dir / "notebooks" / "01_data.ipynb")
    assert (run_dir / "notebooks" / "01_data.ipynb").exists()
    assert [found.name for found in tmp_path.iterdir()] == [run_dir.name]


@pytest.mark.slow
@pytest.mark.parametrize("encoding", [{"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, {}])
def test_an_ascii_terminal_gets_escapes(tmp_path, encoding):
    wanted = os.environ | {"LC_ALL": "C", "PYTHONIOENCODING": "ascii"} | encoding
    for arguments in (["data", tmp_path / "lungs ü ×"], ["report", tmp_path / "ü"], ["study", "--help"]):
        found = subprocess.run([*FMFL, *arguments], env=wanted, capture_output=True, text=True)
        assert "Traceback" not in found.stderr and found.returncode == (0 if "--help" in arguments else 2)


# ------------------------------------------------------------------------------------------ small batches


@pytest.mark.parametrize("size", [32, 64])
@pytest.mark.parametrize("name", [name for name in models.STUDENTS if name != "resnet34_unet"])
def test_the_smallest_batch_is_what_the_network_itself_takes(name, size):
    model = models.build(name)
    one = torch.zeros(1, 1, size, size)
    if models.smallest_batch(model, size) == 1:
        model.train()(one)
    else:
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            model.train()(one)
        model.train()(one.expand(2, 1, size, size))


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"batch_size": 1}, "the proxy set has 9 images, so with batch_size 1 a step sees one alone"),
        ({"batch_size": 2}, "the proxy set has 9 images, so with batch_size 2 a step sees one alone"),
        ({"batch_size": 1, "batch_norm": "group"}, ""),
        ({"batch_size": 1, "size": 64}, ""),
    ],
)
def test_a_batch_too_small_for_batchnorm_is_said_before_anything_runs(tmp_path, changed, says):
    given = {"run_name": str(tmp_path / "run"), "size": 32, "num_phantoms": 40, "student": "resnet18_unet"}
    cells = grid.plan(config.settings(given | changed), [0], ["iid"])
    if not says:
        preflight.check(cells)
        return
    with pytest.raises(UserError, match="set batch_norm to group") as caught:
        preflight.check(cells)
    assert says in str(caught.value)


# ------------------------------------------------------------------------------------------ weights


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: torch.full_like(t, torch.nan), "{key} holds NaN or infinity"),
        (lambda t: torch.full_like(t, torch.inf), "{key} holds NaN or infinity"),
        (lambda t: t.to(torch.int8), "{key} holds int8 instead of floating point"),
    ],
)
def test_weights_that_are_no_numbers_are_refused_by_tensor_and_file(tmp_path, change, says):
    state = load_file(teacher.BUILTIN_WEIGHTS)
    key = next(name for name, value in state.items() if value.ndim == 2)
    save_file(state | {key: change(state[key])}, tmp_path / "bad.safetensors")
    with pytest.raises(UserError, match=re.escape(says.format(key=key))) as caught:
        teacher.load("builtin", tmp_path / "bad.safetensors")
    assert str(tmp_path / "bad.safetensors") in str(caught.value)


@pytest.mark.parametrize("value", [0.0, 0.5])
def test_weights_of_one_number_are_refused(tmp_path, value):
    state = load_file(teacher.BUILTIN_WEIGHTS)
    save_file({k: torch.full_like(v, value) for k, v in state.items()}, tmp_path / "flat.safetensors")
    with pytest.raises(UserError, match="every other matrix hold one number each"):
        teacher.load("builtin", tmp_path / "flat.safetensors")


def test_a_start_of_nan_is_refused(tmp_path):
    model = models.build("tiny_unet")
    state = {k: v.clone().contiguous() for k, v in model.state_dict().items()}
    key = next(name for name, value in state.items() if value.ndim == 4)
    state[key][0] = torch.nan
    save_file(state, tmp_path / "start.safetensors")
    with pytest.raises(UserError, match="holds NaN"):
        models.load_weights(model, tmp_path / "start.safetensors")

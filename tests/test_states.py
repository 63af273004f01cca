"""States come back from their files bit by bit, damaged files are recognised, digests see every change."""

import hashlib
import inspect
import os
import shutil
import stat
import subprocess
from pathlib import Path

import pytest
import torch

from fmfl import paths, states


def a_state(seed: int = 0) -> states.State:
    """Every kind of tensor that a checkpoint holds."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "weight": torch.randn(3, 2, 3, 3, generator=generator).to(memory_format=torch.channels_last),
        "half": torch.randn(5, generator=generator).bfloat16(),
        "num_batches_tracked": torch.tensor(7),
        "negative_zero": torch.tensor([-0.0]),
    }


def same(one: states.State, other: states.State) -> bool:
    """Equal in names, dtypes, shapes and bytes."""
    return one.keys() == other.keys() and all(
        value.dtype == other[key].dtype
        and value.shape == other[key].shape
        and states.tensor_digest(value) == states.tensor_digest(other[key])
        for key, value in one.items()
    )


def test_a_state_and_its_record_come_back_bit_by_bit(tmp_path):
    file = tmp_path / "below" / "a.safetensors"
    states.write_state(file, a_state(), fingerprint="abc", history=[{"dice": 0.5}])
    state, record = states.read_state(file, fingerprint="abc")
    assert same(state, a_state())
    assert record == {
        "fingerprint": "abc",
        "history": [{"dice": 0.5}],
        "sha256": states.state_digest(a_state()),
    }
    assert states.read_record(file) == record
    assert [found.name for found in file.parent.iterdir()] == ["a.safetensors"], "no unfinished file stays"


def test_a_state_made_with_other_settings_is_not_taken(tmp_path):
    file = tmp_path / "a.safetensors"
    states.write_state(file, a_state(), fingerprint="abc")
    assert states.read_state(file, fingerprint="abd") is None
    assert states.read_state(file) is not None


def test_writing_goes_over_what_was_there(tmp_path):
    file = tmp_path / "a.safetensors"
    for seed in (0, 1):
        states.write_state(file, a_state(seed), seed=seed)
    state, record = states.read_state(file)
    assert record["seed"] == 1
    assert same(state, a_state(1))


def test_the_state_before_is_kept_where_that_is_wanted_and_only_there(tmp_path):
    file = tmp_path / "a.safetensors"
    for seed in (0, 1, 2):
        states.write_state(file, a_state(seed), keep_previous=True, seed=seed)
    assert [states.read_record(f)["seed"] for f in (file, states.previous(file))] == [2, 1]
    assert same(states.read_state(states.previous(file))[0], a_state(1))
    assert list(tmp_path.glob("*.safetensors")) == [file], "the one before is no result"
    states.write_state(file, a_state(3), seed=3)
    assert list(tmp_path.iterdir()) == [file]


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    file = tmp_path / "a.safetensors"
    states.write_state(file, a_state(), step=1)
    with pytest.raises(TypeError, match="JSON"):
        states.write_state(file, a_state(1), step=object())
    state, record = states.read_state(file)
    assert record["step"] == 1
    assert same(state, a_state())


@pytest.mark.parametrize("kind", ["state", "bytes"])
def test_a_name_points_at_a_new_content_only_after_it_has_reached_the_disk(tmp_path, monkeypatch, kind):
    """Else a power cut could leave the name with nothing behind it, the old content gone."""
    calls = []
    sync, replace = os.fsync, os.replace

    def logged_sync(opened):
        about = os.fstat(opened)
        calls.append("folder" if stat.S_ISDIR(about.st_mode) else f"{about.st_size} bytes")
        sync(opened)

    def logged_replace(old, new):
        calls.append(f"replace {os.path.basename(new)}")
        replace(old, new)

    monkeypatch.setattr(os, "fsync", logged_sync)
    monkeypatch.setattr(os, "replace", logged_replace)
    for _ in range(2):
        calls.clear()
        if kind == "state":
            states.write_state(tmp_path / "a", a_state(), keep_previous=True)
        else:
            states.write_bytes(tmp_path / "a", b"0123")
    size = (tmp_path / "a").stat().st_size
    before = ["replace a.previous"] if kind == "state" else []
    assert calls == [f"{size} bytes", *before, "replace a", "folder"]


@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "header", "one bit", "text", "folder"])
def test_a_damaged_file_is_no_state(tmp_path, damage):
    file = tmp_path / "a.safetensors"
    states.write_state(file, a_state(), fingerprint="abc")
    whole = file.read_bytes()
    file.unlink()
    if damage == "folder":
        file.mkdir()
    elif damage != "missing":
        flipped = whole[:-3] + bytes([whole[-3] ^ 1]) + whole[-2:]
        header = whole[:20] + b"\xff" + whole[21:]
        contents = {"empty": b"", "cut": whole[:-1], "header": header, "one bit": flipped, "text": b"<html>"}
        file.write_bytes(contents[damage])
    assert states.read_state(file) is None
    assert states.read_state(file, fingerprint="abc") is None


def test_a_file_without_a_record_is_read_as_it_is(tmp_path):
    """Weights that another program wrote."""
    from safetensors.torch import save_file

    save_file({"weight": torch.ones(2)}, tmp_path / "a.safetensors")
    state, record = states.read_state(tmp_path / "a.safetensors")
    assert record == {}
    assert torch.equal(state["weight"], torch.ones(2))


def test_the_digest_of_a_state_sees_names_and_values_and_neither_order_nor_layout():
    state = a_state()
    digest = states.state_digest(state)
    assert digest == states.state_digest(dict(reversed(state.items())))
    assert digest == states.state_digest(state | {"weight": state["weight"].contiguous()})
    moved = {"w" + key: value for key, value in state.items()}
    nudged = state["weight"].clone()
    nudged[2, 1, 2, 2] = torch.nextafter(nudged[2, 1, 2, 2], torch.tensor(9.0))
    for other in (moved, state | {"weight": nudged}, state | {"more": torch.zeros(1)}):
        assert states.state_digest(other) != digest


def test_a_fingerprint_sees_every_part():
    parts = [("a", 1, {"b": [1.0, None]}), ("a", 1, {"b": [1.0]}), ("a", 1.5, {"b": [1.0, None]}), ("a1", {})]
    assert len({states.fingerprint(*part) for part in parts}) == len(parts)
    assert states.fingerprint({"a": 1, "b": 2}) == states.fingerprint({"b": 2, "a": 1})
    assert states.fingerprint(paths.ROOT) == states.fingerprint(str(paths.ROOT))


def digest_of(folder: Path, monkeypatch, sources: dict[str, bytes]) -> str:
    """The digest of modules with these sources."""
    monkeypatch.setattr(paths, "PACKAGE", folder)
    for name, source in sources.items():
        (folder / name).write_bytes(source)
    states.code_digest.cache_clear()
    try:
        return states.code_digest(tuple(sources))
    finally:
        states.code_digest.cache_clear()


def test_the_digest_of_code_is_what_hashlib_says_of_its_text(tmp_path, monkeypatch):
    one, other = b"x = 1\n", "é = 2\n".encode()
    lines = [f"{hashlib.sha256(text).hexdigest()}  {name}.py\n" for text, name in ((one, "b"), (other, "a"))]
    wanted = hashlib.sha256("".join(lines).encode()).hexdigest()
    assert digest_of(tmp_path, monkeypatch, {"b.py": one, "a.py": other}) == wanted


@pytest.mark.skipif(not shutil.which("sha256sum"), reason="needs GNU's sha256sum")
def test_the_digest_of_code_is_what_sha256sum_prints():
    sums = subprocess.run(["sha256sum", *states.TRAINING_CODE], cwd=paths.PACKAGE, capture_output=True)
    whole = subprocess.run(["sha256sum"], input=sums.stdout, capture_output=True, text=False)
    assert whole.stdout.decode().split()[0] == states.code_digest()


@pytest.mark.parametrize("version", ["3.11", "3.12", "3.13", "3.14"])
def test_every_python_gives_the_same_code_the_same_digest(version):
    """Without PyTorch there: the function alone, from its source."""
    python = shutil.which(f"python{version}")
    if not python or subprocess.run([python, "-V"], capture_output=True).returncode:
        pytest.skip(f"no Python {version} here")
    source = inspect.getsource(states.code_digest)
    head = "import hashlib\nfrom functools import cache\nfrom fmfl import paths\n"
    script = f"{head}TRAINING_CODE = {states.TRAINING_CODE}\n{source}\nprint(code_digest())"
    found = subprocess.run([python, "-c", script], cwd=paths.ROOT, capture_output=True, text=True)
    assert found.stdout.strip() == states.code_digest(), found.stderr


def test_the_digest_of_code_sees_every_change_but_that_of_line_endings(tmp_path, monkeypatch):
    code = digest_of(tmp_path, monkeypatch, {"a.py": b"def f(x):\n    return x + 1\n"})
    assert code == digest_of(tmp_path, monkeypatch, {"a.py": b"def f(x):\r\n    return x + 1\r\n"})
    assert code != digest_of(tmp_path, monkeypatch, {"a.py": b"def f(x):\n    return x + 2\n"})
    assert code != digest_of(tmp_path, monkeypatch, {"b.py": b"def f(x):\n    return x + 1\n"})


def test_the_modules_that_decide_what_training_computes_are_there():
    for name in states.TRAINING_CODE:
        assert (paths.PACKAGE / name).is_file()

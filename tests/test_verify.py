"""Two folders are equal, part in a named round and tensor, or are no studies: made by hand, and real ones."""

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest
import torch

from fmfl import states
from fmfl.study import cli, verify

RUN = "federated-iid-fm-seed0"
STATE = {
    "a.weight": torch.tensor([1.0, 2.0]),
    "b.weight": torch.tensor([[3.0], [4.0]]),
    "count": torch.tensor(3),
}
ROUNDS = ["00", "11", "22"]


def a_study(folder: Path, state: states.State = STATE, rounds=ROUNDS, dice: float = 0.75, **changes) -> Path:
    """A study of one start and one run of two rounds."""
    digests = {}
    for name, held in (("init-fm-seed0", STATE), (RUN, state)):
        states.write_state(folder / "weights" / f"{name}.safetensors", held)
        digests[f"{name}.safetensors"] = states.state_digest(held)
    manifest = {
        "fmfl": "1.0",
        "created": str(folder),  # no two studies are made at once
        "versions": {"torch": "2"},
        "device": {"kind": "cpu"},
        "settings": {"run_name": folder.name, "num_rounds": 2},
        "data": {"fingerprint": "f"},
        "weights": digests,
        "rounds": {RUN: rounds},
    }
    (folder / "manifest.json").write_text(json.dumps(manifest | changes))
    rows = [
        {
            **{"arm": "federated", "init": "fm", "split": "iid", "seed": 0, "round": number, "dice": 0.5},
            **{"iou": 0.4, "hd95": 3.0, "seconds": 1.0, "bytes_up": 8, "bytes_down": 8, "images_seen": 20},
        }
        for number in range(3)
    ]
    rows[2] |= {"dice": dice, "seconds": len(str(folder))}
    pd.DataFrame(rows).to_csv(folder / "results.csv", index=False)
    return folder


def changed(**tensors: torch.Tensor) -> states.State:
    return STATE | {name.replace("_", "."): value for name, value in tensors.items()}


@pytest.fixture
def one(tmp_path) -> Path:
    return a_study(tmp_path / "one")


def test_equal_studies_are_equal_whenever_and_wherever_they_were_made(tmp_path, one):
    assert verify.compare(one, a_study(tmp_path / "another")) == (
        [
            f"{RUN}: equal through round 2",
            "init-fm-seed0: equal",
            "results.csv: all 3 rows are equal, seconds aside",
        ],
        True,
    )


def test_what_the_manifests_say_differs_is_named_and_parts_nothing(tmp_path, one):
    other = a_study(tmp_path / "other", versions={"torch": "3"}, settings={"run_name": "x", "num_rounds": 3})
    lines, equal = verify.compare(one, other)
    assert equal
    assert lines[:-3] == ["versions.torch: 2 | 3", "settings.num_rounds: 2 | 3"]


@pytest.mark.parametrize(
    ("rounds", "says"),
    [
        (["00", "xx", "yy"], "equal through round 0, then they part"),
        (["00", "11", "yy"], "equal through round 1, then they part"),
        (["00", "11"], "equal through round 1, then they part"),
        (["xx", "xx", "yy"], "they part from the start"),
    ],
)
def test_the_round_and_the_tensor_in_which_they_part_are_named(tmp_path, one, rounds, says):
    """The second value of b.weight is 0.5 larger, and it is not the first one that is checked."""
    state = changed(b_weight=torch.tensor([[3.0], [4.5]]), count=torch.tensor(5))
    lines, equal = verify.compare(one, a_study(tmp_path / "other", state, rounds))
    assert not equal
    assert lines[0] == f"{RUN}: {says}; final weights differ first in b.weight (by 0.5), at most by 2"


@pytest.mark.parametrize(
    "state",
    [
        changed(a_weight=torch.tensor([1.0, torch.nan])),
        changed(a_weight=torch.tensor([1.0, torch.inf])),
        changed(a_weight=torch.tensor([1.0])),
        changed(a_weight=torch.tensor([1.0, 2.0], dtype=torch.float64)),
        {name: value for name, value in STATE.items() if name != "a.weight"},
    ],
    ids=["NaN", "infinity", "shape", "dtype", "missing"],
)
@pytest.mark.parametrize("tolerance", [0.0, 1e6])
def test_tensors_that_cannot_be_near_are_not(tmp_path, one, state, tolerance):
    for pair in ((one, a_study(tmp_path / "other", state)), (tmp_path / "other", one)):
        lines, equal = verify.compare(*pair, tolerance)
        assert not equal and "differ first in a.weight (" in lines[0] and "at most" not in lines[0]


def test_bit_by_bit_means_the_sign_of_zero_too(tmp_path):
    studies = [a_study(tmp_path / str(v), changed(a_weight=torch.tensor([v, 1.0]))) for v in (0.0, -0.0)]
    assert not verify.compare(*studies)[1]
    assert verify.compare(*studies, 1e-9)[1]


def test_between_devices_what_lies_within_the_tolerance_is_equal(tmp_path, one):
    state = changed(a_weight=torch.tensor([1.0, 2.5]), b_weight=torch.tensor([[3.25], [4.0]]))
    other = a_study(tmp_path / "other", state, ["00", "xx", "yy"], dice=1.0)
    for tolerance, expected in ((0.0, False), (0.4, False), (0.5, True), (0.6, True)):
        lines, equal = verify.compare(one, other, tolerance)
        assert equal == expected
        assert lines[0].startswith(
            f"{RUN}: equal through round 0, then they part; final weights differ first in a.weight"
        )
        assert lines[0].endswith("at most by 0.5" + ", within the tolerance" * expected)


@pytest.mark.parametrize(("tolerance", "expected"), [(0.0, False), (0.2, False), (0.25, True)])
def test_results_are_compared_row_by_row(tmp_path, one, tolerance, expected):
    lines, equal = verify.compare(one, a_study(tmp_path / "other", dice=1.0), tolerance)
    assert equal == expected
    assert lines[-1] == (
        "results.csv: all 3 rows are equal within the tolerance, seconds aside"
        if expected
        else "results.csv: 1 of 3 rows differ, first arm federated, init fm, split iid, seed 0, round 2: "
        "dice 0.75 | 1.0"
    )


def test_bytes_are_left_aside_between_engines_and_nothing_else_is(tmp_path, one):
    """Flower's are measured, with what stands around the weights."""
    for dice in (0.75, 1.0):
        other = a_study(tmp_path / f"other{dice}", dice=dice, settings={"engine": "flower", "num_rounds": 2})
        table = pd.read_csv(other / "results.csv")
        table.assign(bytes_up=9, bytes_down=10).to_csv(other / "results.csv", index=False)
        lines, equal = verify.compare(one, other)
        assert equal == (dice == 0.75)
        assert "settings.engine: None | flower" in lines and "as the engines differ" in lines[-1]
    other = a_study(tmp_path / "other")
    pd.read_csv(other / "results.csv").assign(bytes_up=9).to_csv(other / "results.csv", index=False)
    assert not verify.compare(one, other)[1], "the same engine has to give the same bytes"


def test_the_last_bit_of_a_score_counts(tmp_path, one):
    nearly = float(torch.nextafter(torch.tensor(0.75, dtype=torch.float64), torch.tensor(1.0).double()))
    assert not verify.compare(one, a_study(tmp_path / "other", dice=nearly))[1]


def test_a_row_that_one_study_lacks_is_a_difference(tmp_path, one):
    other = a_study(tmp_path / "other")
    table = pd.read_csv(other / "results.csv")
    table.iloc[1:].to_csv(other / "results.csv", index=False)
    for pair in ((one, other), (other, one)):
        lines, equal = verify.compare(*pair, 100.0)
        assert not equal and "1 of 3 rows differ" in lines[-1] and "round 0: dice" in lines[-1]


def test_scores_that_are_missing_in_both_are_equal(tmp_path, one):
    other = a_study(tmp_path / "other")
    for folder in (one, other):
        pd.read_csv(folder / "results.csv").assign(hd95=float("nan")).to_csv(
            folder / "results.csv", index=False
        )
    assert verify.compare(one, other)[1]


def test_a_run_that_one_study_lacks_is_a_difference(tmp_path, one):
    other = a_study(tmp_path / "other")
    manifest = json.loads((other / "manifest.json").read_text())
    del manifest["weights"][f"{RUN}.safetensors"], manifest["rounds"][RUN]
    (other / "manifest.json").write_text(json.dumps(manifest))
    for pair in ((one, other), (other, one)):
        lines, equal = verify.compare(*pair)
        assert not equal and lines[0] == f"{RUN}: only in {one}"


def test_folders_passed_on_without_weights_are_compared_by_their_manifests(tmp_path, one):
    equals, parts = a_study(tmp_path / "equals"), a_study(tmp_path / "parts", changed(count=torch.tensor(4)))
    for folder in (equals, parts):
        shutil.rmtree(folder / "weights")
    assert verify.compare(one, equals)[1]
    lines, equal = verify.compare(one, parts)
    assert not equal and lines[0].endswith("final weights differ and are not there to compare")


def test_weights_changed_behind_the_manifests_back_are_found(tmp_path, one):
    other = a_study(tmp_path / "other")
    states.write_state(other / "weights" / f"{RUN}.safetensors", changed(a_weight=torch.tensor([1.0, 2.5])))
    lines, equal = verify.compare(one, other)
    assert not equal
    assert lines[0] == (
        f"{RUN}: equal through round 2; final weights differ first in a.weight (by 0.5), at most by 0.5"
    )


def test_starts_have_no_rounds_and_are_compared_too(tmp_path, one):
    other = a_study(tmp_path / "other")
    states.write_state(other / "weights" / "init-fm-seed0.safetensors", changed(count=torch.tensor(4)))
    lines, equal = verify.compare(one, other)
    assert not equal
    assert lines[1] == "init-fm-seed0: the weights differ first in count (by 1), at most by 1"


# ------------------------------------------------------------------------------------------ the command


@pytest.fixture
def fmfl(monkeypatch, capsys):
    """The command as a shell runs it: exit code, what it says, what it complains of."""

    def command(*arguments) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["fmfl", *map(str, arguments)])
        code = 0
        try:
            cli.main()
        except SystemExit as ended:
            code = ended.code or 0
        said = capsys.readouterr()
        return code, said.out, said.err

    return command


def test_the_exit_code_says_whether_they_are_equal(tmp_path, one, fmfl):
    code, out, err = fmfl("verify", one, a_study(tmp_path / "equal"))
    assert (code, err) == (0, "") and out.splitlines()[0] == f"{RUN}: equal through round 2"
    parted = a_study(tmp_path / "parted", changed(count=torch.tensor(4)), ["00", "xx", "yy"])
    code, out, err = fmfl("verify", one, parted)
    assert (code, err) == (1, "") and "equal through round 0, then they part" in out
    assert fmfl("verify", one, parted, "--tolerance", "1")[0] == 0


def spoil(folder: Path, what: str) -> None:
    files = {"manifest": folder / "manifest.json", "results": folder / "results.csv"}
    kind, _, how = what.partition(" ")
    file = files.get(kind, folder / "weights" / f"{RUN}.safetensors")
    if how == "gone":
        file.unlink()
    else:
        whole = file.read_bytes()
        twice = whole + whole.splitlines(keepends=True)[-1]
        contents = {"cut": whole[:-20], "list": b"[]", "text": b"a,b\n1\n", "empty": b"", "twice": twice}
        file.write_bytes(contents[how])


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("manifest gone", "manifest.json is missing"),
        ("manifest cut", "manifest.json is damaged"),
        ("manifest list", "manifest.json is no study's manifest"),
        ("results gone", "results.csv is missing"),
        ("results text", "results.csv is damaged"),
        ("results empty", "results.csv is damaged"),
        ("results twice", "results.csv holds a row twice"),
        ("weights cut", f"{RUN}.safetensors is damaged"),
    ],
)
def test_a_folder_that_is_no_study_is_one_sentence(tmp_path, one, fmfl, what, says):
    other = a_study(tmp_path / "other")
    spoil(other, what)
    for pair in ((one, other), (other, one)):
        code, out, err = fmfl("verify", *pair)
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert err.startswith("fmfl: ") and says in err and str(other) in err


def test_wrong_arguments_are_one_sentence(tmp_path, one, fmfl):
    code, out, err = fmfl("verify", one, tmp_path / "nowhere")
    assert (code, out) == (2, "") and "nowhere: there is no such folder" in err
    for wrong in ("-1", "nan", "inf"):
        code, out, err = fmfl("verify", one, one, f"--tolerance={wrong}")
        assert (code, out) == (2, "") and "--tolerance is" in err and "at least 0" in err


@pytest.mark.slow
def test_real_studies_are_equal_by_themselves_and_part_where_a_setting_says_so(tmp_path, fmfl):
    """A server that takes another step parts the federated runs in round 1, and no other run."""
    tiny = ["-p", "size=32", "-p", "num_phantoms=40", "-p", "num_rounds=2", "-p", "proxy_epochs=1"]
    tiny += ["-p", "student=tiny_unet", "-p", "inits=random,fm", "--splits", "iid", "--plain"]
    for name, more in {"a": [], "b": [], "c": ["-p", "server=momentum"]}.items():
        assert fmfl("study", *tiny, *more, "--out", tmp_path / name)[0] == 0
    code, out, _ = fmfl("verify", tmp_path / "a", tmp_path / "b")
    lines = out.splitlines()
    assert code == 0
    assert sum(line.endswith(": equal through round 2") for line in lines) == 2 + 1 + 3
    assert sum(line.endswith(": equal") for line in lines) == 2 and len(lines) == 9
    code, out, _ = fmfl("verify", tmp_path / "a", tmp_path / "c")
    assert code == 1
    assert "settings.server: average | momentum" in out
    assert (
        "federated-iid-fm-seed0: equal through round 0, then they part; final weights differ first in" in out
    )
    assert "centralised-pooled-random-seed0: equal through round 2\n" in out
    assert "standalone-iid-random-seed0-client0: equal through round 2\n" in out
    manifest = json.loads((tmp_path / "a" / "manifest.json").read_text())
    for name, rounds in manifest["rounds"].items():
        assert rounds[-1] == manifest["weights"][f"{name}.safetensors"] and len(rounds) == 3
    assert manifest["rounds"][RUN][0] == manifest["weights"]["init-fm-seed0.safetensors"]

"""A study's settings from a file: what it says counts as on the command line, which goes before it."""

import sys

import pytest

from fmfl.study import cli, grid

FILE = """
profile: smoke
out: runs/from-file
seeds: [0, 1]
splits: [iid, age]
teacher: builtin
num_rounds: 3
learning_rate: 1e-3     # YAML 1.1 reads a text here
inits: [random, fm]
deterministic: yes
vary:
  labelled: [10, 30]
  learning_rate: 1e-4
"""


@pytest.fixture
def planned(monkeypatch, tmp_path, capsys):
    """Settings, seeds, splits and variants of the study that a command plans; or its refusal."""
    monkeypatch.chdir(tmp_path)

    def study(*arguments, text=FILE):
        (tmp_path / "sweep.yaml").write_text(text)
        plans = []
        monkeypatch.setattr(grid, "plan", lambda *plan: plans.append(plan) or sys.exit(0))
        monkeypatch.setattr(sys, "argv", ["fmfl", "study", "--settings", "sweep.yaml", *arguments])
        with pytest.raises(SystemExit):
            cli.main()
        return plans[0] if plans else capsys.readouterr().err

    return study


def test_a_file_says_what_a_command_line_says(planned, tmp_path, monkeypatch):
    cfg, *rest = planned()
    assert rest == [[0, 1], ["iid", "age"], {"labelled": [10.0, 30.0], "learning_rate": [1e-4]}]
    assert cfg.run_dir == tmp_path / "runs" / "from-file"
    monkeypatch.setattr(grid, "plan", None)
    by_hand = ["--profile", "smoke", "--out", "runs/from-file", "--seeds", "0,1", "--splits", "iid,age"]
    by_hand += ["-p", "num_rounds=3", "-p", "learning_rate=1e-3", "-p", "inits=random,fm"]
    by_hand += ["-p", "deterministic=True", "--vary", "labelled=10,30", "--vary", "learning_rate=1e-4"]
    assert planned(*by_hand, text="{num_rounds: 3}") == (cfg, *rest)


def test_the_command_line_goes_before_the_file_name_by_name(planned):
    cfg, seeds, _, vary = planned(
        *("-p", "num_rounds=7", "--seeds", "5", "--profile", "class", "--vary", "labelled=20")
    )
    assert (cfg.federate.num_rounds, cfg.federate.learning_rate, seeds) == (7, 1e-3, [5])
    assert cfg.data.num_phantoms == 320, "of the profile class"
    assert vary == {"labelled": [20.0], "learning_rate": [1e-4]}


def test_names_of_parameters_serve_for_options_too(planned):
    cfg, seeds, splits, _ = planned(text="run_name: x\nseed: 4\nsplit: iid\n")
    assert (cfg.run_dir.name, seeds, splits) == ("x", [4], ["iid"])


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("lerning_rate: 1e-3", "parameter 'lerning_rate' is unknown: did you mean learning_rate?"),
        ("sed: 1", "parameter 'sed' is unknown: did you mean seed?"),
        ("var: {labelled: 10}", "parameter 'var' is unknown: did you mean vary?"),
        ("vary: {labeled: 10}", "parameter 'labeled' is unknown: did you mean labelled?"),
        ("vary: [labelled]", "vary must hold one `NAME: [VALUE, ...]` a line"),
        ("vary: {labelled: }", "labelled has no value: write `labelled: VALUE`"),
        ("alpha:", "alpha has no value: write `alpha: VALUE`"),
        ("alpha: {a: 1}", "alpha has no value"),
        ("alpha: abc", "parameter alpha must be a number, not 'abc' (str)"),
        ("alpha: 2", "parameter alpha is 2.0: it must lie between 0 and 1"),
        ("num_rounds: 2.5", "parameter num_rounds must be a whole number, not 2.5"),
        ("alpha: 0.5\nalpha: 0.6", "alpha is given twice: name each parameter once"),
        ("seed: 1\nseeds: 2", "seeds is given twice, once as seed"),
        ("alpha: [1", "it is not valid YAML in line"),
        ("alpha 0.5", "it holds no parameters: write one `NAME: VALUE` a line"),
        ("", "it holds no parameters"),
    ],
)
def test_a_mistake_in_a_file_is_one_sentence_that_names_it(planned, tmp_path, text, says):
    refusal = planned(text=text)
    assert refusal.startswith(f"fmfl: --settings sweep.yaml: {says}") and refusal.count("\n") == 1
    assert [file.name for file in tmp_path.iterdir()] == ["sweep.yaml"]


def test_a_file_that_cannot_be_read_is_one_sentence(planned, monkeypatch, tmp_path):
    (tmp_path / "folder").mkdir()
    for name, why in (("none.yaml", "No such file"), ("folder", "Is a directory")):
        assert f"--settings {name}: it cannot be read ({why}" in planned("--settings", name)


def test_a_file_of_a_printed_page_is_no_text(planned, tmp_path):
    (tmp_path / "page.yaml").write_bytes(b"\xff\xfe\x00")
    assert "--settings page.yaml: it cannot be read (not UTF-8)" in planned("--settings", "page.yaml")

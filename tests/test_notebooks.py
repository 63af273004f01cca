"""The notebooks have one rhythm, check their parameters, and are given all that they depend on.

What they compute is run by nbval (`make test`) and by the studies of test_study.py.
"""

import ast
import re
import subprocess
import sys

import nbformat
import papermill
import pytest
from papermill.exceptions import PapermillExecutionError

from fmfl import config, paths
from fmfl.errors import UserError
from fmfl.study import grid, outputs

NAMES = ["01_data", "02_teacher", "03_distill", "04_federate", "05_analysis"]
NOTEBOOKS = {name: nbformat.read(paths.NOTEBOOKS / f"{name}.ipynb", as_version=4) for name in NAMES}


def code(name: str) -> list[str]:
    return [cell.source for cell in NOTEBOOKS[name].cells if cell.cell_type == "code"]


def prose(name: str) -> list[str]:
    return [cell.source for cell in NOTEBOOKS[name].cells if cell.cell_type == "markdown"]


def test_these_are_all_notebooks():
    assert sorted(file.stem for file in paths.NOTEBOOKS.glob("*.ipynb")) == NAMES == list(outputs.DEPENDS)


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_has_the_rhythm_of_all(name):
    """Title, goal, needs and time; parameters; set-up; checks; what you should see; an exercise."""
    notebook, texts, cells = NOTEBOOKS[name], prose(name), code(name)
    nbformat.validate(notebook)
    assert re.match(rf"# {int(name[:2])} · \w+: ", texts[0])
    assert all(f"**{word}:** " in texts[0] for word in ("Goal", "Needs", "Time"))
    assert notebook.cells[0].cell_type == "markdown"
    tagged = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    assert tagged == [notebook.cells[1]]
    assert sum("config.from_notebook(globals())" in source for source in cells) == 1
    assert "config.from_notebook(globals())" in cells[1]
    assert any(source.startswith("assert ") or "\nassert " in source for source in cells)
    assert sum(source.startswith("# NBVAL_CHECK_OUTPUT\n") for source in cells) >= 1
    assert "**Check**" in "".join(texts) or "**Check.**" in "".join(texts)
    assert "**What you should see.**" in texts[-1] and "**Exercise.**" in texts[-1]
    assert all(len(source.splitlines()) <= 25 for source in cells), "a cell is a thought long"


@pytest.mark.parametrize("name", NAMES)
def test_a_committed_notebook_holds_no_error_no_path_and_nobody_else(name):
    for cell in NOTEBOOKS[name].cells:
        for output in cell.get("outputs", []):
            assert output.output_type != "error"
            assert output.get("name") != "stderr", "a warning or a progress bar"
            text = str(output.get("text", "")) + str(output.get("data", {}).get("text/plain", ""))
            assert str(paths.ROOT) not in text and not re.search(r"(^|[\s'\"])/(home|root|Users|tmp)/", text)
        assert "injected-parameters" not in cell.metadata.get("tags", []), "left from papermill"


def test_code_of_notebooks_is_formatted():
    ruff = [sys.executable, "-m", "ruff"]
    for command in (["format", "--check"], ["check"]):
        found = subprocess.run([*ruff, *command, paths.NOTEBOOKS], capture_output=True, text=True)
        assert found.returncode == 0, found.stdout + found.stderr


@pytest.mark.parametrize("name", NAMES)
def test_the_study_gives_a_notebook_all_that_it_depends_on(tmp_path, name):
    """What it reads as cfg.stage.name, and what stands in its own parameter cell."""
    cells = grid.plan(config.settings({"run_name": tmp_path}), [0], ["age"])
    (given,) = [set(cell.parameters) for cell in cells if cell.notebook == name]
    source = "\n".join(code(name))
    read = {field for stage, field in re.findall(r"\bcfg\.(\w+)\.(\w+)", source) if stage in config.STAGES}
    own = {n.id for n in ast.walk(ast.parse(code(name)[0])) if isinstance(n, ast.Name)}
    assert own | read <= given
    assert own >= {"run_name"}


def begin(name: str, injected: str) -> config.Settings:
    """Run a notebook up to its set-up, with a cell of papermill's after its parameters."""
    parameters, setup, *_ = code(name)
    namespace = {"__name__": "__main__", "In": [""]}
    for source in (parameters, f"# Parameters\n{injected}\n", setup):
        namespace["In"].append(source)
        exec(source, namespace)
    return namespace["cfg"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("injected", "says"),
    [
        ("numclients = 3", "parameter 'numclients' is unknown: did you mean num_clients?"),
        ("cfg = 3", "parameter 'cfg' is unknown"),
        ("num_clients = '3'", "parameter num_clients must be a whole number, not '3' (str)"),
        ("target_dice = 93", "parameter target_dice is 93.0: it must lie between 0 and 1"),
        ("loss = 'mse'", "parameter loss is 'mse': choose one of dice"),
    ],
)
def test_a_wrong_parameter_stops_a_notebook_in_its_set_up(name, injected, says):
    with pytest.raises(UserError) as caught:
        begin(name, injected)
    assert says in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", NAMES)
def test_any_stages_parameter_reaches_a_notebook(name):
    cfg = begin(name, "num_clients = 5\nalpha = 0.25\nrun_name = 'class'")
    assert cfg.changed() == {"num_clients": 5, "alpha": 0.25, "run_name": "class"}
    assert begin(name, "").changed() == {}, "as it stands it is the quick run"


# ------------------------------------------------------------------------------------------ papermill


def by_papermill(tmp_path, **parameters) -> nbformat.NotebookNode:
    """01_data, run from another folder than its own."""
    source, output = paths.NOTEBOOKS / "01_data.ipynb", tmp_path / "out.ipynb"
    tiny = {"run_name": str(tmp_path / "run"), "num_phantoms": 40, "size": 32}
    papermill.execute_notebook(
        source, output, tiny | parameters, kernel_name="python3", cwd=tmp_path, progress_bar=False
    )
    return nbformat.read(output, as_version=4)


@pytest.mark.slow
def test_papermill_with_an_unknown_parameter_ends_in_the_sentence(tmp_path):
    with pytest.raises(PapermillExecutionError) as caught:
        by_papermill(tmp_path, numclients=3)
    assert caught.value.ename == "UserError"
    assert caught.value.evalue == "parameter 'numclients' is unknown: did you mean num_clients?"
    outputs = [o for c in nbformat.read(tmp_path / "out.ipynb", 4).cells for o in c.get("outputs", [])]
    (error,) = [output for output in outputs if output.output_type == "error"]
    assert error.traceback == [f"UserError: {caught.value.evalue}"], "the sentence, without a traceback"
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_papermill_runs_a_notebook_with_changed_parameters(tmp_path):
    found = by_papermill(tmp_path, num_clients=4, seed=3)
    (checked,) = [cell for cell in found.cells if cell.source.startswith("# NBVAL_CHECK_OUTPUT")]
    assert checked.outputs[0].text == "True [4, 4, 4]\n", "clients under each split"
    assert (tmp_path / "run" / "cells" / "01_data" / "skew.csv").exists()
    assert len(list((tmp_path / "run" / "figures").glob("*.png"))) == 5

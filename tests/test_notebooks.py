"""The notebooks have one rhythm, check their parameters, and are given all that they depend on.

What they compute is run by nbval (`make test`) and by the studies of test_study.py.
"""

import ast
import re
import subprocess
import sys
from collections import Counter
from itertools import pairwise
from statistics import median

import nbformat
import papermill
import pytest
from papermill.exceptions import PapermillExecutionError

from fmfl import config, paths
from fmfl.errors import UserError
from fmfl.study import grid

NAMES = ["01_data", "02_teacher", "03_distill", "04_federate", "05_analysis", "06_use"]
NOTEBOOKS = {name: nbformat.read(paths.NOTEBOOKS / f"{name}.ipynb", as_version=4) for name in NAMES}


def code(name: str) -> list[str]:
    return [cell.source for cell in NOTEBOOKS[name].cells if cell.cell_type == "code"]


def prose(name: str) -> list[str]:
    return [cell.source for cell in NOTEBOOKS[name].cells if cell.cell_type == "markdown"]


def test_these_are_all_notebooks():
    assert sorted(file.stem for file in paths.NOTEBOOKS.glob("0*.ipynb")) == NAMES
    assert NAMES[:5] == list(config.NOTEBOOKS), "the last one is for people, and no part of a study"


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
    assert sum(source.startswith("# NBVAL_CHECK_OUTPUT\n") for source in cells) >= 1


@pytest.mark.parametrize("name", NAMES)
def test_headings_tell_the_story_in_jupyterlabs_contents(name):
    """One title, sections below it, no level skipped, and no bold line in a heading's place."""
    headings = re.findall(r"^(#+) (.+)$", "\n".join(prose(name)), re.M)
    levels = [len(marks) for marks, _ in headings]
    assert levels[0] == 1 and levels.count(1) == 1 and levels.count(2) >= 7
    assert all(below <= above + 1 for above, below in pairwise(levels))
    sections = [title for marks, title in headings if marks == "##"]
    assert sections[:2] == ["Parameters", "Set up"]
    assert sections[-4:] == ["Checks", "Save", "What you should see", "Exercise"]
    assert len(set(sections)) == len(sections)
    assert not re.search(r"^\*\*[^*]+\.\*\*( |$)", "\n".join(prose(name)), re.M)


@pytest.mark.parametrize("name", NAMES)
def test_code_follows_prose_and_a_cell_is_a_thought_long(name):
    cells = NOTEBOOKS[name].cells
    after_prose = [a.cell_type == "markdown" for a, b in pairwise(cells) if b.cell_type == "code"]
    assert sum(after_prose) >= 0.88 * len(after_prose)
    lengths = [len(source.splitlines()) for source in code(name)[1:]]
    assert max(lengths) <= 12 and 2 <= median(lengths) <= 5


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_links_to_its_neighbours_and_every_link_resolves(name):
    texts, place = prose(name), NAMES.index(name)
    neighbours = [f"({other}.ipynb)" for other in NAMES[max(0, place - 1) : place + 2] if other != name]
    for end in (texts[0], texts[-1]):
        assert all(link in end for link in neighbours), "at the top and at the bottom"
    for link in re.findall(r"\]\(([^)]+)\)", "\n".join(texts)):
        assert (paths.NOTEBOOKS / link).exists(), link


@pytest.mark.parametrize("name", NAMES)
def test_parameters_show_their_type_and_meaning_in_papermills_help(name):
    """Read as `papermill --help-notebook` does."""
    shown = papermill.inspect_notebook(paths.NOTEBOOKS / f"{name}.ipynb")
    assert shown.keys() == {node.target.id for node in ast.parse(code(name)[0]).body}
    for parameter, about in shown.items():
        kind = type(config.defaults()[parameter]).__name__
        assert (about["inferred_type_name"], parameter) == (kind, parameter)
        assert ast.literal_eval(about["default"]) == config.defaults()[parameter]
        assert len(about["help"]) > 5, f"{parameter} has no comment"


@pytest.mark.parametrize("name", NAMES)
def test_checks_are_folded_and_run_all_the_same(name):
    """JupyterLab hides their source; the assertions are under the heading Checks."""
    cells = NOTEBOOKS[name].cells
    first, last = (
        next(k for k, cell in enumerate(cells) if cell.source.startswith(heading))
        for heading in ("## Checks", "## Save")
    )
    checks = [cell for cell in cells[first:last] if cell.cell_type == "code" and "assert" in cell.source]
    assert len(checks) >= 2
    hidden = [cell for cell in cells if cell.metadata.get("jupyter", {}).get("source_hidden")]
    assert all(cell in hidden for cell in checks) and all(cell in cells[first:last] for cell in hidden)


def calls(name: str) -> Counter:
    """A notebook's calls of module functions: of the science, `fmfl.split.holdout`, and of the study's."""
    helpers = {"stages", "outputs", "provenance", "manifest", "report"}
    count = Counter()
    for node in ast.walk(ast.parse("\n".join(code(name)))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            function = ast.unparse(node.func)
            count["science"] += function.startswith("fmfl.")
            count["study"] += function.split(".")[0] in helpers
    return count


@pytest.mark.parametrize("name", NAMES[:4])
def test_a_notebook_calls_the_science_more_than_the_study(name):
    count = calls(name)
    assert count["science"] > count["study"]


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
    given = {cell.notebook: set(cell.parameters) for cell in cells}.get(name, config.taken_by(name))
    source = "\n".join(code(name))
    read = {field for stage, field in re.findall(r"\bcfg\.(\w+)\.(\w+)", source) if stage in config.STAGES}
    own = {node.target.id for node in ast.parse(code(name)[0]).body}
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
    *_, checked = [cell for cell in found.cells if cell.source.startswith("# NBVAL_CHECK_OUTPUT")]
    assert checked.outputs[0].text == "True [4, 4, 4]\n", "clients under each split"
    assert (tmp_path / "run" / "cells" / "01_data" / "skew.csv").exists()
    assert len(list((tmp_path / "run" / "figures").glob("*.png"))) == 5

"""Commands in the docs still parse: no command, option, parameter or value of them has gone."""

import re
import shlex
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from bench.__main__ import app as bench
from docs import pipeline
from fmfl import config, paths
from fmfl.study import cli, grid

FOLDERS = {"data": "README.md", "bench": "README.md", "docs": "**/*.md", ".": "*.md"}
PAGES = sorted(page for folder, pages in FOLDERS.items() for page in (paths.ROOT / folder).glob(pages))
#: Pages that name what is gone, at its commit or as a change.
OTHER_TIMES = {"CHANGELOG.md", "docs/privacy.md"}


def title(page):
    return page.relative_to(paths.ROOT).as_posix()


def code(page):
    """Lines of a page's blocks of code, continued lines joined, comments cut; then its code in sentences."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    blocks = re.findall(r"^```.*?\n(.*?)^```", text, flags=re.S | re.M)
    words = re.sub(r"^```.*?^```", "", text, flags=re.S | re.M)
    lines = "\n".join(blocks).splitlines() + re.findall(r"^ {4}(.*)", words, flags=re.M)
    return [re.sub(r"  *#.*", "", line).strip() for line in lines] + re.findall(r"`([^`\n]+)`", words)


def commands():
    """Every command of the project in the docs, with its page; parameters alone count as a study's."""
    for page in (page for page in PAGES if title(page) not in OTHER_TIMES):
        for line in dict.fromkeys(code(page)):
            line = re.sub(r'^sbatch .*--wrap "(.*)"$', r"\1", line)
            line = re.sub(r"^-p ([a-z]\w*)[ =](\S+)", r"fmfl study -p \1=\2", line)
            line = re.sub(r"^(ExecStart=)?(\S*/bin/)?(?=(fmfl|python|papermill) )", "", line)
            line = line.replace("$SLURM_ARRAY_TASK_ID", "0")  # of a job in an array
            if re.match(r"fmfl \w|python -m bench \w|papermill ", line):
                yield title(page), line.replace(" ... ", " ")


def files_of(page):
    """Files that a page shows, by the name in their first line: a block of YAML that begins `# NAME.yaml`."""
    text = (paths.ROOT / page).read_text(encoding="utf-8")
    return {
        name: block
        for block, name in re.findall(r"^```yaml\n(# (\S+\.yaml)\n.*?)^```", text, flags=re.S | re.M)
    }


def parse(app, arguments):
    """Parse a command line, run nothing, and return the values of its options."""
    parsed = []

    def without_calls(command):
        for one in getattr(command, "commands", {}).values():  # of a group
            without_calls(one)
        if not hasattr(command, "commands"):
            command.callback = lambda **values: parsed.append(values)
        return command

    without_calls(typer.main.get_command(app)).main(arguments, standalone_mode=False)
    assert parsed or arguments[-1] == "--help"
    return parsed[0] if parsed else {}


def here(name):
    """A path of a page below the folder of the test, also where the page's begins at the root."""
    return Path(name.lstrip("/"))


def check_study(arguments, monkeypatch):
    """Run a study's command up to its plan; its folders are made first, all of them below this one."""
    planned = []

    def plan(cfg, *others):
        planned.append(cfg)
        raise KeyboardInterrupt

    monkeypatch.setattr(grid, "plan", plan)
    for position, argument in enumerate(arguments[:-1]):
        if argument == "--data":
            names = [name for name in arguments[position + 1].split(",") if name != "phantom"]
            folders = [here(f"{name}{number}") for number, name in enumerate(names)]  # FOLDER,FOLDER are two
            for folder in folders:
                folder.mkdir(parents=True)
            arguments[position + 1] = ",".join(map(str, folders)) or "phantom"
        if argument == "--checkpoint":
            file = here(arguments[position + 1])
            file.parent.mkdir(parents=True, exist_ok=True)
            file.touch()
            arguments[position + 1] = str(file)
    result = CliRunner().invoke(cli.app, arguments)
    assert len(planned) == 1, f"{result.output} {result.exception}"


@pytest.mark.parametrize(("page", "command"), list(commands()))
def test_a_command_parses(page, command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    program, *arguments = shlex.split(command)
    for name, text in files_of(page).items():
        Path(name).write_text(text)
    if program == "papermill":
        notebook = paths.ROOT / next(name for name in arguments if name.endswith(".ipynb"))
        assert notebook.is_file()
        for name, value in re.findall(r" -[pr] (\S+) (\S+)", command):
            assert name in config.taken_by(notebook.stem)
            config.parse(name, value.strip('"'))
    elif page == "CONTRIBUTING.md" and "-p" in arguments:
        pass  # of a recipe: tests/test_contributing.py
    elif program == "python":
        parse(bench, arguments[2:])
    elif all(argument.isalpha() and argument.islower() for argument in arguments):
        parse(cli.app, [*arguments, "--help"])
    elif arguments[0] == "study":
        check_study(arguments, monkeypatch)
    else:
        for pair in parse(cli.app, arguments).get("p") or []:
            config.parse(*pair.split("=", 1))


def test_the_commands_are_found():
    """By hand: how often each program stands on a page of each kind."""
    found = list(commands())
    assert {page for page, command in found if command.startswith("fmfl study")} >= {
        *(f"docs/results/{name}/README.md" for name in ("v7-cpu", "v7-labels", "v7-choices")),
        *(f"docs/results/{name}/README.md" for name in ("centralised-128", "guangzhou-centralised")),
        *("README.md", "docs/batches.md", "docs/data.md", "docs/hospitals.md"),
    }
    assert ("docs/batches.md", "fmfl study -p deterministic=true") not in found
    assert ("docs/reproducibility.md", "fmfl study -p deterministic=true") in found
    assert any("fmfl flower client --data /data/xrays" in command for _, command in found)
    assert sum(command.startswith("python -m bench") for _, command in found) > 15
    assert any(command.startswith("papermill") for _, command in found)
    batches = [command for page, command in found if page == "docs/batches.md"]
    assert "fmfl study --settings sweep.yaml --out runs/sweep --no-progress" in batches, "what sbatch wraps"
    assert "learning_rate: 1e-3" in files_of("docs/batches.md")["sweep.yaml"]


def test_a_path_of_a_page_is_made_below_the_tests_folder(tmp_path, monkeypatch):
    (tmp_path / "inside").mkdir()
    monkeypatch.chdir(tmp_path / "inside")
    outside = tmp_path / "outside"
    check_study(
        ["study", "--data", f"{outside}/a,phantom", "--checkpoint", f"{outside}/b", "-p", "size=32"],
        monkeypatch,
    )
    assert not outside.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["study", "--jobs", "2"], "No such option"),
        (["study", "-p", "teacher_noise=0.1"], "is unknown"),
        (["study", "-p", "box_rule=point"], "choose one of"),
        (["study", "--settings", "sweep.yaml"], "is unknown: did you mean num_rounds"),
    ],
)
def test_a_command_with_what_is_gone_is_found(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("sweep.yaml").write_text("num_rouds: 3\n")
    with pytest.raises(AssertionError, match=message):
        check_study(arguments, monkeypatch)


def test_parameters_in_the_table_of_what_the_paper_leaves_open_exist():
    text = (paths.ROOT / "docs" / "findings.md").read_text(encoding="utf-8")
    cells = [line.split("|")[-2] for line in text.splitlines() if line.startswith("|")]
    names = [name for cell in cells for name in re.findall(r"`(\w+)`", cell)]
    assert len(names) >= 11
    assert set(names) <= set(config.PARAMETERS)


def test_notebooks_call_what_the_page_says():
    text = (paths.ROOT / "docs" / "notebooks.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| \[.*?\]\(\.\./(notebooks/.*?)\).*\| (`.*`) \|$", text, flags=re.M)
    assert len(rows) == 6
    for notebook, called in rows:
        code = (paths.ROOT / notebook).read_text(encoding="utf-8")
        for module in re.findall(r"`(\w+)`", called):
            assert f"fmfl.{module}" in code, f"{notebook} does not call {module}"


def test_the_picture_is_what_its_script_draws():
    assert pipeline.PAGE.read_text(encoding="utf-8") == pipeline.picture()

"""Each `fmfl study` command in the docs still parses: no option, parameter or value of it has gone."""

import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fmfl import paths
from fmfl.study import cli, grid

PAGES = [
    paths.ROOT / "README.md",
    # privacy.md says at which commit its command ran, and that the code was removed after it.
    *(page for page in sorted((paths.ROOT / "docs").rglob("*.md")) if page.name != "privacy.md"),
]


def commands() -> list[tuple[str, str]]:
    """The pages' commands, each with its page; a line that ends in a backslash goes on in the next one."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8").replace("\\\n", " ")
        for line in re.findall(r"^(?: {4}|`)?(fmfl study [^\n`#]*)", text, flags=re.M):
            if "..." not in line:
                found.append((str(page.relative_to(paths.ROOT)), line.strip()))
    return found


def test_the_results_pages_have_their_commands():
    pages = {page for page, _ in commands()}
    assert {"docs/batches.md", "docs/data.md"} <= pages
    assert {f"docs/results/{name}/README.md" for name in ("v7-cpu", "v7-labels", "v7-choices")} <= pages


@pytest.mark.parametrize(("page", "command"), commands())
def test_a_command_parses(page, command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    seen = []

    def plan(cfg, *arguments):
        seen.append(cfg)
        raise KeyboardInterrupt  # parsed; nothing is to be run

    monkeypatch.setattr(grid, "plan", plan)
    arguments = shlex.split(command)[1:]
    for position, argument in enumerate(arguments[:-1]):
        if argument == "--data":
            names = [name for name in arguments[position + 1].split(",") if name != "phantom"]
            folders = [Path(f"{name}{number}") for number, name in enumerate(names)]  # FOLDER,FOLDER are two
            for folder in folders:
                folder.mkdir(parents=True)
            arguments[position + 1] = ",".join(map(str, folders)) or "phantom"
    result = CliRunner().invoke(cli.app, arguments)
    assert len(seen) == 1, f"{page}: {command}: {result.output} {result.exception}"

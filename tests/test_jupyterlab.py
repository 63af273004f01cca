"""The notebooks in JupyterLab, as a person uses them: a browser runs all cells and moves what can be moved.

Needs Chromium on the machine, as test_browser.py. Screenshots are kept in the folder that the variable
FMFL_ARTEFACTS names, else in pytest's own.
"""

import json
import os
import secrets
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook
from playwright.sync_api import expect
from test_browser import browser  # noqa: F401, the fixture

from fmfl import config, paths

pytestmark = pytest.mark.slow

#: Settings of a run that is over in seconds.
TINY = {
    "size": 64,
    "num_phantoms": 60,
    "student": "tiny_unet",
    "proxy_epochs": 1,
    "num_rounds": 1,
    "alpha_sweep": "",
    "diagnostics": False,
}
#: All cells are in the page at once, and nobody asks about news.
SETTINGS = {
    "notebook-extension/tracker": {"windowingMode": "none"},
    "apputils-extension/notification": {
        "fetchNews": "false",
        "checkForUpdates": False,
        "doNotDisturbMode": True,
    },
}
MINUTE = 60_000  # milliseconds


def settings_for(lab: Path) -> None:
    for name, values in SETTINGS.items():
        file = lab / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(values))


def copy_notebooks(folder: Path, run: Path) -> None:
    """Copy the notebooks, with parameters after their own as papermill puts them."""
    for name in config.NOTEBOOKS:
        notebook = load_notebook_node(str(paths.NOTEBOOKS / f"{name}.ipynb"))
        notebook = parameterize_notebook(notebook, TINY | {"run_name": str(run)})
        nbformat.write(notebook, folder / f"{name}.ipynb")


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """A JupyterLab of its own: its address with the token, the notebooks' folder, and the artefacts'."""
    home = tmp_path_factory.mktemp("lab")
    for name in ("notebooks", "runtime", "config"):
        (home / name).mkdir()
    settings_for(home)
    copy_notebooks(home / "notebooks", home / "run")
    token = secrets.token_hex(16)
    places = {
        "JUPYTER_RUNTIME_DIR": home / "runtime",
        "JUPYTER_CONFIG_DIR": home / "config",
        "JUPYTERLAB_SETTINGS_DIR": home / "settings",
        "JUPYTERLAB_WORKSPACES_DIR": home / "workspaces",
    }
    command = [
        *(sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ServerApp.port=0"),
        *("--ServerApp.ip=127.0.0.1", f"--IdentityProvider.token={token}"),
        f"--ServerApp.root_dir={home / 'notebooks'}",
    ]
    environment = os.environ | {name: str(place) for name, place in places.items()}
    environment.pop("TQDM_DISABLE", None)  # a person sees bars
    with (home / "log").open("wb") as log:
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        try:
            address = wait_for_server(home, server)
            artefacts = Path(os.environ.get("FMFL_ARTEFACTS") or home / "artefacts")
            artefacts.mkdir(parents=True, exist_ok=True)
            yield SimpleNamespace(
                address=address, token=token, folder=home / "notebooks", artefacts=artefacts
            )
        finally:
            server.terminate()
            server.wait(timeout=30)


def wait_for_server(home: Path, server: subprocess.Popen) -> str:
    """The address of a server that has chosen its own port, from the file that it leaves when it is ready."""
    for _ in range(600):
        assert server.poll() is None, (home / "log").read_text()[-2000:]
        for file in (home / "runtime").glob("jpserver-*.json"):
            if text := file.read_text():
                return json.loads(text)["url"]
        time.sleep(0.1)
    raise AssertionError((home / "log").read_text()[-2000:])


def ask(lab, path, method="GET"):
    """An answer of the server's own interface."""
    request = urllib.request.Request(
        f"{lab.address}{path}", method=method, headers={"Authorization": f"token {lab.token}"}
    )
    with urllib.request.urlopen(request) as answer:
        return json.loads(answer.read() or "null")


@pytest.fixture
def opened(lab, browser):  # noqa: F811
    """Open a notebook and run all its cells; ends its kernel afterwards."""
    context = browser.new_context(viewport={"width": 1280, "height": 1000})
    page = context.new_page()
    page.errors = []
    page.on("pageerror", lambda error: page.errors.append(str(error)))

    def run(name):
        page.goto(f"{lab.address}lab/tree/{name}.ipynb?token={lab.token}&reset", timeout=2 * MINUTE)
        expect(page.locator(".jp-Notebook .jp-CodeCell").first).to_be_visible(timeout=MINUTE)
        expect(page.get_by_text("| Idle")).to_be_visible(timeout=MINUTE)
        page.get_by_role("menuitem", name="Run", exact=True).click()
        page.get_by_text("Run All Cells", exact=True).click()
        page.wait_for_function(OVER, timeout=10 * MINUTE)
        save(page)
        return page

    yield run
    context.close()
    for session in ask(lab, "api/sessions"):
        ask(lab, f"api/sessions/{session['id']}", "DELETE")


#: The last code cell has run, or one has failed.
OVER = """() => {
  const prompts = [...document.querySelectorAll('.jp-Notebook .jp-CodeCell .jp-InputPrompt')];
  return /^\\[\\d+\\]:$/.test(prompts.at(-1).textContent)
    || document.querySelector('[data-mime-type="application/vnd.jupyter.error"]') !== null;
}"""


def save(page):
    page.keyboard.press("Control+s")
    expect(page.locator(".jp-mod-dirty")).to_have_count(0, timeout=MINUTE)


def outputs(lab, name):
    """The outputs of a saved notebook whose code cells have all been run."""
    notebook = nbformat.read(lab.folder / f"{name}.ipynb", 4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    shown = [output for cell in code for output in cell.outputs]
    errors = [output for output in shown if output.output_type == "error"]
    assert not errors, errors
    assert all(cell.execution_count for cell in code), "a cell was not run"
    return shown


def live_piece(page):
    """The live piece of a notebook, in sight."""
    piece = page.locator(".fmfl-live")
    expect(piece).to_have_count(1)
    picture = piece.locator(".fmfl-stage img")
    expect(picture).to_be_visible()
    picture.scroll_into_view_if_needed()
    expect(page.get_by_text("Error displaying widget")).to_have_count(0)
    return piece


def handle(piece, label):
    """A slider's handle by its name, which is what software that reads aloud finds it by."""
    return piece.get_by_role("slider", name=label, exact=True)


def moved(lab, piece, name, move):
    """The seconds until another picture is in the place of the first, after a move; both are kept."""
    stage, picture = piece.locator(".fmfl-stage"), piece.locator(".fmfl-stage img")
    before, shown = picture.get_attribute("src"), stage.screenshot()
    piece.screenshot(path=lab.artefacts / f"{name}-before.png")
    started = time.perf_counter()
    move()
    expect(picture).not_to_have_attribute("src", before, timeout=MINUTE)
    seconds = time.perf_counter() - started
    assert stage.screenshot() != shown
    piece.screenshot(path=lab.artefacts / f"{name}-after.png")
    print(f"{name}: the picture changed {seconds:.2f} s after the move")
    return seconds


def test_01_runs_and_a_slider_deals_again(opened, lab):
    page = opened("01_data")
    outputs(lab, "01_data")
    piece = live_piece(page)
    words = piece.get_by_text("images: ").first.inner_text()

    def left():
        slider = handle(piece, "Age strength")
        slider.focus()
        for _ in range(8):
            slider.press("ArrowLeft")

    moved(lab, piece, "01_data", left)
    expect(piece.get_by_text("images: ").first).not_to_have_text(words)
    assert not page.errors


def test_02_runs_and_a_box_is_dragged_and_moved_by_keys(opened, lab):
    page = opened("02_teacher")
    outputs(lab, "02_teacher")
    piece = live_piece(page)
    area = piece.locator(".fmfl-area").bounding_box()

    def at(x, y):
        return area["x"] + x * area["width"], area["y"] + y * area["height"]

    def drag():
        page.mouse.move(*at(0.3, 0.5))
        page.mouse.down()
        page.mouse.move(*at(0.3, 0.6), steps=3)
        page.mouse.move(*at(0.3, 0.7), steps=3)
        page.mouse.up()

    moved(lab, piece, "02_teacher-drag", drag)
    slider = handle(piece, "Box 1, left/right, from")
    slider.focus()
    moved(lab, piece, "02_teacher-keys", lambda: slider.press("ArrowRight"))
    assert not page.errors


def test_03_runs_and_the_temperature_changes_the_loss_of_a_picture(opened, lab):
    page = opened("03_distill")
    outputs(lab, "03_distill")
    piece = live_piece(page)
    slider = handle(piece, "Temperature")
    slider.focus()
    moved(lab, piece, "03_distill", lambda: slider.press("ArrowRight"))
    assert not page.errors


def test_04_runs_and_rounds_are_stepped_run_and_paused(opened, lab):
    page = opened("04_federate")
    outputs(lab, "04_federate")
    piece = live_piece(page)
    words = piece.locator(".fmfl-words")
    expect(words).to_contain_text("after round 2:")
    moved(lab, piece, "04_federate-step", lambda: piece.get_by_role("button", name="Step").click())
    expect(words).to_contain_text("after round 3:")
    moved(lab, piece, "04_federate-run", piece.get_by_role("button", name="Run").click)
    expect(words).to_contain_text("after round 5:", timeout=MINUTE)
    piece.get_by_role("button", name="Pause").click()
    expect(piece.get_by_role("button", name="Run")).to_be_visible(timeout=MINUTE)
    expect(words).to_contain_text(f"after round {piece.locator('.widget-readout').inner_text()}:")
    expect(words).not_to_contain_text("after round 40:")
    assert not page.errors


def test_05_runs_and_leafs_to_another_image(opened, lab):
    """Needs the results of 04 in the same JupyterLab."""
    if not (lab.folder.parent / "run" / "cells").exists():
        pytest.skip("run with test_04: 05 reads its results")
    page = opened("05_analysis")
    outputs(lab, "05_analysis")
    piece = live_piece(page)
    words = piece.locator(".fmfl-words")
    expect(words).to_contain_text("teacher: Dice")
    slider = handle(piece, "Place")
    slider.focus()
    moved(lab, piece, "05_analysis", lambda: slider.press("ArrowRight"))
    assert not page.errors

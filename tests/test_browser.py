"""The report as a browser shows it: on a desk, on a phone, on paper, in the dark, and to assistive software.

Needs Chromium on the machine (`apt-get install chromium`), or its path in the variable CHROMIUM. The checks
of accessibility are axe-core's (MPL-2.0, inside axe-playwright-python).
"""

import os
import shutil
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import test_plots
import test_report
from axe_playwright_python.sync_playwright import Axe
from PIL import Image
from playwright.sync_api import sync_playwright

from fmfl import paths
from fmfl.analysis import plots
from fmfl.study import report
from fmfl.study.outputs import save_figure

pytestmark = pytest.mark.slow

NAMES = ("chromium", "chromium-browser", "google-chrome-stable", "google-chrome")
FLAGS = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)
DESK, PHONE = {"width": 1280, "height": 800}, {"width": 390, "height": 844}
PAPER = {"width": 688, "height": 1000}  # A4 without its margins of 14 mm, at 96 pixels an inch


@pytest.fixture(scope="module")
def browser():
    named = os.environ.get("CHROMIUM")
    path = named or next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        pytest.skip("no Chromium on this machine: install it, or name its file in the variable CHROMIUM")
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path, args=list(FLAGS))
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Two reports by name: a committed study with older figures, and a synthetic one with all of now."""
    folder = tmp_path_factory.mktemp("pages")
    committed = shutil.copytree(paths.ROOT / "docs" / "results" / "v7-cpu", folder / "committed")
    old = Image.open(committed / "figures" / "fig3.png").resize((973, 491))  # as studies once drew it
    old.save(committed / "figures" / "fig3.png")
    synthetic = folder / "synthetic"
    synthetic.mkdir()
    settings, teacher = test_report.SETTINGS, test_report.TEACHER | {"sha256": "f" * 64}
    weights = {f"federated-age-fm-seed{seed}.safetensors": "e" * 64 for seed in range(3)}
    test_report.study(synthetic, settings=settings, teacher=teacher, weights=weights)
    wide_tables(synthetic)
    plots.use_style()
    for name, figure in test_plots._every_figure():
        save_figure(SimpleNamespace(run_dir=synthetic), f"{name}_age" if name == "clients" else name, figure)
    return {path.name: report.write(path) for path in (committed, synthetic)}


def wide_tables(folder):
    """The tables with as many columns, and as long words, as a study may have."""
    who = {"arm": "federated", "init": "fm", "split": "dirichlet", "seeds": 3}
    spent = {"rounds": 12.5, "rounds_low": 11.0, "rounds_high": 14.0, "seconds": 1234.5, "bytes": 2e9}
    spent |= {"images_seen": 323000, "curve": 50.0, "curve_low": 49.0, "curve_high": 51.0}
    speed = [who | spent | {"target": target, "reached": 2, "capped": True} for target in (0.9, 0.92)]
    pd.DataFrame(speed).to_csv(folder / "speed.csv", index=False)
    worst = {"dice": 90.0, "worst_tenth": 80.0, "failures": 1.0, "worst_client_dice": 88.0, "hd95": 12.3}
    worst |= {"assd": 1.2, "worst_band": "80 and more", "worst_band_dice": 85.0}
    worst |= {"worst_band_images": 131, "worst_band_patients": 112}
    pd.DataFrame([who | worst]).to_csv(folder / "weakest.csv", index=False)
    gap = {"init": "fm", "split": "age", "gap_closed": np.nan, "low": np.nan, "high": np.nan}
    gap["why"] = "centralised training is not above the random start outside the noise"
    pd.DataFrame([gap]).to_csv(folder / "gap.csv", index=False)


@pytest.fixture
def open_page(browser):
    """Open a file at a size, and close what was opened at the end."""
    contexts = []

    def opened(file, size, scheme="light"):
        contexts.append(browser.new_context(viewport=size, color_scheme=scheme))
        page = contexts[-1].new_page()
        page.goto(file.as_uri())
        return page

    yield opened
    for context in contexts:
        context.close()


def grave(page):
    """What axe finds serious or critical: id and the first element of each."""
    found = Axe().run(page).response["violations"]
    return [(v["id"], v["nodes"][0]["html"][:200]) for v in found if v["impact"] in ("serious", "critical")]


everywhere = pytest.mark.parametrize("name", ["committed", "synthetic"])


@everywhere
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [DESK, PHONE], ids=["desk", "phone"])
def test_axe_finds_nothing_serious(open_page, pages, name, size, scheme):
    page = open_page(pages[name], size, scheme)
    page.evaluate("document.querySelectorAll('details').forEach(part => part.open = true)")
    assert grave(page) == []


BEYOND = """() => {
  const edge = document.documentElement.clientWidth + 1;
  const cut = element => {
    const box = element.getBoundingClientRect();
    return box.width > 1 && (box.right > edge || box.left < -1) && !element.closest('.wide');
  };
  return [...document.body.querySelectorAll('*')].filter(cut).map(element => element.outerHTML.slice(0, 120));
}"""
SCROLLED = """() => [...document.querySelectorAll('body *')].filter(
  element => element.scrollWidth > element.clientWidth + 1
    && ['auto', 'scroll', 'hidden'].includes(getComputedStyle(element).overflowX)
    && getComputedStyle(element).position !== 'absolute'
).map(element => [element.tabIndex, element.getAttribute('role'), element.getAttribute('aria-label')])"""


def test_the_checks_find_what_is_wrong(open_page, tmp_path):
    """So that an empty list means something: no alt text, grey on grey, a cut line, a nameless area."""
    file = tmp_path / "bad.html"
    file.write_text(
        "<!doctype html><html><head><title>x</title></head><body><main><h1>x</h1>"
        "<img src='data:image/gif;base64,R0lGODlhAQABAAAAACwAAAAAAQABAAA='>"
        "<p style='color:#aaa;background:#999'>grey on grey</p><p style='width:2000px'>cut</p>"
        "<div style='width:90px;height:40px;overflow:auto'><b style='padding:0 900px'>far</b></div>"
        "</main></body></html>"
    )
    page = open_page(file, DESK)
    assert {"image-alt", "html-has-lang", "color-contrast"} <= {name for name, _ in grave(page)}
    assert any("cut" in element for element in page.evaluate(BEYOND))
    ((_, role, label),) = page.evaluate(SCROLLED)
    assert (role, label) == (None, None)


@everywhere
def test_nothing_is_cut_at_1280_pixels(open_page, pages, name):
    """No table and no figure has to be scrolled, and none reaches beyond the page."""
    page = open_page(pages[name], DESK)
    assert page.evaluate(SCROLLED) == []
    assert page.evaluate(BEYOND) == []
    assert page.locator("#weakest thead th").last.is_visible()


@everywhere
def test_on_a_phone_only_named_regions_scroll_sideways_and_keys_reach_them(open_page, pages, name):
    page = open_page(pages[name], PHONE)
    assert page.evaluate(BEYOND) == []
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    regions = page.evaluate(SCROLLED)
    assert all(index == 0 and role == "region" and label for index, role, label in regions)
    assert len({label for *_, label in regions}) == len(regions)


def test_the_arrow_keys_scroll_a_figure_that_is_too_wide(open_page, pages):
    page = open_page(pages["committed"], PHONE)
    region = page.locator("#fig3 .wide")
    for _ in range(100):
        page.keyboard.press("Tab")
        if region.evaluate("element => element === document.activeElement"):
            break
    for _ in range(10):  # a smooth scroll takes its time
        page.keyboard.press("ArrowRight")
        page.wait_for_timeout(100)
    assert region.evaluate("element => element.scrollLeft") > 0


@everywhere
def test_a_figures_text_is_at_least_nine_pixels_on_a_phone(open_page, pages, name):
    """Its least text has 9 points, and its width says 120 pixels an inch: on a phone, 72 are needed."""
    page = open_page(pages[name], PHONE)
    sizes = page.evaluate(
        "[...document.images].map(i => [i.getBoundingClientRect().width / i.getAttribute('width'), "
        "i.naturalWidth, i.closest('figure').id])"
    )
    assert len(sizes) > 5
    assert [name for scale, _, name in sizes if 120 * scale < 71.5] == []
    assert all(natural > 0 for _, natural, _ in sizes)


def test_todays_figures_need_no_scrolling_on_a_phone(open_page, pages):
    page = open_page(pages["synthetic"], PHONE)
    assert page.locator("figure .wide").count() == 0


@everywhere
def test_the_first_screen_holds_the_answer_and_what_it_rests_on(open_page, pages, name):
    page = open_page(pages[name], DESK)
    for part in [".answer", ".facts", *[".banner"] * (name == "synthetic")]:
        box = page.locator(part).bounding_box()
        assert box["y"] + box["height"] <= DESK["height"], part
    phone = open_page(pages[name], PHONE)
    for part in [".answer p >> nth=0", *[".banner"] * (name == "synthetic")]:
        box = phone.locator(part).bounding_box()
        assert box["y"] + box["height"] <= PHONE["height"], part


@everywhere
def test_the_page_fetches_nothing_and_reports_no_error(browser, pages, name):
    context = browser.new_context(viewport=DESK)
    page = context.new_page()
    asked, said = [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda message: said.append(message.text))
    page.goto(pages[name].as_uri())
    page.wait_for_load_state("networkidle")
    assert [url for url in asked if not url.startswith("data:")] == [pages[name].as_uri()]
    assert said == []
    context.close()


def brightness(page, selector, what):
    colour = page.locator(selector).first.evaluate(f"element => getComputedStyle(element).{what}")
    return np.mean([float(part) for part in colour.removeprefix("rgb(").rstrip(")").split(",")])


def test_the_dark_page_is_dark_and_its_figures_stay_on_white(open_page, pages):
    light, dark = (open_page(pages["synthetic"], DESK, scheme) for scheme in ("light", "dark"))
    assert brightness(light, "body", "backgroundColor") > 240 > 60 > brightness(light, "body", "color")
    assert brightness(dark, "body", "backgroundColor") < 40 < 200 < brightness(dark, "body", "color")
    assert brightness(dark, "figure img", "backgroundColor") == 255


@everywhere
def test_on_paper_nothing_is_cut_and_dark_stays_light(open_page, pages, name):
    page = open_page(pages[name], PAPER, "dark")
    page.emulate_media(media="print")
    assert page.evaluate(BEYOND.replace("&& !element.closest('.wide')", "")) == []
    assert page.evaluate(SCROLLED) == []
    assert brightness(page, "body", "backgroundColor") == 255 and brightness(page, "body", "color") < 60
    assert not page.locator("nav").is_visible()
    heights = page.evaluate("[...document.images].map(i => i.getBoundingClientRect().height)")
    assert max(heights) < 1000, "a figure fits on a sheet"
    paper = page.pdf(prefer_css_page_size=True)
    assert paper.startswith(b"%PDF") and paper.count(b"/Type /Page\n") > 2

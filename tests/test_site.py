"""The site of docs/, docstrings and notebooks: built without a warning, no dead link, readable by all."""

import ast
import importlib.util
import re
import subprocess
import sys
from html.parser import HTMLParser
from urllib.parse import unquote, urlsplit

import nbformat
import pytest
import test_browser
from test_browser import DESK, PHONE, grave

from fmfl import paths

DOCS = paths.ROOT / "docs"
#: One page of each kind: front, module, words, results, equations, notebook, table of messages.
KINDS = [
    *("index.html", "api/fmfl.losses.html", "glossary.html", "results/v7-cpu/README.html"),
    *("equations.html", "notebooks/03_distill.html", "troubleshooting.html"),
]

browser, open_page = test_browser.browser, test_browser.open_page  # as fixtures of this module


# ---------------------------------------------------------------------------------------------------
# The sources
# ---------------------------------------------------------------------------------------------------


def texts_of_the_code():
    """Every text constant of the package, with `...` where a value is put in."""
    for file in (paths.ROOT / "fmfl").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = (p.value if isinstance(p, ast.Constant) else "..." for p in node.values)
                yield "".join(parts)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


def messages():
    """The messages that the page of troubles quotes, each at the beginning of its entry."""
    text = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    return re.findall(r"^- `(.+?)`(?:\\| |$)", text, flags=re.M)


def is_said(message, texts):
    """Tell if one text of the code has all parts of a message, in their order."""
    parts = [re.escape(part.strip()) for part in message.split("...") if part.strip(" :,;")]
    pattern = re.compile(".*".join(parts), flags=re.S)
    return any(pattern.search(text) for text in texts)


def test_every_quoted_message_is_one_that_the_code_can_say():
    texts = set(texts_of_the_code())
    assert len(messages()) > 30
    assert [message for message in messages() if not is_said(message, texts)] == []
    assert not is_said("... in no known layout: looked for pictures/ ...", texts)


WORDS = """start, arm, split, proxy set, client, round, local epoch, iid, age skew, quantity skew, teacher,
student, distillation, temperature, alpha, box prompt, dice, iou, hd95, assd, interval, equivalent, verdict,
seed, logits, foundation model, federated averaging, centralised, standalone, pre-training, test set, phantom,
claim"""


def test_the_glossary_explains_each_word_in_at_most_three_sentences():
    text = (DOCS / "glossary.md").read_text(encoding="utf-8")
    entries = dict(re.findall(r"^## (.+)\n\n((?:.+\n)+)", text, flags=re.M))
    assert set(re.split(r",\s+", WORDS)) <= {word.lower() for word in entries}
    assert list(entries) == sorted(entries, key=lambda word: word.lower().replace("-", ""))
    for word, meaning in entries.items():
        assert 1 <= len(re.findall(r"[.)](?:\s|$)", meaning)) <= 4, word


@pytest.fixture(scope="module")
def conf():
    spec = importlib.util.spec_from_file_location("site_conf", DOCS / "conf.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("docstring", "expected"),
    [
        ("With p,\n\n    loss = a * b_\n\nso.", "With p,\n\n::\n\n    loss = a * b_\n\nso."),
        ("Sum_k of |D_k| * `theta`.", r"Sum_k of \|D_k\| \* :py:obj:`theta`."),
        ("`State`s, see `a/b`", r":py:obj:`State`\ s, see ``a/b``"),
        ("Such as `one`, then `two`.", "Such as :py:obj:`one`, then :py:obj:`two`."),
        ("Returns:\n    One, in order: a.", ":returns:\n    One, in order: a."),
        ("Args:\n    x: first.\n\n    y: second.", "Args:\n    x: first.\n\n    y: second."),
        ("===== =\na     b\n===== =", "::\n\n    ===== =\n    a     b\n    ===== ="),
    ],
)
def test_a_docstring_of_plain_text_becomes_markup(conf, docstring, expected):
    assert conf.markup(docstring) == expected


def test_an_equation_becomes_mathml(conf):
    """By hand: a minimum over theta has it below, and `arg` is a word."""
    formula = conf._mathml(r"\arg\min_\theta x", "block")
    assert "<mo>arg</mo><munder><mo>min</mo><mi>&#x003B8;</mi></munder><mi>x</mi>" in formula


# ---------------------------------------------------------------------------------------------------
# The built pages
# ---------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """Addresses that a page names, and the places in it that can be named."""

    def __init__(self, text):
        super().__init__()
        self.links, self.places, self.tags = [], set(), []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.tags.append(tag)
        self.places |= {values[name] for name in ("id", "name") if values.get(name)}
        self.links += [values[name] for name in ("href", "src") if values.get(name)]


def read(folder):
    return {file: Page(file.read_text(encoding="utf-8")) for file in sorted(folder.rglob("*.html"))}


def dead_links(pages):
    """Relative addresses of pages that lead nowhere, and the anchors that are not there."""
    for file, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (file.parent / unquote(parts.path)).resolve() if parts.path else file
            places = pages[target].places if target in pages else {parts.fragment}
            if not target.is_file() or (parts.fragment and unquote(parts.fragment) not in places):
                yield file.name, link


def test_the_check_of_links_finds_a_dead_one(tmp_path):
    (tmp_path / "a.html").write_text(
        "<p id='here'><a href='#here'>1</a><a href='#gone'>2</a><a href='b.html'>3</a><img src='a.html'>"
    )
    assert list(dead_links(read(tmp_path))) == [("a.html", "#gone"), ("a.html", "b.html")]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The built site; a warning of Sphinx ends the build."""
    folder = tmp_path_factory.mktemp("site") / "html"
    command = [sys.executable, str(DOCS / "build_site.py"), str(folder)]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=folder.parent)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert ended.stdout == f"the site is built: {folder / 'index.html'}\n" and ended.stderr == ""
    return folder


@pytest.fixture(scope="module")
def pages(site):
    return read(site)


@pytest.mark.slow
def test_every_relative_link_and_anchor_of_the_site_leads_somewhere(pages):
    assert len(pages) > 100
    assert sum(len(page.links) for page in pages.values()) > 10_000
    assert list(dead_links(pages)) == []


@pytest.mark.slow
def test_every_page_can_be_reached_from_the_front(site, pages):
    seen, ahead = set(), [site / "index.html"]
    while ahead:
        file = ahead.pop()
        if file in seen or file not in pages:
            continue
        seen.add(file)
        ahead += [(file.parent / unquote(urlsplit(link).path)).resolve() for link in pages[file].links]
    missed = {file.relative_to(site).as_posix() for file in set(pages) - seen}
    assert {name for name in missed if not name.startswith("_")} == set()
    for name in (
        "README",
        "CONTRIBUTING",
        "CHANGELOG",
        "bench/README",
        "data/README",
        "results/collapse/README",
    ):
        assert site / f"{name}.html" in seen


@pytest.mark.slow
def test_each_public_function_of_the_science_has_a_place(site, pages):
    for module in (paths.ROOT / "fmfl").glob("[a-z]*.py"):
        names = {
            node.name
            for node in ast.parse(module.read_text(encoding="utf-8")).body
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
        }
        page = pages[site / "api" / f"fmfl.{module.stem}.html"]
        assert {f"fmfl.{module.stem}.{name}" for name in names} <= page.places


@pytest.mark.slow
def test_equations_are_drawn_without_a_script(site, pages):
    """As many equations as the page's source has, and no LaTeX is left."""
    source = (DOCS / "equations.md").read_text(encoding="utf-8")
    displayed = source.count("$$") // 2
    inline = len(re.findall(r"(?<!\$)\$(?!\$)[^$\n]+\$", source))
    assert pages[site / "equations.html"].tags.count("math") == displayed + inline
    html = [
        (site / name).read_text(encoding="utf-8") for name in ("equations.html", "notebooks/04_federate.html")
    ]
    assert not any(mark in text for text in html for mark in ("\\theta", "\\frac", "$$", "MathJax", "\\arg"))


@pytest.mark.slow
def test_a_notebooks_page_has_its_figures_and_tables(site, pages):
    content = nbformat.read(paths.NOTEBOOKS / "03_distill.ipynb", as_version=4)
    shown = [output.get("data", {}) for cell in content.cells for output in cell.get("outputs", [])]
    page = pages[site / "notebooks" / "03_distill.html"]
    figures, tables = (sum(kind in data for data in shown) for kind in ("image/png", "text/html"))
    tables += sum("\n|---" in cell.source for cell in content.cells)
    assert page.tags.count("img") == figures > 3
    assert page.tags.count("table") == tables > 4


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize(("size", "scheme"), [(DESK, "light"), (PHONE, "dark")], ids=["light", "dark phone"])
def test_axe_finds_nothing_serious_and_nothing_is_cut(open_page, site, name, size, scheme):
    page = open_page(site / name, size, scheme)
    assert grave(page) == []
    assert page.evaluate("document.documentElement.scrollWidth") <= size["width"]


@pytest.mark.slow
def test_pages_load_nothing_from_the_network_and_report_no_error(browser, site):
    context = browser.new_context(viewport=DESK)
    context.set_offline(True)
    page = context.new_page()
    asked, said = [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    for name in KINDS:
        page.goto((site / name).as_uri())
        page.wait_for_load_state("networkidle")
    assert [url for url in asked if not url.startswith((site.as_uri(), "data:"))] == []
    assert said == []
    context.close()


@pytest.mark.slow
def test_the_search_works_from_a_file(open_page, site):
    page = open_page(site / "index.html", DESK)
    page.get_by_placeholder("Search").fill("temperature")
    page.keyboard.press("Enter")
    for part in ("glossary", "losses"):  # results come one by one
        page.locator(f"#search-results li a[href*='{part}']").first.wait_for()
    page.locator("#search-results li a").first.click()
    page.locator("h1").wait_for()  # the click returns before the page is there
    assert page.locator("h1").count() == 1


@pytest.mark.slow
def test_the_dark_site_is_dark(open_page, site):
    light, dark = (open_page(site / "index.html", DESK, scheme) for scheme in ("light", "dark"))
    assert test_browser.brightness(light, "body", "backgroundColor") > 240
    assert test_browser.brightness(dark, "body", "backgroundColor") < 40


def test_a_folder_of_something_else_is_not_emptied(tmp_path):
    """The folder is emptied before the site is built: nobody's documents may be in it."""
    (tmp_path / "thesis.txt").write_text("mine")
    command = [sys.executable, str(DOCS / "build_site.py"), str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert ended.returncode and "holds something else than a site: name another folder" in ended.stderr
    assert (tmp_path / "thesis.txt").read_text() == "mine"

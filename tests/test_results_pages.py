"""The committed pages and tables of docs/results are what one command writes from the committed scores."""

import importlib.util
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image, ImageChops

from fmfl import paths
from fmfl.analysis import claims, markdown, statistics, tables, words
from fmfl.errors import UserError

RESULTS = paths.ROOT / "docs" / "results"


#: Folders whose pages and tables `python -m bench` writes: their own tests hold them.
OF_BENCH = {"budgets", "collapse", "plateau", "skew", "taught"}

#: Tables that no command can make again without the runs, and figures that need their images or weights.
SCORES = {"results", "per_image", "drift", "starts", "by_round", "before_any_round", "scores"}
SCORES |= {"phantom", "v7", "v7_variants"}
PICTURES = {"clients_age", "clients_iid", "clients_quantity", "dice_by_rule", "reliability"}


@pytest.fixture(scope="module")
def rebuilt(tmp_path_factory, emptied):
    """A copy of the committed results, written again where a command wrote; times of 0 tell what it left."""
    root = tmp_path_factory.mktemp("checkout")
    shutil.copytree(RESULTS, root / "docs" / "results")
    shutil.copy(paths.ROOT / "docs" / "findings.md", root / "docs" / "findings.md")
    for page in (root / "docs").rglob("*.md"):
        if page.parent.name not in OF_BENCH:
            page.write_text(emptied(page.read_text(encoding="utf-8")), encoding="utf-8")
    for file in (root / "docs").rglob("*.*"):
        os.utime(file, (0, 0))
    spec = importlib.util.spec_from_file_location("rebuild", RESULTS / "rebuild.py")
    rebuild = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(rebuild)
    rebuild.main(root)
    return root


def written(rebuilt, pattern, left):
    """Files of docs/results by a pattern, as committed and as written again; those in `left` are not."""
    pairs = []
    for file in sorted(RESULTS.glob(pattern)):
        if file.parts[-2] in OF_BENCH or file.stem in left:
            continue
        again = rebuilt / file.relative_to(paths.ROOT)
        assert again.stat().st_mtime > 0, f"{file} is not written again"
        pairs.append((file, again))
    return pairs


@pytest.mark.slow
def test_each_page_is_what_the_command_writes(rebuilt):
    findings = Path("docs") / "findings.md"
    pages = [(paths.ROOT / findings, rebuilt / findings), *written(rebuilt, "*/README.md", ())]
    assert len(pages) + len(OF_BENCH) == 14
    for page, again in pages:
        committed = page.read_text(encoding="utf-8")
        assert again.read_text(encoding="utf-8") == committed, page
        assert "<!-- " in committed, f"{page} has a table that nothing writes"


@pytest.mark.slow
def test_each_table_is_what_the_command_writes(rebuilt):
    tables = written(rebuilt, "*/*.csv", SCORES)
    assert len(tables) > 15
    for file, again in tables:
        pd.testing.assert_frame_equal(pd.read_csv(again), pd.read_csv(file), rtol=1e-9, obj=str(file))


@pytest.mark.slow
def test_the_report_says_what_the_command_writes(rebuilt):
    page = RESULTS / "v7-cpu" / "report.html"
    again = (rebuilt / page.relative_to(paths.ROOT)).read_text(encoding="utf-8")
    embedded = r'"data:[^"]*"'  # figures and tables: compared by themselves, since compression may differ
    assert re.sub(embedded, "", page.read_text(encoding="utf-8")) == re.sub(embedded, "", again)


@pytest.mark.slow
def test_each_figure_is_what_the_command_draws(rebuilt):
    for file, drawn in written(rebuilt, "*/figures/*.png", PICTURES):
        with Image.open(file) as committed, Image.open(drawn) as again:
            assert committed.size == again.size, file
            difference = ImageChops.difference(committed.convert("L"), again.convert("L"))
            assert np.asarray(difference).mean() < 1, file  # of 255 grey levels, for fonts hinted otherwise


def test_the_map_has_each_experiments_gains():
    """Means of differences by pandas alone from the scores, and two tables as they are."""
    table = pd.read_csv(RESULTS / "when-it-pays" / "gains.csv").set_index(["axis", "value", "lower"])
    elsewhere = pd.read_csv(RESULTS / "elsewhere" / "scores.csv")
    collapse = pd.read_csv(RESULTS / "collapse" / "per_image.csv")
    collapse = collapse[
        (collapse.norm == "batch") & (collapse.learning_rate == 1e-3) & (collapse.split == "age")
    ]
    collapse = collapse[collapse.arm == "federated"].assign(dice=collapse.dice / 100)
    axes = (
        ("test images, 10 rounds", elsewhere[elsewhere["set"] != "own test set"], "set", {}),
        (
            "running statistics, 10 rounds",
            collapse,
            "server",
            {"all": "averaged", "client 0": "one client's", "start": "forgotten"},
        ),
    )
    for axis, scores, by, names in axes:
        means = 100 * scores.groupby([by, "init"]).dice.mean().unstack()
        for value, row in means.iterrows():
            for lower in ("random", "pretraining"):
                gain = table.gain[axis, names.get(value, value), lower]
                assert gain == pytest.approx(row["fm"] - row[lower], abs=1e-3), (axis, value, lower)
    labels = pd.read_csv(RESULTS / "v7-labels" / "gains.csv")
    for row in labels.itertuples():
        assert table.gain["proxy masks, 4 rounds", str(row.value), row.lower] == pytest.approx(
            row.gain, abs=1e-4
        )
    taught = pd.read_csv(RESULTS / "taught" / "differences.csv").set_index("difference")
    synthetic = taught.value[
        "a teacher of synthetic X-rays less proxy masks alone, 10 masks, before any round"
    ]
    assert table.gain["teacher, 10 masks, no round", "synthetic X-rays", "pretraining"] == synthetic


def test_links_of_the_pages_lead_somewhere():
    pages = [page for folder in (".", "data", "bench") for page in (paths.ROOT / folder).glob("*.md")]
    for page in [*pages, *(paths.ROOT / "docs").rglob("*.md")]:
        for link in re.findall(r"\]\((?!https?://|#)([^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / link).exists(), f"{page}: {link}"


def test_the_rule_of_the_verdicts_is_one_click_away():
    for page in (
        "README.md",
        *(f"docs/results/{name}/README.md" for name in ("v7-cpu", "v7-labels", "v7-choices")),
    ):
        assert "verdicts.md)" in (paths.ROOT / page).read_text(encoding="utf-8")


def test_the_first_page_says_what_the_tables_hold():
    text = " ".join((paths.ROOT / "README.md").read_text(encoding="utf-8").split())
    taught = pd.read_csv(RESULTS / "taught" / "differences.csv").set_index("difference")
    few, control = (
        taught.loc[f"the shipped teacher less {lesson}, 10 masks, before any round"]
        for lesson in ("proxy masks alone", "proxy and corpus masks")
    )
    differences = pd.read_csv(RESULTS / "v7-cpu" / "differences.csv")
    age = differences[(differences.split == "age") & (differences.higher == "fm")].set_index("lower")
    random, pretraining = age.loc["random"], age.loc["pretraining"]
    assert few.reading == random.reading == "higher" and pretraining.equivalent and control.equivalent
    for row in (few, control, random, pretraining):
        value = row["value"]
        within = f"({row.low:.2f} to {row.high:.2f})"
        assert f"{value:.2f} points{' of Dice' * (row is random)} {within}".replace("-", "−") in text
    ledger = pd.read_csv(RESULTS / "v7-cpu" / "claims.csv").groupby("kind").verdict
    of = {kind: verdicts.value_counts() for kind, verdicts in ledger}
    assert f"the paper's {of['size'].sum()} numbers {of['size'].get('reproduced', 0)} are reproduced" in text
    said = f"its {of['direction'].sum()} differences {of['direction']['reproduced']} are reproduced"
    assert f"{said}, and {of['direction']['not testable here']} cannot be tested" in text


def test_the_rule_of_the_verdicts_names_the_numbers_that_the_code_uses():
    text = (paths.ROOT / "docs" / "verdicts.md").read_text(encoding="utf-8")
    for said in (
        f"Fewer than {statistics.MIN_PATIENTS} test patients",
        f"**{statistics.EQUIVALENCE:g} points**",
        f"a margin of {claims.MARGIN:g} points",
        f"a margin of {claims.GAP_MARGIN:g} %",
        f"({100 * tables.TARGETS[0]:g} %;",
        f"from {tables.GROUP_PATIENTS} test patients and {tables.GROUP_IMAGES} test images on",
    ):
        assert said in text, said
    assert all(f"| {verdict} |" in text for verdict in claims.VERDICTS)


def test_small_numbers_keep_two_decimals_and_zero_has_no_sign():
    assert words.estimate(-0.0511, -0.1471, 0.045, sign=True) == "−0.05 (−0.15 to +0.04)"
    assert words.number(-0.001, sign=True) == "0.00" == words.number(0.001, sign=True)
    assert words.number(float("nan")) == "–" and words.interval(float("nan"), 1) == ""


def test_a_mark_that_stands_alone_or_twice_is_an_error(tmp_path):
    page = tmp_path / "page.md"
    for text in ("<!-- gains: begin -->", "<!-- gains: begin -->\n<!-- gains: end -->\n" * 2):
        page.write_text(text)
        with pytest.raises(UserError, match="has no place for gains"):
            markdown.write_into(page, RESULTS / "v7-choices")
        assert page.read_text() == text
    page.write_text("no marks")
    with pytest.raises(UserError, match="has no place for results"):
        markdown.write_into(page, RESULTS / "v7-choices")

"""The page is whole, stands alone, and says nothing that the tables do not."""

import base64
import gzip
import itertools
import json
import re
import shutil
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from fmfl import paths
from fmfl.analysis import claims, markdown, plots, tables, words
from fmfl.errors import UserError
from fmfl.study import report

MANIFEST = {
    "fmfl": "0.1.0",
    "commit": "0123abc",
    "versions": {"torch": "2.15.0"},
    "device": {"name": "cpu"},
    "settings": {"size": 96, "num_clients": 3, "num_rounds": 2, "local_epochs": 1, "seeds": [0, 1, 2]},
    "data": {"images": 12345, "patients": 60, "left_out": {"lateral view": 2}, "fingerprint": "f" * 64},
    "cells": {"age": {"seconds": 1.5}, "iid": {"seconds": 2}},
}


def study(
    directory,
    *,
    gain=3.0,
    seeds=3,
    inits=tables.PAPER_INITS,
    images=40,
    pictures=("fig2", "fig3"),
    **manifest,
):
    """A run in which every informed start is `gain` points above random, written as the study writes it."""
    rng = np.random.default_rng(0)
    hard = rng.normal(0, 3, images)
    runs, scores = [], []
    for init in inits:
        for seed in range(seeds):
            mean = 80 + gain * (init != "random")
            dice = (mean + hard + rng.normal(0, 0.3, images)) / 100
            base = {"arm": "federated", "init": init, "split": "age", "seed": seed}
            image_id = [f"i{k}" for k in range(images)]
            frame = pd.DataFrame({"image_id": image_id, "patient_id": range(images), "dice": dice})
            scores.append(frame.assign(**base, client=-1))
            for number, value in enumerate((0.5 if init == "random" else 0.7, 0.78, dice.mean())):
                spent = {"seconds": number, "bytes_up": number, "bytes_down": number, "images_seen": number}
                runs.append(base | {"round": number, "dice": value} | spent)
    results, per_image = pd.DataFrame(runs), pd.concat(scores)
    results.to_csv(directory / "results.csv", index=False)
    per_image.to_csv(directory / "per_image.csv", index=False)
    tables.table1(results, per_image).to_csv(directory / "table1.csv", index=False)
    claims.ledger(results, per_image).to_csv(directory / "claims.csv", index=False)
    (directory / "manifest.json").write_text(json.dumps(MANIFEST | manifest))
    (directory / "figures").mkdir()
    for name in pictures:
        picture = Image.fromarray(rng.integers(0, 256, (30, 40), dtype=np.uint8))
        picture.save(directory / "figures" / f"{name}.png")
    return directory


class Page(HTMLParser):
    """Every tag with its attributes, the text, and the tables: {id of the section: rows of cells}."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.text, self.open = [], "", []
        self.tables, self.section = {}, ""
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag == "section":
            self.section = dict(attributes).get("id", "")
        elif tag == "tr":
            self.tables.setdefault(self.section, []).append([])
        elif tag in ("td", "th"):
            self.tables[self.section][-1].append("")
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> closes another tag"

    def handle_data(self, data):
        self.text += " ".join(data.split()) + " " if self.open[-1:] not in (["style"],) else ""
        if {"td", "th"} & set(self.open):
            row = self.tables[self.section][-1]
            row[-1] = " ".join(f"{row[-1]} {data}".split())

    @classmethod
    def of(cls, directory):
        """The page of a study, written anew."""
        return cls(report.write(directory).read_text(encoding="utf-8"))

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


def test_page_stands_alone_with_every_figure_and_its_data(tmp_path):
    study(tmp_path, pictures=("fig2", "fig3", "per_image", "clients_age"))
    (tmp_path / "figures" / "clients_age.csv").write_text("client,images\n0,7\n")
    path = report.write(tmp_path)
    html = path.read_text(encoding="utf-8")
    page = Page(html)

    assert page.open == []  # every tag is closed
    assert path == tmp_path / "report.html"
    assert path.stat().st_size < 3_000_000
    assert not list(tmp_path.glob(".report*"))
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in page.tags}
    assert all(image["src"].startswith("data:image/png;base64,") for image in page.all("img"))
    assert all(len(image["alt"]) > 10 for image in page.all("img"))
    assert len(page.all("img")) == 4
    assert not re.search(r"url\(|@import", html)
    policies = [meta["content"] for meta in page.all("meta") if "http-equiv" in meta]
    assert policies == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]
    outside = [link["href"] for link in page.all("a") if not link["href"].startswith(("data:", "#"))]
    assert outside == ["https://arxiv.org/abs/2311.15463"]  # a link to follow, nothing that is fetched
    targets = {attributes.get("id") for _, attributes in page.tags}
    assert {link["href"][1:] for link in page.all("a") if link["href"].startswith("#")} <= targets

    files = {link["download"]: link["href"] for link in page.all("a") if "download" in link}
    wanted = {*report.TABLES, "manifest.json", "differences.csv", "fig2.csv", "fig3.csv", "clients_age.csv"}
    assert wanted <= set(files)
    for name in report.TABLES:
        assert base64.b64decode(files[name].split(",")[1]) == (tmp_path / name).read_bytes()
    assert base64.b64decode(files["clients_age.csv"].split(",")[1]) == b"client,images\n0,7\n"
    assert "IID" not in page.all("img")[0]["alt"]
    assert "age skew, foundation model 82.8 %" in page.all("img")[0]["alt"]


def test_page_shows_our_numbers_beside_the_papers(tmp_path):
    study(tmp_path)
    page = Page(report.write(tmp_path).read_text(encoding="utf-8"))
    table = pd.read_csv(tmp_path / "table1.csv").set_index("init")

    assert f"{table.federated['fm']:.2f}" in page.text
    for number in ("74.67", "83.92", "85.38", "89.41", "67.20", "73 %", "63 %"):
        assert number in page.text
    ledger = pd.read_csv(tmp_path / "claims.csv")
    rest = [re.split("[,:]", claim, maxsplit=1)[1].strip() for claim in ledger.claim]
    assert all(f"{claim[0].upper()}{claim[1:]}" in page.text for claim in rest)


def test_headline_calls_better_only_what_is_outside_the_noise(tmp_path):
    page = Page(report.write(study(tmp_path)).read_text(encoding="utf-8"))
    assert "ends above a random start: +3.0 points" in page.text
    assert re.search(
        r"Its difference from a start from supervised pre-training, .* is inside the noise", page.text
    )
    assert "above a start from supervised" not in page.text


def test_headline_is_about_the_split_that_is_asked_for():
    """fm is above random under age skew and below it under quantity skew, in rounds too short to matter."""
    rows, scores = [], []
    for split, gain in (("age", 5), ("quantity", -5)):
        for init in ("random", "fm"):
            for seed in range(3):
                mean = 0.8 + gain / 100 * (init == "fm")
                base = {"arm": "federated", "init": init, "split": split, "seed": seed}
                rows.append(base | {"round": 1, "dice": mean})
                dice = mean + np.random.default_rng(seed).normal(0, 0.001, 30)
                names = {"image_id": range(30), "patient_id": range(30)}
                scores.append(pd.DataFrame(names | {"dice": dice}).assign(**base))
    results, per_image = pd.DataFrame(rows), pd.concat(scores)
    found = results, tables.paired_differences(per_image), claims.ledger(results, per_image)
    assert "ends above a random start: +5.0 points" in " ".join(words.headline(*found))
    quantity = " ".join(words.headline(*found, split="quantity"))
    assert quantity.startswith("Under quantity skew, ")
    assert "ends below a random start: −5.0 points" in quantity


def test_headline_of_no_effect_and_of_one_seed(tmp_path):
    (tmp_path / "none").mkdir()
    (tmp_path / "one").mkdir()
    (tmp_path / "without").mkdir()
    none = Page(report.write(study(tmp_path / "none", gain=0.0)).read_text(encoding="utf-8")).text
    assert "ends above" not in none
    assert none.count("is inside the noise") == 2
    one = Page(report.write(study(tmp_path / "one", seeds=1)).read_text(encoding="utf-8")).text
    assert "one training run of each: the noise between runs is unknown" in one
    study(tmp_path / "without", inits=("random",))
    without = Page(report.write(tmp_path / "without").read_text(encoding="utf-8")).text
    assert "no federated run from the teacher's student" in without


def test_methods_say_what_the_manifest_says_and_nothing_else():
    text = " ".join(report.methods(MANIFEST))
    assert "12,345 images with a mask, of 60 patients." in text
    assert "Left out: lateral view (2)." in text
    assert "3 clients trained for 2 rounds of 1 local epoch (Eq. 2)." in text
    assert "Seeds: 0, 1, 2." in text
    assert "learning rate" not in text  # not in this manifest
    assert "{" not in text
    assert report.methods({}) == []


def test_words_from_files_cannot_become_markup(tmp_path):
    study(tmp_path)
    ledger = pd.read_csv(tmp_path / "claims.csv")
    ledger.loc[0, "why"] = "<script>alert(1)</script>"
    ledger.to_csv(tmp_path / "claims.csv", index=False)
    (tmp_path / "manifest.json").write_text(json.dumps(MANIFEST | {"device": {"name": "<x86>"}}))
    html = report.write(tmp_path).read_text(encoding="utf-8")
    assert "<script>" not in html
    assert "&lt;x86&gt;" in html


def test_heavy_content_is_reduced_compressed_or_left_beside_the_page(tmp_path, monkeypatch):
    study(tmp_path, images=1000)
    rng = np.random.default_rng(0)
    for name in ("fig2", "ages", "images"):
        noise = rng.integers(0, 256, (300, 400, 3), dtype=np.uint8)  # 360 kB: nothing to compress
        Image.fromarray(noise).save(tmp_path / "figures" / f"{name}.png")
    monkeypatch.setattr(report, "PAGE_BYTES", 500_000)
    path = report.write(tmp_path)
    page = Page(path.read_text(encoding="utf-8"))

    assert path.stat().st_size < 500_000
    assert "images.png, ages.png" in page.text  # named, not shown
    assert len(page.all("img")) == 2
    assert len(page.all("img")[0]["src"]) < 0.5 * (tmp_path / "figures" / "fig2.png").stat().st_size
    files = {link["download"]: link["href"] for link in page.all("a") if "download" in link}
    packed = base64.b64decode(files["per_image.csv.gz"].split(",")[1])
    assert gzip.decompress(packed) == (tmp_path / "per_image.csv").read_bytes()

    monkeypatch.setattr(report, "CSV_BYTES", 10)
    assert (
        "data: results.csv beside this page" in Page(report.write(tmp_path).read_text(encoding="utf-8")).text
    )


def test_figures_are_those_that_the_manifest_names(tmp_path):
    """Another study's lie in the same folder."""
    study(tmp_path, pictures=("fig2", "fig3", "images", "ages", "dice_by_round_age_seed0"))
    about = MANIFEST | {"figures": ["images.png", "ages.png", "fig2.png", "fig3.png", "gone.png"]}
    (tmp_path / "manifest.json").write_text(json.dumps(about))
    shown = [image["alt"] for image in Page(report.write(tmp_path).read_text(encoding="utf-8")).all("img")]
    assert len(shown) == 4, "neither another study's nor one that is gone"
    assert shown[-2].startswith("Images") and shown[-1].startswith("Ages"), "in the manifest's order"
    (tmp_path / "manifest.json").write_text(json.dumps(MANIFEST))
    assert len(Page(report.write(tmp_path).read_text(encoding="utf-8")).all("img")) == 5


@pytest.mark.parametrize("name", [*report.TABLES, "manifest.json", "figures/fig2.png", "figures/fig3.png"])
def test_a_missing_file_is_named_and_leaves_the_old_page(tmp_path, name):
    study(tmp_path)
    before = report.write(tmp_path).read_bytes()
    (tmp_path / name).unlink()
    with pytest.raises(UserError, match=re.escape(name)):
        report.write(tmp_path)
    assert (tmp_path / "report.html").read_bytes() == before


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("results.csv", "", "cannot be read as CSV"),
        ("results.csv", "arm,init\nfederated,fm\n", "no column split, seed, round, dice"),
        ("manifest.json", "{", "is damaged"),
        ("manifest.json", "[]", "holds no JSON object"),
        ("figures/fig2.png", "text", "cannot be read as a picture"),
    ],
)
def test_a_broken_file_is_named(tmp_path, name, content, message):
    study(tmp_path)
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message) as error:
        report.write(tmp_path)
    assert name in str(error.value)
    assert not (tmp_path / "report.html").exists()


def test_the_same_files_give_the_same_page(tmp_path):
    study(tmp_path)
    assert report.write(tmp_path).read_bytes() == report.write(tmp_path).read_bytes()


def test_the_further_tables_and_the_map_are_shown_where_a_study_has_them(tmp_path):
    study(tmp_path, pictures=("fig2", "fig3", "when_it_pays", "why"))
    assert 'id="map"' not in report.write(study_without(tmp_path)).read_text(encoding="utf-8")
    results, per_image = (pd.read_csv(tmp_path / f"{name}.csv") for name in ("results", "per_image"))
    young = per_image.patient_id % 2 == 0  # and half a Dice worse
    per_image = per_image.assign(age=np.where(young, 30.0, 50.0), dice=per_image.dice - 0.5 * young)
    per_image = per_image.assign(site="here", hd95=1.0, assd=0.5)
    tables.speed(results, [0.8]).to_csv(tmp_path / "speed.csv", index=False)
    tables.weakest(per_image).to_csv(tmp_path / "weakest.csv", index=False)
    gap = tables.gap(per_image, ["fm"], "age")
    gap.to_csv(tmp_path / "gap.csv", index=False)
    (tmp_path / "gains.csv").write_text("axis,value\nlabelled,10\n")
    page = Page(report.write(tmp_path).read_text(encoding="utf-8"))
    assert page.open == []
    sections = [attributes.get("id") for attributes in page.all("section")]
    assert {"speed", "gap", "weakest", "map"} <= set(sections)
    downloads = {attributes["download"] for attributes in page.all("a") if "download" in attributes}
    assert {"speed.csv", "gap.csv", "weakest.csv", "when_it_pays.csv"} <= downloads
    assert "20-29" not in page.text and "30-39 years" in page.text, "the worst age band"
    assert "centralised random under pooled was not run" in page.text


def study_without(directory):
    """The same study in a folder beside it, without the map."""
    other = directory.parent / f"{directory.name}-without"
    other.mkdir()
    return study(other)


def test_the_answer_goes_between_the_marks_of_a_markdown_file_and_nowhere_else(tmp_path):
    folder = tmp_path / "docs" / "results"
    folder.mkdir(parents=True)
    study(folder)
    file = tmp_path / "README.md"
    file.write_text(f"# Title\n{markdown.BEGIN}\nold words\n{markdown.END}\nThe end.\n")
    for _ in range(2):  # and again, to the same text
        text = markdown.write_into(file, folder).read_text()
        assert text.startswith(f"# Title\n{markdown.BEGIN}\n![")
        assert text.endswith(f"{markdown.END}\nThe end.\n")
        assert "old words" not in text and "(docs/results/figures/fig3.png)" in text
        table1 = pd.read_csv(folder / "table1.csv").set_index("init")
        assert f"| foundation model | {table1.federated.fm:.2f} (" in text and "| 85.38 |" in text
        assert text.count("| random |") == 1
    (tmp_path / "other.md").write_text(f"{markdown.END} {markdown.BEGIN}")
    with pytest.raises(UserError, match="has no place for results"):
        markdown.write_into(tmp_path / "other.md", folder)


# The first screen


SETTINGS = MANIFEST["settings"] | {"data": "phantom", "mask_class": "lung"}
TEACHER = {"name": "builtin", "dice": 0.9549, "note": "It stands in for another."}


def test_the_first_screen_says_what_was_tested_on_what(tmp_path):
    study(tmp_path, teacher=TEACHER, settings=SETTINGS | {"data": "/data/xrays,site_b"})
    text = Page.of(tmp_path).text
    for fact in (
        "Images /data/xrays, site_b",
        "Organ lung",
        "Test set 40 images of 40 patients",
        "Teacher built-in, mean Dice 95.5 % on the proxy images",
        "Runs 3 seeds, 2 rounds",
        "It stands in for another.",
    ):
        assert fact in text.split("Table 1")[0], fact
    assert "SYNTHETIC" not in text


@pytest.mark.parametrize(
    ("settings", "data", "banner"),
    [
        ({"data": "phantom"}, {}, "SYNTHETIC IMAGES"),
        ({"data": "somewhere"}, {"kind": "synthetic"}, "SYNTHETIC IMAGES"),
        ({"data": "phantom,folder"}, {}, "PARTLY SYNTHETIC IMAGES"),
        ({"data": "folder"}, {}, ""),
        ({"data": "phantom_of_the_ward"}, {}, ""),
        ({}, {}, ""),
    ],
)
def test_a_banner_says_where_images_are_synthetic(tmp_path, settings, data, banner):
    study(tmp_path, settings=settings, data=data)
    page = Page.of(tmp_path)
    banners = [attributes for attributes in page.all("p") if attributes.get("class") == "banner"]
    assert len(banners) == bool(banner) and (banner or "no banner") in page.text + "no banner"
    assert ("cannot be compared with the paper's" in page.text) == bool(banner)
    if banner:
        assert page.text.index(banner) < page.text.index("Under age skew"), "before the answer"


def test_another_organ_is_named_and_stands_beside_no_number_of_the_paper(tmp_path):
    study(tmp_path, settings=SETTINGS | {"data": "folder", "mask_class": "heart"})
    page = Page.of(tmp_path)
    assert "Organ heart" in page.text and "network for heart segmentation" in page.text
    assert "claims" not in page.tables
    assert "claims.csv" not in {link.get("download") for link in page.all("a")}
    assert not any("paper" in cell for rows in page.tables.values() for row in rows for cell in row)
    assert not re.search(r"74\.67|85\.38|lung|reproduced|testable|numbers of the paper", page.text)
    study(tmp_path_of(tmp_path, "named"), settings=SETTINGS | {"mask_class": "lung"}, data={"organ": "heart"})
    assert "Organ heart" in Page.of(tmp_path / "named").text, "what the data say comes first"


def tmp_path_of(directory, name):
    (directory / name).mkdir()
    return directory / name


# Tables


def cells(page):
    """(table, row, column) -> text of the cells, the head's names as columns."""
    found = {}
    for name, (head, *rows) in page.tables.items():
        for number, row in enumerate(rows):
            if len(row) > 1:  # not a group's name
                found |= {(name, number, column): cell for column, cell in zip(head, row, strict=True)}
    return found


@pytest.mark.parametrize("name", ["v7-cpu", "v7-labels"])
def test_committed_studies_have_pages_without_nan_empty_cells_or_empty_columns(tmp_path, name):
    folder = shutil.copytree(paths.ROOT / "docs" / "results" / name, tmp_path / name)
    page = Page.of(folder)
    found = cells(page)
    assert {"table1", "differences", "speed", "gap", "weakest", "claims"} == set(page.tables)
    assert [place for place, cell in found.items() if cell == ""] == []
    columns = itertools.groupby(sorted(found, key=lambda p: (p[0], p[2])), key=lambda p: (p[0], p[2]))
    assert [column for column, places in columns if {found[place] for place in places} == {"–"}] == []
    assert not re.search(r"\bnan\b|NaN|\binf\b|None\b", page.text)
    assert page.open == []


def test_tables_full_of_nothing_say_so_and_never_nan(tmp_path):
    """One patient, one seed, no target reached, nothing measured: what an interval's absence looks like."""
    study(tmp_path, seeds=1, images=1)
    who = {"arm": "federated", "init": "fm", "split": "age"}
    nothing = dict.fromkeys(["rounds", "seconds", "bytes", "rounds_low", "rounds_high"], np.nan)
    curve = {"curve": 50.0, "curve_low": np.nan, "curve_high": np.nan}
    pd.DataFrame([who | {"seeds": 1, "reached": 0} | nothing | curve]).to_csv(tmp_path / "speed.csv")
    gap = {"init": "fm", "gap_closed": np.nan, "low": np.nan, "high": np.nan, "why": "too few test patients"}
    pd.DataFrame([gap]).to_csv(tmp_path / "gap.csv", index=False)
    worst = dict.fromkeys(["worst_band", "worst_band_dice", "worst_client_dice", "hd95", "assd"], np.nan)
    worst |= {"dice": 80.0, "worst_tenth": 70.0, "failures": 50.0}
    pd.DataFrame([who | worst]).to_csv(tmp_path / "weakest.csv", index=False)
    claim = dict.fromkeys(["paper", "ours", "low", "high", "n", "seeds", "why"], np.nan)
    pd.DataFrame([claim | {"claim": "Claim 1, points", "verdict": "not testable here"}]).to_csv(
        tmp_path / "claims.csv", index=False
    )
    page = Page.of(tmp_path)
    assert not re.search(r"\bnan\b|NaN", page.text)
    assert "Fewer than 20 patients: no intervals, no tests." in page.text
    assert "Intervals are 95 % over patients." not in page.text, "no caption promises what no cell holds"
    assert page.tables["claims"][2] == ["Points", "–", "not run", "nothing", "not testable here"]
    assert page.tables["weakest"][0] == ["start", "arm", "partition", "all", "worst tenth", "below 0.8"]
    assert page.tables["gap"][1] == ["foundation model", "too few test patients"]
    assert "rounds (95 % over seeds)" not in page.tables["speed"][0] and "0 of 1" in page.tables["speed"][1]
    assert all(cell for cell in cells(page).values())


@pytest.mark.parametrize(("images", "share"), [(12, "–"), (40, r"[56]\d %")])
def test_the_page_gives_a_share_of_the_gap_only_where_its_ledger_has_one(tmp_path, images, share):
    """12 patients are too few for a share; and what was run and has no number is not called "not run"."""
    study(tmp_path, images=images)
    results, per_image = (pd.read_csv(tmp_path / f"{name}.csv") for name in ("results", "per_image"))
    pooled = {"arm": "centralised", "split": "pooled"}
    # Random ends near 80, informed starts 3 points above and centralised training 5.
    runs = pd.concat([results, results[results.init == "random"].assign(**pooled)])
    own = per_image[per_image.init == "random"]
    scores = pd.concat([per_image, own.assign(**pooled, dice=own.dice + 0.05)])
    runs.to_csv(tmp_path / "results.csv", index=False)
    scores.to_csv(tmp_path / "per_image.csv", index=False)
    tables.table1(runs, scores).to_csv(tmp_path / "table1.csv", index=False)
    claims.ledger(runs, scores).to_csv(tmp_path / "claims.csv", index=False)
    page = Page.of(tmp_path)
    table1 = page.tables["table1"]
    shown = [row[-1].split("paper")[0].strip() for row in table1[2:]]
    assert len(shown) == 2 and all(re.fullmatch(share, one) for one in shown), shown
    ledger = [row for row in page.tables["claims"] if row[0].startswith("% of the way")]
    assert len(ledger) == 2 and not any("not run" in row for row in ledger)


def test_the_newer_columns_are_shown(tmp_path):
    study(tmp_path)
    who = {"arm": "federated", "init": "fm", "split": "age", "seeds": 3}
    spent = {"rounds": 2.5, "rounds_low": 1.0, "rounds_high": 4.0, "seconds": 9.0, "bytes": 2e6}
    spent |= {"images_seen": 3230, "curve": 50.0, "curve_low": 49.0, "curve_high": 51.0}
    rows = [who | spent | {"target": 0.9, "reached": 3, "capped": False}]
    rows += [who | spent | {"target": 0.92, "reached": 2, "capped": True}]
    pd.DataFrame(rows).to_csv(tmp_path / "speed.csv", index=False)
    worst = {"dice": 90.0, "worst_tenth": 80.0, "failures": 1.0, "worst_client_dice": 88.0}
    worst |= {
        "worst_band": "0-4",
        "worst_band_dice": 85.0,
        "worst_band_images": 31.0,
        "worst_band_patients": 12.0,
    }
    pd.DataFrame([who | worst]).to_csv(tmp_path / "weakest.csv", index=False)
    found = cells(Page.of(tmp_path))
    assert (
        found["speed", 0, "rounds (95 % over seeds)"] == "2.5 (1.0 to 4.0)"
        and found["speed", 0, "to a Dice of"] == "90 %"
    )
    assert found["speed", 0, "images"] == "3,230" and found["speed", 0, "seconds"] == "9.0"
    least = [found["speed", 1, name] for name in ("rounds (95 % over seeds)", "seconds", "images", "MB")]
    assert least == ["≥ 2.5", "≥ 9.0", "≥ 3,230", "≥ 2"], "a run that never got there: at least that much"
    assert found["weakest", 0, "worst age band"] == "0-4 years: 85.00 31 images of 12 patients"


def test_a_small_difference_has_two_decimals_and_zero_no_sign():
    def points(*numbers):
        return words.estimate(*numbers, words.decimals(*numbers), sign=True)

    assert points(-0.051, -0.145, 0.04) == "−0.05 (−0.14 to +0.04)"
    assert points(16.71, 10.94, 20.38) == "+16.7 (+10.9 to +20.4)"
    assert points(1.0, 0.69, 1.32) == "+1.00 (+0.69 to +1.32)"
    assert points(0.2, np.nan, np.nan) == "+0.20"
    assert words.estimate(92.5, 91, 94, 1) == "92.5 (91.0 to 94.0)"
    assert words.number(-0.001) == words.number(0.0, sign=True) == "0.00"


def test_the_ledger_is_grouped_and_a_shared_reason_stands_once(tmp_path):
    study(tmp_path)
    base = {
        "paper": "> 0",
        "ours": 1.0,
        "low": 0.5,
        "high": 1.5,
        "n": 40,
        "seeds": 3,
        "verdict": "direction only",
    }
    names = [
        "Table 1, Dice in %: fm",
        "Claim 1, points: a",
        "Table 1, Dice in %: random",
        "Claim 1, rounds: b",
    ]
    whys = ["another number", "its own reason", "another number", ""]
    rows = [base | {"claim": name, "why": why} for name, why in zip(names, whys, strict=True)]
    pd.DataFrame(rows).to_csv(tmp_path / "claims.csv", index=False)
    page = Page.of(tmp_path)
    assert page.tables["claims"][1:] == [
        ["Table 1"],
        ["The next 2 rows: another number."],
        ["Dice in %: fm", "> 0", "1.00 (0.50 to 1.50)", "direction only"],
        ["Dice in %: random", "> 0", "1.00 (0.50 to 1.50)", "direction only"],
        ["Claim 1"],
        ["Points: a its own reason", "> 0", "+1.00 (+0.50 to +1.50)", "direction only"],
        ["Rounds: b", "> 0", "1.0 (0.5 to 1.5)", "direction only"],
    ]
    assert "Tested on 40 images, 3 seeds." in page.text


# Figures


def shown(page):
    return [attributes["id"] for attributes in page.all("figure")]


def test_figures_stand_in_the_storys_order_and_each_has_a_caption(tmp_path):
    pictures = ["why", "dice_by_round_age_seed0", "augmented_seed0", "ages", "images", "reliability"]
    pictures += ["worst_cases_seed0", "clients_age", "boxes", "dice_by_jitter", "per_image"]
    study(tmp_path, pictures=("fig2", "fig3", *pictures))
    assert shown(Page.of(tmp_path)) == [
        *("fig2", "fig3", "images", "ages", "clients_age", "boxes", "dice_by_jitter", "reliability"),
        *("augmented_seed0", "worst_cases_seed0", "dice_by_round_age_seed0", "per_image", "why"),
    ]
    drawn = {
        name for name, found in vars(plots).items() if getattr(found, "__module__", "") == plots.__name__
    }
    drawn = {name for name in drawn if not name.startswith("_")} - {"use_style", "colours", "group_colours"}
    drawn -= {"predictions", "loss_by_pixel", "round_by_round"}  # of pieces to play with, never saved
    assert drawn == set(report.CAPTIONS), "every figure has its place and its caption"
    explained = ("cosine near 1", "diversity near 1", "barrier, the loss does not rise")
    assert all(text in report.CAPTIONS["why"] for text in explained), "measures that no axis explains"


def test_only_the_studys_own_figures_with_content_are_shown(tmp_path):
    own = ["fig2", "fig3", "images", "clients_age"]
    others = ["clients_iid", "clients_quantity", "secret", "ages"]
    study(
        tmp_path, pictures=(*own, *others), figures=[f"{name}.png" for name in [*own, "clients_iid", "boxes"]]
    )
    assert shown(Page.of(tmp_path)) == own, "listed, there, and of a partition that was run"
    (tmp_path / "manifest.json").write_text(json.dumps(MANIFEST))
    assert shown(Page.of(tmp_path)) == ["fig2", "fig3", "images", "ages", "clients_age"], "an older study"
    Image.new("RGB", (40, 30), "white").save(tmp_path / "figures" / "images.png")
    assert "images" not in shown(Page.of(tmp_path)), "nothing is drawn on it"


def test_a_sweep_of_one_student_is_no_figure(tmp_path):
    alone = {"alpha_sweep": "", "temperature_sweep": "", "variants": ""}
    pictures = ("fig2", "fig3", "dice_by_alpha_seed0")
    study(tmp_path_of(tmp_path, "one"), pictures=pictures, settings=SETTINGS | alone)
    study(tmp_path_of(tmp_path, "two"), pictures=pictures, settings=SETTINGS | alone | {"alpha_sweep": "0,1"})
    assert "dice_by_alpha_seed0" not in shown(Page.of(tmp_path / "one"))
    assert "dice_by_alpha_seed0" in shown(Page.of(tmp_path / "two"))


def test_of_several_seeds_the_first_is_shown_and_the_others_are_named(tmp_path):
    study(tmp_path, pictures=("fig2", "fig3", *(f"loss_curves_seed{seed}" for seed in (10, 9, 11))))
    page = Page.of(tmp_path)
    assert shown(page) == ["fig2", "fig3", "loss_curves_seed9"]
    assert "loss_curves_seed10.png, loss_curves_seed11.png" in page.text

"""The page is whole, stands alone, and says nothing that the tables do not."""

import base64
import gzip
import json
import re
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from fmfl import analysis, config, privacy, report
from fmfl.errors import UserError

MANIFEST = {
    "fmfl": "0.1.0",
    "commit": "0123abc",
    "versions": {"torch": "2.15.0"},
    "device": {"name": "cpu"},
    "settings": {"size": 96, "num_clients": 3, "num_rounds": 2, "local_epochs": 1, "seeds": [0, 1, 2]},
    "data": {"images": 12345, "patients": 60, "left_out": {"lateral view": 2}, "fingerprint": "f" * 64},
    "cells": {"age": {"seconds": 1.5}, "iid": {"seconds": 2}},
}


def study(directory, *, gain=3.0, seeds=3, inits=analysis.INITS, images=40, pictures=("fig2", "fig3")):
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
    analysis.table1(results, per_image).to_csv(directory / "table1.csv", index=False)
    analysis.claims(results, per_image).to_csv(directory / "claims.csv", index=False)
    (directory / "manifest.json").write_text(json.dumps(MANIFEST))
    (directory / "figures").mkdir()
    for name in pictures:
        picture = Image.fromarray(rng.integers(0, 256, (30, 40), dtype=np.uint8))
        picture.save(directory / "figures" / f"{name}.png")
    return directory


class Page(HTMLParser):
    """Every tag with its attributes, and the text."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.text, self.open = [], "", []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> closes another tag"

    def handle_data(self, data):
        self.text += " ".join(data.split()) + " " if self.open[-1:] not in (["style"],) else ""

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
    assert not list(tmp_path.glob("*.tmp"))
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
    claims = pd.read_csv(tmp_path / "claims.csv")
    assert all(" ".join(claim.split()) in page.text for claim in claims.claim)


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
    tables = results, analysis.paired_differences(per_image), analysis.claims(results, per_image)
    assert "ends above a random start: +5.0 points" in " ".join(report.headline(*tables))
    quantity = " ".join(report.headline(*tables, split="quantity"))
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
    assert "12,345 images of 60 patients have a mask." in text
    assert "Left out were lateral view 2." in text
    assert "3 clients trained for 2 rounds of 1 local epochs" in text
    assert "Seeds: 0, 1, 2." in text
    assert "learning rate" not in text  # not in this manifest
    assert "{" not in text
    assert "epsilon" not in text
    assert report.methods({}) == [report.STATISTICS]


def test_methods_state_epsilon_where_there_was_noise():
    spent = privacy.spent(config.FlowerConfig(privacy="dp", dp_noise=4.0, dp_clipping=0.5), 5, runs=9)
    text = " ".join(report.methods(MANIFEST | {"privacy": spent}))
    assert "clipped to length 0.5 " in text and "deviation 4" in text and "over 5 rounds" in text
    assert f"epsilon is {int(spent['epsilon'])}." in text
    assert f"The 9 federated runs here come together to epsilon {int(spent['epsilon_of_all_runs'])}." in text
    before = {key: value for key, value in spent.items() if not key.startswith(("runs", "epsilon_of"))}
    older = " ".join(report.methods(MANIFEST | {"privacy": before}))
    assert f"epsilon is {int(spent['epsilon'])}." in older, "what an older manifest states stays stated"
    assert "epsilon" not in " ".join(
        report.methods(MANIFEST | {"privacy": privacy.spent(config.FlowerConfig(), 5)})
    )


def test_words_from_files_cannot_become_markup(tmp_path):
    study(tmp_path)
    claims = pd.read_csv(tmp_path / "claims.csv")
    claims.loc[0, "why"] = "<script>alert(1)</script>"
    claims.to_csv(tmp_path / "claims.csv", index=False)
    (tmp_path / "manifest.json").write_text(json.dumps(MANIFEST | {"device": {"name": "<x86>"}}))
    html = report.write(tmp_path).read_text(encoding="utf-8")
    assert "<script>" not in html
    assert "&lt;x86&gt;" in html


def test_heavy_content_is_reduced_compressed_or_left_beside_the_page(tmp_path, monkeypatch):
    study(tmp_path, images=1000)
    rng = np.random.default_rng(0)
    for name in ("fig2", "heavy1", "heavy2"):
        noise = rng.integers(0, 256, (300, 400, 3), dtype=np.uint8)  # 360 kB: nothing to compress
        Image.fromarray(noise).save(tmp_path / "figures" / f"{name}.png")
    monkeypatch.setattr(report, "PAGE_BYTES", 500_000)
    path = report.write(tmp_path)
    page = Page(path.read_text(encoding="utf-8"))

    assert path.stat().st_size < 500_000
    assert "heavy1.png, heavy2.png" in page.text  # named, not shown
    assert len(page.all("img")) == 2
    assert len(page.all("img")[0]["src"]) < 0.5 * (tmp_path / "figures" / "fig2.png").stat().st_size
    files = {link["download"]: link["href"] for link in page.all("a") if "download" in link}
    packed = base64.b64decode(files["per_image.csv.gz"].split(",")[1])
    assert gzip.decompress(packed) == (tmp_path / "per_image.csv").read_bytes()

    monkeypatch.setattr(report, "CSV_BYTES", 10)
    assert (
        "data: results.csv beside this page" in Page(report.write(tmp_path).read_text(encoding="utf-8")).text
    )


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
        ("manifest.json", "{", "is not JSON"),
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
    analysis.speed(results, [0.8]).to_csv(tmp_path / "speed.csv", index=False)
    analysis.weakest(per_image).to_csv(tmp_path / "weakest.csv", index=False)
    gap = analysis.gap(per_image, ["fm"], "age")
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
    file.write_text(f"# Title\n{report.BEGIN}\nold words\n{report.END}\nThe end.\n")
    for _ in range(2):  # and again, to the same text
        text = report.write_into(file, folder).read_text()
        assert text.startswith(f"# Title\n{report.BEGIN}\n![") and text.endswith(f"{report.END}\nThe end.\n")
        assert "old words" not in text and "(docs/results/figures/fig3.png)" in text
        table1 = pd.read_csv(folder / "table1.csv").set_index("init")
        assert f"| foundation model | {table1.federated.fm:.2f} (" in text and "| 85.38 |" in text
        assert text.count("| random |") == 1
    (tmp_path / "other.md").write_text(f"{report.END} {report.BEGIN}")
    with pytest.raises(UserError, match="has no place for results"):
        report.write_into(tmp_path / "other.md", folder)

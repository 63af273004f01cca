"""Tables in notebooks: no NaN, an interval beside its estimate, text in full, and the same in a terminal."""

import math
import xml.etree.ElementTree as ET

import pandas as pd

from fmfl.analysis import show

FRAME = pd.DataFrame(
    {
        "init": ["fm", "random"],
        "federated": [92.51, math.nan],
        "federated_low": [91.0, math.nan],
        "federated_high": [94.04, math.nan],
        "gain": [-0.5, 0.25],
        "low": [-1.0, math.nan],
        "high": [0.0, math.nan],
        "images_seen": [1110, 555],
        "equivalent": [True, False],
        "claim": ["a < b, and a sentence that is longer than the fifty characters that pandas shows", ""],
    }
)


def test_an_estimate_and_its_interval_share_a_cell():
    cells = show.table(FRAME, {"federated": 1}, interval_of="gain").cells
    assert list(cells) == ["init", "federated", "gain", "images seen", "equivalent", "claim"]
    assert list(cells["federated"]) == ["92.5 (91.0 to 94.0)", "–"]
    assert list(cells["gain"]) == ["−0.50 (−1.00 to 0.00)", "0.25"]
    assert list(cells["images seen"]) == ["1,110", "555"]
    assert list(cells["equivalent"]) == ["yes", "no"]


def test_columns_low_and_high_of_no_column_stay():
    assert list(show.table(FRAME[["init", "low", "high"]]).cells) == ["init", "low", "high"]


def test_text_is_whole_and_safe_in_html_and_in_a_terminal():
    table = show.table(FRAME)
    rows = ET.fromstring(table._repr_html_()).findall(".//tr")
    texts = [[cell.text for cell in row] for row in rows]
    assert texts == [list(table.cells), *table.cells.to_numpy().tolist()]
    assert rows[0][0].get("style") == "text-align: left" and rows[0][3].get("style") == "text-align: right"
    assert "NaN" not in repr(table) and FRAME.claim[0] in repr(table)


def test_a_mapping_is_a_row_a_value():
    table = show.table({"student": "unet", "reasons": {"blurred": 2}, "files": [], "bytes": 6695364})
    assert table.cells.to_numpy().tolist() == [
        ["student", "unet"],
        ["reasons", "blurred: 2"],
        ["files", "–"],
        ["bytes", "6,695,364"],
    ]


def test_an_index_with_names_is_shown_and_a_table_may_be_empty():
    means = FRAME.groupby(["init", "images_seen"])[["gain"]].mean()
    assert list(show.table(means).cells) == ["init", "images seen", "gain"]
    assert repr(show.table(FRAME.head(0))) == "(no rows)"
    assert "no rows" in show.table(FRAME.head(0))._repr_html_()

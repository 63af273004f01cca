"""The notebooks' interactive pieces: they show what the science gives, and programs keep a still picture."""

import base64
import io
import re

import matplotlib.pyplot as plt
import numpy as np
import pytest
from PIL import Image

from fmfl import data, split
from fmfl.analysis import plots
from fmfl.errors import UserError
from fmfl.widgets import live, pieces


@pytest.fixture(scope="module")
def cohort():
    plots.use_style()
    return data.load("phantom", size=32, num_phantoms=60, progress=False)


@pytest.fixture(scope="module")
def parts(cohort):
    return split.holdout(cohort.table)


def shown(live_one):
    """The PNG in the HTML of a live picture."""
    return base64.b64decode(re.search(r"base64,([^\"]+)", live_one.picture.value)[1])


def pixels(png):
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


def counted(draw_calls):
    """A piece that draws a line to its slider's height, and refuses 7."""

    def draw(height):
        draw_calls.append(height)
        if height == 7:
            raise UserError("height is 7: take another")
        figure, axis = plt.subplots(figsize=(2, 2))
        axis.plot([0, height])
        axis.set_ylim(0, 10)
        return figure, f"height {height} < 10"

    return live.Piece(draw, {"height": live.Slider("Height", 3, 0, 10)})


def test_a_piece_shows_the_picture_of_its_first_values_in_words_too():
    calls = []
    piece = counted(calls)
    assert repr(piece) == "height 3 < 10"
    assert pixels(piece.still.png).shape == (200, 200, 3)
    assert calls == [3], "drawn once"
    assert not plt.get_fignums(), "an open figure would be shown a second time"


def test_the_picture_follows_a_slider_and_words_are_escaped():
    live_one = live.Live(counted([]))
    before = shown(live_one)
    live_one.controls["height"].value = 9
    assert (pixels(before) != pixels(shown(live_one))).any()
    assert live_one.words.value == "height 9 &lt; 10"
    assert '<img width="200" height="200" alt="height 9 &lt; 10"' in live_one.picture.value


def test_a_refused_value_is_told_and_the_last_picture_stays():
    live_one = live.Live(counted([]))
    before = live_one.picture.value
    live_one.controls["height"].value = 7
    assert live_one.words.value == "height is 7: take another"
    assert live_one.picture.value == before


class Shell:
    """An IPython shell whose kernel was asked by a message with these metadata."""

    def __init__(self, metadata):
        self.kernel = self
        self.metadata = metadata

    def get_parent(self):
        return {"metadata": self.metadata}


@pytest.mark.parametrize(("metadata", "expected"), [({}, False), ({"cellId": "a"}, True)])
def test_widgets_are_made_where_a_front_end_names_its_cell(monkeypatch, metadata, expected):
    """JupyterLab, Notebook and VS Code name it; nbclient, and with it papermill and nbconvert, do not."""
    import IPython

    monkeypatch.setattr(IPython, "get_ipython", lambda: Shell(metadata))
    assert live.front_end() is expected


def test_without_a_kernel_there_is_no_front_end():
    assert not live.front_end()


def test_programs_keep_the_picture_and_make_no_widget(monkeypatch):
    import IPython.display

    shown = []
    monkeypatch.setattr(IPython.display, "display", lambda *a, **k: shown.append(a[0]))
    piece = counted([])
    monkeypatch.setattr(piece, "widget", lambda: pytest.fail("a widget was made"))
    piece._ipython_display_()
    assert [sorted(bundle) for bundle in shown] == [["image/png", "text/plain"]]


def test_a_gesture_moves_the_controls_together_and_draws_once():
    calls = []

    def draw(x, y):
        calls.append((x, y))
        figure, _ = plt.subplots(figsize=(2, 2))
        return figure, f"{x}, {y}"

    def drag(values, start, end):
        return {"x": values["x"] + round(10 * (end[0] - start[0])), "y": values["y"]}

    controls = {"x": live.Slider("x", 2, 0, 10), "y": live.Slider("y", 2, 0, 10)}
    live_one = live.Live(live.Piece(draw, controls, drag=drag))
    *_, field = live_one.stage.children
    for gesture in ("1,0,0,0.1,0", "1,0,0,0.5,0", "2,0,0,0.1,0"):
        field.value = gesture
    assert calls == [(2, 2), (3, 2), (7, 2), (8, 2)], "the same gesture counts from its begin, the next anew"


# ------------------------------------------------------------------------------------------ the pieces


def test_dealing_shows_what_split_partition_gives(cohort, parts):
    piece = pieces.dealing(cohort.table, parts.federated, "age", num_clients=4, seed=2)
    values = {"scheme": "age", "strength": 0.3, "ratio": 9.0, "num_clients": 4, "seed": 2}
    clients = split.partition(cohort.table, parts.federated, "age", 4, 2, strength=0.3)
    years = split.skew(cohort.table, clients)["wasserstein_mean"]
    words = piece.answer(values).words
    assert f"ages {years:.0f} years apart" in words
    assert words.endswith("images: " + ", ".join(str(len(rows)) for rows in clients))
    dealt = split.partition(cohort.table, parts.federated, "quantity", 4, 2, ratio=3.0)
    words = piece.answer(values | {"scheme": "quantity", "ratio": 3.0}).words
    assert words.endswith("images: " + ", ".join(str(len(rows)) for rows in dealt))


def test_dealing_to_one_client_and_without_ages_says_so(cohort, parts):
    piece = pieces.dealing(cohort.table, parts.federated, "iid", num_clients=1)
    assert "nothing to compare" in repr(piece)
    ageless = cohort.table.assign(age=np.nan)
    piece = pieces.dealing(ageless, parts.federated, "age")
    assert "needs ages" in repr(piece) and not piece.still.png

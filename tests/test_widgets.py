"""The notebooks' interactive pieces: they show what the science gives, and programs keep a still picture."""

import asyncio
import base64
import io
import re

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pandas as pd
import papermill
import pytest
import torch
from PIL import Image

import fmfl
from fmfl import config, data, losses, metrics, paths, prompts, split
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
    calls, open_before = [], plt.get_fignums()
    piece = counted(calls)
    assert repr(piece) == "height 3 < 10"
    assert pixels(piece.still.png).shape == (200, 200, 3)
    assert calls == [3], "drawn once"
    assert plt.get_fignums() == open_before, "an open figure would be shown a second time"


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


def test_a_mistake_in_the_code_is_told_and_raised(monkeypatch):
    live_one = live.Live(counted([]))
    monkeypatch.setattr(live_one.piece, "draw", lambda height: {}[height])
    with pytest.raises(KeyError):
        live_one.controls["height"].value = 5
    assert live_one.words.value == "KeyError: 5"


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


@pytest.fixture(scope="module")
def teacher():
    return fmfl.teacher.load()


def test_prompting_shows_the_dice_of_the_teachers_own_logits(cohort, teacher):
    image, mask = cohort.images[3], cohort.masks[3]
    boxes = prompts.prompt(mask[None], "ground_truth", per_image="per_lung")[0]
    piece = pieces.prompting(teacher, image, mask, boxes)
    expected = metrics.dice(teacher.logits(image[None], boxes[None]) > 0, mask[None])
    assert repr(piece).startswith(f"teacher's Dice {float(expected):.3f} ")
    moved = boxes + torch.tensor([0.0, 4.0, 0.0, 4.0])
    sides = {
        f"{side}{k + 1}": (b[i], b[i + 2])
        for k, b in enumerate(moved.tolist())
        for i, side in enumerate("xy")
    }
    expected = metrics.dice(teacher.logits(image[None], moved[None]) > 0, mask[None])
    calls = teacher.calls
    assert piece.answer(sides).words.startswith(f"teacher's Dice {float(expected):.3f} ")
    assert teacher.calls == calls, "the image was encoded once"


def test_encoded_images_give_the_same_logits_bit_by_bit(cohort, teacher):
    images = cohort.images[:3]
    boxes = prompts.prompt(cohort.masks[:3], "ground_truth", per_image="per_lung")
    assert torch.equal(teacher.encoded(images)(boxes), teacher.logits(images, boxes))
    one = prompts.prompt(cohort.masks[:3], "ground_truth", per_image="one")
    assert torch.equal(teacher.encoded(images)(one), teacher.logits(images, one))


def dragged(boxes, start, end, width=101, height=51):
    """The boxes after a gesture between two pixels, of an image on which these are whole shares."""
    piece = pieces.prompting(
        None, torch.zeros(1, height, width), None, torch.tensor(boxes, dtype=torch.float)
    )
    sides = {name: control.value for name, control in piece.controls.items()}
    (u0, v0), (u1, v1) = (((x + 0.5) / width, (y + 0.5) / height) for x, y in (start, end))
    sides |= piece.drag(sides, (u0, v0), (u1, v1))
    return [[*sides[f"x{k}"], *sides[f"y{k}"]] for k in range(1, 1 + len(boxes))]


def test_pressed_inside_a_box_is_carried_along_and_stays_in_the_image():
    assert dragged([[10, 10, 30, 20]], (20, 15), (25, 18)) == [[15, 35, 13, 23]]
    assert dragged([[10, 10, 30, 20]], (20, 15), (0, 0)) == [[0, 20, 0, 10]]
    assert dragged([[10, 10, 30, 20]], (20, 15), (100, 50)) == [[80, 100, 40, 50]]


def test_pressed_outside_the_nearest_box_is_drawn_anew():
    boxes = [[10, 10, 30, 20], [60, 10, 80, 20]]
    assert dragged(boxes, (50, 40), (70, 30)) == [[10, 30, 10, 20], [50, 70, 30, 40]]


def test_a_row_of_nan_is_no_box(cohort, teacher):
    boxes = torch.tensor([[4.0, 4, 28, 28], [float("nan")] * 4])
    assert list(pieces.prompting(teacher, cohort.images[0], cohort.masks[0], boxes).controls) == ["x1", "y1"]


# Batches of four pictures with a student's and a teacher's logits


@pytest.fixture(scope="module")
def batch(cohort):
    rng = torch.Generator().manual_seed(0)
    masks = cohort.masks[:4].float()
    student, teacher = (4 * masks - 2 + torch.randn(masks.shape, generator=rng) for _ in range(2))
    return cohort.images[:4] / 255, masks, student, teacher


def test_losing_shows_eq_5_of_the_chosen_picture(batch):
    _, masks, student, teacher = batch
    piece = pieces.losing(*batch, alpha=0.6, temperature=1.0)
    words = piece.answer({"alpha": 0.25, "temperature": 2.0, "number": 2}).words
    loss = losses.distillation_loss(student[2:3], teacher[2:3], masks[2:3], 0.25, 2.0)
    assert words.startswith("loss of picture 2: 0.25 * ") and words.endswith(f" = {loss:.4f}")


def test_the_pixels_distances_have_the_mean_of_eq_4_and_the_pull_is_autograds(batch, monkeypatch):
    _, masks, student, teacher = batch
    drawn = {}
    monkeypatch.setattr(
        plots, "loss_by_pixel", lambda i, m, p, far, pull: (drawn.update(far=far, pull=pull), plt.figure())[1]
    )
    piece = pieces.losing(*batch, alpha=0.6, temperature=1.0)
    piece.draw(alpha=0.6, temperature=3.0, number=1)
    expected = losses.kl_divergence(student[1:2], teacher[1:2], 3.0)
    torch.testing.assert_close(drawn["far"].mean(), expected)
    one = losses.kl_divergence(student[1, :, 5:6, 7:8][None], teacher[1, :, 5:6, 7:8][None], 3.0)
    torch.testing.assert_close(drawn["far"][0, 0, 5, 7], one)
    leaf = student[1:2].clone().requires_grad_()
    losses.distillation_loss(leaf, teacher[1:2], masks[1:2], 0.6, 3.0).backward()
    torch.testing.assert_close(drawn["pull"], -leaf.grad)
    plt.close("all")


def rounds_of_a_counter(asked, states=(0,)):
    """Rounds whose state counts them, and whose answer is right from round 3 on."""
    masks = torch.zeros(2, 1, 8, 8)
    masks[..., 2:6, 2:6] = 1

    def one_round(state, number):
        asked.append(number)
        return state + 1

    def look(state):
        return 10 * (2 * masks - 1) if state >= 3 else torch.ones_like(masks)

    return pieces.rounds(one_round, list(states), look, masks, num_rounds=5)


def test_rounds_are_computed_once_in_their_order_and_can_be_looked_at_again():
    asked = []
    piece = rounds_of_a_counter(asked)
    assert piece.still.words.startswith("after round 0: mean Dice 0.400 ") and not asked
    assert piece.answer({"number": 3}).words.startswith("after round 3: mean Dice 1.000 ")
    assert piece.answer({"number": 1}).words.startswith("after round 1: mean Dice 0.400 ")
    assert asked == [1, 2, 3]


def test_rounds_that_are_there_are_not_run_again():
    asked = []
    piece = rounds_of_a_counter(asked, states=(0, 1, 2))
    assert piece.still.words.startswith("after round 2: ") and not asked
    piece.answer({"number": 3})
    assert asked == [3]


def buttons(live_one):
    (around,) = [box for box in live_one.box.children if len(getattr(box, "children", ())) == 2]
    return around.children[0].children


def test_the_step_button_goes_one_round_on_and_stops_at_the_last():
    asked = []
    live_one = live.Live(rounds_of_a_counter(asked))
    step, _ = buttons(live_one)
    for _ in range(7):
        step.click()
    assert asked == [1, 2, 3, 4, 5] and live_one.controls["number"].value == 5


def test_the_run_button_runs_to_the_end_and_pauses_where_it_is_told():
    asked = []
    live_one = live.Live(rounds_of_a_counter(asked))
    _, run = buttons(live_one)

    async def press():
        run.value = True
        assert run.description == "Pause"
        while len(asked) < 2:
            await asyncio.sleep(0.01)
        run.value = False
        await asyncio.sleep(0.5)
        paused = list(asked)
        run.value = True
        while run.value:
            await asyncio.sleep(0.01)
        return paused

    assert asyncio.run(press()) == [1, 2]
    assert asked == [1, 2, 3, 4, 5] and run.description == "Run"


def leafing(cohort, makers, scores=None, note=""):
    if scores is None:
        dice = {"random": [0.5, 0.9, 0.7], "fm": [0.8, 0.9, 0.1]}
        scores = pd.DataFrame(dice, index=[7, 3, 5])
    return pieces.cases(cohort, scores, makers, note)


@pytest.mark.parametrize(
    ("order", "rows"),
    [
        ("Dice of random, lowest first", [7, 5, 3]),
        ("Dice of fm, lowest first", [5, 7, 3]),
        ("random and fm, furthest apart first", [5, 7, 3]),
    ],
)
def test_cases_are_leafed_through_in_their_order(cohort, order, rows):
    piece = leafing(cohort, {})
    for place, row in enumerate(rows, 1):
        words = piece.answer({"order": order, "place": place}).words
        assert words.startswith(f"{cohort.table.image_id[row]}, ")


def test_a_case_has_the_dice_of_each_makers_mask_and_each_is_asked_once(cohort):
    asked = []

    def empty(rows):
        asked.append(rows.tolist())
        return torch.zeros_like(cohort.masks[rows])

    piece = leafing(cohort, {"truth": lambda rows: cohort.masks[rows], "nothing": empty}, note="a note")
    assert repr(piece).endswith("truth: Dice 1.000; nothing: Dice 0.000; a note")
    piece.answer({"order": "Dice of random, lowest first", "place": 1})
    assert asked == [[7]]


def test_a_maker_that_is_refused_is_left_out_with_its_reason(cohort):
    def missing(rows):
        raise UserError("teacher 'medsam' needs its authors' weights")

    piece = leafing(cohort, {"teacher": missing})
    assert repr(piece).endswith("without teacher: teacher 'medsam' needs its authors' weights")
    assert piece.still.png, "the image and the truth are shown all the same"


def test_without_scores_there_is_a_sentence(cohort):
    assert repr(leafing(cohort, {}, scores=pd.DataFrame())).startswith("no federated run has scored")


# ------------------------------------------------------------------------------------------ programs

CELL = """
import matplotlib.pyplot as plt
from fmfl.widgets import live
draw = lambda height: (plt.subplots(figsize=(2, 2))[0], f"height {height}")
live.Piece(draw, {"height": live.Slider("Height", 3, 0, 9)})
"""


@pytest.mark.slow
def test_papermill_keeps_one_picture_and_no_state_of_widgets(tmp_path):
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(CELL)])
    notebook.metadata.kernelspec = {"name": "python3", "display_name": "Python 3"}
    nbformat.write(notebook, tmp_path / "in.ipynb")
    papermill.execute_notebook(tmp_path / "in.ipynb", tmp_path / "out.ipynb", progress_bar=False)
    written = nbformat.read(tmp_path / "out.ipynb", 4)
    assert "widgets" not in written.metadata
    (output,) = written.cells[-1].outputs
    assert sorted(output.data) == ["image/png", "text/plain"] and output.data["text/plain"] == "height 3"


def test_committed_notebooks_have_a_still_picture_each_and_no_widget():
    for name in config.NOTEBOOKS:
        notebook = nbformat.read(paths.NOTEBOOKS / f"{name}.ipynb", 4)
        assert "widgets" not in notebook.metadata
        (piece,) = [cell for cell in notebook.cells if cell.source.split("\n")[-1].startswith("pieces.")]
        (output,) = piece.outputs
        assert sorted(output.data) == ["image/png", "text/plain"], name
        assert len(output.data["image/png"]) < 150_000

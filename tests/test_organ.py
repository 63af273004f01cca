"""Another organ than lungs: boxes of its parts, labels of its masks, texts that name it, and a whole study.

The second organ is drawn by the package: kidneys, see fmfl/sources/kidneys.py.
"""

import ast
import json
import re
from collections import deque

import cv2
import nbformat
import numpy as np
import pandas as pd
import pytest
import torch
from made_sources import LEFT, RIGHT, load, lungs, make_coco, make_darwin, make_folder, picture, reasons, save
from PIL import Image
from typer.testing import CliRunner

import fmfl
from fmfl import config, data, metrics, models, paths, prompts, split, states, train
from fmfl.analysis import plots
from fmfl.errors import UserError
from fmfl.sources import kidneys, mask_files
from fmfl.sources.mask_files import Organ, organ_of
from fmfl.sources.pixels import read_image, resize
from fmfl.study import cli, grid, inspection, manifest, preflight

# ------------------------------------------------------------------------------------------ boxes of parts


def as_mask(*rows):
    return torch.tensor([[[[character == "#" for character in row] for row in rows]]], dtype=torch.uint8)


def boxes_of(masks):
    return prompts.boxes_from_masks(masks, per_image="per_part")


def test_each_part_has_a_box_from_left_to_right_by_hand():
    mask = as_mask(
        "#....##..#",
        "#....##...",
        "..##......",
        "..##......",
    )
    assert boxes_of(mask).tolist() == [[[0, 0, 0, 1], [2, 2, 3, 3], [5, 0, 6, 1], [9, 0, 9, 0]]]


def test_images_with_fewer_parts_have_rows_of_nan_at_the_end():
    three, one = as_mask("#.#.#", "#...."), as_mask(".....", "..##.")
    boxes = boxes_of(torch.cat([one, three]))
    assert boxes.shape == (2, 3, 4)
    assert boxes[0, 0].tolist() == [2, 1, 3, 1] and boxes[0, 1:].isnan().all()
    assert boxes_of(one).shape == (1, 1, 4), "no more rows than the batch needs"


def test_a_part_has_a_box_from_a_share_of_the_picture_on_and_the_largest_at_any_size():
    """0.0005 of 100 x 100 pixels are 5."""
    mask = torch.zeros(3, 1, 100, 100, dtype=torch.uint8)
    mask[:, :, 10:50, 10:50] = 1
    mask[0, :, 80, 80:85] = 1
    mask[1, :, 80, 80:84] = 1
    mask[2] = 0
    mask[2, :, 3, 4] = 1  # one pixel, and nothing else
    boxes = boxes_of(mask)
    assert boxes[0].tolist() == [[10, 10, 49, 49], [80, 80, 84, 80]]
    assert boxes[1, 0].tolist() == [10, 10, 49, 49] and boxes[1, 1].isnan().all()
    assert boxes[2, 0].tolist() == [4, 3, 4, 3]


def test_of_many_parts_the_largest_eight_have_boxes():
    mask = torch.zeros(1, 1, 64, 64, dtype=torch.uint8)
    for number in range(12):  # 1 x 2, 2 x 2, ... 12 x 2 pixels
        mask[0, 0, 4 : 5 + number, 5 * number : 5 * number + 2] = 1
    boxes = boxes_of(mask)[0]
    assert boxes[:, 0].tolist() == [5.0 * number for number in range(4, 12)]


def blobs(seed, size=48):
    noise = cv2.GaussianBlur(np.random.default_rng(seed).standard_normal((size, size)), (0, 0), 2.5)
    return noise > np.quantile(noise, 0.8)


def parts_by_flooding(mask):
    """The slow, obvious version: pixels by their four neighbours; boxes of what is large enough."""
    left = set(zip(*np.nonzero(mask), strict=True))
    parts = []
    while left:
        edge, part = deque([left.pop()]), []
        while edge:
            y, x = edge.popleft()
            part.append((y, x))
            for near in ((y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)):
                if near in left:
                    left.remove(near)
                    edge.append(near)
        parts.append(part)
    return parts


@pytest.mark.parametrize("seed", range(12))
def test_boxes_are_those_of_a_flood_and_of_opencv(seed):
    mask = blobs(seed)
    parts = [part for part in parts_by_flooding(mask) if len(part) >= prompts.PART_AREA * mask.size]
    flooded = [(min(x), min(y), max(x), max(y)) for y, x in (zip(*part, strict=True) for part in parts)]
    boxes = boxes_of(torch.from_numpy(mask)[None, None])[0]
    assert not boxes.isnan().any()
    _, _, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=4)
    by_opencv = [(x, y, x + w - 1, y + h - 1) for x, y, w, h, area in stats[1:] if area >= 2]
    assert set(flooded) == set(by_opencv)
    ours = [tuple(map(int, box)) for box in boxes.tolist()]
    assert ours == sorted(ours), "from left to right"
    if len(flooded) <= prompts.MAX_PARTS:
        assert set(ours) == set(flooded) and len(ours) == len(flooded)
    else:
        assert set(ours) < set(flooded) and len(ours) == prompts.MAX_PARTS


def test_of_two_parts_the_boxes_are_those_of_lungs():
    mask = as_mask("##...###", "##...###")
    assert torch.equal(boxes_of(mask), prompts.boxes_from_masks(mask))


def test_the_other_rules_take_boxes_of_parts():
    mask = as_mask("##..#..##", "##..#..##")
    exact = prompts.prompt(mask, "ground_truth", per_image="per_part")
    moved = prompts.prompt(mask, "ground_truth_jitter", per_image="per_part", jitter_pixels=1)
    assert exact.shape == moved.shape == (1, 3, 4) and 0 < (exact - moved).abs().max() <= 1
    assert prompts.prompt(0 * mask, "predicted", per_image="per_part").tolist() == [[[0, 0, 8, 1]]]
    with pytest.raises(ValueError, match="mask 0 is empty"):
        boxes_of(0 * mask)


def test_lungs_are_compared_by_lung_and_another_organ_by_part():
    assert prompts.compared("per_lung") == prompts.compared("one") == ("per_lung", "one")
    assert prompts.compared("per_part") == ("per_part", "one")
    assert config.settings({"boxes_per_image": "per_part"}).teacher.boxes_per_image == "per_part"


# ------------------------------------------------------------------------------------------ labels of masks


def labelled(*labels):
    """A mask file with one label a square, and the place of each."""
    values = np.zeros((32, 40), np.uint8)
    places = {label: np.s_[4:12, 4 + 9 * k : 10 + 9 * k] for k, label in enumerate(labels)}
    for label, place in places.items():
        values[place] = label
    return values, places


PICTURE = np.random.default_rng(0).integers(0, 256, (32, 40), dtype=np.uint8)


@pytest.mark.parametrize("chosen", [(2,), (1, 3), (3,)])
def test_chosen_labels_are_the_mask_to_the_pixel(chosen, tmp_path):
    values, places = labelled(1, 2, 3)
    organ = organ_of(f"kidney:{'+'.join(map(str, chosen))}")
    assert organ == Organ("kidney", chosen)
    expected = np.zeros(values.shape, bool)
    for label in chosen:
        expected[places[label]] = True
    picture = Image.fromarray(values, "P")
    picture.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0, 0, 0, 255])  # the numbers count, not the colours
    picture.save(tmp_path / "palette.png")
    save(tmp_path / "grey.png", values)
    for file in ("palette.png", "grey.png"):
        mask, remark = mask_files.read_mask(tmp_path / file, PICTURE, organ)
        np.testing.assert_array_equal(mask, expected)
        assert remark == ""


def test_three_labels_are_left_out_with_the_way_to_choose_one(tmp_path):
    save(tmp_path / "m.png", labelled(1, 2, 3)[0])
    with pytest.raises(mask_files.SkippedFile, match=r"labels are 1, 2, 3: choose by mask_class=kidney:1"):
        mask_files.read_mask(tmp_path / "m.png", PICTURE, Organ("kidney"))


def test_two_labels_are_two_lungs_but_of_another_organ_worth_a_remark(tmp_path):
    save(tmp_path / "m.png", labelled(1, 2)[0])
    assert mask_files.read_mask(tmp_path / "m.png", PICTURE)[1] == ""
    mask, remark = mask_files.read_mask(tmp_path / "m.png", PICTURE, Organ("kidney"))
    assert mask.sum() == 2 * 8 * 6
    assert remark == (
        "a mask of two values (1 and 2) that both count as kidney; mask_class=kidney:1 takes the first alone"
    )
    save(tmp_path / "one.png", labelled(255)[0])
    assert mask_files.read_mask(tmp_path / "one.png", PICTURE, Organ("kidney"))[1] == ""


@pytest.mark.parametrize("text", ["kidney:", "kidney:0", "kidney:a", "kidney:1,2", "kidney:1+", "kidney:-1"])
def test_what_is_no_list_of_labels_is_one_sentence(text):
    with pytest.raises(UserError, match="after the colon give labels"):
        organ_of(text)


def test_annotation_files_have_classes_and_no_labels(tmp_path):
    folder = make_coco(tmp_path / "coco", [(5, [[4, 6, 14, 6, 14, 26, 4, 26]])])
    assert len(load(folder, mask_class="heart")) == 1
    with pytest.raises(UserError, match="name their classes, and mask_class=heart:1 names a label"):
        load(folder, mask_class="heart:1")


def test_a_class_that_is_not_annotated_is_answered_with_those_that_are(tmp_path):
    """Each as it is to be named: sides left out, and tags of an image are no classes."""
    outline = [[4, 6, 14, 6, 14, 26, 4, 26]]
    coco = make_coco(tmp_path / "coco", [(3, outline), (4, outline), (5, outline)])
    darwin = make_darwin(tmp_path / "darwin", 2)
    for folder, classes in ((coco, ["heart", "lung"]), (darwin, ["ignore", "lung"])):
        answer = f"1 x no lungs mask.*; annotated are {', '.join(classes)}: name one as mask_class$"
        with pytest.raises(UserError, match=answer):
            load(folder, mask_class="lungs")
        with pytest.raises(UserError, match=answer):
            data.preview(folder, size=32, mask_class="lungs", cache=None)
        assert [len(load(folder, mask_class=name)) for name in classes] == [1, 1]


def test_a_label_that_no_mask_has_is_answered_with_those_that_are(tmp_path):
    folder = make_folder(tmp_path / "clinic")
    save(folder / "masks" / "b.png", 3 * lungs(LEFT).astype(np.uint8))
    save(folder / "masks" / "c.png", picture(2))  # no labels
    answer = "3 x no lung mask.*; labels of its mask files are 3, 255: name them as in mask_class=lung:3$"
    with pytest.raises(UserError, match=answer):
        load(folder, mask_class="lung:300")
    for name in "abc":
        save(folder / "masks" / f"{name}.png", np.zeros((32, 40), np.uint8))
    with pytest.raises(UserError, match=r"its mask is empty$"):
        load(folder)


@pytest.mark.parametrize("ending", ["_mask", "-mask", "_seg", "_Segmentation", "_label", "_gt", "-masks"])
def test_a_masks_name_may_end_in_what_it_is(ending, tmp_path):
    folder = make_folder(tmp_path / "clinic")
    (folder / "masks" / "b.png").rename(folder / "masks" / f"b{ending}.png")
    assert len(load(folder)) == 3


def test_of_two_masks_of_one_image_none_is_taken(tmp_path):
    folder = make_folder(tmp_path / "clinic")
    save(folder / "masks" / "b_seg.png", lungs(LEFT, RIGHT))
    assert reasons(load(folder)) == {"images/b.png": "several masks"}


# ------------------------------------------------------------------------------------------ drawn kidneys


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return kidneys.write(tmp_path_factory.mktemp("second") / "kidneys", 60)


@pytest.fixture(scope="module")
def cohort(folder):
    return load(folder, size=64, mask_class="kidney")


def test_the_drawn_folder_is_read_whole(folder, cohort):
    assert len(cohort) == 60 and cohort.left_out.empty and not cohort.remarks
    table = pd.read_csv(folder / "metadata.csv")
    assert sorted(table.image_id) == sorted(cohort.table.image_id)
    assert cohort.table.age.isna().all() and cohort.table.site.nunique() == 3
    assert 20 < cohort.table.patient_id.nunique() < 60


def test_some_slices_show_one_kidney_alone_and_the_others_two(cohort):
    counts = (~boxes_of(cohort.masks).isnan().any(-1)).sum(1).bincount().tolist()
    assert counts[0] == 0 and sum(counts[1:3]) == 60
    assert 0.1 <= counts[1] / 60 <= 0.4


def test_kidneys_are_not_found_by_their_brightness_nor_by_their_place(cohort):
    """The best of all thresholds, and the mean mask: what a student has to beat."""
    images, masks = cohort.images, cohort.masks
    by_brightness = [metrics.dice(images > level, masks).mean().item() for level in range(0, 256, 8)]
    everyone = masks.float().mean(0, keepdim=True)
    by_place = [
        metrics.dice((everyone > share).expand_as(masks), masks).mean().item() for share in (0.2, 0.4, 0.6)
    ]
    assert max(by_brightness) < 0.4 and max(by_place) < 0.75


def test_the_same_seed_draws_the_same_and_a_longer_list_begins_like_a_shorter_one():
    few, more, other = (list(kidneys.generate(*given)) for given in ((4, 3), (7, 3), (4, 4)))
    assert [len(slices) for slices in (few, more, other)] == [4, 7, 4]
    for (image, mask, row), (again, same, equal) in zip(few, more, strict=False):
        np.testing.assert_array_equal(image, again)
        np.testing.assert_array_equal(mask, same)
        assert row == equal and image.dtype == np.uint8 and mask.dtype == bool
    assert any((a[0].shape != b[0].shape) or (a[0] != b[0]).any() for a, b in zip(few, other, strict=True))


def test_a_folder_that_is_there_is_not_written_over(tmp_path):
    answer = CliRunner().invoke(cli.app, ["example", str(tmp_path / "new"), "--images", "2"])
    assert answer.exit_code == 0 and "with 2 images and masks" in answer.output
    assert sorted(file.name for file in (tmp_path / "new").iterdir()) == ["images", "masks", "metadata.csv"]
    with pytest.raises(UserError, match="is there already; name a new folder"):
        kidneys.write(tmp_path / "new")
    assert [file.name for file in tmp_path.iterdir()] == ["new"], "nothing half-made is left"


def test_each_slice_is_on_the_disk_before_the_next_is_drawn(tmp_path, monkeypatch):
    """So that 100,000 images take no more memory than one."""
    written, draw = [], kidneys.draw

    def counted(*arguments):
        written.append(len([*tmp_path.rglob("images/*.png")]))
        return draw(*arguments)

    monkeypatch.setattr(kidneys, "draw", counted)
    folder = kidneys.write(tmp_path / "new", 5)
    assert written == [0, 1, 2, 3, 4]
    assert len(pd.read_csv(folder / "metadata.csv")) == len([*(folder / "masks").iterdir()]) == 5


def test_the_built_in_teacher_does_not_know_kidneys(cohort):
    """As the page says: far below the same boxes, filled."""
    some = slice(0, 24)
    images, masks = cohort.images[some], cohort.masks[some]
    boxes = boxes_of(masks)
    dice = metrics.dice(fmfl.teacher.load().logits(images, boxes) > 0, masks).mean()
    filled = torch.zeros_like(masks)
    for number, slot in (~boxes.isnan().any(-1)).nonzero().tolist():
        x0, y0, x1, y1 = boxes[number, slot].int().tolist()
        filled[number, 0, y0 : y1 + 1, x0 : x1 + 1] = 1
    assert dice < 0.35 < 0.7 < metrics.dice(filled, masks).mean()


# ------------------------------------------------------------------------------------------ what is said


def test_warnings_and_sheet_name_the_organ_and_compare_with_the_folders_own_masks(tmp_path, cohort):
    said = inspection.warnings(cohort, "kidney")
    assert not re.search(r"lung|x-ray|chest", " ".join(said), re.I)
    assert not any("cover" in sentence for sentence in said), "small for lungs is usual for kidneys"
    tiny = fmfl.data.replace(cohort, masks=cohort.masks.clone())
    tiny.masks[5] = 0
    tiny.masks[5, 0, 3, 3] = 1
    (line,) = [sentence for sentence in inspection.warnings(tiny, "kidney") if "cover" in sentence]
    assert cohort.table.image_id[5] in line and "not what most of them do" in line
    assert inspection.sheet(tiny, tmp_path / "s.png", "kidney") == 60


def test_figures_of_ages_say_that_there_are_none(cohort):
    parts = split.partition(cohort.table, split.holdout(cohort.table).federated, "iid")
    for figure in (plots.ages(cohort.table), plots.clients(cohort.table, parts)):
        assert [text.get_text() for text in figure.axes[-1].texts] == ["no image has an age"]
        plots.plt.close(figure)


def test_a_folder_without_patients_is_warned_of_near_copies(tmp_path):
    (line,) = [
        one for one in inspection.warnings(load(make_folder(tmp_path / "bare"))) if "patient_id" in one
    ]
    assert "nearly the same" in line and "both sides of a split" in line


@pytest.mark.parametrize("splits", [["iid", "age", "quantity"], ["dirichlet"]])
def test_a_study_by_age_without_ages_says_which_splits_to_give(splits, folder, tmp_path):
    given = {"data": str(folder), "mask_class": "kidney", "size": 64, "run_name": str(tmp_path)}
    with pytest.raises(UserError) as caught:
        preflight.check(grid.plan(config.settings(given), [0], splits))
    sentence = str(caught.value)
    named = "age" if "age" in splits else "dirichlet"
    assert sentence.startswith(f"split {named} deals by age, but none of the clients' ")
    assert sentence.endswith("give --splits iid,quantity,site, which need none")


def test_the_splits_that_are_named_work(cohort):
    federated = split.holdout(cohort.table).federated
    for name in inspection.working_splits(cohort.table, federated, 3):
        assert len(split.partition(cohort.table, federated, name, 3)) == 3
    assert inspection.working_splits(cohort.table, federated, 4) == ["iid", "quantity"], "of three sites"


def test_the_note_on_the_built_in_teacher_is_of_the_organ(tmp_path):
    folder = tmp_path / "cells" / "02_teacher"
    folder.mkdir(parents=True)
    about = {"notebook": "02_teacher", "settings": {}, "record": {"name": "builtin"}, "run": {}}
    (folder / "cell.json").write_text(json.dumps(about))
    results = pd.DataFrame({"arm": [], "init": [], "split": [], "seed": []})
    notes = {}
    for organ in ("lung", "kidney:2"):
        cfg = config.settings({"mask_class": organ, "run_name": str(tmp_path)})
        notes[organ] = manifest.manifest(cfg, results)["teacher"]["note"]
    assert notes["lung"] == manifest.STAND_IN
    assert "does not know this organ (kidney)" in notes["kidney:2"]


# ------------------------------------------------------------------------------------------ the notebook


NOTEBOOK = nbformat.read(paths.NOTEBOOKS / "bring_your_own.ipynb", as_version=4)
CODE = [cell for cell in NOTEBOOK.cells if cell.cell_type == "code"]


def test_the_notebook_has_typed_parameters_and_short_cells_after_prose():
    assert NOTEBOOK.cells[1].metadata.tags == ["parameters"]
    for node in ast.parse(CODE[0].source).body:
        assert (
            node.target.id in config.PARAMETERS
            and config.PARAMETERS[node.target.id].kind.__name__ == node.annotation.id
        )
        config.validate(node.target.id, ast.literal_eval(node.value))
    assert max(len(cell.source.splitlines()) for cell in CODE[1:]) <= 12
    for link in re.findall(r"\]\(([^)]+)\)", "\n".join(cell.source for cell in NOTEBOOK.cells)):
        assert (paths.NOTEBOOKS / link).exists(), link


@pytest.mark.slow
def test_the_notebook_goes_from_a_folder_to_masks_in_their_own_size(folder, tmp_path):
    short = dict(num_rounds=1, proxy_epochs=1, data=str(folder), run_name=str(tmp_path / "run"))
    namespace = {"__name__": "__main__", "In": [""]}
    injected = "# Parameters\n" + "\n".join(f"{name} = {value!r}" for name, value in short.items())
    for source in (CODE[0].source, injected, *(cell.source for cell in CODE[1:])):
        namespace["In"].append(source)
        exec(source, namespace)
    masks = sorted((tmp_path / "run" / "predicted").glob("*.png"))
    tested = namespace["cohort"].table.image_id.iloc[namespace["parts"].test.tolist()]
    assert [file.stem for file in masks] == sorted(tested)
    for file in masks:
        assert Image.open(file).size == Image.open(folder / "images" / file.name).size
        assert set(np.unique(np.asarray(Image.open(file)))) <= {0, 255}


# ------------------------------------------------------------------------------------------ a whole study


@pytest.mark.slow
def test_a_second_organ_goes_from_folder_to_report_and_to_the_mask_of_a_new_image(folder, tmp_path):
    arguments = [
        "study",
        "--plain",
        "--profile",
        "smoke",
        "--data",
        folder,
        "--splits",
        "iid",
        "--out",
        tmp_path / "run",
    ]
    options = {"mask_class": "kidney", "boxes_per_image": "per_part", "student": "tiny_unet", "size": 64}
    options |= {"inits": "random,pretraining", "arms": "federated", "num_rounds": 3, "proxy_epochs": 30}
    options |= {"learning_rate": 3e-3, "proxy_learning_rate": 3e-3, "batch_size": 4, "proxy": 0.4, "test": 12}
    options |= {"alpha_sweep": "", "diagnostics": "false"}
    for name, value in options.items():
        arguments += ["-p", f"{name}={value}"]
    answer = CliRunner().invoke(cli.app, list(map(str, arguments)), catch_exceptions=False)
    assert answer.exit_code == 0, answer.output
    run = tmp_path / "run"
    page = re.sub(r"data:[\w/]+;base64,[^\"']*", "", (run / "report.html").read_text(encoding="utf-8"))
    assert "kidney segmentation" in page and "SYNTHETIC" not in page
    said = re.sub(r"trained on lungs alone|per_lung", "", page)
    assert not re.search(r"lung|x-ray|chest|74\.67", said, re.I)

    new = next(one for one in list(kidneys.generate(40, seed=1))[::-1] if one[1].mean() > 0.02)
    save(tmp_path / "new.png", new[0])
    grey, _ = read_image(tmp_path / "new.png")
    model = models.build("tiny_unet")
    state, record = states.read_state(run / "weights" / "federated-iid-pretraining-seed0.safetensors")
    models.load_state(model, state)
    logits = train.predict(model, torch.from_numpy(resize(grey, 64))[None, None], torch.tensor([0]))
    full = torch.nn.functional.interpolate(logits, grey.shape, mode="bilinear", align_corners=False) > 0
    truth = torch.from_numpy(new[1])[None, None]
    before, after = record["history"][0]["dice"], metrics.dice(full, truth).item()
    assert full.shape[-2:] == new[0].shape
    assert after > 0.3, f"{before:.2f} at the start, {after:.2f} on a new image"

"""A study's cost before it runs: its work against what the notebooks do, the speed of a known machine."""

from collections import Counter
from concurrent.futures import Future

import pytest
import torch
from made_sources import make_folder

from fmfl import capture, config, data, metrics, runs, train
from fmfl.data import Preview
from fmfl.errors import UserError
from fmfl.sources import contents
from fmfl.study import cost, execute, grid, preflight, stages
from fmfl.study.cost import Speed
from fmfl.teacher import Teacher

SPEED = Speed(step=0.5, score=0.25, encode=2.0, prompt=0.125, save=8.0, imports=4.0, cores=2)


def small(folder, **given) -> config.Settings:
    tiny = {"size": 32, "num_phantoms": 60, "num_rounds": 3, "proxy_epochs": 2, "student": "tiny_unet"}
    return config.settings(tiny | {"run_name": folder} | given)


# ------------------------------------------------------------------------------------------ a look at images


def test_a_preview_has_the_table_of_the_whole_and_decodes_a_few(tmp_path, monkeypatch):
    make_folder(
        tmp_path / "x", "abcdefghij", "image_id,age,sex\n" + "".join(f"{k},3,F\n" for k in "abcdefghij")
    )
    options = {"size": 32, "num_phantoms": 25, "cache": None}
    whole = data.load(["phantom", tmp_path / "x"], progress=False, **options)
    decoded = []
    decode = contents.decode
    monkeypatch.setattr(contents, "decode", lambda *a, **k: decoded.append(a) or decode(*a, **k))
    look = data.preview(["phantom", tmp_path / "x"], few=4, **options)
    sizes = ["original_width", "original_height"]  # a file's own, where no table tells
    assert look.table.drop(columns=sizes).equals(whole.table.drop(columns=sizes))
    assert len(decoded) <= 4 and look.seconds > 0
    assert torch.equal(look.images[:4], whole.images[:4]) and torch.equal(look.masks[:4], whole.masks[:4])


def test_a_preview_reads_the_cache_where_there_is_one(tmp_path):
    make_folder(tmp_path / "x")
    whole = data.load(tmp_path / "x", 32, cache=tmp_path / "cache", progress=False)
    look = data.preview(tmp_path / "x", 32, cache=tmp_path / "cache")
    assert look.table.equals(whole.table) and look.seconds == 0 and torch.equal(look.images, whole.images)


def test_a_dry_run_draws_a_few_images_alone(tmp_path, monkeypatch):
    """The paper's 6,504 of 256 pixels take minutes."""

    def never(*drawing):
        raise AssertionError("all images are drawn")

    monkeypatch.setattr(contents, "_draw_phantoms", never)
    monkeypatch.setattr(cost, "measure", lambda cfg, look, imports: SPEED)
    cells = grid.plan(small(tmp_path / "run", num_phantoms=90, phantom_seed=7), [0], ["iid", "age"])
    assert list(cost.estimate(cells)) == [cell.key for cell in cells]
    assert not (tmp_path / "run").exists()


def test_ages_that_only_decoded_files_tell_are_no_fault_of_a_dry_run(tmp_path, monkeypatch):
    """The split by age would be refused by the tables alone."""
    monkeypatch.setattr(cost, "measure", lambda cfg, look, imports: SPEED)
    whole = []
    load = stages.load_cohort
    monkeypatch.setattr(stages, "load_cohort", lambda cfg: whole.append(cfg) or load(cfg))
    cells = grid.plan(small(tmp_path / "run"), [0], ["age"])
    look = data.preview("phantom", 32, num_phantoms=60)
    cost._check(cells, look)
    assert not whole
    cost._check(cells, look._replace(table=look.table.assign(age=float("nan"))))
    assert len(whole) == 1


# ------------------------------------------------------------------------------------------ the work


class Spy:
    """Count of what a notebook really does."""

    def __init__(self, monkeypatch) -> None:
        self.count = Counter()
        for owner, name, what, number in (
            (train, "fit", "trained", lambda model, seen, *_, epochs, **__: epochs * len(seen)),
            (train, "predict", "predicted", lambda model, images, rows, **_: len(rows)),
            (metrics, "_surface_scores", "scored", lambda predicted, masks: len(masks)),
            (Teacher, "_embed", "encoded", lambda teacher, images: len(images)),
            (Teacher, "_decode", "prompted", lambda teacher, embeddings, *_: len(embeddings)),
            (runs, "_write", "saved", lambda run, last: 1),
        ):
            self.watch(monkeypatch, owner, name, what, number)

    def watch(self, monkeypatch, owner, name, what, number) -> None:
        real = getattr(owner, name)

        def counted(*arguments, **options):
            self.count[what] += number(*arguments, **options)
            return real(*arguments, **options)

        monkeypatch.setattr(owner, name, counted)


@pytest.mark.slow
@pytest.mark.parametrize(
    "given",
    [
        {"phantom_seed": 1},
        {
            "phantom_seed": 2,
            "alpha_sweep": "",
            "score_every": 2,
            "inits": "random,fm",
            "teacher_views": "fresh",
        },
        {
            "phantom_seed": 3,
            "temperature_sweep": "1,2",
            "variants": "hard,dice_only",
            "labelled": 0.5,
            "arms": "federated",
        },
    ],
)
def test_the_work_is_what_the_notebooks_do(tmp_path, monkeypatch, given):
    """Counted while they run; what 03 and 04 do by hand on one core is counted apart.

    Images of its own: of others the teacher's answers would be in the cache.
    """
    cells = grid.plan(small(tmp_path / "run", **given), [0], ["age"])
    preflight.check(cells)
    cohort = stages.load_cohort(cells[0].cfg)
    for cell in cells:
        with monkeypatch.context() as patched:
            spy = Spy(patched).count
            execute.plain(cell, cell.executed)
        parts = stages.holdout(cell.cfg, cohort)
        one, rounds = cost.work_of(cell, parts, 1), cost._of_rounds(cell, parts)
        work = {name: getattr(one, name) + getattr(rounds, name) for name in cost.Work._fields}
        clients = stages.partition(cohort, parts.federated, cell.cfg.federate)
        first_and_last = min(16, len(clients[0])) + min(32, len(clients[-1]))
        first_and_last += 2 * sum(min(8, len(rows)) for rows in clients)  # two rounds in the piece
        by_hand = {"03_distill": 2 * len(parts.proxy), "04_federate": first_and_last}.get(cell.notebook, 0)
        assert work["images"] == pytest.approx(spy["trained"] - by_hand, abs=2), cell.key
        if cell.notebook == "05_analysis":  # losses around the starts are no predictions
            continue
        for name in ("predicted", "scored", "encoded", "prompted", "saved"):
            assert work[name] == pytest.approx(spy[name], abs=6), f"{name} of {cell.key}"


def test_seconds_are_work_times_speed(tmp_path):
    """By hand: 01 has imports of 4 s, of which a kernel's start takes 1.6 and the figures 0.65."""
    (cell,) = [c for c in grid.plan(small(tmp_path), [0], ["age"]) if c.notebook == "01_data"]
    imports = Future()
    imports.set_result(4.0)
    look = data.preview("phantom", 32, num_phantoms=60)._replace(seconds=10.0)
    for plain, seconds in ((True, 4 * 0.65), (False, 4 * (0.65 + 1.6))):
        (known,) = cost.of_cells([cell], look, imports, plain=plain).values()
        assert known.seconds == pytest.approx(10 + seconds), "reading the images belongs to the first one"
    # A third of a step for a prediction; scores and checkpoints share the two cores.
    work = cost.Work(images=10, alone=2, predicted=30, scored=8, encoded=3, prompted=4, saved=2)
    assert work.seconds(SPEED) == pytest.approx(22 * 0.5 + 6 + 0.5 + (2 + 16) / 2)


def test_the_last_training_on_two_cores_costs_as_much_as_two():
    """Of three trainings side by side on two cores the third leaves one idle."""
    assert [cost._idle(n, 2) for n in (0, 1, 2, 3)] == [0, 1, 0, 1]
    assert cost._idle(5, 16) == 11 and cost._idle(5, 1) == 0


# ------------------------------------------------------------------------------------------ the speed


def test_the_ladder_goes_from_two_small_images_to_the_whole_step():
    assert cost._ladder(256, 16) == [(64, 2), (128, 2), (256, 2), (256, 4), (256, 8), (256, 16)]
    assert cost._ladder(96, 8) == [(96, 2), (96, 4), (96, 8)]
    assert cost._ladder(32, 1) == [(32, 1)]


@pytest.mark.parametrize("whole_step", [0.05, 0.6, 2.0, 60.0])
def test_a_step_is_measured_in_bounded_time_however_long_it_is(tmp_path, monkeypatch, whole_step):
    """On a machine whose steps take a known time a pixel, by a clock that they alone move."""
    steps, now = [], [0.0]

    def fit(model, examples, loss, *, batch_size, **options):
        side = examples.images.shape[-1]
        steps.append((side, batch_size))
        now[0] += whole_step * side**2 * len(examples) / (16 * 256**2)

    monkeypatch.setattr(train, "fit", fit)
    monkeypatch.setattr(cost.time, "perf_counter", lambda: now[0])
    images = torch.zeros(4, 1, 256, 256, dtype=torch.uint8)
    assert cost._one_training(small(tmp_path, size=256, batch_size=16), images, images) == pytest.approx(
        whole_step
    )
    assert now[0] <= cost.MEASURED_SECONDS
    assert ((256, 16) in steps) == (whole_step < 1)
    assert (max(steps) == (64, 2)) == (whole_step > 30)


def test_a_gpu_is_measured_by_recorded_steps_of_their_own_size(tmp_path, monkeypatch):
    """A launch lasts 36 ms whatever the step's size, and the first step 3 s; a replay lasts 7 ms."""
    replayed, now, taken = [], [0.0], Counter()
    monkeypatch.setattr(cost.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(capture, "usable", lambda device: True)
    monkeypatch.setattr(capture, "record", lambda function, buffers, resident: lambda: torch.zeros(()))

    def fit(model, examples, loss, *, batch_size, **options):
        for _ in range(len(examples) // batch_size):
            recording = (id(examples.images), batch_size)  # as `train` knows it
            taken[recording] += 1
            first, eager = not replayed and not now[0], taken[recording] <= capture.EAGER_STEPS
            now[0] += 3.0 if first else 0.036 if eager else 0.5 if taken[recording] == 4 else 0.007
            replayed.append((examples.images.shape[-1], batch_size))

    monkeypatch.setattr(train, "fit", fit)
    images = torch.zeros(4, 1, 256, 256, dtype=torch.uint8)
    step = cost._one_training(small(tmp_path, size=256, batch_size=16), images, images)
    assert step == pytest.approx(0.007)
    assert set(replayed) == {(256, 16)}


def test_a_gpu_is_measured_in_a_process_that_ends_where_kernels_will_need_it(tmp_path, monkeypatch):
    """The process of the study would keep what it takes of the GPU. Here a CPU stands in for one."""
    cfg, look = small(tmp_path), data.preview("phantom", 32, num_phantoms=60)
    monkeypatch.setattr(capture, "usable", lambda device: True)
    monkeypatch.setattr(cost, "measure", lambda cfg, look, imports: SPEED)
    assert cost._measured(cfg, look, 3.0, plain=True) == SPEED
    speed = cost._measured(cfg, look, 3.0, plain=False)
    assert isinstance(speed, Speed) and speed != SPEED and speed.imports == 3
    assert all(value > 0 for value in speed._replace(prompt=1.0))
    assert speed.prompt >= 0  # a difference of two times: the tiny teacher's may be all noise
    monkeypatch.setattr(cost, "MEASURE", "raise RuntimeError('all GPUs are busy or unavailable')")
    with pytest.raises(UserError, match=r"cannot be measured \(RuntimeError: all GPUs are busy"):
        cost._measured(cfg, look, 3.0, plain=False)


def test_a_gpus_first_answer_of_the_teacher_does_not_count(tmp_path, monkeypatch):
    """It loads kernels for seconds; then an image takes 10 ms and a set of boxes 2."""
    now = [0.0]

    class Teacher:
        def answers(self, images, boxes):
            now[0] += 3.0 if not now[0] else len(images) * (0.010 + 0.002 * len(boxes))
            return [torch.zeros(())]

    monkeypatch.setattr(cost.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(capture, "usable", lambda device: True)
    monkeypatch.setattr(stages, "load_teacher", lambda cfg: Teacher())
    images = torch.zeros(4, 1, 32, 32, dtype=torch.uint8)
    masks = torch.zeros_like(images)
    masks[..., 8:24, 8:24] = 1
    assert cost._teacher_seconds(small(tmp_path), images, masks) == pytest.approx((0.010, 0.002))


def test_this_machine_has_a_speed(tmp_path):
    """All of it is measured; another size of a variant is measured on the same images."""
    look: Preview = data.preview("phantom", 32, num_phantoms=60)
    speed = cost.measure(small(tmp_path, size=64), look, imports=3.0)
    assert all(value > 0 for value in speed) and speed.imports == 3
    assert speed.cores == torch.get_num_threads()

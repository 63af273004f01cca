"""Cost of a study before it runs: the work of each cell, and the seconds that this machine takes for it.

The work is counted from the settings and the tables. The machine is measured for a few seconds: a training
step of the run's student, the teacher's answer to a few images, scores, a checkpoint, the imports of a
notebook. A step that would take too long is measured on fewer and smaller images, and scaled by the pixels.
"""

import math
import pickle
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fmfl import capture, data, devices, metrics, models, parallel, prompts, states, train
from fmfl.config import Settings, split_list
from fmfl.data import Cohort, Preview
from fmfl.errors import UserError
from fmfl.sources import phantom
from fmfl.split import Holdout
from fmfl.study import preflight, stages
from fmfl.study.cells import Cell, fingerprints
from fmfl.train import Examples

#: Seconds that the steps of a student may take to be measured, and the smallest images for it.
MEASURED_SECONDS, SMALLEST = 1.5, 64

#: Recorded steps that are timed on a GPU.
REPLAYS = 8

#: A forward pass over a training step: backward costs about twice as much as forward.
FORWARD = 1 / 3

#: Tables and figures of a notebook, in times of a notebook's imports: both are Python on one core.
DRAWING = {"01_data": 0.65, "02_teacher": 0.8, "03_distill": 0.8, "04_federate": 0.6, "05_analysis": 2.6}

#: Start and end of a kernel over the imports of a notebook.
KERNEL = 1.6

#: Imports of a notebook, the student's library among them.
IMPORTS = (
    "import ipykernel, fmfl.study.report, fmfl.study.stages, fmfl.analysis.plots, matplotlib.pyplot;"
    "fmfl.models.build({student!r})"
)

#: Measurement in a process of its own; the file holds what is given, then the speed.
MEASURE = (
    "import pathlib, pickle, sys; from fmfl.study import cost; file = pathlib.Path(sys.argv[1]);"
    "file.write_bytes(pickle.dumps(cost.measure(*pickle.loads(file.read_bytes()))))"
)

#: Sets of boxes that 02_teacher prompts with, by rules and by distances, and images that it encodes for them.
PROMPTS, ENCODINGS = 1 + 7 + 5, 3


class Speed(NamedTuple):
    """Seconds of this machine, with all its cores at work unless one is named.

    Attributes:
        step: of an image in a training step.
        score: of an image's scores, on one core.
        encode: of an image in the teacher's encoder.
        prompt: of a set of boxes of an image in the teacher's decoder.
        save: of a checkpoint, on one core.
        imports: of a notebook's imports.
        cores: trainings that run side by side.
    """

    step: float
    score: float
    encode: float
    prompt: float
    save: float
    imports: float
    cores: int


class Work(NamedTuple):
    """Work of a cell.

    Attributes:
        images: that go through a student in training, repeats counted.
        alone: images more that a core would train while it waits for the others.
        predicted, scored: images.
        encoded, prompted: images in the teacher, and images times sets of boxes.
        saved: checkpoints.
    """

    images: int = 0
    alone: float = 0
    predicted: float = 0
    scored: float = 0
    encoded: float = 0
    prompted: float = 0
    saved: float = 0

    def seconds(self, speed: Speed) -> float:
        """Seconds at a speed, without the notebook's own start and figures."""
        steps = self.images + self.alone + FORWARD * self.predicted
        beside = self.scored * speed.score + self.saved * speed.save
        teacher = self.encoded * speed.encode + self.prompted * speed.prompt
        return steps * speed.step + teacher + beside / speed.cores


class Cost(NamedTuple):
    """Cost of a cell.

    Attributes:
        images: that go through a student in training.
        seconds: of all that the cell does.
        rounds: seconds of its federated rounds, which are part of them.
    """

    images: int
    seconds: float
    rounds: float = 0.0


def estimate(
    cells: list[Cell],
    *,
    replace_other: bool = False,
    plain: bool = False,
    say: Callable[[str], object] = lambda line: None,
) -> dict[str, Cost]:
    """Cost of each cell that is not done, by its key.

    Images are decoded only where the study's folder already holds something, which is told by their bytes.

    Raises:
        UserError: the study cannot run to its end, or its folder holds another one.
    """
    root = cells[0].cfg.run_dir
    if not replace_other:
        preflight.refuse_other(cells, {})  # by settings alone, which takes no time
    say("looking at the images and measuring this machine, for some seconds")
    with ThreadPoolExecutor(1) as pool:
        imports = pool.submit(_seconds_of_imports, cells[0].cfg.distill.student)
        look = _look(cells[0].cfg)
        if root.exists() and any(root.iterdir()):
            inputs = preflight.check(cells)
            if not replace_other:
                preflight.refuse_other(cells, inputs)
            keys = fingerprints(cells, inputs)
            cells = [cell for cell in cells if not cell.is_done(keys[cell.key])]
        else:
            _check(cells, look)
        return of_cells(cells, look, imports, plain=plain)


def _check(cells: list[Cell], look: Preview) -> None:
    """Check a study by the table alone; where that finds a fault, decoded images have the last word."""
    try:
        preflight.check(cells, _without_pixels(look))
    except UserError:
        preflight.check(cells)


def _without_pixels(look: Preview) -> Cohort:
    """Return a cohort whose images are not there: each is the same one."""
    nothing = look.images.new_zeros(1).expand(len(look.table), 1, *look.images.shape[2:])
    return Cohort(nothing, nothing, look.table, look.table.iloc[:0], "")


def of_checked(cells: list[Cell], *, plain: bool = False) -> dict[str, Cost]:
    """Cost of these cells by their keys, for a study that has passed its checks."""
    with ThreadPoolExecutor(1) as pool:
        imports = pool.submit(_seconds_of_imports, cells[0].cfg.distill.student)
        return of_cells(cells, _look(cells[0].cfg), imports, plain=plain)


def _look(cfg: Settings) -> Preview:
    return data.preview(
        cfg.data.data,
        size=cfg.data.size,
        num_phantoms=cfg.data.num_phantoms,
        phantom_seed=cfg.data.phantom_seed,
        mask_class=cfg.data.mask_class,
    )


def of_cells(
    cells: list[Cell], look: Preview, imports: "Future[float]", *, plain: bool = False
) -> dict[str, Cost]:
    """Cost of these cells by their keys; cells of one size and student are measured once.

    Args:
        look: at the study's images.
        imports: seconds of a notebook's imports, once they are measured.
        plain: the notebooks run without kernels.
    """
    cohort, speeds, costs = _without_pixels(look), {}, {}
    for cell in cells:
        cfg = cell.cfg
        how = (cfg.data.size, cfg.distill.student, cfg.teacher, cfg.run, cfg.federate.batch_norm)
        how = (*how, cfg.federate.batch_size, cfg.federate.augmentation)
        if how not in speeds:
            speeds[how] = _measured(cfg, look, imports.result(), plain)
        speed, parts = speeds[how], stages.holdout(cfg, cohort)
        work, rounds = work_of(cell, parts, speed.cores), _of_rounds(cell, parts)
        own = speed.imports * (DRAWING[cell.notebook] + (0 if plain else KERNEL))
        seconds = own + work.seconds(speed) + rounds.seconds(speed)
        costs[cell.key] = Cost(work.images + rounds.images, seconds, rounds.seconds(speed))
    if costs:
        first = next(iter(costs))
        costs[first] = costs[first]._replace(seconds=costs[first].seconds + look.seconds)
    return costs


# ---------------------------------------------------------------------------------------------------
# The work of a cell
# ---------------------------------------------------------------------------------------------------


def work_of(cell: Cell, parts: Holdout, cores: int) -> Work:
    """Count a cell's work besides its federated rounds."""
    counted = {"02_teacher": _of_teacher, "03_distill": _of_starts, "04_federate": _of_steps_by_hand}
    if cell.notebook == "05_analysis":
        return _of_diagnostics(cell.cfg, parts)
    return counted[cell.notebook](cell, parts, cores) if cell.notebook in counted else Work()


def _of_teacher(cell: Cell, parts: Holdout, cores: int) -> Work:
    """Count the answers to each set of boxes, and the two students of the predicted ones."""
    proxy = len(parts.proxy)
    images = cell.cfg.distill.proxy_epochs * proxy
    return Work(
        images=images,
        alone=_idle(2, cores) * images / 2,
        predicted=proxy,
        scored=PROMPTS * proxy,
        encoded=ENCODINGS * proxy,
        prompted=PROMPTS * proxy,
    )


def _of_starts(cell: Cell, parts: Holdout, cores: int) -> Work:
    """Count the trainings of starts and of students compared with them, their scores, and Eq. 5 by hand."""
    cfg, proxy, test = cell.cfg, len(parts.proxy), len(parts.test)
    inits, students = split_list(cfg.federate.inits), stages.variants(cfg)
    starts = preflight.PROXY_INITS & {*inits}
    # Masks alone are the pre-trained start, and the run's own distillation is the start from the teacher.
    compared = {
        "fm" if how == cfg.distill and how.alpha else how if how.alpha else "pretraining" for how in students
    }
    more = compared - starts - (set() if cfg.distill.labelled else {"pretraining"})
    trainings = len(starts) + len(more)
    one = cfg.distill.proxy_epochs * proxy
    fresh = cfg.distill.teacher_views == "fresh"  # also by hand: a batch of 18, and an epoch twice
    asked = fresh * (len((starts | more) - {"pretraining"}) * one + min(18, proxy) + 2 * proxy)
    return Work(
        images=trainings * one,
        alone=(_idle(len(starts), cores) + _idle(len(more), cores)) * one + 2 * cores * proxy,
        predicted=(len(inits) + 1 + len(students)) * test,
        scored=(len(inits) + 1 + len(students)) * test,
        encoded=asked + test,
        prompted=asked + test,
    )


def _idle(trainings: int, cores: int) -> int:
    """Count the trainings that would fit on the cores that have none while the last ones run."""
    return -trainings % cores


def _of_steps_by_hand(cell: Cell, parts: Holdout, cores: int) -> Work:
    """Count the few images on which 04_federate takes Eq. 2 and 3 by hand, on one core."""
    clients, images = cell.cfg.federate.num_clients, len(parts.federated)
    by_hand = 2 * 16 + 16 + 8 * (clients - 1)
    piece = 2 * 8 * clients  # two rounds of few images, shown round by round
    looks = 6 * min(8, len(parts.test))  # three states, each for its Dice and for its picture
    return Work(alone=cores * (min(by_hand, 3 * images) + min(piece, 2 * images)), predicted=looks)


def _of_rounds(cell: Cell, parts: Holdout) -> Work:
    """Count a cell's federated rounds: training, scores, checkpoints."""
    if not cell.rounds:
        return Work()
    cfg = cell.cfg.federate
    runs = cell.rounds / cfg.num_rounds
    runs += (cfg.num_clients - 1) * ("standalone" in split_list(cfg.arms))  # counted as one
    scored = runs * (-(-cfg.num_rounds // cfg.score_every) + 2) * len(parts.test)
    # As if all clients took part: those without an age are few.
    images = round(cell.rounds * cfg.participation * len(parts.federated) * cfg.local_epochs)
    return Work(images=images, predicted=scored, scored=scored, saved=runs * cfg.num_rounds)


def _of_diagnostics(cfg: Settings, parts: Holdout) -> Work:
    """Count the first rounds that the analysis repeats, and the losses around them; see `landscape`."""
    if not cfg.analysis.diagnostics or "federated" not in split_list(cfg.federate.arms):
        return Work()
    clients = cfg.federate.num_clients
    taken = len(range(0, clients, math.ceil(clients / 6)))
    starts, pairs = len(split_list(cfg.federate.inits)), taken * (taken - 1) // 2
    trained = starts * cfg.federate.local_epochs * len(parts.federated) * taken / clients
    return Work(images=round(trained), alone=starts * 20 * 16, predicted=starts * pairs * 5 * 16)


# ---------------------------------------------------------------------------------------------------
# The speed of the machine
# ---------------------------------------------------------------------------------------------------


def _seconds_of_imports(student: str) -> float:
    code = [sys.executable, "-c", IMPORTS.format(student=student)]
    return _timed(lambda: subprocess.run(code, capture_output=True, check=False))[0]


def measure(cfg: Settings, look: Preview, imports: float) -> Speed:
    """Measure the machine for a few seconds with a study's settings.

    Args:
        look: at the study's images.
        imports: seconds of a notebook's imports.
    """
    device, size = devices.device_of(cfg.run), cfg.data.size
    images, masks = (_resized(stored, size).to(device) for stored in _pictures(look, size))
    cores = torch.get_num_threads() if device.type == "cpu" else 1
    model = models.build(cfg.distill.student, device=device, batch_norm=cfg.federate.batch_norm)
    metrics.score(masks[:1].float(), masks[:1])  # the first call imports
    score, _ = _timed(lambda: metrics.score(masks.roll(2, -1).float(), masks))
    encode, prompt = _teacher_seconds(cfg, images, masks)
    return Speed(
        step=_step_seconds(cfg, images, masks, cores),
        score=score / len(images),
        encode=encode,
        prompt=prompt,
        save=_save_seconds(model.state_dict()),
        imports=imports,
        cores=cores,
    )


def _measured(cfg: Settings, look: Preview, imports: float, plain: bool) -> Speed:
    """Measure the machine, and a GPU for kernels in a process that ends.

    What this process takes of a GPU it keeps, and a cluster's GPU may be set to admit one process alone.

    Raises:
        UserError: the GPU cannot be measured.
    """
    if plain or not capture.usable(devices.device_of(cfg.run)):
        return measure(cfg, look, imports)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "measured"
        file.write_bytes(pickle.dumps((cfg, look, imports)))
        code = [sys.executable, "-c", MEASURE, str(file)]
        ended = subprocess.run(code, capture_output=True, text=True, check=False)
        if ended.returncode:
            reason = (ended.stderr.strip() or f"exit code {ended.returncode}").splitlines()[-1]
            raise UserError(f"the GPU cannot be measured ({reason}): free it, or run with --no-progress")
        return pickle.loads(file.read_bytes())


def _pictures(look: Preview, size: int) -> tuple[Tensor, Tensor]:
    """Return the images of a look with their masks; synthetic ones where none of them could be decoded."""
    if len(look.images):
        return look.images, look.masks
    images, masks, _ = phantom.generate(4, size)
    return torch.from_numpy(images)[:, None], torch.from_numpy(masks)[:, None]


def _resized(images: Tensor, size: int) -> Tensor:
    return images if images.shape[-1] == size else F.interpolate(images, size=(size, size))


def _timed(task: Callable[[], Any]) -> tuple[float, Any]:
    started = time.perf_counter()
    result = task()
    return time.perf_counter() - started, result


def _save_seconds(state: states.State) -> float:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "state.safetensors"
        return _timed(lambda: (states.state_digest(state), states.write_state(file, state)))[0]


def _teacher_seconds(cfg: Settings, images: Tensor, masks: Tensor) -> tuple[float, float]:
    """Return the seconds that the teacher takes to encode an image, and to answer a set of boxes."""
    model = stages.load_teacher(cfg)
    boxes = prompts.prompt(masks, "ground_truth", per_image=cfg.teacher.boxes_per_image)

    def ask(number: int, sets: int) -> float:
        def answers() -> list[float]:
            return [logits.sum().item() for logits in model.answers(images[:number], [boxes[:number]] * sets)]

        return _timed(answers)[0] / min(number, len(images))

    if capture.usable(images.device):
        ask(1, 1)  # the first answer of all loads kernels, for seconds
    if (once := ask(1, 1)) > MEASURED_SECONDS / 3:
        return once, 0.0
    one, four = ask(4, 1), ask(4, 4)
    prompt = max(0.0, four - one) / 3
    return max(0.0, one - prompt), prompt


def _step_seconds(cfg: Settings, images: Tensor, masks: Tensor, cores: int) -> float:
    """Return the seconds of an image in a training step, with a training on each core."""
    seconds = parallel.side_by_side(lambda _: _one_training(cfg, images, masks), range(cores), images.device)
    return sum(seconds) / len(seconds) / cfg.federate.batch_size / cores


def _one_training(cfg: Settings, images: Tensor, masks: Tensor) -> float:
    """Return the seconds of one step of the run's student at its own size and batch.

    A GPU takes whole steps at once: its small ones last as long as a launch, whatever their size. On a CPU a
    first step has two images of a small size. It tells the largest step that is short enough to be timed.
    The optimizer's part does not grow with the images, so it is timed apart.
    """
    size, batch, until = cfg.data.size, cfg.federate.batch_size, time.perf_counter() + MEASURED_SECONDS
    model = models.build(cfg.distill.student, device=images.device, batch_norm=cfg.federate.batch_norm)
    optimizer = train.adam(model, cfg.federate.learning_rate)

    def seconds(side: int, number: int, steps: int) -> float:
        rows = torch.arange(number * steps, device=images.device) % len(images)
        own = Examples(_resized(images, side), _resized(masks, side), rows)
        fit = dict(epochs=1, batch_size=number, optimizer=optimizer, key=(0,))
        how = dict(augmentation=cfg.federate.augmentation, precision=devices.precision_of(cfg.run))
        return _timed(lambda: train.fit(model, own, train.LOSSES[cfg.federate.loss], **fit, **how))[0] / steps

    def of_a_pixel(side: int, number: int, steps: int = 1) -> float:
        step = seconds(side, number, steps)
        return max(step - update, step / 10) / (number * side**2)

    if capture.usable(images.device):
        seconds(size, batch, capture.EAGER_STEPS + 1)  # launched one by one, then recorded
        return seconds(size, batch, REPLAYS)
    ladder, update = _ladder(size, batch), 0.0
    of_a_pixel(*ladder[0])  # the first step of all is slow
    update = _timed(optimizer.step)[0]
    pixel = of_a_pixel(*ladder[0])
    for side, number in reversed(ladder):
        step = update + pixel * number * side**2
        if (steps := int((until - time.perf_counter()) / step) - 1) > 0:
            of_a_pixel(side, number)
            pixel = of_a_pixel(side, number, steps)
            break
    return update + pixel * batch * size**2


def _ladder(size: int, batch: int) -> list[tuple[int, int]]:
    """Return sides and numbers of images from a small step to the whole one."""
    sides = [side for k in (8, 4, 2) if (side := size // k // 32 * 32) >= SMALLEST]
    numbers = [batch]
    while numbers[0] > 2:
        numbers.insert(0, max(2, numbers[0] // 2))
    return [*((side, numbers[0]) for side in dict.fromkeys(sides)), *((size, number) for number in numbers)]

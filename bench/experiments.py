"""Experiments that the committed study cannot decide, each a list of trainings: `python -m bench experiment`.

    skew      as many adults as children, dealt by age, by site or as IID: does a skew that bites cost a
              random start more than an informed one?
    budgets   the images, steps and the teacher that an informed start has cost, given to the others
    plateau   60 rounds, constant and decaying learning rate: what is left of the differences at the end
    taught    is a teacher worth more than the masks that it learned from, and how good must it be?

`run NAME` trains what is missing, one JSON file a training, and can be stopped at any time; `tables NAME`
writes what is finished. The rounds are those of `fmfl.federate`; the images are real chest X-rays at 96 x 96
pixels.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import typer
from torch import Tensor

from bench import experiment_tables, lessons, trials
from bench.lessons import Lesson
from fmfl import data, distill, federate, metrics, models, paths, runs, seeds, split, train
from fmfl.analysis.tables import PAPER_INITS
from fmfl.config import DistillConfig, FederateConfig
from fmfl.data import Cohort
from fmfl.errors import UserError
from fmfl.split import Holdout
from fmfl.states import State
from fmfl.train import Examples

STUDENT = "tiny_unet"
CONFIG = FederateConfig(batch_size=8, learning_rate=1e-3)
DISTILL = DistillConfig(student=STUDENT, proxy_epochs=8)
RESULTS = paths.ROOT / "docs" / "results"

app = typer.Typer(no_args_is_help=True, help=__doc__)


class Trial(NamedTuple):
    """One training.

    Attributes:
        deal: name in `DEALS`: who holds which images.
        arm: federated, centralised or standalone.
        init: the initial state.
        seed: of the deal, the initial state and the training.
        epochs: local epochs E of a round.
        rounds: number of rounds.
        schedule: of the learning rate over rounds: constant, or cosine, down to 0 after the last round.
        equal_steps: small clients take more local epochs, for about as many steps as the mean client's; large
            ones take no fewer.
        alpha: the teacher's share in the clients' loss, Eq. 5; 0: Eq. 2.
        lesson: name in `lessons.NAMES`: what the start has learned from.
        labelled: number of proxy images with a mask; None for all.
    """

    deal: str
    arm: str
    init: str
    seed: int
    epochs: int = 1
    rounds: int = 10
    schedule: str = "constant"
    equal_steps: bool = False
    alpha: float = 0.0
    lesson: str = ""
    labelled: int | None = None

    @property
    def name(self) -> str:
        """Name of its file without suffix."""
        how = f"E{self.epochs}-{self.schedule}" + "-equal_steps" * self.equal_steps
        how += f"-alpha{self.alpha:g}" * bool(self.alpha)
        return f"{self.deal}-{how}-{self.arm}-{self.start}-seed{self.seed}"

    @property
    def start(self) -> str:
        """Name of its start, without the seed."""
        masks = "all" if self.labelled is None else self.labelled
        return self.init + f"-{self.lesson}-{masks}_masks" * bool(self.lesson)


# ------------------------------------------------------------------------------------------ who holds what


def study_parts(cohort: Cohort) -> Holdout:
    """The parts of docs/results/v7-cpu: 796 proxy and 265 test images; clients hold up to 1,000."""
    return split.holdout(cohort.table, 0, federated=1000)


def balanced_parts(cohort: Cohort, *, test_patients: int = 60, proxy: int = 300) -> Holdout:
    """As many adults as children in the test set and at the clients; the draw is one for all seeds.

    The test set has 60 adult patients and, of the children, as many images. The clients hold all other adults
    and as many images of children. The proxy set has 300 images of other children and all images of people
    of unknown age, who come from the adults' site. Patients are never divided.
    """
    table = cohort.table
    first_age = table.groupby("patient_id").age.first()
    order = np.random.default_rng(0).permutation(sorted(first_age.index))
    ages, images = first_age.loc[order], table.groupby("patient_id").size()
    adults, children = list(order[ages >= 18]), list(order[ages < 18])
    test, federated = adults[:test_patients], adults[test_patients:]
    parts = {"test": test, "federated": federated, "proxy": list(order[ages.isna()])}
    for name, wanted in (
        ("test", images[test].sum()),
        ("federated", images[federated].sum()),
        ("proxy", proxy),
    ):
        counted = images[children].cumsum().to_numpy()
        if not len(counted) or counted[-1] < wanted:
            raise UserError(
                f"the {name} part needs {wanted} images of children, and {images[children].sum()} are left: "
                "take a source with more"
            )
        taken = np.searchsorted(counted, wanted, side="right")
        parts[name], children = parts[name] + children[:taken], children[taken:]
    rows = [np.flatnonzero(table.patient_id.isin(parts[name])) for name in Holdout._fields]
    return Holdout(*map(torch.from_numpy, rows))


def dealt(scheme: str, seed: int, cohort: Cohort, parts: Holdout, clients: int = 3) -> list[Tensor]:
    """The clients' images of a partition; images without an age are left out of all of them."""
    known = split.with_age(cohort.table, parts.federated)
    return split.partition(cohort.table, known, scheme, clients, seed)


def with_proxy(seed: int, cohort: Cohort, parts: Holdout) -> list[Tensor]:
    """The proxy images join the federation: each client gets a third of them beside its own."""
    extra = split.partition(cohort.table, parts.proxy, "iid", 3, seed)
    own = dealt("age", seed, cohort, parts)
    return [torch.cat(both).sort().values for both in zip(own, extra, strict=True)]


Parts = Callable[[Cohort], Holdout]
Deal = Callable[[int, Cohort, Holdout], list[Tensor]]

#: The parts of a deal, and its clients.
DEALS: dict[str, tuple[Parts, Deal]] = {
    "balanced_iid": (balanced_parts, partial(dealt, "iid")),
    "balanced_age": (balanced_parts, partial(dealt, "age")),
    "balanced_site": (balanced_parts, partial(dealt, "site", clients=2)),
    "iid": (study_parts, partial(dealt, "iid")),
    "age": (study_parts, partial(dealt, "age")),
    "quantity": (study_parts, partial(dealt, "quantity")),
    "age_with_proxy": (study_parts, with_proxy),
}


# ------------------------------------------------------------------------------------------ the plans


def skew(number: int = 5) -> list[Trial]:
    """The manipulation check (a random start under IID and under skew) comes first."""
    deals, many = ("balanced_age", "balanced_iid", "balanced_site"), range(number)
    make = partial(Trial, rounds=20)
    random = [make(deal, "federated", "random", seed) for deal in deals for seed in many]
    informed = [
        make(deal, "federated", init, seed) for seed in many for deal in deals for init in PAPER_INITS[1:]
    ]
    alone = [
        make("balanced_age", arm, "random", seed) for seed in many for arm in ("centralised", "standalone")
    ]
    five = [
        make(deal, "federated", init, seed, epochs=5)
        for seed in many
        for init in ("random", "fm", "pretraining")
        for deal in deals[:2]
    ]
    return random + informed + alone + five


def budgets(number: int = 3) -> list[Trial]:
    """Random with the proxy images inside, the teacher in the rounds, centralised training, more epochs."""
    plan = []
    for seed in range(number):
        plan += [Trial("age", "federated", init, seed) for init in PAPER_INITS]
        plan.append(Trial("age_with_proxy", "federated", "random", seed))
        plan.append(Trial("age_with_proxy", "centralised", "random", seed))
        plan += [Trial("age", "federated", init, seed, alpha=0.5) for init in ("random", "fm")]
        plan += [Trial("age", "centralised", init, seed) for init in PAPER_INITS]
        plan += [
            Trial("quantity", "federated", init, seed, equal_steps=equal)
            for init in PAPER_INITS
            for equal in (False, True)
        ]
    return plan


def plateau(number: int = 8) -> list[Trial]:
    """60 rounds from each start; all seeds of a setting before the next, since power is what it is for.

    The control, under age skew with a decaying rate: a random start whose clients hold the proxy images.
    """
    make = partial(Trial, arm="federated", rounds=60)
    plan = [
        make(deal, init=init, seed=seed, schedule=schedule)
        for schedule in ("cosine", "constant")
        for deal in ("age", "iid")
        for seed in range(number)
        for init in PAPER_INITS
    ]
    control = [make("age_with_proxy", init="random", seed=seed, schedule="cosine") for seed in range(number)]
    return plan[: 3 * number] + control + plan[3 * number :]


def taught(number: int = 3) -> list[Trial]:
    """Starts by each lesson, before and after two rounds; few masks and all of them come first."""
    plan = []
    few = ("own_masks", "corpus_masks", "shipped")
    for budgets_of, names in (((10, None), lessons.NAMES), ((30, 100), few)):
        for seed in range(number):
            plan += [
                Trial(
                    "age", "federated", lessons.init_of(name), seed, rounds=2, lesson=name, labelled=labelled
                )
                for name in names
                for labelled in budgets_of
            ]
    return plan


PLANS: dict[str, Callable[[], list[Trial]]] = {
    "skew": skew,
    "budgets": budgets,
    "plateau": plateau,
    "taught": taught,
}


# ------------------------------------------------------------------------------------------ training


@dataclass(frozen=True)
class Setting:
    """Images of a trial, its proxy set with the teacher's logits, and its clients.

    Attributes:
        lesson: the images that a start learns from.
        clients: rows of each client's images.
        answers: the teacher's logits of all images, [N, 1, H, W]; 0 where no client holds the image. None
            where it does not stay in the rounds.
    """

    cohort: Cohort
    parts: Holdout
    lesson: Lesson
    clients: list[Tensor]
    answers: Tensor | None = None


def setting_of(cohort: Cohort, trial: Trial, material: lessons.Material | None = None) -> Setting:
    """Deal the images, and make the lesson of the start; the teacher's answers are cached.

    Args:
        material: where a trial's lesson lies; none is needed where it has no name.
    """
    find_parts, deal = DEALS[trial.deal]
    parts = find_parts(cohort)
    clients = deal(trial.seed, cohort, parts)
    if trial.lesson:
        lesson = lessons.named(trial.lesson, cohort, parts.proxy, trial.labelled, trial.seed, material)
    else:
        lesson = lessons.exact(cohort, parts.proxy)
    answers = None
    if trial.alpha:
        held = torch.cat(clients).sort().values
        logits = lessons.exact(cohort, held).examples.teacher_logits
        answers = logits.new_zeros(cohort.images.shape)
        answers[held] = logits
    return Setting(cohort, parts, lesson, clients, answers)


def learning_rate(trial: Trial, number: int) -> float:
    """The clients' learning rate in round `number`, counted from 1."""
    if trial.schedule == "constant":
        return CONFIG.learning_rate
    return CONFIG.learning_rate * (1 + math.cos(math.pi * (number - 1) / trial.rounds)) / 2


def local_epochs(trial: Trial, clients: list[Tensor]) -> list[int]:
    """Local epochs of each client."""
    if not trial.equal_steps:
        return [trial.epochs] * len(clients)
    mean = sum(map(len, clients)) / len(clients)
    return [max(1, round(trial.epochs * mean / len(rows))) for rows in clients]


def rounds_of(trial: Trial, setting: Setting, start: State, clients: dict[int, Tensor]) -> Iterator[State]:
    """Yield the global state after each round of Eq. 2 and 3 over these clients."""
    cohort, theta, memory = setting.cohort, start, {}
    model = models.build(STUDENT)
    cfg = runs.own_settings(CONFIG, trial.arm)
    epochs = dict(zip(clients, local_epochs(trial, list(clients.values())), strict=True))
    loss = distill.eq5(trial.alpha, DISTILL) if trial.alpha else None
    for number in range(1, trial.rounds + 1):
        updates = []
        for k, rows in clients.items():
            how = replace(cfg, local_epochs=epochs[k], learning_rate=learning_rate(trial, number))
            answers = None if setting.answers is None else setting.answers[rows]
            examples = Examples(cohort.images, cohort.masks, rows, answers)
            how_to_train = dict(key=(trial.seed, k, number), memory=memory.get(k), loss=loss)
            updates.append(federate.train_client(model, theta, examples, how, **how_to_train))
            memory[k] = updates[-1].memory
        theta = federate.aggregate(updates)
        yield theta


def states_by_round(trial: Trial, setting: Setting, start: State) -> Iterator[list[State]]:
    """Yield the states whose scores are averaged, from round 0: one, or one a client that stands alone."""
    clients = dict(enumerate(setting.clients))
    groups = [clients]
    if trial.arm == "centralised":
        groups = [{seeds.POOLED: torch.cat(setting.clients).sort().values}]
    elif trial.arm == "standalone":
        groups = [{k: rows} for k, rows in clients.items()]
    yield [start]
    every = [rounds_of(trial, setting, start, group) for group in groups]
    yield from map(list, zip(*every, strict=True))


def dice_by_image(model: torch.nn.Module, state: State, cohort: Cohort, test: Tensor) -> np.ndarray:
    """Dice of the test images, [n]."""
    models.load_state(model, state)
    logits = train.predict(model, cohort.images, test)
    return metrics.dice(logits > 0, cohort.masks[test]).numpy()


def images_by_round(trial: Trial, setting: Setting, start_images: int) -> list[int]:
    """Images that have gone through the student by each round, those of the start included."""
    sizes = [len(rows) for rows in setting.clients]
    each = sum(n * e for n, e in zip(sizes, local_epochs(trial, setting.clients), strict=True))
    return [start_images + number * each for number in range(trial.rounds + 1)]


def train_trial(trial: Trial, setting: Setting, starts: Path) -> dict[str, Any]:
    """Train and score one trial: Dice by round and test image."""
    parts_name, lesson = DEALS[trial.deal][0].__name__, setting.lesson
    start = distill.initial_state(
        trial.init,
        lesson.examples,
        replace(DISTILL, proxy_epochs=lesson.epochs(DISTILL.proxy_epochs)),
        batch_size=CONFIG.batch_size,
        seed=trial.seed,
        file=starts / f"{parts_name}-{trial.start}-seed{trial.seed}.safetensors",
        teacher_key=lesson.key,
    )
    judge, test = models.build(STUDENT), setting.parts.test
    dice = []
    for states in states_by_round(trial, setting, start.state):
        scores = [dice_by_image(judge, state, setting.cohort, test) for state in states]
        dice.append([round(float(x), 5) for x in np.mean(scores, axis=0)])
    rows = setting.cohort.table.iloc[test.tolist()]
    return {
        "proxy": lesson.num_proxy,
        "teacher_dice": lesson.teacher_dice,
        "teacher": lesson.key,
        "clients": [len(rows) for rows in setting.clients],
        "images_seen": images_by_round(trial, setting, start.fit.images_seen),
        "images": rows.image_id.tolist(),
        "patients": rows.patient_id.tolist(),
        "ages": [None if math.isnan(age) else age for age in rows.age],
        "dice": dice,
    }


def check(name: str) -> None:
    """Refuse a name that no experiment has, before anything is loaded."""
    if name not in PLANS:
        raise UserError(f"{name!r} is no experiment: choose one of {', '.join(PLANS)}")


@app.command("run")
def run_all(
    name: str,
    sources: str = "v7_covid,v7_guangzhou",
    folder: Path | None = None,
    starts: Path = Path("runs/experiments"),
    corpus: str = "teacher_corpus",
    teachers: Path = Path("runs/teachers"),
    worker: trials.Worker = 0,
    workers: trials.Workers = 1,
) -> None:
    """Train the trials that have no file yet; worker i of n takes every n-th, from the i-th on.

    For `taught`, `--corpus` is the folder of images that the shipped teacher learned from, and `--teachers`
    one of other teachers' weights, `NAME.safetensors`.
    """
    torch.set_num_threads(1)
    check(name)
    trials.check_worker(worker, workers)
    folder = folder or RESULTS / name / "runs"
    made_by, cohort = trials.made_by(), data.load(sources, size=96, progress=False)
    about = {"data": cohort.fingerprint}
    material = lessons.Material(corpus, teachers)
    settings: dict[tuple[object, ...], Setting] = {}
    for trial in trials.pending(PLANS[name](), folder, worker, workers, **about):
        key = trial.deal, trial.seed, trial.alpha, trial.lesson, trial.labelled
        if key not in settings:
            settings = {key: setting_of(cohort, trial, material)}
        result = train_trial(trial, settings[key], starts)
        trials.keep(folder, trial, made_by | about | result)
        print(trial.name, round(100 * float(np.mean(result["dice"][-1])), 2), flush=True)


@app.command()
def tables(name: str, folder: Path | None = None, out: Path | None = None) -> None:
    """Write the tables, the figure and the page's tables of the finished trials."""
    check(name)
    out = out or RESULTS / name
    finished = trials.finished(folder or out / "runs")
    trials.warn_of_mixed(finished)
    experiment_tables.write(name, finished, out)

"""What the notebooks share: the inputs of each stage, made or found, and the files that each leaves behind.

A run's folder holds `weights/` (initial and final states), `cells/` (what each notebook measured),
`figures/`, `notebooks/` (executed), and at the end `results.csv`, `per_image.csv`, `table1.csv`,
`claims.csv`, `manifest.json` and `report.html`.
"""

import ctypes
import os
import pkgutil
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pandas as pd
import torch
from torch import Tensor

from fmfl import (
    data,
    devices,
    distill,
    models,
    parallel,
    paths,
    prompts,
    runs,
    seeds,
    split,
    states,
    teacher,
    train,
)
from fmfl.analysis import landscape, tables
from fmfl.config import VARIANTS, DistillConfig, FederateConfig, Settings, float_list, split_list
from fmfl.data import Cohort
from fmfl.distill import InitialState
from fmfl.errors import UserError
from fmfl.federate import ClientUpdate
from fmfl.runs import Run
from fmfl.split import Holdout
from fmfl.teacher import CachedLogits, Teacher
from fmfl.train import Examples

if TYPE_CHECKING:  # a client of Flower imports this module for each message, and draws nothing
    pass

# ---------------------------------------------------------------------------------------------------
# The stages' inputs, as the settings name them
# ---------------------------------------------------------------------------------------------------


def show_bars() -> bool:
    """Whether progress bars are wanted: not where their every state would be kept as a notebook's output.

    tqdm itself heeds the variable only where a caller leaves `disable` open.
    """
    return "TQDM_DISABLE" not in os.environ


def load_cohort(cfg: Settings) -> Cohort:
    """The images of `cfg.data` on the run's device, or beside it where it has no room for them."""
    devices.set_determinism(cfg.run)
    wanted, device = cfg.data, devices.device_of(cfg.run)
    cohort = data.load(
        wanted.data,
        size=wanted.size,
        num_phantoms=wanted.num_phantoms,
        phantom_seed=wanted.phantom_seed,
        mask_class=wanted.mask_class,
        strict=wanted.strict,
        progress=show_bars(),
    )
    where = cfg.run.cohort_device
    return cohort.to(device, resident=where == "device" or (where == "auto" and _fits(cohort, device)))


def _fits(cohort: Cohort, device: torch.device) -> bool:
    """Whether a cohort takes at most half of a GPU's free memory: training needs the other half."""
    if device.type != "cuda":
        return True
    return cohort.images.nbytes + cohort.masks.nbytes <= torch.cuda.mem_get_info(device)[0] / 2


def holdout(cfg: Settings, cohort: Cohort) -> Holdout:
    """Proxy, test and federated images; the same for every seed of a study."""
    return split.holdout(
        cohort.table,
        cfg.data.holdout_seed,
        proxy=cfg.data.proxy,
        test=cfg.data.test,
        federated=cfg.data.federated,
        device=cohort.images.device,
    )


def partition(
    cohort: Cohort, federated: Tensor, cfg: FederateConfig, scheme: str | None = None
) -> list[Tensor]:
    """Deal the federated images under `cfg.split` (or the scheme named).

    With `images_without_age` at leave_out every scheme deals those with an age alone, as the schemes by age
    have to: then all of them train on the same images.
    """
    scheme = scheme or cfg.split
    if cfg.images_without_age == "leave_out":
        federated = split.with_age(cohort.table, federated)
    options = {
        "age": {"strength": cfg.age_strength},
        "quantity": {"ratio": cfg.quantity_ratio},
        "dirichlet": {"concentration": cfg.dirichlet_concentration},
    }.get(scheme, {})
    return split.partition(cohort.table, federated, scheme, cfg.num_clients, cfg.seed, **options)


def load_teacher(cfg: Settings) -> Teacher:
    """Return the teacher of `cfg.teacher` on the run's device."""
    return teacher.load(
        cfg.teacher.teacher,
        cfg.teacher.checkpoint or None,
        devices.device_of(cfg.run),
        size=cfg.teacher.teacher_size or None,
        precision=devices.precision_of(cfg.run),
    )


class Prompts(NamedTuple):
    """What the teacher is asked with, and what making it has cost."""

    boxes: Tensor
    seconds: float


def labelled(cfg: Settings, proxy: Tensor) -> Tensor:
    """Which proxy images have a mask to learn from, [n] bool: `cfg.distill.labelled` of them, by the seed.

    A smaller budget's images are among a larger one's.

    Raises:
        UserError: there are fewer proxy images than that.
    """
    wanted, n = cfg.distill.labelled, len(proxy)
    number = round(wanted * n) if wanted <= 1 else int(wanted)
    if number > n:
        raise UserError(f"labelled is {number}, but the proxy set has {n} images: name at most as many")
    order = torch.randperm(n, generator=seeds.generator(cfg.federate.seed, seeds.LABELS))
    return (order.argsort() < number).to(proxy.device)


def teacher_prompts(
    cfg: Settings,
    cohort: Cohort,
    indices: Tensor,
    rule: str | None = None,
    per_image: str | None = None,
    known: Tensor | None = None,
) -> Prompts:
    """The prompts of chosen images under the run's box rule, or under the rule named.

    Args:
        known: [n] bool, whose masks there are; None for all. A predicted box of the others comes from these.
    """
    wanted = cfg.teacher
    rule = rule or wanted.box_rule
    masks, seconds = cohort.masks[indices], 0.0
    if rule == "predicted":
        masks, seconds = _predicted_masks(cfg, cohort, indices, known)
    boxes = prompts.prompt(
        masks,
        rule,
        per_image=per_image or wanted.boxes_per_image,
        jitter_pixels=wanted.jitter_pixels,
        seed=cfg.data.holdout_seed,
    )
    return Prompts(boxes, seconds)


def _predicted_masks(
    cfg: Settings, cohort: Cohort, indices: Tensor, known: Tensor | None = None
) -> tuple[Tensor, float]:
    """See `distill.predicted_masks`; made once for the same images and settings."""
    examples = Examples(cohort.images, cohort.masks, indices, device=cohort.device)
    patients = cohort.table.patient_id.iloc[indices.tolist()].tolist()
    how: dict[str, Any] = dict(
        batch_size=cfg.federate.batch_size,
        seed=cfg.data.holdout_seed,
        precision=devices.precision_of(cfg.run),
        augmentation=cfg.federate.augmentation,
    )
    learning = (cfg.distill.student, cfg.distill.proxy_epochs, cfg.distill.proxy_learning_rate)
    seen = [states.tensor_digest(stored[indices]) for stored in (cohort.images, cohort.masks)]
    if known is not None and known.all():
        known = None
    whose = None if known is None else known.tolist()
    key = states.fingerprint(states.code_digest(), how, learning, seen, patients, whose)
    file = paths.CACHE / f"predicted-{key}.safetensors"
    if (stored := states.read_state(file, device=cohort.images.device)) is not None:
        return stored[0]["masks"], stored[1]["seconds"]
    masks, seconds = distill.predicted_masks(examples, patients, cfg.distill, known=known, **how)
    try:
        states.write_state(file, {"masks": masks}, seconds=seconds)
    except OSError as error:
        warnings.warn(f"the predicted masks cannot be kept in {file.parent} ({error.strerror})", stacklevel=2)
    return masks, seconds


def teacher_logits(
    cfg: Settings, who: Teacher, cohort: Cohort, indices: Tensor, known: Tensor | None = None
) -> CachedLogits:
    """The teacher's [n, 1, H, W] logits of chosen images under the run's box rule, cached."""
    boxes, seconds = teacher_prompts(cfg, cohort, indices, known=known)
    found = teacher.cached_logits(who, cohort.images[indices], boxes, progress=show_bars())
    return CachedLogits(found.logits, found.seconds + seconds)


class Taught(NamedTuple):
    """The proxy set with a teacher beside it, whose masks stand in where there are none."""

    examples: Examples
    key: str  # what the teacher's answers depend on
    seconds: float  # that they have cost before training


def taught(cfg: Settings, cohort: Cohort, proxy: Tensor) -> Taught:
    """The proxy set with the teacher's cached logits or, for fresh views, with a way to ask it."""
    who, rule, known = load_teacher(cfg), cfg.teacher, labelled(cfg, proxy)
    if cfg.distill.teacher_views == "cached":
        logits, seconds = teacher_logits(cfg, who, cohort, proxy, known)
        masks = cohort.masks
        if not known.all():
            masks = masks.clone()
            masks[proxy[~known]] = (logits[~known] > 0).to(masks.dtype)
        examples = Examples(cohort.images, masks, proxy, logits, device=cohort.device)
        return Taught(examples, states.tensor_digest(logits), seconds)
    if not known.all():
        raise UserError(
            "teacher_views 'fresh' needs a mask of every proxy image: choose cached, or labelled 1"
        )
    if rule.box_rule == "predicted":
        raise UserError("teacher_views 'fresh' has no predicted box for an augmented image: choose cached")

    def ask(images: Tensor, masks: Tensor) -> Tensor:
        # A turn may carry a lung out of the picture: then the whole image is asked about.
        masks = masks.masked_fill(~masks.flatten(1).any(1)[:, None, None, None], 1)
        boxes = prompts.prompt(
            masks,
            rule.box_rule,
            per_image=rule.boxes_per_image,
            jitter_pixels=rule.jitter_pixels,
            seed=cfg.data.holdout_seed + int(masks.sum()),  # another hand for each batch, the same each time
        )
        return who.logits(images, boxes).clone()  # outside inference mode, so that gradients can pass by

    code = states.code_digest((*teacher.CODE, "study/stages.py"))  # makes the answers
    key = states.fingerprint("fresh", code, who.about(), asdict(rule), cfg.data.holdout_seed)
    return Taught(Examples(cohort.images, cohort.masks, proxy, ask=ask, device=cohort.device), key, 0.0)


def initial_states(
    cfg: Settings, cohort: Cohort, proxy: Tensor, inits: Iterable[str]
) -> dict[str, InitialState]:
    """The named initial states, read from `weights/` where 03_distill has left them, else made now.

    Pre-training learns from the proxy images that have masks, and passes over them the more often the fewer
    they are: it takes as many steps as the other start.

    Raises:
        UserError: pre-training has no mask to learn from.
    """
    inits = list(inits)
    known = labelled(cfg, proxy)
    if not known.any() and ("pretraining" in inits or ("fm" in inits and cfg.distill.alpha == 0)):
        raise UserError("labelled is 0: leave pretraining out of inits, and alpha above 0, or raise it")
    alone = Taught(Examples(cohort.images, cohort.masks, proxy[known], device=cohort.device), "", 0.0)
    lesson = taught(cfg, cohort, proxy) if "fm" in inits and cfg.distill.alpha > 0 else alone

    def make(init: str) -> InitialState:
        return _begin(cfg, init, lesson if init == "fm" else alone, len(proxy), f"init-{init}")

    return dict(zip(inits, parallel.side_by_side(make, inits, cohort.device), strict=True))


def _begin(cfg: Settings, init: str, lesson: Taught, num_proxy: int, kept_as: str) -> InitialState:
    """See `distill.initial_state`; fewer images than the proxy set has are shown more often."""
    epochs = distill.epochs_for_equal_steps(cfg.distill.proxy_epochs, num_proxy, len(lesson.examples))
    return distill.initial_state(
        init,
        lesson.examples,
        replace(cfg.distill, proxy_epochs=epochs),
        batch_size=cfg.federate.batch_size,
        seed=cfg.federate.seed,
        precision=devices.precision_of(cfg.run),
        augmentation=cfg.federate.augmentation,
        batch_norm=cfg.federate.batch_norm,
        file=cfg.run_dir / "weights" / f"{kept_as}-seed{cfg.federate.seed}.safetensors",
        teacher_key=lesson.key,
        teacher_seconds=lesson.seconds,
    )


def variants(cfg: Settings) -> list[DistillConfig]:
    """The run's own distillation, and those that `cfg.sweep` compares with it, each once.

    Every alpha of the sweep with every temperature, where one of the two lists is empty the run's own value;
    then the named variants. With alpha = 0 the teacher has no say, so all that would only change him is one.
    """
    own, sweep = cfg.distill, cfg.sweep
    found = [own]
    if sweep.alpha_sweep or sweep.temperature_sweep:
        for temperature in float_list(sweep.temperature_sweep) or [own.temperature]:
            for alpha in float_list(sweep.alpha_sweep) or [own.alpha]:
                found.append(replace(own, alpha=alpha, temperature=temperature))
    found += [replace(own, **VARIANTS[name]) for name in split_list(sweep.variants)]
    return list(dict.fromkeys(one if one.alpha else replace(own, alpha=0.0) for one in found))


def distilled(cfg: Settings, cohort: Cohort, proxy: Tensor) -> list[tuple[DistillConfig, InitialState]]:
    """A student of each of `variants`, read from `weights/` where it has been made before.

    The teacher's logits are cached, so all students together ask him no more than one does; but for fresh
    views, which is what these cost. Where no proxy image has a mask, there is no student of masks alone.
    """
    known = labelled(cfg, proxy)
    wanted = [replace(cfg, distill=one) for one in variants(cfg) if one.alpha or known.any()]
    alone = Taught(Examples(cohort.images, cohort.masks, proxy[known], device=cohort.device), "", 0.0)
    lessons = {
        views: taught(one, cohort, proxy)
        for views, one in {one.distill.teacher_views: one for one in wanted if one.distill.alpha}.items()
    }

    def make(one: Settings) -> InitialState:
        how = one.distill
        if how.alpha == 0:
            return _begin(one, "pretraining", alone, len(proxy), "init-pretraining")
        name = f"alpha{how.alpha:g}-temperature{how.temperature:g}-{how.teacher_labels}-{how.teacher_views}"
        kept_as = "init-fm" if how == cfg.distill else f"variant-{name}"
        return _begin(one, "fm", lessons[how.teacher_views], len(proxy), kept_as)

    made = parallel.side_by_side(make, wanted, cohort.device)
    return [(one.distill, start) for one, start in zip(wanted, made, strict=True)]


def engine(cfg: Settings) -> Callable[[Run], Iterable[ClientUpdate]]:
    """Return the function that trains a round's clients: `runs.train_clients`, or Flower's by messages.

    Drift is measured on the way, see `landscape.watched`.

    Raises:
        UserError: the engine is not installed.
    """
    if cfg.run.engine == "local":
        return landscape.watched(runs.train_clients)
    try:
        connect = pkgutil.resolve_name("fmfl.flower.engine:connect")
    except ImportError:
        raise UserError(
            "engine 'flower' needs the package flwr: pip install -c requirements.lock -e '.[flower]'"
        ) from None
    return landscape.watched(connect(cfg))


def start_runs(
    cfg: Settings, cohort: Cohort, parts: Holdout, clients: list[Tensor], starts: dict[str, InitialState]
) -> list[Run]:
    """Return every run of one split and seed: federated from each start, the comparisons from random."""
    common: dict[str, Any] = dict(
        cfg=cfg.federate,
        student=cfg.distill.student,
        cohort=cohort,
        test=parts.test,
        precision=devices.precision_of(cfg.run),
        engine=cfg.run.engine,
    )
    holders = runs.clients_of(cohort, clients)
    # As in Table 1 of the paper, both comparisons are trained from random weights only. Centralised training
    # has all that the clients hold: under a split by age, images without an age are left out.
    everything = runs.pooled(cohort, torch.cat(clients).sort().values)
    alone = [{number: examples} for number, examples in holders.items()]
    wanted = {
        "federated": [(init, holders) for init in split_list(cfg.federate.inits)],
        "centralised": [("random", everything)],
        "standalone": [("random", one) for one in alone],
    }
    return [
        runs.start_or_resume(cfg.run_dir, starts[init], examples, arm=arm, **common)
        for arm, planned in wanted.items()
        if arm in split_list(cfg.federate.arms)
        for init, examples in planned
    ]


def images_a_second(cfg: Settings, cohort: Cohort, steps: int = 4) -> float:
    """How fast this device trains the run's student, in images a second over all its cores.

    Args:
        steps: batches that are timed, after one that warms up.
    """
    batch = min(cfg.federate.batch_size, len(cohort))

    def some(number: int, steps: int) -> None:
        rows = torch.arange(steps * batch, device=cohort.images.device) % len(cohort)
        model = models.build(cfg.distill.student, device=cohort.device, batch_norm=cfg.federate.batch_norm)
        train.fit(
            model,
            Examples(cohort.images, cohort.masks, rows, device=cohort.device),
            train.LOSSES[cfg.federate.loss],
            epochs=1,
            batch_size=batch,
            optimizer=train.adam(model, cfg.federate.learning_rate),
            key=(number,),
            augmentation=cfg.federate.augmentation,
            precision=devices.precision_of(cfg.run),
        )

    trainings = range(torch.get_num_threads() if cohort.device.type == "cpu" else 1)
    parallel.side_by_side(lambda number: some(number, 1), trainings, cohort.device)
    started = time.perf_counter()
    parallel.side_by_side(lambda number: some(number, steps), trainings, cohort.device)
    return len(trainings) * steps * batch / (time.perf_counter() - started)


# ---------------------------------------------------------------------------------------------------
# What a cell depends on, and what it leaves behind
# ---------------------------------------------------------------------------------------------------


# ---------------------------------------------------------------------------------------------------
# Bringing the cells together
# ---------------------------------------------------------------------------------------------------


def compositions(cfg: Settings, cohort: Cohort, results: pd.DataFrame) -> pd.DataFrame:
    """What the clients held: `split.composition` of each split and seed that was run."""
    federated = holdout(cfg, cohort).federated
    dealt = results.loc[results.split != "pooled", ["split", "seed"]].drop_duplicates()
    held_by = []
    for scheme, seed in dealt.itertuples(index=False):
        held = partition(cohort, federated, replace(cfg.federate, seed=int(seed)), scheme)
        held_by.append(split.composition(cohort.table, held).assign(split=scheme, seed=seed))
    return pd.concat(held_by, ignore_index=True)


def first_runs(cfg: Settings, cohort: Cohort, results: pd.DataFrame) -> tuple[list[Run], str]:
    """The federated runs of the reference split and the first seed as they began; reads, and writes nothing.

    Returns:
        The runs before their first round, and a sentence that says why there are none; empty otherwise.
    """
    rows = results[results.arm == "federated"]
    if rows.empty:
        return [], "diagnostics are left out: there is no federated run"
    shown = cfg.analysis.reference_split
    shown = shown if shown in set(rows.split) else rows.split.iloc[0]
    rows = rows[(rows.split == shown) & (rows.seed == rows[rows.split == shown].seed.min())]
    seed, weights = int(rows.seed.iloc[0]), cfg.run_dir / "weights"
    cfg = replace(cfg, federate=replace(cfg.federate, split=shown, seed=seed))
    holders = runs.clients_of(cohort, partition(cohort, holdout(cfg, cohort).federated, cfg.federate))
    begun = []
    for init in tables.ordered_inits(rows):
        start, end = f"init-{init}-seed{seed}.safetensors", f"federated-{shown}-{init}-seed{seed}.safetensors"
        state = _start_of(weights / start, weights / end, rows[rows.init == init], cohort.device)
        if state is None:
            return [], (
                f"diagnostics are left out: weights/{start} or weights/{end} is not there or not of these "
                "results, so run 03_distill and 04_federate again"
            )
        begun.append(
            Run(
                arm="federated",
                init=init,
                split=shown,
                client=-1,
                clients=holders,
                cfg=cfg.federate,
                precision=devices.precision_of(cfg.run),
                model=models.build(
                    cfg.distill.student, device=cohort.device, batch_norm=cfg.federate.batch_norm
                ),
                theta=state,
                initial=state,
                file=weights / end,
            )
        )
    return begun, ""


def _start_of(start: Path, end: Path, rows: pd.DataFrame, device: torch.device) -> states.State | None:
    """The state in a start's file; None unless the run in another file began there and has these results."""
    record = states.read_record(end)
    found = states.read_state(start, device=device)
    rounds, history = record.get("rounds"), record.get("history")
    if found is None or not rounds or not history:
        return None
    began = states.state_digest(found[0]) == rounds[0]["sha256"]
    dice = rows.sort_values("round").dice.iloc[-1]
    return found[0] if began and abs(history[-1]["dice"] - dice) < 1e-9 else None


def working_memory(task: Callable[[], object], device: torch.device) -> int | None:
    """The most bytes that a task takes beyond what is held when it begins, such as weights.

    Of a GPU's memory, or of this process's on Linux; None where it is not told.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        task()
        return torch.cuda.max_memory_allocated(device) - before
    try:
        # What earlier work has freed goes back first: else the task would find its memory already there.
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before = _of_this_process("VmRSS")
    except (OSError, AttributeError, TypeError):  # another system than Linux, or one that does not allow it
        return None
    task()
    return _of_this_process("VmHWM") - before


def _of_this_process(what: str) -> int:
    """Bytes by their name in Linux' account of this process."""
    text = Path("/proc/self/status").read_text()
    return 1024 * int(text.split(f"{what}:")[1].split()[0])

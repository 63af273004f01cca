"""Inputs of each stage, built from the settings, and the runs' folders.

A run's folder holds `weights/` (initial and final states), `cells/` (what each notebook measured),
`figures/`, `notebooks/` (executed), and at the end `results.csv`, `per_image.csv`, `table1.csv`,
`claims.csv`, `manifest.json` and `report.html`.
"""

import os
import pkgutil
import warnings
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

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
)
from fmfl.analysis import landscape, tables
from fmfl.config import VARIANTS, DistillConfig, FederateConfig, Settings, float_list, split_list
from fmfl.data import Cohort
from fmfl.distill import InitialState
from fmfl.errors import OutOfTime, UserError
from fmfl.federate import ClientUpdate
from fmfl.runs import Run
from fmfl.split import Holdout
from fmfl.study import tracking
from fmfl.teacher import CachedLogits, Teacher
from fmfl.train import Examples


def show_bars() -> bool:
    """Return whether progress bars are wanted: in a notebook's outputs their every state would be kept.

    tqdm itself reads the variable only where a caller leaves `disable` open.
    """
    return "TQDM_DISABLE" not in os.environ


# ---------------------------------------------------------------------------------------------------
# Images and their parts
# ---------------------------------------------------------------------------------------------------


def load_cohort(cfg: Settings) -> Cohort:
    """Load the images of `cfg.data` on the run's device, or beside it where it has no room for them."""
    tracking.check(cfg)
    devices.set_determinism(cfg.run)
    device, where = devices.device_of(cfg.run), cfg.run.cohort_device
    cohort = data.load(
        cfg.data.data,
        size=cfg.data.size,
        num_phantoms=cfg.data.num_phantoms,
        phantom_seed=cfg.data.phantom_seed,
        mask_class=cfg.data.mask_class,
        strict=cfg.data.strict,
        progress=show_bars(),
    )
    return cohort.to(device, resident=where == "device" or (where == "auto" and _fits(cohort, device)))


def _fits(cohort: Cohort, device: torch.device) -> bool:
    """Return whether a cohort takes at most half of a GPU's free memory: training needs the other half."""
    if device.type != "cuda":
        return True
    return cohort.images.nbytes + cohort.masks.nbytes <= torch.cuda.mem_get_info(device)[0] / 2


def holdout(cfg: Settings, cohort: Cohort) -> Holdout:
    """Return proxy, test and federated images; the same for every seed of a study."""
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
    """Deal the federated images to clients under `cfg.split` (or the scheme named).

    With `images_without_age` at leave_out every scheme deals only images with an age, as the schemes by age
    have to: then all of them train on the same images.
    """
    scheme = scheme or cfg.split
    if cfg.images_without_age == "leave_out":
        federated = split.with_age(cohort.table, federated)
    options = {name: getattr(cfg, f"{scheme}_{name}") for name in split.OPTIONS[scheme]}
    return split.partition(cohort.table, federated, scheme, cfg.num_clients, cfg.seed, **options)


def compositions(cfg: Settings, cohort: Cohort, results: pd.DataFrame) -> pd.DataFrame:
    """Describe the clients' images: `split.composition` of each split and seed that was run."""
    federated = holdout(cfg, cohort).federated
    pairs = results.loc[results.split != "pooled", ["split", "seed"]].drop_duplicates()
    described = []
    for scheme, seed in pairs.itertuples(index=False):
        clients = partition(cohort, federated, replace(cfg.federate, seed=int(seed)), scheme)
        described.append(split.composition(cohort.table, clients).assign(split=scheme, seed=seed))
    return pd.concat(described, ignore_index=True)


def labelled(cfg: Settings, proxy: Tensor) -> Tensor:
    """Choose the proxy images that have a mask, [n] bool: `cfg.distill.labelled` of them, by the seed.

    A smaller budget's images are among a larger one's.

    Raises:
        UserError: there are fewer proxy images than that.
    """
    budget, n = cfg.distill.labelled, len(proxy)
    number = round(budget * n) if budget <= 1 else int(budget)
    if number > n:
        raise UserError(f"labelled is {number}, but the proxy set has {n} images: name at most as many")
    order = torch.randperm(n, generator=seeds.generator(cfg.federate.seed, seeds.LABELS))
    return (order.argsort() < number).to(proxy.device)


# ---------------------------------------------------------------------------------------------------
# The teacher, its prompts and its logits
# ---------------------------------------------------------------------------------------------------


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
    """Boxes for the teacher, and the seconds that making them has cost."""

    boxes: Tensor
    seconds: float


def teacher_prompts(
    cfg: Settings,
    cohort: Cohort,
    indices: Tensor,
    rule: str | None = None,
    per_image: str | None = None,
    known: Tensor | None = None,
) -> Prompts:
    """Return the prompts of chosen images under the run's box rule, or under the rule named.

    Args:
        known: [n] bool, images that have a mask; None for all. They teach the predicted boxes of the others.
    """
    rule = rule or cfg.teacher.box_rule
    masks, seconds = cohort.masks[indices], 0.0
    if rule == "predicted":
        masks, seconds = _predicted_masks(cfg, cohort, indices, known)
    per_image = per_image or cfg.teacher.boxes_per_image
    return Prompts(_boxes(cfg, masks, cfg.data.holdout_seed, rule, per_image), seconds)


def _boxes(
    cfg: Settings, masks: Tensor, seed: int, rule: str | None = None, per_image: str | None = None
) -> Tensor:
    return prompts.prompt(
        masks,
        rule or cfg.teacher.box_rule,
        per_image=per_image or cfg.teacher.boxes_per_image,
        jitter_pixels=cfg.teacher.jitter_pixels,
        seed=seed,
    )


def _predicted_masks(
    cfg: Settings, cohort: Cohort, indices: Tensor, known: Tensor | None
) -> tuple[Tensor, float]:
    """Call `distill.predicted_masks` once for the same images and settings; later read its masks."""
    examples = Examples(cohort.images, cohort.masks, indices, device=cohort.device)
    patients = cohort.table.patient_id.iloc[indices.tolist()].tolist()
    options: dict[str, Any] = dict(
        batch_size=cfg.federate.batch_size,
        seed=cfg.data.holdout_seed,
        precision=devices.precision_of(cfg.run),
        augmentation=cfg.federate.augmentation,
    )
    learning = (cfg.distill.student, cfg.distill.proxy_epochs, cfg.distill.proxy_learning_rate)
    seen = [states.tensor_digest(stored[indices]) for stored in (cohort.images, cohort.masks)]
    known = None if known is None or known.all() else known
    budget = None if known is None else known.tolist()
    deterministic = torch.are_deterministic_algorithms_enabled()
    key = states.fingerprint(states.code_digest(), deterministic, options, learning, seen, patients, budget)
    file = paths.CACHE / f"predicted-{key}.safetensors"
    if (stored := states.read_state(file, device=cohort.images.device)) is not None:
        return stored[0]["masks"], stored[1]["seconds"]
    masks, seconds = distill.predicted_masks(examples, patients, cfg.distill, known=known, **options)
    try:
        states.write_state(file, {"masks": masks}, seconds=seconds)
    except OSError as error:
        warnings.warn(f"the predicted masks cannot be kept in {file.parent} ({error.strerror})", stacklevel=2)
    return masks, seconds


def teacher_logits(
    cfg: Settings, model: Teacher, cohort: Cohort, indices: Tensor, known: Tensor | None = None
) -> CachedLogits:
    """Return the teacher's [n, 1, H, W] logits of chosen images under the run's box rule, cached."""
    boxes, seconds = teacher_prompts(cfg, cohort, indices, known=known)
    cached = teacher.cached_logits(model, cohort.images[indices], boxes, progress=show_bars())
    return CachedLogits(cached.logits, cached.seconds + seconds)


class Taught(NamedTuple):
    """Proxy images with what the teacher says of them.

    Attributes:
        examples: images, masks, and the teacher's logits or the function that asks it.
        key: names all that the teacher's answers depend on.
        seconds: cost of the answers before training.
    """

    examples: Examples
    key: str
    seconds: float


def taught(cfg: Settings, cohort: Cohort, proxy: Tensor) -> Taught:
    """Return the proxy set with the teacher's cached logits or, for fresh views, a function that asks it.

    Images without a mask use the teacher's mask.

    Raises:
        UserError: fresh views are to be asked without a mask or with a predicted box.
    """
    model, known = load_teacher(cfg), labelled(cfg, proxy)
    if cfg.distill.teacher_views == "cached":
        logits, seconds = teacher_logits(cfg, model, cohort, proxy, known)
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
    if cfg.teacher.box_rule == "predicted":
        raise UserError("teacher_views 'fresh' has no predicted box for an augmented image: choose cached")

    def ask(images: Tensor, masks: Tensor) -> Tensor:
        # A turn may carry a lung out of the picture: then the prompt is the whole image.
        masks = masks.masked_fill(~masks.flatten(1).any(1)[:, None, None, None], 1)
        # Each batch has its own jitter, the same each time.
        boxes = _boxes(cfg, masks, cfg.data.holdout_seed + int(masks.sum()))
        return model.logits(images, boxes).clone()  # outside inference mode, so that gradients can pass by

    code = states.code_digest((*teacher.CODE, "prompts.py", "study/stages.py"))  # makes the answers
    key = states.fingerprint("fresh", code, model.about(), asdict(cfg.teacher), cfg.data.holdout_seed)
    return Taught(Examples(cohort.images, cohort.masks, proxy, ask=ask, device=cohort.device), key, 0.0)


# ---------------------------------------------------------------------------------------------------
# Students: the starts, and the distillations compared with them
# ---------------------------------------------------------------------------------------------------


def initial_states(
    cfg: Settings, cohort: Cohort, proxy: Tensor, inits: Iterable[str]
) -> dict[str, InitialState]:
    """Return the named initial states, read from `weights/` where 03_distill has left them, else made now.

    Pre-training learns from the proxy images that have masks. It takes as many steps as the other start: the
    fewer these images are, the more often it sees them.

    Raises:
        UserError: pre-training has no mask to learn from.
    """
    inits = list(inits)
    if not labelled(cfg, proxy).any() and (
        "pretraining" in inits or ("fm" in inits and cfg.distill.alpha == 0)
    ):
        raise UserError("labelled is 0: leave pretraining out of inits, and alpha above 0, or raise it")
    made = _students([(cfg, init, f"init-{init}") for init in inits], cohort, proxy)
    return dict(zip(inits, made, strict=True))


def variants(cfg: Settings) -> list[DistillConfig]:
    """Return the run's own distillation, and those that `cfg.sweep` compares with it, each once.

    Every alpha of the sweep is combined with every temperature; where one of the two lists is empty, with the
    run's own value. The named variants follow. With alpha = 0 the teacher does not affect the loss, so
    variants that differ only in the teacher are merged.
    """
    own, sweep = cfg.distill, cfg.sweep
    compared = [own]
    if sweep.alpha_sweep or sweep.temperature_sweep:
        for temperature in float_list(sweep.temperature_sweep) or [own.temperature]:
            for alpha in float_list(sweep.alpha_sweep) or [own.alpha]:
                compared.append(replace(own, alpha=alpha, temperature=temperature))
    compared += [replace(own, **VARIANTS[name]) for name in split_list(sweep.variants)]
    return list(dict.fromkeys(how if how.alpha else replace(own, alpha=0.0) for how in compared))


def distilled(cfg: Settings, cohort: Cohort, proxy: Tensor) -> list[tuple[DistillConfig, InitialState]]:
    """Return a student of each of `variants`, read from `weights/` where it has been made before.

    Cached logits are shared by all students; only `teacher_views="fresh"` runs the teacher again. Where no
    proxy image has a mask, there is no student of masks alone.
    """
    known = labelled(cfg, proxy)
    plans = []
    for how in variants(cfg):
        name = f"alpha{how.alpha:g}-temperature{how.temperature:g}-{how.teacher_labels}-{how.teacher_views}"
        if how.alpha:
            file = "init-fm" if how == cfg.distill else f"variant-{name}"
            plans.append((replace(cfg, distill=how), "fm", file))
        elif known.any():
            plans.append((replace(cfg, distill=how), "pretraining", "init-pretraining"))
    made = _students(plans, cohort, proxy)
    return [(own.distill, student) for (own, *_), student in zip(plans, made, strict=True)]


def _students(plans: list[tuple[Settings, str, str]], cohort: Cohort, proxy: Tensor) -> list[InitialState]:
    """Make or read students side by side, each planned by its settings, its start's name and its file's.

    Raises:
        OutOfTime: the study's time limit has passed before one was begun.
    """
    asking = {cfg.distill.teacher_views: cfg for cfg, init, _ in plans if init == "fm" and cfg.distill.alpha}
    lessons = {views: taught(cfg, cohort, proxy) for views, cfg in asking.items()}

    def make(plan: tuple[Settings, str, str]) -> InitialState | OutOfTime:
        try:
            return make_one(*plan)
        except OutOfTime as error:  # raised below: those beside it are trained to their end
            return error

    def make_one(cfg: Settings, init: str, name: str) -> InitialState:
        if init == "fm" and cfg.distill.alpha:
            lesson = lessons[cfg.distill.teacher_views]
        else:  # masks alone
            known = proxy[labelled(cfg, proxy)]
            lesson = Taught(Examples(cohort.images, cohort.masks, known, device=cohort.device), "", 0.0)
        epochs = distill.epochs_for_equal_steps(cfg.distill.proxy_epochs, len(proxy), len(lesson.examples))
        start = distill.initial_state(
            init,
            lesson.examples,
            replace(cfg.distill, proxy_epochs=epochs),
            batch_size=cfg.federate.batch_size,
            seed=cfg.federate.seed,
            precision=devices.precision_of(cfg.run),
            augmentation=cfg.federate.augmentation,
            batch_norm=cfg.federate.batch_norm,
            file=cfg.run_dir / "weights" / f"{name}-seed{cfg.federate.seed}.safetensors",
            teacher_key=lesson.key,
            teacher_seconds=lesson.seconds,
        )
        tracking.write_losses(cfg, f"{name}-seed{cfg.federate.seed}", start.fit)
        return start

    made = parallel.side_by_side(make, plans, cohort.device)
    for one in made:
        if isinstance(one, OutOfTime):
            raise one
    return made


# ---------------------------------------------------------------------------------------------------
# Runs of the three arms
# ---------------------------------------------------------------------------------------------------


def engine_key(cfg: Settings) -> list[str]:
    """Name the engine, and the code that measures drift beside it: a run's record depends on both."""
    return [cfg.run.engine, states.code_digest(("analysis/landscape.py",))]


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
        engine=engine_key(cfg),
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
        tracking.follow(cfg, runs.start_or_resume(cfg.run_dir, starts[init], examples, arm=arm, **common))
        for arm, planned in wanted.items()
        if arm in split_list(cfg.federate.arms)
        for init, examples in planned
    ]


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

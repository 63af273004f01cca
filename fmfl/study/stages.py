"""What the notebooks share: the inputs of each stage, made or found, and the files that each leaves behind.

A run's folder holds `weights/` (initial and final states), `cells/` (what each notebook measured),
`figures/`, `notebooks/` (executed), and at the end `results.csv`, `per_image.csv`, `table1.csv`,
`claims.csv`, `manifest.json` and `report.html`.
"""

import ctypes
import importlib.metadata
import io
import json
import os
import platform
import re
import subprocess
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pandas as pd
import torch
from torch import Tensor

import fmfl
from fmfl import config, data, federate, models, paths, split, states, teacher, train
from fmfl.analysis import tables
from fmfl.config import VARIANTS, DistillConfig, FederateConfig, Settings, float_list, split_list
from fmfl.data import Cohort
from fmfl.errors import UserError, first_few
from fmfl.federate import Server
from fmfl.flower import privacy
from fmfl.split import Holdout
from fmfl.teacher import CachedLogits, Teacher
from fmfl.train import Examples, InitialState

if TYPE_CHECKING:  # a client of Flower imports this module for each message, and draws nothing
    from matplotlib.figure import Figure

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
    train.set_determinism(cfg.run)
    wanted, device = cfg.data, train.device_of(cfg.run)
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


def load_teacher(cfg: Settings, **other: Any) -> Teacher:
    """The teacher of `cfg.teacher` on the run's device; `other` replaces arguments of its loading."""
    wanted = cfg.teacher
    options: dict[str, Any] = dict(
        adapter=wanted.adapter,
        size=wanted.teacher_size or None,
        allow=split_list(wanted.passed_over),
        precision=train.precision_of(cfg.run),
        noise=wanted.teacher_noise,
    )
    return teacher.load(
        wanted.teacher, wanted.checkpoint or None, train.device_of(cfg.run), **options | other
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
    order = torch.randperm(n, generator=train.generator(cfg.federate.seed, train.LABELS))
    return (order.argsort() < number).to(proxy.device)


def prompts(
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
    boxes = teacher.prompt(
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
    """See `train.predicted_masks`; made once for the same images and settings."""
    examples = Examples(cohort.images, cohort.masks, indices, device=cohort.device)
    patients = cohort.table.patient_id.iloc[indices.tolist()].tolist()
    how: dict[str, Any] = dict(
        batch_size=cfg.federate.batch_size,
        seed=cfg.data.holdout_seed,
        precision=train.precision_of(cfg.run),
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
    masks, seconds = train.predicted_masks(examples, patients, cfg.distill, known=known, **how)
    try:
        states.write_state(file, {"masks": masks}, seconds=seconds)
    except OSError as error:
        warnings.warn(f"the predicted masks cannot be kept in {file.parent} ({error.strerror})", stacklevel=2)
    return masks, seconds


def teacher_logits(
    cfg: Settings, who: Teacher, cohort: Cohort, indices: Tensor, known: Tensor | None = None
) -> CachedLogits:
    """The teacher's [n, 1, H, W] logits of chosen images under the run's box rule, cached."""
    boxes, seconds = prompts(cfg, cohort, indices, known=known)
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
        boxes = teacher.prompt(
            masks,
            rule.box_rule,
            per_image=rule.boxes_per_image,
            jitter_pixels=rule.jitter_pixels,
            seed=cfg.data.holdout_seed + int(masks.sum()),  # another hand for each batch, the same each time
        )
        return who.logits(images, boxes).clone()  # outside inference mode, so that gradients can pass by

    code = states.code_digest(
        ("teacher.py", "teachers/sam.py", "teachers/checkpoints.py", "study/stages.py")
    )  # makes the answers
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

    return dict(zip(inits, train.side_by_side(make, inits, cohort.device), strict=True))


def _begin(cfg: Settings, init: str, lesson: Taught, num_proxy: int, kept_as: str) -> InitialState:
    """See `train.initial_state`; fewer images than the proxy set has are shown more often."""
    epochs = train.epochs_for_equal_steps(cfg.distill.proxy_epochs, num_proxy, len(lesson.examples))
    return train.initial_state(
        init,
        lesson.examples,
        replace(cfg.distill, proxy_epochs=epochs),
        batch_size=cfg.federate.batch_size,
        seed=cfg.federate.seed,
        precision=train.precision_of(cfg.run),
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

    made = train.side_by_side(make, wanted, cohort.device)
    return [(one.distill, start) for one, start in zip(wanted, made, strict=True)]


def engine_key(cfg: Settings) -> object:
    """What of the engine a federated run's numbers depend on."""
    if cfg.run.engine == "local":
        return "local"
    return cfg.run.engine, {k: v for k, v in asdict(cfg.flower).items() if k.startswith(("privacy", "dp_"))}


def nodes(cfg: Settings, server: Server) -> Any:
    """Flower's nodes between a server and its clients; None where they train in the server's own loop.

    Raises:
        UserError: the engine is not installed, or the local one is asked for what it cannot do.
    """
    if cfg.run.engine == "local":
        if cfg.flower.privacy != "none":
            raise UserError(f"privacy {cfg.flower.privacy!r} comes with the engine flower: set engine to it")
        return None
    if server.arm != "federated":  # nobody there to exchange messages with
        return None
    try:
        from fmfl.flower import engine
    except ImportError:
        raise UserError(
            "engine 'flower' needs the package flwr: pip install -c requirements.lock -e '.[flower]'"
        ) from None
    return engine.simulated(cfg, server)


def servers(
    cfg: Settings, cohort: Cohort, parts: Holdout, clients: list[Tensor], initial: dict[str, InitialState]
) -> list[Server]:
    """Every run of one split and seed: federated from each start, both comparisons from random."""
    common: dict[str, Any] = dict(
        cfg=cfg.federate,
        student=cfg.distill.student,
        cohort=cohort,
        test=parts.test,
        precision=train.precision_of(cfg.run),
        engine=engine_key(cfg),
    )
    holders = federate.clients_of(cohort, clients)
    arms = split_list(cfg.federate.arms)
    found = []
    if "federated" in arms:
        for init in split_list(cfg.federate.inits):
            found.append(Server.start_or_resume(cfg.run_dir, initial[init], holders, **common))
    # As in the paper's Table 1, these two are trained from random weights only.
    if "centralised" in arms:
        # What the clients hold together: under a split by age, images without an age are nobody's.
        everything = federate.pooled(cohort, torch.cat(clients).sort().values)
        found.append(
            Server.start_or_resume(cfg.run_dir, initial["random"], everything, arm="centralised", **common)
        )
    if "standalone" in arms:
        for number, examples in holders.items():
            alone = {number: examples}
            found.append(
                Server.start_or_resume(cfg.run_dir, initial["random"], alone, arm="standalone", **common)
            )
    return found


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
            precision=train.precision_of(cfg.run),
        )

    trainings = range(torch.get_num_threads() if cohort.device.type == "cpu" else 1)
    train.side_by_side(lambda number: some(number, 1), trainings, cohort.device)
    started = time.perf_counter()
    train.side_by_side(lambda number: some(number, steps), trainings, cohort.device)
    return len(trainings) * steps * batch / (time.perf_counter() - started)


# ---------------------------------------------------------------------------------------------------
# What a cell depends on, and what it leaves behind
# ---------------------------------------------------------------------------------------------------


#: Which stages' settings a notebook depends on, and single ones besides.
DEPENDS: dict[str, tuple[str, ...]] = {
    "01_data": ("data", "federate.num_clients", "federate.age_strength", "federate.quantity_ratio",
                "federate.images_without_age", "federate.seed"),
    "02_teacher": ("data", "teacher", "distill.student"),
    "03_distill": ("data", "teacher", "distill", "sweep", "federate.batch_size", "federate.augmentation",
                   "federate.batch_norm", "federate.seed", "federate.inits", "run.precision",
                   "run.deterministic"),
    "04_federate": ("data", "teacher", "distill", "federate", "flower", "run.precision", "run.deterministic",
                    "run.engine"),
    "05_analysis": ("data", "teacher", "distill", "sweep", "federate", "flower", "analysis", "run.precision",
                    "run.deterministic", "run.engine"),
}  # fmt: skip


PLACES = ("data", "checkpoint", "encoder_file", "init_file", "run_name")
"""Settings that name files and folders of this machine."""


def depends_on(notebook: str) -> set[str]:
    """Name the settings that a notebook depends on, see `DEPENDS`."""
    wanted = DEPENDS[notebook]
    return {
        name for name, stage in config.stage_of().items() if stage in wanted or f"{stage}.{name}" in wanted
    }


def changed(about: dict[str, Any], cfg: Settings, by: str = "05_analysis") -> dict[str, tuple[Any, Any]]:
    """Compare the settings that made a cell with others.

    Args:
        about: the cell's record, see `save`; a parameter that came later was at its default then.
        cfg: the other settings.
        by: the notebook that has them; what it does not depend on is not compared.

    Returns:
        Of each setting that differs its value there and in `cfg`, without those in `FREE`.
    """
    used, here = config.defaults() | about["settings"], cfg.flat()
    if here["images_without_age"] == "auto":  # whatever the study has decided
        here["images_without_age"] = used["images_without_age"]
    names = (depends_on(about["notebook"]) & depends_on(by)).difference(FREE)
    return {name: (used[name], here[name]) for name in here if name in names and used[name] != here[name]}


def in_words(differences: dict[str, tuple[Any, Any]]) -> str:
    """Name the first three differences, as `num_rounds is 5 there and 3 here`."""
    return first_few(
        f"{name} is {there!r} there and {here!r} here" for name, (there, here) in differences.items()
    )


def cell_records(run_dir: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and record of each cell in a run's folder, in the order of the story; damaged ones passed over."""
    for file in sorted((run_dir / "cells").glob("*/cell.json"), key=lambda file: _in_story(file.parent.name)):
        try:
            about = read_json(file)
        except UserError:
            continue
        if about.get("notebook") in DEPENDS and isinstance(about.get("settings"), dict):
            yield file.parent.name, about


def _in_story(cell: str) -> list[int | str]:
    """Sorts names of cells by notebook, split and seed: seed 10 after seed 9."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", cell)]


def check_run(cfg: Settings, notebook: str) -> None:
    """Stop a notebook that trains before it writes over a run that other settings made.

    A run's folder holds the weights and results of one set of settings. Cells of 01_data and 02_teacher do
    not count: they are made again in a moment, and 05_analysis leaves out those that do not belong. Nor does
    `images_without_age`, which a study changes when it adds a split by age: rounds of other images move
    aside and come back, and 05_analysis does not mix them.

    Raises:
        UserError: the folder holds starts or results of other settings.
    """
    other: dict[str, tuple[Any, Any]] = {}
    for _, about in cell_records(cfg.run_dir):
        if about["notebook"] in ("03_distill", "04_federate"):
            other |= changed(about, cfg, notebook)
    other.pop("images_without_age", None)
    if other:
        name, (_, here) = next(iter(other.items()))
        own = re.sub(r"[^\w.=-]+", "_", f"{cfg.run_dir.name}-{name}={Path(as_text(here)).name}")
        raise UserError(
            f"run {cfg.run.run_name!r} holds results of other settings ({in_words(other)}), and would lose "
            f"them: name a run of its own in the parameters cell, such as run_name = {own!r}"
        )


VARY = "vary"
"""The folder of a study's variants."""


def variant_dir(cfg: Settings, variant: str) -> Path:
    """Where the study with one setting changed, "name=value", has its own cells and weights."""
    return cfg.run_dir / VARY / variant.replace("/", "_")


def cell_name(cfg: Settings, notebook: str) -> str:
    """The name under which a notebook's results are kept: one per split and seed where it depends on them."""
    seed = f"-seed{cfg.federate.seed}"
    return notebook + {"03_distill": seed, "04_federate": f"-{cfg.federate.split}{seed}"}.get(notebook, "")


def save(cfg: Settings, notebook: str, record: dict[str, Any], **tables: pd.DataFrame) -> Path:
    """Write a cell's tables and a record of its settings, each file whole or not at all.

    Args:
        cfg: the run's settings.
        notebook: the notebook's name without suffix.
        record: JSON values that the manifest shall show for this cell.
        **tables: written as `{name}.csv`.

    Returns:
        The cell's folder.
    """
    folder = cfg.run_dir / "cells" / cell_name(cfg, notebook)
    folder.mkdir(parents=True, exist_ok=True)
    for name, table in tables.items():
        write_text(folder / f"{name}.csv", table.to_csv(index=False))
    about = {"notebook": notebook, "settings": cfg.flat(), "run": where(cfg), "record": record}
    about["figures"] = list(_drawn.pop(cfg.run_dir, {}))
    write_text(folder / "cell.json", json.dumps(about, indent=1, default=str))
    return folder


_drawn: dict[Path, dict[str, None]] = {}
"""Of each run's folder, the figures drawn since the last cell was saved, in their order: the cell's own."""


def save_figure(cfg: Settings, name: str, figure: "Figure") -> "Figure":
    """Keep a figure under `figures/{name}.png` and give it back to be shown."""
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=200, bbox_inches="tight")
    states.write_bytes(cfg.run_dir / "figures" / f"{name}.png", drawn.getvalue())
    _drawn.setdefault(cfg.run_dir, {})[f"{name}.png"] = None
    return figure


def write_text(file: Path, text: str) -> None:
    """Write a text file whole or not at all; see `states.write_bytes`."""
    states.write_bytes(file, text.encode("utf-8"))


# ---------------------------------------------------------------------------------------------------
# Bringing the cells together
# ---------------------------------------------------------------------------------------------------

#: Settings in which the cells of one study may differ.
FREE = (
    *("run_name", "device", "cohort_device"),
    *("split", "seed", "arms", "inits", "target_dice", "reference_split", "diagnostics"),
    *("alpha_sweep", "temperature_sweep", "variants"),
)


def collect(cfg: Settings) -> tuple[pd.DataFrame, pd.DataFrame, list[str]]:
    """All cells' results that were made with this run's settings.

    Returns:
        The rows of results.csv and of per_image.csv, and the names of cells, of all notebooks, that are left
        out because other settings made them.

    Raises:
        UserError: no cell has results with these settings, or two cells were made from different images or
            by different code.
    """
    results, per_image, others = [], [], []
    inputs: dict[tuple[str, str], str] = {}
    apart: dict[str, tuple[Any, Any]] = {}
    for folder, about, other in _federations(cfg.run_dir, cfg):
        if other:
            others.append(folder.name)
            apart |= {name: (there, cfg.flat()[name]) for name, there in other.items()}
            continue
        inputs.setdefault((about["record"].get("images"), about["record"].get("code")), folder.name)
        results.append(tables.read_table(folder / "results.csv"))
        per_image.append(tables.read_table(folder / "per_image.csv"))
    if not results:
        if others:
            raise UserError(
                f"{cfg.run_dir} holds results of other settings alone ({in_words(apart)}): give the same "
                "values in the parameters cell, or run 04_federate with these first"
            )
        raise UserError(f"{cfg.run_dir} holds no results of these settings: run 04_federate first")
    if len(inputs) > 1:
        raise UserError(
            f"{' and '.join(inputs.values())} in {cfg.run_dir} were made from different images or by "
            "different code: run 04_federate for all of them again"
        )
    for name, about in cell_records(cfg.run_dir):
        if about["notebook"] not in ("04_federate", "05_analysis") and changed(about, cfg):
            others.append(name)
    key = ["arm", "init", "split", "seed", "round"]
    table = pd.concat(results, ignore_index=True)
    repeated = table[table.duplicated(key, keep=False)]
    if len(repeated) and (repeated.groupby(key).dice.nunique() > 1).any():
        raise UserError(
            f"{cfg.run_dir / 'cells'} holds two different results for one run: delete it and run again"
        )
    images = pd.concat(per_image, ignore_index=True)
    return (
        table.drop_duplicates(key, ignore_index=True),
        images.drop_duplicates(["arm", "init", "split", "seed", "client", "image_id"], ignore_index=True),
        others,
    )


def _federations(run_dir: Path, cfg: Settings) -> Iterator[tuple[Path, dict[str, Any], dict[str, Any]]]:
    """Each 04_federate cell in a folder: where it is, its record, and its values of settings that differ."""
    cfg = _decided(cfg)
    for folder in sorted((run_dir / "cells").glob("04_federate-*")):
        about = read_json(folder / "cell.json")
        yield folder, about, {name: there for name, (there, _) in changed(about, cfg).items()}


def _decided(cfg: Settings) -> Settings:
    """At auto, `images_without_age` as leave_out where a cell of the run has it: no table has both."""
    records = [
        about["settings"] for _, about in cell_records(cfg.run_dir) if about["notebook"] == "04_federate"
    ]
    if cfg.federate.images_without_age == "auto" and any(
        settings.get("images_without_age") == "leave_out" for settings in records
    ):
        return replace(cfg, federate=replace(cfg.federate, images_without_age="leave_out"))
    return cfg


def collect_drift(cfg: Settings) -> pd.DataFrame:
    """How the clients' updates went in all cells of these settings: see `federate.drift`."""
    tables = [
        pd.read_csv(folder / "drift.csv")
        for folder, _, other in _federations(cfg.run_dir, cfg)
        if not other and (folder / "drift.csv").exists()
    ]
    empty = pd.DataFrame(columns=["init", "split", "seed", "round", *federate.DRIFT])
    return pd.concat(tables, ignore_index=True) if tables else empty


def collect_variants(cfg: Settings) -> pd.DataFrame:
    """Scores by image of the study's variants: those that differ from these settings in one alone.

    Returns:
        The columns of per_image.csv, and axis (the setting's name), value (its value there) and own (here),
        both as text.
    """
    tables = []
    for variant in sorted((cfg.run_dir / VARY).glob("*=*")):
        for folder, _, other in _federations(variant, cfg):
            if len(other) == 1:
                ((axis, value),) = other.items()
                about = {
                    "axis": axis,
                    "value": _on_axis(axis, value),
                    "own": _on_axis(axis, cfg.flat()[axis]),
                }
                tables.append(tables.read_table(folder / "per_image.csv").assign(**about))
    empty = pd.DataFrame(columns=["arm", "init", "split", "seed", "axis", "value", "own"])
    return pd.concat(tables, ignore_index=True) if tables else empty


def _on_axis(axis: str, value: object) -> str:
    return "all" if (axis, value) in {("labelled", 1.0), ("federated", 0.0)} else as_text(value)


def as_text(value: object) -> str:
    """A setting's value as it stands in the name of a variant."""
    return f"{value:g}" if isinstance(value, float) else str(value)


def compositions(cfg: Settings, cohort: Cohort, results: pd.DataFrame) -> pd.DataFrame:
    """What the clients held: `split.composition` of each split and seed that was run."""
    federated = holdout(cfg, cohort).federated
    runs = results.loc[results.split != "pooled", ["split", "seed"]].drop_duplicates()
    tables = []
    for scheme, seed in runs.itertuples(index=False):
        held = partition(cohort, federated, replace(cfg.federate, seed=int(seed)), scheme)
        tables.append(split.composition(cohort.table, held).assign(split=scheme, seed=seed))
    return pd.concat(tables, ignore_index=True)


def first_servers(cfg: Settings, cohort: Cohort, results: pd.DataFrame) -> tuple[list[Server], str]:
    """The federated runs of the reference split and the first seed as they began; reads, and writes nothing.

    Returns:
        The runs before their first round, and a sentence that says why there are none; empty otherwise.
    """
    runs = results[results.arm == "federated"]
    if runs.empty:
        return [], "diagnostics are left out: there is no federated run"
    shown = cfg.analysis.reference_split
    shown = shown if shown in set(runs.split) else runs.split.iloc[0]
    runs = runs[(runs.split == shown) & (runs.seed == runs[runs.split == shown].seed.min())]
    seed, weights = int(runs.seed.iloc[0]), cfg.run_dir / "weights"
    cfg = replace(cfg, federate=replace(cfg.federate, split=shown, seed=seed))
    holders = federate.clients_of(cohort, partition(cohort, holdout(cfg, cohort).federated, cfg.federate))
    servers = []
    for init in tables.ordered_inits(runs):
        start, end = f"init-{init}-seed{seed}.safetensors", f"federated-{shown}-{init}-seed{seed}.safetensors"
        state = _start_of(weights / start, weights / end, runs[runs.init == init], cohort.device)
        if state is None:
            return [], (
                f"diagnostics are left out: weights/{start} or weights/{end} is not there or not of these "
                "results, so run 03_distill and 04_federate again"
            )
        servers.append(
            Server(
                arm="federated",
                init=init,
                split=shown,
                client=-1,
                clients=holders,
                cfg=cfg.federate,
                precision=train.precision_of(cfg.run),
                model=models.build(
                    cfg.distill.student, device=cohort.device, batch_norm=cfg.federate.batch_norm
                ),
                state=state,
                initial=state,
                file=weights / end,
                fingerprint="",
            )
        )
    return servers, ""


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


def read_json(file: Path) -> dict[str, Any]:
    """A JSON file's content.

    Raises:
        UserError: it is missing or damaged.
    """
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{file} is missing: run the notebook that writes it again") from None
    except ValueError:
        raise UserError(f"{file} is damaged: delete it and run the notebook that writes it again") from None


def where(cfg: Settings) -> dict[str, Any]:
    """What a result was computed with: code, versions, device."""
    device = train.device_of(cfg.run)
    name = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else platform.processor() or platform.machine()
    )
    packages = (
        "torch",
        "torchvision",
        "numpy",
        "pandas",
        "scipy",
        "segmentation-models-pytorch",
        "segment-anything",
    )
    return {
        "fmfl": fmfl.__version__,
        "commit": commit(),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "versions": {package: importlib.metadata.version(package) for package in packages},
        "device": {
            "kind": device.type,
            "name": name,
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "memory_gib": memory_gib(),
            "system": platform.system(),
        },
    }


def memory_gib() -> float | None:
    """The machine's memory; None where the system does not tell (Windows)."""
    if not hasattr(os, "sysconf"):
        return None
    return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)


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


def commit() -> str:
    """The checkout's commit, with `+changes` where the package's files differ; empty outside git."""

    def git(*arguments: str) -> str:
        found = subprocess.run(
            ["git", *arguments], cwd=paths.ROOT, capture_output=True, text=True, check=True
        )
        return found.stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", "fmfl", "notebooks", "data")
        return git("rev-parse", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return ""


STAND_IN = (
    "The built-in teacher stands in for SAM-Med2D and is no foundation model: it was trained on lungs alone, "
    "among them images of the Guangzhou source and synthetic ones of the built-in generator, so its student "
    "also carries labels that pre-training has not seen."
)


def manifest(cfg: Settings, results: pd.DataFrame, others: Iterable[str] = ()) -> dict[str, Any]:
    """Everything that the run's numbers depend on, from the records that its cells left.

    Args:
        cfg: the run's settings.
        results: the rows of results.csv.
        others: cells that are not part of them, from `collect`.
    """
    left_out = {*others, "05_analysis"}
    cells = {name: about for name, about in cell_records(cfg.run_dir) if name not in left_out}
    figures = [name for about in cells.values() for name in about.get("figures", [])]
    figures += _drawn.get(cfg.run_dir, {})  # by the analysis that asks
    here = where(cfg)
    settings = cfg.flat() | {
        "seeds": sorted(int(seed) for seed in results.seed.unique()),
        "splits": [name for name in split.OPTIONS if name in set(results.split)],
        "inits": tables.ordered_inits(results),
        "arms": sorted(results.arm.unique()),
    }
    for name in ("split", "seed"):
        del settings[name]
    # Results are passed on; where they lay on this machine is nobody's business.
    for name in PLACES:
        settings[name] = ",".join(Path(part).name for part in split_list(settings[name]))
    runs = {f"{row.arm}-{row.split}-{row.init}-seed{row.seed}" for row in results.itertuples()}
    runs |= {f"init-{row.init}-seed{row.seed}" for row in results.itertuples()}
    weights = {
        file.name: read_record_digest(file)
        for file in sorted((cfg.run_dir / "weights").glob("*.safetensors"))
        if file.stem.split("-client")[0] in runs
    }
    records = {Path(name).stem: states.read_record(cfg.run_dir / "weights" / name) for name in weights}
    rounds = {
        name: [done["sha256"] for done in record["rounds"]]
        for name, record in records.items()
        if "rounds" in record
    }
    federated = results[results.arm == "federated"]
    noised = len(federated[["init", "split", "seed"]].drop_duplicates())
    who = cells.get("02_teacher", {}).get("record", {})
    if who.get("name") == "builtin":
        who = who | {"note": STAND_IN}
    return {
        "fmfl": here["fmfl"],
        "commit": here["commit"],
        "created": here["finished"],
        "versions": {"python": here["python"]} | here["versions"],
        "device": here["device"],
        "settings": settings,
        "privacy": privacy.spent(cfg.flower, cfg.federate.num_rounds, noised),
        "data": cells.get("01_data", {}).get("record", {}),
        "teacher": who,
        "student": next((c["record"] for n, c in cells.items() if n.startswith("03_distill")), {}),
        "figures": list(dict.fromkeys(figures)),
        "weights": weights,
        "rounds": rounds,
        "cells": {name: cell["run"] | {"record": cell["record"]} for name, cell in cells.items()},
    }


def read_record_digest(file: Path) -> str:
    """SHA-256 over the names and values of a state in a file."""
    found = states.read_state(file)
    return states.state_digest(found[0]) if found else "unreadable"


def student_card(name: str, size: int, batch_norm: str = "average") -> dict[str, Any]:
    """What a student weighs: parameters, bytes on the wire, FLOPs of one image."""
    model = models.build(name, batch_norm=batch_norm)
    return {
        "student": name,
        "norm": "group" if batch_norm == "group" else "batch",
        "parameters": models.num_parameters(model),
        "bytes": models.num_bytes(model.state_dict()),
        "flops": models.flops(model, torch.zeros(1, 1, size, size)),
    }

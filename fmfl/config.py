"""Parameters of a run, each declared once: type, default, range, meaning, the paper's value, who takes it.

The defaults are the quick run of the notebooks; the profiles `class` and `paper` say what they change. A
parameter that is unknown, of another type or out of range is refused in one sentence.
"""

import ast
import difflib
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from fmfl import paths
from fmfl.errors import UserError
from fmfl.parameters import Parameter, choice, param, split_list

#: Notebooks of a study, in the story's order. 06_use is for people alone: a study does not run it.
NOTEBOOKS = ("01_data", "02_teacher", "03_distill", "04_federate", "05_analysis")
INITS = ("random", "pretraining", "fm", "imagenet", "file")
ARMS = ("federated", "centralised", "standalone")
SPLITS = ("iid", "age", "quantity", "site", "dirichlet")
BOX_RULES = ("ground_truth", "ground_truth_jitter", "whole_image", "predicted")
#: Boxes of lungs: 02_teacher compares these.
BOXES_PER_IMAGE = ("per_lung", "one")

#: Parameters of older versions and their defaults: a study made with another value is another study.
REMOVED = {"adapter": True, "passed_over": "", "teacher_noise": 0.0, "privacy": "none"}

#: `by` of a parameter that all take: the notebooks by their numbers, and F for Flower's nodes.
ALL = "12345F"

#: Groups of parameters, and what the members have in common.
TAGS = {
    "where": "says where a run happens; fingerprints leave it out, and cells of one study may differ in it",
    "free": "may differ between the cells of one study",
    "place": "names files or folders of this machine",
    "partition": "decides which client holds which images",
    "server": "is used by the federated arm alone",
    "plan": "says which runs there are, and no single run depends on it",
}


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Folder, device and engine of a run."""

    run_name: str = param(
        "quick", "folder under runs/, or an absolute path", by="123456F", tags="where place"
    )
    device: str = choice("auto", "auto cpu cuda", "auto: a GPU where there is one", by=ALL, tags="where")
    precision: str = choice(
        "auto", "auto float32 bfloat16", "auto: bfloat16 on a GPU that has it", by="2345F"
    )
    deterministic: bool = param(False, "the same bytes twice also on a GPU, by slower kernels")
    cohort_device: str = choice(
        "auto",
        "auto device host",
        "home of the images; auto: host if the GPU has no room",
        by=ALL,
        tags="where",
    )
    engine: str = choice("local", "local flower", "flower: the clients behind Flower's messages", by="45")
    track: str = choice(
        "none",
        "none tensorboard",
        "tensorboard: scores and losses as curves, in the run's folder",
        tags="where",
    )


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Images, their size, and which of them are proxy, test and federated."""

    data: str = param(
        "phantom", "phantom, or folders with images and masks, with commas between them", tags="place"
    )
    size: int = param(96, "pixels a side; a U-Net halves it five times", 32, 1024, multiple=32, paper=256)
    num_phantoms: int = param(160, "number of synthetic images that phantom holds", 20, 100_000)
    phantom_seed: int = param(0, "random seed of the synthetic images", 0)
    mask_class: str = param(
        "lung", "the annotated class that is segmented; kidney:2 takes label 2 of mask files"
    )
    strict: bool = param(False, "stop at a bad file instead of leaving it out and counting it")
    proxy: float = param(1504 / 6504, "fraction (< 1) or number of proxy images", 0, paper=1504 / 6504)
    test: float = param(500 / 6504, "fraction (< 1) or number of test images", 0, paper=500 / 6504)
    federated: float = param(0.0, "fraction or number of the other images that clients hold; 0: all", 0)
    holdout_seed: int = param(0, "random seed of proxy and test images; one for all runs", 0)


@dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """The teacher and its prompt."""

    teacher: str = param(
        "builtin", "builtin, sam_vit_b, sam_vit_l, sam_vit_h, medsam or sam-med2d", paper="sam-med2d"
    )
    checkpoint: str = param("", "file of its weights; empty: the shipped ones of builtin", tags="place")
    teacher_size: int = param(0, "pixels a side of the teacher's input; 0: its family's own", 0, 2048)
    box_rule: str = choice(
        "ground_truth", BOX_RULES, "source of boxes; predicted: another network's masks", paper="ground_truth"
    )
    boxes_per_image: str = choice(
        "per_lung",
        (*BOXES_PER_IMAGE, "per_part"),
        "one: round both; the paper does not say; per_part: another organ, a box round each of its parts",
    )
    jitter_pixels: float = param(5.0, "most that each side of a jittered box moves, in pixels", 0, 100)


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """Training of the informed initial states on the proxy set (Eq. 4 and 5)."""

    student: str = param(
        "mobile_unet",
        "network: tiny_unet, mobile_unet, resnet18_unet, resnet34_unet, unet",
        paper="unet",
        by="2345F",
    )
    labelled: float = param(
        1.0, "fraction (<= 1) or number of proxy masks that are used, else the teacher's", 0
    )
    alpha: float = param(0.6, "weight of the teacher in Eq. 5; 0: supervised pre-training", 0, 1, paper=0.6)
    temperature: float = param(1.0, "softens both masks in Eq. 4; 1: not at all", 0.01, 100, paper=1.0)
    teacher_labels: str = choice("soft", "soft hard", "hard: the teacher's mask instead of its logits")
    teacher_views: str = choice("cached", "cached fresh", "fresh: logits of each augmented image")
    proxy_epochs: int = param(15, "passes over the proxy set; the paper names none", 0, 10_000, by="2345")
    proxy_learning_rate: float = param(1e-3, "learning rate of Adam on the proxy set", 0, 10, by="2345")
    encoder_file: str = param("", "the encoder's weights for the initial state imagenet", tags="place")
    init_file: str = param("", "the student's weights for the initial state file", tags="place")


#: What each named variant of distillation changes.
VARIANTS: dict[str, dict[str, Any]] = {
    "kl_only": {"alpha": 1.0},
    "dice_only": {"alpha": 0.0},
    "soft": {"teacher_labels": "soft"},
    "hard": {"teacher_labels": "hard"},
    "cached": {"teacher_views": "cached"},
    "fresh": {"teacher_views": "fresh"},
}


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """Other distillations that 03_distill compares with the run's own; no federated run begins from them."""

    alpha_sweep: str = param("0,0.6,1", "values of alpha to compare", 0, 1, many=True, tags="free")
    temperature_sweep: str = param("", "to compare; empty: the run's own", 0.01, 100, many=True, tags="free")
    variants: str = choice("", VARIANTS, "distillations that change one thing", many=True, tags="free")


@dataclass(frozen=True, kw_only=True)
class FederateConfig:
    """Settings of a federated run, besides its data and its initial state."""

    split: str = choice(
        "age", SPLITS, "how the images are dealt to the clients", by="456F", tags="free partition"
    )
    age_strength: float = param(1.0, "0: as iid; 1: disjoint age ranges", 0, 1, by="145F", tags="partition")
    quantity_ratio: float = param(
        9.0, "images of the largest client over the smallest", 1, 1000, by="145F", tags="partition"
    )
    dirichlet_concentration: float = param(0.5, "small: few age bands a client", 0.01, 1e6, tags="partition")
    arms: str = choice(",".join(ARMS), ARMS, "ways to train", many=True, by="45", tags="free plan")
    inits: str = choice(
        "random,pretraining,fm", INITS, "initial states", many=True, by="345", tags="free plan"
    )
    images_without_age: str = choice(
        "auto",
        "auto keep leave_out",
        "auto: left out where a split of the study deals by age, so that all splits train on the same images",
        by="145F",
        tags="plan",
    )
    num_clients: int = param(3, "number of clients", 1, 100_000, paper=3, by="145F", tags="partition")
    num_rounds: int = param(5, "rounds of local training and averaging", 1, 100_000, paper=100)
    local_epochs: int = param(1, "E, passes of a client over its images in a round", 1, 1000, paper=5)
    batch_size: int = param(8, "B, images in a local step", 1, 4096, by="2345F")
    learning_rate: float = param(1e-3, "learning rate of the clients' Adam", 0, 10, paper=1e-4)
    proximal: float = param(0.0, "mu of FedProx (arXiv 1812.06127); 0: FedAvg", 0, 1000, tags="server")
    loss: str = choice("dice", "dice dice_bce", "loss of the clients", paper="dice")
    optimizer_state: str = choice("reset", "reset keep", "state of a client's Adam between rounds")
    batch_norm: str = choice(
        "average",
        "average local group",
        "local: a client's own (FedBN, arXiv 2102.07623); group: GroupNorm in its place (arXiv 1910.00189)",
        by="345F",
    )
    participation: float = param(1.0, "C, fraction of clients in a round; at least one", 0, 1, tags="server")
    client_weights: str = choice(
        "images", "images uniform", "weights in the average; images: Eq. 3", tags="server"
    )
    server: str = choice(
        "average",
        "average momentum adam",
        "step with the average: FedAvg, FedAvgM (arXiv 1909.06335) or FedAdam (arXiv 2003.00295)",
        paper="average",
        tags="server",
    )
    server_learning_rate: float = param(0.0, "0: 1 for momentum and 0.01 for adam", 0, 100, tags="server")
    server_momentum: float = param(0.9, "beta in FedAvgM, beta_1 in FedAdam", 0, 0.9999, tags="server")
    server_beta2: float = param(0.99, "beta_2 in FedAdam", 0, 0.9999, tags="server")
    server_epsilon: float = param(1e-3, "tau in FedAdam; larger: less adaptive", 1e-12, 1, tags="server")
    augmentation: str = choice("device", "device albumentations none", "none: images as they are", by="2345F")
    score_every: int = param(1, "rounds between scores; the last round is always scored", 1, 100_000)
    seed: int = param(0, "random seed of partition, weights and training", 0, 2**31, by="13456F", tags="free")


@dataclass(frozen=True, kw_only=True)
class FlowerConfig:
    """Further settings of a run on Flower; docs/hospitals.md goes to more than one machine."""

    start: str = param("", "file of a deployment's first weights; empty: random ones by the seed")
    test_data: str = param("", "folders that a deployment scores on; empty: none; held_out: part of data")
    min_clients: int = param(2, "good updates that a round needs, or all where fewer are asked", 1, 100_000)
    join_timeout: float = param(300.0, "seconds to wait for all clients before the first round", 0, 1e6)
    round_timeout: float = param(3600.0, "seconds to wait for a client's update", 1, 1e6)


@dataclass(frozen=True, kw_only=True)
class AnalysisConfig:
    """Settings of the figures and tables."""

    target_dice: float = param(0.9, "Dice that rounds and bytes are counted up to", 0, 1, tags="free")
    reference_split: str = choice("age", SPLITS, "split of Table 1", tags="free")
    diagnostics: bool = param(True, "repeat each first round, to measure the loss around it", tags="free")


@dataclass(frozen=True)
class Settings:
    """All stages' settings of one run, and who takes the parameters of each stage."""

    run: RunConfig = field(metadata={"by": "345F"})
    data: DataConfig = field(metadata={"by": ALL})
    teacher: TeacherConfig = field(metadata={"by": "2345"})
    distill: DistillConfig = field(metadata={"by": "345"})
    sweep: SweepConfig = field(metadata={"by": "35"})
    federate: FederateConfig = field(metadata={"by": "45F"})
    flower: FlowerConfig = field(metadata={"by": "45F"})
    analysis: AnalysisConfig = field(metadata={"by": "5"})

    def flat(self) -> dict[str, Any]:
        """Return every parameter's value by name."""
        return {name: getattr(getattr(self, about.stage), name) for name, about in PARAMETERS.items()}

    def changed(self) -> dict[str, Any]:
        """Return the parameters that differ from the quick run."""
        return {name: value for name, value in self.flat().items() if value != PARAMETERS[name].default}

    @property
    def run_dir(self) -> Path:
        """The run's folder."""
        return paths.RUNS / self.run.run_name


STAGES: dict[str, type] = {stage.name: stage.type for stage in fields(Settings)}

PARAMETERS: dict[str, Parameter] = {
    one.name: Parameter(one.name, one.type, one.default, stage.name, **stage.metadata | one.metadata)
    for stage in fields(Settings)
    for one in fields(stage.type)
}

#: What each profile changes against the defaults (= `smoke`, the notebooks' quick run).
PROFILES: dict[str, dict[str, Any]] = {
    "smoke": {},
    # 320: the fewest whose test part has the patients that an interval needs (statistics.MIN_PATIENTS).
    "class": {"num_phantoms": 320, "alpha_sweep": ""},
    # The paper's values, but for its teacher, whose weights do not come along; the rest it leaves open.
    "paper": {name: about.paper for name, about in PARAMETERS.items() if about.paper is not None}
    | {"teacher": "builtin", "num_phantoms": 6504, "batch_size": 16, "alpha_sweep": ""}
    | {"proxy_epochs": 100, "proxy_learning_rate": 1e-4},
}


def defaults() -> dict[str, Any]:
    """Return every parameter's default: the quick run."""
    return {name: about.default for name, about in PARAMETERS.items()}


def taken_by(notebook: str) -> set[str]:
    """Return the parameters that a notebook takes, or Flower's nodes, as `F`."""
    return {name for name, about in PARAMETERS.items() if notebook.split("_")[0].lstrip("0") in about.by}


def tagged(tag: str) -> set[str]:
    """Return the parameters in one of the groups `TAGS`."""
    return {name for name, about in PARAMETERS.items() if tag in about.tags.split()}


def float_list(text: str) -> list[float]:
    """Return a comma-separated parameter of numbers as a list."""
    return [float(part) for part in split_list(text)]


def known(name: str) -> Parameter:
    """Return the declaration of a parameter.

    Raises:
        UserError: the name is unknown.
    """
    if name in PARAMETERS:
        return PARAMETERS[name]
    raise unknown(name, PARAMETERS)


#: Short names that people write, to ours.
SHORT = {
    "lr": "learning_rate",
    "bs": "batch_size",
    "epochs": "local_epochs",
    "rounds": "num_rounds",
    "clients": "num_clients",
    "resolution": "size",
    "img_size": "size",
    "mu": "proximal",
}


def unknown(name: str, names: Iterable[str]) -> UserError:
    """Return the error for a name that is none of these, with the one that is meant by it or nearest."""
    names = list(names)
    meant = SHORT.get(name.lower())
    near = [meant] if meant in names else difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean {near[0]}?" if near else "`fmfl params` lists them all"
    return UserError(f"parameter {name!r} is unknown: {hint}")


def validate(name: str, value: Any) -> Any:
    """Return a parameter's value in its own type, or raise a UserError; see `Parameter.validate`."""
    return known(name).validate(value)


def parse(name: str, text: str) -> Any:
    """Return the value of a parameter given as text on a command line; see `Parameter.parse`."""
    return known(name).parse(text)


def settings(given: dict[str, Any] | None = None, *, profile: str = "smoke") -> Settings:
    """Return the settings of a profile with some parameters given.

    Raises:
        UserError: a parameter or the profile is not usable.
    """
    if profile not in PROFILES:
        raise UserError(f"profile {profile!r} is unknown: choose one of {', '.join(PROFILES)}")
    values = PROFILES[profile] | {name: validate(name, value) for name, value in (given or {}).items()}
    stages: dict[str, dict[str, Any]] = {stage: {} for stage in STAGES}
    for name, value in values.items():
        stages[PARAMETERS[name].stage][name] = value
    return Settings(**{stage: kind(**stages[stage]) for stage, kind in STAGES.items()})


PARAMETERS_COMMENT = "# Parameters"


def from_notebook(namespace: dict[str, Any]) -> Settings:
    """Return settings from a notebook's variables, for its set-up cell: `config.from_notebook(globals())`.

    The variables themselves take the types of their parameters, as the settings have them: a number that
    YAML reads as text, such as 1e-3, is a number in the cells that follow, and a list is joined by commas.

    Raises:
        UserError: a parameter is unknown, mistyped or out of range, or no parameter cell was run.
    """
    checked = {name: validate(name, value) for name, value in given(namespace).items()}
    namespace.update(checked)
    return settings(checked)


def given(namespace: dict[str, Any]) -> dict[str, Any]:
    """Return the parameters among a notebook's variables, by name, as they were given.

    Parameters are the names that cells beginning with `# Parameters` assign: the notebook's own cell, and the
    one that papermill injects after it. Of a cell that was corrected and run again, told by its first line,
    the last version counts. A runner that keeps no history (nbval) starts a fresh kernel, where all plain
    values are parameters.

    Raises:
        UserError: no parameter cell was run.
    """
    cells = [source.strip() for source in namespace.get("In", []) if source.strip()]
    latest = {cell.splitlines()[0]: cell for cell in cells if cell.startswith(PARAMETERS_COMMENT)}
    if cells and not latest:
        raise UserError(
            f"no cell that was run begins with {PARAMETERS_COMMENT!r}: run the parameters cell first, "
            "with that line"
        )
    nodes = (node for cell in latest.values() for node in ast.walk(ast.parse(cell)))
    names = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    if not cells:
        plain = (str, int, float, bool, list, tuple, type(None))
        names = {name for name, value in namespace.items() if name[0].islower() and isinstance(value, plain)}
    return {name: namespace[name] for name in sorted(names & namespace.keys())}

"""What a run depends on: one frozen dataclass a stage, three profiles, and the contract of parameters.

The defaults are the quick run of the notebooks; `class` and `paper` say what they change. Every
parameter has a type and a range, is named once over all stages, and is refused in one sentence when it
is unknown, of the wrong type or out of range.
"""

import ast
import dataclasses
import difflib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fmfl import paths
from fmfl.errors import UserError

INITS = ("random", "pretraining", "fm", "imagenet", "file")
ARMS = ("federated", "centralised", "standalone")
SPLITS = ("iid", "age", "quantity", "site", "dirichlet")


def _in(default: Any, low: float | None = None, high: float | None = None, multiple: int = 1) -> Any:
    """A number between low and high, both allowed, that `multiple` divides."""
    return dataclasses.field(default=default, metadata={"low": low, "high": high, "multiple": multiple})


def _one_of(default: str, *choices: str) -> Any:
    """One of the named choices."""
    return dataclasses.field(default=default, metadata={"choices": choices})


def _some_of(default: str, *choices: str) -> Any:
    """One or more of the named choices, joined by commas; none only where that is the default."""
    rule = {"choices": choices, "several": True, "none": not default}
    return dataclasses.field(default=default, metadata=rule)


def _numbers(default: str, low: float, high: float) -> Any:
    """Any number of numbers between low and high, joined by commas."""
    return dataclasses.field(default=default, metadata={"numbers": (low, high)})


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Where results go and what computes them."""

    run_name: str = "quick"  # a folder under runs/, or an absolute path
    device: str = _one_of("auto", "auto", "cpu", "cuda")
    precision: str = _one_of("auto", "auto", "float32", "bfloat16")  # auto: bfloat16 on a GPU that has it
    deterministic: bool = False  # on a GPU, slower kernels that give the same bytes twice; a CPU always does
    cohort_device: str = _one_of("auto", "auto", "device", "host")  # auto: host if the GPU has no room for it
    engine: str = _one_of("local", "local", "flower")  # flower: the clients behind Flower's messages


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which images, at which size, and which of them are proxy, test and federated."""

    data: str = "phantom"  # phantom, or folders, joined by commas
    size: int = _in(96, 32, 1024, multiple=32)  # pixels a side, which a U-Net halves five times; paper: 256
    num_phantoms: int = _in(160, 20, 100_000)
    phantom_seed: int = _in(0, 0)
    mask_class: str = "lung"  # the annotated class that is segmented
    strict: bool = False  # a bad file stops the run instead of being left out and counted
    proxy: float = _in(1504 / 6504, 0)  # fraction (< 1) or number of images; paper: 1,504 of 6,504
    test: float = _in(500 / 6504, 0)  # paper: 500 of 6,504
    federated: float = _in(0.0, 0)  # fraction or number of the rest that the clients hold; 0: all of it
    holdout_seed: int = _in(0, 0)  # one test set for all seeds, so that they can be compared image by image


@dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """Who teaches, and with which prompt."""

    teacher: str = "builtin"  # or sam-med2d (the paper's), sam_vit_b, sam_vit_l, sam_vit_h, medsam
    checkpoint: str = ""  # its weights' file; empty: the shipped ones of builtin
    adapter: bool = True  # False: SAM-Med2D's weights without the adapters
    teacher_size: int = _in(0, 0, 2048)  # pixels a side of the teacher's input; 0: the family's own
    passed_over: str = ""  # keys that may be missing, unexpected or of another shape, * for anything
    box_rule: str = _one_of(
        "ground_truth", "ground_truth", "ground_truth_jitter", "whole_image", "predicted", "point"
    )
    boxes_per_image: str = _one_of("per_lung", "per_lung", "one")  # left open by the paper
    jitter_pixels: float = _in(5.0, 0, 100)
    teacher_noise: float = _in(0.0, 0, 10)  # on each weight, in its tensor's deviations


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """How the informed initial states are made from the proxy set (Eq. 4 and 5)."""

    student: str = "mobile_unet"
    # Fraction (<= 1) or number of proxy images with a mask; the teacher's own stands in for the others.
    labelled: float = _in(1.0, 0)
    alpha: float = _in(0.6, 0, 1)  # weight of the teacher in Eq. 5; 0 is supervised pre-training
    temperature: float = _in(1.0, 0.01, 100)  # T of Hinton et al. 2015; the paper names none
    teacher_labels: str = _one_of("soft", "soft", "hard")  # hard: the teacher's mask instead of its logits
    teacher_views: str = _one_of("cached", "cached", "fresh")  # fresh: asked about each augmented image
    proxy_epochs: int = _in(15, 0, 10_000)  # passes of the proxy set; the paper names none
    proxy_learning_rate: float = _in(1e-3, 0, 10)
    encoder_file: str = ""  # of the start imagenet: the encoder's weights as published
    init_file: str = ""  # of the start file: any weights of the student


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
    """Which other distillations 03_distill compares with the run's own; no federated run begins from them."""

    alpha_sweep: str = _numbers("0,0.6,1", 0, 1)  # each with each temperature: Dice only, both, KL only
    temperature_sweep: str = _numbers("", 0.01, 100)  # empty: the run's own
    variants: str = _some_of("", *VARIANTS)  # each changes one thing in the run's own


@dataclass(frozen=True, kw_only=True)
class FederateConfig:
    """What one federated run depends on, besides its data and its initial state."""

    split: str = _one_of("age", *SPLITS)
    age_strength: float = _in(1.0, 0, 1)  # 0: as IID; 1: clients hold disjoint age ranges
    quantity_ratio: float = _in(9.0, 1, 1000)  # largest client over smallest, in images
    dirichlet_concentration: float = _in(0.5, 0.01, 1e6)  # small: each client lives in few age bands
    arms: str = _some_of("federated,centralised,standalone", *ARMS)
    inits: str = _some_of("random,pretraining,fm", *INITS)
    # A split by age cannot deal an image without an age. leave_out: no client holds one, under any split, so
    # that all splits train on the same images. auto: leave_out where a split of the study deals by age.
    images_without_age: str = _one_of("auto", "auto", "keep", "leave_out")
    num_clients: int = _in(3, 1, 100_000)
    num_rounds: int = _in(5, 1, 100_000)  # paper: 100
    local_epochs: int = _in(1, 1, 1000)  # E in McMahan et al. 2017; paper: 5
    batch_size: int = _in(8, 1, 4096)  # B, images a local step
    learning_rate: float = _in(1e-3, 0, 10)  # of the clients' Adam; paper: 1e-4
    proximal: float = _in(0.0, 0, 1000)  # mu of FedProx (Li et al. 2020, arXiv 1812.06127); 0: FedAvg
    loss: str = _one_of("dice", "dice", "dice_bce")  # the paper names the Dice loss
    optimizer_state: str = _one_of("reset", "reset", "keep")  # of a client's Adam between rounds
    # BatchNorm: averaged with the weights; a client's own (FedBN: Li et al. 2021, arXiv 2102.07623); or
    # GroupNorm in its place, in every arm and start (Hsieh et al. 2020, arXiv 1910.00189).
    batch_norm: str = _one_of("average", "average", "local", "group")
    participation: float = _in(1.0, 0, 1)  # C in McMahan et al. 2017: clients a round, at least one
    client_weights: str = _one_of("images", "images", "uniform")  # in the average; images: Eq. 3
    # The server takes the average, or takes the way there for a gradient (FedAvgM: Hsu et al. 2019, arXiv
    # 1909.06335; FedAdam: Reddi et al. 2021, arXiv 2003.00295).
    server: str = _one_of("average", "average", "momentum", "adam")
    server_learning_rate: float = _in(0.0, 0, 100)  # 0: the usual one, 1 for momentum and 0.01 for adam
    server_momentum: float = _in(0.9, 0, 0.9999)  # beta in FedAvgM, beta_1 in FedAdam
    server_beta2: float = _in(0.99, 0, 0.9999)  # of adam
    server_epsilon: float = _in(1e-3, 1e-12, 1)  # tau in FedAdam: how adaptive adam is, the larger the less
    augmentation: str = _one_of("device", "device", "albumentations", "none")
    score_every: int = _in(1, 1, 100_000)  # rounds; the last round is always scored
    seed: int = _in(0, 0, 2**31)


@dataclass(frozen=True, kw_only=True)
class FlowerConfig:
    """What a run on Flower depends on besides; docs/hospitals.md goes to more than one machine."""

    start: str = ""  # a deployment's first weights, a file of safetensors; empty: random ones by the seed
    test_data: str = ""  # what a deployment's server scores on: folders; empty: none; held_out: part of data
    min_clients: int = _in(2, 1, 100_000)  # good updates that a round needs, or all where fewer are asked
    join_timeout: float = _in(300.0, 0, 1e6)  # seconds to wait for all clients before the first round
    round_timeout: float = _in(3600.0, 1, 1e6)  # seconds to wait for a client's update
    # Differential privacy for whole clients (McMahan et al. 2018, arXiv 1710.06963): updates are clipped by
    # the client, and noise is added to their average.
    privacy: str = _one_of("none", "none", "dp")
    dp_clipping: float = _in(1.0, 1e-6, 1e6)  # C, the most that one client's update may measure (L2)
    dp_noise: float = _in(1.0, 1e-6, 1e6)  # z: the noise on the sum of updates has deviation z C
    dp_delta: float = _in(1e-5, 1e-12, 0.5)  # delta at which epsilon is stated


@dataclass(frozen=True, kw_only=True)
class AnalysisConfig:
    """What the figures and tables ask."""

    target_dice: float = _in(0.9, 0, 1)  # rounds, bytes and seconds are counted up to this Dice
    reference_split: str = _one_of("age", *SPLITS)  # of Table 1
    diagnostics: bool = True  # clients train their first round again, to look at the ground there


STAGES: dict[str, type] = {
    "run": RunConfig,
    "data": DataConfig,
    "teacher": TeacherConfig,
    "distill": DistillConfig,
    "sweep": SweepConfig,
    "federate": FederateConfig,
    "flower": FlowerConfig,
    "analysis": AnalysisConfig,
}

#: What each profile changes against the defaults (= `smoke`, the notebooks' quick run).
PROFILES: dict[str, dict[str, Any]] = {
    "smoke": {},
    # 320: the fewest whose test part has the patients that an interval needs (statistics.MIN_PATIENTS).
    "class": {"num_phantoms": 320, "alpha_sweep": ""},
    "paper": {
        "size": 256,
        "num_phantoms": 6504,
        "student": "unet",
        "num_rounds": 100,
        "local_epochs": 5,
        "batch_size": 16,
        "learning_rate": 1e-4,
        "proxy_epochs": 100,
        "proxy_learning_rate": 1e-4,
        "alpha_sweep": "",
    },
}


@dataclass(frozen=True)
class Settings:
    """All stages' settings of one run."""

    run: RunConfig
    data: DataConfig
    teacher: TeacherConfig
    distill: DistillConfig
    sweep: SweepConfig
    federate: FederateConfig
    flower: FlowerConfig
    analysis: AnalysisConfig

    def flat(self) -> dict[str, Any]:
        """Every parameter by name."""
        return {
            name: value
            for stage in STAGES
            for name, value in dataclasses.asdict(getattr(self, stage)).items()
        }

    def changed(self) -> dict[str, Any]:
        """The parameters that differ from the quick run."""
        return {name: value for name, value in self.flat().items() if value != defaults()[name]}

    @property
    def run_dir(self) -> Path:
        """The run's folder."""
        return paths.RUNS / self.run.run_name


def _fields() -> dict[str, tuple[str, dataclasses.Field]]:
    return {
        field.name: (stage, field) for stage, kind in STAGES.items() for field in dataclasses.fields(kind)
    }


def stage_of() -> dict[str, str]:
    """Every parameter's stage."""
    return {name: stage for name, (stage, _) in _fields().items()}


def defaults() -> dict[str, Any]:
    """Every parameter's default: the quick run."""
    return {name: field.default for name, (_, field) in _fields().items()}


def split_list(text: str) -> list[str]:
    """A comma-separated parameter as a list."""
    return [part.strip() for part in text.split(",") if part.strip()]


def float_list(text: str) -> list[float]:
    """A comma-separated parameter of numbers as a list."""
    return [float(part) for part in split_list(text)]


def checked(name: str, value: Any) -> Any:
    """A parameter's value in its own type.

    Raises:
        UserError: the name is unknown, or the value is of another type or out of range.
    """
    fields = _fields()
    if name not in fields:
        near = difflib.get_close_matches(name, fields, n=1)
        hint = f"did you mean {near[0]}?" if near else "see fmfl/config.py for all names"
        raise UserError(f"parameter {name!r} is unknown: {hint}")
    field = fields[name][1]
    kind, rule = field.type, field.metadata
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if kind is str and isinstance(value, list | tuple):
        value = ",".join(map(str, value))
    if "numbers" in rule and isinstance(value, int | float) and not isinstance(value, bool):
        value = f"{value:g}"  # papermill reads a list of one as a number
    if kind is str and isinstance(value, os.PathLike):
        value = str(value)
    if type(value) is not kind:
        raise UserError(f"parameter {name} must be {_a(kind)}, not {value!r} ({type(value).__name__})")
    if "choices" in rule:
        chosen = split_list(value) if rule.get("several") else [value]
        wrong = [item for item in chosen if item not in rule["choices"]]
        if wrong or not (chosen or rule.get("none")):
            what = "some of" if rule.get("several") else "one of"
            found = repr(wrong[0]) if wrong else "empty"
            raise UserError(f"parameter {name} is {found}: choose {what} {', '.join(rule['choices'])}")
        if len(set(chosen)) < len(chosen):
            raise UserError(f"parameter {name} = {value!r} names one choice twice: name each once")
    if "numbers" in rule:
        _check_numbers(name, value, *rule["numbers"])
    low, high = rule.get("low"), rule.get("high")
    # Written so that NaN fails too.
    if (low is not None and not value >= low) or (high is not None and not value <= high):
        if high is None:
            raise UserError(f"parameter {name} is {value}: it must be at least {low:g}")
        raise UserError(f"parameter {name} is {value}: it must lie between {low:g} and {high:g}")
    multiple = rule.get("multiple", 1)
    if multiple > 1 and value % multiple:
        below = value - value % multiple
        raise UserError(
            f"parameter {name} is {value}: it must be a multiple of {multiple}, such as {below or multiple}"
        )
    return value


def _check_numbers(name: str, text: str, low: float, high: float) -> None:
    """Each part of a comma-separated text is a number in the range, and none is there twice."""
    found = []
    for part in split_list(text):
        try:
            found.append(float(part))
        except ValueError:
            raise UserError(
                f"parameter {name} holds {part!r}: give numbers joined by commas, such as {low:g},{high:g}"
            ) from None
        if not low <= found[-1] <= high:
            raise UserError(f"parameter {name} holds {part}: each must lie between {low:g} and {high:g}")
    if len(set(found)) < len(found):
        raise UserError(f"parameter {name} = {text!r} names one number twice: name each once")


def _a(kind: type) -> str:
    return {int: "a whole number", float: "a number", str: "a text", bool: "True or False"}[kind]


def parse(name: str, text: str) -> Any:
    """A parameter given as text on a command line, in its own type: `"1e-4"` becomes a number.

    Raises:
        UserError: see `checked`.
    """
    fields = _fields()
    kind = fields[name][1].type if name in fields else str
    if kind is bool:
        return checked(name, {"true": True, "false": False}.get(text.strip().lower(), text))
    if kind is not str:
        try:
            number = float(text)
        except ValueError:
            return checked(name, text)
        return checked(name, int(number) if kind is int and number.is_integer() else number)
    return checked(name, text)


def settings(given: dict[str, Any] | None = None, *, profile: str = "smoke") -> Settings:
    """Settings of a profile with some parameters given.

    Raises:
        UserError: a parameter or the profile is not usable.
    """
    if profile not in PROFILES:
        raise UserError(f"profile {profile!r} is unknown: choose one of {', '.join(PROFILES)}")
    values = PROFILES[profile] | {name: checked(name, value) for name, value in (given or {}).items()}
    fields = _fields()
    return Settings(
        **{
            stage: kind(**{name: value for name, value in values.items() if fields[name][0] == stage})
            for stage, kind in STAGES.items()
        }
    )


PARAMETERS_COMMENT = "# Parameters"
PLAIN_TYPES = (str, int, float, bool, list, tuple, type(None))  # what a parameter can be


def _assigned_in_parameter_cells(cells: list[str]) -> set[str]:
    """The names that the latest version of each parameter cell assigns, from the sources of all cells run."""
    latest = {cell.splitlines()[0]: cell for cell in cells if cell.startswith(PARAMETERS_COMMENT)}
    if not latest:
        raise UserError(
            f"no cell that was run begins with {PARAMETERS_COMMENT!r}: run the parameters cell first, "
            "with that line"
        )
    return {
        node.id
        for cell in latest.values()
        for node in ast.walk(ast.parse(cell))
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
    }


def from_notebook(namespace: dict[str, Any]) -> Settings:
    """Settings from a notebook's variables, for its set-up cell: `cfg = config.from_notebook(globals())`.

    A parameter cell is one whose source begins with `# Parameters`: the notebook's own, and the one
    that papermill injects after it. A name assigned there that is no parameter is an error, so an
    override with a typing mistake cannot be ignored in silence. Of a cell that was corrected and run again,
    told by its first line, only the last version counts.

    Raises:
        UserError: a parameter is unknown, mistyped or out of range, or no parameter cell was run.
    """
    cells = [source.strip() for source in namespace.get("In", [])]
    if any(cells):
        assigned = _assigned_in_parameter_cells(cells)
    else:
        # A runner that keeps no history (nbval): its kernel is fresh, so all plain values are parameters.
        assigned = {
            name
            for name, value in namespace.items()
            if name[0].islower() and isinstance(value, PLAIN_TYPES)  # BOX_RULES was imported
        }
    return settings({name: namespace[name] for name in sorted(assigned)})

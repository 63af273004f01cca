"""The same federated rounds by fmfl and by Flower's simulation: seconds a steady round, and until the first.

Both sides train the same students on the same images with `train.fit`, under the same random keys,
and average them weighted by images. Flower's side is set up as its guide to simulations advises: one core (or
a share of the GPU) a client, actors that stay, and what a client needs kept in the actor between its turns.
`quickstart` is a client as Flower's tutorial for PyTorch has it: a model and a DataLoader for each turn,
here with albumentations on the CPU.
"""

import functools
import importlib.util
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from bench import measure, rounds
from fmfl import federate, losses, models, runs, train
from fmfl.config import FederateConfig
from fmfl.errors import UserError
from fmfl.states import State, read_state, write_state
from fmfl.train import Examples

# ------------------------------------------------------------------------------------------ both sides


def cohort_and_parts(how: dict[str, Any]) -> tuple[measure.Cohort, list[Tensor]]:
    """The images and who holds them, the same in every process."""
    device = measure.the_device(how["device"])
    number = how["clients"] * how["images"]
    cohort = measure.a_cohort(number, how["size"], device)
    return cohort, list(torch.arange(number, device=device).tensor_split(how["clients"]))


def settings(how: dict[str, Any]) -> FederateConfig:
    """Of the training, in fmfl's own words."""
    return FederateConfig(
        num_clients=how["clients"],
        local_epochs=how["epochs"],
        batch_size=how["batch_size"],
        num_rounds=2 * rounds.FOREVER,
        score_every=rounds.FOREVER,
    )


def first_round(out: str) -> Path:
    """Where a side leaves the state after its first round; `out` is for the last."""
    return Path(f"{out}.first")


class Clock:
    """When each round ended: on the wall, and in CPU seconds of this process and all that it has started."""

    def __init__(self) -> None:
        self.ticks: list[tuple[float, float]] = []
        self.tick()

    def tick(self) -> None:
        """A round has ended."""
        here = psutil.Process()
        cpu = 0.0
        for process in (here, *here.children(recursive=True)):
            try:
                spent = process.cpu_times()
            except psutil.NoSuchProcess:
                continue
            cpu += spent.user + spent.system
        self.ticks.append((time.perf_counter(), cpu))

    def found(self) -> dict[str, float]:
        """Seconds of the middle steady round, and what the first took beyond it and its preparation.

        A process that ends takes its CPU seconds along, so those of a start are not told.
        """
        wall, cpu = (np.diff(column) for column in zip(*self.ticks, strict=True))
        steady = float(np.median(wall[1:]))
        return {"round": steady, "round_cpu": float(np.median(cpu[1:])), "start_up": float(wall[0]) - steady}


# ------------------------------------------------------------------------------------------ fmfl


def fmfl_side(how: dict[str, Any], out: str) -> dict[str, float]:
    """The rounds in this process, its clients side by side; the checkpoint of each round is written."""
    clock = Clock()
    cohort, parts = cohort_and_parts(how)
    with tempfile.TemporaryDirectory() as folder:
        run = measure.a_run(Path(folder), cohort, parts, settings(how), how["student"], how["precision"])
        for _ in range(how["rounds"]):
            run.finish_round(federate.aggregate(runs.train_clients(run)), cohort, parts[0][:1])
            clock.tick()
            if run.round_number == 1:
                write_state(first_round(out), run.theta)
        write_state(Path(out), run.theta)
    return clock.found()


# ------------------------------------------------------------------------------------------ Flower


@functools.lru_cache(maxsize=1)
def kept_in_actor(text: str) -> tuple[dict[str, Any], measure.Cohort, list[Tensor], nn.Module]:
    """What an actor holds between its clients' turns: settings, images on the device, one student."""
    how = json.loads(text)
    torch.set_num_threads(1)
    cohort, parts = cohort_and_parts(how)
    return how, cohort, parts, models.build(how["student"], device=cohort.device)


def tuned_client(text: str, number: int, round_number: int, state: State) -> tuple[State, int]:
    """A client's turn with fmfl's own training."""
    how, cohort, parts, model = kept_in_actor(text)
    cfg = settings(how)
    models.load_state(model, state)
    train.fit(
        model,
        Examples(cohort.images, cohort.masks, parts[number]),
        train.LOSSES[cfg.loss],
        epochs=cfg.local_epochs,
        batch_size=cfg.batch_size,
        optimizer=train.adam(model, cfg.learning_rate),
        key=(cfg.seed, number, round_number),
        augmentation=cfg.augmentation,
        precision=how["precision"],
    )
    return model.state_dict(), len(parts[number])


class Pictures(Dataset):
    """Images and masks of one client, augmented one by one by albumentations."""

    def __init__(self, images: np.ndarray, masks: np.ndarray):
        os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"
        import albumentations as A

        self.images, self.masks = images, masks
        self.augment = A.Compose(
            [
                A.HorizontalFlip(p=0.5),
                A.Affine(rotate=(-15, 15), p=1),
                A.RandomBrightnessContrast(brightness_limit=0.2, contrast_limit=0.2, p=1),
            ]
        )

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        found = self.augment(image=self.images[index], mask=self.masks[index])
        image = torch.from_numpy(found["image"]).float()[None] / 255
        return image, torch.from_numpy(found["mask"]).float()[None]


def quickstart_client(text: str, number: int, round_number: int, state: State) -> tuple[State, int]:
    """A client's turn as the tutorial has it; the source of the images is kept, as there."""
    how, cohort, parts, _ = kept_in_actor(text)
    cfg, part = settings(how), parts[number]
    model = models.build(how["student"]).to(memory_format=torch.contiguous_format)
    model.load_state_dict(state)
    model.to(cohort.device).train()
    own = (stored[part, 0].cpu().numpy() for stored in (cohort.images, cohort.masks))
    loader = DataLoader(Pictures(*own), batch_size=cfg.batch_size, shuffle=True)
    optimizer = torch.optim.Adam(model.parameters(), lr=cfg.learning_rate)
    for _ in range(cfg.local_epochs):
        for images, masks in loader:
            images, masks = images.to(cohort.device), masks.to(cohort.device)
            optimizer.zero_grad()
            losses.dice_loss(model(images), masks).backward()
            optimizer.step()
    return model.state_dict(), len(part)


TURNS: dict[str, Callable[..., tuple[State, int]]] = {"tuned": tuned_client, "quickstart": quickstart_client}


def flower_side(how: dict[str, Any], out: str, turn: str) -> dict[str, float]:
    """The rounds under Flower's simulation, without evaluation; `quickstart` with FedAvg as it is."""
    os.environ |= {"FLWR_TELEMETRY_ENABLED": "0", "RAY_USAGE_STATS_ENABLED": "0"}
    from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
    from flwr.clientapp import ClientApp
    from flwr.serverapp import Grid, ServerApp
    from flwr.serverapp.strategy import FedAvg
    from flwr.simulation import run_simulation

    text = json.dumps(how)
    client_app, server_app, clock = ClientApp(), ServerApp(), Clock()

    class InOrder(FedAvg):
        """FedAvg that sums in float64 and in the clients' order.

        Flower's own sums in float32 and as replies come: after one round that is a last bit, of which Adam
        makes steps of its own size in the next ones.
        """

        def aggregate_train(
            self, server_round: int, replies: Iterable[Message]
        ) -> tuple[ArrayRecord, MetricRecord]:
            told = {message.content["metrics"]["client"]: message.content for message in replies}
            updates = ((told[k]["arrays"], told[k]["metrics"]["num-examples"]) for k in sorted(told))
            state = federate.aggregate((arrays.to_torch_state_dict(), images) for arrays, images in updates)
            return ArrayRecord(state), MetricRecord()

    @client_app.train()
    def train_one(message: Message, context: Context) -> Message:
        state = message.content["arrays"].to_torch_state_dict()
        number, round_number = context.node_config["partition-id"], message.content["config"]["server-round"]
        state, images = TURNS[turn](text, int(number), int(round_number), state)
        metrics = MetricRecord({"num-examples": images, "client": int(number)})
        return Message(RecordDict({"arrays": ArrayRecord(state), "metrics": metrics}), reply_to=message)

    @server_app.main()
    def serve(grid: Grid, context: Context) -> None:
        def ended(round_number: int, arrays: ArrayRecord) -> None:
            if round_number:
                clock.tick()
            if round_number == 1:
                write_state(first_round(out), dict(arrays.to_torch_state_dict()))

        every = how["clients"]
        strategy = {"tuned": InOrder, "quickstart": FedAvg}[turn](
            fraction_evaluate=0.0, min_train_nodes=every, min_available_nodes=every
        )
        initial = ArrayRecord(models.build(how["student"]).state_dict())
        found = strategy.start(
            grid, initial, num_rounds=how["rounds"], train_config=ConfigRecord(), evaluate_fn=ended
        )
        write_state(Path(out), dict(found.arrays.to_torch_state_dict()))

    share = {"num_cpus": 1, "num_gpus": 1 / how["actors"] if how["device"] == "cuda" else 0.0}
    run_simulation(
        server_app, client_app, num_supernodes=how["clients"], backend_config={"client_resources": share}
    )
    return clock.found()


# ------------------------------------------------------------------------------------------ the command


def apart(one: Path, other: Path) -> float:
    """The largest difference of two states' floating numbers."""
    ours, theirs = read_state(one)[0], read_state(other)[0]
    return max(
        float((value.double() - theirs[name].double()).abs().max())
        for name, value in ours.items()
        if value.is_floating_point()
    )


SIDES = {
    "fmfl": ("fmfl_side", {}),
    "Flower": ("flower_side", {"turn": "tuned"}),
    "Flower, quickstart": ("flower_side", {"turn": "quickstart"}),
}


def run(
    scenarios: str = "3x96,30x10,100x3",
    size: int = 96,
    student: str = "mobile_unet",
    epochs: int = 1,
    batch_size: int = 8,
    num_rounds: int = 4,
    repeats: int = 3,
    device: str = "cpu",
    precision: str = "float32",
    actors: int = 3,
    out: Path | None = None,
) -> None:
    """Seconds a round and until the first, by fmfl and by Flower's simulation, tuned and as in its tutorial.

    A scenario is CLIENTSxIMAGES, the images being each client's. Every run is a process of its own, the sides
    in turn; a steady round is the middle one after the first. `--actors` share a GPU; on a CPU there is one
    a core.
    """
    for package in ("flwr", "ray"):
        if importlib.util.find_spec(package) is None:
            raise UserError(f"package {package} is missing: pip install 'flwr[simulation]==1.41.0'")
    given = {key: value for key, value in locals().items() if key not in ("out", "package")}
    rows: list[dict[str, Any]] = []
    found: dict[str, Any] = {}
    for scenario in scenarios.split(","):
        clients, images = map(int, scenario.split("x"))
        how = dict(
            clients=clients, images=images, size=size, student=student, epochs=epochs, batch_size=batch_size,
            rounds=num_rounds, device=device, precision=precision, actors=actors,
        )  # fmt: skip
        taken: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
        with tempfile.TemporaryDirectory() as folder:
            files = {side: Path(folder) / f"{k}.safetensors" for k, side in enumerate(SIDES)}
            for turn in range(repeats):
                for side in list(SIDES)[:: -1 if turn % 2 else 1]:
                    function, more = SIDES[side]
                    taken[side].append(
                        measure.in_own_process(
                            "bench.flower", function, how=how, out=str(files[side]), **more
                        )
                    )
            ends = [files[side] for side in ("fmfl", "Flower")]
            found[f"{scenario}_difference_after_one_round"] = apart(*(first_round(str(end)) for end in ends))
            found[f"{scenario}_difference_at_the_end"] = apart(*ends)
        for side, takings in taken.items():
            middle = {key: measure.spread(one[key] for one in takings)["median"] for key in takings[0]}
            rows.append({"scenario": scenario, "side": side, **middle})
        for side in list(SIDES)[1:]:
            for key in ("round", "round_cpu"):
                name = f"{scenario}_fmfl_over_{side.replace(', ', '_')}_{key}"
                pairs = zip(taken["fmfl"], taken[side], strict=True)
                found[name] = measure.spread(ours[key] / theirs[key] for ours, theirs in pairs)
    measure.report("flower", given, rows, found, out, ("torch", "numpy", "flwr", "ray"))

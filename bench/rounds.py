"""What fmfl's round costs over a plain PyTorch loop, and that loop over bare optimizer steps."""

import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

from bench import measure
from fmfl import augment, devices, federate, losses, models, seeds, train
from fmfl.config import FederateConfig
from fmfl.runs import Run
from fmfl.states import State

EPOCHS = 5
CLIENTS = 3
FOREVER = 10**5
"""Rounds until a score is due: none is, while the clock runs."""


def fmfl_round(run: Run, cohort: measure.Cohort) -> State:
    """As the notebook has it: clients, average, checkpoint."""
    number = run.round_number + 1
    updates = (
        run.note(
            k,
            federate.train_client(
                run.model,
                run.theta,
                own,
                run.cfg,
                key=(run.cfg.seed, k, number),
                precision=run.precision,
            ),
        )
        for k, own in run.clients.items()
    )
    state = federate.aggregate(updates)
    run.finish_round(state, cohort, run.clients[0].indices[:1])
    return state


def plain_round(
    model: nn.Module,
    start: State,
    images: Tensor,
    masks: Tensor,
    parts: list[Tensor],
    cfg: FederateConfig,
    round_number: int,
    precision: str,
) -> State:
    """The same round as a loop that anyone would write, with the same augmentation; no file is written."""
    average: State = {}
    total = sum(len(part) for part in parts)
    for k, part in enumerate(parts):
        model.load_state_dict(start)
        model.train()
        optimizer = torch.optim.Adam(model.parameters(), lr=cfg.learning_rate, fused=True)
        for epoch in range(cfg.local_epochs):
            rng = seeds.generator(cfg.seed, k, round_number, epoch)
            order = torch.randperm(len(part), generator=rng).to(images.device)
            draws = augment.draw(len(part), rng).to(images.device)
            steps = -(-len(part) // cfg.batch_size)
            for rows, drawn in zip(order.tensor_split(steps), draws.tensor_split(steps), strict=True):
                chosen = part[rows]
                x, y, _ = augment.apply(images[chosen], masks[chosen], drawn)
                bare_step(model, optimizer, x.contiguous(memory_format=torch.channels_last), y, precision)
        for name, value in model.state_dict().items():
            if value.is_floating_point():
                average[name] = average.get(name, 0) + value * (len(part) / total)
            else:
                average.setdefault(name, value.clone())
    return average


def bare_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, precision: str
) -> None:
    """Forward, backward, step."""
    with devices.autocast(x.device, precision):
        logits = model(x)
    loss = losses.dice_loss(logits.float(), y)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


class Sides:
    """One federated round three ways, each begun from the same state with the same random key."""

    def __init__(
        self, folder: Path, size: int, student: str, images: int, batch_size: int, device: str, precision: str
    ):
        self.device = measure.the_device(device)
        self.cohort = measure.a_cohort(CLIENTS * images, size, self.device)
        self.parts = list(torch.arange(CLIENTS * images, device=self.device).tensor_split(CLIENTS))
        self.cfg = FederateConfig(
            num_clients=CLIENTS,
            local_epochs=EPOCHS,
            batch_size=batch_size,
            num_rounds=2 * FOREVER,
            score_every=FOREVER,
        )
        self.precision = precision
        self.run = measure.a_run(folder, self.cohort, self.parts, self.cfg, student, precision)
        self.start = self.run.theta
        self.model = models.build(student, device=self.device)
        self.optimizer = train.adam(self.model, self.cfg.learning_rate)
        drawn = augment.draw(batch_size, seeds.generator(0)).to(self.device)
        x, y, _ = augment.apply(self.cohort.images[:batch_size], self.cohort.masks[:batch_size], drawn)
        self.batch = x.contiguous(memory_format=torch.channels_last), y
        self.steps = CLIENTS * EPOCHS * -(-images // batch_size)

    def fmfl(self) -> State:
        """Through fmfl's own code, its checkpoint written."""
        self.run.theta, self.run.round_number = self.start, 0
        return fmfl_round(self.run, self.cohort)

    def plain(self) -> State:
        """The loop that anyone would write."""
        images, masks = self.cohort.images, self.cohort.masks
        return plain_round(self.model, self.start, images, masks, self.parts, self.cfg, 1, self.precision)

    def bare(self) -> None:
        """As many steps on one resident batch."""
        self.model.train()
        for _ in range(self.steps):
            bare_step(self.model, self.optimizer, *self.batch, self.precision)


def difference(one: State, other: State) -> float:
    """The largest between two states' numbers."""
    return max(float((one[name].double() - other[name].double()).abs().max()) for name in one)


def run(
    size: int = 96,
    student: str = "mobile_unet",
    images: int = 64,
    batch_size: int = 8,
    repeats: int = 9,
    device: str = "cpu",
    precision: str = "float32",
    threads: int = 0,
    out: Path | None = None,
) -> None:
    """One round of 3 clients and 5 epochs: fmfl over a plain PyTorch loop, and that over bare steps.

    `--images` is a client's number, `--batch-size` should divide it, `--threads 0` is one a core.
    """
    settings = {key: value for key, value in locals().items() if key != "out"}
    if threads:
        torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as folder:
        sides = Sides(Path(folder), size, student, images, batch_size, device, precision)
        apart = difference(sides.fmfl(), sides.plain())
        taken = measure.interleaved(
            {"fmfl": sides.fmfl, "plain loop": sides.plain, "bare steps": sides.bare}, repeats, sides.device
        )
    rows = [
        {
            "side": name,
            "seconds": measure.median_seconds(times),
            "cpu_seconds": measure.median_seconds(times, "cpu"),
            "images_per_second": CLIENTS * EPOCHS * images / measure.median_seconds(times),
        }
        for name, times in taken.items()
    ]
    found: dict[str, object] = {"threads": torch.get_num_threads(), "steps": sides.steps}
    for clock in ("wall", "cpu"):
        found[f"fmfl_over_plain_{clock}"] = measure.ratio(taken["fmfl"], taken["plain loop"], clock)
        found[f"plain_over_bare_{clock}"] = measure.ratio(taken["plain loop"], taken["bare steps"], clock)
    found["fmfl_over_plain_fastest"] = measure.fastest(taken["fmfl"], taken["plain loop"])
    found["plain_over_bare_fastest"] = measure.fastest(taken["plain loop"], taken["bare steps"])
    found["largest_difference_of_weights"] = apart
    measure.report("rounds", settings, rows, found, out)

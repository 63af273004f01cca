"""The server of a deployment: all rounds of one run at Flower's nodes, and its results."""

import logging
from functools import partial
from pathlib import Path

import pandas as pd
import torch
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from torch import Tensor

from fmfl import data, devices, federate, models, parallel, runs, states
from fmfl.analysis import landscape
from fmfl.config import Settings
from fmfl.data import Cohort
from fmfl.distill import InitialState
from fmfl.errors import UserError
from fmfl.flower.client import load, settings_of
from fmfl.flower.messages import layout
from fmfl.flower.nodes import Nodes, log, train_round
from fmfl.runs import Run
from fmfl.study import outputs, stages, tracking
from fmfl.train import Examples, FitResult

#: Value of `test_data` for the test images of `data`.
HELD_OUT = "held_out"


def serve(grid: Grid, cfg: Settings) -> Run:
    """Train all rounds of a deployment, from its start or its last checkpoint, and write the results.

    `results.csv` and `faults.csv` are written after each round, `per_image.csv` at the end.

    Raises:
        UserError: a setting does not fit, the folder holds another run, or a round had too few good updates.
    """
    cohort, test = _test_images(cfg)
    run = tracking.follow(cfg, _start_or_resume(cfg, cohort, test))
    (cfg.run_dir / "per_image.csv").unlink(missing_ok=True)
    log.info("start %s, round %d of %d", run.init, run.round_number, cfg.federate.num_rounds)
    train = landscape.watched(partial(train_round, Nodes(grid, cfg)))
    for number in run.remaining_rounds():
        try:
            theta = federate.aggregate(train(run))
        except UserError:
            _write(cfg, run, stopped=number)
            raise
        with parallel.one_thread(cohort.device):
            run.finish_round(theta, cohort, test)
        _write(cfg, run)
        log.info("round %d: clients %s, %s", number, run.rounds[-1]["clients"], _dice(run))
    if len(test):
        outputs.write_text(cfg.run_dir / "per_image.csv", run.per_image(cohort, test).to_csv(index=False))
    return run


def _start_or_resume(cfg: Settings, cohort: Cohort, test: Tensor) -> Run:
    initial = _initial_state(cfg, cohort.device)
    _check_folder(cfg, initial.name)
    none = torch.empty(0, dtype=torch.int64, device=cohort.images.device)
    return runs.start_or_resume(
        cfg.run_dir,
        initial,
        {k: Examples(cohort.images, cohort.masks, none) for k in range(cfg.federate.num_clients)},
        cfg.federate,
        student=cfg.distill.student,
        cohort=cohort,
        test=test,
        precision=devices.precision_of(cfg.run),
        engine=stages.engine_key(cfg),
        move_aside=False,
    )


def _check_folder(cfg: Settings, init: str) -> None:
    """Raise a UserError where the results' folder holds a study, or a deployment's other run."""
    if any((cfg.run_dir / "cells").glob("*/cell.json")):
        raise UserError(f"{cfg.run_dir} holds a study: name another folder with --out")
    own = f"federated-{cfg.federate.split}-{init}-seed{cfg.federate.seed}"
    for file in sorted((cfg.run_dir / "weights").glob("federated-*.safetensors")):
        if file.stem != own:
            raise UserError(f"{file} is of another run than {own}: name another folder with --out")


def _dice(run: Run) -> str:
    scored = run.history[-1]
    return f"Dice {scored['dice']:.4f}" if scored["round"] == run.round_number else "not scored"


def _write(cfg: Settings, run: Run, stopped: int = 0) -> None:
    """Write the rounds so far and their faults; `stopped` is a round that could not be finished."""
    outputs.write_text(cfg.run_dir / "results.csv", pd.DataFrame(run.history).to_csv(index=False))
    rounds = list(enumerate(done.get("faults", {}) for done in run.rounds))
    if stopped and run.traffic:
        rounds.append((stopped, run.traffic.faults))
    rows = [(number, int(k), fault) for number, faults in rounds for k, fault in faults.items()]
    table = pd.DataFrame(rows, columns=["round", "client", "fault"])
    outputs.write_text(cfg.run_dir / "faults.csv", table.to_csv(index=False))


def _test_images(cfg: Settings) -> tuple[Cohort, Tensor]:
    """Return the images that the server scores on: of its own folders, of `data`, or none."""
    if cfg.flower.test_data == HELD_OUT:
        cohort = stages.load_cohort(cfg)
        return cohort, stages.holdout(cfg, cohort).test
    if cfg.flower.test_data:
        cohort = load(cfg.flower.test_data, cfg)
        return cohort, torch.arange(len(cohort), device=cohort.images.device)
    devices.set_determinism(cfg.run)
    device, size = devices.device_of(cfg.run), cfg.data.size
    nothing = torch.empty((0, 1, size, size), dtype=torch.uint8, device=device)
    table = pd.DataFrame(columns=list(data.COLUMNS))
    cohort = Cohort(nothing, nothing, table, pd.DataFrame(), "no test images")
    return cohort, torch.empty(0, dtype=torch.int64, device=device)


def _initial_state(cfg: Settings, device: torch.device) -> InitialState:
    """Return the state that a deployment begins from: a file's, or random weights."""
    model = models.build(
        cfg.distill.student, seed=cfg.federate.seed, device=device, batch_norm=cfg.federate.batch_norm
    )
    random = models.copy_state(model)
    if not cfg.flower.start:
        return InitialState("random", random, FitResult())
    file = Path(cfg.flower.start)
    if (stored := states.read_state(file, device=device)) is None:
        raise UserError(f"start {file} is missing or damaged: name a file of safetensors, such as an init-*")
    state, record = stored
    own = {name: value for name, value in state.items() if not name.startswith(runs.KEPT)}
    if layout(own) != layout(random):  # one with BatchNorm has all names of one with GroupNorm, and more
        raise UserError(
            f"start {file} does not hold the weights of student {cfg.distill.student!r} with batch_norm "
            f"{cfg.federate.batch_norm!r}: choose the student and the batch_norm that it was made with"
        )
    fit = FitResult(**record.get("fit", record.get("fitted", {})))  # older files have "fitted"
    return InitialState(record.get("init", file.stem), {name: state[name] for name in random}, fit)


server_app = ServerApp()


@server_app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the server's part of the app."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    log.setLevel(logging.INFO)
    try:
        serve(grid, settings_of(context))
    except UserError as error:
        log.error("%s", error)
        raise

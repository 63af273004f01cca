"""Progress of a study: a bar in estimated seconds, with the notebook that runs and the time left.

A finished cell counts with its estimated cost, so the bar's own speed corrects an estimate that is wrong by
one factor. Inside a cell it follows the checkpoints of the federated rounds, which every process that shares
the study's folder can see; the rest of a cell goes by the clock.
"""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

from tqdm import tqdm

from fmfl import states
from fmfl.study.cells import Cell, training_runs
from fmfl.study.cost import Cost

#: Seconds between two looks at the checkpoints.
LOOK_SECONDS = 1.0

#: Share of its estimated time that a cell without rounds comes to before it is finished.
ALMOST = 0.95

#: Bar with its time left, which has no unit to show.
FORMAT = "{desc} {percentage:3.0f}%|{bar}| {elapsed} gone, {remaining} left"


class Running(NamedTuple):
    """Cell that this process runs, and the time at which it began."""

    cell: Cell
    since: float


class Watch:
    """Count of a study's finished work, in estimated seconds.

    Args:
        cells: of the whole plan.
        costs: of those that were not done when the study began.
    """

    def __init__(self, cells: list[Cell], costs: Mapping[str, Cost]) -> None:
        self.cells, self.costs = cells, costs
        self.finished = {cell.key for cell in cells if cell.key not in costs}
        self.running: Running | None = None
        self.pace = 1.0
        self.look: Callable[[], None] = lambda: None

    @property
    def total(self) -> float:
        """Estimated seconds of all cells that were not done."""
        return sum(cost.seconds for cost in self.costs.values())

    def begin(self, cell: Cell) -> None:
        """Note the cell that begins now."""
        self.running = Running(cell, time.monotonic())
        self.look()

    def end(self, cell: Cell) -> None:
        """Note a finished cell; how long it took corrects what is expected of the next ones."""
        self.finished.add(cell.key)
        if self.running and cell.key in self.costs:
            self.pace = max(0.1, (time.monotonic() - self.running.since) / self.costs[cell.key].seconds)
        self.running = None
        if len(self.finished) == len(self.cells):
            self.look()

    def title(self) -> str:
        """Name the notebook that runs, and its number in the plan."""
        running = self.running  # read once: the bar's thread looks while a cell ends
        name = running.cell.key if running else "waiting for another process"
        number = min(len(self.finished) + 1, len(self.cells))
        return f"{number} of {len(self.cells)}: {name}" if len(self.finished) < len(self.cells) else "study"

    def done(self) -> float:
        """Estimated seconds of what is done, here and by other processes."""
        return sum(
            cost.seconds if key in self.finished else self._within(cell, cost)
            for cell in self.cells
            if (key := cell.key) in self.costs
            for cost in [self.costs[key]]
        )

    def _within(self, cell: Cell, cost: Cost) -> float:
        """Estimated seconds of what is done in a cell that is not finished."""
        rounds = cost.rounds * rounds_done(cell) / cell.rounds if cell.rounds else 0.0
        running = self.running
        if running is None or running.cell is not cell:
            return rounds
        gone = (time.monotonic() - running.since) / self.pace
        return rounds + min(gone, ALMOST * (cost.seconds - cost.rounds))


def rounds_done(cell: Cell) -> float:
    """Count a cell's finished rounds by their checkpoints; a standalone client's count by its share."""
    done = 0.0
    for name, share in training_runs(cell.cfg).items():
        record = states.read_record(cell.cfg.run_dir / "weights" / f"{name}.safetensors")
        done += share * min(cell.cfg.federate.num_rounds, record.get("round_number", 0))
    return done


@contextlib.contextmanager
def shown(watch: Watch) -> Iterator[Watch]:
    """Show a bar over a watch's seconds, and look at it each second."""
    stop, lock = threading.Event(), threading.Lock()
    with tqdm(total=watch.total, bar_format=FORMAT, dynamic_ncols=True, smoothing=0) as bar:
        bar.n = bar.initial = watch.done()

        def look() -> None:
            with lock:
                bar.n = max(bar.n, min(watch.total, watch.done()))
                bar.set_description_str(watch.title())

        def watching() -> None:
            while not stop.wait(LOOK_SECONDS):
                look()

        thread = threading.Thread(target=watching, daemon=True)
        thread.start()
        watch.look = look
        try:
            yield watch
        finally:
            stop.set()
            thread.join()

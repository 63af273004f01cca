"""Points for TensorBoard: a run's scores by round, a start's loss by epoch. Off unless `track` asks for it.

The points are a copy for looking at, below `tensorboard/` in the study's folder. Nothing is computed for them
and nothing reads them back. A run that goes on after a stop writes all of its points anew, so that no round
is there twice, and none is missing that was finished while tracking was off.
"""

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from fmfl.config import Settings
from fmfl.errors import UserError
from fmfl.runs import Run
from fmfl.train import FitResult

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

#: Columns of a run's history that become curves.
CURVES = ("dice", "iou", "hd95", "seconds", "images_seen", "bytes_up", "bytes_down")

#: Folder of the points in a study's folder, with a folder for each run and each start.
FOLDER = "tensorboard"


def check(cfg: Settings) -> None:
    """Raise a UserError where points are wanted and TensorBoard is not installed."""
    if cfg.run.track == "tensorboard" and find_spec("tensorboard") is None:
        raise UserError(
            "track is tensorboard, but that package is not installed: "
            "pip install -c requirements.lock -e '.[track]', or set track to none"
        )


def follow(cfg: Settings, run: Run) -> Run:
    """Write the points of a run's rounds so far, and of each round to come when it is finished."""
    if cfg.run.track == "tensorboard":
        check(cfg)
        run.observers.append(_Points(cfg.run_dir / FOLDER / run.file.stem, run))
    return run


def write_losses(cfg: Settings, name: str, fit: FitResult) -> None:
    """Write the loss of each epoch of a start's training, and its seconds."""
    if cfg.run.track == "tensorboard" and fit.losses:
        with _emptied(cfg.run_dir / FOLDER / name) as writer:
            for epoch, loss in enumerate(fit.losses, 1):
                writer.add_scalar("loss", loss, epoch)
            writer.add_scalar("seconds", fit.seconds, len(fit.losses))


class _Points:
    """Writer of one run's points, called after each of its rounds."""

    def __init__(self, folder: Path, run: Run) -> None:
        self.writer, self.written = _emptied(folder), 0
        self(run)

    def __call__(self, run: Run) -> None:
        for row in run.history[self.written :]:
            for name in CURVES:
                self.writer.add_scalar(name, row[name], row["round"])
        self.written = len(run.history)
        self.writer.flush()
        if run.round_number == run.cfg.num_rounds:
            self.writer.close()


def _emptied(folder: Path) -> "SummaryWriter":
    """Return a writer into a folder, without the points of an earlier one."""
    from torch.utils.tensorboard import SummaryWriter

    for file in folder.glob("events.out.tfevents.*"):
        file.unlink()
    return SummaryWriter(folder)

"""Two trainings side by side on one core each, against one after the other on all cores."""

from pathlib import Path

import torch

from bench import measure
from fmfl import models, parallel, train
from fmfl.config import FederateConfig
from fmfl.train import Examples


def run(
    size: int = 96,
    student: str = "mobile_unet",
    batch_size: int = 8,
    steps: int = 10,
    repeats: int = 5,
    out: Path | None = None,
) -> None:
    """Two trainings side by side on one core each, against one after the other on all cores."""
    settings = {key: value for key, value in locals().items() if key != "out"}
    device = torch.device("cpu")
    cohort = measure.a_cohort(batch_size * steps, size)
    examples = Examples(cohort.images, cohort.masks, torch.arange(len(cohort)))
    cfg = FederateConfig(batch_size=batch_size)

    def one_training(number: int) -> None:
        model = models.build(student, seed=number)
        train.fit(
            model,
            examples,
            train.LOSSES[cfg.loss],
            epochs=1,
            batch_size=batch_size,
            optimizer=train.adam(model, cfg.learning_rate),
            key=(number,),
        )

    taken = measure.interleaved(
        {
            "side by side": lambda: parallel.side_by_side(one_training, (0, 1), device),
            "one by one": lambda: (one_training(0), one_training(1)),
        },
        repeats,
        device,
    )
    rows = [
        {"trainings": name, "images_per_second": 2 * len(cohort) / measure.median_seconds(times)}
        for name, times in taken.items()
    ]
    found = {
        "threads": torch.get_num_threads(),
        "side_by_side_over_one_by_one": measure.ratio(taken["side by side"], taken["one by one"]),
    }
    measure.report("threads", settings, rows, found, out)

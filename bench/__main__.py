"""``python -m bench NAME``: each command prints a table and one JSON line."""

import json
import statistics
import time

import torch
import typer

from fmfl import models, train
from fmfl.config import FederateConfig
from fmfl.train import Examples

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__)


@app.callback()
def _main() -> None:
    """Benchmarks of fmfl."""


@app.command()
def threads(
    size: int = 96, student: str = "mobile_unet", batch_size: int = 8, steps: int = 10, repeats: int = 5
):
    """Two trainings side by side on one core each, against one after the other on all cores."""
    device = torch.device("cpu")
    rng = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (batch_size * steps, 1, size, size), dtype=torch.uint8, generator=rng)
    masks = (images > 127).to(torch.uint8)
    examples = Examples(images, masks, torch.arange(len(images)))
    cfg = FederateConfig(batch_size=batch_size)

    def one_training(number: int) -> None:
        model = models.build(student, seed=number)
        optimizer = train.adam(model, cfg.learning_rate)
        train.fit(
            model,
            examples,
            train.LOSSES[cfg.loss],
            epochs=1,
            batch_size=batch_size,
            optimizer=optimizer,
            key=(number,),
        )

    def seconds(run) -> float:
        started = time.perf_counter()
        run()
        return time.perf_counter() - started

    def beside() -> None:
        train.side_by_side(one_training, (0, 1), device)

    def after() -> None:
        one_training(0)
        one_training(1)

    beside(), after()  # warm-up
    pairs = [(seconds(beside), seconds(after)) for _ in range(repeats)]  # interleaved: the machine may drift
    found = {
        "bench": "threads",
        "cores": torch.get_num_threads(),
        "size": size,
        "student": student,
        "batch_size": batch_size,
        "images_per_second_side_by_side": 2 * len(images) / statistics.median(a for a, _ in pairs),
        "images_per_second_one_by_one": 2 * len(images) / statistics.median(b for _, b in pairs),
        "ratio_of_times": statistics.median(a / b for a, b in pairs),
    }
    for name, value in found.items():
        print(f"{name:32} {value:.3g}" if isinstance(value, float) else f"{name:32} {value}")
    print(json.dumps(found))


if __name__ == "__main__":
    app()

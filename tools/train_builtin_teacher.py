"""Training of the built-in teacher: `python tools/train_builtin_teacher.py train FOLDERS`; `score` tests it.

A small Segment Anything model learns lungs from box prompts on chest X-rays that are never part of the
study, and on synthetic ones. data/README.md records the training of the shipped weights.
"""

import json
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
import typer
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from fmfl import data, metrics, prompts, teacher
from fmfl.teachers import builtin

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")

app = typer.Typer(add_completion=False, help="Train the built-in teacher, or score it.")

#: Montgomery County's masks leave the heart out, V7's include most of the lung behind it. Pixels between the
#: lungs of these sites' images are not scored, so that they teach nothing about the heart.
HEART_EXCLUDED = ("montgomery",)

#: The shipped network but for its input's size; written into the weights' file.
NETWORK = dict(
    patch_size=8, width=128, depth=4, num_heads=4, window_size=8, global_attention=[1, 3], prompt_width=128
)


class Pool(NamedTuple):
    """Images to draw from, their masks, [N, H, W] uint8, and which masks leave the heart out, [N] bool."""

    images: np.ndarray
    masks: np.ndarray
    heart_excluded: np.ndarray


def augmentation():
    """Return strong changes of geometry and film, beyond the students': the teacher serves unseen sites."""
    import albumentations as A

    return A.Compose(
        [
            A.HorizontalFlip(p=0.5),
            A.Affine(
                scale={"x": (0.75, 1.2), "y": (0.75, 1.2)},
                keep_ratio=False,
                translate_percent=(-0.08, 0.08),
                rotate=(-20, 20),
                shear=(-6, 6),
                p=0.95,
            ),
            A.GridDistortion(num_steps=4, distort_limit=0.2, p=0.3),
            A.RandomGamma(gamma_limit=(50, 200), p=0.6),
            A.RandomBrightnessContrast(brightness_limit=0.25, contrast_limit=0.4, p=0.6),
            A.CLAHE(clip_limit=(1, 4), tile_grid_size=(4, 4), p=0.15),
            A.GaussianBlur(blur_limit=(3, 5), p=0.15),
            A.GaussNoise(std_range=(0.01, 0.08), p=0.3),
            A.CoarseDropout(
                num_holes_range=(1, 5),
                hole_height_range=(0.03, 0.25),
                hole_width_range=(0.02, 0.25),
                fill="random_uniform",
                p=0.3,
            ),
        ]
    )


def between_the_lungs(mask: np.ndarray) -> np.ndarray:
    """Return the background pixels of [H, W] that have lung on both sides in their row."""
    inside = mask > 0
    return (
        ~inside & np.logical_or.accumulate(inside, 1) & np.logical_or.accumulate(inside[:, ::-1], 1)[:, ::-1]
    )


def drawn_prompts(masks: Tensor, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Return a mix of boxes as users draw them: a box a lung or one for both, exact, sloppy, or whole image.

    Returns:
        [P] image numbers, [P, 4] boxes and [P, 1, H, W] float targets, one a box.
    """
    per_lung = prompts.boxes_from_masks(masks, per_image="per_lung")
    together = prompts.boxes_from_masks(masks, per_image="one")[:, 0]
    columns = torch.arange(size).view(1, 1, size)
    image, boxes, targets = [], [], []
    for i in range(len(masks)):
        kind, sloppy = torch.rand(2, generator=generator).tolist()
        mask = masks[i].float()
        both = not per_lung[i].isnan().any()
        if kind < 0.6 and both:
            left, right = per_lung[i]
            # A pixel belongs to the lung whose box holds it; where both do, to the nearer box centre.
            middle = (left[0] + left[2] + right[0] + right[2]) / 4
            in_left, in_right = columns <= left[2], columns >= right[0]
            first = in_left & (~in_right | (columns <= middle))
            rows = [(left, mask * first), (right, mask * ~first)]
        elif kind < 0.92:
            rows = [(together[i], mask)]
        else:
            rows = [(torch.tensor([0.0, 0.0, size - 1, size - 1]), mask)]
        for box, target in rows:
            pixels = 8.0 if sloppy < 0.2 else 3.0 if sloppy < 0.6 else 0.0
            image.append(i)
            boxes.append(prompts.jitter(box, size, generator, pixels=pixels))
            targets.append(target)
    return torch.tensor(image), torch.stack(boxes), torch.stack(targets)


def loss_of(logits: Tensor, iou: Tensor, targets: Tensor, scored: Tensor) -> Tensor:
    """Return cross-entropy + Dice on the scored pixels, and the square error of the predicted IoU."""
    cross_entropy = (F.binary_cross_entropy_with_logits(logits, targets, reduction="none") * scored).mean()
    p, y = logits.sigmoid() * scored, targets * scored
    dice = 1 - (2 * (p * y).sum((1, 2, 3)) + 1) / (p.sum((1, 2, 3)) + y.sum((1, 2, 3)) + 1)
    with torch.no_grad():
        hard = (logits > 0) * scored
        union = ((hard + y) > 0).sum((1, 2, 3)).clamp(min=1)
        true_iou = (hard * y).sum((1, 2, 3)) / union
    return cross_entropy + dice.mean() + 0.05 * F.mse_loss(iou[:, 0], true_iou)


def scores(frozen: teacher.Teacher, images: Tensor, masks: Tensor) -> dict[str, float]:
    """Return the mean Dice by box rule and number of boxes."""
    boxes = {"whole_image": prompts.prompt(masks, "whole_image")}
    for rule in ("ground_truth", "ground_truth_jitter"):
        for per_image in prompts.BOXES_PER_IMAGE:
            boxes[f"{rule}, {per_image}"] = prompts.prompt(masks, rule, per_image=per_image)
    answers = frozen.answers(images, list(boxes.values()))
    return {
        rule: round(metrics.dice(logits > 0, masks).mean().item(), 4)
        for rule, logits in zip(boxes, answers, strict=True)
    }


def a_twelfth(table: pd.DataFrame, rng: np.random.Generator) -> np.ndarray:
    """Return the images of a twelfth of the patients, [N] bool."""
    patients = sorted(set(table.patient_id))
    chosen = set(rng.choice(patients, len(patients) // 12, replace=False))
    return table.patient_id.isin(chosen).to_numpy(copy=True)


def pool_of(cohort: data.Cohort, chosen: np.ndarray) -> Pool:
    """Return the chosen images of a cohort, [N] bool."""
    heart_excluded = cohort.table.site[chosen].isin(HEART_EXCLUDED).to_numpy()
    return Pool(cohort.images.numpy()[chosen, 0], cohort.masks.numpy()[chosen, 0], heart_excluded)


def drawn_images(
    pools: list[Pool], share: float, rng: np.random.Generator, seed: int
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yield augmented images without end, `share` of them from the second pool.

    Yields:
        image and mask, [H, W] uint8, and the scored pixels, [H, W] bool.
    """
    transform = augmentation()
    transform.set_random_seed(seed)
    orders: list[list[int]] = [[], []]
    while True:
        number = int(rng.random() < share)
        pool, order = pools[number], orders[number]
        if not order:
            # Montgomery's are the corpus's only adults, so each is seen twice as often.
            order += rng.permutation(np.repeat(np.arange(len(pool.images)), 1 + pool.heart_excluded)).tolist()
        i = order.pop()
        moved = transform(image=pool.images[i], mask=pool.masks[i])
        image, mask = moved["image"], moved["mask"]
        if mask.sum() > 0.03 * mask.size:
            scored = ~between_the_lungs(mask) if pool.heart_excluded[i] else np.ones_like(mask, bool)
            yield image, mask, scored


def optimizer_of(
    sam: torch.nn.Module, learning_rate: float, weight_decay: float, steps: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """Return AdamW with weight decay on matrices alone, and its schedule: warm-up, then cosine to zero."""
    decayed = [p for p in sam.parameters() if p.ndim > 1]
    others = [p for p in sam.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}],
        lr=learning_rate,
        betas=(0.9, 0.98),
        fused=True,
    )
    warm_up = max(1, min(400, steps // 10))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warm_up, 0.5 * (1 + math.cos(math.pi * step / steps)) + 1e-3),
    )
    return optimizer, schedule


def batch_loss(
    sam: torch.nn.Module, batch: list[tuple[np.ndarray, np.ndarray, np.ndarray]], generator: torch.Generator
) -> Tensor:
    """Return `loss_of` a batch of drawn images, each asked with drawn boxes."""
    images, masks, scored = (torch.from_numpy(np.stack(part))[:, None] for part in zip(*batch, strict=True))
    size, device = images.shape[-1], sam.device
    image, boxes, targets = drawn_prompts(masks, size, generator)
    embeddings = sam.image_encoder(builtin.standardise(images.float().to(device)))
    low, iou = teacher.decode(sam, embeddings[image.to(device)], boxes.to(device))
    logits = F.interpolate(low, (size, size), mode="bilinear", align_corners=False)
    return loss_of(logits, iou, targets.to(device), scored[image].float().to(device))


def write_weights(out: Path, sam: torch.nn.Module, network: dict, record: dict) -> None:
    """Write weights (float16) with the network's settings and the record of their training."""
    state = {key: value.half().contiguous().cpu() for key, value in sam.state_dict().items()}
    metadata = {"network": json.dumps(network), "training": json.dumps(record), "licence": "CC BY 4.0"}
    unfinished = out.with_suffix(f".{os.getpid()}")
    save_file(state, unfinished, metadata)
    os.replace(unfinished, out)


@app.command()
def train(
    corpus: str = typer.Argument(help="folders of chest X-rays, joined by commas; never the study's"),
    out: Path = typer.Option(teacher.BUILTIN_WEIGHTS, help="the weights' file"),
    steps: int = 6500,
    batch_size: int = 8,
    learning_rate: float = 8e-4,
    weight_decay: float = 0.05,
    num_phantoms: int = 1500,
    phantom_share: float = 0.25,
    size: int = 128,
    seed: int = 0,
    device: str = "cpu",
    progress: bool = True,
) -> None:
    """Train the built-in teacher and write its weights (float16) with the record of how they were made."""
    given = dict(
        batch_size=batch_size,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        num_phantoms=num_phantoms,
        phantom_share=phantom_share,
        seed=seed,
    )
    started = time.perf_counter()
    out.parent.mkdir(parents=True, exist_ok=True)  # a folder that cannot be made is found before the hours
    torch.manual_seed(seed)
    generator, rng = torch.Generator().manual_seed(seed), np.random.default_rng(seed)
    real = data.load(corpus, size=size)
    made = data.load("phantom", size=size, num_phantoms=num_phantoms, phantom_seed=seed + 1_000_000)
    held_out = a_twelfth(real.table, rng)
    about = {
        "corpus_images": len(real),
        "corpus_fingerprint": real.fingerprint,
        "held_out_images": int(held_out.sum()),
    }
    network = {"size": size} | NETWORK
    sam = builtin.network(**network).to(device)
    average = AveragedModel(sam, multi_avg_fn=get_ema_multi_avg_fn(0.998))
    optimizer, schedule = optimizer_of(sam, learning_rate, weight_decay, steps)
    pools = [pool_of(real, ~held_out), pool_of(made, np.ones(len(made), bool))]
    images = drawn_images(pools, phantom_share, rng, seed)
    bar = tqdm(range(1, steps + 1), disable=not progress, mininterval=60, maxinterval=120)
    for step in bar:
        sam.train()
        loss = batch_loss(sam, [next(images) for _ in range(batch_size)], generator)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(sam.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        average.update_parameters(sam)
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
        if step % 500 == 0 or step == steps:
            frozen = teacher.Teacher("builtin", average.module.eval(), size, builtin.CONVENTION, sha256="")
            dice = scores(frozen, real.images[held_out].to(device), real.masks[held_out].to(device))
            minutes = round((time.perf_counter() - started) / 60, 1)
            record = {"steps": step, "planned_steps": steps} | given | about
            record |= {"held_out_dice": dice, "torch": torch.__version__, "minutes": minutes}
            tqdm.write(json.dumps(record))
            write_weights(out, average.module, network, record)


@app.command("score")
def score_on(
    source: str = typer.Argument(help="phantom, or folders of chest X-rays, joined by commas"),
    checkpoint: Path = typer.Option(teacher.BUILTIN_WEIGHTS, help="the weights' file"),
    size: int = 128,
    num_phantoms: int = 300,
) -> None:
    """Print the teacher's mean Dice on images, by box rule and by source, as one JSON line a source."""
    frozen = teacher.load("builtin", checkpoint)
    cohort = data.load(source, size=size, num_phantoms=num_phantoms)
    for name, rows in cohort.table.groupby("source").indices.items():
        found = scores(frozen, cohort.images[rows], cohort.masks[rows])
        typer.echo(json.dumps({"source": name, "images": len(rows), "size": size, "dice": found}))


if __name__ == "__main__":
    app()

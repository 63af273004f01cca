"""Is the loaded teacher the one that is meant, and is he asked as his authors ask him?

What can be known depends on the weights. The built-in teacher's answer to one drawn picture is kept in
`data/known_answer.json`. Of others there is the checksum, where their authors or a public registry name
one. For all of them the `segment-anything` package is asked beside this project's own way: one image,
one box.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor

from fmfl import metrics, paths, teacher
from fmfl.errors import UserError
from fmfl.prompts import boxes_from_masks
from fmfl.teacher import Teacher
from fmfl.teachers import checkpoints

RECORD = paths.DATA / "known_answer.json"
STEP = 16  # pixels between the recorded places

#: How far logits may be off. A GPU multiplies float32 with ten bits of mantissa in its convolutions.
TOLERANCE = {"cpu": 1e-3, "cuda": 0.1}

UNKNOWN = "not known"


def drawn_chest() -> tuple[Tensor, Tensor]:
    """Two dark lungs on a bright ground with a fine pattern: whole numbers alone, the same everywhere.

    Returns:
        image and mask, each (1, 1, 112, 96) uint8; not square, so that mixed-up axes show.
    """
    y, x = torch.arange(112)[:, None], torch.arange(96)[None]
    # An ellipse without a division: (x - x0)^2 b^2 + (y - y0)^2 a^2 < a^2 b^2
    a, b = 17, 38
    inside = [(x - x0) ** 2 * b**2 + (y - 56) ** 2 * a**2 < a**2 * b**2 for x0 in (26, 70)]
    mask = (inside[0] | inside[1]).to(torch.uint8)
    image = 185 - 115 * mask.long() + (7 * x + 13 * y) % 17
    return image.to(torch.uint8)[None, None], mask[None, None]


@torch.inference_mode()
def by_the_package(who: Teacher, image: Tensor, boxes: Tensor) -> Tensor:
    """`Teacher.logits` of one image as the package computes it: encoder, prompt, decoder, box by box.

    Args:
        who: the teacher; of `teacher` only his convention for images, boxes and masks is used.
        image: (1, 1, H, W) uint8.
        boxes: [n, 4] in pixels of the image.

    Returns:
        (1, 1, H, W) float32: the largest logit over the boxes.
    """
    height, width = image.shape[-2:]
    embedding = who.sam.image_encoder(who.convention.image(image.to(who.device), who.size))
    found = []
    for box in boxes.to(who.device).split(1):
        scaled = who.convention.boxes(box[:, None], who.size, height, width)[:, 0]
        sparse, dense = who.sam.prompt_encoder(points=None, boxes=scaled, masks=None)
        masks, iou = who.sam.mask_decoder(
            image_embeddings=embedding,
            image_pe=who.sam.prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=who.convention.multimask,
        )
        best = masks[:, int(iou.argmax())][:, None]
        found.append(who.convention.mask(best.float(), who.size, height, width))
    return torch.cat(found).amax(0, keepdim=True)


def record(file: Path = RECORD) -> dict[str, object]:
    """The recorded answer: the weights' SHA-256 and the logits at every `STEP`-th pixel.

    Raises:
        UserError: the file is missing or damaged.
    """
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        return {"sha256": found["sha256"], "logits": torch.tensor(found["logits"])}
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{file} is missing or damaged: restore it, it is part of the project") from None


def write_record(who: Teacher, file: Path = RECORD) -> None:
    """Record a teacher's answer, as the package computes it."""
    image, mask = drawn_chest()
    answer = by_the_package(who, image, boxes_from_masks(mask)[0])[0, 0, ::STEP, ::STEP]
    rows = [[round(value, 5) for value in row] for row in answer.tolist()]
    about = {"teacher": who.name, "sha256": who.sha256, "picture": "fmfl.teachers.known_answer.drawn_chest"}
    lines = ",\n  ".join(json.dumps(row) for row in rows)
    text = json.dumps(about | {"every": STEP, "logits": []}, indent=1).replace("[]", f"[\n  {lines}\n ]")
    file.write_text(text + "\n", encoding="utf-8")


def _checksum(who: Teacher) -> tuple[str, str, str]:
    """What the weights' checksum should be, what it is, and whether it holds."""
    known = record()["sha256"] if who.name == "builtin" else checkpoints.PUBLISHED[who.name].sha256
    found = f"{who.sha256[:16]}..."
    if not known:
        return "none is published", found, UNKNOWN
    # Weights of one's own are no mistake: then nothing more is known of them.
    return f"{str(known)[:16]}...", found, "yes" if who.sha256 == known else UNKNOWN


def checks(who: Teacher) -> pd.DataFrame:
    """What can be known of a loaded teacher: what is expected, what was found, and whether it holds.

    Asked in float32 and without counting the calls.

    Returns:
        One row a check; `holds` is "yes", "no" where an answer is wrong, or "not known" where these
        weights are others than the shipped or the published ones.
    """
    asked = replace(who, precision="float32")
    near = TOLERANCE.get(who.device.type, 0.1)
    image, mask = drawn_chest()
    boxes = boxes_from_masks(mask)
    both, *singles = asked.answers(image, [boxes, *boxes[0].split(1)])
    one_by_one = torch.cat(singles).amax(0, keepdim=True)

    def distance(one: Tensor, other: Tensor) -> tuple[str, str, str]:
        one, other = one.cpu(), other.cpu()
        apart = float((one - other).abs().masked_fill(one == other, 0).max())  # where both are infinite
        return f"apart by at most {near:g}", f"{apart:.1g}", "yes" if apart <= near else "no"

    recorded = ("none of these weights", "", UNKNOWN)
    if who.name == "builtin" and who.sha256 == record()["sha256"] and not who.noise:
        recorded = distance(both[0, 0, ::STEP, ::STEP], record()["logits"])
    passed_over = len(who.fit.problems)
    dice = float(metrics.dice(both.cpu() > 0, mask))
    rows = {
        "SHA-256 of the weights": _checksum(who),
        "keys that were passed over": ("0", str(passed_over), UNKNOWN if passed_over else "yes"),
        "the recorded logits": recorded,
        "the package, box by box": distance(both, by_the_package(asked, image, boxes[0])),
        "two boxes at once and one by one": distance(both, one_by_one),
        "Dice on the drawn lungs": ("above 0.5", f"{dice:.3f}", "yes" if dice > 0.5 else UNKNOWN),
    }
    return pd.DataFrame.from_dict(rows, orient="index", columns=["expected", "found", "holds"])


if __name__ == "__main__":
    write_record(teacher.load())
    sys.stdout.write(f"{RECORD.name} written\n")

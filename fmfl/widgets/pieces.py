"""The notebooks' interactive pieces, one function each: what they show is computed by the science."""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from itertools import combinations

import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.func import grad_and_value, vmap

from fmfl import losses, metrics, split
from fmfl.analysis import plots
from fmfl.data import Cohort
from fmfl.errors import UserError
from fmfl.states import State
from fmfl.teacher import Teacher
from fmfl.widgets.live import Choice, Piece, Range, Slider, Steps


def dealing(
    table: pd.DataFrame, indices: Tensor, scheme: str = "age", *, num_clients: int = 3, seed: int = 0
) -> Piece:
    """Return a piece that deals images to clients again: by another rule, strength, number or draw.

    Args:
        table: a Cohort's table.
        indices: the images to deal.
        scheme: the rule to begin with.
        num_clients: to begin with.
        seed: of the draw to begin with.
    """
    controls = {
        "scheme": Choice("Split", scheme, {name: name for name in ("iid", "age", "quantity")}),
        "strength": Slider("Age strength", 1.0, 0.0, 1.0, 0.05),
        "ratio": Slider("Quantity ratio", 9.0, 1.0, 20.0, 0.5),
        "num_clients": Slider("Clients", num_clients, 1, max(10, num_clients)),
        "seed": Slider("Seed of the draw", seed, 0, max(20, seed)),
    }

    def draw(scheme: str, strength: float, ratio: float, num_clients: int, seed: int) -> tuple[Figure, str]:
        options = {"age": {"strength": strength}, "quantity": {"ratio": ratio}}.get(scheme, {})
        clients = split.partition(table, indices, scheme, num_clients, seed, **options)
        words = _of_skew(scheme, split.skew(table, clients))
        return plots.clients(table, clients, title=words), f"{words}; images: {_sizes(clients)}"

    return Piece(draw, controls)


def _of_skew(scheme: str, skew: dict[str, float]) -> str:
    """Tell a split's measures in a line."""
    years = skew["wasserstein_mean"]
    ages = "nothing to compare" if math.isnan(years) else f"ages {years:.0f} years apart"
    return f"{scheme}: {ages}, sizes {skew['size_ratio']:.1f} : 1"


def _sizes(clients: Sequence[Tensor]) -> str:
    return ", ".join(str(len(indices)) for indices in clients)


def prompting(teacher: Teacher, image: Tensor, mask: Tensor, boxes: Tensor) -> Piece:
    """Return a piece that moves the teacher's boxes on one image, by sliders or by dragging.

    Pressed inside a box, a pointer carries it along; elsewhere it draws the nearest box anew. The image is
    encoded once, at the first answer.

    Args:
        teacher: who answers.
        image: [1, H, W] uint8.
        mask: the ground truth, likewise.
        boxes: [4] or [n, 4] to begin with, x0 y0 x1 y1 in pixels; a row of NaN is no box.
    """
    height, width = image.shape[-2:]
    begin = [box.tolist() for box in boxes.reshape(-1, 4).float() if not box.isnan().any()]
    ask = cache(lambda: teacher.encoded(image[None]))
    controls = {}
    for number, (x0, y0, x1, y1) in enumerate(begin, 1):
        name = f"Box {number}" if len(begin) > 1 else "Box"
        controls[f"x{number}"] = Range(f"{name}, left/right", (x0, x1), 0.0, width - 1.0)
        controls[f"y{number}"] = Range(f"{name}, top/bottom", (y0, y1), 0.0, height - 1.0)

    def draw(**sides: tuple[float, float]) -> tuple[Figure, str]:
        moved = torch.tensor(_boxes(sides))
        answer = ask()(moved[None])[0].to(mask.device) > 0
        dice = float(metrics.dice(answer[None], mask[None])[0])
        figure = plots.boxes(image, moved, teacher_mask=answer, mask=mask)
        where = "; ".join(f"from ({a:.0f}, {b:.0f}) to ({c:.0f}, {d:.0f})" for a, b, c, d in moved.tolist())
        return figure, f"teacher's Dice {dice:.3f} with a box {where.replace('; ', ' and one ')}"

    return Piece(draw, controls, drag=partial(_drag_box, width, height))


def _boxes(sides: Mapping[str, tuple[float, float]]) -> list[list[float]]:
    """Return x0 y0 x1 y1 of each box, from its sides by name."""
    pairs = [(sides[f"x{number}"], sides[f"y{number}"]) for number in range(1, 1 + len(sides) // 2)]
    return [[x0, y0, x1, y1] for (x0, x1), (y0, y1) in pairs]


def _drag_box(
    width: int, height: int, sides: dict, start: tuple[float, float], end: tuple[float, float]
) -> dict[str, tuple[float, float]]:
    """Return the moved sides of the box that a pointer was pressed in, or of the nearest one, drawn anew."""
    # The axes begin half a pixel before the first pixel's centre.
    (u0, v0), (u1, v1) = (
        (min(max(x * width - 0.5, 0), width - 1), min(max(y * height - 0.5, 0), height - 1))
        for x, y in (start, end)
    )
    boxes = dict(enumerate(_boxes(sides), 1))
    inside = [k for k, (x0, y0, x1, y1) in boxes.items() if x0 <= u0 <= x1 and y0 <= v0 <= y1]
    nearest = min(boxes, key=lambda k: math.dist((u0, v0), _middle(boxes[k])))
    if not inside:
        across, down = sorted((u0, u1)), sorted((v0, v1))
        return {f"x{nearest}": _whole(*across), f"y{nearest}": _whole(*down)}
    x0, y0, x1, y1 = boxes[inside[0]]
    right, down = (
        min(max(u1 - u0, -x0), width - 1 - x1),
        min(max(v1 - v0, -y0), height - 1 - y1),
    )
    return {f"x{inside[0]}": _whole(x0 + right, x1 + right), f"y{inside[0]}": _whole(y0 + down, y1 + down)}


def _middle(box: Sequence[float]) -> tuple[float, float]:
    return (box[0] + box[2]) / 2, (box[1] + box[3]) / 2


def _whole(low: float, high: float) -> tuple[float, float]:
    return float(round(low)), float(round(high))


def losing(
    images: Tensor, masks: Tensor, logits: Tensor, teacher_logits: Tensor, *, alpha: float, temperature: float
) -> Piece:
    """Return a piece that takes the loss of one picture apart, pixel by pixel.

    Args:
        images: [B, 1, H, W], 0..1, to choose from.
        masks: the ground truth, likewise.
        logits: the student's, likewise.
        teacher_logits: the teacher's, likewise.
        alpha: the teacher's share in Eq. 5 to begin with.
        temperature: of both masks in Eq. 4 to begin with.
    """
    controls = {
        "alpha": Slider("Teacher's share (alpha)", alpha, 0.0, 1.0, 0.05),
        "temperature": Slider("Temperature", temperature, 0.5, max(10.0, temperature), 0.5),
        "number": Slider("Picture", 0, 0, len(images) - 1),
    }
    stored = [tensor.detach() for tensor in (images, masks, logits, teacher_logits)]

    def draw(alpha: float, temperature: float, number: int) -> tuple[Figure, str]:
        image, mask, student, teacher = (tensor[number : number + 1] for tensor in stored)
        gradient, loss = grad_and_value(losses.distillation_loss)(student, teacher, mask, alpha, temperature)
        each_pixel = vmap(losses.kl_divergence, in_dims=(0, 0, None))
        far = each_pixel(student.flatten(), teacher.flatten(), temperature).reshape(student.shape)
        dice_loss = losses.dice_loss(student, mask)
        figure = plots.loss_by_pixel(image, mask, student > 0, far, -gradient)
        terms = f"{alpha:.2f} * {far.mean():.4f} + {1 - alpha:.2f} * {dice_loss:.4f}"
        return figure, f"loss of picture {number}: {terms} = {loss:.4f}"

    return Piece(draw, controls)


def rounds(
    one_round: Callable[[State, int], State],
    states: Sequence[State],
    look: Callable[[State], Tensor],
    masks: Tensor,
    *,
    num_rounds: int = 40,
) -> Piece:
    """Return a piece that steps, runs and pauses rounds, and shows what the global model sees after each.

    A round is computed when it is first asked for, and its picture is kept. States of rounds are not.

    Args:
        one_round: from the global state and a round's number, from 1, to the next global state.
        states: of the rounds 0, 1, ... that are there already.
        look: from a state to logits [n, 1, H, W] of test images, the first of which is shown.
        masks: the ground truth of these, likewise.
        num_rounds: the last round that can be asked for.
    """
    pictures, dice, last = [], [], states[0]

    def add(state: State) -> None:
        nonlocal last
        last, logits = state, look(state)
        pictures.append(logits[0].sigmoid())
        dice.append(float(metrics.dice(logits > 0, masks).mean()))

    for state in states:
        add(state)

    def draw(number: int) -> tuple[Figure, str]:
        while len(pictures) <= number:
            add(one_round(last, len(pictures)))
        figure = plots.round_by_round(pictures[number], masks[0], dice[: number + 1])
        return figure, f"after round {number}: mean Dice {dice[number]:.3f} on {len(masks)} test images"

    return Piece(draw, {"number": Steps("Round", num_rounds, len(states) - 1)})


def cases(
    cohort: Cohort, scores: pd.DataFrame, makers: Mapping[str, Callable[[Tensor], Tensor]], note: str = ""
) -> Piece:
    """Return a piece that leafs through test images, the worst first, or those on which two starts differ.

    A maker that is refused is left out, and its reason is told.

    Args:
        cohort: the images.
        scores: final Dice, 0..1: a row an image, indexed by its row in the cohort; a column a start.
        makers: from rows of the cohort, [1] int64, to masks [1, 1, H, W], by name; asked once an image.
        note: what is missing, and why.
    """
    if scores.empty:
        return Piece(_no_scores, {})
    orders = {f"Dice of {init}, lowest first": scores[init] for init in scores}
    for one, other in combinations(scores, 2):
        orders[f"{one} and {other}, furthest apart first"] = -(scores[one] - scores[other]).abs()
    controls = {
        "order": Choice("Sorted by", next(iter(orders)), {name: name for name in orders}),
        "place": Slider("Place", 1, 1, len(scores)),
    }
    ask = cache(lambda row: _masks(makers, torch.tensor([row], device=cohort.images.device)))

    def draw(order: str, place: int) -> tuple[Figure, str]:
        row = int(orders[order].sort_values(kind="stable").index[place - 1])
        image, mask, about = cohort.images[row], cohort.masks[row], cohort.table.iloc[row]
        masks, refused = ask(row)
        dice = {name: float(metrics.dice(made, mask[None])[0]) for name, made in masks.items()}
        shown = {f"{name}\nDice {dice[name]:.3f}": made[0] for name, made in masks.items()}
        age = "age unknown" if pd.isna(about.age) else f"{about.age:g} years"
        told = [f"{about.image_id}, {about.site}, {age}", *(f"{k}: Dice {v:.3f}" for k, v in dice.items())]
        words = "; ".join([*told, *filter(None, [note, *refused])])
        return plots.predictions(image, mask, shown or {"ground truth alone": mask}), words

    return Piece(draw, controls)


def _no_scores() -> tuple[Figure, str]:
    raise UserError("no federated run has scored a test image of this cohort")


def _masks(
    makers: Mapping[str, Callable[[Tensor], Tensor]], rows: Tensor
) -> tuple[dict[str, Tensor], list[str]]:
    """Return the masks by their makers' names, and the sentences of those that are refused."""
    masks, refused = {}, []
    for name, make in makers.items():
        try:
            masks[name] = make(rows)
        except UserError as error:
            refused.append(f"without {name}: {error}")
    return masks, refused

"""Lessons of the experiments: images that a start learns from, with masks or a teacher's answers."""

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from fmfl import data, distill, errors, metrics, prompts, seeds, states, teacher
from fmfl.data import Cohort
from fmfl.errors import UserError
from fmfl.teachers.checkpoints import sha256_of
from fmfl.train import Examples

#: Lessons of masks alone: those of the proxy set, these and the shipped teacher's corpus, and these and the
#: corpus without Montgomery's images, whose masks leave the heart out.
SUPERVISED = ("own_masks", "corpus_masks", "guangzhou_masks")

#: The shipped teacher, and four others of 1,200 steps each: on the shipped one's corpus, on Montgomery's
#: images in it, on synthetic X-rays, and on drawn kidneys.
TAUGHT = ("shipped", "corpus", "montgomery", "synthetic", "kidneys")

NAMES = SUPERVISED + TAUGHT


class Material(NamedTuple):
    """Folders of the images that the shipped teacher learned from, and of other teachers' weights."""

    corpus: str
    teachers: Path


class Lesson(NamedTuple):
    """Images to learn from.

    Attributes:
        examples: with masks, and with a teacher's logits where there is one.
        num_proxy: images of the proxy set.
        key: names all that the teacher's logits depend on.
        teacher_dice: mean Dice of the teacher's answers on the proxy set; None without a teacher.
    """

    examples: Examples
    num_proxy: int
    key: str = ""
    teacher_dice: float | None = None

    def epochs(self, over_proxy: int) -> int:
        """Number of epochs that shows about as many images as `over_proxy` over the whole proxy set."""
        return distill.epochs_for_equal_steps(over_proxy, self.num_proxy, len(self.examples))


def init_of(name: str) -> str:
    """Return the name of the initial state that a lesson makes."""
    return "pretraining" if name in SUPERVISED else "fm"


def exact(cohort: Cohort, rows: Tensor) -> Lesson:
    """Return images with all masks and the shipped teacher's answers to exact boxes; rows are [n] int64."""
    boxes = prompts.prompt(cohort.masks[rows], "ground_truth", per_image="per_lung")
    return _answered(cohort, rows, teacher.load("builtin"), boxes, "builtin, ground_truth, per_lung")


def named(
    name: str, cohort: Cohort, proxy: Tensor, labelled: int | None, seed: int, material: Material
) -> Lesson:
    """Return a lesson of `NAMES`; the seed chooses the images that keep their masks, as in a study.

    A teacher answers to sloppy boxes, a lung each; its answer is the mask of the images without one.

    Args:
        name: of the lesson.
        cohort: the study's images.
        proxy: rows of the proxy set, [n] int64.
        labelled: number of proxy images with a mask; None for all.
        seed: of the choice.
        material: where the corpus and the other teachers lie.
    """
    known = proxy[_first(len(proxy), labelled, seed)]
    if name == "own_masks":
        return Lesson(Examples(cohort.images, cohort.masks, known), len(proxy))
    if name in SUPERVISED:
        corpus = _corpus(material, cohort)
        wanted = (corpus.table.site != "montgomery") | (name == "corpus_masks")
        return Lesson(_beside(cohort, known, corpus, torch.tensor(wanted.to_numpy())), len(proxy))
    file = teacher.default_file("builtin") if name == "shipped" else material.teachers / f"{name}.safetensors"
    boxes = prompts.prompt(cohort.masks[proxy], "ground_truth_jitter", per_image="per_lung")
    about = f"{sha256_of(file)}, ground_truth_jitter, per_lung"
    lesson = _answered(cohort, proxy, teacher.load("builtin", file), boxes, about)
    masks = cohort.masks.clone()
    masks[proxy] = (lesson.examples.teacher_logits > 0).to(masks.dtype)
    masks[known] = cohort.masks[known]
    examples = Examples(cohort.images, masks, proxy, lesson.examples.teacher_logits)
    return lesson._replace(examples=examples)


def _first(number: int, labelled: int | None, seed: int) -> Tensor:
    """Choose images by the seed, [number] bool; a smaller budget's are among a larger one's."""
    order = torch.randperm(number, generator=seeds.generator(seed, seeds.LABELS))
    return order.argsort() < (number if labelled is None else labelled)


def _answered(cohort: Cohort, rows: Tensor, model: teacher.Teacher, boxes: Tensor, about: str) -> Lesson:
    """Ask a teacher about images with true masks; the key has words about it and its answers' digest."""
    logits = teacher.cached_logits(model, cohort.images[rows], boxes, progress=False).logits
    dice = metrics.dice(logits > 0, cohort.masks[rows]).mean().item()
    key = f"{about}: {states.tensor_digest(logits)}"
    return Lesson(Examples(cohort.images, cohort.masks, rows, logits), len(rows), key, round(dice, 5))


def _corpus(material: Material, cohort: Cohort) -> Cohort:
    """Read the images that the shipped teacher learned from, at the cohort's size."""
    corpus = data.load(material.corpus, size=cohort.images.shape[-1], progress=False)
    shared = set(corpus.table.patient_id) & set(cohort.table.patient_id)
    if shared:
        raise UserError(
            f"--corpus {material.corpus} and the study's images share {len(shared)} patients, such as "
            f"{errors.first_few(sorted(shared))}: take a corpus of other people"
        )
    return corpus


def _beside(cohort: Cohort, known: Tensor, corpus: Cohort, wanted: Tensor) -> Examples:
    """Join chosen images of a corpus, [n] bool, with chosen images of a cohort, [m] int64."""
    images, masks = torch.cat([cohort.images, corpus.images]), torch.cat([cohort.masks, corpus.masks])
    added = len(cohort.images) + wanted.nonzero().flatten()
    return Examples(images, masks, torch.cat([known, added]))

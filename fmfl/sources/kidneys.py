"""A second organ, drawn: synthetic slices through the abdomen with exact masks of the kidneys.

It stands for somebody's own folder: `write` leaves images/, masks/ and metadata.csv, and no ages. A slice
shows what makes kidneys hard to find. Liver, spleen and muscle lie beside them and are about as bright, in
thin people without fat between. One slice in five shows one kidney alone. Sizes, tilts, cysts and shrunken
kidneys vary by patient; contrast medium, blur and noise vary by hospital.

Coordinates: x grows to the picture's right (the patient's left), y downwards to the spine, and the picture
reaches from -1 to 1 on both axes. Values are grey levels between air, 0, and dense bone, 1. Proportions are
set by eye and are not measurements of people.
"""

import csv
import itertools
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import cos, pi, sin
from pathlib import Path

import numpy as np
from numpy.random import Generator, default_rng
from numpy.typing import NDArray
from PIL import Image
from scipy.ndimage import gaussian_filter

from fmfl.errors import UserError

Array = NDArray[np.float64]

COLUMNS = ("image_id", "patient_id", "sex", "finding", "site", "licence")
FINDINGS = ("normal", "cyst", "shrunken kidney", "one kidney")
LICENCE = "CC BY 4.0"
FAT, MUSCLE, LIVER, SPLEEN, BONE, AIR = 0.16, 0.46, 0.53, 0.52, 0.92, 0.02


@dataclass(frozen=True, kw_only=True)
class Site:
    """Typical properties of one hospital's slices."""

    name: str
    share: float  # of all patients
    medium: tuple[float, float]  # how much contrast medium has reached the kidneys: from, to
    width: float  # of the display window; small is hard contrast
    blur: float  # in 256ths of the picture
    noise: float  # standard deviation of the grey levels
    grain: float  # size of the noise's grains, in 256ths of the picture
    side: int  # pixels of a stored picture


SITES = (
    Site(name="harbour", share=0.4, medium=(0.6, 1), width=0.8, blur=0.8, noise=0.04, grain=0.8, side=256),
    Site(name="hill", share=0.35, medium=(0.1, 0.7), width=1.0, blur=1.5, noise=0.03, grain=1.4, side=320),
    Site(name="river", share=0.25, medium=(0, 0.3), width=0.7, blur=1.0, noise=0.07, grain=1.0, side=192),
)


@dataclass(frozen=True, kw_only=True)
class Patient:
    """Anatomy of one person, which all of their slices share."""

    number: int
    site: Site
    sex: str
    finding: str
    fat: float  # 0.02 thin .. 0.12
    body: tuple[float, float]  # half-axes
    medium: float  # in the kidneys, 0..1
    kidneys: tuple[tuple[float, float, float, float], ...]  # of each side: size, height, tilt, level
    seed: tuple[int, ...]


def _draw_patient(seed: int, number: int) -> Patient:
    rng = default_rng([seed, 11, number])
    site = SITES[rng.choice(len(SITES), p=[site.share for site in SITES])]
    finding = FINDINGS[rng.choice(len(FINDINGS), p=(0.6, 0.22, 0.12, 0.06))]
    fat = float(rng.uniform(0.02, 0.12))
    kidneys = [
        (rng.normal(0.165, 0.017), rng.normal(0.12, 0.04), rng.normal(0.5, 0.2), rng.normal(0, 0.35))
        for _ in range(2)
    ]
    changed = int(rng.integers(2))
    if finding == "shrunken kidney":
        kidneys[changed] = (0.6 * kidneys[changed][0], *kidneys[changed][1:])
    if finding == "one kidney":  # the other one grows
        kidneys[changed] = (0.0, *kidneys[changed][1:])
        kidneys[1 - changed] = (1.15 * kidneys[1 - changed][0], *kidneys[1 - changed][1:])
    return Patient(
        number=number,
        site=site,
        sex="F" if rng.random() < 0.5 else "M",
        finding=finding,
        fat=fat,
        body=(rng.uniform(0.8, 0.93), rng.uniform(0.6, 0.72)),
        medium=float(rng.uniform(*site.medium)),
        kidneys=tuple(tuple(map(float, kidney)) for kidney in kidneys),
        seed=(seed, 12, number),
    )


class _Picture:
    """A picture while it is painted; shapes are ellipses with uneven outlines.

    Attributes:
        centres: coordinates of the pixels' centres along a side.
        x, y: the same of each pixel, [H, W].
        values: grey levels.
    """

    def __init__(self, side: int) -> None:
        self.centres = (np.arange(side) + 0.5) * 2 / side - 1
        self.x, self.y = np.meshgrid(self.centres, self.centres)
        self.values = np.full((side, side), AIR)
        self.pixel = 2 / side

    def ellipse(
        self,
        centre: tuple[float, float],
        axes: tuple[float, float],
        tilt: float = 0.0,
        waves: Array | None = None,
    ) -> Array:
        """Return how far each pixel lies inside of an ellipse, in its coordinates (negative: outside).

        Args:
            tilt: of the first axis, in radians.
            waves: [k, 2] cosine and sine by which the outline swells, k = 2, 3, ... times a turn.
        """
        inside, reach = np.full(self.values.shape, -1.0), 1.5 * max(axes) + 0.1
        near = tuple(  # all that a shape and a rim round it may reach: the rest need not be computed
            slice(*np.searchsorted(self.centres, (middle - reach, middle + reach)))
            for middle in (centre[1], centre[0])
        )
        x, y = self.x[near] - centre[0], self.y[near] - centre[1]
        along, across = cos(tilt) * x + sin(tilt) * y, cos(tilt) * y - sin(tilt) * x
        place = along / axes[0] + 1j * across / axes[1]
        radius, swell = np.abs(place), 1.0
        if waves is not None:
            turn = once = place / np.maximum(radius, 1e-9)
            for even, odd in waves:
                turn = turn * once
                swell = swell + even * turn.real + odd * turn.imag
        inside[near] = (swell - radius) * min(axes)
        return inside

    def cover(self, inside: Array) -> Array:
        """Return the share of each pixel that a shape covers, 0..1."""
        return np.clip(inside / self.pixel + 0.5, 0, 1)

    def paint(self, inside: Array, value: float | Array) -> None:
        """Lay a value over the inside of a shape."""
        share = self.cover(inside)
        self.values = self.values * (1 - share) + value * share


def _waves(rng: Generator, strength: float) -> Array:
    return rng.normal(0, strength, (3, 2))


def draw(patient: Patient, visit: int, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw one slice.

    Args:
        visit: number of the patient's slice; each lies at a level of its own.
        side: pixels a side.

    Returns:
        [H, W] uint8 image and [H, W] bool mask.
    """
    rng = default_rng([*patient.seed, visit])
    picture = _Picture(side)
    _paint_body(picture, patient, default_rng(patient.seed))
    _paint_organs(picture, patient, rng)
    mask = _paint_kidneys(picture, patient, rng)
    return _photographed(picture.values, patient.site, rng), mask


def _paint_body(picture: _Picture, patient: Patient, rng: Generator) -> None:
    """Paint skin, fat, the wall's muscles, and the spine with the muscles beside it."""
    (wide, high), waves = patient.body, _waves(rng, 0.01)
    for rim, value in ((0, MUSCLE), (0.012, FAT), (0.02 + patient.fat, MUSCLE), (0.06 + patient.fat, FAT)):
        picture.paint(picture.ellipse((0, 0), (wide - rim, high - rim), 0, waves), value)
    for sign in (-1, 1):
        picture.paint(picture.ellipse((0.2 * sign, 0.72 * high), (0.18, 0.1), 0, _waves(rng, 0.03)), MUSCLE)
        psoas = picture.ellipse((0.185 * sign, 0.42 * high), (0.085, 0.11), 0.2 * sign, _waves(rng, 0.03))
        picture.paint(psoas, MUSCLE + rng.normal(0, 0.01))
    vertebra = picture.ellipse((0, 0.46 * high), (0.14, 0.115), 0, _waves(rng, 0.02))
    picture.paint(vertebra, BONE)
    picture.paint(vertebra - 0.025, 0.68 + rng.normal(0, 0.03))  # spongy inside the shell
    picture.paint(picture.ellipse((0, 0.72 * high), (0.022, 0.15)), BONE)
    picture.paint(picture.ellipse((0, 0.645 * high), (0.045, 0.035)), 0.4)


def _paint_organs(picture: _Picture, patient: Patient, rng: Generator) -> None:
    """Paint liver, spleen, great vessels and bowel: about as bright as kidneys, and next to them."""
    wide, high = patient.body[0] - patient.fat, patient.body[1] - patient.fat
    bright = 0.05 * patient.medium
    liver = ((-0.56 * wide, -0.22 * high), (0.34 * wide, rng.uniform(0.45, 0.6) * high))
    picture.paint(picture.ellipse(*liver, rng.normal(0, 0.15), _waves(rng, 0.05)), LIVER + bright)
    spleen = ((0.72 * wide, rng.normal(-0.05, 0.08) * high), (0.13, rng.uniform(0.16, 0.3)))
    picture.paint(picture.ellipse(*spleen, rng.normal(-0.2, 0.1), _waves(rng, 0.05)), SPLEEN + bright)
    vessel = 0.5 + 0.3 * patient.medium
    picture.paint(picture.ellipse((0.05, 0.24 * high), (0.045, 0.045)), vessel)
    picture.paint(picture.ellipse((-0.08, 0.22 * high), (0.06, 0.04), 0, _waves(rng, 0.05)), vessel - 0.08)
    for _ in range(int(rng.integers(6, 12))):
        centre = rng.uniform(-0.2, 0.62) * wide, rng.uniform(-0.7, -0.05) * high
        loop = picture.ellipse(
            centre, tuple(rng.uniform(0.05, 0.12, 2)), rng.uniform(0, pi), _waves(rng, 0.06)
        )
        picture.paint(loop, 0.46)
        picture.paint(loop - 0.015, rng.choice([0.4, 0.48, 0.75, AIR], p=[0.45, 0.25, 0.15, 0.15]))


def _paint_kidneys(picture: _Picture, patient: Patient, rng: Generator) -> np.ndarray:
    """Paint the kidneys that this slice meets, at least one, and return their mask."""
    level = rng.uniform(-0.75, 0.75)
    # A kidney is as long as 2 of level; a slice near its pole shows it small, or not at all.
    sizes = [size * np.sqrt(max(0.0, 1 - (level - own) ** 2)) for size, _, _, own in patient.kidneys]
    sizes = [size if size > 0.06 else 0.0 for size in sizes]
    if not any(sizes):
        sizes = [0.8 * size for size, *_ in patient.kidneys]
    mask = np.zeros(picture.values.shape, bool)
    for sign, size, (_, height, tilt, own) in zip((-1, 1), sizes, patient.kidneys, strict=True):
        if size:
            place = sign * (0.36 + 0.55 * patient.fat + rng.normal(0, 0.02)), height + rng.normal(0, 0.02)
            mask |= _paint_kidney(picture, patient, rng, place, size, sign * tilt, abs(level - own) < 0.6)
    return mask


def _paint_kidney(
    picture: _Picture,
    patient: Patient,
    rng: Generator,
    place: tuple[float, float],
    size: float,
    tilt: float,
    open_hilum: bool,
) -> np.ndarray:
    """Paint a kidney with its fat, cortex, pyramids, sinus and a cyst, and return its mask."""
    axes = size * rng.uniform(0.78, 0.9), size * rng.uniform(1.05, 1.25)
    body = picture.ellipse(place, axes, tilt, _waves(rng, 0.03))
    picture.paint(body + 0.35 * patient.fat, FAT)
    cortex = 0.49 + 0.27 * patient.medium + rng.normal(0, 0.01)
    angle = np.arctan2(picture.y - place[1], picture.x - place[0])
    pyramids = 0.5 + 0.5 * np.cos(rng.integers(6, 9) * angle + rng.uniform(0, 2 * pi))
    deep = np.clip((body - 0.25 * size) / (0.1 * size), 0, 1)
    picture.paint(body, cortex - (0.03 + 0.12 * patient.medium) * deep * pyramids)
    if patient.finding == "cyst":  # it counts as kidney, as annotators draw it
        turn = rng.uniform(0, 2 * pi)
        centre = place[0] + 0.75 * axes[0] * cos(turn), place[1] + 0.75 * axes[1] * sin(turn)
        cyst = picture.ellipse(centre, (rng.uniform(0.3, 0.6) * size,) * 2, 0, _waves(rng, 0.02))
        picture.paint(cyst, 0.33)
        body = np.maximum(body, cyst)
    if open_hilum:  # the sinus opens towards the spine
        inward = -np.sign(place[0])
        centre = place[0] + 0.8 * inward * axes[0], place[1] - 0.25 * axes[1]
        sinus = picture.ellipse(centre, (0.75 * axes[0], 0.3 * axes[1]), -0.3 * inward, _waves(rng, 0.05))
        picture.paint(sinus, FAT)
        picture.paint(sinus - 0.16 * size, 0.36 + 0.4 * patient.medium * rng.random())
        body = np.minimum(body, -sinus)
    return picture.cover(body) > 0.5


def _photographed(values: Array, site: Site, rng: Generator) -> np.ndarray:
    """Return the picture as a site's machine shows it, [H, W] uint8: texture, blur, noise and window."""
    scale = len(values) / 256
    tissue = (values > 0.3) & (values < 0.85)
    texture = gaussian_filter(rng.standard_normal(values.shape), 3 * scale)
    values = values + 0.015 * texture / texture.std() * tissue
    grains = gaussian_filter(rng.standard_normal(values.shape), site.grain * scale)
    values = gaussian_filter(values, site.blur * scale) + site.noise * grains / grains.std()
    middle = 0.45 + rng.normal(0, 0.02)
    shown = (values - middle) / (site.width * rng.uniform(0.92, 1.08)) + 0.5
    return np.clip(255 * shown, 0, 255).round().astype(np.uint8)


#: [H, W] uint8 image, [H, W] bool mask and a row of the table.
Slice = tuple[np.ndarray, np.ndarray, dict[str, str]]


def generate(number: int, seed: int = 0) -> Iterator[Slice]:
    """Draw slices one by one, so that thousands take no more memory than one.

    A patient has one to three slices. The first slices of a longer list are those of a shorter one.
    """
    return itertools.islice(_slices(seed), number)


def _slices(seed: int) -> Iterator[Slice]:
    """Draw slices without end, patient by patient."""
    numbers = itertools.count()
    for count in itertools.count():
        patient = _draw_patient(seed, count)
        for visit in range(1 + int(default_rng([*patient.seed, 99]).integers(3))):
            image, mask = draw(patient, visit, patient.site.side)
            about = (
                f"k{next(numbers):04}",
                f"K{count:04}",
                patient.sex,
                patient.finding,
                patient.site.name,
                LICENCE,
            )
            yield image, mask, dict(zip(COLUMNS, about, strict=True))


def write(folder: str | Path, number: int = 120, seed: int = 0) -> Path:
    """Write a folder of slices: images/, masks/ (0 and 255) and metadata.csv, without ages.

    Returns:
        The folder. It is there whole or not at all.

    Raises:
        UserError: the folder is there already, or the number is below 1.
    """
    folder = Path(folder)
    if number < 1:
        raise UserError(f"the number of images is {number}: give at least 1")
    if folder.exists():
        raise UserError(f"{folder}: is there already; name a new folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        _write_files(made, generate(number, seed))
        made.chmod(0o755)
        made.rename(folder)
    finally:
        shutil.rmtree(made, ignore_errors=True)
    return folder


def _write_files(folder: Path, slices: Iterable[Slice]) -> None:
    for name in ("images", "masks"):
        (folder / name).mkdir()
    with (folder / "metadata.csv").open("w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, COLUMNS)
        table.writeheader()
        for image, mask, about in slices:
            Image.fromarray(image).save(folder / "images" / f"{about['image_id']}.png")
            Image.fromarray(mask.astype(np.uint8) * 255).save(folder / "masks" / f"{about['image_id']}.png")
            table.writerow(about)
